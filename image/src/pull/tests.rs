use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::json;

use super::*;
use crate::manifest::Compression;
use crate::source::RegistryOptions;
use crate::testing::{Entry, Layout, TestLayer, listing, noise, tar};

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
    puller: Puller,
}

fn puller(root: &Path) -> Puller {
    let store = Store::open(root).unwrap();
    let sources = Sources::new(RegistryOptions::default()).unwrap();
    Puller::new(store, sources, PullOptions { attempts: 2, ..PullOptions::default() })
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::new(&dir.path().join("layout"));
    let puller = puller(&dir.path().join("store"));
    Bench { dir, layout, puller }
}

impl Bench {
    fn layer(&self, compression: Compression, entries: &[Entry<'_>]) -> TestLayer {
        self.layout.layer(&tar(entries), compression)
    }

    async fn pull(&self, reference: &Reference) -> Result<Pulled, PullError> {
        self.pull_by(reference, PullPolicy::IfNotPresent).await
    }

    async fn pull_by(
        &self,
        reference: &Reference,
        policy: PullPolicy,
    ) -> Result<Pulled, PullError> {
        let request = PullRequest { policy, ..PullRequest::new(reference.clone()) };
        self.puller.start(request).wait().await
    }

    fn store(&self) -> &Store {
        self.puller.store()
    }

    /// Until no pull is on the board.
    async fn until_quiet(&self) {
        let mut changes = self.puller.changes();
        while !self.puller.pulls().is_empty() {
            changes.changed().await.unwrap();
        }
    }

    fn tree(&self, pulled: &Pulled) -> Vec<String> {
        listing(&self.store().rootfs(&pulled.digest))
    }

    /// Nothing half-made: no tree, no reference, nothing under way.
    fn assert_nothing_is_left(&self) {
        for folder in ["trees", "refs", "ingest", "leases"] {
            let left = listing(&self.store().root().join(folder));
            assert!(left.is_empty(), "{folder}: {left:?}");
        }
    }
}

use Compression::{Gzip, None as Plain, Zstd};

#[tokio::test]
async fn an_image_becomes_a_tree_with_its_layers_laid_over_each_other() {
    let mut bench = bench();
    let weights = noise(1, 3_000_000);
    let layers = [
        bench.layer(Plain, &[Entry::Dir("models"), Entry::File("models/weights", &weights)]),
        bench.layer(Gzip, &[Entry::File("models/old/a", b"a"), Entry::File("models/config", b"1")]),
        bench.layer(
            Zstd,
            &[
                Entry::File("models/.wh.old", b""),
                Entry::File("models/config", b"22"),
                Entry::Hardlink("models/same", "models/weights"),
                Entry::Symlink("latest", "models"),
            ],
        ),
    ];
    let reference = bench.layout.image("v1", &layers);
    let pulled = bench.pull(&reference).await.unwrap();
    assert_eq!(
        bench.tree(&pulled),
        ["latest -> models", "models/", "models/config", "models/same", "models/weights"]
    );
    let rootfs = bench.store().rootfs(&pulled.digest);
    assert_eq!(fs::read(rootfs.join("models/config")).unwrap(), b"22");
    assert!(fs::read(rootfs.join("models/weights")).unwrap() == weights);
    let inode = |name: &str| fs::metadata(rootfs.join(name)).unwrap().ino();
    assert_eq!(inode("models/same"), inode("models/weights"));
    let image = bench.store().image(&pulled.digest).unwrap().unwrap();
    assert_eq!(image.references, [reference.to_string()]);
    assert_eq!((pulled.image.files, pulled.image.unpacked_bytes), (3, 6_000_002));
    assert_eq!(pulled.written_bytes, 3_000_000 + 1 + 1 + 2, "each file of each layer once");
    assert!(!pulled.already_present && pulled.fetched_bytes > 3_000_000);
    assert_eq!(bench.puller.pulls(), [], "what is done is in the store, not under way");
}

#[tokio::test]
async fn what_is_here_is_not_fetched_again() {
    let mut bench = bench();
    let shared = bench.layer(Plain, &[Entry::File("base", &noise(2, 100_000))]);
    let extra = bench.layer(Plain, &[Entry::File("adapter", b"lora")]);
    let base = bench.layout.image("base", std::slice::from_ref(&shared));
    let tuned = bench.layout.image("tuned", &[shared.clone(), extra.clone(), shared.clone()]);
    bench.pull(&base).await.unwrap();
    let size = |layer: &TestLayer| fs::metadata(bench.layout.blob_path(&layer.blob)).unwrap().len();
    let (shared_bytes, extra_bytes) = (size(&shared), size(&extra));
    let before = Traffic { fetched_bytes: shared_bytes, ..Traffic::default() };
    assert_eq!(bench.puller.traffic(), before);
    fs::remove_file(bench.layout.blob_path(&shared.blob)).unwrap();
    let pulled = bench.pull(&tuned).await.unwrap();
    assert!(pulled.fetched_bytes < 10_000, "{} bytes", pulled.fetched_bytes);
    let fetched_bytes = shared_bytes + extra_bytes;
    let after = Traffic { fetched_bytes, skipped_bytes: shared_bytes, ..before };
    assert_eq!(bench.puller.traffic(), after);
    assert_eq!(bench.tree(&pulled), ["adapter", "base"]);
    assert!(bench.pull(&tuned).await.unwrap().already_present);
    assert_eq!(bench.store().usage().unwrap().objects, 2);
}

#[tokio::test]
async fn callers_of_the_same_image_share_one_pull_and_images_a_layer() {
    let mut bench = bench();
    let shared = bench.layer(Plain, &[Entry::File("base", &noise(3, 2_000_000))]);
    let references: Vec<_> = (0..4)
        .map(|n| {
            let own = bench.layer(Plain, &[Entry::File("own", &[n])]);
            bench.layout.image(&format!("v{n}"), &[shared.clone(), own])
        })
        .collect();
    let handles: Vec<_> =
        (0..40).map(|n| bench.puller.start(PullRequest::new(references[n % 4].clone()))).collect();
    assert_eq!(bench.puller.pulls().len(), 4);
    for handle in &handles {
        handle.wait().await.unwrap();
        assert_eq!(handle.progress().state, PullState::Done);
        assert_eq!(handle.progress().done_bytes, handle.progress().total_bytes);
    }
    assert_eq!(bench.store().usage().unwrap().objects, 5);
}

#[tokio::test]
async fn policies_ask_the_source_when_kubernetes_would() {
    let mut bench = bench();
    let one = bench.layer(Plain, &[Entry::File("f", b"one")]);
    let two = bench.layer(Plain, &[Entry::File("f", b"two!")]);
    let reference = bench.layout.image("latest", &[one]);
    let never = bench.pull_by(&reference, PullPolicy::Never).await.unwrap_err();
    assert!(matches!(&never, PullError::NotStored(why) if why.contains("Never")), "{never}");
    bench.assert_nothing_is_left();

    let first = bench.pull(&reference).await.unwrap();
    let again = bench.pull_by(&reference, PullPolicy::Always).await.unwrap();
    assert!(again.already_present && again.digest == first.digest);
    bench.layout.image("latest", &[two]);
    assert_eq!(
        bench.pull(&reference).await.unwrap().digest,
        first.digest,
        "IfNotPresent does not ask"
    );
    let moved = bench.pull_by(&reference, PullPolicy::Always).await.unwrap();
    assert_ne!(moved.digest, first.digest);
    let never = bench.pull_by(&reference, PullPolicy::Never).await.unwrap();
    assert_eq!(never.digest, moved.digest);
    let images = bench.store().images().unwrap();
    let names: Vec<_> = images.iter().map(|image| (image.digest, image.references.len())).collect();
    assert_eq!(names.len(), 2);
    assert!(names.contains(&(first.digest, 0)) && names.contains(&(moved.digest, 1)));
}

#[tokio::test]
async fn an_index_gives_the_image_of_the_platform_that_is_asked_for() {
    let mut bench = bench();
    let entry = |bench: &Bench, arch: &str| {
        let layer = bench.layer(Plain, &[Entry::File(arch, b"x")]);
        let mut manifest = bench.layout.manifest(&[layer]);
        manifest["platform"] = json!({"os": "linux", "architecture": arch});
        manifest
    };
    let index = serde_json::to_vec(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry(&bench, "arm64"), entry(&bench, "amd64")],
    }))
    .unwrap();
    let digest = bench.layout.blob(&index);
    let descriptor = json!({"mediaType": "application/vnd.oci.image.index.v1+json",
                            "digest": digest, "size": index.len()});
    let reference = bench.layout.tag("multi", &descriptor);
    for arch in ["amd64", "arm64", "amd64"] {
        let platform = Platform { os: "linux".into(), architecture: arch.into() };
        let request = PullRequest { platform, ..PullRequest::new(reference.clone()) };
        let pulled = bench.puller.start(request).wait().await.unwrap();
        assert_eq!(bench.tree(&pulled), [arch]);
    }
    let platform = Platform { os: "linux".into(), architecture: "s390x".into() };
    let request = PullRequest { platform, ..PullRequest::new(reference) };
    let error = bench.puller.start(request).wait().await.unwrap_err();
    assert!(
        error.to_string().contains("no image for linux/s390x; there is: linux/arm64, linux/amd64"),
        "{error}"
    );
}

