//! Real FUSE mounts, as root and as an ordinary user.
//!
//! Each mount that must be able to die is served by a process of its own: this test's
//! binary again, told by the environment what to serve.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Lines, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

#[path = "../src/testing.rs"]
mod testing;

use carport_csi::fuse::{self, FuseError, FuseMount};
use carport_csi::mount::{ImagePath, Tree};

/// `nobody`, on every distribution.
const NOBODY: u32 = 65534;

const TREE: &str = "CARPORT_TEST_TREE";
const TARGET: &str = "CARPORT_TEST_TARGET";

/// Says aloud why nothing is tested here.
fn can_fuse() -> bool {
    match fuse::check() {
        Ok(()) => true,
        Err(error) => {
            println!("SKIPPED: {error}");
            false
        }
    }
}

/// Runs `test` where an ordinary user may use FUSE, or says why not.
///
/// udev opens the device to all users. Where there is none, a copy of the device that is
/// open to all covers it, in a mount namespace of the test's own.
fn as_ordinary_user(test: &str, run: impl FnOnce() + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can become another user");
        return;
    }
    if !can_fuse() {
        return;
    }
    testing::in_mount_namespace(test, || {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("fuse");
        if fs::metadata("/dev/fuse").unwrap().mode() & 0o006 != 0o006 {
            let made = Command::new("mknod").arg(&device).args(["c", "10", "229"]).status();
            if !made.is_ok_and(|status| status.success()) {
                println!("SKIPPED: /dev/fuse is root's alone, and cannot be copied");
                return;
            }
            fs::set_permissions(&device, fs::Permissions::from_mode(0o666)).unwrap();
            rustix::mount::mount_bind(&device, "/dev/fuse").unwrap();
        }
        run();
    });
}

/// A model's tree, and an empty folder to mount it on. Open to all users.
struct Place {
    dir: tempfile::TempDir,
    rootfs: PathBuf,
    target: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (rootfs, target) = (dir.path().join("rootfs"), dir.path().join("target"));
        fs::create_dir_all(rootfs.join("models/tokenizer")).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(rootfs.join("models/weights"), pattern(5 << 20)).unwrap();
        fs::write(rootfs.join("models/tokenizer/vocab"), "a b c").unwrap();
        fs::hard_link(rootfs.join("models/tokenizer/vocab"), rootfs.join("again")).unwrap();
        fs::write(rootfs.join("run"), "#!/bin/sh\necho it runs\n").unwrap();
        fs::set_permissions(rootfs.join("run"), fs::Permissions::from_mode(0o555)).unwrap();
        symlink("/etc/hostname", rootfs.join("absolute")).unwrap();
        symlink("models/tokenizer", rootfs.join("relative")).unwrap();
        Self { dir, rootfs, target }
    }

    fn tree(&self) -> Tree {
        Tree { rootfs: self.rootfs.clone(), path: None }
    }

    fn mount(&self) -> FuseMount {
        FuseMount::mount(&self.tree(), &self.target).unwrap()
    }

    fn give_target_to(&self, user: u32) {
        std::os::unix::fs::chown(&self.target, Some(user), Some(user)).unwrap();
    }
}

/// Bytes that tell where they are from.
fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 7 % 251) as u8).collect()
}

/// Everything below `path`: name, mode, size, and the bytes or the link's text.
fn contents(path: &Path) -> Vec<(PathBuf, u32, u64, Vec<u8>)> {
    walkdir::WalkDir::new(path)
        .min_depth(1)
        .sort_by_file_name()
        .into_iter()
        .map(|entry| {
            let entry = entry.unwrap();
            let meta = entry.path().symlink_metadata().unwrap();
            let bytes = match meta.file_type() {
                kind if kind.is_file() => fs::read(entry.path()).unwrap(),
                kind if kind.is_symlink() => {
                    fs::read_link(entry.path()).unwrap().into_os_string().into_encoded_bytes()
                }
                _ => Vec::new(),
            };
            let size = if meta.is_dir() { 0 } else { meta.size() };
            (entry.path().strip_prefix(path).unwrap().to_owned(), meta.mode(), size, bytes)
        })
        .collect()
}

/// A server in a process of its own, killed by its id in the end.
struct Server {
    child: Child,
    /// Kept open: what writes to a closed one fails.
    _output: Lines<BufReader<ChildStdout>>,
}

