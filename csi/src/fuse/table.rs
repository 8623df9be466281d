//! The inode table: what a tree of the store holds, read in one walk.
//!
//! A tree never changes, so neither does the table: an inode number stays good for
//! as long as the session, nothing is ever forgotten or looked up again. The walk
//! goes beneath the tree's root and through no symbolic link; links of the image are
//! text here, which only their reader resolves.
//!
//! Names of one file (hard links in the tree) are one inode, so that the kernel
//! caches its pages once.
//!
//! Of an image that arrives there is no such tree yet: then the table is made of what its layers
//! say, and its files are the same in all that a reader can tell but for inode numbers.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use carport_image::pull::{Arriving, ArrivingFile};
use carport_image::{ObjectId, tree};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};

/// Number of the root folder, as FUSE has it.
pub(super) const ROOT: u64 = 1;

/// An image of more entries takes a gigabyte of table; none that is known comes near.
const MAX_NODES: usize = 4_000_000;

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    File,
    Link,
}

/// What `stat` tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) inode: u64,
    pub(super) kind: Kind,
    /// Permission bits; set-user-id and its like are not among them.
    pub(super) permissions: u16,
    /// Bytes.
    pub(super) size: u64,
    /// Of 512 bytes, on the disk below.
    pub(super) blocks: u64,
    /// Names in this tree; of a folder as usual two and one for each folder in it.
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds of the last change of content; all times are this one.
    pub(super) modified: (i64, u32),
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) attributes: Attributes,
    pub(super) content: Content,
}

#[derive(Debug)]
pub(super) enum Content {
    /// Its parent, and its children sorted by name.
    Folder {
        parent: u64,
        children: Vec<Child>,
    },
    File(Place),
    /// The text of the link.
    Link(Box<OsStr>),
}

/// Where a file's bytes are.
#[derive(Debug)]
pub(super) enum Place {
    /// Beneath the root.
    Stored(Box<Path>),
    /// Of this path in the image, and still on their way.
    Arriving(Box<Path>, ArrivingFile),
    /// Nowhere: it has none.
    Empty,
}

#[derive(Debug)]
pub(super) struct Child {
    pub(super) name: Box<OsStr>,
    pub(super) inode: u64,
}

/// All inodes of a tree.
#[derive(Debug)]
pub(super) struct Table {
    /// Inode `n` is at `n - 1`.
    nodes: Vec<Node>,
    bytes: u64,
}

impl Table {
    /// Reads the tree whose root folder `root` is. Blocks.
    ///
    /// # Errors
    ///
    /// With the path that could not be read.
    pub(super) fn load(root: BorrowedFd<'_>) -> Result<Self, (PathBuf, io::Error)> {
        Walk { root, table: Self { nodes: Vec::new(), bytes: 0 }, files: HashMap::new() }.all()
    }

    /// The table of what an image has in the folder `path`. Stored files are named by their path below
    /// the store's `objects`.
    ///
    /// # Errors
    ///
    /// When there is no such folder.
    pub(super) fn arriving(
        image: &Arriving,
        path: Option<&Path>,
    ) -> Result<Self, (PathBuf, io::Error)> {
        let mut folder = image.tree().root();
        for name in path.into_iter().flatten() {
            match name.to_str().and_then(|name| folder.get(name)) {
                Some(tree::Node::Directory(children)) => folder = children,
                _ => {
                    let error = io::Error::from(io::ErrorKind::NotADirectory);
                    return Err((path.unwrap_or(Path::new("")).to_owned(), error));
                }
            }
        }
        let mut made =
            Making { image, table: Self { nodes: Vec::new(), bytes: 0 }, files: HashMap::new() };
        match made.all(folder) {
            Ok(()) => Ok(made.table),
            Err(error) => Err((PathBuf::from("."), error)),
        }
    }

    pub(super) fn get(&self, inode: u64) -> Option<&Node> {
        self.nodes.get(usize::try_from(inode.checked_sub(1)?).ok()?)
    }

    /// Number of inodes.
    pub(super) fn len(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// Sum of the sizes of all files.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    fn add(&mut self, stat: &Stat, kind: Kind, content: Content) -> io::Result<u64> {
        self.push(attributes(0, kind, stat), content)
    }

    /// Adds a node, whose inode number is given here.
    fn push(&mut self, mut attributes: Attributes, content: Content) -> io::Result<u64> {
        if self.nodes.len() == MAX_NODES {
            return Err(io::Error::other(format!("more than {MAX_NODES} entries")));
        }
        attributes.inode = self.nodes.len() as u64 + 1;
        let inode = attributes.inode;
        self.nodes.push(Node { attributes, content });
        Ok(inode)
    }

    fn attributes_mut(&mut self, inode: u64) -> Option<&mut Attributes> {
        let node = self.nodes.get_mut(usize::try_from(inode.checked_sub(1)?).ok()?)?;
        Some(&mut node.attributes)
    }

    fn fill(&mut self, folder: u64, children: Vec<Child>, folders: u32) {
        let node = usize::try_from(folder - 1).ok().and_then(|index| self.nodes.get_mut(index));
        if let Some(node) = node
            && let Content::Folder { children: empty, .. } = &mut node.content
        {
            *empty = children;
            node.attributes.links = 2 + folders;
        }
    }
}

struct Walk<'a> {
    root: BorrowedFd<'a>,
    table: Table,
    /// Files with more than one name, by device and inode number below.
    files: HashMap<(u64, u64), u64>,
}

