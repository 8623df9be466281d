//! Who connects and says nothing, and a process without file descriptors, keep no pod from its volumes.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use carport_image::source::PullSecret;
use carport_tests::carport::binary;
use carport_tests::models::{Model, sources};
use carport_tests::node::{Node, Setup, eventually};
use tokio::net::TcpSocket;

/// More than the soft limit of open files that containerd gives since 2.0.
const IDLE: usize = 1_100;

/// The binary, started with this limit of open files, as `ulimit` takes it.
fn with_open_files(folder: &Path, limit: &str) -> PathBuf {
    let program = folder.join("carport");
    let script = format!("#!/bin/sh\nulimit {limit}\nexec {} \"$@\"\n", binary().display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    program
}

fn open_files(pid: u32) -> u64 {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}

/// A connection from another address than this machine's own.
async fn connect_from(peer: Ipv4Addr, to: SocketAddr) -> std::io::Result<tokio::net::TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((peer, 0).into())?;
    socket.connect(to).await
}

async fn publish_and_unpublish(node: &Node, image: &str) {
    let pod = node.pod("pod-a");
    let work = async {
        node.publish(&pod, image).await.unwrap();
        node.unpublish(&pod).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("volumes are served");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_stop_neither_volumes_nor_probes() {
    let own = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: own.maximum, ..own };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    // A soft limit that may be raised, and one that is all there is.
    for (limit, files) in [("-Sn 1024", None), ("-n 1024", Some(1024))] {
        let folder = tempfile::tempdir().unwrap();
        let image = format!("oci:{}:v1", folder.path().join("layout").display());
        Model::new().pack(&image, &PullSecret::none(), &sources(&[])).await.unwrap();
        let setup = Setup {
            layout_folders: vec![folder.path().to_owned()],
            config: Some("gpu: {enabled: false}\n".into()),
            ..Setup::default()
        };
        let program = with_open_files(folder.path(), limit);
        let Some(node) = Node::set_up(&program, setup) else { return };
        match files {
            Some(files) => assert_eq!(open_files(node.pid()), files),
            None => assert!(open_files(node.pid()) > 4096, "{}", open_files(node.pid())),
        }
        eventually("the registration socket", async || node.registration_socket().exists()).await;
        node.register(None).await;
        let to: SocketAddr = node.http().parse().unwrap();
        let mut idle = Vec::new();
        for n in 0..IDLE {
            // Ten peers.
            let peer = Ipv4Addr::new(127, 0, 1, u8::try_from(n % 10).unwrap());
            idle.push(connect_from(peer, to).await.unwrap());
        }
        publish_and_unpublish(&node, &image).await;
        assert_eq!(node.page("/readyz").await.0, 200, "a probe from the node itself is answered");
        let refused = |reason: &str| {
            format!("carport_connections_refused_total{{listener=\"http\",reason=\"{reason}\"}}")
        };
        let all = node.metric(&refused("limit")).await + node.metric(&refused("peer_limit")).await;
        assert!(all >= 800.0, "{all} of {IDLE} were refused");
        assert_eq!(
            node.log().matches("too many connections").count(),
            1,
            "one line: {}",
            node.log()
        );
        // Those that were let in, and sent nothing, are closed: then there is room for others.
        let start = Instant::now();
        for stream in &mut idle {
            use tokio::io::AsyncReadExt as _;
            let mut byte = [0];
            let ended = tokio::time::timeout(Duration::from_secs(60), stream.read(&mut byte));
            assert!(matches!(ended.await.expect("it is closed"), Ok(0) | Err(_)));
        }
        assert!(start.elapsed() < Duration::from_secs(40), "{:?}", start.elapsed());
        connect_from(Ipv4Addr::new(127, 0, 1, 1), to).await.unwrap();
        assert_eq!(node.page("/healthz").await.0, 200);
    }
}

/// User and system time, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

fn limit_open_files(pid: u32, limit: &str) {
    let set = Command::new("prlimit").args([&format!("--pid={pid}"), limit]).status();
    assert!(set.unwrap().success(), "prlimit {limit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_descriptors_no_accept_loop_spins_and_all_are_served_when_there_are_some() {
    let setup = Setup { config: Some("gpu: {enabled: false}\n".into()), ..Setup::default() };
    let Some(node) = Node::set_up(binary(), setup) else { return };
    if Command::new("prlimit").arg("--version").output().is_err() {
        eprintln!("SKIPPED: prlimit (util-linux) is not installed");
        return;
    }
    eventually("the registration socket", async || node.registration_socket().exists()).await;
    node.register(None).await;
    let files = open_files(node.pid());
    limit_open_files(node.pid(), "--nofile=3:");
    let sockets = [node.csi_socket(), node.socket(), node.registration_socket()];
    let waiting: Vec<UnixStream> =
        sockets.iter().map(|socket| UnixStream::connect(socket).unwrap()).collect();
    let scrape = TcpStream::connect(node.http()).unwrap();
    let says = "cannot accept connections";
    eventually("each loop says it", async || node.log().matches(says).count() == 4).await;
    let before = cpu_seconds(node.pid());
    // Not a wait for something: this is the time that is measured.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let spent = cpu_seconds(node.pid()) - before;
    assert!(spent < 1.0, "{spent} s of CPU in 3 s");
    assert_eq!(node.log().matches(says).count(), 4, "once for each: {}", node.log());
    drop((waiting, scrape));
    limit_open_files(node.pid(), &format!("--nofile={files}:"));
    let about = carport_proto::csi::v1::NodeGetInfoRequest {};
    node.csi().await.node_get_info(about).await.unwrap();
    node.register(None).await;
    eventually("ready", async || node.page("/readyz").await.0 == 200).await;
    for listener in ["csi", "api", "registration", "http"] {
        let metric = format!(
            "carport_connections_refused_total{{listener=\"{listener}\",reason=\"not_accepted\"}}"
        );
        assert!(node.metric(&metric).await >= 2.0, "{listener}");
    }
}

/// An agent in a network namespace of its own.
struct Alone {
    agent: Child,
    folder: tempfile::TempDir,
}

impl Alone {
    /// After a shell script; nothing, and a word about it, where there can be none.
    fn start(script: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        // The loopback interface, up.
        let up = "python3 -c 'import fcntl, socket, struct\n\
                  fcntl.ioctl(socket.socket(), 0x8914, struct.pack(\"16sh22x\", b\"lo\", 0x41))'";
        let agent = Command::new("unshare")
            .args(["--net", "sh", "-euc"])
            .arg(format!("{up}\n{script}\nexec \"$@\""))
            .arg("sh")
            .arg(binary())
            .args(["agent", "--csi", "false", "--gpu", "false", "--http-listen", "[::]:9760"])
            .env("CARPORT_ROOT", folder.path().join("store"))
            .env("CARPORT_SOCKET", folder.path().join("carport.sock"))
            .env("CARPORT_NODE_NAME", "node-1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let mut alone = Self { agent: agent.ok()?, folder };
        let start = Instant::now();
        while !alone.folder.path().join("carport.sock").exists() {
            if alone.agent.try_wait().unwrap().is_some() {
                eprintln!("SKIPPED: no network namespace can be made and set up: run as root");
                return None;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "the agent does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(alone)
    }

    /// Whether the page of health is served at `address`, in that namespace.
    fn serves(&self, address: IpAddr) -> std::io::Result<()> {
        let namespace = fs::File::open(format!("/proc/{}/ns/net", self.agent.id())).unwrap();
        std::thread::scope(|scope| {
            let look = scope.spawn(|| {
                use std::io::{Read as _, Write as _};
                use std::os::fd::AsFd as _;
                let kind = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind)).unwrap();
                let mut stream = TcpStream::connect((address, 9760))?;
                stream
                    .write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
                Ok(())
            });
            look.join().unwrap()
        })
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
    }
}

#[test]
fn the_address_of_the_manifests_is_reached_over_both_families() {
    // Also where the node says that such a socket is for IPv6 alone.
    let bindv6only = "echo 1 >/proc/sys/net/ipv6/bindv6only";
    for script in ["", bindv6only] {
        let Some(alone) = Alone::start(script) else { return };
        alone.serves(Ipv6Addr::LOCALHOST.into()).unwrap();
        alone.serves(Ipv4Addr::LOCALHOST.into()).unwrap();
    }
}

#[test]
fn the_address_of_the_manifests_is_reached_where_ipv6_is_switched_off() {
    let off = "for i in all default lo; do echo 1 >/proc/sys/net/ipv6/conf/$i/disable_ipv6; done";
    let Some(alone) = Alone::start(off) else { return };
    alone.serves(Ipv4Addr::LOCALHOST.into()).unwrap();
    alone.serves(Ipv6Addr::LOCALHOST.into()).unwrap_err();
}
