//! Real FUSE sessions, and pods that are processes in mount namespaces of their own: this
//! test's binary again, told by the environment what to do.
//!
//! ```text
//! host:  /…/kubelet (shared) ── a/mount, b/mount: bind mounts of the session's
//! agent: a namespace that shares, or receives, what is mounted there
//! pods:  processes whose `inside` is a bind mount of a/mount
//! ```

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Lines, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::json;

use rustix::mount::{MountFlags, MountPropagationFlags};

use super::*;
use crate::fuse::{self, FuseMount};
use crate::mount::{KernelMounter, MountPoint, Mounter as _, Tree as Stored};
use crate::testing;

const ROLE: &str = "CARPORT_TEST_ROLE";
const FROM: &str = "CARPORT_TEST_FROM";
const TO: &str = "CARPORT_TEST_TO";
const WEIGHTS: usize = 3 << 20;

/// The host of a node: a tree, its session, and the folder of the kubelet, which is shared.
struct Host {
    _folder: tempfile::TempDir,
    rootfs: PathBuf,
    session: PathBuf,
    kubelet: PathBuf,
    /// Lives in the host's namespace, as its first process does.
    init: Child,
}

impl Host {
    /// In the namespace of the calling thread.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (rootfs, session, kubelet) = (at("rootfs"), at("session"), at("kubelet"));
        fs::create_dir_all(rootfs.join("models/tokenizer")).unwrap();
        fs::write(rootfs.join("models/weights"), pattern()).unwrap();
        fs::write(rootfs.join("models/tokenizer/vocab"), "a b c").unwrap();
        fs::write(rootfs.join("run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(rootfs.join("run"), fs::Permissions::from_mode(0o555)).unwrap();
        fs::create_dir(&session).unwrap();
        fs::create_dir(&kubelet).unwrap();
        testing::mount_tmpfs(&kubelet);
        testing::propagate(&kubelet, MountPropagationFlags::SHARED);
        let init = Command::new("sleep").arg("1000").spawn().unwrap();
        Self { _folder: folder, rootfs, session, kubelet, init }
    }

    fn serve(&self) -> FuseMount {
        let tree = Stored { rootfs: self.rootfs.clone(), path: None };
        FuseMount::mount(&tree, &self.session).unwrap()
    }

    /// The target of a volume that shows `path` of the session.
    fn publish(&self, volume: &str, path: &str) -> PathBuf {
        let target = self.kubelet.join(volume).join("mount");
        fs::create_dir_all(&target).unwrap();
        rustix::mount::mount_bind(self.session.join(path), &target).unwrap();
        target
    }

    fn device(&self) -> Device {
        Device::mounted_at(&self.session).unwrap().unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.init.kill().unwrap();
        self.init.wait().unwrap();
    }
}

/// Bytes that tell where they are from.
fn pattern() -> Vec<u8> {
    (0..WEIGHTS).map(|at| (at / 7 % 251) as u8).collect()
}

/// This binary in the role of `role`, below `wrapper`.
fn actor(role: &str, wrapper: &[&str]) -> Command {
    let exe = std::env::current_exe().unwrap();
    let words = wrapper.iter().map(std::ffi::OsStr::new).chain([exe.as_os_str()]);
    let words: Vec<_> = words.collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).args(["--exact", "mount::native::tests::act", "--nocapture"]);
    command.env(ROLE, role).stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A process that says a line when it is ready, and another when it has been told to end.
struct Actor {
    child: Child,
    input: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Actor {
    fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut actor = Self { input: child.stdin.take(), child, lines };
        actor.hear("ready");
        actor
    }

    /// A pod with the mount `from` at `to`, in a namespace that is as `propagation` says.
    fn pod(propagation: &str, from: &Path, to: &Path) -> Self {
        let mut command = actor("pod", &["unshare", "-m", "--propagation", propagation]);
        Self::start(command.env(FROM, from).env(TO, to))
    }

    fn hear(&mut self, start: &str) -> String {
        let mut lines = self.lines.by_ref().map(Result::unwrap);
        let line = lines.find_map(|line| Some(line.split_once(start)?.1.to_owned()));
        line.unwrap_or_else(|| panic!("it ended before it said {start:?}"))
    }

