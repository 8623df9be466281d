//! Pulls on a node whose containerd has the image, or a part of it.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use carport_image::pull::{
    AccessCheck, PullOptions, PullPolicy, PullRequest, Pulled, RegistryAway,
};
use carport_image::runtime::{Inventory, Namespace, Runtime, RuntimeOptions};
use carport_image::source::{Audience, ManifestName, PullSecret, Source, SourceError};
use carport_image::{Digest, PullError, Puller, Store};
use carport_proto::carport::v1 as api;
use carport_tests::carport::binary;
use carport_tests::containerd::Containerd;
use carport_tests::models::{Model, reference, secret, sources};
use carport_tests::node::{self, Setup, eventually};
use carport_tests::registry::{PASSWORD, Registry, USERNAME};
use carport_tests::sources::{Known, conforms};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const NAMESPACE: &str = "k8s.io";
const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

/// A registry with a model, a containerd, and a store.
struct Node {
    folder: TempDir,
    registry: Registry,
    containerd: Containerd,
    model: Model,
    runtime: Runtime,
    image: String,
    digest: Digest,
}

impl Node {
    /// Packs a model and has containerd pull it into `namespace`.
    async fn with(namespace: &str, registry: Option<Registry>) -> Option<Self> {
        let registry = registry?;
        let folder = tempfile::tempdir().unwrap();
        let containerd = Containerd::start(folder.path()).unwrap()?;
        let (model, host) = (Model::new(), registry.host());
        let image = format!("{host}/team/m:v1");
        let login = secret(host, USERNAME, PASSWORD);
        let packed = model.pack(&image, &login, &sources(&[host])).await.unwrap();
        let user = format!("{USERNAME}:{PASSWORD}");
        let pull = ["images", "pull", "--plain-http", "--user", &user, &image];
        containerd.run(namespace, &pull).unwrap();
        let runtime = runtime(&containerd.socket());
        Some(Self { folder, registry, containerd, model, runtime, image, digest: packed.digest })
    }

    async fn new() -> Option<Self> {
        Self::with(NAMESPACE, Registry::start()).await
    }

    fn by_digest(&self) -> String {
        format!("{}/team/m@{}", self.registry.host(), self.digest)
    }

    fn puller(&self, store: &str) -> Puller {
        let sources = sources(&[self.registry.host()]).with_runtime(self.runtime.clone());
        let store = Store::open(self.folder.path().join(store)).unwrap();
        Puller::new(store, sources, PullOptions { attempts: 1, ..PullOptions::default() })
    }

    async fn pull(&self, image: &str) -> Result<Pulled, PullError> {
        self.puller("store").start(PullRequest::new(reference(image))).wait().await
    }

    fn source(&self, image: &str) -> Arc<dyn Source> {
        let sources = sources(&[self.registry.host()]).with_runtime(self.runtime.clone());
        sources.open(&reference(image), &PullSecret::none()).unwrap()
    }

    /// The manifest, as the registry has it.
    fn manifest(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stored(&self.digest.to_string())).unwrap()
    }

    /// `(digest, size)` of the layers.
    fn layers(&self) -> Vec<(String, u64)> {
        let manifest = self.manifest();
        let layer = |layer: &serde_json::Value| {
            (layer["digest"].as_str().unwrap().to_owned(), layer["size"].as_u64().unwrap())
        };
        manifest["layers"].as_array().unwrap().iter().map(layer).collect()
    }

    fn stored_path(&self, digest: &str) -> std::path::PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        let blobs = self.registry.storage().join("docker/registry/v2/blobs/sha256");
        blobs.join(&hex[..2]).join(hex).join("data")
    }

    fn stored(&self, digest: &str) -> Vec<u8> {
        std::fs::read(self.stored_path(digest)).unwrap()
    }

    /// Takes all layers and the config out of the registry.
    fn empty_registry(&self) {
        let config = self.manifest()["config"]["digest"].as_str().unwrap().to_owned();
        for digest in self.layers().into_iter().map(|(digest, _)| digest).chain([config]) {
            std::fs::remove_file(self.stored_path(&digest)).unwrap();
        }
    }

    fn unpacked(&self, pulled: &Pulled) {
        let rootfs = self.folder.path().join("store/trees").join(pulled.digest.hex());
        for name in ["config.json", "tokenizer/vocab.json", "model.safetensors"] {
            let there = std::fs::read(rootfs.join("rootfs/models").join(name)).unwrap();
            assert!(there == std::fs::read(self.model.path().join(name)).unwrap(), "{name}");
        }
    }

    /// Takes the unpacked files away from containerd, the topmost layer first.
    fn remove_snapshots(&self) {
        let list = || self.containerd.run(NAMESPACE, &["snapshots", "ls"]).unwrap();
        for _ in 0..=list().lines().count() {
            for line in list().lines().skip(1) {
                let key = line.split(' ').next().unwrap();
                let _ = self.containerd.run(NAMESPACE, &["snapshots", "rm", key]);
            }
        }
        assert_eq!(list().lines().count(), 1, "{}", list());
    }

    fn leases(&self) -> Vec<String> {
        let list = self.containerd.run(NAMESPACE, &["leases", "ls", "-q"]).unwrap();
        list.lines().filter(|line| line.starts_with("carport-")).map(str::to_owned).collect()
    }

    /// Waits until no lease of ours is left: they are ended behind the caller's back.
    async fn no_leases(&self) {
        for _ in 0..100 {
            if self.leases().is_empty() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("leases stay: {:?}", self.leases());
    }
}

