//! Indexes: one image for several platforms, and the choice among them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::ManifestError;
use crate::digest::{Digest, InvalidDigest};

/// Manifests of one image, a platform each.
#[derive(Debug, Clone)]
pub struct Index {
    digest: Digest,
    entries: Vec<IndexEntry>,
}

#[derive(Debug, Clone)]
struct IndexEntry {
    /// As it travelled: it counts when it is chosen.
    digest: String,
    platform: Option<Platform>,
    /// `v8` of `linux/arm64/v8`.
    variant: Option<String>,
}

/// Operating system and processor architecture, in Go's names: `linux/amd64`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
}

impl Default for Platform {
    /// The machine this runs on.
    fn default() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned() }
    }
}

impl std::str::FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let part = |text: &str| {
            !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
        };
        match text.split_once('/') {
            Some((os, architecture)) if part(os) && part(architecture) => {
                Ok(Self { os: os.to_owned(), architecture: architecture.to_owned() })
            }
            _ => {
                Err(format!("{text:?} is no platform; write OS/ARCHITECTURE, such as linux/arm64"))
            }
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// An index as it travels. One entry that is odd must not make the others unreadable.
#[derive(Deserialize)]
struct Listed {
    manifests: Vec<ListedEntry>,
}

#[derive(Deserialize)]
struct ListedEntry {
    digest: String,
    platform: Option<ListedPlatform>,
}

#[derive(Deserialize)]
struct ListedPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    variant: Option<String>,
}

impl Index {
    /// Reads the bytes of an index.
    pub(super) fn read(digest: Digest, bytes: &[u8]) -> Result<Self, String> {
        let listed: Listed =
            serde_json::from_slice(bytes).map_err(|error| format!("index: {error}"))?;
        let entries = listed.manifests.into_iter().map(|entry| {
            let (platform, variant) = match entry.platform {
                Some(ListedPlatform { os, architecture, variant }) => {
                    (Some(Platform { os, architecture }), variant.filter(|v| !v.is_empty()))
                }
                None => (None, None),
            };
            IndexEntry { digest: entry.digest, platform, variant }
        });
        Ok(Self { digest, entries: entries.collect() })
    }

    /// The manifest for `platform`; an entry that names no platform serves where none does. Of several
    /// variants of the processor the one is taken that all have.
    ///
    /// # Errors
    ///
    /// When there is none: the message lists what there is.
    pub fn choose(&self, platform: &Platform) -> Result<Digest, ManifestError> {
        let refuse = |why: String| ManifestError { digest: self.digest, why };
        let fits = |entry: &&IndexEntry| entry.platform.as_ref() == Some(platform);
        let exact = self.entries.iter().filter(fits).min_by_key(|entry| entry.is_special());
        let any = || self.entries.iter().find(|entry| entry.platform.is_none());
        if let Some(entry) = exact.or_else(any) {
            return entry.digest.parse().map_err(|error: InvalidDigest| refuse(error.to_string()));
        }
        let mut there: Vec<_> = self
            .entries
            .iter()
            .filter_map(|e| e.platform.as_ref())
            // Build attestations ride along as unknown/unknown.
            .filter(|p| p.os != "unknown")
            .map(ToString::to_string)
            .collect();
        there.dedup();
        let there = if there.is_empty() { "none".to_owned() } else { there.join(", ") };
        Err(refuse(format!("no image for {platform}; there is: {there}")))
    }
}

impl IndexEntry {
    /// Whether it needs more of a processor than each of its architecture has: `amd64/v3`.
    fn is_special(&self) -> bool {
        let architecture = self.platform.as_ref().map(|platform| platform.architecture.as_str());
        let common = match architecture {
            Some("arm64") => "v8",
            _ => "v1",
        };
        self.variant.as_deref().is_some_and(|variant| variant != common)
    }
}
