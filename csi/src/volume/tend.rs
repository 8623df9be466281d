//! Streaming volumes as their sessions go on: turned native, given another session, or let go.
//!
//! ```text
//! each volume that streams, and its FUSE mount
//!   ├─ its image is complete           ─► kernel mounts, in all pods; the session ends
//!   ├─ its session serves              ─► nothing to do
//!   ├─ a layer was wrong               ─► nothing: its pod must be deleted
//!   └─ the pull failed, the process died ─► another session, whose mount takes the place
//! each session without a volume        ─► ends
//! ```
//!
//! All of that is found out of records, mounts and the sessions' report, again and again: it does not
//! matter who died when, or what the agent had begun.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use carport_image::pull::{PullPolicy, PullRequest};
use carport_image::{Digest, Reference};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::disk::{Mounted, Pin};
use super::{StoreError, VolumeRecord, Volumes, blocking};
use crate::mount::Device;
use crate::mount::native::{self, Turned};
use crate::stream::{Event, Failure, Known, Open, Session, State, Streams, Unopened};

/// How often is looked after what nobody tells of.
const LOOK: Duration = Duration::from_secs(1);

/// From one try to the next, at first and at most.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// After so many tries to have a session the image is pulled without one.
const SESSION_TRIES: u32 = 4;

/// So often mounts that were turned are looked for again, over half a minute; until then their session runs.
const TURN_TRIES: u32 = 6;

/// A volume at whose target a call hangs for longer is left for the next look.
const TURN: Duration = Duration::from_secs(1);

/// The reason of a pull whose source sent something else than the digest's bytes.
const WRONG: &str = "mismatch";

/// What is remembered between two looks.
#[derive(Default)]
struct Tended {
    /// Mounts that were turned, or should have been.
    turning: HashMap<Device, Turning>,
    /// Images that are brought again.
    resumed: HashMap<Digest, (Pace, Option<AbortOnDropHandle<()>>)>,
    /// Sessions whose failure has been told.
    failed: HashSet<Device>,
}

/// Mounts that are looked at again: containers that were being made have them, too.
struct Turning {
    digest: Digest,
    pace: Pace,
    /// Keeps the number from being another file system's by the next look.
    pin: Option<Arc<Pin>>,
}

/// Ever more rarely.
#[derive(Debug, Clone, Copy)]
struct Pace {
    next: Instant,
    delay: Duration,
    tries: u32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { next: Instant::now(), delay: AGAIN.0, tries: 0 }
    }
}

impl Pace {
    /// Whether it is time.
    fn is_due(&mut self) -> bool {
        let now = Instant::now();
        let due = now >= self.next;
        if due {
            self.next = now + self.delay;
            self.delay = (self.delay * 2).min(AGAIN.1);
            self.tries += 1;
        }
        due
    }
}

impl Volumes {
    /// Keeps streaming volumes right until `stop`: turns them native when their image is complete, gives
    /// them another session where theirs is dead, and ends sessions that nobody needs any more.
    pub async fn keep_streams(&self, stop: CancellationToken) {
        let Some(streams) = &self.streams else { return stop.cancelled().await };
        let tending = async {
            let (mut known, mut volumes) = (streams.known(), self.changes());
            let mut look = tokio::time::interval(LOOK);
            let mut tended = Tended::default();
            loop {
                let busy = self.tend(streams, &mut tended).await.unwrap_or_else(|error| {
                    tracing::error!(%error, "cannot look after streaming volumes");
                    true
                });
                tokio::select! {
                    _ = known.changed() => {}
                    _ = volumes.changed() => {}
                    _ = look.tick(), if busy => {}
                }
            }
        };
        tokio::select! {
            () = streams.follow(&stop) => {}
            () = tending => {}
        }
    }

