//! Small JSON records, each replaced as a whole: written beside, synced, renamed, directory synced.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::{Context as _, StoreError};

/// A layer of a million entries, with the longest names that a layer may have and each of their bytes
/// escaped, has no larger record; more is damage.
const MAX_RECORD_BYTES: u64 = 768 * 1024 * 1024;

/// A folder of records, `<name>.json` each.
#[derive(Debug, Clone)]
pub struct Records {
    folder: PathBuf,
    lock: Option<PathBuf>,
}

impl Records {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder, lock: None }
    }

    /// Records whose writing must not overlap with a removal of images.
    pub(super) fn locked(folder: PathBuf, lock: PathBuf) -> Self {
        Self { folder, lock: Some(lock) }
    }

    /// Writes or replaces a record; it is on the disk when this returns.
    ///
    /// # Errors
    ///
    /// When `name` is no plain file name, or the disk refuses.
    pub fn put<T: Serialize>(&self, name: &str, value: &T) -> Result<(), StoreError> {
        let path = self.file(name)?;
        let bytes = serde_json::to_vec(value)
            .map_err(|e| StoreError::Corrupt(format!("record {}: {e}", path.display())))?;
        let _shared = self.lock.as_deref().map(Lock::shared).transpose()?;
        write(&path, &bytes)
    }

    /// Reads a record.
    ///
    /// # Errors
    ///
    /// [`StoreError::Corrupt`] when it is there and unreadable.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StoreError> {
        read(&self.file(name)?)
    }

    /// Reads a record that can be made again: a damaged one is logged and counts as absent.
    pub(super) fn get_sound<T: DeserializeOwned>(
        &self,
        name: &str,
    ) -> Result<Option<T>, StoreError> {
        match self.get(name) {
            Err(StoreError::Corrupt(why)) => {
                tracing::warn!(%why, "a damaged record counts as absent");
                Ok(None)
            }
            other => other,
        }
    }

    /// Removes a record; false when there was none.
    pub fn remove(&self, name: &str) -> Result<bool, StoreError> {
        let path = self.file(name)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).context(|| format!("remove {}", path.display())),
        }
        sync_dir(&self.folder)?;
        Ok(true)
    }

    /// All records, by name. One that is unreadable is logged and left out:
    /// it must not hide the others.
    pub fn list<T: DeserializeOwned>(&self) -> Result<Vec<(String, T)>, StoreError> {
        let mut records = Vec::new();
        for name in self.names()? {
            match self.get(&name) {
                Ok(Some(record)) => records.push((name, record)),
                Ok(None) => {}
                Err(StoreError::Corrupt(why)) => tracing::error!(%why, "skipped a damaged record"),
                Err(e) => return Err(e),
            }
        }
        Ok(records)
    }

    /// The names, sorted.
    pub(super) fn names(&self) -> Result<Vec<String>, StoreError> {
        let what = || format!("read {}", self.folder.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).context(what)? {
            let name = entry.context(what)?.file_name();
            if let Some(name) = name.to_str().and_then(|name| name.strip_suffix(".json")) {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn file(&self, name: &str) -> Result<PathBuf, StoreError> {
        if name.is_empty()
            || name.len() > 200
            || name.starts_with('.')
            || name.contains(['/', '\0'])
        {
            return Err(StoreError::Corrupt(format!(
                "record name {name:?} is not a plain file name"
            )));
        }
        Ok(self.folder.join(format!("{name}.json")))
    }
}

/// Reads a JSON file of bounded size; `None` when it is absent.
pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let what = || format!("read {}", path.display());
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e).context(what),
    };
    let mut bytes = Vec::new();
    file.take(MAX_RECORD_BYTES).read_to_end(&mut bytes).context(what)?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| {
        StoreError::Corrupt(format!(
            "record {} is damaged ({e}): remove the file and pull again",
            path.display()
        ))
    })
}

/// Puts `bytes` in place of `path`, all or nothing, and durably.
pub(super) fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let what = || format!("write {}", path.display());
    let mut file = tempfile::Builder::new().prefix(".tmp").tempfile_in(folder).context(what)?;
    file.write_all(bytes).context(what)?;
    file.as_file().sync_all().context(what)?;
    file.persist(path).map_err(|e| e.error).context(what)?;
    sync_dir(folder)
}

/// Makes renames and removals in `folder` durable.
pub(super) fn sync_dir(folder: &Path) -> Result<(), StoreError> {
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .context(|| format!("sync {}", folder.display()))
}

/// A `flock` on a file, held while this lives.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    pub(super) fn shared(path: &Path) -> Result<Self, StoreError> {
        Self::take(path, File::lock_shared)
    }

    pub(super) fn exclusive(path: &Path) -> Result<Self, StoreError> {
        Self::take(path, File::lock)
    }

    fn take(path: &Path, how: fn(&File) -> io::Result<()>) -> Result<Self, StoreError> {
        let file = File::open(path).context(|| format!("open {}", path.display()))?;
        how(&file).context(|| format!("lock {}", path.display()))?;
        Ok(Self { _file: file })
    }
}
