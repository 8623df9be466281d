//! `include` and `exclude`: which files of an image a volume shows.
//!
//! Patterns are written as in `.gitignore`, as far as files of models need it: one without a
//! slash means a name at any depth, one with a slash is looked at from the volume's root, and
//! one that fits a folder means all that is in it. `*` and `?` stop at a slash, `**` does not.

use std::fmt;
use std::path::Path;

use carport_image::Digest;
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde::{Deserialize, Serialize};

use crate::mount::ImagePath;

/// More than this is no choice of files any more.
const MAX_PATTERNS: usize = 64;
const MAX_PATTERN_BYTES: usize = 256;

/// The patterns of one volume.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "Written")]
pub struct Filter {
    written: Written,
    // Compiled from it.
    include: GlobSet,
    exclude: GlobSet,
}

/// As the user wrote them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Written {
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    include: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    exclude: Vec<String>,
}

impl PartialEq for Filter {
    fn eq(&self, other: &Self) -> bool {
        self.written == other.written
    }
}

impl Eq for Filter {}

impl fmt::Debug for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.written.fmt(f)
    }
}

impl Filter {
    /// Reads lists of patterns, separated by commas; `None` where there is no pattern.
    ///
    /// # Errors
    ///
    /// The attribute, and what is wrong with it.
    pub fn parse(
        include: Option<&str>,
        exclude: Option<&str>,
    ) -> Result<Option<Self>, (&'static str, String)> {
        let list = |text: Option<&str>| -> Vec<String> {
            let parts = text.unwrap_or_default().split(',').map(str::trim);
            parts.filter(|part| !part.is_empty()).map(str::to_owned).collect()
        };
        let written = Written { include: list(include), exclude: list(exclude) };
        if written.include.is_empty() && written.exclude.is_empty() {
            return Ok(None);
        }
        Self::new(written).map(Some)
    }

    fn new(written: Written) -> Result<Self, (&'static str, String)> {
        let set = |name, patterns: &[String]| compile(patterns).map_err(|why| (name, why));
        Ok(Self {
            include: set("include", &written.include)?,
            exclude: set("exclude", &written.exclude)?,
            written,
        })
    }

    /// Whether a file at `path`, from the volume's root, is shown.
    pub(crate) fn shows(&self, path: &Path) -> bool {
        // Nothing said is everything.
        let included = self.written.include.is_empty() || takes(&self.include, path);
        included && !takes(&self.exclude, path)
    }

    /// The same for the same choice of files of `path`, and no other.
    pub(crate) fn name(&self, path: Option<&ImagePath>) -> Digest {
        // No pattern or path has a NUL, so no two choices run together into one text.
        let path = path.map(ToString::to_string).unwrap_or_default();
        let text = [path, self.written.include.join("\0"), self.written.exclude.join("\0")];
        Digest::of(text.join("\0\0").as_bytes())
    }
}

/// Whether a pattern fits the path or a folder that it is in.
fn takes(set: &GlobSet, path: &Path) -> bool {
    path.ancestors().any(|part| !part.as_os_str().is_empty() && set.is_match(part))
}

fn compile(patterns: &[String]) -> Result<GlobSet, String> {
    if patterns.len() > MAX_PATTERNS {
        return Err(format!("has more than {MAX_PATTERNS} patterns"));
    }
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        if pattern.len() > MAX_PATTERN_BYTES || pattern.contains('\0') {
            return Err(format!("has a pattern of more than {MAX_PATTERN_BYTES} bytes"));
        }
        let anchored = pattern.trim_end_matches('/');
        let full = match anchored.strip_prefix('/') {
            Some(rest) => rest.to_owned(),
            None if anchored.contains('/') => anchored.to_owned(),
            None => format!("**/{anchored}"),
        };
        let glob = GlobBuilder::new(&full)
            .literal_separator(true)
            .build()
            .map_err(|error| format!("{pattern:?} is no pattern: {}", error.kind()))?;
        set.add(glob);
    }
    set.build().map_err(|error| error.to_string())
}

impl TryFrom<Written> for Filter {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        Self::new(written).map_err(|(name, why)| format!("{name}: {why}"))
    }
}

impl From<Filter> for Written {
    fn from(filter: Filter) -> Self {
        filter.written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(include: &str, exclude: &str) -> Vec<&'static str> {
        let filter = Filter::parse(Some(include), Some(exclude)).unwrap().unwrap();
        let files = [
            "config.json",
            "model-1.safetensors",
            "original/params.json",
            "original/deep/consolidated.pth",
            "tokenizer/vocab.json",
        ];
        files.into_iter().filter(|file| filter.shows(Path::new(file))).collect()
    }

    #[test]
    fn a_name_is_meant_at_any_depth_and_a_path_from_the_root() {
        assert_eq!(shown("*.safetensors, config.json", ""), ["config.json", "model-1.safetensors"]);
        assert_eq!(shown("vocab.json", ""), ["tokenizer/vocab.json"]);
        assert_eq!(shown("/*.json", ""), ["config.json"]);
        assert_eq!(shown("original/*.json", ""), ["original/params.json"]);
        assert_eq!(shown("**/*.pth", ""), ["original/deep/consolidated.pth"]);
        assert_eq!(shown("/vocab.json", ""), [""; 0]);
    }

    #[test]
    fn a_folder_means_all_in_it_and_what_is_excluded_is_not_shown() {
        let rest = ["config.json", "model-1.safetensors", "tokenizer/vocab.json"];
        assert_eq!(shown("", "original"), rest);
        assert_eq!(shown("", "original/"), rest);
        assert_eq!(shown("original", "*.pth"), ["original/params.json"]);
        assert_eq!(shown("*.json", "tokenizer,original"), ["config.json"]);
    }

    #[test]
    fn wrong_patterns_are_named() {
        assert_eq!(Filter::parse(None, Some(" , ")), Ok(None));
        let (name, why) = Filter::parse(Some("a"), Some("[")).unwrap_err();
        assert_eq!(name, "exclude");
        assert!(why.starts_with(r#""[" is no pattern: "#), "{why}");
        let many = vec!["a"; 65].join(",");
        assert_eq!(Filter::parse(Some(&many), None).unwrap_err().1, "has more than 64 patterns");
        assert!(Filter::parse(Some(&"a".repeat(257)), None).is_err());
    }

    #[test]
    fn a_choice_has_a_name_of_its_own_and_survives_the_disk() {
        let filter = |include, exclude| Filter::parse(include, exclude).unwrap().unwrap();
        let path = ImagePath::parse("/models").unwrap();
        let one = filter(Some("a,b"), None);
        assert_eq!(one.name(None), filter(Some("a, b"), Some("")).name(None));
        let others = [
            one.name(path.as_ref()),
            filter(Some("a"), Some("b")).name(None),
            filter(None, Some("a,b")).name(None),
            filter(Some("a"), None).name(None),
        ];
        assert!(others.iter().all(|other| *other != one.name(None)));
        let text = serde_json::to_string(&one).unwrap();
        assert_eq!(text, r#"{"include":["a","b"]}"#);
        assert_eq!(serde_json::from_str::<Filter>(&text).unwrap(), one);
    }
}
