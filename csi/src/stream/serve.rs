//! The process that holds the sessions: what `carport fuse` runs.
//!
//! ```text
//! open ─► pull ─► its files are known ─► session: mounted ─► all is here ─► turned native by the agent
//!           │                              │                                   │
//!           └─ the image is here: told     └─ the pull failed: served as far   └─ end ─► unmounted
//!                                             as it came                            ─► last file closed
//! ```

use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use carport_image::Puller;
use carport_image::pull::{Arriving, PullHandle, PullProgress, PullState};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::wire::{Answer, Ask, Open, Pull, Report, Session, Shown, State};
use super::{Line, hear, say, socket};
use crate::fuse::{self, FuseError, FuseMount};
use crate::mount::{KernelMounter, MountError, Mounter as _};
use crate::socket::{BindError, Modes, Serving, Socket, Sockets};

/// How often what moves is told.
const TICK: Duration = Duration::from_secs(1);

/// A process that nobody needs stays for so long: the next pod may come soon.
const IDLE: Duration = Duration::from_secs(30);

/// How long pulls may take to save what came, and mounts to end; Kubernetes kills after 30 s.
const PATIENCE: Duration = Duration::from_secs(10);

/// A node has some hundred pods at most, each asking once at a time.
const MAX_CONNECTIONS: usize = 1024;

/// How sessions are served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where the socket and the mounts are; made where it is missing.
    pub folder: PathBuf,
    /// How long a read waits for bytes that have not come, before it is an error.
    pub read_timeout: Duration,
    /// Whether to end when nothing has been shown or pulled for a while.
    pub until_idle: bool,
    /// How long a pull goes on whose caller went away before it could be shown.
    pub pull_grace: Duration,
}

/// Serves until `end`, or until nobody needs it where the options say so.
///
/// At the end who waits for bytes gets an error, pulls stop where they can be gone on from, and
/// reads of what is here are answered meanwhile.
///
/// # Errors
///
/// When another process serves there, or the folder cannot be used.
pub async fn serve(
    puller: Puller,
    options: ServeOptions,
    end: impl Future<Output = ()>,
) -> Result<(), BindError> {
    let path = socket(&options.folder);
    let mut bound = Socket::bind(&path, Modes::ROOT)?;
    // Whoever was here before is gone.
    let folder = options.folder.clone();
    let cleared = tokio::task::spawn_blocking(move || clear(&folder)).await;
    if let Err(error) = cleared {
        tracing::warn!(%error, "cannot clear what an earlier process left");
    }
    bound.show()?;
    let stop = CancellationToken::new();
    let mut incoming = bound
        .serve(Serving::new("sessions", Sockets::default()), stop.clone())
        .map_err(|e| BindError::io("listen at", &path, e))?;
    tracing::info!(folder = %options.folder.display(), pid = std::process::id(), "serving sessions");
    let until_idle = options.until_idle;
    let server = Arc::new(Server::new(puller, options));
    let tasks = TaskTracker::new();
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut end = pin!(end);
    let mut look = tokio::time::interval(TICK);
    let mut needed = Instant::now();
    loop {
        tokio::select! {
            () = &mut end => break,
            Some(connection) = incoming.accept() => {
                let Ok(place) = Arc::clone(&connections).try_acquire_owned() else { continue };
                let server = Arc::clone(&server);
                needed = Instant::now();
                tasks.spawn(async move {
                    let _place = place;
                    server.converse(connection.into_stream()).await;
                });
            }
            _ = look.tick(), if until_idle => {
                if server.is_needed() {
                    needed = Instant::now();
                } else if needed.elapsed() > IDLE {
                    break;
                }
            }
        }
    }
    stop.cancel();
    while incoming.accept().await.is_some() {}
    server.shut_down().await;
    tracing::info!("no sessions any more");
    Ok(())
}

