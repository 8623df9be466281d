//! Files that other images brought.

use super::*;

/// A node that has two of the shards, and a fine-tune that has another third.
async fn over_a_base(kind: &str) -> (Image, Image) {
    let raw = |seeds: &[u64]| {
        let mut layout = Layout::new();
        let layers: Vec<_> = seeds
            .iter()
            .map(|seed| {
                let named = json!({"org.cncf.model.filepath": format!("model-{seed}.safetensors")});
                Layer::raw("application/vnd.cncf.model.weight.v1.raw", named, &shard(*seed))
            })
            .collect();
        let config = ("application/vnd.cncf.model.config.v1+json", &json!({}));
        let digest = layout.add("v1", "", config, &layers);
        Image::of_layout(&layout, &digest)
    };
    let (base, tune) = ([1, 2], [1, 2, 30]);
    match kind {
        "raw" => {
            // By another name for each file, so that no layer is the same.
            let files: Vec<_> =
                base.iter().map(|seed| (format!("f{seed}"), shard(*seed))).collect();
            let mut tar = Tar::default();
            for (name, content) in &files {
                tar = tar.file(name, content);
            }
            (Image::of(&[tar.end()]), raw(&tune))
        }
        _ => (raw(&base), image_of(&[packed_layer(kind, tune)])),
    }
}

fn both(base: &Image, tune: &Image) -> impl Fn(&Request) -> Answer + Send + Sync + 'static {
    let (base, tune) = (base.clone(), tune.clone());
    move |request| match base.has(&request.target) {
        true => base.answer(request),
        false => tune.answer(request),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_known_to_be_here_are_readable_at_once_and_not_fetched() {
    if !tools() {
        return;
    }
    for (kind, below) in [("zstd:chunked", "models/"), ("estargz", "models/"), ("raw", "")] {
        let (base, tune) = over_a_base(kind).await;
        let server = Scripted::start(both(&base, &tune)).await;
        let host = server.host();
        let node = Machine::new(&host);
        node.start(&host, &base, false).wait().await.unwrap();
        let objects = node.store().usage().unwrap().objects;
        let pull = node.start(&host, &tune, true);
        let arriving = pull.arriving().await.unwrap_or_else(|| panic!("{kind}: not listed"));
        assert_eq!(arriving.waited_for(), 0, "{kind}");
        for n in [1, 2] {
            let here = file(&arriving, &format!("{below}model-{n}.safetensors"));
            assert_eq!(here.has(0..SHARD_BYTES as u64), Ok(true), "{kind}: {n}");
            assert!(read(here, 0, SHARD_BYTES).await == shard(n), "{kind}: {n}");
        }
        let pulled = pull.wait().await.unwrap();
        // The new shard, and of each other a chunk for a sample, and of eStargz what is between.
        let most = (SHARD_BYTES + 6 * CHUNK_BYTES) as u64;
        assert!(pulled.fetched_bytes < most, "{kind}: {}", pulled.fetched_bytes);
        assert!(pulled.fetched_bytes >= SHARD_BYTES as u64, "{kind}");
        let progress = pull.progress();
        assert_eq!(progress.done_bytes, progress.total_bytes, "{kind}");
        assert_eq!(
            listing(&node.store().rootfs(&pulled.digest)),
            plain_tree(&tune).await,
            "{kind}"
        );
        let new = if kind == "raw" { 1 } else { 3 };
        assert_eq!(node.store().usage().unwrap().objects, objects + new, "{kind}: the very files");
        node.assert_nothing_is_under_way();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_file_that_is_damaged_ends_the_stream_and_is_fetched_by_the_next() {
    if !tools() {
        return;
    }
    let (base, tune) = over_a_base("zstd:chunked").await;
    let server = Scripted::start(both(&base, &tune)).await;
    let host = server.host();
    let node = Machine::new(&host);
    node.start(&host, &base, false).wait().await.unwrap();
    let hex = blake3::hash(&shard(2)).to_hex();
    let object = node.store().root().join("objects").join(&hex[..2]).join(hex.as_str());
    let damaged = File::options().write(true).open(&object).unwrap();
    damaged.write_all_at(b"rot", 3 * CHUNK_BYTES as u64 + 5).unwrap();

    let error = node.start(&host, &tune, true).wait().await.unwrap_err();
    assert!(matches!(error, PullError::Mismatch(_)), "{error}");
    assert!(!object.exists(), "it is no object any more");
    let pulled = node.start(&host, &tune, true).wait().await.unwrap();
    assert_eq!(listing(&node.store().rootfs(&pulled.digest)), plain_tree(&tune).await);
    node.assert_nothing_is_under_way();
}
