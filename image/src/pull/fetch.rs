//! Fetching of one blob what is wanted: pieces in parallel, handed on in order.
//!
//! ```text
//! wanted ranges ─► piece 0 ═══════►┐
//!                  piece 1 ════►   ├─► in order ─► one queue ─► layer
//!                  piece 2 ═►      ┘
//! ```
//!
//! # What always holds
//!
//! - **Memory is bounded by the window.** A range is asked for only once credit
//!   for all its bytes is there; the credit goes back as its bytes are used.
//! - **No deadlock over credit.** Ranges start in order, so the range that is
//!   handed on always has its own; and only a blob with no range at all under
//!   way waits for credit.
//! - **Retries lose nothing.** A range that breaks off goes on from its last byte.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use backon::BackoffBuilder as _;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::PullError;
use super::layers::LayerState;
use super::pace::Pace;
use crate::layer::{Chunk, Piece, Want};
use crate::manifest::Blob;
use crate::source::{BlobBody, Source, SourceError};

/// Bytes of one ranged request. Much smaller, and the registry's work for each request shows;
/// much larger, and the window holds too few of them.
const RANGE_BYTES: u64 = 12 * 1024 * 1024;

/// Credit is counted in KiB: a semaphore's counter is too small for bytes.
const CREDIT: u64 = 1024;

/// A registry that says "come back in an hour" is asked again earlier than that.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Held while a range's bytes are in memory.
pub(super) type Credit = Arc<OwnedSemaphorePermit>;

/// What all fetches of a puller share.
#[derive(Clone)]
pub(super) struct Fetcher {
    window: Arc<Semaphore>,
    window_credits: u32,
    pub(super) connections: usize,
    attempts: u32,
    pub(super) pace: Arc<Pace>,
    /// Bytes of blobs that came from sources, whatever became of them.
    came: Arc<AtomicU64>,
    /// Pieces that somebody waits for, which need no credit of the window.
    asked: Arc<Semaphore>,
    /// How many of them are under way, and of those that follow them in a file.
    read_now: Arc<watch::Sender<usize>>,
}

/// Pieces of 4 MiB under way at once because somebody waits for them, over all pulls.
const ASKED_PIECES: usize = 8;

/// How long other pieces stand back for those at most: theirs may come from a place that stalls.
const STAND_BACK: Duration = Duration::from_secs(1);

/// Counts a piece that is being read, or soon will be, while it is under way.
struct ReadNow(Arc<watch::Sender<usize>>);

impl Drop for ReadNow {
    fn drop(&mut self) {
        self.0.send_modify(|pieces| *pieces -= 1);
    }
}

impl Fetcher {
    pub(super) fn new(window_bytes: u64, connections: usize, attempts: u32) -> Self {
        let credits = (window_bytes.max(RANGE_BYTES) / CREDIT).min(Semaphore::MAX_PERMITS as u64);
        let credits = u32::try_from(credits).unwrap_or(u32::MAX);
        Self {
            window: Arc::new(Semaphore::new(credits as usize)),
            window_credits: credits,
            connections: connections.max(1),
            attempts: attempts.max(1),
            pace: Arc::new(Pace::new()),
            came: Arc::default(),
            asked: Arc::new(Semaphore::new(ASKED_PIECES)),
            read_now: Arc::new(watch::Sender::new(0)),
        }
    }

    /// Bytes of blobs that came from sources since the start, those that were of no use included.
    pub(super) fn came(&self) -> u64 {
        self.came.load(Ordering::Relaxed)
    }

