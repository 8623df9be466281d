//! Answering a registry's `WWW-Authenticate`: basic credentials and bearer tokens.
//!
//! ```text
//! 401 + challenge ─► credential (looked up once) ─► Basic header
//!                                               └─► token server ─► token, cached ─► Bearer header
//! ```
//!
//! A [`Session`] belongs to one source and knows what to send with the next
//! request. Tokens are shared between sources through [`Tokens`], under the
//! token server, scope *and* credential, so that nobody pulls with another's token.
//!
//! What always holds: one request for a token at a time per key (whoever comes
//! meanwhile waits for it); a token is asked for again when it has expired or
//! was refused, also in the middle of a pull; credentials go to a token server
//! over TLS only, unless its host is listed for plain HTTP, and never along a redirect.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Response, Url};
use serde::Deserialize;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::answer::{Asked, authority, broken, drain, refused};
use super::credentials::{self, Credential, Found, Origin, PullSecret};
use super::{RegistryClient, read_bounded};
use crate::digest::Digest;
use crate::source::SourceError;

/// Without `expires_in`, the token specification says a minute.
/// <https://distribution.github.io/distribution/spec/auth/token/>
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// A token is renewed this long before it expires, so that none is refused on its way;
/// one that lives shortly, in the last quarter of its life.
const EXPIRY_MARGIN: Duration = Duration::from_secs(10);

/// A token's lifetime is believed up to here.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// Tokens are a few kB.
const MAX_TOKEN_BYTES: usize = 256 * 1024;

/// Beyond so many, expired tokens are forgotten, and then all.
const MAX_TOKENS: usize = 1024;

/// What to send with the requests of one source.
pub(super) struct Session {
    /// The registry as references write it: what credentials are stored under.
    registry: String,
    repository: String,
    /// `repository:team/model:pull`.
    scope: String,
    secret: PullSecret,
    found: OnceCell<Found>,
    // Held for a clone or an assignment only.
    grant: Mutex<Option<Grant>>,
}

/// How the registry lets us in.
#[derive(Clone)]
pub(super) enum Grant {
    Basic(HeaderValue),
    Bearer { key: Arc<TokenKey>, slot: Slot },
}

/// Tokens by what they were asked with.
#[derive(Default)]
pub(super) struct Tokens {
    // Held for a look-up or an insertion only; fetching happens in the slot.
    slots: Mutex<HashMap<Arc<TokenKey>, Slot>>,
}

/// Filled by the first who needs it; others wait. Replaced, never refilled.
type Slot = Arc<OnceCell<Token>>;

#[derive(PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    realm: String,
    service: String,
    scope: String,
    credential: Digest,
}

pub(super) struct Token {
    header: HeaderValue,
    renew_at: Instant,
}

impl Session {
    /// `actions`: `pull`, or `pull,push`.
    pub(super) fn new(
        registry: &str,
        repository: &str,
        actions: &str,
        secret: &PullSecret,
    ) -> Self {
        Self {
            registry: registry.to_owned(),
            repository: repository.to_owned(),
            scope: format!("repository:{repository}:{actions}"),
            secret: secret.clone(),
            found: OnceCell::new(),
            grant: Mutex::new(None),
        }
    }

    /// What to send as `Authorization`, and what that rests on: give it back to
    /// [`Session::answer`] when it is refused. Nothing before the first challenge.
    pub(super) async fn authorization(
        &self,
        client: &RegistryClient,
    ) -> Result<Option<(HeaderValue, Grant)>, SourceError> {
        let grant = self.grant.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match grant {
            None => Ok(None),
            Some(Grant::Basic(header)) => Ok(Some((header.clone(), Grant::Basic(header)))),
            Some(Grant::Bearer { key, slot }) => {
                self.token(client, key, Some(slot)).await.map(Some)
            }
        }
    }

