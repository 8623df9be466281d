//! The command line: what can be said, and how it lays over the configuration file.
//!
//! Values are parsed here with the same functions as the file's, so that a wrong one is a usage
//! error (exit code 2) that names the flag. `--help` is meant to teach: each command says
//! what it does, what its JSON looks like, and shows an example. The flags of `carport agent` and of
//! registries are in `agent`, those of the commands that ask an agent in `remote`.

use std::path::PathBuf;
use std::time::Duration;

use carport_image::Reference;
use carport_image::manifest::Platform;
use carport_image::store::Owner;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::text;
use crate::config::{Config, ConfigError, LogFormat};

mod agent;
mod remote;

pub use agent::{AgentArgs, RegistryArgs};
pub use remote::{LocateArgs, PrefetchArgs, Remote};

/// One copy of each model on the node, mounted into every pod.
///
/// carport brings model images ("modelcars" and other OCI images) to a node once, keeps equal
/// bytes once, and mounts them read-only. `carport agent` is the daemon of a Kubernetes node; the other
/// commands work on the same store with or without it, also for an ordinary user.
#[derive(Debug, Parser)]
#[command(name = "carport", version, max_term_width = 100, after_long_help = EXAMPLES)]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Pack a folder, pull the result, and look at it:
    carport pack ./llama oci:/tmp/llama:v1
    carport pull oci:/tmp/llama:v1
    carport ls
    carport mount oci:/tmp/llama:v1 /mnt/llama

  Run the node's daemon, and ask it:
    carport agent --config /etc/carport/config.yaml
    carport status
    carport locate registry.example/team/llama:v1

References:
  registry.example/team/llama:v1          a registry; also @sha256:… or oci://…
  oci:/path/to/layout:tag                 an OCI layout folder
  oci-archive:/path/to/layout.tar:tag     a tar of one
  docker-archive:/path/to/saved.tar:name  what docker save writes

Exit codes: 0 done, 1 could not (one line on standard error says what and why), 2 wrong usage.
Data goes to standard output, progress and logs to standard error.";

/// What every command takes.
#[derive(Debug, Clone, Default, Args)]
pub struct Global {
    /// Form of what goes to standard output.
    #[arg(
        short,
        long,
        global = true,
        help_heading = "For every command",
        value_name = "FORM",
        default_value = "text"
    )]
    pub output: Output,
    /// The configuration file [default: /etc/carport/config.yaml, where it exists].
    #[arg(
        long,
        global = true,
        help_heading = "For every command",
        env = "CARPORT_CONFIG",
        value_name = "FILE"
    )]
    pub config: Option<PathBuf>,
    /// The store's directory [default: /var/lib/carport; ordinary user: ~/.local/share/carport].
    #[arg(long, global = true, help_heading = "For every command", env = "CARPORT_ROOT", value_name = "DIR", value_parser = text::parse_absolute)]
    pub root: Option<PathBuf>,
    /// The daemon's socket [default: /run/carport/carport.sock; ordinary user: in $XDG_RUNTIME_DIR].
    #[arg(long, global = true, help_heading = "For every command", env = "CARPORT_SOCKET", value_name = "PATH", value_parser = text::parse_socket_path)]
    pub socket: Option<PathBuf>,
    /// What is logged: error, warn, info, debug, trace, or directives [default: agent info, else error].
    #[arg(long, global = true, help_heading = "For every command", env = "CARPORT_LOG_LEVEL", value_name = "LEVEL", value_parser = text::parse_log_level)]
    pub log_level: Option<String>,
    /// How it is logged.
    #[arg(
        long,
        global = true,
        help_heading = "For every command",
        env = "CARPORT_LOG_FORMAT",
        value_name = "FORM"
    )]
    pub log_format: Option<LogFormat>,
}

