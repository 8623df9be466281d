//! The kernel's list of mounts, `/proc/thread-self/mountinfo`.
//!
//! Of the *thread*, because a test's thread may live in a mount namespace of its
//! own. Parsed here as bytes: a path need not be UTF-8, one odd mount must not hide
//! the others, and white space and backslashes in paths are written in octal.
//!
//! ```text
//! 36 35 98:0 /root /target ro,nosuid shared:1 - ext4 /dev/sda rw
//! id parent dev root target options  tags     - type source   super options
//! ```
//!
//! <https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html>

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::{Device, MountPoint};

/// A line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// Unique among the mounts of all namespaces, until the mount is gone.
    pub(super) id: u64,
    /// The mount that it is mounted on.
    pub(super) parent: u64,
    pub(super) device: Device,
    pub(super) noexec: bool,
    /// Mounts below its master appear below it, too, but not the other way.
    pub(super) slave: bool,
    pub(super) point: MountPoint,
}

/// All mounts that this thread sees, in the order of mounting, and of those at one target the
/// topmost last.
pub(super) fn read() -> io::Result<Vec<Entry>> {
    Ok(parse(&std::fs::read("/proc/thread-self/mountinfo")?))
}

pub(super) fn parse(text: &[u8]) -> Vec<Entry> {
    let mut entries: Vec<Entry> =
        text.split(|&byte| byte == b'\n').filter_map(parse_line).collect();
    // What was mounted beneath another mount comes after it.
    let places: HashMap<u64, usize> =
        entries.iter().enumerate().map(|(at, entry)| (entry.id, at)).collect();
    let beneath: Vec<u64> = entries
        .iter()
        .enumerate()
        .filter(|(at, entry)| places.get(&entry.parent).is_some_and(|place| place > at))
        .map(|(_, entry)| entry.parent)
        .collect();
    for id in beneath {
        let Some(place) = entries.iter().position(|entry| entry.id == id) else { continue };
        let target = &entries[place].point.target;
        let on_it = |entry: &Entry| entry.parent == id && entry.point.target == *target;
        if let Some(top) = entries[..place].iter().position(on_it) {
            entries[top..=place].rotate_right(1);
        }
    }
    entries
}

/// `None` for a line of another form, which no kernel has written so far.
fn parse_line(line: &[u8]) -> Option<Entry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let mut text = || str::from_utf8(fields.next()?).ok();
    let (id, parent) = (text()?.parse().ok()?, text()?.parse().ok()?);
    let (major, minor) = text()?.split_once(':')?;
    let device = Device { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let root = path(fields.next()?);
    let target = path(fields.next()?);
    let options = fields.next()?;
    let has = |wanted: &[u8]| options.split(|&byte| byte == b',').any(|option| option == wanted);
    // Any number of tags, then a dash.
    let (mut shared, mut slave) = (false, false);
    fields.by_ref().take_while(|&field| field != b"-").for_each(|tag| {
        shared |= tag.starts_with(b"shared:");
        slave |= tag.starts_with(b"master:");
    });
    let fs_type = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    let point = MountPoint { target, root, fs_type, read_only: has(b"ro"), shared };
    Some(Entry { id, parent, device, noexec: has(b"noexec"), slave, point })
}

fn path(field: &[u8]) -> PathBuf {
    OsString::from_vec(unescape(field)).into()
}

/// Undoes `\040` and its like; anything else stays as it is.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..] => {
                bytes.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = tail;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn lines_with_and_without_tags_are_read() {
        let text = b"24 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
            30 24 254:0 /trees/a/rootfs /pods/1/mount ro,nosuid shared:1 master:2 - ext4 /dev/vda rw\n\
            31 24 0:50 / /fuse rw,ro2,noexec - fuse.carport carport rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(
            mounts[1],
            Entry {
                id: 30,
                parent: 24,
                device: Device { major: 254, minor: 0 },
                noexec: false,
                slave: true,
                point: MountPoint {
                    target: "/pods/1/mount".into(),
                    root: "/trees/a/rootfs".into(),
                    fs_type: "ext4".into(),
                    read_only: true,
                    shared: true,
                },
            }
        );
        assert!(!mounts[0].point.shared && !mounts[2].point.shared);
        assert!(!mounts[0].point.read_only && !mounts[2].point.read_only);
        assert_eq!(mounts[2].point.fs_type, "fuse.carport");
        assert!(mounts[2].noexec && !mounts[2].slave);
    }

    #[test]
    fn what_was_mounted_beneath_is_listed_beneath() {
        let text = b"24 1 254:0 / / rw - ext4 /dev/vda rw\n\
            31 40 0:50 / /pod ro - fuse.carport carport rw\n\
            35 24 0:51 / /other rw - tmpfs none rw\n\
            40 44 254:0 /trees/a/rootfs /pod ro - ext4 /dev/vda rw\n\
            44 24 254:0 /trees/b/rootfs /pod ro - ext4 /dev/vda rw\n";
        let ids: Vec<u64> = parse(text).iter().map(|mount| mount.id).collect();
        assert_eq!(ids, [24, 44, 40, 31, 35]);
    }

    #[test]
    fn octal_in_paths_is_undone() {
        let text = br"9 1 0:1 / /a\040b\011c\134d\012e\377 ro - tmpfs none rw";
        let mounts = parse(text);
        assert_eq!(mounts[0].point.target.as_os_str().as_encoded_bytes(), b"/a b\tc\\d\ne\xff");
        assert_eq!(unescape(br"\9\04\\040"), b"\\9\\04\\ ");
    }

    #[test]
    fn an_odd_line_hides_no_other() {
        let mounts = parse(b"\nnonsense\n1 2 3\n9 1 0:1 / /a ro - tmpfs none rw\n8 1 0:1 / /b ro");
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].point.target, PathBuf::from("/a"));
    }

    #[test]
    fn the_list_of_this_thread_has_a_root() {
        assert!(read().unwrap().iter().any(|mount| mount.point.target == Path::new("/")));
    }
}
