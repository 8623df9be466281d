//! Indexes: one image for several platforms, and the choice among them.

use std::fmt;

use oci_spec::image as oci;
use serde::{Deserialize, Serialize};

use super::{ManifestError, blob};
use crate::digest::Digest;

/// Manifests of one image, a platform each.
#[derive(Debug, Clone)]
pub struct Index {
    digest: Digest,
    entries: Vec<IndexEntry>,
}

#[derive(Debug, Clone)]
struct IndexEntry {
    digest: Digest,
    platform: Option<Platform>,
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

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

impl Index {
    pub(super) fn new(digest: Digest, index: &oci::ImageIndex) -> Result<Self, ManifestError> {
        let entries = index
            .manifests()
            .iter()
            .map(|entry| {
                Ok(IndexEntry {
                    digest: blob(digest, entry)?.digest,
                    platform: entry.platform().as_ref().map(|p| Platform {
                        os: p.os().to_string(),
                        architecture: p.architecture().to_string(),
                    }),
                })
            })
            .collect::<Result<_, ManifestError>>()?;
        Ok(Self { digest, entries })
    }

    /// The manifest for `platform`; an entry that names no platform serves where none does.
    ///
    /// # Errors
    ///
    /// When there is none: the message lists what there is.
    pub fn choose(&self, platform: &Platform) -> Result<Digest, ManifestError> {
        let exact = self.entries.iter().find(|e| e.platform.as_ref() == Some(platform));
        let any = || self.entries.iter().find(|e| e.platform.is_none());
        exact.or_else(any).map(|e| e.digest).ok_or_else(|| {
            let mut there: Vec<_> = self
                .entries
                .iter()
                .filter_map(|e| e.platform.as_ref())
                // Build attestations ride along as unknown/unknown.
                .filter(|p| p.os != "unknown")
                .map(ToString::to_string)
                .collect();
            there.dedup();
            let why = format!("no image for {platform}; there is: {}", there.join(", "));
            ManifestError { digest: self.digest, why }
        })
    }
}
