use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Mutex;

use tempfile::TempDir;

use super::*;
use crate::source::RegistryOptions;
use crate::source::layout::blob_path;

/// A folder with files in it, under a name that is always the same.
struct Model {
    parent: TempDir,
}

impl Model {
    fn new(files: &[(&str, &[u8])]) -> Self {
        let model = Self { parent: tempfile::tempdir().unwrap() };
        fs::create_dir(model.path()).unwrap();
        for (name, content) in files {
            let path = model.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        model
    }

    fn path(&self) -> PathBuf {
        self.parent.path().join("llama")
    }

    fn layout(&self) -> PathBuf {
        self.parent.path().join("layout")
    }

    async fn pack(&self, tag: &str) -> Result<Packed, PackError> {
        self.pack_with(tag, PackOptions::default()).await
    }

    async fn pack_with(&self, tag: &str, options: PackOptions) -> Result<Packed, PackError> {
        let reference = format!("oci:{}{tag}", self.layout().display()).parse().unwrap();
        let sources = Sources::new(RegistryOptions::default()).unwrap();
        pack(&self.path(), &reference, options, &sources).await
    }

    fn blob(&self, digest: &str) -> Vec<u8> {
        fs::read(self.layout().join(blob_path(&digest.parse().unwrap()))).unwrap()
    }

    fn json(&self, digest: &str) -> serde_json::Value {
        serde_json::from_slice(&self.blob(digest)).unwrap()
    }

    fn index(&self) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.layout().join("index.json")).unwrap()).unwrap()
    }
}

const BIG: usize = 3 * 1024 * 1024 / 2;

/// Path → (mode, content; nothing for a folder), and the layers' paths in order.
type Entries = BTreeMap<String, (u32, Option<Vec<u8>>)>;

fn entries(tar: &[u8]) -> (Vec<String>, Entries) {
    let mut archive = ::tar::Archive::new(tar);
    let (mut order, mut entries) = (Vec::new(), Entries::new());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let header = entry.header();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
        assert_eq!(header.mtime().unwrap(), 0);
        let mode = header.mode().unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let content = header.entry_type().is_file().then(|| {
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            content
        });
        order.push(path.clone());
        entries.insert(path, (mode, content));
    }
    (order, entries)
}

#[tokio::test]
async fn a_folder_becomes_a_modelcar_of_one_layer_a_large_file() {
    let weights = vec![7; BIG];
    let long = format!("{}/tokenizer.json", "long-name".repeat(20));
    let model = Model::new(&[
        ("model.safetensors", &weights),
        ("config.json", b"{}"),
        ("run.sh", b"#!/bin/sh"),
        (&long, b"tokens"),
    ]);
    fs::set_permissions(model.path().join("run.sh"), fs::Permissions::from_mode(0o711)).unwrap();
    let packed = model.pack(":v1").await.unwrap();

    let index = model.index();
    let entry = &index["manifests"][0];
    assert_eq!(entry["digest"], packed.digest.to_string());
    assert_eq!(entry["annotations"]["org.opencontainers.image.ref.name"], "v1");
    let manifest = model.json(&packed.digest.to_string());
    assert_eq!(manifest["annotations"]["org.opencontainers.image.title"], "llama");
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!((layers.len(), packed.layers), (2, 2));
    let sizes: u64 = layers.iter().map(|layer| layer["size"].as_u64().unwrap()).sum();
    assert_eq!(sizes, packed.bytes);

    let config = model.json(manifest["config"]["digest"].as_str().unwrap());
    let mut trees = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let digest = layer["digest"].as_str().unwrap();
        let bytes = model.blob(digest);
        assert_eq!(Digest::of(&bytes).to_string(), digest);
        assert_eq!(bytes.len() as u64, layer["size"].as_u64().unwrap());
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(config["rootfs"]["diff_ids"][number], digest);
        trees.push(entries(&bytes));
    }
    let (order, small) = &trees[0];
    let folder = format!("models/{}/", "long-name".repeat(20));
    let file = format!("models/{long}");
    assert_eq!(order, &["models/", "models/config.json", &folder, &file, "models/run.sh"]);
    assert_eq!(small["models/"], (0o755, None));
    assert_eq!(small["models/config.json"], (0o444, Some(b"{}".to_vec())));
    assert_eq!(small["models/run.sh"], (0o555, Some(b"#!/bin/sh".to_vec())));
    assert_eq!(small[&file], (0o444, Some(b"tokens".to_vec())));
    let (order, large) = &trees[1];
    assert_eq!(order, &["models/", "models/model.safetensors"]);
    assert_eq!(large["models/model.safetensors"], (0o444, Some(weights)));
}

