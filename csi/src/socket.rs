//! Unix sockets that appear when they are served and go when they are not.

use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, mem};

/// `sun_path` less its closing NUL: the system's ABI.
const MAX_PATH_BYTES: usize = 107;

/// Why a socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody serves there.
    #[error("bind {}: another process serves there; stop it, or use another path", .0.display())]
    InUse(PathBuf),
    /// The system allows no socket with so long a path.
    #[error(
        "bind {}: too long for a socket, whose path has at most 106 bytes; use a shorter one",
        .0.display()
    )]
    TooLong(PathBuf),
    /// The kernel said something else.
    #[error("{what}: {source}")]
    Io {
        /// The verb and its object.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl BindError {
    pub(crate) fn io(verb: &str, path: &Path, source: io::Error) -> Self {
        Self::Io { what: format!("{verb} {}", path.display()), source }
    }
}

/// A bound socket that listens under another name until it is shown.
///
/// Dropping it removes the file, unless another process has put its own in place.
#[derive(Debug)]
pub(crate) struct Socket {
    path: PathBuf,
    hidden: PathBuf,
    inode: (u64, u64),
    listener: Option<UnixListener>,
    shown: bool,
}

impl Socket {
    /// Binds for `path` and listens. What a killed process left there is replaced when
    /// the socket is shown.
    pub(crate) fn bind(path: &Path) -> Result<Self, BindError> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(BindError::io("bind", path, ErrorKind::InvalidInput.into()));
        };
        // The kubelet takes no notice of names with a leading dot.
        let mut hidden_name = std::ffi::OsString::from(".");
        hidden_name.push(name);
        let hidden = folder.join(hidden_name);
        if hidden.as_os_str().len() > MAX_PATH_BYTES {
            return Err(BindError::TooLong(path.to_owned()));
        }
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(folder)
            .map_err(|e| BindError::io("create", folder, e))?;
        if UnixStream::connect(path).is_ok() {
            return Err(BindError::InUse(path.to_owned()));
        }
        match fs::remove_file(&hidden) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                return Err(BindError::io("remove", &hidden, e));
            }
            _ => {}
        }
        let listener =
            UnixListener::bind(&hidden).map_err(|e| BindError::io("bind", &hidden, e))?;
        let prepared = fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))
            .and_then(|()| listener.set_nonblocking(true))
            .and_then(|()| fs::symlink_metadata(&hidden));
        let meta = prepared.map_err(|e| BindError::io("prepare", &hidden, e))?;
        Ok(Self {
            path: path.to_owned(),
            hidden,
            inode: (meta.dev(), meta.ino()),
            listener: Some(listener),
            shown: false,
        })
    }

    /// Gives the socket its name. Callers that connect from now on are served.
    pub(crate) fn show(&mut self) -> Result<(), BindError> {
        fs::rename(&self.hidden, &self.path).map_err(|e| BindError::io("rename", &self.path, e))?;
        self.shown = true;
        Ok(())
    }

    /// Where it is, or would be, shown.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is what stands at its path.
    pub(crate) fn is_in_place(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode)
    }

    /// The listener, for serving. Once.
    pub(crate) fn listener(&mut self) -> io::Result<tokio::net::UnixListener> {
        let listener = self.listener.take().ok_or(ErrorKind::NotConnected)?;
        tokio::net::UnixListener::from_std(listener)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let path = mem::take(if self.shown { &mut self.path } else { &mut self.hidden });
        let ours =
            fs::symlink_metadata(&path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours && let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "cannot remove a socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_hidden_until_shown_and_goes_when_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/csi.sock");
        let mut socket = Socket::bind(&path).unwrap();
        assert!(!path.exists());
        socket.show().unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 0);
        drop(Socket::bind(&path).unwrap());
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 0);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("csi.sock");
        let served = UnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path), Err(BindError::InUse(_))));
        drop(served);
        // Left by a process that was killed, as is a hidden one.
        fs::write(folder.path().join(".csi.sock"), "").unwrap();
        let mut socket = Socket::bind(&path).unwrap();
        socket.show().unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn the_socket_of_a_successor_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("csi.sock");
        let mut old = Socket::bind(&path).unwrap();
        old.show().unwrap();
        fs::remove_file(&path).unwrap();
        let _new = UnixListener::bind(&path).unwrap();
        drop(old);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_long_path_is_refused_by_name() {
        let path = PathBuf::from(format!("/tmp/{}/csi.sock", "long".repeat(30)));
        let error = Socket::bind(&path).unwrap_err();
        assert!(matches!(error, BindError::TooLong(_)), "{error}");
    }
}
