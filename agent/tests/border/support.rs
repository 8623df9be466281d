//! A folder to live in, and the binary started in it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Far more than anything here takes; two cores may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A node's files.
pub(crate) struct Home {
    dir: TempDir,
}

impl Home {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("run/carport.sock")
    }

    /// `carport` with nothing of the caller's environment that it reads.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carport"));
        command.env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("HOME", self.dir.path());
        command.env("CARPORT_ROOT", self.path("store"));
        command.env("CARPORT_SOCKET", self.socket());
        // Also where the machine has a file of its own.
        let config = self.path("config.yaml");
        if !config.exists() {
            std::fs::write(&config, "").unwrap();
        }
        command.env("CARPORT_CONFIG", config);
        command.args(arguments).stdin(Stdio::null());
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// What a command that succeeds prints with `-o json`.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.command(arguments).args(["-o", "json"]).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stderr(&output), "", "{arguments:?}: nothing but data");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The one line of error of a command that fails.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stderr(&output));
        let text = stderr(&output);
        let progress = |line: &&str| line.starts_with("pulling ") || line.starts_with("packing ");
        let lines: Vec<&str> = text.lines().filter(|line| !progress(line)).collect();
        assert!(lines.len() == 1 && lines[0].starts_with("carport: "), "{text}");
        lines[0].into()
    }

    /// A model folder, packed as `oci:<home>/images/<name>:v1`; its reference.
    pub(crate) fn image(&self, name: &str, files: &[(&str, &str)]) -> String {
        let folder = self.path("models").join(name);
        for (file, content) in files {
            let path = folder.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let reference = format!("oci:{}:v1", self.path("images").join(name).display());
        let packed = self.json(&["pack", folder.to_str().unwrap(), &reference]);
        assert_eq!(packed["destination"], reference.as_str());
        reference
    }

    /// The agent, serving.
    pub(crate) fn agent(&self, arguments: &[&str]) -> Agent {
        Agent::start(self.command(&self.agent_arguments(arguments)))
    }

    /// The agent in a mount namespace of its own: none of its mounts outlives it.
    pub(crate) fn agent_alone(&self, arguments: &[&str]) -> Agent {
        let agent = self.command(&self.agent_arguments(arguments));
        let mut command = Command::new("unshare");
        // A machine's mounts are shared, as systemd makes them; none of these is seen outside.
        command.args(["--mount", "sh", "-c", "mount --make-rshared / && exec \"$@\"", "sh"]);
        command.arg(agent.get_program()).args(agent.get_args()).env_clear();
        command.envs(agent.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Agent::start(command)
    }

    fn agent_arguments<'a>(&self, more: &[&'a str]) -> Vec<&'a str> {
        let mut arguments = vec!["agent", "--http-listen", "127.0.0.1:0", "--log-format", "json"];
        arguments.extend(["--node-name", "node-1", "--gpu", "false"]);
        if !more.contains(&"--csi") {
            arguments.extend(["--csi", "false"]);
        }
        arguments.extend(more);
        arguments
    }
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A running agent; killed when dropped.
pub(crate) struct Agent {
    child: Child,
    events: mpsc::Receiver<Value>,
    pub(crate) http: SocketAddr,
    /// Where the API is served over TCP, if it is.
    pub(crate) tcp: Option<String>,
}

impl Agent {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, events) = mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                // Not JSON: the one line of an error.
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let http = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut agent = Self { child, events, http, tcp: None };
        let serving = agent.event("serving");
        agent.http = serving["http"].as_str().unwrap().parse().unwrap();
        agent.tcp = serving["tcp"].as_str().map(str::to_owned);
        agent
    }

    /// Waits for the event with this message.
    pub(crate) fn event(&self, message: &str) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if event["message"] == message => return event,
                Ok(event) => seen.push(event),
                Err(error) => panic!("no event {message:?} ({error}); saw {seen:#?}"),
            }
        }
    }

    /// Status and body of a page.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.http).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (status, answer)
    }

    /// The value of a metric without labels, or with the labels written out.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let (_, page) = self.get("/metrics");
        let line = page.lines().find(|line| line.split(' ').next() == Some(name))?;
        line.rsplit(' ').next()?.parse().ok()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    pub(crate) fn ended(mut self) -> ExitStatus {
        eventually("the agent ends", || self.child.try_wait().unwrap())
    }

    pub(crate) fn terminate(self) {
        self.signal(Signal::TERM);
        assert!(self.ended().success());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks until there is something to see.
pub(crate) fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// As [`eventually`], at what is asked for over a connection.
pub(crate) async fn comes<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The names in a folder, sorted.
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
