use std::fs;
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::*;
use crate::store::tests::{admitted, layer, put_image, put_layer, reference};
use crate::store::{Limits, PinRequest, RecordKind};
use crate::testing::{listing, noise, store};

const KIB: u64 = 1024;
const HOUR: Duration = Duration::from_secs(3600);

fn limited(store: Store, quota: u64) -> Store {
    let limits = Limits { quota_bytes: Some(quota), high: 0.8, low: 0.5, keep_for: Duration::ZERO };
    store.with_limits(limits)
}

/// A layer of `kib` KiB, different for each seed.
fn blob(store: &Store, seed: u64, kib: usize) -> Digest {
    put_layer(store, &noise(seed, kib * 1024)).0
}

/// An image of these layers, used last `idle` ago.
fn image(store: &Store, name: &str, idle: Duration, layers: &[Digest]) -> Digest {
    let image = put_image(store, name, layers);
    used(store, &image, idle);
    image
}

fn used(store: &Store, image: &Digest, ago: Duration) {
    store.touch(image);
    let file = fs::File::options().write(true).open(store.tree(image).join("used")).unwrap();
    file.set_modified(SystemTime::now() - ago).unwrap();
}

fn chosen(store: &Store, needed: u64) -> (Vec<Digest>, u64) {
    let choice = store.holdings(&Wanted::default()).unwrap().choose(needed);
    let mut images: Vec<_> = choice.images.iter().map(|chosen| chosen.told.digest).collect();
    images.sort();
    (images, choice.freed_bytes)
}

fn sorted<const N: usize>(mut images: [Digest; N]) -> Vec<Digest> {
    images.sort();
    images.to_vec()
}

#[test]
fn of_equal_images_the_one_that_was_used_longest_ago_goes() {
    let (_dir, store) = store();
    let store = limited(store, KIB * KIB);
    let [a, b, c] = [1, 2, 3].map(|seed| blob(&store, seed, 40));
    image(&store, "a", HOUR, &[a]);
    let old = image(&store, "b", 3 * HOUR, &[b]);
    let future = image(&store, "c", 2 * HOUR, &[c]);
    assert_eq!(chosen(&store, 1), (vec![old], 40 * KIB));
    // A time to come is as good as now.
    let file = fs::File::options().write(true).open(store.tree(&future).join("used")).unwrap();
    file.set_modified(SystemTime::now() + 100 * HOUR).unwrap();
    let choice = store.holdings(&Wanted::default()).unwrap().choose(120 * KIB);
    assert_eq!(choice.images.len(), 3);
    let last = &choice.images[2].told;
    assert_eq!((last.digest, last.idle_seconds), (future, 0), "the dearest goes last");
    let expected = PULL_SECONDS + 40.0 * 1024.0 / 100e6;
    assert!((last.expected_seconds - expected).abs() < 1e-9, "{}", last.expected_seconds);
}

#[test]
fn an_image_of_a_slow_registry_is_dearer_than_one_that_was_used_later() {
    let (_dir, store) = store();
    let store = limited(store, 64 << 20);
    let [a, b] = [1, 2].map(|seed| blob(&store, seed, 8 * 1024));
    let slow = image(&store, "slow", 24 * HOUR, &[a]);
    let quick = put_image(&store, "quick", &[b]);
    used(&store, &quick, HOUR);
    store.note_rate("registry.example", 100 << 20, Duration::from_secs(1)).unwrap();
    assert_eq!(chosen(&store, 1).0, [slow]);
    // The same images, from a registry that gives 40 kB a second: eight minutes against one half.
    let holdings = |rates: [f64; 2]| {
        let mut holdings = store.holdings(&Wanted::default()).unwrap();
        for holding in &mut holdings.images {
            holding.bytes_per_second = rates[usize::from(holding.image.digest == quick)];
        }
        holdings.choose(1).images[0].told.digest
    };
    assert_eq!(holdings([100e6, 100e6]), slow);
    assert_eq!(holdings([4e3, 100e6]), quick);
}

