//! Getting in: basic credentials and tokens, where they come from, when they end.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::HashSet;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine;
use bytes::Bytes;
use carport_image::digest::Digest;
use carport_image::source::{ManifestName, PullSecret, Source, SourceError, Sources};
use carport_tests::models::{Model, docker_config, options, reference, secret, sources};
use carport_tests::registry::{PASSWORD, Registry, USERNAME};
use carport_tests::scripted::{Answer, Request, Scripted};
use futures_util::TryStreamExt;
use futures_util::future::join_all;

const BLOB: &[u8] = b"0123456789";

fn tag() -> ManifestName {
    ManifestName::Tag("v1".into())
}

#[tokio::test]
async fn basic_credentials_come_from_the_pull_secret_or_docker_config() {
    let Some(registry) = Registry::start_with_login() else { return };
    let host = registry.host();
    let model = Model::new();
    let place = format!("{host}/team/tiny:v1");
    let right = secret(host, USERNAME, PASSWORD);
    let open = sources(&[host]);
    let error = model.pack(&place, &PullSecret::none(), &open).await.unwrap_err().to_string();
    assert!(error.contains("denied") && error.contains("add credentials for"), "{error}");
    let packed = model.pack(&place, &right, &open).await.unwrap();

    let ask = async |sources: &Sources, secret: &PullSecret| {
        let source = sources.open(&reference(&place), secret).unwrap();
        source.manifest(&tag()).await.map(|manifest| manifest.digest())
    };
    assert_eq!(ask(&open, &right).await.unwrap(), packed.digest);
    let error = ask(&open, &PullSecret::none()).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("UNAUTHORIZED: authentication required"), "{text}");
    assert!(
        text.contains(&format!("add credentials for {host} to docker's config.json")),
        "{text}"
    );

    let error = ask(&open, &secret(host, USERNAME, "hunter2")).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&format!("check the entry for {host} in the pull secret")), "{text}");
    assert!(!text.contains("hunter2"), "{text}");

    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    fs::write(&config, docker_config(host, USERNAME, PASSWORD)).unwrap();
    let mut with_config = options(&[host]);
    with_config.docker_config = Some(config.clone());
    let with_config = Sources::new(with_config).unwrap();
    assert_eq!(ask(&with_config, &PullSecret::none()).await.unwrap(), packed.digest);
    // The secret goes first, also where it is wrong: the pod said so.
    assert!(ask(&with_config, &secret(host, USERNAME, "hunter2")).await.is_err());
    fs::write(&config, docker_config(host, USERNAME, "old")).unwrap();
    let error = ask(&with_config, &PullSecret::none()).await.unwrap_err().to_string();
    let advice = format!("check the entry for {host} in {}", config.display());
    assert!(error.contains(&advice), "{error}");
}

/// A registry of one manifest and one blob that wants a token, and its token server, in one.
/// A token is good until it is revoked.
struct TokenRegistry {
    server: Scripted,
    good: Arc<Mutex<HashSet<String>>>,
    issued: Arc<AtomicUsize>,
}

impl TokenRegistry {
    async fn start() -> Self {
        let good: Arc<Mutex<HashSet<String>>> = Arc::default();
        let issued = Arc::new(AtomicUsize::new(0));
        let (tokens, counter) = (good.clone(), issued.clone());
        let server = Scripted::start(move |request| {
            if request.target.starts_with("/token") {
                return match granted(request) {
                    Some(who) => {
                        let number = counter.fetch_add(1, Ordering::SeqCst);
                        let token = format!("token-{who}-{number}");
                        tokens.lock().unwrap().insert(token.clone());
                        Answer::ok(format!(r#"{{"token":"{token}","expires_in":3600}}"#))
                    }
                    None => Answer::status(401)
                        .body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"who?"}]}"#),
                };
            }
            let sent =
                request.header("authorization").and_then(|text| text.strip_prefix("Bearer "));
            if !sent.is_some_and(|token| tokens.lock().unwrap().contains(token)) {
                let host = request.header("host").unwrap();
                let realm = format!(
                    r#"Bearer realm="http://{host}/token",service="{host}",scope="repository:m:pull""#
                );
                return Answer::status(401).header("WWW-Authenticate", &realm);
            }
            if request.target.contains("/blobs/") { Answer::ok(BLOB) } else { Answer::ok("{}") }
        });
        Self { server: server.await, good, issued }
    }

    fn open(&self, sources: &Sources, secret: &PullSecret) -> Arc<dyn Source> {
        sources.open(&reference(&format!("{}/m:v1", self.server.host())), secret).unwrap()
    }

    fn sources(&self) -> Sources {
        sources(&[&self.server.host()])
    }

    fn revoke(&self) {
        self.good.lock().unwrap().clear();
    }

    fn issued(&self) -> usize {
        self.issued.load(Ordering::SeqCst)
    }
}

