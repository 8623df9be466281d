//! Giving up a transfer that only just moves.
//!
//! A pause between bytes is bounded by the HTTP library. Whoever sends a byte now and then keeps to
//! that, and would hold a connection and a layer for months.

use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use tokio::time::Instant;

use super::answer::Asked;
use crate::source::SourceError;

/// No model comes over a slower link in anybody's time.
const SLOWEST_BYTES_PER_SECOND: u64 = 1024;

type Chunks = BoxStream<'static, Result<Bytes, SourceError>>;

/// The same chunks, and an error where `patience` of waiting brought next to nothing. Only the
/// waiting counts: who takes the bytes may be as slow as a cap on bandwidth makes him.
pub(super) fn given_up(chunks: Chunks, patience: Duration, asked: Asked) -> Chunks {
    let outset = (chunks, Duration::ZERO, 0, asked);
    let watched = stream::unfold(outset, move |(mut chunks, waited, came, asked)| async move {
        let began = Instant::now();
        let chunk = chunks.next().await?;
        let (mut waited, mut came) = (waited + began.elapsed(), came);
        let chunk = chunk.and_then(|bytes| {
            came += bytes.len() as u64;
            if waited < patience {
                return Ok(bytes);
            }
            let least = (patience.as_secs_f64() * SLOWEST_BYTES_PER_SECOND as f64) as u64;
            if came < least {
                return Err(SourceError::Unavailable(format!(
                    "{}: {} sent {came} bytes in {:.0} s, and is given up",
                    asked.object,
                    asked.host,
                    waited.as_secs_f64()
                )));
            }
            (waited, came) = (Duration::ZERO, 0);
            Ok(bytes)
        });
        Some((chunk, (chunks, waited, came, asked)))
    });
    // Readers may ask behind the end.
    watched.fuse().boxed()
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt as _;

    use super::*;
    use crate::source::registry::credentials::Origin;

    /// So many bytes of a blob come each second, for five minutes.
    async fn pulled(bytes: usize) -> Result<usize, SourceError> {
        let chunks = stream::iter(0..300).then(move |_| async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(Bytes::from(vec![0; bytes]))
        });
        let asked = Asked {
            object: "blob sha256:ab".into(),
            registry: "quay.io".into(),
            host: "quay.io".into(),
            origin: Origin::Nowhere,
        };
        let chunks = given_up(chunks.boxed(), Duration::from_secs(60), asked);
        chunks.try_fold(0, |sum, bytes| async move { Ok(sum + bytes.len()) }).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_now_and_then_is_given_up_and_a_slow_link_is_not() {
        let error = pulled(1).await.unwrap_err();
        assert!(error.is_transient());
        let text = "blob sha256:ab: quay.io sent 60 bytes in 60 s, and is given up";
        assert_eq!(error.to_string(), text);
        assert_eq!(pulled(2048).await.unwrap(), 300 * 2048);
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_the_bytes_may_be_slow() {
        let chunks = stream::iter(0..300).map(|_| Ok(Bytes::from_static(b"x")));
        let asked = Asked {
            object: String::new(),
            registry: String::new(),
            host: String::new(),
            origin: Origin::Nowhere,
        };
        let mut chunks = given_up(chunks.boxed(), Duration::from_secs(60), asked);
        for _ in 0..300 {
            assert!(chunks.next().await.unwrap().is_ok());
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}
