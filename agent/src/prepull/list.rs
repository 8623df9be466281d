//! The list as it is written: YAML in, checked entries out.
//!
//! Everything wrong is told with line and field; nothing of a bad list is used.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use carport_image::Reference;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use super::schedule::Window;
use super::when::When;
use crate::config::load::parse;
use crate::config::{ConfigError, Rate};

/// More entries than a node could ever hold.
const MAX_ENTRIES: usize = 4_096;
/// Windows of one entry; more are a program's output gone wrong.
const MAX_WINDOWS: usize = 64;
/// A name is shown in tables and answers.
const MAX_NAME_BYTES: usize = 253;

/// A tag is a promise for the day, seldom for the minute.
const DEFAULT_REFRESH: Duration = Duration::from_secs(3600);
/// Oftener than this is a load on the registry that no tag is worth.
const REFRESH_RANGE: std::ops::RangeInclusive<Duration> =
    Duration::from_secs(10)..=Duration::from_secs(30 * 86_400);
/// The longest time that a pin can be given; longer is `forever`.
const MAX_PIN: Duration = Duration::from_secs(3650 * 86_400);

/// What should be on the node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct List {
    /// How often a registry is asked what a tag means now.
    #[serde(deserialize_with = "refresh")]
    pub refresh: Duration,
    /// What all prefetches of this node together may take of the network. Absent: as configured.
    pub bandwidth: Option<Rate>,
    /// The images; of the same priority the first goes first.
    pub images: Vec<Entry>,
}

impl Default for List {
    fn default() -> Self {
        Self { refresh: DEFAULT_REFRESH, bandwidth: None, images: Vec::new() }
    }
}

/// One image.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entry {
    /// Where it comes from.
    pub image: Reference,
    /// What people call it.
    #[serde(default, deserialize_with = "name")]
    pub name: Option<String>,
    /// Where it is to be.
    #[serde(default)]
    pub target: Target,
    /// Higher goes first.
    #[serde(default)]
    pub priority: i32,
    /// Whether it is kept when room is needed.
    #[serde(default, deserialize_with = "pin")]
    pub pin: Option<Pin>,
    /// On which nodes. Absent: on all.
    #[serde(default)]
    pub when: When,
    /// At which times. Empty: at any.
    #[serde(default)]
    pub schedule: Vec<Window>,
    /// Whether its files are read into the page cache once they are here.
    #[serde(default)]
    pub warm_page_cache: bool,
}

/// Where on the node an image is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// In the agent's store, for volumes.
    #[default]
    Store,
    /// In the container runtime, for containers and image volumes.
    Runtime,
}

impl Target {
    /// One word, as the list and pages write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Runtime => "runtime",
        }
    }
}

/// For how long an image is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pin {
    /// While the list names it.
    Forever,
    /// For so long after it came to the node.
    For(Duration),
}

impl List {
    /// Reads a list; `path` is for messages only.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], naming line and field.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let list: Self = parse(path, text)?;
        let wrong = |field: &str, why: &str| {
            let (place, field) = (path.display().to_string(), format!("{field}: "));
            Err(ConfigError::Invalid { place, field, message: why.to_string() })
        };
        if list.images.len() > MAX_ENTRIES {
            let why = format!("{} entries; list at most {MAX_ENTRIES}", list.images.len());
            return wrong("images", &why);
        }
        let mut seen = HashSet::new();
        for (index, entry) in list.images.iter().enumerate() {
            if entry.schedule.len() > MAX_WINDOWS {
                let why = format!("{} windows; write at most {MAX_WINDOWS}", entry.schedule.len());
                return wrong(&format!("images[{index}].schedule"), &why);
            }
            if let Some((field, why)) = entry.unserved() {
                return wrong(&format!("images[{index}].{field}"), why);
            }
            // Two wishes about one image could contradict each other, and only one would count.
            if !seen.insert((&entry.image, entry.target)) {
                let why = format!("{} is listed twice; write one entry", entry.image);
                return wrong(&format!("images[{index}].image"), &why);
            }
        }
        Ok(list)
    }
}

impl Entry {
    /// Its name, else its reference.
    pub fn shown(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.image.to_string())
    }

    /// What an entry for the container runtime cannot wish: the field, and what to write.
    fn unserved(&self) -> Option<(&'static str, &'static str)> {
        if self.target != Target::Runtime {
            return None;
        }
        if self.image.registry().is_none() {
            return Some(("image", "the container runtime pulls from registries only"));
        }
        if let Some(Pin::For(_)) = self.pin {
            let why =
                "in the container runtime an image is kept forever or not at all; write forever";
            return Some(("pin", why));
        }
        self.warm_page_cache.then_some(("warmPageCache", "only images in the store can be warmed"))
    }
}

fn refresh<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(from)?;
    match humantime::parse_duration(&text) {
        Ok(length) if REFRESH_RANGE.contains(&length) => Ok(length),
        _ => Err(D::Error::custom(format!("{text:?}: write something from 10s to 30days"))),
    }
}

