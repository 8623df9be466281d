//! The thread between the two others, of a compressed layer: what it unpacks to.
//!
//! ```text
//! bytes of the blob ─► decoder ─► buffers, filled ─► the unpacking thread
//!                                   ▲ emptied ◄───────┘
//! ```
//!
//! There are [`BUFFERS`] of them and no more, so that a decoder that is ahead waits. It is here that
//! places to go on from are found: behind a frame or member, or between two blocks of a member.

use std::sync::mpsc;

use sha2::{Digest as _, Sha256};

use super::front::{Mark, Packed, Step};
use super::inflate::{Inflater, OUT_BYTES};
use super::{CHECKPOINT_BYTES, LayerError};

/// Enough to even out the pace of the two threads.
const BUFFERS: usize = 6;

/// A part of what the blob unpacks to. The memory goes back to the decoder in the end.
pub(super) struct Lent {
    memory: Vec<u8>,
    filled: usize,
    home: mpsc::Sender<Vec<u8>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.filled]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Nobody needs it where the decoder is gone.
        let _ = self.home.send(std::mem::take(&mut self.memory));
    }
}

pub(super) struct Decoding {
    inflater: Inflater,
    sender: mpsc::Sender<Step<Lent>>,
    /// What is being filled.
    out: Option<Lent>,
    empty: mpsc::Receiver<Vec<u8>>,
    home: mpsc::Sender<Vec<u8>>,
    /// The last place in the blob to go on from.
    marked: u64,
}

/// The unpacking thread is gone; it says itself why.
struct Gone;

enum Halt {
    Gone,
    Failed(LayerError),
}

impl From<Gone> for Halt {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

impl Decoding {
    /// Goes on from `offset` of the blob, where the decoder is.
    pub(super) fn new(inflater: Inflater, offset: u64, sender: mpsc::Sender<Step<Lent>>) -> Self {
        let (home, empty) = mpsc::channel();
        for _ in 0..BUFFERS {
            // Cannot fail: the other end is in this function.
            let _ = home.send(vec![0; OUT_BYTES]);
        }
        Self { inflater, sender, out: None, empty, home, marked: offset }
    }

    /// Takes steps until there are no more, or the unpacking thread is gone.
    pub(super) fn run<C>(mut self, steps: &mpsc::Receiver<Step<Packed<C>>>) {
        for step in steps {
            match self.pass(step) {
                Ok(()) => {}
                Err(Halt::Gone) => return,
                Err(Halt::Failed(error)) => {
                    let _ = self.send(Step::Failed(error));
                    return;
                }
            }
        }
    }

    fn pass<C>(&mut self, step: Step<Packed<C>>) -> Result<(), Halt> {
        let step = match step {
            Step::Bytes(Packed { bytes, at, before: Some(before), .. }) => {
                return self.decode(&bytes, at, &before);
            }
            Step::Bytes(_) => {
                return Err(Halt::Failed(LayerError::Refused("no hash of the blob".to_owned())));
            }
            Step::Local(local) => {
                self.ends()?;
                Step::Local(local)
            }
            Step::Verified => {
                self.ends()?;
                Step::Verified
            }
            Step::Mark(mark) => Step::Mark(mark),
            Step::Failed(error) => Step::Failed(error),
        };
        self.hand_on()?;
        Ok(self.send(step)?)
    }

    /// The blob's bytes behind this begin with a frame or member of their own, or there are none.
    fn ends(&self) -> Result<(), Halt> {
        self.inflater.finish().map_err(|why| Halt::Failed(LayerError::Refused(why)))
    }

    /// Unpacks bytes of the blob from `at` on, `before` being the hash over what comes before them.
    fn decode(&mut self, bytes: &[u8], at: u64, before: &Sha256) -> Result<(), Halt> {
        let mut done = 0;
        loop {
            if self.out.as_ref().is_some_and(|out| out.filled == out.memory.len()) {
                self.hand_on()?;
            }
            let out = match &mut self.out {
                Some(out) => out,
                none => {
                    let memory = self.empty.recv().map_err(|_| Gone)?;
                    none.insert(Lent { memory, filled: 0, home: self.home.clone() })
                }
            };
            let is_due = at + done as u64 - self.marked >= CHECKPOINT_BYTES;
            let room = &mut out.memory[out.filled..];
            let step = self.inflater.step(&bytes[done..], room, is_due);
            let step = step.map_err(|why| Halt::Failed(LayerError::Refused(why)))?;
            let is_full = step.written == room.len();
            out.filled += step.written;
            done += step.read;
            if is_due && done > 0 {
                let midway = match step.border {
                    true => None,
                    false => self.inflater.midway(&bytes[..done]),
                };
                if step.border || midway.is_some() {
                    self.hand_on()?;
                    let mut hash = before.clone();
                    hash.update(&bytes[..done]);
                    self.marked = at + done as u64;
                    self.send(Step::Mark(Mark::new(self.marked, &hash, midway)))?;
                }
            }
            // A full buffer may not have been all that there is.
            if done == bytes.len() && !is_full {
                return Ok(());
            }
        }
    }

    fn hand_on(&mut self) -> Result<(), Gone> {
        match self.out.take() {
            Some(out) if out.filled > 0 => self.send(Step::Bytes(out)),
            _ => Ok(()),
        }
    }

    fn send(&self, step: Step<Lent>) -> Result<(), Gone> {
        self.sender.send(step).map_err(|_| Gone)
    }
}