#[tokio::test]
async fn bad_images_fail_with_one_clear_error_and_leave_nothing() {
    let mut bench = bench();
    let through =
        bench.layer(Plain, &[Entry::Symlink("evil", "/etc"), Entry::File("evil/cron.d/x", b"x")]);
    let reference = bench.layout.image("through", &[through]);
    let error = bench.pull(&reference).await.unwrap_err();
    assert!(
        matches!(&error, PullError::Unpack(why) if why.contains("leads through the symlink \"evil\"")),
        "{error}"
    );
    bench.assert_nothing_is_left();

    let climbs = bench.layer(Gzip, &[Entry::File("../../etc/cron.d/x", b"x")]);
    let reference = bench.layout.image("climbs", &[climbs]);
    let error = bench.pull(&reference).await.unwrap_err();
    assert!(matches!(&error, PullError::Unpack(why) if why.contains("climbs out")), "{error}");
    bench.assert_nothing_is_left();

    let altered = bench.layer(Plain, &[Entry::File("g", &noise(5, 10_000))]);
    let reference = bench.layout.image("altered", std::slice::from_ref(&altered));
    let path = bench.layout.blob_path(&altered.blob);
    let mut bytes = fs::read(&path).unwrap();
    bytes[5_000] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = bench.pull(&reference).await.unwrap_err();
    assert!(
        matches!(&error, PullError::Mismatch(why) if why.contains(&altered.blob.to_string())),
        "{error}"
    );
    bench.assert_nothing_is_left();
    assert_eq!(bench.puller.pulls().len(), 3, "failures are remembered");
    assert_eq!(
        bench.puller.pulls()[2].state,
        PullState::Failed { reason: "mismatch", message: error.to_string() }
    );

    let gone = bench.layer(Plain, &[Entry::File("f", b"x")]);
    let reference = bench.layout.image("gone", std::slice::from_ref(&gone));
    fs::remove_file(bench.layout.blob_path(&gone.blob)).unwrap();
    let error = bench.pull(&reference).await.unwrap_err();
    assert!(matches!(error, PullError::Source(SourceError::NotFound(_))), "{error}");
    bench.assert_nothing_is_left();
}

