use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use super::super::{PullOptions, PullPolicy, PullRequest, Pulled};
use super::*;
use crate::manifest::Compression;
use crate::reference::Reference;
use crate::source::{RegistryOptions, Sources};
use crate::testing::{Entry, Layout, listing, noise, tar};

const W: usize = 3_000_001;

/// A store with two images that share a layer of each compression.
struct Bench {
    layout: Layout,
    puller: Puller,
    base: Pulled,
    tuned: Pulled,
    dir: tempfile::TempDir,
}

fn puller(root: &Path) -> Puller {
    let sources = Sources::new(RegistryOptions::default()).unwrap();
    let options = PullOptions { attempts: 1, ..PullOptions::default() };
    Puller::new(Store::open(root).unwrap(), sources, options)
}

/// Where the tests' files are: one each layer that is damaged by the tests.
const FILES: [(&str, u64); 4] = [("plain", 1), ("gzip", 2), ("zstd", 3), ("own", 4)];

fn fill(layout: &mut Layout) -> [Reference; 2] {
    let file = |name: &str, seed| {
        let (before, weights) = (noise(seed + 100, 70_000), noise(seed, W));
        tar(&[
            Entry::Dir("models"),
            Entry::File(&format!("models/{name}.txt"), &before),
            Entry::File(&format!("models/{name}"), &weights),
            Entry::Exec(&format!("models/{name}.sh"), &noise(seed + 200, 2_000)),
            Entry::File(&format!("models/{name}.empty"), b""),
            Entry::Symlink(&format!("models/{name}.link"), name),
        ])
    };
    let plain = layout.layer(&file("plain", 1), Compression::None);
    let gzip = layout.layer(&file("gzip", 2), Compression::Gzip);
    let zstd = layout.layer(&file("zstd", 3), Compression::Zstd);
    let own = layout.layer(&file("own", 4), Compression::None);
    let base = [plain.clone(), gzip.clone(), zstd.clone()];
    [layout.image("base", &base), layout.image("tuned", &[plain, gzip, zstd, own])]
}

async fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new(&dir.path().join("layout"));
    let puller = puller(&dir.path().join("store"));
    let [base, tuned] = fill(&mut layout);
    let base = puller.start(PullRequest::new(base)).wait().await.unwrap();
    let tuned = puller.start(PullRequest::new(tuned)).wait().await.unwrap();
    Bench { layout, puller, base, tuned, dir }
}

impl Bench {
    fn store(&self) -> &Store {
        self.puller.store()
    }

    fn root(&self) -> &Path {
        self.puller.store().root()
    }

    fn object(&self, seed: u64) -> PathBuf {
        let id = ObjectId::new(blake3::hash(&noise(seed, W)), false);
        self.root().join("objects").join(id.path())
    }

    fn file(&self, image: &Pulled, name: &str) -> PathBuf {
        self.store().rootfs(&image.digest).join("models").join(name)
    }

    async fn verify(&self, repair: bool) -> VerifyReport {
        let options = VerifyOptions { repair, ..VerifyOptions::default() };
        self.puller.verify(options, Arc::default()).await.unwrap()
    }

    async fn assert_sound(&self) {
        let report = self.verify(false).await;
        assert_eq!(report.damage, [], "all is sound again");
        assert_eq!((report.objects, report.images, report.complete), (12, 2, true));
        for (name, seed) in FILES {
            let mut inodes = vec![fs::metadata(self.object(seed)).unwrap().ino()];
            for image in [&self.base, &self.tuned] {
                if name == "own" && image.digest == self.base.digest {
                    continue;
                }
                let file = self.file(image, name);
                assert!(fs::read(&file).unwrap() == noise(seed, W), "{name}");
                let meta = fs::metadata(&file).unwrap();
                assert_eq!((meta.mode() & 0o7777, meta.mtime()), (0o444, 0), "{name}");
                let folder = fs::metadata(file.parent().unwrap()).unwrap();
                assert_eq!((folder.mode() & 0o7777, folder.mtime()), (0o755, 0));
                inodes.push(meta.ino());
            }
            inodes.dedup();
            assert_eq!(inodes.len(), 1, "{name}: one copy for all");
        }
        let left = listing(&self.root().join("ingest"));
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(self.store().collect().unwrap().objects, 0);
    }
}

/// Changes a byte as a bad disk does: past the file's mode.
fn flip(path: &Path, at: u64) {
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    file.sync_all().unwrap();
    fs::set_permissions(path, mode).unwrap();
    rustix::fs::utimensat(
        rustix::fs::CWD,
        path,
        &crate::store::EPOCH,
        rustix::fs::AtFlags::empty(),
    )
    .unwrap();
}

