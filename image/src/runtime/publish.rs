//! A stored image for containers of the node, without a copy.
//!
//! ```text
//! tree, layers' records ─► a snapshot a layer: folders, hard links to objects ─► Commit as the chain id
//! manifest, config ─► content store, which refer to the topmost snapshot ─► names, as CRI gives them
//! ```
//!
//! Afterwards CRI lists the image, and a container of it starts at once. containerd never had its blobs:
//! they count as discarded.
//!
//! # What always holds
//!
//! - **Nobody is shown something else than the image says**, but for what [`Runtime::publish`] names.
//! - **What is unfinished has no name.** All of it is under a lease; a snapshot takes its name when its
//!   files are there, the image when its snapshots have theirs. What a crash leaves, containerd collects.
//! - **One inode, nobody's to change**: objects are 0444, and overlayfs copies a file before it is
//!   written to. containerd's removal of the image takes its links away and no byte of the store's.
//! - **Tried before it is done**: whether snapshots are taken so is tested with one file, in a namespace
//!   of its own, before the first image, and again after containerd was away.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::{CommitSnapshotRequest, StatSnapshotRequest};
use containerd_client::services::v1::{
    CreateImageRequest, DeleteNamespaceRequest, GetImageRequest, Image, Info, ListContentRequest,
    UpdateImageRequest, UpdateRequest, WriteAction, WriteContentRequest,
};
use containerd_client::types::Descriptor;
use prost_types::FieldMask;
use tonic::Code;

use super::snapshots::{SNAPSHOTTER, Session, chain_ids, patient};
use super::{Failed, Namespace, Runtime, told};
use crate::digest::Digest;
use crate::manifest::Packaging;
use crate::reference::Reference;
use crate::store::{Store, StoreError, Whole};
use crate::tree::{Attributes, LayerEntry, Tree};
use rustix::fs::StatVfsMountFlags;

/// Where it is tried.
const TRIAL: &str = "carport-trial";

/// CRI's label for the images that it knows, and its value.
const MANAGED: (&str, &str) = ("io.cri-containerd.image", "managed");
/// CRI's label for images that the kubelet must not collect, and its value.
const PINNED: (&str, &str) = ("io.cri-containerd.pinned", "pinned");

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// What is to be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// The stored image: a platform's manifest.
    pub image: Digest,
    /// What it is called, by tag or by the manifest's digest.
    pub name: Reference,
    /// Whether the kubelet is to leave it alone when it collects images: heeded by containerd from 1.7.24 on.
    pub pinned: bool,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Names that mean the image in containerd now, as CRI gives them.
    pub names: Vec<String>,
    /// Snapshots that were made; the others containerd had.
    pub snapshots: usize,
}

/// Why an image was not published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// This image, or this node, does not allow for it: have the runtime pull the image.
    #[error("cannot be given to containerd without a copy: {0}")]
    NotPossible(String),
    /// containerd does not answer, or not as it should: later it may.
    #[error("containerd: {0}")]
    Away(String),
    /// The store's disk.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How the reason begins where the runtime's folder could be shared but for a read-only mount.
const READ_ONLY: &str = "its folder is mounted read-only here";

impl PublishError {
    /// Whether only a read-only mount stands between the store and the runtime's folder, as in the default
    /// install: nothing is broken then.
    pub fn is_read_only_mount(&self) -> bool {
        matches!(self, Self::NotPossible(why) if why.starts_with(READ_ONLY))
    }
}

impl From<Failed> for PublishError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::NotFound => Self::Away("something of it has gone".to_owned()),
            Failed::Away(why) => Self::Away(why),
        }
    }
}

impl From<tonic::Status> for PublishError {
    fn from(status: tonic::Status) -> Self {
        Self::Away(told(&status))
    }
}