    /// Takes in a 401: what the next request sends answers its challenge.
    ///
    /// # Errors
    ///
    /// [`SourceError::Denied`] when there is nothing else to try.
    pub(super) async fn answer(
        &self,
        client: &RegistryClient,
        asked: &Asked,
        response: Response,
        sent: Option<Grant>,
    ) -> Result<(), SourceError> {
        let challenge = match challenge(response.headers()) {
            Ok(challenge) => challenge,
            Err(why) => {
                return Err(SourceError::Denied(format!(
                    "{}: {} asks to authenticate, but {why}",
                    asked.object, asked.host
                )));
            }
        };
        let found = self.found(client).await?;
        match (challenge, &found.credential) {
            (Challenge::Basic, Credential::Password { username, password })
                if !matches!(sent, Some(Grant::Basic(_))) =>
            {
                self.set(Grant::Basic(basic(username, password)?));
                drain(response).await;
                Ok(())
            }
            // No credentials, refused ones, or an identity token where a password is asked for.
            (Challenge::Basic, _) => {
                let asked = Asked { origin: found.origin.clone(), ..asked.clone() };
                Err(refused(&asked, response).await)
            }
            (Challenge::Bearer { realm, service }, credential) => {
                let key = Arc::new(TokenKey {
                    realm,
                    service,
                    scope: self.scope.clone(),
                    credential: credential.fingerprint(),
                });
                let stale = match sent {
                    Some(Grant::Bearer { key: sent, slot }) if sent == key => Some(slot),
                    _ => None,
                };
                drain(response).await;
                // The refused token is put aside even when it has not expired.
                let slot = client.tokens().fresh(&key, stale.as_ref());
                self.fill(client, key, slot).await?;
                Ok(())
            }
        }
    }

    /// Where the credentials stood that were sent so far.
    pub(super) fn origin(&self) -> Origin {
        self.found.get().map_or(Origin::Nowhere, |found| found.origin.clone())
    }

    /// Whether nothing was asked of us so far that only credentials can answer.
    pub(super) fn is_anonymous(&self) -> bool {
        self.found.get().is_none_or(|found| found.credential == Credential::Anonymous)
    }

    async fn found(&self, client: &RegistryClient) -> Result<&Found, SourceError> {
        let config = client.options().docker_config.clone();
        self.found
            .get_or_try_init(|| {
                credentials::find(&self.secret, config, &self.registry, &self.repository)
            })
            .await
    }

    /// The token in `slot`, or another when that has expired.
    async fn token(
        &self,
        client: &RegistryClient,
        key: Arc<TokenKey>,
        slot: Option<Slot>,
    ) -> Result<(HeaderValue, Grant), SourceError> {
        let expired =
            slot.filter(|slot| slot.get().is_none_or(|token| token.renew_at <= Instant::now()));
        let slot = client.tokens().fresh(&key, expired.as_ref());
        self.fill(client, key, slot).await
    }

    async fn fill(
        &self,
        client: &RegistryClient,
        key: Arc<TokenKey>,
        slot: Slot,
    ) -> Result<(HeaderValue, Grant), SourceError> {
        let found = self.found(client).await?;
        let token = slot.get_or_try_init(|| fetch(client, &key, found, &self.registry)).await?;
        let header = token.header.clone();
        let grant = Grant::Bearer { key, slot };
        self.set(grant.clone());
        Ok((header, grant))
    }

    fn set(&self, grant: Grant) {
        *self.grant.lock().unwrap_or_else(PoisonError::into_inner) = Some(grant);
    }
}

impl Tokens {
    /// The slot under `key`, or a new one where that is `stale`, expired, or not there.
    fn fresh(&self, key: &Arc<TokenKey>, stale: Option<&Slot>) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let usable = |slot: &Slot| slot.get().is_none_or(|token| token.renew_at > now);
        if let Some(slot) = slots.get(key)
            && usable(slot)
            && stale.is_none_or(|stale| !Arc::ptr_eq(slot, stale))
        {
            return slot.clone();
        }
        if slots.len() >= MAX_TOKENS {
            slots.retain(|_, slot| usable(slot));
        }
        if slots.len() >= MAX_TOKENS {
            slots.clear();
        }
        let slot = Slot::default();
        slots.insert(key.clone(), slot.clone());
        slot
    }
}