#[tokio::test]
async fn the_documents_are_what_the_specification_says() {
    let model = Model::new(&[("config.json", b"{}")]);
    let packed = model.pack_with(
        ":v1",
        PackOptions {
            platform: Platform { os: "linux".into(), architecture: "arm64".into() },
            title: Some("Llama".into()),
            ..PackOptions::default()
        },
    );
    let digest = packed.await.unwrap().digest.to_string();
    let manifest: oci_spec::image::ImageManifest =
        serde_json::from_slice(&model.blob(&digest)).unwrap();
    assert_eq!(manifest.schema_version(), 2);
    assert_eq!(manifest.annotations().as_ref().unwrap()["org.opencontainers.image.title"], "Llama");
    let config: oci_spec::image::ImageConfiguration =
        serde_json::from_slice(&model.blob(manifest.config().digest().as_ref())).unwrap();
    assert_eq!(config.architecture().to_string(), "arm64");
    assert_eq!(config.rootfs().diff_ids().len(), 1);
    let history = config.history().as_ref().unwrap();
    assert_eq!(history[0].created_by().as_deref(), Some("carport pack: models/config.json"));
    assert_eq!(model.index()["manifests"][0]["platform"]["architecture"], "arm64");
}

#[tokio::test]
async fn the_same_files_have_the_same_digest_whatever_their_times_and_order() {
    let files: [(&str, &[u8]); 3] = [("b", b"1"), ("a/c", b"2"), ("a-b", b"3")];
    let first = Model::new(&files);
    let second = Model::new(&[files[2], files[1], files[0]]);
    fs::set_permissions(second.path().join("b"), fs::Permissions::from_mode(0o640)).unwrap();
    let old = fs::File::open(second.path().join("b")).unwrap();
    old.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let amd64 = || PackOptions {
        platform: Platform { os: "linux".into(), architecture: "amd64".into() },
        ..PackOptions::default()
    };
    let first = first.pack_with(":v1", amd64()).await.unwrap();
    let second = second.pack_with("", amd64()).await.unwrap();
    assert_eq!(first, second);
    // Changes when the format does, which must be on purpose: whoever packed before has
    // images whose layers would no longer be shared.
    assert_eq!(
        first.digest.to_string(),
        "sha256:c18950b9285dda0059cdab6e7af746e7e396bbe7c41a8d6ddaffa73382b40a97"
    );
}

#[tokio::test]
async fn a_layout_keeps_its_other_images_and_a_tag_moves() {
    let model = Model::new(&[("config.json", b"1")]);
    let one = model.pack(":one").await.unwrap().digest.to_string();
    let two = model.pack(":two").await.unwrap().digest.to_string();
    assert_eq!(one, two);
    fs::write(model.path().join("config.json"), b"2").unwrap();
    let moved = model.pack(":two").await.unwrap().digest.to_string();
    let untagged = model.pack("").await.unwrap().digest.to_string();
    assert_eq!(moved, untagged);
    let index = model.index();
    let names: Vec<(Option<&str>, &str)> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            let tag = entry["annotations"]["org.opencontainers.image.ref.name"].as_str();
            (tag, entry["digest"].as_str().unwrap())
        })
        .collect();
    assert_eq!(names, [(Some("one"), &*one), (Some("two"), &*moved), (None, &*moved)]);
    let left: Vec<_> =
        fs::read_dir(model.layout()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "{left:?}");
}

