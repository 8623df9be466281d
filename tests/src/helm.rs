//! What Helm makes of the chart.
//!
//! Helm is the program that `HELM` names (with its first arguments, if any), else `helm`.
//! `make test-deploy` brings Helm's engine along where it is not installed.

use std::process::{Command, Output};

use crate::carport::workspace;
use crate::registry::installed;

/// Helm with these arguments, in the root of the source tree. Nothing, and a word about it, where there is none.
///
/// # Panics
///
/// When it cannot be run.
pub fn helm(arguments: &[&str]) -> Option<Output> {
    let program = std::env::var("HELM").unwrap_or_else(|_| "helm".into());
    let mut words = program.split_whitespace();
    let program = words.next()?;
    if !program.contains('/') && !installed(program) {
        return None;
    }
    let mut command = Command::new(program);
    let output = command.args(words).args(arguments).current_dir(workspace()).output();
    Some(output.expect("run helm"))
}

/// The chart with the values of these files and of this text: YAML, or what Helm says against it.
///
/// # Panics
///
/// When Helm cannot be run.
pub fn rendered(files: &[&str], values: &str) -> Option<Result<String, String>> {
    let file = tempfile::NamedTempFile::new().expect("a file for values");
    std::fs::write(file.path(), values).expect("write values");
    let mut arguments =
        vec!["template", "carport", "deploy/helm/carport", "--namespace", "carport-system"];
    for file in files.iter().copied().chain(file.path().to_str()) {
        arguments.extend(["-f", file]);
    }
    let output = helm(&arguments)?;
    Some(if output.status.success() {
        Ok(String::from_utf8(output.stdout).expect("YAML is UTF-8"))
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    })
}
