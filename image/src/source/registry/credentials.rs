//! Who we are at a registry: user names, passwords and identity tokens.
//!
//! In comes the text of a `.dockerconfigjson` pull secret, or docker's own
//! `config.json`; out goes the one [`Credential`] for a repository. A pull
//! secret goes first. An entry's key may be a host, a host with a path
//! (`quay.io/team`, the longest path wins), a host with `*` in its labels
//! (`*.azurecr.io`), each with or without `https://`: what docker, podman and
//! the kubelet write.
//!
//! What always holds: no secret is in a `Debug` text or an error, and a pull
//! secret never runs a program. Credential helpers come from the node's own
//! `config.json` alone, since they name programs.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Serialize};

use super::helper;
use crate::digest::Digest;
use crate::reference::Reference;
use crate::source::SourceError;

/// Docker's `config.json` is a few kB; a secret in Kubernetes is at most 1 MiB.
const MAX_CONFIG_BYTES: u64 = 1024 * 1024;

/// The user name that says: the password is an identity token.
pub(super) const TOKEN_USER: &str = "<token>";

/// Credentials given by the caller of a pull: the content of a pod's pull secret.
///
/// `Debug` prints no secret.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct PullSecret {
    entries: Arc<[Entry]>,
}

impl PullSecret {
    /// No credentials: what docker's `config.json` says holds.
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads the text of a `.dockerconfigjson`.
    ///
    /// # Errors
    ///
    /// [`SourceError::Invalid`] when it is none; the message repeats nothing of the text.
    pub fn from_docker_config_json(text: &str) -> Result<Self, SourceError> {
        let fail = |why: String| SourceError::Invalid(format!("pull secret: {why}"));
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(fail("larger than 1 MiB".into()));
        }
        let config: DockerConfig = parse(text.as_bytes()).map_err(fail)?;
        let auths = config.auths.ok_or_else(|| {
            fail(r#"has no "auths"; give the content of .dockerconfigjson, as kubectl create secret docker-registry makes it"#.into())
        })?;
        let entries: Vec<Entry> = auths.into_iter().map(Entry::new).collect();
        for entry in &entries {
            entry.credential().map_err(fail)?;
        }
        Ok(Self { entries: entries.into() })
    }

    /// With a login for a registry (`registry.example`, or `*.registry.example`) for which it has none.
    #[must_use]
    pub fn or_login(self, registry: &str, username: String, password: String) -> Self {
        let auth = Auth { username: Some(username), password: Some(password), ..Auth::default() };
        // Of two that fit as well the last one counts.
        let mut entries = vec![Entry { pattern: Pattern::new(registry), auth }];
        entries.extend_from_slice(&self.entries);
        Self { entries: entries.into() }
    }

    /// All of it as text, the credentials included, for another process of this user that pulls in its
    /// stead. Never to be logged or kept.
    pub fn hand_over(&self) -> String {
        // Of strings alone, so it never fails.
        serde_json::to_string(&*self.entries).unwrap_or_default()
    }

    /// What [`PullSecret::hand_over`] wrote.
    ///
    /// # Errors
    ///
    /// [`SourceError::Invalid`] when it is something else; the message repeats nothing of it.
    pub fn taken_over(text: &str) -> Result<Self, SourceError> {
        let entries: Vec<Entry> = parse(text.as_bytes())
            .map_err(|why| SourceError::Invalid(format!("credentials handed over: {why}")))?;
        Ok(Self { entries: entries.into() })
    }

    /// Tells apart who asks for `reference`, without being a credential: of all that the
    /// secret holds, the entry that would be used counts. Without one the node's own
    /// configuration is used, which is the same for everybody.
    pub(crate) fn fingerprint(&self, reference: &Reference) -> Digest {
        let credential = match reference {
            Reference::Registry(place) => best(&self.entries, place.host(), place.repository())
                .and_then(|entry| entry.credential().ok().flatten()),
            Reference::Layout(_) => None,
        };
        credential.unwrap_or(Credential::Anonymous).fingerprint()
    }
}

impl fmt::Debug for PullSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PullSecret({} registries)", self.entries.len())
    }
}

/// What a registry or its token server is told. `Debug` prints no secret.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// Nothing.
    Anonymous,
    /// A user's name and password.
    Password {
        /// Who.
        username: String,
        /// The secret.
        password: String,
    },
    /// What a token server gives tokens for.
    IdentityToken(String),
}

impl Credential {
    /// Tells credentials apart without being one: tokens are cached under it.
    pub(super) fn fingerprint(&self) -> Digest {
        Digest::of(
            match self {
                Self::Anonymous => String::new(),
                // The lengths keep ("a", "bc") and ("ab", "c") apart.
                Self::Password { username, password } => {
                    format!("p{}:{username}{password}", username.len())
                }
                Self::IdentityToken(token) => format!("t{token}"),
            }
            .as_bytes(),
        )
    }
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Password { .. } => "Password(..)",
            Self::IdentityToken(_) => "IdentityToken(..)",
        })
    }
}

