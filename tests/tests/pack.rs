//! Packing as other programs see it, and pushing.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use carport_image::pack::{PackError, PackOptions, PackPhase, pack};
use carport_image::source::{PullSecret, SourceError};
use carport_tests::models::{Model, reference, sources};
use carport_tests::registry::{Registry, installed};
use carport_tests::scripted::{Answer, Scripted};
use tokio::process::Command;

async fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().await.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn skopeo_reads_and_copies_what_was_packed() {
    let Some(registry) = Registry::start() else { return };
    if !installed("skopeo") {
        return;
    }
    let model = Model::new();
    let sources = sources(&[registry.host()]);
    let layout = format!("oci:{}:v1", model.layout().display());
    let packed = model.pack(&layout, &PullSecret::none(), &sources).await.unwrap();
    let place = format!("{}/team/pushed:v1", registry.host());
    let pushed = model.pack(&place, &PullSecret::none(), &sources).await.unwrap();
    assert_eq!(pushed, packed);
    let remote = format!("docker://{place}");
    for arguments in [
        &["inspect", "--format", "{{.Digest}} {{.Architecture}} {{.Os}}", &layout][..],
        &[
            "inspect",
            "--tls-verify=false",
            "--format",
            "{{.Digest}} {{.Architecture}} {{.Os}}",
            &remote,
        ],
    ] {
        let seen = run("skopeo", arguments).await;
        let architecture = carport_image::manifest::Platform::default().architecture;
        assert_eq!(seen.trim(), format!("{} {architecture} linux", packed.digest));
    }
    // skopeo checks every blob's digest on the way, and each diff id where it changes the layers.
    let copy = model.layout().with_file_name("copy");
    let copied = format!("oci:{}:v1", copy.display());
    let arguments =
        ["copy", "--quiet", "--src-tls-verify=false", "--dest-compress", &remote, &copied];
    run("skopeo", &arguments).await;
    let copied = sources.open(&reference(&copied), &PullSecret::none()).unwrap();
    copied.manifest(&reference("oci:x:v1").name()).await.unwrap();
}

#[tokio::test]
async fn tar_unpacks_what_was_packed() {
    let model = Model::new();
    let layout = format!("oci:{}:v1", model.layout().display());
    model.pack(&layout, &PullSecret::none(), &sources(&[])).await.unwrap();
    let out = model.layout().with_file_name("out");
    fs::create_dir(&out).unwrap();
    for blob in fs::read_dir(model.layout().join("blobs/sha256")).unwrap() {
        let blob = blob.unwrap().path();
        if fs::read(&blob).unwrap().starts_with(b"models/") {
            let (blob, out) = (blob.to_str().unwrap(), out.to_str().unwrap());
            run("tar", &["-xf", blob, "-C", out]).await;
        }
    }
    let (original, unpacked) = (model.path(), out.join("models"));
    run("diff", &["-r", original.to_str().unwrap(), unpacked.to_str().unwrap()]).await;
}

#[tokio::test]
async fn a_push_skips_what_the_registry_has() {
    let server = Scripted::start(|request| match request.method.as_str() {
        "HEAD" => Answer::status(200),
        "PUT" => Answer::status(201),
        _ => Answer::status(500),
    });
    let server = server.await;
    let host = server.host();
    let model = Model::new();
    let place = format!("{host}/m:v1");
    let packed = model.pack(&place, &PullSecret::none(), &sources(&[&host])).await.unwrap();
    let methods: Vec<_> =
        server.requests().iter().map(|r| format!("{} {}", r.method, r.target)).collect();
    assert_eq!(methods.len(), packed.layers + 2);
    assert!(
        methods[..3].iter().all(|line| line.starts_with("HEAD /v2/m/blobs/sha256:")),
        "{methods:?}"
    );
    assert_eq!(methods[3], "PUT /v2/m/manifests/v1");
}

