//! containerd's snapshots: where the files of one are.
//!
//! ```text
//! introspection ─► overlayfs' folder;  Prepare or View ─► mounts ─► the folder of its own layer
//! ```
//!
//! Both are asked for, never guessed, and must agree: a folder that is not below overlayfs' own is not
//! touched.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    PrepareSnapshotRequest, RemoveSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{DeleteRequest, PluginsRequest};
use containerd_client::types::Mount;
use sha2::{Digest as _, Sha256};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;

use super::{Failed, Lease, Namespace, Runtime, ask, told, within};
use crate::digest::Digest;

/// The snapshotter whose snapshots are folders of files.
pub(super) const SNAPSHOTTER: &str = "overlayfs";

/// How long containerd may take for what it writes down: each is synced, on a disk that may be busy.
const PATIENCE: Duration = Duration::from_secs(10);

/// The name of what a layer and all below it unpack to, of their diff_ids, lowest first.
/// <https://github.com/opencontainers/image-spec/blob/main/config.md#layer-chainid>
pub(crate) fn chain_ids(diff_ids: impl IntoIterator<Item = Digest>) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::new();
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id,
            Some(below) => Digest::from_sha256(Sha256::digest(format!("{below} {diff_id}")).into()),
        };
        chain.push(next);
    }
    chain
}

/// Calls in one namespace under one lease: what they make stays until it ends.
pub(super) struct Session {
    pub(super) runtime: Runtime,
    pub(super) namespace: Namespace,
    /// overlayfs' folder.
    pub(super) root: PathBuf,
    lease: Lease,
    header: MetadataValue<Ascii>,
}

impl Runtime {
    /// overlayfs' folder, as containerd says, where it is to be seen from here.
    pub(super) async fn snapshots_root(&self) -> Result<Result<PathBuf, String>, Failed> {
        let filters = vec!["type==io.containerd.snapshotter.v1".to_owned()];
        let mut client = IntrospectionClient::new(self.channel());
        let plugins = ask(client.plugins(PluginsRequest { filters })).await?.plugins;
        let overlayfs = plugins.iter().find(|plugin| plugin.id == SNAPSHOTTER);
        let Some(overlayfs) = overlayfs.filter(|plugin| plugin.init_err.is_none()) else {
            return Ok(Err("containerd has no working overlayfs snapshotter".to_owned()));
        };
        let root = overlayfs.exports.get("root").map(PathBuf::from);
        let Some(root) = root.filter(|root| root.is_absolute()) else {
            return Ok(Err("containerd does not say where its snapshots are".to_owned()));
        };
        let seen = root.clone();
        if !tokio::task::spawn_blocking(move || seen.is_dir()).await.unwrap_or_default() {
            return Ok(Err(format!(
                "containerd's snapshots in {} are not to be seen from here: mount their folder at the \
                 same path",
                root.display()
            )));
        }
        Ok(Ok(root))
    }

    pub(super) async fn session(
        &self,
        namespace: &Namespace,
        root: PathBuf,
    ) -> Result<Session, Failed> {
        let lease = Lease::new(self, namespace).await?;
        let header = lease.id.parse();
        let header = header.map_err(|_| Failed::Away("a lease has no name".to_owned()))?;
        let (runtime, namespace) = (self.clone(), namespace.clone());
        Ok(Session { runtime, namespace, root, lease, header })
    }
}

impl Session {
    /// Ends the lease. What it alone held goes soon.
    pub(super) async fn end(mut self) -> Result<(), tonic::Status> {
        let request =
            within(&self.namespace, DeleteRequest { id: self.lease.id.clone(), sync: false });
        patient(LeasesClient::new(self.channel()).delete(request)).await?;
        self.lease.id.clear();
        Ok(())
    }

    pub(super) fn channel(&self) -> Channel {
        self.runtime.channel()
    }

