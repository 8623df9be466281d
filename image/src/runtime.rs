//! The node's container runtime: what containerd has, used beside it.
//!
//! ```text
//! digest ─► content.Info in each namespace ─► lease ─► <content root>/blobs/sha256/<hex> ─► open file
//! ```
//!
//! In comes a digest; out goes an open file of containerd's content store, *unverified*: who reads it
//! checks it, as everything that comes from somewhere else. Nothing of containerd's is ever changed
//! but for leases, which end by themselves, and labels of images that it is asked to keep (`pin`).
//!
//! # What always holds
//!
//! - **A guest.** containerd may be absent, restart or hang: each call has a short time-out, and after
//!   one that failed containerd is left alone for a while. What could not be asked counts as not there.
//! - **Said once.** That it is away, and that it is back, is logged when it changes.
//! - **Files, not streams.** Blobs are read by path, several times as fast as over its API; the content
//!   root is asked for, never guessed. An open file stays whole whatever containerd removes.
//!
//! [`crate::source`] puts it before registries; which images there are is in `inventory`.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest, DeleteRequest, InfoRequest, PluginsRequest, Resource,
};
use hyper_util::rt::TokioIo;
use rustix::fs::{Mode, OFlags};
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use crate::digest::Digest;

mod adopt;
mod api;
mod arrived;
mod inventory;
mod pin;
mod publish;
mod snapshots;

pub(crate) use adopt::Snapshot;
pub(crate) use api::ApiBlob;
pub use inventory::{Inventory, RuntimeImage, RuntimeLayer};
pub use pin::RuntimeError;
pub use publish::{Publication, PublishError, Published};
pub(crate) use snapshots::chain_ids;

/// Where the images of pods are: CRI's own, which no configuration of containerd changes.
const CRI_NAMESPACE: &str = "k8s.io";
/// What one answer may take: the list of images comes in one.
const MAX_ANSWER: usize = 64 << 20;

/// How long containerd may take for an answer, and for all it takes to open one blob. A quiet one
/// answers within milliseconds; a pull must not feel one that does not.
const PATIENCE: Duration = Duration::from_secs(1);

/// After an answer that did not come, containerd is left alone for so long.
const REST: Duration = Duration::from_secs(30);

/// What a lease that nobody ends is worth: an open file needs none, so this is only for the blobs of an image
/// that are still to be opened.
const LEASE: Duration = Duration::from_secs(3600);

/// The label of a config whose layers are unpacked, which keeps their snapshots; the snapshotter follows.
const UNPACKED: &str = "containerd.io/gc.ref.snapshot.";

/// Where containerd is, and what of it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// containerd's gRPC socket. Need not exist.
    pub socket: PathBuf,
    /// The namespaces whose content is used, in the order in which they are asked.
    pub namespaces: Vec<Namespace>,
}

/// The name of a containerd namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace(MetadataValue<Ascii>);

