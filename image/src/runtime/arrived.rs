//! How far a pull of containerd's own is.

use std::collections::HashMap;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{InfoRequest, ListStatusesRequest};

use super::pin::{RuntimeError, cri_namespace};
use super::{Failed, Runtime, ask, within};
use crate::digest::Digest;
use crate::manifest::Blob;

impl Runtime {
    /// How many bytes of `blobs` are in CRI's namespace: of those that are complete all, of those that
    /// are on their way what has been written so far.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Away`].
    pub async fn arrived_bytes(&self, blobs: &[Blob]) -> Result<u64, RuntimeError> {
        let namespace = cri_namespace()?;
        let mut client = ContentClient::new(self.channel());
        let request = within(&namespace, ListStatusesRequest::default());
        let coming = ask(client.list_statuses(request)).await?.statuses;
        // Their names end in the digest that is expected: "layer-sha256:…".
        let coming: HashMap<Digest, u64> = coming
            .iter()
            .filter_map(|status| {
                let (_, digest) = status.r#ref.rsplit_once('-')?;
                Some((digest.parse().ok()?, u64::try_from(status.offset).ok()?))
            })
            .collect();
        let mut arrived = 0_u64;
        for blob in blobs {
            let bytes = match coming.get(&blob.digest) {
                Some(bytes) => *bytes,
                None => {
                    let request = InfoRequest { digest: blob.digest.to_string() };
                    match ask(client.info(within(&namespace, request))).await {
                        Ok(_) => blob.size,
                        Err(Failed::NotFound) => 0,
                        Err(away) => return Err(away.into()),
                    }
                }
            };
            arrived = arrived.saturating_add(bytes.min(blob.size));
        }
        Ok(arrived)
    }
}
