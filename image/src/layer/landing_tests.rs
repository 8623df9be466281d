use std::sync::Arc;

use futures_util::FutureExt as _;
use proptest::prelude::*;

use super::*;
use crate::layer::{Lister, Listing};
use crate::manifest::{Blob, Compression, Content, Layer};
use crate::store::Store;
use crate::testing::arriving::{self, ask, file, ingest, members, opens_as, plain};
use crate::testing::{Entry, layer_of, noise, store, tar};
use crate::tree::LayerEntry;

fn raw_layer(content: &[u8]) -> Layer {
    let blob = Blob { digest: Digest::of(content), size: content.len() as u64 };
    Layer { blob, compression: Compression::None, content: Content::File, toc: None }
}

/// Lists a layer whose bytes these are; what was read for it.
fn list(ingest: &Ingest, layer: Layer, blob: &[u8]) -> (Listing, Landing, u64) {
    let here = ingest.landed::<Landed>().map(|landed| landed.here).unwrap_or_default();
    let mut lister = Lister::new(ingest.folder(), layer, here, None).unwrap();
    let mut read = 0;
    while let Some(range) = lister.next_read() {
        let bytes = &blob[range.start as usize..range.end as usize];
        read += bytes.len() as u64;
        lister.take(range.start, &Bytes::copy_from_slice(bytes)).unwrap();
    }
    let (listing, landing) = lister.finish().unwrap();
    (listing, landing, read)
}

fn land(landing: &Landing, blob: &[u8], range: &Range<u64>) -> Result<(), Unlanded> {
    let bytes = Bytes::copy_from_slice(&blob[range.start as usize..range.end as usize]);
    landing.land(0, range.start, &[bytes]).map_err(Unlanded::Disk)
}

/// Brings the rest, in the order in which it may come, and commits.
fn complete(
    ingest: Arc<Ingest>,
    listed: (&Listing, &Landing),
    layer: Layer,
    blob: &[u8],
    store: &Store,
) -> Vec<LayerEntry> {
    let land = |range: &Range<u64>| land(listed.1, blob, range);
    arriving::complete(ingest, listed, layer, layer.blob.digest, store, land).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..Default::default() })]

    #[test]
    fn in_any_order_a_layer_becomes_what_it_is_in_order(
        files in prop::collection::vec(file(500_000..3_000_000), 0..6),
        asked in prop::collection::vec((any::<prop::sample::Index>(), 0..3_000_000_u64), 0..6),
        end in any::<bool>(),
    ) {
        let mut blob = tar(&members(&files));
        if !end {
            // Many tools leave the end marker out.
            blob.truncate(blob.len() - 1024);
        }
        let layer = layer_of(&blob, Compression::None);
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        let (listing, landing, _) = list(&ingest, layer, &blob);
        let land = |range: &Range<u64>| land(&landing, &blob, range);
        ask((&listing, &landing), asked, &blob, land)?;
        let entries = complete(ingest, (&listing, &landing), layer, &blob, &store);
        prop_assert_eq!(&entries, &plain(layer, &blob).unwrap());
        prop_assert_eq!(&store.layer_as(&layer, None).unwrap().unwrap().entries, &entries);
        opens_as((&listing, &landing), &blob)?;
    }
}

#[test]
fn of_large_files_only_headers_are_read_to_list_them() {
    let large = noise(1, 8_000_000);
    let blob = tar(&[Entry::File("a", &large), Entry::File("b", &large), Entry::File("c", b"c")]);
    let layer = layer_of(&blob, Compression::None);
    let (_folder, store) = store();
    let ingest = ingest(&store, &layer);
    let (listing, _, read) = list(&ingest, layer, &blob);
    assert_eq!(
        listing.files().map(|file| file.size).collect::<Vec<_>>(),
        [8_000_000, 8_000_000, 1]
    );
    assert!(read < 100_000, "{read} bytes");
}

#[test]
fn small_files_and_heads_come_first_and_then_large_files_by_name() {
    let large = noise(1, 6_000_000);
    let blob =
        tar(&[Entry::File("z", &large), Entry::File("m", &large), Entry::File("s", b"small")]);
    let layer = layer_of(&blob, Compression::None);
    let (_folder, store) = store();
    let ingest = ingest(&store, &layer);
    let (listing, landing, _) = list(&ingest, layer, &blob);
    let offsets: Vec<_> = listing.files().map(|file| file.offset).collect();
    let mut at = Vec::new();
    while let Some(piece) = landing.next(false) {
        assert!(piece.want == Want::InOrder);
        let file = offsets.iter().rposition(|offset| *offset <= piece.range.start).unwrap();
        at.push((file, piece.range.start - offsets[file] >= HEAD_BYTES));
        land(&landing, &blob, &piece.range).unwrap();
    }
    at.dedup();
    // The heads of z and m; then m, then z. What was read for the list, such as all of s, is here.
    assert_eq!(at, [(0, false), (1, false), (1, true), (0, true)]);
}

