//! Accepting connections on a unix socket for as long as it is served.
//!
//! ```text
//! accept ─► Connection ─► server
//!    │ no descriptors: wait, log once, accept again
//! look, once a second ─► the file is gone ─► bind and show another one ─► accept there
//! ```
//!
//! Somebody who cleans up may remove a socket's file; a listener without a file serves nobody. The
//! file is looked for instead of being watched: a watch follows a folder that is removed, not the
//! one that takes its place. Connections that were accepted, and those that wait to be, are served
//! on whatever happens to the file.

use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::{FutureExt as _, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::server::Connected;

use super::{BindError, Modes, Socket};
use crate::accept::AcceptErrors;

/// How often the file is looked for: one `lstat`.
const LOOK: Duration = Duration::from_secs(1);

/// How often it is tried to put a socket back where that failed: another process may serve there.
const RETRY: Duration = Duration::from_secs(5);

/// What happens to the sockets of a process. Clones share all state.
#[derive(Clone)]
pub struct Sockets {
    missing: watch::Sender<BTreeMap<PathBuf, String>>,
    observer: Arc<dyn Fn(&SocketEvent) + Send + Sync>,
}

/// Something that is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketEvent {
    /// A connection could not be accepted on this socket.
    NotAccepted(&'static str),
    /// This socket's file was gone, and was created again.
    Recreated(&'static str),
}

impl Default for Sockets {
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl Sockets {
    /// Reports to `observer`, which must not wait.
    pub fn new(observer: impl Fn(&SocketEvent) + Send + Sync + 'static) -> Self {
        Self { missing: watch::Sender::default(), observer: Arc::new(observer) }
    }

    /// The sockets whose file is gone and could not be created again, and why.
    pub fn missing(&self) -> watch::Receiver<BTreeMap<PathBuf, String>> {
        self.missing.subscribe()
    }

    fn is_missing(&self, path: &Path, why: &str) {
        self.missing.send_if_modified(|missing| {
            missing.insert(path.to_owned(), why.to_owned()).as_deref() != Some(why)
        });
    }

    fn is_back(&self, path: &Path) {
        self.missing.send_if_modified(|missing| missing.remove(path).is_some());
    }
}

/// How a socket is served.
#[derive(Clone)]
pub struct Serving {
    /// What it is called in logs and metrics.
    pub name: &'static str,
    /// Where it is reported what happens to it.
    pub sockets: Sockets,
    /// Whether its folder is created where it is gone, too.
    pub make_folder: bool,
    /// Called before another file is shown in place of one that was removed.
    pub before_shown: Arc<dyn Fn() + Send + Sync>,
    /// Called when a connection ends whose caller sent something, and no call was understood.
    pub not_understood: Arc<dyn Fn(&Caller) + Send + Sync>,
}

impl Serving {
    /// Named so, and nobody has to hear of it.
    pub fn new(name: &'static str, sockets: Sockets) -> Self {
        Self {
            name,
            sockets,
            make_folder: true,
            before_shown: Arc::new(|| {}),
            not_understood: Arc::new(|_| {}),
        }
    }
}

impl Socket {
    /// Accepts connections, and keeps the file in place, until `stop`; then the file is removed.
    /// The socket has been shown, or is by `show` now.
    ///
    /// # Errors
    ///
    /// When the socket cannot be used by this runtime.
    pub fn serve(mut self, serving: Serving, stop: CancellationToken) -> io::Result<Incoming> {
        let listener = self.listener()?;
        let (sender, receiver) = mpsc::channel(1);
        let (path, modes, errors) =
            (self.path().to_owned(), self.modes, AcceptErrors::new(serving.name));
        let file = Shown(Arc::new(Mutex::new(Some(self))));
        let keeper =
            Keeper { path, modes, file: file.clone(), serving, errors, sender, not_before: None };
        let task = tokio::spawn(keeper.run(listener, stop));
        Ok(Incoming { receiver, file, _task: AbortOnDropHandle::new(task) })
    }
}

/// The file of a socket that is served; nothing once it is not served any more.
#[derive(Clone)]
struct Shown(Arc<Mutex<Option<Socket>>>);

impl Shown {
    fn lock(&self) -> MutexGuard<'_, Option<Socket>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes it, and keeps it from being created again.
    fn close(&self) {
        let socket = self.lock().take();
        drop(socket);
    }

    /// Whether it is where it should be, or is not wanted any more.
    fn is_in_place(&self) -> bool {
        self.lock().as_ref().is_none_or(Socket::is_in_place)
    }

    /// Takes another one in its place; not once it is closed.
    fn replace(&self, socket: Socket) {
        if let Some(shown) = &mut *self.lock() {
            *shown = socket;
        }
    }
}

/// The connections of a socket, and nothing but connections: what goes wrong is dealt with. Dropping
/// it removes the socket's file.
pub struct Incoming {
    receiver: mpsc::Receiver<Connection>,
    file: Shown,
    _task: AbortOnDropHandle<()>,
}

impl Incoming {
    /// The next connection; none once the socket is not served any more.
    ///
    /// # Cancel safety
    ///
    /// No connection is lost.
    pub async fn accept(&mut self) -> Option<Connection> {
        self.receiver.recv().await
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.file.close();
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.receiver.poll_recv(context).map(|connection| connection.map(Ok))
    }
}

struct Keeper {
    path: PathBuf,
    modes: Modes,
    file: Shown,
    serving: Serving,
    errors: AcceptErrors,
    sender: mpsc::Sender<Connection>,
    /// When it may be tried again to put the socket back.
    not_before: Option<Instant>,
}

impl Keeper {
    async fn run(mut self, mut listener: UnixListener, stop: CancellationToken) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let work = async {
            loop {
                tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => {
                            self.errors.over();
                            if !self.hand_on(stream).await {
                                return;
                            }
                        }
                        Err(error) => {
                            (self.serving.sockets.observer)(&SocketEvent::NotAccepted(self.serving.name));
                            self.errors.wait(&error).await;
                        }
                    },
                    _ = look.tick() => {
                        let Some(new) = self.look().await else { continue };
                        let old = std::mem::replace(&mut listener, new);
                        // Those who connected to the old file in time.
                        while let Some(Ok((stream, _))) = old.accept().now_or_never() {
                            if !self.hand_on(stream).await {
                                return;
                            }
                        }
                    }
                }
            }
        };
        stop.run_until_cancelled(work).await;
        self.file.close();
    }

    async fn hand_on(&self, stream: UnixStream) -> bool {
        let connection = Connection::new(stream, Arc::clone(&self.serving.not_understood));
        self.sender.send(connection).await.is_ok()
    }

    /// Another listener where the file was gone, and is back.
    async fn look(&mut self) -> Option<UnixListener> {
        let path = self.path.clone();
        if self.file.is_in_place() {
            if self.not_before.take().is_some() {
                self.serving.sockets.is_back(&path);
            }
            return None;
        }
        if self.not_before.is_some_and(|time| Instant::now() < time) {
            return None;
        }
        match self.bind_again(&path).await {
            Ok((socket, listener)) => {
                self.file.replace(socket);
                self.not_before = None;
                self.serving.sockets.is_back(&path);
                (self.serving.sockets.observer)(&SocketEvent::Recreated(self.serving.name));
                tracing::warn!(socket = %path.display(), "the socket's file was removed; created it again");
                Some(listener)
            }
            Err(error) => {
                let why = error.to_string();
                if self.not_before.is_none() {
                    tracing::error!(socket = %path.display(), why,
                        "the socket's file was removed and cannot be created again; trying every few seconds");
                }
                self.not_before = Some(Instant::now() + RETRY);
                self.serving.sockets.is_missing(&path, &why);
                None
            }
        }
    }

    async fn bind_again(&self, path: &Path) -> Result<(Socket, UnixListener), BindError> {
        let (folder, modes) = (path.parent().unwrap_or(path), self.modes);
        if !self.serving.make_folder && !folder.is_dir() {
            return Err(BindError::io("find", folder, io::ErrorKind::NotFound.into()));
        }
        let (bound, before_shown) = (path.to_owned(), Arc::clone(&self.serving.before_shown));
        // Another process may listen there, and connecting to it may block.
        let made = tokio::task::spawn_blocking(move || {
            let mut socket = Socket::bind(&bound, modes)?;
            before_shown();
            socket.show()?;
            Ok(socket)
        });
        let mut socket = match made.await {
            Ok(made) => made?,
            Err(error) => return Err(BindError::io("bind", path, io::Error::other(error))),
        };
        let listener = socket.listener().map_err(|e| BindError::io("listen at", path, e))?;
        Ok((socket, listener))
    }
}

