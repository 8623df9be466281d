//! Volumes that stream, on a node in small: a pod starts while its model arrives, reads what it
//! wants first, and outlives whatever ends meanwhile.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use carport_csi::fuse::{self, FS_TYPE};
use carport_proto::csi::v1 as csi;
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Node, Pod, Setup, eventually, publish_request};
use carport_tests::scripted::{Answer, Gate, Request, Scripted};
use rustix::process::Signal;

const SHARD_BYTES: usize = 12 * 1024 * 1024 + 333;

/// What a registry lets pass of the first shard: its head, which comes early.
const OPEN_BYTES: u64 = 2 * 1024 * 1024;

fn shard(n: u64) -> Vec<u8> {
    noise(SHARD_BYTES, n)
}

/// Three shards and small files in one layer.
fn image_with(shards: [&[u8]; 3]) -> Image {
    let [first, second, third] = shards;
    Image::of(&[Tar::default()
        .entry("models", tar::EntryType::Directory, "", b"")
        .file("models/config.json", b"{}")
        .file("models/model-1.safetensors", first)
        .file("models/model-2.safetensors", second)
        .file("models/model-3.safetensors", third)
        .symlink("models/latest", "model-3.safetensors")
        .end()])
}

fn image() -> Image {
    image_with([&shard(1), &shard(2), &shard(3)])
}

fn range_of(request: &Request) -> Option<(u64, u64)> {
    let (from, to) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse::<u64>().ok()? + 1))
}

/// A registry that holds the end of the first shard back behind the gate.
async fn holding_back(image: &Image, gate: &Gate) -> Scripted {
    let (image, gate) = (image.clone(), gate.clone());
    Scripted::start(move |request| {
        let held = request.target.ends_with(&image.layers[0].to_string())
            && range_of(request)
                .is_some_and(|(from, to)| from < SHARD_BYTES as u64 && OPEN_BYTES < to);
        if held { image.answer_gated(request, &gate) } else { image.answer(request) }
    })
    .await
}

/// Bytes of the layer that were asked for.
fn asked(server: &Scripted, image: &Image) -> u64 {
    let layer = image.layers[0].to_string();
    let requests = server.requests().into_iter().filter(|r| r.target.ends_with(&layer));
    requests.filter_map(|request| range_of(&request)).map(|(from, to)| to - from).sum()
}

/// A program that is killed when dropped.
struct Running(Child);