impl Namespace {
    /// Reads a name: letters and digits in groups that `.`, `-` or `_` part, 76 characters at most.
    pub fn parse(text: &str) -> Option<Self> {
        let groups = text.split(['.', '-', '_']);
        let plain = |group: &str| {
            !group.is_empty() && group.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        let sound = text.len() <= 76 && groups.into_iter().all(plain);
        if !sound {
            return None;
        }
        text.parse().ok().map(Self)
    }

    /// As containerd writes it.
    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

/// What was read of containerd so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RuntimeUse {
    /// Blobs that were opened.
    pub blobs: u64,
    /// Bytes of layers that need not be fetched because containerd had them.
    pub bytes: u64,
}

/// containerd on this node. Clones share the connection and what is known of it.
#[derive(Clone)]
pub struct Runtime {
    shared: Arc<Shared>,
}

struct Shared {
    options: RuntimeOptions,
    /// Connects when it is used, and again when that is needed.
    channel: OnceLock<Channel>,
    // Held for a look only.
    link: Mutex<Link>,
    /// The turn of who tries out whether files can be shared.
    trial: tokio::sync::Mutex<()>,
    blobs: AtomicU64,
    bytes: AtomicU64,
}

/// What is known of the other side.
#[derive(Default)]
struct Link {
    /// The content store's folder, as containerd said since it answered last.
    root: Option<Root>,
    resting_until: Option<Instant>,
    /// What was said last, so that it is not said again.
    said: Option<String>,
    said_unseen: bool,
    /// Whether it takes snapshots of that store's files: overlayfs' folder, or why not. Found out again
    /// after it was away.
    publishes: Option<(PathBuf, Result<PathBuf, String>)>,
}

/// The content store's folder.
#[derive(Debug, Clone)]
enum Root {
    Seen(PathBuf),
    /// It is not mounted here: what is in it is to be had through the API.
    Unseen,
}

/// Why containerd did not say.
#[derive(Debug)]
enum Failed {
    /// It answers, and has no such thing.
    NotFound,
    /// It does not answer, or not as it should.
    Away(String),
}

impl Failed {
    fn late() -> Self {
        Self::Away(format!("no answer within {} s", PATIENCE.as_secs()))
    }
}

/// A blob that containerd has.
pub(crate) enum Found {
    File(FoundBlob),
    Api(ApiBlob),
}

/// A blob in containerd's content store, open.
pub(crate) struct FoundBlob {
    pub(crate) file: File,
    pub(crate) size: u64,
}

impl Runtime {
    /// Names it; asks nothing yet.
    pub fn new(options: RuntimeOptions) -> Self {
        let shared = Shared {
            options,
            channel: OnceLock::new(),
            link: Mutex::default(),
            trial: tokio::sync::Mutex::default(),
            blobs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Where it is.
    pub fn socket(&self) -> &Path {
        &self.shared.options.socket
    }

    /// Whether the images of pods are among those that are looked at.
    pub fn sees_pods(&self) -> bool {
        let mut namespaces = self.shared.options.namespaces.iter();
        namespaces.any(|namespace| namespace.as_str() == CRI_NAMESPACE)
    }

    /// Whether what is published here is for pods.
    pub fn publishes_to_pods(&self) -> bool {
        let first = self.shared.options.namespaces.first();
        first.is_some_and(|namespace| namespace.as_str() == CRI_NAMESPACE)
    }

    /// What was read of it so far, by all clones.
    pub fn used(&self) -> RuntimeUse {
        RuntimeUse {
            blobs: self.shared.blobs.load(Ordering::Relaxed),
            bytes: self.shared.bytes.load(Ordering::Relaxed),
        }
    }

    /// Counts bytes that need not be fetched.
    pub(crate) fn count(&self, bytes: u64) {
        self.shared.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Opens the blob where containerd has it, and keeps it there by `leases`. Nothing where it
    /// has not, where it is not to be asked now, or where its files cannot be opened from here.
    ///
    /// # Cancel safety
    ///
    /// A lease that was just made ends by itself.
    pub(crate) async fn blob(&self, digest: &Digest, leases: &Leases) -> Option<Found> {
        if self.rests() {
            return None;
        }
        let found = tokio::time::timeout(PATIENCE, self.find(digest, leases)).await;
        match found.unwrap_or_else(|_| Err(Failed::late())) {
            Ok(found) => {
                self.shared.blobs.fetch_add(1, Ordering::Relaxed);
                Some(found)
            }
            Err(Failed::NotFound) => None,
            Err(Failed::Away(why)) => {
                self.away(&why);
                None
            }
        }
    }

    async fn find(&self, digest: &Digest, leases: &Leases) -> Result<Found, Failed> {
        let root = self.content().await?;
        for namespace in &self.shared.options.namespaces {
            let size = match self.size(namespace, digest).await {
                Err(Failed::NotFound) => continue,
                size => size?,
            };
            leases.hold(self, namespace, digest).await?;
            let Root::Seen(root) = &root else {
                return Ok(Found::Api(ApiBlob::new(self, namespace, *digest, size)));
            };
            let path = root.join("blobs").join("sha256").join(digest.hex());
            let opened = tokio::task::spawn_blocking(move || open(&path, size)).await;
            let found = opened.ok().flatten().map(Found::File);
            if found.is_none() {
                // Collected at this moment; or the store has moved.
                self.link().root = None;
            }
            return found.ok_or(Failed::NotFound);
        }
        Err(Failed::NotFound)
    }

    /// Whether the namespace has the blob, and how large it is.
    async fn size(&self, namespace: &Namespace, digest: &Digest) -> Result<u64, Failed> {
        let request = InfoRequest { digest: digest.to_string() };
        let mut client = ContentClient::new(self.channel());
        let answer = ask(client.info(within(namespace, request))).await?;
        let size = answer.info.and_then(|info| u64::try_from(info.size).ok());
        size.ok_or_else(|| Failed::Away(format!("blob {digest}: containerd names no size")))
    }

    /// Where its content store is, as this process sees it.
    async fn content(&self) -> Result<Root, Failed> {
        if let Some(root) = &self.link().root {
            return Ok(root.clone());
        }
        let filters = vec!["type==io.containerd.content.v1".to_owned()];
        let mut client = IntrospectionClient::new(self.channel());
        let answer = ask(client.plugins(PluginsRequest { filters })).await?;
        let root = answer.plugins.iter().find_map(|plugin| plugin.exports.get("root"));
        let root = root.map(PathBuf::from).filter(|root| root.is_absolute());
        let root = root.ok_or_else(|| {
            Failed::Away("containerd does not say where its content store is".to_owned())
        })?;
        // Which it makes when it starts; an empty folder may be what somebody mounts instead.
        let inside = root.join("ingest");
        let is_seen = tokio::task::spawn_blocking(move || inside.is_dir()).await;
        let shown = root.display().to_string();
        let root = if is_seen.unwrap_or_default() { Root::Seen(root) } else { Root::Unseen };
        let mut link = self.link();
        link.root = Some(root.clone());
        link.resting_until = None;
        let socket = self.shared.options.socket.display();
        if link.said.take().is_some() {
            tracing::info!(%socket, "containerd is back");
        }
        if matches!(root, Root::Unseen) && !std::mem::replace(&mut link.said_unseen, true) {
            tracing::info!(
                %socket, content = shown,
                "containerd's content store is not to be seen from here: its blobs are read through \
                 its API, which is slower; mount it at the same path"
            );
        }
        Ok(root)
    }

    fn channel(&self) -> Channel {
        let connect = || {
            let socket = self.shared.options.socket.clone();
            // The address is never used; the connector has its own.
            Endpoint::from_static("http://containerd").connect_with_connector_lazy(service_fn(
                move |_| {
                    let socket = socket.clone();
                    async move { UnixStream::connect(socket).await.map(TokioIo::new) }
                },
            ))
        };
        self.shared.channel.get_or_init(connect).clone()
    }

    fn rests(&self) -> bool {
        self.link().resting_until.is_some_and(|until| Instant::now() < until)
    }

    /// Leaves containerd alone for a while, and says why where that is news.
    fn away(&self, why: &str) {
        self.say_away(why);
        self.link().resting_until = Some(Instant::now() + REST);
    }

    /// Says that containerd is away, where that is news.
    fn say_away(&self, why: &str) {
        let mut link = self.link();
        link.root = None;
        link.publishes = None;
        if link.said.as_deref() != Some(why) {
            let socket = self.shared.options.socket.display();
            tracing::info!(%socket, why, "nothing is taken from containerd for now");
            link.said = Some(why.to_owned());
        }
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Link> {
        self.shared.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What keeps blobs in containerd while somebody reads them: one lease a namespace. They end when this is
/// dropped.
#[derive(Default)]
pub(crate) struct Leases {
    // The cell of a namespace is filled once; the map is held for a look only.
    leases: Mutex<HashMap<String, Arc<tokio::sync::OnceCell<Lease>>>>,
}

/// One lease. Ends when dropped, and by its time where the process ends first.
struct Lease {
    runtime: Runtime,
    namespace: Namespace,
    id: String,
}

impl Leases {
    /// Keeps `digest` in `namespace`.
    async fn hold(
        &self,
        runtime: &Runtime,
        namespace: &Namespace,
        digest: &Digest,
    ) -> Result<(), Failed> {
        let cell = {
            let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(leases.entry(namespace.as_str().to_owned()).or_default())
        };
        let lease = cell.get_or_try_init(|| Lease::new(runtime, namespace)).await?;
        let resource = Resource { id: digest.to_string(), r#type: "content".to_owned() };
        let request = AddResourceRequest { id: lease.id.clone(), resource: Some(resource) };
        let mut client = LeasesClient::new(runtime.channel());
        ask(client.add_resource(within(namespace, request))).await?;
        Ok(())
    }
}

impl Lease {
    async fn new(runtime: &Runtime, namespace: &Namespace) -> Result<Self, Failed> {
        static MADE: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now();
        let nanoseconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let made = MADE.fetch_add(1, Ordering::Relaxed);
        let id = format!("carport-{}-{nanoseconds}-{made}", std::process::id());
        let end = humantime::format_rfc3339_seconds(now + LEASE).to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), end)]);
        let mut client = LeasesClient::new(runtime.channel());
        let request = CreateRequest { id: id.clone(), labels };
        ask(client.create(within(namespace, request))).await?;
        Ok(Self { runtime: runtime.clone(), namespace: namespace.clone(), id })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Nothing to do where it was ended. Outside of a Tokio runtime, as at the process's end, its time has
        // to do.
        if self.id.is_empty() {
            return;
        }
        let Ok(tokio) = tokio::runtime::Handle::try_current() else { return };
        let mut client = LeasesClient::new(self.runtime.channel());
        let request = DeleteRequest { id: std::mem::take(&mut self.id), sync: false };
        let request = within(&self.namespace, request);
        tokio.spawn(async move {
            if let Err(error) = ask(client.delete(request)).await {
                tracing::debug!(?error, "a lease in containerd ends by its time");
            }
        });
    }
}

/// Opens a blob's file, where it is what containerd says. Blocks.
fn open(path: &Path, size: u64) -> Option<FoundBlob> {
    // A pipe must not make us wait for its other end, nor a link lead out of the store.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .inspect_err(|error| tracing::debug!(path = %path.display(), %error, "cannot open a blob"));
    let file = File::from(file.ok()?);
    let meta = file.metadata().ok()?;
    (meta.is_file() && meta.len() == size).then_some(FoundBlob { file, size })
}

/// `message` for one namespace.
fn within<T>(namespace: &Namespace, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace.0.clone());
    request
}

/// An answer, within the time that it may take.
async fn ask<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, Failed> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) if status.code() == tonic::Code::NotFound => Err(Failed::NotFound),
        Ok(Err(status)) => Err(Failed::Away(told(&status))),
        Err(_) => Err(Failed::late()),
    }
}

