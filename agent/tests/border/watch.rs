//! A watch over the socket, with an agent that pulls.

use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use carport_proto::carport::v1::watch_response::Event;
use carport_proto::client::connect;
use tonic::{Code, Streaming};

use crate::support::{Home, PATIENCE};

/// Reads until an event is as wanted; the newest revision that was seen.
async fn until(
    stream: &mut Streaming<v1::WatchResponse>,
    wanted: impl Fn(&Event) -> bool,
) -> v1::Revision {
    let read = async {
        let mut newest = None;
        loop {
            let message = stream.message().await.unwrap().unwrap();
            newest = message.revision.or(newest);
            if let (true, Some(newest)) = (wanted(&message.event.unwrap()), newest.clone()) {
                return newest;
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_and_a_removal_are_heard_also_by_who_comes_back() {
    let home = Home::new();
    let reference = home.image("a", &[("w", "12345")]);
    let agent = home.agent(&[]);
    let channel = connect(&home.socket()).await.unwrap();
    let mut locality = LocalityServiceClient::new(channel.clone());
    let watch = |resume_from| v1::WatchRequest { resume_from, ..Default::default() };
    let mut stream = locality.watch(watch(None)).await.unwrap().into_inner();
    let synced = until(&mut stream, |event| matches!(event, Event::Synced(_))).await;

    let model = v1::ModelRef { reference: reference.clone(), ..Default::default() };
    let prefetch = v1::PrefetchRequest { model: Some(model), ..Default::default() };
    CacheServiceClient::new(channel).prefetch(prefetch).await.unwrap();
    let is_ready = |event: &Event| {
        matches!(event, Event::Upsert(model) if model.state() == v1::ModelState::Ready
            && model.total_bytes == Some(5))
    };
    let ready = until(&mut stream, is_ready).await;
    assert!(ready.sequence > synced.sequence && ready.epoch == synced.epoch);
    home.json(&["rm", &reference]);
    let is_gone =
        |event: &Event| matches!(event, Event::Delete(model) if model.reference == reference);
    let gone = until(&mut stream, is_gone).await;

    let mut again = locality.watch(watch(Some(synced))).await.unwrap().into_inner();
    until(&mut again, is_ready).await;
    until(&mut again, is_gone).await;
    let other = v1::Revision { epoch: "before".into(), ..gone };
    let refused = locality.watch(watch(Some(other))).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);

    tokio::task::spawn_blocking(move || agent.terminate()).await.unwrap();
    let end = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a watch ends with a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Unavailable, "{end:?}");
}
