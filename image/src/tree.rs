//! The tree: what the layers of an image add up to, in memory.
//!
//! [`LayerEntry`]s come in, lowest layer first; a [`Tree`] of directories,
//! files and symlinks comes out, as the OCI image specification's layer rules
//! have it. Nothing here touches a disk: the store turns a tree into hard links.
//!
//! # What always holds
//!
//! - Whiteouts and opaque markers hide what *lower* layers brought, wherever
//!   in the layer they stand, and never what their own layer brings.
//! - No path of an entry leads through a symlink: nothing is followed.
//! - The last entry of a path wins, and a directory over a directory merges.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::ObjectId;

/// One thing that a layer says. Paths are relative, clean, and never empty but for
/// [`LayerEntry::Opaque`] and the one file of a raw layer, which the manifest names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum LayerEntry {
    /// A directory.
    Directory {
        /// Where.
        path: String,
    },
    /// A regular file.
    File {
        /// Where.
        path: String,
        /// Its length in bytes.
        size: u64,
        /// Its content.
        object: ObjectId,
        /// Where in the uncompressed layer its bytes begin. Absent where it has none, and in
        /// records of earlier versions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    },
    /// A symbolic link, kept as it is.
    Symlink {
        /// Where.
        path: String,
        /// What it says, unresolved.
        target: String,
    },
    /// Another name for a file of this or a lower layer.
    Hardlink {
        /// Where.
        path: String,
        /// The other name.
        target: String,
    },
    /// Hides `path` of the lower layers.
    Whiteout {
        /// What is hidden.
        path: String,
    },
    /// Hides all that the lower layers have below `path`.
    Opaque {
        /// The directory; empty for the root.
        path: String,
    },
}

impl LayerEntry {
    /// Where it stands.
    fn path(&self) -> &str {
        match self {
            Self::Directory { path }
            | Self::File { path, .. }
            | Self::Symlink { path, .. }
            | Self::Hardlink { path, .. }
            | Self::Whiteout { path }
            | Self::Opaque { path } => path,
        }
    }
}

/// Whether a layer says of owners, modes and extended attributes what a tree shows: all root's, folders
/// 0755, files readable and executable for all or executable for nobody. A file's write bit of its owner
/// does not count: root, who alone has it, needs none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Attributes {
    /// Nobody looked.
    #[default]
    Unknown,
    /// It does.
    Kept,
    /// It does not; the first entry that says something else, and what.
    Changed(String),
}

/// Why layers do not add up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("entry {path:?}: {why}")]
pub struct TreeError {
    path: String,
    why: String,
}

/// A node of a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory and what is in it, by name.
    Directory(BTreeMap<String, Node>),
    /// A regular file.
    File {
        /// Its length in bytes.
        size: u64,
        /// Its content.
        object: ObjectId,
    },
    /// A symbolic link.
    Symlink(String),
}

/// A root directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tree {
    root: BTreeMap<String, Node>,
}

impl Tree {
    /// What is in the root directory, by name.
    pub fn root(&self) -> &BTreeMap<String, Node> {
        &self.root
    }

    /// Lays one more layer over the tree.
    ///
    /// # Errors
    ///
    /// When an entry's path leads through a symlink or a file, or a hard link
    /// names what is not there. The tree is then of no use any more.
    pub fn apply(&mut self, layer: &[LayerEntry]) -> Result<(), TreeError> {
        for entry in layer {
            match entry {
                LayerEntry::Whiteout { path } => self.hide(path),
                LayerEntry::Opaque { path } => self.hide_below(path),
                _ => {}
            }
        }
        for entry in layer {
            match entry {
                LayerEntry::Whiteout { .. } | LayerEntry::Opaque { .. } => {}
                LayerEntry::Directory { path } => {
                    let (directory, name) = self.parent(path)?;
                    if !matches!(directory.get(name), Some(Node::Directory(_))) {
                        directory.insert(name.to_owned(), Node::Directory(BTreeMap::new()));
                    }
                }
                LayerEntry::File { path, size, object, .. } => {
                    self.put(path, Node::File { size: *size, object: *object })?;
                }
                LayerEntry::Symlink { path, target } => {
                    self.put(path, Node::Symlink(target.clone()))?;
                }
                LayerEntry::Hardlink { path, target } => {
                    let node = match self.get(target) {
                        Some(Node::Directory(_)) => {
                            return Err(error(
                                path,
                                format!("hard link to the directory {target:?}"),
                            ));
                        }
                        Some(node) => node.clone(),
                        None => {
                            return Err(error(
                                path,
                                format!("hard link to {target:?}, which is not there"),
                            ));
                        }
                    };
                    self.put(path, node)?;
                }
            }
        }
        Ok(())
    }