#[tokio::test]
async fn a_flipped_bit_is_found_and_only_that_file_fetched_again() {
    let bench = bench().await;
    bench.assert_sound().await;
    // (file, what may be fetched for it)
    let blob = |name: &str| {
        let layers = &bench.tuned.image.layers;
        layers[FILES.iter().position(|file| file.0 == name).unwrap()].size_bytes
    };
    for (name, seed) in FILES {
        let most = if ["plain", "own"].contains(&name) { W as u64 } else { blob(name) };
        let open = File::open(bench.file(&bench.tuned, name)).unwrap();
        flip(&bench.object(seed), W as u64 - 1);
        let report = bench.verify(false).await;
        let images = if name == "own" { 1 } else { 2 };
        let [damage] = &report.damage[..] else { panic!("{:?}", report.damage) };
        assert_eq!(damage.outcome, Outcome::Found);
        assert_eq!(damage.images.len(), images, "{name}");
        assert!(damage.why.contains("3000001 bytes have the BLAKE3"), "{}", damage.why);
        assert!(!report.is_sound());

        let report = bench.verify(true).await;
        assert_eq!(report.damage.len(), 1);
        assert_eq!(report.damage[0].outcome, Outcome::Repaired, "{:?}", report.damage);
        assert!(report.is_sound());
        assert!((W as u64 / 2..=most).contains(&report.fetched_bytes), "{}", report.fetched_bytes);
        // Who had it open goes on with what they had.
        let mut last = [0];
        open.read_exact_at(&mut last, W as u64 - 1).unwrap();
        assert_eq!(last[0] ^ 4, *noise(seed, W).last().unwrap(), "{name}: not written in place");
        bench.assert_sound().await;
    }
}

#[tokio::test]
async fn every_kind_of_damage_to_an_object_is_repaired() {
    let bench = bench().await;
    type Harm = fn(&Path);
    let harms: [(&str, Harm); 5] = [
        ("truncated", |path| {
            fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
            File::options().write(true).open(path).unwrap().set_len(5000).unwrap();
        }),
        ("emptied", |path| {
            fs::set_permissions(path, PermissionsExt::from_mode(0o644)).unwrap();
            File::options().write(true).open(path).unwrap().set_len(0).unwrap();
        }),
        ("mode", |path| fs::set_permissions(path, PermissionsExt::from_mode(0o600)).unwrap()),
        ("gone", |path| fs::remove_file(path).unwrap()),
        ("a link to nowhere", |path| {
            fs::remove_file(path).unwrap();
            std::os::unix::fs::symlink("/nowhere", path).unwrap();
        }),
    ];
    for (name, harm) in harms {
        for seed in [1, 2] {
            harm(&bench.object(seed));
        }
        let report = bench.verify(true).await;
        assert!(!report.damage.is_empty() && report.is_sound(), "{name}: {:?}", report.damage);
        if name == "mode" || name == "gone" {
            assert_eq!(report.fetched_bytes, 0, "{name}: nothing was lost");
        }
        bench.assert_sound_but_copies(name).await;
    }
}

impl Bench {
    /// As [`Bench::assert_sound`], where trees may have a sound copy of their own.
    async fn assert_sound_but_copies(&self, what: &str) {
        let report = self.verify(false).await;
        assert_eq!(report.damage, [], "{what}");
        for (name, seed) in FILES {
            let file = self.file(&self.tuned, name);
            assert!(fs::read(&file).unwrap() == noise(seed, W), "{what}: {name}");
        }
    }
}

