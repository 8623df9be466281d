//! A repository in a registry, over the OCI distribution protocol.
//!
//! In comes a repository and credentials; out go manifests and ranges of blobs,
//! unverified, as [`Source`] says. One [`RegistryClient`] serves all pulls: its
//! idle connections, tokens and per-registry limits are shared.
//!
//! # What always holds
//!
//! - **Bounded.** A connect and a pause between bytes have time-outs, manifests
//!   and error bodies a largest size, each registry a number of blob transfers at a
//!   time. A blob's body holds its place until it is dropped.
//! - **No copy.** The chunks of a blob are the HTTP library's own.
//! - **TLS**, except to the hosts that the configuration names, in redirects too.
//!   Loopback is no exception: who serves plain HTTP there says so.
//! - **Secrets stay.** Credentials go to the registry and its token server, never along
//!   a redirect to another host; nor do the headers of `hosts.toml`.
//! - **No retries.** [`SourceError`] says what can be tried again; the puller does.
//!
//! HTTP/1.1 throughout: a transfer has a TCP connection to itself, which is what lets several
//! run side by side at full speed. The `client` is what all sources share; answers to
//! refusals are read in `answer`, challenges met in `auth`, credentials found in `credentials`, of
//! programs in `helper`; `hosts` reads what the container runtime knows of mirrors, `mirrors` asks them
//! in turn; `redirect` follows to other hosts, `slow` gives up who hardly sends; `upload` is the writing
//! side.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt;
use reqwest::header::{
    ACCEPT, AUTHORIZATION, CONTENT_ENCODING, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue,
    RANGE,
};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use tokio::sync::Semaphore;

use crate::digest::Digest;
use crate::reference::RegistryReference;
use crate::source::{
    Audience, BlobBody, MAX_MANIFEST_BYTES, ManifestName, RawManifest, Source, SourceError,
};

mod answer;
mod auth;
mod client;
mod credentials;
mod helper;
mod hosts;
mod mirrors;
mod redirect;
mod slow;
mod upload;

pub use client::{RegistryClient, RegistryOptions};
pub use credentials::{Credential, PullSecret};
pub(crate) use upload::{Upload, UploadStream};

use answer::{Asked, authority, broken, refused};
use auth::Session;
use hosts::Endpoint;
pub use mirrors::MirroredSource;

/// What is asked for when a manifest is: everything that may turn out to be a model.
const MANIFEST_TYPES: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";

/// A challenge is met, a shared token turns out to be refused, another is fetched: three.
const MAX_TRIES_TO_AUTHENTICATE: usize = 3;

/// One repository, and what we may do there.
struct Repository {
    client: RegistryClient,
    session: Session,
    limit: Arc<Semaphore>,
    /// As references write them: `docker.io`, `library/busybox`.
    registry: String,
    repository: String,
    /// For a mirror of many registries: whose content is meant.
    namespace: Option<String>,
    /// To send along, from `hosts.toml`.
    headers: HeaderMap,
    /// `https://registry-1.docker.io/v2/library/busybox/`.
    base: Url,
    /// The host of `base`, with its port where that is not the scheme's.
    host: String,
}

impl Repository {
    fn new(
        client: &RegistryClient,
        endpoint: Endpoint,
        reference: &RegistryReference,
        actions: &str,
        secret: &PullSecret,
    ) -> Result<Self, SourceError> {
        let (registry, repository) = (reference.host(), reference.repository());
        let base = endpoint.base.join(&format!("{repository}/")).map_err(|error| {
            SourceError::Invalid(format!("{registry}/{repository}: no valid address: {error}"))
        })?;
        let host = authority(&base);
        // A mirror has credentials of its own, or none.
        let login = if endpoint.is_mirror { host.as_str() } else { registry };
        Ok(Self {
            session: Session::new(login, repository, actions, secret),
            limit: client.limit(&host),
            client: client.clone(),
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            namespace: endpoint.is_mirror.then(|| registry.to_owned()),
            headers: endpoint.headers,
            host,
            base,
        })
    }

    fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    fn asked(&self, object: String) -> Asked {
        Asked {
            object,
            registry: self.registry.clone(),
            host: self.host.clone(),
            origin: self.session.origin(),
        }
    }

    fn asked_manifest(&self, name: &ManifestName) -> Asked {
        self.asked(format!("manifest {}{name}", self.name()))
    }

    fn asked_blob(&self, digest: &Digest) -> Asked {
        self.asked(format!("blob {digest} of {}", self.name()))
    }

