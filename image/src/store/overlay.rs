//! A layer in overlayfs' form: what a container runtime keeps of it, made of hard links.
//!
//! ```text
//! layers below, the layer's entries ─► its own folders, files, links ─► whiteouts, opaque folders
//! ```
//!
//! A file that the layer hides is a character device 0:0 of that name; a folder of the layer that shows
//! nothing of the lower ones has the attribute `trusted.overlay.opaque`
//! (<https://docs.kernel.org/filesystems/overlayfs.html>). Only what is there below is hidden.

use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use super::error::{Context as _, StoreError};
use super::trees::{Links, normal_folder, open_dir};
use super::{LayerRecord, Store};
use crate::digest::Digest;
use crate::manifest::{ImageManifest, Manifest, PlacedLayer};
use crate::source::RawManifest;
use crate::tree::{LayerEntry, Node, Tree, TreeError};

const OPAQUE: &str = "trusted.overlay.opaque";

/// A stored image with all that it was made of.
pub(crate) struct Whole {
    pub(crate) image: ImageManifest,
    /// As it travelled.
    pub(crate) manifest: RawManifest,
    /// As it travelled.
    pub(crate) config: Vec<u8>,
    /// Lowest first.
    pub(crate) layers: Vec<(PlacedLayer, LayerRecord)>,
}

impl Store {
    /// The image and the records of its layers; `None` where it is not here, or something of it is gone.
    pub(crate) fn whole(&self, digest: &Digest) -> Result<Option<Whole>, StoreError> {
        if self.image_unnamed(digest)?.is_none() {
            return Ok(None);
        }
        let folder = self.tree(digest);
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read(&path).context(|| format!("read {}", path.display()))
        };
        let corrupt = |why: String| StoreError::Corrupt(format!("image {digest}: {why}"));
        let manifest =
            RawManifest { media_type: String::new(), bytes: read("manifest.json")?.into() };
        let config = read("config.json")?;
        let image = match Manifest::parse(&manifest).map_err(|e| corrupt(e.to_string()))? {
            Manifest::Image(image) if image.digest == *digest => image,
            _ => return Err(corrupt("its manifest is another one: run `carport verify`".into())),
        };
        if Digest::of(&config) != image.config.digest {
            return Err(corrupt("its config is another one: run `carport verify`".into()));
        }
        let mut layers = Vec::new();
        for placed in image.layers_with(&config).map_err(|e| corrupt(e.to_string()))? {
            let Some(record) = self.layer_as(&placed.layer, placed.diff_id.as_ref())? else {
                return Ok(None);
            };
            layers.push((placed, record));
        }
        Ok(Some(Whole { image, manifest, config, layers }))
    }

    /// Fills the empty `folder`, on the store's file system, with what a layer brings over the `lower`
    /// ones. Nothing is synced.
    ///
    /// # Errors
    ///
    /// [`StoreError::Corrupt`] when the entries do not fit the lower layers.
    pub(crate) fn lay_out(
        &self,
        lower: &Tree,
        entries: &[LayerEntry],
        folder: &Path,
    ) -> Result<(), StoreError> {
        let own = own(lower, entries).map_err(|e| StoreError::Corrupt(e.to_string()))?;
        let what = || format!("open {}", folder.display());
        let root = open_dir(folder).context(what)?;
        Links::new(self)?.fill(root.as_fd(), own.tree.root(), "")?;
        for path in &own.hidden {
            let at = folder.join(path);
            let what = || format!("hide {}", at.display());
            rustix::fs::mknodat(CWD, &at, FileType::CharacterDevice, Mode::empty(), 0)
                .context(what)?;
            at.parent().map(normal_folder).transpose().context(what)?;
        }
        for path in &own.opaque {
            let at = folder.join(path);
            let set = rustix::fs::setxattr(&at, OPAQUE, b"y", XattrFlags::empty());
            set.context(|| format!("hide what is below {}", at.display()))?;
        }
        Ok(())
    }
}

/// What a layer is over its lower ones.
#[derive(Debug, Default, PartialEq, Eq)]
struct Own {
    /// Folders that hold hidden names are in it, too.
    tree: Tree,
    hidden: Vec<String>,
    /// Folders of `tree`.
    opaque: Vec<String>,
}

fn own(lower: &Tree, entries: &[LayerEntry]) -> Result<Own, TreeError> {
    let mut tree = Tree::default();
    for entry in entries {
        let entry = match entry {
            LayerEntry::Whiteout { .. } | LayerEntry::Opaque { .. } => continue,
            LayerEntry::Hardlink { path, target } if tree.get(target).is_none() => {
                // Of a lower layer: more of it than this name is not needed.
                match lower.get(target) {
                    Some(Node::File { size, object }) => LayerEntry::File {
                        path: path.clone(),
                        size: *size,
                        object: *object,
                        offset: None,
                    },
                    Some(Node::Symlink(target)) => {
                        LayerEntry::Symlink { path: path.clone(), target: target.clone() }
                    }
                    _ => entry.clone(),
                }
            }
            entry => entry.clone(),
        };
        tree.apply(&[entry])?;
    }
    let mut own = Own { tree, ..Own::default() };
    for entry in entries {
        match entry {
            LayerEntry::Whiteout { path } => own.hide(lower, path),
            LayerEntry::Opaque { path } => {
                let below = match path.as_str() {
                    "" => Some(lower.root()),
                    path => lower.get(path).and_then(folder),
                };
                for name in below.into_iter().flat_map(|below| below.keys()) {
                    let slash = if path.is_empty() { "" } else { "/" };
                    own.hide(lower, &format!("{path}{slash}{name}"));
                }
            }
            _ => {}
        }
    }
    own.opaque.sort();
    own.opaque.dedup();
    own.hidden.sort();
    own.hidden.dedup();
    // What is below something that is hidden is hidden by that.
    let hides: Vec<String> = own.hidden.iter().chain(&own.opaque).cloned().collect();
    own.hidden.retain(|path| !above(path).any(|above| hides.iter().any(|path| path == above)));
    for path in &own.hidden {
        if let Some((parent, _)) = path.rsplit_once('/') {
            own.tree.apply(&[LayerEntry::Directory { path: parent.to_owned() }])?;
        }
    }
    Ok(own)
}

/// The folders that lead to a path.
fn above(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

impl Own {
    /// Hides `path` of the lower layers, but nothing that the layer itself has there.
    fn hide(&mut self, lower: &Tree, path: &str) {
        let Some(hidden) = lower.get(path) else { return };
        // Where the layer has something else than a folder above it, that hides it already.
        let is_other = |path| self.tree.get(path).is_some_and(|node| folder(node).is_none());
        if above(path).any(is_other) {
            return;
        }
        match (self.tree.get(path), hidden) {
            (None, _) => self.hidden.push(path.to_owned()),
            (Some(Node::Directory(_)), Node::Directory(_)) => self.opaque.push(path.to_owned()),
            // It lies over it.
            (Some(_), _) => {}
        }
    }
}

fn folder(node: &Node) -> Option<&std::collections::BTreeMap<String, Node>> {
    match node {
        Node::Directory(children) => Some(children),
        Node::File { .. } | Node::Symlink(_) => None,
    }
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
