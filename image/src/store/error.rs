//! What can go wrong on the disk, told so that a person can act.

use std::io;

/// Why the store could not do it. The variants are what a caller does next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk said no.
    #[error("{what}: {source}")]
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
