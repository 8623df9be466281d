//! What tests of volumes need: a mount namespace of their own, a dead mount, packed
//! images, and a registry that holds back its layers until it is told.
#![allow(unsafe_code, reason = "a raw system call")]
#![allow(dead_code, reason = "not every test uses all of it")]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carport_image::pack::{PackOptions, pack};
use carport_image::pull::PullOptions;
use carport_image::source::{RegistryOptions, Sources};
use carport_image::{Digest, Puller, Store};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Larger blobs than this are layers, and held back by a [`GatedRegistry`].
const LAYER_BYTES: u64 = 10_000;

/// Runs `test` on a thread in a private mount namespace, as are the threads that
/// it starts; or says that it skips.
pub(crate) fn in_mount_namespace(name: &str, test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if let Err(error) = leave_mount_namespace() {
                println!("{name}: skipped, no mount namespace to be had ({error}): run as root");
                return;
            }
            propagate("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC);
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// As [`in_mount_namespace`], with a Tokio runtime whose threads are in there, too.
pub(crate) fn in_mount_namespace_async<F: Future<Output = ()>>(
    name: &str,
    test: impl FnOnce() -> F + Send,
) {
    in_mount_namespace(name, || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(test());
    });
}

/// Gives the calling thread a copy of its mount namespace.
pub(crate) fn leave_mount_namespace() -> rustix::io::Result<()> {
    // SAFETY: descriptors stay shared; only the mounts of this thread, and of the threads
    // that it starts, are its own from here on.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
}

/// Sets how mounts below `path` propagate.
pub(crate) fn propagate(path: impl AsRef<Path>, how: MountPropagationFlags) {
    rustix::mount::mount_change(path.as_ref(), how).unwrap();
}

/// Mounts an empty tmpfs.
pub(crate) fn mount_tmpfs(target: &Path) {
    rustix::mount::mount("none", target, "tmpfs", MountFlags::empty(), None).unwrap();
}

/// Mounts a FUSE file system whose server is gone already. False, and a word about it,
/// where there is no FUSE.
pub(crate) fn mount_dead_fuse(target: &Path) -> bool {
    // Closing the device ends the connection: every call answers ENOTCONN from now on.
    mount_hung_fuse(target).map(drop).is_some()
}

/// Mounts a FUSE file system whose server never answers, for as long as the answer is kept.
/// `None`, and a word about it, where there is no FUSE.
pub(crate) fn mount_hung_fuse(target: &Path) -> Option<File> {
    let device = match File::options().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        Err(error) => {
            println!("SKIPPED: open /dev/fuse: {error}");
            return None;
        }
    };
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = CString::new(options).unwrap();
    rustix::mount::mount("hung", target, "fuse", MountFlags::empty(), Some(options.as_c_str()))
        .unwrap();
    Some(device)
}

/// A file, mapped.
pub(crate) struct Mapping {
    at: *mut libc::c_void,
    length: usize,
}

impl Mapping {
    /// The first `length` bytes of a file that nobody changes.
    pub(crate) fn of(file: &File, length: usize) -> Self {
        let (read, private, fd) = (libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd());
        // SAFETY: a fresh mapping, at a place that the kernel chooses.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), length, read, private, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Self { at, length }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: mapped until it is dropped, and never written.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`; nothing borrows it any more.
        unsafe { libc::munmap(self.at, self.length) };
    }
}

/// A store, images to pull into it, and a folder for the targets of pods.
pub(crate) struct World {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) store: Store,
    pub(crate) pods: PathBuf,
    sources: Sources,
    pub(crate) puller: Puller,
}

impl World {
    /// An empty store. `registry` is spoken to over plain HTTP.
    pub(crate) fn new(registry: Option<&GatedRegistry>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        let docker_config = folder.path().join("config.json");
        fs::write(&docker_config, "{}").unwrap();
        let sources = Sources::new(RegistryOptions {
            plain_http: registry.iter().map(|registry| registry.host.clone()).collect(),
            docker_config: Some(docker_config),
            ..RegistryOptions::default()
        })
        .unwrap();
        let puller = Puller::new(store.clone(), sources.clone(), PullOptions::default());
        let pods = folder.path().join("pods");
        fs::create_dir(&pods).unwrap();
        Self { folder, store, pods, sources, puller }
    }

    /// Packs an image of these files, which appear below `/models`; answers its reference.
    pub(crate) async fn pack(&self, tag: &str, files: &[(&str, &str)]) -> String {
        let reference = format!("oci:{}:{tag}", self.folder.path().join("layout").display());
        pack_into(&self.sources, &reference, files).await;
        reference
    }