fn runtime(socket: &Path) -> Runtime {
    let namespaces = vec![Namespace::parse(NAMESPACE).unwrap()];
    Runtime::new(RuntimeOptions { socket: socket.to_owned(), namespaces })
}

#[tokio::test]
async fn what_containerd_has_is_not_fetched() {
    let Some(node) = Node::new().await else { return };
    node.empty_registry();
    let pulled = node.pull(&node.image).await.unwrap();
    node.unpacked(&pulled);
    assert_eq!((pulled.digest, pulled.fetched_bytes), (node.digest, 0));
    // The weights are taken over as they are.
    assert!(!pulled.already_present && pulled.written_bytes < 1 << 20);
    let all: u64 = node.layers().iter().map(|(_, size)| size).sum();
    let used = node.runtime.used();
    // Some headers are read twice: once to see whether the files are here.
    assert!(used.bytes >= all && used.bytes < all + all / 2, "{used:?} of {all}");
    node.no_leases().await;
    // Of what is not unpacked the blobs are read.
    node.remove_snapshots();
    let other = node.puller("other").start(PullRequest::new(reference(&node.image)));
    let other = other.wait().await.unwrap();
    assert!(other.fetched_bytes == 0 && other.written_bytes > 3 << 20);
    let read = node.runtime.used().bytes - used.bytes;
    assert!(read >= all && read < all + all / 2, "{read} of {all}");
}

#[tokio::test]
async fn an_image_by_digest_needs_no_registry() {
    let Some(mut node) = Node::new().await else { return };
    let image = node.by_digest();
    let tag = node.image.clone();
    node.registry = Registry::start().unwrap();
    let pulled = node.pull(&image).await.unwrap();
    node.unpacked(&pulled);
    // What a tag means is the registry's to say, whatever containerd calls its image.
    let request = PullRequest { policy: PullPolicy::Always, ..PullRequest::new(reference(&tag)) };
    let error = node.puller("store").start(request).wait().await.unwrap_err();
    assert!(matches!(error, PullError::Source(_)), "{error:?}");
}

#[tokio::test]
async fn what_containerd_has_discarded_is_fetched_and_the_rest_is_not() {
    let Some(node) = Node::new().await else { return };
    let (gone, size) = node.layers().pop().unwrap();
    node.containerd.run(NAMESPACE, &["content", "rm", &gone]).unwrap();
    // As long as it is unpacked, its headers are fetched.
    let pulled = node.pull(&node.image).await.unwrap();
    node.unpacked(&pulled);
    assert!(pulled.fetched_bytes < 32 << 10, "{}", pulled.fetched_bytes);
    node.remove_snapshots();
    let other = node.puller("other").start(PullRequest::new(reference(&node.image)));
    assert_eq!(other.wait().await.unwrap().fetched_bytes, size);
}

#[tokio::test]
async fn another_namespace_is_not_looked_into() {
    let Some(node) = Node::with("elsewhere", Registry::start()).await else { return };
    let all: u64 = node.layers().iter().map(|(_, size)| size).sum();
    let pulled = node.pull(&node.image).await.unwrap();
    assert_eq!((pulled.fetched_bytes, node.runtime.used().blobs), (all, 0));
}