#[tokio::test]
async fn a_symlink_to_a_file_is_packed_as_that_file() {
    let model = Model::new(&[("real", b"here")]);
    let blobs = model.parent.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    fs::write(blobs.join("abc"), b"there").unwrap();
    symlink("../blobs/abc", model.path().join("outside")).unwrap();
    symlink("real", model.path().join("inside")).unwrap();
    let digest = model.pack(":v1").await.unwrap().digest.to_string();
    let layer = model.json(&digest)["layers"][0]["digest"].as_str().unwrap().to_owned();
    let (_, entries) = entries(&model.blob(&layer));
    assert_eq!(entries["models/outside"].1.as_deref(), Some(&b"there"[..]));
    assert_eq!(entries["models/inside"].1.as_deref(), Some(&b"here"[..]));
}

#[tokio::test]
async fn a_snapshot_of_hugging_faces_cache_tells_where_it_is_from() {
    let parent = tempfile::tempdir().unwrap();
    let snapshot = parent.path().join("models--meta-llama--Llama-3--8B/snapshots/abc123");
    fs::create_dir_all(&snapshot).unwrap();
    let known = annotations(&snapshot, None);
    assert_eq!(known["org.opencontainers.image.title"], "meta-llama/Llama-3--8B");
    assert_eq!(known["org.opencontainers.image.revision"], "abc123");
    let source = "https://huggingface.co/meta-llama/Llama-3--8B";
    assert_eq!(known["org.opencontainers.image.source"], source);
}

#[tokio::test]
async fn what_cannot_be_packed_is_refused_by_name() {
    let refuse = async |make: &dyn Fn(&Path)| {
        let model = Model::new(&[("ok", b"1")]);
        make(&model.path());
        let error = model.pack(":v1").await.unwrap_err();
        assert!(!model.layout().join("index.json").exists());
        let text = error.to_string();
        text.replace(model.path().to_str().unwrap(), "DIR")
    };
    let socket = |dir: &Path| drop(std::os::unix::net::UnixListener::bind(dir.join("s")).unwrap());
    assert_eq!(refuse(&socket).await, "pack DIR/s: a socket cannot be packed; remove it");
    let folder = |dir: &Path| symlink("/tmp", dir.join("l")).unwrap();
    assert_eq!(
        refuse(&folder).await,
        "pack DIR/l: a symlink to a folder cannot be packed; remove it"
    );
    let nothing = |dir: &Path| symlink("gone", dir.join("l")).unwrap();
    assert_eq!(
        refuse(&nothing).await,
        "pack DIR/l: a symlink to nothing; remove it or fetch what it names"
    );
    let device = |dir: &Path| symlink("/dev/null", dir.join("l")).unwrap();
    assert_eq!(refuse(&device).await, "pack DIR/l: a device cannot be packed; remove it");
    let empty = |dir: &Path| fs::remove_file(dir.join("ok")).unwrap();
    assert_eq!(refuse(&empty).await, "pack DIR: no file in it");
    let control = |dir: &Path| fs::write(dir.join("a\nb"), b"").unwrap();
    assert_eq!(refuse(&control).await, "pack DIR/a\nb: a control character in the name");
    let missing = |dir: &Path| fs::remove_dir_all(dir).unwrap();
    assert_eq!(refuse(&missing).await, "pack: DIR: No such file or directory (os error 2)");
}

#[tokio::test]
async fn a_folder_that_is_no_layout_is_not_written_into() {
    let model = Model::new(&[("ok", b"1")]);
    fs::create_dir(model.layout()).unwrap();
    fs::write(model.layout().join("thesis.txt"), b"").unwrap();
    let error = model.pack(":v1").await.unwrap_err().to_string();
    assert!(error.ends_with("is no OCI layout; name an empty or new one"), "{error}");
    let digest = "@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let error = model.pack(digest).await.unwrap_err().to_string();
    assert!(error.ends_with("gets a digest of its own; name a tag"), "{error}");
}

#[tokio::test]
async fn two_writers_do_not_meet_in_one_layout() {
    let model = Model::new(&[("ok", b"1")]);
    model.pack(":v1").await.unwrap();
    let lock = fs::File::open(model.layout()).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let error = model.pack(":v1").await.unwrap_err().to_string();
    assert!(error.contains("another process packs into it"), "{error}");
    drop(lock);
    // What an interrupted writer left is removed.
    let left = model.layout().join(".pack-left");
    fs::write(&left, b"").unwrap();
    model.pack(":v1").await.unwrap();
    assert!(!left.exists());
}