#[tokio::test]
async fn a_push_asks_the_storage_that_a_registry_sends_it_to() {
    let storage = Scripted::start(|_| Answer::status(200)).await;
    let target = format!("http://{}/bucket", storage.host());
    let server = Scripted::start(move |request| match request.method.as_str() {
        "HEAD" => Answer::status(307).header("Location", &target),
        "PUT" => Answer::status(201),
        _ => Answer::status(500),
    });
    let server = server.await;
    let model = Model::new();
    let place = format!("{}/m:v1", server.host());
    model.pack(&place, &PullSecret::none(), &sources(&["127.0.0.1"])).await.unwrap();
    assert_eq!(storage.requests().len(), 3);
    assert!(storage.requests().iter().all(|request| request.method == "HEAD"));
}

#[tokio::test]
async fn an_upload_elsewhere_is_shown_no_credentials() {
    let storage = Scripted::start(|_| Answer::status(201)).await;
    let target = format!("http://{}/upload?sig=1", storage.host());
    let server = Scripted::start(move |request| {
        match (request.header("authorization"), request.method.as_str()) {
            (None, _) => Answer::status(401).header("WWW-Authenticate", r#"Basic realm="x""#),
            (_, "HEAD") => Answer::status(404),
            (_, "POST") => Answer::status(202).header("Location", &target),
            _ => Answer::status(201),
        }
    });
    let server = server.await;
    let place = format!("{}/m:v1", server.host());
    let secret = carport_tests::models::secret(&server.host(), "me", "right");
    let model = Model::new();
    model.pack(&place, &secret, &sources(&["127.0.0.1"])).await.unwrap();
    let uploads = storage.requests();
    assert_eq!(uploads.len(), 3);
    for upload in &uploads {
        assert_eq!(upload.header("authorization"), None);
        assert!(upload.target.starts_with("/upload?sig=1&digest=sha256%3A"), "{}", upload.target);
        let digest = carport_image::digest::Digest::of(&upload.body);
        assert!(upload.target.ends_with(&digest.hex()));
    }
    // To a host that is not listed, nothing is sent.
    let sources = sources(&[&server.host()]);
    let error = model.pack(&place, &secret, &sources).await.unwrap_err().to_string();
    assert!(error.contains("is not spoken to over TLS"), "{error}");
    assert_eq!(storage.requests().len(), 3);
}

#[tokio::test]
async fn a_file_that_changes_before_its_upload_fails_the_push_and_no_tag_appears() {
    let Some(registry) = Registry::start() else { return };
    let model = Model::new();
    let weights = model.path().join("model.safetensors");
    let (changed, once) = (weights.clone(), AtomicBool::new(false));
    let options = PackOptions {
        progress: Some(Arc::new(move |progress| {
            // The first layer, of the small files, is on its way.
            if progress.phase == PackPhase::Writing && !once.swap(true, Ordering::SeqCst) {
                fs::write(&changed, vec![0; carport_tests::models::WEIGHTS_BYTES]).unwrap();
            }
        })),
        ..PackOptions::default()
    };
    let place = reference(&format!("{}/m:v1", registry.host()));
    let sources = sources(&[registry.host()]);
    let error = pack(&model.path(), &place, options, &sources).await.unwrap_err();
    assert!(matches!(&error, PackError::Changed(path) if *path == weights), "{error}");
    let source = sources.open(&place, &PullSecret::none()).unwrap();
    let error = source.resolve(&place.name()).await.unwrap_err();
    assert!(matches!(error, SourceError::NotFound(_)), "{error:?}");
}

#[tokio::test]
async fn a_push_that_is_refused_says_so() {
    let server = Scripted::start(|request| match request.method.as_str() {
        "HEAD" => Answer::status(404),
        "POST" => Answer::status(202).header("Location", "/v2/m/blobs/uploads/1?_state=x"),
        _ => Answer::status(413).body(r#"{"errors":[{"code":"QUOTA","message":"full"}]}"#),
    });
    let server = server.await;
    let host = server.host();
    let place = format!("{host}/m:v1");
    let error = Model::new().pack(&place, &PullSecret::none(), &sources(&[&host])).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("QUOTA: full") && error.contains("blob sha256:"), "{error}");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = closed.local_addr().unwrap().to_string();
    drop(closed);
    let place = format!("{host}/m:v1");
    let error = Model::new().pack(&place, &PullSecret::none(), &sources(&[&host])).await;
    let error = error.unwrap_err();
    assert!(matches!(error, PackError::Source(SourceError::Unavailable(_))), "{error}");
}
