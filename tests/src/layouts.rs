//! OCI layouts of anything that has a manifest, layers as other programs make them, and both in a
//! registry.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine as _;
use carport_image::Digest;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::registry::installed;

/// What a tree holds: files by path, a folder's path with a slash and no content.
pub type Files = BTreeMap<String, Vec<u8>>;

/// A layer's descriptor without digest and size, and its bytes.
#[derive(Debug, Clone)]
pub struct Layer {
    /// `mediaType`.
    pub media_type: String,
    /// `annotations`.
    pub annotations: Value,
    /// The bytes as they travel.
    pub bytes: Vec<u8>,
    /// Of the bytes uncompressed.
    pub diff_id: String,
}

impl Layer {
    /// A raw file.
    pub fn raw(media_type: &str, annotations: Value, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            annotations,
            bytes: bytes.to_vec(),
            diff_id: Digest::of(bytes).to_string(),
        }
    }

    /// A layer of these files, made by `fixtures/layers.py`: `kind` is `tar`, `tar+gzip`,
    /// `tar+zstd`, `estargz` or `zstd:chunked`.
    ///
    /// # Panics
    ///
    /// When python3 or zstd cannot make it; ask [`tools`] first.
    pub fn made(media_type: &str, kind: &str, files: &[(&str, &[u8])]) -> Self {
        Self::made_in_chunks(media_type, kind, 64 * 1024, files)
    }

    /// As [`Layer::made`], with chunks of so many bytes where the kind has chunks.
    ///
    /// # Panics
    ///
    /// As [`Layer::made`].
    pub fn made_in_chunks(
        media_type: &str,
        kind: &str,
        chunk: usize,
        files: &[(&str, &[u8])],
    ) -> Self {
        let out = tempfile::NamedTempFile::new().expect("a temporary file");
        let base64 = base64::engine::general_purpose::STANDARD;
        let files: Vec<_> =
            files.iter().map(|(name, content)| json!([name, base64.encode(content)])).collect();
        let spec =
            json!({"kind": kind, "out": out.path(), "chunk": chunk, "files": files}).to_string();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/layers.py");
        let mut python = Command::new("python3")
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut input = python.stdin.take().expect("a pipe");
        input.write_all(spec.as_bytes()).expect("python3 reads");
        drop(input);
        let done = python.wait_with_output().expect("python3");
        assert!(done.status.success(), "layers.py: {}", done.status);
        let said: Value = serde_json::from_slice(&done.stdout).expect("layers.py says JSON");
        Self {
            media_type: media_type.to_owned(),
            annotations: said["annotations"].clone(),
            bytes: std::fs::read(out.path()).expect("the layer"),
            diff_id: said["diff_id"].as_str().expect("a diff_id").to_owned(),
        }
    }

    /// With one more annotation.
    #[must_use]
    pub fn annotated(mut self, key: &str, value: &str) -> Self {
        self.annotations[key] = json!(value);
        self
    }

    /// Its digest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.bytes)
    }
}

/// Whether what [`Layer::made`] needs is there; says so where it is not.
pub fn tools() -> bool {
    installed("python3") && installed("zstd")
}

/// An OCI layout folder.
pub struct Layout {
    folder: TempDir,
    manifests: Vec<Value>,
}

impl Default for Layout {
    fn default() -> Self {
        Self::new()
    }
}

impl Layout {
    /// An empty one.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir_all(folder.path().join("blobs/sha256")).expect("a blobs folder");
        std::fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("a layout file");
        Self { folder, manifests: Vec::new() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The reference of a tag.
    pub fn reference(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.path().display())
    }