/// A credential, and where it stood: for the message when it is refused.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) credential: Credential,
    pub(super) origin: Origin,
}

#[derive(Debug, Clone)]
pub(super) enum Origin {
    Nowhere,
    PullSecret,
    DockerConfig(PathBuf),
}

/// Finds the credential for `host/repository`: pull secret, `config.json`, its helpers.
///
/// `config` is docker's `config.json`, when configured; else the user's.
pub(super) async fn find(
    secret: &PullSecret,
    config: Option<PathBuf>,
    host: &str,
    repository: &str,
) -> Result<Found, SourceError> {
    if let Some(entry) = best(&secret.entries, host, repository)
        && let Some(credential) = entry.credential().map_err(SourceError::Invalid)?
    {
        return Ok(Found { credential, origin: Origin::PullSecret });
    }
    let (asked, wanted) = (host.to_owned(), repository.to_owned());
    let reading = tokio::task::spawn_blocking(move || from_config(config, &asked, &wanted));
    let known = reading
        .await
        .map_err(|_| SourceError::Unavailable(format!("credentials for {host}: interrupted")))??;
    match known {
        Known::Found(found) => Ok(found),
        Known::Helper { config, program, server } => {
            let credential = helper::ask(&config.display().to_string(), &program, &server).await?;
            let origin = match credential {
                Credential::Anonymous => Origin::Nowhere,
                _ => Origin::DockerConfig(config),
            };
            Ok(Found { credential, origin })
        }
    }
}

/// What docker's `config.json` says.
#[derive(Debug)]
enum Known {
    Found(Found),
    /// A program is to be asked.
    Helper {
        config: PathBuf,
        program: String,
        server: String,
    },
}

fn from_config(
    configured: Option<PathBuf>,
    host: &str,
    repository: &str,
) -> Result<Known, SourceError> {
    let nowhere = Found { credential: Credential::Anonymous, origin: Origin::Nowhere };
    let must_exist = configured.is_some();
    let Some(path) = configured.or_else(default_config) else { return Ok(Known::Found(nowhere)) };
    let fail = |why: String| SourceError::Invalid(format!("{}: {why}", path.display()));
    let text = match read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => {
            return Ok(Known::Found(nowhere));
        }
        Err(error) => return Err(fail(error.to_string())),
    };
    let config: DockerConfig = parse(&text).map_err(fail)?;
    let ask = |program: &str, server: &str| Known::Helper {
        config: path.clone(),
        program: program.to_owned(),
        server: server.to_owned(),
    };
    let helper = config
        .cred_helpers
        .iter()
        .find(|(server, program)| !program.is_empty() && Pattern::new(server).host == host);
    if let Some((server, program)) = helper {
        return Ok(ask(program, server));
    }
    let entries: Vec<Entry> =
        config.auths.unwrap_or_default().into_iter().map(Entry::new).collect();
    if let Some(entry) = best(&entries, host, repository)
        && let Some(credential) = entry.credential().map_err(fail)?
    {
        let origin = Origin::DockerConfig(path.clone());
        return Ok(Known::Found(Found { credential, origin }));
    }
    Ok(match config.creds_store.as_deref() {
        // Docker stores Docker Hub under this address, not under its name.
        Some(program) if !program.is_empty() && host == "docker.io" => {
            ask(program, "https://index.docker.io/v1/")
        }
        Some(program) if !program.is_empty() => ask(program, host),
        _ => Known::Found(nowhere),
    })
}

fn default_config() -> Option<PathBuf> {
    let folder = match std::env::var_os("DOCKER_CONFIG") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
    };
    Some(folder.join("config.json"))
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(MAX_CONFIG_BYTES).read_to_end(&mut text)?;
    Ok(text)
}

fn parse<T: for<'de> Deserialize<'de>>(text: &[u8]) -> Result<T, String> {
    // serde_json's own message may quote the value it tripped over.
    serde_json::from_slice(text).map_err(|error| {
        format!("no valid docker config: line {} column {}", error.line(), error.column())
    })
}

#[derive(Deserialize)]
struct DockerConfig {
    auths: Option<BTreeMap<String, Auth>>,
    #[serde(rename = "credsStore")]
    creds_store: Option<String>,
    #[serde(rename = "credHelpers", default)]
    cred_helpers: BTreeMap<String, String>,
}

/// An entry as docker writes it; all of it may be missing where a helper holds the secret.
#[derive(Clone, Default, Serialize, Deserialize, PartialEq, Eq, Hash)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
}