#[tokio::test]
async fn a_damaged_blob_in_containerd_is_fetched_from_the_registry() {
    let Some(node) = Node::new().await else { return };
    for (digest, size) in node.layers() {
        // Replaced, not written to: a blob's file is nobody's to change.
        let (path, new) = (node.containerd.blob(&digest), node.folder.path().join("damaged"));
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = usize::try_from(size / 2).unwrap();
        bytes[middle] ^= 1;
        std::fs::write(&new, bytes).unwrap();
        std::fs::rename(&new, &path).unwrap();
    }
    let pulled = node.pull(&node.image).await.unwrap();
    node.unpacked(&pulled);
    // And a manifest is checked before it is believed.
    let manifest = node.containerd.blob(&node.digest.to_string());
    let padded = vec![b' '; std::fs::read(&manifest).unwrap().len()];
    std::fs::write(node.folder.path().join("m"), padded).unwrap();
    std::fs::rename(node.folder.path().join("m"), &manifest).unwrap();
    let raw = node.source(&node.by_digest());
    let raw = raw.manifest(&ManifestName::Digest(node.digest)).await.unwrap();
    assert_eq!(raw.digest(), node.digest);
}

#[tokio::test]
async fn a_containerd_that_hangs_costs_a_pull_a_second_once() {
    let Some(node) = Node::new().await else { return };
    node.containerd.hang(true).unwrap();
    let all: u64 = node.layers().iter().map(|(_, size)| size).sum();
    let started = Instant::now();
    let pulled = node.pull(&node.image).await.unwrap();
    let took = started.elapsed();
    assert_eq!(pulled.fetched_bytes, all);
    assert!(took < Duration::from_secs(4), "{took:?}");
    // Left alone now: the next pull does not feel it at all.
    let started = Instant::now();
    let again = node.puller("other").start(PullRequest::new(reference(&node.image)));
    again.wait().await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    node.containerd.hang(false).unwrap();
}

#[tokio::test]
async fn a_containerd_that_restarts_is_found_again() {
    let Some(mut node) = Node::new().await else { return };
    let source = node.source(&node.image);
    let (layer, size) = node.layers().pop().unwrap();
    let digest: Digest = layer.parse().unwrap();
    assert!(source.blob(&digest, size, 0..1).await.unwrap().is_here);
    node.containerd.kill().unwrap();
    node.containerd.restart().unwrap();
    let pulled = node.pull(&node.image).await.unwrap();
    assert_eq!(pulled.fetched_bytes, 0);
}

#[tokio::test]
async fn what_is_being_read_stays_when_the_image_is_removed() {
    let Some(node) = Node::new().await else { return };
    let source = node.source(&node.image);
    let (layer, size) = node.layers().pop().unwrap();
    let digest: Digest = layer.parse().unwrap();
    drop(source.blob(&digest, size, 0..1).await.unwrap());
    assert_eq!(node.leases().len(), 1);
    node.containerd.run(NAMESPACE, &["images", "rm", "--sync", &node.image]).unwrap();
    assert!(node.containerd.blob(&layer).exists(), "the lease holds it");
    let others = node.layers();
    assert!(!node.containerd.blob(&others[0].0).exists(), "and nothing else");
    drop(source);
    node.no_leases().await;
}

#[tokio::test]
async fn an_image_in_containerd_is_given_to_nobody_whom_the_registry_refuses() {
    let registry = Registry::start_with_login();
    let Some(node) = Node::with(NAMESPACE, registry).await else { return };
    let check =
        AccessCheck { remember_for: Duration::ZERO, registry_away: RegistryAway::AllowKnown };
    let request = |secret: PullSecret| PullRequest {
        access: Some(check),
        secret,
        ..PullRequest::new(reference(&node.by_digest()))
    };
    let refused = node.puller("store").start(request(PullSecret::none())).wait().await;
    let error = refused.unwrap_err();
    assert!(matches!(error, PullError::Source(SourceError::Denied(_))), "{error:?}");
    let login = secret(node.registry.host(), USERNAME, PASSWORD);
    let pulled = node.puller("store").start(request(login)).wait().await.unwrap();
    node.unpacked(&pulled);
    assert_eq!(pulled.fetched_bytes, 0);
}

