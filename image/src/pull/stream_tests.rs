//! A stream that ends at any step of its commit; what readers see is in `tests/tests/stream.rs`.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::manifest::Compression;
use crate::source::RegistryOptions;
use crate::testing::{Entry, Layout, chunked, noise, tar};

/// Who knows the digest of a file that is here, and not the file, is not shown it.
#[tokio::test]
async fn a_digest_in_a_table_of_contents_opens_no_file() {
    let (secret, other) = (noise(1, 3_000_000), noise(2, 3_000_000));
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&dir.path().join("layout"));
    let base = layout.layer(&tar(&[Entry::File("secret", &secret)]), Compression::None);
    layout.image("v1", &[base]);
    let puller = puller(&dir.path().join("store"));
    puller.start(request(dir.path(), false)).wait().await.unwrap();
    for kind in [Compression::Zstd, Compression::Gzip] {
        let digest = Digest::of(&secret);
        let lie = |toc: &mut serde_json::Value| {
            toc["entries"][0]["digest"] = digest.to_string().into();
        };
        let members = [Entry::File("bait", &other)];
        let (tar, blob) = chunked(&members, (kind, 100_000), &lie);
        let suffix = if kind == Compression::Zstd { "+zstd" } else { "+gzip" };
        let layer = layout.packed(&tar, &blob, suffix);
        layout.image("v1", &[layer]);
        let again = PullRequest { policy: PullPolicy::Always, ..request(dir.path(), true) };
        let pull = puller.start(again);
        let arriving = pull.arriving().await.unwrap();
        assert_eq!(arriving.waited_for(), 0, "{kind:?}");
        let pulled = pull.wait().await.unwrap();
        let rootfs = puller.store().rootfs(&pulled.digest);
        assert!(fs::read(rootfs.join("bait")).unwrap() == other, "{kind:?}");
    }
}

const CRASH_DIR: &str = "CARPORT_CRASH_STREAM_DIR";

fn puller(root: &Path) -> Puller {
    let sources = Sources::new(RegistryOptions::default()).unwrap();
    Puller::new(Store::open(root).unwrap(), sources, PullOptions::default())
}

fn request(dir: &Path, stream: bool) -> PullRequest {
    let reference = format!("oci:{}:v1", dir.join("layout").display()).parse().unwrap();
    PullRequest { stream, ..PullRequest::new(reference) }
}

/// Runs in a process of its own, which `crash::point` ends.
#[test]
fn crash_child() {
    let Ok(dir) = std::env::var(CRASH_DIR) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let dir = Path::new(&dir);
        puller(&dir.join("store")).start(request(dir, true)).wait().await.unwrap();
    });
}

#[tokio::test]
async fn a_crash_at_any_step_of_a_stream_loses_nothing() {
    for kind in [Compression::None, Compression::Zstd] {
        crash_at_any_step(kind).await;
    }
}

async fn crash_at_any_step(kind: Compression) {
    let (a, b) = (noise(1, 3_000_000), noise(2, 2_000_000));
    for step in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let mut layout = Layout::new(&dir.path().join("layout"));
        let members = [Entry::File("a", &a), Entry::Exec("b", &b), Entry::File("empty", b"")];
        let layer = match kind {
            Compression::None => layout.layer(&tar(&members), kind),
            _ => {
                let (tar, blob) = chunked(&members, (kind, 200_000), &|_| {});
                layout.packed(&tar, &blob, "+zstd")
            }
        };
        layout.image("v1", &[layer]);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pull::stream_tests::crash_child", "--nocapture"])
            .env(CRASH_DIR, dir.path())
            .env("CARPORT_CRASH_AT", step.to_string())
            .output()
            .unwrap();
        let crashed = !output.status.success();
        let puller = puller(&dir.path().join("store"));
        let pulled = puller.start(request(dir.path(), false)).wait().await.unwrap();
        let rootfs = puller.store().rootfs(&pulled.digest);
        assert!(fs::read(rootfs.join("a")).unwrap() == a, "{kind:?}, step {step}");
        assert!(fs::read(rootfs.join("b")).unwrap() == b, "{kind:?}, step {step}");
        assert_eq!(puller.store().usage().unwrap().objects, 2, "{kind:?}, step {step}");
        let left = fs::read_dir(puller.store().root().join("ingest")).unwrap().count();
        assert_eq!(left, 0, "{kind:?}, step {step}");
        if !crashed {
            assert!(step > 6, "{kind:?}: the child passed {step} points only");
            return;
        }
    }
}