    /// `path` below the repository; it is made of checked names, digests and fixed words.
    fn url(&self, path: &str) -> Result<Url, SourceError> {
        let mut url = self.base.join(path).map_err(|error| {
            SourceError::Invalid(format!("{}: no valid address: {error}", self.name()))
        })?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    fn manifest_url(&self, name: &ManifestName) -> Result<Url, SourceError> {
        match name {
            ManifestName::Tag(tag) => self.url(&format!("manifests/{tag}")),
            ManifestName::Digest(digest) => self.url(&format!("manifests/{digest}")),
            ManifestName::Only => Err(SourceError::Invalid(format!(
                "{}: an image in a registry needs a tag or a digest",
                self.name()
            ))),
        }
    }

    /// Sends what `build` makes, again after each challenge that can be met. The answer's
    /// status is for the caller to judge.
    async fn send(
        &self,
        asked: &Asked,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, SourceError> {
        let mut tries = 1;
        loop {
            let authorization = self.session.authorization(&self.client).await?;
            let mut request = build().headers(self.headers.clone());
            if let Some((header, _)) = &authorization {
                request = request.header(AUTHORIZATION, header.clone());
            }
            let response = request.send().await.map_err(|error| broken(asked, error))?;
            // A 401 from behind a redirect is not the registry's.
            if response.status() != StatusCode::UNAUTHORIZED
                || tries == MAX_TRIES_TO_AUTHENTICATE
                || authority(response.url()) != self.host
            {
                return Ok(response);
            }
            tries += 1;
            let sent = authorization.map(|(_, grant)| grant);
            self.session.answer(&self.client, asked, response, sent).await?;
        }
    }

    /// How long a document may take: it comes at once or not at all, while a pod waits for it.
    fn patience(&self) -> Duration {
        let options = self.client.options();
        options.connect_timeout + options.read_timeout
    }

    /// The refusal as an error, with the credentials that were used by now.
    async fn refused(&self, asked: Asked, response: Response) -> SourceError {
        refused(&Asked { origin: self.session.origin(), ..asked }, response).await
    }
}

/// A repository to pull from.
pub struct RegistrySource {
    repository: Arc<Repository>,
}

#[async_trait]
impl Source for RegistrySource {
    fn name(&self) -> String {
        self.repository.name()
    }

    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        let repository = &self.repository;
        let asked = repository.asked_manifest(want);
        let url = repository.manifest_url(want)?;
        let patience = repository.patience();
        let get = || {
            let get = repository.client.pulling().get(url.clone());
            get.header(ACCEPT, MANIFEST_TYPES).timeout(patience)
        };
        let response = repository.get(&asked, get).await?;
        if response.status() != StatusCode::OK {
            return Err(repository.refused(asked, response).await);
        }
        check_encoding(&asked, &response)?;
        let media_type = media_type(response.headers());
        let limit = usize::try_from(MAX_MANIFEST_BYTES).unwrap_or(usize::MAX);
        let bytes = read_bounded(&asked, response, limit).await?;
        Ok(RawManifest { media_type, bytes })
    }

    async fn resolve(&self, want: &ManifestName) -> Result<Digest, SourceError> {
        let repository = &self.repository;
        let asked = repository.asked_manifest(want);
        let url = repository.manifest_url(want)?;
        let patience = repository.patience();
        let head = || {
            let head = repository.client.pulling().request(Method::HEAD, url.clone());
            head.header(ACCEPT, MANIFEST_TYPES).timeout(patience)
        };
        let response = repository.get(&asked, head).await?;
        let digest = response.headers().get("docker-content-digest");
        let digest = digest.and_then(|digest| digest.to_str().ok()?.parse().ok());
        match (response.status(), digest) {
            (StatusCode::OK, Some(digest)) => Ok(digest),
            // Not every registry answers a HEAD in full, or at all.
            (StatusCode::OK | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED, _) => {
                Ok(self.manifest(want).await?.digest())
            }
            _ => Err(repository.refused(asked, response).await),
        }
    }

    fn audience(&self) -> Audience {
        // A header from the node's configuration may be a login, too.
        match self.repository.session.is_anonymous() && self.repository.headers.is_empty() {
            true => Audience::Everybody,
            false => Audience::Caller,
        }
    }

    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError> {
        let repository = &self.repository;
        let asked = repository.asked_blob(digest);
        if range.is_empty() || range.end > size {
            return Err(SourceError::Invalid(format!(
                "{}: no range {}..{} in {size} bytes",
                asked.object, range.start, range.end
            )));
        }
        let permit = repository.limit.clone().acquire_owned().await.map_err(|_| {
            SourceError::Unavailable(format!("{}: the client has stopped", asked.object))
        })?;
        let url = repository.url(&format!("blobs/{digest}"))?;
        let get = || {
            let request = repository.client.pulling().get(url.clone());
            if range == (0..size) {
                request
            } else {
                request.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1))
            }
        };
        let response = repository.get(&asked, get).await?;
        check_encoding(&asked, &response)?;
        let invalid = |why: String| Err(SourceError::Invalid(format!("{}: {why}", asked.object)));
        let offset = match response.status() {
            StatusCode::OK => match response.content_length() {
                Some(length) if length != size => {
                    return invalid(format!(
                        "{} has {length} bytes of it, the manifest says {size}",
                        authority(response.url())
                    ));
                }
                _ => 0,
            },
            StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
                Some((start, total))
                    if start == range.start && total.is_none_or(|total| total == size) =>
                {
                    start
                }
                _ => {
                    return invalid(format!(
                        "{} answered another range than {}-{} of {size} bytes",
                        authority(response.url()),
                        range.start,
                        range.end - 1
                    ));
                }
            },
            _ => return Err(repository.refused(asked, response).await),
        };
        let ranged = response.status() == StatusCode::PARTIAL_CONTENT;
        let patience = repository.client.options().read_timeout;
        let told = asked.clone();
        let stream = response.bytes_stream().map(move |chunk| {
            // The place in the limit is given back when the stream is dropped.
            let _held = &permit;
            chunk.map_err(|error| broken(&asked, error))
        });
        let stream = slow::given_up(stream.boxed(), patience, told);
        Ok(BlobBody { offset, ranged, is_here: false, stream })
    }
}

