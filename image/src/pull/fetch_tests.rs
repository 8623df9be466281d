use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::stream;

use super::super::arrive::Shown;
use super::super::meter::Meter;
use super::super::pace::Bandwidth;
use super::super::slots::{Priority, Urgency};
use super::*;
use crate::digest::Digest;
use crate::source::{ManifestName, RawManifest};
use crate::testing::noise;

const MIB: u64 = 1024 * 1024;

/// A blob in memory, and the ways in which its source misbehaves.
struct Blobs {
    content: Bytes,
    ranges: bool,
    local: bool,
    /// Errors to give before the n-th request is served, by its start.
    refusals: Mutex<BTreeMap<u64, Vec<SourceError>>>,
    /// Each body breaks off after so many bytes.
    breaks_after: Option<u64>,
    requests: AtomicUsize,
    sent: Arc<AtomicU64>,
}

impl Blobs {
    fn new(size: u64) -> Self {
        Self {
            content: noise(7, size as usize).into(),
            ranges: true,
            local: false,
            refusals: Mutex::default(),
            breaks_after: None,
            requests: AtomicUsize::new(0),
            sent: Arc::default(),
        }
    }

    fn blob(&self) -> Blob {
        Blob { digest: Digest::of(b"not checked here"), size: self.content.len() as u64 }
    }
}

#[async_trait]
impl Source for Blobs {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn audience(&self) -> crate::source::Audience {
        crate::source::Audience::Everybody
    }

    fn is_local(&self) -> bool {
        self.local
    }

    async fn manifest(&self, _: &ManifestName) -> Result<RawManifest, SourceError> {
        Err(SourceError::NotFound("no manifests here".to_owned()))
    }

    async fn blob(&self, _: &Digest, _: u64, range: Range<u64>) -> Result<BlobBody, SourceError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let refusal = self.refusals.lock().unwrap().get_mut(&range.start).and_then(Vec::pop);
        if let Some(error) = refusal {
            return Err(error);
        }
        let range = if self.ranges { range } else { 0..self.content.len() as u64 };
        let end = self.breaks_after.map_or(range.end, |after| range.end.min(range.start + after));
        let broken = end < range.end;
        let content = self.content.slice(range.start as usize..end as usize);
        let sent = Arc::clone(&self.sent);
        let chunks: Vec<_> = content.chunks(65_536).map(|chunk| content.slice_ref(chunk)).collect();
        let tail = broken.then(|| Err(SourceError::Unavailable("connection reset".to_owned())));
        let stream = stream::iter(chunks.into_iter().map(Ok).chain(tail)).inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
        });
        Ok(BlobBody {
            offset: range.start,
            ranged: self.ranges,
            is_here: false,
            stream: stream.boxed(),
        })
    }
}

fn state(priority: Priority) -> LayerState {
    LayerState {
        meter: Arc::new(Meter::new(Instant::now())),
        urgency: Arc::new(Urgency::new(priority)),
        shown: Shown::default(),
    }
}

async fn fetch_with(
    fetcher: Fetcher,
    blobs: &Arc<Blobs>,
    ranges: &[Range<u64>],
) -> Result<(Vec<u8>, u64), PullError> {
    let (sender, mut chunks) = mpsc::channel(4);
    let state = state(Priority::Demand);
    let source: Arc<dyn Source> = Arc::clone(blobs) as _;
    let (blob, shown, ranges) = (blobs.blob(), state.clone(), ranges.to_vec());
    let fetching =
        tokio::spawn(async move { fetcher.fetch(source, blob, ranges, shown, sender).await });
    let mut got = Vec::new();
    while let Some(chunk) = chunks.recv().await {
        got.extend_from_slice(&chunk.bytes);
    }
    fetching.await.unwrap()?;
    Ok((got, state.meter.read(Instant::now()).fetched_bytes))
}

async fn fetch(blobs: &Arc<Blobs>, start: u64) -> Result<Vec<u8>, PullError> {
    let range = start..blobs.content.len() as u64;
    let fetcher = Fetcher::new(64 * MIB, 4, 3);
    let (got, counted) = fetch_with(fetcher, blobs, std::slice::from_ref(&range)).await?;
    assert_eq!(counted, got.len() as u64);
    Ok(got)
}

