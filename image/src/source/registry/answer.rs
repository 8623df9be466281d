//! What a registry's refusals mean.
//!
//! In comes a response that is no success, or a transport's error; out goes a
//! [`SourceError`] whose variant is what to do next and whose message names the
//! object, the host, the registry's own words, and what a person can do.
//!
//! Nothing secret passes: query strings of redirects (signatures) are cut off,
//! and of an error's body only the messages of the registry's own error format
//! are repeated, shortened and without control characters.

use std::error::Error as _;
use std::io;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;

use super::credentials::Origin;
use crate::source::SourceError;

/// Error bodies are read up to here and no further.
const MAX_ERROR_BYTES: usize = 16 * 1024;

/// Of a registry's own words, so many characters are repeated.
const MAX_DETAIL_CHARS: usize = 300;

/// No source can make us sleep longer than this.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// What was asked for, for messages.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// `manifest quay.io/team/model:v1`, `blob sha256:… of quay.io/team/model`.
    pub(super) object: String,
    /// The registry as a reference writes it: `quay.io`.
    pub(super) registry: String,
    /// The host that is asked: `registry-1.docker.io`, a token server.
    pub(super) host: String,
    /// Where the credentials stood that went with the request.
    pub(super) origin: Origin,
}

/// The error that a response stands for. Reads the body's beginning.
pub(super) async fn refused(asked: &Asked, response: Response) -> SourceError {
    let status = response.status();
    let retry_after = retry_after(response.headers(), SystemTime::now());
    let answered = authority(response.url());
    // A storage backend's errors may repeat the signed request: only the host that was
    // asked may speak.
    let detail = if answered == asked.host { detail(response).await } else { None };
    from_status(asked, &answered, status, retry_after, detail)
}

/// Reads a short body to its end, so that the connection can be used again.
pub(super) async fn drain(response: Response) {
    let _ = detail(response).await;
}

/// Maps a status to what the caller does next: the one place where that is decided.
fn from_status(
    asked: &Asked,
    answered: &str,
    status: StatusCode,
    retry_after: Option<Duration>,
    detail: Option<String>,
) -> SourceError {
    let Asked { object, registry, .. } = asked;
    let said = match detail {
        Some(detail) => format!("{answered} says {status}, {detail}"),
        None => format!("{answered} says {status}"),
    };
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => SourceError::NotFound(format!(
            "{object}: not found ({said}); check the name, and that it was pushed"
        )),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if answered != asked.host => {
            SourceError::Denied(format!("{object}: denied by the registry's storage ({said})"))
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            let advice = match &asked.origin {
                Origin::Nowhere => format!(
                    "add credentials for {registry} to docker's config.json or the pull secret, \
                     and check the name"
                ),
                Origin::PullSecret => {
                    format!("check the entry for {registry} in the pull secret, and its rights")
                }
                Origin::DockerConfig(path) => {
                    format!("check the entry for {registry} in {}, and its rights", path.display())
                }
            };
            SourceError::Denied(format!("{object}: denied ({said}); {advice}"))
        }
        StatusCode::TOO_MANY_REQUESTS => SourceError::Throttled {
            message: format!("{object}: too many requests ({said})"),
            retry_after,
        },
        StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => {
            SourceError::Throttled { message: format!("{object}: busy ({said})"), retry_after }
        }
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY => {
            SourceError::Unavailable(format!("{object}: {said}"))
        }
        status if status.is_server_error() => SourceError::Unavailable(format!("{object}: {said}")),
        StatusCode::RANGE_NOT_SATISFIABLE => SourceError::Invalid(format!(
            "{object}: {said}: it is shorter there than the manifest says"
        )),
        _ => SourceError::Invalid(format!("{object}: unexpected answer ({said})")),
    }
}

/// The error that a request or a body broke off with.
pub(super) fn broken(asked: &Asked, error: reqwest::Error) -> SourceError {
    // reqwest's text has the address, and the address may have a signature.
    let error = error.without_url();
    let host = &asked.host;
    let object = &asked.object;
    let causes = causes(&error);
    if error.is_redirect() {
        return SourceError::Invalid(format!("{object}: redirect from {host} refused: {causes}"));
    }
    if error.is_builder() {
        return SourceError::Invalid(format!("{object}: {causes}"));
    }
    if is_tls(&error) {
        return SourceError::Invalid(format!(
            "{object}: no TLS with {host}: {causes}; where {host} serves plain HTTP, add it to \
             registries.plainHttp (--plain-http); where its certificate is your own, add the CA to the system's"
        ));
    }
    SourceError::Unavailable(if error.is_connect() {
        format!("{object}: connect to {host}: {causes}")
    } else if error.is_timeout() {
        format!("{object}: {host} sent nothing for too long, or too little")
    } else {
        format!("{object}: connection to {host} broke off: {causes}")
    })
}

/// `host:port`, without a port that the scheme implies.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

/// rustls' errors travel as `InvalidData` inside of I/O errors; they get no better by trying again.
fn is_tls(error: &reqwest::Error) -> bool {
    let mut cause = error.source();
    while let Some(error) = cause {
        let mut io = error.downcast_ref::<io::Error>();
        while let Some(error) = io {
            if error.kind() == io::ErrorKind::InvalidData {
                return true;
            }
            // An I/O error's `source` passes over the error that it wraps.
            io = error.get_ref().and_then(|inner| inner.downcast_ref());
        }
        cause = error.source();
    }
    false
}