impl Server {
    fn start(place: &Place, user: u32) -> Self {
        // Under another name: the target folder may lie where only root may go.
        let (this, program) = (std::env::current_exe().unwrap(), place.dir.path().join("server"));
        fs::hard_link(&this, &program).or_else(|_| fs::copy(&this, &program).map(drop)).unwrap();
        let mut command = Command::new(program);
        command
            .args(["--exact", "serve", "--nocapture"])
            .env(TREE, &place.rootfs)
            .env(TARGET, &place.target)
            .current_dir("/")
            .stdout(Stdio::piped());
        if user != 0 {
            command.uid(user).gid(user);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("serving")), "the server ended");
        Self { child, _output: lines }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// No test of its own: what [`Server`] runs.
#[test]
fn serve() {
    let (Some(tree), Some(target)) = (std::env::var_os(TREE), std::env::var_os(TARGET)) else {
        return;
    };
    let tree = Tree { rootfs: tree.into(), path: None };
    let mount = FuseMount::mount(&tree, Path::new(&target)).unwrap();
    println!("serving");
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(mount.ended());
}

#[test]
fn a_mount_shows_the_tree_and_is_read_only() {
    if !can_fuse() {
        return;
    }
    let place = Place::new();
    let mount = place.mount();
    assert!(fuse::is_mounted(&place.target).unwrap());
    assert_eq!(contents(&place.target), contents(&place.rootfs));

    let ours = |path: &str| place.target.join(path).metadata().unwrap();
    assert_eq!(ours("again").ino(), ours("models/tokenizer/vocab").ino());
    assert_eq!(ours("again").nlink(), 2);
    let run = Command::new(place.target.join("run")).output().unwrap();
    assert_eq!(String::from_utf8(run.stdout).unwrap(), "it runs\n");
    // A link is resolved by its reader, where the reader is.
    assert_eq!(fs::read_link(place.target.join("absolute")).unwrap(), Path::new("/etc/hostname"));
    assert_eq!(fs::read(place.target.join("absolute")).ok(), fs::read("/etc/hostname").ok(),);
    assert_eq!(fs::read(place.target.join("relative/vocab")).unwrap(), b"a b c");

    let erofs = |result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EROFS));
    };
    erofs(fs::write(place.target.join("new"), "x"));
    erofs(File::options().write(true).open(place.target.join("again")).map(drop));
    erofs(fs::remove_file(place.target.join("again")));
    erofs(fs::create_dir(place.target.join("folder")));
    erofs(fs::rename(place.target.join("again"), place.target.join("other")));
    erofs(fs::set_permissions(place.target.join("run"), fs::Permissions::from_mode(0o777)));

    let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.contains(place.target.to_str().unwrap())).unwrap();
    let options: Vec<&str> = line.split(' ').nth(3).unwrap().split(',').collect();
    for option in ["ro", "nosuid", "nodev", "default_permissions"] {
        assert!(options.contains(&option), "{line}");
    }
    assert!(line.contains(" fuse.carport "), "{line}");

    mount.unmount().unwrap();
    assert!(!fuse::is_mounted(&place.target).unwrap());
    assert_eq!(fs::read_dir(&place.target).unwrap().count(), 0);
}

#[test]
fn a_folder_of_the_image_can_be_mounted_alone() {
    if !can_fuse() {
        return;
    }
    let place = Place::new();
    let path = |text| ImagePath::parse(text).unwrap();
    let tree = Tree { path: path("/models/tokenizer"), ..place.tree() };
    let mount = FuseMount::mount(&tree, &place.target).unwrap();
    assert_eq!(contents(&place.target), contents(&place.rootfs.join("models/tokenizer")));
    drop(mount);
    assert!(!fuse::is_mounted(&place.target).unwrap());
    // Through a link there is no way.
    let tree = Tree { path: path("/relative"), ..place.tree() };
    let error = FuseMount::mount(&tree, &place.target).unwrap_err();
    assert!(matches!(error, FuseError::Tree(_)), "{error}");
}

#[test]
fn what_cannot_be_mounted_on_is_said() {
    if !can_fuse() {
        return;
    }
    let place = Place::new();
    let busy = place.target.parent().unwrap().join("rootfs/models");
    let error = FuseMount::mount(&place.tree(), &busy).unwrap_err();
    assert!(matches!(error, FuseError::Occupied(_)), "{error}");
    let error = FuseMount::mount(&place.tree(), &place.target.join("absent")).unwrap_err();
    assert!(error.to_string().contains("absent: No such file or directory"), "{error}");
}

#[test]
fn root_lets_other_users_read() {
    if !can_fuse() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    let place = Place::new();
    let _mount = place.mount();
    let cat = |path: &str| {
        let path = place.target.join(path);
        Command::new("cat").arg(path).uid(NOBODY).gid(NOBODY).output().unwrap()
    };
    assert_eq!(cat("again").stdout, b"a b c");
    assert!(
        !Command::new(place.target.join("again")).uid(NOBODY).status().is_ok_and(|s| s.success())
    );
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    if !can_fuse() {
        return;
    }
    let place = Place::new();
    let mount = place.mount();
    let expected = pattern(5 << 20);
    std::thread::scope(|scope| {
        for reader in 0..16_usize {
            let (target, expected) = (&place.target, &expected);
            scope.spawn(move || {
                let file = File::open(target.join("models/weights")).unwrap();
                let mut bytes = vec![0; 300_001];
                for round in 0..40_usize {
                    let offset = (reader * 7_919_993 + round * 1_299_709) % expected.len();
                    let count = file.read_at(&mut bytes, offset as u64).unwrap();
                    assert!(count > 0);
                    assert!(bytes[..count] == expected[offset..offset + count], "at {offset}");
                }
            });
        }
    });
    drop(mount);
}

