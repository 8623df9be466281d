//! What the node's container runtime knows of a registry: containerd's `hosts.toml`.
//!
//! ```text
//! <dir>/<registry>/hosts.toml, <dir>/<host>_<port>_/hosts.toml, <dir>/_default/hosts.toml   first found
//!
//! server = "https://registry.example"              the registry itself, asked last
//! [host."https://mirror.example:5000"]             mirrors, in the order of the file
//!   capabilities = ["pull", "resolve"]
//!   ca = "mirror.crt"        client = [["mirror.cert", "mirror.key"]]
//!   skip_verify = false      override_path = false
//!   [host."https://mirror.example:5000".header]
//!     x-team = "models"
//! ```
//!
//! Read anew for each pull, so that a cluster's Spegel or Dragonfly may be set up at any time. See
//! <https://github.com/containerd/containerd/blob/main/docs/hosts.md>.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, ClientBuilder, Identity, Url};
use serde::Deserialize;

use super::client::is_listed;
use crate::source::SourceError;

/// `hosts.toml` and certificates are a few KiB.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// A place that serves a registry's content.
#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    /// `https://mirror.example:5000/v2/`.
    pub(super) base: Url,
    /// Not the registry itself.
    pub(super) is_mirror: bool,
    /// May say what a tag means.
    pub(super) resolves: bool,
    pub(super) headers: HeaderMap,
    pub(super) transport: Transport,
}

/// How a place is reached, where that is not the usual way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Transport {
    /// Certificate authorities beside the system's, in PEM.
    authorities: Vec<Vec<u8>>,
    /// Our certificate and its key, in PEM.
    identity: Option<Vec<u8>>,
    /// Take any certificate.
    skip_verify: bool,
    /// Hosts that are spoken to over HTTP.
    pub(super) plain_http: Vec<String>,
}

impl Transport {
    pub(super) fn apply(&self, mut builder: ClientBuilder) -> Result<ClientBuilder, SourceError> {
        let fail = |what: &str, error: reqwest::Error| {
            SourceError::Invalid(format!("hosts.toml: {what}: {}", error.without_url()))
        };
        for pem in &self.authorities {
            for authority in
                Certificate::from_pem_bundle(pem).map_err(|error| fail("ca is no PEM", error))?
            {
                builder = builder.add_root_certificate(authority);
            }
        }
        if let Some(pem) = &self.identity {
            let identity = Identity::from_pem(pem);
            builder = builder.identity(identity.map_err(|error| fail("client is no PEM", error))?);
        }
        if self.skip_verify {
            builder = builder.danger_accept_invalid_certs(true);
        }
        Ok(builder)
    }
}

impl Endpoint {
    /// The registry itself, when nothing else is said.
    pub(super) fn origin(registry: &str, plain_http: &[String]) -> Result<Self, SourceError> {
        let host = match registry {
            // Docker Hub's name is a website's; its API lives here.
            "docker.io" => "registry-1.docker.io",
            host => host,
        };
        let address = |scheme: &str| {
            Url::parse(&format!("{scheme}://{host}/v2/")).map_err(|error| {
                SourceError::Invalid(format!("registry {registry}: no valid address: {error}"))
            })
        };
        // Which scheme decides which port is meant by none; so both are asked.
        let base = match address("http")? {
            http if is_listed(plain_http, &http) => http,
            _ => address("https")?,
        };
        Ok(Self {
            base,
            is_mirror: false,
            resolves: true,
            headers: HeaderMap::new(),
            transport: Transport::default(),
        })
    }
}

#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(flatten)]
    origin: Host,
    // In the order of the file.
    #[serde(default)]
    host: toml::Table,
}