#[tokio::test]
async fn verified_layers_stay_when_another_one_fails() {
    let mut bench = bench();
    let good = bench.layer(Plain, &[Entry::File("f", &noise(4, 10_000))]);
    let gone = bench.layer(Plain, &[Entry::File("g", b"x")]);
    let alone = bench.layout.image("alone", std::slice::from_ref(&good));
    let both = bench.layout.image("both", &[good.clone(), gone.clone()]);
    fs::remove_file(bench.layout.blob_path(&gone.blob)).unwrap();
    bench.pull(&both).await.unwrap_err();
    // Stopped or finished, the good layer is there for the next pull.
    let pulled = bench.pull(&alone).await.unwrap();
    assert_eq!(bench.tree(&pulled), ["f"]);
}

#[tokio::test]
async fn a_manifest_that_is_not_what_its_digest_says_is_refused() {
    let mut bench = bench();
    let layer = bench.layer(Plain, &[Entry::File("f", b"x")]);
    let manifest = bench.layout.manifest(&[layer]);
    bench.layout.tag("v1", &manifest);
    let digest: Digest = manifest["digest"].as_str().unwrap().parse().unwrap();
    let path = bench.layout.blob_path(&digest);
    let altered = fs::read_to_string(&path).unwrap().replace("\"size\"", "\"size\" ");
    fs::write(&path, altered).unwrap();
    let reference = format!("oci:{}@{digest}", bench.layout.folder.display()).parse().unwrap();
    let error = bench.pull(&reference).await.unwrap_err();
    assert!(
        matches!(error, PullError::Mismatch(_) | PullError::Source(SourceError::Invalid(_))),
        "{error}"
    );
    bench.assert_nothing_is_left();
}