    /// The target of a pod whose folder exists.
    pub(crate) fn target(&self, pod: &str) -> PathBuf {
        let volume = self.pods.join(pod).join("volumes/kubernetes.io~csi/model");
        fs::create_dir_all(&volume).unwrap();
        volume.join("mount")
    }

    /// The names of the volume records on disk.
    pub(crate) fn records(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.store.root().join("volumes")).unwrap();
        let mut records: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        records.sort();
        records
    }
}

async fn pack_into(sources: &Sources, reference: &str, files: &[(&str, &str)]) -> Digest {
    let model = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = model.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    let options = PackOptions { title: Some("model".into()), ..PackOptions::default() };
    pack(model.path(), &reference.parse().unwrap(), options, sources).await.unwrap().digest
}

/// A registry of one image, `<host>/model:v1`, that answers with layers only once it is
/// opened. It counts them.
pub(crate) struct GatedRegistry {
    _layout: tempfile::TempDir,
    host: String,
    gate: watch::Sender<bool>,
    asked: watch::Receiver<usize>,
    task: tokio::task::JoinHandle<()>,
}

impl GatedRegistry {
    pub(crate) async fn start() -> Self {
        Self::start_with_login(None).await
    }

    /// Wants this `Authorization` header.
    pub(crate) async fn start_with_login(login: Option<&'static str>) -> Self {
        let layout = tempfile::tempdir().unwrap();
        let sources = Sources::new(RegistryOptions::default()).unwrap();
        let reference = format!("oci:{}:v1", layout.path().display());
        let weights = "weights ".repeat(10_000);
        pack_into(&sources, &reference, &[("weights", &weights)]).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let (gate, opened) = watch::channel(false);
        let (count, asked) = watch::channel(0);
        let (root, count) = (layout.path().to_owned(), Arc::new(count));
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (root, opened, count) = (root.clone(), opened.clone(), Arc::clone(&count));
                tokio::spawn(async move { answer(stream, &root, opened, &count, login).await });
            }
        });
        Self { _layout: layout, host, gate, asked, task }
    }

    pub(crate) fn reference(&self) -> String {
        format!("{}/model:v1", self.host)
    }

    /// Lets the layers go.
    pub(crate) fn open(&self) {
        self.gate.send_replace(true);
    }

    /// Waits until somebody asks for a layer.
    pub(crate) async fn asked_for_a_layer(&self) {
        self.asked.clone().wait_for(|count| *count > 0).await.unwrap();
    }

    /// How often a layer was asked for.
    pub(crate) fn layers_asked_for(&self) -> usize {
        *self.asked.borrow()
    }

    /// The content of a `.dockerconfigjson` for this registry.
    pub(crate) fn docker_config(&self, auth: &str) -> String {
        format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, self.host)
    }
}

impl Drop for GatedRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers one request, with what the layout folder has.
async fn answer(
    stream: TcpStream,
    root: &Path,
    mut opened: watch::Receiver<bool>,
    count: &watch::Sender<usize>,
    login: Option<&str>,
) -> Option<()> {
    let mut stream = BufReader::new(stream);
    let mut request = String::new();
    while !request.ends_with("\r\n\r\n") {
        if stream.read_line(&mut request).await.ok()? == 0 {
            return None;
        }
    }
    let head_only = request.starts_with("HEAD ");
    let path = request.split(' ').nth(1)?.to_owned();
    let allowed = login.is_none_or(|login| request.contains(login));
    let (status, kind, body) = if !allowed {
        ("401 Unauthorized\r\nwww-authenticate: Basic realm=\"test\"", "text/plain", Vec::new())
    } else if path == "/v2/" {
        ("200 OK", "application/json", b"{}".to_vec())
    } else {
        let name = path.rsplit('/').next()?;
        let digest = match name.strip_prefix("sha256:") {
            Some(hex) => hex.to_owned(),
            None => {
                let index = fs::read_to_string(root.join("index.json")).unwrap();
                index.split("sha256:").nth(1)?.get(..64)?.to_owned()
            }
        };
        let body = fs::read(root.join("blobs/sha256").join(digest)).ok()?;
        if body.len() as u64 > LAYER_BYTES && !head_only {
            count.send_modify(|count| *count += 1);
            opened.wait_for(|open| *open).await.ok()?;
        }
        ("200 OK", "application/vnd.oci.image.manifest.v1+json", body)
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.ok()?;
    if !head_only {
        stream.write_all(&body).await.ok()?;
    }
    stream.shutdown().await.ok()
}