/// What a status says, down to its cause: "transport error" alone tells nobody anything.
fn told(status: &tonic::Status) -> String {
    let first = std::error::Error::source(status);
    let last = std::iter::successors(first, |cause| cause.source()).last();
    match last {
        Some(cause) => format!("{}: {cause}", status.message()),
        None => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_what_containerd_takes_for_one() {
        for name in ["k8s.io", "moby", "a-b_c.d", "default"] {
            assert_eq!(Namespace::parse(name).unwrap().as_str(), name);
        }
        for text in ["", ".", "a..b", "-a", "a/b", "a b", "ä", "a\n", &"a".repeat(77)] {
            assert_eq!(Namespace::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_what_containerd_says_is_no_blob() {
        let folder = tempfile::tempdir().unwrap();
        let blob = folder.path().join("blob");
        std::fs::write(&blob, b"12345").unwrap();
        assert_eq!(open(&blob, 5).map(|found| found.size), Some(5));
        assert!(open(&blob, 6).is_none());
        assert!(open(&folder.path().join("gone"), 5).is_none());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        assert!(open(&link, 5).is_none());
        assert!(open(folder.path(), folder.path().metadata().unwrap().len()).is_none());
    }

    #[tokio::test]
    async fn without_a_socket_nothing_is_there_and_it_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let namespaces = vec![Namespace::parse("k8s.io").unwrap()];
        let socket = folder.path().join("none.sock");
        let runtime = Runtime::new(RuntimeOptions { socket, namespaces });
        assert!(runtime.blob(&Digest::of(b"x"), &Leases::default()).await.is_none());
        assert!(runtime.rests());
        let said = runtime.link().said.clone().unwrap();
        assert!(said.contains("No such file"), "{said}");
    }
}
