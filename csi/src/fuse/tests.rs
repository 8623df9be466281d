//! The file system without a kernel, beside what the folder's own file system says.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;
use rustix::fs::{Access, CWD, Mode, OFlags};
use walkdir::WalkDir;

use super::fs::{Fs, FsError};
use super::read::{MAX_READ, Progress};
use super::table::{Attributes, Kind, ROOT};

fn load(root: &Path) -> Fs {
    let root = rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
    Fs::load(root.unwrap()).unwrap()
}

/// As the adapter does it.
fn read(fs: &Fs, handle: u64, offset: u64, size: u32) -> Result<Bytes, FsError> {
    match fs.read(handle, offset, size)?.now().map_err(|_| FsError::Damaged)? {
        Progress::Ready(bytes) => Ok(bytes),
        Progress::Waiting(reading) => reading.wait().map_err(|_| FsError::Damaged),
        Progress::Missing(_) => Err(FsError::NotArrived),
    }
}

fn resolve<'a>(fs: &'a Fs, path: &Path) -> Result<&'a Attributes, FsError> {
    path.iter().try_fold(fs.attributes(ROOT)?, |at, name| fs.lookup(at.inode, name))
}

/// All of it, by listing folders in pieces of `step` entries.
fn listing(fs: &Fs, step: usize) -> BTreeMap<PathBuf, Attributes> {
    let mut all = BTreeMap::new();
    let mut folders = vec![(ROOT, PathBuf::new())];
    while let Some((inode, path)) = folders.pop() {
        let (mut offset, mut names) = (0, Vec::new());
        loop {
            let piece: Vec<_> = fs.entries(inode, offset).unwrap().take(step).collect();
            let Some(last) = piece.last() else { break };
            offset = last.next;
            names.extend(piece.iter().map(|entry| (entry.name.to_owned(), *entry.attributes)));
        }
        assert_eq!((names[0].0.to_str(), names[0].1.inode), (Some("."), inode));
        assert_eq!(names[1].0.to_str(), Some(".."));
        assert_eq!(names[1].1, *fs.lookup(inode, OsStr::new("..")).unwrap());
        for (name, attributes) in names.drain(2..) {
            let at = path.join(&name);
            if attributes.kind == Kind::Folder {
                folders.push((attributes.inode, at.clone()));
            }
            assert_eq!(all.insert(at, attributes), None, "no name comes twice");
        }
    }
    all
}

#[derive(Debug, Clone)]
enum Made {
    Folder,
    File {
        bytes: Vec<u8>,
        executable: bool,
    },
    Symlink(String),
    /// Another name of what was made before, if that is a file.
    HardLink(prop::sample::Index),
}

fn made() -> impl Strategy<Value = Made> {
    prop_oneof![
        Just(Made::Folder),
        (prop::collection::vec(any::<u8>(), 0..3000), any::<bool>())
            .prop_map(|(bytes, executable)| Made::File { bytes, executable }),
        "(/etc/passwd|\\.\\./\\.\\./[a-c]|[a-c]/[a-c])".prop_map(Made::Symlink),
        any::<prop::sample::Index>().prop_map(Made::HardLink),
    ]
}

fn path() -> impl Strategy<Value = PathBuf> {
    prop::collection::vec("[a-cé ]{1,2}", 1..4).prop_map(|names| names.iter().collect())
}

/// Makes what can be made; two wishes for one path are one wish.
fn make(root: &Path, wishes: &[(PathBuf, Made)]) {
    let mut files: Vec<PathBuf> = Vec::new();
    for (path, made) in wishes {
        let at = root.join(path);
        if at.symlink_metadata().is_ok() || fs::create_dir_all(at.parent().unwrap()).is_err() {
            continue;
        }
        // Below a symlink it would land outside.
        if !at.parent().unwrap().canonicalize().unwrap().starts_with(root) {
            continue;
        }
        match made {
            Made::Folder => fs::create_dir(&at).unwrap(),
            Made::File { bytes, executable } => {
                fs::write(&at, bytes).unwrap();
                let mode = if *executable { 0o555 } else { 0o444 };
                fs::set_permissions(&at, fs::Permissions::from_mode(mode)).unwrap();
                files.push(at);
            }
            Made::Symlink(text) => symlink(text, &at).unwrap(),
            Made::HardLink(index) if !files.is_empty() => {
                fs::hard_link(index.get(&files), &at).unwrap();
            }
            Made::HardLink(_) => {}
        }
    }
}

