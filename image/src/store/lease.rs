//! Leases: content that a pull has gathered and no tree uses yet.
//!
//! A lease is a file whose owner holds its `flock`. One that can be locked by
//! somebody else has lost its owner, and means nothing any more.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, Write};

use serde::{Deserialize, Serialize};

use super::Store;
use super::error::{Context as _, StoreError};
use crate::digest::Digest;

/// Keeps the objects of some layers from [`Store::collect`] while it lives.
#[derive(Debug)]
pub(crate) struct Lease {
    // Removed from the disk on drop; the lock goes with the descriptor.
    _file: tempfile::NamedTempFile,
}

#[derive(Serialize, Deserialize)]
struct Leased {
    layers: BTreeSet<Digest>,
}

impl Store {
    /// Leases `layers`, present or still to come.
    pub(crate) fn lease(&self, layers: BTreeSet<Digest>) -> Result<Lease, StoreError> {
        let folder = self.path("leases");
        let what = || format!("write a lease in {}", folder.display());
        // Shared with nobody who collects: the file counts from its lock on.
        let _shared = super::record::Lock::shared(&self.path("lock"))?;
        let mut file =
            tempfile::Builder::new().suffix(".lease").tempfile_in(&folder).context(what)?;
        file.as_file().lock().context(what)?;
        let bytes = serde_json::to_vec(&Leased { layers })
            .map_err(|e| StoreError::Corrupt(format!("{}: {e}", what())))?;
        file.write_all(&bytes).context(what)?;
        Ok(Lease { _file: file })
    }

    /// The layers under a living lease. Dead leases are removed on the way.
    pub(super) fn leased(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let folder = self.path("leases");
        let what = || format!("read {}", folder.display());
        let mut layers = BTreeSet::new();
        for entry in fs::read_dir(&folder).context(what)? {
            let path = entry.context(what)?.path();
            let Ok(mut file) = File::open(&path) else { continue };
            if file.try_lock().is_ok() {
                let _ = fs::remove_file(&path);
                continue;
            }
            let mut text = String::new();
            file.rewind().and_then(|()| file.read_to_string(&mut text)).context(what)?;
            let leased: Leased = serde_json::from_str(&text)
                .map_err(|e| StoreError::Corrupt(format!("lease {}: {e}", path.display())))?;
            layers.extend(leased.layers);
        }
        Ok(layers)
    }
}