impl Running {
    fn start(mut command: Command) -> Self {
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node on which volumes can stream.
fn node(test: &str, server: &Scripted) -> Option<Node> {
    configured(test, server, None)
}

fn configured(test: &str, server: &Scripted, config: Option<&str>) -> Option<Node> {
    let config = config.map(str::to_owned);
    set_up(test, Setup { config, ..Setup::plain_http(&[&server.host()]) })
}

fn set_up(test: &str, setup: Setup) -> Option<Node> {
    if let Err(error) = fuse::check() {
        eprintln!("SKIPPED {test}: {error}");
        return None;
    }
    Node::set_up(binary(), setup)
}

fn name(server: &Scripted) -> String {
    format!("{}/models/llama:v1", server.host())
}

async fn stream(node: &Node, pod: &Pod, image: &str) -> Result<(), tonic::Status> {
    node.publish_with(pod, &[("image", image), ("mode", "stream")]).await
}

/// The type of the topmost mount that a pod's volume is.
fn fs_type(node: &Node, pod: &Pod) -> Option<String> {
    let mounts = node.mounts_below(&pod.target);
    let (_, fields) = mounts.last()?.split_once(" - ")?;
    Some(fields.split(' ').next()?.to_owned())
}

fn is_native(node: &Node, pod: &Pod) -> bool {
    fs_type(node, pod).is_some_and(|fs_type| fs_type != FS_TYPE)
}

/// What the driver says is wrong with a pod's volume.
async fn condition(node: &Node, pod: &Pod) -> Option<String> {
    let request = csi::NodeGetVolumeStatsRequest {
        volume_id: pod.volume_id.clone(),
        volume_path: pod.target.display().to_string(),
        ..Default::default()
    };
    let stats = node.csi().await.node_get_volume_stats(request).await.unwrap().into_inner();
    let condition = stats.volume_condition.unwrap();
    condition.abnormal.then_some(condition.message)
}

/// A read of what is held back, on a thread: its error, and how long it took.
fn blocked(path: PathBuf) -> tokio::task::JoinHandle<(io::Error, Duration)> {
    // Opened now, so that what ends next ends it.
    let file = File::open(path).unwrap();
    tokio::task::spawn_blocking(move || {
        let start = Instant::now();
        let at = SHARD_BYTES as u64 - 1000;
        let error = file.read_at(&mut [0; 100], at).unwrap_err();
        (error, start.elapsed())
    })
}

fn at(node: &Node, pod: &Pod, file: &str) -> PathBuf {
    node.inside(&pod.target).join("models").join(file)
}

/// Reads a file of a pod, on a thread that may wait.
async fn read(node: &Node, pod: &Pod, file: &str) -> io::Result<Vec<u8>> {
    let path = at(node, pod, file);
    tokio::task::spawn_blocking(move || fs::read(path)).await.unwrap()
}

fn stored(node: &Node) -> bool {
    !node.json(&["ls"]).as_array().unwrap().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_starts_while_its_image_arrives_and_the_next_one_gets_a_kernel_mount() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "a_pod_starts_while_its_image_arrives_and_the_next_one_gets_a_kernel_mount";
    let Some(node) = node(test, &server) else { return };
    let name = name(&server);
    let [first, second, third] = ["first", "second", "third"].map(|uid| node.pod(uid));
    // The probe of the container with the sessions.
    let probe = || node.carport().args(["fuse", "--check"]).output().unwrap();
    let silent = probe();
    let said = String::from_utf8_lossy(&silent.stderr);
    assert!(!silent.status.success() && said.contains("ask the process that serves"), "{said}");

    stream(&node, &first, &name).await.unwrap();
    assert!(probe().status.success(), "{:?}", probe());
    stream(&node, &second, &name).await.unwrap();
    stream(&node, &second, &name).await.unwrap();
    assert!(!stored(&node), "not complete");
    for pod in [&first, &second] {
        assert_eq!(fs_type(&node, pod).as_deref(), Some(FS_TYPE));
        assert!(read(&node, pod, "latest").await.unwrap() == shard(3));
    }
    let device = |pod: &Pod| fs::metadata(node.inside(&pod.target)).unwrap().dev();
    assert_eq!(device(&first), device(&second), "one page cache");
    assert!(fs::write(at(&node, &first, "config.json"), b"").is_err());
    eventually("both volumes count while the image arrives", async || {
        node.json(&["status"])["models"][0]["mount_count"] == 2
    })
    .await;
    let pull = node.json(&["status"])["models"][0]["pull"].clone();
    assert!(pull["done_bytes"].as_u64() > Some(OPEN_BYTES), "{pull}");

    let open = File::open(at(&node, &second, "model-2.safetensors")).unwrap();
    let late = read(&node, &first, "model-1.safetensors");
    gate.open();
    assert!(late.await.unwrap() == shard(1));
    eventually("the image is stored", async || stored(&node)).await;
    stream(&node, &third, &name).await.unwrap();
    assert!(is_native(&node, &third));
    assert_eq!(asked(&server, &image), image.layer_bytes(), "each byte once");
    for pod in [&first, &second] {
        eventually("a running pod is turned native", async || is_native(&node, pod)).await;
    }
    // Open while it was turned, and served until it is closed.
    let mut bytes = vec![0; 1000];
    open.read_exact_at(&mut bytes, SHARD_BYTES as u64 - 1000).unwrap();
    assert!(bytes == shard(2)[SHARD_BYTES - 1000..]);
    drop(open);
    for pod in [&first, &second, &third] {
        assert!(read(&node, pod, "model-2.safetensors").await.unwrap() == shard(2));
        assert_eq!(condition(&node, pod).await, None);
    }

    for pod in [&first, &second, &third] {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
    let folder = node.socket().with_file_name("stream");
    eventually("the session ends", async || node.mounts_below(&folder).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_its_last_volume_a_session_ends_and_what_came_is_kept() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "with_its_last_volume_a_session_ends_and_what_came_is_kept";
    let Some(node) = node(test, &server) else { return };
    let pods = ["first", "second"].map(|uid| node.pod(uid));
    for pod in &pods {
        stream(&node, pod, &name(&server)).await.unwrap();
    }
    assert!(read(&node, &pods[0], "model-3.safetensors").await.unwrap() == shard(3));
    node.unpublish(&pods[0]).await.unwrap();
    assert!(read(&node, &pods[1], "model-2.safetensors").await.unwrap() == shard(2));
    node.unpublish(&pods[1]).await.unwrap();
    let folder = node.socket().with_file_name("stream");
    eventually("the session ends", async || node.mounts_below(&folder).is_empty()).await;
    let none = async || node.json(&["status"])["models"].as_array().unwrap().is_empty();
    eventually("the pull stops", none).await;

    gate.open();
    let pod = node.pod("third");
    node.publish(&pod, &name(&server)).await.unwrap();
    assert!(read(&node, &pod, "model-1.safetensors").await.unwrap() == shard(1));
    let again = asked(&server, &image) - image.layer_bytes();
    assert!(again < SHARD_BYTES as u64, "{again} bytes came twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_do_not_notice_that_the_agent_is_killed_and_it_goes_on_from_there() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "readers_do_not_notice_that_the_agent_is_killed_and_it_goes_on_from_there";
    let Some(mut node) = node(test, &server) else { return };
    let pod = node.pod("first");
    stream(&node, &pod, &name(&server)).await.unwrap();
    node.kill_agent();
    assert!(read(&node, &pod, "model-3.safetensors").await.unwrap() == shard(3));
    node.start_agent();
    assert_eq!(condition(&node, &pod).await, None);
    let again = node.pod("second");
    stream(&node, &again, &name(&server)).await.unwrap();
    node.kill_agent();
    gate.open();
    // Nobody but the process with the sessions brings it.
    assert!(read(&node, &pod, "model-1.safetensors").await.unwrap() == shard(1));
    assert!(read(&node, &pod, "model-2.safetensors").await.unwrap() == shard(2));
    node.start_agent();
    for pod in [&pod, &again] {
        eventually("turned native", async || is_native(&node, pod)).await;
        assert!(read(&node, pod, "latest").await.unwrap() == shard(3));
        node.unpublish(pod).await.unwrap();
    }
    assert_eq!(asked(&server, &image), image.layer_bytes(), "each byte once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_session_is_made_again_under_running_pods() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "a_killed_session_is_made_again_under_running_pods";
    let Some(node) = node(test, &server) else { return };
    let pod = node.pod("first");
    stream(&node, &pod, &name(&server)).await.unwrap();
    // A container with mounts of its own, which gets none of those that the agent makes.
    let container = node.private_namespace();
    let inside = container.inside(&pod.target).join("models");
    assert!(read(&node, &pod, "model-3.safetensors").await.unwrap() == shard(3));
    let waiting = blocked(at(&node, &pod, "model-1.safetensors"));
    node.end_sessions(Signal::KILL);
    let (error, took) = waiting.await.unwrap();
    assert!(took < Duration::from_secs(30), "{error}: {took:?}");

    let reads = |path: PathBuf, n| async move {
        let read = tokio::task::spawn_blocking(move || fs::read(path)).await.unwrap();
        read.is_ok_and(|bytes| bytes == shard(n))
    };
    for folder in [inside.clone(), node.inside(&pod.target).join("models")] {
        let path = folder.join("model-3.safetensors");
        eventually("there is another session", async || reads(path.clone(), 3).await).await;
    }
    assert_eq!(fs_type(&node, &pod).as_deref(), Some(FS_TYPE));
    assert_eq!(condition(&node, &pod).await, None);
    gate.open();
    assert!(reads(inside.join("model-1.safetensors"), 1).await);
    eventually("turned native", async || is_native(&node, &pod)).await;
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    eventually("in the container, too", async || device(&inside) == device(&node.root())).await;
    let again = asked(&server, &image) - image.layer_bytes();
    assert!(again < 2 * SHARD_BYTES as u64, "{again} bytes came twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_is_told_in_time_of_what_does_not_come() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "a_reader_is_told_in_time_of_what_does_not_come";
    let config = Some("stream: {readTimeout: 300ms}");
    let Some(node) = configured(test, &server, config) else { return };
    let pod = node.pod("first");
    stream(&node, &pod, &name(&server)).await.unwrap();
    let path = at(&node, &pod, "model-1.safetensors");
    let (error, took) = blocked(path.clone()).await.unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!((Duration::from_millis(300)..Duration::from_secs(20)).contains(&took), "{took:?}");

    // Somebody cuts the connection with readers in it: they return, and another one is made.
    let device = rustix::fs::minor(fs::metadata(node.inside(&pod.target)).unwrap().dev());
    let abort = format!("/sys/fs/fuse/connections/{device}/abort");
    if let Ok(abort) = File::options().write(true).open(&abort) {
        let readers: Vec<_> = (0..3).map(|_| blocked(path.clone())).collect();
        io::Write::write_all(&mut &abort, b"1").unwrap();
        for reader in readers {
            let (error, took) = reader.await.unwrap();
            assert!(took < Duration::from_secs(30), "{error}: {took:?}");
        }
        let readable = async || read(&node, &pod, "model-2.safetensors").await.is_ok();
        eventually("there is another session", readable).await;
    } else {
        eprintln!("SKIPPED the abort: no {abort}");
    }
    gate.open();
    eventually("turned native", async || is_native(&node, &pod)).await;
    assert!(read(&node, &pod, "model-1.safetensors").await.unwrap() == shard(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_told_to_end_gives_who_waits_an_error_at_once() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "a_session_that_is_told_to_end_gives_who_waits_an_error_at_once";
    let Some(mut node) = node(test, &server) else { return };
    let pod = node.pod("first");
    stream(&node, &pod, &name(&server)).await.unwrap();
    let waiting = blocked(at(&node, &pod, "model-1.safetensors"));
    assert_eq!(node.stop_agent().code(), Some(0));
    node.end_sessions(Signal::TERM);
    let (error, took) = waiting.await.unwrap();
    assert!(
        [libc::EIO, libc::ENOTCONN, libc::ECONNABORTED].contains(&error.raw_os_error().unwrap())
    );
    assert!(took < Duration::from_secs(30), "{took:?}");

    node.start_agent();
    let readable = async || read(&node, &pod, "model-3.safetensors").await.is_ok();
    eventually("the next agent has another session", readable).await;
    node.unpublish(&pod).await.unwrap();
    assert!(!node.inside(&pod.target).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_turns_out_wrong_is_an_error_for_readers_and_its_volume_abnormal() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let mut altered = shard(2);
    altered[5_000_000] ^= 1;
    let wrong = image_with([&shard(1), &altered, &shard(3)]);
    let (right, passing) = (image.clone(), gate.clone());
    let server = Scripted::start(move |request| {
        let (asked, given) = (right.layers[0].to_string(), wrong.layers[0].to_string());
        if !request.target.ends_with(&asked) {
            return right.answer(request);
        }
        let mut request = request.clone();
        request.target = request.target.replace(&asked, &given);
        let held = range_of(&request)
            .is_some_and(|(from, to)| from < SHARD_BYTES as u64 && OPEN_BYTES < to);
        if held { wrong.answer_gated(&request, &passing) } else { wrong.answer(&request) }
    })
    .await;
    let test = "a_layer_that_turns_out_wrong_is_an_error_for_readers_and_its_volume_abnormal";
    let Some(node) = node(test, &server) else { return };
    let pod = node.pod("first");
    stream(&node, &pod, &name(&server)).await.unwrap();
    assert!(read(&node, &pod, "model-2.safetensors").await.unwrap() == altered);
    gate.open();
    eventually("the volume is abnormal", async || condition(&node, &pod).await.is_some()).await;
    let why = condition(&node, &pod).await.unwrap();
    assert!(why.contains("the source altered them"), "{why}");
    let error = read(&node, &pod, "model-1.safetensors").await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    node.metric_becomes("carport_stream_failures_total{reason=\"mismatch\"}", 1.0).await;
    assert!(!stored(&node));
    node.unpublish(&pod).await.unwrap();
    let folder = node.socket().with_file_name("stream");
    eventually("the session ends", async || node.mounts_below(&folder).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_or_cannot_stream_is_as_in_mode_wait() {
    let (image, served) = (image(), image());
    // No ranges, so that nothing can be read before all of a layer is here.
    let server = Scripted::start(move |request| {
        if request.target.contains("absent") {
            return Answer::status(404);
        }
        let mut request = request.clone();
        request.headers.remove("range");
        served.answer(&request)
    })
    .await;
    let test = "what_is_refused_or_cannot_stream_is_as_in_mode_wait";
    let Some(node) = node(test, &server) else { return };
    let absent = format!("{}/models/absent:v1", server.host());
    let error = stream(&node, &node.pod("absent"), &absent).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::NotFound, "{error}");
    assert!(!node.inside(&node.pod("absent").target).exists());

    let pod = node.pod("whole");
    stream(&node, &pod, &name(&server)).await.unwrap();
    assert!(read(&node, &pod, "model-3.safetensors").await.unwrap() == shard(3));
    eventually("turned native", async || is_native(&node, &pod)).await;
    assert_eq!(node.json(&["ls"])[0]["digest"], image.digest().to_string());
    let filtered = [("image", &*name(&server)), ("mode", "stream"), ("include", "*.json")];
    let error = node.publish_with(&node.pod("filtered"), &filtered).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
}

/// As in the DaemonSet: mounts come by propagation, and nobody but the kubelet starts it.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_live_in_a_container_of_their_own_and_are_waited_for_where_it_is_started_again() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "sessions_live_in_a_container_of_their_own";
    let setup = Setup {
        config: Some("stream: {start: false}".into()),
        prepare: Some("mount --bind $RUN $RUN && mount --make-shared $RUN".into()),
        ..Setup::plain_http(&[&server.host()])
    };
    let Some(node) = set_up(test, setup) else { return };
    let container = node.copied_namespace();
    let fuse = || {
        let mut fuse = container.within(&node, binary());
        fuse.arg("fuse");
        Running::start(fuse)
    };
    let socket = node.socket().with_file_name("stream").join("fuse.sock");
    let listens = async || std::os::unix::net::UnixStream::connect(&socket).is_ok();
    let running = fuse();
    eventually("the container is up", listens).await;
    let pod = node.pod("first");
    stream(&node, &pod, &name(&server)).await.unwrap();
    assert!(read(&node, &pod, "model-3.safetensors").await.unwrap() == shard(3));
    assert_eq!(fs_type(&node, &pod).as_deref(), Some(FS_TYPE));

    drop(running);
    assert!(read(&node, &pod, "config.json").await.is_err());
    eventually("the volume is abnormal", async || condition(&node, &pod).await.is_some()).await;
    let _running = fuse();
    let readable = async || read(&node, &pod, "model-3.safetensors").await.is_ok();
    eventually("there is another session", readable).await;
    gate.open();
    eventually("turned native", async || is_native(&node, &pod)).await;
    assert!(read(&node, &pod, "model-1.safetensors").await.unwrap() == shard(1));
    node.unpublish(&pod).await.unwrap();
    let folder = node.socket().with_file_name("stream");
    eventually("the session ends", async || node.mounts_below(&folder).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_arrives_is_shown_to_nobody_who_may_not_pull_it() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let (served, passing) = (image.clone(), gate.clone());
    // user:password
    let right = "Basic dXNlcjpwYXNzd29yZA==";
    let server = Scripted::start(move |request| {
        if request.header("authorization") != Some(right) {
            return Answer::status(401).header("www-authenticate", "Basic realm=\"models\"");
        }
        let held = range_of(request)
            .is_some_and(|(from, to)| from < SHARD_BYTES as u64 && OPEN_BYTES < to);
        if held { served.answer_gated(request, &passing) } else { served.answer(request) }
    })
    .await;
    let test = "an_image_that_arrives_is_shown_to_nobody_who_may_not_pull_it";
    let Some(node) = node(test, &server) else { return };
    let digest = format!("{}/models/llama@{}", server.host(), image.digest());
    let publish = async |pod: &Pod, image: &str, auth: Option<&str>| {
        let mut request = publish_request(pod, &[("image", image), ("mode", "stream")]);
        if let Some(auth) = auth {
            let config = serde_json::json!({"auths": {server.host(): {"auth": auth}}});
            request.secrets.insert(".dockerconfigjson".into(), config.to_string());
        }
        node.csi().await.node_publish_volume(request).await
    };
    let [owner, other, third] = ["owner", "other", "third"].map(|uid| node.pod(uid));
    publish(&owner, &name(&server), Some("dXNlcjpwYXNzd29yZA==")).await.unwrap();
    assert!(read(&node, &owner, "model-3.safetensors").await.unwrap() == shard(3));
    // None, and wrong ones; by tag, and by the digest that is on its way.
    for (image, auth) in [(&name(&server), None), (&digest, None), (&digest, Some("dTpw"))] {
        let error = publish(&other, image, auth).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::PermissionDenied, "{error}");
        assert!(!node.inside(&other.target).exists());
    }
    publish(&third, &digest, Some("dXNlcjpwYXNzd29yZA==")).await.unwrap();
    assert!(read(&node, &third, "model-2.safetensors").await.unwrap() == shard(2));
    assert!(!node.log().contains("dXNlcjpwYXNzd29yZA"), "no credentials in the log");
    let config = node.socket().with_file_name("stream").join("config.yaml");
    let config = fs::read_to_string(node.inside(&config)).unwrap();
    assert!(!config.contains("dXNlcjpwYXNzd29yZA"), "no credentials on the disk");
}
