//! The agent's side: asks the process with the sessions, and follows what it reports.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use carport_image::source::PullSecret;
use carport_image::{Digest, Puller};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::wire::{Answer, Ask, Failure, Open, Pull, Report, Session, Shown};
use super::{Line, hear, say, socket};

/// Starts the process with the sessions, and does not wait for it.
pub type Starter = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// How long the process may take to listen.
const START: Duration = Duration::from_secs(10);

/// How long it may take to answer what needs no work.
const ANSWER: Duration = Duration::from_secs(5);

/// How often it is looked for.
const POLL: Duration = Duration::from_millis(20);

/// How often somebody who does not serve is looked for while nobody asks for anything.
const AWAY: Duration = Duration::from_secs(1);

/// What is told of streaming volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// So many sessions there are.
    Sessions {
        /// Whose image is on its way.
        arriving: usize,
        /// Whose image is complete, and who are served until they end.
        complete: usize,
        /// Whose pull has failed.
        failed: usize,
    },
    /// The pull of a session has failed.
    Failed {
        /// As `PullError::reason`.
        reason: &'a str,
    },
    /// Mounts of a session were to be replaced.
    Turned {
        /// So many were.
        mounts: usize,
        /// So many could not be.
        left: usize,
    },
}

type Observer = Arc<dyn Fn(&Event<'_>) + Send + Sync>;

/// The sessions of this node, as the agent knows them. Clones share all state.
#[derive(Clone)]
pub struct Streams {
    inner: Arc<Inner>,
    observer: Observer,
}

struct Inner {
    folder: PathBuf,
    start: Option<Starter>,
    puller: Puller,
    known: watch::Sender<Known>,
    starting: tokio::sync::Mutex<()>,
    connected: Notify,
    /// Of images that pods read: for pulls that must be begun again.
    secrets: Mutex<HashMap<Digest, PullSecret>>,
}

/// What is known of the process.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Known {
    /// It has not been looked for yet.
    Nothing,
    /// There is none.
    Away,
    /// It has these sessions.
    Sessions(Vec<Session>),
}

impl Known {
    /// The newest session of an image.
    pub(crate) fn newest(&self, digest: &Digest) -> Option<&Session> {
        let Self::Sessions(sessions) = self else { return None };
        let fits = |session: &&Session| session.shown.digest == *digest;
        sessions.iter().filter(fits).max_by_key(|session| session.shown.number)
    }
}

