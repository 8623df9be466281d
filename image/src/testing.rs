//! Images for tests: tars of what a test names, packed into OCI layout folders.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::digest::Digest;
use crate::manifest::{Blob, Compression, Content, Layer};
use crate::reference::Reference;
use crate::store::Store;

pub(crate) mod arriving;

/// A member of a test's tar.
pub(crate) enum Entry<'a> {
    Dir(&'a str),
    File(&'a str, &'a [u8]),
    Exec(&'a str, &'a [u8]),
    Symlink(&'a str, &'a str),
    Hardlink(&'a str, &'a str),
}

/// A tar with these members, names unchecked.
pub(crate) fn tar(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        let (name, kind, content, link): (_, _, &[u8], _) = match entry {
            Entry::Dir(name) => (name, tar::EntryType::Directory, b"", ""),
            Entry::File(name, content) => (name, tar::EntryType::Regular, content, ""),
            Entry::Exec(name, content) => {
                header.set_mode(0o755);
                (name, tar::EntryType::Regular, content, "")
            }
            Entry::Symlink(name, target) => (name, tar::EntryType::Symlink, b"", *target),
            Entry::Hardlink(name, target) => (name, tar::EntryType::Link, b"", *target),
        };
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        // Not through set_path, which refuses what the tests want to see refused.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap()
}

pub(crate) fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Gzip => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(bytes).unwrap();
            gzip.finish().unwrap()
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

/// `bytes` as a frame that decoders pass over.
pub(crate) fn skippable(bytes: &[u8]) -> Vec<u8> {
    let mut frame = 0x184D_2A50_u32.to_le_bytes().to_vec();
    frame.extend((bytes.len() as u32).to_le_bytes());
    frame.extend(bytes);
    frame
}

