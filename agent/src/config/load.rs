//! From the file to a [`Config`], with errors that say where to look.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::Config;

/// A configuration or list is small; more than this is the wrong file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why there is no configuration. The message names file, line, field, and what to write.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read {}: {source}; name another file with --config, or make this one readable", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no configuration.
    #[error("{place}: {field}{message}")]
    Invalid {
        /// `file:line:column`.
        place: String,
        /// `pull.attempts: `, or empty where the file itself is wrong.
        field: String,
        /// What is wrong, and what to write.
        message: String,
    },
    /// Values that do not go together.
    #[error("configuration: {0}")]
    Field(String),
}

impl ConfigError {
    /// A value that is wrong wherever it came from.
    pub fn field(field: &str, why: &str) -> Self {
        Self::Field(format!("{field}: {why}"))
    }
}

impl Config {
    /// Reads `file`; without one, the default file where it exists, else the defaults.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], naming file, line and field.
    pub fn load(file: Option<&Path>) -> Result<Self, ConfigError> {
        match file {
            Some(file) => parse(file, &read(file)?),
            None => match read(&super::default_file()) {
                Ok(text) => parse(&super::default_file(), &text),
                Err(ConfigError::Unreadable { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    Ok(Self::default())
                }
                Err(error) => Err(error),
            },
        }
    }
}

/// The text of a small file.
///
/// # Errors
///
/// [`ConfigError::Unreadable`], also for what is no regular file, is no text or is too large.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_path_buf(), source };
    let refuse = |why: &str| unreadable(std::io::Error::other(why.to_string()));
    let meta = std::fs::metadata(path).map_err(unreadable)?;
    if !meta.is_file() {
        return Err(refuse("not a regular file"));
    }
    if meta.len() > MAX_FILE_BYTES {
        return Err(refuse("larger than 1 MiB, which is no such file of ours"));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// Reads YAML of any of our kinds; `path` is for messages only.
///
/// An empty document is the kind's default, as an empty ConfigMap key should be.
///
/// # Errors
///
/// [`ConfigError::Invalid`], naming line and field.
pub fn parse<T: DeserializeOwned + Default>(path: &Path, text: &str) -> Result<T, ConfigError> {
    let only_comments = text.lines().all(|line| {
        let line = line.trim();
        line.is_empty() || line.starts_with('#') || line == "---"
    });
    if only_comments {
        return Ok(T::default());
    }
    let mut field = String::new();
    let result = serde_saphyr::with_deserializer_from_str(text, |from| {
        serde_path_to_error::deserialize(from).map_err(|error| {
            field = error.path().to_string();
            error.into_inner()
        })
    });
    result.map_err(|error| invalid(path, &field, &error))
}

/// Names what was probably meant, else all that is known.
fn unknown(field: &str, known: &[&str]) -> String {
    let field: String = field.chars().take(64).collect();
    let distance =
        |known: &&&str| strsim::damerau_levenshtein(&field.to_lowercase(), &known.to_lowercase());
    // A slip of the hand changes a letter or two; a word in between is another word.
    match known.iter().min_by_key(distance).filter(|nearest| distance(nearest) <= 2) {
        Some(nearest) => format!("unknown field `{field}`; did you mean `{nearest}`?"),
        None => format!("unknown field `{field}`; known are {}", known.join(", ")),
    }
}

fn invalid(path: &Path, field: &str, error: &serde_saphyr::Error) -> ConfigError {
    let place = match error.location() {
        Some(at) => format!("{}:{}:{}", path.display(), at.line(), at.column()),
        None => path.display().to_string(),
    };
    // Without the snippet: a log line is one line, and the place is named already.
    let formatter = serde_saphyr::UserMessageFormatter;
    let message = error.without_snippet().render_with_formatter(&formatter);
    let mut message = message.lines().next().unwrap_or_default().to_string();
    if let serde_saphyr::Error::SerdeUnknownField { field, expected, .. } = error.without_snippet()
    {
        message = unknown(field, expected);
    }
    // Errors in lists end in their place, which is named already.
    if let Some(at) = error.location() {
        let tail = format!(" at line {}, column {}", at.line(), at.column());
        message.truncate(message.strip_suffix(&tail).unwrap_or(&message).len());
    }
    let field = match field {
        "" | "." | "?" => String::new(),
        field => format!("{field}: "),
    };
    ConfigError::Invalid { place, field, message }
}
