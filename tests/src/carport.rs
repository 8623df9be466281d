//! The real `carport`, built as the tests are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The binary for a test; built first, once a test process, so that no test meets an old one.
///
/// # Panics
///
/// When it cannot be built.
pub fn binary() -> &'static Path {
    // <target>/<profile>/deps/<test>-<hash>
    built_in(2)
}

/// The binary beside this program in the target folder; built first.
///
/// # Panics
///
/// When it cannot be built.
pub fn beside_this() -> &'static Path {
    // <target>/<profile>/<program>
    built_in(1)
}

fn built_in(ancestor: usize) -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let this = std::env::current_exe().expect("this program's path");
        let folder = this.ancestors().nth(ancestor).expect("a profile's folder");
        let binary = folder.join(format!("carport{}", std::env::consts::EXE_SUFFIX));
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--package", "carport-agent", "--bin", "carport"]);
        cargo.arg("--target-dir").arg(folder.parent().expect("the target folder"));
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        let built = cargo.current_dir(workspace()).status().expect("run cargo");
        assert!(built.success(), "cargo build of the agent: {built}");
        assert!(binary.is_file(), "{} was not built", binary.display());
        binary
    })
}

/// The root of the source tree.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a crate in a workspace")
}
