//! How much of each image is in the page cache, as far as the kernel tells.
//!
//! `cachestat(2)` (Linux 6.5) counts the cached pages of an open file without touching them. A look at
//! all images of a full node costs a second; so they are looked at in turn, a little at a time.

#![allow(unsafe_code, reason = "a raw system call that no crate wraps yet")]

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use carport_image::{Digest, Store};

/// The same number on all architectures.
const SYS_CACHESTAT: libc::c_long = 451;

/// For one turn: at one each [`TURN`], a thousandth of a core.
const BUDGET: Duration = Duration::from_millis(10);
/// From one turn to the next.
pub const TURN: Duration = Duration::from_secs(10);

/// What was last seen of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sample {
    /// Bytes of its files in the page cache.
    pub bytes: u64,
    /// When that was.
    pub at: SystemTime,
}

/// Looks at images in turn.
#[derive(Debug, Default)]
pub struct Sampler {
    samples: HashMap<Digest, Sample>,
    /// The next turn begins after this one.
    last: Option<Digest>,
    /// The kernel does not tell.
    mute: bool,
}

impl Sampler {
    /// Looks at some of `images`, in their order, and forgets all others. Blocking.
    pub fn turn(&mut self, store: &Store, images: &[Digest]) -> &HashMap<Digest, Sample> {
        self.samples.retain(|digest, _| images.binary_search(digest).is_ok());
        let begin = match self.last {
            Some(last) => images.partition_point(|digest| *digest <= last),
            None => 0,
        };
        let started = Instant::now();
        for digest in images[begin..].iter().chain(&images[..begin]) {
            if self.mute || started.elapsed() >= BUDGET {
                break;
            }
            match cached_bytes(&store.rootfs(digest)) {
                Ok(bytes) => {
                    self.samples.insert(*digest, Sample { bytes, at: SystemTime::now() });
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                    tracing::info!("this kernel does not tell what is in the page cache");
                    self.mute = true;
                }
                // Removed meanwhile, mostly.
                Err(error) => tracing::debug!(%digest, %error, "look at the page cache"),
            }
            self.last = Some(*digest);
        }
        &self.samples
    }
}

/// Bytes of the files below `root` that are in the page cache. Blocking.
fn cached_bytes(root: &Path) -> std::io::Result<u64> {
    let page = rustix::param::page_size() as u64;
    let mut pages = 0;
    for entry in walkdir::WalkDir::new(root) {
        let entry = entry?;
        if entry.file_type().is_file() {
            pages += cached_pages(&File::open(entry.path())?)?;
        }
    }
    Ok(pages * page)
}

/// `struct cachestat_range`.
#[repr(C)]
struct Range {
    offset: u64,
    length: u64,
}

/// `struct cachestat`.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Whether this kernel tells, or why it does not. Blocking.
///
/// # Errors
///
/// The kernel's: `ENOSYS` before Linux 6.5.
pub fn try_kernel() -> std::io::Result<()> {
    cached_pages(&File::open("/proc/self/exe")?).map(drop)
}

fn cached_pages(file: &File) -> std::io::Result<u64> {
    // A length of 0 is all to the end.
    let (range, mut stat) = (Range { offset: 0, length: 0 }, Stat::default());
    // SAFETY: the descriptor is open while `file` is borrowed; both structs are laid out as the kernel's,
    // live until the call returns, and the kernel writes to the second one only.
    let result = unsafe {
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0)
    };
    match result {
        0 => Ok(stat.cached),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_just_written_is_cached_as_a_whole() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let page = rustix::param::page_size() as u64;
        std::fs::write(dir.path().join("a"), vec![1; 3 * page as usize]).unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        std::fs::write(dir.path().join("b/c"), [1]).unwrap();
        match cached_bytes(dir.path()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                eprintln!("SKIPPED: this kernel has no cachestat");
            }
            bytes => assert_eq!(bytes.unwrap(), 4 * page),
        }
    }
}
