//! Unix sockets that appear when they are served and go when they are not.
//!
//! [`Socket::serve`] accepts connections and keeps the file in place: see `incoming`.

use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, mem};

mod incoming;

pub use incoming::{Caller, Connection, Incoming, Serving, SocketEvent, Sockets};

/// `sun_path` less its closing NUL: the system's ABI.
const MAX_PATH_BYTES: usize = 107;

/// Why a socket could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody serves there.
    #[error("bind {}: another process serves there; stop it, or use another path", .0.display())]
    InUse(PathBuf),
    /// A file of another kind has the socket's name.
    #[error("bind {}: a file that is not a socket is in the way; remove it, or use another path", .0.display())]
    NotASocket(PathBuf),
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

/// File modes: of a socket, and of its folder where that has to be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Modes {
    /// Of the socket.
    pub socket: u32,
    /// Of its folder, where it is created; an existing folder keeps its mode.
    pub folder: u32,
}

impl Modes {
    /// For the kubelet, which is root.
    pub const ROOT: Self = Self { socket: 0o600, folder: 0o750 };
}

/// A bound socket that listens under another name until it is shown.
///
/// Dropping it removes the file, unless another process has put its own in place.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    modes: Modes,
    hidden: PathBuf,
    inode: (u64, u64),
    listener: Option<UnixListener>,
    shown: bool,
}

impl Socket {
    /// Binds for `path` and listens. What a killed process left there is replaced when
    /// the socket is shown.
    ///
    /// # Errors
    ///
    /// See [`BindError`].
    pub fn bind(path: &Path, modes: Modes) -> Result<Self, BindError> {
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
        make_folder(folder, modes.folder).map_err(|e| BindError::io("create", folder, e))?;
        if fs::symlink_metadata(path).is_ok_and(|meta| !meta.file_type().is_socket()) {
            return Err(BindError::NotASocket(path.to_owned()));
        }
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
        let prepared = fs::set_permissions(&hidden, fs::Permissions::from_mode(modes.socket))
            .and_then(|()| listener.set_nonblocking(true))
            .and_then(|()| fs::symlink_metadata(&hidden));
        let meta = prepared.map_err(|e| BindError::io("prepare", &hidden, e))?;
        Ok(Self {
            path: path.to_owned(),
            modes,
            hidden,
            inode: (meta.dev(), meta.ino()),
            listener: Some(listener),
            shown: false,
        })
    }

    /// Gives the socket its name. Callers that connect from now on are served.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn show(&mut self) -> Result<(), BindError> {
        fs::rename(&self.hidden, &self.path).map_err(|e| BindError::io("rename", &self.path, e))?;
        self.shown = true;
        Ok(())
    }

    /// Where it is, or would be, shown.
    pub fn path(&self) -> &Path {
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

/// With this mode whatever the umask; an existing folder is left as it is.
fn make_folder(folder: &Path, mode: u32) -> io::Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
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
        let mut socket = Socket::bind(&path, Modes::ROOT).unwrap();
        assert!(!path.exists());
        socket.show().unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(socket);
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 0);
        drop(Socket::bind(&path, Modes::ROOT).unwrap());
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 0);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("csi.sock");
        let served = UnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::bind(&path, Modes::ROOT), Err(BindError::InUse(_))));
        drop(served);
        // Left by a process that was killed, as is a hidden one.
        fs::write(folder.path().join(".csi.sock"), "").unwrap();
        let mut socket = Socket::bind(&path, Modes::ROOT).unwrap();
        socket.show().unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("carport.sock");
        fs::write(&path, "precious").unwrap();
        let refused = Socket::bind(&path, Modes::ROOT).unwrap_err().to_string();
        assert!(refused.contains("is not a socket is in the way; remove it"), "{refused}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn the_modes_are_those_asked_for_whatever_the_umask() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/carport.sock");
        let modes = Modes { socket: 0o660, folder: 0o755 };
        let mut socket = Socket::bind(&path, modes).unwrap();
        socket.show().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o660, 0o755));
    }

    #[test]
    fn the_socket_of_a_successor_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("csi.sock");
        let mut old = Socket::bind(&path, Modes::ROOT).unwrap();
        old.show().unwrap();
        fs::remove_file(&path).unwrap();
        let _new = UnixListener::bind(&path).unwrap();
        drop(old);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_long_path_is_refused_by_name() {
        let path = PathBuf::from(format!("/tmp/{}/csi.sock", "long".repeat(30)));
        let error = Socket::bind(&path, Modes::ROOT).unwrap_err();
        assert!(matches!(error, BindError::TooLong(_)), "{error}");
    }
}
