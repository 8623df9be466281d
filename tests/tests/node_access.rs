//! Who gets an image that is on the node already.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::models::docker_config;
use carport_tests::node::{Node, Pod, Setup, publish_request};
use carport_tests::scripted::{Answer, Gate, Scripted};
use tonic::{Code, Status};

/// A registry that gives its image to whom it likes, while it is there.
struct Choosy {
    server: Scripted,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// `user:password` of those who may pull.
    allowed: HashSet<&'static str>,
    everybody: bool,
    away: bool,
}

impl Choosy {
    async fn start(image: &Image, gate: &Gate, allowed: &[&'static str]) -> Self {
        let allowed = allowed.iter().copied().collect();
        let state = Arc::new(Mutex::new(State { allowed, ..State::default() }));
        let (image, gate, asked) = (image.clone(), gate.clone(), Arc::clone(&state));
        let server = Scripted::start(move |request| {
            let state = asked.lock().unwrap();
            if state.away {
                return Answer::status(502);
            }
            let login = request.header("authorization").and_then(|text| {
                let text = text.strip_prefix("Basic ")?;
                let text = base64::engine::general_purpose::STANDARD.decode(text).ok()?;
                String::from_utf8(text).ok()
            });
            if state.everybody || login.is_some_and(|login| state.allowed.contains(login.as_str()))
            {
                return image.answer_gated(request, &gate);
            }
            Answer::status(401).header("WWW-Authenticate", "Basic realm=\"choosy\"")
        });
        Self { server: server.await, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn reference(&self) -> String {
        format!("{}/team/model:v1", self.server.host())
    }

    fn asked(&self) -> usize {
        self.server.requests().len()
    }

    async fn publish(&self, node: &Node, pod: &Pod, login: Option<&str>) -> Result<(), Status> {
        self.publish_as(node, pod, login, &self.reference()).await
    }

    async fn publish_as(
        &self,
        node: &Node,
        pod: &Pod,
        login: Option<&str>,
        image: &str,
    ) -> Result<(), Status> {
        let mut request = publish_request(pod, &[("image", image)]);
        if let Some((user, password)) = login.and_then(|login| login.split_once(':')) {
            let config = docker_config(&self.server.host(), user, password);
            request.secrets.insert(".dockerconfigjson".into(), config);
        }
        node.csi().await.node_publish_volume(request).await.map(drop)
    }
}

fn image() -> Image {
    Image::of(&[Tar::default().file("models/w", &noise(100_000, 1)).end()])
}

fn node(choosy: &Choosy, access: &str) -> Option<Node> {
    let config = format!("pull: {{attempts: 2}}\ncsi: {{imageAccess: {access}}}\n");
    let host = choosy.server.host();
    Node::set_up(binary(), Setup { config: Some(config), ..Setup::plain_http(&[&host]) })
}

fn code(result: Result<(), Status>) -> Code {
    result.err().map_or(Code::Ok, |status| status.code())
}

const ADA: &str = "ada:lovelace";
const BOB: &str = "bob:builder";

#[tokio::test(flavor = "multi_thread")]
async fn a_cached_private_image_is_for_pods_whose_own_credentials_the_registry_accepts() {
    let choosy = Choosy::start(&image(), &Gate::closed_at(u64::MAX), &[ADA]).await;
    let Some(node) = node(&choosy, "{}") else { return };
    let (ada, bob, none) = (node.pod("ada"), node.pod("bob"), node.pod("none"));
    choosy.publish(&node, &ada, Some(ADA)).await.unwrap();
    let pulled = choosy.asked();

    let status = choosy.publish(&node, &bob, Some(BOB)).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied, "{}", status.message());
    let message = status.message();
    assert!(message.contains("its registry refuses this pod's credentials"), "{message}");
    // Nor does it tell a stranger that the image is cached, and what it is.
    assert!(!message.contains("sha256:") && !message.contains("on this node"), "{message}");
    assert_eq!(code(choosy.publish(&node, &none, None).await), Code::PermissionDenied);
    // Nor by digest, nor by a name that the node has never heard.
    let digest = image().digest();
    for name in [
        format!("{}/team/model@{digest}", choosy.server.host()),
        format!("{}/other/name@{digest}", choosy.server.host()),
    ] {
        let refused = choosy.publish_as(&node, &bob, Some(BOB), &name).await;
        assert_eq!(code(refused), Code::PermissionDenied, "{name}");
    }
    assert!(!node.inside(&bob.target).exists() && !node.inside(&none.target).exists());
    assert!(choosy.asked() > pulled);

    // Given the right, bob is let in, and neither is asked for again.
    choosy.set(|state| state.allowed.extend([BOB]));
    choosy.publish(&node, &bob, Some(BOB)).await.unwrap();
    let asked = choosy.asked();
    for pod in ["ada-2", "ada-3"] {
        choosy.publish(&node, &node.pod(pod), Some(ADA)).await.unwrap();
    }
    choosy.publish(&node, &node.pod("bob-2"), Some(BOB)).await.unwrap();
    assert_eq!(choosy.asked(), asked);
    // Who has the volume keeps it, and a publish that is told again needs no right.
    choosy.set(|state| state.away = true);
    choosy.publish(&node, &ada, None).await.unwrap();
    assert!(!node.log().contains("lovelace") && !node.log().contains("builder"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_pulled_without_credentials_is_everybodys() {
    let choosy = Choosy::start(&image(), &Gate::closed_at(u64::MAX), &[]).await;
    choosy.set(|state| state.everybody = true);
    let Some(node) = node(&choosy, "{registryAway: deny}") else { return };
    // Credentials that nobody asked for are not sent, and make no secret of it.
    choosy.publish(&node, &node.pod("a"), Some(ADA)).await.unwrap();
    choosy.set(|state| state.away = true);
    let asked = choosy.asked();
    choosy.publish(&node, &node.pod("b"), None).await.unwrap();
    choosy.publish(&node, &node.pod("c"), Some(BOB)).await.unwrap();
    assert_eq!(choosy.asked(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_under_way_is_not_joined_into_by_who_has_no_right() {
    let gate = Gate::closed_at(10_000);
    let choosy = Choosy::start(&image(), &gate, &[ADA]).await;
    let Some(node) = node(&choosy, "{}") else { return };
    let (ada, bob) = (node.pod("ada"), node.pod("bob"));
    let pulling = choosy.publish(&node, &ada, Some(ADA));
    let meanwhile = async {
        gate.reached(10_000).await;
        let refused = choosy.publish(&node, &bob, Some(BOB)).await;
        gate.open();
        refused
    };
    let (pulled, refused) = tokio::join!(pulling, meanwhile);
    pulled.unwrap();
    assert_eq!(code(refused), Code::PermissionDenied);
    assert!(!node.inside(&bob.target).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_registry_is_away_the_policy_says_who_is_let_in() {
    for (policy, known) in [("allow-known", Code::Ok), ("deny", Code::Unavailable)] {
        let choosy = Choosy::start(&image(), &Gate::closed_at(u64::MAX), &[ADA, BOB]).await;
        let access = format!("{{rememberFor: 1ms, registryAway: {policy}}}");
        let Some(mut node) = node(&choosy, &access) else { return };
        choosy.publish(&node, &node.pod("ada"), Some(ADA)).await.unwrap();
        // What is known outlives the agent.
        node.kill_agent();
        node.start_agent();
        choosy.set(|state| state.away = true);
        let again = choosy.publish(&node, &node.pod("ada-2"), Some(ADA)).await;
        assert_eq!(code(again), known, "{policy}");
        let unknown = choosy.publish(&node, &node.pod("bob"), Some(BOB)).await;
        assert_eq!(code(unknown), Code::Unavailable, "{policy}");

        // A right that was taken back is not known any more.
        choosy.set(|state| (state.away, state.allowed) = (false, HashSet::from([BOB])));
        let refused = choosy.publish(&node, &node.pod("ada-3"), Some(ADA)).await;
        assert_eq!(code(refused), Code::PermissionDenied, "{policy}");
        choosy.set(|state| state.away = true);
        let away = choosy.publish(&node, &node.pod("ada-4"), Some(ADA)).await;
        assert_eq!(code(away), Code::Unavailable, "{policy}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_is_looked_into_again_when_it_is_old_and_not_at_all_where_nobody_wants_it() {
    let choosy = Choosy::start(&image(), &Gate::closed_at(u64::MAX), &[ADA]).await;
    let Some(node) = node(&choosy, "{rememberFor: 1ms}") else { return };
    choosy.publish(&node, &node.pod("a"), Some(ADA)).await.unwrap();
    let asked = choosy.asked();
    tokio::time::sleep(Duration::from_millis(2)).await;
    choosy.publish(&node, &node.pod("b"), Some(ADA)).await.unwrap();
    assert!(choosy.asked() > asked);
    let layers: Vec<String> = image().layers.iter().map(ToString::to_string).collect();
    let fetched = choosy.server.requests().into_iter().filter(|request| {
        layers.iter().any(|layer| request.target.contains(layer)) && request.method == "GET"
    });
    // The first is told who has to log in.
    assert!(fetched.count() <= 2, "the bytes are fetched once");
    drop(node);

    let Some(node) = self::node(&choosy, "{verify: false}") else { return };
    choosy.publish(&node, &node.pod("a"), Some(ADA)).await.unwrap();
    let asked = choosy.asked();
    choosy.publish(&node, &node.pod("b"), Some(BOB)).await.unwrap();
    assert_eq!(choosy.asked(), asked);
}

/// A mirror serves whom it likes; only the registry itself says who may have an image.
#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_serves_everybody_gives_nobody_a_right() {
    let choosy = Choosy::start(&image(), &Gate::closed_at(u64::MAX), &[ADA]).await;
    let (host, held) = (choosy.server.host(), image());
    let mirror = Scripted::start(move |request| held.answer(request)).await;
    let hosts = tempfile::tempdir().unwrap();
    let folder = hosts.path().join(&host);
    std::fs::create_dir(&folder).unwrap();
    let text =
        format!("[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n", mirror.host());
    std::fs::write(folder.join("hosts.toml"), text).unwrap();
    let hosts_dir = Some(hosts.path().to_owned());
    let setup = Setup { hosts_dir, ..Setup::plain_http(&[&host]) };
    let Some(node) = Node::set_up(binary(), setup) else { return };

    let (ada, bob) = (node.pod("ada"), node.pod("bob"));
    for _before_and_after_it_is_here in 0..2 {
        let refused = choosy.publish(&node, &bob, Some(BOB)).await;
        assert_eq!(code(refused), Code::PermissionDenied);
        choosy.publish(&node, &ada, Some(ADA)).await.unwrap();
    }
    let layers: Vec<String> = image().layers.iter().map(ToString::to_string).collect();
    let from_here = choosy.server.requests();
    assert!(!from_here.iter().any(|asked| layers.iter().any(|l| asked.target.contains(l))));
    // What the registry gives to everybody is everybody's, by way of the mirror, too.
    choosy.set(|state| state.everybody = true);
    choosy.publish(&node, &bob, Some(BOB)).await.unwrap();
}
