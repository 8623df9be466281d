//! A pre-pull list whose images are to be in the node's container runtime.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::{Path, PathBuf};
use std::time::Duration;

use carport_image::Digest;
use carport_proto::carport::v1 as api;
use carport_proto::cri::v1 as cri;
use carport_tests::carport::binary;
use carport_tests::containerd::Containerd;
use carport_tests::cri::FakeCri;
use carport_tests::models::{Model, secret, sources};
use carport_tests::node::{Node, Setup, eventually};
use carport_tests::registry::{PASSWORD, Registry, USERNAME};
use tempfile::TempDir;

const PINNED: &str = "io.cri-containerd.pinned=pinned";

/// A folder with a list, beside what else a node needs.
struct Here(TempDir);

impl Here {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Puts a list in place as a whole, as a ConfigMap comes.
    fn list(&self, text: &str) -> PathBuf {
        let folder = self.path().join("list");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(self.path().join("new"), text).unwrap();
        std::fs::rename(self.path().join("new"), folder.join("list.yaml")).unwrap();
        folder.join("list.yaml")
    }

    /// Docker's `config.json`, with the login of `host`.
    fn login(&self, host: &str) -> PathBuf {
        let auths = serde_json::json!({ "auths": { host:
            { "username": USERNAME, "password": PASSWORD } } });
        let path = self.path().join("docker.json");
        std::fs::write(&path, auths.to_string()).unwrap();
        path
    }

    fn agent(&self, host: &str, more: &str) -> Option<Node> {
        let config = format!(
            "prepull: {{list: {}, startJitter: 1ms}}\n{more}",
            self.path().join("list/list.yaml").display()
        );
        Node::set_up(binary(), Setup { config: Some(config), ..Setup::plain_http(&[host]) })
    }
}

/// Waits until so many entries are in this state.
async fn entries(agent: &Node, state: &str, count: f64) {
    agent.metric_becomes(&format!("carport_prepull_entries{{state=\"{state}\"}}"), count).await;
}

