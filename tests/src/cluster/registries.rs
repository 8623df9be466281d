//! The registries of a cluster. Containerd and carport find them by the same `hosts.toml` files, under names
//! as users write them.

use std::fs;
use std::path::Path;

use carport_image::source::{PullSecret, RegistryOptions, Sources};

use super::ADDRESS;
use crate::registry::{HTPASSWD, PASSWORD, USERNAME, make_certificate};

/// The registries of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Plain HTTP without a login: `crane registry serve`. deploy/examples uses its name.
    Open,
    /// TLS, and a login: Debian's docker-registry.
    Private,
    /// A proxy of [`Served::Open`] with limited speed, started by the tests that need it.
    Slow,
}

impl Served {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Open, Self::Private, Self::Slow];

    /// Its name in references.
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "registry.example",
            Self::Private => "private.example",
            Self::Slow => "slow.example",
        }
    }

    /// Where it listens.
    pub fn port(self) -> u16 {
        match self {
            Self::Open => 5000,
            Self::Private => 5443,
            Self::Slow => 5001,
        }
    }

    fn hosts_toml(self) -> String {
        let (name, port) = (self.name(), self.port());
        if self == Self::Private {
            return format!("server = \"https://{name}:{port}\"\nca = \"ca.crt\"\n");
        }
        format!("server = \"http://{name}:{port}\"\n")
    }
}

/// Writes `certs.d` and what the private registry is started with.
pub(super) fn write(state: &Path) -> anyhow::Result<()> {
    for served in Served::ALL {
        let folder = state.join("certs.d").join(served.name());
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("hosts.toml"), served.hosts_toml())?;
    }
    fs::create_dir_all(state.join("registry"))?;
    let private = Served::Private;
    let folder = state.join("private");
    fs::create_dir_all(&folder)?;
    let certificate = state.join("certs.d").join(private.name()).join("ca.crt");
    let names = format!("DNS:{},IP:{ADDRESS}", private.name());
    make_certificate(&names, &folder.join("tls.key"), &certificate);
    fs::write(folder.join("htpasswd"), HTPASSWD)?;
    let config = format!(
        "version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {folder}/storage}}}}
http:
  addr: {ADDRESS}:{}
  tls: {{certificate: {}, key: {folder}/tls.key}}
auth: {{htpasswd: {{realm: tests, path: {folder}/htpasswd}}}}
",
        private.port(),
        certificate.display(),
        folder = folder.display()
    );
    fs::write(folder.join("config.yml"), config)?;
    Ok(())
}

/// For packing models into the registries, from inside.
///
/// # Errors
///
/// When there can be no HTTP client.
pub fn sources(state: &Path) -> anyhow::Result<Sources> {
    let options =
        RegistryOptions { hosts_dir: Some(state.join("certs.d")), ..crate::models::options(&[]) };
    Ok(Sources::new(options)?)
}

/// The login of [`Served::Private`].
pub fn login() -> PullSecret {
    crate::models::secret(Served::Private.name(), USERNAME, PASSWORD)
}

/// The same, as the content of a Secret.
pub fn docker_config() -> String {
    crate::models::docker_config(Served::Private.name(), USERNAME, PASSWORD)
}
