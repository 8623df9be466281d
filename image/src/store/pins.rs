//! Pins: images that stay because somebody wishes it.
//!
//! ```text
//! pins/<image>.<hash of the owner>.json    owner, image, reference, created_at, expires_at
//! ```
//!
//! A pin is its owner's, one an image: pinning again only changes when it ends. The image is
//! in the record's name, so that a damaged record keeps that image and no other.
//!
//! # What always holds
//!
//! - **A pinned image is not removed**, neither by hand nor to make room, until the pin is taken
//!   away or its time is over.
//! - **Only a time that is over ends a pin.** Nothing is computed from its age: a clock that is set
//!   back makes it last longer.

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::record::Lock;
use super::told::date;
use super::{Records, Store};
use crate::digest::Digest;
use crate::reference::Reference;

/// As long as a Kubernetes name.
const MAX_OWNER_BYTES: usize = 253;

/// More owners than that of one image are a program that makes up names.
const MAX_PINS_AN_IMAGE: usize = 256;

/// Who wants an image kept: lower-case letters, digits and `- . / : @`, from a letter or digit
/// to a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Owner(String);

/// Why a text is no [`Owner`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no owner; write at most 253 lower-case letters, digits, '-', '.', '/', ':' and '@', \
     with a letter or digit at both ends"
)]
pub struct InvalidOwner(String);

impl Owner {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Owner {
    type Err = InvalidOwner;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let ends = text.bytes().next().is_some_and(plain) && text.bytes().last().is_some_and(plain);
        let sound = text.bytes().all(|byte| plain(byte) || b"-./:@".contains(&byte));
        match ends && sound && text.len() <= MAX_OWNER_BYTES {
            true => Ok(Self(text.to_owned())),
            false => Err(InvalidOwner(text.chars().take(64).collect())),
        }
    }
}

impl TryFrom<String> for Owner {
    type Error = InvalidOwner;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Owner> for String {
    fn from(owner: Owner) -> Self {
        owner.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Somebody's wish that an image stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Whose wish.
    pub owner: Owner,
    /// The image manifest.
    pub image: Digest,
    /// What the image was called when it was pinned, where it was pinned by a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<Reference>,
    /// When this owner pinned it first.
    pub created_at: SystemTime,
    /// From then on it counts for nothing; absent: it lasts until it is taken away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<SystemTime>,
}

impl Pin {
    fn is_over(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|end| end <= now)
    }
}

/// What [`Store::pin`] is told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PinRequest {
    /// Whose wish.
    pub owner: Owner,
    /// When it ends; absent: when it is taken away.
    pub expires_at: Option<SystemTime>,
}

impl Store {
    /// Pins a stored image. An owner who has pinned it already changes when that ends.
    ///
    /// `None` when the image is not here: nothing is pinned then.
    ///
    /// # Errors
    ///
    /// [`StoreError::InUse`] when the image has more pins than anybody could mean.
    pub fn pin(
        &self,
        image: &Digest,
        reference: Option<&Reference>,
        request: &PinRequest,
    ) -> Result<Option<Pin>, StoreError> {
        // Shared with nobody who removes: the look and the deed are one.
        let _shared = Lock::shared(&self.path("lock"))?;
        if self.tree_record(image)?.is_none() {
            return Ok(None);
        }
        let name = record_name(image, &request.owner);
        let earlier = self.pin_records().get_sound::<Pin>(&name)?;
        if earlier.is_none() && self.pin_names(image)?.len() >= MAX_PINS_AN_IMAGE {
            return Err(StoreError::InUse(format!(
                "image {image} has {MAX_PINS_AN_IMAGE} pins: use one owner for what belongs together"
            )));
        }
        let pin = Pin {
            owner: request.owner.clone(),
            image: *image,
            reference: reference
                .cloned()
                .or_else(|| earlier.as_ref().and_then(|pin| pin.reference.clone())),
            created_at: earlier.map_or_else(SystemTime::now, |pin| pin.created_at),
            expires_at: request.expires_at,
        };
        self.pin_records().put(&name, &pin)?;
        Ok(Some(pin))
    }

    /// Takes an owner's pin away; false when there was none.
    pub fn unpin(&self, image: &Digest, owner: &Owner) -> Result<bool, StoreError> {
        self.pin_records().remove(&record_name(image, owner))
    }

    /// All pins whose time is not over, by image and owner.
    pub fn pins(&self) -> Result<Vec<Pin>, StoreError> {
        let now = SystemTime::now();
        let mut pins: Vec<Pin> =
            self.pin_records().list()?.into_iter().map(|(_, pin): (_, Pin)| pin).collect();
        pins.retain(|pin| !pin.is_over(now));
        pins.sort_by(|a, b| (a.image, &a.owner).cmp(&(b.image, &b.owner)));
        Ok(pins)
    }

    /// One pin that keeps `image`, told to a person; `None` when nothing does.
    ///
    /// A record that cannot be read keeps its image, too.
    pub(super) fn pinned_by(&self, image: &Digest) -> Result<Option<String>, StoreError> {
        let now = SystemTime::now();
        for name in self.pin_names(image)? {
            match self.pin_records().get::<Pin>(&name) {
                Ok(Some(pin)) if !pin.is_over(now) => return Ok(Some(told(&pin))),
                Ok(_) => {}
                Err(StoreError::Corrupt(why)) => return Ok(Some(why)),
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Removes the pins of an image that goes, and with it all that is over.
    pub(super) fn drop_pins(&self, image: &Digest) -> Result<(), StoreError> {
        for name in self.pin_names(image)? {
            self.pin_records().remove(&name)?;
        }
        Ok(())
    }

    /// Removes the pins whose time is over.
    pub(super) fn drop_expired_pins(&self) -> Result<(), StoreError> {
        let now = SystemTime::now();
        for (name, pin) in self.pin_records().list::<Pin>()? {
            if pin.is_over(now) {
                self.pin_records().remove(&name)?;
            }
        }
        Ok(())
    }

    fn pin_names(&self, image: &Digest) -> Result<Vec<String>, StoreError> {
        let start = format!("{}.", image.hex());
        let mut names = self.pin_records().names()?;
        names.retain(|name| name.starts_with(&start));
        Ok(names)
    }

    fn pin_records(&self) -> Records {
        Records::new(self.path("pins"))
    }
}

fn record_name(image: &Digest, owner: &Owner) -> String {
    format!("{}.{}", image.hex(), Digest::of(owner.as_str().as_bytes()).hex())
}

/// Who keeps an image, until when, and how to end it.
fn told(pin: &Pin) -> String {
    let end = match pin.expires_at {
        Some(end) => format!("until {}", date(end)),
        None => "without an end".to_owned(),
    };
    let (image, owner) = (pin.image, &pin.owner);
    format!("pinned by {owner} {end}: `carport unpin {image} --owner {owner}` first")
}

#[cfg(test)]
#[path = "pins_tests.rs"]
mod tests;
