//! Leases: content that a pull has gathered and no tree uses yet.
//!
//! A lease is a file whose owner holds its `flock`. One that can be locked by
//! somebody else has lost its owner, and means nothing any more.
//!
//! It also says what is still to come under it, so that pulls in all processes know what room the
//! others were promised.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Store;
use super::error::{Context as _, StoreError};
use crate::digest::Digest;
use crate::reference::Reference;

/// Keeps the objects of some layers from [`Store::collect`] while it lives.
#[derive(Debug)]
pub(crate) struct Lease {
    // Removed from the disk on drop; the lock goes with the descriptor.
    _file: tempfile::NamedTempFile,
}

/// What a lease says.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Leased {
    /// Present or still to come.
    pub(super) layers: BTreeSet<Digest>,
    /// What they will be.
    #[serde(default)]
    pub(super) image: Option<Digest>,
    /// As it was asked for.
    #[serde(default)]
    pub(super) reference: Option<Reference>,
    /// Names of the layers' records that were missing when the pull began, and the layers' bytes.
    #[serde(default)]
    pub(super) coming: BTreeMap<String, u64>,
}

impl Store {
    /// Takes a lease.
    pub(super) fn lease(&self, leased: &Leased) -> Result<Lease, StoreError> {
        let folder = self.path("leases");
        let what = || format!("write a lease in {}", folder.display());
        // Shared with nobody who collects: the file counts from its lock on.
        let _shared = super::record::Lock::shared(&self.path("lock"))?;
        let mut file =
            tempfile::Builder::new().suffix(".lease").tempfile_in(&folder).context(what)?;
        file.as_file().lock().context(what)?;
        let bytes = serde_json::to_vec(leased)
            .map_err(|e| StoreError::Corrupt(format!("{}: {e}", what())))?;
        file.write_all(&bytes).context(what)?;
        Ok(Lease { _file: file })
    }

    /// The layers under a living lease. Dead leases are removed on the way. Under the exclusive lock.
    pub(super) fn leased(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let mut layers = BTreeSet::new();
        self.visit_leases(|path, file| {
            match file {
                None => drop(fs::remove_file(path)),
                Some(file) => layers.extend(read(path, file)?.layers),
            }
            Ok(())
        })?;
        Ok(layers)
    }

    /// The living leases, for whoever counts: one that is being written at this moment may be missing.
    pub(super) fn leases(&self) -> Result<Vec<Leased>, StoreError> {
        let mut leases = Vec::new();
        self.visit_leases(|path, file| {
            leases.extend(file.and_then(|file| read(path, file).ok()));
            Ok(())
        })?;
        Ok(leases)
    }

    /// Calls `visit` with each lease; `None` for one that is dead.
    fn visit_leases(
        &self,
        mut visit: impl FnMut(&Path, Option<File>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let folder = self.path("leases");
        let what = || format!("read {}", folder.display());
        for entry in fs::read_dir(&folder).context(what)? {
            let path = entry.context(what)?.path();
            let Ok(file) = File::open(&path) else { continue };
            // Shared, so that two who look do not take each other for its owner.
            let dead = file.try_lock_shared().is_ok();
            visit(&path, (!dead).then_some(file))?;
        }
        Ok(())
    }
}

fn read(path: &Path, mut file: File) -> Result<Leased, StoreError> {
    let mut text = String::new();
    file.read_to_string(&mut text).context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text)
        .map_err(|e| StoreError::Corrupt(format!("lease {}: {e}", path.display())))
}