#[tokio::test]
async fn a_session_serves_until_its_last_reader_has_gone() {
    if !can_fuse() {
        return;
    }
    let place = Place::new();
    let mount = place.mount();
    let mut open = File::open(place.target.join("models/weights")).unwrap();
    mount.unmount().unwrap();
    assert!(!fuse::is_mounted(&place.target).unwrap());
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert!(bytes == pattern(5 << 20));
    drop(open);
    tokio::time::timeout(Duration::from_secs(20), mount.ended()).await.expect("ended");
}

#[tokio::test]
async fn a_mount_that_others_took_away_is_the_end_of_its_session() {
    if !can_fuse() {
        return;
    }
    let place = Place::new();
    let mount = place.mount();
    fuse::unmount(&place.target).unwrap();
    tokio::time::timeout(Duration::from_secs(20), mount.ended()).await.expect("ended");
    // And what is there then is not ours to take away.
    let second = place.mount();
    drop(mount);
    assert_eq!(fs::read(place.target.join("again")).unwrap(), b"a b c");
    drop(second);
    fuse::unmount(&place.target).unwrap_err();
}

/// As root, and as `nobody` with `fusermount3`.
fn readers_of_a_killed_server(user: u32) {
    let place = Place::new();
    place.give_target_to(user);
    let server = Server::start(&place, user);
    let as_user = |program: &str, path: PathBuf| {
        let mut command = Command::new(program);
        command.arg(path).stdout(Stdio::piped()).stderr(Stdio::piped());
        if user != 0 {
            command.uid(user).gid(user);
        }
        command
    };
    // Reads for ever, so it is in the middle of it when the server goes.
    let weights = place.target.join("models/weights");
    let script = "while dd if=\"$0\" of=/dev/null bs=64k iflag=direct 2>/dev/null; do echo; done";
    let mut reader = Command::new("sh");
    reader.args(["-c", script]).arg(&weights).stdout(Stdio::piped());
    if user != 0 {
        reader.uid(user).gid(user);
    }
    let mut reader = reader.spawn().unwrap();
    let mut rounds = BufReader::new(reader.stdout.take().unwrap()).lines();
    rounds.next().expect("a whole round of reading").unwrap();
    let started = Instant::now();
    server.kill();
    // It ends at its first error.
    rounds.for_each(drop);
    reader.wait().unwrap();
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());

    let cat = as_user("cat", weights).output().unwrap();
    let said = String::from_utf8(cat.stderr).unwrap();
    assert!(said.contains("Transport endpoint is not connected"), "{said}");
    assert!(fuse::is_mounted(&place.target).unwrap());
    if user == 0 {
        fuse::unmount(&place.target).unwrap();
    } else {
        let mut command = Command::new("fusermount3");
        command.args(["-u", "-z"]).arg(&place.target).uid(user).gid(user);
        assert!(command.status().unwrap().success());
    }
    assert!(!fuse::is_mounted(&place.target).unwrap());
    // The folder is as good as new.
    let again = place.mount();
    assert_eq!(fs::read(place.target.join("again")).unwrap(), b"a b c");
    drop(again);
}

#[test]
fn readers_of_a_killed_server_get_an_error() {
    if can_fuse() {
        readers_of_a_killed_server(0);
    }
}

#[test]
fn readers_of_a_killed_server_get_an_error_as_an_ordinary_user() {
    let test = "readers_of_a_killed_server_get_an_error_as_an_ordinary_user";
    as_ordinary_user(test, || readers_of_a_killed_server(NOBODY));
}

#[test]
fn an_ordinary_user_sees_the_tree_alone() {
    as_ordinary_user("an_ordinary_user_sees_the_tree_alone", || {
        let place = Place::new();
        place.give_target_to(NOBODY);
        let server = Server::start(&place, NOBODY);
        let read = |user: u32| {
            let mut command = Command::new("sha256sum");
            command.arg("models/weights").current_dir("/");
            command.arg(place.target.join("models/weights")).uid(user).gid(user);
            let output = command.output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let native = Command::new("sha256sum").arg(place.rootfs.join("models/weights")).output();
        let native = String::from_utf8(native.unwrap().stdout).unwrap();
        let hash = native.split(' ').next().unwrap();
        assert_eq!(hash.len(), 64);
        assert!(read(NOBODY).contains(hash));
        assert_eq!(read(1), "", "not for other users");
        assert_eq!(read(0), "", "and not for root");

        let unmount = || {
            let mut command = Command::new("fusermount3");
            command.args(["-u", "-z"]).arg(&place.target).uid(NOBODY).gid(NOBODY);
            command.status().unwrap()
        };
        assert!(unmount().success());
        let mut server = server;
        assert!(server.child.wait().unwrap().success(), "the server ends with its mount");
    });
}
