//! Publishing an image that arrives: a bind mount of its session's mount.
//!
//! ```text
//! publish ─► the image is here? ─► session ─► record ─► bind mount
//!                │                    │ cannot be shown
//!                └─ as in mode wait ◄─┘
//! ```
//!
//! What becomes of it as the session goes on is [`super::tend`]'s.

use std::sync::Arc;
use std::time::SystemTime;

use carport_image::Digest;
use carport_image::pull::{Priority, PullPolicy, PullProgress, PullState};
use carport_image::source::PullSecret;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::disk::Wanted;
use super::targets::Turn;
use super::{Condition, Interrupted, Mode, PublishError, Volumes, blocking};
use crate::stream::{Failure, Known, Open, State, Unopened};

/// What became of a publish that would stream.
pub(super) enum Streamed {
    /// It is in place.
    Published(Digest),
    /// The volume is made when the image is complete.
    Wait(Turn),
}

impl Volumes {
    /// Makes a volume of an image that arrives, where one is wanted and can be had.
    pub(super) async fn stream(
        &self,
        wanted: &Wanted,
        secret: &PullSecret,
        turn: Turn,
        deadline: Instant,
        withdrawn: &CancellationToken,
    ) -> Result<Streamed, PublishError> {
        let asked = &wanted.attributes;
        let Some(streams) = self.streams.as_ref().filter(|_| asked.mode == Mode::Stream) else {
            return Ok(Streamed::Wait(turn));
        };
        if asked.pull_policy != PullPolicy::Always {
            let (disk, image) = (self.inner.disk.clone(), asked.image.clone());
            let here = blocking(move || disk.has(&image)).await?;
            if here || asked.pull_policy == PullPolicy::Never {
                return Ok(Streamed::Wait(turn));
            }
        }
        let open = Open::new(asked.image.clone(), asked.pull_policy, self.access, secret);
        let opening = match streams.open(open).await {
            Ok(mut opening) => {
                match self.until(deadline, withdrawn, opening.answer()).await {
                    Ok(Ok(Some(shown))) => Ok((opening, shown)),
                    // The pull finds it here.
                    Ok(Ok(None)) => return Ok(Streamed::Wait(turn)),
                    Ok(Err(why)) => Err(why),
                    Err(Interrupted::Withdrawn) => {
                        opening.give_up().await;
                        return Err(PublishError::Withdrawn(wanted.target.to_string()));
                    }
                    Err(why) => {
                        let late = PublishError::StillPulling(Box::new(self.progress(wanted)));
                        return Err(why.error(&wanted.target, late));
                    }
                }
            }
            Err(why) => Err(why),
        };
        let (opening, shown) = match opening {
            Ok(opened) => opened,
            Err(Unopened::Failed(Failure { reason, message })) => {
                let (disk, wanted) = (self.inner.disk.clone(), wanted.clone());
                let error = PublishError::NotArriving { reason, message };
                let refuse = move || (disk.after_failure(&wanted, error), turn);
                return Err(blocking(refuse).await.0);
            }
            Err(Unopened::Unshown(why)) => {
                tracing::warn!(image = %asked.image, why, "cannot stream; the pod waits for all of it");
                return Ok(Streamed::Wait(turn));
            }
        };
        // A session ends when it has no volume: not between the record and the answer's end.
        let making = Arc::clone(&self.inner.making).read_owned().await;
        let (disk, wanted, session) = (self.inner.disk.clone(), wanted.clone(), shown.clone());
        let committed = blocking(move || {
            // Held to the end, also when the caller is gone.
            let _held = (opening, making);
            if !disk.sees(&session)? {
                return Ok(Some(turn));
            }
            let _turn = turn;
            disk.commit_arriving(&wanted, &session).map(|()| None)
        });
        match committed.await? {
            None => {
                streams.remember(shown.digest, secret.clone());
                Ok(Streamed::Published(shown.digest))
            }
            Some(turn) => {
                tracing::error!(image = %asked.image, mount = %shown.mount.display(),
                    "a session's mount is not to be seen; give the container with the agent the \
                     mount propagation HostToContainer and the one with the sessions Bidirectional: \
                     the pod waits for all of its image");
                Ok(Streamed::Wait(turn))
            }
        }
    }

    /// How far the image is that a session is asked for.
    fn progress(&self, wanted: &Wanted) -> PullProgress {
        let image = &wanted.attributes.image;
        let pulls = self.inner.puller.pulls().into_iter();
        pulls.rev().find(|pull| pull.reference == *image).unwrap_or_else(|| PullProgress {
            reference: image.clone(),
            digest: image.digest(),
            state: PullState::Resolving,
            priority: Priority::Demand,
            done_bytes: 0,
            fetched_bytes: 0,
            total_bytes: 0,
            started_at: SystemTime::now(),
            bytes_per_second: 0.0,
        })
    }

    /// What is wrong with the session of an image; nothing where it is well.
    pub(super) fn session_condition(&self, digest: &Digest) -> Option<Condition> {
        let streams = self.streams.as_ref()?;
        let known = streams.known();
        let known = known.borrow();
        let why = match known.newest(digest).map(|session| &session.state) {
            _ if *known == Known::Nothing => return None,
            Some(State::Arriving | State::Complete) => return None,
            Some(State::Failed(failure)) => failure.message.clone(),
            // Not for long, as it is looked for again and again.
            None => "the process that serves it is gone, and is started again".to_owned(),
        };
        Some(Condition::Abnormal(format!("reads of it are errors: {why}")))
    }
}
