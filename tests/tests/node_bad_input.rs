//! Bad input through both doors, the kubelet's and the command line's: one clear error that
//! names the object, the right code, nothing half-made behind, and an agent that serves on.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Output;

use bytes::Bytes;
use carport_image::Digest;
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::models::{Model, docker_config, secret, sources};
use carport_tests::node::{Node, Pod, Setup, publish_request};
use carport_tests::registry::{PASSWORD, Registry, USERNAME};
use carport_tests::scripted::{Answer, Request, Scripted};
use tar::EntryType;
use tonic::Code;

/// Two attempts: what does not come is given up within a second or two.
const QUICK: &str = "pull: {attempts: 2}\nregistries: {connectTimeout: 2s, readTimeout: 2s}\n";

type Script = Box<dyn Fn(&Request) -> Answer + Send + Sync>;

/// A registry with a script for each repository.
async fn registry(scripts: HashMap<&'static str, Script>) -> Scripted {
    Scripted::start(move |request| {
        let repository =
            request.target.strip_prefix("/v2/").and_then(|rest| rest.split('/').next());
        match repository.and_then(|name| scripts.get(name)) {
            Some(script) => script(request),
            None => Answer::status(404),
        }
    })
    .await
}

fn image(tar: Tar) -> Image {
    Image::of(&[tar.end()])
}

fn sound() -> Image {
    image(Tar::default().file("models/w.bin", &noise(1 << 20, 9)))
}

