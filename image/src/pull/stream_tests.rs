//! A stream that ends at any step of its commit; what readers see is in `tests/tests/stream.rs`.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::*;
use crate::manifest::Compression;
use crate::source::RegistryOptions;
use crate::testing::{Entry, Layout, noise, tar};

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
    let (a, b) = (noise(1, 3_000_000), noise(2, 2_000_000));
    for step in 1.. {
        let dir = tempfile::tempdir().unwrap();
        let mut layout = Layout::new(&dir.path().join("layout"));
        let members = [Entry::File("a", &a), Entry::Exec("b", &b), Entry::File("empty", b"")];
        let layer = layout.layer(&tar(&members), Compression::None);
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
        assert!(fs::read(rootfs.join("a")).unwrap() == a, "step {step}");
        assert!(fs::read(rootfs.join("b")).unwrap() == b, "step {step}");
        assert_eq!(puller.store().usage().unwrap().objects, 2, "step {step}");
        let left = fs::read_dir(puller.store().root().join("ingest")).unwrap().count();
        assert_eq!(left, 0, "step {step}");
        if !crashed {
            assert!(step > 6, "the child passed {step} points only");
            return;
        }
    }
}