#[test]
fn a_little_room_does_not_cost_a_large_image() {
    let (_dir, store) = store();
    let store = limited(store, 64 << 20);
    let [large, small, tiny] =
        [(1, 4096), (2, 40), (3, 20)].map(|(seed, kib)| blob(&store, seed, kib));
    // For each byte the large one is the cheapest by far.
    let large = image(&store, "large", 30 * HOUR, &[large]);
    let small = image(&store, "small", 20 * HOUR, &[small]);
    let tiny = image(&store, "tiny", 40 * HOUR, &[tiny]);
    store.note_rate("registry.example", 8 << 20, Duration::from_secs(8389)).unwrap();
    assert_eq!(chosen(&store, 30 * KIB), (vec![small], 40 * KIB));
    assert_eq!(chosen(&store, 60 * KIB), (sorted([small, tiny]), 60 * KIB));
    assert_eq!(chosen(&store, 1000 * KIB), (vec![large], 4096 * KIB), "and then it alone");
}

#[test]
fn images_that_share_everything_go_together_or_not_at_all() {
    let (_dir, store) = store();
    let store = limited(store, KIB * KIB);
    let (base, own, apart) = (blob(&store, 1, 400), blob(&store, 2, 8), blob(&store, 3, 40));
    let mounted = image(&store, "mounted", 90 * HOUR, &[base]);
    let inside = image(&store, "inside", 80 * HOUR, &[base]);
    let tuned = image(&store, "tuned", 70 * HOUR, &[base, own]);
    let apart = image(&store, "apart", HOUR, &[apart]);
    mount(&store, &mounted);
    // `inside` frees nothing, `tuned` its own 8 KiB.
    assert_eq!(chosen(&store, 4 * KIB), (vec![tuned], 8 * KIB));
    assert_eq!(chosen(&store, 500 * KIB), (sorted([tuned, apart]), 48 * KIB));
    assert!(store.records(RecordKind::Volumes).remove("csi-1").unwrap());
    assert_eq!(chosen(&store, 300 * KIB), (sorted([mounted, inside, tuned]), 408 * KIB));
}

fn mount(store: &Store, digest: &Digest) {
    #[derive(Serialize)]
    struct Volume {
        digest: Digest,
    }
    store.records(RecordKind::Volumes).put("csi-1", &Volume { digest: *digest }).unwrap();
}

#[test]
fn what_somebody_holds_is_never_a_candidate() {
    let (_dir, store) = store();
    let limits = Limits { keep_for: HOUR, ..limited(store.clone(), 1).limits() };
    let store = store.with_limits(limits);
    let [a, b, c, d, e] = [1, 2, 3, 4, 5].map(|seed| blob(&store, seed, 40));
    let mounted = image(&store, "mounted", 9 * HOUR, &[a]);
    let pinned = image(&store, "pinned", 9 * HOUR, &[b]);
    image(&store, "recent", HOUR / 2, &[c]);
    let coming = image(&store, "coming", 9 * HOUR, &[d]);
    let idle = image(&store, "idle", 9 * HOUR, &[e, a]);
    mount(&store, &mounted);
    let request = PinRequest { owner: "ops".parse().unwrap(), expires_at: None };
    store.pin(&pinned, None, &request).unwrap();
    let lease = admitted(&store, coming, reference("coming"), &[layer(&d)]).unwrap();
    assert_eq!(chosen(&store, u64::MAX), (vec![idle], 40 * KIB));
    let held = store.holdings(&Wanted::default()).unwrap().held();
    let expected = crate::store::Held {
        mounted_bytes: 40 * KIB,
        pinned_bytes: 40 * KIB,
        recent_bytes: 80 * KIB,
        evictable_bytes: 40 * KIB,
    };
    assert_eq!(held, expected);
    drop(lease);
    // Content that a pull of another image counts on is not freed with this one.
    let lease = admitted(&store, Digest::of(b"new"), reference("new"), &[layer(&e)]).unwrap();
    assert_eq!(chosen(&store, u64::MAX), (vec![coming], 40 * KIB));
    drop(lease);

    let usage = store.image_usage().unwrap();
    let of = |digest| usage.iter().find(|usage| usage.image.digest == digest).unwrap();
    assert_eq!((of(idle).unique_bytes, of(idle).shared_bytes), (40 * KIB, 40 * KIB));
    assert_eq!((of(pinned).unique_bytes, of(pinned).shared_bytes), (40 * KIB, 0));
}