impl Runtime {
    /// Makes a stored image one of containerd's, in the first of the configured namespaces: with
    /// snapshots of hard links to the store's files, and no copy of them. A name that means another
    /// image there means this one afterwards.
    ///
    /// Only images are published of which containers then see what the image says: its owners, modes
    /// and extended attributes must be those that trees have. What differs is that files are 0444 for
    /// 0644 and 0555 for 0755, that all times are 1970-01-01, and that equal files are one inode. Images with
    /// compiled Python are left to the runtime, since that is of use only with the times.
    ///
    /// # Errors
    ///
    /// [`PublishError::NotPossible`] where the image has to come to containerd another way.
    ///
    /// # Cancel safety
    ///
    /// What was begun has no name, and containerd collects it within an hour.
    pub async fn publish(
        &self,
        store: &Store,
        what: &Publication,
    ) -> Result<Published, PublishError> {
        let image = what.image;
        let whole = on_disk(store, move |store| store.whole(&image)).await?;
        let whole = whole.ok_or_else(|| not(format!("image {image} is not in the store")))?;
        let names = names(what, &whole)?;
        shows_the_same(&whole)?;
        let root = self.room_for(store).await?;
        let namespace = self.shared.options.namespaces.first();
        let namespace = namespace.ok_or_else(|| not("no namespace is configured".to_owned()))?;
        let session = self.session(namespace, root).await?;
        let publishing = Publishing { session: &session, store, whole: &whole };
        let done = publishing.run(names, what.pinned).await;
        if matches!(done, Err(PublishError::Away(_))) {
            // Another one may come back.
            self.link().publishes = None;
        }
        // The snapshots are kept by the image now, or by nothing.
        if let Err(status) = session.end().await {
            tracing::debug!(%status, "a lease in containerd ends by its time");
        }
        let published = done?;
        tracing::info!(
            %image, names = ?published.names, snapshots = published.snapshots,
            "image given to containerd"
        );
        Ok(published)
    }

    /// Whether images can be published, and files taken over, without a copy; tried out where that is not
    /// known yet.
    ///
    /// # Errors
    ///
    /// As [`Runtime::publish`].
    ///
    /// # Cancel safety
    ///
    /// As [`Runtime::publish`].
    pub async fn shares_files_with(&self, store: &Store) -> Result<(), PublishError> {
        self.room_for(store).await.map(drop)
    }

    /// overlayfs' folder, where snapshots can be made of the store's files.
    pub(super) async fn room_for(&self, store: &Store) -> Result<PathBuf, PublishError> {
        // One trial at a time: it ends with the removal of its namespace.
        let _turn = self.shared.trial.lock().await;
        let known = {
            let link = self.link();
            let known = link.publishes.as_ref().filter(|(at, _)| at == store.root());
            known.map(|(_, known)| known.clone())
        };
        if let Some(known) = known {
            return known.map_err(PublishError::NotPossible);
        }
        let found = match self.try_out(store).await {
            Err(PublishError::NotPossible(why)) => Err(why),
            found => Ok(found?),
        };
        if let Err(why) = &found {
            tracing::info!(why, "images cannot be given to containerd without a copy");
        }
        self.link().publishes = Some((store.root().to_owned(), found.clone()));
        found.map_err(PublishError::NotPossible)
    }

    /// Makes a snapshot of one file of the store, looks at it, and removes it.
    async fn try_out(&self, store: &Store) -> Result<PathBuf, PublishError> {
        let root = self.snapshots_root().await?.map_err(not)?;
        let snapshotter = self.used_snapshotter().await?;
        if let Some(other) = snapshotter.filter(|used| used != SNAPSHOTTER) {
            return Err(not(format!("its images are unpacked by the snapshotter {other}")));
        }
        let (near, far) = (store.root().to_owned(), root.clone());
        let apart = on_disk(store, move |_| {
            let device = |path: &Path| {
                let what = || format!("look at {}", path.display());
                std::fs::metadata(path)
                    .map(|meta| meta.dev())
                    .map_err(|e| StoreError::io(what(), e))
            };
            Ok(device(&near)? != device(&far)?)
        });
        if apart.await? {
            return Err(not(format!(
                "its snapshots in {} are on another file system than the store in {}",
                root.display(),
                store.root().display()
            )));
        }
        let far = root.clone();
        let read_only = on_disk(store, move |_| {
            let mount = rustix::fs::statvfs(&far).map(|mount| mount.f_flag);
            Ok(mount.is_ok_and(|flags| flags.contains(StatVfsMountFlags::RDONLY)))
        });
        if read_only.await? {
            return Err(not(format!("{READ_ONLY}: {}", root.display())));
        }
        let namespace = Namespace::parse(TRIAL).ok_or_else(|| not(TRIAL.to_owned()))?;
        let session = self.session(&namespace, root.clone()).await?;
        let (committed, view) = (session.key("committed"), session.key("view"));
        let tried = try_snapshot(&session, store, &committed, &view).await;
        for key in [&view, &committed] {
            if let Err(status) = session.remove(key).await {
                tracing::debug!(%status, "a snapshot of the trial stays until it is collected");
            }
        }
        let channel = session.channel();
        session.end().await?;
        let request = DeleteNamespaceRequest { name: TRIAL.to_owned() };
        if let Err(status) = patient(NamespacesClient::new(channel).delete(request)).await {
            tracing::debug!(%status, "the trial's namespace stays");
        }
        tried.map(|()| root)
    }

