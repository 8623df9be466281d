//! A gzip decoder ([RFC 1952](https://www.rfc-editor.org/rfc/rfc1952)) that can be put away in the
//! middle of a member and taken up by another process.
//!
//! ```text
//! member │ header │ block │ block │ block … │ CRC-32, size │
//!                         ▲ here, with the last 32 KiB that came out and the bits of the last
//!                           byte that the next block begins with
//! ```
//!
//! What zlib offers for it is used as its own example `zran.c` does: `Z_BLOCK` stops behind a block,
//! `inflatePrime` and `inflateSetDictionary` bring the bits and the window back. The library is
//! zlib-rs, by zlib's own interface, since no other way to it offers these. A member that was taken
//! up is raw to zlib, so that its end is checked here.

// zlib's interface is made of raw pointers: all calls of it are in this file.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int};

use libz_rs_sys as zlib;
use serde::{Deserialize, Serialize};

/// The largest window, as a power of two.
const WINDOW_BITS: c_int = 15;
const WINDOW_BYTES: usize = 1 << WINDOW_BITS;

/// Added to [`WINDOW_BITS`]: a gzip member with header and trailer.
const WRAPPED: c_int = 16;

/// Bits of `z_stream::data_type`: those of the last byte that are still to be read; the last block
/// has begun; a block has just ended.
const BITS: c_int = 63;
const LAST_BLOCK: c_int = 64;
const BEHIND_A_BLOCK: c_int = 128;

/// CRC-32 and size of what came out, both little-endian.
const TRAILER_BYTES: usize = 8;

/// Decodes one member.
pub(super) struct Gunzip {
    stream: Box<zlib::z_stream>,
    /// Over what came out. zlib has it, too, and does not tell.
    crc32: u32,
    /// Of what came out, modulo 2^32.
    size: u32,
    end: End,
}

/// Who reads the trailer.
enum End {
    Zlib,
    /// This, once the last block has ended: zlib was not told of the header.
    Own(Option<Vec<u8>>),
}

// SAFETY: the stream's memory is its own, and is used through `&mut` only.
unsafe impl Send for Gunzip {}

/// All that is needed to go on behind a block.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Midway {
    /// How many of the last byte's bits, 0 to 7, belong to what comes.
    bits: u8,
    last_byte: u8,
    /// The last bytes that came out, up to [`WINDOW_BYTES`], in hex.
    window: String,
    /// Over all that came out of the member so far.
    crc32: u32,
    /// Of all that came out of the member so far, modulo 2^32.
    size: u32,
}

/// What a call of [`Gunzip::step`] did.
pub(super) struct Stepped {
    pub(super) read: usize,
    pub(super) written: usize,
    /// The member has ended.
    pub(super) ended: bool,
}

impl Gunzip {
    pub(super) fn new() -> Result<Self, String> {
        Ok(Self { stream: stream(WINDOW_BITS + WRAPPED)?, crc32: 0, size: 0, end: End::Zlib })
    }

    /// Goes on from where another was put away.
    pub(super) fn take_up(midway: &Midway) -> Result<Self, String> {
        let Midway { bits, last_byte, window, crc32, size } = midway;
        let window = hex::decode(window).map_err(|e| format!("the window: {e}"))?;
        if *bits > 7 || window.len() > WINDOW_BYTES {
            return Err("not the state of a gzip decoder".to_owned());
        }
        let mut stream = stream(-WINDOW_BITS)?;
        let value = u16::from(*last_byte) >> (8 - bits);
        // SAFETY: `stream` was initialized for inflating, and `window` has the length that is given.
        let codes = unsafe {
            [
                zlib::inflatePrime(&raw mut *stream, c_int::from(*bits), c_int::from(value)),
                zlib::inflateSetDictionary(
                    &raw mut *stream,
                    window.as_ptr(),
                    window.len() as zlib::uInt,
                ),
            ]
        };
        match codes {
            [zlib::Z_OK, zlib::Z_OK] => {
                Ok(Self { stream, crc32: *crc32, size: *size, end: End::Own(None) })
            }
            _ => Err("no gzip decoder goes on from there".to_owned()),
        }
    }

