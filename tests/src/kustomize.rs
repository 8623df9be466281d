//! What `kubectl kustomize` makes of a folder.

use std::path::Path;
use std::process::Command;

use crate::registry::installed;

/// The rendered YAML. Nothing, and a word about it, where kubectl is not installed or too old: that
/// of Debian 12 carries a kustomize from before `labels` and folders as resources.
///
/// # Panics
///
/// When kustomize refuses the folder.
pub fn rendered(folder: &Path) -> Option<String> {
    if !installed("kubectl") {
        return None;
    }
    let version = Command::new("kubectl").args(["version", "--client"]).output();
    let version = version.expect("run kubectl").stdout;
    if !String::from_utf8_lossy(&version).contains("Kustomize Version") {
        eprintln!("SKIPPED: kubectl is older than 1.24");
        return None;
    }
    let output = Command::new("kubectl").arg("kustomize").arg(folder).output();
    let output = output.expect("run kubectl");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).expect("YAML is UTF-8"))
}
