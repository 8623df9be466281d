//! Blobs through containerd's API, where its content store is not mounted here.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{ReadContentRequest, ReadContentResponse};
use futures_util::{Stream, TryStreamExt as _};
use tonic::Streaming;

use super::{Failed, Namespace, Runtime, ask, told, within};
use crate::digest::Digest;

/// How long the next bytes may take: a disk that is busy, not one that is gone.
const PATIENCE: Duration = Duration::from_secs(20);

/// A blob that containerd has, to be read through its API.
#[derive(Clone)]
pub(crate) struct ApiBlob {
    runtime: Runtime,
    namespace: Namespace,
    digest: Digest,
    pub(crate) size: u64,
}

impl ApiBlob {
    pub(super) fn new(runtime: &Runtime, namespace: &Namespace, digest: Digest, size: u64) -> Self {
        Self { runtime: runtime.clone(), namespace: namespace.clone(), digest, size }
    }

    /// The bytes of a range, which is not empty, as they come: one message of containerd's at a time,
    /// and never more than the range. What went wrong is told in words.
    pub(crate) fn read(self, range: Range<u64>) -> impl Stream<Item = Result<Bytes, String>> {
        futures_util::stream::try_unfold((None, range), move |(stream, left)| {
            let blob = self.clone();
            async move {
                if left.is_empty() {
                    return Ok(None);
                }
                let mut stream = match stream {
                    Some(stream) => stream,
                    None => blob.open(&left).await?,
                };
                let message = tokio::time::timeout(PATIENCE, stream.message()).await;
                let message =
                    message.map_err(|_| "containerd sends nothing any more".to_owned())?;
                let Some(message) = message.map_err(|status| told(&status))? else {
                    return Err("containerd ended too early".to_owned());
                };
                let mut data = Bytes::from(message.data);
                let most = usize::try_from(left.end - left.start).unwrap_or(usize::MAX);
                data.truncate(most);
                let left = left.start + data.len() as u64..left.end;
                Ok(Some((data, (Some(stream), left))))
            }
        })
    }

    /// All of it. It is to be small: who asks has looked at its size.
    pub(crate) async fn read_all(self) -> Result<Bytes, String> {
        let size = self.size;
        let chunks = self.read(0..size);
        let all: Vec<Bytes> = chunks.try_collect().await?;
        Ok(all.concat().into())
    }

    async fn open(&self, range: &Range<u64>) -> Result<Streaming<ReadContentResponse>, String> {
        let signed = |number: u64| i64::try_from(number).map_err(|error| error.to_string());
        let request = ReadContentRequest {
            digest: self.digest.to_string(),
            offset: signed(range.start)?,
            size: signed(range.end - range.start)?,
        };
        let mut client = ContentClient::new(self.runtime.channel());
        ask(client.read(within(&self.namespace, request))).await.map_err(|failed| match failed {
            Failed::NotFound => "containerd has it no more".to_owned(),
            Failed::Away(why) => why,
        })
    }
}
