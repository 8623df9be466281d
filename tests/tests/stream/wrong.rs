//! Layers, chunks and tables of contents that are not what the manifest names.

use super::*;

/// A registry that has other bytes of a layer than it should have, for each request that `alters`.
async fn altering(
    layer: &Layer,
    at: usize,
    alters: impl Fn((u64, u64)) -> bool + Send + Sync + 'static,
) -> (Image, Scripted) {
    let mut altered = layer.clone();
    altered.bytes[at] ^= 1;
    let (right, wrong) = (image_of(std::slice::from_ref(layer)), image_of(&[altered]));
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
async fn a_layer_that_turns_out_wrong_is_not_readable_any_more_and_leaves_nothing() {
    let (image, mut altered) = (one_layer(), shard(2));
    altered[5_000_000] ^= 1;
    let wrong = tar_of([&shard(1), &altered, &shard(3)]);
    let gate = Gate::closed_at(OPEN_BYTES);
    let (right, served, passing) = (image.clone(), wrong.clone(), gate.clone());
    let server = Scripted::start(move |request| {
        let (asked, given) = (right.layers[0].to_string(), served.layers[0].to_string());
        if !request.target.ends_with(&asked) {
            return right.answer(request);
        }
        let mut request = request.clone();
        request.target = request.target.replace(&asked, &given);
        match range_of(&request) {
            Some((from, to)) if from < SHARD_BYTES as u64 && to > OPEN_BYTES => {
                served.answer_gated(&request, &passing)
            }
            _ => served.answer(&request),
        }
    })
    .await;
    let (node, pull, arriving) = Machine::streaming(&server, &image, "tar").await;
    let second = file(&arriving, "models/model-2.safetensors");
    assert!(read(second, 0, SHARD_BYTES).await == altered, "nobody can know yet");
    let fused = can_fuse("reads through the mount of a wrong layer");
    let mount = fused.then(|| node.mount(&arriving, PATIENT));
    gate.open();
    let error = pull.wait().await.unwrap_err();
    assert!(matches!(error, PullError::Mismatch(_)), "{error}");
    assert!(second.has(0..1).unwrap_err().to_string().contains("the source altered them"));
    if let Some(mount) = mount {
        let path = node.target().join("models/config.json");
        let read = tokio::task::spawn_blocking(move || {
            let read = fs::read(path);
            drop(mount);
            read
        });
        assert_eq!(read.await.unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    assert_eq!(node.store().image(&image.digest()).unwrap(), None);
    for folder in ["ingest", "leases", "trees", "refs", "layers"] {
        assert_eq!(files_below(&node.store().root().join(folder)), Files::new(), "{folder}");
    }
    assert_eq!(node.store().usage().unwrap().objects, 0);
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
        let (node, pull, arriving) = Machine::streaming(&server, &image, kind).await;
        let second = file(&arriving, "models/model-2.safetensors");
        assert!(read(second, 0, SHARD_BYTES).await == shard(2), "{kind}");
        pull.wait().await.unwrap();
        node.assert_is_plain(&image, kind).await;
        assert_eq!(times.load(Ordering::Relaxed), 2, "{kind}: once more");

        let (image, server) = altering(&layer, at, |_| true).await;
        let (node, pull, arriving) = Machine::streaming(&server, &image, kind).await;
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
        let image = image_of(&[layer.annotated(name, &Digest::of(b"another table").to_string())]);
        let served = image.clone();
        let server = Scripted::start(move |request| served.answer(request)).await;
        let node = Machine::new(&server.host());
        let pull = node.start(&server.host(), &image, true);
        if let Some(arriving) = pull.arriving().await {
            assert_eq!(arriving.waited_for(), 1, "{kind}");
        }
        pull.wait().await.unwrap();
        node.assert_is_plain(&image, kind).await;
        let progress = pull.progress();
        assert_eq!(progress.done_bytes, progress.total_bytes, "{kind}");
    }
}
