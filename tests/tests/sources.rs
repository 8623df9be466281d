//! The suite that every source passes, and what only a layout can do wrong.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use bytes::Bytes;
use carport_image::digest::Digest;
use carport_image::source::{ManifestName, PullSecret, SourceError};
use carport_tests::models::{Model, reference, sources};
use carport_tests::registry::{Registry, installed};
use carport_tests::sources::{Known, conforms, read};
use proptest::prelude::*;

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";

/// What is known of `model` as it was packed into its layout.
fn known(model: &Model, manifest: Digest) -> Known {
    let blob = |digest: &str| fs::read(model.layout().join(digest.replace(':', "/"))).unwrap();
    let blob = |digest: &str| blob(&format!("blobs/{digest}"));
    let json: serde_json::Value = serde_json::from_slice(&blob(&manifest.to_string())).unwrap();
    let layer = json["layers"][1]["digest"].as_str().unwrap();
    Known {
        tag: "v1".into(),
        manifest,
        media_type: OCI.into(),
        blob: layer.parse().unwrap(),
        content: Bytes::from(blob(layer)),
    }
}

async fn packed() -> (Model, Known) {
    let model = Model::new();
    let place = format!("oci:{}:v1", model.layout().display());
    let packed = model.pack(&place, &PullSecret::none(), &sources(&[])).await.unwrap();
    let known = known(&model, packed.digest);
    (model, known)
}

#[tokio::test]
async fn a_layout_conforms() {
    let (model, known) = packed().await;
    let place = reference(&format!("oci:{}:v1", model.layout().display()));
    let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
    conforms(source.as_ref(), &known).await;
}

/// Copies the packed layout into an archive with skopeo.
async fn archived(model: &Model, archive: &str) -> bool {
    if !installed("skopeo") {
        return false;
    }
    let copy = tokio::process::Command::new("skopeo")
        .args(["copy", "--quiet"])
        .arg(format!("oci:{}:v1", model.layout().display()))
        .arg(archive)
        .status();
    assert!(copy.await.unwrap().success());
    true
}

#[tokio::test]
async fn an_archive_of_a_layout_conforms() {
    let (model, known) = packed().await;
    let path = model.path().join("layout.tar");
    let tar = std::process::Command::new("tar")
        .arg("-cf")
        .arg(&path)
        .args(["-C", model.layout().to_str().unwrap(), "."])
        .status();
    assert!(tar.unwrap().success());
    let place = reference(&format!("oci-archive:{}:v1", path.display()));
    let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
    conforms(source.as_ref(), &known).await;
}

#[tokio::test]
async fn an_archive_of_docker_save_conforms() {
    let (model, known) = packed().await;
    let place = format!("docker-archive:{}", model.path().join("saved.tar").display());
    if !archived(&model, &format!("{place}:team/tiny:v1")).await {
        return;
    }
    let source = sources(&[]).open(&reference(&place), &PullSecret::none()).unwrap();
    // Its manifest is made here; the layers are those of the layout.
    let made = source.manifest(&ManifestName::Only).await.unwrap();
    let known = Known {
        tag: "docker.io/team/tiny:v1".into(),
        manifest: made.digest(),
        media_type: "application/vnd.docker.distribution.manifest.v2+json".into(),
        ..known
    };
    conforms(source.as_ref(), &known).await;
}

#[tokio::test]
async fn a_registry_conforms() {
    let Some(registry) = Registry::start() else { return };
    let (model, known) = packed().await;
    let sources = sources(&[registry.host()]);
    let place = format!("{}/team/tiny:v1", registry.host());
    let pushed = model.pack(&place, &PullSecret::none(), &sources).await.unwrap();
    assert_eq!(pushed.digest, known.manifest, "a layout and a push make the same image");
    let source = sources.open(&reference(&place), &PullSecret::none()).unwrap();
    conforms(source.as_ref(), &known).await;
}

#[tokio::test]
async fn a_docker_manifest_is_served_as_one() {
    let Some(registry) = Registry::start() else { return };
    if !installed("skopeo") {
        return;
    }
    let (model, _) = packed().await;
    let place = format!("{}/team/tiny:docker", registry.host());
    let copy = tokio::process::Command::new("skopeo")
        .args(["copy", "--quiet", "--dest-tls-verify=false", "--format", "v2s2"])
        .arg(format!("oci:{}:v1", model.layout().display()))
        .arg(format!("docker://{place}"))
        .status();
    assert!(copy.await.unwrap().success());
    let source = sources(&[registry.host()]).open(&reference(&place), &PullSecret::none()).unwrap();
    let raw = source.manifest(&ManifestName::Tag("docker".into())).await.unwrap();
    assert_eq!(raw.media_type, "application/vnd.docker.distribution.manifest.v2+json");
}

fn layout_error(place: &str) -> impl Future<Output = SourceError> {
    let place = reference(place);
    async move {
        let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
        source.resolve(&place.name()).await.unwrap_err()
    }
}