/// Who gets a token: nobody's (anonymous), `me` by password, `robot` by identity token.
fn granted(request: &Request) -> Option<&'static str> {
    if request.method == "POST" {
        let form = String::from_utf8_lossy(&request.body);
        let right = form.contains("grant_type=refresh_token")
            && form.contains("refresh_token=identity%2B1")
            && form.contains("scope=repository%3Am%3Apull");
        return right.then_some("robot");
    }
    assert!(request.target.contains("scope=repository%3Am%3Apull"), "{}", request.target);
    assert!(request.target.contains("service=127.0.0.1%3A"), "{}", request.target);
    let right = base64::engine::general_purpose::STANDARD.encode("me:right");
    match request.header("authorization") {
        None => Some("anonymous"),
        Some(header) => (header == format!("Basic {right}")).then_some("me"),
    }
}

async fn blob(source: &dyn Source) -> Result<Vec<u8>, SourceError> {
    let body = source.blob(&Digest::of(BLOB), 10, 0..10).await?;
    let bytes: Vec<Bytes> = body.stream.try_collect().await?;
    Ok(bytes.concat())
}

fn last_token(registry: &TokenRegistry) -> String {
    registry.server.requests().last().unwrap().header("authorization").unwrap().to_owned()
}

#[tokio::test]
async fn a_token_is_got_once_and_used_by_all_with_the_same_credentials() {
    let registry = TokenRegistry::start().await;
    let sources = registry.sources();
    let source = registry.open(&sources, &PullSecret::none());
    source.manifest(&tag()).await.unwrap();
    assert_eq!(blob(source.as_ref()).await.unwrap(), BLOB);
    blob(registry.open(&sources, &PullSecret::none()).as_ref()).await.unwrap();
    assert_eq!(registry.issued(), 1);
    assert_eq!(last_token(&registry), "Bearer token-anonymous-0");

    let mine = secret(&registry.server.host(), "me", "right");
    blob(registry.open(&sources, &mine).as_ref()).await.unwrap();
    assert_eq!(registry.issued(), 2, "nobody pulls with another's token");
    assert_eq!(last_token(&registry), "Bearer token-me-1");
    blob(source.as_ref()).await.unwrap();
    assert_eq!(last_token(&registry), "Bearer token-anonymous-0");
}

#[tokio::test]
async fn those_who_need_a_token_at_a_time_wait_for_one() {
    let registry = TokenRegistry::start().await;
    let sources = registry.sources();
    let opened: Vec<_> = (0..8).map(|_| registry.open(&sources, &PullSecret::none())).collect();
    for result in join_all(opened.iter().map(|source| blob(source.as_ref()))).await {
        result.unwrap();
    }
    assert_eq!(registry.issued(), 1);
}

#[tokio::test]
async fn a_token_that_ends_in_the_middle_of_a_pull_is_renewed() {
    let registry = TokenRegistry::start().await;
    let source = registry.open(&registry.sources(), &PullSecret::none());
    for round in 1..4 {
        let results = join_all((0..4).map(|_| blob(source.as_ref()))).await;
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_eq!(registry.issued(), round, "by one request for all");
        registry.revoke();
    }
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let registry = TokenRegistry::start().await;
    let host = registry.server.host();
    let robot = secret(&host, "<token>", "identity+1");
    blob(registry.open(&registry.sources(), &robot).as_ref()).await.unwrap();
    assert_eq!(last_token(&registry), "Bearer token-robot-0");
    let wrong = secret(&host, "<token>", "hunter2");
    let error = blob(registry.open(&registry.sources(), &wrong).as_ref()).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    assert!(!error.to_string().contains("hunter2"), "{error}");
}

#[tokio::test]
async fn refused_credentials_are_named_by_their_place() {
    let registry = TokenRegistry::start().await;
    let host = registry.server.host();
    let wrong = secret(&host, "me", "hunter2");
    let error = blob(registry.open(&registry.sources(), &wrong).as_ref()).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        format!(
            "token for repository:m:pull of {host}: denied ({host} says 401 Unauthorized, \
             UNAUTHORIZED: who?); check the entry for {host} in the pull secret, and its rights"
        )
    );
}