#[tokio::test]
async fn containerd_before_a_registry_conforms() {
    let Some(node) = Node::new().await else { return };
    let (layer, _) = node.layers().into_iter().max_by_key(|(_, size)| *size).unwrap();
    let known = Known {
        tag: "v1".into(),
        manifest: node.digest,
        media_type: OCI.into(),
        blob: layer.parse().unwrap(),
        content: Bytes::from(node.stored(&layer)),
    };
    let source = node.source(&node.image);
    conforms(source.as_ref(), &known).await;
    assert!(node.runtime.used().bytes > known.content.len() as u64);
    assert_eq!(source.audience(), Audience::Nobody);
}

/// Follows `runtime` until the end of the test.
fn follow(runtime: &Runtime) -> (watch::Receiver<Arc<Inventory>>, JoinHandle<()>) {
    let (sender, seen) = watch::channel(Arc::default());
    let runtime = runtime.clone();
    (seen, tokio::spawn(async move { runtime.follow(&sender).await }))
}

/// Waits for an inventory that is as `wanted`.
async fn seen(
    inventory: &mut watch::Receiver<Arc<Inventory>>,
    what: &str,
    wanted: impl Fn(&Inventory) -> bool,
) -> (Arc<Inventory>, Duration) {
    let started = Instant::now();
    let found = inventory.wait_for(|inventory| wanted(inventory));
    let found = tokio::time::timeout(Duration::from_secs(8), found).await;
    let found = found.unwrap_or_else(|_| panic!("{what} is not seen")).unwrap();
    (found.clone(), started.elapsed())
}

#[tokio::test]
async fn images_in_containerd_are_known_as_they_come_and_go() {
    let Some(mut node) = Node::new().await else { return };
    let (mut inventory, _task) = follow(&node.runtime);
    let (first, _) = seen(&mut inventory, "a list", |now| now.connected).await;
    let all: u64 = node.layers().iter().map(|(_, size)| size).sum();
    let image = first.find(None, Some(&reference(&node.image))).unwrap();
    assert_eq!((image.digest, image.bytes, image.unpacked), (node.digest, all, true));
    assert_eq!(image.references, [node.image.clone()]);
    let layers: Vec<_> = image.layers.iter().map(|l| (l.digest.to_string(), l.bytes)).collect();
    assert_eq!(layers, node.layers());
    assert!(first.find(Some(Digest::of(b"another")), None).is_none());

    // Another name is seen at once, and so is that it goes.
    let other = format!("{}/team/other:v2", node.registry.host());
    node.containerd.run(NAMESPACE, &["images", "tag", &node.image, &other]).unwrap();
    let named = |name: &str| {
        let name = reference(name);
        move |now: &Inventory| now.find(None, Some(&name)).is_some()
    };
    let (_, took) = seen(&mut inventory, "a name", named(&other)).await;
    assert!(took < Duration::from_secs(1), "{took:?}");
    node.containerd.run(NAMESPACE, &["images", "rm", &other]).unwrap();
    let gone = named(&other);
    let (now, _) = seen(&mut inventory, "its end", |now| !gone(now)).await;
    assert_eq!(now.images.len(), 1);

    // A restart is seen, and what is there afterwards is listed anew.
    node.containerd.kill().unwrap();
    let (away, _) = seen(&mut inventory, "its absence", |now| !now.connected).await;
    assert_eq!((away.images.len(), away.listed_at), (1, now.listed_at), "with its age");
    node.containerd.restart().unwrap();
    node.containerd.run(NAMESPACE, &["images", "rm", "--sync", &node.image]).unwrap();
    let (back, _) =
        seen(&mut inventory, "its return", |now| now.connected && now.images.is_empty()).await;
    assert!(back.listed_at > away.listed_at);
}

