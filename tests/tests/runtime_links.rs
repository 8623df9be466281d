//! Files that the store and containerd share: images that are given to containerd, and files that are taken
//! over from its snapshots, without a copy.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use carport_image::pull::{PullOptions, PullRequest, Pulled, VerifyOptions};
use carport_image::runtime::{Namespace, Publication, PublishError, Runtime, RuntimeOptions};
use carport_image::{Digest, Puller, Store};
use carport_tests::carport::binary;
use carport_tests::containerd::Containerd;
use carport_tests::models::{reference, sources};
use serde_json::{Value, json};
use tar::{EntryType, Header};
use tempfile::TempDir;

const NAMESPACE: &str = "k8s.io";
const NAME: &str = "models.example/team/m:v1";
const WEIGHTS: usize = 2 << 20;

/// A tar as container tools write them: root's, 0644 and 0755.
struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, path: &str, kind: EntryType, mode: u32, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        self.0.append_data(&mut header, path, content).unwrap();
        self
    }

    fn owned(mut self, path: &str, user: u64) -> Self {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(user);
        header.set_gid(0);
        header.set_size(0);
        self.0.append_data(&mut header, path, std::io::empty()).unwrap();
        self
    }

    fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(path, EntryType::Regular, 0o644, content)
    }

    fn program(self, path: &str) -> Self {
        let content = std::fs::read(format!("/{path}")).unwrap();
        self.entry(path, EntryType::Regular, 0o755, &content)
    }

    fn folder(self, path: &str) -> Self {
        self.entry(path, EntryType::Directory, 0o755, b"")
    }
}

/// Writes an image of these layers as an OCI layout; its reference.
fn layout(folder: &Path, layers: Vec<Layer>) -> String {
    let blobs = folder.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |kind: &str, bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        json!({ "mediaType": kind, "digest": digest, "size": bytes.len() })
    };
    let tars = layers.into_iter().map(|layer| layer.0.into_inner().unwrap());
    let layers: Vec<Value> =
        tars.map(|tar| put("application/vnd.oci.image.layer.v1.tar", &tar)).collect();
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer["digest"].clone()).collect();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({ "architecture": architecture, "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids } });
    let config = put("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let manifest = json!({ "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": layers });
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let mut entry = put(kind, manifest.to_string().as_bytes());
    // The one for carport, the other for `ctr`.
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "v1",
        "io.containerd.image.name": NAME });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    std::fs::write(folder.join("index.json"), index.to_string()).unwrap();
    std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("oci:{}:v1", folder.display())
}