#[tokio::test]
async fn trees_and_records_are_made_what_they_must_be() {
    let bench = bench().await;
    let models = bench.store().rootfs(&bench.base.digest).join("models");
    let whole = listing(&bench.store().rootfs(&bench.base.digest));
    let inode = fs::metadata(&models).unwrap().ino();

    fs::remove_file(models.join("plain")).unwrap();
    fs::write(models.join("stranger"), "x").unwrap();
    fs::remove_file(models.join("gzip.link")).unwrap();
    std::os::unix::fs::symlink("/etc/shadow", models.join("gzip.link")).unwrap();
    fs::remove_file(models.join("gzip.empty")).unwrap();
    fs::write(models.join("gzip.empty"), "not empty").unwrap();
    fs::remove_file(models.join("zstd")).unwrap();
    fs::create_dir_all(models.join("zstd/deep")).unwrap();
    let found = bench.verify(false).await;
    let mut paths: Vec<_> =
        found.damage.iter().map(|d| d.path.rsplit('/').next().unwrap()).collect();
    paths.sort_unstable();
    assert_eq!(paths, ["gzip.empty", "gzip.link", "models", "plain", "stranger", "zstd"]);
    let report = bench.verify(true).await;
    assert!(report.is_sound() && report.damage.len() == 6, "{:?}", report.damage);
    assert_eq!(report.fetched_bytes, 0);
    assert_eq!(listing(&bench.store().rootfs(&bench.base.digest)), whole);
    bench.assert_sound().await;

    let tree = models.parent().unwrap().parent().unwrap().to_owned();
    for record in ["tree.json", "manifest.json", "config.json"] {
        for text in ["", "{}"] {
            fs::write(tree.join(record), text).unwrap();
            let report = bench.verify(true).await;
            assert!(report.is_sound() && report.damage.len() == 1, "{:?}", report.damage);
            bench.assert_sound().await;
        }
        fs::remove_file(tree.join(record)).unwrap();
        assert!(bench.verify(true).await.is_sound(), "{record}");
    }
    for record in listing(&bench.root().join("layers")) {
        fs::write(bench.root().join("layers").join(&record), "damaged").unwrap();
        let report = bench.verify(true).await;
        assert!(report.is_sound() && !report.damage.is_empty(), "{:?}", report.damage);
        bench.assert_sound().await;
    }
    assert_eq!(fs::metadata(&models).unwrap().ino(), inode, "mended where pods see it");
}

#[tokio::test]
async fn views_get_the_repaired_file_too() {
    let bench = bench().await;
    let (image, name) = (bench.tuned.digest, Digest::of(b"view"));
    let keep = |path: &Path| path.ends_with("own");
    bench.store().view(&image, &name, Path::new("models"), keep).unwrap();
    let file = bench.store().view_rootfs(&image, &name).join("own");
    flip(&bench.object(4), 7);
    assert!(bench.verify(true).await.is_sound());
    assert_eq!(fs::metadata(&file).unwrap().ino(), fs::metadata(bench.object(4)).unwrap().ino());
    assert!(fs::read(&file).unwrap() == noise(4, W));
}

#[tokio::test]
async fn what_cannot_be_repaired_is_put_out_of_use_until_a_pull_mends_it() {
    let bench = bench().await;
    let away = bench.dir.path().join("away");
    fs::rename(&bench.layout.folder, &away).unwrap();
    let tree = bench.store().rootfs(&bench.tuned.digest);
    let inode = fs::metadata(&tree).unwrap().ino();
    flip(&bench.object(4), 0);
    let report = bench.verify(true).await;
    let lost: Vec<_> = report.damage.iter().filter(|d| d.outcome == Outcome::Lost).collect();
    assert!(!lost.is_empty() && !report.is_sound(), "{:?}", report.damage);
    assert!(lost[0].message.as_deref().unwrap().contains("layout"), "{:?}", lost[0].message);
    assert!(!bench.object(4).exists(), "no new image links it");
    assert!(bench.file(&bench.tuned, "own").exists(), "pods that run are left alone");
    assert_eq!(bench.store().image(&bench.tuned.digest).unwrap(), None);
    assert_eq!(bench.store().damaged_images().unwrap(), [bench.tuned.digest]);
    assert!(bench.store().image(&bench.base.digest).unwrap().is_some(), "the other is sound");

    let request = |policy| {
        let reference = format!("oci:{}:tuned", bench.layout.folder.display()).parse().unwrap();
        PullRequest { policy, ..PullRequest::new(reference) }
    };
    let never = bench.puller.start(request(PullPolicy::Never)).wait().await.unwrap_err();
    assert!(matches!(never, PullError::NotStored(_)), "{never}");
    assert!(bench.puller.start(request(PullPolicy::IfNotPresent)).wait().await.is_err());

    fs::rename(&away, &bench.layout.folder).unwrap();
    let pulled = bench.puller.start(request(PullPolicy::IfNotPresent)).wait().await.unwrap();
    let layer = pulled.image.layers[3].size_bytes;
    assert_eq!(pulled.fetched_bytes, layer, "that layer, and no other");
    assert_eq!(fs::metadata(&tree).unwrap().ino(), inode, "mended where it stands");
    bench.assert_sound().await;
}

