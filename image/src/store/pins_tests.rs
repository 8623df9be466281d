use std::time::Duration;

use super::*;
use crate::store::tests::{put_image, put_layer, reference};
use crate::testing::{listing, store};

const HOUR: Duration = Duration::from_secs(3600);

fn by(owner: &str, expires_at: Option<SystemTime>) -> PinRequest {
    PinRequest { owner: owner.parse().unwrap(), expires_at }
}

fn image(store: &Store, name: &str) -> Digest {
    let (layer, _) = put_layer(store, name.as_bytes());
    put_image(store, name, &[layer])
}

#[test]
fn an_owner_is_a_name_and_nothing_else() {
    for owner in
        ["a", "prepull", "team-a/llama", "system:serviceaccount:ns:name", "ops@example.com"]
    {
        assert_eq!(owner.parse::<Owner>().unwrap().as_str(), owner);
    }
    let long = "a".repeat(254);
    for owner in ["", "A", "a b", "-a", "a/", "../a\n", "ä", &long] {
        let error = owner.parse::<Owner>().unwrap_err().to_string();
        assert!(error.contains("at most 253 lower-case letters"), "{owner:?}: {error}");
    }
    assert!(serde_json::from_str::<Owner>("\"A\"").is_err(), "the disk is not trusted");
}

#[test]
fn an_owner_pins_an_image_once_and_may_change_when_that_ends() {
    let (_dir, store) = store();
    let image = image(&store, "a");
    let end = SystemTime::now() + HOUR;
    let first = store.pin(&image, Some(&reference("a")), &by("ops", None)).unwrap().unwrap();
    assert_eq!((first.reference.clone(), first.expires_at), (Some(reference("a")), None));
    let again = store.pin(&image, None, &by("ops", Some(end))).unwrap().unwrap();
    assert_eq!(again, Pin { expires_at: Some(end), ..first });
    store.pin(&image, None, &by("team", None)).unwrap().unwrap();
    let owners: Vec<_> = store.pins().unwrap().into_iter().map(|pin| pin.owner.0).collect();
    assert_eq!(owners, ["ops", "team"]);
    assert!(store.unpin(&image, &by("ops", None).owner).unwrap());
    assert!(!store.unpin(&image, &by("ops", None).owner).unwrap());
    assert_eq!(store.pin(&Digest::of(b"absent"), None, &by("ops", None)).unwrap(), None);
    assert_eq!(store.pins().unwrap().len(), 1);
}

#[test]
fn a_pinned_image_is_not_removed_and_the_error_says_whose_it_is() {
    let (_dir, store) = store();
    let (kept, other) = (image(&store, "kept"), image(&store, "other"));
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    store.pin(&kept, None, &by("team-a/llama", Some(end))).unwrap();
    let error = store.remove(&kept).unwrap_err();
    let expected = format!(
        "image {kept} is pinned by team-a/llama until 2096-10-02T07:06:40Z: \
         `carport unpin {kept} --owner team-a/llama` first"
    );
    assert!(matches!(&error, StoreError::InUse(why) if *why == expected), "{error}");
    assert!(store.remove(&other).unwrap(), "a pin keeps one image");
    store.unpin(&kept, &by("team-a/llama", None).owner).unwrap();
    assert!(store.remove(&kept).unwrap());
}

#[test]
fn a_pin_that_is_over_keeps_nothing_and_is_collected() {
    let (_dir, store) = store();
    let image = image(&store, "a");
    store.pin(&image, None, &by("ops", Some(SystemTime::now()))).unwrap();
    assert_eq!(store.pins().unwrap(), []);
    assert_eq!(listing(&store.path("pins")).len(), 1);
    store.collect().unwrap();
    assert!(listing(&store.path("pins")).is_empty());
    store.pin(&image, None, &by("ops", Some(SystemTime::now()))).unwrap();
    assert!(store.remove(&image).unwrap());
    assert!(listing(&store.path("pins")).is_empty(), "they go with their image");
}

#[test]
fn a_clock_that_is_set_back_loses_no_pin() {
    let (_dir, store) = store();
    let image = image(&store, "a");
    // As it is on the disk when the clock stood at tomorrow.
    let owner: Owner = "ops".parse().unwrap();
    let tomorrow = SystemTime::now() + 24 * HOUR;
    let expires_at = Some(tomorrow + HOUR);
    let pin =
        Pin { owner: owner.clone(), image, reference: None, created_at: tomorrow, expires_at };
    store.pin_records().put(&record_name(&image, &owner), &pin).unwrap();
    store.collect().unwrap();
    assert_eq!(store.pins().unwrap(), std::slice::from_ref(&pin));
    assert!(store.remove(&image).is_err());
    assert!(!pin.is_over(SystemTime::UNIX_EPOCH));
    assert!(pin.is_over(tomorrow + HOUR));
    let renewed = SystemTime::now() + HOUR;
    let again = store.pin(&image, None, &by("ops", Some(renewed))).unwrap().unwrap();
    assert_eq!(again, Pin { expires_at: Some(renewed), ..pin });
}

#[test]
fn a_damaged_pin_keeps_its_own_image_and_no_other() {
    let (_dir, store) = store();
    let (kept, other) = (image(&store, "kept"), image(&store, "other"));
    store.pin(&kept, None, &by("ops", None)).unwrap();
    let file = listing(&store.path("pins")).remove(0);
    std::fs::write(store.path("pins").join(&file), "{").unwrap();
    let error = store.remove(&kept).unwrap_err().to_string();
    assert!(error.contains(&file) && error.contains("remove the file"), "{error}");
    assert!(store.remove(&other).unwrap());
}