async fn places(agent: &Node, image: &str) -> Vec<api::Place> {
    let model = api::ModelRef { reference: image.to_owned(), ..Default::default() };
    let question = api::EvaluatePlacementRequest { models: vec![model], ..Default::default() };
    let answer = agent.locality().await.evaluate_placement(question).await.unwrap().into_inner();
    answer.nodes[0].models[0].places().collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_for_the_runtime_is_pulled_pinned_and_let_go() {
    let Some(registry) = Registry::start_with_login() else { return };
    let (here, host) = (Here::new(), registry.host());
    let Some(containerd) = Containerd::start_with_cri(here.path(), &[host], "").unwrap() else {
        return;
    };
    let image = format!("{host}/team/m:v1");
    let login = secret(host, USERNAME, PASSWORD);
    let packed = Model::new().pack(&image, &login, &sources(&[host])).await.unwrap();
    let by_digest = format!("{host}/team/m@{}", packed.digest);
    here.list(&format!(
        "images:\n- {{image: '{image}', target: runtime, pin: forever}}\n\
         - {{image: '{by_digest}', target: runtime}}\n"
    ));
    let config = format!(
        "registries: {{dockerConfig: {}}}\nruntime: {{containerd: {{enabled: true, socket: {}}}}}\n",
        here.login(host).display(),
        containerd.socket().display()
    );
    let Some(agent) = here.agent(host, &config) else { return };
    entries(&agent, "ready", 2.0).await;
    let images = containerd.run("k8s.io", &["images", "ls"]).unwrap();
    let labels = |images: &str, name: &str| {
        let line = images.lines().find(|line| line.starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name}: {images}")).to_owned()
    };
    assert!(labels(&images, &image).contains(PINNED), "{images}");
    assert!(!labels(&images, &by_digest).contains(PINNED), "{images}");
    let known = async || places(&agent, &image).await == [api::Place::Runtime];
    eventually("the inventory has it", known).await;
    assert_eq!(agent.json(&["ls"]).as_array().unwrap().len(), 0, "the store has nothing of it");

    // What it says of the pin is what CRI says.
    let (_, page) = agent.page("/").await;
    let old = containerd.version().unwrap().starts_with("1.6");
    assert_eq!(page.contains("the kubelet may remove it"), old, "{page}");
    assert!(page.contains("<td>runtime<td>ready"), "{page}");

    // What leaves the list is no longer pinned, and stays.
    here.list("images: []\n");
    let unpinned = async || {
        let images = containerd.run("k8s.io", &["images", "ls"]).unwrap();
        !labels(&images, &image).contains(PINNED)
    };
    eventually("the pin is gone", unpinned).await;
    let images = containerd.run("k8s.io", &["images", "ls"]).unwrap();
    assert!(!images.contains("carport.dev"), "{images}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_somebody_else_stays_theirs() {
    let Some(registry) = Registry::start() else { return };
    let (here, host) = (Here::new(), registry.host());
    let Some(mut containerd) = Containerd::start_with_cri(here.path(), &[host], "").unwrap() else {
        return;
    };
    let image = format!("{host}/team/m:v1");
    let login = secret(host, USERNAME, PASSWORD);
    Model::new().pack(&image, &login, &sources(&[host])).await.unwrap();
    containerd.run("k8s.io", &["images", "pull", "--plain-http", &image]).unwrap();
    containerd.run("k8s.io", &["images", "label", &image, PINNED]).unwrap();
    here.list(&format!("images: [{{image: '{image}', target: runtime, pin: forever}}]"));
    // The runtime is away at first: said, and tried again.
    containerd.kill().unwrap();
    let config = format!(
        "runtime: {{containerd: {{enabled: true, socket: {}}}}}\n",
        containerd.socket().display()
    );
    let Some(agent) = here.agent(host, &config) else { return };
    entries(&agent, "failed", 1.0).await;
    let (_, page) = agent.page("/").await;
    assert!(page.contains("the container runtime does not answer: connect to "), "{page}");
    containerd.restart().unwrap();
    entries(&agent, "ready", 1.0).await;
    here.list("images: []\n");
    entries(&agent, "ready", 0.0).await;
    let images = containerd.run("k8s.io", &["images", "ls"]).unwrap();
    assert!(images.contains(PINNED) && !images.contains("carport.dev"), "{images}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_for_both_places_is_fetched_once() {
    let Some(registry) = Registry::start() else { return };
    let (here, host) = (Here::new(), registry.host());
    let Some(containerd) = Containerd::start_with_cri(here.path(), &[host], "").unwrap() else {
        return;
    };
    let image = format!("{host}/team/m:v1");
    let login = secret(host, USERNAME, PASSWORD);
    let packed = Model::new().pack(&image, &login, &sources(&[host])).await.unwrap();
    here.list(&format!(
        "refresh: 10s\nimages:\n- {{image: '{image}', target: runtime, pin: forever}}\n- image: '{image}'\n"
    ));
    let config = format!(
        "runtime: {{containerd: {{enabled: true, socket: {}}}}}\n",
        containerd.socket().display()
    );
    let Some(agent) = here.agent(host, &config) else { return };
    entries(&agent, "ready", 2.0).await;
    let both = async || places(&agent, &image).await == [api::Place::Store, api::Place::Runtime];
    eventually("both places have it", both).await;
    // containerd got the store's files, and no layer of its own.
    let content = containerd.run("k8s.io", &["content", "ls", "-q"]).unwrap();
    let manifest = std::fs::read(containerd.blob(&packed.digest.to_string())).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        assert!(!content.contains(layer["digest"].as_str().unwrap()), "{content}");
    }
    let images = containerd.run("k8s.io", &["images", "ls"]).unwrap();
    assert!(images.contains(PINNED), "{images}");
    // The models that the node has, by where they are.
    let listed = async |place: api::Place| {
        let question = api::ListModelsRequest { place: place.into(), ..Default::default() };
        let answer = agent.locality().await.list_models(question).await.unwrap().into_inner();
        answer.models.len()
    };
    let counts = (
        listed(api::Place::Store).await,
        listed(api::Place::Runtime).await,
        listed(api::Place::Unspecified).await,
    );
    // In the runtime by its tag and by its digest.
    assert_eq!(counts, (1, 2, 2));

    // A tag that means another image now is brought there again.
    let model = Model::new();
    model.write("config.json", b"{\"architectures\":[\"Other\"]}");
    let other = model.pack(&image, &login, &sources(&[host])).await.unwrap();
    let moved = async || {
        let images = containerd.run("k8s.io", &["images", "ls"]).unwrap();
        let line = images.lines().find(|line| line.starts_with(&format!("{image} "))).unwrap();
        line.contains(&other.digest.to_string()) && line.contains(PINNED)
    };
    eventually("the tag has moved", moved).await;
}

/// An image as CRI-O tells of it.
fn image(name: &str, tag: &str) -> cri::Image {
    let digest = Digest::of(name.as_bytes());
    cri::Image {
        id: digest.hex().to_owned(),
        repo_tags: vec![format!("models.example/{name}:{tag}")],
        repo_digests: vec![format!("models.example/{name}@{digest}")],
        size: 7 << 30,
        pinned: false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runtime_that_is_not_containerd_is_listed_and_fed_through_cri() {
    let here = Here::new();
    let socket = here.path().join("crio.sock");
    let runtime = FakeCri::start(&socket);
    runtime.has(image("serving", "v1"));
    runtime.could_have(image("llama", "v1"));
    let entry = |name: &str| {
        format!("{{image: 'models.example/{name}:v1', target: runtime, pin: forever}}")
    };
    here.list(&format!("images: [{}, {}]", entry("serving"), entry("llama")));
    let config = format!(
        "runtime: {{containerd: {{enabled: false}}, cri: {{enabled: true, socket: {}}}}}\n",
        socket.display()
    );
    let Some(mut agent) = here.agent("127.0.0.1:1", &config) else { return };
    entries(&agent, "ready", 2.0).await;
    let [serving, llama] = ["serving", "llama"].map(|name| format!("models.example/{name}:v1"));
    let ready = async || places(&agent, &llama).await == [api::Place::Runtime];
    eventually("what was pulled is listed", ready).await;
    assert_eq!(places(&agent, &serving).await, [api::Place::Runtime]);
    // What was there was not pulled again, and nobody's login went along.
    let pulls: Vec<_> = runtime.pulls();
    let asked: Vec<_> = pulls.iter().map(|pull| pull.image.clone().unwrap().image).collect();
    assert_eq!(asked, std::slice::from_ref(&llama));
    assert_eq!(pulls[0].auth, None);
    let expected = serde_json::json!({ "connected": true, "image_count": 2 });
    assert_eq!(agent.json(&["status"])["runtime"], expected);
    // It keeps nothing by wish, and that is said.
    let (_, page) = agent.page("/").await;
    assert_eq!(page.matches("the kubelet may remove it").count(), 2, "{page}");

    // A disk that is full, and a pull that is stopped.
    runtime.refuses(Some(tonic::Status::unknown("write /x: no space left on device")));
    here.list(&format!("images: [{}]", entry("big")));
    entries(&agent, "no_room", 1.0).await;
    let status = agent.json(&["status"]);
    assert_eq!(status["reasons"][0]["code"], "PREPULL_NO_ROOM", "{status}");
    runtime.refuses(None);
    runtime.holds(true);
    here.list(&format!("images: [{}]", entry("slow")));
    entries(&agent, "pulling", 1.0).await;
    let asked = async || runtime.pulls().len() == 3;
    eventually("it is asked to pull", asked).await;
    assert!(agent.stop_agent().success(), "a pull under way holds nothing up");
    runtime.holds(false);

    // Without it nothing is claimed.
    here.list("images: []");
    drop(runtime);
    agent.start_agent();
    tokio::time::timeout(Duration::from_secs(20), async {
        let away = "images in the container runtime are not known";
        eventually("its absence is told", async || agent.log().contains(away)).await;
    })
    .await
    .unwrap();
    assert_eq!(places(&agent, &llama).await, []);
}