#[tokio::test]
async fn ranges_come_out_in_order_from_any_start() {
    for size in [1, RANGE_BYTES - 1, RANGE_BYTES, RANGE_BYTES + 1, 5 * RANGE_BYTES + 12_345] {
        let blobs = Arc::new(Blobs::new(size));
        for start in [0, 1, size / 2, size - 1, size] {
            let got = fetch(&blobs, start).await.unwrap();
            assert!(got == blobs.content[start as usize..], "{size} bytes from {start}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_blob_only_the_wanted_ranges_come_and_a_source_without_ranges_is_read_as_far_as_they_go()
 {
    let end = 4 * RANGE_BYTES;
    let wanted = [0..1, 5..512, 512..513, 70_000..RANGE_BYTES + 3, 3 * RANGE_BYTES - 1..end - 100];
    let length: u64 = wanted.iter().map(length).sum();
    for (ranges, breaks_after) in [(true, None), (false, None), (true, Some(MIB))] {
        let mut blobs = Blobs::new(end);
        (blobs.ranges, blobs.breaks_after) = (ranges, breaks_after);
        let blobs = Arc::new(blobs);
        let fetcher = Fetcher::new(64 * MIB, 4, 3);
        let (got, counted) = fetch_with(fetcher.clone(), &blobs, &wanted).await.unwrap();
        let parts = wanted.iter().map(|range| range.start as usize..range.end as usize);
        let expected: Vec<u8> = parts.flat_map(|part| blobs.content[part].to_vec()).collect();
        assert!(got == expected, "ranges: {ranges}, broken off after {breaks_after:?}");
        if ranges {
            assert_eq!((counted, blobs.sent.load(Ordering::Relaxed)), (length, length));
        } else {
            assert_eq!(blobs.requests.load(Ordering::Relaxed), 1);
            assert!((end - 100..=end).contains(&counted), "{counted}: what came was counted");
        }
        assert_eq!(fetch_with(fetcher, &blobs, &[]).await.unwrap(), (Vec::new(), 0));
    }
}

#[tokio::test]
async fn a_small_range_is_read_where_ranges_are_served() {
    let state = state(Priority::Demand);
    let fetcher = Fetcher::new(64 * MIB, 4, 3);
    for ranges in [true, false] {
        let mut blobs = Blobs::new(100_000);
        blobs.ranges = ranges;
        let (blob, content) = (blobs.blob(), blobs.content.clone());
        let read = fetcher.read(Arc::new(blobs), blob, 70_000..99_000, state.clone());
        let expected = ranges.then(|| content.slice(70_000..99_000));
        assert!(read.await.unwrap() == expected);
    }
    assert_eq!(state.meter.read(Instant::now()).fetched_bytes, 29_000);
}

#[tokio::test]
async fn a_source_without_ranges_is_read_over_one_connection() {
    let mut blobs = Blobs::new(3 * RANGE_BYTES);
    blobs.ranges = false;
    let blobs = Arc::new(blobs);
    assert!(fetch(&blobs, 0).await.unwrap() == blobs.content);
    assert_eq!(blobs.requests.load(Ordering::Relaxed), 1);
    assert!(fetch(&blobs, 12_345).await.unwrap() == blobs.content[12_345..]);
    assert_eq!(blobs.requests.load(Ordering::Relaxed), 2);
}

#[tokio::test(start_paused = true)]
async fn a_range_that_breaks_off_goes_on_from_its_last_byte() {
    for ranges in [true, false] {
        let mut blobs = Blobs::new(RANGE_BYTES + 5 * MIB);
        blobs.breaks_after = Some(if ranges { 3 * MIB } else { RANGE_BYTES + 2 * MIB });
        blobs.ranges = ranges;
        let blobs = Arc::new(blobs);
        if ranges {
            assert!(fetch(&blobs, 0).await.unwrap() == blobs.content);
            assert_eq!(
                blobs.sent.load(Ordering::Relaxed),
                blobs.content.len() as u64,
                "nothing twice"
            );
        } else {
            // Without ranges each try begins at 0 and breaks at the same place: an error, not a loop.
            let error = fetch(&blobs, 0).await.map(|got| got.len()).unwrap_err();
            assert!(error.to_string().contains("connection reset"), "{error}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn transient_errors_are_waited_out_as_the_registry_asks() {
    let blobs = Blobs::new(2 * RANGE_BYTES);
    let throttled = |seconds| SourceError::Throttled {
        message: "429".to_owned(),
        retry_after: Some(Duration::from_secs(seconds)),
    };
    let down = SourceError::Unavailable("503".to_owned());
    blobs.refusals.lock().unwrap().insert(0, vec![throttled(20), throttled(7)]);
    blobs.refusals.lock().unwrap().insert(RANGE_BYTES, vec![down]);
    let blobs = Arc::new(blobs);
    let start = tokio::time::Instant::now();
    assert!(fetch(&blobs, 0).await.unwrap() == blobs.content);
    let waited = start.elapsed();
    assert!((27..30).contains(&waited.as_secs()), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn an_error_for_good_ends_the_fetch_at_once_and_the_last_try_too() {
    let blobs = Blobs::new(3 * RANGE_BYTES);
    let gone = SourceError::NotFound("404".to_owned());
    blobs.refusals.lock().unwrap().insert(RANGE_BYTES, vec![gone]);
    let error = fetch(&Arc::new(blobs), 0).await.unwrap_err();
    assert!(matches!(error, PullError::Source(SourceError::NotFound(_))), "{error}");

    let blobs = Blobs::new(10);
    let down = || SourceError::Unavailable("503".to_owned());
    blobs.refusals.lock().unwrap().insert(0, vec![down(), down(), down(), down()]);
    let blobs = Arc::new(blobs);
    fetch(&blobs, 0).await.unwrap_err();
    assert_eq!(blobs.requests.load(Ordering::Relaxed), 3, "as many as configured");
}

#[tokio::test]
async fn no_more_than_the_window_is_in_memory() {
    let blobs = Arc::new(Blobs::new(8 * RANGE_BYTES));
    let fetcher = Fetcher::new(2 * RANGE_BYTES, 8, 3);
    let (sender, mut chunks) = mpsc::channel(1);
    let state = state(Priority::Demand);
    let source: Arc<dyn Source> = Arc::clone(&blobs) as _;
    let blob = blobs.blob();
    let task = tokio::spawn(async move {
        fetcher.fetch(source, blob, std::iter::once(0..blob.size).collect(), state, sender).await
    });
    let (mut taken, mut most) = (0, 0);
    while let Some(chunk) = chunks.recv().await {
        // Let everybody run as far as they can.
        for _ in 0..64 {
            tokio::task::yield_now().await;
        }
        most = most.max(blobs.sent.load(Ordering::Relaxed) - taken);
        taken += chunk.bytes.len() as u64;
    }
    task.await.unwrap().unwrap();
    assert_eq!(taken, 8 * RANGE_BYTES);
    assert!(most <= 2 * RANGE_BYTES + 65_536, "{most} bytes at once");
}

#[tokio::test]
async fn blobs_that_share_a_small_window_do_not_lock_each_other_out() {
    let fetcher = Fetcher::new(RANGE_BYTES, 4, 3);
    let blobs = Arc::new(Blobs::new(4 * RANGE_BYTES));
    let range = 0..4 * RANGE_BYTES;
    let whole = std::slice::from_ref(&range);
    let both = (fetch_with(fetcher.clone(), &blobs, whole), fetch_with(fetcher, &blobs, whole));
    let (a, b) = tokio::join!(both.0, both.1);
    assert!(a.unwrap().0 == blobs.content && b.unwrap().0 == blobs.content);
}

#[tokio::test(start_paused = true)]
async fn a_cap_holds_for_what_comes_over_the_network() {
    let fetcher = Fetcher::new(64 * MIB, 4, 3);
    fetcher.pace.set(Bandwidth {
        total_bytes_per_second: std::num::NonZeroU64::new(10 * MIB),
        ..Bandwidth::default()
    });
    for (local, seconds) in [(false, 4..6), (true, 0..1)] {
        let mut blobs = Blobs::new(4 * RANGE_BYTES);
        blobs.local = local;
        let start = tokio::time::Instant::now();
        let (got, _) = fetch_with(
            fetcher.clone(),
            &Arc::new(blobs),
            std::slice::from_ref(&(0..4 * RANGE_BYTES)),
        )
        .await
        .unwrap();
        assert_eq!(got.len() as u64, 4 * RANGE_BYTES);
        let took = start.elapsed();
        assert!(seconds.contains(&took.as_secs()), "local: {local}: {took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_prefetch_asks_for_nothing_more_while_demanded_bytes_move() {
    for ranges in [true, false] {
        let fetcher = Fetcher::new(64 * MIB, 2, 3);
        let mut blobs = Blobs::new(8 * RANGE_BYTES);
        blobs.ranges = ranges;
        let blobs = Arc::new(blobs);
        let (sender, mut chunks) = mpsc::channel(1);
        let prefetch = state(Priority::Prefetch(100));
        let (source, blob) = (Arc::clone(&blobs) as Arc<dyn Source>, blobs.blob());
        let (worker, shown) = (fetcher.clone(), prefetch.clone());
        let task = tokio::spawn(async move {
            worker.fetch(source, blob, std::iter::once(0..blob.size).collect(), shown, sender).await
        });
        assert!(chunks.recv().await.is_some());

        // A pod's image goes through meanwhile, and each byte of it holds the other back.
        let demand = state(Priority::Demand);
        let start = tokio::time::Instant::now();
        let mut got = 0;
        while start.elapsed() < Duration::from_secs(10) {
            fetcher.pace.took(1, &demand.urgency).await;
            tokio::select! {
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
                Some(chunk) = chunks.recv() => got += chunk.bytes.len() as u64,
            }
        }
        assert!(got < 3 * RANGE_BYTES, "ranges: {ranges}: {got} bytes came meanwhile");
        prefetch.urgency.raise(Priority::Demand);
        while chunks.recv().await.is_some() {}
        task.await.unwrap().unwrap();
        assert_eq!(prefetch.meter.read(Instant::now()).fetched_bytes, 8 * RANGE_BYTES);
    }
}
