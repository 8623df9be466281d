//! Who serves the sockets that the agent, the kubelet and schedulers meet at.

use std::io::ErrorKind;
use std::path::Path;
use std::time::{Duration, SystemTime};

use carport_proto::carport::v1;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use tokio::net::UnixStream;

use super::super::ask;
use super::{Check, Level};
use crate::config::Config;
use crate::kubelet::{CODES, GRACE};

/// A socket on this machine answers at once, or its owner hangs.
const PATIENCE: Duration = Duration::from_secs(5);

/// What stands at a socket's path.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Absent,
    /// A file that nobody listens at.
    Stale,
    /// Served, by a process of this name where that can be told.
    Served(Option<String>),
    Refused(String),
}

async fn see(path: &Path) -> Seen {
    let connected = match tokio::time::timeout(PATIENCE, UnixStream::connect(path)).await {
        Ok(connected) => connected,
        Err(_) => return Seen::Refused("does not accept connections".into()),
    };
    match connected {
        Ok(stream) => Seen::Served(owner(&stream)),
        Err(error) => match error.kind() {
            ErrorKind::NotFound => Seen::Absent,
            ErrorKind::ConnectionRefused => Seen::Stale,
            _ => Seen::Refused(error.to_string()),
        },
    }
}

/// The name of the process at the other end; none where it is in another PID namespace.
fn owner(stream: &UnixStream) -> Option<String> {
    let pid = stream.peer_cred().ok()?.pid().filter(|pid| *pid > 0)?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    Some(format!("{} (process {pid})", name.trim()))
}

/// Whether an agent answers here, and what is to be said of the sockets.
pub(super) async fn look(config: &Config) -> (bool, Vec<Check>) {
    let path = &config.api.socket;
    let shown = path.display();
    let seen = see(path).await;
    let agent = matches!(seen, Seen::Served(_));
    let mut heard: Option<v1::Kubelet> = None;
    let mut checks = match seen {
        Seen::Served(owner) => {
            let (checks, told) = ask_agent(config, owner).await;
            heard = told;
            checks
        }
        Seen::Absent => vec![Check::warn(
            "agent",
            format!("none runs: {shown} does not exist"),
            "start `carport agent`; in a cluster, look at the DaemonSet's pod of this node",
        )],
        Seen::Stale => vec![Check::warn(
            "agent",
            format!("none runs: {shown} is what an agent that was killed has left"),
            "start `carport agent`, which replaces it",
        )],
        Seen::Refused(why) => {
            let advice = "run this as root, or as a user of the socket's group";
            vec![Check::fail("agent", format!("{shown}: {why}"), advice)]
        }
    };
    if config.csi.enabled {
        let kubelet = &config.csi.kubelet_dir;
        let driver = &config.csi.driver_name;
        let csi = kubelet.join("plugins").join(driver).join("csi.sock");
        let registration = kubelet.join("plugins_registry").join(format!("{driver}-reg.sock"));
        checks.push(judge("csi", &csi, see(&csi).await, agent));
        let served = judge("registration", &registration, see(&registration).await, agent);
        checks.push(registered(served, heard.as_ref()));
    }
    if config.gpu.enabled {
        let socket = config.gpu_options().pod_resources;
        let shown = socket.display();
        checks.push(match see(&socket).await {
            Seen::Served(_) => Check::ok("pod-resources", "the kubelet tells who holds GPUs"),
            seen => Check::warn(
                "pod-resources",
                match seen {
                    Seen::Refused(why) => format!("{shown}: {why}"),
                    _ => format!("{shown}: no kubelet answers there"),
                },
                "on a node of a cluster: mount the kubelet's pod-resources folder, or name the socket \
                 in gpu.podResources; until then a GPU counts as taken only while processes use it",
            ),
        });
    }
    (agent, checks)
}

/// One of the driver's two sockets.
fn judge(name: &'static str, path: &Path, seen: Seen, agent: bool) -> Check {
    let shown = path.display();
    match (seen, agent) {
        (Seen::Served(Some(owner)), _) if !owner.starts_with("carport ") => Check::fail(
            name,
            format!("{shown} is served by {owner}"),
            "a driver's name has one owner on a node: stop that one, or change csi.driverName",
        ),
        (Seen::Served(owner), true) => {
            let owner = owner.unwrap_or_else(|| "a process that cannot be seen from here".into());
            Check::ok(name, format!("{shown} is served by {owner}"))
        }
        (Seen::Served(_), false) => Check::fail(
            name,
            format!("{shown} is served, and no agent answers at api.socket"),
            "an agent with another configuration runs here: end one of the two",
        ),
        (Seen::Absent, false) => Check::ok(name, "not there, as no agent runs"),
        (Seen::Stale, false) => {
            Check::ok(name, format!("{shown} was left behind; the next agent replaces it"))
        }
        (Seen::Absent | Seen::Stale, true) => Check::fail(
            name,
            format!("an agent runs, and does not serve {shown}"),
            "does it run with csi.enabled: false, or another csi.kubeletDir? Its log says; restart it",
        ),
        (Seen::Refused(why), _) => {
            Check::fail(name, format!("{shown}: {why}"), "run this as root, in the agent's pod")
        }
    }
}