#[tokio::test]
async fn a_file_that_changes_meanwhile_is_noticed_and_nothing_is_named() {
    let model = Model::new(&[("a", b"1"), ("z", &vec![0; BIG])]);
    let path = model.path().join("z");
    let shrink = path.clone();
    let options = PackOptions {
        // Called first when the small layer is written.
        progress: Some(Arc::new(move |_| fs::write(&shrink, b"short").unwrap())),
        ..PackOptions::default()
    };
    let error = model.pack_with(":v1", options).await.unwrap_err();
    assert!(matches!(&error, PackError::Changed(changed) if *changed == path), "{error}");
    assert!(!model.layout().join("index.json").exists());
    let left = fs::read_dir(model.layout()).unwrap().map(|e| e.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().starts_with(".pack-")));
}

#[tokio::test]
async fn a_pack_that_nobody_waits_for_stops_and_names_nothing() {
    let model = Model::new(&[("a", &vec![1; 2 * BIG]), ("b", b"2")]);
    let (began, has_begun) = tokio::sync::oneshot::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    let hooks = Mutex::new((Some(began), may_go_on));
    let options = PackOptions {
        progress: Some(Arc::new(move |_| {
            let mut hooks = hooks.lock().unwrap();
            if let Some(began) = hooks.0.take() {
                began.send(()).unwrap();
                // Until the other side is dropped.
                let _ = hooks.1.recv();
            }
        })),
        ..PackOptions::default()
    };
    tokio::select! {
        _ = model.pack_with(":v1", options) => panic!("it was held up"),
        begun = has_begun => begun.unwrap(),
    }
    drop(go_on);
    // The lock on the layout is free when the blocking side has ended.
    let folder = fs::File::open(model.layout()).unwrap();
    tokio::task::spawn_blocking(move || folder.lock().unwrap()).await.unwrap();
    assert!(!model.layout().join("index.json").exists());
    let blobs = fs::read_dir(model.layout().join("blobs/sha256")).unwrap();
    assert_eq!(blobs.count(), 0);
}

#[tokio::test]
async fn progress_ends_at_the_total() {
    let model = Model::new(&[("a", &vec![1; BIG]), ("b", &vec![2; BIG])]);
    let seen: Arc<Mutex<Vec<PackProgress>>> = Arc::default();
    let sink = seen.clone();
    let options = PackOptions {
        progress: Some(Arc::new(move |progress| sink.lock().unwrap().push(progress))),
        ..PackOptions::default()
    };
    let packed = model.pack_with(":v1", options).await.unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.windows(2).all(|pair| pair[0].done_bytes <= pair[1].done_bytes));
    let expected = PackProgress {
        phase: PackPhase::Writing,
        done_bytes: packed.bytes,
        total_bytes: packed.bytes,
    };
    assert_eq!(seen.last(), Some(&expected));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(32))]
    /// What `tar` reads back is what was in the folder, for any names and sizes.
    #[test]
    fn a_layer_reads_back_as_its_files(
        files in proptest::collection::btree_map("[a-zé]{1,8}(/[a-z .]{1,70}[a-z]){0,3}", 0usize..3000, 1..12)
    ) {
        let model = Model::new(&[]);
        let mut written = BTreeMap::new();
        for (name, size) in &files {
            let path = model.path().join(name);
            // A name that is a folder of another's, or below a file, is left out.
            if path.exists() || fs::create_dir_all(path.parent().unwrap()).is_err() { continue }
            let content = vec![b'x'; *size];
            fs::write(&path, &content).unwrap();
            written.insert(format!("models/{name}"), content);
        }
        let plan = plan::scan(&model.path(), MAX_LAYERS).unwrap();
        let mut reader = tar::LayerReader::new(&plan.layers[0]).unwrap();
        let mut bytes = Vec::new();
        while let Some(chunk) = reader.next_chunk().unwrap() { bytes.extend_from_slice(&chunk); }
        proptest::prop_assert_eq!(bytes.len() as u64, reader.size());
        let read: BTreeMap<String, Vec<u8>> = entries(&bytes).1.into_iter()
            .filter_map(|(path, (_, content))| Some((path, content?))).collect();
        proptest::prop_assert_eq!(read, written);
    }
}