/// The innermost reasons, outermost first, each once.
fn causes(error: &reqwest::Error) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Wrappers often repeat what they wrap.
        texts.retain(|outer| !outer.contains(&text));
        texts.push(text);
        cause = error.source();
    }
    if texts.is_empty() { clean(&error.to_string()) } else { clean(&texts.join(": ")) }
}

fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// The messages of the distribution specification's error format, or nothing.
async fn detail(mut response: Response) -> Option<String> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        let room = MAX_ERROR_BYTES - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if body.len() == MAX_ERROR_BYTES {
            break;
        }
    }
    detail_of(&body)
}

fn detail_of(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Body {
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let texts: Vec<String> = body
        .errors
        .iter()
        .map(|item| match (item.code.as_str(), item.message.as_str()) {
            (code, "") => code.to_owned(),
            ("", message) => message.to_owned(),
            (code, message) => format!("{code}: {message}"),
        })
        .filter(|text| !text.is_empty())
        .collect();
    if texts.is_empty() { None } else { Some(clean(&texts.join("; "))) }
}

/// Debugging proxies repeat the header that they were sent: what follows its scheme is cut out
/// where it looks like a credential and not like a word.
fn without_credentials(text: &str) -> String {
    let mut after_scheme = false;
    let words = text.split(' ').map(|word| {
        let is_mixed = word.contains(|c: char| c.is_ascii_digit() || c.is_ascii_uppercase());
        let hidden = after_scheme && is_mixed && word.len() >= 4;
        let bare = word.trim_matches(|c: char| !c.is_ascii_alphanumeric());
        after_scheme = ["basic", "bearer"].iter().any(|scheme| {
            bare.len() >= scheme.len()
                && bare
                    .get(bare.len() - scheme.len()..)
                    .is_some_and(|w| w.eq_ignore_ascii_case(scheme))
        });
        if hidden { "…" } else { word }
    });
    words.collect::<Vec<_>>().join(" ")
}

/// What a peer says, fit for one line of a log.
fn clean(text: &str) -> String {
    let text = without_credentials(text);
    let mut clean: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_DETAIL_CHARS + 1)
        .collect();
    if clean.chars().count() > MAX_DETAIL_CHARS {
        clean.pop();
        clean.push('…');
    }
    clean.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(origin: Origin) -> Asked {
        Asked {
            object: "manifest quay.io/team/model:v1".into(),
            registry: "quay.io".into(),
            host: "quay.io".into(),
            origin,
        }
    }

    fn map(status: u16, retry_after: Option<u64>) -> SourceError {
        from_status(
            &asked(Origin::Nowhere),
            "quay.io",
            StatusCode::from_u16(status).unwrap(),
            retry_after.map(Duration::from_secs),
            None,
        )
    }

    #[test]
    fn a_credential_that_is_repeated_is_cut_out() {
        assert_eq!(
            clean("got Authorization: Basic dTpodW50ZXIy from you"),
            "got Authorization: Basic … from you"
        );
        assert_eq!(clean("\"bearer eyJhbGciOi.x\""), "\"bearer …");
        assert_eq!(clean("Bearer authentication required"), "Bearer authentication required");
    }

    #[test]
    fn each_status_says_what_to_do_next() {
        assert!(matches!(map(404, None), SourceError::NotFound(_)));
        assert!(matches!(map(401, None), SourceError::Denied(_)));
        assert!(matches!(map(403, None), SourceError::Denied(_)));
        assert!(matches!(map(416, None), SourceError::Invalid(_)));
        assert!(matches!(map(302, None), SourceError::Invalid(_)));
        assert!(matches!(map(400, None), SourceError::Invalid(_)));
        for status in [408, 500, 502, 503, 504] {
            assert!(matches!(map(status, None), SourceError::Unavailable(_)), "{status}");
        }
        for (status, after) in [(429, Some(7)), (429, None), (503, Some(7))] {
            let SourceError::Throttled { retry_after, .. } = map(status, after) else {
                panic!("{status}")
            };
            assert_eq!(retry_after, after.map(Duration::from_secs));
        }
    }

    #[test]
    fn a_denial_says_whose_credentials_to_look_at() {
        assert_eq!(
            map(401, None).to_string(),
            "manifest quay.io/team/model:v1: denied (quay.io says 401 Unauthorized); add \
             credentials for quay.io to docker's config.json or the pull secret, and check the name"
        );
        let error = from_status(
            &asked(Origin::PullSecret),
            "quay.io",
            StatusCode::FORBIDDEN,
            None,
            Some("DENIED: no".into()),
        );
        assert_eq!(
            error.to_string(),
            "manifest quay.io/team/model:v1: denied (quay.io says 403 Forbidden, DENIED: no); \
             check the entry for quay.io in the pull secret, and its rights"
        );
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_and_bounded() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let read = |text: &str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]);
            retry_after(&headers, now)
        };
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(read("Sun, 06 Nov 1994 08:50:37 GMT"), Some(Duration::from_secs(60)));
        assert_eq!(read("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("99999999999999"), Some(MAX_RETRY_AFTER));
        assert_eq!(read("soon"), None);
    }

    #[test]
    fn a_registrys_words_are_shortened_and_cleaned() {
        let body = br#"{"errors":[{"code":"DENIED","message":"no\u001b[31m\nway"},{"code":"X"}]}"#;
        assert_eq!(detail_of(body).unwrap(), "DENIED: no [31m way; X");
        assert_eq!(detail_of(b"<html>token=abc</html>"), None);
        let long = format!(r#"{{"errors":[{{"message":"{}"}}]}}"#, "é".repeat(10_000));
        assert_eq!(detail_of(long.as_bytes()).unwrap().chars().count(), MAX_DETAIL_CHARS + 1);
    }
}
