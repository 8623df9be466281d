//! One connection's header blocks (HPACK, RFC 7541): which fields are `:authority`, and what the
//! server gets in place of a value that it would refuse.
//!
//! ```text
//! block ─► field by field ─► :authority that is not valid ─► as many zeros, of the same kind
//!                        └─► everything else ──────────────► as it is
//! ```
//!
//! # What always holds
//!
//! - **Both dynamic tables are in step.** The replacement decodes to as many bytes as the original,
//!   and its field keeps its kind (inserted into the table or not). So each entry has the same size
//!   on both sides, the same entries are evicted, and an index means the same field.
//! - **A block never grows.** Zeros have the shortest Huffman code, and a smaller index or length
//!   has no longer a form.
//! - **An empty authority is left out**, since no valid value is as short. Where the client's field
//!   is inserted into the table, the server's table lacks that entry, and is emptier: it evicts later.
//!   What the client still has is there, newest first, without the entries left out. So the number
//!   of those that are newer is taken off each index.

use std::borrow::Cow;
use std::collections::VecDeque;

use http::uri::Authority;

use super::huffman;

/// The client's table has at most this many bytes: SETTINGS_HEADER_TABLE_SIZE's default, which
/// tonic's server has no option to change.
const MAX_TABLE_BYTES: usize = 4096;

/// What the specification adds to the bytes of name and value for each entry.
const ENTRY_OVERHEAD: usize = 32;

/// An integer has at most this many bytes for h2.
const MAX_INTEGER_BYTES: usize = 5;

const AUTHORITY: &[u8] = b":authority";

/// `:authority` in the static table, whose other entries are other names.
const AUTHORITY_INDEX: usize = 1;

/// How long the names in the static table are (RFC 7541, appendix A).
#[rustfmt::skip]
const STATIC_NAME_BYTES: [u8; 61] = [
    10, 7, 7, 5, 5, 7, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13,
    12, 6, 4, 4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16,
];

/// A block that is not HPACK. Nothing can be said of those that follow.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

/// The bits before an integer, and how many bits of the first byte the integer has.
#[derive(Debug, Clone, Copy)]
struct Prefix {
    flags: u8,
    bits: u8,
}

const INDEXED: Prefix = Prefix { flags: 0x80, bits: 7 };
const INSERTED: Prefix = Prefix { flags: 0x40, bits: 6 };
const TABLE_SIZE: Prefix = Prefix { flags: 0x20, bits: 5 };
const NEVER_INDEXED: Prefix = Prefix { flags: 0x10, bits: 4 };
const NOT_INDEXED: Prefix = Prefix { flags: 0x00, bits: 4 };
const HUFFMAN: Prefix = Prefix { flags: 0x80, bits: 7 };

impl Prefix {
    /// What a field that begins with `byte` is.
    fn of(byte: u8) -> Self {
        let kinds = [INDEXED, INSERTED, TABLE_SIZE, NEVER_INDEXED];
        kinds.into_iter().find(|kind| byte & kind.flags != 0).unwrap_or(NOT_INDEXED)
    }

    fn write(self, value: usize, out: &mut Vec<u8>) {
        let most = (1 << self.bits) - 1;
        if value < most {
            return out.push(self.flags | value as u8);
        }
        out.push(self.flags | most as u8);
        let mut rest = value - most;
        while rest >= 0x80 {
            out.push(0x80 | rest as u8);
            rest >>= 7;
        }
        out.push(rest as u8);
    }
}

/// What an entry of the client's table is for the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Another field.
    Other,
    /// An `:authority`, valid on the server's side.
    Authority,
    /// An empty `:authority`. The server does not have it.
    LeftOut,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: usize,
    name: Name,
}

/// A name: its length, and what it is.
#[derive(Debug, Clone, Copy)]
struct Name {
    bytes: usize,
    kind: Kind,
}

/// The dynamic table as the client has it, newest first: sizes and kinds, no texts.
#[derive(Debug)]
struct Table {
    entries: VecDeque<Entry>,
    bytes: usize,
    max: usize,
}

impl Table {
    fn insert(&mut self, name: Name, value_bytes: usize) {
        let bytes = name.bytes + value_bytes + ENTRY_OVERHEAD;
        self.evict(self.max.saturating_sub(bytes));
        // An entry that is too large only empties the table.
        if bytes <= self.max {
            self.entries.push_front(Entry { bytes, name });
            self.bytes += bytes;
        }
    }

    fn evict(&mut self, max: usize) {
        while self.bytes > max
            && let Some(oldest) = self.entries.pop_back()
        {
            self.bytes -= oldest.bytes;
        }
    }
}

/// The header fields of one connection. At most 4096 / 32 entries are remembered.
#[derive(Debug)]
pub(super) struct Fields(Table);

impl Fields {
    pub(super) fn new() -> Self {
        Self(Table { entries: VecDeque::new(), bytes: 0, max: MAX_TABLE_BYTES })
    }

