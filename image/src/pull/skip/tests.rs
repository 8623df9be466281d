use std::fs;
use std::process::Command;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::toc::{TAIL_BYTES, footer, parse};
use super::*;
use crate::manifest::Compression;
use crate::pull::{PullError, PullOptions, PullRequest, Pulled, Puller};
use crate::reference::Reference;
use crate::source::{RegistryOptions, Sources};
use crate::testing::{Entry, Layout, listing, noise, skippable, tar};

const MIB: usize = 1024 * 1024;

/// A tar, and the zstd:chunked of it in chunks of a MiB.
fn chunked(files: &[(&str, &[u8])], edit: &dyn Fn(&mut Value)) -> (Vec<u8>, Vec<u8>) {
    let entries: Vec<_> = files.iter().map(|(name, content)| Entry::File(name, content)).collect();
    crate::testing::chunked(&entries, (Compression::Zstd, MIB), edit)
}

struct Bench {
    dir: tempfile::TempDir,
    layout: Layout,
    puller: Puller,
}

fn puller(root: &std::path::Path) -> Puller {
    let sources = Sources::new(RegistryOptions::default()).unwrap();
    Puller::new(Store::open(root).unwrap(), sources, PullOptions::default())
}

/// A store that has these files, each in a layer of its own.
async fn bench(files: &[(&str, &[u8])]) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&dir.path().join("layout"));
    let puller = puller(&dir.path().join("store"));
    let layers: Vec<_> = files
        .iter()
        .map(|(name, content)| layout.layer(&tar(&[Entry::File(name, content)]), Compression::None))
        .collect();
    let base = layout.image("base", &layers);
    let bench = Bench { dir, layout, puller };
    bench.pull(&base).await.unwrap();
    bench
}

impl Bench {
    async fn pull(&self, reference: &Reference) -> Result<Pulled, PullError> {
        self.puller.start(PullRequest::new(reference.clone())).wait().await
    }

    fn assert_tree(&self, pulled: &Pulled, files: &[(&str, &[u8])], what: &str) {
        let root = self.puller.store().rootfs(&pulled.digest);
        let names: Vec<_> = files.iter().map(|(name, _)| *name).collect();
        assert_eq!(listing(&root), names, "{what}");
        for (name, content) in files {
            assert!(fs::read(root.join(name)).unwrap() == *content, "{what}: {name}");
        }
        let left = listing(&self.puller.store().root().join("ingest"));
        assert!(left.is_empty(), "{what}: {left:?}");
    }
}

type Lie = Box<dyn Fn(&mut Value)>;

#[tokio::test]
async fn whatever_a_table_of_contents_says_the_tree_is_right() {
    let (shared, old, new) = (noise(1, 2 * MIB), noise(2, 2 * MIB), noise(3, 2 * MIB));
    let files: [(&str, &[u8]); 2] = [("a", &shared), ("b", &new)];
    let set = |entry: usize, key: &'static str, value: Value| {
        move |toc: &mut Value| toc["entries"][entry][key] = value.clone()
    };
    let old_in_place_of_new = {
        let halves = [Digest::of(&old[..MIB]), Digest::of(&old[MIB..])];
        let whole = Digest::of(&old);
        move |toc: &mut Value| {
            toc["entries"][2]["digest"] = json!(whole);
            toc["entries"][2]["chunkDigest"] = json!(halves[0]);
            toc["entries"][3]["chunkDigest"] = json!(halves[1]);
        }
    };
    let lies: Vec<(&str, bool, Lie)> = vec![
        ("nothing wrong", true, Box::new(|_| {})),
        ("another file's digests", false, Box::new(old_in_place_of_new)),
        ("a file that begins earlier", false, Box::new(set(0, "offset", json!(3)))),
        ("a file that ends in itself", false, Box::new(set(0, "endOffset", json!(MIB)))),
        ("a file that ends in the next", false, Box::new(set(0, "endOffset", json!(3 * MIB)))),
        ("a file behind the end", false, Box::new(set(0, "endOffset", json!(u64::MAX)))),
        ("no end, a last chunk elsewhere", false, {
            let chunk = set(1, "offset", json!(4 * MIB));
            let end = set(0, "endOffset", json!(0));
            Box::new(move |toc| (chunk(toc), end(toc)).0)
        }),
        ("an end that is not said", true, Box::new(set(0, "endOffset", json!(0)))),
        ("another size", false, Box::new(set(0, "size", json!(2 * MIB + 1)))),
        ("an executable", false, Box::new(set(0, "mode", json!(0o755)))),
        ("a negative offset", false, Box::new(set(0, "offset", json!(-1)))),
        ("no digest", false, Box::new(set(0, "digest", Value::Null))),
        ("no list", false, Box::new(|toc| toc["entries"] = json!("none"))),
        (
            "a file listed twice",
            true,
            Box::new(|toc| {
                let entries = toc["entries"].as_array_mut().unwrap();
                entries.insert(0, entries[0].clone());
            }),
        ),
    ];
    for (what, helps, lie) in lies {
        let mut bench = bench(&[("a", &shared), ("b", &old)]).await;
        let (tar, blob) = chunked(&files, &*lie);
        let layer = bench.layout.packed(&tar, &blob, "+zstd");
        let tune = bench.layout.image("tune", &[layer]);
        let pulled = bench.pull(&tune).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        bench.assert_tree(&pulled, &files, what);
        let whole = blob.len() as u64;
        assert_eq!(
            pulled.fetched_bytes < whole - 500_000,
            helps,
            "{what}: {}",
            pulled.fetched_bytes
        );
        assert!(pulled.fetched_bytes < 2 * whole, "{what}: {}", pulled.fetched_bytes);
        assert_eq!(bench.puller.store().usage().unwrap().objects, 3, "{what}");
    }
}

