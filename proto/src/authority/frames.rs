//! One connection's frames (HTTP/2, RFC 9113): finds the header blocks and puts the rewritten ones
//! in their place.
//!
//! ```text
//! preface ─► frame ─┬─► HEADERS ─► held, with its CONTINUATION frames, to END_HEADERS ─► rewritten ─┐
//!            ▲      └─► any other: passes                                                           │
//!            └──────────────────────────────────────────────────────────────────────────────────────┘
//! not HTTP/2, not HPACK, a block that is too large: everything passes from there on, what was held first
//! ```
//!
//! # What always holds
//!
//! - **The frames stay**: as many, of the same kind, stream and flags, with their padding and
//!   priority. Only fragments of blocks become shorter.
//! - **What is held is bounded**: [`MAX_HELD_BYTES`]. Nothing is held but the preface, the beginning of a
//!   frame, and a block that has not ended; the server could do nothing with them yet.

use std::ops::Range;

use bytes::BytesMut;

use super::fields::{Fields, Malformed};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD_BYTES: usize = 9;

const HEADERS: u8 = 0x1;
const CONTINUATION: u8 = 0x9;

const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The stream and the weight that a HEADERS frame may name.
const PRIORITY_BYTES: usize = 5;

/// More than h2 takes of one block: HEADERS and at most 6 CONTINUATION frames of 16 KiB.
const MAX_HELD_BYTES: usize = 128 << 10;

/// Where a connection is.
#[derive(Debug)]
enum State {
    /// The preface is held until it is complete.
    Preface,
    /// A frame begins at this byte of what is held.
    Frame(usize),
    /// So many bytes of a frame's payload pass.
    Payload(usize),
    /// Everything passes.
    Raw,
}

/// A frame's first 9 bytes.
struct Head {
    length: usize,
    kind: u8,
    flags: u8,
    stream: [u8; 4],
}

impl Head {
    fn read(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, d, e, f, g, ..] = bytes else { return None };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        // The first bit is reserved.
        Some(Self { length, kind, flags, stream: [d & 0x7f, e, f, g] })
    }
}

/// A held frame of a block: where it is in what is held, and where its part of the block is.
#[derive(Debug)]
struct Part {
    frame: Range<usize>,
    fragment: Range<usize>,
}

/// What a client sends, made fit for the server.
#[derive(Debug)]
pub(super) struct Frames {
    state: State,
    held: Vec<u8>,
    parts: Vec<Part>,
    fields: Fields,
}

impl Frames {
    pub(super) fn new() -> Self {
        Self { state: State::Preface, held: vec![], parts: vec![], fields: Fields::new() }
    }

    /// How many bytes at the beginning of `input` the server gets as they are. What follows them goes to
    /// [`Frames::feed`].
    pub(super) fn pass(&mut self, input: &[u8]) -> usize {
        let mut at = 0;
        loop {
            let rest = &input[at..];
            match &mut self.state {
                State::Raw => return input.len(),
                State::Payload(left) => {
                    let now = rest.len().min(*left);
                    *left -= now;
                    at += now;
                    if *left > 0 {
                        return at;
                    }
                    self.state = State::Frame(0);
                }
                State::Frame(_) if self.held.is_empty() => match Head::read(rest) {
                    Some(head) if head.kind != HEADERS => {
                        at += HEAD_BYTES;
                        self.state = State::Payload(head.length);
                    }
                    _ => return at,
                },
                State::Preface | State::Frame(_) => return at,
            }
        }
    }

    /// Takes `input`, and puts what the server is to get now at the end of `out`.
    pub(super) fn feed(&mut self, mut input: &[u8], out: &mut BytesMut) {
        while !input.is_empty() {
            let passed = self.pass(input);
            out.extend_from_slice(&input[..passed]);
            input = &input[passed..];
            let take = self.wanted().saturating_sub(self.held.len()).min(input.len());
            self.held.extend_from_slice(&input[..take]);
            input = &input[take..];
            if self.decide(out).is_err() {
                self.state = State::Raw;
                self.end(out);
            }
        }
    }

