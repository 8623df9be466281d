//! Pre-pull by declaration: what a list names is brought to the node.
//!
//! ```text
//! list file ─► List ─► one task an entry ─► Puller
//!   ▲ directory watch, a look a minute       └ failed: again, later and later
//! ```
//!
//! The list is a YAML file, mostly a mounted ConfigMap:
//!
//! ```yaml
//! images:
//!   - image: registry.example/team/llama:v1
//!   - image: registry.example/team/embedder@sha256:…
//! ```
//!
//! # What always holds
//!
//! - **A bad list changes nothing.** The last good one stays in force, and logs and metrics say so.
//! - **The directory is watched, not the file**: a ConfigMap changes by the swap of a `..data` link,
//!   in which the file itself is never written. Contents are compared; a list that
//!   reads the same is no event.
//! - **What leaves the list stops being pulled** and stays in the store if it is there.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use carport_image::pull::{Priority, PullRequest};
use carport_image::{Puller, Reference};
use notify::{RecursiveMode, Watcher as _};
use serde::Deserialize;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::ConfigError;
use crate::config::load::{parse, read};
use crate::metrics::Metrics;

/// The file is looked at after so long, whatever the watch says.
const SAFETY_NET: Duration = Duration::from_secs(60);
/// A swap is several events; they are answered by one look.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// The first retry of an entry that failed; doubled each time up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(10);
/// An image that is pushed to a registry later is then found within so long.
const MAX_RETRY: Duration = Duration::from_secs(300);
/// More entries than a node could ever hold.
const MAX_ENTRIES: usize = 10_000;

/// What should be on the node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct List {
    /// The images, in the order in which they are asked for.
    #[serde(default)]
    pub images: Vec<Entry>,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// Where it comes from.
    pub image: Reference,
}

impl List {
    /// Reads a list; `path` is for messages only.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], naming line and field.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let list: Self = parse(path, text)?;
        if list.images.len() > MAX_ENTRIES {
            let why = format!("{} entries; list at most {MAX_ENTRIES}", list.images.len());
            return Err(ConfigError::field(&format!("{}: images", path.display()), &why));
        }
        Ok(list)
    }
}

/// Where an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EntryState {
    Pulling,
    Ready,
    Failed,
}

/// States of all entries; the tasks write, the metrics read.
#[derive(Clone)]
struct Board {
    entries: Arc<Mutex<BTreeMap<Reference, EntryState>>>,
    metrics: Arc<Metrics>,
}

impl Board {
    /// The list has a new entry.
    fn enter(&self, reference: &Reference) {
        self.edit(|entries| {
            entries.insert(reference.clone(), EntryState::Pulling);
        });
    }

    /// An entry has come further; one that has left the list meanwhile does not come back.
    fn set(&self, reference: &Reference, state: EntryState) {
        self.edit(|entries| {
            if let Some(entry) = entries.get_mut(reference) {
                *entry = state;
            }
        });
    }

    /// An entry has left the list.
    fn leave(&self, reference: &Reference) {
        self.edit(|entries| {
            entries.remove(reference);
        });
    }

    fn edit(&self, change: impl FnOnce(&mut BTreeMap<Reference, EntryState>)) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut entries);
        let count = |state| entries.values().filter(|other| **other == state).count();
        let (pulling, ready) = (count(EntryState::Pulling), count(EntryState::Ready));
        self.metrics.prepull.entries(pulling, ready, count(EntryState::Failed));
    }
}

/// Follows the list at `path` until `stop`, then ends all waits; the puller's own
/// shutdown ends the pulls.
pub async fn run(path: PathBuf, puller: Puller, metrics: Arc<Metrics>, stop: CancellationToken) {
    let changed = Arc::new(Notify::new());
    let _watcher = watch(&path, &changed);
    let board = Board { entries: Arc::default(), metrics: Arc::clone(&metrics) };
    let mut tasks = JoinSet::new();
    let mut running: BTreeMap<Reference, CancellationToken> = BTreeMap::new();
    let mut last_seen = None;
    loop {
        let content = content(&path).await;
        if last_seen.as_ref() != Some(&content) {
            match content
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|text| List::parse(&path, text).map_err(|error| error.to_string()))
            {
                Ok(list) => {
                    tracing::info!(list = %path.display(), entries = list.images.len(), "pre-pull list");
                    metrics.prepull.list_read(true);
                    follow(&list, &mut running, &mut tasks, &puller, &board);
                }
                Err(error) => {
                    let in_force = running.len();
                    tracing::error!(%error, in_force, "pre-pull list; the last good one stays in force");
                    metrics.prepull.list_read(false);
                }
            }
            last_seen = Some(content);
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = changed.notified() => tokio::time::sleep(DEBOUNCE).await,
            () = tokio::time::sleep(SAFETY_NET) => {}
            Some(_) = tasks.join_next() => {}
        }
    }
    running.values().for_each(CancellationToken::cancel);
    while tasks.join_next().await.is_some() {}
}