/// Form of what goes to standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Text,
    /// The same with more columns, where a command has more to tell.
    Wide,
    /// One JSON object or array, with field names that stay.
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the node's daemon until SIGTERM or SIGINT.
    ///
    /// Serves the CSI driver to the kubelet, the gRPC API on a unix socket, and metrics and health
    /// over HTTP. On SIGTERM the sockets go, pulls stop where they can go on later, and mounts stay.
    Agent(AgentArgs),
    /// Bring images into the store.
    ///
    /// Fetches what the store lacks, verifies it, and keeps each file once. Needs no daemon.
    ///
    /// JSON: an array of {reference, digest, packaging, unpacked_bytes, files, fetched_bytes,
    /// written_bytes, already_present, seconds}.
    #[command(after_help = "Example:\n  carport pull registry.example/team/llama:v1")]
    Pull(PullArgs),
    /// Make an image of a folder, one uncompressed layer a file.
    ///
    /// DEST is an OCI layout folder (oci:/path:tag) or a registry (host/repo:tag). The files stand
    /// below /models in the image, where KServe looks for them.
    ///
    /// With --base the model's layers are appended to another image, whose layers are copied as they are (within one
    /// registry without their bytes). KServe's oci:// storage needs that: its sidecar runs sh, ln and sleep from
    /// the image, which busybox has.
    ///
    /// JSON: {destination, digest, layers, bytes}.
    #[command(
        after_help = "Example:\n  carport pack ./llama oci:/tmp/llama:v1\n  carport pack ./llama registry.example/models/llama:v1 --base registry.example/library/busybox:1"
    )]
    Pack(PackArgs),
    /// List the images in the store.
    ///
    /// JSON: an array of {digest, references, packaging, unpacked_bytes, files, layers: [{digest,
    /// size_bytes, diff_id}], pulled_at}.
    Ls,
    /// Mount an image read-only on a folder, pulling it first where it is not stored.
    ///
    /// As root a kernel mount of the stored files, which needs no process to stay. As an ordinary
    /// user it goes through FUSE (package fuse3), for this user's eyes only, and a process in the
    /// background serves it until `carport umount`.
    ///
    /// With --stream the mount stands as soon as the image's file list is known, and reads are served
    /// while the image arrives, what is read first; also for root through FUSE, unless the image is stored
    /// already. Bytes are read before their layer's digest is known: where it turns out wrong, reads are
    /// errors from then on. Layers that are compressed must be complete first.
    ///
    /// JSON: {reference, digest, target, arriving, waited_for}; `waited_for` counts layers that had to
    /// be complete before the mount.
    #[command(
        after_help = "Example:\n  carport mount oci:/tmp/llama:v1 /mnt/llama\n  carport mount --stream registry.example/team/llama:v1 /mnt/llama"
    )]
    Mount(MountArgs),
    /// Serve the volumes that stream, until SIGTERM or SIGINT.
    ///
    /// One process a node, beside the agent: it pulls and shows images that are read while they arrive, so that
    /// readers do not notice when the agent ends. The agent starts it where none runs (`stream.start`); in a
    /// DaemonSet it is a container of its own. Takes the agent's configuration.
    Fuse(FuseArgs),
    /// Take a mount away; the image stays in the store.
    ///
    /// Who has files open may read on, and the folder is free at once.
    ///
    /// JSON: {target, unmounted, still_open}; `still_open` is false for a kernel mount.
    Umount {
        /// Where it is mounted.
        #[arg(value_name = "DIR")]
        target: PathBuf,
    },
    /// Ask the daemon how the node is: store, models, pulls under way, GPUs.
    ///
    /// JSON: {node_name, agent_version, state, epoch, sequence, reasons: [{code, message}], store:
    /// {capacity_bytes, used_bytes, free_bytes, mounted_bytes, reclaimable_bytes,
    /// dedupe_saved_bytes}, runtime: {connected, image_count}, models: [{reference, digest, state,
    /// places: ["store", "runtime"], total_bytes, present_bytes, download_bytes, mount_count, pull:
    /// {done_bytes, total_bytes, bytes_per_second, eta_seconds}, error}], gpus: as `carport gpus`}.
    /// What is not known is null.
    Status(Remote),
    /// Show the GPUs, from the daemon or, where none runs, from NVML.
    ///
    /// `-o wide` has more columns and the parts of split GPUs.
    ///
    /// JSON: {provider: {state, message}, driver_version, nvml_version, cuda_driver_version, gpus:
    /// [{uuid, index, product, memory, mig, health: {state, reasons}, faults, telemetry, processes,
    /// allocatable, allocations: [{pod_namespace, pod_name, container, …}], …}], links: [{uuid_a,
    /// uuid_b, type, link_count, …}], allocation: {source, message}, sampled_at, generation}.
    #[command(after_help = "Example:\n  carport gpus --topo")]
    Gpus {
        /// Show how the GPUs reach each other, as a matrix.
        #[arg(long)]
        topo: bool,
    },
    /// Ask the daemon how far the models are from being here.
    ///
    /// JSON: an array of {node_name, score, state, missing_bytes, eta_seconds, eta_p90_seconds, fits,
    /// fits_without_eviction, free_bytes, models (as in `carport status`), gpu: {free_count,
    /// matching_count, candidate_uuids}, reasons: [{code, message}]}. What is not known is null.
    #[command(
        after_help = "Example:\n  carport locate registry.example/team/llama:v1 --gpus 2 --gpu-memory 80GB"
    )]
    Locate(LocateArgs),
    /// Say what pulls would do: bytes to fetch, what would be evicted, whether it fits.
    ///
    /// Asks the registries, and changes nothing. Layers that are here, and those that several of the
    /// images share, count once. Of a compressed layer the size unpacked is not known before: then
    /// what would be written is a lower bound.
    ///
    /// JSON: {images: [{reference, digest, present, download_bytes, missing_bytes, bytes_per_second}],
    /// download_bytes, missing_bytes, needed_bytes, at_least, fits, eta_seconds, evict: [{digest,
    /// references, freed_bytes, idle_seconds, bytes_per_second, expected_seconds}], room: {limit_bytes,
    /// used_bytes, free_bytes, pulls_bytes, reserved_bytes, mounted_bytes, pinned_bytes, recent_bytes,
    /// evictable_bytes, unused_bytes}}. What is not known is null.
    #[command(
        after_help = "Example:\n  carport plan registry.example/team/llama:v1 registry.example/team/llama-tuned:v1"
    )]
    Plan(PlanArgs),
    /// Show what each image takes on the disk, alone and shared with others.
    ///
    /// UNIQUE is what removing the image frees.
    ///
    /// JSON: {images: [{digest, references, unpacked_bytes, unique_bytes, shared_bytes, last_used_at}],
    /// object_bytes, saved_bytes, unused_bytes}.
    Du,
    /// Keep an image, whatever room is needed.
    ///
    /// It is neither evicted nor removed until each of its owners has taken the pin away or its time
    /// is over. Pinning again changes when that is.
    ///
    /// JSON: {owner, digest, reference, created_at, expires_at}; no end is null.
    #[command(
        after_help = "Example:\n  carport pin registry.example/team/llama:v1 --owner team-a --for 30days"
    )]
    Pin(PinArgs),
    /// Take a pin away.
    ///
    /// JSON: {owner, digest, removed}.
    Unpin(UnpinArgs),
    /// List the pins.
    ///
    /// JSON: an array of what `carport pin` prints.
    Pins,
    /// Ask the daemon to bring models here, and do not wait.
    ///
    /// `carport watch` shows how far they are.
    ///
    /// JSON: an array of models as in `carport status`.
    #[command(
        after_help = "Example:\n  carport prefetch registry.example/team/llama:v1 --priority 5 --pin 24h"
    )]
    Prefetch(PrefetchArgs),
    /// Ask the daemon to stop pulls that nobody needs.
    ///
    /// Stops what `carport prefetch` asked for, and pulls that a deleted pod has left behind. Downloaded bytes
    /// stay in the store, and a later pull resumes from them. A pull that a pod waits for, or that the
    /// pre-pull list names, is refused with the reason; --force stops it, and who needs it starts it again.
    ///
    /// Exits with 1 where a pull was refused.
    ///
    /// JSON: an array of {reference, cancelled, stopped}.
    #[command(after_help = "Example:\n  carport cancel registry.example/team/llama:v1")]
    Cancel(CancelArgs),
    /// Show what the node has, then what changes, until interrupted.
    ///
    /// A watch that breaks goes on where it was.
    ///
    /// JSON: one object a line: {event, sequence, model (as in `carport status`), reference, digest}. The events
    /// are node, model, gone, progress, gpus, synced and heartbeat; what does not belong to one is null.
    #[command(after_help = "Example:\n  carport watch -o json | jq 'select(.event == \"model\")'")]
    Watch {
        /// Only these models: references, or digests (sha256:…) [default: all].
        #[arg(value_name = "REF")]
        references: Vec<String>,
        /// End when all that is there has been shown.
        #[arg(long)]
        once: bool,
        /// Where the agent is.
        #[command(flatten)]
        remote: Remote,
    },
    /// Take images out of the store.
    ///
    /// Their bytes go with `carport gc`. An image that a volume uses or somebody has pinned is refused.
    ///
    /// JSON: an array of {reference, digest, removed}.
    Rm {
        /// References, or digests as `carport ls` shows them.
        #[arg(value_name = "REF", required = true)]
        references: Vec<String>,
    },
    /// Read all that is stored, or some images, and repair what is damaged.
    ///
    /// Compares each file with its BLAKE3, and each image with its records. Only damaged files are
    /// fetched again, from where the image came; a file of a compressed layer costs that layer. The
    /// page cache of running models is left alone. Pods that have a damaged file open keep it until
    /// they open it again. The daemon does the same on a schedule (store.scrub).
    ///
    /// Exits with 1 where damage is left.
    ///
    /// JSON: {objects, bytes, images, fetched_bytes, seconds, sound, damage: [{path, images, why,
    /// outcome, message}]}; `outcome` is found, repaired or lost.
    #[command(after_help = "Example:\n  carport verify --rate 200MB/s")]
    Verify(VerifyArgs),
    /// Delete the bytes that no image uses.
    ///
    /// JSON: {objects, bytes}.
    Gc,
    /// Look for what this node lacks, and say what to do.
    ///
    /// Kernel, clock, store and disk, the kubelet's folders and whether mounts reach the host, sockets and
    /// who serves them, the pre-pull list, credentials, GPUs; and whether each REF can be had from its
    /// registry. Reads the configuration file as the agent does; flags that the agent was given are not
    /// known. Changes nothing.
    ///
    /// Exits with 1 where a check failed.
    ///
    /// JSON: {healthy, checks: [{name, level, message, advice}]}; `level` is ok, warn or fail, and no advice
    /// is null.
    #[command(after_help = "Example:\n  carport doctor registry.example/team/llama:v1")]
    Doctor(DoctorArgs),
}