#[test]
fn what_was_asked_for_goes_first_once_and_reading_on_is_foreseen() {
    let content = noise(3, 20_000_000);
    let layer = raw_layer(&content);
    let (_folder, store) = store();
    let ingest = ingest(&store, &layer);
    let (_, landing, read) = list(&ingest, layer, &content);
    assert!((1..100_000).contains(&read), "one read shows that ranges are served");
    assert_eq!(landing.next(true), None);
    let wanted = 15_000_000..15_100_000;
    let mut waits = [Box::pin(landing.wait(&wanted)), Box::pin(landing.wait(&wanted))];
    assert!(waits.iter_mut().all(|wait| wait.as_mut().now_or_never().is_none()));
    let piece = landing.next(false).unwrap();
    assert_eq!(
        piece,
        Piece { range: 15_000_000..15_000_000 + PIECE_BYTES, want: Want::Asked, round: 0 }
    );
    assert_eq!(landing.next(true), None, "who asks for the same waits for the same");
    let next = landing.next(false).unwrap();
    assert_eq!(next, Piece { range: piece.range.end..20_000_000, want: Want::Follows, round: 0 });
    assert_eq!(landing.has(&wanted), Ok(false));
    land(&landing, &content, &piece.range).unwrap();
    assert!(waits.iter_mut().all(|wait| wait.as_mut().now_or_never() == Some(Ok(()))));
    assert_eq!(landing.has(&wanted), Ok(true));
}

#[test]
fn the_end_is_told_to_who_waits() {
    let content = noise(4, 3_000_000);
    let layer = raw_layer(&content);
    for end in [End::Stopped("stopped".into()), End::Wrong("wrong".into())] {
        let (_folder, store) = store();
        let ingest = ingest(&store, &layer);
        let (_, landing, _) = list(&ingest, layer, &content);
        let (here, missing) = (0..10, 2_000_000..2_000_001);
        let mut wait = Box::pin(landing.wait(&missing));
        assert!(wait.as_mut().now_or_never().is_none());
        landing.end(end.clone());
        landing.end(End::Verified);
        assert_eq!(wait.as_mut().now_or_never(), Some(Err(end.clone())), "the first end counts");
        let there = landing.has(&here);
        match end {
            End::Wrong(_) => assert_eq!(there, Err(end), "also of what is here"),
            _ => assert_eq!(there, Ok(true), "what is here may be right"),
        }
    }
}

#[test]
fn what_is_given_back_is_fetched_again_and_does_not_land_late() {
    let content = noise(6, 12_000_000);
    let layer = raw_layer(&content);
    let (_folder, store) = store();
    let ingest = ingest(&store, &layer);
    let (listing, landing, _) = list(&ingest, layer, &content);
    let wanted = 9_000_000..9_000_001;
    let mut wait = Box::pin(landing.wait(&wanted));
    assert!(wait.as_mut().now_or_never().is_none());
    let first = landing.next(true).unwrap();
    let other = landing.next(false).unwrap();
    assert_eq!(landing.next(true), None, "it is under way");
    landing.give_back("the registry is away");
    assert_eq!(landing.trouble().as_deref(), Some("the registry is away"));
    assert!(wait.as_mut().now_or_never().is_none());
    let again = landing.next(true).unwrap();
    assert_eq!(again, Piece { round: 1, ..first.clone() }, "who waits asks again");

    let late = Bytes::from(vec![0; (first.range.end - first.range.start) as usize]);
    landing.land(first.round, first.range.start, &[late]).unwrap_err();
    assert_eq!(landing.has(&wanted), Ok(false));
    let range = again.range.clone();
    let bytes = Bytes::copy_from_slice(&content[range.start as usize..range.end as usize]);
    landing.land(again.round, range.start, &[bytes]).unwrap();
    assert_eq!(wait.as_mut().now_or_never(), Some(Ok(())));
    assert_eq!(landing.trouble(), None, "bytes come again");
    let mut left = Ranges::default();
    while let Some(piece) = landing.next(false) {
        left.insert(piece.range.clone());
        let bytes = &content[piece.range.start as usize..piece.range.end as usize];
        landing.land(piece.round, piece.range.start, &[Bytes::copy_from_slice(bytes)]).unwrap();
    }
    assert!(left.covers(&other.range), "what was under way for nobody comes as well");
    let entries = complete(ingest, (&listing, &landing), layer, &content, &store);
    assert_eq!(entries, plain(layer, &content).unwrap());
}

#[test]
fn what_was_saved_is_here_the_next_time_and_nothing_else() {
    let content = noise(5, 3_000_000);
    let blob = tar(&[Entry::File("a", b"a"), Entry::File("weights", &content)]);
    let layer = layer_of(&blob, Compression::None);
    let (_folder, store) = store();
    let right = ingest(&store, &layer);
    let (listing, landing, _) = list(&right, layer, &blob);
    let offset = listing.files().last().unwrap().offset;
    land(&landing, &blob, &(offset + 1_000_000..offset + 2_000_000)).unwrap();
    landing.save(&right).unwrap();
    // Written, and perhaps not on the disk.
    land(&landing, &blob, &(offset + 2_500_000..offset + 2_600_000)).unwrap();
    drop((right, landing));

    let store = Store::open(store.root()).unwrap();
    let right = ingest(&store, &layer);
    assert!(right.has_landed() && !right.has_checkpoint());
    let (listing, landing, _) = list(&right, layer, &blob);
    assert_eq!(landing.has(&(offset + 1_000_000..offset + 2_000_000)), Ok(true));
    assert_eq!(landing.has(&(offset + 2_500_000..offset + 2_500_001)), Ok(false));
    let name = format!("at-{offset:016x}");
    drop((listing, landing));

    // A file that is not as it was is none.
    File::options().write(true).open(right.folder().join(name)).unwrap().set_len(9).unwrap();
    let (listing, landing, _) = list(&right, layer, &blob);
    assert_eq!(landing.has(&(offset + 1_000_000..offset + 1_000_001)), Ok(false));
    let entries = complete(right, (&listing, &landing), layer, &blob, &store);
    assert_eq!(entries, plain(layer, &blob).unwrap());
}
