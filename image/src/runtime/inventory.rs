//! Which images containerd has: listed, then followed by its events.
//!
//! ```text
//! subscribe ─► list ─► event ─► list again, at most every 300 ms ─► Inventory behind a watch
//!     ▲                                        │
//!     └── connection lost: later and later ◄───┘
//! ```
//!
//! containerd's events say only that something changed, and none is sent again: so each makes us list
//! anew, and soon after the subscription once more. What a digest names never changes, so a
//! manifest is read once.
//!
//! # What always holds
//!
//! - **Nothing old passes for new.** An inventory says when it was listed, and whether containerd is
//!   still there to tell of changes.
//! - **Bounded**: images, blobs, the size of answers, and every wait.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{ListContentRequest, ListImagesRequest, SubscribeRequest};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::{ApiBlob, Failed, MAX_ANSWER, Namespace, Root, Runtime, UNPACKED, ask, open, within};
use crate::digest::Digest;
use crate::manifest::{Blob, Manifest, Platform};
use crate::reference::Reference;
use crate::source::{MAX_MANIFEST_BYTES, RawManifest};

/// A node runs some hundred pods; with more images than this something else is wrong.
const MAX_IMAGES: usize = 20_000;
/// The blobs of so many images.
const MAX_BLOBS: usize = 400_000;
/// From the end of one list to the next; events within this time share one.
const SPACING: Duration = Duration::from_millis(300);
/// That an image is unpacked is noted a moment after the last event of its pull.
const SETTLE: Duration = Duration::from_secs(2);
/// The list is made anew after so long: no event tells of everything.
const SAFETY_NET: Duration = Duration::from_secs(60);
/// How long a list may take.
const LIST_PATIENCE: Duration = Duration::from_secs(20);
/// How often containerd is asked for a sign of life, and how many may fail to come in a row: one that hangs
/// ends no connection.
const BEAT: (Duration, u32) = (Duration::from_secs(3), 2);
/// How soon a lost containerd is looked for again, at first and at last.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// What changes when images come and go.
const TOPICS: [&str; 3] =
    ["topic~=\"^/images/\"", "topic==\"/snapshot/commit\"", "topic==\"/content/delete\""];

/// The images that containerd had at one moment.
#[derive(Debug, Clone, Default)]
pub struct Inventory {
    /// By the manifest of this machine's platform.
    pub images: BTreeMap<Digest, Arc<RuntimeImage>>,
    /// What each name means, in canonical form.
    pub references: HashMap<String, Digest>,
    /// Other digests that lead to them: of the index that an image was chosen from.
    pub aliases: HashMap<Digest, Digest>,
    /// When it was listed. Absent: never yet.
    pub listed_at: Option<SystemTime>,
    /// Whether containerd tells of changes since. If not, it may have other images by now.
    pub connected: bool,
}

/// An image that containerd knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeImage {
    /// The platform's manifest.
    pub digest: Digest,
    /// Its names, in canonical form and order.
    pub references: Vec<String>,
    /// Bytes of its layers as they travel; of a runtime that tells no layers, what it takes there.
    pub bytes: u64,
    /// Whether its layers are unpacked: a container of it starts without a pull.
    pub unpacked: bool,
    /// Its layers, lowest first, as they travel, where the runtime tells them.
    pub layers: Vec<RuntimeLayer>,
}

/// A layer of an image that containerd knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuntimeLayer {
    /// The blob's digest.
    pub digest: Digest,
    /// Its size.
    pub bytes: u64,
    /// Whether its blob is there: some nodes discard them once they are unpacked.
    pub present: bool,
}

impl RuntimeImage {
    /// Whether nothing of it would have to be fetched to run it.
    pub fn is_complete(&self) -> bool {
        self.unpacked || self.layers.iter().all(|layer| layer.present)
    }
}