/// Takes away what a process left that was killed.
fn clear(folder: &Path) {
    let mounts = KernelMounter.under(folder).unwrap_or_default();
    for mount in mounts.iter().filter(|mount| mount.fs_type == fuse::FS_TYPE) {
        if let Err(error) = fuse::unmount(&mount.target) {
            tracing::warn!(%error, "left a dead mount");
        }
    }
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        // Only empty folders go.
        let _ = fs::remove_dir(entry.path());
    }
}

struct Server {
    puller: Puller,
    options: ServeOptions,
    /// One session is made at a time, so that there are no two of an image.
    making: tokio::sync::Mutex<()>,
    table: Mutex<Table>,
    changes: watch::Sender<u64>,
    tasks: TaskTracker,
}

struct Table {
    last: u64,
    sessions: Vec<Held>,
}

struct Held {
    session: Session,
    mount: Arc<FuseMount>,
    /// Calls that are about to make a volume of it.
    holders: usize,
    /// Pulls that bring it.
    pulls: usize,
    end: CancellationToken,
}

/// Keeps a session from being ended.
struct Hold {
    server: Arc<Server>,
    shown: Shown,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.server.change(self.shown.number, |held| held.holders -= 1);
    }
}

/// Behind those of every process before this one: one that ends may still take its own mounts away.
fn first_number() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or_default()
}

fn under_way(pulls: Vec<PullProgress>) -> impl Iterator<Item = Pull> {
    pulls.into_iter().filter_map(Pull::of)
}