fn same_attributes(ours: &Attributes, theirs: &fs::Metadata) {
    let kind = match theirs.file_type() {
        kind if kind.is_dir() => Kind::Folder,
        kind if kind.is_symlink() => Kind::Link,
        _ => Kind::File,
    };
    assert_eq!(ours.kind, kind);
    assert_eq!(u32::from(ours.permissions), theirs.mode() & 0o777);
    assert_eq!((ours.size, ours.blocks), (theirs.size(), theirs.blocks()));
    assert_eq!((ours.uid, ours.gid), (theirs.uid(), theirs.gid()));
    assert_eq!(ours.modified, (theirs.mtime(), theirs.mtime_nsec() as u32));
    if kind != Kind::Folder || theirs.nlink() > 1 {
        assert_eq!(u64::from(ours.links), theirs.nlink());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    #[test]
    fn a_tree_is_as_the_folder_below_it(
        wishes in prop::collection::vec((path(), made()), 0..40),
        questions in prop::collection::vec((path(), 0u64..4000, 0u32..4000), 0..40),
        step in 1usize..5,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        make(&root, &wishes);
        let fs = load(&root);

        let ours = listing(&fs, step);
        let theirs: BTreeMap<PathBuf, fs::Metadata> = WalkDir::new(&root)
            .min_depth(1)
            .into_iter()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                let path = entry.path().strip_prefix(&root).unwrap().to_owned();
                (path, entry.path().symlink_metadata().unwrap())
            })
            .collect();
        prop_assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>());
        for (path, attributes) in &ours {
            same_attributes(attributes, &theirs[path]);
            prop_assert_eq!(resolve(&fs, path).unwrap(), attributes);
            let text = fs.link_text(attributes.inode);
            match attributes.kind {
                Kind::Link => {
                    let read = fs::read_link(root.join(path)).unwrap();
                    prop_assert_eq!(text.unwrap(), read.as_os_str());
                }
                Kind::File | Kind::Folder => prop_assert_eq!(text, Err(FsError::Invalid)),
            }
        }
        // Hard links are one inode, and other files are not.
        for (path, attributes) in &ours {
            for (other, others) in &ours {
                let below = |path: &Path| (theirs[path].dev(), theirs[path].ino());
                prop_assert_eq!(
                    attributes.inode == others.inode,
                    below(path) == below(other),
                    "{:?} {:?}", path, other
                );
            }
        }
        let bytes: BTreeMap<u64, u64> =
            theirs.values().filter(|m| m.is_file()).map(|m| (m.ino(), m.size())).collect();
        prop_assert_eq!(fs.statistics().bytes, bytes.values().sum::<u64>());

        for (path, offset, size) in &questions {
            let found = resolve(&fs, path);
            let Some(theirs) = theirs.get(path) else {
                let below_a_folder = path.ancestors().skip(1).all(|above| {
                    theirs.get(above).is_none_or(fs::Metadata::is_dir)
                });
                let error = if below_a_folder { FsError::NotFound } else { FsError::NotFolder };
                prop_assert_eq!(found, Err(error));
                continue;
            };
            let inode = found.unwrap().inode;
            let opened = fs.open(inode, false);
            if theirs.is_dir() {
                prop_assert_eq!(opened, Err(FsError::IsFolder));
            } else if theirs.is_symlink() {
                prop_assert_eq!(opened, Err(FsError::Invalid));
            } else {
                let handle = opened.unwrap();
                let mut expected = vec![0; *size as usize];
                let count = File::open(root.join(path)).unwrap();
                let count = count.read_at(&mut expected, *offset).unwrap();
                prop_assert_eq!(&read(&fs, handle, *offset, *size).unwrap()[..], &expected[..count]);
                fs.release(handle).unwrap();
                prop_assert_eq!(read(&fs, handle, 0, 1), Err(FsError::BadHandle));
            }
        }
    }
}