#[tokio::test]
async fn shutdown_stops_where_the_next_start_goes_on() {
    let mut bench = bench();
    let layer = bench.layer(Plain, &[Entry::File("weights", &noise(6, 200_000_000))]);
    let reference = bench.layout.image("big", std::slice::from_ref(&layer));
    let handle = bench.puller.start(PullRequest::new(reference.clone()));
    let mut changes = bench.puller.changes();
    while handle.progress().done_bytes == 0 {
        let _ = tokio::time::timeout(Duration::from_millis(1), changes.changed()).await;
    }
    bench.puller.shutdown().await;
    let stopped = handle.wait().await.unwrap_err();
    assert!(matches!(stopped, PullError::Cancelled(_)), "{stopped}");
    let refused = bench.pull(&reference).await.unwrap_err();
    assert!(matches!(refused, PullError::Cancelled(_)), "{refused}");

    bench.puller = puller(&bench.dir.path().join("store"));
    let pulled = bench.pull(&reference).await.unwrap();
    let total = fs::metadata(bench.layout.blob_path(&layer.blob)).unwrap().len();
    assert!(pulled.fetched_bytes < total, "{} of {total} bytes again", pulled.fetched_bytes);
    let Traffic { fetched_bytes, skipped_bytes, .. } = bench.puller.traffic();
    assert_eq!((fetched_bytes, fetched_bytes + skipped_bytes), (pulled.fetched_bytes, total));
    assert_eq!(bench.tree(&pulled), ["weights"]);
}

#[tokio::test]
async fn a_pull_stops_with_its_last_handle() {
    let mut bench = bench();
    let layer = bench.layer(Plain, &[Entry::File("weights", &noise(7, 64_000_000))]);
    let reference = bench.layout.image("big", &[layer]);
    drop(bench.puller.start(PullRequest::new(reference.clone())));
    bench.until_quiet().await;
    assert_eq!(bench.store().lookup(&reference).unwrap(), None);
    assert_eq!(bench.puller.traffic().cancelled_pulls, 1);
}

#[tokio::test]
async fn a_pull_that_nobody_needs_is_cancelled_and_goes_on_later() {
    let mut bench = bench();
    let layer = bench.layer(Plain, &[Entry::File("weights", &noise(7, 200_000_000))]);
    let reference = bench.layout.image("big", std::slice::from_ref(&layer));
    let start =
        |holder| bench.puller.start(PullRequest { holder, ..PullRequest::new(reference.clone()) });
    let (prefetch, mut pod, list) =
        (start(Holder::Prefetch), start(Holder::Pod), start(Holder::List));
    let mut changes = bench.puller.changes();
    while pod.progress().done_bytes == 0 {
        let _ = tokio::time::timeout(Duration::from_millis(1), changes.changed()).await;
    }
    let cancel = |force| bench.puller.cancel(&reference, force);
    assert_eq!(cancel(false), Cancel::Needed(NeededBy { pods: 1, list: true }));
    drop(list);
    assert_eq!(cancel(false), Cancel::Needed(NeededBy { pods: 1, list: false }));
    // Its publish was answered; the kubelet has not called again.
    pod.hand_to(Holder::Retry);
    assert_eq!(cancel(false), Cancel::Stopped);
    for held in [&prefetch, &pod] {
        let error = held.wait().await.unwrap_err();
        assert!(matches!(error, PullError::Cancelled(_)), "{error}");
    }
    bench.until_quiet().await;
    assert_eq!(cancel(true), Cancel::NotInFlight);
    assert_eq!(bench.puller.traffic().cancelled_pulls, 1);

    let again = bench.pull(&reference).await.unwrap();
    let total = fs::metadata(bench.layout.blob_path(&layer.blob)).unwrap().len();
    assert!(again.fetched_bytes < total, "{} of {total} bytes again", again.fetched_bytes);
}