    /// The snapshotter that the images there are unpacked by: overlayfs where that is one of several.
    async fn used_snapshotter(&self) -> Result<Option<String>, PublishError> {
        let Some(namespace) = self.shared.options.namespaces.first() else { return Ok(None) };
        let mut client = ContentClient::new(self.channel());
        let list = super::within(namespace, ListContentRequest::default());
        let mut stream = patient(client.list(list)).await?;
        let mut used = None;
        while let Some(part) = stream.message().await? {
            let labels = part.info.iter().flat_map(|info| info.labels.keys());
            for snapshotter in labels.filter_map(|label| label.strip_prefix(super::UNPACKED)) {
                // A label may be followed by a number, `overlayfs.1`.
                let name = snapshotter.split(['.', '/']).next().unwrap_or_default();
                if name == SNAPSHOTTER {
                    return Ok(Some(name.to_owned()));
                }
                used = Some(name.to_owned());
            }
        }
        Ok(used)
    }
}

fn not(why: String) -> PublishError {
    PublishError::NotPossible(why)
}

/// Whether a snapshot that is filled from outside shows what was put there.
async fn try_snapshot(
    session: &Session,
    store: &Store,
    committed: &str,
    view: &str,
) -> Result<(), PublishError> {
    const FILE: &str = "carport";
    let active = session.key("active");
    let filled = async {
        let folder = session.prepare(&active, None).await?;
        let inode = on_disk(store, move |store| {
            let scratch = store.scratch()?;
            let (file, link) = (scratch.path().join(FILE), folder.join(FILE));
            let what = || format!("link a file of the store to {}", link.display());
            std::fs::write(&file, FILE)
                .and_then(|()| std::fs::hard_link(&file, &link))
                .and_then(|()| std::fs::metadata(&file))
                .map(|meta| meta.ino())
                .map_err(|e| StoreError::io(what(), e))
        });
        // Over two bind mounts of one file system, for one, there are no links.
        let inode = inode.await.map_err(|error| not(error.to_string()))?;
        commit(session, &active, committed).await?;
        Ok::<_, PublishError>(inode)
    };
    let inode = match filled.await {
        Ok(inode) => inode,
        Err(error) => {
            let _ = session.remove(&active).await;
            return Err(error);
        }
    };
    let shown = session.view(view, committed).await?.join(FILE);
    let found = on_disk(store, move |_| Ok(std::fs::metadata(shown).ok().map(|meta| meta.ino())));
    match found.await? == Some(inode) {
        true => Ok(()),
        false => Err(not("a snapshot does not show what was put into it".to_owned())),
    }
}

/// Gives a snapshot its name; false where another has it already.
async fn commit(session: &Session, key: &str, name: &str) -> Result<bool, tonic::Status> {
    let request = CommitSnapshotRequest {
        snapshotter: SNAPSHOTTER.to_owned(),
        name: name.to_owned(),
        key: key.to_owned(),
        ..Default::default()
    };
    match patient(session.snapshots().commit(session.of(request))).await {
        Ok(()) => Ok(true),
        Err(status) if status.code() == Code::AlreadyExists => Ok(false),
        Err(status) => Err(status),
    }
}

/// The image's names: as it was asked for, by its digest, and by its config's as CRI does.
fn names(what: &Publication, whole: &Whole) -> Result<Vec<String>, PublishError> {
    let Reference::Registry(registry) = &what.name else {
        return Err(not(format!("{} is no name in a registry", what.name)));
    };
    if let Some(digest) = what.name.digest().filter(|digest| *digest != what.image) {
        return Err(not(format!(
            "{digest} is an index, which the store does not keep: name the image by a tag or by {}",
            what.image
        )));
    }
    let repository = format!("{}/{}", registry.host(), registry.repository());
    let mut names = vec![whole.image.config.digest.to_string()];
    names.extend(what.name.tag().map(|tag| format!("{repository}:{tag}")));
    names.push(format!("{repository}@{}", what.image));
    Ok(names)
}

