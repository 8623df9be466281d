//! From inside: the components of a cluster, in the order in which they need each other.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};

use super::kube::Kube;
use super::registries::Served;
use super::{ADDRESS, NODE, bin};

/// How long a component may take to start. It usually takes a few seconds.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A running cluster, seen from inside. Its processes outlive this value; [`super::Machine`] ends them.
pub struct Cluster {
    state: PathBuf,
    /// kubectl.
    pub kube: Kube,
    running: BTreeMap<&'static str, Child>,
}

impl Cluster {
    /// Starts the cluster in this machine, and waits until pods can be created. `say` gets a line for each stage with its duration.
    ///
    /// # Errors
    ///
    /// When a component does not serve in time, or ends.
    pub async fn start(state: &Path, mut say: impl FnMut(&str)) -> anyhow::Result<Self> {
        let kube = Kube::new(&bin(), state);
        let mut cluster = Self { state: state.to_owned(), kube, running: BTreeMap::new() };
        let start = Instant::now();
        for name in ["etcd", "containerd", "kube-apiserver", "registry", "private-registry"] {
            cluster.run(name)?;
        }
        let busybox = state.join("busybox.tar");
        super::images::busybox(&busybox)?;
        cluster
            .wait_for("containerd", &|_| Path::new("/run/containerd/containerd.sock").exists())
            .await?;
        cluster.import(&busybox)?;
        cluster.serves("kube-apiserver", 443).await?;
        let ready = async |kube: &Kube| {
            Ok(kube.run(&["get", "--raw", "/readyz"]).await.map_err(|error| error.to_string()))
        };
        cluster.kube.until("the API server is ready", START_TIMEOUT, ready).await?;
        say(&format!("API server ready after {:.1} s", start.elapsed().as_secs_f64()));
        for name in ["kube-controller-manager", "kube-scheduler", "kubelet"] {
            cluster.run(name)?;
        }
        let node = format!("node/{NODE}");
        let exists = async |kube: &Kube| {
            Ok(kube.exists(&[&node]).await?.then_some(()).ok_or_else(|| "no such node".to_owned()))
        };
        cluster.kube.until("the kubelet registers the node", START_TIMEOUT, exists).await?;
        cluster.kube.wait(&[&node, "--for=condition=Ready"], START_TIMEOUT).await?;
        say(&format!("node Ready after {:.1} s", start.elapsed().as_secs_f64()));
        let account = async |kube: &Kube| {
            Ok(kube
                .exists(&["serviceaccount", "default"])
                .await?
                .then_some(())
                .ok_or_else(|| "none".to_owned()))
        };
        cluster.kube.until("the ServiceAccount default exists", START_TIMEOUT, account).await?;
        cluster.serves("registry", Served::Open.port()).await?;
        cluster.serves("private-registry", Served::Private.port()).await?;
        Ok(cluster)
    }

    /// Its folder.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// A program of the cluster, such as `helm` or `ctr`, to be completed.
    pub fn program(&self, name: &str) -> Command {
        let mut command = Command::new(bin().join(name));
        super::environment(&mut command, &self.state);
        command.stdin(Stdio::null());
        command
    }

    /// Imports an archive into the node's containerd, as `kind load image-archive` does.
    ///
    /// # Errors
    ///
    /// When containerd refuses it.
    pub fn import(&self, archive: &Path) -> anyhow::Result<()> {
        let imported =
            self.program("ctr").args(["images", "import", "--local"]).arg(archive).output()?;
        let error = String::from_utf8_lossy(&imported.stderr);
        ensure!(imported.status.success(), "ctr images import {}: {error}", archive.display());
        Ok(())
    }