    /// Hands the bytes of `piece` on as they come, those that have come together at once. It counts as
    /// `memory` bytes of the window.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the transfer; what was handed on is all that came.
    pub(super) async fn piece<F>(
        &self,
        source: &Arc<dyn Source>,
        blob: Blob,
        piece: Piece,
        memory: u64,
        state: &LayerState,
        mut land: impl FnMut(u64, Vec<Bytes>) -> F,
    ) -> Result<(), PullError>
    where
        F: Future<Output = Result<(), PullError>>,
    {
        let Piece { range, want, .. } = piece;
        let _counted = if want == Want::InOrder {
            let mut read_now = self.read_now.subscribe();
            let quiet = read_now.wait_for(|pieces| *pieces == 0);
            // Either way it is this piece's turn then.
            let _ = tokio::time::timeout(STAND_BACK, quiet).await;
            None
        } else {
            self.read_now.send_modify(|pieces| *pieces += 1);
            Some(ReadNow(Arc::clone(&self.read_now)))
        };
        let credit = if want == Want::Asked {
            acquire(&self.asked, 1).await?
        } else {
            self.pace.turn(&state.urgency).await;
            self.credit(memory).await?
        };
        let mut at = range.start;
        let reader = self.reader(Arc::clone(source), blob, range, state.clone());
        let mut under_way = spawn(reader, credit);
        while let Some(chunk) = under_way.chunks.recv().await {
            let mut together = vec![chunk?.bytes];
            while let Ok(chunk) = under_way.chunks.try_recv() {
                together.push(chunk?.bytes);
            }
            let length: usize = together.iter().map(Bytes::len).sum();
            land(at, together).await?;
            at += length as u64;
        }
        Ok(())
    }

    /// Sends the bytes of `ranges` of the blob, in order, into `out`; no chunk holds bytes of two
    /// ranges. The ranges are ascending, do not overlap, and lie in the blob.
    ///
    /// Ends early without an error when `out` is closed.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes all transfers.
    pub(super) async fn fetch(
        &self,
        source: Arc<dyn Source>,
        blob: Blob,
        ranges: Vec<Range<u64>>,
        state: LayerState,
        out: mpsc::Sender<Chunk<Credit>>,
    ) -> Result<(), PullError> {
        let mut pieces = pieces(&ranges).peekable();
        let Some(piece) = pieces.next() else { return Ok(()) };
        self.pace.turn(&state.urgency).await;
        let credit = self.credit(length(&piece)).await?;
        let mut first = self.reader(source, blob, piece, state);
        first.open().await?;
        // The first answer tells whether ranges are served at all.
        if first.is_whole_blob() {
            let left = length(&first.range);
            first.range.end = blob.size;
            return self.stream(first, (credit, left), &ranges, &out).await;
        }

        let template = first.again(0..0);
        let mut under_way = VecDeque::from([spawn(first, credit)]);
        loop {
            while under_way.len() < self.connections
                && let Some(piece) = pieces.peek()
            {
                let credit = if under_way.is_empty() {
                    self.pace.turn(&template.state.urgency).await;
                    self.credit(length(piece)).await?
                } else if self.pace.is_turn(&template.state.urgency)
                    && let Some(credit) = self.try_credit(length(piece))
                {
                    credit
                } else {
                    break;
                };
                under_way.push_back(spawn(template.again(piece.clone()), credit));
                pieces.next();
            }
            let Some(front) = under_way.front_mut() else { return Ok(()) };
            match front.chunks.recv().await {
                Some(Ok(chunk)) => {
                    if out.send(chunk).await.is_err() {
                        return Ok(());
                    }
                }
                Some(Err(e)) => return Err(e),
                None => {
                    under_way.pop_front();
                }
            }
        }
    }

    /// Reads a small range into memory, outside of the window; `None` where the source does not
    /// serve ranges.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes the transfer.
    pub(super) async fn read(
        &self,
        source: Arc<dyn Source>,
        blob: Blob,
        range: Range<u64>,
        state: LayerState,
    ) -> Result<Option<Bytes>, PullError> {
        let mut bytes = BytesMut::with_capacity(length(&range) as usize);
        let is_part = length(&range) < blob.size;
        let mut reader = self.reader(source, blob, range, state);
        reader.open().await?;
        if is_part && reader.is_whole_blob() {
            return Ok(None);
        }
        while let Some(chunk) = reader.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(Some(bytes.freeze()))
    }