/// Refuses bytes that were compressed on their way, which no digest is over.
fn check_encoding(asked: &Asked, response: &Response) -> Result<(), SourceError> {
    let encoding = response.headers().get(CONTENT_ENCODING);
    let encoding = encoding.map_or(Ok("identity"), HeaderValue::to_str).unwrap_or("?");
    if !response.status().is_success() || encoding.eq_ignore_ascii_case("identity") {
        return Ok(());
    }
    let host = authority(response.url());
    let encoding: String = encoding.chars().take(20).collect();
    Err(SourceError::Invalid(format!(
        "{}: {host} sends it with Content-Encoding {encoding:?}, though it was asked not to: switch \
         compression off there, or in the proxy before it",
        asked.object
    )))
}

/// The media type without parameters; empty when there is none.
fn media_type(headers: &HeaderMap) -> String {
    let text = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Start and, where it says so, total of `Content-Range: bytes start-end/total`.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes")?.trim().split_once('/')?;
    let start = range.split_once('-')?.0.parse().ok()?;
    let total = match total {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((start, total))
}

/// The whole body, or an error when it is larger than `limit` bytes, whatever
/// its Content-Length says.
async fn read_bounded(
    asked: &Asked,
    mut response: Response,
    limit: usize,
) -> Result<Bytes, SourceError> {
    let too_large = || {
        SourceError::Invalid(format!(
            "{}: larger than {limit} bytes, which is refused",
            asked.object
        ))
    };
    if response.content_length().is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| broken(asked, error))? {
        if body.len() + chunk.len() > limit {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_read_strictly() {
        let read = |text: &str| {
            content_range(&HeaderMap::from_iter([(CONTENT_RANGE, text.parse().unwrap())]))
        };
        assert_eq!(read("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(read("bytes 5-9/*"), Some((5, None)));
        assert_eq!(read("bytes */10"), None);
        assert_eq!(read("items 5-9/10"), None);
        assert_eq!(read("bytes -5/10"), None);
        assert_eq!(content_range(&HeaderMap::new()), None);
    }

    #[test]
    fn a_media_type_has_no_parameters() {
        let read =
            |text: &str| media_type(&HeaderMap::from_iter([(CONTENT_TYPE, text.parse().unwrap())]));
        assert_eq!(read("Application/JSON; charset=utf-8"), "application/json");
        assert_eq!(media_type(&HeaderMap::new()), "");
    }

    #[test]
    fn docker_hub_is_asked_at_its_api() {
        let client = RegistryClient::new(RegistryOptions::default()).unwrap();
        let base = |text: &str| {
            let crate::reference::Reference::Registry(reference) = text.parse().unwrap() else {
                panic!("{text}")
            };
            let endpoint = client.endpoints(&reference).unwrap().remove(0);
            let secret = PullSecret::none();
            Repository::new(&client, endpoint, &reference, "pull", &secret)
                .unwrap()
                .base
                .to_string()
        };
        assert_eq!(base("busybox"), "https://registry-1.docker.io/v2/library/busybox/");
        assert_eq!(base("127.0.0.1:5000/a/b"), "https://127.0.0.1:5000/v2/a/b/");
    }
}
