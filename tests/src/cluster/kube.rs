//! The cluster's API, through kubectl as users have it.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

/// Interval of polling.
pub const LOOK: Duration = Duration::from_millis(150);

/// kubectl with the administrator's rights.
#[derive(Debug, Clone)]
pub struct Kube {
    program: PathBuf,
    config: PathBuf,
}

impl Kube {
    pub(super) fn new(bin: &Path, state: &Path) -> Self {
        Self { program: bin.join("kubectl"), config: state.join("admin.kubeconfig") }
    }

    async fn output(
        &self,
        arguments: &[&str],
        input: &str,
        limit: Duration,
    ) -> anyhow::Result<Output> {
        let mut child = Command::new(&self.program)
            .env("KUBECONFIG", &self.config)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| self.program.display().to_string())?;
        let mut stdin = child.stdin.take().context("a pipe")?;
        let work = async {
            // A kubectl that exits early does not read its input; its error output says why.
            let _ = stdin.write_all(input.as_bytes()).await;
            drop(stdin);
            child.wait_with_output().await
        };
        let done = tokio::time::timeout(limit, work).await;
        Ok(done.with_context(|| {
            format!("kubectl {}: no end within {limit:?}", arguments.join(" "))
        })??)
    }

    /// What kubectl prints.
    ///
    /// # Errors
    ///
    /// When kubectl fails, with its message, or after a minute.
    pub async fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.run_within(arguments, "", Duration::from_secs(60)).await
    }

    /// As [`Kube::run`], with this input and time limit.
    ///
    /// # Errors
    ///
    /// As [`Kube::run`].
    pub async fn run_within(
        &self,
        arguments: &[&str],
        input: &str,
        limit: Duration,
    ) -> anyhow::Result<String> {
        let output = self.output(arguments, input, limit).await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "kubectl {}: {}", arguments.join(" "), error.trim());
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Applies these objects, as YAML.
    ///
    /// # Errors
    ///
    /// As [`Kube::run`].
    pub async fn apply(&self, objects: &str) -> anyhow::Result<()> {
        self.run_within(&["apply", "-f", "-"], objects, Duration::from_secs(60)).await.map(drop)
    }

    /// `kubectl get … -o json`.
    ///
    /// # Errors
    ///
    /// As [`Kube::run`].
    pub async fn get(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let text = self.run(&[&["get", "-o", "json"], arguments].concat()).await?;
        Ok(serde_json::from_str(&text)?)
    }

    /// Whether there is such an object.
    ///
    /// # Errors
    ///
    /// As [`Kube::run`].
    pub async fn exists(&self, arguments: &[&str]) -> anyhow::Result<bool> {
        let text =
            self.run(&[&["get", "--ignore-not-found", "-o", "name"], arguments].concat()).await?;
        Ok(!text.trim().is_empty())
    }

    /// Runs `kubectl wait` with this timeout.
    ///
    /// # Errors
    ///
    /// When the condition is not met in time.
    pub async fn wait(&self, arguments: &[&str], limit: Duration) -> anyhow::Result<()> {
        let timeout = format!("--timeout={}s", limit.as_secs());
        let arguments = [&["wait", &timeout], arguments].concat();
        self.run_within(&arguments, "", limit + Duration::from_secs(10)).await.map(drop)
    }

    /// Polls until `found` returns `Ok(Ok(_))`, at most for `limit`.
    ///
    /// # Errors
    ///
    /// After `limit`, with what was seen last; or when `found` fails.
    pub async fn until<T>(
        &self,
        what: &str,
        limit: Duration,
        mut found: impl AsyncFnMut(&Self) -> anyhow::Result<Result<T, String>>,
    ) -> anyhow::Result<T> {
        let start = Instant::now();
        loop {
            match found(self).await? {
                Ok(value) => return Ok(value),
                Err(seen) if start.elapsed() > limit => {
                    bail!("{what}: not within {limit:?}; last seen: {seen}")
                }
                Err(_) => tokio::time::sleep(LOOK).await,
            }
        }
    }

    /// The messages of the events about a pod, oldest first.
    ///
    /// # Errors
    ///
    /// As [`Kube::run`].
    pub async fn events(&self, namespace: &str, pod: &str) -> anyhow::Result<Vec<String>> {
        let selector = format!("involvedObject.name={pod}");
        let events = self.get(&["events", "-n", namespace, "--field-selector", &selector]).await?;
        let events = events["items"].as_array().into_iter().flatten();
        Ok(events.filter_map(|event| event["message"].as_str()).map(str::to_owned).collect())
    }

    /// What a container has logged.
    ///
    /// # Errors
    ///
    /// As [`Kube::run`].
    pub async fn logs(&self, namespace: &str, pod: &str) -> anyhow::Result<String> {
        self.run(&["logs", "-n", namespace, pod, "--tail=-1"]).await
    }
}
