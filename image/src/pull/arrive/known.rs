//! Files of a compressed layer that the store has, by their SHA-256 in its table of contents.
//!
//! Such a file is a link to the stored object from the start. The diff_id proves that in the end, as all
//! of the layer. Before, two things are asked of it: that SHA-256, over all of the object, and that the
//! source has some chunks of the same bytes. The second is for who has no right to a file and knows its
//! digest: a table of contents costs nothing to write, and readers see the file at once.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;

use crate::digest::{Digest, ObjectId};
use crate::layer::tar::MemberKind;
use crate::layer::{Contents, Frame, Promised};
use crate::manifest::Layer;
use crate::pull::layers::LayerState;
use crate::pull::skip::{HASH_BUDGET_BYTES, first_linked, is_known, is_like, of_size};
use crate::pull::{Inner, PullError};
use crate::source::Source;
use crate::store::{BySize, Candidate};

/// Chunks of a file that are compared, and the part of it that they may be.
const SAMPLES: usize = 3;
const SAMPLED_PART: u64 = 16;

/// A file that is large enough to be looked for.
struct Subject {
    size: u64,
    executable: bool,
    digest: Digest,
}

impl Inner {
    /// Links what the store has of `contents` into `folder`, and says which objects these are.
    pub(super) async fn link_known(
        &self,
        contents: &mut Contents,
        folder: &Path,
        source: &Arc<dyn Source>,
        layer: Layer,
        state: &LayerState,
    ) -> HashSet<ObjectId> {
        let mut linked = HashSet::new();
        let subjects: Vec<_> = contents.members.iter().map(Subject::of).collect();
        if subjects.iter().all(Option::is_none) {
            return linked;
        }
        let Some(by_size) = self.by_size(&layer).await else { return linked };
        let mut budget = HASH_BUDGET_BYTES;
        for (promised, subject) in contents.members.iter_mut().zip(subjects) {
            let Some(subject) = subject else { continue };
            let found = async {
                let (candidate, left) = self.of_digest(&subject, &by_size, budget).await?;
                budget = left;
                let Some(candidate) = candidate else { return Ok(None) };
                let known = self.chunks_of(&promised.frames, source, layer, state).await?;
                let (folder, size) = (folder.to_owned(), subject.size);
                let link = self.disk(move |store| {
                    let same = is_like(store, &candidate, size, &known);
                    let same = if same { vec![candidate] } else { Vec::new() };
                    Ok(first_linked(store, same, size, &folder))
                });
                link.await
            };
            match found.await {
                Ok(Some((name, object))) => {
                    promised.link = Some(name);
                    linked.insert(object);
                }
                Ok(None) => {}
                Err(error) => {
                    let layer = layer.blob.digest;
                    tracing::debug!(%layer, %error, "looking no further for what is here");
                    break;
                }
            }
        }
        linked
    }

    /// An object with that digest; and what is left of the budget for reading such.
    async fn of_digest(
        &self,
        subject: &Subject,
        by_size: &Arc<BySize>,
        mut budget: u64,
    ) -> Result<(Option<Candidate>, u64), PullError> {
        let candidates: Vec<_> = of_size(by_size, subject.size, subject.executable).collect();
        if candidates.is_empty() {
            return Ok((None, budget));
        }
        let (sizes, wanted) = (Arc::clone(&self.sizes), (subject.size, subject.digest));
        let found = self.disk(move |store| {
            let mut candidates = candidates.into_iter();
            let found = candidates.find(|one| is_known(store, one, wanted, &mut budget, &sizes));
            Ok((found, budget))
        });
        found.await
    }

    /// Some of the chunks as the source has them, by their place in the file.
    async fn chunks_of(
        &self,
        frames: &[Frame],
        source: &Arc<dyn Source>,
        layer: Layer,
        state: &LayerState,
    ) -> Result<Vec<(u64, Bytes)>, PullError> {
        let reads = sample(frames).into_iter().map(|frame| async move {
            let (source, range) = (Arc::clone(source), frame.packed.clone());
            let read = self.fetcher.read(source, layer.blob, range, state.clone()).await?;
            let unpacked = read.map(|packed| frame.unpack(layer.compression, &packed));
            match unpacked {
                Some(Ok(content)) => Ok((frame.content.start, content)),
                Some(Err(wrong)) => Err(PullError::Mismatch(wrong.0)),
                None => Err(PullError::Mismatch("no ranges are served".to_owned())),
            }
        });
        try_join_all(reads).await
    }
}

impl Subject {
    fn of(promised: &Promised) -> Option<Self> {
        let MemberKind::File { size, executable } = promised.member.kind else { return None };
        let digest = promised.digest.filter(|_| !promised.frames.is_empty())?;
        Some(Self { size, executable, digest })
    }
}

/// One in the middle, since the beginnings of files are alike; the first and the last where they are
/// small beside the rest.
fn sample(frames: &[Frame]) -> Vec<&Frame> {
    let middle = frames.len() / 2;
    let mut places = vec![middle, 0, frames.len().saturating_sub(1)];
    let bytes = |place: &usize| frames[*place].packed.end - frames[*place].packed.start;
    let all: u64 = (0..frames.len()).map(|place| bytes(&place)).sum();
    if frames.len() < SAMPLES || places.iter().map(bytes).sum::<u64>() > all / SAMPLED_PART {
        places.truncate(1);
    }
    places.into_iter().filter_map(|place| frames.get(place)).collect()
}
