//! What every [`Source`] must do, as one suite.

use std::ops::Range;

use bytes::Bytes;
use carport_image::digest::Digest;
use carport_image::source::{ManifestName, Source, SourceError};
use futures_util::{StreamExt, TryStreamExt};

/// An image that a source holds, for [`conforms`].
pub struct Known {
    /// A tag of the image.
    pub tag: String,
    /// The manifest that the tag names.
    pub manifest: Digest,
    /// The manifest's media type.
    pub media_type: String,
    /// A blob of the image.
    pub blob: Digest,
    /// What is in it: several chunks' worth.
    pub content: Bytes,
}

/// Panics where `source`, which holds `known`, does not do what the trait says.
///
/// # Panics
///
/// As said.
pub async fn conforms(source: &dyn Source, known: &Known) {
    manifests(source, known).await;
    ranges(source, known).await;
    refusals(source, known).await;
}

async fn manifests(source: &dyn Source, known: &Known) {
    let by_tag = ManifestName::Tag(known.tag.clone());
    let by_digest = ManifestName::Digest(known.manifest);
    for name in [&by_tag, &by_digest] {
        let raw = source.manifest(name).await.expect("the manifest");
        assert_eq!(raw.digest(), known.manifest, "bytes are handed on as they are");
        assert_eq!(raw.media_type, known.media_type);
        assert_eq!(source.resolve(name).await.expect("a digest"), known.manifest);
    }
    let nowhere = ManifestName::Tag("no-such-tag".into());
    for error in [
        source.manifest(&nowhere).await.expect_err("not there"),
        source.resolve(&nowhere).await.expect_err("not there"),
    ] {
        assert!(matches!(error, SourceError::NotFound(_)), "{error:?}");
        assert!(!error.is_transient());
        let text = error.to_string();
        assert!(text.contains("no-such-tag") && text.contains(&source.name()), "{text}");
    }
    let other = ManifestName::Digest(Digest::of(b"no such manifest"));
    let error = source.manifest(&other).await.expect_err("not there");
    assert!(matches!(error, SourceError::NotFound(_)), "{error:?}");
}

async fn ranges(source: &dyn Source, known: &Known) {
    let size = known.content.len() as u64;
    assert!(size > 2 * 1024 * 1024, "the suite wants a blob of several chunks");
    let mut ranges = vec![0..size, 0..1, size - 1..size, 1..size - 1, size / 2..size];
    ranges.push(1024 * 1024 - 1..1024 * 1024 + 1);
    for range in ranges {
        let read = read(source, known, range.clone()).await.expect("a range");
        assert!(read == known.slice(&range), "range {range:?} holds other bytes");
    }
    // Whoever drops a body half-way does no harm to the next.
    let mut body = source.blob(&known.blob, size, 0..size).await.expect("a blob");
    let first = body.stream.next().await.expect("a chunk").expect("bytes");
    assert!(!first.is_empty() && known.content.starts_with(&first));
    drop(body);
    // Several at a time, read in turn.
    let (left, right) = (0..size / 2, size / 2..size);
    let mut a = source.blob(&known.blob, size, left.clone()).await.expect("a range");
    let mut b = source.blob(&known.blob, size, right.clone()).await.expect("a range");
    let (mut a_bytes, mut b_bytes) = (Vec::<u8>::new(), Vec::<u8>::new());
    loop {
        let a = a.stream.try_next().await.expect("bytes");
        let b = b.stream.try_next().await.expect("bytes");
        a_bytes.extend(a.iter().flatten().copied());
        b_bytes.extend(b.iter().flatten().copied());
        if a.is_none() && b.is_none() {
            break;
        }
    }
    assert!(a_bytes == known.slice(&left) && b_bytes == known.slice(&right));
}

async fn refusals(source: &dyn Source, known: &Known) {
    let size = known.content.len() as u64;
    let refused = async |digest: &Digest, size: u64, range: Range<u64>| match source
        .blob(digest, size, range.clone())
        .await
    {
        Ok(_) => panic!("{range:?} of {digest} of {size} bytes was served"),
        Err(error) => {
            assert!(
                error.to_string().contains(&source.name())
                    || error.to_string().contains(&digest.hex()),
                "{error}"
            );
            error
        }
    };
    let missing = Digest::of(b"no such blob");
    let error = refused(&missing, 5, 0..5).await;
    assert!(matches!(error, SourceError::NotFound(_)), "{error:?}");
    for range in [0..0, 5..5, 0..size + 1, size..size + 1, u64::MAX - 1..u64::MAX] {
        let error = refused(&known.blob, size, range).await;
        assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    }
    // Another size than the blob has: its digest can never be right.
    for (wrong, range) in [
        (size + 1, 0..size + 1),
        (size - 1, 0..size - 1),
        (size + 9, 5..size + 9),
        (size + 9, size..size + 9),
    ] {
        let error = refused(&known.blob, wrong, range).await;
        assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    }
}

impl Known {
    fn slice(&self, range: &Range<u64>) -> &[u8] {
        let at = |offset: u64| usize::try_from(offset).expect("a small blob");
        &self.content[at(range.start)..at(range.end)]
    }
}

/// The bytes of `range`, whether the source serves ranges or starts at 0.
///
/// # Errors
///
/// As [`Source::blob`] and its body.
///
/// # Panics
///
/// When the body starts elsewhere.
pub async fn read(
    source: &dyn Source,
    known: &Known,
    range: Range<u64>,
) -> Result<Vec<u8>, SourceError> {
    let body = source.blob(&known.blob, known.content.len() as u64, range.clone()).await?;
    assert!(body.offset == range.start || body.offset == 0, "a body from {}", body.offset);
    let bytes: Vec<Bytes> = body.stream.try_collect().await?;
    let bytes = bytes.concat();
    let skip = usize::try_from(range.start - body.offset).expect("a small blob");
    Ok(bytes[skip.min(bytes.len())..].to_vec())
}
