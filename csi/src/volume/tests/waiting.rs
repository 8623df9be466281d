//! Publishes that wait for a pull: how they end, and what becomes of the pull.

use std::time::Duration;

use super::*;
use crate::testing::GatedRegistry;

#[tokio::test]
async fn at_the_deadline_the_caller_hears_how_far_it_is_and_the_pull_goes_on() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let target = bench.world.target("a");
    let image = registry.reference();
    // One that waits for the layer holds the pull while the other's deadline passes.
    let waiting = request("csi-a", &target, &[("image", &image)], Duration::from_millis(300));
    let error = bench.volumes.publish(waiting).await.unwrap_err();
    let PublishError::StillPulling(progress) = &error else { panic!("{error:?}") };
    assert_eq!(progress.reference.to_string(), image);
    assert!(error.to_string().contains("the pull goes on"), "{error}");
    bench.assert_nothing_left(&target);

    registry.asked_for_a_layer().await;
    let asked = registry.layers_asked_for();
    registry.open();
    bench.publish("csi-a", &target, &image).await.unwrap();
    assert_eq!(registry.layers_asked_for(), asked, "the layer was asked for again");
}

#[tokio::test]
async fn a_pull_goes_on_when_its_caller_goes_away() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let target = bench.world.target("a");
    let image = registry.reference();
    tokio::select! {
        done = bench.publish("csi-a", &target, &image) => panic!("{done:?}"),
        () = registry.asked_for_a_layer() => {}
    }
    let mut changes = bench.world.puller.changes();
    registry.open();
    while bench.world.store.images().unwrap().is_empty() {
        changes.changed().await.unwrap();
    }
    bench.publish("csi-a", &target, &image).await.unwrap();
}

#[tokio::test]
async fn a_pull_stops_when_its_pod_is_gone_between_two_calls() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let (a, b) = (bench.world.target("a"), bench.world.target("b"));
    let image = registry.reference();
    let hasty = |id, target: &Path| {
        let request = request(id, target, &[("image", &image)], Duration::from_millis(50));
        bench.volumes.publish(request)
    };
    for (id, target) in [("csi-a", &a), ("csi-b", &b)] {
        let error = hasty(id, target).await.unwrap_err();
        assert!(matches!(error, PublishError::StillPulling(_)), "{error:?}");
    }
    // A volume that shares the id is another pod's.
    bench.unpublish("csi-a", &b).await.unwrap();
    assert_eq!(bench.world.puller.pulls().len(), 1, "the other pod may come again");
    bench.unpublish("csi-a", &a).await.unwrap();
    bench.until_quiet().await;
    assert_eq!(bench.world.puller.traffic().cancelled_pulls, 1);
    registry.open();
    bench.publish("csi-a", &a, &image).await.unwrap();
}

#[tokio::test]
async fn a_pull_stops_after_the_grace_period_unless_the_kubelet_asks_again() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let grace = Duration::from_millis(300);
    let volumes = bench.volumes.clone().with_pull_grace(grace);
    let bench = Bench { volumes, ..bench };
    let target = bench.world.target("a");
    let image = registry.reference();
    let hasty = |timeout| {
        let request = request("csi-a", &target, &[("image", &image)], timeout);
        bench.volumes.publish(request)
    };
    hasty(Duration::from_millis(50)).await.unwrap_err();
    registry.asked_for_a_layer().await;
    let asked = registry.layers_asked_for();
    // This one lasts longer than the grace period of the one before, and has its own afterwards.
    let error = hasty(2 * grace).await.unwrap_err();
    assert!(matches!(error, PublishError::StillPulling(_)), "{error:?}");
    assert_eq!(bench.world.puller.pulls().len(), 1);
    assert_eq!(registry.layers_asked_for(), asked, "it is the same pull");
    bench.until_quiet().await;
    assert_eq!(bench.world.puller.traffic().cancelled_pulls, 1);
    registry.open();
    bench.publish("csi-a", &target, &image).await.unwrap();
}