impl Inventory {
    /// The complete image that a digest or a reference names.
    pub fn find(
        &self,
        digest: Option<Digest>,
        reference: Option<&Reference>,
    ) -> Option<&RuntimeImage> {
        let named = || self.references.get(&reference?.to_string()).copied();
        let digest = digest.or_else(|| reference?.digest()).or_else(named)?;
        let digest = self.aliases.get(&digest).unwrap_or(&digest);
        self.images.get(digest).map(AsRef::as_ref).filter(|image| image.is_complete())
    }

    /// Equal but for its age.
    pub fn same(&self, other: &Self) -> bool {
        self.connected == other.connected
            && self.images == other.images
            && self.references == other.references
            && self.aliases == other.aliases
    }
}

/// What a manifest says; read once, since a digest always names the same.
#[derive(Debug, Clone)]
enum Document {
    /// The manifest for this platform.
    Index(Digest),
    Image {
        config: Digest,
        layers: Vec<Blob>,
    },
    /// Nothing that can be read here, as an image for other platforms.
    Other,
}

type Documents = HashMap<Digest, Document>;

/// What containerd says of a blob.
struct Content {
    size: u64,
    unpacked: bool,
}

impl Runtime {
    /// Keeps `inventory` as containerd has it; connects as soon as there is something to connect to,
    /// and again after each loss.
    ///
    /// # Cancel safety
    ///
    /// Never ends by itself; drop it.
    pub async fn follow(&self, inventory: &watch::Sender<Arc<Inventory>>) {
        let mut documents = Documents::new();
        let (mut wait, longest) = RETRY;
        loop {
            let began = Instant::now();
            let lost = tokio::select! {
                lost = self.follow_once(inventory, &mut documents) => lost,
                () = self.silent() => Failed::late(),
            };
            let why = match lost {
                Failed::NotFound => "its content store has gone".to_owned(),
                Failed::Away(why) => why,
            };
            self.say_away(&why);
            inventory.send_if_modified(|inventory| {
                let lost = inventory.connected;
                Arc::make_mut(inventory).connected = false;
                lost
            });
            // One that was there for a while is likely to be back soon.
            wait = if began.elapsed() > longest { RETRY.0 } else { (wait * 2).min(longest) };
            tokio::time::sleep(wait).await;
        }
    }

    /// Ends when it gives no sign of life any more.
    async fn silent(&self) {
        let mut missed = 0;
        while missed < BEAT.1 {
            tokio::time::sleep(BEAT.0).await;
            let mut client = VersionClient::new(self.channel());
            missed = if ask(client.version(())).await.is_ok() { 0 } else { missed + 1 };
        }
    }

    /// Follows until the connection is lost.
    async fn follow_once(
        &self,
        inventory: &watch::Sender<Arc<Inventory>>,
        documents: &mut Documents,
    ) -> Failed {
        // containerd answers a subscription with its first event, not before: whether it stands is not
        // to be seen. The second list, a moment after the first, sees what may have fallen between.
        let changed = Arc::new(Notify::new());
        let mut events = AbortOnDropHandle::new(tokio::spawn(self.events(Arc::clone(&changed))));
        let mut earliest = Instant::now();
        let mut next = earliest;
        let mut settle = Some(earliest + SETTLE);
        loop {
            tokio::select! {
                () = changed.notified() => {
                    next = next.min(earliest);
                    settle = Some(Instant::now() + SETTLE);
                    continue;
                }
                why = &mut events => {
                    return why.unwrap_or_else(|_| Failed::Away("following it ended".to_owned()));
                }
                () = tokio::time::sleep_until(next) => {}
            }
            let listed = tokio::time::timeout(LIST_PATIENCE, self.list(documents)).await;
            match listed.unwrap_or_else(|_| Err(Failed::late())) {
                Ok(now) => inventory.send_replace(Arc::new(now)),
                Err(why) => return why,
            };
            let now = Instant::now();
            earliest = now + SPACING;
            settle = settle.filter(|settle| *settle > now);
            next = settle.unwrap_or(now + SAFETY_NET);
        }
    }

