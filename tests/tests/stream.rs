//! Streaming: an image is read while it arrives, what is read comes first and once, and in the end the
//! store has what an ordinary pull makes.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use carport_csi::fuse::{self, FuseMount};
use carport_image::pull::{Arriving, ArrivingFile, PullHandle, PullOptions, PullRequest};
use carport_image::tree::Node;
use carport_image::{Digest, PullError, Puller, Store};
use carport_tests::images::{Image, Tar, noise};
use carport_tests::layouts::{Files, Layer, Layout, files_below, tools};
use carport_tests::models::{reference, sources};
use carport_tests::node::eventually;
use carport_tests::registry::installed;
use carport_tests::scripted::{Answer, Gate, Request, Scripted};
use serde_json::json;
use tempfile::TempDir;

#[path = "stream/known.rs"]
mod known;
#[path = "stream/wrong.rs"]
mod wrong;

const SHARD_BYTES: usize = 12 * 1024 * 1024 + 333;

const CHUNK_BYTES: usize = 1024 * 1024;

/// What is read of a compressed layer's end.
const FOOTER_BYTES: u64 = 4096;

/// What a registry lets pass of the first shard: its head, which comes early.
const OPEN_BYTES: u64 = 2 * 1024 * 1024;

/// What it holds back: all but that and the last chunk, with which eStargz's next header comes.
const HELD: (u64, u64) = (OPEN_BYTES, SHARD_BYTES as u64 - 2 * 1024 * 1024);

/// In one that is no longer than the first shard is.
const SHARD: (u64, u64) = (OPEN_BYTES, SHARD_BYTES as u64);

const PATIENT: Duration = Duration::from_secs(60);

struct Machine {
    folder: TempDir,
    puller: Puller,
}

impl Machine {
    fn new(host: &str) -> Self {
        Self::with(host, PullOptions::default())
    }

    fn with(host: &str, options: PullOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        let puller = Puller::new(store, sources(&[host]), options);
        Self { folder, puller }
    }

    fn start(&self, host: &str, image: &Image, stream: bool) -> PullHandle {
        let place = format!("{host}/models/llama@{}", image.digest());
        self.puller.start(PullRequest { stream, ..PullRequest::new(reference(&place)) })
    }

    /// A machine on which an image of `server` arrives.
    async fn streaming(
        server: &Scripted,
        image: &Image,
        kind: &str,
    ) -> (Self, PullHandle, Arc<Arriving>) {
        let machine = Self::new(&server.host());
        let pull = machine.start(&server.host(), image, true);
        let arriving = pull.arriving().await.unwrap_or_else(|| panic!("{kind}: not listed"));
        (machine, pull, arriving)
    }

    fn store(&self) -> &Store {
        self.puller.store()
    }

    fn mount(&self, arriving: &Arriving, patience: Duration) -> FuseMount {
        let target = self.target();
        fs::create_dir_all(&target).unwrap();
        FuseMount::mount_arriving(arriving, self.store(), None, patience, &target).unwrap()
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("mount")
    }

    /// The image is what an ordinary pull makes of it.
    async fn assert_is_plain(&self, image: &Image, kind: &str) {
        let found = listing(&self.store().rootfs(&image.digest()));
        assert_eq!(found, plain_tree(image).await, "{kind}");
    }

    fn assert_nothing_is_under_way(&self) {
        for folder in ["ingest", "leases"] {
            assert_eq!(files_below(&self.store().root().join(folder)), Files::new(), "{folder}");
        }
    }
}

fn shard(n: u64) -> Vec<u8> {
    noise(SHARD_BYTES, n)
}

/// Three shards and small files in one layer.
fn tar_of(shards: [&[u8]; 3]) -> Image {
    Image::of(&[Tar::default()
        .entry("models", tar::EntryType::Directory, "", b"")
        .file("models/config.json", b"{}")
        .file("models/empty", b"")
        .file("models/model-1.safetensors", shards[0])
        .file("models/model-2.safetensors", shards[1])
        .file("models/model-3.safetensors", shards[2])
        .symlink("models/latest", "model-3.safetensors")
        .file("models/vocab.txt", b"a b c")
        .end()])
}

