//! Pulls by way of what containerd's `hosts.toml` says: mirrors, certificates, plain HTTP.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;

use carport_image::pull::{PullOptions, PullRequest, Pulled};
use carport_image::source::{PullSecret, RegistryOptions, SourceError, Sources};
use carport_image::{PullError, Puller, Store};
use carport_tests::models::{Model, options, reference, sources};
use carport_tests::registry::Registry;
use carport_tests::scripted::{Answer, Request, Scripted};
use tempfile::TempDir;

/// A store, and a folder of `hosts.toml` files.
struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn hosts(&self, registry: &str, text: &str) {
        let folder = self.dir.path().join("certs.d").join(registry);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("hosts.toml"), text).unwrap();
    }

    fn options(&self) -> RegistryOptions {
        RegistryOptions { hosts_dir: Some(self.dir.path().join("certs.d")), ..options(&[]) }
    }

    async fn pull(&self, image: &str) -> Result<Pulled, PullError> {
        self.pull_with(image, 1).await
    }

    async fn pull_with(&self, image: &str, attempts: u32) -> Result<Pulled, PullError> {
        let store = Store::open(self.dir.path().join("store")).unwrap();
        let sources = Sources::new(self.options()).unwrap();
        let options = PullOptions { attempts, ..PullOptions::default() };
        let puller = Puller::new(store, sources, options);
        puller.start(PullRequest::new(reference(image))).wait().await
    }
}

/// Packs a model into `registry`, over plain HTTP.
async fn push(registry: &Registry, model: &Model, image: &str) {
    let host = registry.host();
    model.pack(&format!("{host}/{image}"), &PullSecret::none(), &sources(&[host])).await.unwrap();
}

fn unpacked(bench: &Bench, pulled: &Pulled, model: &Model) {
    let rootfs =
        bench.dir.path().join("store/trees").join(pulled.digest.hex()).join("rootfs/models");
    for name in ["config.json", "model.safetensors"] {
        let (there, packed) =
            (std::fs::read(rootfs.join(name)), std::fs::read(model.path().join(name)));
        assert!(there.unwrap() == packed.unwrap(), "{name}");
    }
}

/// A registry that nobody answers for: this port of loopback is taken, and speaks no HTTP.
fn silent() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    (listener, host)
}

#[tokio::test]
async fn a_mirror_serves_for_a_registry_that_is_away() {
    let Some(mirror) = Registry::start() else { return };
    let model = Model::new();
    push(&mirror, &model, "team/m:v1").await;
    let bench = Bench::new();
    let text = format!("server = \"http://127.0.0.1:1\"\n[host.\"http://{}\"]\n", mirror.host());
    bench.hosts("_default", &text);
    let pulled = bench.pull("models.example/team/m:v1").await.unwrap();
    unpacked(&bench, &pulled, &model);
    let error = bench.pull("models.example/team/other:v1").await.unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1"), "the registry's own error counts: {error}");
}

#[tokio::test]
async fn what_a_mirror_lacks_or_refuses_the_registry_serves() {
    let Some(registry) = Registry::start() else { return };
    let model = Model::new();
    push(&registry, &model, "team/m:v1").await;
    for answer in [Answer::status(404), Answer::status(503), Answer::status(401)] {
        let mirror = Scripted::start(move |_: &Request| answer.clone()).await;
        let bench = Bench::new();
        let text = format!(
            "server = \"http://{}\"\n[host.\"http://{}\"]\n[host.\"http://{}\".header]\nx-team = \"a\"\n",
            registry.host(),
            mirror.host(),
            mirror.host()
        );
        bench.hosts("models.example", &text);
        let pulled = bench.pull("models.example/team/m:v1").await.unwrap();
        unpacked(&bench, &pulled, &model);
        let requests = mirror.requests();
        let first = requests.first().expect("the mirror was asked first");
        assert_eq!(first.target, "/v2/team/m/manifests/v1?ns=models.example");
        assert_eq!(first.header("x-team"), Some("a"));
        assert_eq!(first.header("authorization"), None);
    }
}

#[tokio::test]
async fn a_mirror_that_lies_is_dropped_for_the_registry() {
    let Some(registry) = Registry::start() else { return };
    let model = Model::new();
    push(&registry, &model, "team/m:v1").await;
    let storage = registry.storage();
    // Has every blob, of the right length and with other bytes; and manifests that are none of ours.
    let mirror = Scripted::start(move |request: &Request| {
        let Some((_, digest)) = request.target.split_once("/blobs/sha256:") else {
            return Answer::status(200).body("{}");
        };
        let digest = digest.split('?').next().unwrap_or_default();
        let folder = storage.join("docker/registry/v2/blobs/sha256");
        let path = folder.join(&digest[..2]).join(digest).join("data");
        let length = std::fs::metadata(path).map(|meta| meta.len()).unwrap_or_default();
        Answer::status(200).body(vec![b'x'; usize::try_from(length).unwrap()])
    })
    .await;
    let bench = Bench::new();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        registry.host(),
        mirror.host()
    );
    bench.hosts("models.example", &text);
    let pulled = bench.pull("models.example/team/m:v1").await.unwrap();
    unpacked(&bench, &pulled, &model);
    assert!(mirror.requests().iter().all(|request| !request.target.contains("/manifests/v1")));
    assert!(mirror.requests().iter().any(|request| request.target.contains("/blobs/")));
}

