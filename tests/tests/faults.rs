//! Registries that refuse, lie, stall and break off: each ends in one clear error.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use carport_image::digest::Digest;
use carport_image::source::{ManifestName, PullSecret, Source, SourceError, Sources};
use carport_tests::models::{Model, options, reference, secret, sources};
use carport_tests::registry::Registry;
use carport_tests::scripted::{Answer, Request, Scripted};
use futures_util::{FutureExt, TryStreamExt};

const BLOB: &[u8] = b"0123456789";

fn tag() -> ManifestName {
    ManifestName::Tag("v1".into())
}

fn open(server: &Scripted) -> Arc<dyn Source> {
    let host = server.host();
    sources(&[&host]).open(&reference(&format!("{host}/m:v1")), &PullSecret::none()).unwrap()
}

/// What `manifest` says of a server that answers everything so.
async fn manifest_error(answer: Answer) -> SourceError {
    let server = Scripted::start(move |_| answer.clone()).await;
    let error = open(&server).manifest(&tag()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&format!("{}/m:v1", server.host())), "names the object: {text}");
    error
}

/// The bytes that `blob` gives of a server that answers everything so.
async fn blob(answer: Answer, range: std::ops::Range<u64>) -> Result<(u64, Vec<u8>), SourceError> {
    let server = Scripted::start(move |_| answer.clone()).await;
    let body = open(&server).blob(&Digest::of(BLOB), BLOB.len() as u64, range).await?;
    let bytes: Vec<Bytes> = body.stream.try_collect().await?;
    Ok((body.offset, bytes.concat()))
}

#[tokio::test]
async fn a_refusal_repeats_the_registrys_words_and_says_what_to_do() {
    let body = r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#;
    let error = manifest_error(Answer::status(404).body(body)).await;
    assert!(matches!(error, SourceError::NotFound(_)), "{error:?}");
    let text = error.to_string();
    assert!(
        text.contains("says 404 Not Found, MANIFEST_UNKNOWN: manifest unknown); check the name"),
        "{text}"
    );
    let error = manifest_error(Answer::status(403)).await;
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    assert!(error.to_string().contains("to docker's config.json or the pull secret"), "{error}");
    let error = manifest_error(Answer::status(401)).await;
    assert!(matches!(error, SourceError::Denied(_)), "{error:?}");
    assert!(error.to_string().contains("asks to authenticate, but does not say how"), "{error}");
    let error = manifest_error(Answer::status(418)).await;
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
}

#[tokio::test]
async fn a_busy_registry_is_one_to_come_back_to() {
    let wait = |error: &SourceError| match error {
        SourceError::Throttled { retry_after, .. } => *retry_after,
        other => panic!("{other:?}"),
    };
    let error = manifest_error(Answer::status(429).header("Retry-After", "7")).await;
    assert_eq!(wait(&error), Some(Duration::from_secs(7)));
    assert!(error.is_transient());
    let error = manifest_error(Answer::status(429)).await;
    assert_eq!(wait(&error), None);
    let date = "Wed, 21 Oct 2015 07:28:00 GMT";
    let error = manifest_error(Answer::status(503).header("Retry-After", date)).await;
    assert_eq!(wait(&error), Some(Duration::ZERO));
    for status in [500, 502, 503, 504] {
        let error = manifest_error(Answer::status(status)).await;
        assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
    }
}

#[tokio::test]
async fn a_manifest_is_bounded_whatever_is_declared() {
    let large = vec![b' '; 4 * 1024 * 1024 + 1];
    let error = manifest_error(Answer::ok(large)).await;
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("larger than 4194304 bytes"), "{error}");
    let error = manifest_error(Answer::ok("").declare(1 << 40)).await;
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    // No length, and no end.
    let endless = b"100000\r\n".iter().copied().chain(vec![b'x'; 0x10_0000]).chain(*b"\r\n");
    let chunks: Vec<u8> = endless.cycle().take(6 * (0x10_0000 + 10)).collect();
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = server.local_addr().unwrap().to_string();
    let serve = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = server.accept().await.unwrap();
        let _ = stream.read(&mut [0; 4096]).await;
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        let _ = stream.write_all(&chunks).await;
    });
    let place = reference(&format!("{host}/m:v1"));
    let source = sources(&[&host]).open(&place, &PullSecret::none()).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(error.to_string().contains("larger than 4194304 bytes"), "{error}");
    serve.await.unwrap();
}

