//! `docs/semantics.md` is true: each row of its tables is packed into an image, pulled, and
//! looked at. A row that no check knows fails, and so does a check without a row.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use carport_image::digest::Digest;
use carport_image::pull::{PullOptions, PullRequest};
use carport_image::{PullError, Puller, Store};
use carport_tests::carport::{binary, workspace};
use carport_tests::models::{reference, sources};
use carport_tests::registry::installed;
use serde_json::json;
use tar::{EntryType, Header};
use tempfile::TempDir;

/// The rows of a table, each a list of cells.
fn table(name: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(workspace().join("docs/semantics.md")).unwrap();
    let mark = format!("<!-- table: {name} -->");
    let (_, rest) = text.split_once(&mark).unwrap_or_else(|| panic!("no table {name}"));
    let lines = rest.trim_start().lines().take_while(|line| line.starts_with('|'));
    let rows: Vec<_> = lines
        .skip(2)
        .map(|line| {
            let line = line.trim().trim_start_matches('|').trim_end_matches('|');
            line.split('|').map(|cell| cell.trim().to_owned()).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "table {name}");
    rows
}

/// The checks of a table, by what stands in a row's first cell.
fn each_row_has_its_check(name: &str, checks: &[(&str, &dyn Fn())]) {
    let mut left: BTreeMap<&str, &dyn Fn()> = checks.iter().copied().collect();
    for row in table(name) {
        let check = left.remove(row[0].as_str());
        check.unwrap_or_else(|| panic!("table {name}: nothing checks {:?}", row[0]))();
    }
    assert!(left.is_empty(), "table {name}: no row for {:?}", left.keys());
}

/// The words in backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// A layer that is being written, whatever a well-behaved tar program thinks of it.
#[derive(Default)]
struct Layer(Vec<u8>);

impl Layer {
    fn entry(mut self, name: &str, kind: EntryType, mode: u32, link: &str, content: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1234);
        header.set_gid(1234);
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

    fn file(self, name: &str, content: &[u8]) -> Self {
        self.entry(name, EntryType::Regular, 0o644, "", content)
    }

    fn folder(self, name: &str) -> Self {
        self.entry(name, EntryType::Directory, 0o755, "", b"")
    }

    fn link(self, name: &str, kind: EntryType, target: &str) -> Self {
        self.entry(name, kind, 0o777, target, b"")
    }

    /// A pax record for the next entry.
    fn pax(self, key: &str, value: &[u8]) -> Self {
        // The length at the front counts itself.
        let rest = key.len() + value.len() + 3;
        let length = (rest..).find(|n| n.to_string().len() + rest == *n).unwrap();
        let mut record = format!("{length} {key}=").into_bytes();
        record.extend_from_slice(value);
        record.push(b'\n');
        self.entry("pax", EntryType::XHeader, 0o644, "", &record)
    }
}

/// A node's store, and images to pull into it.
struct Node {
    folder: TempDir,
    puller: Puller,
    runtime: tokio::runtime::Runtime,
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let puller = Puller::new(store, sources(&[]), PullOptions::default());
        Self { folder, puller, runtime }
    }

    /// Writes an OCI layout with one image; its reference.
    fn image(&self, name: &str, layers: &[&Layer]) -> String {
        let layout = self.folder.path().join(name);
        let blob = |bytes: &[u8]| {
            let digest = Digest::of(bytes);
            fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
            digest
        };
        fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        let diff_ids: Vec<Digest> = layers.iter().map(|layer| blob(&layer.0)).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = config.to_string();
        let layers: Vec<_> = layers
            .iter()
            .map(|layer| {
                json!({"mediaType": "application/vnd.oci.image.layer.v1.tar",
                       "digest": Digest::of(&layer.0), "size": layer.0.len()})
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                       "digest": blob(config.as_bytes()), "size": config.len()},
            "layers": layers,
        });
        let manifest = manifest.to_string();
        let index = json!({"schemaVersion": 2, "manifests": [
            {"mediaType": "application/vnd.oci.image.manifest.v1+json",
             "digest": blob(manifest.as_bytes()), "size": manifest.len()}]});
        fs::write(layout.join("index.json"), index.to_string()).unwrap();
        format!("oci:{}", layout.display())
    }

    /// Pulls an image of these layers; its tree.
    fn pull(&self, name: &str, layers: &[&Layer]) -> Result<PathBuf, PullError> {
        let request = PullRequest::new(reference(&self.image(name, layers)));
        let pulled = self.runtime.block_on(async { self.puller.start(request).wait().await })?;
        Ok(self.puller.store().rootfs(&pulled.digest))
    }

    fn tree(&self, name: &str, layers: &[&Layer]) -> PathBuf {
        self.pull(name, layers).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

fn stat(path: &Path) -> fs::Metadata {
    fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn mode(path: &Path) -> u32 {
    stat(path).mode() & 0o7777
}

/// What is below a folder, in the words of the layers' table.
fn listing(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_str().unwrap();
            let kind = stat(&path).file_type();
            if kind.is_dir() {
                found.push(format!("{name}/"));
                folders.push(path);
            } else if kind.is_symlink() {
                found.push(format!("{name}->{}", fs::read_link(&path).unwrap().display()));
            } else {
                found.push(name.to_owned());
            }
        }
    }
    found.sort();
    found
}

