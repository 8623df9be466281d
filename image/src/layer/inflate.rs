//! Decompression, fed from the front, and where one can begin in the middle.
//!
//! ```text
//! blob │ frame │ frame │ frame │      zstd: frames, some of them only passed over
//!      │ member │ member │ …           gzip: members
//!              ▲ a border: nothing before it is needed to read what comes after
//! ```
//!
//! Within a gzip member it goes on from between two blocks, too, with what [`gzip`](super::gzip) keeps
//! of what came before.
//!
//! Bytes go in as they come. [`Inflater::step`] stops behind each border, so that who calls it can note
//! the place; [`Inflater::feed`] is for those who need not.

use std::io;

use zstd::stream::raw::{Decoder, InBuffer, Operation as _, OutBuffer};

use super::gzip::{Gunzip, Midway, Stepped};
use crate::manifest::Compression;

/// Bytes that are handed on at once: much of a tar's header blocks and small files in one call.
pub(super) const OUT_BYTES: usize = 256 * 1024;

/// A decoder, and whether it stands at a border.
pub(super) struct Inflater {
    codec: Codec,
    at_border: bool,
    /// Where [`Inflater::feed`] has it write to.
    out: Vec<u8>,
}

enum Codec {
    None,
    Gzip(Gunzip),
    Zstd(Decoder<'static>),
}

/// Why bytes did not go through.
#[derive(Debug)]
pub(super) enum Broken<E> {
    /// They are not what they should be.
    Input(String),
    /// The sink does not want them.
    Sink(E),
}

/// How far a call of [`Inflater::step`] came.
pub(super) struct Step {
    pub(super) read: usize,
    pub(super) written: usize,
    /// Behind what was read is a border.
    pub(super) border: bool,
}

impl Inflater {
    pub(super) fn new(compression: Compression) -> Result<Self, String> {
        let codec = match compression {
            Compression::None => Codec::None,
            Compression::Gzip => Codec::Gzip(Gunzip::new()?),
            Compression::Zstd => Codec::Zstd(Decoder::new().map_err(|e| format!("zstd: {e}"))?),
        };
        Ok(Self { codec, at_border: true, out: Vec::new() })
    }

    /// Goes on in the middle of a gzip member.
    pub(super) fn take_up(midway: &Midway) -> Result<Self, String> {
        let codec = Codec::Gzip(Gunzip::take_up(midway)?);
        Ok(Self { codec, at_border: false, out: Vec::new() })
    }

    /// Unpacks all of `input` into `sink`.
    pub(super) fn feed<E>(
        &mut self,
        mut input: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), Broken<E>> {
        if let Codec::None = self.codec {
            return sink(input).map_err(Broken::Sink);
        }
        let mut out = std::mem::take(&mut self.out);
        out.resize(OUT_BYTES, 0);
        let fed = loop {
            let step = match self.step(input, &mut out, false) {
                Ok(step) => step,
                Err(why) => break Err(Broken::Input(why)),
            };
            input = &input[step.read..];
            if step.written > 0
                && let Err(e) = sink(&out[..step.written])
            {
                break Err(Broken::Sink(e));
            }
            // A full buffer may not have been all that there is.
            if input.is_empty() && step.written < out.len() {
                break Ok(());
            }
        };
        self.out = out;
        fed
    }

    /// Unpacks from `input` into `out`, until one of them is used up or a border is reached; with
    /// `to_block` also where [`Inflater::midway`] may find a place to go on from.
    pub(super) fn step(
        &mut self,
        input: &[u8],
        out: &mut [u8],
        to_block: bool,
    ) -> Result<Step, String> {
        let Stepped { read, written, ended } = match &mut self.codec {
            Codec::None => {
                let length = input.len().min(out.len());
                out[..length].copy_from_slice(&input[..length]);
                Stepped { read: length, written: length, ended: true }
            }
            Codec::Gzip(decoder) => decoder.step(input, out, to_block)?,
            Codec::Zstd(decoder) => {
                let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(out));
                let hint = decoder
                    .run(&mut input, &mut output)
                    .map_err(|e: io::Error| format!("zstd: {e}"))?;
                Stepped { read: input.pos(), written: output.pos(), ended: hint == 0 }
            }
        };
        if read == 0 && written == 0 && !ended && !input.is_empty() && !out.is_empty() {
            return Err(format!("{}: comes to nothing", self.name()));
        }
        // A zstd decoder goes on with the next frame by itself.
        if let (true, Codec::Gzip(decoder)) = (ended, &mut self.codec) {
            *decoder = Gunzip::new()?;
        }
        self.at_border = ended || self.at_border && read == 0;
        Ok(Step { read, written, border: ended })
    }

