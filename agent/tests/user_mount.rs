//! `carport mount` and `umount` as an ordinary user, with the real binary and real FUSE.
//!
//! Runs as root, to be able to become somebody else. Each test has a mount namespace of
//! its own, in which `/dev/fuse` is open to all users as udev makes it elsewhere.
#![allow(unsafe_code, reason = "unshare")]
#![allow(clippy::unwrap_used, reason = "a test says by panicking that it fails")]

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::mount::MountPropagationFlags;
use rustix::process::{Pid, Signal};
use rustix::thread::UnshareFlags;
use serde_json::Value;

/// `nobody`, on every distribution.
const NOBODY: u32 = 65534;

const WEIGHTS: usize = 3 << 20;

struct Home {
    dir: tempfile::TempDir,
    image: String,
    target: PathBuf,
    program: PathBuf,
}

impl Home {
    /// A home of `nobody`'s, and a model packed where `nobody` can read it.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        let home = Self {
            image: format!("oci:{}:v1", dir.path().join("layout").display()),
            target: dir.path().join("model"),
            program: reachable(Path::new(env!("CARGO_BIN_EXE_carport")), dir.path()),
            dir,
        };
        let model = home.dir.path().join("source");
        fs::create_dir(&model).unwrap();
        fs::write(model.join("config.json"), "{}").unwrap();
        fs::write(model.join("weights"), vec![7; WEIGHTS]).unwrap();
        chown(&model, Some(NOBODY), Some(NOBODY)).unwrap();
        home.done(&["pack", model.to_str().unwrap(), &home.image]);
        home
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.uid(NOBODY).gid(NOBODY).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("HOME", self.dir.path()).env_remove("XDG_DATA_HOME");
        command
    }

    fn carport(&self, arguments: &[&str]) -> Output {
        self.command(&self.program).args(arguments).output().unwrap()
    }

    fn done(&self, arguments: &[&str]) -> String {
        let output = self.carport(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "carport {arguments:?}: {said}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.carport(arguments);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        // What a pull tells of its progress is no error.
        let errors: Vec<&str> = said.lines().filter(|line| line.starts_with("carport: ")).collect();
        assert_eq!(errors.len(), 1, "{said}");
        errors[0].to_owned()
    }

    fn mount(&self) -> String {
        self.done(&["mount", &self.image, self.target()])
    }

    fn target(&self) -> &str {
        self.target.to_str().unwrap()
    }

    fn cat(&self, path: &str) -> Output {
        self.command("find")
            .arg(&self.target)
            .args(["-path", &format!("*/{path}"), "-exec", "cat", "{}", ";"])
            .output()
            .unwrap()
    }

    /// The process that serves the mount.
    fn server(&self) -> Pid {
        let mut found = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid = entry.unwrap().file_name().to_str()?.parse().ok()?;
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line).into_owned();
            (line.contains("--serve") && line.contains(self.target())).then_some(pid)
        });
        Pid::from_raw(found.next().expect("a serving process")).unwrap()
    }

    fn records(&self) -> usize {
        let store = self.dir.path().join(".local/share/carport");
        let count = |name: &str| fs::read_dir(store.join(name)).unwrap().count();
        assert_eq!(count("volumes"), count("mounts"));
        count("volumes")
    }
}

/// Another name of `program` in `folder`: the target folder may lie where only root may go.
fn reachable(program: &Path, folder: &Path) -> PathBuf {
    let name = folder.join("carport");
    fs::hard_link(program, &name).or_else(|_| fs::copy(program, &name).map(drop)).unwrap();
    name
}

impl Drop for Home {
    fn drop(&mut self) {
        // What a failed test left mounted would hold the folder.
        let _ = self.carport(&["umount", self.target()]);
    }
}