/// Whether a container sees what the image says.
fn shows_the_same(whole: &Whole) -> Result<(), PublishError> {
    if !matches!(whole.image.packaging, Packaging::OciImage | Packaging::DockerImage) {
        return Err(not(format!("a {} is no image for containers", whole.image.packaging)));
    }
    if whole.layers.is_empty() {
        return Err(not("the image has no layers".to_owned()));
    }
    for (placed, record) in &whole.layers {
        let layer = placed.layer.blob.digest;
        match &record.attributes {
            Attributes::Kept => {}
            Attributes::Changed(why) => {
                return Err(not(format!("layer {layer}: {why}, which the store does not keep")));
            }
            Attributes::Unknown => {
                return Err(not(format!(
                    "layer {layer} was pulled by a version that did not look at owners and modes: \
                     remove the image and pull it again"
                )));
            }
        }
        let compiled = record.entries.iter().find_map(|entry| match entry {
            LayerEntry::File { path, .. } if path.ends_with(".pyc") => Some(path),
            _ => None,
        });
        if let Some(path) = compiled {
            return Err(not(format!(
                "layer {layer}: /{path} is of use only with its source's time, which the store does \
                 not keep"
            )));
        }
    }
    Ok(())
}

/// One image on its way.
struct Publishing<'a> {
    session: &'a Session,
    store: &'a Store,
    whole: &'a Whole,
}

