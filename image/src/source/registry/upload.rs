//! The writing side of a registry: what `pack` pushes with.
//!
//! A blob goes in one piece: POST for an upload's address, then PUT with the
//! digest, streamed with a known length. Blobs that are there are skipped by
//! the caller, who asks [`Upload::has_blob`] first. Manifests go last.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode, Url};

use super::answer::{Asked, broken, drain};
use super::{Repository, authority};
use crate::digest::Digest;
use crate::source::{ManifestName, SourceError};

/// An upload of which the registry takes nothing for this long is given up. Longer than a
/// download's pause: after the last byte a registry may copy the blob within its storage.
const STALL: Duration = Duration::from_secs(300);

/// Bytes on their way up. An `Err` ends the upload with that text.
pub(crate) type UploadStream = BoxStream<'static, Result<Bytes, std::io::Error>>;

/// A repository to push to.
pub(crate) struct Upload {
    repository: Repository,
}

impl Upload {
    pub(super) fn new(repository: Repository) -> Self {
        Self { repository }
    }

    /// Whether the repository has the blob already.
    pub(crate) async fn has_blob(&self, digest: &Digest) -> Result<bool, SourceError> {
        let asked = self.repository.asked_blob(digest);
        let url = self.repository.url(&format!("blobs/{digest}"))?;
        let head = || self.pulling(Method::HEAD, &url);
        // Who keeps blobs elsewhere may send there for this, too.
        let response = self.repository.get(&asked, head).await?;
        match response.status() {
            StatusCode::OK => Ok(true),
            StatusCode::NOT_FOUND => Ok(false),
            _ => Err(self.repository.refused(asked, response).await),
        }
    }

    /// Has the registry take the blob from another of its repositories. False where it does not, for whatever
    /// reason: the bytes can still be uploaded.
    pub(crate) async fn mount_blob(
        &self,
        digest: &Digest,
        from: &str,
    ) -> Result<bool, SourceError> {
        let asked = self.repository.asked_blob(digest);
        let mut url = self.repository.url("blobs/uploads/")?;
        url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from);
        let post = || self.plain(Method::POST, &url).header(CONTENT_LENGTH, "0");
        let response = self.send(&asked, &AtomicU64::new(0), post).await?;
        let mounted = response.status() == StatusCode::CREATED;
        // It may have begun an upload instead, which ends by itself.
        drain(response).await;
        Ok(mounted)
    }

    /// Uploads the `size` bytes of `open`'s stream, which must be `digest`'s: the registry checks.
    /// `open` may be called more than once, when a token turns out to have expired.
    pub(crate) async fn put_blob(
        &self,
        digest: &Digest,
        size: u64,
        open: impl Fn() -> UploadStream,
    ) -> Result<(), SourceError> {
        let asked = self.repository.asked_blob(digest);
        let start = self.repository.url("blobs/uploads/")?;
        let post = || self.plain(Method::POST, &start).header(CONTENT_LENGTH, "0");
        let response = self.send(&asked, &AtomicU64::new(0), post).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(self.repository.refused(asked, response).await);
        }
        let mut target = response
            .headers()
            .get(LOCATION)
            .and_then(|location| start.join(location.to_str().ok()?).ok())
            .ok_or_else(|| {
                let host = &asked.host;
                SourceError::Invalid(format!("{}: {host} names no place to upload", asked.object))
            })?;
        drain(response).await;
        if target.scheme() != "https" && !self.repository.client.is_plain_http(&target) {
            return Err(SourceError::Invalid(format!(
                "{}: {} is not spoken to over TLS; where that is meant, add it to \
                 registries.plainHttp (--plain-http)",
                asked.object,
                authority(&target)
            )));
        }
        target.query_pairs_mut().append_pair("digest", &digest.to_string());
        let taken = Arc::new(AtomicU64::new(0));
        let put = || {
            let taken = taken.clone();
            let stream = open().inspect(move |_| {
                taken.fetch_add(1, Ordering::Relaxed);
            });
            self.plain(Method::PUT, &target)
                .header(CONTENT_TYPE, "application/octet-stream")
                .header(CONTENT_LENGTH, size)
                .body(Body::wrap_stream(stream))
        };
        let response = if authority(&target) == self.repository.host {
            self.send(&asked, &taken, put).await?
        } else {
            // Another host's address carries its own permission; ours is not shown there.
            watched(&asked, &taken, async {
                put().send().await.map_err(|error| broken(&asked, error))
            })
            .await?
        };
        match response.status() {
            StatusCode::CREATED | StatusCode::NO_CONTENT | StatusCode::OK => {
                drain(response).await;
                Ok(())
            }
            _ => Err(self.repository.refused(asked, response).await),
        }
    }

    /// Puts the manifest under `name`; the digest is the caller's, checked against the
    /// registry's where that names one.
    pub(crate) async fn put_manifest(
        &self,
        name: &ManifestName,
        media_type: &'static str,
        bytes: Bytes,
    ) -> Result<(), SourceError> {
        let asked = self.repository.asked_manifest(name);
        let url = self.repository.manifest_url(name)?;
        let put =
            || self.plain(Method::PUT, &url).header(CONTENT_TYPE, media_type).body(bytes.clone());
        let response = self.send(&asked, &AtomicU64::new(0), put).await?;
        if !response.status().is_success() {
            return Err(self.repository.refused(asked, response).await);
        }
        let ours = Digest::of(&bytes);
        let theirs = response.headers().get("docker-content-digest");
        match theirs.and_then(|value| value.to_str().ok()?.parse::<Digest>().ok()) {
            Some(theirs) if theirs != ours => Err(SourceError::Invalid(format!(
                "{}: {} stored it as {theirs} instead of {ours}",
                asked.object, asked.host
            ))),
            _ => Ok(()),
        }
    }

    fn pulling(&self, method: Method, url: &Url) -> RequestBuilder {
        self.repository.client.pulling().request(method, url.clone())
    }

    fn plain(&self, method: Method, url: &Url) -> RequestBuilder {
        self.repository.client.plain().request(method, url.clone())
    }

    async fn send(
        &self,
        asked: &Asked,
        progress: &AtomicU64,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, SourceError> {
        watched(asked, progress, self.repository.send(asked, build)).await
    }
}

/// Gives `request` up when `progress` has not moved for [`STALL`].
async fn watched(
    asked: &Asked,
    progress: &AtomicU64,
    request: impl Future<Output = Result<Response, SourceError>>,
) -> Result<Response, SourceError> {
    tokio::pin!(request);
    let mut seen = progress.load(Ordering::Relaxed);
    loop {
        if let Ok(answer) = tokio::time::timeout(STALL, &mut request).await {
            return answer;
        }
        let now = progress.load(Ordering::Relaxed);
        if now == seen {
            return Err(SourceError::Unavailable(format!(
                "{}: {} took nothing for {} s",
                asked.object,
                asked.host,
                STALL.as_secs()
            )));
        }
        seen = now;
    }
}
