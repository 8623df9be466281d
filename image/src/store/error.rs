//! What can go wrong on the disk, told so that a person can act.

use std::io;

/// Why the store could not do it. The variants are what a caller does next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk said no.
    #[error("{what}: {source}{}", hint(source))]
    Io {
        /// Verb and path.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// It does not fit: a pull that was refused beforehand, or the disk that is full after all.
    #[error("{what}")]
    NoSpace {
        /// What does not fit where, and what to do.
        what: String,
    },
    /// Not a store, or not one of this version.
    #[error("{0}")]
    Format(String),
    /// Something still needs it, or there are too many of its kind.
    #[error("{0}")]
    InUse(String),
    /// A record or object is not what it must be; the message says how to get past it.
    #[error("{0}")]
    Corrupt(String),
}

/// What a person can do about it.
fn hint(error: &io::Error) -> &'static str {
    use rustix::io::Errno;
    match errno(error).map(Errno::from_raw_os_error) {
        Some(Errno::ROFS) => {
            ": the store's file system is read-only; look into the kernel's log, and mount it for writing"
        }
        Some(Errno::IO | Errno::UCLEAN) => {
            ": the disk or its file system failed; look into the kernel's log"
        }
        Some(Errno::MFILE | Errno::NFILE) => ": raise the limit of open files (ulimit -n)",
        _ => "",
    }
}

/// The system's number. Errors of tempfile keep it in their text only.
fn errno(error: &io::Error) -> Option<i32> {
    let told = || error.to_string().split_once("(os error ")?.1.split_once(')')?.0.parse().ok();
    error.raw_os_error().or_else(told)
}

impl StoreError {
    pub(crate) fn io(what: String, source: io::Error) -> Self {
        match source.kind() {
            // Of the disk, or of this user on it.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace {
                what: format!(
                    "{what}: no space left on the store's file system: free space or run `carport gc`"
                ),
            },
            _ => Self::Io { what, source },
        }
    }
}

/// Names the deed that failed.
pub(crate) trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::io(what(), source.into()))
    }
}
