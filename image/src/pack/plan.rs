//! What goes into which layer.
//!
//! In comes a folder; out goes a [`Plan`]: its regular files in the order of
//! their names, grouped into layers. The grouping depends on names and sizes alone.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use walkdir::WalkDir;

use super::PackError;

/// Where KServe looks for a modelcar's files, below the image's root.
const ROOT: &str = "models";

/// Smaller files share a layer: a layer costs a request, a descriptor and a diff id.
const SMALL_BYTES: u64 = 1024 * 1024;

/// More layers than this no image gets. Docker's overlay driver ends at 128 and a
/// runtime adds a few of its own; there are models of 160 files and more.
pub const MAX_LAYERS: usize = 100;

/// A folder with more files is no model, and its manifest would not fit.
const MAX_FILES: usize = 100_000;

/// What the image will hold.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) layers: Vec<Arc<LayerPlan>>,
}

/// The files of one layer, in order.
#[derive(Debug)]
pub(super) struct LayerPlan {
    pub(super) files: Vec<FilePlan>,
}

/// A file as it was when the folder was read.
#[derive(Debug)]
pub(super) struct FilePlan {
    /// Where to read it.
    pub(super) source: PathBuf,
    /// Its name in the image: `models/config.json`.
    pub(super) name: String,
    pub(super) executable: bool,
    pub(super) state: FileState,
}

/// What changes when a file's content does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileState {
    pub(super) size: u64,
    inode: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileState {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.len(),
            inode: metadata.ino(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl LayerPlan {
    /// For the image's history.
    pub(super) fn description(&self) -> String {
        match self.files.as_slice() {
            [file] => file.name.clone(),
            files => format!("{} files in {ROOT}", files.len()),
        }
    }
}

/// Reads the folder. The image gets at most `max_layers` of it, two or more.
pub(super) fn scan(folder: &Path, max_layers: usize) -> Result<Plan, PackError> {
    let unfit = |path: &Path, why: &str| PackError::Unfit { path: path.into(), why: why.into() };
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| PackError::Io { path, source }
    };
    if !std::fs::metadata(folder).map_err(io(folder))?.is_dir() {
        return Err(unfit(folder, "no folder; give the folder that holds the model's files"));
    }
    let mut files = Vec::new();
    // The folder itself may be a symlink; what stands in it is looked at one by one.
    for entry in WalkDir::new(folder).follow_root_links(true).min_depth(1).sort_by_file_name() {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(folder).to_owned();
            PackError::Io { path, source: io::Error::from(error) }
        })?;
        let path = entry.path();
        if entry.file_type().is_dir() {
            continue;
        }
        let metadata = match std::fs::metadata(path) {
            Err(error) if entry.path_is_symlink() && error.kind() == io::ErrorKind::NotFound => {
                return Err(unfit(path, "a symlink to nothing; remove it or fetch what it names"));
            }
            other => other.map_err(io(path))?,
        };
        let kind = metadata.file_type();
        if !kind.is_file() {
            let what = match () {
                () if kind.is_dir() => "a symlink to a folder",
                () if kind.is_socket() => "a socket",
                () if kind.is_fifo() => "a FIFO",
                () => "a device",
            };
            return Err(unfit(path, &format!("{what} cannot be packed; remove it")));
        }
        let relative = path.strip_prefix(folder).unwrap_or(path);
        let name = relative.to_str().ok_or_else(|| unfit(path, "a name that is not UTF-8"))?;
        if name.chars().any(char::is_control) {
            return Err(unfit(path, "a control character in the name"));
        }
        if files.len() == MAX_FILES {
            return Err(unfit(folder, &format!("more than {MAX_FILES} files")));
        }
        files.push(FilePlan {
            source: path.to_owned(),
            name: format!("{ROOT}/{name}"),
            executable: metadata.mode() & 0o111 != 0,
            state: FileState::of(&metadata),
        });
    }
    if files.is_empty() {
        return Err(unfit(folder, "no file in it"));
    }
    // walkdir sorts within a folder; between `a/b` and `a-c` the full name decides.
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Plan { layers: group(files, max_layers) })
}

fn group(files: Vec<FilePlan>, max_layers: usize) -> Vec<Arc<LayerPlan>> {
    let (small, large): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|file| file.state.size < SMALL_BYTES);
    let mut layers = Vec::new();
    if !small.is_empty() {
        layers.push(small);
    }
    let each = large.len().div_ceil(max_layers.saturating_sub(layers.len()).max(1)).max(1);
    let mut large = large.into_iter().peekable();
    while large.peek().is_some() {
        layers.push(large.by_ref().take(each).collect());
    }
    layers.into_iter().map(|files| Arc::new(LayerPlan { files })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, size: u64) -> FilePlan {
        let state = FileState { size, inode: 0, modified: (0, 0), changed: (0, 0) };
        FilePlan { source: name.into(), name: name.into(), executable: false, state }
    }

    #[test]
    fn a_large_file_has_a_layer_and_small_ones_share_one() {
        let layers = group(
            vec![
                file("a", SMALL_BYTES),
                file("b", 1),
                file("c", SMALL_BYTES - 1),
                file("d", 1 << 40),
            ],
            MAX_LAYERS,
        );
        let names: Vec<Vec<&str>> =
            layers.iter().map(|l| l.files.iter().map(|f| f.name.as_str()).collect()).collect();
        assert_eq!(names, [vec!["b", "c"], vec!["a"], vec!["d"]]);
    }

    #[test]
    fn no_image_has_more_layers_than_a_runtime_takes() {
        for count in [99, 100, 101, 163, 1000] {
            let files = (0..count).map(|i| file(&format!("{i:04}"), SMALL_BYTES));
            let layers =
                group(std::iter::once(file("small", 1)).chain(files).collect(), MAX_LAYERS);
            assert!(layers.len() <= MAX_LAYERS, "{count} files in {} layers", layers.len());
            assert_eq!(layers.iter().map(|l| l.files.len()).sum::<usize>(), count + 1);
            assert!(count != 99 || layers.len() == 100);
        }
    }
}