    fn reader(
        &self,
        source: Arc<dyn Source>,
        blob: Blob,
        range: Range<u64>,
        state: LayerState,
    ) -> RangeReader {
        let pace = (!source.is_local()).then(|| Arc::clone(&self.pace));
        let (came, attempts) = (Arc::clone(&self.came), self.attempts);
        RangeReader { source, blob, range, state, pace, came, attempts, body: None }
    }

    /// One connection for the blob up to the last of `ranges`, in bounded steps of credit. What
    /// lies between the ranges comes, too, and is dropped.
    async fn stream(
        &self,
        mut reader: RangeReader,
        (mut credit, mut left): (Credit, u64),
        ranges: &[Range<u64>],
        out: &mpsc::Sender<Chunk<Credit>>,
    ) -> Result<(), PullError> {
        let mut wanted = ranges.iter().peekable();
        while wanted.peek().is_some() {
            let at = reader.range.start;
            let Some(bytes) = reader.next().await? else { break };
            let came = at..reader.range.start;
            if bytes.len() as u64 > left {
                // What was handed on before keeps the old credit alive until it is used.
                drop(credit);
                self.pace.turn(&reader.state.urgency).await;
                credit = self.credit(RANGE_BYTES).await?;
                left = RANGE_BYTES;
            }
            left = left.saturating_sub(bytes.len() as u64);
            while let Some(range) = wanted.peek() {
                let part = range.start.max(came.start)..range.end.min(came.end);
                if !part.is_empty() {
                    let place = (part.start - at) as usize..(part.end - at) as usize;
                    let chunk = Chunk { bytes: bytes.slice(place), _credit: Arc::clone(&credit) };
                    if out.send(chunk).await.is_err() {
                        return Ok(());
                    }
                }
                if range.end > came.end {
                    break;
                }
                wanted.next();
            }
        }
        Ok(())
    }

    fn amount(&self, bytes: u64) -> u32 {
        let credits = u32::try_from(bytes.div_ceil(CREDIT)).unwrap_or(u32::MAX);
        credits.clamp(1, self.window_credits)
    }

    async fn credit(&self, bytes: u64) -> Result<Credit, PullError> {
        acquire(&self.window, self.amount(bytes)).await
    }

    fn try_credit(&self, bytes: u64) -> Option<Credit> {
        Arc::clone(&self.window).try_acquire_many_owned(self.amount(bytes)).ok().map(Arc::new)
    }
}

async fn acquire(from: &Arc<Semaphore>, permits: u32) -> Result<Credit, PullError> {
    let permit = Arc::clone(from).acquire_many_owned(permits).await;
    permit
        .map(Arc::new)
        .map_err(|_| PullError::Cancelled("the puller has been shut down".to_owned()))
}

/// The ranges, cut into what one request asks for.
fn pieces(ranges: &[Range<u64>]) -> impl Iterator<Item = Range<u64>> + '_ {
    ranges.iter().flat_map(|range| {
        let end = range.end;
        let starts = range.clone().step_by(RANGE_BYTES as usize);
        starts.map(move |start| start..start.saturating_add(RANGE_BYTES).min(end))
    })
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

/// A range under way in a task of its own.
struct UnderWay {
    // Unbounded, and never longer than the range's credit.
    chunks: mpsc::UnboundedReceiver<Result<Chunk<Credit>, PullError>>,
    _task: AbortOnDropHandle<()>,
}

fn spawn(mut reader: RangeReader, credit: Credit) -> UnderWay {
    let (sender, chunks) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        loop {
            let message = match reader.next().await {
                Ok(Some(bytes)) => Ok(Chunk { bytes, _credit: Arc::clone(&credit) }),
                Ok(None) => return,
                Err(e) => Err(e),
            };
            let failed = message.is_err();
            if sender.send(message).is_err() || failed {
                return;
            }
        }
    });
    UnderWay { chunks, _task: AbortOnDropHandle::new(task) }
}

/// Reads one range to its end, over as many requests as it takes.
struct RangeReader {
    source: Arc<dyn Source>,
    blob: Blob,
    /// What is still to come.
    range: Range<u64>,
    state: LayerState,
    /// Absent where nothing comes over the network.
    pace: Option<Arc<Pace>>,
    came: Arc<AtomicU64>,
    attempts: u32,
    body: Option<BlobBody>,
}

