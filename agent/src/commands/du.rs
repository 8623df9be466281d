//! `carport du`: what each image takes.

use std::time::SystemTime;

use serde::{Serialize, Serializer};

use super::open_store;
use crate::cli::Output;
use crate::config::Config;
use crate::output::{print, size, table, time};

#[derive(Debug, Serialize)]
struct Taken {
    images: Vec<Image>,
    object_bytes: u64,
    saved_bytes: u64,
    unused_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Image {
    digest: String,
    references: Vec<String>,
    unpacked_bytes: u64,
    unique_bytes: u64,
    shared_bytes: u64,
    #[serde(serialize_with = "write_optional_time")]
    last_used_at: Option<SystemTime>,
}

pub(super) fn run(output: Output, config: &Config) -> anyhow::Result<()> {
    let store = open_store(config)?;
    let images = store.image_usage()?;
    let usage = store.usage()?;
    let alone: u64 = images.iter().map(|image| image.alone_bytes).sum();
    let images = images.into_iter().map(|usage| Image {
        digest: usage.image.digest.to_string(),
        references: usage.image.references,
        unpacked_bytes: usage.image.unpacked_bytes,
        unique_bytes: usage.unique_bytes,
        shared_bytes: usage.shared_bytes,
        last_used_at: usage.last_used_at,
    });
    let taken = Taken {
        images: images.collect(),
        object_bytes: usage.object_bytes,
        saved_bytes: alone.saturating_sub(usage.object_bytes - usage.unused_bytes),
        unused_bytes: usage.unused_bytes,
    };
    print(output, &taken, |taken| {
        let rows = taken.images.iter().map(|image| {
            vec![
                image.references.first().cloned().unwrap_or_else(|| "-".into()),
                super::ask::short(&image.digest),
                size(image.unpacked_bytes),
                size(image.unique_bytes),
                size(image.shared_bytes),
                image.last_used_at.map_or_else(|| "-".into(), time),
            ]
        });
        let header = ["REFERENCE", "DIGEST", "SIZE", "UNIQUE", "SHARED", "LAST USE"];
        format!(
            "{}\n{} on the disk, {} saved by sharing, {} unused\n",
            table(&header, rows),
            size(taken.object_bytes),
            size(taken.saved_bytes),
            size(taken.unused_bytes)
        )
    })
}

/// Writes a time as [`time`] does, and null where there is none.
pub(super) fn write_optional_time<S: Serializer>(
    at: &Option<SystemTime>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => crate::output::write_time(at, to),
        None => to.serialize_none(),
    }
}