    /// As [`Tree::apply`], with `folder` before all paths and targets of hard links.
    ///
    /// # Errors
    ///
    /// As [`Tree::apply`].
    pub fn apply_below(&mut self, folder: &str, layer: &[LayerEntry]) -> Result<(), TreeError> {
        let below =
            |path: &str| if path.is_empty() { folder.into() } else { format!("{folder}/{path}") };
        let moved: Vec<_> = layer
            .iter()
            .map(|entry| {
                let mut entry = entry.clone();
                match &mut entry {
                    LayerEntry::Hardlink { path, target } => {
                        *path = below(path);
                        *target = below(target);
                    }
                    LayerEntry::Directory { path }
                    | LayerEntry::File { path, .. }
                    | LayerEntry::Symlink { path, .. }
                    | LayerEntry::Whiteout { path }
                    | LayerEntry::Opaque { path } => *path = below(path),
                }
                entry
            })
            .collect();
        self.apply(&moved)
    }

    /// As [`Tree::apply`], of a layer that may have nothing outside of `folder`.
    ///
    /// # Errors
    ///
    /// As [`Tree::apply`], and when an entry stands elsewhere.
    pub fn apply_within(&mut self, folder: &str, layer: &[LayerEntry]) -> Result<(), TreeError> {
        let is_within = |path: &str| {
            path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if let Some(path) = layer.iter().map(LayerEntry::path).find(|path| !is_within(path)) {
            return Err(error(path, format!("stands outside of the layer's folder {folder:?}")));
        }
        // A folder of nothing is a folder.
        self.apply(&[LayerEntry::Directory { path: folder.to_owned() }])?;
        self.apply(layer)
    }

    /// Puts the one file of a raw layer at `path`.
    ///
    /// # Errors
    ///
    /// When something else is there, the path leads through a symlink or a file, or the layer is
    /// not one file.
    pub fn place_file(&mut self, path: &str, layer: &[LayerEntry]) -> Result<(), TreeError> {
        let [LayerEntry::File { size, object, .. }] = layer else {
            return Err(error(path, "the layer is not one file".to_owned()));
        };
        let file = Node::File { size: *size, object: *object };
        match self.get(path) {
            Some(there) if *there != file => {
                Err(error(path, "two layers bring something of this name".to_owned()))
            }
            _ => self.put(path, file),
        }
    }

    /// The node at `path`, following nothing.
    pub fn get(&self, path: &str) -> Option<&Node> {
        let (parents, name) = split(path);
        let mut directory = &self.root;
        for parent in parents {
            match directory.get(parent) {
                Some(Node::Directory(children)) => directory = children,
                _ => return None,
            }
        }
        directory.get(name)
    }

    /// Every file, in path order: `(path, size in bytes, object)`.
    pub fn files(&self) -> Vec<(String, u64, ObjectId)> {
        let mut files = Vec::new();
        collect(&self.root, "", &mut files);
        files
    }

    fn put(&mut self, path: &str, node: Node) -> Result<(), TreeError> {
        let (directory, name) = self.parent(path)?;
        directory.insert(name.to_owned(), node);
        Ok(())
    }

    /// The directory that holds `path`, made where it is missing, and the last name.
    fn parent<'a, 'p>(
        &'a mut self,
        path: &'p str,
    ) -> Result<(&'a mut BTreeMap<String, Node>, &'p str), TreeError> {
        let (parents, name) = split(path);
        let mut directory = &mut self.root;
        for parent in parents {
            let node = directory
                .entry(parent.to_owned())
                .or_insert_with(|| Node::Directory(BTreeMap::new()));
            match node {
                Node::Directory(children) => directory = children,
                Node::Symlink(_) => {
                    return Err(error(path, format!("leads through the symlink {parent:?}")));
                }
                Node::File { .. } => {
                    return Err(error(path, format!("leads through {parent:?}, which is a file")));
                }
            }
        }
        Ok((directory, name))
    }

    fn hide(&mut self, path: &str) {
        let (parents, name) = split(path);
        if let Some(directory) = self.directory(parents) {
            directory.remove(name);
        }
    }

    fn hide_below(&mut self, path: &str) {
        let names = path.split('/').filter(|name| !name.is_empty());
        if let Some(directory) = self.directory(names) {
            directory.clear();
        }
    }

    fn directory<'p>(
        &mut self,
        names: impl Iterator<Item = &'p str>,
    ) -> Option<&mut BTreeMap<String, Node>> {
        let mut directory = &mut self.root;
        for name in names {
            match directory.get_mut(name) {
                Some(Node::Directory(children)) => directory = children,
                _ => return None,
            }
        }
        Some(directory)
    }
}

fn split(path: &str) -> (impl Iterator<Item = &str>, &str) {
    let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
    (parents.split('/').filter(|name| !name.is_empty()), name)
}

fn collect(
    directory: &BTreeMap<String, Node>,
    prefix: &str,
    files: &mut Vec<(String, u64, ObjectId)>,
) {
    for (name, node) in directory {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}/{name}") };
        match node {
            Node::Directory(children) => collect(children, &path, files),
            Node::File { size, object } => files.push((path, *size, *object)),
            Node::Symlink(_) => {}
        }
    }
}

fn error(path: &str, why: String) -> TreeError {
    TreeError { path: path.to_owned(), why }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
