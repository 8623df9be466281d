//! Chunks and tables of contents that are not what the manifest names.

use super::*;

/// A registry that has other bytes of a layer than it should have, for each request that `alters`.
async fn altering(
    layer: &Layer,
    at: usize,
    alters: impl Fn((u64, u64)) -> bool + Send + Sync + 'static,
) -> (Image, Scripted) {
    let mut altered = layer.clone();
    altered.bytes[at] ^= 1;
    let (right, wrong) = (image_of(layer), image_of(&altered));
    let image = right.clone();
    let server = Scripted::start(move |request| {
        let (asked, given) = (right.layers[0].to_string(), wrong.layers[0].to_string());
        let at = at as u64;
        match range_of(request) {
            Some((from, to))
                if request.target.ends_with(&asked)
                    && (from..to).contains(&at)
                    && alters((from, to)) =>
            {
                let target = request.target.replace(&asked, &given);
                wrong.answer(&Request { target, ..request.clone() })
            }
            _ => right.answer(request),
        }
    });
    (image, server.await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_chunk_is_fetched_once_more_and_never_handed_out() {
    if !tools() {
        return;
    }
    for kind in ["zstd:chunked", "estargz"] {
        let layer = packed_layer(kind, [1, 2, 3]);
        // In a chunk of the second shard.
        let at = SHARD_BYTES + 5_500_000;
        let times = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&times);
        let once = move |_| counted.fetch_add(1, Ordering::Relaxed) == 0;
        let (image, server) = altering(&layer, at, once).await;
        let node = Machine::new(&server.host());
        let pull = node.start(&server.host(), &image, true);
        let arriving = pull.arriving().await.unwrap_or_else(|| panic!("{kind}: not listed"));
        let second = file(&arriving, "models/model-2.safetensors");
        assert!(read(second, 0, SHARD_BYTES).await == shard(2), "{kind}");
        let pulled = pull.wait().await.unwrap();
        assert_eq!(
            listing(&node.store().rootfs(&pulled.digest)),
            plain_tree(&image).await,
            "{kind}"
        );
        assert_eq!(times.load(Ordering::Relaxed), 2, "{kind}: once more");

        let (image, server) = altering(&layer, at, |_| true).await;
        let node = Machine::new(&server.host());
        let pull = node.start(&server.host(), &image, true);
        let arriving = pull.arriving().await.unwrap_or_else(|| panic!("{kind}: not listed"));
        let second = file(&arriving, "models/model-2.safetensors");
        let waited = second.wait(5_500_000..5_500_001);
        let waited = tokio::time::timeout(PATIENT, waited).await.unwrap();
        assert!(waited.unwrap_err().to_string().contains("not the chunk"), "{kind}");
        let error = pull.wait().await.unwrap_err();
        assert!(matches!(error, PullError::Mismatch(_)), "{kind}: {error}");
        assert!(file(&arriving, "models/model-1.safetensors").has(0..1).is_err(), "{kind}");
        assert_eq!(node.store().usage().unwrap().objects, 0, "{kind}");
        node.assert_nothing_is_under_way();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_with_another_table_than_the_manifest_names_is_waited_for() {
    if !tools() {
        return;
    }
    for (kind, name) in [
        ("zstd:chunked", "io.github.containers.zstd-chunked.manifest-checksum"),
        ("estargz", "containerd.io/snapshot/stargz/toc.digest"),
    ] {
        let layer = packed_layer(kind, [1, 2, 3]);
        assert!(layer.annotations[name].is_string(), "{kind} says it");
        let image = image_of(&layer.annotated(name, &Digest::of(b"another table").to_string()));
        let served = image.clone();
        let server = Scripted::start(move |request| served.answer(request)).await;
        let node = Machine::new(&server.host());
        let pull = node.start(&server.host(), &image, true);
        if let Some(arriving) = pull.arriving().await {
            assert_eq!(arriving.waited_for(), 1, "{kind}");
        }
        let pulled = pull.wait().await.unwrap();
        assert_eq!(
            listing(&node.store().rootfs(&pulled.digest)),
            plain_tree(&image).await,
            "{kind}"
        );
        let progress = pull.progress();
        assert_eq!(progress.done_bytes, progress.total_bytes, "{kind}");
    }
}
