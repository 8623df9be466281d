//! Following a registry's redirects to its storage.
//!
//! On one host the HTTP library follows by itself. To another one the request is made anew, with
//! nothing but what it asks for: `Authorization` and the headers that `hosts.toml` adds stay behind,
//! since any of them may be a login.

use reqwest::header::LOCATION;
use reqwest::{RequestBuilder, Response, StatusCode, Url, redirect};

use super::Repository;
use super::answer::{Asked, authority, broken};
use crate::source::SourceError;

/// Registries redirect blobs to their storage, once as a rule.
const MAX_REDIRECTS: usize = 5;

const TOO_MANY: &str = "more than 5 in a row";

/// What the HTTP library may follow; what leads to another host it hands back.
pub(super) fn on_one_host() -> redirect::Policy {
    redirect::Policy::custom(|attempt| {
        let is_elsewhere =
            attempt.previous().last().is_some_and(|from| origin(from) != origin(attempt.url()));
        if attempt.previous().len() > MAX_REDIRECTS {
            attempt.error(TOO_MANY)
        } else if is_elsewhere {
            attempt.stop()
        } else {
            attempt.follow()
        }
    })
}

fn origin(url: &Url) -> (&str, Option<&str>, Option<u16>) {
    (url.scheme(), url.host_str(), url.port_or_known_default())
}

impl Repository {
    /// As [`Repository::send`], and after redirects to other hosts.
    pub(super) async fn get(
        &self,
        asked: &Asked,
        build: impl Fn() -> RequestBuilder,
    ) -> Result<Response, SourceError> {
        let mut response = self.send(asked, &build).await?;
        for _ in 0..MAX_REDIRECTS {
            let Some(target) = target(&response) else { return Ok(response) };
            if target.scheme() != "https" && !self.client.is_plain_http(&target) {
                let host = authority(&target);
                return Err(refused(
                    asked,
                    &format!(
                        "{host} is not spoken to over TLS; where that is meant, add it to \
                         registries.plainHttp (--plain-http)"
                    ),
                ));
            }
            let mut request = build().build().map_err(|error| broken(asked, error))?;
            *request.url_mut() = target;
            let sent = self.client.pulling().execute(request).await;
            response = sent.map_err(|error| broken(asked, error))?;
        }
        match target(&response) {
            Some(_) => Err(refused(asked, TOO_MANY)),
            None => Ok(response),
        }
    }
}

/// Where the answer says that the object is.
fn target(response: &Response) -> Option<Url> {
    let is_redirect = matches!(
        response.status(),
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    );
    let location = response.headers().get(LOCATION).filter(|_| is_redirect)?;
    let target = response.url().join(location.to_str().ok()?).ok()?;
    target.has_host().then_some(target)
}

fn refused(asked: &Asked, why: &str) -> SourceError {
    let Asked { object, host, .. } = asked;
    SourceError::Invalid(format!("{object}: redirect from {host} refused: {why}"))
}