/// Flags of `carport pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// What to pull.
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<Reference>,
    /// Ask the registry what a tag means now, also where the store knows it.
    #[arg(long)]
    pub always: bool,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Flags of `carport cancel`.
#[derive(Debug, Args)]
pub struct CancelArgs {
    /// The images, as the pods or `carport prefetch` named them; `carport status` shows them.
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<String>,
    /// Stop pulls also where a pod or the pre-pull list needs them.
    #[arg(long)]
    pub force: bool,
    /// Where the agent is.
    #[command(flatten)]
    pub remote: Remote,
}

/// Flags of `carport plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// What would be pulled, together.
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<Reference>,
    /// Ask the registry what a tag means now, also where the store knows it.
    #[arg(long)]
    pub always: bool,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Flags of `carport verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// References or digests of images [default: all that is stored].
    #[arg(value_name = "REF")]
    pub references: Vec<String>,
    /// Read no faster than this [default: as fast as the disk].
    #[arg(long, value_name = "RATE")]
    pub rate: Option<text::Rate>,
    /// Tell of damage only, and change nothing.
    #[arg(long)]
    pub no_repair: bool,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Flags of `carport doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Images to ask their registries for.
    #[arg(value_name = "REF")]
    pub references: Vec<Reference>,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Flags of `carport pin`.