#[tokio::test]
async fn a_head_without_a_digest_falls_back_to_the_manifest() {
    let server = Scripted::start(|request| match request.method.as_str() {
        "HEAD" => Answer::status(405),
        _ => Answer::ok("{}").header("Content-Type", "application/json; charset=utf-8"),
    });
    let server = server.await;
    assert_eq!(open(&server).resolve(&tag()).await.unwrap(), Digest::of(b"{}"));
    assert_eq!(open(&server).manifest(&tag()).await.unwrap().media_type, "application/json");
    let server = Scripted::start(|_| {
        Answer::status(200).header("Docker-Content-Digest", &Digest::of(b"x").to_string())
    });
    let server = server.await;
    assert_eq!(open(&server).resolve(&tag()).await.unwrap(), Digest::of(b"x"));
    let requests = server.requests();
    assert_eq!(requests.len(), 1);
    let accept = requests[0].header("accept").unwrap();
    assert!(accept.contains("vnd.oci.image.index.v1") && accept.contains("manifest.list.v2"));
}

#[tokio::test]
async fn a_range_is_asked_for_and_the_answer_is_checked() {
    let server = Scripted::start(|request| {
        assert_eq!(request.header("range"), Some("bytes=3-6"));
        Answer::status(206).header("Content-Range", "bytes 3-6/10").body(&BLOB[3..7])
    });
    let server = server.await;
    let body = open(&server).blob(&Digest::of(BLOB), 10, 3..7).await.unwrap();
    assert_eq!(body.offset, 3);
    let bytes: Vec<Bytes> = body.stream.try_collect().await.unwrap();
    assert_eq!(bytes.concat(), b"3456");

    // Where ranges are not served, the blob comes from its start.
    assert_eq!(blob(Answer::ok(BLOB), 3..7).await.unwrap(), (0, BLOB.to_vec()));
    let partial = |range: &str| Answer::status(206).header("Content-Range", range).body("3456");
    for wrong in ["bytes 4-7/10", "bytes 3-6/11", "bytes */10", "pages 3-6/10"] {
        let error = blob(partial(wrong), 3..7).await.unwrap_err();
        assert!(matches!(error, SourceError::Invalid(_)), "{wrong}: {error:?}");
        assert!(error.to_string().contains("another range than 3-6 of 10 bytes"), "{error}");
    }
    let error = blob(Answer::status(206).body("3456"), 3..7).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    let error = blob(Answer::status(416), 3..7).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    let error = blob(Answer::ok("short"), 0..10).await.unwrap_err();
    assert!(error.to_string().contains("has 5 bytes of it, the manifest says 10"), "{error}");
    let error = blob(Answer::ok(""), 0..0).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
}

#[tokio::test]
async fn altered_bytes_are_handed_on_for_the_caller_to_check() {
    assert_eq!(blob(Answer::ok("9876543210"), 0..10).await.unwrap().1, b"9876543210");
}

#[tokio::test]
async fn a_transfer_that_breaks_off_can_be_tried_again() {
    let error = blob(Answer::ok("01234").declare(10), 0..10).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("broke off"), "{error}");
    assert!(error.to_string().contains(&Digest::of(BLOB).to_string()), "{error}");
    let error = manifest_error(Answer::ok("{").declare(2)).await;
    assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn a_stalled_transfer_is_given_up() {
    let impatient = |host: &str| {
        let mut options = options(&[host]);
        options.read_timeout = Duration::from_millis(100);
        Sources::new(options).unwrap()
    };
    let server = Scripted::start(|_| Answer::ok("01234").declare(10).then_stall()).await;
    let place = reference(&format!("{}/m:v1", server.host()));
    let source = impatient(&server.host()).open(&place, &PullSecret::none()).unwrap();
    let body = source.blob(&Digest::of(BLOB), 10, 0..10).await.unwrap();
    let error = body.stream.try_collect::<Vec<_>>().await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
    assert!(error.to_string().contains("sent nothing for too long"), "{error}");

    // Accepts, and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = silent.local_addr().unwrap().to_string();
    let place = reference(&format!("{host}/m:v1"));
    let source = impatient(&host).open(&place, &PullSecret::none()).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(error.to_string().contains("sent nothing for too long"), "{error}");
}