/// A tar, and the zstd:chunked or eStargz of it with chunks of `chunk` bytes, whose table of contents
/// `edit` may falsify.
pub(crate) fn chunked(
    entries: &[Entry<'_>],
    (compression, chunk): (Compression, usize),
    edit: &dyn Fn(&mut Value),
) -> (Vec<u8>, Vec<u8>) {
    let estargz = compression == Compression::Gzip;
    let mut tar = tar(entries);
    if estargz {
        // The table comes before the end.
        tar.truncate(tar.len() - 1024);
    }
    let (mut blob, mut between, mut at, mut listed) = (Vec::new(), Vec::new(), 0, Vec::new());
    for entry in entries {
        let (name, kind, link, content, mode): (_, _, _, &[u8], _) = match entry {
            Entry::Dir(name) => (name, "dir", "", b"", 0o755),
            Entry::File(name, content) => (name, "reg", "", content, 0o644),
            Entry::Exec(name, content) => (name, "reg", "", content, 0o755),
            Entry::Symlink(name, target) => (name, "symlink", *target, b"", 0o777),
            Entry::Hardlink(name, target) => (name, "hardlink", *target, b"", 0o644),
        };
        let begins = at + 512;
        between.extend(&tar[at..begins]);
        let first = listed.len();
        listed.push(json!({"type": kind, "name": name, "linkName": link, "mode": mode,
            "size": content.len(), "digest": Digest::of(content)}));
        for (n, part) in content.chunks(chunk).enumerate() {
            if !between.is_empty() {
                blob.extend(compress(&std::mem::take(&mut between), compression));
            }
            let place = json!({"offset": blob.len(), "chunkOffset": n * chunk,
                "chunkSize": part.len(), "chunkDigest": Digest::of(part)});
            if n > 0 {
                listed.push(json!({"type": "chunk", "name": name}));
            }
            let entry = listed.last_mut().unwrap().as_object_mut().unwrap();
            entry.extend(place.as_object().unwrap().clone());
            match estargz {
                // What follows the last chunk shares its member.
                true => between.extend(part),
                false => blob.extend(compress(part, compression)),
            }
        }
        if !estargz && !content.is_empty() {
            listed[first]["endOffset"] = json!(blob.len());
        }
        let end = begins + content.len();
        at = end.next_multiple_of(512);
        between.extend(&tar[end..at]);
    }
    between.extend(&tar[at..]);
    blob.extend(compress(&between, compression));
    let mut toc = json!({"version": 1, "entries": listed});
    edit(&mut toc);
    let text = toc.to_string();
    let start = blob.len() as u64;
    if estargz {
        let table = self::tar(&[Entry::File("stargz.index.json", text.as_bytes())]);
        blob.extend(compress(&table, compression));
        tar.extend(table);
        blob.extend([0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255, 26, 0, b'S', b'G', 22, 0]);
        blob.extend(format!("{start:016x}STARGZ").as_bytes());
        blob.extend([1, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
    } else {
        let packed = compress(text.as_bytes(), compression);
        blob.extend(skippable(&packed));
        let mut end = Vec::new();
        for number in [start + 8, packed.len() as u64, text.len() as u64, 1, 0, 0, 0] {
            end.extend(number.to_le_bytes());
        }
        end.extend(b"GNUlInUx");
        blob.extend(skippable(&end));
    }
    (tar, blob)
}

/// Bytes that neither compress away nor repeat at a block's distance.
pub(crate) fn noise(seed: u64, size: usize) -> Vec<u8> {
    let mut out = vec![0; size];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}

pub(crate) fn layer_of(blob: &[u8], compression: Compression) -> Layer {
    let blob = Blob { digest: Digest::of(blob), size: blob.len() as u64 };
    Layer { blob, compression, content: Content::Tar, toc: None }
}

/// An OCI layout folder that a test fills.
pub(crate) struct Layout {
    pub(crate) folder: PathBuf,
    index: Vec<Value>,
}

/// A layer in a layout.
#[derive(Clone)]
pub(crate) struct TestLayer {
    pub(crate) blob: Digest,
    descriptor: Value,
    diff_id: Digest,
}

impl Layout {
    pub(crate) fn new(folder: &Path) -> Self {
        std::fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
        std::fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { folder: folder.to_owned(), index: Vec::new() }
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.folder.join("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn blob(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of(bytes);
        std::fs::write(self.blob_path(&digest), bytes).unwrap();
        digest
    }

    pub(crate) fn layer(&self, tar: &[u8], compression: Compression) -> TestLayer {
        let suffix = match compression {
            Compression::None => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        self.packed(tar, &compress(tar, compression), suffix)
    }

    /// A layer whose blob is said to unpack to `tar`.
    pub(crate) fn packed(&self, tar: &[u8], blob: &[u8], suffix: &str) -> TestLayer {
        let digest = self.blob(blob);
        let descriptor = json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
            "digest": digest, "size": blob.len(),
        });
        TestLayer { blob: digest, descriptor, diff_id: Digest::of(tar) }
    }

    /// Writes config and manifest; returns the manifest's descriptor.
    pub(crate) fn manifest(&self, layers: &[TestLayer]) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id).collect();
        let config = serde_json::to_vec(&json!({
            "architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }))
        .unwrap();
        let layers: Vec<_> = layers.iter().map(|layer| &layer.descriptor).collect();
        let manifest = serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                       "digest": self.blob(&config), "size": config.len()},
            "layers": layers,
        }))
        .unwrap();
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json",
               "digest": self.blob(&manifest), "size": manifest.len()})
    }

    /// Tags `descriptor`; returns the reference to it.
    pub(crate) fn tag(&mut self, tag: &str, descriptor: &Value) -> Reference {
        let mut descriptor = descriptor.clone();
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.index.retain(|entry| entry["annotations"] != descriptor["annotations"]);
        self.index.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.index});
        std::fs::write(self.folder.join("index.json"), index.to_string()).unwrap();
        format!("oci:{}:{tag}", self.folder.display()).parse().unwrap()
    }

    pub(crate) fn image(&mut self, tag: &str, layers: &[TestLayer]) -> Reference {
        let manifest = self.manifest(layers);
        self.tag(tag, &manifest)
    }
}

/// Every file below `folder`, relative, sorted: what a test compares with.
pub(crate) fn listing(folder: &Path) -> Vec<String> {
    let mut found: Vec<_> = walkdir::WalkDir::new(folder)
        .min_depth(1)
        .into_iter()
        .map(|entry| {
            let entry = entry.unwrap();
            let path = entry.path().strip_prefix(folder).unwrap().display().to_string();
            match entry.file_type() {
                kind if kind.is_dir() => format!("{path}/"),
                kind if kind.is_symlink() => {
                    format!("{path} -> {}", std::fs::read_link(entry.path()).unwrap().display())
                }
                _ => path,
            }
        })
        .collect();
    found.sort();
    found
}

/// A store in a temporary folder.
pub(crate) fn store() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path().join("store")).unwrap();
    (folder, store)
}