/// What docker-registry's folder holds for a request of `team/m`, and whether it is a blob.
fn stored(storage: &Path, request: &Request) -> Option<(Vec<u8>, bool)> {
    let folder = storage.join("docker/registry/v2");
    let target = request.target.split('?').next().unwrap_or_default();
    let (kind, name) = target.strip_prefix("/v2/team/m/")?.split_once('/')?;
    let digest = match name.strip_prefix("sha256:") {
        Some(digest) => digest.to_owned(),
        None => {
            let tag = format!("repositories/team/m/_manifests/tags/{name}/current/link");
            let link = std::fs::read_to_string(folder.join(tag)).ok()?;
            link.trim().strip_prefix("sha256:")?.to_owned()
        }
    };
    let path = folder.join("blobs/sha256").join(&digest[..2]).join(&digest).join("data");
    Some((std::fs::read(path).ok()?, kind == "blobs"))
}

/// The range that was asked for, or all of it.
fn part(bytes: &[u8], request: &Request) -> Answer {
    let Some(range) = request.header("range") else { return Answer::ok(bytes.to_vec()) };
    let (start, end) = range.strip_prefix("bytes=").and_then(|r| r.split_once('-')).unwrap();
    let (start, end): (usize, usize) = (start.parse().unwrap(), end.parse().unwrap());
    let told = format!("bytes {start}-{end}/{}", bytes.len());
    Answer::status(206).header("Content-Range", &told).body(bytes[start..=end].to_vec())
}

#[tokio::test]
async fn what_a_mirror_breaks_off_is_gone_on_with_at_the_registry() {
    let Some(registry) = Registry::start() else { return };
    let model = Model::new();
    push(&registry, &model, "team/m:v1").await;
    let storage = registry.storage();
    let mirror = Scripted::start(move |request: &Request| match stored(&storage, request) {
        Some((bytes, true)) => part(&bytes, request).cut(1000),
        _ => Answer::status(404),
    })
    .await;
    let bench = Bench::new();
    let text =
        format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", registry.host(), mirror.host());
    bench.hosts("models.example", &text);
    // A second attempt is needed for the rest, and no more.
    let pulled = bench.pull_with("models.example/team/m:v1", 2).await.unwrap();
    unpacked(&bench, &pulled, &model);
    let blobs = mirror.requests().iter().filter(|r| r.target.contains("/blobs/")).count();
    assert!((1..=8).contains(&blobs), "it was asked {blobs} times");
}

#[tokio::test]
async fn a_mirror_that_rests_is_asked_where_the_registry_is_away() {
    let Some(good) = Registry::start() else { return };
    let model = Model::new();
    push(&good, &model, "team/m:v1").await;
    // Busy at each first request for a blob.
    let (storage, seen) = (good.storage(), std::sync::Mutex::new(std::collections::HashSet::new()));
    let mirror = Scripted::start(move |request: &Request| match stored(&storage, request) {
        Some((_, true)) if seen.lock().unwrap().insert(request.target.clone()) => {
            Answer::status(503)
        }
        Some((bytes, _)) => part(&bytes, request),
        None => Answer::status(404),
    })
    .await;
    let bench = Bench::new();
    let text = format!("server = \"http://127.0.0.1:1\"\n[host.\"http://{}\"]\n", mirror.host());
    bench.hosts("_default", &text);
    let pulled = bench.pull_with("models.example/team/m:v1", 2).await.unwrap();
    unpacked(&bench, &pulled, &model);
}

#[tokio::test]
async fn a_mirror_that_serves_a_web_page_for_a_tag_is_passed_over() {
    let Some(registry) = Registry::start() else { return };
    let model = Model::new();
    push(&registry, &model, "team/m:v1").await;
    let mirror = Scripted::start(|_| Answer::ok("<html>Log in</html>")).await;
    let bench = Bench::new();
    let text =
        format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", registry.host(), mirror.host());
    bench.hosts("models.example", &text);
    let pulled = bench.pull("models.example/team/m:v1").await.unwrap();
    unpacked(&bench, &pulled, &model);
}

#[tokio::test]
async fn a_registry_with_a_certificate_of_its_own_is_trusted_by_its_ca() {
    let Some(registry) = Registry::start_with_tls() else { return };
    let model = Model::new();
    let host = registry.host();
    let bench = Bench::new();
    let secret = PullSecret::none();

    let error = model.pack(&format!("{host}/m:v1"), &secret, &sources(&[])).await.unwrap_err();
    assert!(error.to_string().contains("no TLS with"), "{error}");

    let certificate = registry.certificate();
    let ca = certificate.display();
    bench.hosts(host, &format!("server = \"https://{host}\"\nca = \"{ca}\"\n"));
    let with_ca = Sources::new(bench.options()).unwrap();
    model.pack(&format!("{host}/m:v1"), &secret, &with_ca).await.unwrap();
    let pulled = bench.pull(&format!("{host}/m:v1")).await.unwrap();
    unpacked(&bench, &pulled, &model);

    let trusting = Bench::new();
    trusting.hosts(host, &format!("server = \"https://{host}\"\nskip_verify = true\n"));
    unpacked(&trusting, &trusting.pull(&format!("{host}/m:v1")).await.unwrap(), &model);
}

#[tokio::test]
async fn a_broken_hosts_file_is_named_and_nothing_is_asked() {
    let (_listener, host) = silent();
    let bench = Bench::new();
    bench.hosts(&host, "server = \n");
    let error = bench.pull(&format!("{host}/m:v1")).await.unwrap_err();
    assert!(matches!(error, PullError::Source(SourceError::Invalid(_))), "{error}");
    let file = Path::new(&host).join("hosts.toml");
    assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
}