#[tokio::test]
async fn a_containerd_that_hangs_is_soon_no_authority_any_more() {
    let Some(node) = Node::new().await else { return };
    let (mut inventory, _task) = follow(&node.runtime);
    let (now, _) = seen(&mut inventory, "a list", |now| now.connected).await;
    // No connection ends, and no event comes.
    node.containerd.hang(true).unwrap();
    let gone = inventory.wait_for(|now| !now.connected);
    let gone = tokio::time::timeout(Duration::from_secs(20), gone).await;
    node.containerd.hang(false).unwrap();
    let gone = gone.expect("within some seconds").unwrap().clone();
    assert_eq!(gone.images.len(), now.images.len(), "with its age");
    let back = inventory.wait_for(|later| later.connected && later.listed_at > now.listed_at);
    tokio::time::timeout(Duration::from_secs(20), back).await.expect("it is found again").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_read_as_files_is_read_through_the_api() {
    let Some(here) = Node::new().await else { return };
    let config = format!(
        "runtime: {{containerd: {{enabled: true, socket: {}, namespaces: [k8s.io]}}}}\n",
        here.containerd.socket().display()
    );
    // As where the folder is not mounted into the agent's container.
    let prepare = format!("mount -t tmpfs none {}", here.containerd.content().display());
    let setup = Setup {
        config: Some(config),
        prepare: Some(prepare),
        ..Setup::plain_http(&[here.registry.host()])
    };
    let Some(agent) = node::Node::set_up(binary(), setup) else { return };
    let image = here.image.clone();
    let is_ready = async || located(&agent, &image).await.1.state() == api::ModelState::Ready;
    eventually("the image in containerd is known", is_ready).await;
    here.empty_registry();
    let pod = agent.pod("a");
    agent.publish(&pod, &image).await.unwrap();
    let weights = agent.inside(&pod.target).join("models/model.safetensors");
    let expected = std::fs::read(here.model.path().join("model.safetensors")).unwrap();
    assert!(std::fs::read(weights).unwrap() == expected);
    let counted = async || agent.metric("carport_runtime_bytes_total").await > 3e6;
    eventually("what was read there is counted", counted).await;
    let said = "containerd's content store is not to be seen from here";
    assert_eq!(agent.log().matches(said).count(), 1, "{}", agent.log());
    agent.unpublish(&pod).await.unwrap();
    here.no_leases().await;
}

#[tokio::test]
async fn an_image_without_its_layers_is_complete_only_where_it_is_unpacked() {
    let Some(node) = Node::new().await else { return };
    let (mut inventory, _task) = follow(&node.runtime);
    let (gone, _) = node.layers().pop().unwrap();
    node.containerd.run(NAMESPACE, &["content", "rm", &gone]).unwrap();
    let discarded = |now: &Inventory| {
        now.images.values().any(|image| image.layers.iter().any(|layer| !layer.present))
    };
    let (now, _) = seen(&mut inventory, "the discarded layer", discarded).await;
    assert!(now.find(Some(node.digest), None).is_some(), "its snapshots are there");
    // The same blobs in a namespace where nothing was unpacked.
    let fetched = Node::with("elsewhere", Registry::start()).await.unwrap();
    let fetch = ["content", "fetch", "--plain-http", &fetched.image];
    fetched.containerd.run(NAMESPACE, &fetch).unwrap();
    let (mut inventory, _task) = follow(&fetched.runtime);
    let (now, _) = seen(&mut inventory, "the image", |now| !now.images.is_empty()).await;
    let image = now.find(Some(fetched.digest), None).unwrap();
    assert!(!image.unpacked && image.is_complete());
    fetched.containerd.run(NAMESPACE, &["content", "rm", &fetched.layers()[0].0]).unwrap();
    let incomplete = |now: &Inventory| now.find(Some(fetched.digest), None).is_none();
    seen(&mut inventory, "that it is incomplete", incomplete).await;
}

/// An OCI layout of `images` images with `layers` layers each, every blob another.
fn many(folder: &Path, images: usize, layers: usize) -> std::path::PathBuf {
    let blobs = folder.join("many/blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = Digest::of(bytes);
        std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        (digest.to_string(), bytes.len())
    };
    let mut manifests = Vec::new();
    for image in 0..images {
        let describe = |kind: &str, (digest, size): (String, usize)| serde_json::json!({ "mediaType": kind, "digest": digest, "size": size });
        let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "n": image,
            "rootfs": { "type": "layers", "diff_ids": [] } });
        let config = put(config.to_string().as_bytes());
        let layer = |layer| put(format!("layer {layer} of {image}").as_bytes());
        let tar = "application/vnd.oci.image.layer.v1.tar";
        let layers: Vec<_> = (0..layers).map(|n| describe(tar, layer(n))).collect();
        let config = describe("application/vnd.oci.image.config.v1+json", config);
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI,
            "config": config, "layers": layers });
        let mut entry = describe(OCI, put(manifest.to_string().as_bytes()));
        let name = format!("models.example/team/m{image}:v1");
        entry["annotations"] = serde_json::json!({ "io.containerd.image.name": name });
        manifests.push(entry);
    }
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": manifests });
    std::fs::write(folder.join("many/index.json"), index.to_string()).unwrap();
    let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
    std::fs::write(folder.join("many/oci-layout"), version).unwrap();
    let tar = folder.join("many.tar");
    let made = std::process::Command::new("tar")
        .arg("-cf")
        .arg(&tar)
        .arg("-C")
        .arg(folder.join("many"))
        .arg(".")
        .status();
    assert!(made.unwrap().success());
    tar
}