    /// Starts a component (again).
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn run(&mut self, name: &'static str) -> anyhow::Result<()> {
        let (program, arguments) = self.command_line(name);
        let path = self.state.join("logs").join(format!("{name}.log"));
        let log = File::options().create(true).append(true).open(&path)?;
        let program =
            if program.contains('/') { PathBuf::from(program) } else { bin().join(program) };
        let mut command = Command::new(&program);
        super::environment(&mut command, &self.state);
        // A fixed home: the caller's settings of docker or kubectl must not matter.
        command.env("HOME", "/root").current_dir("/").args(arguments);
        // In its own process group, so that Ctrl-C stops the tests first; they stop the cluster.
        command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| program.display().to_string())?;
        self.running.insert(name, child);
        Ok(())
    }

    /// Kills a component (SIGKILL) and waits for its end.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn kill(&mut self, name: &str) -> anyhow::Result<()> {
        let mut child =
            self.running.remove(name).with_context(|| format!("{name} does not run"))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// The process of a component that runs.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn pid(&self, name: &str) -> anyhow::Result<u32> {
        Ok(self.running.get(name).with_context(|| format!("{name} does not run"))?.id())
    }

    async fn serves(&mut self, name: &'static str, port: u16) -> anyhow::Result<()> {
        let address = format!("{ADDRESS}:{port}").parse()?;
        self.wait_for(name, &|_| {
            std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_ok()
        })
        .await
    }

    async fn wait_for(
        &mut self,
        name: &'static str,
        serves: &dyn Fn(&Self) -> bool,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while !serves(self) {
            let ended =
                self.running.get_mut(name).and_then(|child| child.try_wait().ok().flatten());
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.state.join("logs").join(format!("{name}.log")));
                let log = log.unwrap_or_default();
                let lines: Vec<_> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(20)..].join("\n");
                bail!("{name} does not serve ({ended:?}):\n{tail}");
            }
            tokio::time::sleep(super::kube::LOOK).await;
        }
        Ok(())
    }

    fn command_line(&self, name: &str) -> (&'static str, Vec<String>) {
        let at = |file: &str| self.state.join(file).display().to_string();
        let (program, arguments) = match name {
            "etcd" => (
                "etcd",
                // The data is lost with the machine anyway.
                "--unsafe-no-fsync --data-dir=/run/etcd --listen-client-urls=http://127.0.0.1:2379 \
                 --advertise-client-urls=http://127.0.0.1:2379 --listen-peer-urls=http://127.0.0.1:2380"
                    .to_owned(),
            ),
            "containerd" => ("containerd", format!("--config {}", at("containerd.toml"))),
            "kube-apiserver" => (
                "kube-apiserver",
                format!(
                    "--etcd-servers=http://127.0.0.1:2379 --secure-port=443 --advertise-address={ADDRESS} \
                     --service-cluster-ip-range=10.96.0.0/24 --cert-dir={} --token-auth-file={} \
                     --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
                     --allow-privileged=true --service-account-issuer=https://kubernetes.default.svc \
                     --service-account-key-file={key} --service-account-signing-key-file={key} \
                     --kubelet-preferred-address-types=InternalIP",
                    at("pki"),
                    at("tokens.csv"),
                    key = at("service-accounts.key")
                ),
            ),
            "kube-controller-manager" => (
                "kube-controller-manager",
                format!(
                    "--kubeconfig={} --leader-elect=false --secure-port=0 \
                     --service-account-private-key-file={} --root-ca-file={}",
                    at("admin.kubeconfig"),
                    at("service-accounts.key"),
                    at("pki/apiserver.crt")
                ),
            ),
            "kube-scheduler" => (
                "kube-scheduler",
                format!("--kubeconfig={} --leader-elect=false --secure-port=0", at("admin.kubeconfig")),
            ),
            "kubelet" => (
                "kubelet",
                format!(
                    "--config={} --kubeconfig={} --hostname-override={NODE} --node-ip={ADDRESS}",
                    at("kubelet.yaml"),
                    at("node.kubeconfig")
                ),
            ),
            "registry" => (
                "crane",
                format!("registry serve --address {ADDRESS}:{} --disk {}", Served::Open.port(), at("registry")),
            ),
            _ => ("/usr/bin/docker-registry", format!("serve {}", at("private/config.yml"))),
        };
        (program, arguments.split_whitespace().map(str::to_owned).collect())
    }
}