    /// Decodes from `input` into `output`, until one of them is used up or the member ends; with
    /// `to_block` also where a block ends.
    pub(super) fn step(
        &mut self,
        input: &[u8],
        output: &mut [u8],
        to_block: bool,
    ) -> Result<Stepped, String> {
        if let End::Own(Some(trailer)) = &mut self.end {
            let read = input.len().min(TRAILER_BYTES - trailer.len());
            trailer.extend_from_slice(&input[..read]);
            let ended = trailer.len() == TRAILER_BYTES;
            if ended && *trailer != [self.crc32.to_le_bytes(), self.size.to_le_bytes()].concat() {
                return Err("gzip: incorrect data check".to_owned());
            }
            return Ok(Stepped { read, written: 0, ended });
        }
        let stream = &mut *self.stream;
        let room = |length: usize| zlib::uInt::try_from(length).unwrap_or(zlib::uInt::MAX);
        (stream.next_in, stream.avail_in) = (input.as_ptr(), room(input.len()));
        (stream.next_out, stream.avail_out) = (output.as_mut_ptr(), room(output.len()));
        let (before_in, before_out) = (stream.avail_in, stream.avail_out);
        let flush = if to_block { zlib::Z_BLOCK } else { zlib::Z_NO_FLUSH };
        // SAFETY: the stream was initialized for inflating; behind both pointers there are as many bytes
        // as is said, alive during the call, and behind it the stream forgets them.
        let code = unsafe { zlib::inflate(stream, flush) };
        let read = (before_in - stream.avail_in) as usize;
        let written = (before_out - stream.avail_out) as usize;
        (stream.next_in, stream.avail_in) = (std::ptr::null(), 0);
        (stream.next_out, stream.avail_out) = (std::ptr::null_mut(), 0);
        let mut ended = match code {
            zlib::Z_STREAM_END => true,
            // No progress with what there is: the caller sees it.
            zlib::Z_OK | zlib::Z_BUF_ERROR => false,
            _ => return Err(format!("gzip: {}", self.why(code))),
        };
        // SAFETY: so many bytes are at the start of `output`.
        let crc32 =
            unsafe { zlib::crc32(self.crc32.into(), output.as_ptr(), written as zlib::uInt) };
        self.crc32 = crc32 as u32;
        self.size = self.size.wrapping_add(written as u32);
        if let (true, End::Own(trailer)) = (ended, &mut self.end) {
            *trailer = Some(Vec::new());
            ended = false;
        }
        Ok(Stepped { read, written, ended })
    }

    /// What is needed to go on from here, where a block has just ended and another comes. `input` are the
    /// bytes read last.
    pub(super) fn midway(&mut self, input: &[u8]) -> Option<Midway> {
        let state = self.stream.data_type;
        let bits = u8::try_from(state & BITS).ok().filter(|bits| *bits < 8)?;
        if state & BEHIND_A_BLOCK == 0 || state & LAST_BLOCK != 0 {
            return None;
        }
        let mut window = vec![0; WINDOW_BYTES];
        let mut length = WINDOW_BYTES as zlib::uInt;
        // SAFETY: the stream was initialized for inflating, and a window is never larger than that.
        let code = unsafe {
            zlib::inflateGetDictionary(&raw mut *self.stream, window.as_mut_ptr(), &mut length)
        };
        if code != zlib::Z_OK {
            return None;
        }
        window.truncate(length as usize);
        let (window, last_byte) = (hex::encode(window), *input.last()?);
        Some(Midway { bits, last_byte, window, crc32: self.crc32, size: self.size })
    }

