//! Whether the kubelet can use this node's volumes, and if not, why: for `/readyz`, the node's state, the
//! log and `carport doctor`.
//!
//! ```text
//! driver: calls of the kubelet ─┐
//! sockets that are missing ─────┼─► Kubelet ─► findings ─► /readyz                all of them, at once
//! the kernel's mount calls ─────┤                       └─► NodeState, log        what lasts
//! list of mounts ───────────────┘
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use carport_csi::mount::{KernelMounter, MountError, hidden_by};
use carport_csi::{KubeletStatus, RegistrationState};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::output::time;
use crate::state::Trouble;

/// A running kubelet calls within a second. After this long without a call something is wrong.
pub const GRACE: Duration = Duration::from_secs(45);

/// How often it is looked whether something has come to last.
const LOOK: Duration = Duration::from_secs(5);

/// The codes of all findings.
pub const CODES: [&str; 4] =
    ["CANNOT_MOUNT", "SOCKET_MISSING", "MOUNTS_NOT_SHARED", "KUBELET_NOT_REGISTERED"];

/// Something that keeps pods from getting volumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A fixed code, as of [`Trouble`].
    pub code: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
    /// Not only for the moment.
    pub lasts: bool,
}

/// What the kubelet has done, for an answer.
#[derive(Debug, Clone)]
pub struct KubeletReport {
    /// As the driver saw it.
    pub status: KubeletStatus,
    /// Since when the registration is as it is.
    pub since: SystemTime,
    /// What is wrong with the registration, and what to do.
    pub message: Option<String>,
}

/// What is known of the kubelet. Clones share all state.
#[derive(Debug, Clone)]
pub struct Kubelet {
    places: Arc<Places>,
    status: watch::Receiver<KubeletStatus>,
    missing: watch::Receiver<BTreeMap<PathBuf, String>>,
    cannot_mount: Option<Arc<str>>,
}

/// Where the kubelet is looked for.
#[derive(Debug)]
struct Places {
    pods: PathBuf,
    endpoint: PathBuf,
    registration: PathBuf,
    kubelet: PathBuf,
}

impl Kubelet {
    /// Judges by what the driver hears of the kubelet, which of its sockets are missing, and whether the
    /// kernel mounts.
    pub fn new(
        config: &Config,
        status: watch::Receiver<KubeletStatus>,
        missing: watch::Receiver<BTreeMap<PathBuf, String>>,
        cannot_mount: Option<Arc<str>>,
    ) -> Self {
        let (kubelet, driver) = (config.csi.kubelet_dir.clone(), &config.csi.driver_name);
        let places = Places {
            pods: kubelet.join("pods"),
            endpoint: kubelet.join("plugins").join(driver).join("csi.sock"),
            registration: kubelet.join("plugins_registry").join(format!("{driver}-reg.sock")),
            kubelet,
        };
        Self { places: Arc::new(places), status, missing, cannot_mount }
    }

    /// What the kubelet has done.
    pub fn report(&self) -> KubeletReport {
        let status = self.status.borrow().clone();
        let since = match &status.registration {
            RegistrationState::NotCalled { since } => *since,
            RegistrationState::NotUnderstood { at, .. }
            | RegistrationState::Asked { at }
            | RegistrationState::Registered { at }
            | RegistrationState::Refused { at, .. } => *at,
        };
        let message = self.places.registration_message(&status);
        KubeletReport { status, since, message }
    }

