//! Single files out of a layer: for repair, without the rest being written.
//!
//! Each file is proved by its BLAKE3, which is its object's name; the layer's own digest is not
//! needed for that.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use super::file::{Buffer, FileWriter};
use super::inflate::{Broken, Inflater};
use super::{Chunk, LayerError};
use crate::digest::ObjectId;
use crate::manifest::Compression;
use crate::store::StoreError;

/// A file to take out of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) object: ObjectId,
    /// Its bytes in the uncompressed layer.
    pub(crate) range: Range<u64>,
    /// Where it is written.
    pub(crate) to: PathBuf,
}

/// What came of it.
#[derive(Debug, Default)]
pub(crate) struct Sifted {
    /// Written, synced, and what their names say.
    pub(crate) found: Vec<ObjectId>,
    /// Why there are not more.
    pub(crate) why: Option<String>,
}

/// Writes the `wanted` files, which do not overlap and are sorted by their place.
///
/// `next` gives the chunks of a compressed blob from its start; of an uncompressed one only the
/// wanted ranges. Blocks.
pub(crate) fn sift<C>(
    compression: Compression,
    wanted: Vec<Wanted>,
    mut next: impl FnMut() -> Option<Chunk<C>>,
) -> Result<Sifted, LayerError> {
    let mut inflater = Inflater::new(compression).map_err(LayerError::Refused)?;
    let mut sink = Sink {
        jump: compression == Compression::None,
        wanted: wanted.into(),
        at: 0,
        writer: None,
        buffer: Buffer::new(),
        sifted: Sifted::default(),
    };
    let mut broken = None;
    while !sink.wanted.is_empty()
        && broken.is_none()
        && let Some(chunk) = next()
    {
        match inflater.feed(&chunk.bytes, |bytes| sink.take(bytes)) {
            Ok(()) => {}
            Err(Broken::Input(why)) => broken = Some(why),
            Err(Broken::Sink((path, e))) => {
                return Err(StoreError::io(format!("write {}", path.display()), e).into());
            }
        }
    }
    sink.sifted.why = sink.sifted.why.or(broken);
    Ok(sink.sifted)
}

struct Sink {
    /// What lies between the wanted files does not come.
    jump: bool,
    wanted: VecDeque<Wanted>,
    at: u64,
    writer: Option<FileWriter>,
    buffer: Buffer,
    sifted: Sifted,
}

impl Sink {
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), (PathBuf, io::Error)> {
        while let Some(wanted) = self.wanted.front()
            && !bytes.is_empty()
        {
            let disk = |e| (wanted.to.clone(), e);
            let Range { start, end } = wanted.range;
            if self.jump && self.at < start {
                self.at = start;
            }
            if self.at < start {
                let skipped =
                    bytes.len().min(usize::try_from(start - self.at).unwrap_or(usize::MAX));
                bytes = &bytes[skipped..];
                self.at += skipped as u64;
                continue;
            }
            let writer = match &mut self.writer {
                Some(writer) => writer,
                none => none.insert(
                    FileWriter::create(&wanted.to, end - start, wanted.object.executable())
                        .map_err(disk)?,
                ),
            };
            let taken = bytes.len().min(usize::try_from(end - self.at).unwrap_or(usize::MAX));
            writer.write(&bytes[..taken], &mut self.buffer).map_err(disk)?;
            bytes = &bytes[taken..];
            self.at += taken as u64;
            if self.at == end
                && let Some(writer) = self.writer.take()
            {
                let found = writer.finish(&mut self.buffer, true).map_err(disk)?;
                if found == wanted.object {
                    self.sifted.found.push(found);
                } else {
                    std::fs::remove_file(&wanted.to).map_err(disk)?;
                    let object = wanted.object;
                    self.sifted.why = Some(format!("object {object}: the source has other bytes"));
                }
                self.wanted.pop_front();
            }
        }
        Ok(())
    }
}