    /// Does what is to be done now; false where nothing streams.
    async fn tend(&self, streams: &Streams, tended: &mut Tended) -> Result<bool, StoreError> {
        let known = streams.known().borrow().clone();
        let sessions = match &known {
            Known::Nothing => return Ok(false),
            Known::Away => &[][..],
            Known::Sessions(sessions) => sessions,
        };
        let disk = self.inner.disk.clone();
        let volumes = blocking(move || disk.streaming()).await?;
        tell(streams, sessions, tended);
        if volumes.is_empty() && sessions.is_empty() {
            *tended = Tended::default();
            return Ok(false);
        }
        let images: HashSet<Digest> = volumes
            .iter()
            .map(|(record, _)| record.digest)
            .chain(sessions.iter().map(|session| session.shown.digest))
            .chain(tended.turning.values().map(|turning| turning.digest))
            .collect();
        tended.resumed.retain(|digest, _| images.contains(digest));
        for digest in images {
            let of_image = |(record, _): &&(VolumeRecord, Mounted)| record.digest == digest;
            let volumes: Vec<_> = volumes.iter().filter(of_image).collect();
            let disk = self.inner.disk.clone();
            let rootfs = blocking(move || disk.rootfs(&digest)).await?;
            let newest = known.newest(&digest);
            let mut stale: Vec<Arc<Pin>> = Vec::new();
            for (record, mounted) in &volumes {
                match mounted {
                    Mounted::Native => self.now_native(record).await?,
                    Mounted::Fuse(pin) => stale.push(Arc::clone(pin)),
                    Mounted::Nothing => {}
                }
            }
            if let Some(rootfs) = rootfs {
                self.end_complete(streams, sessions, digest).await;
                self.turn(streams, tended, digest, stale, rootfs).await;
            } else if let Some(Session { shown, state: State::Arriving, .. }) = newest {
                stale.retain(|pin| pin.device != shown.device);
                self.turn(streams, tended, digest, stale, shown.mount.clone()).await;
            } else if !stale.is_empty() && !is_wrong(newest) {
                let (record, _) = volumes[0];
                self.resume(streams, tended, record);
            }
        }
        let shown: HashSet<Device> = volumes.iter().filter_map(|(_, m)| device(m)).collect();
        tended.turning.retain(|device, turning| turning.pin.is_some() || shown.contains(device));
        self.end_unused(streams, sessions).await?;
        Ok(true)
    }

    /// Puts mounts of `root` in the place of those of `stale`, in all pods, and of what was turned before.
    async fn turn(
        &self,
        streams: &Streams,
        tended: &mut Tended,
        digest: Digest,
        stale: Vec<Arc<Pin>>,
        root: PathBuf,
    ) {
        for pin in stale {
            let new = || Turning { digest, pace: Pace::default(), pin: None };
            let device = pin.device;
            tended.turning.entry(device).or_insert_with(new).pin = Some(pin);
        }
        let of_image = tended.turning.iter_mut().filter(|(_, turning)| turning.digest == digest);
        for (&device, turning) in of_image {
            let Some(pin) = &turning.pin else { continue };
            let (held, due) = (Arc::clone(pin), turning.pace.is_due());
            if turning.pace.tries >= TURN_TRIES {
                turning.pin = None;
            }
            if !due {
                continue;
            }
            let from = root.clone();
            let turned = blocking(move || {
                let _held = held;
                native::turn(device, &from)
            });
            match turned.await {
                Ok(Turned { turned, remaining, .. }) => {
                    for mount in &remaining {
                        tracing::warn!(namespace = %mount.namespace, target = %mount.target.display(),
                            why = %mount.why, "a mount of a streamed image stays as it is");
                    }
                    if !turned.is_empty() {
                        tracing::info!(%device, root = %root.display(), mounts = turned.len(),
                            "turned the mounts of a streamed image");
                        self.changed();
                    }
                    streams.tell(&Event::Turned { mounts: turned.len(), left: remaining.len() });
                }
                Err(error) => tracing::warn!(%device, %error, "cannot turn mounts"),
            }
        }
    }

    async fn now_native(&self, record: &VolumeRecord) -> Result<(), StoreError> {
        let place = self.inner.targets.enter(&record.target);
        let Ok(turn) = tokio::time::timeout(TURN, place.turn()).await else { return Ok(()) };
        let (disk, record) = (self.inner.disk.clone(), record.clone());
        blocking(move || {
            let _turn = turn;
            disk.now_native(&record)
        })
        .await
    }

