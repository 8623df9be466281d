//! docker-registry on a port of loopback, for as long as the value lives.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use tempfile::TempDir;

/// Who may log in where a login is asked for.
pub const USERNAME: &str = "carport";
/// The password of [`USERNAME`].
pub const PASSWORD: &str = "s3cret";

/// bcrypt of [`PASSWORD`], with the least work that there is.
pub(crate) const HTPASSWD: &str =
    "carport:$2y$05$abcdefghijklmnopqrstuuLK7U1u6pVRmL7L1BBM2aS35PSZnDXlK\n";

/// A running docker-registry with an empty store; killed and removed when dropped.
pub struct Registry {
    host: String,
    folder: TempDir,
    process: Child,
    // Reads the log to its end, so that the registry never waits for a reader.
    log: Option<JoinHandle<()>>,
}

impl Registry {
    /// Starts one that everybody may pull from and push to. Nothing, and a word about it,
    /// where docker-registry is not installed.
    pub fn start() -> Option<Self> {
        Self::with("")
    }

    /// Starts one that asks for [`USERNAME`] and [`PASSWORD`] (basic authentication).
    pub fn start_with_login() -> Option<Self> {
        Self::with("auth:\n  htpasswd:\n    realm: carport-tests\n    path: FOLDER/htpasswd\n")
    }

    /// Starts one that serves over TLS, with a certificate that it signed itself:
    /// [`Registry::certificate`]. Nothing, and a word about it, where openssl is not installed.
    ///
    /// # Panics
    ///
    /// When no certificate can be made.
    pub fn start_with_tls() -> Option<Self> {
        if !installed("openssl") {
            return None;
        }
        Self::with("  tls:\n    certificate: FOLDER/tls.crt\n    key: FOLDER/tls.key\n")
    }

    /// The certificate of a registry that serves over TLS, in PEM.
    pub fn certificate(&self) -> std::path::PathBuf {
        self.folder.path().join("tls.crt")
    }

    /// Where it listens: `127.0.0.1:<port>`, over plain HTTP where it does not serve over TLS.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its storage, to damage.
    pub fn storage(&self) -> std::path::PathBuf {
        self.folder.path().join("storage")
    }

    fn with(more: &str) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path();
        if more.contains("tls:") {
            make_certificate("IP:127.0.0.1", &path.join("tls.key"), &path.join("tls.crt"));
        }
        let config = format!(
            "version: 0.1\nlog:\n  level: info\n  formatter: text\n  accesslog:\n    disabled: true\n\
             storage:\n  filesystem:\n    rootdirectory: FOLDER/storage\n\
             http:\n  addr: 127.0.0.1:0\n{more}"
        );
        let config = config.replace("FOLDER", &path.display().to_string());
        std::fs::write(path.join("config.yml"), config).expect("a registry's config");
        std::fs::write(path.join("htpasswd"), HTPASSWD).expect("a registry's htpasswd");
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(path.join("config.yml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut process = match process {
            Ok(process) => process,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("SKIPPED: docker-registry is not installed");
                return None;
            }
            Err(error) => panic!("docker-registry: {error}"),
        };
        let mut log = BufReader::new(process.stderr.take().expect("a pipe"));
        let mut seen = String::new();
        // It chooses a free port and says which.
        let host = loop {
            let mut line = String::new();
            let count = log.read_line(&mut line).expect("docker-registry's log");
            seen.push_str(&line);
            assert!(count > 0, "docker-registry ended:\n{seen}");
            if let Some((_, rest)) = line.split_once("listening on ") {
                let end = |c: char| !c.is_ascii_digit() && c != '.' && c != ':';
                break rest.split(end).next().unwrap_or_default().to_owned();
            }
        };
        let log = std::thread::spawn(move || for _ in log.split(b'\n').map_while(Result::ok) {});
        Some(Self { host, folder, process, log: Some(log) })
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(log) = self.log.take() {
            let _ = log.join();
        }
    }
}

/// Writes a key and a self-signed certificate for these names: `DNS:registry.example,IP:127.0.0.1`.
///
/// # Panics
///
/// When openssl cannot make them.
pub fn make_certificate(names: &str, key: &Path, certificate: &Path) {
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"])
        .args(["-nodes", "-days", "30", "-subj", "/CN=carport-tests"])
        .args(["-addext", &format!("subjectAltName={names}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(key)
        .arg("-out")
        .arg(certificate)
        .output()
        .expect("run openssl");
    assert!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
}

/// Whether a program is installed; says so where it is not.
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let there =
        std::env::split_paths(&path).any(|folder| Path::new(&folder).join(program).exists());
    if !there {
        eprintln!("SKIPPED: {program} is not installed");
    }
    there
}
