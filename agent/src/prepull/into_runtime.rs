//! An entry of the list that is to be in the node's container runtime.
//!
//! ```text
//! there already, as its name means now ────────────────┐
//! else in the store: given to containerd by hard links ─┼─► pinned ─► there
//! else CRI's PullImage, with the node's login ──────────┘
//!        │ every few seconds: does the runtime live, how much has arrived?
//! ```
//!
//! Where the runtime pulls, its own mirrors, certificates and limits hold, and none of the caps here.
//!
//! # What always holds
//!
//! - **Bounded.** A runtime that stops answering ends the try, and so does a very long time.
//! - **Nothing is claimed.** How far a pull is is told where containerd tells it, and the image's layers are
//!   known; that the kubelet leaves it alone, where CRI says so.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use carport_image::manifest::Blob;
use carport_image::runtime::{Publication, PublishError};
use carport_image::{Digest, Puller, Reference, Runtime};

use super::plan::{Ended, Start};
use crate::cri::{Cri, CriError, CriImage};

/// From one look at a pull to the next.
const LOOK: Duration = Duration::from_secs(5);
/// Looks in a row at which the runtime did not answer, until the try is given up.
const MAX_SILENT: u32 = 3;
/// What no pull takes: a terabyte at 50 MB/s.
const MAX_PULL: Duration = Duration::from_secs(6 * 3600);
/// How long the registry may take to tell what a name means. The runtime may reach it where we do not.
const MANIFEST_PATIENCE: Duration = Duration::from_secs(15);
/// How often it is looked, and how long from one look to the next, whether CRI has heard of an image.
const HEARING: (u32, Duration) = (20, Duration::from_millis(100));

/// What is said of an image that was to be pinned and is not.
const UNPINNED: &str = "the kubelet may remove it: this runtime keeps no image by wish (containerd does from \
                        1.7 on)";

/// How far a pull is; both 0 while that is not known.
#[derive(Debug, Default)]
pub(super) struct Arrived {
    bytes: AtomicU64,
    of: AtomicU64,
}

impl Arrived {
    /// Bytes, and of how many; nothing where it is not known.
    pub(super) fn get(&self) -> Option<(u64, u64)> {
        let of = self.of.load(Ordering::Relaxed);
        (of > 0).then(|| (self.bytes.load(Ordering::Relaxed), of))
    }

    fn set(&self, bytes: u64, of: u64) {
        // Layers that the runtime discards once they are unpacked have arrived all the same.
        self.bytes.fetch_max(bytes.min(of), Ordering::Relaxed);
        self.of.store(of, Ordering::Relaxed);
    }
}

/// What brings images into the container runtime.
#[derive(Clone)]
pub struct IntoRuntime {
    /// The runtime.
    pub cri: Cri,
    /// Where logins and manifests come from, and containerd, where that is the runtime.
    pub puller: Puller,
}

impl IntoRuntime {
    /// Brings `start`'s image into the runtime, or gives up when told to.
    pub(super) async fn bring(&self, start: &Start) -> Ended {
        let Some(name) = name(&start.entry.image) else {
            return Ended::Failed("a layout cannot be pulled by the container runtime".into());
        };
        match start.stop.run_until_cancelled(self.brought(start, &name)).await {
            None => Ended::Stopped,
            Some(Ok(ended)) => ended,
            Some(Err(CriError::NoRoom(why))) => Ended::NoRoom(why),
            Some(Err(error)) => Ended::Failed(error.to_string()),
        }
    }

    async fn brought(&self, start: &Start, name: &str) -> Result<Ended, CriError> {
        let here = self.cri.image(name).await?;
        let image = match here {
            Some(image) if !start.again => image,
            before => {
                self.fetch(start, name, before.as_ref()).await?;
                let image = self.cri.image(name).await?;
                let image = image.ok_or_else(|| {
                    CriError::Failed("it says that it has pulled the image, and has it not".into())
                })?;
                if before.as_ref().is_none_or(|before| before.digests != image.digests) {
                    tracing::info!(image = name, "brought into the container runtime");
                }
                image
            }
        };
        let note = match start.entry.pin {
            Some(_) => self.pinned(name, image.pinned).await?,
            None => String::new(),
        };
        Ok(Ended::There { digest: digest(&image, &start.entry.image), note })
    }