/// Serves `image`, but for what `other` answers.
fn but(image: Image, other: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> Script {
    Box::new(move |request| other(request).unwrap_or_else(|| image.answer(request)))
}

fn always(answer: Answer) -> Script {
    Box::new(move |_| answer.clone())
}

fn is_layer(image: &Image, request: &Request) -> bool {
    request.target.contains(&image.layers[0].to_string())
}

struct Case {
    reference: String,
    code: Code,
    parts: Vec<String>,
}

/// The one line of a command that could not.
fn told(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("carport: ")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    lines[0].to_owned()
}

fn is_uncertain(code: Code) -> bool {
    matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

/// Both doors refuse it as told, and leave the store as it was.
async fn refuse(node: &Node, number: usize, case: &Case) {
    let Case { reference, code, parts } = case;
    // Bytes on their way may be kept for the next try where there may be one.
    let listing = || -> Vec<String> {
        let lines = node.store_listing().into_iter();
        lines.filter(|line| !is_uncertain(*code) || !line.starts_with("ingest/")).collect()
    };
    let before = listing();
    let pod = node.pod(&format!("pod-{number}"));
    let status = node.publish(&pod, reference).await.unwrap_err();
    let message = status.message();
    // That a manifest was altered may be found by whoever chooses among mirrors, or after them.
    let by_mirrors = *code == Code::DataLoss && status.code() == Code::FailedPrecondition;
    let is_manifest = message.starts_with("manifest ");
    assert!(status.code() == *code || by_mirrors && is_manifest, "{reference}: {status:?}");
    let output = node.within(binary()).args(["pull", "--", reference]).output().unwrap();
    let usage = *code == Code::InvalidArgument;
    assert_eq!(output.status.code(), Some(if usage { 2 } else { 1 }), "{reference}: {output:?}");
    assert!(output.stdout.is_empty(), "{reference}: {output:?}");
    let line =
        if usage { String::from_utf8_lossy(&output.stderr).into_owned() } else { told(&output) };
    for part in parts {
        assert!(message.contains(part), "{reference}: {part:?} is not in {message:?}");
        assert!(line.contains(part), "{reference}: {part:?} is not in {line:?}");
    }
    assert!(!node.inside(&pod.target).exists(), "{reference}: something is at the target");
    // What was verified stays for the next try, until somebody collects it: bytes that no image
    // uses. Nothing else may.
    let after = listing();
    let new: Vec<&String> = after.iter().filter(|line| !before.contains(line)).collect();
    let is_verified = |line: &str| line.starts_with("objects/") || line.starts_with("layers/");
    assert!(new.iter().all(|line| is_verified(line)), "{reference}: {new:?}");
    if !new.is_empty() {
        node.json(&["gc"]);
        // A record of nothing but links holds no bytes; a collection may leave it.
        let without_records = |lines: Vec<String>| -> Vec<String> {
            lines.into_iter().filter(|line| !line.starts_with("layers/")).collect()
        };
        assert_eq!(without_records(listing()), without_records(before), "{reference}");
    }
    if is_uncertain(*code) {
        node.unpublish(&pod).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_refuses_or_fails() {
    let bad = |status: u16| always(Answer::status(status));
    let blob_absent = sound();
    let is_absent = blob_absent.clone();
    let server = registry(HashMap::from([
        ("login", bad(401)),
        ("denied", bad(403)),
        ("absent", bad(404)),
        ("teapot", bad(418)),
        ("busy", always(Answer::status(429).header("Retry-After", "0"))),
        ("broken", bad(500)),
        ("gateway", bad(502)),
        ("down", bad(503)),
        ("html", always(Answer::ok("<html>sign in</html>").header("Content-Type", "text/html"))),
        ("json", always(Answer::ok("{}").header("Content-Type", "application/json"))),
        ("nothing", always(Answer::ok(""))),
        ("cut", always(Answer::ok("{").declare(1000))),
        ("silent", always(Answer::ok("{").declare(1000).then_stall())),
        (
            "blob-absent",
            but(blob_absent.clone(), move |r| is_layer(&is_absent, r).then(|| Answer::status(404))),
        ),
        ("sound", but(sound(), |_| None)),
    ]))
    .await;
    // Nobody listens there any more.
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let host = server.host();
    let setup = Setup { config: Some(QUICK.into()), ..Setup::plain_http(&[&host, &gone]) };
    let Some(node) = Node::set_up(binary(), setup) else { return };

    let case = |repository: &str, code: Code, parts: &[&str]| Case {
        reference: format!("{host}/{repository}/model:v1"),
        code,
        // Each names the object and the host.
        parts: parts.iter().map(|part| (*part).to_owned()).chain([host.clone()]).collect(),
    };
    let digest = Digest::of(b"x");
    let mut cases = vec![
        case("login", Code::PermissionDenied, &["login/model:v1", "asks to authenticate"]),
        case("denied", Code::PermissionDenied, &["denied/model:v1", "403", "credentials"]),
        case("absent", Code::NotFound, &["absent/model:v1", "404", "check the name"]),
        case("teapot", Code::FailedPrecondition, &["teapot/model:v1", "418"]),
        case("busy", Code::Unavailable, &["busy/model:v1", "429"]),
        case("broken", Code::Unavailable, &["broken/model:v1", "500"]),
        case("gateway", Code::Unavailable, &["gateway/model:v1", "502"]),
        case("down", Code::Unavailable, &["down/model:v1", "503"]),
        case("cut", Code::Unavailable, &["cut/model:v1", "broke off"]),
        case("silent", Code::Unavailable, &["silent/model:v1", "sent nothing for too long"]),
        case("blob-absent", Code::NotFound, &[&blob_absent.layers[0].to_string(), "404"]),
    ];
    for repository in ["html", "json", "nothing"] {
        let mut bad = case(repository, Code::FailedPrecondition, &[]);
        bad.parts = vec!["manifest".into()];
        cases.push(bad);
    }
    cases.push(Case {
        reference: format!("{host}/sound/model@{digest}"),
        code: Code::DataLoss,
        parts: vec![digest.to_string(), "hash to".into()],
    });
    cases.push(Case {
        reference: format!("{gone}/team/model:v1"),
        code: Code::Unavailable,
        parts: vec![format!("{gone}/team/model:v1"), "connect to".into()],
    });
    for wrong in [
        "Team/Model:v1",
        "host/model:",
        "host/model@sha256:12",
        "http://host/model:v1",
        "-",
        "host/../model:v1",
    ] {
        cases.push(Case {
            reference: wrong.into(),
            code: Code::InvalidArgument,
            parts: vec![wrong.into()],
        });
    }
    for (number, case) in cases.iter().enumerate() {
        refuse(&node, number, case).await;
    }
    serves_on(&node, &format!("{host}/sound/model:v1")).await;
}

/// After all that was refused.
async fn serves_on(node: &Node, reference: &str) {
    let pod = node.pod("after");
    node.publish(&pod, reference).await.unwrap();
    assert!(node.inside(&pod.target).join("models/w.bin").exists());
    node.unpublish(&pod).await.unwrap();
    assert_eq!(node.page("/healthz").await.0, 200);
    assert_eq!(node.mounts_below(&node.kubelet()), [""; 0]);
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_are_cut_altered_or_hostile() {
    let outside = tempfile::tempdir().unwrap();
    let path = outside.path().to_str().unwrap();
    let hostile = [
        ("climbs", Tar::default().file("../../evil", b"x"), ".."),
        ("climbs-within", Tar::default().file("models/../../evil", b"x"), ".."),
        ("absolute", Tar::default().file(&format!("{path}/evil"), b"x"), "absolute"),
        (
            "through-link",
            Tar::default().symlink("way", path).file("way/evil", b"x"),
            "leads through the symlink",
        ),
        (
            "through-relative-link",
            Tar::default().symlink("way", "../../../../../../../tmp").file("way/evil", b"x"),
            "leads through the symlink",
        ),
        (
            "hard-link-out",
            Tar::default().entry("passwd", EntryType::Link, "../../../../etc/passwd", b""),
            "..",
        ),
        ("hard-link-away", Tar::default().entry("p", EntryType::Link, "/etc/passwd", b""), ""),
        (
            "link-through-link",
            Tar::default().symlink("way", "/etc").entry("p", EntryType::Link, "way/passwd", b""),
            "",
        ),
        ("device", Tar::default().entry("dev/sda", EntryType::Block, "", b""), "device"),
        ("null", Tar::default().entry("dev/null", EntryType::Char, "", b""), "device"),
        ("no-tar", Tar::default().file("ok", b"x").entry("", EntryType::Regular, "", b"x"), ""),
    ];
    let mut scripts: HashMap<&'static str, Script> = HashMap::new();
    let mut cases = Vec::new();
    for (name, tar, part) in hostile {
        let image = image(tar);
        cases.push((
            name,
            Code::FailedPrecondition,
            vec![image.layers[0].to_string(), part.to_owned()],
        ));
        scripts.insert(name, but(image, |_| None));
    }
    let not_a_tar = Image::of(&[Bytes::from(noise(64 * 1024, 5))]);
    cases.push(("noise", Code::FailedPrecondition, vec![not_a_tar.layers[0].to_string()]));
    scripts.insert("noise", but(not_a_tar, |_| None));

    // The tar ends in the middle of a file: as its digest says, and still no image.
    let whole = Tar::default().file("models/w.bin", &noise(1 << 20, 3)).end();
    let half = Image::of(&[whole.slice(..whole.len() / 2)]);
    cases.push(("half-a-tar", Code::FailedPrecondition, vec![half.layers[0].to_string()]));
    scripts.insert("half-a-tar", but(half, |_| None));

    // The connection breaks off, always at the same byte.
    let cut = sound();
    let asked = cut.clone();
    cases.push(("cut", Code::Unavailable, vec![cut.layers[0].to_string(), "broke off".into()]));
    scripts.insert(
        "cut",
        but(cut.clone(), move |request| {
            let whole = is_layer(&asked, request).then(|| asked.answer(request))?;
            // What came once is not asked for again.
            let from = request.header("range").map_or(0, |range| {
                range.trim_start_matches("bytes=").split('-').next().unwrap().parse().unwrap()
            });
            Some(whole.cut(1000_usize.saturating_sub(from)))
        }),
    );
    // The blob is shorter, or longer, than the manifest says.
    for (name, length) in [("short", 1000_usize), ("long", 3 << 20)] {
        let other = sound();
        let asked = other.clone();
        cases.push((
            name,
            Code::FailedPrecondition,
            vec![other.layers[0].to_string(), length.to_string()],
        ));
        scripts.insert(
            name,
            but(other.clone(), move |request| {
                is_layer(&asked, request).then(|| Answer::ok(vec![0; length]))
            }),
        );
    }
    // As long as it should be, with other bytes.
    let altered = sound();
    let asked = altered.clone();
    cases.push(("altered", Code::DataLoss, vec![altered.layers[0].to_string(), "altered".into()]));
    let mut bytes = Tar::default().file("models/w.bin", &noise(1 << 20, 9)).end().to_vec();
    bytes[600_000] ^= 1;
    scripts.insert(
        "altered",
        but(altered.clone(), move |request| {
            is_layer(&asked, request).then(|| Answer::ok(bytes.clone()))
        }),
    );
    scripts.insert("sound", but(sound(), |_| None));

    let server = registry(scripts).await;
    let host = server.host();
    let setup = Setup { config: Some(QUICK.into()), ..Setup::plain_http(&[&host]) };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    for (number, (repository, code, parts)) in cases.into_iter().enumerate() {
        let reference = format!("{host}/{repository}/model:v1");
        refuse(&node, number, &Case { reference, code, parts }).await;
    }
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "nothing got out");
    assert!(!Path::new("/tmp/evil").exists());
    // What was cut is the same layer as what is sound: the next try goes on, or begins again.
    serves_on(&node, &format!("{host}/sound/model:v1")).await;
    node.json(&["rm", &format!("{host}/sound/model:v1")]);
    node.json(&["gc"]);
    let bytes = |line: &String| !line.ends_with('/') && !line.starts_with("layers/");
    let left: Vec<String> = node.store_listing().into_iter().filter(bytes).collect();
    assert_eq!(left, ["admission 0 1", "format 16 1", "lock 0 1"], "nothing is left of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk() {
    let large = Image::of(&[Tar::default().file("models/w.bin", &noise(64 << 20, 1)).end()]);
    let small = Image::of(&[Tar::default().file("models/w.bin", &noise(8 << 20, 2)).end()]);
    let crumbs = (0..6000)
        .fold(Tar::default(), |tar, n| tar.file(&format!("models/{n}"), format!("{n}").as_bytes()));
    let crumbs = image(crumbs);
    let server = registry(HashMap::from([
        ("large", but(large.clone(), |_| None)),
        ("small", but(small, |_| None)),
        ("crumbs", but(crumbs.clone(), |_| None)),
        ("sound", but(sound(), |_| None)),
    ]))
    .await;
    let host = server.host();
    let setup = Setup {
        config: Some(QUICK.into()),
        // A disk of its own: real ext4, with few inodes.
        prepare: Some(
            "truncate -s 48M $ROOT.img; mkfs.ext4 -q -N 4096 -O ^has_journal $ROOT.img
             mount -o loop $ROOT.img $ROOT"
                .into(),
        ),
        ..Setup::plain_http(&[&host])
    };
    let Some(mut node) = Node::set_up(binary(), setup) else { return };
    let name = |repository: &str| format!("{host}/{repository}/model:v1");
    let pod = node.pod("running");
    node.publish(&pod, &name("small")).await.unwrap();

    // Too large for the disk, and too many files for it.
    // The first is known before it is fetched, the second is not.
    let beforehand = ["needs at least", "free of a file system of", "is mounted"];
    for (number, (repository, image, parts)) in
        [("large", &large, &beforehand[..]), ("crumbs", &crumbs, &["no space left", "carport gc"])]
            .iter()
            .enumerate()
    {
        let case = Case {
            reference: name(repository),
            code: Code::ResourceExhausted,
            parts: parts.iter().map(|part| (*part).to_owned()).collect(),
        };
        refuse(&node, number, &case).await;
        let ingest = node.inside(&node.root()).join("ingest");
        assert_eq!(
            fs::read_dir(ingest).unwrap().count(),
            0,
            "{repository}: the room is given back"
        );
        assert!(!image.layers.is_empty());
    }
    let w = node.inside(&pod.target).join("models/w.bin");
    assert!(fs::read(&w).unwrap() == noise(8 << 20, 2), "who was there reads on");

    // Not a byte is left: what is here can still be taken away and looked at.
    let fill = "cat /dev/zero > $ROOT/lost+found/fill 2>/dev/null || true; sync $ROOT";
    assert!(node.within("sh").args(["-c", fill]).status().unwrap().success());
    let status = node.publish(&node.pod("second"), &name("small")).await;
    if let Err(status) = status {
        assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
        assert!(status.message().contains("no space left"), "{}", status.message());
        assert!(!node.inside(&node.pod("second").target).exists());
    }
    node.unpublish(&node.pod("second")).await.unwrap();
    assert_eq!(node.json(&["ls"]).as_array().unwrap().len(), 1);
    node.kill_agent();
    node.start_agent();
    let status = node.json(&["status"]);
    assert_eq!(status["state"], "degraded");
    assert_eq!(status["reasons"][0]["code"], "DISK_PRESSURE");
    let located = node.json(&["locate", &name("small")]);
    assert_eq!(located[0]["missing_bytes"], 0);
    assert_eq!(located[0]["fits"], true);
    node.unpublish(&pod).await.unwrap();
    node.json(&["rm", &name("small")]);
    assert!(node.json(&["gc"])["bytes"].as_u64().unwrap() >= 8 << 20);
    serves_on(&node, &name("sound")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_or_configuration_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let run = |arguments: &[&str]| {
        // What is taken after all would be served for ever.
        std::process::Command::new("timeout")
            .arg("30")
            .arg(binary())
            .args(arguments)
            .env("CARPORT_ROOT", at("store"))
            .env("CARPORT_SOCKET", at("run/carport.sock"))
            .env("CARPORT_KUBELET_DIR", at("kubelet"))
            .env("CARPORT_HTTP_LISTEN", "127.0.0.1:0")
            .output()
            .unwrap()
    };
    let config = at("config.yaml");
    let config_text = config.to_str().unwrap();
    for (content, part) in [
        ("pull: {attempts: 0}\n", "pull.attempts"),
        ("pull:\n  concurrentLayer: 3\n", "config.yaml:2:3"),
        ("registries: {plainHttp: [\"http://x\"]}\n", "plainHttp"),
        ("root: relative\n", "root"),
        ("nodeName: [1]\n", "nodeName"),
        ("pull: {windowBytes: 1}\n", "windowBytes"),
        ("http: {listen: nowhere}\n", "http.listen"),
        ("csi: {driverName: \"../x\"}\n", "driverName"),
        ("api: {socket: /a/../b}\n", "socket"),
        ("log: {level: loud}\n", "log.level"),
        ("log: {level: \"info,carport_image\"}\n", "log.level"),
        ("a: &a [*a]\n", "config.yaml"),
        ("\u{0}\u{1}", "config.yaml"),
    ] {
        fs::write(&config, content).unwrap();
        for command in [&["agent"][..], &["pull", "127.0.0.1:1/a:b"], &["ls"]] {
            let mut arguments = command.to_vec();
            arguments.extend(["--config", config_text]);
            let output = run(&arguments);
            assert_eq!(output.status.code(), Some(1), "{content:?} {command:?}: {output:?}");
            let line = told(&output);
            assert!(line.contains("config.yaml") && line.contains(part), "{content:?}: {line}");
        }
    }
    for (path, part) in [("absent.yaml", "--config"), (".", "not a regular file")] {
        let path = at(path);
        let output = run(&["agent", "--config", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        assert!(told(&output).contains(part) && told(&output).contains(path.to_str().unwrap()));
    }
    assert!(!at("store").exists() && !at("run").exists() && !at("kubelet").exists());

    // A root that is something else, or nothing that can be made.
    fs::write(at("file"), "x").unwrap();
    fs::create_dir(at("home")).unwrap();
    fs::write(at("home/thesis.txt"), "x").unwrap();
    for (root, part) in [("file", "file"), ("home", "thesis.txt"), ("file/store", "file/store")] {
        let root = at(root);
        let root = root.to_str().unwrap();
        for command in [&["agent"][..], &["pull", "127.0.0.1:1/a:b"], &["ls"]] {
            let mut arguments = command.to_vec();
            arguments.extend(["--root", root]);
            let output = run(&arguments);
            assert_eq!(output.status.code(), Some(1), "{root} {command:?}: {output:?}");
            assert!(told(&output).contains(part), "{root}: {}", told(&output));
        }
    }
    assert_eq!(fs::read_dir(at("home")).unwrap().count(), 1);
    assert!(!at("run/carport.sock").exists() && !at("kubelet/plugins_registry/x").exists());
}

/// An ordinary user meets a configuration that only root may read.
#[tokio::test(flavor = "multi_thread")]
async fn an_unreadable_configuration() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: becoming another user needs root");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.path().join("config.yaml");
    fs::write(&config, "").unwrap();
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600)).unwrap();
    // The binary may lie where nobody else may go.
    let copy = folder.path().join("carport");
    fs::copy(binary(), &copy).unwrap();
    let output = std::process::Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&copy)
        .args(["agent", "--config"])
        .arg(&config)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let line = told(&output);
    assert!(line.contains(config.to_str().unwrap()), "{line}");
    assert!(line.to_lowercase().contains("permission denied"), "{line}");
    assert!(line.contains("--config"), "{line}");
}

/// What the kubelet hands over in confidence: the pull secret, and the pod's tokens.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_nowhere_to_be_read() {
    const WRONG: &str = "hunter2-wrong-password";
    const TOKEN: &str = "eyJhbGciOi.service-account-token";
    let Some(registry) = Registry::start_with_login() else { return };
    // One that repeats what it was sent, as debugging proxies do.
    let echo = Scripted::start(|request| {
        let sent = request.header("authorization").unwrap_or("nothing").to_owned();
        let body = serde_json::json!({"errors": [{"code": "DENIED", "message": sent}]});
        Answer::status(401)
            .header("WWW-Authenticate", "Basic realm=\"echo\"")
            .body(body.to_string())
    })
    .await;
    let (host, echo) = (registry.host().to_owned(), echo.host());
    let image = format!("{host}/team/model:v1");
    let packing = secret(&host, USERNAME, PASSWORD);
    Model::new().pack(&image, &packing, &sources(&[&host])).await.unwrap();
    let setup = Setup {
        log_level: Some("trace".into()),
        config: Some(QUICK.into()),
        ..Setup::plain_http(&[&host, &echo])
    };
    let Some(node) = Node::set_up(binary(), setup) else { return };

    let publish = async |pod: &Pod, image: &str, secret: &str| {
        let tokens = format!(r#"{{"":{{"token":"{TOKEN}"}}}}"#);
        let attributes =
            [("image", image), ("csi.storage.k8s.io/serviceAccount.tokens", tokens.as_str())];
        let mut request = publish_request(pod, &attributes);
        request.secrets.insert(".dockerconfigjson".into(), secret.into());
        node.csi().await.node_publish_volume(request).await
    };
    let mut said = Vec::new();
    for (place, image) in [(&host, image.clone()), (&echo, format!("{echo}/team/model:v1"))] {
        let refused = node.pod("refused");
        let wrong = docker_config(place, USERNAME, WRONG);
        let status = publish(&refused, &image, &wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{}", status.message());
        assert!(status.message().contains("pull secret"), "{}", status.message());
        assert!(!node.inside(&refused.target).exists());
        said.push(format!("{status:?}"));
    }
    for not_a_config in [format!("{{\"auths\": \"{WRONG}\"}}"), WRONG.to_owned()] {
        let status = publish(&node.pod("refused"), &image, &not_a_config).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{}", status.message());
        said.push(format!("{status:?}"));
    }
    let pod = node.pod("pod-a");
    publish(&pod, &image, &docker_config(&host, USERNAME, PASSWORD)).await.unwrap();
    assert!(node.inside(&pod.target).join("models/config.json").exists());
    said.push(node.json(&["status"]).to_string());
    said.push(node.page("/metrics").await.1);
    let output = node.carport().args(["ls", "--log-level", "trace"]).output().unwrap();
    said.push(format!("{output:?}"));
    let encoded = |password| {
        let text = docker_config("x", USERNAME, password);
        let config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config["auths"]["x"]["auth"].as_str().unwrap().to_owned()
    };
    let records = walkdir::WalkDir::new(node.root()).into_iter().flatten();
    for entry in records.filter(|entry| entry.path().extension().is_some_and(|e| e == "json")) {
        said.push(fs::read_to_string(entry.path()).unwrap());
    }
    node.unpublish(&pod).await.unwrap();
    node.metric_becomes("carport_volumes", 0.0).await;
    said.push(node.log());
    assert!(node.log().contains("TRACE"), "the log is as chatty as can be");
    for secret in [WRONG, PASSWORD, TOKEN, &encoded(WRONG), &encoded(PASSWORD)] {
        for text in &said {
            if let Some(at) = text.find(secret) {
                let start = text[..at].rfind('\n').map_or(0, |line| line + 1);
                let line: String =
                    text[start..].lines().next().unwrap().chars().take(600).collect();
                panic!("{secret} stands in {line}");
            }
        }
    }
}
