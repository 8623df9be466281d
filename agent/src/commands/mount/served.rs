//! `carport mount` for who may not use the kernel's mounts: a process of this user
//! serves the image through FUSE.
//!
//! ```text
//! command:  pull ─► start itself again, apart from the terminal ─► wait for its line
//! server:   claim ─► mount ─► line ─► serve until unmounted ─► claim removed
//! ```
//!
//! With `--stream` the server pulls, since it is the one that stays ([`stream`]).
//!
//! The claim ([`super::claim`]) keeps the image while it is served. Afterwards the server
//! writes to its log only, so that nobody need be there to listen.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail};
use carport_csi::fuse::{self, FuseMount};
use carport_csi::mount::{ImagePath, KernelMounter, MountOptions, Mounter as _, TargetState, Tree};
use carport_csi::volume::{TargetPath, VolumeId, VolumeRecord};
use carport_image::{Digest, Reference, Store};

use super::Mounted;
use super::claim::{self, Claims};
use crate::cli::{Global, MountArgs, Output};
use crate::commands::fuse::{raise_open_files, told_to_end};
use crate::commands::pull::pull_one;
use crate::commands::{open_puller, open_store};
use crate::config::Config;

mod stream;

/// How long a server that is told to end goes on for who has files open.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a server takes to end at most when nobody has files open.
const END: Duration = Duration::from_secs(1);

/// More of a server's log is no error message.
const MAX_SAID_BYTES: u64 = 4096;

/// What is mounted where.
struct Wanted {
    reference: Reference,
    target: PathBuf,
    path: Option<ImagePath>,
}

/// Mounts as an ordinary user.
pub(super) async fn mount(
    global: &Global,
    config: Config,
    arguments: MountArgs,
    target: PathBuf,
    path: Option<ImagePath>,
) -> anyhow::Result<()> {
    let output = global.output;
    let wanted = Wanted { reference: arguments.reference.clone(), target, path };
    if let Some(name) = arguments.serve.clone() {
        // What a shell does to its background jobs is not for this one.
        rustix::process::setsid().context("leave the terminal")?;
        std::env::set_current_dir("/").context("leave the current folder")?;
        if arguments.stream {
            return stream::serve(output, &config, wanted, name, arguments.read_timeout).await;
        }
        let store = open_store(&config)?;
        let digest = store.lookup(&wanted.reference)?;
        let digest = digest.with_context(|| format!("{}: not stored", wanted.reference))?;
        return serve(output, store, digest, wanted, name).await;
    }
    // Before a pull of hours.
    fuse::check()?;
    let there = clear_target(&wanted.target)?;
    let puller = open_puller(&config)?;
    if arguments.stream && puller.store().lookup(&wanted.reference)?.is_none() {
        if there == Target::Mounted {
            let claim = claimed(puller.store(), &wanted, |claim| claim.image == wanted.reference)?;
            let mounted = Mounted::new(&wanted.reference, &claim.digest, wanted.target);
            return Mounted { arriving: true, ..mounted }.print(output);
        }
        let root = puller.store().root().to_owned();
        drop(puller);
        let name = claim::new_name();
        if arguments.foreground {
            return stream::serve(output, &config, wanted, name, arguments.read_timeout).await;
        }
        let (global, mut more) = (global.clone(), arguments.registry.flags());
        let patience = humantime::format_duration(arguments.read_timeout).to_string();
        more.extend(["--stream".into(), "--read-timeout".into(), patience.replace(' ', "").into()]);
        let mounted =
            tokio::task::spawn_blocking(move || start(&global, &root, &wanted, &name, &more));
        return mounted.await.context("mount")??.print(output);
    }
    let digest = pull_one(output, &puller, &wanted.reference).await?.digest;
    let store = puller.store().clone();
    drop(puller);
    if there == Target::Mounted {
        claimed(&store, &wanted, |claim| claim.digest == digest)?;
        return Mounted::new(&wanted.reference, &digest, wanted.target).print(output);
    }
    let name = claim::new_name();
    if arguments.foreground {
        return serve(output, store, digest, wanted, name).await;
    }
    let (global, root) = (global.clone(), store.root().to_owned());
    let mounted = tokio::task::spawn_blocking(move || start(&global, &root, &wanted, &name, &[]));
    mounted.await.context("mount")??.print(output)
}

