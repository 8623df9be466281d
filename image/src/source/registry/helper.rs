//! docker's credential helpers: programs that know a login.
//!
//! `docker-credential-<name> get` reads the server's name and prints `{"Username": …, "Secret": …}`;
//! see <https://github.com/docker/docker-credential-helpers>. A helper is somebody's script: one that
//! hangs is ended with all that it has started, and one that goes on talking is not listened to.
//! What it prints is never repeated, since it may hold secrets.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};

use super::credentials::{Credential, TOKEN_USER};
use crate::source::SourceError;

/// A helper may ask a cloud's API, but not forever.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What a helper that has ended left in the pipe is there at once; what it has started may hold the
/// pipe open.
const AFTERWARDS: Duration = Duration::from_secs(1);

/// Tokens are a few kB.
const MAX_ANSWER_BYTES: u64 = 256 * 1024;

/// Not reaped yet, so that its number is still its own.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // `id` is nothing once it has been reaped: then it has ended well, and what it started stays.
        let group = self.0.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = group {
            // It may have ended at this moment.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

/// Asks a helper who we are at `server`.
///
/// # Errors
///
/// [`SourceError::Unavailable`] when it gives no answer in time, else [`SourceError::Invalid`]; `place`
/// is where the helper is named.
///
/// # Cancel safety
///
/// Dropping the future ends the helper.
pub(super) async fn ask(
    place: &str,
    program: &str,
    server: &str,
) -> Result<Credential, SourceError> {
    let told = |what: &str| {
        format!(
            "{place}: docker-credential-{program} {what} for {server}; run it by hand to see why"
        )
    };
    let command = Command::new(format!("docker-credential-{program}"));
    match tokio::time::timeout(TIMEOUT, run(command, server)).await {
        Ok(outcome) => outcome.map_err(|what| SourceError::Invalid(told(what))),
        Err(_) => Err(SourceError::Unavailable(told(&format!(
            "gave no answer in {} s",
            TIMEOUT.as_secs()
        )))),
    }
}

async fn run(mut command: Command, server: &str) -> Result<Credential, &'static str> {
    let child = command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = Running(child.map_err(|_| "cannot be run")?);
    if let Some(mut stdin) = child.0.stdin.take() {
        // A helper need not read it.
        let _ = stdin.write_all(server.as_bytes()).await;
    }
    let stdout = child.0.stdout.take().ok_or("cannot be run")?;
    let mut answer = Vec::new();
    let mut stdout = stdout.take(MAX_ANSWER_BYTES + 1);
    let ended = tokio::select! {
        read = stdout.read_to_end(&mut answer) => {
            read.map_err(|_| "failed")?;
            None
        }
        ended = child.0.wait() => Some(ended),
    };
    let ended = match ended {
        Some(ended) => {
            let _ = tokio::time::timeout(AFTERWARDS, stdout.read_to_end(&mut answer)).await;
            ended
        }
        None if answer.len() as u64 > MAX_ANSWER_BYTES => return Err("said too much"),
        None => child.0.wait().await,
    };
    if answer.len() as u64 > MAX_ANSWER_BYTES {
        return Err("said too much");
    }
    if !ended.map_err(|_| "failed")?.success() {
        // The helpers' protocol: this text, and a non-zero status.
        return match String::from_utf8_lossy(&answer).contains("credentials not found") {
            true => Ok(Credential::Anonymous),
            false => Err("failed"),
        };
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Answer {
        username: String,
        secret: String,
    }
    let Answer { username, secret } =
        serde_json::from_slice(&answer).map_err(|_| "gave no valid answer")?;
    Ok(match username.as_str() {
        TOKEN_USER => Credential::IdentityToken(secret),
        _ => Credential::Password { username, password: secret },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    async fn said(script: &str) -> Result<Credential, &'static str> {
        tokio::time::timeout(TIMEOUT, run(shell(script), "quay.io")).await.expect("in time")
    }

    #[tokio::test]
    async fn what_a_helper_says_is_bounded_and_judged() {
        let login =
            |name: &str| Credential::Password { username: name.into(), password: "s".into() };
        let answer = r#"{"ServerURL":"","Username":"me","Secret":"s"}"#;
        assert_eq!(said(&format!("read server; echo '{answer}'")).await, Ok(login("me")));
        // It need not read, and what it leaves behind need not end.
        let left = format!("exec <&-; sleep 5 & echo '{answer}'");
        assert_eq!(said(&left).await, Ok(login("me")));
        let token = said(r#"echo '{"Username":"<token>","Secret":"t"}'"#).await;
        assert_eq!(token, Ok(Credential::IdentityToken("t".into())));
        assert_eq!(
            said("echo credentials not found in x; exit 1").await,
            Ok(Credential::Anonymous)
        );
        assert_eq!(said("echo hunter2; exit 1").await, Err("failed"));
        assert_eq!(said("echo hunter2").await, Err("gave no valid answer"));
        assert_eq!(said("yes").await, Err("said too much"));
        let absent = run(Command::new("/nonexistent/carport-helper"), "quay.io").await;
        assert_eq!(absent, Err("cannot be run"));
    }

    #[tokio::test]
    async fn a_helper_that_is_not_waited_for_ends_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let note = folder.path().join("child");
        let script = format!("sleep 600 & echo $! > {0}.new; mv {0}.new {0}; wait", note.display());
        let child = tokio::select! {
            _ = run(shell(&script), "quay.io") => panic!("it ended"),
            child = async {
                loop {
                    if let Ok(text) = std::fs::read_to_string(&note) {
                        break text;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            } => child,
        };
        let stat = format!("/proc/{}/stat", child.trim());
        let runs = || std::fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
        let ended = async {
            while runs() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it was ended");
    }
}