#[tokio::test]
async fn a_damaged_image_that_nobody_uses_goes_with_the_next_collection() {
    let bench = bench().await;
    fs::remove_dir_all(&bench.layout.folder).unwrap();
    flip(&bench.object(4), 0);
    bench.verify(true).await;
    assert_eq!(bench.store().collect().unwrap().objects, 2, "what only it had");
    assert!(!bench.store().rootfs(&bench.tuned.digest).exists());
    assert_eq!(listing(&bench.root().join("refs")).len(), 1, "the other image's");
    let report = bench.verify(false).await;
    assert_eq!((report.damage, report.images), (vec![], 1));
}

#[tokio::test]
async fn a_source_with_other_bytes_repairs_nothing() {
    let bench = bench().await;
    let blob = bench.tuned.image.layers[3].digest;
    let path = bench.layout.blob_path(&blob);
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 600_000;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    flip(&bench.object(4), 0);
    let report = bench.verify(true).await;
    assert!(report.damage.iter().any(|d| d.outcome == Outcome::Lost), "{:?}", report.damage);
    assert!(!bench.object(4).exists());
}

#[tokio::test]
async fn chosen_images_are_read_alone() {
    let bench = bench().await;
    flip(&bench.object(4), 0);
    let images = vec![bench.base.digest];
    let options = VerifyOptions { images, ..VerifyOptions::default() };
    let report = bench.puller.verify(options, Arc::default()).await.unwrap();
    assert_eq!((report.objects, report.images, report.damage), (9, 1, vec![]));
}

#[tokio::test]
async fn reading_keeps_to_its_rate_and_stops_when_told() {
    let bench = bench().await;
    let began = Instant::now();
    let control = Arc::new(VerifyControl::new(40_000_000));
    let options = VerifyOptions::default();
    let report = bench.puller.verify(options.clone(), Arc::clone(&control)).await.unwrap();
    let least = report.bytes as f64 / 40e6;
    assert!(began.elapsed().as_secs_f64() >= least, "{:?}, {least}", began.elapsed());
    assert_eq!(control.progress().total_bytes, report.bytes);

    let control = Arc::new(VerifyControl::new(1));
    let reading = bench.puller.verify(options, Arc::clone(&control));
    let stopping = async {
        while control.progress().bytes == 0 {
            tokio::task::yield_now().await;
        }
        control.stop();
    };
    let (report, ()) = tokio::join!(reading, stopping);
    assert!(!report.unwrap().complete);
}

const CRASH_ROOT: &str = "CARPORT_CRASH_VERIFY";

/// Runs in a process of its own, which `crash::point` ends.
#[tokio::test]
async fn crash_child() {
    let Ok(root) = std::env::var(CRASH_ROOT) else { return };
    let options = VerifyOptions { repair: true, ..VerifyOptions::default() };
    puller(Path::new(&root)).verify(options, Arc::default()).await.unwrap();
}

/// Damages the store, and ends a verification at each of its steps. The next one must find the rest.
async fn crash_at_each_step(harm: impl Fn(&Bench), source_is_away: bool) {
    let test = std::env::current_exe().unwrap();
    for step in 1.. {
        let bench = bench().await;
        harm(&bench);
        let away = bench.dir.path().join("away");
        if source_is_away {
            fs::rename(&bench.layout.folder, &away).unwrap();
        }
        let output = Command::new(&test)
            .args(["--exact", "pull::verify::tests::crash_child", "--nocapture"])
            .env(CRASH_ROOT, bench.root())
            .env("CARPORT_CRASH_AT", step.to_string())
            .output()
            .unwrap();
        let crashed = !output.status.success();
        if source_is_away {
            fs::rename(&away, &bench.layout.folder).unwrap();
        }
        Store::open(bench.root()).unwrap();
        let report = bench.verify(true).await;
        assert!(report.is_sound(), "step {step}: {:?}", report.damage);
        bench.assert_sound().await;
        if !crashed {
            assert!(step > 4, "the child passed {step} points only");
            return;
        }
    }
}

#[tokio::test]
async fn a_crash_at_any_step_of_a_repair_is_mended_by_the_next_start() {
    crash_at_each_step(|bench| flip(&bench.object(1), 9), false).await;
}

#[tokio::test]
async fn a_crash_while_an_image_is_put_out_of_use_is_mended_too() {
    crash_at_each_step(|bench| flip(&bench.object(1), 9), true).await;
}

#[tokio::test]
async fn a_crash_at_any_step_of_mending_a_tree_is_mended_by_the_next_verification() {
    let harm = |bench: &Bench| {
        for name in ["plain", "zstd.link", "gzip.sh"] {
            fs::remove_file(bench.file(&bench.base, name)).unwrap();
        }
        fs::write(bench.store().rootfs(&bench.base.digest).join("../tree.json"), "").unwrap();
    };
    crash_at_each_step(harm, false).await;
}