/// Of a blob that is not seen whole the digest is not known: what one image says of it must not
/// count for others.
#[tokio::test]
async fn what_a_diff_id_proves_is_not_taken_for_the_blob() {
    let (here, theirs) = (noise(1, 2 * MIB), noise(2, 3 * MIB));
    let mut bench = bench(&[("a", &here)]).await;
    let evil_files: [(&str, &[u8]); 2] = [("a", &here), ("note", b"gotcha")];
    // As long as the other, so that no source would notice.
    let (good_tar, good) = chunked(&[("weights", &theirs)], &|_| {});
    let (_, short) = chunked(&evil_files, &|_| {});
    let padding = vec![0; good.len() - short.len() - 8];
    let (evil_tar, mut evil) = chunked(&evil_files, &|_| {});
    let before_footer = evil.len() - 72;
    evil.splice(before_footer..before_footer, skippable(&padding));
    assert_eq!(evil.len(), good.len());

    let theirs_layer = bench.layout.packed(&good_tar, &good, "+zstd");
    // Their layer's digest, with another diff_id and other bytes behind it.
    let evil_layer = bench.layout.packed(&evil_tar, &good, "+zstd");
    fs::write(bench.layout.blob_path(&theirs_layer.blob), &evil).unwrap();
    let evil_image = bench.layout.image("evil", &[evil_layer]);
    let pulled = bench.pull(&evil_image).await.unwrap();
    bench.assert_tree(&pulled, &evil_files, "what its own config says");
    assert!(pulled.fetched_bytes < MIB as u64, "it was skipped in");
    let shown = bench.puller.store().layer(&crate::testing::layer_of(&good, Compression::Zstd));
    assert!(shown.unwrap().is_none(), "nothing is known of the blob");

    fs::write(bench.layout.blob_path(&theirs_layer.blob), &good).unwrap();
    let image = bench.layout.image("theirs", &[theirs_layer]);
    let pulled = bench.pull(&image).await.unwrap();
    bench.assert_tree(&pulled, &[("weights", &theirs)], "theirs");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_bytes_make_the_reader_of_tables_panic(
        at in 0..4096_usize, with in any::<u8>(), cut in 0..200_usize, gzip in any::<bool>(),
    ) {
        let small = noise(1, 1_200_000);
        let (_, mut blob) = chunked(&[("a", &small)], &|_| {});
        let last = blob.len() - 1;
        blob[last - at] = with;
        blob.truncate(blob.len() - cut.saturating_sub(100));
        let compression = if gzip { Compression::Gzip } else { Compression::Zstd };
        let size = blob.len() as u64;
        let tail = &blob[blob.len() - TAIL_BYTES as usize..];
        if let Some(footer) = footer(tail, size, compression) {
            prop_assert!(footer.toc.end <= size && footer.end <= size);
            let toc = &blob[footer.toc.start as usize..footer.toc.end as usize];
            let _ = parse(&footer, toc);
        }
    }
}

