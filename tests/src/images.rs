//! Images that a [`Scripted`] registry serves from memory: layers of
//! tars as no well-behaved program writes them, blobs that a gate lets pass, and counts of what
//! was asked for.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use carport_image::Digest;
use serde_json::{Value, json};
use tar::{EntryType, Header};

use crate::layouts::Layout;
use crate::scripted::{Answer, Gate, Request, Scripted};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

/// A tar that is being written, whatever a well-behaved tar program thinks of it.
#[derive(Debug, Clone, Default)]
pub struct Tar(Vec<u8>);

impl Tar {
    /// An entry as it is given; nothing of it is checked.
    #[must_use]
    pub fn entry(mut self, name: &str, kind: EntryType, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        // Not through the setters, which refuse what is to be refused here.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name, EntryType::Regular, "", content)
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, EntryType::Symlink, target, b"")
    }

    /// The whole tar.
    pub fn end(mut self) -> Bytes {
        self.0.extend_from_slice(&[0; 1024]);
        self.0.into()
    }
}

/// An image with uncompressed layers, in memory.
#[derive(Debug, Clone)]
pub struct Image {
    manifest: Bytes,
    blobs: Arc<HashMap<Digest, Bytes>>,
    /// Its layers' digests, lowest first.
    pub layers: Vec<Digest>,
}

impl Image {
    /// An image of these layers.
    pub fn of(layers: &[Bytes]) -> Self {
        let digests: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
        let config = Bytes::from(
            json!({
                "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
                "os": "linux",
                "rootfs": { "type": "layers", "diff_ids": digests },
            })
            .to_string(),
        );
        let descriptor = |media_type: &str, blob: &Bytes| json!({ "mediaType": media_type, "digest": Digest::of(blob), "size": blob.len() });
        let layer_type = "application/vnd.oci.image.layer.v1.tar";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": layers.iter().map(|l| descriptor(layer_type, l)).collect::<Vec<_>>(),
        });
        let blobs = layers.iter().chain([&config]).map(|blob| (Digest::of(blob), blob.clone()));
        Self {
            manifest: manifest.to_string().into(),
            blobs: Arc::new(blobs.collect()),
            layers: digests,
        }
    }

    /// The image or artifact that an OCI layout has under this digest.
    ///
    /// # Panics
    ///
    /// When the layout lacks something of it.
    pub fn of_layout(layout: &Layout, digest: &Digest) -> Self {
        let read = |digest: &Digest| {
            let path = layout.path().join("blobs/sha256").join(digest.hex());
            Bytes::from(std::fs::read(path).expect("a blob"))
        };
        let manifest = read(digest);
        let json: Value = serde_json::from_slice(&manifest).expect("a manifest");
        let digest_of = |descriptor: &Value| -> Digest {
            descriptor["digest"].as_str().and_then(|d| d.parse().ok()).expect("a digest")
        };
        let layers: Vec<_> =
            json["layers"].as_array().expect("layers").iter().map(digest_of).collect();
        let blobs = layers.iter().copied().chain([digest_of(&json["config"])]);
        let blobs = blobs.map(|digest| (digest, read(&digest))).collect();
        Self { manifest, blobs: Arc::new(blobs), layers }
    }

    /// The manifest's digest.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// The bytes of all layers as they travel.
    pub fn layer_bytes(&self) -> u64 {
        self.layers.iter().map(|digest| self.blobs[digest].len() as u64).sum()
    }

    /// The bytes of a layer as it travels.
    pub fn size_of(&self, layer: &Digest) -> u64 {
        self.blobs[layer].len() as u64
    }

    /// Whether a request for `target` is for its manifest, by digest, or for a blob of it.
    pub fn has(&self, target: &str) -> bool {
        let digests = self.blobs.keys().copied().chain([self.digest()]);
        digests.map(|digest| digest.to_string()).any(|digest| target.contains(&digest))
    }

    /// What a registry answers that has this image, under every name and tag.
    pub fn answer(&self, request: &Request) -> Answer {
        self.answer_through(request, None)
    }

    /// As [`Image::answer`], with the layers' bytes as `gate` lets them pass.
    pub fn answer_gated(&self, request: &Request, gate: &Gate) -> Answer {
        self.answer_through(request, Some(gate))
    }

    fn answer_through(&self, request: &Request, gate: Option<&Gate>) -> Answer {
        let path = request.target.split('?').next().unwrap_or_default();
        if path.contains("/manifests/") {
            return Answer::ok(self.manifest.clone())
                .header("Content-Type", MANIFEST_TYPE)
                .header("Docker-Content-Digest", &self.digest().to_string());
        }
        let digest = path.rsplit_once("/blobs/").and_then(|(_, digest)| digest.parse().ok());
        let Some((digest, blob)) = digest
            .and_then(|digest: Digest| self.blobs.get(&digest).map(|blob| (digest, blob.clone())))
        else {
            return Answer::status(404);
        };
        let range = request.header("range").and_then(|range| {
            let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?))
        });
        let (from, answer) = match range {
            Some((from, to)) if from <= to && to < blob.len() => {
                let range = format!("bytes {from}-{to}/{}", blob.len());
                let part = blob.slice(from..=to);
                (from, Answer::status(206).header("Content-Range", &range).body(part))
            }
            Some(_) => return Answer::status(416),
            None => (0, Answer::ok(blob)),
        };
        match gate {
            Some(gate) if self.layers.contains(&digest) => answer.through(gate, from as u64),
            _ => answer,
        }
    }

    /// A registry that has this image, whose layers `gate` lets pass.
    pub async fn serve(&self, gate: &Gate) -> Scripted {
        let (image, gate) = (self.clone(), gate.clone());
        Scripted::start(move |request| image.answer_gated(request, &gate)).await
    }
}

/// `count` bytes that do not compress and differ with `seed`.
pub fn noise(count: usize, seed: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ (seed + 1).wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut bytes = Vec::with_capacity(count.next_multiple_of(8));
    while bytes.len() < count {
        // xorshift64: the same on every machine.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