#[tokio::test]
async fn a_layout_without_a_tag_is_its_only_manifest() {
    let (model, known) = packed().await;
    let folder = format!("oci:{}", model.layout().display());
    let source = sources(&[]).open(&reference(&folder), &PullSecret::none()).unwrap();
    let only = source.manifest(&ManifestName::Only).await.unwrap();
    assert_eq!(only.digest(), known.manifest);
    // The same image under a second tag is still one manifest.
    model.pack(&format!("{folder}:v2"), &PullSecret::none(), &sources(&[])).await.unwrap();
    assert_eq!(source.resolve(&ManifestName::Only).await.unwrap(), known.manifest);
    model.write("config.json", b"changed");
    model.pack(&format!("{folder}:v3"), &PullSecret::none(), &sources(&[])).await.unwrap();
    let error = layout_error(&folder).await;
    assert!(matches!(error, SourceError::Invalid(_)));
    assert_eq!(
        error.to_string(),
        format!("manifest {folder}: the layout holds 2 manifests; it holds :v1, :v2, :v3")
    );
    let error = layout_error(&format!("{folder}:v9")).await;
    assert_eq!(
        error.to_string(),
        format!("manifest {folder}:v9: not there; it holds :v1, :v2, :v3")
    );
}

#[tokio::test]
async fn what_is_no_layout_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let place = format!("oci:{}", folder.path().display());
    let error = layout_error(&place).await;
    assert!(matches!(error, SourceError::NotFound(_)));
    assert!(error.to_string().contains("no OCI layout, it has no file oci-layout"), "{error}");
    let error = layout_error(&format!("{place}/none:v1")).await;
    assert!(matches!(error, SourceError::NotFound(_)), "{error:?}");

    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("oci-layout", r#"{"imageLayoutVersion":"2.0.0"}"#);
    let error = layout_error(&place).await;
    assert!(error.to_string().contains(r#"version "2.0.0" is not supported"#), "{error}");
    write("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#);
    let error = layout_error(&place).await;
    assert!(error.to_string().contains("index.json: not there"), "{error}");
    write("index.json", "{");
    assert!(matches!(layout_error(&place).await, SourceError::Invalid(_)));
    write("index.json", r#"{"manifests":[{"digest":"sha256:../../x"}]}"#);
    assert!(matches!(layout_error(&place).await, SourceError::Invalid(_)));
    write("index.json", r#"{"manifests":[]}"#);
    assert!(layout_error(&place).await.to_string().contains("holds no manifest"));
    let huge = fs::File::create(folder.path().join("index.json")).unwrap();
    huge.set_len(1 << 40).unwrap();
    let error = layout_error(&place).await;
    assert!(error.to_string().contains("are more than the 4194304 allowed"), "{error}");
}

#[tokio::test]
async fn no_file_outside_of_a_layout_is_read() {
    let (model, known) = packed().await;
    let place = reference(&format!("oci:{}:v1", model.layout().display()));
    let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
    let blob = model.layout().join(format!("blobs/sha256/{}", known.blob.hex()));
    let size = known.content.len() as u64;
    let outside = model.path().join("outside");
    fs::write(&outside, &known.content).unwrap();
    let replace = |target: &Path| {
        fs::remove_file(&blob).unwrap();
        symlink(target, &blob).unwrap();
    };
    replace(&outside);
    let error = source.blob(&known.blob, size, 0..size).await.err().unwrap();
    assert!(error.to_string().ends_with("leads out of the layout"), "{error}");
    replace(Path::new("../../../tiny-llama/outside"));
    assert!(source.blob(&known.blob, size, 0..size).await.is_err());
    replace(Path::new("/dev/zero"));
    assert!(source.blob(&known.blob, size, 0..size).await.is_err());
    // Within it, a symlink may lead.
    fs::rename(&outside, model.layout().join("inside")).unwrap();
    replace(Path::new("../../inside"));
    assert!(read(source.as_ref(), &known, 0..size).await.unwrap() == known.content);
    // A FIFO does not hold anybody up.
    fs::remove_file(&blob).unwrap();
    let made = std::process::Command::new("mkfifo").arg(&blob).status().unwrap();
    assert!(made.success());
    let error = source.blob(&known.blob, size, 0..size).await.err().unwrap();
    assert!(error.to_string().ends_with("no regular file"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_range_of_a_layouts_blob_is_those_bytes(a in 0usize..3_000_000, b in 0usize..3_000_000) {
        static SHARED: std::sync::OnceLock<(Model, Known)> = std::sync::OnceLock::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (model, known) = SHARED.get_or_init(|| runtime.block_on(packed()));
        let (start, end) = (a.min(b), a.max(b) + 1);
        let place = reference(&format!("oci:{}:v1", model.layout().display()));
        let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
        let bytes = runtime.block_on(read(source.as_ref(), known, start as u64..end as u64)).unwrap();
        prop_assert!(bytes == known.content[start..end]);
    }
}
