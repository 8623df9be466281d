//! The store's disk fails at each of its writes: every error is clear, and the store is sound after it.
//!
//! The failures are the kernel's own: a tmpfs that has room for one inode or one page more each
//! time, a process that may open one file more each time, a file system that is read-only. A disk
//! that breaks, and a file with as many links as a file may have, are played by strace, which lets one call of the
//! process return the error that the kernel would.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use carport_tests::carport::binary;
use carport_tests::images::noise;

const PAGE: u64 = 4096;

/// A tmpfs of its own, unmounted when dropped.
struct Disk(PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

impl Disk {
    /// None, and a word about it, where nothing can be mounted.
    fn new(folder: &Path) -> Option<Self> {
        let at = folder.join("disk");
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("mount").args(["-t", "tmpfs", "carport-test"]).arg(&at).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(at)),
            _ => {
                eprintln!("SKIPPED: no tmpfs can be mounted (root only)");
                None
            }
        }
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap();
        assert!(status.success(), "mount -o {options}");
    }

    /// Used inodes and pages.
    fn used(&self) -> (u64, u64) {
        let now = rustix::fs::statvfs(&self.0).unwrap();
        (now.f_files - now.f_ffree, (now.f_blocks - now.f_bfree) * now.f_frsize / PAGE)
    }
}