/// The claim of who serves what is wanted, and has the image that `same` says.
fn claimed(
    store: &Store,
    wanted: &Wanted,
    same: impl Fn(&VolumeRecord) -> bool,
) -> anyhow::Result<VolumeRecord> {
    let target = wanted.target.display();
    let there = |claim: &VolumeRecord| {
        claim.target.as_path() == wanted.target && claim.path == wanted.path && same(claim)
    };
    Claims::of(store).living()?.into_iter().find(there).with_context(|| {
        format!(
            "mount on {target}: something else is mounted there; `carport umount {target}` first"
        )
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Target {
    Ready,
    Mounted,
}

/// Makes the folder where there is none, and takes a dead mount away.
fn clear_target(target: &Path) -> anyhow::Result<Target> {
    let shown = target.display();
    match KernelMounter.state(target)? {
        TargetState::Absent => {
            fs::create_dir_all(target).with_context(|| format!("make {shown}"))?;
        }
        TargetState::Empty => {}
        TargetState::Occupied(what) => bail!("mount on {shown}: {what}; choose an empty folder"),
        TargetState::Mounted { .. } => return Ok(Target::Mounted),
        TargetState::Dead => fuse::unmount(target)?,
    }
    Ok(Target::Ready)
}

/// Starts the server and waits until it has mounted, or says why it has not.
fn start(
    global: &Global,
    root: &Path,
    wanted: &Wanted,
    name: &str,
    more: &[OsString],
) -> anyhow::Result<Mounted> {
    let log = claim::file(root, name)?;
    let mut command = Command::new(std::env::current_exe().context("find this program")?);
    if let Some(config) = &global.config {
        command.arg("--config").arg(std::path::absolute(config).context("find the configuration")?);
    }
    command.arg("--root").arg(root).args(["--output", "json", "mount", "--foreground", "--serve"]);
    command.arg(name).args(more);
    if let Some(path) = &wanted.path {
        command.arg("--path").arg(path.as_path());
    }
    command.arg("--").arg(wanted.reference.to_string()).arg(&wanted.target);
    let errors = File::options().read(true).append(true).create(true).open(&log);
    let errors = errors.with_context(|| format!("write {}", log.display()))?;
    let mut server = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors.try_clone().context("write the log")?)
        .spawn()
        .context("start the serving process")?;
    // One JSON object, and then the end of the output, or of the process.
    let mut answer = String::new();
    if let Some(output) = server.stdout.take() {
        for line in BufReader::new(output).lines() {
            answer.push_str(&line.context("ask the serving process")?);
            if let Ok(mounted) = serde_json::from_str(&answer) {
                return Ok(mounted);
            }
        }
    }
    let status = server.wait().context("wait for the serving process")?;
    // The server has removed it, unless it got no further than its first steps.
    let _ = fs::remove_file(&log);
    let said = from_the_start(&errors);
    let mut said: Vec<&str> =
        said.lines().map(|line| line.trim_start_matches("carport: ")).collect();
    // What is wrong comes last; what the helper said before it is why.
    said.reverse();
    match said.is_empty() {
        true => bail!("mount on {}: the serving process ended ({status})", wanted.target.display()),
        false => bail!("{}", said.join("; ")),
    }
}

/// The text of a log, which has no name any more. What is not readable is left out.
fn from_the_start(mut log: &File) -> String {
    let mut bytes = Vec::new();
    let _ = log.rewind().and_then(|()| log.take(MAX_SAID_BYTES).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Mounts and serves in this process.
async fn serve(
    output: Output,
    store: Store,
    digest: Digest,
    wanted: Wanted,
    name: String,
) -> anyhow::Result<()> {
    let told = told_to_end()?;
    if let Err(error) = raise_open_files() {
        tracing::warn!(%error, "left the limit of open files as it is");
    }
    let mounted = Mounted::new(&wanted.reference, &digest, wanted.target.clone());
    let (claim, mount) = tokio::task::spawn_blocking(move || {
        // The claim first: from then on the image stays.
        let image = store.image(&digest)?.with_context(|| format!("{digest}: not stored"))?;
        let record = record(&wanted, digest, (image.unpacked_bytes, image.files), &name)?;
        let claim = Claims::of(&store).claim(&name, &record)?;
        let tree = Tree { rootfs: store.rootfs(&digest), path: wanted.path };
        let mount = FuseMount::mount(&tree, &wanted.target)?;
        anyhow::Ok((claim, mount))
    })
    .await
    .context("mount")??;
    mounted.print(output)?;

    tokio::select! {
        () = mount.ended() => {}
        () = told => {
            // New readers find an empty folder; who is in the middle of a file may finish.
            tokio::task::block_in_place(|| mount.unmount())?;
            let _ = tokio::time::timeout(PATIENCE, mount.ended()).await;
        }
    }
    tokio::task::block_in_place(|| {
        drop(mount);
        drop(claim);
    });
    Ok(())
}

fn record(
    wanted: &Wanted,
    digest: Digest,
    (bytes, files): (u64, u64),
    name: &str,
) -> anyhow::Result<VolumeRecord> {
    let target = wanted.target.to_str();
    let target = target.with_context(|| format!("{:?}: not UTF-8", wanted.target))?;
    Ok(VolumeRecord {
        volume_id: VolumeId::parse(name)?,
        target: TargetPath::parse(target)?,
        image: wanted.reference.clone(),
        digest,
        path: wanted.path.clone(),
        filter: None,
        view: None,
        stream: false,
        options: MountOptions::default(),
        bytes,
        files,
        pin_seconds: None,
        pod: None,
        published_at: SystemTime::now(),
    })
}

/// Waits until nobody serves `target` any more; false when somebody still has a file open.
pub(super) fn wait_for_end(config: &Config, target: &Path) -> anyhow::Result<bool> {
    if !config.root.join("format").exists() {
        return Ok(true);
    }
    let claims = Claims::of(&open_store(config)?);
    let deadline = Instant::now() + END;
    loop {
        let living = claims.living()?;
        if !living.iter().any(|claim| claim.target.as_path() == target) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