    fn why(&self, code: c_int) -> String {
        match self.stream.msg.is_null() {
            true => format!("code {code}"),
            // SAFETY: zlib's messages are constants, with a NUL behind them.
            false => unsafe { CStr::from_ptr(self.stream.msg) }.to_string_lossy().into_owned(),
        }
    }
}

impl Drop for Gunzip {
    fn drop(&mut self) {
        // SAFETY: the stream was initialized for inflating, and nobody uses it after this.
        unsafe { zlib::inflateEnd(&raw mut *self.stream) };
    }
}

fn stream(window_bits: c_int) -> Result<Box<zlib::z_stream>, String> {
    let mut stream = Box::new(zlib::z_stream::default());
    // SAFETY: a stream of zeros and NULLs is what is asked for; it has the size that is said.
    let code = unsafe {
        zlib::inflateInit2_(
            &raw mut *stream,
            window_bits,
            zlib::zlibVersion(),
            size_of::<zlib::z_stream>() as c_int,
        )
    };
    match code {
        zlib::Z_OK => Ok(stream),
        _ => Err(format!("gzip: no decoder: code {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Compression;
    use crate::testing::{compress, noise};

    /// Letters of a small alphabet, so that there are matches.
    fn content(bytes: usize) -> Vec<u8> {
        noise(1, bytes).iter().map(|byte| byte & 0x0f).collect()
    }

    /// Decodes `blob[at..]` in pieces, to the end or to the first place to go on from behind `stop`.
    fn run(
        gunzip: &mut Gunzip,
        (blob, mut at): (&[u8], usize),
        stop: usize,
        out: &mut Vec<u8>,
    ) -> Result<Option<(usize, Midway)>, String> {
        let mut room = vec![0; 10_007];
        loop {
            let piece = &blob[at..blob.len().min(at + 4096)];
            let stepped = gunzip.step(piece, &mut room, at >= stop)?;
            out.extend_from_slice(&room[..stepped.written]);
            at += stepped.read;
            if stepped.ended {
                assert_eq!(at, blob.len());
                return Ok(None);
            }
            if stepped.read + stepped.written == 0 {
                return Err("stalled".to_owned());
            }
            if at >= stop
                && let Some(midway) = gunzip.midway(&piece[..stepped.read])
            {
                return Ok(Some((at, midway)));
            }
        }
    }

    #[test]
    fn a_member_goes_on_from_many_places_and_its_end_is_checked() {
        let content = content(3_000_000);
        let blob = compress(&content, Compression::Gzip);
        for stop in (0..blob.len() - 60_000).step_by(99_991) {
            let (mut first, mut out) = (Gunzip::new().unwrap(), Vec::new());
            let (at, midway) = run(&mut first, (&blob, 0), stop, &mut out).unwrap().unwrap();
            let midway = serde_json::to_string(&midway).unwrap();
            let midway: Midway = serde_json::from_str(&midway).unwrap();
            let mut second = Gunzip::take_up(&midway).unwrap();
            let mut rest = out.clone();
            assert!(run(&mut second, (&blob, at), usize::MAX, &mut rest).unwrap().is_none());
            assert!(rest == content, "from {at}");

            for damaged in [blob.len() - 1, blob.len() - 8] {
                let mut blob = blob.clone();
                blob[damaged] ^= 1;
                let mut second = Gunzip::take_up(&midway).unwrap();
                let end = run(&mut second, (&blob, at), usize::MAX, &mut Vec::new());
                assert_eq!(end.err().as_deref(), Some("gzip: incorrect data check"));
            }
        }
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let sound = Midway { bits: 0, last_byte: 0, window: "00".into(), crc32: 0, size: 0 };
        assert!(Gunzip::take_up(&sound).is_ok());
        for wrong in [
            Midway { bits: 8, ..sound.clone() },
            Midway { window: "0".into(), ..sound.clone() },
            Midway { window: "00".repeat(WINDOW_BYTES + 1), ..sound },
        ] {
            assert!(Gunzip::take_up(&wrong).is_err());
        }
    }
}
