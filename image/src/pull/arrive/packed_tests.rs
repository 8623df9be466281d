use std::io::Read as _;

use futures_util::FutureExt as _;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::layer::{Landed, Landing, LayerError, Listing, Want};
use crate::manifest::{Compression, Layer};
use crate::pull::toc;
use crate::store::Store;
use crate::testing::arriving::{self, ask, file, ingest, members, opens_as, plain};
use crate::testing::{Entry, chunked, layer_of, noise, store};
use crate::tree::LayerEntry;

const KINDS: [Compression; 2] = [Compression::Zstd, Compression::Gzip];

fn contents(layer: Layer, blob: &[u8]) -> Result<crate::layer::Contents, String> {
    let tail = &blob[blob.len().saturating_sub(toc::TAIL_BYTES as usize)..];
    let footer = toc::footer(tail, layer.blob.size, layer.compression).ok_or("no footer")?;
    let table = &blob[footer.toc.start as usize..footer.toc.end as usize];
    toc::contents(&footer, table, layer.toc)
}

/// Lists a layer whose bytes these are; also what was read between frames.
fn list(
    ingest: &Ingest,
    layer: Layer,
    blob: &[u8],
    piece: u64,
) -> Result<(Listing, Landing, u64), LayerError> {
    let contents = contents(layer, blob).map_err(LayerError::Refused)?;
    let here = left(ingest, Some(contents.table))?;
    let mut lister = PackedLister::new(ingest.folder(), layer, contents, here)?;
    let mut read = 0;
    for range in lister.reads().collect::<Vec<_>>() {
        for start in range.clone().step_by(piece as usize) {
            let end = range.end.min(start + piece);
            lister.take(&blob[start as usize..end as usize])?;
            read += end - start;
        }
    }
    let (listing, landing) = lister.finish()?;
    Ok((listing, landing, read))
}

fn land(
    landing: &Landing,
    (layer, blob): (Layer, &[u8]),
    range: &Range<u64>,
) -> Result<(), Unlanded> {
    let (mut unpack, packed) = landing.unpack(range, layer.compression);
    let bytes = Bytes::copy_from_slice(&blob[packed.start as usize..packed.end as usize]);
    for at in (0..bytes.len()).step_by(77_777) {
        let part = bytes.slice(at..bytes.len().min(at + 77_777));
        landing.land_frames(0, &mut unpack, &[part])?;
    }
    Ok(())
}

/// Brings the rest and commits it, as `proof` says.
fn complete(
    ingest: Arc<Ingest>,
    listed: (&Listing, &Landing),
    (layer, blob): (Layer, &[u8]),
    proof: Digest,
    store: &Store,
) -> Result<Vec<LayerEntry>, String> {
    let land = |range: &Range<u64>| land(listed.1, (layer, blob), range);
    arriving::complete(ingest, listed, layer, proof, store, land)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..Default::default() })]

    #[test]
    fn in_any_order_a_layer_becomes_what_it_is_in_order(
        files in prop::collection::vec(file(900_000..3_500_000), 0..5),
        asked in prop::collection::vec((any::<prop::sample::Index>(), 0..3_500_000_u64), 0..6),
        kind in prop::sample::select(&KINDS[..]),
        chunk in prop::sample::select(vec![60_000, 400_001, 1 << 20, 4 << 20]),
        piece in prop::sample::select(vec![1000_u64, 300_000]),
    ) {
        let (tar, blob) = chunked(&members(&files), (kind, chunk), &|_| {});
        let layer = layer_of(&blob, kind);
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        let (listing, landing, _) = list(&ingest, layer, &blob, piece).unwrap();
        let land = |range: &Range<u64>| land(&landing, (layer, &blob), range);
        ask((&listing, &landing), asked, &tar, land)?;
        let of_blob = (layer, &blob[..]);
        let proof = Digest::of(&tar);
        let entries = complete(ingest, (&listing, &landing), of_blob, proof, &store).unwrap();
        prop_assert_eq!(&entries, &plain(layer, &blob).unwrap());
        let record = store.layer_as(&layer, Some(&proof)).unwrap().unwrap();
        prop_assert_eq!(&record.entries, &entries);
        prop_assert!(store.layer_as(&layer, None).unwrap().is_none(), "the blob was not seen");
        opens_as((&listing, &landing), &tar)?;
    }

    #[test]
    fn whatever_a_table_says_nothing_wrong_gets_a_name(
        kind in prop::sample::select(&KINDS[..]),
        entry in 0..12_usize,
        key in prop::sample::select(vec![
            "offset", "endOffset", "innerOffset", "size", "chunkOffset", "chunkSize", "mode",
            "digest", "chunkDigest", "type", "name",
        ]),
        value in prop_oneof![
            prop::sample::select(vec![0, 1, 511, 512, 600_000, 1_200_000, u64::MAX, u64::MAX - 1])
                .prop_map(|n| json!(n)),
            (0..4_000_000_u64).prop_map(|n| json!(n)),
            prop::sample::select(vec!["reg", "chunk", "dir", "symlink", "char", "../x", "a", ""])
                .prop_map(|text| json!(text)),
            Just(json!(Digest::of(b"something else"))),
        ],
        moved in prop::option::of(0..12_usize),
    ) {
        let (large, small) = (noise(1, 1_300_000), noise(2, 5000));
        let members = [
            Entry::File("first", &large),
            Entry::File("small", &small),
            Entry::Exec("second", &large[..1_200_000]),
        ];
        let edit = |toc: &mut Value| {
            let entries = toc["entries"].as_array_mut().unwrap();
            let count = entries.len();
            entries[entry % count][key] = value.clone();
            if let Some(other) = moved {
                entries.swap(entry % count, other % count);
            }
        };
        let (tar, blob) = chunked(&members, (kind, 400_000), &edit);
        let layer = layer_of(&blob, kind);
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        if let Ok((listing, landing, _)) = list(&ingest, layer, &blob, 100_000) {
            let proof = Digest::of(&tar);
            if let Ok(found) = complete(ingest, (&listing, &landing), (layer, &blob), proof, &store) {
                prop_assert_eq!(found, plain(layer, &blob).unwrap());
            }
        }
    }
}