#[tokio::test]
async fn a_registry_that_is_not_there_says_so() {
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = closed.local_addr().unwrap().to_string();
    drop(closed);
    let place = reference(&format!("{host}/m:v1"));
    let source = sources(&[&host]).open(&place, &PullSecret::none()).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&format!("connect to {host}: ")) && text.contains("refused"), "{text}");
    let place = reference("no-such-registry.invalid/m:v1");
    let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn plain_http_is_spoken_only_where_it_is_allowed() {
    let server = Scripted::start(|_| Answer::ok("{}")).await;
    let registry = Registry::start();
    let hosts = [Some(server.host()), registry.as_ref().map(|registry| registry.host().to_owned())];
    for host in hosts.into_iter().flatten() {
        let place = reference(&format!("{host}/m:v1"));
        let source = sources(&[]).open(&place, &PullSecret::none()).unwrap();
        let error = source.manifest(&tag()).await.unwrap_err();
        assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(&format!("no TLS with {host}")), "{text}");
        assert!(text.contains("registries.plainHttp"), "{text}");
    }
    assert!(server.requests().is_empty());
}

/// A storage backend that keeps BLOB, and a registry that redirects to it.
async fn redirecting(status: u16) -> (Scripted, Scripted) {
    let storage = Scripted::start(move |request: &Request| match request.header("range") {
        _ if status != 200 => Answer::status(status)
            .body(r#"{"errors":[{"message":"signature hunter2 of the request"}]}"#),
        Some(_) => Answer::status(206).header("Content-Range", "bytes 3-6/10").body("3456"),
        None => Answer::ok(BLOB),
    });
    let storage = storage.await;
    let target = format!("http://{}/bucket?X-Signature=hunter2", storage.host());
    let registry =
        Scripted::start(move |request: &Request| match request.header("authorization") {
            None => Answer::status(401).header("WWW-Authenticate", r#"Basic realm="x""#),
            Some(_) => Answer::status(307).header("Location", &target),
        });
    (registry.await, storage)
}

#[tokio::test]
async fn a_redirect_to_storage_is_followed_without_credentials() {
    let (registry, storage) = redirecting(200).await;
    let host = registry.host();
    let sources = sources(&["127.0.0.1"]);
    let secret = secret(&host, "me", "password");
    let source = sources.open(&reference(&format!("{host}/m:v1")), &secret).unwrap();
    let body = source.blob(&Digest::of(BLOB), 10, 3..7).await.unwrap();
    assert_eq!(body.offset, 3);
    let bytes: Vec<Bytes> = body.stream.try_collect().await.unwrap();
    assert_eq!(bytes.concat(), b"3456");
    let asked = storage.requests();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].header("authorization"), None);
    assert_eq!(asked[0].header("referer"), None);
    assert_eq!(asked[0].header("range"), Some("bytes=3-6"));
}

#[tokio::test]
async fn headers_of_hosts_toml_stay_with_their_host() {
    let (registry, storage) = redirecting(200).await;
    let host = registry.host();
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join(&host);
    std::fs::create_dir(&hosts).unwrap();
    let text = format!("server = \"http://{host}\"\n[header]\nx-token = \"hunter2\"\n");
    std::fs::write(hosts.join("hosts.toml"), text).unwrap();
    let mut options = options(&["127.0.0.1"]);
    options.hosts_dir = Some(folder.path().to_owned());
    let secret = secret(&host, "me", "password");
    let place = reference(&format!("{host}/m:v1"));
    let source = Sources::new(options).unwrap().open(&place, &secret).unwrap();
    let body = source.blob(&Digest::of(BLOB), 10, 3..7).await.unwrap();
    let bytes: Vec<Bytes> = body.stream.try_collect().await.unwrap();
    assert_eq!(bytes.concat(), b"3456");
    assert!(registry.requests().iter().all(|r| r.header("x-token") == Some("hunter2")));
    let asked = storage.requests();
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0].header("x-token"), asked[0].header("authorization")), (None, None));
    assert_eq!(asked[0].header("range"), Some("bytes=3-6"));
}

#[tokio::test]
async fn storages_that_send_each_other_around_end() {
    let other: std::sync::Arc<std::sync::OnceLock<String>> = std::sync::Arc::default();
    let told = other.clone();
    let first = Scripted::start(move |_: &Request| {
        Answer::status(307).header("Location", &format!("http://{}/x", told.get().unwrap()))
    });
    let first = first.await;
    let back = format!("http://{}/y", first.host());
    let second =
        Scripted::start(move |_: &Request| Answer::status(302).header("Location", &back)).await;
    other.set(second.host()).unwrap();
    let place = reference(&format!("{}/m:v1", first.host()));
    let source = sources(&["127.0.0.1"]).open(&place, &PullSecret::none()).unwrap();
    let error = source.manifest(&tag()).await.unwrap_err();
    assert!(error.to_string().contains("more than 5 in a row"), "{error}");
    assert_eq!(first.requests().len() + second.requests().len(), 6);
}

