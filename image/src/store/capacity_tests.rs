use std::time::SystemTime;

use super::*;
use crate::manifest::{Blob, Compression, Content};
use crate::store::StoreError;
use crate::store::tests::{admitted, layer, put_image, put_layer, reference};
use crate::testing::{noise, store};

const KIB: u64 = 1024;

/// A layer that is nowhere yet.
fn to_come(name: &str, size: u64) -> Layer {
    let blob = Blob { digest: Digest::of(name.as_bytes()), size };
    Layer { blob, compression: Compression::None, content: Content::Tar, toc: None }
}

fn with_quota(store: Store, quota: u64) -> Store {
    store.with_limits(Limits {
        quota_bytes: Some(quota),
        keep_for: Duration::ZERO,
        ..Limits::default()
    })
}

fn admit(store: &Store, name: &str, layers: &[Layer]) -> Result<Lease, StoreError> {
    let image = Digest::of(name.as_bytes());
    admitted(store, image, reference(name), layers)
}

/// What a refusal says.
fn refused(result: Result<Lease, StoreError>) -> String {
    match result {
        Err(StoreError::NoSpace { what }) => what,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_pull_that_cannot_fit_is_refused_with_the_numbers() {
    let (_dir, store) = store();
    let store = with_quota(store, 100 * KIB);
    let (here, _) = put_layer(&store, &noise(1, 40 * 1024));
    let image = put_image(&store, "here", &[here]);
    let request = super::super::PinRequest { owner: "ops".parse().unwrap(), expires_at: None };
    store.pin(&image, None, &request).unwrap();
    assert!(admit(&store, "fits", &[to_come("fits", 60 * KIB)]).is_ok());
    let text = refused(admit(&store, "large", &[to_come("large", 61 * KIB)]));
    assert_eq!(
        text,
        "pull registry.example/large:1: needs at least 61.0 KiB, and 60.0 KiB is free of the quota \
         of 100.0 KiB; 0 B could be evicted, 40.0 KiB is pinned: unpin or remove images, wait for \
         pulls to end, or raise store.quota"
    );
    assert_eq!(crate::testing::listing(&store.path("leases")), [""; 0]);
    // Layers that are here need no room.
    assert!(admit(&store, "again", &[layer(&here), to_come("rest", 60 * KIB)]).is_ok());
}

#[test]
fn two_pulls_that_fit_one_by_one_are_not_let_in_together() {
    let (_dir, store) = store();
    let store = with_quota(store, 100 * KIB);
    let (shared, a, b) =
        (to_come("shared", 30 * KIB), to_come("a", 50 * KIB), to_come("b", 50 * KIB));
    let first = admit(&store, "a", &[shared, a]).unwrap();
    let text = refused(admit(&store, "b", &[shared, b]));
    assert!(text.contains("needs at least 50.0 KiB, and 100.0 KiB is free"), "{text}");
    assert!(text.contains("80.0 KiB is promised to pulls under way"), "{text}");
    let same = admit(&store, "c", &[shared]).expect("a layer is promised once");
    drop(first);
    admit(&store, "b", &[shared, b]).expect("the first pull has ended");
    drop(same);
}

#[test]
fn what_has_arrived_of_a_layer_is_not_promised_any_more() {
    let (_dir, store) = store();
    let store = with_quota(store, 100 * KIB);
    let coming = to_come("a", 80 * KIB);
    let _lease = admit(&store, "a", &[coming]).unwrap();
    let ingest = store.ingest(&coming.blob.digest).unwrap().unwrap();
    fs::write(ingest.folder().join("0000000"), noise(1, 60 * 1024)).unwrap();
    let (_, promised) = store.promised(|_| false).unwrap();
    assert_eq!(promised.pulls_bytes, 20 * KIB);
    assert_eq!(store.space().unwrap().free_bytes, 40 * KIB);
    assert!(admit(&store, "b", &[to_come("b", 20 * KIB)]).is_ok());
    refused(admit(&store, "b", &[to_come("b", 24 * KIB)]));
    // Nor is a layer that has been committed.
    drop(ingest);
    let name = coming.record_name();
    fs::write(store.path("layers").join(format!("{name}.json")), "{}").unwrap();
    assert_eq!(store.promised(|_| false).unwrap().1.pulls_bytes, 0);
}

#[test]
fn a_reservation_keeps_room_until_its_pull_its_end_or_its_release() {
    let (_dir, store) = store();
    let store = with_quota(store, 100 * KIB);
    let later = SystemTime::now() + Duration::from_secs(3600);
    let mut wish = Reservation {
        id: "job-1".into(),
        owner: "scheduler".parse().unwrap(),
        bytes: 70 * KIB,
        reference: Some(reference("a")),
        expires_at: later,
    };
    store.reserve(&wish).unwrap();
    store.reserve(&wish).expect("asked twice it is one");
    assert_eq!(store.reservations().unwrap(), [wish.clone()]);
    let text = refused(admit(&store, "b", &[to_come("b", 40 * KIB)]));
    assert!(text.contains("70.0 KiB is reserved"), "{text}");

    let own = admit(&store, "a", &[to_come("a", 70 * KIB)]).expect("it was reserved for this one");
    assert!(admit(&store, "c", &[to_come("c", 30 * KIB)]).is_ok(), "not counted twice");
    drop(own);
    refused(admit(&store, "c", &[to_come("c", 40 * KIB)]));
    store.use_up_reservations(&reference("a")).unwrap();
    assert_eq!(store.reservations().unwrap(), []);

    wish.bytes = 101 * KIB;
    assert!(matches!(store.reserve(&wish), Err(StoreError::NoSpace { .. })));
    wish.bytes = u64::MAX;
    assert!(matches!(store.reserve(&wish), Err(StoreError::NoSpace { .. })));
    wish.bytes = 60 * KIB;
    store.reserve(&wish).unwrap();
    wish.bytes = 90 * KIB;
    store.reserve(&wish).expect("its own bytes do not stand against it");
    assert!(store.release("job-1").unwrap() && !store.release("job-1").unwrap());
    wish.expires_at = SystemTime::now();
    store.reserve(&wish).unwrap();
    assert_eq!(store.reservations().unwrap(), []);
    assert!(admit(&store, "b", &[to_come("b", 40 * KIB)]).is_ok());
}

#[test]
fn the_running_figure_is_not_what_decides() {
    let (_dir, store) = store();
    let store = with_quota(store, 100 * KIB);
    put_layer(&store, &noise(1, 10 * 1024));
    assert_eq!(store.space().unwrap().used_bytes, 12 * KIB);
    put_layer(&store, &noise(2, 10 * 1024));
    assert_eq!(store.space().unwrap().used_bytes, 24 * KIB, "commits are counted as they come");
    // Another process takes away what this one has seen.
    Store::open(store.root()).unwrap().collect().unwrap();
    assert_eq!(store.space().unwrap().used_bytes, 24 * KIB);
    assert_eq!(store.space_now().unwrap().used_bytes, 0);
    put_layer(&store, &noise(3, 10 * 1024));
    Store::open(store.root()).unwrap().collect().unwrap();
    assert_eq!(store.space().unwrap().used_bytes, 12 * KIB);
    assert!(admit(&store, "a", &[to_come("a", 95 * KIB)]).is_ok());
}

#[test]
fn what_is_too_much_is_counted_against_the_watermark_and_the_limit() {
    let space = Space { limit_bytes: 1000, used_bytes: 700, free_bytes: 200 };
    assert_eq!(space.above(0.8), 0);
    assert_eq!(space.above(0.6), 100);
    assert_eq!(space.excess(100, 0.8), 0);
    assert_eq!(space.excess(150, 0.8), 50, "above the watermark");
    assert_eq!(space.excess(250, 1.0), 50, "less is free than the limit says");
    assert_eq!(space.excess(u64::MAX, 1.0), u64::MAX - 200);
}

#[test]
fn what_would_be_let_in_is_reckoned_as_admission_does() {
    let limits = Limits { high: 0.8, ..Limits::default() };
    let mut room = Room {
        space: Space { limit_bytes: 1000, used_bytes: 700, free_bytes: 300 },
        taken: Promised { pulls_bytes: 20, reserved_bytes: 30 },
        held: Held { evictable_bytes: 400, ..Held::default() },
        unused_bytes: 100,
    };
    assert_eq!(
        room.fits(150, &limits),
        Fits::AsItIs,
        "up to the watermark, without what is unused"
    );
    assert_eq!(room.fits(151, &limits), Fits::AfterEviction);
    assert_eq!(room.fits(750, &limits), Fits::AfterEviction);
    assert_eq!(room.fits(751, &limits), Fits::No);
    assert_eq!(room.fits(u64::MAX, &limits), Fits::No);
    // Above the watermark with nothing to evict is no reason to refuse.
    room.held.evictable_bytes = 0;
    assert_eq!(room.fits(350, &limits), Fits::AsItIs);
    assert_eq!(room.fits(351, &limits), Fits::No);
    room.space = Space { limit_bytes: 1000, used_bytes: 2000, free_bytes: 0 };
    assert_eq!(room.fits(0, &limits), Fits::AsItIs, "nothing needs no room");
}

#[test]
fn a_survey_says_what_could_go_and_with_which_images() {
    let (_dir, store) = store();
    let store = with_quota(store, 1000 * KIB);
    let (own, _) = put_layer(&store, &noise(1, 40 * 1024));
    let (shared, _) = put_layer(&store, &noise(2, 20 * 1024));
    let (kept, _) = put_layer(&store, &noise(3, 12 * 1024));
    put_layer(&store, &noise(4, 8 * 1024));
    let (a, b) = (put_image(&store, "a", &[own, shared]), put_image(&store, "b", &[shared]));
    let pinned = put_image(&store, "pinned", &[kept]);
    let request = super::super::PinRequest { owner: "ops".parse().unwrap(), expires_at: None };
    store.pin(&pinned, None, &request).unwrap();
    let survey = store.survey().unwrap();
    assert_eq!(survey.held.evictable_bytes, 60 * KIB);
    assert_eq!(survey.held.pinned_bytes, 12 * KIB);
    assert_eq!(survey.evictable, BTreeMap::from([(a, 60 * KIB), (b, 20 * KIB)]));
    let (room, (space, taken)) = (store.room().unwrap(), store.standing().unwrap());
    assert_eq!((room.space, room.taken), (space, taken));
    assert_eq!((room.held, room.unused_bytes), (survey.held, survey.unused_bytes));
}
