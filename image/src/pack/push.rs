//! Pushing an image to a registry.
//!
//! A registry wants to know a blob's digest before its last byte, and we want to know
//! whether it has the blob before the first: so files are read twice, once to hash and, where
//! the registry lacks the layer, once to upload. The second reading checks that the files are
//! still those; the registry checks the digest.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use sha2::Digest as _;

use super::base::{Base, BaseLayer};
use super::document::{self, Document, DoneLayer};
use super::plan::{LayerPlan, Plan};
use super::tar::LayerReader;
use super::{Meter, PackError, PackOptions, PackPhase, Packed, blocking};
use crate::digest::Digest;
use crate::manifest::Blob;
use crate::reference::Reference;
use crate::source::registry::{Upload, UploadStream};

/// What is pushed.
pub(super) struct What {
    pub(super) plan: Arc<Plan>,
    pub(super) base: Option<Arc<Base>>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// Pushes the planned image as `destination`.
pub(super) async fn push(
    upload: &Upload,
    destination: &Reference,
    What { plan, base, annotations }: What,
    options: &PackOptions,
    stopped: &Arc<AtomicBool>,
) -> Result<Packed, PackError> {
    let layers = {
        let (plan, options, stopped) = (plan.clone(), options.clone(), stopped.clone());
        blocking(move || hash(&plan, &options, &stopped)).await?
    };
    let base = base.as_deref();
    let own: u64 = layers.iter().map(|layer| layer.size).sum();
    let total = own + base.map_or(0, Base::bytes);
    let meter = Meter::new(options, stopped, PackPhase::Writing, total);
    let mut done = 0;
    if let Some(base) = base {
        for layer in &base.layers {
            copy_layer(upload, destination, base, layer, &meter).await?;
            done += layer.blob.size;
            meter.set(done)?;
        }
    }
    for (plan, layer) in plan.layers.iter().zip(&layers) {
        if !upload.has_blob(&layer.digest).await? {
            upload_layer(upload, plan, layer, &meter).await?;
        }
        done += layer.size;
        meter.set(done)?;
    }
    let invalid = |source: serde_json::Error| PackError::Destination {
        destination: destination.to_string(),
        why: source.to_string(),
    };
    let config = document::config(base, &layers, &options.platform).map_err(invalid)?;
    let manifest = document::manifest(base, &config, &layers, annotations).map_err(invalid)?;
    if !upload.has_blob(&config.digest).await? {
        upload_document(upload, &config).await?;
    }
    let name = destination.name();
    upload.put_manifest(&name, document::MANIFEST_TYPE, manifest.bytes.into()).await?;
    let count = base.map_or(0, |base| base.layers.len()) + layers.len();
    Ok(Packed { digest: manifest.digest, layers: count, bytes: total })
}

fn hash(
    plan: &Plan,
    options: &PackOptions,
    stopped: &Arc<AtomicBool>,
) -> Result<Vec<DoneLayer>, PackError> {
    let mut readers = Vec::new();
    for layer in &plan.layers {
        readers.push((layer, LayerReader::new(layer)?));
    }
    let total = readers.iter().map(|(_, reader)| reader.size()).sum();
    let meter = Meter::new(options, stopped, PackPhase::Hashing, total);
    let mut layers = Vec::new();
    for (layer, mut reader) in readers {
        let mut hash = sha2::Sha256::new();
        while let Some(chunk) = reader.next_chunk()? {
            hash.update(&chunk);
            meter.add(chunk.len() as u64)?;
        }
        layers.push(DoneLayer {
            digest: Digest::from_sha256(hash.finalize().into()),
            size: reader.size(),
            description: layer.description(),
        });
    }
    Ok(layers)
}

/// Makes a layer of the base one of the repository's: it may have it, or take it from another repository of the
/// same registry; else its bytes are copied, and the registry checks the digest.
async fn copy_layer(
    upload: &Upload,
    destination: &Reference,
    base: &Base,
    layer: &BaseLayer,
    meter: &Meter,
) -> Result<(), PackError> {
    let Blob { digest, size } = layer.blob;
    if upload.has_blob(&digest).await? {
        return Ok(());
    }
    if let (Reference::Registry(from), Reference::Registry(to)) = (&base.reference, destination)
        && from.host() == to.host()
        && upload.mount_blob(&digest, from.repository()).await?
    {
        return Ok(());
    }
    // The HTTP client wraps what its body's stream says into an error of its own; ours is kept here.
    let failed: Arc<Mutex<Option<PackError>>> = Arc::default();
    let open = || {
        let (failed, meter, name) = (failed.clone(), meter.clone(), base.reference.to_string());
        let chunks = base.open(layer).map(move |chunk| {
            let fail = |why: String| PackError::Base { base: name.clone(), why };
            let chunk = chunk.map_err(|error| (fail(error.to_string()), error));
            let chunk = chunk.and_then(|chunk| match meter.add(chunk.len() as u64) {
                Ok(()) => Ok(chunk),
                Err(error) => Err((error, io::ErrorKind::Interrupted.into())),
            });
            chunk.map_err(|(ours, error)| {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
                error
            })
        });
        chunks.boxed()
    };
    let result = upload.put_blob(&digest, size, open).await;
    match failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}

/// Streams a layer, read again from its files.
async fn upload_layer(
    upload: &Upload,
    plan: &Arc<LayerPlan>,
    layer: &DoneLayer,
    meter: &Meter,
) -> Result<(), PackError> {
    // The HTTP client wraps what its body's stream says into an error of its own; ours is kept here.
    let failed: Arc<Mutex<Option<PackError>>> = Arc::default();
    let open = || {
        let (failed, meter) = (failed.clone(), meter.clone());
        let state = (Reading::New(plan.clone()), meter);
        stream::try_unfold(state, |(reading, meter)| async move {
            let read = blocking(move || {
                let mut reader = reading.reader()?;
                let chunk = reader.next_chunk()?;
                meter.add(chunk.as_ref().map_or(0, Bytes::len) as u64)?;
                Ok(chunk.map(|chunk| (chunk, (Reading::Open(reader), meter))))
            });
            read.await
        })
        .map(move |chunk| {
            chunk.map_err(|error| {
                let text = error.to_string();
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                io::Error::other(text)
            })
        })
        .boxed()
    };
    let result = upload.put_blob(&layer.digest, layer.size, open).await;
    match failed.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(error),
        None => Ok(result?),
    }
}

/// A layer's reader, opened on the first thread that blocks for it.
enum Reading {
    New(Arc<LayerPlan>),
    Open(LayerReader),
}

impl Reading {
    fn reader(self) -> Result<LayerReader, PackError> {
        match self {
            Self::New(plan) => LayerReader::new(&plan),
            Self::Open(reader) => Ok(reader),
        }
    }
}

async fn upload_document(upload: &Upload, document: &Document) -> Result<(), PackError> {
    let open = || -> UploadStream {
        let bytes = Bytes::from(document.bytes.clone());
        stream::once(async { Ok(bytes) }).boxed()
    };
    Ok(upload.put_blob(&document.digest, document.bytes.len() as u64, open).await?)
}