#[test]
fn modes_are_as_the_table_says() {
    let node = Node::new();
    for row in table("modes") {
        let octal = |text: &str| u32::from_str_radix(text, 8).unwrap();
        let (before, after) = (octal(&row[1]), octal(&row[2]));
        let layer = match row[0].as_str() {
            "file" => Layer::default().entry("x", EntryType::Regular, before, "", b"content"),
            "folder" => Layer::default().entry("x", EntryType::Directory, before, "", b""),
            other => panic!("{other:?} has no mode"),
        };
        let name = format!("{}-{before:o}", row[0]);
        let tree = node.tree(&name, &[&layer]);
        assert_eq!(mode(&tree.join("x")), after, "{row:?}");
        // Empty files are made in another way.
        if row[0] == "file" {
            let layer = Layer::default().entry("x", EntryType::Regular, before, "", b"");
            let tree = node.tree(&format!("{name}-empty"), &[&layer]);
            assert_eq!(mode(&tree.join("x")), after, "{row:?}, empty");
        }
        assert_eq!(mode(&tree), 0o755, "the root itself");
    }
}

#[test]
fn files_folders_and_links_are_as_the_table_says() {
    let node = Node::new();
    let base = Layer::default()
        .folder("d")
        .pax("SCHILY.xattr.user.comment", b"hello")
        .file("d/a", b"content")
        .link("l", EntryType::Symlink, "/etc/../nowhere");
    let tree = node.tree("base", &[&base]);

    let owner = || {
        let me = stat(node.folder.path());
        for name in ["", "d", "d/a", "l"] {
            let meta = stat(&tree.join(name));
            assert_eq!((meta.uid(), meta.gid()), (me.uid(), me.gid()), "{name}");
        }
    };
    let times = || {
        for name in ["", "d", "d/a"] {
            assert_eq!(stat(&tree.join(name)).mtime(), 0, "{name:?}");
        }
        assert!(stat(&tree.join("l")).mtime() > 1_700_000_000);
    };
    let xattrs = || {
        let mut list = [0_u8; 4096];
        let length = rustix::fs::listxattr(tree.join("d/a"), &mut list[..]).unwrap();
        let list = String::from_utf8_lossy(&list[..length]);
        assert!(!list.contains("user.comment"), "{list}");
    };
    let long_names = || {
        let long = format!("{}/{}", "x".repeat(255), "y".repeat(255));
        let deep = vec!["z"; 128].join("/");
        let longest = vec!["n".repeat(255); 15].join("/") + "/" + &"m".repeat(255);
        assert_eq!(longest.len(), 4095);
        let layer = Layer::default()
            .pax("path", long.as_bytes())
            .file("short", b"pax")
            .entry("././@LongLink", EntryType::GNULongName, 0, "", deep.as_bytes())
            .file("short", b"gnu")
            .pax("path", longest.as_bytes())
            .folder("short");
        let tree = node.tree("long", &[&layer]);
        assert_eq!(fs::read(tree.join(long)).unwrap(), b"pax");
        assert_eq!(fs::read(tree.join(deep)).unwrap(), b"gnu");
    };
    let missing_folders = || {
        let tree = node.tree("missing", &[&Layer::default().file("p/q/a", b"a")]);
        assert_eq!((mode(&tree.join("p")), mode(&tree.join("p/q"))), (0o755, 0o755));
    };
    let dots = || {
        let tree = node.tree("dots", &[&Layer::default().file("./models/./a", b"a")]);
        assert_eq!(listing(&tree), ["models/", "models/a"]);
    };
    let hard_link = || {
        let upper = Layer::default()
            .link("lower", EntryType::Link, "d/a")
            .file("own", b"own")
            .link("same", EntryType::Link, "own");
        let tree = node.tree("links", &[&base, &upper]);
        let inode = |name: &str| stat(&tree.join(name)).ino();
        assert_eq!(inode("lower"), inode("d/a"));
        assert_eq!(inode("same"), inode("own"));
        let late = Layer::default().link("early", EntryType::Link, "own").file("own", b"own");
        assert!(node.pull("late", &[&late]).is_err(), "a target stands before the link");
    };
    let equal_files = || {
        let layer = Layer::default().file("copy", b"content").entry(
            "run",
            EntryType::Regular,
            0o755,
            "",
            b"content",
        );
        let other = node.tree("equal", &[&layer]);
        let inode = |path: &str| stat(&other.join(path)).ino();
        assert_eq!(inode("copy"), stat(&tree.join("d/a")).ino(), "across images");
        assert_ne!(inode("run"), inode("copy"), "the executable bit is the inode's");
    };
    let empty_file = || {
        let tree = node.tree("empty", &[&Layer::default().file("e", b"").file("f", b"")]);
        let (one, two) = (stat(&tree.join("e")), stat(&tree.join("f")));
        assert_ne!(one.ino(), two.ino());
        assert_eq!((one.nlink(), one.len()), (1, 0));
    };
    let symbolic_link = || {
        assert_eq!(fs::read_link(tree.join("l")).unwrap(), Path::new("/etc/../nowhere"));
    };
    let twice = || {
        let layer = Layer::default().file("a", b"first").file("a", b"last");
        assert_eq!(fs::read(node.tree("twice", &[&layer]).join("a")).unwrap(), b"last");
    };
    let odd_tars = || {
        let mut layer = Layer::default()
            .entry("global", EntryType::XGlobalHeader, 0, "", b"13 comment=x\n")
            .entry("old/", EntryType::Regular, 0o755, "", b"");
        layer.0.extend([0; 1024]);
        layer.0.extend(b"anything");
        assert_eq!(listing(&node.tree("odd", &[&layer])), ["old/"]);
    };

    each_row_has_its_check(
        "shows",
        &[
            ("owner", &owner),
            ("times", &times),
            ("xattrs", &xattrs),
            ("long names", &long_names),
            ("missing folders", &missing_folders),
            ("dots", &dots),
            ("hard link", &hard_link),
            ("equal files", &equal_files),
            ("empty file", &empty_file),
            ("symbolic link", &symbolic_link),
            ("same name twice", &twice),
            ("odd tars", &odd_tars),
        ],
    );
}

