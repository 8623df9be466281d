//! What tests do with a layer that is read while it arrives, however it is packed.
//!
//! A test lists the layer and says how a piece of it lands; here it is read as it comes, completed, and
//! compared with what an ordinary pull makes of it.

use std::io::Read as _;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt as _;
use proptest::prelude::*;
use proptest::sample::Index;

use super::{Entry, noise, store};
use crate::digest::Digest;
use crate::layer::{
    Chunk, End, Landing, LayerError, Listing, Plan, Resumed, Unlanded, Verifier, Want,
};
use crate::manifest::{Compression, Layer};
use crate::store::{Ingest, LayerRecord, Store};
use crate::tree::{Attributes, LayerEntry};

/// A file's name, content, and whether it can be run.
pub(crate) type TestFile = (String, Vec<u8>, bool);

/// A small file, or one of about `large` bytes.
pub(crate) fn file(large: Range<usize>) -> impl Strategy<Value = TestFile> {
    let size = prop_oneof![0..2000_usize, large];
    ("[a-d]/[a-z]{1,3}", size, any::<u8>(), any::<bool>())
        .prop_map(|(name, size, seed, exec)| (name, noise(seed.into(), size), exec))
}

/// A layer's members: `files`, and some that are no files.
pub(crate) fn members(files: &[TestFile]) -> Vec<Entry<'_>> {
    let mut members = vec![Entry::Dir("d"), Entry::Symlink("l", "a")];
    members.extend(files.iter().map(|(name, content, exec)| match exec {
        true => Entry::Exec(name, content),
        false => Entry::File(name, content),
    }));
    members.push(Entry::File("b/.wh.gone", b"marker"));
    members
}

pub(crate) fn ingest(store: &Store, layer: &Layer) -> Arc<Ingest> {
    Arc::new(store.ingest(&layer.blob.digest).unwrap().unwrap())
}

/// What an ordinary pull makes of the layer.
pub(crate) fn plain(layer: Layer, blob: &[u8]) -> Result<Vec<LayerEntry>, LayerError> {
    let (_folder, store) = store();
    let ingest = store.ingest(&layer.blob.digest)?.unwrap();
    let mut resumed = Resumed::open(ingest, layer, None)?;
    resumed.follow(Plan::plain(0..layer.blob.size));
    let mut chunks =
        blob.chunks(1000).map(|chunk| Chunk { bytes: Bytes::copy_from_slice(chunk), _credit: () });
    resumed.unpack(|| chunks.next())?;
    Ok(store.layer_as(&layer, None)?.unwrap().entries)
}

/// Reads at some places of some files, as readers do, and compares that with `tar`.
pub(crate) fn ask(
    (listing, landing): (&Listing, &Landing),
    asked: Vec<(Index, u64)>,
    tar: &[u8],
    land: impl Fn(&Range<u64>) -> Result<(), Unlanded>,
) -> Result<(), TestCaseError> {
    let listed: Vec<_> = listing.files().collect();
    if listed.is_empty() {
        return Ok(());
    }
    for (index, at) in asked {
        let file = index.get(&listed);
        let start = file.offset + at % file.size;
        let range = start..(start + 5000).min(file.offset + file.size);
        let mut wait = Box::pin(landing.wait(&range));
        let here = wait.as_mut().now_or_never();
        while let Some(piece) = landing.next(true) {
            prop_assert!(here.is_none() && piece.want == Want::Asked);
            land(&piece.range).unwrap();
        }
        prop_assert_eq!(here.or_else(|| wait.as_mut().now_or_never()), Some(Ok(())));
        let mut read = vec![0; (range.end - range.start) as usize];
        landing.open(file.offset).unwrap().read_exact_at(&mut read, start - file.offset).unwrap();
        prop_assert!(read == tar[range.start as usize..range.end as usize]);
    }
    Ok(())
}

/// Brings the rest and commits it, as `proof` says.
pub(crate) fn complete(
    ingest: Arc<Ingest>,
    (listing, landing): (&Listing, &Landing),
    layer: Layer,
    proof: Digest,
    store: &Store,
    land: impl Fn(&Range<u64>) -> Result<(), Unlanded>,
) -> Result<Vec<LayerEntry>, String> {
    let mut verifier = Verifier::new();
    loop {
        let here = landing.run_from(verifier.at()).now_or_never();
        if let Some(end) = here {
            verifier.read(landing, end).unwrap();
        }
        let Some(piece) = landing.next(false) else { break };
        land(&piece.range).map_err(|e| format!("{e:?}"))?;
    }
    verifier.read(landing, landing.size()).unwrap();
    if verifier.digest() != proof {
        return Err(format!("{} instead of {proof}", verifier.digest()));
    }
    let staged = verifier.finish(landing, store.root()).unwrap();
    let mut objects = staged.iter().map(|staged| staged.object);
    let entries = listing.entries(|_| objects.next().unwrap());
    let record = LayerRecord {
        digest: layer.blob.digest,
        size_bytes: layer.blob.size,
        diff_id: proof,
        entries: entries.clone(),
        attributes: Attributes::Unknown,
    };
    let name = match layer.compression {
        Compression::None => layer.record_name(),
        _ => layer.record_name_as(&proof),
    };
    Arc::into_inner(ingest).unwrap().commit(name, record, staged).unwrap();
    landing.end(End::Verified);
    Ok(entries)
}

/// What a reader opens now is the object.
pub(crate) fn opens_as(
    (listing, landing): (&Listing, &Landing),
    tar: &[u8],
) -> Result<(), TestCaseError> {
    for file in listing.files() {
        let mut read = Vec::new();
        landing.open(file.offset).unwrap().read_to_end(&mut read).unwrap();
        prop_assert!(read == tar[file.offset as usize..(file.offset + file.size) as usize]);
    }
    Ok(())
}