/// Asks the token server: GET with basic credentials, or the refresh-token grant by POST.
async fn fetch(
    client: &RegistryClient,
    key: &TokenKey,
    found: &Found,
    registry: &str,
) -> Result<Token, SourceError> {
    let mut url = Url::parse(&key.realm).map_err(|_| {
        SourceError::Invalid(format!("token for {registry}: the realm it names is no address"))
    })?;
    let asked = Asked {
        object: format!("token for {} of {registry}", key.scope),
        registry: registry.to_owned(),
        host: authority(&url),
        origin: found.origin.clone(),
    };
    if url.scheme() != "https" && !(url.scheme() == "http" && client.is_plain_http(&url)) {
        return Err(SourceError::Invalid(format!(
            "{}: the token server {} is not spoken to over TLS; where it serves plain HTTP, \
             add it to registries.plainHttp (--plain-http)",
            asked.object, asked.host
        )));
    }
    let request = match &found.credential {
        Credential::IdentityToken(token) => {
            let form = form(&[
                ("grant_type", "refresh_token"),
                ("service", &key.service),
                ("client_id", "carport"),
                ("scope", &key.scope),
                ("refresh_token", token),
            ]);
            let content = HeaderValue::from_static("application/x-www-form-urlencoded");
            client.plain().post(url).header(CONTENT_TYPE, content).body(form)
        }
        credential => {
            {
                let mut query = url.query_pairs_mut();
                if !key.service.is_empty() {
                    query.append_pair("service", &key.service);
                }
                query.append_pair("scope", &key.scope);
            }
            let request = client.plain().get(url);
            match credential {
                Credential::Password { username, password } => {
                    request.basic_auth(username, Some(password))
                }
                _ => request,
            }
        }
    };
    let request = request.timeout(client.options().connect_timeout + client.options().read_timeout);
    let asked_at = Instant::now();
    let response = request.send().await.map_err(|error| broken(&asked, error))?;
    if !response.status().is_success() {
        return Err(refused(&asked, response).await);
    }
    let body = read_bounded(&asked, response, MAX_TOKEN_BYTES).await?;
    token_of(&body, asked_at)
        .ok_or_else(|| SourceError::Invalid(format!("{}: {} sent none", asked.object, asked.host)))
}

fn token_of(body: &[u8], asked_at: Instant) -> Option<Token> {
    #[derive(Deserialize)]
    struct Body {
        token: Option<String>,
        access_token: Option<String>,
        expires_in: Option<u64>,
    }
    let body: Body = serde_json::from_slice(body).ok()?;
    let token = [body.token, body.access_token].into_iter().flatten().find(|t| !t.is_empty())?;
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    let lifetime = body.expires_in.map_or(DEFAULT_LIFETIME, Duration::from_secs).min(MAX_LIFETIME);
    Some(Token { header, renew_at: asked_at + lifetime - EXPIRY_MARGIN.min(lifetime / 4) })
}

fn basic(username: &str, password: &str) -> Result<HeaderValue, SourceError> {
    let text = format!("Basic {}", STANDARD.encode(format!("{username}:{password}")));
    let mut header = HeaderValue::from_str(&text)
        .map_err(|_| SourceError::Invalid("credentials do not fit into a header".into()))?;
    header.set_sensitive(true);
    Ok(header)
}

fn form(pairs: &[(&str, &str)]) -> String {
    // The query of an address and a form are encoded alike.
    let mut url = Url::parse("http://form").ok();
    if let Some(url) = &mut url {
        url.query_pairs_mut().extend_pairs(pairs);
    }
    url.and_then(|url| url.query().map(str::to_owned)).unwrap_or_default()
}

enum Challenge {
    Basic,
    Bearer { realm: String, service: String },
}