    fn end(mut self) -> String {
        drop(self.input.take());
        let said = self.hear("said ");
        assert!(self.child.wait().unwrap().success());
        said
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// No test of its own: what an [`Actor`] does.
#[test]
fn act() {
    let path = |name| PathBuf::from(std::env::var_os(name).unwrap());
    let wait = || std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    match std::env::var(ROLE).as_deref() {
        Ok("pod") => {
            let to = path(TO);
            if let Some(from) = std::env::var_os(FROM) {
                rustix::mount::mount_bind(Path::new(&from), &to).unwrap();
            }
            println!("said {}", hammer(&to, wait));
        }
        Ok("server") => {
            let tree = Stored { rootfs: path(FROM), path: None };
            let _mount = FuseMount::mount(&tree, &path(TO)).unwrap();
            println!("ready");
            wait();
        }
        Ok("agent") => {
            let device = Device::mounted_at(&path(TO)).unwrap().unwrap();
            println!("ready");
            let turned = turn(device, &path(FROM)).unwrap();
            println!("said {} blind {}", turned.turned.len(), turned.blind);
        }
        _ => {}
    }
}

/// Opens and reads in `folder` with four threads until `wait` returns, with a file open and a
/// file mapped all the time. Says what failed, and what the folder shows in the end.
fn hammer(folder: &Path, wait: impl FnOnce() -> usize) -> String {
    let (weights, expected) = (folder.join("models/weights"), pattern());
    let (stop, opens, failed) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let held = File::open(&weights).ok();
    let device = |file: &File| file.metadata().unwrap().dev();
    let before = held.as_ref().map(device);
    let mapped = held.as_ref().map(|file| testing::Mapping::of(file, WEIGHTS));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut round = 0_usize;
                let mut bytes = [0; 4096];
                while !stop.load(Ordering::Relaxed) {
                    round += 1;
                    let at = round * 77_773 % (WEIGHTS - bytes.len());
                    let read = File::open(&weights)
                        .and_then(|file| file.read_exact_at(&mut bytes, at as u64))
                        .is_ok_and(|()| bytes[..] == expected[at..at + 4096]);
                    failed.fetch_add(u64::from(!read), Ordering::Relaxed);
                    opens.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        println!("ready");
        std::io::stdout().flush().unwrap();
        wait();
        stop.store(true, Ordering::Relaxed);
    });
    let sound = held.as_ref().is_some_and(|file| {
        let mut bytes = vec![0; WEIGHTS];
        file.read_exact_at(&mut bytes, 0).is_ok() && bytes == expected
    }) && mapped.as_ref().is_some_and(|bytes| bytes.bytes() == expected);
    let after = File::open(&weights).ok().map(|file| device(&file));
    assert!(opens.load(Ordering::Relaxed) > 0);
    let mounts = at(folder).len();
    let failed = failed.load(Ordering::Relaxed);
    format!("failed {failed} sound {sound} moved {} mounts {mounts}", before != after)
}

/// The mounts at exactly `target`, the topmost last.
fn at(target: &Path) -> Vec<MountPoint> {
    let mounts = KernelMounter.under(target).unwrap();
    mounts.into_iter().filter(|mount| mount.target == target).collect()
}

fn assert_native(host: &Host, target: &Path, path: &str) {
    let mounts = at(target);
    assert_eq!(mounts.len(), 1, "{mounts:?}");
    let (ours, theirs) =
        (fs::metadata(target).unwrap(), host.rootfs.join(path).metadata().unwrap());
    assert_eq!((ours.dev(), ours.ino()), (theirs.dev(), theirs.ino()));
    assert!(mounts[0].read_only);
}

fn assert_fuse(target: &Path) {
    let mounts = at(target);
    assert_eq!(mounts.last().unwrap().fs_type, fuse::FS_TYPE, "{mounts:?}");
    assert_eq!(fs::read(target.join("models/tokenizer/vocab")).unwrap(), b"a b c");
}

/// Runs `test` on the host of a node where one can be had.
fn on_a_host(name: &str, test: impl FnOnce() + Send) {
    if let Err(error) = fuse::check() {
        println!("SKIPPED: {error}");
        return;
    }
    if !can_mount_beneath() {
        println!("SKIPPED: the kernel cannot mount beneath another mount");
        return;
    }
    testing::in_mount_namespace(name, test);
}

/// As the agent: in a copy of the host's namespace, with what is mounted on the host.
fn as_the_agent<T: Send>(how: Option<MountPropagationFlags>, act: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let agent = scope.spawn(|| {
            testing::leave_mount_namespace().unwrap();
            if let Some(how) = how {
                testing::propagate("/", how | MountPropagationFlags::REC);
            }
            act()
        });
        agent.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

const NOTHING_NOTICED: &str = "failed 0 sound true moved true mounts 1";

#[test]
fn running_pods_are_turned_and_notice_nothing() {
    on_a_host("running_pods_are_turned", || {
        let host = Host::new();
        let session = host.serve();
        let a = host.publish("a", "");
        let inside = host.rootfs.parent().unwrap().join("inside");
        fs::create_dir(&inside).unwrap();
        let pods: Vec<Actor> = ["private", "slave", "unchanged", "private"]
            .map(|propagation| Actor::pod(propagation, &a, &inside))
            .into();
        let device = host.device();
        let turned = as_the_agent(None, || turn(device, &host.rootfs).unwrap());
        assert!(turned.remaining.is_empty(), "{turned:?}");
        assert!(!turned.blind);
        assert!(turned.turned.iter().filter(|mount| mount.target == inside).count() == 4);
        for pod in pods {
            assert_eq!(pod.end(), NOTHING_NOTICED);
        }
        assert_native(&host, &a, "");
        ended(&session);
        freed(device);
    });
}

/// A container of the runtime that most nodes have, as containerd starts it.
fn container(name: &str, host: &Host, target: &Path, options: &str, user_namespace: bool) -> Actor {
    let bundle = host.rootfs.parent().unwrap().join(name);
    let root = bundle.join("root");
    for folder in ["dev", "proc", "usr", "models"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    fs::write(root.join("actor"), "").unwrap();
    for (link, folder) in [("bin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")] {
        std::os::unix::fs::symlink(folder, root.join(link)).unwrap();
    }
    let bind = |from: &Path, to: &str, options: &[&str]| json!({"type": "bind", "source": from, "destination": to, "options": options});
    let exe = std::env::current_exe().unwrap();
    let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "pid"})];
    let mut ids = json!([]);
    if user_namespace {
        namespaces.push(json!({"type": "user"}));
        ids = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    }
    let config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/actor", "--exact", "mount::native::tests::act", "--nocapture"],
            "env": [format!("{ROLE}=pod"), format!("{TO}=/models")],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": root, "readonly": true},
        "mounts": [
            {"type": "proc", "source": "proc", "destination": "/proc"},
            {"type": "tmpfs", "source": "tmpfs", "destination": "/dev", "options": ["mode=755"]},
            bind(Path::new("/usr"), "/usr", &["rbind", "ro"]),
            bind(&exe, "/actor", &["bind", "ro"]),
            bind(target, "/models", &["rbind", "ro", "nosuid", "nodev", options]),
        ],
        "linux": {"namespaces": namespaces, "uidMappings": ids, "gidMappings": ids},
    });
    fs::write(bundle.join("config.json"), config.to_string()).unwrap();
    let id = format!("carport-test-{}-{name}", std::process::id());
    let mut runc = Command::new("runc");
    runc.args(["--root", bundle.join("state").to_str().unwrap(), "run", "-b"]);
    runc.arg(&bundle).arg(id).stdin(Stdio::piped()).stdout(Stdio::piped());
    Actor::start(&mut runc)
}

