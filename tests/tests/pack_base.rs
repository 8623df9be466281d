//! `carport pack --base`: a model appended to an image that has a shell, as KServe's sidecar needs it.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use carport_image::Digest;
use carport_image::manifest::Platform;
use carport_image::pack::{PackError, PackOptions, Packed, pack};
use carport_image::source::Sources;
use carport_tests::layouts::{Layer, Layout};
use carport_tests::models::{Model, reference, sources};
use carport_tests::registry::{Registry, installed};
use carport_tests::scripted::{Answer, Scripted};
use serde_json::{Value, json};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// A layer of what `fill` puts into a folder.
fn layer(compressed: bool, fill: impl FnOnce(&Path)) -> Layer {
    let folder = tempfile::tempdir().unwrap();
    let (root, tar) = (folder.path().join("root"), folder.path().join("layer.tar"));
    fs::create_dir(&root).unwrap();
    fill(&root);
    let (root, path) = (root.to_str().unwrap(), tar.to_str().unwrap());
    run("tar", &["--owner=0", "--group=0", "-C", root, "-cf", path, "."]);
    let diff_id = Digest::of(&fs::read(&tar).unwrap()).to_string();
    if compressed {
        run("gzip", &["-n", path]);
    }
    let file = if compressed { tar.with_extension("tar.gz") } else { tar };
    let media_type = if compressed { GZIP } else { TAR }.to_owned();
    Layer {
        media_type,
        annotations: json!({"kept": "yes"}),
        bytes: fs::read(file).unwrap(),
        diff_id,
    }
}

/// A shell and the programs that KServe's sidecar runs, in two layers.
fn busybox() -> Option<Vec<Layer>> {
    let program = Path::new("/usr/bin/busybox");
    if !program.exists() {
        eprintln!("SKIPPED: no /usr/bin/busybox; install the package busybox-static");
        return None;
    }
    let programs = layer(true, |root| {
        fs::create_dir(root.join("bin")).unwrap();
        fs::copy(program, root.join("bin/busybox")).unwrap();
        fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["sh", "ln", "sleep", "cat"] {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
    });
    let more = layer(false, |root| {
        fs::create_dir(root.join("mnt")).unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        fs::write(root.join("etc/os-release"), "NAME=base\n").unwrap();
    });
    Some(vec![programs, more])
}

fn config(layers: &[Layer], architecture: &str) -> Value {
    json!({
        "architecture": architecture, "os": "linux", "created": "2024-01-02T03:04:05Z",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"], "User": "65534"},
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|l| &l.diff_id).collect::<Vec<_>>()},
        "history": layers.iter().map(|_| json!({"created_by": "base"})).collect::<Vec<_>>(),
        "moby.buildkit.unknown": "kept",
    })
}

fn here() -> String {
    Platform::default().architecture
}

async fn pack_on(
    base: &str,
    destination: &str,
    model: &Model,
    sources: &Sources,
) -> Result<Packed, PackError> {
    let options = PackOptions { base: Some(reference(base)), ..PackOptions::default() };
    pack(&model.path(), &reference(destination), options, sources).await
}

/// The manifest and the config of an image in an OCI layout.
fn documents(layout: &Path, manifest: &Digest) -> (Value, Value) {
    let read = |digest: &str| -> Value {
        let hex = digest.trim_start_matches("sha256:");
        serde_json::from_slice(&fs::read(layout.join("blobs/sha256").join(hex)).unwrap()).unwrap()
    };
    let manifest = read(&manifest.to_string());
    let config = read(manifest["config"]["digest"].as_str().unwrap());
    (manifest, config)
}

/// An image of the layout, unpacked by tar: layer over layer.
fn unpacked(layout: &Path, manifest: &Value, into: &Path) -> PathBuf {
    let root = into.join("rootfs");
    fs::create_dir(&root).unwrap();
    for layer in manifest["layers"].as_array().unwrap() {
        let hex = layer["digest"].as_str().unwrap().trim_start_matches("sha256:");
        let blob = layout.join("blobs/sha256").join(hex);
        run("tar", &["-xf", blob.to_str().unwrap(), "-C", root.to_str().unwrap()]);
    }
    root
}