#[tokio::test]
async fn force_cancels_a_pull_under_those_who_need_it() {
    let mut bench = bench();
    let layer = bench.layer(Plain, &[Entry::File("weights", &noise(7, 64_000_000))]);
    let reference = bench.layout.image("big", &[layer]);
    let request = PullRequest { holder: Holder::Pod, ..PullRequest::new(reference.clone()) };
    let pod = bench.puller.start(request);
    assert_eq!(bench.puller.cancel(&reference, true), Cancel::Stopped);
    assert!(matches!(pod.wait().await, Err(PullError::Cancelled(_))));
    assert!(bench.pull(&reference).await.is_ok(), "who asks again starts it again");
}

fn kept(owner: &str) -> PinRequest {
    PinRequest { owner: owner.parse().unwrap(), expires_at: None }
}

/// The bench's puller, over a store of that size in which everything idle may go.
fn with_quota(bench: &mut Bench, quota: u64) {
    let limits = crate::store::Limits {
        quota_bytes: Some(quota),
        keep_for: Duration::ZERO,
        ..crate::store::Limits::default()
    };
    let store = Store::open(bench.dir.path().join("store")).unwrap().with_limits(limits);
    let sources = Sources::new(RegistryOptions::default()).unwrap();
    bench.puller = Puller::new(store, sources, PullOptions::default());
}

#[tokio::test]
async fn a_pull_pins_what_it_brings_and_what_it_finds() {
    let mut bench = bench();
    let layer = bench.layer(Plain, &[Entry::File("f", b"x")]);
    let reference = bench.layout.image("v1", &[layer]);
    for owner in ["first", "second"] {
        let pin = Some(kept(owner));
        let request = PullRequest { pin, ..PullRequest::new(reference.clone()) };
        let pulled = bench.puller.start(request).wait().await.unwrap();
        assert_eq!(pulled.already_present, owner == "second");
        let pins = bench.store().pins().unwrap();
        let last = pins.last().unwrap();
        assert_eq!((last.owner.as_str(), &last.image), (owner, &pulled.digest));
        assert_eq!(last.reference.as_ref(), Some(&reference));
    }
    let digest = bench.store().images().unwrap()[0].digest;
    assert!(bench.store().last_used(&digest).is_some());
    assert!(matches!(bench.store().remove(&digest), Err(StoreError::InUse(_))));
}