    /// Notifies with each event; ends when the connection does.
    fn events(&self, changed: Arc<Notify>) -> impl Future<Output = Failed> + use<> {
        let mut client = EventsClient::new(self.channel());
        async move {
            let filters = TOPICS.map(str::to_owned).to_vec();
            let outcome: Result<(), tonic::Status> = async {
                let mut events = client.subscribe(SubscribeRequest { filters }).await?.into_inner();
                while events.message().await?.is_some() {
                    changed.notify_one();
                }
                Ok(())
            }
            .await;
            match outcome {
                Ok(()) => Failed::Away("it ended its events".to_owned()),
                Err(status) => Failed::Away(super::told(&status)),
            }
        }
    }

    async fn list(&self, documents: &mut Documents) -> Result<Inventory, Failed> {
        let root = self.content().await?;
        let listed_at = SystemTime::now();
        let mut images: BTreeMap<Digest, RuntimeImage> = BTreeMap::new();
        let (mut references, mut aliases) = (HashMap::new(), HashMap::new());
        for namespace in &self.shared.options.namespaces {
            let named = self.named(namespace).await?;
            let content = self.contents(namespace).await?;
            if matches!(root, Root::Unseen) {
                self.fetch(namespace, &named, &content, documents).await?;
            }
            let (root, mut known) = (root.clone(), std::mem::take(documents));
            let reading = tokio::task::spawn_blocking(move || {
                let found = describe(named, &content, &root, &mut known);
                (found, known)
            });
            let (found, known) =
                reading.await.map_err(|_| Failed::Away("reading it was interrupted".to_owned()))?;
            *documents = known;
            for (target, reference, image) in found {
                if target != image.digest {
                    aliases.insert(target, image.digest);
                }
                let image = images.entry(image.digest).or_insert(image);
                // The first namespace that has a name says what it means.
                if let Some(reference) = reference
                    && references.insert(reference.clone(), image.digest).is_none()
                {
                    image.references.push(reference);
                }
            }
        }
        let images = images.into_iter().map(|(digest, mut image)| {
            image.references.sort();
            (digest, Arc::new(image))
        });
        Ok(Inventory {
            images: images.collect(),
            references,
            aliases,
            listed_at: Some(listed_at),
            connected: true,
        })
    }

    /// Names of images and what each points at.
    async fn named(&self, namespace: &Namespace) -> Result<Vec<(String, Digest)>, Failed> {
        let mut client = ImagesClient::new(self.channel()).max_decoding_message_size(MAX_ANSWER);
        let request = within(namespace, ListImagesRequest::default());
        let answer = patient(client.list(request)).await?;
        if answer.images.len() > MAX_IMAGES {
            tracing::warn!(
                count = answer.images.len(),
                "more images in containerd than are looked at"
            );
        }
        let named = answer.images.into_iter().take(MAX_IMAGES);
        Ok(named
            .filter_map(|image| Some((image.name, image.target?.digest.parse().ok()?)))
            .collect())
    }

    /// Reads manifests that are not known yet, where their files cannot be.
    async fn fetch(
        &self,
        namespace: &Namespace,
        named: &[(String, Digest)],
        content: &HashMap<Digest, Content>,
        documents: &mut Documents,
    ) -> Result<(), Failed> {
        for (_, target) in named {
            let mut next = Some(*target);
            // An index, and the image that is chosen of it.
            for _ in 0..2 {
                let Some(digest) = next.take() else { break };
                if !documents.contains_key(&digest)
                    && let Some(Content { size, .. }) = content.get(&digest)
                {
                    let blob = ApiBlob::new(self, namespace, digest, *size);
                    let document = match *size > MAX_MANIFEST_BYTES {
                        true => Some(Document::Other),
                        false => parse(&digest, blob.read_all().await.map_err(Failed::Away)?),
                    };
                    documents.extend(document.map(|document| (digest, document)));
                }
                if let Some(Document::Index(chosen)) = documents.get(&digest) {
                    next = Some(*chosen);
                }
            }
        }
        Ok(())
    }

