use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use super::*;
use crate::testing::{listing, noise, store};
use crate::tree::Tree;

/// How [`put_layer`]'s layers are read.
pub(super) fn layer(digest: &Digest) -> Layer {
    let blob = crate::manifest::Blob { digest: *digest, size: 1 };
    let compression = crate::manifest::Compression::None;
    Layer { blob, compression, content: crate::manifest::Content::Tar, toc: None }
}

/// Brings in a layer of one file by the store's own means.
pub(super) fn put_layer(store: &Store, content: &[u8]) -> (Digest, ObjectId) {
    let digest = Digest::of(content);
    let object = ObjectId::new(blake3::hash(content), false);
    let ingest = store.ingest(&digest).unwrap().expect("nobody else is at it");
    fs::write(ingest.folder().join("0000000"), content).unwrap();
    let size = content.len() as u64;
    let path = format!("models/{}", digest.short());
    let record = LayerRecord {
        digest,
        size_bytes: size,
        diff_id: digest,
        entries: vec![LayerEntry::File { path, size, object, offset: Some(0) }],
        attributes: crate::tree::Attributes::Unknown,
    };
    let staged = vec![Staged { name: "0000000".into(), object, size }];
    ingest.commit(layer(&digest).record_name(), record, staged).unwrap();
    (digest, object)
}

/// Makes an image of stored layers.
pub(super) fn put_image(store: &Store, name: &str, layers: &[Digest]) -> Digest {
    let mut tree = Tree::default();
    for digest in layers {
        tree.apply(&store.layer(&layer(digest)).unwrap().expect("stored").entries).unwrap();
    }
    let digest = Digest::of(name.as_bytes());
    let layers = layers
        .iter()
        .map(|digest| StoredLayer { digest: *digest, size_bytes: 1, diff_id: *digest })
        .collect();
    let new = NewTree {
        digest,
        packaging: Packaging::OciImage,
        layers,
        tree: &tree,
        manifest: b"{}",
        config: b"{}",
    };
    assert!(store.commit_tree(&new).unwrap());
    let record = RefRecord {
        reference: format!("registry.example/{name}:1"),
        resolved: digest,
        platform: Platform::default(),
        image: digest,
        resolved_at: SystemTime::now(),
    };
    store.put_reference(&record).unwrap();
    digest
}

pub(super) fn reference(name: &str) -> Reference {
    format!("registry.example/{name}:1").parse().unwrap()
}

#[test]
fn images_share_the_inodes_of_equal_files() {
    let (_dir, store) = store();
    let (a, object) = put_layer(&store, b"weights");
    let (b, _) = put_layer(&store, b"adapter");
    let base = put_image(&store, "base", &[a]);
    let tuned = put_image(&store, "tuned", &[a, b]);

    let name = format!("models/{}", a.short());
    let inode = |digest| fs::metadata(store.rootfs(digest).join(&name)).unwrap().ino();
    assert_eq!(inode(&base), inode(&tuned));
    let meta = fs::metadata(store.object(&object)).unwrap();
    assert_eq!((meta.ino(), meta.nlink()), (inode(&base), 3));

    assert_eq!(store.lookup(&reference("tuned")).unwrap(), Some(tuned));
    assert_eq!(store.lookup(&reference("other")).unwrap(), None);
    let by_digest = format!("registry.example/anything@{base}").parse().unwrap();
    assert_eq!(store.lookup(&by_digest).unwrap(), Some(base), "a digest needs no record");
    let images = store.images().unwrap();
    assert_eq!(images.len(), 2);
    let image = store.image(&tuned).unwrap().unwrap();
    assert_eq!((image.files, image.unpacked_bytes), (2, 14));
    assert_eq!(image.references, ["registry.example/tuned:1"]);
    let usage = store.usage().unwrap();
    assert_eq!((usage.objects, usage.image_bytes, usage.unused_bytes), (2, 7 + 14, 0));
}

