//! Decompression, fed from the front, and where one can begin in the middle.
//!
//! ```text
//! blob │ frame │ frame │ frame │      zstd: frames, some of them only passed over
//!      │ member │ member │ …           gzip: members
//!              ▲ a border: nothing before it is needed to read what comes after
//! ```
//!
//! Bytes go in as they come; what they unpack to goes to a sink. [`Inflater::feed`] stops behind each
//! border, so that who feeds it can note the place.

use std::io;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation as _, OutBuffer};

use crate::manifest::Compression;

/// Bytes that are handed on at once: much of a tar's header blocks and small files in one call.
const OUT_BYTES: usize = 256 * 1024;

/// The largest window of a gzip member, as a power of two.
const GZIP_WINDOW_BITS: u8 = 15;

/// A decoder, and whether it stands at a border.
pub(super) struct Inflater {
    codec: Codec,
    out: Box<[u8]>,
    at_border: bool,
}

enum Codec {
    None,
    Gzip(Decompress),
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

/// How far a call of [`Inflater::feed`] came.
pub(super) struct Fed {
    /// Bytes of the input that are dealt with: all of it, or up to a border.
    pub(super) bytes: usize,
    /// Behind them is a border.
    pub(super) border: bool,
}

struct Step {
    read: usize,
    written: usize,
    ended: bool,
}

impl Inflater {
    pub(super) fn new(compression: Compression) -> Result<Self, String> {
        let (codec, out_bytes) = match compression {
            Compression::None => (Codec::None, 0),
            Compression::Gzip => (Codec::Gzip(member()), OUT_BYTES),
            Compression::Zstd => {
                let decoder = Decoder::new().map_err(|e| format!("zstd: {e}"))?;
                (Codec::Zstd(decoder), OUT_BYTES)
            }
        };
        Ok(Self { codec, out: vec![0; out_bytes].into(), at_border: true })
    }

    /// Unpacks `input` into `sink`, up to its end or the first border.
    pub(super) fn feed<E>(
        &mut self,
        input: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<Fed, Broken<E>> {
        if let Codec::None = self.codec {
            sink(input).map_err(Broken::Sink)?;
            return Ok(Fed { bytes: input.len(), border: true });
        }
        let mut bytes = 0;
        loop {
            let Step { read, written, ended } =
                self.codec.step(&input[bytes..], &mut self.out).map_err(Broken::Input)?;
            bytes += read;
            if written > 0 {
                sink(&self.out[..written]).map_err(Broken::Sink)?;
            }
            if ended {
                self.codec.restart();
                self.at_border = true;
                return Ok(Fed { bytes, border: true });
            }
            self.at_border &= read == 0;
            if bytes == input.len() && written < self.out.len() {
                return Ok(Fed { bytes, border: false });
            }
            if read == 0 && written == 0 {
                return Err(Broken::Input(format!("{}: comes to nothing", self.codec.name())));
            }
        }
    }

    /// Says that no more bytes will come.
    pub(super) fn finish(&self) -> Result<(), String> {
        match self.at_border {
            true => Ok(()),
            false => Err(format!("{}: ends in the middle", self.codec.name())),
        }
    }
}

fn member() -> Decompress {
    Decompress::new_gzip(GZIP_WINDOW_BITS)
}

impl Codec {
    fn name(&self) -> &'static str {
        match self {
            Self::None => "uncompressed",
            Self::Gzip(_) => "gzip",
            Self::Zstd(_) => "zstd",
        }
    }

    fn step(&mut self, input: &[u8], out: &mut [u8]) -> Result<Step, String> {
        match self {
            Self::None => Ok(Step { read: input.len(), written: 0, ended: true }),
            Self::Gzip(decoder) => {
                let (before_in, before_out) = (decoder.total_in(), decoder.total_out());
                let status = decoder
                    .decompress(input, out, FlushDecompress::None)
                    .map_err(|e| format!("gzip: {e}"))?;
                Ok(Step {
                    read: (decoder.total_in() - before_in) as usize,
                    written: (decoder.total_out() - before_out) as usize,
                    ended: status == Status::StreamEnd,
                })
            }
            Self::Zstd(decoder) => {
                let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(out));
                let hint = decoder
                    .run(&mut input, &mut output)
                    .map_err(|e: io::Error| format!("zstd: {e}"))?;
                Ok(Step { read: input.pos(), written: output.pos(), ended: hint == 0 })
            }
        }
    }

    /// Behind a border. A zstd decoder goes on with the next frame by itself.
    fn restart(&mut self) {
        if let Self::Gzip(decoder) = self {
            *decoder = member();
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
        for piece in blob.chunks(piece) {
            let mut left = piece;
            while !left.is_empty() {
                let fed = inflater.feed(left, |bytes| {
                    out.extend_from_slice(bytes);
                    Ok::<_, std::convert::Infallible>(())
                });
                let fed = fed.map_err(|e| match e {
                    Broken::Input(why) => why,
                    Broken::Sink(never) => match never {},
                })?;
                left = &left[fed.bytes..];
                at += fed.bytes;
                if fed.border {
                    borders.push(at);
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