    /// The client sends nothing more: what is held goes on as it is.
    pub(super) fn end(&mut self, out: &mut BytesMut) {
        out.extend_from_slice(&std::mem::take(&mut self.held));
        self.parts = vec![];
    }

    /// How much must be held before the next decision.
    fn wanted(&self) -> usize {
        match self.state {
            State::Preface => PREFACE.len(),
            State::Frame(start) => match Head::read(&self.held[start..]) {
                None => start + HEAD_BYTES,
                Some(head) => start + HEAD_BYTES + head.length,
            },
            State::Payload(_) | State::Raw => 0,
        }
    }

    fn decide(&mut self, out: &mut BytesMut) -> Result<(), Malformed> {
        match self.state {
            State::Preface if !PREFACE.starts_with(&self.held) => Err(Malformed),
            State::Preface if self.held.len() == PREFACE.len() => {
                self.end(out);
                self.state = State::Frame(0);
                Ok(())
            }
            State::Frame(start) => match Head::read(&self.held[start..]) {
                Some(head) => self.frame(start, &head, out),
                None => Ok(()),
            },
            State::Preface | State::Payload(_) | State::Raw => Ok(()),
        }
    }

    /// A frame whose head is held.
    fn frame(&mut self, start: usize, head: &Head, out: &mut BytesMut) -> Result<(), Malformed> {
        let end = start + HEAD_BYTES + head.length;
        if let Some(first) = self.parts.first() {
            // Nothing else may come before a block has ended.
            let block = Head::read(&self.held[first.frame.start..]).ok_or(Malformed)?;
            if head.kind != CONTINUATION || head.stream != block.stream {
                return Err(Malformed);
            }
        } else if head.kind != HEADERS {
            self.end(out);
            self.state = State::Payload(head.length);
            return Ok(());
        }
        if end > MAX_HELD_BYTES {
            return Err(Malformed);
        }
        if self.held.len() < end {
            return Ok(());
        }
        let fragment = self.fragment(start + HEAD_BYTES..end, head)?;
        self.parts.push(Part { frame: start..end, fragment });
        if head.flags & END_HEADERS == 0 {
            self.state = State::Frame(end);
            return Ok(());
        }
        self.block(out)?;
        self.state = State::Frame(0);
        Ok(())
    }

    /// Which part of a payload belongs to the block.
    fn fragment(&self, payload: Range<usize>, head: &Head) -> Result<Range<usize>, Malformed> {
        let Range { mut start, mut end } = payload;
        if head.kind == HEADERS && head.flags & PADDED != 0 {
            let padding = *self.held[start..end].first().ok_or(Malformed)?;
            start += 1;
            end = end.checked_sub(padding.into()).ok_or(Malformed)?;
        }
        if head.kind == HEADERS && head.flags & PRIORITY != 0 {
            start += PRIORITY_BYTES;
        }
        if start > end { Err(Malformed) } else { Ok(start..end) }
    }

    /// A block that is complete.
    fn block(&mut self, out: &mut BytesMut) -> Result<(), Malformed> {
        let fragments = self.parts.iter().map(|part| &self.held[part.fragment.clone()]);
        let rewritten = self.fields.rewrite(&fragments.collect::<Vec<_>>().concat())?;
        let mut rest = &rewritten[..];
        for Part { frame, fragment } in &self.parts {
            let (now, later) = rest.split_at(rest.len().min(fragment.len()));
            rest = later;
            let length = frame.len() - HEAD_BYTES - fragment.len() + now.len();
            let [_, length @ ..] = (length as u32).to_be_bytes();
            out.extend_from_slice(&length);
            out.extend_from_slice(&self.held[frame.start + length.len()..fragment.start]);
            out.extend_from_slice(now);
            out.extend_from_slice(&self.held[fragment.end..frame.end]);
        }
        self.held = vec![];
        self.parts.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