/// Runs `test` where an ordinary user may use FUSE, or says why not.
fn as_ordinary_user(test: impl FnOnce() + Send) {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can become another user");
        return;
    }
    if let Err(error) = carport_csi::fuse::check() {
        println!("SKIPPED: {error}");
        return;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: only the mounts of this thread, and of the processes that it starts,
            // are its own from here on; descriptors stay shared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
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
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn a_user_mounts_reads_and_unmounts() {
    as_ordinary_user(|| {
        let home = Home::new();
        let said = home.mount();
        assert_eq!(said, format!("{} on {} (read-only)\n", home.image, home.target()));
        assert_eq!(home.cat("config.json").stdout, b"{}");
        assert!(home.cat("weights").stdout == vec![7; WEIGHTS]);
        let touched = home.command("touch").arg(home.target.join("new")).output().unwrap();
        let said = String::from_utf8(touched.stderr).unwrap();
        assert!(said.contains("Read-only file system"), "{said}");

        // Again is no error and no second server; something else there is.
        home.mount();
        assert_eq!(home.records(), 1);
        let said = home.refused(&["mount", "--path", "models", &home.image, home.target()]);
        assert!(said.contains("something else is mounted there"), "{said}");

        let said = home.refused(&["rm", &home.image]);
        let target = home.target();
        assert!(
            said.contains(&format!("mounted at {target}; `carport umount {target}`")),
            "{said}"
        );

        let json = home.done(&["-o", "json", "umount", target]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["still_open"], false);
        assert_eq!(json["target"], target);
        assert_eq!(home.records(), 0);
        assert_eq!(fs::read_dir(&home.target).unwrap().count(), 0);
        let said = home.refused(&["umount", target]);
        assert!(said.contains("no image is mounted there"), "{said}");
        home.done(&["rm", &home.image]);
    });
}

#[test]
fn a_user_reads_an_image_that_arrives() {
    as_ordinary_user(|| {
        let home = Home::new();
        let target = home.target();
        let json = home.done(&["-o", "json", "mount", "--stream", &home.image, target]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((&json["arriving"], &json["waited_for"]), (&true.into(), &0.into()));
        assert_eq!(home.cat("config.json").stdout, b"{}");
        assert!(home.cat("weights").stdout == vec![7; WEIGHTS]);
        home.done(&["mount", "--stream", &home.image, target]);
        assert_eq!(home.records(), 1, "no second server");
        home.done(&["umount", target]);
        assert_eq!(home.records(), 0);

        // Whether it was complete by then or not, it goes on where it was.
        home.done(&["pull", &home.image]);
        let json = home.done(&["-o", "json", "mount", "--stream", &home.image, target]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["arriving"], false, "it is stored");
        assert!(home.cat("weights").stdout == vec![7; WEIGHTS]);
        home.done(&["umount", target]);
        home.done(&["rm", &home.image]);
    });
}

#[test]
fn a_folder_of_the_image_is_mounted_alone() {
    as_ordinary_user(|| {
        let home = Home::new();
        let json =
            home.done(&["-o", "json", "mount", "--path", "/models", &home.image, home.target()]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["reference"], home.image.as_str());
        assert_eq!(json["target"], home.target());
        let listed = home.command("ls").arg(home.target()).output().unwrap();
        assert_eq!(String::from_utf8(listed.stdout).unwrap(), "config.json\nweights\n");
        home.done(&["umount", home.target()]);
    });
}

#[test]
fn what_cannot_be_mounted_is_one_clear_error() {
    as_ordinary_user(|| {
        let home = Home::new();
        let said = home.refused(&["mount", &home.image, "source"]);
        assert!(said.contains("a folder with something in it; choose an empty folder"), "{said}");
        let said = home.refused(&["mount", "--path", "absent", &home.image, "other"]);
        assert!(said.starts_with("carport: image folder /absent: is not there"), "{said}");
        // A folder of root's.
        let foreign = tempfile::tempdir().unwrap();
        fs::set_permissions(foreign.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let said = home.refused(&["mount", &home.image, foreign.path().to_str().unwrap()]);
        assert!(said.contains("fusermount3 refused"), "{said}");
        assert!(said.contains("user has no write access to mountpoint"), "{said}");
        assert_eq!(home.records(), 0);
    });
}

#[test]
fn who_has_a_file_open_reads_on_after_umount() {
    as_ordinary_user(|| {
        let home = Home::new();
        home.mount();
        // The shell opens the file, tells, and reads it when told.
        let mut reader = home.command("sh");
        reader.args(["-c", "exec 3<\"$0\"; echo open; read go; cat <&3 | wc -c"]);
        reader.arg(first(&home, "weights")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut reader = reader.spawn().unwrap();
        let mut out = reader.stdout.take().unwrap();
        let mut opened = [0; 5];
        out.read_exact(&mut opened).unwrap();
        let said = home.done(&["umount", home.target()]);
        assert!(said.contains("files of it are still open"), "{said}");
        assert!(home.refused(&["rm", &home.image]).contains("mounted at"));
        drop(reader.stdin.take());
        let mut count = String::new();
        out.read_to_string(&mut count).unwrap();
        assert_eq!(count.trim(), WEIGHTS.to_string());
        reader.wait().unwrap();
    });
}

#[test]
fn a_killed_server_leaves_nothing_in_the_way() {
    as_ordinary_user(|| {
        let home = Home::new();
        home.mount();
        let kill = |signal| {
            let server = home.server();
            rustix::process::kill_process(server, signal).unwrap();
            // It is no child of this test, so its end can only be seen. The process that
            // inherits it may take its time to bury it.
            let status = format!("/proc/{}/status", server.as_raw_nonzero());
            let ended = |status: String| {
                status.contains("\nState:\tZ") && status.contains("\nThreads:\t1\n")
            };
            while !fs::read_to_string(&status).map_or(true, ended) {
                std::thread::yield_now();
            }
        };
        kill(Signal::KILL);
        let said = String::from_utf8(home.cat("weights").stderr).unwrap();
        assert!(said.contains("Transport endpoint is not connected"), "{said}");
        // A new mount clears the dead one away.
        home.mount();
        assert_eq!(home.cat("config.json").stdout, b"{}");
        kill(Signal::KILL);
        home.done(&["umount", home.target()]);
        home.done(&["rm", &home.image]);
        assert_eq!(home.records(), 0);

        // One that is asked to end takes its mount with it.
        home.mount();
        kill(Signal::TERM);
        assert_eq!(home.records(), 0);
        assert!(home.refused(&["umount", home.target()]).contains("no image is mounted there"));
    });
}

#[test]
fn foreground_is_not_for_root() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: not root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_carport"))
        .arg("--root")
        .arg(dir.path().join("store"))
        .args(["mount", "--foreground", "oci:/absent:v1"])
        .arg(dir.path().join("target"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("--foreground: for ordinary users"), "{said}");
}

/// Where in the mount the file is; `nobody` alone can look.
fn first(home: &Home, name: &str) -> PathBuf {
    let found = home.command("find").arg(&home.target).args(["-name", name]).output().unwrap();
    Path::new(String::from_utf8(found.stdout).unwrap().trim()).to_owned()
}