#[test]
fn of_large_files_only_what_lies_between_is_read_to_list_them() {
    let large = noise(1, 6_000_000);
    let members = [Entry::File("a", &large), Entry::File("b", &large), Entry::File("c", b"c")];
    // The last chunk of eStargz comes with what follows.
    for (kind, most) in [(Compression::Zstd, 5_000), (Compression::Gzip, 2 * 100_000 + 25_000)] {
        let (_, blob) = chunked(&members, (kind, 100_000), &|_| {});
        let layer = layer_of(&blob, kind);
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        let (listing, landing, read) = list(&ingest, layer, &blob, 4096).unwrap();
        let sizes: Vec<_> = listing.files().map(|file| file.size).collect();
        assert_eq!(sizes, [6_000_000, 6_000_000, 1], "{kind:?}");
        assert!(read < most, "{kind:?}: {read} bytes");
        assert!(landing.missing_frames_bytes() > 11_000_000, "{kind:?}");
    }
}

#[test]
fn heads_come_first_and_a_reader_before_them() {
    let large = noise(1, 6_000_000);
    let members = [Entry::File("z", &large), Entry::File("m", &large)];
    for kind in KINDS {
        let (_, blob) = chunked(&members, (kind, 100_000), &|_| {});
        let layer = layer_of(&blob, kind);
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        let (listing, landing, _) = list(&ingest, layer, &blob, 4096).unwrap();
        let begins: Vec<_> = listing.files().map(|file| file.offset).collect();
        let wanted = begins[1] + 3_333_333..begins[1] + 3_333_334;
        let mut wait = Box::pin(landing.wait(&wanted));
        assert!(wait.as_mut().now_or_never().is_none());
        let piece = landing.next(false).unwrap();
        assert_eq!(piece.range.start, begins[1] + 3_300_000, "{kind:?}: a whole chunk");
        assert!(
            piece.want == Want::Asked && piece.range.end <= begins[1] + 6_000_000,
            "{kind:?}: {piece:?}"
        );
        land(&landing, (layer, &blob), &piece.range).unwrap();
        assert_eq!(wait.as_mut().now_or_never(), Some(Ok(())), "{kind:?}");
        let mut order = Vec::new();
        while let Some(piece) = landing.next(false) {
            let file = begins.iter().rposition(|begin| *begin <= piece.range.start).unwrap();
            order.push((file, piece.range.start - begins[file] >= 1_000_000));
            land(&landing, (layer, &blob), &piece.range).unwrap();
        }
        order.dedup();
        // The heads of z and m; then m by its name, and z.
        assert_eq!(order, [(0, false), (1, false), (1, true), (0, true)], "{kind:?}");
        assert_eq!(landing.missing_frames_bytes(), 0);
    }
}