#[derive(Deserialize, Default)]
struct Host {
    capabilities: Option<Vec<String>>,
    ca: Option<OneOrMany>,
    client: Option<Pairs>,
    #[serde(default)]
    skip_verify: bool,
    #[serde(default)]
    override_path: bool,
    #[serde(default)]
    header: toml::Table,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

/// One file with certificate and key, several of them, or pairs of files.
#[derive(Deserialize)]
#[serde(untagged)]
enum Pairs {
    One(PathBuf),
    Many(Vec<Pair>),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Pair {
    One(PathBuf),
    Two([PathBuf; 2]),
}

/// The places that serve `registry`, in the order in which they are asked; `origin` is what
/// the registry itself is without a word about it.
///
/// # Errors
///
/// [`SourceError::Invalid`] when there is a file and it cannot be used: a mirror that was left out
/// in silence would be missed by nobody.
pub(super) fn read(
    folder: &Path,
    registry: &str,
    origin: Endpoint,
) -> Result<Vec<Endpoint>, SourceError> {
    let Some((folder, text)) = find(folder, registry)? else { return Ok(vec![origin]) };
    let path = folder.join("hosts.toml");
    let fail = |why: String| SourceError::Invalid(format!("{}: {why}", path.display()));
    let file: File = toml::from_str(&text).map_err(|error| fail(error.message().to_owned()))?;

    let mut endpoints = Vec::new();
    for (name, value) in file.host {
        let host: Host = value.try_into().map_err(|error: toml::de::Error| {
            fail(format!("host {name:?}: {}", error.message()))
        })?;
        if let Some(endpoint) = endpoint(&folder, &name, &host, true)
            .map_err(|why| fail(format!("host {name:?}: {why}")))?
        {
            endpoints.push(endpoint);
        }
    }
    let server = file.server.as_deref();
    let name = server.unwrap_or(origin.base.as_str());
    // The default has its path already.
    let own = Host { override_path: file.origin.override_path || server.is_none(), ..file.origin };
    endpoints.extend(
        endpoint(&folder, name, &own, false).map_err(|why| fail(format!("server: {why}")))?,
    );
    if endpoints.is_empty() {
        return Err(fail("no host has the capability pull".to_owned()));
    }
    Ok(endpoints)
}

/// Nothing for a host that is not to be pulled from.
fn endpoint(
    folder: &Path,
    name: &str,
    host: &Host,
    is_mirror: bool,
) -> Result<Option<Endpoint>, String> {
    // As containerd has it: none at all are all of them.
    let can = |what: &str| {
        let mut told = host.capabilities.iter().flatten().peekable();
        told.peek().is_none() || told.any(|capability| capability.eq_ignore_ascii_case(what))
    };
    if !can("pull") {
        return Ok(None);
    }
    let address = if name.contains("://") { name.to_owned() } else { format!("https://{name}") };
    let mut base = Url::parse(&address).map_err(|error| error.to_string())?;
    if !matches!(base.scheme(), "http" | "https") || base.host_str().is_none() {
        return Err("expected http:// or https:// and a host".to_owned());
    }
    let mut path = base.path().trim_end_matches('/').to_owned();
    if !host.override_path && !path.ends_with("/v2") {
        path.push_str("/v2");
    }
    path.push('/');
    base.set_path(&path);

    let mut transport = Transport { skip_verify: host.skip_verify, ..Transport::default() };
    if base.scheme() == "http" {
        let port = base.port_or_known_default().unwrap_or(80);
        transport.plain_http.push(format!("{}:{port}", base.host_str().unwrap_or_default()));
    }
    let authorities = match &host.ca {
        None => &[][..],
        Some(OneOrMany::One(path)) => std::slice::from_ref(path),
        Some(OneOrMany::Many(paths)) => paths,
    };
    for path in authorities {
        transport.authorities.push(content(folder, path)?);
    }
    let pair = match &host.client {
        None => None,
        Some(Pairs::One(path)) => Some(content(folder, path)?),
        // Only one certificate can be shown; containerd shows the first that fits, too.
        Some(Pairs::Many(pairs)) => match pairs.first() {
            None => None,
            Some(Pair::One(path)) => Some(content(folder, path)?),
            Some(Pair::Two([certificate, key])) => {
                let mut pem = content(folder, certificate)?;
                pem.push(b'\n');
                pem.extend(content(folder, key)?);
                Some(pem)
            }
        },
    };
    transport.identity = pair;
    Ok(Some(Endpoint {
        base,
        is_mirror,
        resolves: can("resolve"),
        headers: headers(&host.header)?,
        transport,
    }))
}

fn headers(table: &toml::Table) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in table {
        let values = match value {
            toml::Value::String(text) => vec![text.as_str()],
            toml::Value::Array(many) => many.iter().filter_map(toml::Value::as_str).collect(),
            _ => Vec::new(),
        };
        let header = HeaderName::try_from(name.as_str()).map_err(|_| format!("header {name:?}"))?;
        for value in values {
            // The value may be a secret: it is not repeated.
            let mut value =
                HeaderValue::from_str(value).map_err(|_| format!("value of header {name:?}"))?;
            value.set_sensitive(true);
            headers.append(header.clone(), value);
        }
    }
    Ok(headers)
}

/// The folder that speaks of `registry`, and its file.
fn find(folder: &Path, registry: &str) -> Result<Option<(PathBuf, String)>, SourceError> {
    let mut names = vec![registry.to_owned(), "_default".to_owned()];
    if let Some((host, port)) = registry.rsplit_once(':') {
        names.insert(0, format!("{host}_{port}_"));
    }
    for name in names {
        let folder = folder.join(name);
        match bounded(&folder.join("hosts.toml")) {
            Ok(bytes) => {
                let text = String::from_utf8(bytes).map_err(|_| {
                    SourceError::Invalid(format!("{}/hosts.toml: not UTF-8", folder.display()))
                })?;
                return Ok(Some((folder, text)));
            }
            Err(e)
                if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
            Err(e) => {
                return Err(SourceError::Invalid(format!(
                    "read {}/hosts.toml: {e}",
                    folder.display()
                )));
            }
        }
    }
    Ok(None)
}

/// A file named in `hosts.toml`, relative to it.
fn content(folder: &Path, path: &Path) -> Result<Vec<u8>, String> {
    let path = folder.join(path);
    bounded(&path).map_err(|error| format!("read {}: {error}", path.display()))
}

fn bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other("larger than 1 MiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(registry: &str, folder: &str, text: &str) -> Result<Vec<Endpoint>, String> {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join(folder)).unwrap();
        fs::write(dir.path().join(folder).join("hosts.toml"), text).unwrap();
        let origin = Endpoint::origin(registry, &[]).unwrap();
        read(dir.path(), registry, origin).map_err(|e| e.to_string())
    }

