//! The two kinds of name that bytes have here.
//!
//! A [`Digest`] is what the OCI world calls a blob by: SHA-256 over the bytes
//! as they travel. An [`ObjectId`] is what the store calls a file by: BLAKE3
//! over the file's content, which costs less than half a second SHA-256 would.
//! The two never mix, so they are two types.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// SHA-256 of a blob, written `sha256:<64 hex digits>`.
///
/// The OCI image specification also registers sha512; no registry in use
/// serves it, and it is refused by name instead of half supported.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Why a text is not a [`Digest`] or [`ObjectId`].
#[derive(Debug, thiserror::Error)]
#[error("digest {text:?}: {why}")]
pub struct InvalidDigest {
    text: String,
    why: &'static str,
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// Wraps a finished SHA-256.
    pub fn from_sha256(hash: [u8; 32]) -> Self {
        Self(hash)
    }

    /// The 64 hex digits, without `sha256:`. Safe as a file name.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 hex digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }

    /// Reads back what [`Digest::hex`] wrote.
    ///
    /// # Errors
    ///
    /// When `hex` is not 64 lower-case hex digits.
    pub fn from_hex(hex: &str) -> Result<Self, InvalidDigest> {
        parse_hex(hex, hex).map(Self)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        match text.split_once(':') {
            Some(("sha256", hex)) => parse_hex(text, hex).map(Self),
            Some(_) => Err(invalid(text, "only sha256 is supported")),
            None => Err(invalid(text, "expected sha256:<64 hex digits>")),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// BLAKE3 of a file's content, and whether the file is executable.
///
/// Written `<64 hex digits>`, with `.x` behind it for an executable file: the
/// mode belongs to the inode, so the two are two objects.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectId {
    blake3: [u8; 32],
    executable: bool,
}

impl ObjectId {
    /// Names content whose BLAKE3 is `hash`.
    pub fn new(hash: blake3::Hash, executable: bool) -> Self {
        Self { blake3: *hash.as_bytes(), executable }
    }

    /// Whether the object's mode is 0555 instead of 0444.
    pub fn executable(&self) -> bool {
        self.executable
    }

    /// `ab/<64 hex digits>[.x]`: its place below the store's `objects/`.
    pub fn path(&self) -> PathBuf {
        let name = self.to_string();
        PathBuf::from(&name[..2]).join(name)
    }
}

impl FromStr for ObjectId {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        let (hex, executable) = match text.strip_suffix(".x") {
            Some(hex) => (hex, true),
            None => (text, false),
        };
        Ok(Self { blake3: parse_hex(text, hex)?, executable })
    }
}

impl TryFrom<String> for ObjectId {
    type Error = InvalidDigest;

    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<ObjectId> for String {
    fn from(id: ObjectId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.blake3))?;
        if self.executable { f.write_str(".x") } else { Ok(()) }
    }
}

impl fmt::Debug for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn parse_hex(text: &str, hex: &str) -> Result<[u8; 32], InvalidDigest> {
    if hex.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(invalid(text, "hex digits must be lower case"));
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(hex, &mut bytes).map_err(|_| invalid(text, "expected 64 hex digits"))?;
    Ok(bytes)
}

fn invalid(text: &str, why: &'static str) -> InvalidDigest {
    // What a peer declares may be long; an error message need not be.
    InvalidDigest { text: text.chars().take(100).collect(), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_text_and_back() {
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let digest: Digest = text.parse().unwrap();
        assert_eq!(digest, Digest::of(b""));
        assert_eq!(digest.to_string(), text);
        assert_eq!(digest.short(), "e3b0c44298fc");
        assert_eq!(Digest::from_hex(&digest.hex()).unwrap(), digest);
    }

    #[test]
    fn what_is_not_a_digest_is_refused_with_the_reason() {
        let why = |text: &str| text.parse::<Digest>().unwrap_err().to_string();
        assert_eq!(why("abc"), r#"digest "abc": expected sha256:<64 hex digits>"#);
        assert_eq!(why("sha512:abc"), r#"digest "sha512:abc": only sha256 is supported"#);
        assert_eq!(why("sha256:abc"), r#"digest "sha256:abc": expected 64 hex digits"#);
        let upper = format!("sha256:{}", "A".repeat(64));
        assert!(why(&upper).ends_with("hex digits must be lower case"), "{}", why(&upper));
    }

    #[test]
    fn an_object_is_named_by_content_and_exec_bit() {
        let hash = blake3::hash(b"weights");
        let plain = ObjectId::new(hash, false);
        let exec = ObjectId::new(hash, true);
        assert_ne!(plain, exec);
        assert_eq!(exec.to_string(), format!("{}.x", hash.to_hex()));
        assert_eq!(exec.to_string().parse::<ObjectId>().unwrap(), exec);
        let path = plain.path();
        assert_eq!(path.parent().unwrap().to_str().unwrap(), &hash.to_hex()[..2]);
        assert!("../../etc/passwd".parse::<ObjectId>().is_err());
    }
}