#[derive(Debug, Args)]
pub struct PinArgs {
    /// A reference, or a digest as `carport ls` shows it.
    #[arg(value_name = "REF")]
    pub image: String,
    /// Whose pin it is.
    #[arg(long, value_name = "NAME", default_value = "cli")]
    pub owner: Owner,
    /// How long it lasts [default: until `carport unpin`].
    #[arg(long = "for", value_name = "TIME", value_parser = text::parse_pin_time)]
    pub time: Option<Duration>,
}

/// Flags of `carport unpin`.
#[derive(Debug, Args)]
pub struct UnpinArgs {
    /// A reference, or a digest as `carport ls` shows it.
    #[arg(value_name = "REF")]
    pub image: String,
    /// Whose pin it is.
    #[arg(long, value_name = "NAME", default_value = "cli")]
    pub owner: Owner,
}

/// Flags of `carport pack`.
#[derive(Debug, Args)]
pub struct PackArgs {
    /// The folder.
    #[arg(value_name = "DIR")]
    pub source: PathBuf,
    /// Where the image goes.
    #[arg(value_name = "DEST")]
    pub destination: Reference,
    /// An image to append the model to: its layers stay as they are.
    #[arg(long, value_name = "REF")]
    pub base: Option<Reference>,
    /// What the image is for, and which image of a base for several platforms is taken [default: this machine].
    #[arg(long, value_name = "OS/ARCH")]
    pub platform: Option<Platform>,
    /// The image's title [default: the folder's name].
    #[arg(long, value_name = "TEXT")]
    pub title: Option<String>,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Flags of `carport mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// What to mount.
    #[arg(value_name = "REF")]
    pub reference: Reference,
    /// Where; made when it does not exist.
    #[arg(value_name = "DIR")]
    pub target: PathBuf,
    /// Mount only this folder of the image.
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub path: String,
    /// Mount it before it is complete, and read while it arrives.
    #[arg(long)]
    pub stream: bool,
    /// How long a read waits for bytes that have not come, before it is an error.
    #[arg(long, requires = "stream", value_name = "TIME", default_value = "60s", value_parser = text::parse_duration)]
    pub read_timeout: Duration,
    /// Serve it in this process until unmounted or interrupted; for ordinary users, and with --stream.
    #[arg(long)]
    pub foreground: bool,
    /// Serve under this name, away from the terminal; for this program itself.
    #[arg(long, hide = true, requires = "foreground", value_name = "NAME")]
    pub serve: Option<String>,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Flags of `carport fuse`.
#[derive(Debug, Args)]
pub struct FuseArgs {
    /// End when nothing has streamed for a while.
    #[arg(long)]
    pub until_idle: bool,
    /// Serve nothing; ask the process that does whether it answers, and exit with 1 where it does not.
    #[arg(long, conflicts_with = "until_idle")]
    pub check: bool,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

impl Global {
    /// The configuration: the file, then the environment and flags that all commands share.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], when the file is not to be read or wrong.
    pub fn load(&self) -> Result<Config, ConfigError> {
        let mut config = Config::load(self.config.as_deref())?;
        set(&mut config.root, &self.root);
        set(&mut config.api.socket, &self.socket);
        set(&mut config.log.level, &self.log_level);
        set(&mut config.log.format, &self.log_format);
        Ok(config)
    }
}

fn set<T: Clone>(field: &mut T, given: &Option<T>) {
    if let Some(value) = given {
        field.clone_from(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("carport").chain(arguments.iter().copied()))
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_behind_the_command() {
        for arguments in [["-o", "json", "ls"], ["ls", "-o", "json"]] {
            assert_eq!(parse(&arguments).unwrap().global.output, Output::Json);
        }
    }

    #[test]
    fn a_wrong_value_is_a_usage_error_that_names_the_flag() {
        for (arguments, part) in [
            (vec!["agent", "--node-name", "A b"], "--node-name"),
            (vec!["agent", "--http-listen", "9760"], "127.0.0.1:9760"),
            (vec!["ls", "--root", "here"], "absolute"),
            (vec!["pull"], "REF"),
            (vec!["pull", "Not A Reference"], "Not A Reference"),
            (vec!["locate", "a/b:c", "--gpu-memory", "80GB"], "--gpus"),
            (vec!["pin", "a/b:c", "--owner", "Team A"], "--owner"),
            (vec!["pin", "a/b:c", "--for", "0s"], "from 1s to 10years"),
        ] {
            let error = parse(&arguments).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.yaml");
        std::fs::write(&file, "nodeName: a\nroot: /a\nlog: {level: warn}\n").unwrap();
        let cli = parse(&[
            "agent",
            "--config",
            file.to_str().unwrap(),
            "--root",
            "/b",
            "--csi",
            "false",
            "--plain-http",
            "r:5000,s",
            "--csi-layout-folders",
            "/srv/a,/srv/b",
            "--http-listen",
            "127.0.0.1:1",
        ]);
        let cli = cli.unwrap();
        let mut config = cli.global.load().unwrap();
        let Command::Agent(arguments) = &cli.command else { panic!("agent") };
        arguments.apply(&mut config);
        assert_eq!(config.node_name, "a");
        assert_eq!(config.root.to_str().unwrap(), "/b");
        assert_eq!(config.log.level, "warn");
        assert!(!config.csi.enabled);
        assert_eq!(config.registries.plain_http, ["r:5000", "s"]);
        let folders = ["/srv/a", "/srv/b"].map(PathBuf::from);
        assert_eq!(config.csi.layout_folders, folders);
        assert_eq!(config.http.listen.port(), 1);
    }
}