impl RangeReader {
    fn again(&self, range: Range<u64>) -> Self {
        Self {
            source: Arc::clone(&self.source),
            blob: self.blob,
            range,
            state: self.state.clone(),
            pace: self.pace.clone(),
            came: Arc::clone(&self.came),
            attempts: self.attempts,
            body: None,
        }
    }

    /// The source does not do ranges, and has begun to send everything.
    fn is_whole_blob(&self) -> bool {
        self.body.as_ref().is_some_and(|body| !body.ranged)
    }

    async fn open(&mut self) -> Result<(), PullError> {
        let what = || format!("fetch {} from {}", self.blob.digest, self.source.name());
        let body = retry(self.attempts, &what(), || {
            self.source.blob(&self.blob.digest, self.blob.size, self.range.clone())
        })
        .await?;
        self.body = Some(body);
        Ok(())
    }

    /// The next bytes, or `None` when the range is complete.
    async fn next(&mut self) -> Result<Option<Bytes>, PullError> {
        // Attempts are counted while nothing comes; a byte is progress.
        let mut failures = 0;
        loop {
            if self.range.is_empty() {
                return Ok(None);
            }
            if self.body.is_none() {
                self.open().await?;
            }
            let Some(body) = &mut self.body else { continue };
            let error = match body.stream.next().await {
                Some(Ok(mut bytes)) => {
                    if !body.is_here {
                        self.came.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                    let skipped = (self.range.start - body.offset).min(bytes.len() as u64);
                    body.offset += bytes.len() as u64;
                    let _ = bytes.split_to(skipped as usize);
                    let left = self.range.end - self.range.start;
                    bytes.truncate(usize::try_from(left).unwrap_or(usize::MAX));
                    if bytes.is_empty() {
                        continue;
                    }
                    self.range.start += bytes.len() as u64;
                    if body.is_here {
                        self.state.meter.skip(bytes.len() as u64);
                        return Ok(Some(bytes));
                    }
                    self.state.meter.add(bytes.len() as u64, Instant::now());
                    if let Some(pace) = &self.pace {
                        pace.took(bytes.len() as u64, &self.state.urgency).await;
                    }
                    return Ok(Some(bytes));
                }
                Some(Err(e)) => e,
                None => SourceError::Unavailable(format!(
                    "{} ended blob {} at byte {} of {}",
                    self.source.name(),
                    self.blob.digest,
                    self.range.start,
                    self.blob.size
                )),
            };
            self.body = None;
            failures += 1;
            if !error.is_transient() || failures >= self.attempts {
                return Err(error.into());
            }
            tracing::debug!(%error, at = self.range.start, "going on with a new request");
            tokio::time::sleep(pause(failures, &error)).await;
        }
    }
}

/// Runs `attempt` until it succeeds, fails for good, or has been tried `attempts` times.
pub(super) async fn retry<T, F>(
    attempts: u32,
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> Result<T, SourceError>
where
    F: Future<Output = Result<T, SourceError>>,
{
    let mut failures = 0;
    loop {
        match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => {
                failures += 1;
                if !error.is_transient() || failures >= attempts {
                    return Err(error);
                }
                let wait = pause(failures, &error);
                tracing::warn!(%error, wait_ms = wait.as_millis() as u64, "{what}: trying again");
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// Half a second, doubled each time, with jitter so that a cluster does not come back as one; or
/// what the registry asked for.
fn pause(failures: u32, error: &SourceError) -> Duration {
    if let SourceError::Throttled { retry_after: Some(wait), .. } = error {
        return (*wait).min(LONGEST_WAIT);
    }
    backon::ExponentialBuilder::default()
        .with_jitter()
        .with_min_delay(Duration::from_millis(500))
        .with_max_delay(Duration::from_secs(15))
        .without_max_times()
        .build()
        .nth(failures.saturating_sub(1) as usize)
        .unwrap_or(LONGEST_WAIT)
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
mod tests;