#[test]
fn containers_are_turned_also_with_users_of_their_own() {
    on_a_host("containers_are_turned", || {
        if !Command::new("runc").arg("--version").output().is_ok_and(|it| it.status.success()) {
            println!("SKIPPED: runc is not installed");
            return;
        }
        let host = Host::new();
        let folder = host.rootfs.parent().unwrap();
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
        let session = host.serve();
        let a = host.publish("a", "");
        let containers = [
            container("private", &host, &a, "rprivate", false),
            container("slave", &host, &a, "rslave", false),
            container("users", &host, &a, "rprivate", true),
        ];
        let turned = turn(host.device(), &host.rootfs).unwrap();
        assert!(turned.remaining.is_empty(), "{turned:?}");
        let inside = turned.turned.iter().filter(|mount| mount.target == Path::new("/models"));
        assert_eq!(inside.count(), 3, "{turned:?}");
        for container in containers {
            assert_eq!(container.end(), NOTHING_NOTICED);
        }
        ended(&session);
    });
}

fn ended(session: &FuseMount) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let wait = async { tokio::time::timeout(Duration::from_secs(20), session.ended()).await };
    runtime.block_on(wait).expect("the session ends with its last holder");
}

/// The kernel lets the number go a moment after the server; and may give it to another test's
/// mount, for as long as that lasts.
fn freed(device: Device) {
    let start = Instant::now();
    while device.in_use().unwrap() {
        assert!(start.elapsed() < Duration::from_secs(60), "{device} is still in use");
        std::thread::yield_now();
    }
}

