//! Which images the container runtime has: as containerd itself tells, else as CRI lists them.
//!
//! ```text
//! containerd's events ─────────┐ while it answers
//!                              ├─► Inventory behind a watch
//! CRI's list, twice a minute ──┘ else, where CRI has a socket of its own
//! ```
//!
//! CRI tells names, digests and sizes, and no layers: enough to say that an image is there. It has no events
//! of images, so they are listed over again, and after each pull of our own.
//!
//! What always holds: an inventory says when it was listed, and one of a runtime that does not answer any
//! more says that.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use carport_image::runtime::{Inventory, RuntimeImage};
use carport_image::{Digest, Reference, Runtime};
use tokio::sync::watch;

use super::{Cri, CriError, CriImage};

/// From one list to the next: the kubelet itself asks no oftener.
const EVERY: Duration = Duration::from_secs(30);
/// How soon a runtime that does not answer is asked again.
const RETRY: Duration = Duration::from_secs(10);
/// A node runs some hundred pods; with more images than this something else is wrong.
const MAX_IMAGES: usize = 20_000;

/// Keeps `inventory` as the runtime has it.
///
/// # Cancel safety
///
/// Never ends by itself; drop it.
pub async fn follow(
    containerd: Option<Runtime>,
    cri: Option<Cri>,
    inventory: &watch::Sender<Arc<Inventory>>,
) {
    let (own, told) = watch::channel(Arc::default());
    let following = async {
        match &containerd {
            Some(containerd) => containerd.follow(&own).await,
            None => std::future::pending().await,
        }
    };
    let other = |cri: &Cri| {
        containerd.as_ref().is_none_or(|containerd| containerd.socket() != cri.socket())
    };
    tokio::select! {
        () = following => {}
        () = choose(told, cri, other, inventory) => {}
    }
}

async fn choose(
    mut containerd: watch::Receiver<Arc<Inventory>>,
    cri: Option<Cri>,
    is_other: impl Fn(&Cri) -> bool,
    inventory: &watch::Sender<Arc<Inventory>>,
) {
    // What was said last, so that it is not said again.
    let mut said = None;
    loop {
        let told = Arc::clone(&containerd.borrow_and_update());
        // Each time: a socket may appear later.
        let other = cri.as_ref().filter(|cri| !told.connected && is_other(cri));
        let wait = match other {
            Some(cri) => {
                let listed = list(cri, said.is_none()).await;
                let news = listed.as_ref().map(drop).map_err(ToString::to_string);
                if said.as_ref() != Some(&news) {
                    if let Err(why) = &news {
                        tracing::info!(why, "images in the container runtime are not known");
                    }
                    said = Some(news);
                }
                match listed {
                    Ok(listed) => {
                        inventory.send_replace(Arc::new(listed));
                        EVERY
                    }
                    Err(_) => {
                        lost(inventory);
                        RETRY
                    }
                }
            }
            None => {
                if told.listed_at.is_some() {
                    inventory.send_replace(told);
                }
                said = None;
                EVERY
            }
        };
        let pulled = async {
            match other {
                Some(cri) => cri.pulled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Ok(()) = containerd.changed() => {}
            () = pulled => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Says that nobody tells of changes any more.
fn lost(inventory: &watch::Sender<Arc<Inventory>>) {
    inventory.send_if_modified(|inventory| {
        let lost = inventory.connected;
        Arc::make_mut(inventory).connected = false;
        lost
    });
}

async fn list(cri: &Cri, is_first: bool) -> Result<Inventory, CriError> {
    let listed_at = SystemTime::now();
    let images = cri.images().await?;
    if is_first {
        let who = cri.identity().await?;
        let socket = cri.socket();
        tracing::info!(
            socket = %socket.display(), name = who.name, version = who.version, images = images.len(),
            "images in the container runtime are listed through CRI"
        );
    }
    Ok(inventory(images, listed_at))
}

fn inventory(images: Vec<CriImage>, listed_at: SystemTime) -> Inventory {
    let mut found: BTreeMap<Digest, Arc<RuntimeImage>> = BTreeMap::new();
    let (mut references, mut aliases) = (HashMap::new(), HashMap::new());
    for image in images.into_iter().take(MAX_IMAGES) {
        let named = |text: &String| text.parse::<Reference>().ok();
        let digests: Vec<Digest> =
            image.digests.iter().filter_map(named).filter_map(|name| name.digest()).collect();
        // One that was built on the node: no registry has it.
        let Some(digest) = digests.first().copied() else { continue };
        aliases.extend(digests.iter().filter(|other| **other != digest).map(|o| (*o, digest)));
        let names = image.tags.iter().filter_map(named).map(|name| name.to_string());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names.retain(|name| references.insert(name.clone(), digest).is_none());
        let image = RuntimeImage {
            digest,
            references: names,
            bytes: image.bytes,
            unpacked: true,
            layers: Vec::new(),
        };
        found.entry(digest).or_insert_with(|| Arc::new(image));
    }
    Inventory { images: found, references, aliases, listed_at: Some(listed_at), connected: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_its_tags_and_by_all_of_its_digests() {
        let [manifest, index, other] = [b"m", b"i", b"o"].map(|bytes| Digest::of(bytes));
        let image = |tags: &[&str], digests: &[Digest]| CriImage {
            tags: tags.iter().map(ToString::to_string).collect(),
            digests: digests.iter().map(|digest| format!("r:5000/a@{digest}")).collect(),
            bytes: 7,
            pinned: false,
        };
        let images = vec![
            image(&["r:5000/a:2", "r:5000/a:1", "not a name"], &[manifest, index]),
            image(&["localhost/built:here"], &[]),
            image(&[], &[other]),
        ];
        let inventory = inventory(images, SystemTime::UNIX_EPOCH);
        assert_eq!(inventory.images.len(), 2);
        let found = inventory.find(None, Some(&"r:5000/a:1".parse().unwrap())).unwrap();
        assert_eq!((found.digest, found.bytes), (manifest, 7));
        assert_eq!(found.references, ["r:5000/a:1", "r:5000/a:2"]);
        for digest in [manifest, index] {
            assert_eq!(inventory.find(Some(digest), None).unwrap().digest, manifest);
            let name = format!("r:5000/a@{digest}").parse().unwrap();
            assert_eq!(inventory.find(None, Some(&name)).unwrap().digest, manifest);
        }
        assert_eq!(inventory.find(Some(other), None).unwrap().digest, other);
        assert!(inventory.find(None, Some(&"r:5000/a:3".parse().unwrap())).is_none());
    }
}