fn one_layer() -> Image {
    tar_of([&shard(1), &shard(2), &shard(3)])
}

/// The same, as raw layers of an artifact.
fn raw_layers() -> Image {
    let mut layout = Layout::new();
    let raw = |name: &str, content: &[u8]| {
        let named = json!({"org.cncf.model.filepath": name});
        Layer::raw("application/vnd.cncf.model.weight.v1.raw", named, content)
    };
    let layers = [
        raw("model-1.safetensors", &shard(1)),
        raw("model-2.safetensors", &shard(2)),
        raw("model-3.safetensors", &shard(3)),
        raw("config.json", b"{\"raw\": true}"),
    ];
    let config = ("application/vnd.cncf.model.config.v1+json", &json!({}));
    let digest = layout.add("v1", "", config, &layers);
    Image::of_layout(&layout, &digest)
}

/// About the same, in one compressed layer with a table of contents.
fn packed_layer(kind: &str, seeds: [u64; 3]) -> Layer {
    let shards = seeds.map(shard);
    let names =
        ["models/model-1.safetensors", "models/model-2.safetensors", "models/model-3.safetensors"];
    let mut files: Vec<(&str, &[u8])> =
        vec![("models/", b""), ("models/config.json", b"{}"), ("models/empty", b"")];
    files.extend(names.iter().zip(&shards).map(|(name, content)| (*name, &content[..])));
    files.push(("models/vocab.txt", b"a b c"));
    let suffix = if kind == "estargz" { "gzip" } else { "zstd" };
    let media_type = format!("application/vnd.oci.image.layer.v1.tar+{suffix}");
    Layer::made_in_chunks(&media_type, kind, CHUNK_BYTES, &files)
}

fn image_of(layers: &[Layer]) -> Image {
    let (layout, digest) = layout_of(layers);
    Image::of_layout(&layout, &digest)
}

fn layout_of(layers: &[Layer]) -> (Layout, Digest) {
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    let config = json!({"architecture": "amd64", "os": "linux", "rootfs": {
        "type": "layers", "diff_ids": diff_ids}});
    let mut layout = Layout::new();
    let config = ("application/vnd.oci.image.config.v1+json", &config);
    let digest = layout.add("v1", "", config, layers);
    (layout, digest)
}

/// The kinds of layers that stream.
fn kinds() -> Vec<(&'static str, Image, &'static str)> {
    let mut kinds = vec![("tar", one_layer(), "models/"), ("raw", raw_layers(), "")];
    if tools() {
        for kind in ["zstd:chunked", "estargz"] {
            kinds.push((kind, image_of(&[packed_layer(kind, [1, 2, 3])]), "models/"));
        }
    }
    kinds
}

fn range_of(request: &Request) -> Option<(u64, u64)> {
    let (from, to) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse::<u64>().ok()? + 1))
}

/// A registry that holds a range of a layer back behind the gate.
async fn holding_back(image: &Image, layer: usize, range: (u64, u64), gate: &Gate) -> Scripted {
    let (image, gate, layer) = (image.clone(), gate.clone(), image.layers[layer]);
    Scripted::start(move |request| {
        let held = request.target.ends_with(&layer.to_string())
            && range_of(request).is_some_and(|(from, to)| from < range.1 && range.0 < to);
        if held { image.answer_gated(request, &gate) } else { image.answer(request) }
    })
    .await
}

/// Bytes of layers that were asked for.
fn asked(server: &Scripted, image: &Image) -> u64 {
    let mut bytes = 0;
    for request in server.requests() {
        let layers = &image.layers;
        if let Some(layer) = layers.iter().find(|one| request.target.ends_with(&one.to_string())) {
            let (from, to) = range_of(&request).unwrap_or((0, image.size_of(layer)));
            bytes += to - from;
        }
    }
    bytes
}