    /// What is wrong now. Reads the list of mounts; asks nobody.
    pub fn findings(&self, now: SystemTime) -> Vec<Finding> {
        let report = self.report();
        let mut findings = Vec::new();
        if let Some(why) = &self.cannot_mount {
            let message = format!("volumes cannot be mounted on this node: {why}");
            findings.push(Finding { code: "CANNOT_MOUNT", message, lasts: true });
        }
        for (path, why) in self.missing.borrow().iter() {
            let message = format!(
                "{} is gone and cannot be created again: {why}; if its folder was removed, restart \
                 the agent's pod, which mounts it anew",
                path.display()
            );
            findings.push(Finding { code: "SOCKET_MISSING", message, lasts: true });
        }
        let hidden = report.status.viewer.map(|viewer| {
            // Of a pod's folder in there, as of each target.
            hidden_by(&KernelMounter, viewer, &self.places.pods.join("_"))
        });
        if let Some(Ok(Some(mount))) = hidden {
            let message = format!(
                "mounts made in {} do not reach the kubelet: {} is not shared; set mountPropagation: \
                 Bidirectional at the agent's volume mount of the folder, or on the host run mount \
                 --make-rshared {1}",
                self.places.pods.display(),
                mount.display(),
            );
            findings.push(Finding { code: "MOUNTS_NOT_SHARED", message, lasts: true });
        }
        if let Some(message) = report.message {
            let waited = now.duration_since(report.status.registration.since()).unwrap_or_default();
            let refused = matches!(report.status.registration, RegistrationState::Refused { .. });
            let lasts = refused || waited >= GRACE;
            findings.push(Finding { code: "KUBELET_NOT_REGISTERED", message, lasts });
        }
        findings
    }