impl Server {
    fn new(puller: Puller, options: ServeOptions) -> Self {
        Self {
            puller,
            options,
            making: tokio::sync::Mutex::default(),
            table: Mutex::new(Table { last: first_number(), sessions: Vec::new() }),
            changes: watch::Sender::new(0),
            tasks: TaskTracker::new(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, number: u64, change: impl FnOnce(&mut Held)) {
        let mut table = self.table();
        if let Some(held) = table.sessions.iter_mut().find(|h| h.session.shown.number == number) {
            change(held);
        }
        drop(table);
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
    }

    fn is_needed(&self) -> bool {
        let over =
            |pull: &PullProgress| matches!(pull.state, PullState::Done | PullState::Failed { .. });
        !self.table().sessions.is_empty() || !self.puller.pulls().iter().all(over)
    }

    fn report(&self) -> Report {
        Report {
            pid: std::process::id(),
            sessions: self.table().sessions.iter().map(|held| held.session.clone()).collect(),
            pulls: under_way(self.puller.pulls()).collect(),
        }
    }

    async fn converse(self: Arc<Self>, stream: UnixStream) {
        let mut line = Line::new(stream);
        let done = match hear(&mut line.read).await {
            Ok(Some(Ask::Open(open))) => self.open(open, &mut line).await,
            Ok(Some(Ask::Watch)) => self.tell(&mut line).await,
            Ok(Some(Ask::End(number))) => {
                self.end(number);
                say(&mut line.write, &"ended").await
            }
            Ok(Some(Ask::GiveUp) | None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = done {
            tracing::debug!(%error, "a connection ended");
        }
    }

    async fn open(self: &Arc<Self>, open: Open, line: &mut Line) -> std::io::Result<()> {
        let pull = match open.request() {
            Ok(request) => self.puller.start(request),
            Err(error) => return say(&mut line.write, &Answer::Unshown(error.to_string())).await,
        };
        let mut said = pin!(hear::<Ask>(&mut line.read));
        let arriving = tokio::select! {
            biased;
            arriving = pull.arriving() => arriving,
            said = &mut said => {
                // Else the caller's time is over, who comes again.
                if !matches!(said, Ok(Some(Ask::GiveUp))) {
                    let grace = self.options.pull_grace;
                    self.tasks.spawn(async move {
                        let _ = tokio::time::timeout(grace, pull.wait()).await;
                    });
                }
                return Ok(());
            }
        };
        // Its last steps are not waited for in a session of their own.
        let arriving = match arriving {
            Some(arriving) if !self.is_stored(&arriving).await => Some(arriving),
            _ => None,
        };
        let Some(arriving) = arriving else {
            let answer = match pull.wait().await {
                Ok(_) => Answer::Complete,
                Err(error) => Answer::Failed(error.into()),
            };
            return say(&mut line.write, &answer).await;
        };
        match self.session(&arriving, pull).await {
            Ok(hold) => {
                say(&mut line.write, &Answer::Arriving(hold.shown.clone())).await?;
                // The caller makes its volume.
                let _ = said.await;
                Ok(())
            }
            Err(error) => say(&mut line.write, &Answer::Unshown(error.to_string())).await,
        }
    }

    async fn is_stored(&self, arriving: &Arriving) -> bool {
        let (store, digest) = (self.puller.store().clone(), arriving.digest());
        let image = tokio::task::spawn_blocking(move || store.image(&digest)).await;
        image.is_ok_and(|image| image.is_ok_and(|image| image.is_some()))
    }

    /// The session of an image, and its pull with it.
    async fn session(
        self: &Arc<Self>,
        arriving: &Arc<Arriving>,
        pull: PullHandle,
    ) -> Result<Hold, FuseError> {
        let _turn = self.making.lock().await;
        let number = match self.find(arriving) {
            Some(number) => number,
            None => self.make(arriving, &pull).await?,
        };
        let mut shown = None;
        self.change(number, |held| {
            held.holders += 1;
            held.pulls += 1;
            shown = Some((held.session.shown.clone(), held.end.clone()));
        });
        let Some((shown, end)) = shown else {
            return Err(FuseError::io("show an image", std::io::Error::other("it ended at once")));
        };
        let server = Arc::clone(self);
        self.tasks.spawn(async move {
            tokio::select! {
                () = end.cancelled() => {}
                ended = pull.wait() => server.change(number, |held| {
                    held.pulls -= 1;
                    held.session.state = match ended {
                        Ok(_) => State::Complete,
                        // Another one may still bring it.
                        Err(_) if held.pulls > 0 || held.session.state == State::Complete => return,
                        Err(error) => State::Failed(error.into()),
                    };
                }),
            }
        });
        Ok(Hold { server: Arc::clone(self), shown })
    }

    fn find(&self, arriving: &Arriving) -> Option<u64> {
        let table = self.table();
        let fits = |held: &&Held| {
            let Session { shown, state, open, .. } = &held.session;
            shown.digest == arriving.digest() && *open && !matches!(state, State::Failed(_))
        };
        table.sessions.iter().find(fits).map(|held| held.session.shown.number)
    }

    async fn make(
        self: &Arc<Self>,
        arriving: &Arc<Arriving>,
        pull: &PullHandle,
    ) -> Result<u64, FuseError> {
        let number = {
            let mut table = self.table();
            table.last += 1;
            table.last
        };
        let (digest, image) = (arriving.digest(), pull.progress().reference);
        // Never a path that was used before: a session that ends unmounts its own only.
        let target = self.options.folder.join(format!("{}.{number}", digest.hex()));
        let seen = Arc::clone(arriving);
        let (store, patience) = (self.puller.store().clone(), self.options.read_timeout);
        let mounted = tokio::task::spawn_blocking(move || {
            fs::DirBuilder::new()
                .mode(0o700)
                .create(&target)
                .map_err(|e| FuseError::io(format!("make {}", target.display()), e))?;
            let mount = FuseMount::mount_arriving(&seen, &store, None, patience, &target);
            if mount.is_err() {
                let _ = fs::remove_dir(&target);
            }
            mount
        });
        let mount = match mounted.await {
            Ok(mount) => Arc::new(mount?),
            Err(error) => return Err(FuseError::io("mount", std::io::Error::other(error))),
        };
        let files = arriving.tree().files();
        let shown = Shown {
            number,
            digest,
            mount: mount.target().to_owned(),
            device: mount.device(),
            bytes: files.iter().map(|(_, size, _)| size).sum(),
            files: files.len() as u64,
            waited_for: arriving.waited_for(),
        };
        if shown.waited_for > 0 {
            tracing::warn!(%image, %digest, layers = shown.waited_for,
                "layers that cannot be read before they are complete were waited for");
        }
        let end = CancellationToken::new();
        let session = Session { shown, image, state: State::Arriving, open: true };
        let held = Held {
            session: session.clone(),
            mount: Arc::clone(&mount),
            holders: 0,
            pulls: 0,
            end: end.clone(),
        };
        self.table().sessions.push(held);
        let server = Arc::clone(self);
        self.tasks.spawn(async move { server.follow(&session.shown, mount, end).await });
        Ok(number)
    }

    /// Takes the mount away when it is told to, and waits for its end.
    async fn follow(&self, shown: &Shown, mount: Arc<FuseMount>, end: CancellationToken) {
        tokio::select! {
            () = mount.ended() => {}
            () = end.cancelled() => {
                mount.end_waits();
                let unmounting = Arc::clone(&mount);
                let unmounted = tokio::task::spawn_blocking(move || unmounting.unmount()).await;
                if let Ok(Err(error)) = unmounted {
                    tracing::warn!(%error, "left a mount behind");
                }
                mount.ended().await;
            }
        }
        // Pulls that only it was for.
        end.cancel();
        self.table().sessions.retain(|held| held.session.shown.number != shown.number);
        self.changes.send_modify(|n| *n = n.wrapping_add(1));
        let folder = shown.mount.clone();
        let gone = tokio::task::spawn_blocking(move || {
            drop(mount);
            // Where it was turned native before it was told to end.
            KernelMounter.unmount(&folder)?;
            fs::remove_dir(&folder)
                .map_err(|e| MountError::new(format!("remove {}", folder.display()), e))
        });
        if let Ok(Err(error)) = gone.await {
            tracing::warn!(%error, "left a folder behind");
        }
        tracing::info!(digest = %shown.digest, number = shown.number, "session ended");
    }

    /// Lets a session end, unless somebody is about to make a volume of it.
    fn end(&self, number: u64) {
        self.change(number, |held| {
            if held.holders == 0 {
                held.session.open = false;
                held.end.cancel();
            }
        });
    }

    /// Tells how everything is, until the other side goes.
    async fn tell(&self, line: &mut Line) -> std::io::Result<()> {
        let (mut changes, mut pulls) = (self.changes.subscribe(), self.puller.changes());
        let mut tick = tokio::time::interval(TICK);
        let mut gone = pin!(hear::<Ask>(&mut line.read));
        let mut last = None;
        loop {
            let report = self.report();
            if last.as_ref() != Some(&report) {
                say(&mut line.write, &report).await?;
                last = Some(report);
            }
            tokio::select! {
                _ = &mut gone => return Ok(()),
                changed = changes.changed() => if changed.is_err() { return Ok(()) },
                changed = pulls.changed() => if changed.is_err() { return Ok(()) },
                _ = tick.tick() => {}
            }
        }
    }

    async fn shut_down(&self) {
        let mounts: Vec<_> =
            self.table().sessions.iter().map(|held| Arc::clone(&held.mount)).collect();
        for mount in &mounts {
            mount.end_waits();
        }
        // Reads of what is here are answered meanwhile.
        if tokio::time::timeout(PATIENCE, self.puller.shutdown()).await.is_err() {
            tracing::warn!("pulls that did not stop in time are cut off");
        }
        for held in &self.table().sessions {
            held.end.cancel();
        }
        // Sessions whose files are still open end with this process.
        self.tasks.close();
        let _ = tokio::time::timeout(Duration::from_secs(1), self.tasks.wait()).await;
    }
}