#[test]
fn a_chunk_with_other_bytes_does_not_land() {
    let large = noise(1, 3_000_000);
    for kind in KINDS {
        let (_, blob) = chunked(&[Entry::File("a", &large)], (kind, 100_000), &|_| {});
        let (_, other) =
            chunked(&[Entry::File("a", &noise(2, 3_000_000))], (kind, 100_000), &|_| {});
        let layer = layer_of(&blob, kind);
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        let (listing, landing, _) = list(&ingest, layer, &blob, 4096).unwrap();
        let piece = landing.next(false).unwrap();
        let wrong = land(&landing, (layer, &other), &piece.range).unwrap_err();
        assert!(matches!(wrong, Unlanded::Wrong(_)), "{kind:?}: {wrong:?}");
        let begins = listing.files().next().unwrap().offset;
        assert_eq!(landing.has(&(begins..begins + 1)), Ok(false), "{kind:?}");
    }
}

#[test]
fn a_table_is_the_one_that_the_manifest_names_or_none() {
    let large = noise(1, 3_000_000);
    for kind in KINDS {
        let (_, blob) = chunked(&[Entry::File("a", &large)], (kind, 100_000), &|_| {});
        let plain = layer_of(&blob, kind);
        let tail = &blob[blob.len() - toc::TAIL_BYTES as usize..];
        let footer = toc::footer(tail, plain.blob.size, kind).unwrap();
        let table = &blob[footer.toc.start as usize..footer.toc.end as usize];
        let digest = match kind {
            Compression::Zstd => Digest::of(table),
            _ => {
                let mut tar = Vec::new();
                flate2::read::MultiGzDecoder::new(table).read_to_end(&mut tar).unwrap();
                let end = tar.windows(2).rposition(|two| two == b"}\0").unwrap();
                Digest::of(&tar[512..=end])
            }
        };
        assert!(contents(Layer { toc: Some(digest), ..plain }, &blob).is_ok(), "{kind:?}");
        let other = Layer { toc: Some(Digest::of(b"")), ..plain };
        assert!(contents(other, &blob).unwrap_err().contains("the manifest says"), "{kind:?}");
    }
}

#[test]
fn what_was_saved_is_here_the_next_time_as_whole_chunks() {
    let large = noise(1, 3_000_000);
    for kind in KINDS {
        let (tar, blob) = chunked(&[Entry::File("a", &large)], (kind, 100_000), &|_| {});
        let layer = layer_of(&blob, kind);
        let (_folder, store) = store();
        let right = ingest(&store, &layer);
        let (listing, landing, _) = list(&right, layer, &blob, 4096).unwrap();
        let begins = listing.files().next().unwrap().offset;
        land(&landing, (layer, &blob), &(begins + 300_000..begins + 900_000)).unwrap();
        // As if half of a chunk had been recorded.
        landing.save(&right).unwrap();
        let mut landed = right.landed::<Landed>().unwrap();
        landed.here.remove(begins + 850_000..begins + 900_000);
        right.save_landed(&landed).unwrap();
        drop((right, listing, landing));

        let store = Store::open(store.root()).unwrap();
        let right = ingest(&store, &layer);
        let (listing, landing, _) = list(&right, layer, &blob, 4096).unwrap();
        assert_eq!(landing.has(&(begins + 300_000..begins + 800_000)), Ok(true), "{kind:?}");
        assert_eq!(landing.has(&(begins + 800_000..begins + 800_001)), Ok(false), "{kind:?}");
        let of_blob = (layer, &blob[..]);
        let entries =
            complete(right, (&listing, &landing), of_blob, Digest::of(&tar), &store).unwrap();
        assert_eq!(entries, plain(layer, &blob).unwrap(), "{kind:?}");
    }
}

#[test]
fn what_landed_by_another_table_is_not_taken_over() {
    let large = noise(1, 3_000_000);
    let (_, blob) = chunked(&[Entry::File("a", &large)], (KINDS[0], 100_000), &|_| {});
    let layer = layer_of(&blob, KINDS[0]);
    let (_folder, store) = store();
    let ingest = ingest(&store, &layer);
    let (_, landing, _) = list(&ingest, layer, &blob, 4096).unwrap();
    let piece = landing.next(false).unwrap();
    land(&landing, (layer, &blob), &piece.range).unwrap();
    landing.save(&ingest).unwrap();
    let table = contents(layer, &blob).unwrap().table;
    assert!(left(&ingest, Some(table)).unwrap().covers(&piece.range));
    assert_eq!(left(&ingest, Some(Digest::of(b"another"))).unwrap().total(), 0);
    assert!(!ingest.has_landed(), "nor can it be found later");
}