    /// Has it there as its name means now, at the least cost.
    async fn fetch(
        &self,
        start: &Start,
        name: &str,
        before: Option<&CriImage>,
    ) -> Result<(), CriError> {
        let image = &start.entry.image;
        // What the store has need not be asked about, where it is the first time.
        let stored = match start.again {
            false => self.stored(image).await,
            true => None,
        };
        if let Some(digest) = stored
            && self.published(image, digest, name).await?
        {
            return Ok(());
        }
        let asked = tokio::time::timeout(MANIFEST_PATIENCE, self.puller.layers(image)).await;
        let meant = asked.ok().and_then(Result::ok);
        if let Some((digest, _)) = &meant {
            if before.is_some_and(|before| before.is_named_by(digest)) {
                return Ok(());
            }
            if stored != Some(*digest) && self.published(image, *digest, name).await? {
                return Ok(());
            }
        }
        let layers = meant.map(|(_, layers)| layers).unwrap_or_default();
        self.pull(start, name, &layers).await
    }

    /// What the image means in the store.
    async fn stored(&self, image: &Reference) -> Option<Digest> {
        let (store, image) = (self.puller.store().clone(), image.clone());
        let found = tokio::task::spawn_blocking(move || store.lookup(&image)).await;
        found.ok()?.ok()?
    }

    /// Gives the store's image to containerd. False where that cannot be: it is to be pulled.
    async fn published(
        &self,
        image: &Reference,
        digest: Digest,
        name: &str,
    ) -> Result<bool, CriError> {
        let feeds = |containerd: &&Runtime| containerd.publishes_to_pods();
        let Some(containerd) = self.containerd().filter(feeds) else { return Ok(false) };
        let what = Publication { image: digest, name: image.clone(), pinned: false };
        match containerd.publish(self.puller.store(), &what).await {
            Ok(_) => {}
            Err(PublishError::Away(why)) => return Err(CriError::Away(why)),
            Err(error) => {
                tracing::debug!(image = name, %error, "to be pulled into the container runtime");
                return Ok(false);
            }
        }
        for _ in 0..HEARING.0 {
            if self.cri.image(name).await?.is_some_and(|image| image.is_named_by(&digest)) {
                return Ok(true);
            }
            tokio::time::sleep(HEARING.1).await;
        }
        Ok(false)
    }

    /// Has it pulled, and looks after the pull; `layers` as far as they are known.
    async fn pull(&self, start: &Start, name: &str, layers: &[Blob]) -> Result<(), CriError> {
        let image = &start.entry.image;
        let credential = self.puller.credential(image).await;
        let credential = credential.map_err(|error| CriError::Failed(error.to_string()))?;
        tracing::info!(image = name, "pull into the container runtime");
        let pull = tokio::time::timeout(MAX_PULL, self.cri.pull(name, credential));
        tokio::select! {
            pulled = pull => pulled.unwrap_or_else(|_| {
                let why = format!("not pulled within {} h", MAX_PULL.as_secs() / 3600);
                Err(CriError::Failed(why))
            }),
            why = self.watch(layers, &start.arrived) => Err(CriError::Away(why)),
        }
    }

    /// Ends when the runtime does not answer any more.
    async fn watch(&self, layers: &[Blob], arrived: &Arrived) -> String {
        let mut silent = 0;
        while silent < MAX_SILENT {
            tokio::time::sleep(LOOK.min(self.cri.patience())).await;
            silent = match self.cri.identity().await {
                Ok(_) => 0,
                Err(_) => silent + 1,
            };
            let Some(containerd) = self.containerd().filter(|_| !layers.is_empty()) else {
                continue;
            };
            if silent == 0
                && let Ok(bytes) = containerd.arrived_bytes(layers).await
            {
                arrived.set(bytes, layers.iter().map(|layer| layer.size).sum());
            }
        }
        "it stopped answering while it pulled".into()
    }

    /// Keeps it, where that is to be had; what is to be said otherwise.
    async fn pinned(&self, name: &str, already: bool) -> Result<String, CriError> {
        if already {
            return Ok(String::new());
        }
        let Some(containerd) = self.containerd() else { return Ok(UNPINNED.into()) };
        containerd.pin(name).await.map_err(|error| CriError::Failed(error.to_string()))?;
        // CRI hears of it by an event.
        for _ in 0..HEARING.0 {
            match self.cri.image(name).await? {
                Some(image) if image.pinned => return Ok(String::new()),
                Some(_) => tokio::time::sleep(HEARING.1).await,
                None => return Err(CriError::Failed("removed before it could be pinned".into())),
            }
        }
        Ok(UNPINNED.into())
    }

