//! How registries are spoken to: connections, tokens and limits that all pulls share.
//!
//! In come the options, once, and then references; out go sources of their repositories. A registry that is reached
//! in a way of its own (certificates, plain HTTP) has connections of its own.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{ACCEPT_ENCODING, HeaderMap, HeaderValue};
use reqwest::{Client, Url};
use tokio::sync::Semaphore;

use super::auth::Tokens;
use super::credentials::{self, Credential, PullSecret};
use super::hosts::{self, Endpoint, Transport};
use super::redirect;
use super::{MirroredSource, RegistrySource, Repository, Upload};
use crate::reference::RegistryReference;
use crate::source::SourceError;

/// Names of registries come from pods: beyond so many, those not in use are forgotten.
const MAX_LIMITS: usize = 1024;

/// How registries are spoken to.
#[derive(Debug, Clone)]
pub struct RegistryOptions {
    /// Hosts that are spoken to over HTTP instead of HTTPS: `host:port`, or `host` for all of
    /// its ports.
    pub plain_http: Vec<String>,
    /// Docker's `config.json`; where not given, `$DOCKER_CONFIG/config.json` or
    /// `~/.docker/config.json`, when there is one.
    pub docker_config: Option<PathBuf>,
    /// How long connecting may take, TLS included.
    pub connect_timeout: Duration,
    /// When no byte comes for this long, the transfer is given up.
    pub read_timeout: Duration,
    /// Blob transfers at a time from one registry; at least 1.
    pub connections_per_registry: usize,
    /// containerd's folder of `<registry>/hosts.toml`: mirrors, certificates and plain HTTP of
    /// each registry. A registry without one is asked directly.
    pub hosts_dir: Option<PathBuf>,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            docker_config: None,
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(60),
            connections_per_registry: 16,
            hosts_dir: None,
        }
    }
}

/// The HTTP side of all registry sources. Cheap to clone.
#[derive(Clone)]
pub struct RegistryClient {
    shared: Arc<Shared>,
    http: Arc<Http>,
}

/// What all registries share.
struct Shared {
    options: RegistryOptions,
    tokens: Tokens,
    // Held for a look-up only.
    limits: Mutex<HashMap<String, Arc<Semaphore>>>,
    /// For registries with certificates of their own; most have none.
    special: Mutex<HashMap<Transport, Arc<Http>>>,
}

/// The connections to registries that are reached in one way.
struct Http {
    /// Follows redirects; gives up when no byte comes.
    pulling: Client,
    /// Follows none and has no time-out of its own: for tokens and uploads, whose bodies
    /// must not be sent elsewhere, and which may take long to be answered.
    plain: Client,
    /// Hosts that are spoken to over HTTP.
    plain_http: Vec<String>,
}

impl Http {
    fn new(options: &RegistryOptions, transport: &Transport) -> Result<Self, SourceError> {
        let fail = |error: reqwest::Error| {
            // "builder error" alone tells nobody anything.
            let error = error.without_url();
            let causes = std::iter::successors(std::error::Error::source(&error), |e| e.source());
            let why = causes.last().map(|cause| format!(": {cause}")).unwrap_or_default();
            SourceError::Invalid(format!("HTTP client: {error}{why}"))
        };
        let common = || {
            let builder = Client::builder()
                .user_agent(concat!("carport/", env!("CARGO_PKG_VERSION")))
                .http1_only()
                .tcp_nodelay(true)
                .connect_timeout(options.connect_timeout)
                .pool_max_idle_per_host(options.connections_per_registry)
                // The address that a redirect came from may hold a signature.
                .referer(false)
                // Digests are over the bytes as they are; without this a proxy may compress them.
                .default_headers(HeaderMap::from_iter([(
                    ACCEPT_ENCODING,
                    HeaderValue::from_static("identity"),
                )]));
            transport.apply(builder)
        };
        let mut plain_http = options.plain_http.clone();
        plain_http.extend(transport.plain_http.clone());
        let pulling =
            common()?.redirect(redirect::on_one_host()).read_timeout(options.read_timeout).build();
        let plain = common()?.redirect(reqwest::redirect::Policy::none()).build();
        Ok(Self { pulling: pulling.map_err(fail)?, plain: plain.map_err(fail)?, plain_http })
    }
}