#[tokio::test]
async fn five_hundred_images_are_listed_within_two_seconds_and_a_burst_within_one() {
    // In memory: five thousand blobs, each synced, would take minutes to bring in.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let Some(containerd) = Containerd::start(folder.path()).unwrap() else { return };
    let tar = many(folder.path(), 500, 8);
    let import = ["images", "import", "--no-unpack", "--all-platforms", tar.to_str().unwrap()];
    containerd.run(NAMESPACE, &import).unwrap();
    let (mut inventory, _task) = follow(&runtime(&containerd.socket()));
    let (now, took) = seen(&mut inventory, "all", |now| now.images.len() == 500).await;
    eprintln!("500 images, 5,000 blobs: {took:?}");
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(now.references.len(), 500);

    // A thousand names in one go.
    let names: Vec<String> = (0..1000).map(|n| format!("models.example/burst/m:v{n}")).collect();
    let mut tag = vec!["images", "tag", "models.example/team/m7:v1"];
    tag.extend(names.iter().map(String::as_str));
    let began = Instant::now();
    containerd.run(NAMESPACE, &tag).unwrap();
    let tagged = began.elapsed();
    let (_, lag) = seen(&mut inventory, "all names", |now| now.references.len() == 1500).await;
    eprintln!("1,000 events in {tagged:?}; all seen {lag:?} after the last");
    assert!(lag < Duration::from_secs(1), "{lag:?}");
}

/// What the agent says of one image.
async fn located(agent: &node::Node, image: &str) -> (api::NodeEvaluation, api::ModelLocality) {
    let model = api::ModelRef { reference: image.to_owned(), ..Default::default() };
    let question = api::EvaluatePlacementRequest { models: vec![model], ..Default::default() };
    let answer = agent.locality().await.evaluate_placement(question).await.unwrap().into_inner();
    let node = answer.nodes.into_iter().next().unwrap();
    let model = node.models[0].clone();
    (node, model)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_answers_for_containerds_images_and_makes_volumes_of_them() {
    use api::Place::{Runtime as InRuntime, Store as InStore};
    let Some(mut here) = Node::new().await else { return };
    let socket = here.containerd.socket();
    let config = format!(
        "runtime: {{containerd: {{enabled: true, socket: {}, namespaces: [k8s.io]}}}}\n",
        socket.display()
    );
    let setup = Setup { config: Some(config), ..Setup::plain_http(&[here.registry.host()]) };
    let Some(agent) = node::Node::set_up(binary(), setup) else { return };
    let image = here.image.clone();
    let is_ready = async || located(&agent, &image).await.1.state() == api::ModelState::Ready;
    eventually("the image in containerd is known", is_ready).await;
    let (node, model) = located(&agent, &image).await;
    assert_eq!(model.places().collect::<Vec<_>>(), [InRuntime]);
    assert_eq!(model.model.unwrap().digest, here.digest.to_string());
    assert_eq!((node.score, node.missing_bytes, model.total_bytes), (100, Some(0), None));
    let status = agent.json(&["status"]);
    let expected = serde_json::json!({ "connected": true, "image_count": 1 });
    assert_eq!(status["runtime"], expected);

    // A volume of it costs the network its manifest.
    here.empty_registry();
    let pod = agent.pod("a");
    agent.publish(&pod, &image).await.unwrap();
    let both = async || {
        let (_, model) = located(&agent, &image).await;
        model.places().collect::<Vec<_>>() == [InStore, InRuntime]
    };
    eventually("both places are known", both).await;
    let all: u64 = here.layers().iter().map(|(_, size)| size).sum();
    #[allow(clippy::cast_precision_loss)]
    let read = async || agent.metric("carport_runtime_bytes_total").await >= all as f64;
    eventually("what was read there is counted", read).await;
    agent.unpublish(&pod).await.unwrap();

    // Without containerd nothing is claimed of what it had.
    here.containerd.kill().unwrap();
    let alone = async || {
        let (_, model) = located(&agent, &image).await;
        model.places().collect::<Vec<_>>() == [InStore]
    };
    eventually("containerd's absence is known", alone).await;
    assert_eq!(agent.json(&["status"])["runtime"]["connected"], false);
}