#[test]
fn wherever_it_starts_each_namespace_has_one_kernel_mount_in_the_end() {
    for how in [
        None,
        Some(MountPropagationFlags::SHARED),
        Some(MountPropagationFlags::DOWNSTREAM),
        Some(MountPropagationFlags::PRIVATE),
    ] {
        on_a_host("wherever_it_starts", || {
            let host = Host::new();
            let session = host.serve();
            let a = host.publish("a", "");
            as_the_agent(how, || {
                assert_fuse(&a);
                let turned = turn(host.device(), &host.rootfs).unwrap();
                assert!(turned.remaining.is_empty(), "{turned:?}");
                assert_native(&host, &a, "");
                assert_native(&host, &host.session, "");
            });
            assert_native(&host, &a, "");
            assert_native(&host, &host.session, "");
            ended(&session);
        });
    }
}

#[test]
fn folders_files_and_noexec_stay_what_they_are() {
    on_a_host("folders_files_and_noexec", || {
        let host = Host::new();
        let session = host.serve();
        let folder = host.publish("folder", "models/tokenizer");
        let noexec = host.publish("noexec", "");
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        let flags = flags | MountFlags::BIND | MountFlags::NOEXEC;
        rustix::mount::mount_remount(&noexec, flags, "").unwrap();
        // What the kubelet makes of a `subPath`.
        let file = host.kubelet.join("file");
        fs::write(&file, "").unwrap();
        rustix::mount::mount_bind(host.session.join("models/weights"), &file).unwrap();
        let turned = turn(host.device(), &host.rootfs).unwrap();
        assert!(turned.remaining.is_empty(), "{turned:?}");
        assert_native(&host, &folder, "models/tokenizer");
        assert_native(&host, &file, "models/weights");
        assert_native(&host, &noexec, "");
        let runs = |folder: &Path| Command::new(folder.join("run")).status().is_ok();
        assert!(!runs(&noexec) && runs(&host.session));
        ended(&session);
    });
}

#[test]
fn an_open_file_keeps_the_session_until_it_is_closed() {
    on_a_host("an_open_file_keeps_the_session", || {
        let host = Host::new();
        let session = host.serve();
        let file = File::open(host.session.join("models/weights")).unwrap();
        let device = host.device();
        let turned = turn(device, &host.rootfs).unwrap();
        assert!(turned.remaining.is_empty(), "{turned:?}");
        assert_eq!(turned.turned.len(), 1);
        assert!(device.in_use().unwrap());
        let mut bytes = vec![0; WEIGHTS];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == pattern());
        drop(file);
        ended(&session);
        freed(device);
        // And ending takes nothing of what is there now.
        drop(session);
        assert_native(&host, &host.session, "");
    });
}