impl RegistryClient {
    pub(in crate::source) fn new(options: RegistryOptions) -> Result<Self, SourceError> {
        let http = Arc::new(Http::new(&options, &Transport::default())?);
        let shared = Shared {
            options,
            tokens: Tokens::default(),
            limits: Mutex::default(),
            special: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared), http })
    }

    /// The same client over another transport.
    fn over(&self, transport: &Transport) -> Result<Self, SourceError> {
        if *transport == Transport::default() {
            return Ok(self.clone());
        }
        let mut special = self.shared.special.lock().unwrap_or_else(PoisonError::into_inner);
        let http = match special.get(transport) {
            Some(http) => Arc::clone(http),
            None => {
                if special.len() >= MAX_LIMITS {
                    special.clear();
                }
                let http = Arc::new(Http::new(&self.shared.options, transport)?);
                special.insert(transport.clone(), Arc::clone(&http));
                http
            }
        };
        Ok(Self { shared: Arc::clone(&self.shared), http })
    }

    /// Who the node is at the repository's registry.
    pub(in crate::source) async fn credential(
        &self,
        reference: &RegistryReference,
    ) -> Result<Credential, SourceError> {
        let config = self.shared.options.docker_config.clone();
        let (host, repository) = (reference.host(), reference.repository());
        let found = credentials::find(&PullSecret::none(), config, host, repository).await?;
        Ok(found.credential)
    }

    /// A source of the repository, with the right to pull.
    pub(in crate::source) fn pull_from(
        &self,
        reference: &RegistryReference,
        secret: &PullSecret,
    ) -> Result<MirroredSource, SourceError> {
        let endpoints = self.endpoints(reference)?;
        let sources = endpoints.into_iter().map(|endpoint| {
            let client = self.over(&endpoint.transport)?;
            let resolves = endpoint.resolves;
            let repository = Repository::new(&client, endpoint, reference, "pull", secret)?;
            Ok((RegistrySource { repository: Arc::new(repository) }, resolves))
        });
        Ok(MirroredSource::new(sources.collect::<Result<_, SourceError>>()?))
    }

    /// Where the reference's registry can be asked, mirrors first.
    pub(super) fn endpoints(
        &self,
        reference: &RegistryReference,
    ) -> Result<Vec<Endpoint>, SourceError> {
        let origin = Endpoint::origin(reference.host(), &self.http.plain_http)?;
        match &self.shared.options.hosts_dir {
            Some(folder) => hosts::read(folder, reference.host(), origin),
            None => Ok(vec![origin]),
        }
    }

    /// The registry itself, without its mirrors, with the right to pull.
    pub(in crate::source) fn origin_of(
        &self,
        reference: &RegistryReference,
        secret: &PullSecret,
    ) -> Result<RegistrySource, SourceError> {
        let repository = self.origin(reference, "pull", secret)?;
        Ok(RegistrySource { repository: Arc::new(repository) })
    }

    /// The repository with the right to push. Mirrors are not pushed to.
    pub(crate) fn push_to(
        &self,
        reference: &RegistryReference,
        secret: &PullSecret,
    ) -> Result<Upload, SourceError> {
        Ok(Upload::new(self.origin(reference, "pull,push", secret)?))
    }

    fn origin(
        &self,
        reference: &RegistryReference,
        actions: &str,
        secret: &PullSecret,
    ) -> Result<Repository, SourceError> {
        // The registry itself is last.
        let endpoint = self.endpoints(reference)?.pop();
        let endpoint = endpoint
            .map_or_else(|| Endpoint::origin(reference.host(), &self.http.plain_http), Ok)?;
        let client = self.over(&endpoint.transport)?;
        Repository::new(&client, endpoint, reference, actions, secret)
    }

    pub(super) fn options(&self) -> &RegistryOptions {
        &self.shared.options
    }

    pub(super) fn pulling(&self) -> &Client {
        &self.http.pulling
    }

    pub(super) fn plain(&self) -> &Client {
        &self.http.plain
    }

    pub(super) fn tokens(&self) -> &Tokens {
        &self.shared.tokens
    }

    pub(super) fn is_plain_http(&self, url: &Url) -> bool {
        is_listed(&self.http.plain_http, url)
    }

    pub(super) fn limit(&self, host: &str) -> Arc<Semaphore> {
        let mut limits = self.shared.limits.lock().unwrap_or_else(PoisonError::into_inner);
        let permits = self.shared.options.connections_per_registry.max(1);
        if limits.len() >= MAX_LIMITS {
            limits.retain(|_, limit| Arc::strong_count(limit) > 1);
        }
        limits.entry(host.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(permits))).clone()
    }
}

pub(super) fn is_listed(plain_http: &[String], url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let port = url.port_or_known_default().unwrap_or_default();
    plain_http.iter().any(|listed| match listed.rsplit_once(':') {
        Some((name, number)) => name.eq_ignore_ascii_case(host) && number.parse() == Ok(port),
        None => listed.eq_ignore_ascii_case(host),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_the_listed_hosts_alone() {
        let listed = ["a.example".to_owned(), "b.example:5000".to_owned()];
        let is = |url: &str| is_listed(&listed, &Url::parse(url).unwrap());
        assert!(
            is("http://a.example/") && is("http://A.example:99/") && is("http://b.example:5000/")
        );
        assert!(!is("http://b.example/") && !is("http://localhost/") && !is("http://127.0.0.1/"));
    }
}