/// A store on a disk that fails, and an image beside it.
struct Bench {
    disk: Disk,
    image: String,
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::new(folder.path())?;
        // Whatever this machine's own says.
        fs::write(folder.path().join("config.yaml"), "pull: {attempts: 1}\n").unwrap();
        let model = folder.path().join("model");
        fs::create_dir_all(model.join("deep/er")).unwrap();
        for n in 0..6 {
            fs::write(model.join(format!("small-{n}")), noise(3000, n)).unwrap();
        }
        fs::write(model.join("deep/er/weights"), noise(300_000, 99)).unwrap();
        let image = format!("oci:{}:v1", folder.path().join("layout").display());
        let bench = Self { disk, image, folder };
        let packed = bench.carport(&["pack", model.to_str().unwrap(), &bench.image]);
        assert!(packed.status.success(), "{}", told(&packed));
        bench.works(&["gc"]);
        Some(bench)
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("CARPORT_ROOT", &self.disk.0)
            .env("CARPORT_CONFIG", self.folder.path().join("config.yaml"));
        command
    }

    fn carport(&self, arguments: &[&str]) -> Output {
        self.command(binary()).args(arguments).output().unwrap()
    }

    /// Runs `carport` with the `nth` call of each of its threads to `call` failing as `error`; `None` where
    /// there is no such call.
    fn failing(&self, call: &str, error: &str, nth: u32, arguments: &[&str]) -> Option<Output> {
        let record = self.folder.path().join("calls");
        let output = self
            .command("strace")
            .args(["--follow-forks", "--seccomp-bpf", "--quiet=all", "--output"])
            .arg(&record)
            .args(["--trace", call, "--inject", &format!("{call}:error={error}:when={nth}")])
            .arg(binary())
            .args(arguments)
            .output()
            .unwrap();
        fs::read_to_string(record).unwrap().contains("(INJECTED)").then_some(output)
    }

    fn works(&self, arguments: &[&str]) -> String {
        let output = self.carport(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The files of the store that have bytes of images.
    fn bytes_left(&self) -> Vec<PathBuf> {
        let parts = ["objects", "ingest", "trees", "leases"].map(|part| self.disk.0.join(part));
        let walk = parts.iter().flat_map(walkdir::WalkDir::new);
        let files = walk.map(Result::unwrap).filter(|entry| !entry.file_type().is_dir());
        files.map(walkdir::DirEntry::into_path).collect()
    }

    /// After a failure: what was gathered can be thrown away, or gone on with, and all is sound.
    fn is_sound_after(&self, what: &str) {
        self.works(&["gc"]);
        // The last writes are the references: an image that stands before them is no orphan.
        if self.works(&["ls", "-o", "json"]).trim() == "[]" {
            assert_eq!(self.bytes_left(), [] as [PathBuf; 0], "{what}: orphan bytes");
        }
        self.works(&["pull", &self.image]);
        self.works(&["verify", "--no-repair"]);
        self.works(&["rm", &self.image]);
        self.works(&["gc"]);
        assert_eq!(self.bytes_left(), [] as [PathBuf; 0], "{what}: orphan bytes of a whole image");
    }
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An error of one line that names a deed and a place, and has all of `parts`.
fn assert_clear(output: &Output, parts: &[&str], what: &str) {
    let text = told(output);
    assert_eq!(output.status.code(), Some(1), "{what}: {text}");
    assert_eq!(
        text.trim_end().lines().filter(|line| line.starts_with("carport: ")).count(),
        1,
        "{text}"
    );
    for part in parts {
        assert!(text.contains(part), "{what}: {part:?} is not in {text}");
    }
}

#[test]
fn no_inode_is_left_at_any_step_of_a_pull() {
    let Some(bench) = Bench::new() else { return };
    let (used, _) = bench.disk.used();
    for more in 0.. {
        bench.disk.remount(&format!("nr_inodes={}", used + more));
        let what = format!("{more} inodes");
        let output = bench.carport(&["pull", &bench.image]);
        if output.status.success() {
            assert!(more > 20, "{what} were enough");
            break;
        }
        assert_clear(&output, &["no space left on the store's file system", "carport gc"], &what);
        // Room is made on the full disk, too.
        bench.works(&["gc"]);
        bench.disk.remount("nr_inodes=100000");
        bench.is_sound_after(&what);
    }
}

#[test]
fn no_block_is_left_before_a_pull_or_at_any_step_of_it() {
    let Some(bench) = Bench::new() else { return };
    let (_, used) = bench.disk.used();
    let mut refused = 0;
    for more in (1..).step_by(3) {
        bench.disk.remount(&format!("size={}", (used + more) * PAGE));
        let what = format!("{more} pages");
        let output = bench.carport(&["pull", &bench.image]);
        if output.status.success() {
            assert!(more > 60, "{what} were enough");
            break;
        }
        // What the image's bytes do not fit into is known before; its folders and records may still
        // be too many.
        if told(&output).contains("needs at least") {
            assert_clear(&output, &["is free of a file system of", "enlarge the disk"], &what);
            refused += 1;
        } else {
            let full = ["no space left on the store's file system", "carport gc"];
            assert_clear(&output, &full, &what);
        }
        bench.works(&["gc"]);
        bench.disk.remount("size=100m");
        bench.is_sound_after(&what);
    }
    assert!(refused > 0, "no disk was too small");
}

#[test]
fn no_file_can_be_opened_any_more_at_any_step_of_a_pull() {
    let Some(bench) = Bench::new() else { return };
    let mut failures = 0;
    // Below this the runtime and the HTTP client cannot begin.
    for limit in 10.. {
        let what = format!("{limit} files");
        let limited = format!("ulimit -n {limit}; exec \"$0\" pull \"$1\"");
        let arguments = ["-c", &limited, binary().to_str().unwrap(), &bench.image];
        let output = bench.command("sh").args(arguments).output().unwrap();
        if output.status.success() {
            break;
        }
        assert_clear(&output, &["Too many open files"], &what);
        if told(&output).contains(bench.disk.0.to_str().unwrap()) {
            assert_clear(&output, &["ulimit -n"], &what);
            failures += 1;
        }
        bench.is_sound_after(&what);
    }
    assert!(failures > 0, "the limit never met the store");
}

#[test]
fn a_read_only_store_can_be_looked_at_and_says_why_it_takes_nothing() {
    let Some(bench) = Bench::new() else { return };
    bench.works(&["pull", &bench.image]);
    bench.disk.remount("ro");
    assert!(bench.works(&["ls"]).contains("layout"));
    bench.works(&["verify", "--no-repair"]);
    bench.works(&["pull", &bench.image]);
    let what = "read-only";
    for arguments in [&["rm", &bench.image][..], &["pull", "--always", &bench.image]] {
        assert_clear(&bench.carport(arguments), &["read-only", "the kernel's log"], what);
    }
    bench.disk.remount("rw");
    bench.works(&["rm", &bench.image]);
    bench.is_sound_after(what);
}

/// Whether calls can be made to fail here.
fn has_strace() -> bool {
    let traced =
        Command::new("strace").args(["--quiet=all", "--seccomp-bpf", "-f", "true"]).output();
    let works = traced.is_ok_and(|output| output.status.success());
    if !works {
        eprintln!("SKIPPED: no strace that may trace (package strace)");
    }
    works
}

/// The calls by which a store is written, and its folders read.
const CALLS: [&str; 17] = [
    "fallocate",
    "fchmod",
    "fdatasync",
    "fsync",
    "getdents64",
    "linkat",
    "mkdir",
    "mkdirat",
    "openat2",
    "pread64",
    "pwrite64",
    "rename",
    "renameat",
    "syncfs",
    "unlink",
    "unlinkat",
    "utimensat",
];

/// Of the same call in a row, these fail; the steps between them are alike.
const NTH: [u32; 5] = [1, 2, 4, 8, 16];

#[test]
fn the_disk_breaks_at_any_call_of_a_pull() {
    let Some(bench) = Bench::new().filter(|_| has_strace()) else { return };
    let mut failed = 0;
    for (call, nth) in CALLS.iter().flat_map(|call| NTH.map(|nth| (call, nth))) {
        let what = format!("EIO of {call} {nth}");
        let output = bench.failing(call, "EIO", nth, &["pull", &bench.image]);
        match output.filter(|output| !output.status.success()) {
            // Before carport itself: the loader reads libraries.
            Some(output) if output.status.code() == Some(127) => {}
            Some(output) => {
                assert_clear(&output, &["Input/output error"], &what);
                // The other disk is the image's.
                if told(&output).contains(bench.disk.0.to_str().unwrap()) {
                    assert_clear(&output, &["the kernel's log"], &what);
                }
                failed += 1;
                bench.is_sound_after(&what);
            }
            // There are not so many such calls, or it was of no account: a lease that is cleared up, a
            // folder that is looked at for what a crash left.
            None => {
                bench.works(&["verify", "--no-repair"]);
                bench.works(&["rm", &bench.image]);
                bench.works(&["gc"]);
                assert_eq!(bench.bytes_left(), [] as [PathBuf; 0], "{what}: orphan bytes");
            }
        }
    }
    assert!(failed >= 25, "only {failed} of the calls met the pull");
}

#[test]
fn the_disk_breaks_at_any_call_of_a_repair() {
    let Some(bench) = Bench::new().filter(|_| has_strace()) else { return };
    let mut failed = 0;
    for (call, nth) in CALLS.iter().flat_map(|call| NTH[..3].iter().map(move |nth| (call, *nth))) {
        bench.works(&["pull", &bench.image]);
        let largest =
            bench.bytes_left().into_iter().max_by_key(|path| path.metadata().unwrap().len());
        damage(&largest.unwrap());
        let what = format!("EIO of {call} {nth} while the store is verified");
        if let Some(output) = bench.failing(call, "EIO", nth, &["verify"]) {
            assert!(output.status.code().is_some(), "{what}: {}", told(&output));
            failed += u32::from(!output.status.success());
        }
        // Mended then, or now: either way it is whole.
        bench.works(&["verify"]);
        bench.works(&["verify", "--no-repair"]);
        bench.works(&["rm", &bench.image]);
        bench.is_sound_after(&what);
    }
    assert!(failed >= 10, "only {failed} of the calls met the repair");
}

#[test]
fn an_object_with_as_many_links_as_a_file_may_have_is_copied() {
    let Some(bench) = Bench::new().filter(|_| has_strace()) else { return };
    for nth in NTH {
        let what = format!("EMLINK of linkat {nth}");
        let Some(output) = bench.failing("linkat", "EMLINK", nth, &["pull", &bench.image]) else {
            break;
        };
        assert!(output.status.success(), "{what}: {}", told(&output));
        bench.works(&["verify", "--no-repair"]);
        let largest =
            bench.bytes_left().into_iter().max_by_key(|path| path.metadata().unwrap().len());
        damage(&largest.unwrap());
        if let Some(output) = bench.failing("linkat", "EMLINK", nth, &["verify"]) {
            assert!(output.status.success(), "{what}, in a repair: {}", told(&output));
        }
        bench.works(&["verify"]);
        bench.works(&["verify", "--no-repair"]);
        bench.works(&["rm", &bench.image]);
        bench.is_sound_after(&what);
    }
}

/// Another byte in the middle of a file, under its old name.
fn damage(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let (middle, mut byte) = (file.metadata().unwrap().len() / 2, [0]);
    file.read_exact_at(&mut byte, middle).unwrap();
    file.write_all_at(&[!byte[0]], middle).unwrap();
}