    fn bases(endpoints: &[Endpoint]) -> Vec<(&str, bool, bool)> {
        endpoints.iter().map(|e| (e.base.as_str(), e.is_mirror, e.resolves)).collect()
    }

    #[test]
    fn mirrors_come_in_the_files_order_and_the_registry_last() {
        let text = r#"
            server = "https://upstream.example"
            [host."http://z-first.example:5000"]
              capabilities = ["pull", "resolve"]
            [host."https://a-second.example/proxy"]
              capabilities = ["Pull"]
            [host."https://push.example"]
              capabilities = ["push"]
            [host."third.example/exact"]
              capabilities = []
              override_path = true
        "#;
        let endpoints = read_text("registry.example", "registry.example", text).unwrap();
        assert_eq!(
            bases(&endpoints),
            [
                ("http://z-first.example:5000/v2/", true, true),
                ("https://a-second.example/proxy/v2/", true, false),
                ("https://third.example/exact/", true, true),
                ("https://upstream.example/v2/", false, true),
            ]
        );
        assert_eq!(endpoints[0].transport.plain_http, ["z-first.example:5000"]);
        assert!(endpoints[1].transport.plain_http.is_empty());
    }

    #[test]
    fn the_folder_of_the_registry_goes_before_the_default() {
        let mirror = "[host.\"https://m.example\"]\n";
        for (registry, folder) in [
            ("r.example:5000", "r.example_5000_"),
            ("r.example:5000", "r.example:5000"),
            ("r.example", "_default"),
        ] {
            let endpoints = read_text(registry, folder, mirror).unwrap();
            let own = format!("https://{registry}/v2/");
            assert_eq!(
                bases(&endpoints),
                [("https://m.example/v2/", true, true), (own.as_str(), false, true)],
                "{folder}"
            );
        }
        let other = read_text("r.example", "elsewhere.example", mirror).unwrap();
        assert_eq!(bases(&other), [("https://r.example/v2/", false, true)]);
        let hub = read_text("docker.io", "docker.io", mirror).unwrap();
        assert_eq!(hub[1].base.as_str(), "https://registry-1.docker.io/v2/");
    }

    #[test]
    fn what_cannot_be_used_is_an_error_that_names_the_file() {
        let why = |text: &str| read_text("r.example", "r.example", text).unwrap_err();
        assert!(why("server = ").contains("r.example/hosts.toml: "), "{}", why("server = "));
        assert!(why("[host.\"ftp://x\"]").contains("host \"ftp://x\": expected http"));
        let missing = why("[host.\"https://x\"]\nca = \"gone.crt\"");
        assert!(missing.contains("gone.crt: No such file"), "{missing}");
        let header = why("[host.\"https://x\".header]\nauthorization = \"se\\u0000cret\"");
        assert!(
            header.contains("value of header \"authorization\"") && !header.contains("cret\""),
            "{header}"
        );
        let none = why("server = \"https://x\"\ncapabilities = [\"push\"]");
        assert!(none.contains("no host has the capability pull"), "{none}");
    }
}
