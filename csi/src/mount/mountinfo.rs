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

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use super::MountPoint;

/// All mounts that this thread sees, in the order of mounting.
pub(super) fn read() -> io::Result<Vec<MountPoint>> {
    Ok(parse(&std::fs::read("/proc/thread-self/mountinfo")?))
}

fn parse(text: &[u8]) -> Vec<MountPoint> {
    text.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// `None` for a line of another form, which no kernel has written so far.
fn parse_line(line: &[u8]) -> Option<MountPoint> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = path(fields.nth(3)?);
    let target = path(fields.next()?);
    let options = fields.next()?;
    let read_only = options.split(|&byte| byte == b',').any(|option| option == b"ro");
    // Any number of tags, then a dash.
    let mut shared = false;
    fields.by_ref().take_while(|&field| field != b"-").for_each(|tag| {
        shared |= tag.starts_with(b"shared:");
    });
    let fs_type = String::from_utf8_lossy(&unescape(fields.next()?)).into_owned();
    Some(MountPoint { target, root, fs_type, read_only, shared })
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
            31 24 0:50 / /fuse rw,ro2 - fuse.carport carport rw\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(
            mounts[1],
            MountPoint {
                target: "/pods/1/mount".into(),
                root: "/trees/a/rootfs".into(),
                fs_type: "ext4".into(),
                read_only: true,
                shared: true,
            }
        );
        assert!(!mounts[0].shared && !mounts[2].shared);
        assert!(!mounts[0].read_only && !mounts[2].read_only);
        assert_eq!(mounts[2].fs_type, "fuse.carport");
    }

    #[test]
    fn octal_in_paths_is_undone() {
        let text = br"9 1 0:1 / /a\040b\011c\134d\012e\377 ro - tmpfs none rw";
        let mounts = parse(text);
        assert_eq!(mounts[0].target.as_os_str().as_encoded_bytes(), b"/a b\tc\\d\ne\xff");
        assert_eq!(unescape(br"\9\04\\040"), b"\\9\\04\\ ");
    }

    #[test]
    fn an_odd_line_hides_no_other() {
        let mounts = parse(b"\nnonsense\n1 2 3\n9 1 0:1 / /a ro - tmpfs none rw\n8 1 0:1 / /b ro");
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].target, PathBuf::from("/a"));
    }

    #[test]
    fn the_list_of_this_thread_has_a_root() {
        assert!(read().unwrap().iter().any(|mount| mount.target == Path::new("/")));
    }
}