    /// containerd, where it is the runtime that CRI speaks of.
    fn containerd(&self) -> Option<&Runtime> {
        let socket = self.cri.socket();
        self.puller.runtime().filter(|runtime| runtime.socket() == socket)
    }

    /// Takes away pins that the list in force does not wish. False: to be tried again.
    pub(super) async fn unpin_all_but(&self, wanted: &BTreeSet<String>) -> bool {
        let Some(containerd) = self.containerd() else { return true };
        match containerd.unpin_all_but(wanted).await {
            Ok(0) => true,
            Ok(images) => {
                tracing::info!(images, "no longer pinned in the container runtime");
                true
            }
            Err(error) => {
                tracing::debug!(%error, "unpin in the container runtime what left the list");
                false
            }
        }
    }
}

/// What the runtime calls an image: a digest goes before a tag. Nothing for a layout.
pub(super) fn name(image: &Reference) -> Option<String> {
    let Reference::Registry(place) = image else { return None };
    Some(match image.digest() {
        Some(digest) => format!("{}/{}@{digest}", place.host(), place.repository()),
        None => image.to_string(),
    })
}

/// Its digest, as far as the runtime tells: that which was asked for, else one of the same repository.
fn digest(image: &CriImage, asked: &Reference) -> Option<Digest> {
    let Reference::Registry(place) = asked else { return None };
    let of = |text: &String| {
        let named = text.parse::<Reference>().ok()?;
        let same = matches!(&named, Reference::Registry(other)
            if (other.host(), other.repository()) == (place.host(), place.repository()));
        named.digest().filter(|_| same)
    };
    asked.digest().or_else(|| image.digests.iter().find_map(of))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_knows_an_image_by_its_digest_or_its_tag() {
        let digest = Digest::of(b"x");
        let named = |text: &str| name(&text.parse().unwrap());
        assert_eq!(named("r:5000/a:1").unwrap(), "r:5000/a:1");
        assert_eq!(named(&format!("r:5000/a:1@{digest}")).unwrap(), format!("r:5000/a@{digest}"));
        assert_eq!(named("busybox").unwrap(), "docker.io/library/busybox:latest");
        assert_eq!(named("oci:/models/a:1"), None);
    }

    #[test]
    fn of_several_names_the_one_of_the_same_repository_counts() {
        let (one, other) = (Digest::of(b"1"), Digest::of(b"2"));
        let digests = vec![format!("r:5000/b@{other}"), format!("r:5000/a@{one}")];
        let image = CriImage { tags: Vec::new(), digests, bytes: 1, pinned: false };
        assert_eq!(digest(&image, &"r:5000/a:1".parse().unwrap()), Some(one));
        assert_eq!(digest(&image, &"r:5000/c:1".parse().unwrap()), None);
        assert_eq!(digest(&image, &format!("r:5000/c@{other}").parse().unwrap()), Some(other));
    }

    #[test]
    fn what_has_arrived_never_goes_back() {
        let arrived = Arrived::default();
        assert_eq!(arrived.get(), None);
        arrived.set(5, 10);
        arrived.set(3, 10);
        assert_eq!(arrived.get(), Some((5, 10)));
        arrived.set(11, 10);
        assert_eq!(arrived.get(), Some((10, 10)));
    }

    #[tokio::test]
    async fn a_runtime_that_stops_answering_ends_the_try() {
        use carport_image::Store;
        use carport_image::pull::PullOptions;
        use carport_image::source::{RegistryOptions, Sources};

        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("cri.sock");
        // Connections come about, and nothing is ever said on them.
        let _hangs = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        let sources = Sources::new(RegistryOptions::default()).unwrap();
        let into = IntoRuntime {
            cri: Cri::patient_for(vec![socket], Duration::from_millis(20)),
            puller: Puller::new(store, sources, PullOptions::default()),
        };
        let arrived = Arrived::default();
        let watch = into.watch(&[], &arrived);
        let why = tokio::time::timeout(Duration::from_secs(20), watch).await.unwrap();
        assert_eq!(why, "it stopped answering while it pulled");
    }
}