fn name<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control) {
        return Err(D::Error::custom(format!("write 1 to {MAX_NAME_BYTES} bytes on one line")));
    }
    Ok(Some(text))
}

fn pin<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Pin>, D::Error> {
    let text = String::deserialize(from)?;
    if text == "forever" {
        return Ok(Some(Pin::Forever));
    }
    match humantime::parse_duration(&text) {
        Ok(length) if !length.is_zero() && length <= MAX_PIN => Ok(Some(Pin::For(length))),
        _ => Err(D::Error::custom(format!(
            "{text:?}: write forever, or a length of time such as 24h"
        ))),
    }
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
        assert_eq!((list.refresh, list.bandwidth), (Duration::from_secs(3600), None));
    }

    #[test]
    fn an_entry_says_what_it_wants() {
        let text = "refresh: 10min\nbandwidth: 200MB/s\nimages:\n- image: r/a:1\n  name: llama\n  \
                    priority: -5\n  pin: 36h\n  warmPageCache: true\n  when: {labels: {pool: h100}, \
                    gpus: {count: 2, memory: 80GB}}\n  schedule: [{days: [sat], from: '22:00', \
                    to: '06:00'}]\n";
        let list = list(text).unwrap();
        assert_eq!(list.refresh, Duration::from_secs(600));
        assert_eq!(list.bandwidth.unwrap().bytes_per_second().get(), 200_000_000);
        let entry = &list.images[0];
        assert_eq!((entry.shown().as_str(), entry.priority), ("llama", -5));
        assert_eq!(entry.pin, Some(Pin::For(Duration::from_secs(36 * 3600))));
        assert!(entry.warm_page_cache && entry.schedule.len() == 1);
        assert_eq!(entry.when.labels["pool"], "h100");
    }

    #[test]
    fn an_image_may_be_wished_for_in_the_store_and_in_the_runtime() {
        let two = list("images: [{image: 'r/a:1'}, {image: 'r/a:1', target: runtime}]").unwrap();
        let targets: Vec<_> = two.images.iter().map(|entry| entry.target.as_str()).collect();
        assert_eq!(targets, ["store", "runtime"]);
        for (wish, part) in [
            ("image: 'oci:/m/a:1'", "images[0].image: the container runtime pulls"),
            ("image: 'r/a:1', pin: 24h", "images[0].pin: in the container runtime"),
            ("image: 'r/a:1', warmPageCache: true", "images[0].warmPageCache: only images in"),
        ] {
            let error = list(&format!("images: [{{{wish}, target: runtime}}]")).unwrap_err();
            assert!(error.contains(part), "{wish}: {error}");
        }
        let error = list("images: [{image: 'r/a:1', target: disk}]").unwrap_err();
        assert!(error.contains("target"), "{error}");
    }

    #[test]
    fn an_empty_list_is_a_list() {
        for text in ["", "# later\n", "images: []\n", "{}"] {
            assert_eq!(list(text).unwrap(), List::default(), "{text:?}");
        }
    }

    #[test]
    fn a_bad_list_names_line_and_field() {
        let image = "images:\n- image: r/a:1\n";
        for (text, start, part) in [
            ("images:\n- imgae: r/a:1\n", "/list.yaml:2:3: ", "did you mean `image`?"),
            ("images:\n- image: Not A Ref\n", "/list.yaml:2:10: images[0].image: ", "Not A Ref"),
            ("images:\n- {}\n", "/list.yaml:2:", "image"),
            ("image: r/a:1\n", "/list.yaml:1:1: ", "did you mean `images`?"),
            ("images: [\n", "/list.yaml:", ""),
            (&format!("{image}  pin: never\n"), "/list.yaml:3:8: images[0].pin: ", "forever"),
            (&format!("{image}  priority: high\n"), "/list.yaml:3:13: images[0].priority: ", ""),
            (&format!("{image}  zzz: 1\n"), "/list.yaml:3:3: ", "known are image, name, target"),
            (
                &format!("{image}- image: r/a:1\n"),
                "",
                "images[1].image: docker.io/r/a:1 is listed twice",
            ),
            ("refresh: 1s\n", "/list.yaml:1:10: refresh: ", "10s to 30days"),
            ("bandwidth: fast\n", "/list.yaml:1:12: bandwidth: ", "100MB/s"),
            (
                &format!("{image}  when: {{gpus: {{memroy: 80GB}}}}\n"),
                "/list.yaml:3:17: ",
                "did you mean `memory`?",
            ),
            (
                &format!("{image}  schedule: [{{from: '25:00', to: '06:00'}}]\n"),
                "/list.yaml:3:21: images[0].schedule[0].from: ",
                "22:30",
            ),
        ] {
            let error = list(text).unwrap_err();
            assert!(error.contains(start) && error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn a_list_of_absurd_length_is_refused() {
        let entries = (0..=MAX_ENTRIES).map(|n| format!("- image: r:5000/a:{n}\n"));
        let error = list(&format!("images:\n{}", entries.collect::<String>())).unwrap_err();
        assert!(error.contains("4097 entries"), "{error}");
    }
}