    /// What is needed to go on from here, which is within a gzip member, where that can be. `input` are the
    /// bytes that were read last.
    pub(super) fn midway(&mut self, input: &[u8]) -> Option<Midway> {
        match &mut self.codec {
            Codec::Gzip(decoder) if !self.at_border => decoder.midway(input),
            _ => None,
        }
    }

    /// Says that no more bytes will come.
    pub(super) fn finish(&self) -> Result<(), String> {
        match self.at_border {
            true => Ok(()),
            false => Err(format!("{}: ends in the middle", self.name())),
        }
    }

    fn name(&self) -> &'static str {
        match self.codec {
            Codec::None => "uncompressed",
            Codec::Gzip(_) => "gzip",
            Codec::Zstd(_) => "zstd",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{compress, noise};

    /// Feeds `blob` in pieces of `piece` bytes; what comes out, and the borders within the blob.
    fn inflate(
        compression: Compression,
        blob: &[u8],
        piece: usize,
    ) -> Result<(Vec<u8>, Vec<usize>), String> {
        let mut inflater = Inflater::new(compression)?;
        let (mut out, mut borders, mut at) = (Vec::new(), Vec::new(), 0);
        let mut room = vec![0; 10_007];
        for piece in blob.chunks(piece) {
            let mut left = piece;
            loop {
                let step = inflater.step(left, &mut room, false)?;
                out.extend_from_slice(&room[..step.written]);
                left = &left[step.read..];
                at += step.read;
                if step.border {
                    borders.push(at);
                }
                if left.is_empty() && step.written < room.len() {
                    break;
                }
            }
        }
        inflater.finish().map(|()| (out, borders))
    }

    const KINDS: [Compression; 2] = [Compression::Gzip, Compression::Zstd];

    #[test]
    fn each_frame_and_member_ends_at_a_border_however_the_input_is_cut() {
        let parts = [noise(1, 700_000), vec![0; 5_000_000], noise(2, 3), Vec::new()];
        for compression in KINDS {
            let packed: Vec<_> = parts.iter().map(|part| compress(part, compression)).collect();
            let (blob, all) = (packed.concat(), parts.concat());
            let mut ends = Vec::new();
            for part in &packed {
                ends.push(ends.last().unwrap_or(&0) + part.len());
            }
            for piece in [1, 1000, 65_537, blob.len()] {
                let (out, borders) = inflate(compression, &blob, piece).unwrap();
                assert!(out == all, "{compression:?} in pieces of {piece}");
                assert_eq!(borders, ends, "{compression:?} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn what_is_cut_short_altered_or_followed_by_something_else_is_an_error() {
        for compression in KINDS {
            let blob = compress(&noise(3, 300_000), compression);
            assert!(inflate(compression, &blob[..blob.len() - 1], 4096).is_err());
            assert!(inflate(compression, &blob[..20], 4096).is_err());
            let mut behind = blob.clone();
            behind.extend(b"something else entirely");
            assert!(inflate(compression, &behind, 4096).is_err());
            let mut altered = blob.clone();
            altered[0] ^= 1;
            assert!(inflate(compression, &altered, 4096).is_err());
        }
        // Both ends of a gzip member are checked, too.
        let mut altered = compress(&vec![7; 100_000], Compression::Gzip);
        let at = altered.len() - 5;
        altered[at] ^= 1;
        assert!(inflate(Compression::Gzip, &altered, 4096).is_err());
    }

    #[test]
    fn nothing_is_unpacked_of_nothing() {
        for compression in KINDS {
            assert_eq!(inflate(compression, b"", 1).unwrap(), (Vec::new(), Vec::new()));
        }
    }
}