#[test]
fn layers_add_up_as_the_table_says() {
    let node = Node::new();
    for (number, row) in table("layers").iter().enumerate() {
        let layer = |cell: &str, content: &[u8]| {
            quoted(cell).into_iter().fold(Layer::default(), |layer, word| {
                match (word.split_once("->"), word.strip_suffix('/')) {
                    (Some((name, target)), _) => layer.link(name, EntryType::Symlink, target),
                    (None, Some(folder)) => layer.folder(folder),
                    (None, None) => layer.file(word, content),
                }
            })
        };
        let (lower, upper) = (layer(&row[0], b"lower"), layer(&row[1], b"upper"));
        let tree = node.tree(&format!("image-{number}"), &[&lower, &upper]);
        assert_eq!(listing(&tree), quoted(&row[2]), "{row:?}");
        for name in
            quoted(&row[2]).iter().filter(|name| !name.contains("->") && !name.ends_with('/'))
        {
            let expected = if quoted(&row[1]).contains(name) { "upper" } else { "lower" };
            assert_eq!(fs::read_to_string(tree.join(name)).unwrap(), expected, "{row:?}: {name}");
        }
    }
}

#[test]
fn what_the_table_names_is_refused_in_its_words() {
    let node = Node::new();
    let new = Layer::default;
    let sparse = new().pax("GNU.sparse.major", b"1").file("a", b"a");
    let mut damaged = new().file("a", b"a");
    damaged.0[0] = b'b';
    let mut cut = new().file("a", &[1; 2000]);
    cut.0.truncate(1024);
    let deep = vec!["z"; 129].join("/");
    let cases: BTreeMap<&str, Layer> = [
        ("`..` in its name", new().file("a/../../b", b"b")),
        ("an absolute name", new().file("/etc/passwd", b"b")),
        ("a name that is not UTF-8", new().pax("path", b"a\xff").file("a", b"a")),
        ("a name of more than 255 bytes", new().pax("path", &[b'x'; 256]).file("a", b"a")),
        ("more than 128 folders above it", new().pax("path", deep.as_bytes()).folder("a")),
        (
            "a path through a symbolic link",
            new().link("l", EntryType::Symlink, "/etc").file("l/passwd", b"a"),
        ),
        ("a path through a file", new().file("a", b"a").file("a/b", b"b")),
        ("a hard link to nothing", new().link("a", EntryType::Link, "b")),
        ("a hard link to a folder", new().folder("d").link("a", EntryType::Link, "d")),
        ("a hard link that climbs out", new().link("a", EntryType::Link, "../../etc/shadow")),
        ("a character device", new().link("null", EntryType::Char, "")),
        ("a block device", new().link("sda", EntryType::Block, "")),
        ("a pipe", new().link("pipe", EntryType::Fifo, "")),
        ("sparse content", sparse),
        ("a type that nobody knows", new().entry("a", EntryType::new(b'Z'), 0o644, "", b"")),
        ("a damaged header", damaged),
        ("less content than its size says", cut),
    ]
    .into();
    let rows = table("refused");
    assert_eq!(rows.len(), cases.len());
    for (number, row) in rows.iter().enumerate() {
        let layer = cases.get(row[0].as_str()).unwrap_or_else(|| panic!("nothing is {:?}", row[0]));
        // In the second layer, above a good one: the image fails as a whole.
        let good = new().file("good", b"good");
        let error = node.pull(&format!("image-{number}"), &[&good, layer]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, PullError::Unpack(_)), "{row:?}: {error:?}");
        assert!(text.contains(quoted(&row[1])[0]), "{row:?}: {text}");
        assert!(text.contains(&Digest::of(&layer.0).to_string()), "the layer: {text}");
        assert_eq!(node.puller.store().images().unwrap(), [], "{row:?}");
    }
    let old_sparse = new().entry("a", EntryType::GNUSparse, 0o644, "", b"a");
    let error = node.pull("sparse", &[&old_sparse]).unwrap_err().to_string();
    assert!(error.contains("sparse files are not supported"), "{error}");
}