#[tokio::test]
async fn a_registry_that_refuses_its_own_tokens_is_asked_no_more_than_thrice() {
    let server = Scripted::start(|request| {
        let realm = format!(r#"Bearer realm="http://{}/token""#, request.header("host").unwrap());
        match request.target.starts_with("/token") {
            true => Answer::ok(r#"{"access_token":"useless"}"#),
            false => Answer::status(401).header("WWW-Authenticate", &realm),
        }
    });
    let server = server.await;
    let host = server.host();
    let place = reference(&format!("{host}/m:v1"));
    let source = sources(&[&host]).open(&place, &PullSecret::none()).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    assert!(!error.to_string().contains("useless"), "{error}");
    let manifests = server.requests().iter().filter(|r| r.target.contains("/v2/")).count();
    assert_eq!(manifests, 3);
}

#[tokio::test]
async fn credentials_go_to_no_token_server_without_tls() {
    let thief = Scripted::start(|_| Answer::ok(r#"{"token":"x"}"#)).await;
    let realm = format!(r#"Bearer realm="http://{}/token""#, thief.host());
    let server =
        Scripted::start(move |_| Answer::status(401).header("WWW-Authenticate", &realm)).await;
    let host = server.host();
    let place = reference(&format!("{host}/m:v1"));
    let source = sources(&[&host]).open(&place, &secret(&host, "me", "right")).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("is not spoken to over TLS"), "{error}");
    assert!(thief.requests().is_empty());
}

#[tokio::test]
async fn a_token_request_follows_no_redirect() {
    let thief = Scripted::start(|_| Answer::ok(r#"{"token":"x"}"#)).await;
    let target = format!("http://{}/token", thief.host());
    let server = Scripted::start(move |request| {
        if request.target.starts_with("/token") {
            return Answer::status(307).header("Location", &target);
        }
        let realm = format!(r#"Bearer realm="http://{}/token""#, request.header("host").unwrap());
        Answer::status(401).header("WWW-Authenticate", &realm)
    });
    let server = server.await;
    let place = reference(&format!("{}/m:v1", server.host()));
    let robot = secret(&server.host(), "<token>", "identity+1");
    let source = sources(&["127.0.0.1"]).open(&place, &robot).unwrap();
    source.manifest(&tag()).await.unwrap_err();
    assert!(thief.requests().is_empty());
}

#[tokio::test]
async fn a_credential_helper_of_docker_config_is_asked() {
    use std::os::unix::fs::PermissionsExt;
    let registry = TokenRegistry::start().await;
    let host = registry.server.host();
    let folder = tempfile::tempdir().unwrap();
    let helper = folder.path().join("docker-credential-carport-tests");
    let script = format!(
        "#!/bin/sh\nread server\n[ \"$1 $server\" = \"get {host}\" ] && \
         printf '{{\"ServerURL\":\"\",\"Username\":\"me\",\"Secret\":\"right\"}}' || \
         {{ echo 'credentials not found in native keychain'; exit 1; }}\n"
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    let config = folder.path().join("config.json");
    let store = |kind: &str| match kind {
        "store" => serde_json::json!({ "credsStore": "carport-tests" }),
        _ => serde_json::json!({ "credHelpers": { &host: "carport-tests" } }),
    };
    let path = std::env::var("PATH").unwrap();
    for kind in ["store", "helper"] {
        fs::write(&config, store(kind).to_string()).unwrap();
        // A process of its own, since PATH is the whole process'.
        let status = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pulls_for_the_helper_test", "--nocapture"])
            .env("PATH", format!("{}:{path}", folder.path().display()))
            .env("CARPORT_TEST_HOST", &host)
            .env("CARPORT_TEST_CONFIG", &config)
            .status();
        assert!(status.await.unwrap().success());
        assert_eq!(last_token(&registry), format!("Bearer token-me-{}", registry.issued() - 1));
    }
}

/// The other half of the test above; by itself it does nothing.
#[tokio::test]
async fn pulls_for_the_helper_test() {
    let (Ok(host), Ok(config)) =
        (std::env::var("CARPORT_TEST_HOST"), std::env::var("CARPORT_TEST_CONFIG"))
    else {
        return;
    };
    let mut options = options(&[&host]);
    options.docker_config = Some(config.into());
    let place = reference(&format!("{host}/m:v1"));
    let source = Sources::new(options).unwrap().open(&place, &PullSecret::none()).unwrap();
    blob(source.as_ref()).await.unwrap();
}