const CRASH_DIR: &str = "CARPORT_CRASH_SKIP_DIR";

fn tune_files() -> [Vec<u8>; 3] {
    [noise(1, 2 * MIB), noise(2, MIB + 7), noise(3, 3 * MIB)]
}

/// Runs in a process of its own, which `crash::point` ends.
#[test]
fn crash_child() {
    let Ok(dir) = std::env::var(CRASH_DIR) else { return };
    let dir = std::path::Path::new(&dir);
    let reference = format!("oci:{}:tune", dir.join("layout").display()).parse().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let puller = puller(&dir.join("store"));
        puller.start(PullRequest::new(reference)).wait().await.unwrap();
    });
}

#[tokio::test]
async fn a_crash_at_any_step_of_a_pull_that_skips_loses_nothing() {
    let [a, b, c] = tune_files();
    let files: [(&str, &[u8]); 3] = [("a", &a), ("b", &b), ("c", &c)];
    for step in 1.. {
        let mut bench = bench(&[("a", &a), ("other", &b)]).await;
        let tars: Vec<_> = files.iter().map(|(name, content)| Entry::File(name, content)).collect();
        let layer = bench.layout.layer(&tar(&tars), Compression::None);
        let tune = bench.layout.image("tune", &[layer]);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pull::skip::tests::crash_child", "--nocapture"])
            .env(CRASH_DIR, bench.dir.path())
            .env("CARPORT_CRASH_AT", step.to_string())
            .output()
            .unwrap();
        let crashed = !output.status.success();
        let Bench { puller: before, .. } = &bench;
        let base = before.store().images().unwrap();
        bench.puller = puller(&bench.dir.path().join("store"));
        let what = format!("step {step}");
        // Nothing of the base has gone, and nothing stays of the crash.
        bench.puller.store().collect().unwrap();
        for image in base.iter().filter(|image| image.files == 2) {
            let root = bench.puller.store().rootfs(&image.digest);
            assert!(fs::read(root.join("a")).unwrap() == a, "{what}");
        }
        let pulled = bench.pull(&tune).await.unwrap();
        bench.assert_tree(&pulled, &files, &what);
        assert!(
            pulled.fetched_bytes < 3 * MIB as u64 + 100_000,
            "{what}: {}",
            pulled.fetched_bytes
        );
        assert_eq!(bench.puller.store().usage().unwrap().objects, 3, "{what}");
        if !crashed {
            assert!(step > 6, "the child passed {step} points only");
            return;
        }
    }
}

#[tokio::test]
async fn what_is_here_already_needs_no_room() {
    let (shared, own) = (noise(50, 8 * MIB), noise(51, 2 * MIB));
    let mut bench = bench(&[("base", &shared)]).await;
    let entries = [Entry::File("a", &shared), Entry::File("b", &own)];
    let layer = bench.layout.layer(&tar(&entries), Compression::None);
    let tune = bench.layout.image("tune", &[layer]);
    let plan = bench.puller.plan(&[PullRequest::new(tune.clone())]).await.unwrap();
    assert!(plan.download_bytes > 10 * MIB as u64, "{plan:?}");
    assert!((2 * MIB as u64..2 * MIB as u64 + 65_536).contains(&plan.missing_bytes), "{plan:?}");

    // A quota that what is new fits into, and the layer does not; the base may not go.
    let root = bench.dir.path().join("store");
    let limits = crate::store::Limits {
        quota_bytes: Some(11 * MIB as u64),
        ..crate::store::Limits::default()
    };
    let sources = Sources::new(RegistryOptions::default()).unwrap();
    let store = Store::open(&root).unwrap().with_limits(limits);
    bench.puller = Puller::new(store, sources, PullOptions::default());
    let pulled = bench.pull(&tune).await.unwrap();
    bench.assert_tree(&pulled, &[("a", &shared), ("b", &own)], "tight");
    assert_eq!(bench.puller.store().images().unwrap().len(), 2, "nothing was evicted");

    let large =
        bench.layout.layer(&tar(&[Entry::File("c", &noise(52, 2 * MIB))]), Compression::None);
    let large = bench.layout.image("large", &[large]);
    let refused = bench.pull(&large).await.unwrap_err();
    assert_eq!(refused.reason(), "no_space", "{refused}");
}