    /// Keeps `troubles` to what lasts, and logs each when it comes and when it is over, until `stop`.
    pub async fn follow(
        mut self,
        troubles: watch::Sender<Arc<Vec<Trouble>>>,
        stop: CancellationToken,
    ) {
        let work = async {
            loop {
                let lasting = self.findings(SystemTime::now()).into_iter().filter(|f| f.lasts);
                let now: Vec<Trouble> = lasting
                    .map(|Finding { code, message, .. }| Trouble { code, message })
                    .collect();
                troubles.send_if_modified(|before| {
                    log_changes(before, &now);
                    let changed = **before != now;
                    *before = Arc::new(now);
                    changed
                });
                tokio::select! {
                    // Without a driver that serves there is nothing more to hear.
                    Ok(()) = self.status.changed() => {}
                    Ok(()) = self.missing.changed() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        };
        stop.run_until_cancelled(work).await;
    }
}

/// One line for each code that has come or gone; not for each change of its words.
fn log_changes(before: &[Trouble], now: &[Trouble]) {
    let has = |troubles: &[Trouble], code| troubles.iter().any(|trouble| trouble.code == code);
    for Trouble { code, message } in now.iter().filter(|trouble| !has(before, trouble.code)) {
        tracing::warn!(code, why = message, "the kubelet cannot use this node's volumes");
    }
    for trouble in before.iter().filter(|trouble| !has(now, trouble.code)) {
        tracing::info!(code = trouble.code, "resolved");
    }
}

impl Places {
    /// What is wrong with the registration, and what to do; nothing where there is nothing.
    fn registration_message(&self, status: &KubeletStatus) -> Option<String> {
        let socket = self.registration.display();
        Some(match &status.registration {
            RegistrationState::Registered { .. } => return None,
            RegistrationState::NotCalled { since } => format!(
                "the kubelet has not called the registration socket {socket} since {}: see whether it \
                 runs, and whether csi.kubeletDir ({}) is its --root-dir and is mounted from the host \
                 at the same path",
                time(*since),
                self.kubelet.display(),
            ),
            RegistrationState::NotUnderstood { since, connections, caller, .. } => format!(
                "somebody connects to the registration socket {socket} and no call is understood: \
                 {connections} since {}, the last from {caller}; see the kubelet's log \
                 (journalctl -u kubelet), and report it with the kubelet's version",
                time(*since),
            ),
            RegistrationState::Asked { at } => format!(
                "the kubelet asked for the CSI driver at {} and has not reported the outcome; {}",
                time(*at),
                match status.node_info {
                    Some(called) => format!(
                        "it called NodeGetInfo at {}: see its log (journalctl -u kubelet)",
                        time(called)
                    ),
                    None => format!(
                        "it has not called NodeGetInfo: it must reach {} under this path",
                        self.endpoint.display()
                    ),
                }
            ),
            RegistrationState::Refused { at, why } => format!(
                "the kubelet did not register the CSI driver at {}: {why}; see its log \
                 (journalctl -u kubelet), and whether the driver's name is taken",
                time(*at),
            ),
        })
    }
}

/// Why this node cannot mount volumes, where the kernel or the container does not allow for it.
pub fn cannot_mount() -> Option<Arc<str>> {
    let error = KernelMounter.rehearse(std::path::Path::new("/")).err()?;
    let uname = rustix::system::uname();
    let why = match &error {
        MountError::Denied { .. } => error.to_string(),
        _ => format!(
            "Linux {}: {error}; carport needs open_tree, mount_setattr and move_mount: use Linux 5.12 or \
             newer, and no seccomp profile that hides these calls",
            uname.release().to_string_lossy()
        ),
    };
    Some(why.into())
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    struct Seen {
        status: watch::Sender<KubeletStatus>,
        missing: watch::Sender<BTreeMap<PathBuf, String>>,
        kubelet: Kubelet,
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn seen(cannot_mount: Option<&str>) -> Seen {
        let registration = RegistrationState::NotCalled { since: at(100) };
        let status = KubeletStatus { registration, node_info: None, last_call: None, viewer: None };
        let (status, heard) = watch::channel(status);
        let (missing, watched) = watch::channel(BTreeMap::new());
        let config = Config::default();
        let kubelet = Kubelet::new(&config, heard, watched, cannot_mount.map(Into::into));
        Seen { status, missing, kubelet }
    }

    impl Seen {
        fn one(&self, now: u64) -> Finding {
            let mut findings = self.kubelet.findings(at(now));
            assert_eq!(findings.len(), 1, "{findings:?}");
            findings.remove(0)
        }

        fn registration(&self, registration: RegistrationState) {
            self.status.send_modify(|status| status.registration = registration);
        }
    }

    #[test]
    fn a_kubelet_that_does_not_call_is_a_trouble_after_the_grace_time() {
        let seen = seen(None);
        let early = seen.one(100 + GRACE.as_secs() - 1);
        assert!(early.message.contains("has not called the registration socket"), "{early:?}");
        assert!(early.message.contains("since 1970-01-01T00:01:40Z"), "{early:?}");
        assert!(!early.lasts);
        assert!(seen.one(100 + GRACE.as_secs()).lasts);
    }

    #[test]
    fn connections_without_a_call_name_who_connects() {
        let seen = seen(None);
        seen.registration(RegistrationState::NotUnderstood {
            since: at(100),
            at: at(190),
            connections: 3,
            caller: "kubelet (process 7)".into(),
        });
        let found = seen.one(195);
        assert!(found.lasts, "{found:?}");
        assert!(found.message.contains("3 since 1970-01-01T00:01:40Z, the last from kubelet"));
    }

    #[test]
    fn a_refusal_lasts_at_once_and_a_registration_ends_it() {
        let seen = seen(None);
        seen.registration(RegistrationState::Refused { at: at(101), why: "taken".into() });
        let found = seen.one(101);
        assert!(found.lasts && found.message.contains("taken"), "{found:?}");
        seen.registration(RegistrationState::Asked { at: at(102) });
        assert!(seen.one(103).message.contains("has not called NodeGetInfo"));
        seen.status.send_modify(|status| status.node_info = Some(at(103)));
        assert!(seen.one(104).message.contains("called NodeGetInfo at 1970-01-01T00:01:43Z"));
        seen.registration(RegistrationState::Registered { at: at(104) });
        assert_eq!(seen.kubelet.findings(at(1000)), []);
    }

    #[test]
    fn a_missing_socket_and_a_kernel_that_is_too_old_are_found_beside_it() {
        let seen = seen(Some("Linux 5.4.0: too old"));
        seen.missing.send_modify(|missing| {
            missing.insert("/k/csi.sock".into(), "find /k: not found".into());
        });
        let findings = seen.kubelet.findings(at(100));
        let codes: Vec<_> = findings.iter().map(|f| (f.code, f.lasts)).collect();
        let expected =
            [("CANNOT_MOUNT", true), ("SOCKET_MISSING", true), ("KUBELET_NOT_REGISTERED", false)];
        assert_eq!(codes, expected);
        assert!(findings[1].message.contains("/k/csi.sock"), "{findings:?}");
    }
}