fn weights() -> Vec<u8> {
    let mut bytes = vec![0; WEIGHTS];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// A containerd, and a store beside it.
struct Node {
    folder: TempDir,
    containerd: Containerd,
    runtime: Runtime,
    store: Store,
}

impl Node {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let containerd = Containerd::start(folder.path()).unwrap()?;
        let namespaces = vec![Namespace::parse(NAMESPACE).unwrap()];
        let runtime = Runtime::new(RuntimeOptions { socket: containerd.socket(), namespaces });
        let store = Store::open(folder.path().join("store")).unwrap();
        Some(Self { folder, containerd, runtime, store })
    }

    /// Writes an image of these layers; the reference to it.
    fn image(&self, layers: Vec<Layer>) -> String {
        layout(&tempfile::tempdir_in(self.folder.path()).unwrap().keep(), layers)
    }

    /// Pulls an image of these layers into the store.
    async fn pull(&self, layers: Vec<Layer>) -> Digest {
        self.take(&self.image(layers)).await.digest
    }

    fn puller(&self) -> Puller {
        let sources = sources(&[]).with_runtime(self.runtime.clone());
        Puller::new(self.store.clone(), sources, PullOptions::default())
    }

    async fn take(&self, image: &str) -> Pulled {
        self.puller().start(PullRequest::new(reference(image))).wait().await.unwrap()
    }

    /// Gives an image to containerd, which unpacks it.
    fn import(&self, image: &str) {
        let layout = image.trim_start_matches("oci:").trim_end_matches(":v1");
        let tar = self.folder.path().join("image.tar");
        let mut made = std::process::Command::new("tar");
        made.arg("-cf").arg(&tar).args(["-C", layout, "."]);
        assert!(made.status().unwrap().success());
        self.ctr(&["images", "import", tar.to_str().unwrap()]);
    }

    /// The file that containerd has of an image, or several.
    fn unpacked(&self, name: &str) -> PathBuf {
        let root = self.containerd.content().parent().unwrap().to_owned();
        let found = walkdir::WalkDir::new(root.join("io.containerd.snapshotter.v1.overlayfs"));
        let is_it = |entry: &walkdir::DirEntry| entry.file_name() == name;
        let found = found.into_iter().map(Result::unwrap).find(is_it);
        found.unwrap().path().to_owned()
    }

    /// Waits until nothing of ours is left in containerd: it ends behind the caller's back.
    async fn nothing_left(&self) {
        for _ in 0..200 {
            let views = self.ctr(&["snapshots", "ls"]).matches("View").count();
            if self.remains().1.is_empty() && views == 0 {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        panic!("{:?} {}", self.remains(), self.ctr(&["snapshots", "ls"]));
    }

    async fn publish(&self, image: Digest) -> Result<usize, PublishError> {
        let what = Publication { image, name: reference(NAME), pinned: true };
        let published = self.runtime.publish(&self.store, &what).await?;
        assert!(published.names.contains(&NAME.to_owned()), "{published:?}");
        Ok(published.snapshots)
    }

    async fn refused(&self, image: Digest) -> String {
        match self.publish(image).await {
            Err(PublishError::NotPossible(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    fn ctr(&self, arguments: &[&str]) -> String {
        self.containerd.run(NAMESPACE, arguments).unwrap()
    }

    fn stored(&self, image: &Digest, path: &str) -> PathBuf {
        self.store.rootfs(image).join(path)
    }

    /// What is left of the trial and of leases.
    fn remains(&self) -> (String, String) {
        let namespaces = self.containerd.run(NAMESPACE, &["namespaces", "ls", "-q"]).unwrap();
        (namespaces.trim().to_owned(), self.ctr(&["leases", "ls", "-q"]).trim().to_owned())
    }
}

/// The libraries of `cat`, and `cat`.
fn system() -> Layer {
    let ldd = std::process::Command::new("ldd").arg("/bin/cat").output().unwrap();
    let text = String::from_utf8(ldd.stdout).unwrap();
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    libraries.fold(Layer::new(), |layer, path| layer.program(&path[1..])).program("bin/cat")
}

fn model() -> Vec<Layer> {
    vec![
        system(),
        Layer::new()
            .folder("models/")
            .file("models/weights", &weights())
            .file("models/old", b"old")
            .file("extra/a", b"a"),
        Layer::new()
            .file("models/note", b"a note\n")
            .file("models/.wh.old", b"")
            .file("extra/.wh..wh..opq", b"")
            .file("extra/b", b"b"),
    ]
}

#[tokio::test]
async fn a_container_starts_from_a_stored_image_and_shares_its_inodes() {
    let Some(node) = Node::new() else { return };
    let image = node.pull(model()).await;
    let started = Instant::now();
    assert_eq!(node.publish(image).await.unwrap(), 3);
    eprintln!("published in {:?}", started.elapsed());
    assert_eq!(node.remains(), (NAMESPACE.to_owned(), String::new()));

    let listed = node.ctr(&["images", "ls"]);
    let names: Vec<_> = listed.lines().skip(1).filter_map(|l| l.split(' ').next()).collect();
    let by_digest = format!("models.example/team/m@{image}");
    assert!(names.contains(&NAME) && names.contains(&by_digest.as_str()), "{listed}");
    assert_eq!(listed.matches("io.cri-containerd.image=managed").count(), 3, "{listed}");
    assert_eq!(listed.matches("io.cri-containerd.pinned=pinned").count(), 3, "{listed}");

    // What a container sees is what the image says, on the store's inode.
    let see = |command: &[&str]| {
        let run = ["run", "--rm", "--read-only", NAME, "c1"];
        node.ctr(&[&run[..], command].concat())
    };
    assert_eq!(see(&["/bin/cat", "/models/note", "/extra/b"]), "a note\nb");
    let hidden = ["run", "--rm", "--read-only", NAME, "c2", "/bin/cat", "/models/old", "/extra/a"];
    let hidden = node.containerd.ctr(NAMESPACE, &hidden).output().unwrap();
    let said = String::from_utf8(hidden.stderr).unwrap();
    assert_eq!(said.matches("No such file").count(), 2, "{said}");
    let mounted = node.folder.path().join("mounted");
    std::fs::create_dir(&mounted).unwrap();
    let at = mounted.to_str().unwrap();
    node.ctr(&["images", "mount", NAME, at]);
    let (seen, stored) = (mounted.join("models/weights"), node.stored(&image, "models/weights"));
    assert!(std::fs::read(&seen).unwrap() == weights());
    let (seen, stored) = (seen.metadata().unwrap(), stored.metadata().unwrap());
    node.ctr(&["images", "unmount", "--rm", at]);
    assert_eq!(seen.ino(), stored.ino());
    // The object, the store's tree, containerd's snapshot.
    assert_eq!((stored.nlink(), stored.mode() & 0o7777), (3, 0o444));

    // What is there is not made again; what containerd removes, the store keeps.
    assert_eq!(node.publish(image).await.unwrap(), 0);
    for name in names {
        node.ctr(&["images", "rm", "--sync", name]);
    }
    let stored = node.stored(&image, "models/weights");
    assert_eq!(stored.metadata().unwrap().nlink(), 2);
    assert!(std::fs::read(&stored).unwrap() == weights());
    assert_eq!(node.ctr(&["snapshots", "ls"]).lines().count(), 1);
    assert_eq!(node.publish(image).await.unwrap(), 3);

    // And what the store gives up, it takes back from containerd.
    assert!(node.store.remove(&image).unwrap());
    node.store.collect().unwrap();
    assert_eq!(node.store.usage().unwrap().objects, 0);
    let again = node.take(&node.image(model())).await;
    assert!(again.digest == image && again.written_bytes < 1 << 20, "{again:?}");
    let shared = node.stored(&image, "models/weights").metadata().unwrap();
    assert_eq!(
        (shared.nlink(), shared.ino()),
        (3, node.unpacked("weights").metadata().unwrap().ino())
    );
}

#[tokio::test]
async fn an_image_that_the_store_changes_is_not_published() {
    let Some(node) = Node::new() else { return };
    let model = || Layer::new().file("models/weights", &weights());
    for (layer, why) in [
        (
            model().owned("models/a", 1000),
            "/models/a belongs to 1000:0, which the store does not keep",
        ),
        (
            model().entry("tmp", EntryType::Directory, 0o1777, b""),
            "/tmp has the mode 1777, which the store does not keep",
        ),
        (
            model().file("lib/m.pyc", b"x"),
            "/lib/m.pyc is of use only with its source's time, which the store does not keep",
        ),
    ] {
        let image = node.pull(vec![layer]).await;
        let said = node.refused(image).await;
        assert!(said.ends_with(why), "{said}");
    }
    let unknown = Digest::of(b"unknown");
    assert_eq!(node.refused(unknown).await, format!("image {unknown} is not in the store"));
    let image = node.pull(vec![model()]).await;
    let index = format!("models.example/team/m@{unknown}");
    let what = Publication { image, name: reference(&index), pinned: false };
    let error = node.runtime.publish(&node.store, &what).await.unwrap_err();
    assert!(error.to_string().contains("is an index"), "{error}");
    assert_eq!(node.ctr(&["images", "ls", "-q"]), "");
    assert_eq!(node.ctr(&["snapshots", "ls"]).lines().count(), 1);
}

#[tokio::test]
async fn what_the_node_does_not_allow_is_said_and_tried_again_after_containerd_was_away() {
    let Some(mut node) = Node::new() else { return };
    let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
    let near = node.store.clone();
    node.store = Store::open(elsewhere.path().join("store")).unwrap();
    let image = node.pull(vec![Layer::new().file("models/weights", &weights())]).await;
    let said = node.refused(image).await;
    assert!(said.contains("on another file system than the store"), "{said}");
    node.store = near;
    node.pull(vec![Layer::new().file("models/weights", &weights())]).await;
    node.containerd.kill().unwrap();
    let error = node.publish(image).await.unwrap_err();
    assert!(matches!(error, PublishError::Away(_)), "{error:?}");
    node.containerd.restart().unwrap();
    let mut published = node.publish(image).await;
    for _ in 0..50 {
        if published.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        published = node.publish(image).await;
    }
    assert_eq!(published.unwrap(), 1);
    // A name that meant something else means this image now.
    let other = node.pull(vec![Layer::new().file("models/other", &weights())]).await;
    assert_eq!(node.publish(other).await.unwrap(), 1);
    let listed = node.ctr(&["images", "ls", &format!("name=={NAME}")]);
    assert!(listed.contains(&other.to_string()), "{listed}");
}

/// A folder mounted once more; unmounted when dropped.
struct Bound(PathBuf);

impl Bound {
    fn new(from: &Path, to: PathBuf) -> Self {
        std::fs::create_dir(&to).unwrap();
        let made = std::process::Command::new("mount").arg("--bind").args([from, &to]).status();
        assert!(made.unwrap().success());
        Self(to)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[tokio::test]
async fn over_two_mounts_of_one_file_system_files_are_copied() {
    let Some(mut node) = Node::new() else { return };
    let image = node.image(model());
    node.import(&image);
    let bound = Bound::new(node.store.root(), node.folder.path().join("bound"));
    node.store = Store::open(&bound.0).unwrap();
    let pulled = node.take(&image).await;
    let (ours, theirs) = (node.stored(&pulled.digest, "models/weights"), node.unpacked("weights"));
    assert!(std::fs::read(&ours).unwrap() == weights());
    assert_ne!(ours.metadata().unwrap().ino(), theirs.metadata().unwrap().ino());
    let error = node.runtime.shares_files_with(&node.store).await.unwrap_err();
    assert!(
        matches!(&error, PublishError::NotPossible(why) if why.contains("cross-device")),
        "{error}"
    );
    node.nothing_left().await;
    assert_eq!(node.remains().0, NAMESPACE);
}

/// As in the default install, where containerd's folder is mounted read-only: nothing is broken.
#[tokio::test]
async fn doctor_takes_a_read_only_mount_of_containerds_folder_for_what_it_is() {
    let Some(node) = Node::new() else { return };
    let image = node.image(model());
    node.import(&image);
    let config = node.folder.path().join("config.yaml");
    let text = format!(
        "root: {}\ncsi: {{enabled: false}}\ngpu: {{enabled: false}}\n\
         http: {{listen: '127.0.0.1:0'}}\nruntime: {{containerd: {{socket: {}}}}}\n",
        node.store.root().display(),
        node.containerd.socket().display(),
    );
    std::fs::write(&config, text).unwrap();
    let root = node.containerd.content().parent().unwrap().display().to_string();
    let doctor = |mount: &str| {
        let script = format!("set -eu\n{mount}\nexec \"$@\"");
        let mut command = std::process::Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).arg(binary());
        command.arg("--config").arg(&config).args(["doctor", "-o", "json"]);
        let output = command.output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut checks = report["checks"].as_array().unwrap().iter();
        let check = checks.find(|check| check["name"] == "containerd").unwrap();
        let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
        (text("level"), text("message"))
    };
    let (level, message) = doctor("");
    assert!(level == "ok" && message.contains("shares its files"), "{level}: {message}");
    let (level, message) =
        doctor(&format!("mount --bind {root} {root}\nmount -o remount,bind,ro {root}"));
    assert!(level == "ok" && message.contains("mounted read-only here"), "{level}: {message}");
    let (level, message) = doctor(&format!("mount --bind {root} {root}"));
    assert!(level == "warn" && message.contains("cross-device"), "{level}: {message}");
}

#[tokio::test]
async fn files_of_containerds_snapshots_become_objects_without_a_copy() {
    let Some(node) = Node::new() else { return };
    let image = node.image(model());
    node.import(&image);
    let theirs = node.unpacked("weights");
    let before = theirs.metadata().unwrap();
    let pulled = node.take(&image).await;
    let ours = node.stored(&pulled.digest, "models/weights").metadata().unwrap();
    assert_eq!(ours.ino(), before.ino());
    assert_eq!((ours.mode() & 0o7777, ours.mtime()), (0o644, before.mtime()));
    assert!(std::fs::read(node.stored(&pulled.digest, "models/weights")).unwrap() == weights());
    // What is small is written, and of a system's libraries one is large.
    assert!(pulled.written_bytes < 1 << 20, "{}", pulled.written_bytes);
    node.nothing_left().await;

    // An adopted file is sound as it is, and published as it is.
    let verify = async |repair: bool| {
        let options = VerifyOptions { repair, ..VerifyOptions::default() };
        node.puller().verify(options, std::sync::Arc::default()).await.unwrap()
    };
    assert_eq!(verify(false).await.damage, []);
    // Its mode is not ours to set: another file takes its place.
    std::fs::set_permissions(&theirs, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(verify(true).await.damage.len(), 1);
    assert_eq!(verify(false).await.damage, []);
    assert_eq!(theirs.metadata().unwrap().mode() & 0o7777, 0o600);
    let repaired = node.stored(&pulled.digest, "models/weights").metadata().unwrap();
    assert_eq!(repaired.mode() & 0o7777, 0o444);
    assert_ne!(repaired.ino(), before.ino());
}

#[tokio::test]
async fn what_only_containerd_still_has_is_collected_and_frees_nothing() {
    let Some(node) = Node::new() else { return };
    let image = node.image(model());
    node.import(&image);
    let pulled = node.take(&image).await;
    assert!(node.store.remove(&pulled.digest).unwrap());
    let collected = node.store.collect().unwrap();
    assert!(collected.objects > 3 && collected.bytes < 1 << 20, "{collected:?}");
    let usage = node.store.usage().unwrap();
    assert_eq!((usage.objects, usage.object_bytes), (0, 0));
    let theirs = node.unpacked("weights");
    assert!(
        theirs.metadata().unwrap().nlink() == 1 && std::fs::read(&theirs).unwrap() == weights()
    );
    // An image that is there keeps what it shares; two small files are hidden in it.
    let again = node.take(&image).await;
    assert_eq!(node.store.collect().unwrap().objects, 2);
    assert_eq!(theirs.metadata().unwrap().nlink(), 3);
    assert!(again.written_bytes < 1 << 20);
}

#[tokio::test]
async fn a_file_that_was_changed_in_containerd_is_not_taken() {
    let Some(node) = Node::new() else { return };
    let image = node.image(model());
    node.import(&image);
    let theirs = node.unpacked("weights");
    let mut changed = weights();
    changed[WEIGHTS / 2] ^= 1;
    std::fs::write(&theirs, &changed).unwrap();
    let pulled = node.take(&image).await;
    let ours = node.stored(&pulled.digest, "models/weights");
    assert!(std::fs::read(&ours).unwrap() == weights());
    assert_ne!(ours.metadata().unwrap().ino(), theirs.metadata().unwrap().ino());
    assert!(std::fs::read(&theirs).unwrap() == changed);
    node.nothing_left().await;
}