#[test]
fn nothing_can_be_changed() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "bytes").unwrap();
    let fs = load(dir.path());
    let file = fs.lookup(ROOT, OsStr::new("file")).unwrap().inode;
    assert_eq!(fs.open(file, true), Err(FsError::ReadOnly));
    assert_eq!(fs.open(ROOT, true), Err(FsError::ReadOnly));
    assert_eq!(fs.change::<()>(), Err(FsError::ReadOnly));
    assert_eq!(fs.access(file, Access::READ_OK | Access::WRITE_OK), Err(FsError::ReadOnly));
    assert_eq!(fs.access(file, Access::READ_OK), Ok(()));
    assert_eq!(fs.access(file, Access::EXEC_OK), Err(FsError::Denied));
    assert_eq!(fs.access(ROOT, Access::EXEC_OK), Ok(()));
    assert_eq!(FsError::ReadOnly.errno(), libc::EROFS);
}

#[test]
fn inodes_and_handles_that_never_were_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "bytes").unwrap();
    let fs = load(dir.path());
    for inode in [0, 3, u64::MAX] {
        assert_eq!(fs.attributes(inode), Err(FsError::Stale));
        assert_eq!(fs.lookup(inode, OsStr::new("a")), Err(FsError::Stale));
        assert_eq!(fs.open(inode, false), Err(FsError::Stale));
        assert!(matches!(fs.entries(inode, 0).map(Iterator::count), Err(FsError::Stale)));
    }
    assert_eq!(fs.release(7), Err(FsError::BadHandle));
    let handle = fs.open(2, false).unwrap();
    assert_eq!(read(&fs, handle, 0, MAX_READ as u32 + 1), Err(FsError::Invalid));
    assert_eq!(read(&fs, handle, u64::MAX, 9), Ok(Bytes::new()));
    assert_eq!(fs.entries(ROOT, u64::MAX).unwrap().count(), 0);
    assert!(matches!(fs.entries(2, 0).map(Iterator::count), Err(FsError::NotFolder)));
}

#[test]
fn a_stored_file_that_changed_is_no_bytes_instead_of_wrong_ones() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["shorter", "link", "gone", "cut"] {
        fs::write(dir.path().join(name), "bytes").unwrap();
    }
    let fs = load(dir.path());
    let open = |name: &str| fs.open(fs.lookup(ROOT, OsStr::new(name)).unwrap().inode, false);
    let cut = open("cut").unwrap();
    fs::write(dir.path().join("cut"), "by").unwrap();
    assert_eq!(read(&fs, cut, 0, 5), Err(FsError::Damaged));
    fs::write(dir.path().join("shorter"), "byte").unwrap();
    assert_eq!(open("shorter"), Err(FsError::Damaged));
    fs::remove_file(dir.path().join("gone")).unwrap();
    assert_eq!(open("gone"), Err(FsError::Damaged));
    // No way out of the tree, though the file behind the link has the right length.
    let outside = tempfile::NamedTempFile::new().unwrap();
    fs::write(outside.path(), "bytes").unwrap();
    fs::remove_file(dir.path().join("link")).unwrap();
    symlink(outside.path(), dir.path().join("link")).unwrap();
    assert_eq!(open("link"), Err(FsError::Damaged));
}

#[test]
fn buffers_are_used_again_and_never_show_old_bytes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a"), vec![7; MAX_READ]).unwrap();
    fs::write(dir.path().join("b"), "b").unwrap();
    let fs = load(dir.path());
    let open = |name: &str| fs.open(fs.lookup(ROOT, OsStr::new(name)).unwrap().inode, false);
    let (a, b) = (open("a").unwrap(), open("b").unwrap());
    let first = read(&fs, a, 0, MAX_READ as u32).unwrap();
    assert_eq!(first.len(), MAX_READ);
    let place = first.as_ptr();
    drop(first);
    let second = read(&fs, b, 0, MAX_READ as u32).unwrap();
    assert_eq!((&second[..], second.as_ptr()), (&b"b"[..], place));
}