#[tokio::test]
async fn a_model_on_a_base_has_its_shell_and_its_layers_untouched() {
    let Some(layers) = busybox() else { return };
    let mut bases = Layout::new();
    let base = bases.add("v1", "", (CONFIG, &config(&layers, &here())), &layers);
    let model = Model::new();
    let (destination, alone) = (
        format!("oci:{}:v1", model.layout().display()),
        format!("oci:{}:a", model.layout().display()),
    );
    let packed =
        pack_on(&bases.reference("v1"), &destination, &model, &sources(&[])).await.unwrap();
    let again = pack_on(&bases.reference("v1"), &destination, &model, &sources(&[])).await.unwrap();
    assert_eq!(packed, again, "same files, same digest");
    let without =
        pack(&model.path(), &reference(&alone), PackOptions::default(), &sources(&[])).await;
    let without = without.unwrap();
    assert_eq!(packed.layers, layers.len() + without.layers);

    let (manifest, config) = documents(&model.layout(), &packed.digest);
    let (base_manifest, base_config) = documents(bases.path(), &base);
    let own = documents(&model.layout(), &without.digest);
    let list = |value: &Value| value.as_array().unwrap().clone();
    let joined = |a: &Value, b: &Value| json!([list(a), list(b)].concat());
    assert_eq!(manifest["layers"], joined(&base_manifest["layers"], &own.0["layers"]));
    assert_eq!(config["history"], joined(&base_config["history"], &own.1["history"]));
    let diff_ids = |config: &Value| config["rootfs"]["diff_ids"].clone();
    assert_eq!(diff_ids(&config), joined(&diff_ids(&base_config), &diff_ids(&own.1)));
    for kept in ["architecture", "os", "created", "config", "moby.buildkit.unknown"] {
        assert_eq!(config[kept], base_config[kept], "{kept}");
    }
    let annotations = &manifest["annotations"];
    assert_eq!(annotations["org.opencontainers.image.base.digest"], base.to_string());
    assert_eq!(annotations["org.opencontainers.image.base.name"], bases.reference("v1"));

    // What KServe's sidecar runs, in the unpacked image.
    let out = tempfile::tempdir().unwrap();
    let root = unpacked(&model.layout(), &manifest, out.path());
    run("diff", &["-r", model.path().to_str().unwrap(), root.join("models").to_str().unwrap()]);
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: chroot needs root");
        return;
    }
    let sidecar = "ln -s /models /mnt/models && sleep 0 && cat /mnt/models/config.json";
    let said = run("chroot", &[root.to_str().unwrap(), "/bin/sh", "-c", sidecar]);
    assert_eq!(said, fs::read_to_string(model.path().join("config.json")).unwrap());
}

#[tokio::test]
async fn skopeo_checks_what_was_pushed_on_a_base_of_dockers_form() {
    let Some(layers) = busybox() else { return };
    let Some(registry) = Registry::start() else { return };
    if !installed("skopeo") {
        return;
    }
    let mut bases = Layout::new();
    bases.add("v1", "", (CONFIG, &config(&layers, &here())), &layers);
    let name = |repository: &str| format!("{}/{repository}:v1", registry.host());
    let base = format!("docker://{}", name("library/busybox"));
    let flags = ["copy", "--quiet", "--format", "v2s2", "--dest-tls-verify=false"];
    run("skopeo", &[&flags[..], &[&bases.reference("v1"), &base]].concat());

    let (model, sources) = (Model::new(), sources(&[registry.host()]));
    let packed =
        pack_on(&name("library/busybox"), &name("models/llama"), &model, &sources).await.unwrap();
    let pushed = format!("docker://{}", name("models/llama"));
    let raw = run("skopeo", &["inspect", "--raw", "--tls-verify=false", &pushed]);
    let manifest: Value = serde_json::from_str(&raw).unwrap();
    assert_eq!(manifest["mediaType"], "application/vnd.oci.image.manifest.v1+json");
    let kinds: Vec<_> =
        manifest["layers"].as_array().unwrap().iter().map(|l| l["mediaType"].clone()).collect();
    assert!(kinds.iter().all(|kind| kind == GZIP || kind == TAR), "{kinds:?}");
    assert_eq!(kinds[0], GZIP);
    // skopeo checks each digest, and each diff id where it compresses a layer.
    let copy = model.layout().with_file_name("copy");
    let copied = format!("oci:{}:v1", copy.display());
    let flags = ["copy", "--quiet", "--src-tls-verify=false"];
    run("skopeo", &[&flags[..], &["--preserve-digests", &pushed, &copied]].concat());
    let (manifest, _) = documents(&copy, &packed.digest);
    let out = tempfile::tempdir().unwrap();
    let root = unpacked(&copy, &manifest, out.path());
    run("diff", &["-r", model.path().to_str().unwrap(), root.join("models").to_str().unwrap()]);
    assert_eq!(fs::read_link(root.join("bin/sh")).unwrap(), Path::new("busybox"));
    let compressed = format!("oci:{}:v1", model.layout().with_file_name("zipped").display());
    run("skopeo", &[&flags[..], &["--dest-compress", &pushed, &compressed]].concat());
}