#[tokio::test]
async fn bytes_that_a_proxy_compressed_are_refused_by_name() {
    let server = Scripted::start(|_| Answer::ok("{}").header("Content-Encoding", "gzip")).await;
    let error = open(&server).manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("Content-Encoding \"gzip\""), "{error}");
    let error = open(&server).blob(&Digest::of(b"{}"), 2, 0..2).await.err().unwrap();
    assert!(error.to_string().contains("Content-Encoding \"gzip\""), "{error}");
    assert!(server.requests().iter().all(|r| r.header("accept-encoding") == Some("identity")));
    let plain = Scripted::start(|_| Answer::ok("{}").header("Content-Encoding", "identity")).await;
    assert!(open(&plain).manifest(&tag()).await.is_ok());
}

#[tokio::test]
async fn no_signature_of_a_redirect_gets_into_an_error() {
    for status in [403, 404, 500] {
        let (registry, storage) = redirecting(status).await;
        let host = registry.host();
        let secret = secret(&host, "me", "password");
        let place = reference(&format!("{host}/m:v1"));
        let source = sources(&["127.0.0.1"]).open(&place, &secret).unwrap();
        let text = source.blob(&Digest::of(BLOB), 10, 0..10).await.err().unwrap().to_string();
        assert!(text.contains(&storage.host()) && text.contains(&status.to_string()), "{text}");
        assert!(!text.contains("hunter2") && !text.contains("password"), "{text}");
        // To a host that is not listed, it is not followed; nor does that error tell.
        let source = sources(&[&host]).open(&place, &secret).unwrap();
        let error = source.blob(&Digest::of(BLOB), 10, 0..10).await.err().unwrap();
        assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("redirect") && text.contains("registries.plainHttp"), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let server =
        Scripted::start(|request| Answer::status(307).header("Location", &request.target.clone()));
    let server = server.await;
    let error = open(&server).manifest(&tag()).await.unwrap_err();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    assert!(error.to_string().contains("more than 5 in a row"), "{error}");
    assert_eq!(server.requests().len(), 6);
}

#[tokio::test]
async fn a_body_holds_its_place_among_the_registrys_connections() {
    let open_now = Arc::new(AtomicUsize::new(0));
    let count = open_now.clone();
    let server = Scripted::start(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Answer::ok("01234").declare(10).then_stall()
    });
    let server = server.await;
    let host = server.host();
    let mut options = options(&[&host]);
    options.connections_per_registry = 1;
    let source = Sources::new(options)
        .unwrap()
        .open(&reference(&format!("{host}/m:v1")), &PullSecret::none())
        .unwrap();
    let digest = Digest::of(BLOB);
    let first = source.blob(&digest, 10, 0..10).await.unwrap();
    let mut second = source.blob(&digest, 10, 0..10);
    // Not even asked for while the first is open.
    assert!((&mut second).now_or_never().is_none());
    assert_eq!(open_now.load(Ordering::SeqCst), 1);
    drop(first);
    second.await.unwrap();
    assert_eq!(open_now.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_blob_that_the_registry_has_lost_part_of_is_not_served() {
    let Some(registry) = Registry::start() else { return };
    let host = registry.host();
    let place = format!("{host}/m:v1");
    let sources = sources(&[host]);
    Model::new().pack(&place, &PullSecret::none(), &sources).await.unwrap();
    let source = sources.open(&reference(&place), &PullSecret::none()).unwrap();
    let manifest = source.manifest(&tag()).await.unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap();
    let layer = &manifest["layers"][1];
    let digest: Digest = layer["digest"].as_str().unwrap().parse().unwrap();
    let size = layer["size"].as_u64().unwrap();
    let hex = digest.hex();
    let blobs = registry.storage().join("docker/registry/v2/blobs/sha256");
    let data = blobs.join(&hex[..2]).join(&hex).join("data");
    std::fs::OpenOptions::new().write(true).open(data).unwrap().set_len(1000).unwrap();
    for range in [0..size, 5..900, 2000..size] {
        let error = source.blob(&digest, size, range.clone()).await.err();
        assert!(matches!(error, Some(SourceError::Invalid(_))), "{range:?}: {error:?}");
    }
}