#[tokio::test]
async fn the_first_publish_of_a_slow_pull_is_answered_early_and_the_next_one_waits() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let volumes = bench.volumes.clone().with_first_answer(Duration::from_millis(200));
    let bench = Bench { volumes, ..bench };
    let image = registry.reference();
    for name in ["a", "b"] {
        let target = bench.world.target(name);
        // Its caller would wait for a minute.
        let error = bench.publish(name, &target, &image).await.unwrap_err();
        assert!(matches!(error, PublishError::StillPulling(_)), "{error:?}");
        bench.assert_nothing_left(&target);
    }
    let target = bench.world.target("a");
    let (published, ()) = tokio::join!(bench.publish("a", &target, &image), async {
        tokio::time::sleep(Duration::from_millis(600)).await;
        registry.open();
    });
    assert!(!published.unwrap(), "it waited for the pull");
    assert_eq!(registry.layers_asked_for(), 1);

    // After an unpublish it is another pod's first.
    bench.unpublish("a", &target).await.unwrap();
    assert!(!bench.publish("a", &target, &image).await.unwrap());
}

#[tokio::test]
async fn an_unpublish_ends_a_publish_that_waits() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let target = bench.world.target("a");
    let image = registry.reference();
    let (published, ()) = tokio::join!(bench.publish("csi-a", &target, &image), async {
        registry.asked_for_a_layer().await;
        bench.unpublish("csi-a", &target).await.unwrap();
    });
    assert!(matches!(published, Err(PublishError::Withdrawn(_))), "{published:?}");
    bench.assert_nothing_left(&target);
    registry.open();
    bench.publish("csi-a", &target, &image).await.unwrap();
    assert_eq!(bench.mounts().len(), 1);
}

#[tokio::test]
async fn a_second_publish_of_a_target_waits_for_the_first() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let target = bench.world.target("a");
    let image = registry.reference();
    let (first, second, ()) = tokio::join!(
        bench.publish("csi-a", &target, &image),
        async {
            registry.asked_for_a_layer().await;
            let hasty = request("csi-a", &target, &[("image", &image)], Duration::from_millis(50));
            let error = bench.volumes.publish(hasty).await.unwrap_err();
            assert!(matches!(error, PublishError::Busy(_)), "{error:?}");
            registry.open();
            bench.publish("csi-a", &target, &image).await
        },
        async {}
    );
    assert_eq!((first.unwrap(), second.unwrap()), (false, true));
    assert_eq!(bench.mounts().len(), 1);
}

#[tokio::test]
async fn a_stop_ends_every_wait() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let target = bench.world.target("a");
    let image = registry.reference();
    let (published, ()) = tokio::join!(bench.publish("csi-a", &target, &image), async {
        registry.asked_for_a_layer().await;
        bench.volumes.stop();
    });
    assert!(matches!(published, Err(PublishError::Stopping)), "{published:?}");
    bench.assert_nothing_left(&target);
}

#[tokio::test]
async fn fifty_pods_share_one_pull() {
    let registry = GatedRegistry::start().await;
    let bench = Bench::new(Some(&registry));
    let image = registry.reference();
    let mut pods = tokio::task::JoinSet::new();
    for pod in 0..50 {
        let target = bench.world.target(&format!("pod-{pod}"));
        let request =
            request(&format!("csi-{pod}"), &target, &[("image", &image)], Duration::from_secs(60));
        let volumes = bench.volumes.clone();
        pods.spawn(async move { volumes.publish(request).await });
    }
    registry.asked_for_a_layer().await;
    registry.open();
    while let Some(published) = pods.join_next().await {
        assert!(!published.unwrap().unwrap().already);
    }
    assert_eq!(bench.mounts().len(), 50);
    assert_eq!(registry.layers_asked_for(), 1);
}