#[test]
fn what_was_used_after_the_choice_stays() {
    let (_dir, store) = store();
    let store = limited(store, KIB * KIB);
    let [a, b] = [1, 2].map(|seed| blob(&store, seed, 40));
    let first = image(&store, "a", 3 * HOUR, &[a]);
    let second = image(&store, "b", 2 * HOUR, &[b]);
    let choice = store.holdings(&Wanted::default()).unwrap().choose(80 * KIB);
    store.touch(&first);
    let evicted = store.evict(&choice, Reason::Pull).unwrap();
    assert_eq!(evicted.images.iter().map(|image| image.digest).collect::<Vec<_>>(), [second]);
    assert_eq!(evicted.collected, Collected { objects: 1, bytes: 40 * KIB });
    assert!(store.image(&first).unwrap().is_some());
    let count = EvictionCount { images: 1, bytes: 40 * KIB };
    assert_eq!(
        (store.evictions(Reason::Pull), store.evictions(Reason::Watermark)),
        (count, EvictionCount::default())
    );
}

#[test]
fn above_the_high_watermark_the_store_is_brought_down_to_the_low_one() {
    let (_dir, store) = store();
    let store = limited(store, 200 * KIB);
    let layers = [1, 2, 3, 4].map(|seed| blob(&store, seed, 40));
    let [a, b, c, d] =
        [0, 1, 2, 3].map(|n| image(&store, &format!("m{n}"), (9 - n as u32) * HOUR, &[layers[n]]));
    assert_eq!(
        store.keep_below_watermark().unwrap(),
        Evicted::default(),
        "160 KiB are just allowed"
    );
    blob(&store, 9, 4);
    let unused = store.keep_below_watermark().unwrap();
    let gone: Vec<_> = unused.images.iter().map(|image| image.digest).collect();
    assert_eq!((gone, unused.collected.bytes), (vec![a, b], 84 * KIB), "to 100 KiB or less");
    assert_eq!(store.lookup(&reference("m0")).unwrap(), None);
    let left: Vec<_> = store.images().unwrap().into_iter().map(|image| image.digest).collect();
    assert_eq!(left, sorted([c, d]));
    assert_eq!(store.evictions(Reason::Watermark).images, 2);
}

#[test]
fn what_nobody_uses_goes_before_any_image() {
    let (_dir, store) = store();
    let store = limited(store, 200 * KIB);
    let kept = blob(&store, 1, 80);
    image(&store, "kept", 9 * HOUR, &[kept]);
    blob(&store, 2, 60);
    let partial = store.ingest(&Digest::of(b"partial")).unwrap().unwrap();
    fs::write(partial.folder().join("0000000"), noise(3, 40 * 1024)).unwrap();
    drop(partial);
    let evicted = store.keep_below_watermark().unwrap();
    assert_eq!((evicted.images.len(), evicted.collected.bytes), (0, 100 * KIB));
    assert_eq!(store.space().unwrap().used_bytes, 80 * KIB);
}

#[test]
fn a_pull_that_fits_with_an_eviction_evicts_first_and_one_that_does_not_evicts_nothing() {
    let (_dir, store) = store();
    let store = limited(store, 200 * KIB);
    let layers = [1, 2, 3].map(|seed| blob(&store, seed, 40));
    let [a, b, c] =
        [0, 1, 2].map(|n| image(&store, &format!("m{n}"), (9 - n as u32) * HOUR, &[layers[n]]));
    mount(&store, &c);
    let admit = |kib| {
        let mut coming = layer(&Digest::of(b"coming"));
        coming.blob.size = kib * KIB;
        admitted(&store, Digest::of(b"new"), reference("new"), &[coming])
    };
    let error = admit(161).unwrap_err().to_string();
    assert!(error.contains("80.0 KiB is free of the quota of 200.0 KiB; 80.0 KiB could be evicted, 40.0 KiB is mounted"), "{error}");
    assert_eq!(store.images().unwrap().len(), 3);
    let lease = admit(80).unwrap();
    let left: Vec<_> = store.images().unwrap().into_iter().map(|image| image.digest).collect();
    assert_eq!(left, sorted([b, c]), "the high watermark is kept where that can be");
    assert_eq!(store.evictions(Reason::Pull).images, 1);
    drop(lease);
    admit(160).unwrap();
    assert!(store.image(&a).unwrap().is_none() && store.image(&b).unwrap().is_none());
}

