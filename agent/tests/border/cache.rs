//! Calls that change what the node holds.

use std::time::{Duration, SystemTime};

use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use carport_proto::client::connect;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use crate::support::{Agent, Home, comes};

struct Node {
    home: Home,
    agent: Agent,
    cache: CacheServiceClient<Channel>,
    locality: LocalityServiceClient<Channel>,
}

impl Node {
    async fn start() -> Self {
        Self::start_with(&[]).await
    }

    async fn start_with(arguments: &[&str]) -> Self {
        let home = Home::new();
        let agent = home.agent(arguments);
        let channel = connect(&home.socket()).await.unwrap();
        let (cache, locality) =
            (CacheServiceClient::new(channel.clone()), LocalityServiceClient::new(channel));
        Self { home, agent, cache, locality }
    }

    /// Waits until the only model is as wanted.
    async fn until(&mut self, wanted: impl Fn(&v1::ModelLocality) -> bool) -> v1::ModelLocality {
        let look = async || {
            let list = self.locality.list_models(v1::ListModelsRequest::default()).await;
            let mut models = list.unwrap().into_inner().models;
            models.pop().filter(|model| models.is_empty() && wanted(model))
        };
        comes("the only model is as wanted", look).await
    }

    async fn stop(self) {
        tokio::task::spawn_blocking(move || self.agent.terminate()).await.unwrap();
    }
}