#[tokio::test]
async fn what_a_layer_expands_to_is_held_to_the_quota() {
    let mut bench = bench();
    with_quota(&mut bench, 50_000_000);
    let idle = bench.layer(Plain, &[Entry::File("w", &noise(1, 20_000_000))]);
    let idle = bench.layout.image("idle", &[idle]);
    bench.puller.start(PullRequest::new(idle.clone())).wait().await.unwrap();
    // One file that says how large it is, and many that say it bit by bit.
    let zeros = vec![0; 80_000_000];
    let one = bench.layer(Gzip, &[Entry::File("zeros", &zeros)]);
    let names: Vec<String> = (0..80).map(|n| format!("{n}")).collect();
    let parts =
        names.iter().zip(zeros.chunks(1_000_000)).map(|(name, part)| Entry::File(name, part));
    let many = bench.layer(Zstd, &parts.collect::<Vec<_>>());
    for (tag, bomb) in [("one", one), ("many", many)] {
        let reference = bench.layout.image(tag, &[bomb]);
        for stream in [false, true] {
            let request = PullRequest { stream, ..PullRequest::new(reference.clone()) };
            let error = bench.puller.start(request).wait().await.unwrap_err();
            assert!(
                matches!(&error, PullError::Store(e) if matches!(**e, StoreError::NoSpace { .. }))
            );
            let text = error.to_string();
            assert!(
                text.contains(" expands: needs at least ")
                    && text.contains("of the quota of 47.7 MiB"),
                "{text}"
            );
        }
        assert_eq!(crate::testing::listing(&bench.store().root().join("ingest")), [""; 0]);
    }
    // What is idle makes room for what fits.
    let fits = bench.layer(Gzip, &[Entry::File("zeros", &zeros[..40_000_000])]);
    let fits = bench.layout.image("fits", &[fits]);
    bench.puller.start(PullRequest::new(fits.clone())).wait().await.unwrap();
    assert!(bench.store().lookup(&fits).unwrap().is_some());
    assert_eq!(bench.store().lookup(&idle).unwrap(), None);
}

#[tokio::test]
async fn a_pull_makes_room_before_it_downloads_or_says_that_there_is_none() {
    let mut bench = bench();
    with_quota(&mut bench, 1_000_000);
    let mut pulled = Vec::new();
    let mut references = Vec::new();
    for n in 0..4_u8 {
        let layer = bench.layer(Plain, &[Entry::File("w", &noise(n.into(), 300_000))]);
        let reference = bench.layout.image(&format!("v{n}"), std::slice::from_ref(&layer));
        let pin = (n == 0).then(|| kept("ops"));
        let request = PullRequest { pin, ..PullRequest::new(reference.clone()) };
        let plan = bench.puller.plan(std::slice::from_ref(&request)).await.unwrap();
        assert!(plan.fits, "{plan:?}");
        assert_eq!(plan.evict.len(), usize::from(n == 3), "{plan:?}");
        pulled.push(bench.puller.start(request).wait().await.unwrap().digest);
        references.push(reference);
        if let [evicted] = &plan.evict[..] {
            assert!(bench.store().image(&evicted.digest).unwrap().is_none(), "as planned");
        }
    }
    assert_eq!(bench.store().images().unwrap().len(), 3);
    assert!(bench.store().image(&pulled[0]).unwrap().is_some(), "pinned");
    assert!(bench.store().space().unwrap().used_bytes <= 1_000_000);

    let big = bench.layer(Plain, &[Entry::File("w", &noise(9, 800_000))]);
    let reference = bench.layout.image("big", std::slice::from_ref(&big));
    // The blob is not even asked for.
    fs::remove_file(bench.layout.blob_path(&big.blob)).unwrap();
    let plan = bench.puller.plan(&[PullRequest::new(reference.clone())]).await.unwrap();
    assert!(!plan.fits && plan.evict.is_empty(), "{plan:?}");
    let error = bench.pull(&reference).await.unwrap_err();
    assert_eq!(error.reason(), "no_space");
    let text = error.to_string();
    assert!(text.contains("of the quota of 976.6 KiB") && text.contains("is pinned"), "{text}");
    assert_eq!(bench.store().images().unwrap().len(), 3, "nothing was evicted for it");
}