impl Walk<'_> {
    fn all(mut self) -> Result<Table, (PathBuf, io::Error)> {
        let stat = rustix::fs::fstat(self.root).map_err(|e| (PathBuf::from("."), e.into()))?;
        let empty = Content::Folder { parent: ROOT, children: Vec::new() };
        let root = self
            .table
            .add(&stat, Kind::Folder, empty)
            .map_err(|error| (PathBuf::from("."), error))?;
        let mut folders = vec![(root, PathBuf::new())];
        while let Some((inode, path)) = folders.pop() {
            self.folder(inode, &path, &mut folders).map_err(|error| (path, error))?;
        }
        Ok(self.table)
    }

    fn folder(
        &mut self,
        inode: u64,
        path: &Path,
        folders: &mut Vec<(u64, PathBuf)>,
    ) -> io::Result<()> {
        let itself = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let folder = open_beneath(self.root, itself, OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&folder)? {
            let name = OsString::from_vec(entry?.file_name().to_bytes().to_vec());
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        let (mut children, mut subfolders) = (Vec::with_capacity(names.len()), 0);
        for name in names {
            let stat = rustix::fs::statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            let at = path.join(&name);
            let child = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    let content = Content::Folder { parent: inode, children: Vec::new() };
                    let child = self.table.add(&stat, Kind::Folder, content)?;
                    folders.push((child, at));
                    subfolders += 1;
                    child
                }
                FileType::RegularFile => self.file(&stat, at)?,
                FileType::Symlink => {
                    let text = rustix::fs::readlinkat(&folder, &name, Vec::new())?;
                    let text = OsStr::from_bytes(text.to_bytes()).into();
                    self.table.add(&stat, Kind::Link, Content::Link(text))?
                }
                // The store makes none.
                kind => return Err(io::Error::other(format!("{name:?} is a {kind:?}"))),
            };
            children.push(Child { name: name.into_boxed_os_str(), inode: child });
        }
        self.table.fill(inode, children, subfolders);
        Ok(())
    }

    fn file(&mut self, stat: &Stat, path: PathBuf) -> io::Result<u64> {
        let below = (stat.st_dev, stat.st_ino);
        if let Some(&known) = self.files.get(&below)
            && let Some(attributes) = self.table.attributes_mut(known)
        {
            attributes.links += 1;
            return Ok(known);
        }
        let content = Content::File(Place::Stored(path.into_boxed_path()));
        let inode = self.table.add(stat, Kind::File, content)?;
        self.table.bytes += size(stat);
        self.files.insert(below, inode);
        Ok(inode)
    }
}

/// Makes a table of what is told of a tree.
struct Making<'a> {
    image: &'a Arriving,
    table: Table,
    /// Inodes by object.
    files: HashMap<ObjectId, u64>,
}

impl Making<'_> {
    fn all(&mut self, root: &BTreeMap<String, tree::Node>) -> io::Result<()> {
        let folder = |parent| Content::Folder { parent, children: Vec::new() };
        let made = told(Kind::Folder, 0o755, 0);
        let root = (self.table.push(made, folder(ROOT))?, PathBuf::new(), root);
        let mut folders = vec![root];
        while let Some((inode, path, entries)) = folders.pop() {
            let (mut children, mut subfolders) = (Vec::with_capacity(entries.len()), 0);
            for (name, node) in entries {
                let at = path.join(name);
                let child = match node {
                    tree::Node::Directory(entries) => {
                        let child = self.table.push(made, folder(inode))?;
                        folders.push((child, at, entries));
                        subfolders += 1;
                        child
                    }
                    tree::Node::File { size, object } => self.file(*size, *object, at)?,
                    tree::Node::Symlink(text) => {
                        let attributes = told(Kind::Link, 0o777, text.len() as u64);
                        self.table.push(attributes, Content::Link(OsStr::new(text).into()))?
                    }
                };
                children.push(Child { name: OsStr::new(name).into(), inode: child });
            }
            self.table.fill(inode, children, subfolders);
        }
        Ok(())
    }

    fn file(&mut self, size: u64, object: ObjectId, path: PathBuf) -> io::Result<u64> {
        if let Some(&known) = self.files.get(&object)
            && let Some(attributes) = self.table.attributes_mut(known)
        {
            attributes.links += 1;
            return Ok(known);
        }
        let place = match self.image.file(&object) {
            Some(file) => Place::Arriving(path.into_boxed_path(), file.clone()),
            None if size == 0 => Place::Empty,
            None => Place::Stored(object.path().into_boxed_path()),
        };
        let permissions = if object.executable() { 0o555 } else { 0o444 };
        let inode = self.table.push(told(Kind::File, permissions, size), Content::File(place))?;
        self.table.bytes += size;
        self.files.insert(object, inode);
        Ok(inode)
    }
}

/// What the store will say of such a thing.
fn told(kind: Kind, permissions: u16, size: u64) -> Attributes {
    Attributes {
        inode: 0,
        kind,
        permissions,
        size,
        blocks: if kind == Kind::File { size.div_ceil(512) } else { 0 },
        links: 1,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        modified: (0, 0),
    }
}

/// Opens what is at `path`, for which no link is followed and `root` never left.
pub(super) fn open_beneath(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat2(
        root,
        path,
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | flags,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
    )
}

/// Bytes of a file.
pub(super) fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or_default()
}

fn attributes(inode: u64, kind: Kind, stat: &Stat) -> Attributes {
    Attributes {
        inode,
        kind,
        permissions: (stat.st_mode & 0o777) as u16,
        size: size(stat),
        blocks: u64::try_from(stat.st_blocks).unwrap_or_default(),
        links: 1,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modified: (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or_default()),
    }
}