    pub(super) fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel())
    }

    pub(super) fn of<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = within(&self.namespace, message);
        request.metadata_mut().insert("containerd-lease", self.header.clone());
        request
    }

    /// A name that nobody else gives to a snapshot.
    pub(super) fn key(&self, what: impl std::fmt::Display) -> String {
        format!("{}-{what}", self.lease.id)
    }

    /// A new snapshot, and the empty folder for its files.
    pub(super) async fn prepare(
        &self,
        key: &str,
        parent: Option<&Digest>,
    ) -> Result<PathBuf, tonic::Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: key.to_owned(),
            parent: parent.map(Digest::to_string).unwrap_or_default(),
            ..Default::default()
        };
        let answer = patient(self.snapshots().prepare(self.of(request))).await?;
        self.own_folder(&answer.mounts)
    }

    /// The folder of a committed snapshot's own files, which nobody changes. `key` is the view's, which
    /// has to be removed.
    pub(super) async fn view(&self, key: &str, of: &str) -> Result<PathBuf, tonic::Status> {
        let request = ViewSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: key.to_owned(),
            parent: of.to_owned(),
            ..Default::default()
        };
        let answer = patient(self.snapshots().view(self.of(request))).await?;
        self.own_folder(&answer.mounts)
    }

    /// Removes a snapshot, where it is.
    pub(super) async fn remove(&self, key: &str) -> Result<(), tonic::Status> {
        let (snapshotter, key) = (SNAPSHOTTER.to_owned(), key.to_owned());
        let request = self.of(RemoveSnapshotRequest { snapshotter, key });
        match patient(self.snapshots().remove(request)).await {
            Err(status) if status.code() != tonic::Code::NotFound => Err(status),
            _ => Ok(()),
        }
    }

    fn own_folder(&self, mounts: &[Mount]) -> Result<PathBuf, tonic::Status> {
        own_folder(mounts, &self.root).ok_or_else(|| {
            tonic::Status::internal(format!(
                "it shows a snapshot by mounts of another kind: {mounts:?}"
            ))
        })
    }
}

/// Where a snapshot's own files are: alone it is bound, over others it is overlayfs' upper folder, or the
/// topmost of the lower ones where nothing is to be written.
fn own_folder(mounts: &[Mount], root: &Path) -> Option<PathBuf> {
    let [mount] = mounts else { return None };
    let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let folder = match mount.r#type.as_str() {
        "bind" => &mount.source,
        "overlay" => match option("upperdir=") {
            Some(upper) => upper,
            None => option("lowerdir=")?.split(':').next()?,
        },
        _ => return None,
    };
    let folder = PathBuf::from(folder);
    let inside = folder.strip_prefix(root).ok()?;
    let is_plain = inside.components().all(|part| matches!(part, std::path::Component::Normal(_)));
    (is_plain && inside.components().count() > 1).then_some(folder)
}

/// An answer, within the time that writing it down may take.
pub(super) async fn patient<T>(
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, tonic::Status> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(tonic::Status::deadline_exceeded(format!(
            "no answer within {} s",
            PATIENCE.as_secs()
        ))),
    }
}

impl From<tonic::Status> for Failed {
    fn from(status: tonic::Status) -> Self {
        match status.code() {
            tonic::Code::NotFound => Self::NotFound,
            _ => Self::Away(told(&status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_the_specifications() {
        let a: Digest = Digest::of(b"a");
        let b: Digest = Digest::of(b"b");
        let ab = Digest::of(format!("{a} {b}").as_bytes());
        let abb = Digest::of(format!("{ab} {b}").as_bytes());
        assert_eq!(chain_ids([a, b, b]), [a, ab, abb]);
    }

    #[test]
    fn a_folder_is_taken_only_from_below_overlayfs_own() {
        let root = Path::new("/r/overlayfs");
        let of = |kind: &str, source: &str, options: &[&str]| {
            let options = options.iter().map(ToString::to_string).collect();
            let (r#type, source) = (kind.to_owned(), source.to_owned());
            own_folder(&[Mount { r#type, source, target: String::new(), options }], root)
        };
        let found = |path: &str| Some(PathBuf::from(path));
        let (fs, below) = ("/r/overlayfs/snapshots/7/fs", "/r/overlayfs/snapshots/1/fs");
        assert_eq!(of("bind", fs, &["ro", "rbind"]), found(fs));
        let lower = format!("lowerdir={fs}:{below}");
        assert_eq!(of("overlay", "overlay", &["index=off", &lower]), found(fs));
        let (upper, lower) = (format!("upperdir={fs}"), format!("lowerdir={below}"));
        assert_eq!(of("overlay", "overlay", &["workdir=/r/w", &upper, &lower]), found(fs));
        assert_eq!(of("bind", "/etc/x", &[]), None);
        assert_eq!(of("bind", "/r/overlayfs", &[]), None);
        assert_eq!(of("bind", "/r/overlayfs/snapshots/../../x/y", &[]), None);
        assert_eq!(of("fuse3.fuse-overlayfs", fs, &[]), None);
        assert_eq!(own_folder(&[], root), None);
    }
}