impl Publishing<'_> {
    async fn run(&self, names: Vec<String>, pinned: bool) -> Result<Published, PublishError> {
        let chain = chain_ids(self.whole.layers.iter().map(|(_, record)| record.diff_id));
        let Some(top) = chain.last() else { return Err(not("the image has no layers".to_owned())) };
        let mut snapshots = 0;
        if !self.has(top).await? {
            snapshots = self.snapshots(&chain).await?;
        }
        let reference = |label: &str, to: &Digest| HashMap::from([(label.into(), to.to_string())]);
        let Whole { image, manifest, config, .. } = self.whole;
        let to_snapshot = format!("{}{SNAPSHOTTER}", super::UNPACKED);
        self.content(image.config.digest, config.clone(), reference(&to_snapshot, top)).await?;
        let to_config = reference("containerd.io/gc.ref.content.config", &image.config.digest);
        self.content(image.digest, manifest.bytes.to_vec(), to_config).await?;
        for name in &names {
            self.name(name, pinned).await?;
        }
        Ok(Published { names, snapshots })
    }

    async fn has(&self, chain: &Digest) -> Result<bool, PublishError> {
        let (snapshotter, key) = (SNAPSHOTTER.to_owned(), chain.to_string());
        let request = self.session.of(StatSnapshotRequest { snapshotter, key });
        match patient(self.session.snapshots().stat(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(status.into()),
        }
    }

    /// Makes what is missing of a chain; how many that were.
    async fn snapshots(&self, chain: &[Digest]) -> Result<usize, PublishError> {
        let (mut lower, mut below, mut made) = (Tree::default(), None, 0);
        for ((placed, record), id) in self.whole.layers.iter().zip(chain) {
            if !self.has(id).await? && self.snapshot(id, below, &lower, &record.entries).await? {
                made += 1;
            }
            let laid = placed.place.lay(&mut lower, &record.entries);
            laid.map_err(|e| StoreError::Corrupt(e.to_string()))?;
            below = Some(id);
        }
        // Links are on the disk before the image has a name; before that nobody looks for them.
        let root = self.session.root.clone();
        let synced = on_disk(self.store, move |_| {
            let what = || format!("sync {}", root.display());
            let root = std::fs::File::open(&root).map_err(|e| StoreError::io(what(), e))?;
            rustix::fs::syncfs(&root).map_err(|e| StoreError::io(what(), e.into()))
        });
        synced.await?;
        Ok(made)
    }

    /// Makes one; false where somebody else just did.
    async fn snapshot(
        &self,
        id: &Digest,
        below: Option<&Digest>,
        lower: &Tree,
        entries: &[LayerEntry],
    ) -> Result<bool, PublishError> {
        let key = self.session.key(id.hex());
        let making = async {
            let folder = self.session.prepare(&key, below).await?;
            let (lower, entries) = (lower.clone(), entries.to_vec());
            on_disk(self.store, move |store| store.lay_out(&lower, &entries, &folder)).await?;
            Ok::<_, PublishError>(commit(self.session, &key, &id.to_string()).await?)
        };
        let made = making.await;
        if !matches!(made, Ok(true)) {
            // What cannot be removed goes with the lease.
            let _ = self.session.remove(&key).await;
        }
        made
    }

    /// Puts a document into the content store, with labels.
    async fn content(
        &self,
        digest: Digest,
        data: Vec<u8>,
        labels: HashMap<String, String>,
    ) -> Result<(), PublishError> {
        let mut client = ContentClient::new(self.session.channel());
        let total = i64::try_from(data.len()).unwrap_or(i64::MAX);
        let write = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: self.session.key(digest.hex()),
            total,
            expected: digest.to_string(),
            offset: 0,
            data,
            labels: labels.clone(),
        };
        let stream = self.session.of(futures_util::stream::once(std::future::ready(write)));
        let written = async {
            let mut answers = patient(client.write(stream)).await?;
            while answers.message().await?.is_some() {}
            Ok::<_, tonic::Status>(())
        };
        match written.await {
            Err(status) if status.code() == Code::AlreadyExists => {}
            written => return Ok(written?),
        }
        let paths = labels.keys().map(|label| format!("labels.{label}")).collect();
        let info = Some(Info { digest: digest.to_string(), labels, ..Default::default() });
        let update = UpdateRequest { info, update_mask: Some(FieldMask { paths }) };
        patient(client.update(self.session.of(update))).await?;
        Ok(())
    }

    /// Makes `name` mean the image.
    async fn name(&self, name: &str, pinned: bool) -> Result<(), PublishError> {
        let Whole { image, manifest, .. } = self.whole;
        let label = |(label, value): (&str, &str)| (label.to_owned(), value.to_owned());
        let labels: HashMap<_, _> =
            [MANAGED].into_iter().chain(pinned.then_some(PINNED)).map(label).collect();
        let target = Descriptor {
            media_type: media_type(&manifest.bytes),
            digest: image.digest.to_string(),
            size: i64::try_from(manifest.bytes.len()).unwrap_or(i64::MAX),
            ..Default::default()
        };
        let image = Image {
            name: name.to_owned(),
            labels: labels.clone(),
            target: Some(target.clone()),
            ..Default::default()
        };
        let mut client = ImagesClient::new(self.session.channel());
        let request = CreateImageRequest { image: Some(image.clone()), source_date_epoch: None };
        match patient(client.create(self.session.of(request))).await {
            Err(status) if status.code() == Code::AlreadyExists => {}
            created => return Ok(created.map(drop)?),
        }
        let request = GetImageRequest { name: name.to_owned() };
        let there = patient(client.get(self.session.of(request))).await?.image.unwrap_or_default();
        let is_same = there.target.is_some_and(|there| there.digest == target.digest)
            && labels.iter().all(|(label, value)| there.labels.get(label) == Some(value));
        if is_same {
            return Ok(());
        }
        let labels = labels.keys().map(|label| format!("labels.{label}"));
        let paths = labels.chain(["target".to_owned()]).collect();
        let (image, update_mask) = (Some(image), Some(FieldMask { paths }));
        let request = UpdateImageRequest { image, update_mask, source_date_epoch: None };
        patient(client.update(self.session.of(request))).await?;
        Ok(())
    }
}

/// As the manifest says; OCI's where it says nothing.
fn media_type(manifest: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        media_type: Option<String>,
    }
    let kind = serde_json::from_slice::<Kind>(manifest).ok().and_then(|kind| kind.media_type);
    kind.unwrap_or_else(|| OCI_MANIFEST.to_owned())
}

/// Runs something that blocks on the disk.
async fn on_disk<T: Send + 'static>(
    store: &Store,
    work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let store = store.clone();
    match tokio::task::spawn_blocking(move || work(&store)).await {
        Ok(done) => done,
        Err(panic) => Err(StoreError::Corrupt(format!("work on the store died: {panic}"))),
    }
}