#[test]
fn a_tree_looks_the_same_wherever_it_is_made() {
    let (_dir, store) = store();
    let (object, size) = {
        let (_, object) = put_layer(&store, b"x");
        (object, 1)
    };
    let mut tree = Tree::default();
    let path = |path: &str| path.to_owned();
    tree.apply(&[
        LayerEntry::File { path: path("models/a"), size, object, offset: None },
        LayerEntry::File { path: path("models/empty"), size: 0, object, offset: None },
        LayerEntry::Symlink { path: path("models/link"), target: path("/etc/passwd") },
        LayerEntry::Directory { path: path("models/sub") },
    ])
    .unwrap();
    let digest = Digest::of(b"image");
    let new = NewTree {
        digest,
        packaging: Packaging::OciImage,
        layers: Vec::new(),
        tree: &tree,
        manifest: b"m",
        config: b"c",
    };
    assert!(store.commit_tree(&new).unwrap());
    assert!(store.commit_tree(&new).unwrap(), "made once is made");
    let rootfs = store.rootfs(&digest);
    assert_eq!(
        listing(&rootfs),
        ["models/", "models/a", "models/empty", "models/link -> /etc/passwd", "models/sub/"]
    );
    for name in ["models", "models/empty", "models/sub"] {
        assert_eq!(fs::metadata(rootfs.join(name)).unwrap().mtime(), 0, "{name}");
    }
    assert_eq!(fs::metadata(rootfs.join("models")).unwrap().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(rootfs.join("models/empty")).unwrap().mode() & 0o7777, 0o444);
}

#[test]
fn what_an_image_or_a_lease_needs_is_not_collected() {
    let (_dir, store) = store();
    let (kept, _) = put_layer(&store, b"kept");
    put_image(&store, "image", &[kept]);
    let (leased, _) = put_layer(&store, &noise(1, 10_000));
    let (loose, _) = put_layer(&store, &noise(2, 20_000));

    let lease =
        store.lease(&lease::Leased { layers: [leased].into(), ..Default::default() }).unwrap();
    let collected = store.collect().unwrap();
    assert_eq!((collected.objects, collected.bytes), (1, 20_480));
    assert!(
        store.layer(&layer(&loose)).unwrap().is_none(),
        "a record without its objects is no record"
    );
    assert!(store.layer(&layer(&leased)).unwrap().is_some());
    drop(lease);
    assert_eq!(store.collect().unwrap().objects, 1);
    assert!(store.layer(&layer(&kept)).unwrap().is_some());
    assert_eq!(store.usage().unwrap().objects, 1);
    assert_eq!(fs::read_dir(store.path("leases")).unwrap().count(), 0);
}

#[test]
fn a_removed_image_frees_only_what_nobody_else_uses() {
    let (_dir, store) = store();
    let (shared, _) = put_layer(&store, b"shared");
    let (own, _) = put_layer(&store, b"own");
    let base = put_image(&store, "base", &[shared]);
    let tuned = put_image(&store, "tuned", &[shared, own]);
    assert!(store.remove(&tuned).unwrap());
    assert!(!store.remove(&tuned).unwrap(), "gone is gone");
    assert_eq!(store.collect().unwrap().objects, 1);
    assert_eq!(store.lookup(&reference("tuned")).unwrap(), None);
    assert_eq!(store.lookup(&reference("base")).unwrap(), Some(base));
    assert!(store.layer(&layer(&shared)).unwrap().is_some());
}

#[test]
fn a_mounted_image_is_not_removed() {
    #[derive(Serialize)]
    struct Volume {
        digest: Digest,
    }
    let (_dir, store) = store();
    let (layer, _) = put_layer(&store, b"weights");
    let image = put_image(&store, "image", &[layer]);
    let volumes = store.records(RecordKind::Volumes);
    volumes.put("csi-1", &Volume { digest: image }).unwrap();
    let error = store.remove(&image).unwrap_err();
    assert!(matches!(&error, StoreError::InUse(why) if why.contains("csi-1")), "{error}");
    assert!(store.image(&image).unwrap().is_some());
    assert!(volumes.remove("csi-1").unwrap());
    assert!(!volumes.remove("csi-1").unwrap());
    // A record that cannot be read may speak of any image.
    fs::write(store.path("volumes").join("csi-2.json"), "{").unwrap();
    assert!(matches!(store.remove(&image), Err(StoreError::Corrupt(_))));
    fs::remove_file(store.path("volumes").join("csi-2.json")).unwrap();
    assert!(store.remove(&image).unwrap());
}