    /// All blobs.
    async fn contents(&self, namespace: &Namespace) -> Result<HashMap<Digest, Content>, Failed> {
        let mut client = ContentClient::new(self.channel()).max_decoding_message_size(MAX_ANSWER);
        let mut stream =
            patient(client.list(within(namespace, ListContentRequest::default()))).await?;
        let mut contents = HashMap::new();
        while let Some(part) =
            stream.message().await.map_err(|status| Failed::Away(super::told(&status)))?
        {
            for info in part.info {
                let (Ok(digest), Ok(size)) = (info.digest.parse(), u64::try_from(info.size)) else {
                    continue;
                };
                let unpacked = info.labels.keys().any(|label| label.starts_with(UNPACKED));
                contents.insert(digest, Content { size, unpacked });
            }
            if contents.len() > MAX_BLOBS {
                return Err(Failed::Away(format!("it has more than {MAX_BLOBS} blobs")));
            }
        }
        Ok(contents)
    }
}

/// As `ask`; a list may take longer than a question, and has a limit of its own.
async fn patient<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failed> {
    call.await.map(tonic::Response::into_inner).map_err(|status| Failed::Away(super::told(&status)))
}

/// The images behind names, each with what it was named by: a digest, and a canonical name where it has
/// one. Blocks.
fn describe(
    named: Vec<(String, Digest)>,
    content: &HashMap<Digest, Content>,
    root: &Root,
    documents: &mut Documents,
) -> Vec<(Digest, Option<String>, RuntimeImage)> {
    documents.retain(|digest, _| content.contains_key(digest));
    let mut document = |digest: &Digest| -> Option<Document> {
        if let Some(known) = documents.get(digest) {
            return Some(known.clone());
        }
        // What cannot be read now may be there next time.
        let Root::Seen(root) = root else { return None };
        let read = read(root, digest, content.get(digest)?.size)?;
        documents.insert(*digest, read.clone());
        Some(read)
    };
    let mut found = Vec::with_capacity(named.len());
    for (name, target) in named {
        let (digest, image) = match document(&target) {
            Some(Document::Index(digest)) => (digest, document(&digest)),
            image => (target, image),
        };
        let Some(Document::Image { config, layers }) = image else { continue };
        let layers = layers.into_iter().map(|blob| RuntimeLayer {
            digest: blob.digest,
            bytes: blob.size,
            present: content.get(&blob.digest).is_some_and(|there| there.size == blob.size),
        });
        let layers: Vec<_> = layers.collect();
        // CRI names images by their config, too; that is no reference.
        let reference = match name.starts_with("sha256:") {
            true => None,
            false => name.parse::<Reference>().ok().filter(|name| name.registry().is_some()),
        };
        let image = RuntimeImage {
            digest,
            references: Vec::new(),
            bytes: layers.iter().map(|layer| layer.bytes).sum(),
            unpacked: content.get(&config).is_some_and(|config| config.unpacked),
            layers,
        };
        found.push((target, reference.map(|reference| reference.to_string()), image));
    }
    found
}

/// A manifest or an index, checked against its digest. Blocks.
fn read(root: &Path, digest: &Digest, size: u64) -> Option<Document> {
    use std::io::Read as _;
    if size > MAX_MANIFEST_BYTES {
        return Some(Document::Other);
    }
    let path = root.join("blobs").join("sha256").join(digest.hex());
    let mut bytes = Vec::new();
    open(&path, size)?.file.take(size).read_to_end(&mut bytes).ok()?;
    parse(digest, Bytes::from(bytes))
}

/// What a manifest or an index says; nothing where it is not what its digest says.
fn parse(digest: &Digest, bytes: Bytes) -> Option<Document> {
    if Digest::of(&bytes) != *digest {
        return None;
    }
    let raw = RawManifest { media_type: String::new(), bytes };
    Some(match Manifest::parse(&raw) {
        Ok(Manifest::Index(index)) => {
            index.choose(&Platform::default()).map_or(Document::Other, Document::Index)
        }
        Ok(Manifest::Image(image)) => Document::Image {
            config: image.config.digest,
            layers: image.layers.iter().map(|placed| placed.layer.blob).collect(),
        },
        Err(_) => Document::Other,
    })
}
