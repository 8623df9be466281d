//! A copy of the shared library for one test.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::scenario::Scenario;

const LIBRARY: &str = "libfake_nvml.so";

/// A private copy of the library, with its scenario beside it, in a folder that
/// goes away with this value.
///
/// A copy that is still loaded may be dropped: the mapping stays.
///
/// Every function panics with what was missing: this is for tests.
#[derive(Debug)]
pub struct FakeNvml {
    folder: TempDir,
}

impl FakeNvml {
    /// Lays out a copy that plays `scenario`.
    pub fn new(scenario: &Scenario) -> Self {
        Self::without_symbols(scenario, &[])
    }

    /// The same, with these functions missing, as in an older driver's library.
    pub fn without_symbols(scenario: &Scenario, missing: &[&str]) -> Self {
        let fake = Self::not_yet_there();
        fake.appear(scenario, missing);
        fake
    }

    /// A path at which there is no library until [`FakeNvml::appear`].
    pub fn not_yet_there() -> Self {
        Self { folder: tempfile::tempdir().expect("a folder for the fake NVML") }
    }

    /// Puts the library at its path: a driver has been installed.
    pub fn appear(&self, scenario: &Scenario, missing: &[&str]) {
        let built = built_library();
        let mut image = fs::read(&built)
            .unwrap_or_else(|error| panic!("read the fake NVML at {}: {error}", built.display()));
        for symbol in missing {
            rename_symbol(&mut image, symbol);
        }
        self.set(scenario);
        // By rename, so that nobody loads half of it.
        let part = self.folder.path().join("part");
        fs::write(&part, image).expect("write the copy of the fake NVML");
        fs::rename(&part, self.library()).expect("name the copy of the fake NVML");
        // The loader takes two files with one inode number for one library, and a copy may be
        // loaded for longer than its folder lasts: kept open, its number goes to no other.
        let kept = fs::File::open(self.library()).expect("open the copy of the fake NVML");
        std::mem::forget(kept);
    }

    /// Changes the scenario; the next look at the GPUs sees it.
    pub fn set(&self, scenario: &Scenario) {
        let part = self.folder.path().join("scenario.part");
        let json = serde_json::to_vec_pretty(scenario).expect("a scenario is JSON");
        fs::write(&part, json).expect("write the scenario");
        fs::rename(&part, self.scenario()).expect("name the scenario");
    }

    /// The path to load.
    pub fn library(&self) -> PathBuf {
        self.folder.path().join(LIBRARY)
    }

    /// The scenario's file; any process may replace it, by rename.
    pub fn scenario(&self) -> PathBuf {
        scenario_beside(&self.library())
    }
}

/// The scenario that belongs to the library at `path`.
pub(crate) fn scenario_beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".json");
    PathBuf::from(name)
}

/// Where cargo put the shared library: beside the test (`target/debug/deps`), or
/// one above, where `cargo build -p fake-nvml` and `cargo test` leave it.
fn built_library() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(LIBRARY))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!("no {LIBRARY} near {}: run `cargo build -p fake-nvml`", test.display())
        })
}

/// Makes the loader miss `symbol`: its name in the string table loses its first
/// letter's meaning, so that a search by the right name compares unequal.
fn rename_symbol(image: &mut [u8], symbol: &str) {
    let entry = [b"\0", symbol.as_bytes(), b"\0"].concat();
    let mut found = false;
    for at in 0..image.len().saturating_sub(entry.len()) {
        if image[at..].starts_with(&entry) {
            image[at + 1] = b'X';
            found = true;
        }
    }
    assert!(found, "the fake NVML exports no {symbol}");
}