#[test]
fn an_image_whose_record_is_damaged_can_be_made_again() {
    let (_dir, store) = store();
    let (layer, _) = put_layer(&store, b"weights");
    let image = put_image(&store, "image", &[layer]);
    fs::remove_file(store.tree(&image).join("tree.json")).unwrap();
    assert_eq!(store.image(&image).unwrap(), None);
    assert_eq!(put_image(&store, "image", &[layer]), image);
    assert_eq!(store.image(&image).unwrap().unwrap().files, 1);
    assert!(listing(&store.path("ingest")).is_empty());
}

#[test]
fn records_are_replaced_whole_and_damage_is_told() {
    let (_dir, store) = store();
    let records = store.records(RecordKind::Volumes);
    records.put("a", &1).unwrap();
    records.put("a", &2).unwrap();
    records.put("b", &3).unwrap();
    assert_eq!(records.get::<u8>("a").unwrap(), Some(2));
    assert_eq!(records.get::<u8>("c").unwrap(), None);
    fs::write(store.path("volumes").join("a.json"), "{").unwrap();
    assert!(matches!(records.get::<u8>("a"), Err(StoreError::Corrupt(_))));
    assert_eq!(
        records.list::<u8>().unwrap(),
        [("b".to_owned(), 3)],
        "one does not hide the others"
    );
    for name in ["", ".hidden", "a/b", "../a"] {
        assert!(records.put(name, &1).is_err(), "{name:?}");
    }
}

#[test]
fn a_damaged_commit_closes_no_store() {
    let (dir, store) = store();
    let (here, _) = put_layer(&store, b"here");
    let image = put_image(&store, "image", &[here]);
    let folder = store.path("ingest").join(Digest::of(b"on its way").hex());
    for damage in ["", "{\"name\""] {
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("commit.json"), damage).unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        assert_eq!(store.images().unwrap().len(), 1);
        assert_eq!(listing(&store.path("ingest")), [""; 0]);
    }
    assert!(store.image(&image).unwrap().is_some());
}

#[test]
fn records_that_were_never_named_are_collected_once_nobody_can_be_writing_them() {
    let (_dir, store) = store();
    let now = SystemTime::now();
    let ages = [
        ("old", now - Duration::from_secs(3600)),
        ("young", now),
        ("ahead", now + Duration::from_secs(3600)),
    ];
    for folder in ["layers", "refs", "."] {
        for (name, modified) in ages {
            let file = fs::File::create(store.path(folder).join(format!(".tmp-{name}"))).unwrap();
            file.set_modified(modified).unwrap();
        }
    }
    store.collect().unwrap();
    for folder in ["layers", "refs", "."] {
        let is_there = |name: &str| store.path(folder).join(format!(".tmp-{name}")).exists();
        assert_eq!(ages.map(|(name, _)| is_there(name)), [false, true, true], "{folder}");
    }
}

