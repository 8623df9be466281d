//! Who has been found to have a right to an image: one small record an image.
//!
//! A grant says that a repository handed the image out to somebody, and when. Who that was is
//! known by a hash; nobody in particular, where no credentials were needed. A record that is
//! lost or damaged costs one question to the registry, never an image to the wrong pod.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::{Records, Store};
use crate::digest::Digest;

/// Pods of more identities than that on one image have the oldest asked about again.
const MAX_GRANTS: usize = 64;

/// The grants of one image.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AccessRecord {
    /// Oldest first.
    grants: Vec<Grant>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Grant {
    /// As [`crate::source::Source::name`] says it.
    repository: String,
    /// Absent: it is for everybody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    credential: Option<Digest>,
    accepted_at: SystemTime,
}

/// How somebody stands to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is for everybody, or their right was seen lately.
    Entitled,
    /// Their right was seen long ago.
    Known,
    /// Nothing is known of them.
    Unknown,
}

impl AccessRecord {
    /// How the holder of `credential` stands, where a grant counts for `remember_for`.
    pub(crate) fn standing(
        &self,
        repository: &str,
        credential: &Digest,
        remember_for: Duration,
        now: SystemTime,
    ) -> Standing {
        let mut standing = Standing::Unknown;
        for grant in self.grants.iter().filter(|grant| grant.repository == repository) {
            match grant.credential {
                None => return Standing::Entitled,
                Some(known) if known == *credential => {
                    // A clock that was set back makes no grant last longer.
                    let age = now.duration_since(grant.accepted_at);
                    if age.is_ok_and(|age| age < remember_for) {
                        return Standing::Entitled;
                    }
                    standing = Standing::Known;
                }
                Some(_) => {}
            }
        }
        standing
    }

    /// Whether this repository has been seen to hold the image.
    pub(crate) fn holds(&self, repository: &str) -> bool {
        self.grants.iter().any(|grant| grant.repository == repository)
    }

    fn forget(&mut self, repository: &str, credential: Option<Digest>) {
        self.grants
            .retain(|grant| grant.repository != repository || grant.credential != credential);
    }
}

impl Store {
    /// The grants of an image; none where nothing is known.
    pub(crate) fn access(&self, image: &Digest) -> Result<AccessRecord, StoreError> {
        Ok(self.access_records().get_sound(&image.hex())?.unwrap_or_default())
    }

    /// Notes a grant. Two that come at the same moment from two processes may lose one.
    pub(crate) fn grant(
        &self,
        image: &Digest,
        repository: &str,
        credential: Option<Digest>,
    ) -> Result<(), StoreError> {
        let mut record = self.access(image)?;
        record.forget(repository, credential);
        let excess = (record.grants.len() + 1).saturating_sub(MAX_GRANTS);
        record.grants.drain(..excess);
        let accepted_at = SystemTime::now();
        record.grants.push(Grant { repository: repository.to_owned(), credential, accepted_at });
        self.access_records().put(&image.hex(), &record)
    }

    /// Takes a grant back: the registry refused.
    pub(crate) fn revoke(
        &self,
        image: &Digest,
        repository: &str,
        credential: Digest,
    ) -> Result<(), StoreError> {
        let mut record = self.access(image)?;
        let before = record.grants.len();
        record.forget(repository, Some(credential));
        match record.grants.len() == before {
            true => Ok(()),
            false => self.access_records().put(&image.hex(), &record),
        }
    }

    pub(super) fn access_records(&self) -> Records {
        Records::new(self.path("access"))
    }

    /// Removes the records of images that are gone; what a crash left.
    pub(super) fn drop_access_without_image(&self) -> Result<(), StoreError> {
        for name in self.access_records().names()? {
            let there = Digest::from_hex(&name).is_ok_and(|image| self.tree(&image).exists());
            if !there {
                self.access_records().remove(&name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        (folder, store)
    }

    #[test]
    fn a_grant_is_one_credentials_at_one_repository_for_a_time() {
        let (_folder, store) = store();
        let (image, ada, bob) = (Digest::of(b"image"), Digest::of(b"ada"), Digest::of(b"bob"));
        store.grant(&image, "r/a", Some(ada)).unwrap();
        let record = store.access(&image).unwrap();
        let now = SystemTime::now();
        let stands = |repository, who, at| record.standing(repository, who, HOUR, at);
        assert_eq!(stands("r/a", &ada, now), Standing::Entitled);
        assert_eq!(stands("r/a", &ada, now + HOUR), Standing::Known);
        assert_eq!(stands("r/a", &ada, now - HOUR), Standing::Known, "the clock was set back");
        assert_eq!(stands("r/a", &bob, now), Standing::Unknown);
        assert_eq!(stands("r/b", &ada, now), Standing::Unknown);
        assert!(record.holds("r/a") && !record.holds("r/b"));
        assert_eq!(store.access(&Digest::of(b"other")).unwrap(), AccessRecord::default());

        store.revoke(&image, "r/a", ada).unwrap();
        let record = store.access(&image).unwrap();
        assert_eq!(record.standing("r/a", &ada, HOUR, now), Standing::Unknown);
    }

    #[test]
    fn what_was_given_to_nobody_in_particular_is_everybodys_at_that_repository() {
        let (_folder, store) = store();
        let (image, anybody) = (Digest::of(b"image"), Digest::of(b"anybody"));
        store.grant(&image, "r/a", None).unwrap();
        let record = store.access(&image).unwrap();
        let late = SystemTime::now() + HOUR * 1000;
        assert_eq!(record.standing("r/a", &anybody, HOUR, late), Standing::Entitled);
        assert_eq!(record.standing("r/b", &anybody, HOUR, late), Standing::Unknown);
    }

    #[test]
    fn grants_are_bounded_and_the_oldest_go() {
        let (_folder, store) = store();
        let image = Digest::of(b"image");
        let who = |n: usize| Digest::of(n.to_string().as_bytes());
        for n in 0..=MAX_GRANTS {
            store.grant(&image, "r/a", Some(who(n))).unwrap();
        }
        store.grant(&image, "r/a", Some(who(5))).unwrap();
        let record = store.access(&image).unwrap();
        assert_eq!(record.grants.len(), MAX_GRANTS);
        let stands = |n| record.standing("r/a", &who(n), HOUR, SystemTime::now());
        assert_eq!((stands(0), stands(1)), (Standing::Unknown, Standing::Entitled));
        assert_eq!((stands(5), stands(MAX_GRANTS)), (Standing::Entitled, Standing::Entitled));
    }

    #[test]
    fn records_of_images_that_are_gone_are_collected_and_damaged_ones_count_as_none() {
        let (_folder, store) = store();
        let image = Digest::of(b"image");
        store.grant(&image, "r/a", None).unwrap();
        std::fs::write(store.root().join("access").join(format!("{}.json", image.hex())), "{")
            .unwrap();
        assert_eq!(store.access(&image).unwrap(), AccessRecord::default());
        store.collect().unwrap();
        assert_eq!(std::fs::read_dir(store.root().join("access")).unwrap().count(), 0);
    }
}