#[tokio::test]
async fn within_one_registry_the_bases_layers_are_mounted_and_not_copied() {
    let layers = [layer(true, |root| fs::write(root.join("sh"), "#!").unwrap())];
    let mut bases = Layout::new();
    let digest = bases.add("v1", "", (CONFIG, &config(&layers, &here())), &layers);
    let blobs = bases.path().join("blobs/sha256");
    let server = Scripted::start(move |request| {
        let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
        let name = path.rsplit('/').next().unwrap();
        match request.method.as_str() {
            "GET" => {
                let file = blobs.join(name.strip_prefix("sha256:").unwrap());
                let kind = "application/vnd.oci.image.manifest.v1+json";
                Answer::ok(fs::read(file).unwrap()).header("Content-Type", kind)
            }
            "HEAD" => Answer::status(404),
            "POST" if query.contains("mount=sha256") && query.contains("from=library%2Fbase") => {
                Answer::status(201)
            }
            "POST" => Answer::status(202).header("Location", "/v2/models/a/blobs/uploads/1"),
            "PUT" => Answer::status(201),
            other => panic!("{other}"),
        }
    });
    let server = server.await;
    let host = server.host();
    let (base, destination) =
        (format!("{host}/library/base@{digest}"), format!("{host}/models/a:v1"));
    pack_on(&base, &destination, &Model::new(), &sources(&[&host])).await.unwrap();
    let layer = layers[0].digest().to_string();
    let moved: Vec<_> = server
        .requests()
        .into_iter()
        .filter(|request| request.target.contains(&layer) || request.target.contains("mount="))
        .map(|request| request.method)
        .collect();
    assert_eq!(moved, ["HEAD", "POST"], "neither read nor uploaded");
}

#[tokio::test]
async fn of_an_index_the_platform_is_taken_that_the_image_is_for() {
    let layers = [layer(false, |root| fs::write(root.join("sh"), "#!").unwrap())];
    let other = if here() == "arm64" { "amd64" } else { "arm64" };
    let mut bases = Layout::new();
    let [ours, theirs] =
        [here().as_str(), other].map(|a| bases.add(a, "", (CONFIG, &config(&layers, a)), &layers));
    bases.add_index("both", &[(other, theirs), (&here(), ours)]);
    bases.add_index("foreign", &[(other, theirs)]);
    let model = Model::new();
    let destination = reference(&format!("oci:{}:v1", model.layout().display()));
    for (platform, chosen) in
        [(Platform::default(), ours), (format!("linux/{other}").parse().unwrap(), theirs)]
    {
        let base = Some(reference(&bases.reference("both")));
        let options = PackOptions { base, platform: platform.clone(), ..PackOptions::default() };
        let packed = pack(&model.path(), &destination, options, &sources(&[])).await.unwrap();
        let (manifest, config) = documents(&model.layout(), &packed.digest);
        assert_eq!(config["architecture"], platform.architecture.as_str());
        let from = &manifest["annotations"]["org.opencontainers.image.base.digest"];
        assert_eq!(*from, chosen.to_string());
    }
    let here = format!("linux/{}", here());
    for (tag, says) in [
        ("foreign", format!("no image for {here}; there is: linux/{other}")),
        (other, format!("it is for linux/{other}, and the image is to be for {here}")),
    ] {
        let place = format!("oci:{}:x", model.layout().display());
        let refused = pack_on(&bases.reference(tag), &place, &model, &sources(&[])).await;
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(&says) && error.contains("--platform"), "{error}");
    }
}

#[tokio::test]
async fn what_cannot_be_a_base_is_refused_and_nothing_gets_the_name() {
    let mut bases = Layout::new();
    let file = "application/vnd.oci.image.layer.v1.tar";
    let titled = json!({"org.opencontainers.image.title": "model.gguf"});
    let artifact = Layer::raw(file, titled, b"weights");
    let empty = ("application/vnd.oci.empty.v1+json", &json!({}));
    bases.add("artifact", "application/vnd.example.model", empty, &[artifact]);
    let mut foreign = layer(true, |root| fs::write(root.join("a"), "a").unwrap());
    foreign.media_type = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip".into();
    let foreign = [foreign];
    bases.add("foreign", "", (CONFIG, &config(&foreign, &here())), &foreign);
    let many: Vec<_> = (0..119)
        .map(|n| layer(false, |root| fs::write(root.join("a"), n.to_string()).unwrap()))
        .collect();
    bases.add("many", "", (CONFIG, &config(&many, &here())), &many);
    let model = Model::new();
    let place = format!("oci:{}:v1", model.layout().display());
    for (tag, says) in [
        ("absent", "absent"),
        ("artifact", "it is an artifact (files) and no image"),
        ("foreign", "may not be copied"),
        ("many", "it has 119 layers"),
    ] {
        let base = bases.reference(tag);
        let error = pack_on(&base, &place, &model, &sources(&[])).await.unwrap_err();
        assert!(matches!(error, PackError::Base { .. }), "{error:?}");
        let error = error.to_string();
        assert!(error.starts_with(&format!("base {base}: ")) && error.contains(says), "{error}");
        assert!(!model.layout().join("index.json").exists(), "{tag}");
    }
}
