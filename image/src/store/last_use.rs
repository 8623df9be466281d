//! When an image was used last: the time of an empty file in the tree's folder.
//!
//! It is set when the tree is made, when a pull finds the image and when a volume of it goes; while
//! a volume shows it, it is in use. Nothing is synced: a time that a crash sets back costs an image its place in a
//! queue, and a touch must cost a publish nothing.

use std::time::SystemTime;

use rustix::fs::{CWD, Mode, OFlags, Timestamps, UTIME_NOW};

use super::Store;
use crate::digest::Digest;

/// In the tree's folder.
pub(super) const FILE: &str = "used";

impl Store {
    /// Notes that the image is used now. A cheap call that cannot fail; for an image that is not
    /// here it does nothing.
    pub fn touch(&self, image: &Digest) {
        let path = self.last_use_file(image);
        let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let touched =
            rustix::fs::openat(CWD, &path, flags, Mode::from_raw_mode(0o600)).and_then(|file| {
                rustix::fs::futimens(
                    &file,
                    &Timestamps { last_access: now, last_modification: now },
                )
            });
        // On a full or read-only disk the pod comes first.
        if let Err(error) = touched
            && error != rustix::io::Errno::NOENT
        {
            tracing::debug!(%image, %error, "cannot note an image's last use");
        }
    }

    /// When the image came, was last asked for, or a volume of it ended, whatever was last; `None`
    /// for an image that is not here, or that an earlier version has made and nobody used since.
    pub fn last_used(&self, image: &Digest) -> Option<SystemTime> {
        std::fs::symlink_metadata(self.last_use_file(image)).ok()?.modified().ok()
    }

    fn last_use_file(&self, image: &Digest) -> std::path::PathBuf {
        self.tree(image).join(FILE)
    }
}