    /// Writes an image or artifact and tags it. `artifact_type` is left out where it is empty.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub fn add(
        &mut self,
        tag: &str,
        artifact_type: &str,
        (config_type, config): (&str, &Value),
        layers: &[Layer],
    ) -> Digest {
        let config = config.to_string();
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| {
                json!({"mediaType": layer.media_type, "digest": self.blob(&layer.bytes),
                       "size": layer.bytes.len(), "annotations": layer.annotations})
            })
            .collect();
        let mut manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": config_type, "digest": self.blob(config.as_bytes()),
                       "size": config.len()},
            "layers": layers,
        });
        if !artifact_type.is_empty() {
            manifest["artifactType"] = json!(artifact_type);
        }
        let manifest = manifest.to_string();
        let digest = self.blob(manifest.as_bytes());
        self.manifests.push(json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
            "size": manifest.len(), "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        std::fs::write(self.path().join("index.json"), index.to_string()).expect("an index");
        digest
    }

    /// Tags an index of these manifests, each for an architecture of Linux.
    ///
    /// # Panics
    ///
    /// When it cannot be written.
    pub fn add_index(&mut self, tag: &str, manifests: &[(&str, Digest)]) -> Digest {
        let kind = "application/vnd.oci.image.index.v1+json";
        let entry = |(architecture, digest): &(&str, Digest)| {
            let size = std::fs::metadata(self.blob_path(digest)).expect("a manifest").len();
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest,
                "size": size, "platform": {"os": "linux", "architecture": architecture},
            })
        };
        let entries: Vec<_> = manifests.iter().map(entry).collect();
        let index =
            json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).to_string();
        let digest = self.blob(index.as_bytes());
        self.manifests.push(json!({
            "mediaType": kind, "digest": digest, "size": index.len(),
            "annotations": {"org.opencontainers.image.ref.name": tag},
        }));
        let listed = json!({"schemaVersion": 2, "manifests": self.manifests});
        std::fs::write(self.path().join("index.json"), listed.to_string()).expect("an index");
        digest
    }

    /// Puts a manifest and its blobs into a registry with curl, as any artifact may be put.
    ///
    /// # Panics
    ///
    /// When the registry refuses.
    pub fn push(&self, manifest: &Digest, host: &str, repository: &str, tag: &str) {
        let base = format!("http://{host}/v2/{repository}");
        let text = std::fs::read(self.blob_path(manifest)).expect("the manifest");
        let json: Value = serde_json::from_slice(&text).expect("a manifest");
        let layers = json["layers"].as_array().expect("layers").iter();
        for descriptor in layers.chain([&json["config"]]) {
            let digest: Digest =
                descriptor["digest"].as_str().and_then(|d| d.parse().ok()).expect("a digest");
            let started = curl(&["-X", "POST", "-D", "-", &format!("{base}/blobs/uploads/")]);
            let location = started
                .lines()
                .find_map(|line| line.strip_prefix("Location: "))
                .expect("an upload's location")
                .trim();
            let and = if location.contains('?') { '&' } else { '?' };
            let body = format!("@{}", self.blob_path(&digest).display());
            let url = format!("{location}{and}digest={digest}");
            curl(&[
                "-X",
                "PUT",
                "-H",
                "Content-Type: application/octet-stream",
                "--data-binary",
                &body,
                &url,
            ]);
        }
        let body = format!("@{}", self.blob_path(manifest).display());
        let kind = format!("Content-Type: {}", json["mediaType"].as_str().unwrap_or_default());
        curl(&[
            "-X",
            "PUT",
            "-H",
            &kind,
            "--data-binary",
            &body,
            &format!("{base}/manifests/{tag}"),
        ]);
    }

    fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blob_path(&digest), bytes).expect("a blob");
        digest
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path().join("blobs/sha256").join(digest.hex())
    }
}

fn curl(arguments: &[&str]) -> String {
    let done = Command::new("curl").args(["-sSf"]).args(arguments).output().expect("curl");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "curl {arguments:?}: {said}");
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Everything below `root`.
///
/// # Panics
///
/// When something there is neither file nor folder, or cannot be read.
pub fn files_below(root: &Path) -> Files {
    let entries = walkdir::WalkDir::new(root).min_depth(1).into_iter();
    entries
        .map(|entry| {
            let entry = entry.expect("a readable tree");
            let path = entry.path().strip_prefix(root).expect("below the root").display();
            if entry.file_type().is_dir() {
                return (format!("{path}/"), Vec::new());
            }
            assert!(entry.file_type().is_file(), "{path} is no file");
            (path.to_string(), std::fs::read(entry.path()).expect("a readable file"))
        })
        .collect()
}
