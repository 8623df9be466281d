//! Watchers of a node whose state a test makes.

use carport_image::pull::PullOptions;
use carport_image::source::{RegistryOptions, Sources};
use carport_image::{Puller, Store};
use futures_util::StreamExt as _;
use tokio::sync::watch;
use tonic::Code;

use super::*;
use crate::run::Phase;
use crate::state::fixtures::{image, node};
use crate::warm::Warmer;

struct Bench {
    _dir: tempfile::TempDir,
    state: watch::Sender<Arc<NodeState>>,
    api: Api,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        let sources = Sources::new(RegistryOptions::default()).unwrap();
        let puller = Puller::new(store, sources, PullOptions::default());
        let (state, seen) = watch::channel(Arc::new(node(vec![image("r/a:1", 1)])));
        let (_, phase) = watch::channel(Phase::Serving);
        Self {
            _dir: dir,
            state,
            api: Api::new(
                "n".into(),
                seen,
                phase,
                puller.clone(),
                Warmer::new(puller.store().clone()),
                None,
            ),
        }
    }

    /// The node has these images now.
    fn hold(&self, names: &[&str]) {
        let mut next = node(names.iter().map(|name| image(name, 1)).collect());
        // What could go changes with them, and would be told of the node each time.
        next.evictable_bytes = self.state.borrow().evictable_bytes;
        let before = self.state.borrow().revision.clone();
        next.revision = Revision { sequence: before.sequence + 1, ..before };
        self.api.feed.tell_changes(&self.api, &next);
        self.state.send_replace(Arc::new(next));
    }

    fn revision(&self) -> v1::Revision {
        convert::revision(&self.state.borrow().revision)
    }

    /// What a new watcher hears until it is told that nothing more is there.
    async fn hear(&self, request: &v1::WatchRequest) -> Vec<String> {
        let mut stream = self.api.watch_from(request).unwrap();
        let mut heard = Vec::new();
        loop {
            let message = stream.next().await.unwrap().unwrap();
            heard.push(told(&message));
            if matches!(message.event, Some(Event::Synced(_))) {
                return heard;
            }
        }
    }
}

fn told(message: &v1::WatchResponse) -> String {
    let name = |model: &Option<v1::ModelRef>| model.clone().unwrap().reference;
    let event = match message.event.as_ref().unwrap() {
        Event::Node(_) => "node".into(),
        Event::Upsert(model) => format!("+{}", name(&model.model)),
        Event::Delete(model) => format!("-{}", model.reference),
        Event::Progress(progress) => format!("progress {}", name(&progress.model)),
        Event::Gpus(_) => "gpus".into(),
        Event::Synced(_) => "synced".into(),
        Event::Heartbeat(_) => "heartbeat".into(),
    };
    match &message.revision {
        Some(revision) => format!("{event} @{}", revision.sequence),
        None => event,
    }
}

#[tokio::test]
async fn a_watch_begins_with_all_that_is_and_goes_on_with_what_changes() {
    let bench = Bench::new();
    let request = v1::WatchRequest { include_gpus: true, ..Default::default() };
    let all = ["node", "gpus", "+docker.io/r/a:1", "synced @0"];
    assert_eq!(bench.hear(&request).await, all);
    let mut stream = bench.api.watch_from(&v1::WatchRequest::default()).unwrap();
    for _ in 0..3 {
        stream.next().await.unwrap().unwrap();
    }
    bench.hold(&["r/b:1"]);
    for expected in ["-docker.io/r/a:1", "+docker.io/r/b:1 @1"] {
        assert_eq!(told(&stream.next().await.unwrap().unwrap()), expected);
    }
}

#[tokio::test]
async fn who_resumes_hears_what_it_missed_and_no_more() {
    let bench = Bench::new();
    let from = bench.revision();
    bench.hold(&["r/a:1", "r/b:1"]);
    let middle = bench.revision();
    bench.hold(&["r/b:1"]);
    let resume = |from| v1::WatchRequest { resume_from: Some(from), ..Default::default() };
    let all = ["+docker.io/r/b:1 @1", "-docker.io/r/a:1 @2", "synced @2"];
    assert_eq!(bench.hear(&resume(from)).await, all);
    assert_eq!(bench.hear(&resume(middle)).await, all[1..]);
    assert_eq!(bench.hear(&resume(bench.revision())).await, all[2..]);
}

#[tokio::test]
async fn what_is_no_longer_known_is_out_of_range() {
    let bench = Bench::new();
    let first = bench.revision();
    // Two messages each.
    for _ in 0..MAX_HISTORY / 4 {
        bench.hold(&["r/b:1"]);
        bench.hold(&["r/a:1"]);
    }
    let ask = |from| {
        let request = v1::WatchRequest { resume_from: Some(from), ..Default::default() };
        bench.api.watch_from(&request).err()
    };
    assert!(ask(first.clone()).is_none(), "the window is just full");
    bench.hold(&["r/b:1"]);
    for wrong in [
        first.clone(),
        v1::Revision { epoch: "another start".into(), ..bench.revision() },
        v1::Revision { sequence: 1 << 40, ..first },
    ] {
        let status = ask(wrong).unwrap();
        assert_eq!(status.code(), Code::OutOfRange);
        assert!(status.message().contains("resume_from"), "{}", status.message());
    }
    assert!(bench.api.feed.told().history_messages <= MAX_HISTORY);
}

#[tokio::test]
async fn who_reads_too_slowly_is_cut_off_with_a_code_and_the_others_are_not() {
    let bench = Bench::new();
    let mut slow = bench.api.watch_from(&v1::WatchRequest::default()).unwrap();
    let mut quick = bench.api.watch_from(&v1::WatchRequest::default()).unwrap();
    for _ in 0..3 {
        slow.next().await.unwrap().unwrap();
        quick.next().await.unwrap().unwrap();
    }
    for round in 0..=MAX_BEHIND {
        bench.hold(&[if round % 2 == 0 { "r/b:1" } else { "r/a:1" }]);
        for _ in 0..2 {
            quick.next().await.unwrap().unwrap();
        }
    }
    let status = slow.next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("watch again from the last revision"));
    assert!(slow.next().await.is_none(), "and that is the end");
}

#[tokio::test]
async fn who_chose_models_hears_of_others_only_that_time_passes() {
    let bench = Bench::new();
    let chosen = v1::ModelRef { reference: "r/b:1".into(), ..Default::default() };
    let request = v1::WatchRequest { models: vec![chosen], ..Default::default() };
    assert_eq!(bench.hear(&request).await, ["node", "synced @0"]);
    let mut stream = bench.api.watch_from(&request).unwrap();
    for _ in 0..2 {
        stream.next().await.unwrap().unwrap();
    }
    bench.hold(&["r/b:1"]);
    bench.hold(&["r/b:1", "r/c:1"]);
    for expected in ["+docker.io/r/b:1 @1", "heartbeat @2"] {
        assert_eq!(told(&stream.next().await.unwrap().unwrap()), expected);
    }
}