/// Bytes of layers that were asked for more than once.
fn asked_twice(server: &Scripted, image: &Image) -> u64 {
    let mut twice = 0;
    for layer in &image.layers {
        let requests = server.requests().into_iter();
        let requests = requests.filter(|request| request.target.ends_with(&layer.to_string()));
        let mut ranges: Vec<_> = requests
            .map(|request| range_of(&request).unwrap_or((0, image.size_of(layer))))
            .collect();
        ranges.sort_unstable();
        let mut at = 0;
        for (from, to) in ranges {
            twice += at.min(to).saturating_sub(from);
            at = at.max(to);
        }
    }
    twice
}

fn file<'a>(arriving: &'a Arriving, path: &str) -> &'a ArrivingFile {
    match arriving.tree().get(path) {
        Some(Node::File { object, .. }) => arriving.file(object).unwrap(),
        other => panic!("{path}: {other:?}"),
    }
}

async fn read(file: &ArrivingFile, at: u64, length: usize) -> Vec<u8> {
    let waited = tokio::time::timeout(PATIENT, file.wait(at..at + length as u64)).await;
    waited.expect("it comes").unwrap();
    let mut bytes = vec![0; length];
    file.open().unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

/// What an ordinary pull makes of the image.
async fn plain_tree(image: &Image) -> BTreeMap<String, String> {
    let image = image.clone();
    let answered = image.clone();
    let server = Scripted::start(move |request| answered.answer(request)).await;
    let node = Machine::new(&server.host());
    let pulled = node.start(&server.host(), &image, false).wait().await.unwrap();
    listing(&node.store().rootfs(&pulled.digest))
}

/// All that a reader can tell of a tree.
fn listing(root: &Path) -> BTreeMap<String, String> {
    let walk = walkdir::WalkDir::new(root).min_depth(1).into_iter();
    walk.map(|entry| {
        let entry = entry.unwrap();
        let meta = entry.path().symlink_metadata().unwrap();
        let what = if meta.is_symlink() {
            format!("-> {}", fs::read_link(entry.path()).unwrap().display())
        } else if meta.is_dir() {
            format!("folder {:o} {} {}:{}", meta.mode(), meta.mtime(), meta.uid(), meta.gid())
        } else {
            let content = blake3::hash(&fs::read(entry.path()).unwrap());
            let (mode, owner) = (meta.mode(), (meta.uid(), meta.gid()));
            format!("{mode:o} {} {} {owner:?} {content}", meta.mtime(), meta.len())
        };
        (entry.path().strip_prefix(root).unwrap().display().to_string(), what)
    })
    .collect()
}

fn can_fuse(test: &str) -> bool {
    let can = fuse::check();
    if let Err(error) = &can {
        eprintln!("SKIPPED {test}: {error}");
    }
    can.is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_file_is_read_while_the_first_is_held_back_and_all_comes_once() {
    for (kind, image, below) in kinds() {
        let gate = Gate::closed_at(OPEN_BYTES);
        let server = holding_back(&image, 0, HELD, &gate).await;
        let (node, pull, arriving) = Machine::streaming(&server, &image, kind).await;
        assert_eq!((arriving.digest(), arriving.waited_for()), (image.digest(), 0));

        let last = file(&arriving, &format!("{below}model-3.safetensors"));
        let content = shard(3);
        assert!(read(last, 0, 100_000).await == content[..100_000], "{kind}");
        let tail = SHARD_BYTES - 100_000;
        assert!(read(last, tail as u64, 100_000).await == content[tail..], "{kind}");
        let first = file(&arriving, &format!("{below}model-1.safetensors"));
        assert_eq!(first.has(0..SHARD_BYTES as u64), Ok(false), "{kind}");
        assert_eq!(node.store().image(&image.digest()).unwrap(), None, "not complete");

        gate.open();
        let pulled = pull.wait().await.unwrap();
        // A layer's end is looked at for a table of contents, and what follows that is not of the tar.
        let (most, whole) = (image.layer_bytes(), ["tar", "raw"].contains(&kind));
        let (least, twice) = if whole { (most, 0) } else { (most * 99 / 100, FOOTER_BYTES) };
        assert!(asked_twice(&server, &image) <= twice, "{kind}");
        let fetched = pulled.fetched_bytes;
        assert!((least..=most + twice).contains(&fetched), "{kind}: {fetched}");
        assert_eq!(asked(&server, &image), pulled.fetched_bytes, "{kind}");
        let progress = pull.progress();
        assert_eq!(progress.done_bytes, progress.total_bytes, "{kind}");
        node.assert_is_plain(&image, kind).await;
        node.assert_nothing_is_under_way();
        // Who opens it now opens what is stored.
        assert!(read(first, 0, SHARD_BYTES).await == shard(1));
        let again = node.start(&server.host(), &image, true);
        assert!(again.arriving().await.is_none(), "it is here");
        assert!(again.wait().await.unwrap().already_present);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_of_what_arrives_looks_as_the_stored_image_will() {
    if !can_fuse("a_mount_of_what_arrives_looks_as_the_stored_image_will") {
        return;
    }
    let image = one_layer();
    let gate = Gate::closed_at(OPEN_BYTES);
    let server = holding_back(&image, 0, SHARD, &gate).await;
    let (node, pull, arriving) = Machine::streaming(&server, &image, "tar").await;
    let mount = Arc::new(node.mount(&arriving, PATIENT));
    let target = node.target();
    let path = target.join("models/model-3.safetensors");
    let early = tokio::task::spawn_blocking(move || fs::read(path)).await.unwrap().unwrap();
    assert!(early == shard(3));
    assert_eq!(node.store().image(&image.digest()).unwrap(), None, "not complete");
    let path = target.join("models/model-1.safetensors");
    let late = tokio::task::spawn_blocking(move || fs::read(path));
    gate.open();
    assert!(late.await.unwrap().unwrap() == shard(1));
    pull.wait().await.unwrap();
    let seen = target.clone();
    let seen = tokio::task::spawn_blocking(move || listing(&seen)).await.unwrap();
    assert_eq!(seen, listing(&node.store().rootfs(&image.digest())));
    assert_eq!(asked(&server, &image), image.layer_bytes(), "each byte once");
    tokio::task::spawn_blocking(move || drop(mount)).await.unwrap();
    assert!(!fuse::is_mounted(&target).unwrap());
}

/// A read of what is held back, in a thread; its error, and how long it took.
fn blocked(path: PathBuf) -> tokio::task::JoinHandle<(io::Error, Duration)> {
    let start = Instant::now();
    tokio::task::spawn_blocking(move || {
        let file = File::open(path).unwrap();
        let at = SHARD_BYTES as u64 - 1000;
        let error = file.read_at(&mut [0; 100], at).unwrap_err();
        (error, start.elapsed())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_what_does_not_come_return_in_time_on_stop_and_on_abort() {
    if !can_fuse("readers_of_what_does_not_come_return_in_time_on_stop_and_on_abort") {
        return;
    }
    let image = one_layer();
    let gate = Gate::closed_at(OPEN_BYTES);
    let server = holding_back(&image, 0, SHARD, &gate).await;
    let (node, pull, arriving) = Machine::streaming(&server, &image, "tar").await;
    let target = node.target();
    let path = target.join("models/model-1.safetensors");

    let mount = node.mount(&arriving, Duration::from_millis(300));
    let (error, took) = blocked(path.clone()).await.unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert!((Duration::from_millis(300)..Duration::from_secs(20)).contains(&took), "{took:?}");
    tokio::task::spawn_blocking(move || drop(mount)).await.unwrap();

    let mount = node.mount(&arriving, PATIENT);
    let readers: Vec<_> = (0..3).map(|_| blocked(path.clone())).collect();
    mount.end_waits();
    for reader in readers {
        let (error, took) = tokio::time::timeout(PATIENT / 2, reader).await.unwrap().unwrap();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        assert!(took < PATIENT, "{took:?}");
    }
    tokio::task::spawn_blocking(move || drop(mount)).await.unwrap();

    let mount = node.mount(&arriving, PATIENT);
    let device = fs::metadata(&target).unwrap().dev();
    let abort = format!("/sys/fs/fuse/connections/{}/abort", rustix::fs::minor(device));
    let reader = blocked(path.clone());
    match File::options().write(true).open(&abort) {
        Ok(abort) => {
            io::Write::write_all(&mut &abort, b"1").unwrap();
            let (error, _) = tokio::time::timeout(PATIENT / 2, reader).await.unwrap().unwrap();
            let gone = [libc::ECONNABORTED, libc::ENOTCONN, libc::EIO].map(Some);
            assert!(gone.contains(&error.raw_os_error()), "{error}");
        }
        Err(error) => {
            eprintln!("SKIPPED the abort: {abort}: {error}");
            mount.end_waits();
            reader.await.unwrap();
        }
    }
    tokio::task::spawn_blocking(move || drop(mount)).await.unwrap();

    // The pull's own end is an end for who waits, too.
    let first = file(&arriving, "models/model-1.safetensors").clone();
    let waiting = tokio::spawn(async move { first.wait(OPEN_BYTES..SHARD_BYTES as u64).await });
    drop(pull);
    let ended = tokio::time::timeout(PATIENT / 2, waiting).await.unwrap().unwrap();
    assert!(ended.unwrap_err().to_string().contains("stopped"));
    node.puller.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_that_skopeo_made_are_streamed() {
    if !tools() || !installed("skopeo") {
        return;
    }
    let tar = "application/vnd.oci.image.layer.v1.tar";
    let files =
        [("models/config.json", b"{}".to_vec()), ("models/a", shard(1)), ("models/b", shard(2))];
    let files = files.each_ref().map(|(name, content)| (*name, &content[..]));
    let layer = Layer::made(tar, "tar", &files);
    let ((plain, _), chunked) = (layout_of(&[layer]), Layout::new());
    let done = Command::new("skopeo")
        .args(["copy", "--quiet", "--dest-compress-format", "zstd:chunked"])
        .args(["--dest-compress", &plain.reference("v1"), &chunked.reference("v1")])
        .output()
        .unwrap();
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        eprintln!("SKIPPED layers_that_skopeo_made_are_streamed: no zstd:chunked: {said}");
        return;
    }
    let index = fs::read(chunked.path().join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let digest: Digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    let image = Image::of_layout(&chunked, &digest);
    let gate = Gate::closed_at(OPEN_BYTES);
    let server = holding_back(&image, 0, HELD, &gate).await;
    let (node, pull, arriving) = Machine::streaming(&server, &image, "zstd:chunked").await;
    assert_eq!(arriving.waited_for(), 0);
    assert!(read(file(&arriving, "models/b"), 0, SHARD_BYTES).await == shard(2));
    assert_eq!(node.store().image(&image.digest()).unwrap(), None, "not complete");
    gate.open();
    pull.wait().await.unwrap();
    node.assert_is_plain(&image, "zstd:chunked").await;
    assert!(asked_twice(&server, &image) <= FOOTER_BYTES);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_recover_when_a_registry_that_went_away_is_back() {
    for (kind, image, below) in kinds().into_iter().filter(|(kind, ..)| *kind != "raw") {
        let away = Arc::new(AtomicBool::new(true));
        let (served, is_away) = (image.clone(), Arc::clone(&away));
        let server = Scripted::start(move |request| {
            let held = range_of(request).is_some_and(|(from, to)| from < HELD.1 && HELD.0 < to);
            if held && is_away.load(Ordering::Relaxed) {
                Answer::status(503)
            } else {
                served.answer(request)
            }
        })
        .await;
        let options = PullOptions { attempts: 1, ..PullOptions::default() };
        let node = Machine::with(&server.host(), options);
        let pull = node.start(&server.host(), &image, true);
        let arriving = pull.arriving().await.unwrap_or_else(|| panic!("{kind}: not listed"));
        let first = file(&arriving, &format!("{below}model-1.safetensors"));
        let last = file(&arriving, &format!("{below}model-3.safetensors"));
        assert!(read(last, 0, SHARD_BYTES).await == shard(3), "{kind}: what can come comes");
        let early = first.wait(HELD.0..HELD.0 + 1);
        assert!(tokio::time::timeout(Duration::from_millis(300), early).await.is_err(), "{kind}");
        let patient = first.clone();
        let waiting = tokio::spawn(async move { patient.wait(HELD.0..HELD.0 + 1).await });
        let trouble = async || arriving.trouble().is_some_and(|why| why.contains("503"));
        eventually("trouble is told", trouble).await;
        assert!(tokio::time::timeout(Duration::ZERO, pull.wait()).await.is_err(), "{kind}");

        away.store(false, Ordering::Relaxed);
        let waited = tokio::time::timeout(PATIENT, waiting).await.unwrap().unwrap();
        waited.unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert!(read(first, 0, SHARD_BYTES).await == shard(1), "{kind}");
        pull.wait().await.unwrap();
        node.assert_is_plain(&image, kind).await;
        assert_eq!(arriving.trouble(), None, "{kind}");
        node.assert_nothing_is_under_way();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_layers_are_waited_for() {
    if !tools() {
        return;
    }
    let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
    let plain = "application/vnd.oci.image.layer.v1.tar";
    let content = shard(7);
    let layers = [
        Layer::made(gzip, "tar+gzip", &[("a", &content[..100_000])]),
        Layer::made(plain, "tar", &[("b", &content)]),
    ];
    let image = image_of(&layers);
    let gate = Gate::closed_at(OPEN_BYTES);
    let server = holding_back(&image, 1, SHARD, &gate).await;
    let (_node, pull, arriving) = Machine::streaming(&server, &image, "tar").await;
    assert_eq!(arriving.waited_for(), 1);
    match arriving.tree().get("a") {
        Some(Node::File { object, .. }) => assert!(arriving.file(object).is_none(), "it is stored"),
        other => panic!("{other:?}"),
    }
    assert_eq!(file(&arriving, "b").has(0..SHARD_BYTES as u64), Ok(false));
    gate.open();
    pull.wait().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_killed_goes_on_as_a_plain_pull() {
    const BYTES: usize = 160 * 1024 * 1024;
    const KILLED_AT: u64 = 120 * 1024 * 1024;
    const MOST_AGAIN: u64 = 64 * 1024 * 1024;
    if !can_fuse("a_stream_that_is_killed_goes_on_as_a_plain_pull") {
        return;
    }
    let content = noise(BYTES, 9);
    let image = Image::of(&[Tar::default().file("weights", &content).end()]);
    let gate = Gate::closed_at(KILLED_AT);
    // But for the end of the layer, which shows that no file comes behind.
    let server = holding_back(&image, 0, (0, BYTES as u64), &gate).await;
    let folder = tempfile::tempdir().unwrap();
    let (root, target) = (folder.path().join("store"), folder.path().join("mount"));
    let host = server.host();
    let place = format!("{host}/models/llama@{}", image.digest());
    let carport = |arguments: &[&str]| {
        let mut command = Command::new(carport_tests::carport::binary());
        command.args(arguments).args(["--plain-http", &host, "--root"]).arg(&root).arg(&place);
        command.stdin(Stdio::null());
        command
    };
    let mut stream = carport(&["mount", "--stream", "--foreground"]);
    let mut stream = stream.arg(&target).stdout(Stdio::null()).spawn().unwrap();
    gate.reached(KILLED_AT).await;
    let early = target.join("weights");
    let early = tokio::task::spawn_blocking(move || {
        let mut bytes = vec![0; 1000];
        File::open(early).unwrap().read_exact_at(&mut bytes, 50_000_000).unwrap();
        bytes
    });
    assert!(early.await.unwrap() == content[50_000_000..50_001_000]);
    stream.kill().unwrap();
    stream.wait().unwrap();
    fuse::unmount(&target).unwrap();

    gate.open();
    let mut pull = carport(&["pull"]);
    let pulled = tokio::task::spawn_blocking(move || pull.output().unwrap()).await.unwrap();
    assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
    let again = gate.served().saturating_sub(image.layer_bytes());
    assert!(again <= MOST_AGAIN, "{again} bytes came twice");
    let store = Store::open(&root).unwrap();
    assert!(fs::read(store.rootfs(&image.digest()).join("weights")).unwrap() == content);
    assert_eq!(files_below(&root.join("ingest")), Files::new());
}