#[test]
fn a_turn_that_was_broken_off_is_ended_by_the_next() {
    on_a_host("a_turn_that_was_broken_off", || {
        let host = Host::new();
        let _session = host.serve();
        let a = host.publish("a", "");
        let mut agent = actor("agent", &["env", "CARPORT_CRASH_AT=1"]);
        let agent = Actor::start(agent.env(FROM, &host.rootfs).env(TO, &a));
        assert!(!{ agent }.child.wait().unwrap().success(), "it was to be killed");
        let stacked = |target: &Path| at(target).len() == 2;
        assert_eq!([&a, &host.session].map(|target| stacked(target)), [true, false]);
        assert_fuse(&a);

        let device = host.device();
        let turned = turn(device, &host.rootfs).unwrap();
        assert_eq!((turned.turned.len(), turned.remaining.len()), (2, 0), "{turned:?}");
        let again = turn(device, &host.rootfs).unwrap();
        assert_eq!((again.turned.len(), again.remaining.len()), (0, 0), "{again:?}");
        assert_native(&host, &a, "");
        assert_native(&host, &host.session, "");
    });
}

#[test]
fn a_dead_server_is_replaced_in_running_pods() {
    on_a_host("a_dead_server_is_replaced", || {
        let host = Host::new();
        let mut server = actor("server", &["env"]);
        let server = Actor::start(server.env(FROM, &host.rootfs).env(TO, &host.session));
        let a = host.publish("a", "");
        let inside = host.rootfs.parent().unwrap().join("inside");
        fs::create_dir(&inside).unwrap();
        let pod = Actor::pod("private", &a, &inside);
        let device = host.device();
        server.kill();
        let error = fs::read_dir(&a).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));

        let turned = turn(device, &host.rootfs).unwrap();
        assert!(turned.remaining.is_empty(), "{turned:?}");
        assert_native(&host, &a, "");
        let said = pod.end();
        assert!(said.contains("moved true mounts 1"), "{said}");
        freed(device);
    });
}

#[test]
fn a_server_that_does_not_answer_holds_up_nothing() {
    on_a_host("a_server_that_does_not_answer", || {
        let host = Host::new();
        let server = testing::mount_hung_fuse(&host.session).unwrap();
        let a = host.publish("a", "");
        let turned = turn(host.device(), &host.rootfs).unwrap();
        assert!(turned.remaining.is_empty(), "{turned:?}");
        assert_native(&host, &a, "");
        drop(server);
    });
}

#[test]
fn what_cannot_be_turned_serves_on_and_is_named() {
    on_a_host("what_cannot_be_turned", || {
        let host = Host::new();
        let _session = host.serve();
        let a = host.publish("a", "");
        let kernel = turn_where(host.device(), &host.rootfs, false).unwrap();
        assert_eq!(kernel.remaining.len(), 2, "{kernel:?}");
        assert!(kernel.remaining.iter().all(|it| matches!(it.why, Why::Kernel)));
        assert!(kernel.turned.is_empty());
        assert_fuse(&a);

        let cache = a.join("models/tokenizer");
        testing::mount_tmpfs(&cache);
        let covered = turn(host.device(), &host.rootfs).unwrap();
        let [left] = &covered.remaining[..] else { panic!("{covered:?}") };
        assert_eq!(left.target, a);
        assert_eq!(left.why.to_string(), "something else is mounted on it or inside it");
        assert_eq!(at(&cache).len(), 1);
        assert_native(&host, &host.session, "");
        rustix::mount::unmount(&cache, rustix::mount::UnmountFlags::empty()).unwrap();
        assert_fuse(&a);

        let device = Device::mounted_at(&a).unwrap().unwrap();
        let error = turn(device, &host.rootfs.join("absent")).unwrap_err();
        assert!(matches!(error, MountError::TreeGone(_)), "{error}");
        assert_eq!(turn(device, &host.rootfs).unwrap().turned.len(), 1);
        assert_native(&host, &a, "");
    });
}

#[test]
fn without_the_host_s_processes_it_says_that_it_is_blind() {
    on_a_host("without_the_host_s_processes", || {
        let host = Host::new();
        let _session = host.serve();
        let a = host.publish("a", "");
        let mut agent = actor("agent", &["unshare", "--pid", "--fork", "--mount-proc"]);
        let agent = Actor::start(agent.env(FROM, &host.rootfs).env(TO, &a));
        assert_eq!(agent.end(), "2 blind true");
    });
}