    /// Has the image of `record` brought again, in a session where there can be one.
    fn resume(&self, streams: &Streams, tended: &mut Tended, record: &VolumeRecord) {
        let (pace, task) = tended.resumed.entry(record.digest).or_default();
        if task.as_ref().is_some_and(|task| !task.is_finished()) || !pace.is_due() {
            return;
        }
        let digest = record.digest;
        // What a tag points to by now is not what the pods have.
        let image: Reference = match record.image.digest() {
            Some(_) => record.image.clone(),
            None => format!("{}@{digest}", record.image).parse().unwrap_or(record.image.clone()),
        };
        tracing::warn!(%image, tries = pace.tries, "a streamed image has no session; resuming");
        let (volumes, streams) = (self.clone(), streams.clone());
        let alone = pace.tries > SESSION_TRIES;
        *task = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let secret = streams.remembered(&digest);
            let open = Open::new(image.clone(), PullPolicy::IfNotPresent, volumes.access, &secret);
            let answer = match streams.open(open).await {
                Ok(mut opening) => opening.answer().await,
                Err(why) => Err(why),
            };
            match answer {
                Ok(_) => {}
                Err(Unopened::Failed(Failure { message, .. })) => {
                    tracing::warn!(%image, why = message, "cannot bring a streamed image");
                }
                Err(Unopened::Unshown(why)) => {
                    tracing::warn!(%image, why, "cannot have a session for a streamed image");
                    if alone {
                        let request = PullRequest { secret, ..PullRequest::new(image.clone()) };
                        if let Err(error) = volumes.inner.puller.start(request).wait().await {
                            tracing::warn!(%image, %error, "cannot bring a streamed image");
                        }
                    }
                }
            }
            volumes.changed();
        })));
    }

    /// Ends the sessions of a complete image: new volumes are kernel mounts.
    async fn end_complete(&self, streams: &Streams, sessions: &[Session], digest: Digest) {
        let open = |session: &&Session| {
            session.open && session.shown.digest == digest && session.state == State::Complete
        };
        for session in sessions.iter().filter(open) {
            end(streams, session).await;
        }
    }

    /// Ends sessions that no volume shows.
    async fn end_unused(&self, streams: &Streams, sessions: &[Session]) -> Result<(), StoreError> {
        if sessions.iter().all(|session| !session.open) {
            return Ok(());
        }
        let _alone = self.inner.making.write().await;
        let disk = self.inner.disk.clone();
        let volumes = blocking(move || disk.streaming()).await?;
        let used: HashSet<Digest> = volumes.iter().map(|(record, _)| record.digest).collect();
        streams.forget_but(|digest| used.contains(digest));
        let known = streams.known().borrow().clone();
        for session in sessions.iter().filter(|session| session.open) {
            let shown = &session.shown;
            let has_volume =
                volumes.iter().any(|(_, mounted)| device(mounted) == Some(shown.device));
            let newest = known.newest(&shown.digest).map(|newest| newest.shown.number);
            let is_newest = newest == Some(shown.number);
            let has_more = is_newest && used.contains(&shown.digest);
            if !has_volume && !has_more {
                end(streams, session).await;
            }
        }
        Ok(())
    }
}

fn device(mounted: &Mounted) -> Option<Device> {
    match mounted {
        Mounted::Fuse(pin) => Some(pin.device),
        Mounted::Native | Mounted::Nothing => None,
    }
}

/// Says once of each session that it has failed.
fn tell(streams: &Streams, sessions: &[Session], tended: &mut Tended) {
    for Session { shown, image, state, .. } in sessions {
        if let State::Failed(Failure { reason, message }) = state
            && tended.failed.insert(shown.device)
        {
            tracing::error!(%image, digest = %shown.digest, reason, why = message,
                "the pull of a streamed image failed: reads of what has not come are errors");
            streams.tell(&Event::Failed { reason });
        }
    }
    let living: HashSet<Device> = sessions.iter().map(|session| session.shown.device).collect();
    tended.failed.retain(|device| living.contains(device));
    streams.tell(&Event::Sessions {
        arriving: sessions.iter().filter(|s| s.state == State::Arriving).count(),
        complete: sessions.iter().filter(|s| s.state == State::Complete).count(),
        failed: sessions.iter().filter(|s| matches!(s.state, State::Failed(_))).count(),
    });
}

/// Whether pods have read what the digest does not stand for.
fn is_wrong(session: Option<&Session>) -> bool {
    session.is_some_and(|session| match &session.state {
        State::Failed(failure) => failure.reason == WRONG,
        State::Arriving | State::Complete => false,
    })
}

async fn end(streams: &Streams, session: &Session) {
    let digest = session.shown.digest;
    match streams.end(session.shown.number).await {
        Ok(()) => tracing::info!(%digest, number = session.shown.number, "let a session end"),
        Err(error) => tracing::warn!(%digest, %error, "cannot end a session"),
    }
}