/// What the agent has heard from the kubelet: that its socket is served does not mean that it was called.
fn registered(served: Check, kubelet: Option<&v1::Kubelet>) -> Check {
    use v1::KubeletRegistration as State;
    let Some(kubelet) = kubelet.filter(|_| served.level == Level::Ok) else { return served };
    let since = kubelet.since.and_then(|at| SystemTime::try_from(at).ok());
    let since = since.unwrap_or(SystemTime::UNIX_EPOCH);
    let advice = "the kubelet's log (journalctl -u kubelet) says what it tried";
    match kubelet.registration() {
        State::Registered => {
            let when = crate::output::time(since);
            Check::ok(
                served.name,
                format!("{}; the kubelet registered it at {when}", served.message),
            )
        }
        // A kubelet takes a second or two.
        State::NotCalled | State::Asked if since.elapsed().unwrap_or_default() < GRACE => {
            Check::warn(served.name, kubelet.message.clone(), "wait a moment, and run this again")
        }
        _ => Check::fail(served.name, kubelet.message.clone(), advice),
    }
}

async fn ask_agent(config: &Config, owner: Option<String>) -> (Vec<Check>, Option<v1::Kubelet>) {
    let socket = config.api.socket.display();
    let owner = owner.unwrap_or_else(|| "a process that cannot be seen from here".into());
    let answer = async {
        let mut client = LocalityServiceClient::new(ask::connect(config).await?);
        let node = client.get_node(ask::request(v1::GetNodeRequest::default())).await;
        anyhow::Ok(node.map_err(|status| ask::refused(&status))?.into_inner())
    };
    let node = match answer.await {
        Ok(node) => node,
        Err(error) => {
            let message = format!("{socket} is served by {owner}, which does not answer: {error}");
            let check = Check::fail("agent", message, "look at its log, and restart it");
            return (vec![check], None);
        }
    };
    let (theirs, ours) = (&node.agent_version, env!("CARGO_PKG_VERSION"));
    let mut checks = vec![match theirs == ours {
        true => Check::ok("agent", format!("{owner}, version {theirs}, serves {socket}")),
        false => Check::warn(
            "agent",
            format!("{owner} is version {theirs}, this is {ours}"),
            "use one version of both on a node",
        ),
    }];
    // The registration is a check of its own.
    for reason in node.reasons.iter().filter(|reason| reason.code != "KUBELET_NOT_REGISTERED") {
        let message = format!("{}: {}", reason.code, reason.message);
        let check = match CODES.contains(&reason.code.as_str()) {
            true => Check::fail,
            false => Check::warn,
        };
        checks.push(check("agent", message, "docs/troubleshooting.md has the codes"));
    }
    (checks, node.kubelet)
}

/// Without an agent: whether the port that it would want is free.
pub(super) fn http(config: &Config, agent: bool) -> Option<Check> {
    let listen = config.http.listen;
    if agent || listen.port() == 0 {
        return None;
    }
    Some(match crate::listen::bind(listen) {
        Ok(_) => Check::ok("http", format!("{listen} is free for metrics and health")),
        Err(error) => Check::fail(
            "http",
            format!("{listen}: {error}"),
            "stop what listens there, or write another http.listen",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_absent_stale_or_served_by_somebody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        assert_eq!(see(&path).await, Seen::Absent);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let Seen::Served(Some(owner)) = see(&path).await else { panic!("served") };
        assert!(owner.ends_with(&format!("(process {})", std::process::id())), "{owner}");
        drop(listener);
        assert_eq!(see(&path).await, Seen::Stale);
    }

    #[test]
    fn a_socket_that_is_served_is_fine_only_when_the_kubelet_has_registered_the_driver() {
        use v1::KubeletRegistration as State;
        let level = |state: State, age: Duration| {
            let kubelet = v1::Kubelet {
                registration: state.into(),
                since: Some(SystemTime::now().checked_sub(age).unwrap().into()),
                message: "why".into(),
                ..Default::default()
            };
            registered(Check::ok("registration", "served"), Some(&kubelet)).level
        };
        let (early, late) = (Duration::ZERO, GRACE);
        assert_eq!(level(State::Registered, late), Level::Ok);
        assert_eq!(
            (level(State::NotCalled, early), level(State::NotCalled, late)),
            (Level::Warn, Level::Fail)
        );
        assert_eq!(
            (level(State::Asked, early), level(State::Asked, late)),
            (Level::Warn, Level::Fail)
        );
        assert_eq!(level(State::NotUnderstood, early), Level::Fail);
        assert_eq!(level(State::Refused, early), Level::Fail);
        // An older agent does not tell.
        assert_eq!(registered(Check::ok("registration", "served"), None).level, Level::Ok);
    }

    #[test]
    fn the_drivers_sockets_belong_to_the_agent_that_runs() {
        let served = |name: &str| Seen::Served(Some(format!("{name} (process 1)")));
        let level = |seen, agent| judge("csi", Path::new("/s"), seen, agent).level;
        assert_eq!(level(served("carport"), true), Level::Ok);
        assert_eq!(level(Seen::Served(None), true), Level::Ok);
        assert_eq!(level(served("other"), true), Level::Fail);
        assert_eq!(level(served("carport"), false), Level::Fail);
        assert_eq!(level(Seen::Stale, true), Level::Fail);
        assert_eq!(level(Seen::Absent, true), Level::Fail);
        assert_eq!(level(Seen::Stale, false), Level::Ok);
        assert_eq!(level(Seen::Absent, false), Level::Ok);
    }
}