#[tokio::test]
async fn a_plan_counts_a_layer_once_over_all_images() {
    let mut bench = bench();
    let size = |entry: &TestLayer| fs::metadata(bench.layout.blob_path(&entry.blob)).unwrap().len();
    let shared = bench.layer(Plain, &[Entry::File("base", &noise(1, 100_000))]);
    let [a, b] = [2, 3].map(|n| bench.layer(Gzip, &[Entry::File("own", &noise(n, 50_000))]));
    let (shared_size, a_size, b_size) = (size(&shared), size(&a), size(&b));
    let here = bench.layout.image("here", std::slice::from_ref(&shared));
    let references = [
        bench.layout.image("a", &[shared.clone(), a.clone()]),
        bench.layout.image("b", &[shared.clone(), b.clone()]),
    ];
    let requests = references.clone().map(PullRequest::new);
    let plan = bench.puller.plan(&requests).await.unwrap();
    assert_eq!(plan.download_bytes, 2 * shared_size + a_size + b_size);
    assert_eq!(plan.missing_bytes, shared_size + a_size + b_size);
    assert_eq!(plan.images[1].missing_bytes, b_size);
    assert!(plan.at_least && plan.fits && plan.eta.is_none() && plan.evict.is_empty());

    bench.pull(&here).await.unwrap();
    bench.store().note_rate("", 1 << 30, Duration::from_secs(1 << 10)).unwrap();
    let plan = bench.puller.plan(&requests).await.unwrap();
    assert_eq!((plan.missing_bytes, plan.needed_bytes), (a_size + b_size, a_size + b_size));
    let seconds = (a_size + b_size) as f64 / (1 << 20) as f64;
    assert!((plan.eta.unwrap().as_secs_f64() - seconds).abs() < 1e-6, "{plan:?}");
    bench.pull(&references[0]).await.unwrap();
    let plan = bench.puller.plan(&requests).await.unwrap();
    assert!(plan.images[0].present && !plan.images[1].present);
    assert_eq!((plan.images[0].missing_bytes, plan.missing_bytes), (0, b_size));
    assert_eq!(bench.puller.pulls(), []);
}

#[test]
fn an_eta_is_told_when_it_can_be() {
    let progress = |state, done_bytes, total_bytes, bytes_per_second| PullProgress {
        reference: "registry.example/m:1".parse().unwrap(),
        digest: None,
        state,
        priority: Priority::Demand,
        done_bytes,
        fetched_bytes: done_bytes,
        total_bytes,
        started_at: SystemTime::now(),
        bytes_per_second,
    };
    let eta = |progress: PullProgress| progress.eta();
    assert_eq!(eta(progress(PullState::Resolving, 0, 0, 0.0)), None);
    assert_eq!(eta(progress(PullState::Pulling, 10, 110, 50.0)), Some(Duration::from_secs(2)));
    assert_eq!(eta(progress(PullState::Pulling, 10, 110, 0.0)), None);
    assert_eq!(eta(progress(PullState::Finishing, 110, 110, 0.0)), Some(Duration::ZERO));
    assert_eq!(
        eta(progress(PullState::Failed { reason: "x", message: String::new() }, 10, 110, 5.0)),
        None
    );
}

#[tokio::test]
async fn what_somebody_waits_for_overtakes_what_nobody_does() {
    let mut bench = bench();
    let mut image = |seed: u64, bytes: usize| {
        let layer = bench.layout.layer(&tar(&[Entry::File("weights", &noise(seed, bytes))]), Plain);
        bench.layout.image(&format!("model-{seed}"), &[layer])
    };
    let later: Vec<_> = (20..26).map(|seed| image(seed, 48_000_000)).collect();
    let (joined, wanted) = (image(30, 48_000_000), image(31, 1_000_000));
    let start = |reference: &Reference, priority| {
        let request = PullRequest { priority, ..PullRequest::new(reference.clone()) };
        bench.puller.start(request)
    };
    let later: Vec<_> = later.iter().map(|image| start(image, Priority::Prefetch(0))).collect();
    let last = start(&joined, Priority::Prefetch(-5));
    assert_eq!(last.progress().priority, Priority::Prefetch(-5));

    // Nothing of these has been waited for yet, and all of it stands before this.
    start(&wanted, Priority::Demand).wait().await.unwrap();
    let joining = start(&joined, Priority::Demand);
    assert_eq!(last.progress().priority, Priority::Demand);
    joining.wait().await.unwrap();
    last.wait().await.unwrap();
    let waiting = later.iter().filter(|pull| pull.progress().state != PullState::Done).count();
    assert!(waiting >= 2, "{waiting} prefetches were still under way");
    for pull in later {
        pull.wait().await.unwrap();
    }
}