    /// What the server is to get in place of `block`: never more bytes, and mostly the same ones.
    ///
    /// # Errors
    ///
    /// When it is malformed; then nothing more can be asked of these fields.
    pub(super) fn rewrite(&mut self, block: &[u8]) -> Result<Vec<u8>, Malformed> {
        let mut out = Vec::with_capacity(block.len());
        let mut reader = Reader { block, at: 0 };
        while let Some(&first) = block.get(reader.at) {
            let (start, prefix) = (reader.at, Prefix::of(first));
            let number = reader.integer(prefix.bits)?;
            if prefix.flags == TABLE_SIZE.flags {
                self.resize(number)?;
                out.extend_from_slice(&block[start..reader.at]);
            } else if prefix.flags == INDEXED.flags {
                self.indexed(number, &block[start..reader.at], &mut out)?;
            } else {
                self.literal(prefix, number, start, &mut reader, &mut out)?;
            }
        }
        Ok(out)
    }

    fn resize(&mut self, max: usize) -> Result<(), Malformed> {
        if max > MAX_TABLE_BYTES {
            return Err(Malformed);
        }
        self.0.max = max;
        self.0.evict(max);
        Ok(())
    }

    /// A field whose name and value are in a table.
    fn indexed(&self, index: usize, original: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
        if self.name(index)?.kind != Kind::LeftOut {
            self.write_index(INDEXED, index, original, out);
        }
        Ok(())
    }

    /// A field whose value is in the block. Its name is there, too, where `index` is 0.
    fn literal(
        &mut self,
        prefix: Prefix,
        index: usize,
        start: usize,
        reader: &mut Reader<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Malformed> {
        let name = match index {
            0 => Name::of(&reader.string()?.decoded()?),
            _ => self.name(index)?,
        };
        let name_end = reader.at;
        let value = reader.string()?;
        let (name_written, value_written) =
            (&reader.block[start..name_end], &reader.block[name_end..reader.at]);
        let inserted = prefix.flags == INSERTED.flags;
        if name.kind == Kind::Other {
            self.write_index(prefix, index, name_written, out);
            out.extend_from_slice(value_written);
            if inserted {
                self.0.insert(name, value.decoded()?.len());
            }
            return Ok(());
        }
        let value = value.decoded()?;
        let kind = if value.is_empty() { Kind::LeftOut } else { Kind::Authority };
        if kind == Kind::Authority {
            match name.kind {
                Kind::LeftOut => prefix.write(AUTHORITY_INDEX, out),
                _ => self.write_index(prefix, index, name_written, out),
            }
            if Authority::try_from(value.as_ref()).is_ok() {
                out.extend_from_slice(value_written);
            } else {
                let zeros = huffman::zeros(value.len());
                HUFFMAN.write(zeros.len(), out);
                out.extend_from_slice(&zeros);
            }
        }
        if inserted {
            self.0.insert(Name { kind, ..name }, value.len());
        }
        Ok(())
    }

    /// The name at `index` of both tables.
    fn name(&self, index: usize) -> Result<Name, Malformed> {
        if let Some(dynamic) = index.checked_sub(STATIC_NAME_BYTES.len() + 1) {
            return self.0.entries.get(dynamic).map(|entry| entry.name).ok_or(Malformed);
        }
        let bytes =
            index.checked_sub(1).and_then(|at| STATIC_NAME_BYTES.get(at)).ok_or(Malformed)?;
        let kind = if index == AUTHORITY_INDEX { Kind::Authority } else { Kind::Other };
        Ok(Name { bytes: (*bytes).into(), kind })
    }

    /// Writes an index as the server counts: as it is, unless newer entries were left out.
    fn write_index(&self, prefix: Prefix, index: usize, written: &[u8], out: &mut Vec<u8>) {
        let newer = index.saturating_sub(STATIC_NAME_BYTES.len() + 1);
        let newer = self.0.entries.iter().take(newer);
        match newer.filter(|entry| entry.name.kind == Kind::LeftOut).count() {
            0 => out.extend_from_slice(written),
            left_out => prefix.write(index - left_out, out),
        }
    }
}

impl Name {
    fn of(name: &[u8]) -> Self {
        let kind = if name == AUTHORITY { Kind::Authority } else { Kind::Other };
        Self { bytes: name.len(), kind }
    }
}

/// Reads a block from its beginning to its end.
struct Reader<'a> {
    block: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Result<u8, Malformed> {
        let byte = self.block.get(self.at).ok_or(Malformed)?;
        self.at += 1;
        Ok(*byte)
    }

    fn integer(&mut self, bits: u8) -> Result<usize, Malformed> {
        let most = (1 << bits) - 1;
        let mut value = usize::from(self.byte()?) & most;
        if value < most {
            return Ok(value);
        }
        for shift in (0..MAX_INTEGER_BYTES - 1).map(|byte| byte * 7) {
            let byte = self.byte()?;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed)
    }

    fn string(&mut self) -> Result<Text<'a>, Malformed> {
        let huffman = self.block.get(self.at).is_some_and(|byte| byte & HUFFMAN.flags != 0);
        let length = self.integer(HUFFMAN.bits)?;
        let rest = &self.block[self.at..];
        let written = rest.get(..length).ok_or(Malformed)?;
        self.at += length;
        Ok(Text { written, huffman })
    }
}

/// A string in a block.
struct Text<'a> {
    written: &'a [u8],
    huffman: bool,
}

impl<'a> Text<'a> {
    fn decoded(&self) -> Result<Cow<'a, [u8]>, Malformed> {
        if !self.huffman {
            return Ok(self.written.into());
        }
        huffman::decode(self.written).map(Cow::Owned).ok_or(Malformed)
    }
}

#[cfg(test)]
mod tests;