/// One entry of `auths`.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Hash)]
struct Entry {
    pattern: Pattern,
    auth: Auth,
}

impl Entry {
    fn new((key, auth): (String, Auth)) -> Self {
        Self { pattern: Pattern::new(&key), auth }
    }

    /// Nothing when the entry is empty.
    fn credential(&self) -> Result<Option<Credential>, String> {
        let filled = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
        if let Some(token) = filled(&self.auth.identitytoken) {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        let (username, password) = match filled(&self.auth.auth) {
            Some(auth) => decode(&auth).ok_or_else(|| {
                format!("auths entry {:?}: auth is not user:password in base64", self.pattern.host)
            })?,
            None => match (filled(&self.auth.username), filled(&self.auth.password)) {
                (Some(username), Some(password)) => (username, password),
                _ => return Ok(None),
            },
        };
        Ok(Some(if username == TOKEN_USER {
            Credential::IdentityToken(password)
        } else {
            Credential::Password { username, password }
        }))
    }
}

fn decode(auth: &str) -> Option<(String, String)> {
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let bytes = GeneralPurpose::new(&STANDARD, config).decode(auth.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (username, password) = text.split_once(':')?;
    // Docker pads with NUL.
    Some((username.to_owned(), password.trim_end_matches('\0').to_owned()))
}

/// The key of an entry: which repositories it is for.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq, Hash)]
struct Pattern {
    host: String,
    path: String,
}

impl Pattern {
    fn new(key: &str) -> Self {
        let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
        let (host, path) = match bare.unwrap_or(key).split_once('/') {
            Some((host, path)) => (host, path.trim_matches('/')),
            None => (bare.unwrap_or(key), ""),
        };
        let host = host.to_ascii_lowercase();
        Self {
            host: match host.as_str() {
                "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
                _ => host,
            },
            // Old clients stored the API's address.
            path: if matches!(path, "v1" | "v2") { String::new() } else { path.to_owned() },
        }
    }

    fn fits(&self, host: &str, repository: &str) -> bool {
        let (mut labels, mut wanted) = (self.host.split('.'), host.split('.'));
        let host_fits = loop {
            match (labels.next(), wanted.next()) {
                (None, None) => break true,
                (Some(label), Some(wanted)) if label_fits(label, wanted) => {}
                _ => break false,
            }
        };
        let path_fits = match repository.strip_prefix(&self.path) {
            Some(rest) => self.path.is_empty() || rest.is_empty() || rest.starts_with('/'),
            None => false,
        };
        host_fits && path_fits
    }
}

/// `*` stands for any part of one label.
fn label_fits(pattern: &str, label: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == label,
        Some((start, end)) => match label.strip_prefix(start) {
            Some(rest) if end.contains('*') => {
                (0..=rest.len()).any(|at| rest.is_char_boundary(at) && label_fits(end, &rest[at..]))
            }
            Some(rest) => rest.ends_with(end),
            None => false,
        },
    }
}

/// The entry with the longest path that fits; a host in full goes before one with `*`.
fn best<'a>(entries: &'a [Entry], host: &str, repository: &str) -> Option<&'a Entry> {
    entries
        .iter()
        .filter(|entry| entry.pattern.fits(host, repository))
        .max_by_key(|entry| (entry.pattern.path.len(), !entry.pattern.host.contains('*')))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn password(username: &str, password: &str) -> Credential {
        Credential::Password { username: username.into(), password: password.into() }
    }

    fn auth(text: &str) -> String {
        base64::engine::general_purpose::STANDARD.encode(text)
    }

    fn secret(auths: &serde_json::Value) -> PullSecret {
        let text = serde_json::json!({ "auths": auths }).to_string();
        PullSecret::from_docker_config_json(&text).unwrap()
    }

    #[test]
    fn a_login_counts_where_the_secret_has_none() {
        let own = secret(&serde_json::json!({ "a.example": { "auth": auth("ada:own") } }));
        let with = own.or_login("a.example", "pod".into(), "t1".into()).or_login(
            "*.b.example",
            "pod".into(),
            "t2".into(),
        );
        assert_eq!(pick(&with, "a.example", "team/m"), Some(password("ada", "own")));
        assert_eq!(pick(&with, "x.b.example", "team/m"), Some(password("pod", "t2")));
        assert_eq!(pick(&with, "c.example", "team/m"), None);
    }

    #[test]
    fn what_is_handed_over_is_taken_over_whole_and_in_order() {
        let auths = serde_json::json!({"quay.io/team": {"auth": "YTpi"}, "*.example": {"identitytoken": "t"}});
        let given = secret(&auths).or_login("quay.io", "u".into(), "p".into());
        let taken = PullSecret::taken_over(&given.hand_over()).unwrap();
        assert!(taken == given);
        assert!(
            PullSecret::taken_over(&PullSecret::none().hand_over()).unwrap() == PullSecret::none()
        );
        let error = PullSecret::taken_over(r#"{"hunter2""#).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
    }

    fn pick(secret: &PullSecret, host: &str, repository: &str) -> Option<Credential> {
        best(&secret.entries, host, repository).and_then(|entry| entry.credential().unwrap())
    }

    #[test]
    fn the_longest_path_wins_and_a_full_host_beats_a_wildcard() {
        let secret = secret(&serde_json::json!({
            "quay.io": { "auth": auth("all:1") },
            "quay.io/team": { "auth": auth("team:2") },
            "https://index.docker.io/v1/": { "username": "hub", "password": "3" },
            "*.azurecr.io": { "auth": auth("any:4") },
            "mine.azurecr.io": { "auth": auth("mine:5") },
            "ghcr.io": { "identitytoken": "6" },
            "old.example:5000": { "auth": auth("<token>:7") },
        }));
        assert_eq!(pick(&secret, "quay.io", "team/model"), Some(password("team", "2")));
        assert_eq!(pick(&secret, "quay.io", "team"), Some(password("team", "2")));
        assert_eq!(pick(&secret, "quay.io", "teammate/model"), Some(password("all", "1")));
        assert_eq!(pick(&secret, "docker.io", "library/x"), Some(password("hub", "3")));
        assert_eq!(pick(&secret, "x.azurecr.io", "m"), Some(password("any", "4")));
        assert_eq!(pick(&secret, "mine.azurecr.io", "m"), Some(password("mine", "5")));
        assert_eq!(pick(&secret, "a.b.azurecr.io", "m"), None);
        assert_eq!(pick(&secret, "ghcr.io", "m"), Some(Credential::IdentityToken("6".into())));
        let token = Some(Credential::IdentityToken("7".into()));
        assert_eq!(pick(&secret, "old.example:5000", "m"), token);
        assert_eq!(pick(&secret, "old.example", "m"), None);
    }

    #[test]
    fn what_is_no_pull_secret_is_refused_without_repeating_it() {
        let why = |text: &str| PullSecret::from_docker_config_json(text).unwrap_err().to_string();
        assert_eq!(why("hunter2"), "pull secret: no valid docker config: line 1 column 1");
        assert!(why(r#"{"quay.io": {}}"#).contains(r#"has no "auths""#));
        let broken = why(r#"{"auths": {"quay.io": {"auth": "aHVudGVyMg=="}}}"#);
        assert_eq!(
            broken,
            r#"pull secret: auths entry "quay.io": auth is not user:password in base64"#
        );
        let typed = why(r#"{"auths": {"quay.io": "hunter2"}}"#);
        assert!(!typed.contains("hunter2"), "{typed}");
    }

    #[test]
    fn debug_prints_no_secret() {
        let secret = secret(&serde_json::json!({ "quay.io": { "auth": auth("me:hunter2") } }));
        let found = Found {
            credential: pick(&secret, "quay.io", "x").unwrap(),
            origin: Origin::PullSecret,
        };
        let text = format!("{secret:?} {found:?}");
        assert!(!text.contains("hunter2") && !text.contains("me"), "{text}");
    }

    #[tokio::test]
    async fn the_pull_secret_goes_before_config_json_and_its_helpers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let config = serde_json::json!({
            "auths": { "quay.io": { "auth": auth("file:1") }, "ghcr.io": {} },
            "credHelpers": { "helped.example": "carport-test-that-is-not-installed" },
        });
        std::fs::write(&path, config.to_string()).unwrap();
        let ask = async |secret: &PullSecret, host: &str| {
            find(secret, Some(path.clone()), host, "team/model").await
        };
        let none = PullSecret::none();
        let found = ask(&none, "quay.io").await.unwrap();
        assert_eq!(found.credential, password("file", "1"));
        assert!(matches!(found.origin, Origin::DockerConfig(_)));
        let given = secret(&serde_json::json!({ "quay.io": { "auth": auth("given:2") } }));
        assert_eq!(ask(&given, "quay.io").await.unwrap().credential, password("given", "2"));
        assert_eq!(ask(&none, "ghcr.io").await.unwrap().credential, Credential::Anonymous);
        let error = ask(&none, "helped.example").await.unwrap_err().to_string();
        assert!(
            error.ends_with(
                "docker-credential-carport-test-that-is-not-installed cannot be run for \
                 helped.example; run it by hand to see why"
            ),
            "{error}"
        );
        let missing = find(&none, Some(folder.path().join("none.json")), "quay.io", "x").await;
        assert!(matches!(missing, Err(SourceError::Invalid(_))));
    }
}
