//! `carport pin`, `unpin` and `pins`.

use std::time::SystemTime;

use anyhow::Context as _;
use carport_image::store::{Pin, PinRequest};
use carport_image::{Digest, Reference};
use serde::Serialize;

use super::du::write_optional_time;
use super::images::find;
use super::open_store;
use crate::cli::{Output, PinArgs, UnpinArgs};
use crate::config::Config;
use crate::output::{print, table, time, write_time};

/// A pin as it is printed.
#[derive(Debug, Serialize)]
struct Shown {
    owner: String,
    digest: String,
    reference: Option<String>,
    #[serde(serialize_with = "write_time")]
    created_at: SystemTime,
    #[serde(serialize_with = "write_optional_time")]
    expires_at: Option<SystemTime>,
}

impl From<Pin> for Shown {
    fn from(pin: Pin) -> Self {
        Self {
            owner: pin.owner.to_string(),
            digest: pin.image.to_string(),
            reference: pin.reference.map(|reference| reference.to_string()),
            created_at: pin.created_at,
            expires_at: pin.expires_at,
        }
    }
}

impl Shown {
    fn end(&self) -> String {
        self.expires_at.map_or_else(|| "-".into(), time)
    }
}

pub(super) fn pin(output: Output, config: &Config, arguments: &PinArgs) -> anyhow::Result<()> {
    let store = open_store(config)?;
    let digest = find(&store, &arguments.image)?;
    // A digest that was shortened may look like a name, too.
    let named = arguments.image.parse::<Reference>().ok();
    let named = match named {
        Some(reference) if store.lookup(&reference)? == Some(digest) => Some(reference),
        _ => None,
    };
    let expires_at = arguments.time.map(|time| SystemTime::now() + time);
    let request = PinRequest { owner: arguments.owner.clone(), expires_at };
    let pin = store.pin(&digest, named.as_ref(), &request)?;
    let pin = pin.with_context(|| format!("{digest}: removed meanwhile; pull it again"))?;
    print(output, &Shown::from(pin), |pin| match pin.expires_at {
        Some(end) => format!("pinned {} for {} until {}", pin.digest, pin.owner, time(end)),
        None => format!("pinned {} for {}", pin.digest, pin.owner),
    })
}

/// What `unpin` did.
#[derive(Debug, Serialize)]
struct Unpinned {
    owner: String,
    digest: String,
    removed: bool,
}

pub(super) fn unpin(output: Output, config: &Config, arguments: &UnpinArgs) -> anyhow::Result<()> {
    let store = open_store(config)?;
    // An image may have gone by other ways than these.
    let digest = match arguments.image.parse::<Digest>() {
        Ok(digest) => digest,
        Err(_) => find(&store, &arguments.image)?,
    };
    let removed = store.unpin(&digest, &arguments.owner)?;
    let (owner, digest) = (arguments.owner.to_string(), digest.to_string());
    print(output, &Unpinned { owner, digest, removed }, |one| match one.removed {
        true => format!("unpinned {} for {}", one.digest, one.owner),
        false => format!("{} has no pin of {}", one.digest, one.owner),
    })
}

pub(super) fn list(output: Output, config: &Config) -> anyhow::Result<()> {
    let pins: Vec<Shown> = open_store(config)?.pins()?.into_iter().map(Shown::from).collect();
    print(output, &pins, |pins| {
        let rows = pins.iter().map(|pin| {
            let name = pin.reference.clone().unwrap_or_else(|| "-".into());
            vec![pin.owner.clone(), super::ask::short(&pin.digest), name, pin.end()]
        });
        table(&["OWNER", "DIGEST", "REFERENCE", "EXPIRES"], rows)
    })
}
