//! How far the scrub is: the verification that goes round and round.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::{Store, record};

/// What `scrub.json` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// The part of 256 that a round under way goes on with; absent between two rounds.
    pub next_part: Option<u8>,
    /// When the last round ended; before the first, when the store was made.
    pub finished_at: SystemTime,
}

impl Store {
    /// How far the scrub is. A damaged record counts as none.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn scrub(&self) -> Result<ScrubRecord, StoreError> {
        match record::read(&self.path("scrub.json")) {
            Ok(Some(record)) => return Ok(record),
            Ok(None) => {}
            Err(StoreError::Corrupt(why)) => {
                tracing::warn!(%why, "a damaged record counts as none");
            }
            Err(e) => return Err(e),
        }
        let format = self.path("format");
        let made = std::fs::metadata(&format).and_then(|meta| meta.modified());
        let finished_at = made.context(|| format!("read {}", format.display()))?;
        Ok(ScrubRecord { next_part: None, finished_at })
    }

    /// Remembers how far it is.
    ///
    /// # Errors
    ///
    /// The disk's.
    pub fn put_scrub(&self, scrub: &ScrubRecord) -> Result<(), StoreError> {
        let path = self.path("scrub.json");
        let bytes = serde_json::to_vec(scrub)
            .map_err(|e| StoreError::Corrupt(format!("{}: {e}", path.display())))?;
        record::write(&path, &bytes)
    }
}