/// The best challenge that we can answer: a token before a password.
fn challenge(headers: &HeaderMap) -> Result<Challenge, String> {
    let mut basic = false;
    let mut other = None;
    for header in headers.get_all(WWW_AUTHENTICATE) {
        let Ok(text) = header.to_str() else { continue };
        for challenge in http_auth::ChallengeParser::new(text).map_while(Result::ok) {
            let param = |name: &str| {
                let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                if let Some(realm) = param("realm") {
                    let service = param("service").unwrap_or_default();
                    return Ok(Challenge::Bearer { realm, service });
                }
            } else if challenge.scheme.eq_ignore_ascii_case("basic") {
                basic = true;
            } else {
                other.get_or_insert_with(|| challenge.scheme.chars().take(40).collect::<String>());
            }
        }
    }
    match (basic, other) {
        (true, _) => Ok(Challenge::Basic),
        (false, Some(scheme)) => Err(format!("the scheme {scheme:?} is not supported")),
        (false, None) => Err("does not say how".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(values: &[&str]) -> Result<Challenge, String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        challenge(&headers)
    }

    #[test]
    fn a_token_is_preferred_to_a_password() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="reg, istry",scope="x""#;
        for values in [&[bearer, "Basic realm=\"x\""][..], &["Basic realm=\"x\"", bearer]] {
            let Ok(Challenge::Bearer { realm, service }) = read(values) else { panic!() };
            assert_eq!(
                (realm.as_str(), service.as_str()),
                ("https://auth.example/token", "reg, istry")
            );
        }
        assert!(matches!(read(&["basic realm=x"]), Ok(Challenge::Basic)));
        assert_eq!(
            read(&["Negotiate x=y"]).err().unwrap(),
            r#"the scheme "Negotiate" is not supported"#
        );
        assert_eq!(read(&[]).err().unwrap(), "does not say how");
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_lives_as_long_as_its_server_says_less_a_margin() {
        let now = Instant::now();
        let token = |body: &str| token_of(body.as_bytes(), now);
        let seen = |token: &Token| {
            (token.header.to_str().unwrap().to_owned(), (token.renew_at - now).as_secs())
        };
        let plain = token(r#"{"token":"a"}"#).unwrap();
        assert_eq!(seen(&plain), ("Bearer a".to_owned(), 50));
        assert!(!format!("{:?}", plain.header).contains('a'), "{:?}", plain.header);
        let oauth = token(r#"{"token":"","access_token":"b","expires_in":300}"#).unwrap();
        assert_eq!(seen(&oauth), ("Bearer b".to_owned(), 290));
        let short = token(r#"{"token":"c","expires_in":4}"#).unwrap();
        assert_eq!(seen(&short), ("Bearer c".to_owned(), 3));
        let forever = token(r#"{"token":"d","expires_in":18446744073709551615}"#).unwrap();
        assert_eq!(seen(&forever), ("Bearer d".to_owned(), 24 * 60 * 60 - 10));
        assert!(token(r#"{"token":"a\nb"}"#).is_none());
        assert!(token(r#"{"expires_in":3}"#).is_none());
        assert!(token("<html>").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_slot_is_shared_until_its_token_expires_or_is_refused() {
        let tokens = Tokens::default();
        let key = Arc::new(TokenKey {
            realm: "r".into(),
            service: "s".into(),
            scope: "x".into(),
            credential: Digest::of(b""),
        });
        let first = tokens.fresh(&key, None);
        assert!(Arc::ptr_eq(&first, &tokens.fresh(&key, None)), "one fetch serves all who wait");
        first.set(token_of(br#"{"token":"a"}"#, Instant::now()).unwrap_or_else(|| panic!())).ok();
        assert!(Arc::ptr_eq(&first, &tokens.fresh(&key, None)));
        let second = tokens.fresh(&key, Some(&first));
        assert!(!Arc::ptr_eq(&first, &second), "a refused token is replaced");
        assert!(Arc::ptr_eq(&second, &tokens.fresh(&key, Some(&first))), "once");
        second.set(token_of(br#"{"token":"b"}"#, Instant::now()).unwrap_or_else(|| panic!())).ok();
        tokio::time::advance(DEFAULT_LIFETIME).await;
        assert!(!Arc::ptr_eq(&second, &tokens.fresh(&key, None)), "an expired one, too");
    }

    #[test]
    fn a_form_is_encoded() {
        assert_eq!(form(&[("a", "1 2&3"), ("b", "ü=")]), "a=1+2%263&b=%C3%BC%3D");
    }
}