fn named(reference: &str) -> Option<v1::ModelRef> {
    Some(v1::ModelRef { reference: reference.into(), ..Default::default() })
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_pins_what_it_brings_and_an_id_makes_it_one() {
    let mut node = Node::start().await;
    let reference = node.home.image("a", &[("w", "12345")]);
    let request = v1::PrefetchRequest {
        model: named(&reference),
        priority: 7,
        pin_ttl: seconds(3600),
        warm_page_cache: true,
        request_id: "first".into(),
        ..Default::default()
    };
    let answer = node.cache.prefetch(request.clone()).await.unwrap().into_inner();
    let held = node.until(|model| model.pin.is_some()).await;
    let pin = held.pin.unwrap();
    let end = SystemTime::try_from(pin.expire_time.unwrap()).unwrap();
    let left = end.duration_since(SystemTime::now()).unwrap();
    assert!(pin.owner == "prefetch" && left <= Duration::from_secs(3600), "{left:?}");
    assert_eq!(held.eviction_risk, i32::from(v1::EvictionRisk::None));
    let again = node.cache.prefetch(request.clone()).await.unwrap().into_inner();
    assert_eq!(again, answer, "as it was answered then");
    let other = v1::PrefetchRequest { priority: 8, ..request };
    let refused = node.cache.prefetch(other).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("request_id: "), "{}", refused.message());

    let cancel = v1::CancelPrefetchRequest { model: named(&reference), ..Default::default() };
    let cancelled = node.cache.cancel_prefetch(cancel).await.unwrap().into_inner();
    assert!(!cancelled.cancelled, "it is over");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefetch_that_is_taken_back_stops() {
    // A registry that takes connections and says nothing.
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = mute.local_addr().unwrap().to_string();
    let mut node = Node::start_with(&["--plain-http", &host]).await;
    let model = named(&format!("{host}/a:1"));
    let request = v1::PrefetchRequest { model: model.clone(), ..Default::default() };
    node.cache.prefetch(request).await.unwrap();
    node.until(|model| model.state() == v1::ModelState::Queued).await;
    let cancel = v1::CancelPrefetchRequest { model, ..Default::default() };
    let cancelled = node.cache.cancel_prefetch(cancel.clone()).await.unwrap().into_inner();
    assert!(cancelled.cancelled);
    let again = node.cache.cancel_prefetch(cancel).await.unwrap().into_inner();
    assert!(!again.cancelled);
    let look = async || {
        let list = node.locality.list_models(v1::ListModelsRequest::default()).await;
        list.unwrap().into_inner().models.is_empty().then_some(())
    };
    comes("no model is listed", look).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pinned_is_not_evicted_until_it_is_unpinned() {
    let mut node = Node::start().await;
    let reference = node.home.image("a", &[("w", "12345")]);
    let pin =
        v1::PinRequest { model: named(&reference), owner: "team-a".into(), ..Default::default() };
    let absent = node.cache.pin(pin.clone()).await.unwrap_err();
    assert_eq!(absent.code(), Code::NotFound);
    let details = absent.get_error_details();
    assert_eq!(details.resource_info().unwrap().resource_name, reference);

    node.home.json(&["pull", &reference]);
    let dry = v1::PinRequest { validate_only: true, ..pin.clone() };
    let pinned = node.cache.pin(dry).await.unwrap().into_inner();
    let digest = pinned.model.unwrap().digest;
    let evict = v1::EvictRequest { model: named(&reference), ..Default::default() };
    let dry = v1::EvictRequest { validate_only: true, ..evict.clone() };
    let would = node.cache.evict(dry).await.unwrap().into_inner();
    assert!(would.removed && would.freed_bytes > 0, "{would:?}");

    node.cache.pin(pin.clone()).await.unwrap();
    let held = node.until(|model| model.pin.is_some()).await;
    assert_eq!(held.pin.unwrap(), v1::Pin { owner: "team-a".into(), expire_time: None });
    let store = node.locality.get_node(v1::GetNodeRequest::default()).await.unwrap();
    let store = store.into_inner().store.unwrap();
    assert_eq!((store.pinned_bytes, store.reclaimable_bytes), (5, 0));
    let refused = node.cache.evict(evict.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("pinned by team-a"), "{}", refused.message());
    assert!(refused.get_error_details().precondition_failure().is_some());

    let by_digest = Some(v1::ModelRef { digest, ..Default::default() });
    let owner: String = "team-a".into();
    let unpin = v1::UnpinRequest { model: by_digest, owner, request_id: "u".into() };
    for _ in 0..2 {
        let answer = node.cache.unpin(unpin.clone()).await.unwrap().into_inner();
        assert!(answer.removed, "and repeated: as before");
    }
    assert!(node.cache.evict(evict.clone()).await.unwrap().into_inner().removed);
    assert!(!node.cache.evict(evict).await.unwrap().into_inner().removed);
    let bad = v1::PinRequest { owner: "Team A".into(), ..pin };
    let refused = node.cache.pin(bad).await.unwrap_err();
    assert!(refused.message().starts_with("owner: "), "{}", refused.message());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reserved_room_is_told_and_given_back_and_more_than_there_is_is_refused() {
    let mut node = Node::start().await;
    let reserve = v1::ReserveSpaceRequest {
        reservation_id: "r1".into(),
        owner: "scheduler".into(),
        bytes: 4096,
        ttl: seconds(60),
        ..Default::default()
    };
    let mut dry = reserve.clone();
    (dry.validate_only, dry.bytes) = (true, u64::MAX);
    let answer = node.cache.reserve_space(dry).await.unwrap().into_inner();
    assert!(!answer.fit.unwrap().fits);
    for _ in 0..2 {
        let answer = node.cache.reserve_space(reserve.clone()).await.unwrap().into_inner();
        assert!(answer.fit.unwrap().fits && answer.expire_time.is_some());
    }
    let look = async || {
        let whole = node.locality.get_node(v1::GetNodeRequest::default()).await.unwrap();
        (whole.into_inner().store.unwrap().reserved_bytes == 4096).then_some(())
    };
    comes("4096 bytes are reserved", look).await;
    let mut huge = reserve.clone();
    (huge.reservation_id, huge.bytes) = ("r2".into(), 1 << 60);
    let refused = node.cache.reserve_space(huge).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(refused.get_error_details().error_info().unwrap().reason, "NO_SPACE");
    for (change, field) in [
        ((|r| r.bytes = 0) as fn(&mut v1::ReserveSpaceRequest), "bytes"),
        (|r| r.ttl = None, "ttl"),
        (|r| r.ttl = seconds(-1), "ttl"),
        (|r| r.ttl = seconds(100_000), "ttl"),
        (|r| r.reservation_id.clear(), "reservation_id"),
        (|r| r.owner.clear(), "owner"),
    ] {
        let mut wrong = reserve.clone();
        change(&mut wrong);
        let status = node.cache.reserve_space(wrong).await.unwrap_err();
        let details = status.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, field);
    }
    let release = v1::ReleaseSpaceRequest { reservation_id: "r1".into() };
    assert!(node.cache.release_space(release.clone()).await.unwrap().into_inner().released);
    assert!(!node.cache.release_space(release).await.unwrap().into_inner().released);
    node.stop().await;
}