/// Makes the running entries those of `list`.
fn follow(
    list: &List,
    running: &mut BTreeMap<Reference, CancellationToken>,
    tasks: &mut JoinSet<()>,
    puller: &Puller,
    board: &Board,
) {
    let wanted: HashSet<&Reference> = list.images.iter().map(|entry| &entry.image).collect();
    running.retain(|reference, token| {
        let stays = wanted.contains(reference);
        if !stays {
            token.cancel();
            board.leave(reference);
        }
        stays
    });
    for Entry { image } in &list.images {
        if running.contains_key(image) {
            continue;
        }
        let token = CancellationToken::new();
        running.insert(image.clone(), token.clone());
        board.enter(image);
        let (image, puller, board) = (image.clone(), puller.clone(), board.clone());
        tasks.spawn(async move {
            // Dropping the pull gives up this wait; others may still want the image.
            token.run_until_cancelled(bring(&image, &puller, &board)).await;
        });
    }
}

/// Brings `image` here, however often it takes.
async fn bring(image: &Reference, puller: &Puller, board: &Board) {
    let mut retry = FIRST_RETRY;
    loop {
        let priority = Priority::Prefetch(0);
        let request = PullRequest { priority, ..PullRequest::new(image.clone()) };
        match puller.start(request).wait().await {
            Ok(_) => {
                board.set(image, EntryState::Ready);
                return;
            }
            Err(_) => {
                // Why, the puller has told.
                board.set(image, EntryState::Failed);
                tracing::info!(%image, retry_s = retry.as_secs(), "pre-pull again later");
            }
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(MAX_RETRY);
        board.set(image, EntryState::Pulling);
    }
}

/// The list's text, or why there is none.
async fn content(path: &Path) -> Result<String, String> {
    let path = path.to_path_buf();
    let text = tokio::task::spawn_blocking(move || read(&path)).await;
    match text {
        Ok(text) => text.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Calls `changed` when anything happens in the list's directory.
fn watch(path: &Path, changed: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let notified = Arc::clone(changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading opens and closes the file; that is no news.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            notified.notify_one();
        }
    });
    let directory = path.parent().unwrap_or(Path::new("/"));
    let watched = watcher.and_then(|mut watcher| {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    watched
        .inspect_err(|error| {
            tracing::warn!(
                directory = %directory.display(), %error,
                "cannot watch the pre-pull list; changes are seen within a minute"
            );
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<List, String> {
        List::parse(Path::new("/list.yaml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_is_images_in_order() {
        let list = list("images:\n- image: r:5000/b:1\n- image: oci:/models/a:1\n").unwrap();
        let names: Vec<String> = list.images.iter().map(|entry| entry.image.to_string()).collect();
        assert_eq!(names, ["r:5000/b:1", "oci:/models/a:1"]);
    }

    #[test]
    fn an_empty_list_is_a_list() {
        for text in ["", "# later\n", "images: []\n", "{}"] {
            assert_eq!(list(text).unwrap(), List::default(), "{text:?}");
        }
    }

    #[test]
    fn a_bad_list_names_line_and_field() {
        for (text, start, part) in [
            ("images:\n- imgae: r/a:1\n", "/list.yaml:2:3: ", "imgae"),
            ("images:\n- image: Not A Ref\n", "/list.yaml:2:10: images[0].image: ", "Not A Ref"),
            ("images:\n- {}\n", "/list.yaml:2:", "image"),
            ("image: r/a:1\n", "/list.yaml:1:1: ", "images"),
            ("images: [\n", "/list.yaml:", ""),
        ] {
            let error = list(text).unwrap_err();
            assert!(error.starts_with(start) && error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_list_of_absurd_length_is_refused() {
        let text = "images:\n".to_string() + &"- image: r:5000/a:1\n".repeat(MAX_ENTRIES + 1);
        let error = list(&text).unwrap_err();
        assert!(error.contains("10001 entries"), "{error}");
    }
}