/// The peer of a connection, and whether one of its calls was understood.
#[derive(Debug, Clone)]
pub struct Caller(Arc<Seen>);

#[derive(Debug)]
struct Seen {
    pid: Option<u32>,
    sent: AtomicBool,
    understood: AtomicBool,
}

impl Caller {
    /// Its process; none where that is not to be seen from this PID namespace.
    pub fn pid(&self) -> Option<u32> {
        self.0.pid
    }

    /// Its process as a person knows it.
    pub fn name(&self) -> String {
        let Some(pid) = self.0.pid else {
            return "a process that is not visible from this PID namespace".to_owned();
        };
        match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
            Ok(name) => format!("{} (process {pid})", name.trim()),
            Err(_) => format!("process {pid}"),
        }
    }

    /// A call of it has arrived.
    pub(crate) fn is_understood(&self) {
        self.0.understood.store(true, Ordering::Relaxed);
    }
}

/// An accepted connection. Its [`Caller`] is an extension of each request that comes over it.
pub struct Connection {
    stream: UnixStream,
    end: End,
}

/// Reports, when the connection is dropped, one that was not understood.
struct End {
    caller: Caller,
    not_understood: Arc<dyn Fn(&Caller) + Send + Sync>,
}

impl Drop for End {
    fn drop(&mut self) {
        let seen = &self.caller.0;
        if seen.sent.load(Ordering::Relaxed) && !seen.understood.load(Ordering::Relaxed) {
            (self.not_understood)(&self.caller);
        }
    }
}

impl Connection {
    fn new(stream: UnixStream, not_understood: Arc<dyn Fn(&Caller) + Send + Sync>) -> Self {
        // The kernel writes 0 for a process of another PID namespace.
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let pid = pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
        let seen = Seen { pid, sent: AtomicBool::new(false), understood: AtomicBool::new(false) };
        Self { stream, end: End { caller: Caller(Arc::new(seen)), not_understood } }
    }

    /// The stream itself, for a protocol that is not gRPC.
    pub(crate) fn into_stream(self) -> UnixStream {
        self.stream
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.end.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
        if buffer.filled().len() > before {
            this.end.caller.0.sent.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}