/// Runs a shell script in a mount namespace of its own, with `$carport` and the image `$image`
/// mounted at `$one` and `$two` and its folder `/models` at `$part`; what it prints.
fn in_mounts(script: &str) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: mounting needs root");
        return None;
    }
    if !installed("unshare") {
        return None;
    }
    let node = Node::new();
    let layer = Layer::default()
        .folder("models")
        .entry("models/run", EntryType::Regular, 0o4755, "", b"#!/bin/sh\necho ran\n")
        .file("models/weights", b"weights")
        .link("alias", EntryType::Symlink, "models");
    let image = node.image("image", &[&layer]);
    let mount = r#"
        set -e
        "$carport" mount "$image" "$one" >/dev/null
        "$carport" mount "$image" "$two" >/dev/null
        "$carport" mount --path /models "$image" "$part" >/dev/null
    "#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c"]);
    command.arg(format!("{mount}\n{script}")).env("carport", binary()).env("image", image);
    for name in ["one", "two", "part"] {
        command.env(name, node.folder.path().join(name));
    }
    let config = node.folder.path().join("config.yaml");
    fs::write(&config, "").unwrap();
    command.env("CARPORT_CONFIG", config).env("CARPORT_ROOT", node.folder.path().join("own"));
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}: {errors}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn mounts_are_as_the_table_says() {
    let check = |script: &str, expected: &str| {
        if let Some(said) = in_mounts(script) {
            assert_eq!(said.trim(), expected, "{script}");
        }
    };
    let read_only = || {
        check(
            r#"for deed in 'touch $one/new' 'rm $one/models/weights' 'chmod 0 $one/models/run'; do
                 eval "$deed" 2>&1 | grep -o 'Read-only file system'
               done"#,
            "Read-only file system\nRead-only file system\nRead-only file system",
        );
    };
    let restricted = || {
        let options = r#"grep -F " $one " /proc/self/mountinfo | cut -d' ' -f6 | tr ',' '\n' |
            grep -x -e ro -e nosuid -e nodev -e noexec; "$one"/models/run"#;
        check(options, "ro\nnosuid\nnodev\nran");
    };
    let folder = || {
        check(r#"ls "$part""#, "run\nweights");
        check(
            r#"for path in /alias /models/weights /none; do
                 "$carport" mount --path $path "$image" "$part-2" 2>&1 >/dev/null |
                     grep -o -e 'is not a folder' -e 'is not there' -e 'is reached through'
               done"#,
            "is reached through\nis not a folder\nis not there",
        );
    };
    let same_inodes = || {
        check(
            r#"stat -c %i "$one"/models/weights "$two"/models/weights "$part"/weights | uniq | wc -l"#,
            "1",
        );
    };
    let no_process = || {
        // The commands that mounted have ended.
        check(r#"cat "$one"/models/weights"#, "weights");
        check(r#"stat -f -c %T "$one" | grep -c fuse || true"#, "0");
    };
    each_row_has_its_check(
        "mount",
        &[
            ("read-only", &read_only),
            ("nosuid, nodev", &restricted),
            ("folder of an image", &folder),
            ("the same inodes", &same_inodes),
            ("no process behind it", &no_process),
        ],
    );
}