#[test]
fn only_a_store_of_this_version_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("precious"), "data").unwrap();
    let error = Store::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("not a carport store and not empty (it holds \"precious\")"), "{error}");

    let newer = dir.path().join("newer");
    Store::open(&newer).unwrap();
    fs::write(newer.join("format"), "carport store 9\n").unwrap();
    let error = Store::open(&newer).unwrap_err();
    assert!(
        matches!(&error, StoreError::Format(why) if why.contains("carport store 9")),
        "{error}"
    );

    // Half a creation is completed.
    let half = dir.path().join("half");
    Store::open(&half).unwrap();
    fs::remove_file(half.join("format")).unwrap();
    fs::remove_dir(half.join("refs")).unwrap();
    assert_eq!(Store::open(&half).unwrap().images().unwrap(), []);
    assert_eq!(fs::metadata(&half).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn one_worker_a_digest_in_any_process() {
    let (_dir, store) = store();
    let digest = Digest::of(b"layer");
    let ingest = store.ingest(&digest).unwrap().expect("free");
    assert!(store.ingest(&digest).unwrap().is_none());
    assert!(store.ingest(&Digest::of(b"other")).unwrap().is_some());
    // Opening the store again does not touch what somebody is at.
    fs::write(ingest.folder().join("0000000"), "bytes").unwrap();
    Store::open(store.root()).unwrap();
    assert!(ingest.folder().join("0000000").exists());
    ingest.discard().unwrap();
    assert!(store.ingest(&digest).unwrap().is_some());
}

/// Files behind the file system's limit of names are copied.
#[test]
fn more_names_than_an_inode_can_have_are_no_error() {
    let (_dir, store) = store();
    let (_, object) = put_layer(&store, b"LICENSE");
    let entries: Vec<_> = (0..66_000)
        .map(|n| LayerEntry::File {
            path: format!("{}/{n}", n / 1000),
            size: 7,
            object,
            offset: None,
        })
        .collect();
    let mut tree = Tree::default();
    tree.apply(&entries).unwrap();
    let digest = Digest::of(b"image");
    let new = NewTree {
        digest,
        packaging: Packaging::OciImage,
        layers: Vec::new(),
        tree: &tree,
        manifest: b"",
        config: b"",
    };
    assert!(store.commit_tree(&new).unwrap());
    assert_eq!(fs::read(store.rootfs(&digest).join("65/65999")).unwrap(), b"LICENSE");
    assert_eq!(store.image(&digest).unwrap().unwrap().files, 66_000);
}

const CRASH_ROOT: &str = "CARPORT_CRASH_ROOT";

/// Runs in a process of its own, which `crash::point` ends.
#[test]
fn crash_child() {
    let Ok(root) = std::env::var(CRASH_ROOT) else { return };
    let store = Store::open(root).unwrap();
    let (a, _) = put_layer(&store, b"first");
    let (b, _) = put_layer(&store, b"second");
    put_image(&store, "image", &[a, b]);
}

#[test]
fn a_crash_at_any_step_of_a_commit_is_mended_by_the_next_start() {
    let test = std::env::current_exe().unwrap();
    for step in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("store");
        let output = Command::new(&test)
            .args(["--exact", "store::tests::crash_child", "--nocapture"])
            .env(CRASH_ROOT, &root)
            .env("CARPORT_CRASH_AT", step.to_string())
            .output()
            .unwrap();
        let crashed = !output.status.success();

        let store = Store::open(&root).unwrap();
        for image in store.images().unwrap() {
            let files = listing(&store.rootfs(&image.digest));
            assert_eq!(files.len(), 3, "step {step}: a tree is whole or absent: {files:?}");
        }
        let ingest = listing(&store.path("ingest"));
        assert!(ingest.is_empty(), "step {step}: {ingest:?}");
        // And the work can be done again, to the same end.
        let (a, _) = put_layer(&store, b"first");
        let (b, _) = put_layer(&store, b"second");
        let image = put_image(&store, "image", &[a, b]);
        assert_eq!(store.collect().unwrap(), Collected::default(), "step {step}");
        assert_eq!(store.usage().unwrap().objects, 2, "step {step}");
        assert_eq!(store.image(&image).unwrap().unwrap().files, 2, "step {step}");
        if !crashed {
            assert!(step > 8, "the child passed {step} points only");
            return;
        }
    }
}

/// Lets a pull of these layers in, whatever must be evicted for it.
pub(super) fn admitted(
    store: &Store,
    image: Digest,
    reference: Reference,
    layers: &[Layer],
) -> Result<Lease, StoreError> {
    let keys = layers.iter().map(|layer| (*layer, None)).collect();
    let layers = layers.iter().map(|layer| layer.blob.digest).collect();
    let coming = store.missing(&keys)?;
    let admission = Admission { image, reference, layers, coming };
    Ok(store.admit(&admission, true)?.expect("evicting leaves no third way"))
}