/// Asks the process that listens in `folder` how everything is, and waits for its first answer.
///
/// # Errors
///
/// When nobody listens there, or the answer does not come within 5 s.
pub async fn check(folder: &Path) -> io::Result<()> {
    let asked = async {
        let mut line = Line::new(UnixStream::connect(socket(folder)).await?);
        say(&mut line.write, &Ask::Watch).await?;
        match hear::<Report>(&mut line.read).await? {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    };
    tokio::time::timeout(ANSWER, asked).await?
}

/// Why an image is not shown while it arrives.
#[derive(Debug)]
pub(crate) enum Unopened {
    /// It cannot be had.
    Failed(Failure),
    /// It can be had, and waited for.
    Unshown(String),
}

impl Streams {
    /// The sessions of the process that listens in `folder`; `start` starts one where there is none.
    /// What it pulls is shown among the pulls of `puller`.
    pub fn new(folder: impl Into<PathBuf>, puller: Puller, start: Option<Starter>) -> Self {
        Self {
            inner: Arc::new(Inner {
                folder: folder.into(),
                start,
                puller,
                known: watch::Sender::new(Known::Nothing),
                starting: tokio::sync::Mutex::default(),
                connected: Notify::new(),
                secrets: Mutex::default(),
            }),
            observer: Arc::new(|_| {}),
        }
    }

    /// Tells `observer` what happens. It must not wait.
    #[must_use]
    pub fn observed_by(self, observer: impl Fn(&Event<'_>) + Send + Sync + 'static) -> Self {
        Self { observer: Arc::new(observer), ..self }
    }

    pub(crate) fn tell(&self, event: &Event<'_>) {
        (self.observer)(event);
    }

    pub(crate) fn known(&self) -> watch::Receiver<Known> {
        self.inner.known.subscribe()
    }

    pub(crate) fn remember(&self, digest: Digest, secret: PullSecret) {
        self.secrets().insert(digest, secret);
    }

    pub(crate) fn remembered(&self, digest: &Digest) -> PullSecret {
        self.secrets().get(digest).cloned().unwrap_or_default()
    }

    pub(crate) fn forget_but(&self, wanted: impl Fn(&Digest) -> bool) {
        self.secrets().retain(|digest, _| wanted(digest));
    }

    fn secrets(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, PullSecret>> {
        self.inner.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for an image to be shown while it arrives.
    pub(crate) async fn open(&self, open: Open) -> Result<Opening, Unopened> {
        let unshown = |error: io::Error| Unopened::Unshown(format!("the process for it: {error}"));
        let mut line = self.connect().await.map_err(unshown)?;
        say(&mut line.write, &Ask::Open(open)).await.map_err(unshown)?;
        Ok(Opening { line })
    }

    /// Lets a session end, unless somebody is about to make a volume of it.
    pub(crate) async fn end(&self, number: u64) -> io::Result<()> {
        let ended = async {
            let mut line = Line::new(UnixStream::connect(socket(&self.inner.folder)).await?);
            say(&mut line.write, &Ask::End(number)).await?;
            hear::<String>(&mut line.read).await.map(drop)
        };
        tokio::time::timeout(ANSWER, ended).await?
    }

    async fn connect(&self) -> io::Result<Line> {
        let path = socket(&self.inner.folder);
        let gone = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
        };
        let mut connected = UnixStream::connect(&path).await;
        if let (Err(error), Some(start)) = (&connected, &self.inner.start)
            && gone(error)
        {
            let _turn = self.inner.starting.lock().await;
            connected = UnixStream::connect(&path).await;
            if connected.as_ref().is_err_and(gone) {
                let start = Arc::clone(start);
                tokio::task::spawn_blocking(move || start()).await.map_err(io::Error::other)??;
                let deadline = Instant::now() + START;
                while connected.as_ref().is_err_and(gone) && Instant::now() < deadline {
                    tokio::time::sleep(POLL).await;
                    connected = UnixStream::connect(&path).await;
                }
            }
        }
        self.inner.connected.notify_one();
        connected.map(Line::new)
    }

    /// Follows what the process reports, until `stop`.
    pub(crate) async fn follow(&self, stop: &CancellationToken) {
        let inner = &self.inner;
        let followed = async {
            loop {
                let error = self.listen().await.err();
                inner.puller.show_elsewhere(Vec::new());
                let before = inner.known.send_replace(Known::Away);
                match before {
                    Known::Sessions(sessions) if !sessions.is_empty() => {
                        tracing::warn!(?error, "the process with the streaming sessions is gone");
                    }
                    Known::Sessions(_) => tracing::info!("no process has streaming sessions"),
                    Known::Nothing | Known::Away => {}
                }
                tokio::select! {
                    () = inner.connected.notified() => {}
                    () = tokio::time::sleep(AWAY) => {}
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = followed => {}
        }
    }

    async fn listen(&self) -> io::Result<()> {
        let mut line = Line::new(UnixStream::connect(socket(&self.inner.folder)).await?);
        say(&mut line.write, &Ask::Watch).await?;
        while let Some(Report { pid, sessions, pulls }) = hear(&mut line.read).await? {
            self.inner.puller.show_elsewhere(pulls.into_iter().map(Pull::progress).collect());
            let known = Known::Sessions(sessions);
            self.inner.known.send_if_modified(|before| {
                if !matches!(before, Known::Sessions(_)) {
                    tracing::info!(pid, "the process with the streaming sessions is there");
                }
                let news = *before != known;
                *before = known;
                news
            });
        }
        Ok(())
    }
}

/// A request under way. Dropping it lets the pull go on; once it is answered, the session stays at
/// least until then.
pub(crate) struct Opening {
    line: Line,
}

impl Opening {
    /// Waits until the image can be read; `None` when all of it is here.
    pub(crate) async fn answer(&mut self) -> Result<Option<Shown>, Unopened> {
        match hear(&mut self.line.read).await {
            Ok(Some(Answer::Arriving(shown))) => Ok(Some(shown)),
            Ok(Some(Answer::Complete)) => Ok(None),
            Ok(Some(Answer::Failed(failure))) => Err(Unopened::Failed(failure)),
            Ok(Some(Answer::Unshown(why))) => Err(Unopened::Unshown(why)),
            Ok(None) => Err(Unopened::Unshown("the process for it ended".to_owned())),
            Err(error) => Err(Unopened::Unshown(format!("the process for it: {error}"))),
        }
    }

    /// Says that nobody wants it any more.
    pub(crate) async fn give_up(mut self) {
        if let Err(error) = say(&mut self.line.write, &Ask::GiveUp).await {
            tracing::debug!(%error, "a request was over before it was given up");
        }
    }
}