#[test]
fn a_partial_layer_that_a_waiting_pull_goes_on_with_is_not_collected() {
    let (_dir, store) = store();
    let coming = layer(&Digest::of(b"coming"));
    let lease = admitted(&store, Digest::of(b"new"), reference("new"), &[coming]).unwrap();
    let ingest = store.ingest(&coming.blob.digest).unwrap().unwrap();
    fs::write(ingest.folder().join("0000000"), b"partial").unwrap();
    drop(ingest);
    store.collect().unwrap();
    assert_eq!(listing(&store.path("ingest")).len(), 3, "folder, file, lock");
    drop(lease);
    store.collect().unwrap();
    assert!(listing(&store.path("ingest")).is_empty());
}

#[test]
fn what_came_a_moment_ago_is_collected_by_hand_only() {
    let (_dir, store) = store();
    let limits = Limits { keep_for: HOUR, ..limited(store.clone(), 100 * KIB).limits() };
    let store = store.with_limits(limits);
    blob(&store, 1, 60);
    let partial = store.ingest(&Digest::of(b"partial")).unwrap().unwrap();
    fs::write(partial.folder().join("0000000"), noise(3, 40 * 1024)).unwrap();
    drop(partial);
    assert_eq!(store.keep_below_watermark().unwrap(), Evicted::default());
    assert_eq!(store.room().unwrap().unused_bytes, 0);
    assert_eq!(store.collect().unwrap(), Collected { objects: 1, bytes: 100 * KIB });
}

const CRASH_ROOT: &str = "CARPORT_EVICT_CRASH_ROOT";

/// Runs in a process of its own, which `crash::point` ends.
#[test]
fn crash_child() {
    let Ok(root) = std::env::var(CRASH_ROOT) else { return };
    let store = limited(Store::open(root).unwrap(), 200 * KIB);
    store.keep_below_watermark().unwrap();
}

#[test]
fn a_crash_at_any_step_of_an_eviction_is_mended_by_the_next_start() {
    let test = std::env::current_exe().unwrap();
    for step in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let store = limited(Store::open(&root).unwrap(), 200 * KIB);
        let (shared, kept) = (blob(&store, 1, 80), blob(&store, 2, 40));
        let own = [3, 4].map(|seed| blob(&store, seed, 40));
        let gone = [0, 1].map(|n| image(&store, &format!("m{n}"), 9 * HOUR, &[shared, own[n]]));
        let mounted = image(&store, "mounted", 99 * HOUR, &[kept]);
        mount(&store, &mounted);
        drop(store);
        let output = Command::new(&test)
            .args(["--exact", "store::evict::tests::crash_child", "--nocapture"])
            .env(CRASH_ROOT, &root)
            .env("CARPORT_CRASH_AT", step.to_string())
            .output()
            .unwrap();
        let crashed = !output.status.success();

        let store = limited(Store::open(&root).unwrap(), 200 * KIB);
        assert!(listing(&store.path("ingest")).is_empty(), "step {step}");
        for digest in &gone {
            // Whole, or not there under any name.
            match store.image(digest).unwrap() {
                Some(image) => {
                    assert_eq!(listing(&store.rootfs(digest)).len() as u64, image.files + 1);
                }
                None => assert!(!store.tree(digest).exists(), "step {step}"),
            }
        }
        store.keep_below_watermark().unwrap();
        store.collect().unwrap();
        let left: Vec<_> = store.images().unwrap().into_iter().map(|image| image.digest).collect();
        let usage = store.usage().unwrap();
        let allowed = [vec![mounted], sorted([mounted, gone[0]]), sorted([mounted, gone[1]])];
        assert!(allowed.contains(&left), "step {step}: {left:?}");
        assert_eq!(usage.unused_bytes, 0, "step {step}");
        assert_eq!(listing(&store.path("refs")).len(), left.len(), "step {step}");
        assert_eq!(listing(&store.rootfs(&mounted)).len(), 2, "step {step}");
        if !crashed {
            assert!(step > 8, "the child passed {step} points only");
            return;
        }
    }
}
