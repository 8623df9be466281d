use super::*;
use crate::digest::ObjectId;
use crate::manifest::Content;
use crate::store::Store;
use crate::testing::{Entry, compress, layer_of, noise, store, tar};
use crate::tree::LayerEntry;

const MIB: usize = 1024 * 1024;

/// Unpacks `blob[from..]`, in chunks, and stops after `until` bytes of it when that is given.
fn unpack(
    store: &Store,
    blob: &[u8],
    layer: Layer,
    diff_id: Digest,
    until: Option<usize>,
) -> Result<(u64, Done), LayerError> {
    let ingest = store.ingest(&layer.blob.digest).unwrap().expect("nobody else is at it");
    let resumed = Resumed::open(ingest, layer, Some(diff_id))?;
    let from = resumed.offset();
    let end = until.unwrap_or(blob.len());
    let mut chunks = blob[from as usize..end].chunks(1_000_003).map(Bytes::copy_from_slice);
    let done = resumed.unpack(|| chunks.next().map(|bytes| Chunk { bytes, _credit: () }))?;
    Ok((from, done))
}

fn ingest_is_empty(store: &Store) -> bool {
    std::fs::read_dir(store.root().join("ingest")).unwrap().next().is_none()
}

fn file(path: &str, size: u64, object: ObjectId, offset: Option<u64>) -> LayerEntry {
    LayerEntry::File { path: path.into(), size, object, offset }
}

/// Each file's bytes are where the record says.
fn assert_offsets(store: &Store, layer: &Layer, uncompressed: &[u8]) {
    for entry in store.layer(layer).unwrap().expect("recorded").entries {
        if let LayerEntry::File { path, size: size @ 1.., object, offset } = entry {
            let bytes = &uncompressed[offset.unwrap() as usize..][..size as usize];
            let found = ObjectId::new(blake3::hash(bytes), object.executable());
            assert_eq!(found, object, "{path}");
        }
    }
}

fn objects(store: &Store) -> u64 {
    store.usage().unwrap().objects
}

#[test]
fn a_layer_of_any_compression_becomes_the_same_objects() {
    let big = noise(1, 9_000_001);
    let tar = tar(&[
        Entry::Dir("models"),
        Entry::File("models/weights", &big),
        Entry::Exec("models/run", b"#!"),
        Entry::File("models/empty", b""),
        Entry::File("models/.wh.gone", b""),
        Entry::File("models/sub/.wh..wh..opq", b""),
        Entry::File(".wh..wh.plnk", b""),
        Entry::Symlink("models/alias", "weights"),
        Entry::Hardlink("models/same", "models/weights"),
    ]);
    let weights = ObjectId::new(blake3::hash(&big), false);
    let run = ObjectId::new(blake3::hash(b"#!"), true);
    let empty = ObjectId::new(blake3::hash(b""), false);
    let path = |path: &str| path.to_owned();
    let expected = [
        LayerEntry::Directory { path: path("models") },
        file("models/weights", 9_000_001, weights, Some(1024)),
        file("models/run", 2, run, Some(1024 + 9_000_448 + 512)),
        file("models/empty", 0, empty, None),
        LayerEntry::Whiteout { path: path("models/gone") },
        LayerEntry::Opaque { path: path("models/sub") },
        LayerEntry::Symlink { path: path("models/alias"), target: path("weights") },
        LayerEntry::Hardlink { path: path("models/same"), target: path("models/weights") },
    ];
    let (_dir, store) = store();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let blob = compress(&tar, compression);
        let layer = layer_of(&blob, compression);
        let (_, done) = unpack(&store, &blob, layer, Digest::of(&tar), None).unwrap();
        assert_eq!(done.written_bytes, 9_000_003, "{compression:?}");
        let record = store.layer(&layer).unwrap().expect("recorded");
        assert_eq!(record.entries, expected, "{compression:?}");
        assert!(ingest_is_empty(&store));
    }
    assert_eq!(objects(&store), 2, "equal files are one object");
    let path = store.root().join("objects").join(weights.path());
    assert!(std::fs::read(path).unwrap() == big);
}

#[test]
fn many_members_and_frames_are_one_stream() {
    let tar = tar(&[Entry::File("a", &noise(1, 100_000)), Entry::File("b", &noise(2, 100_000))]);
    let (_dir, store) = store();
    for compression in [Compression::Gzip, Compression::Zstd] {
        let mut blob = compress(&tar[..70_000], compression);
        blob.extend_from_slice(&compress(&tar[70_000..], compression));
        let layer = layer_of(&blob, compression);
        unpack(&store, &blob, layer, Digest::of(&tar), None).unwrap();
        assert_eq!(store.layer(&layer).unwrap().unwrap().entries.len(), 2);
    }
}

#[test]
fn altered_bytes_are_a_mismatch_and_leave_nothing() {
    let tar = tar(&[Entry::File("weights", &noise(3, 3_000_000))]);
    let (_dir, store) = store();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let blob = compress(&tar, compression);
        let layer = layer_of(&blob, compression);
        for at in [0, 300, blob.len() / 2, blob.len() - 1] {
            let mut altered = blob.clone();
            altered[at] ^= 0x40;
            let error = unpack(&store, &altered, layer, Digest::of(&tar), None).err().unwrap();
            assert!(matches!(error, LayerError::Mismatch(_)), "{compression:?} at {at}: {error}");
            assert!(ingest_is_empty(&store));
        }
        let mut longer = blob.clone();
        longer.push(0);
        let error = unpack(&store, &longer, layer, Digest::of(&tar), None).err().unwrap();
        assert!(matches!(&error, LayerError::Mismatch(why) if why.contains("longer")), "{error}");
    }
    assert_eq!(objects(&store), 0);
}

#[test]
fn a_wrong_diff_id_is_the_images_fault_and_said_so() {
    let tar = tar(&[Entry::File("weights", b"w")]);
    let blob = compress(&tar, Compression::Gzip);
    let (_dir, store) = store();
    let layer = layer_of(&blob, Compression::Gzip);
    let error = unpack(&store, &blob, layer, Digest::of(b"other"), None).err().unwrap();
    assert!(matches!(&error, LayerError::Mismatch(why) if why.contains("diff_id")), "{error}");
    assert!(ingest_is_empty(&store) && objects(&store) == 0);
}

#[test]
fn verified_bytes_that_must_not_be_unpacked_are_refused() {
    let (_dir, store) = store();
    let cases: [(&[Entry<'_>], &str); 3] = [
        (&[Entry::File("ok", b"x"), Entry::File("../evil", b"x")], "climbs out"),
        (&[Entry::File("/etc/passwd", b"x")], "absolute names"),
        (&[Entry::Hardlink("a", "../../etc/shadow")], "climbs out"),
    ];
    for (entries, why) in cases {
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let tar = tar(entries);
            let blob = compress(&tar, compression);
            let layer = layer_of(&blob, compression);
            let error = unpack(&store, &blob, layer, Digest::of(&tar), None).err().unwrap();
            assert!(matches!(&error, LayerError::Refused(text) if text.contains(why)), "{error}");
            assert!(ingest_is_empty(&store) && objects(&store) == 0);
        }
    }
}

#[test]
fn truncated_archives_with_right_digests_are_refused() {
    let whole = tar(&[Entry::File("weights", &noise(4, 50_000))]);
    let (_dir, store) = store();
    let cut = &whole[..20_000];
    let layer = layer_of(cut, Compression::None);
    let error = unpack(&store, cut, layer, Digest::of(cut), None).err().unwrap();
    assert!(matches!(&error, LayerError::Refused(why) if why.contains("in the middle")), "{error}");
    for compression in [Compression::Gzip, Compression::Zstd] {
        let blob = compress(&whole, compression);
        let cut = &blob[..blob.len() / 2];
        let layer = layer_of(cut, compression);
        let error = unpack(&store, cut, layer, Digest::of(&whole), None).err().unwrap();
        assert!(matches!(error, LayerError::Refused(_) | LayerError::Mismatch(_)), "{error}");
    }
    assert!(ingest_is_empty(&store) && objects(&store) == 0);
}

#[test]
fn a_stopped_layer_goes_on_where_it_was() {
    let files: Vec<_> = (0..4).map(|n| noise(10 + n, 30_000_000)).collect();
    let tar = tar(&[
        Entry::File("a", &files[0]),
        Entry::File("b", &files[1]),
        Entry::Dir("d"),
        Entry::File("d/c", &files[2]),
        Entry::File("d/e", &files[3]),
    ]);
    let layer = layer_of(&tar, Compression::None);
    let (_dir, store) = store();
    let mut came_from = Vec::new();
    // In a header, in a file, at a file's last byte, in padding, and again without progress.
    for stop in [100, 31_000_000, 30_000_512, 60_001_100, 75_000_000, 75_000_000, tar.len() - 3] {
        let stop = stop.max(came_from.last().copied().unwrap_or(0) as usize);
        let error = unpack(&store, &tar, layer, Digest::of(&tar), Some(stop)).err().unwrap();
        assert!(matches!(error, LayerError::Stopped(_)), "{error}");
        assert_eq!(objects(&store), 0, "nothing has a name before the layer is verified");
        came_from.push(stop as u64);
        // A new process finds what the old one left.
        Store::open(store.root()).unwrap();
    }
    let (from, _) = unpack(&store, &tar, layer, Digest::of(&tar), None).unwrap();
    assert_eq!(from, tar.len() as u64 - 3, "an orderly stop loses nothing");
    assert_eq!(objects(&store), 4);
    for (n, file) in files.iter().enumerate() {
        let id = ObjectId::new(blake3::hash(file), false);
        let path = store.root().join("objects").join(id.path());
        assert!(std::fs::read(path).unwrap() == *file, "file {n}");
    }
    assert_offsets(&store, &layer, &tar);
    assert!(ingest_is_empty(&store));
}

#[test]
fn a_record_without_offsets_is_read() {
    let object = ObjectId::new(blake3::hash(b"x"), false);
    let text = format!(r#"{{"kind":"file","path":"a","size":1,"object":"{object}"}}"#);
    let entry: LayerEntry = serde_json::from_str(&text).unwrap();
    assert_eq!(entry, file("a", 1, object, None));
}

#[test]
fn a_layer_has_a_checkpoint_every_so_many_bytes() {
    let tar =
        tar(&[Entry::File("a", &noise(40, 150 * MIB)), Entry::File("b", &noise(41, 9 * MIB))]);
    let layer = layer_of(&tar, Compression::None);
    let (_dir, store) = store();
    let ingest = store.ingest(&layer.blob.digest).unwrap().unwrap();
    let folder = ingest.folder().to_owned();
    let resumed = Resumed::open(ingest, layer, Some(Digest::of(&tar))).unwrap();
    let mut checkpoints = std::collections::BTreeSet::new();
    let mut chunks = tar.chunks(400_000);
    let mut feed = || {
        if let Ok(text) = std::fs::read(folder.join("checkpoint.json")) {
            let checkpoint: serde_json::Value = serde_json::from_slice(&text).unwrap();
            checkpoints.insert(checkpoint["offset"].as_u64().unwrap());
        }
        // A pull that is killed ends between two chunks and says nothing.
        chunks.next().map(|bytes| Chunk { bytes: Bytes::copy_from_slice(bytes), _credit: () })
    };
    resumed.unpack(&mut feed).unwrap();
    let checkpoints: Vec<u64> = checkpoints.into_iter().collect();
    assert!((3..=4).contains(&checkpoints.len()), "{checkpoints:?}");
    for pair in checkpoints.windows(2) {
        assert!(pair[1] - pair[0] <= 33 * MIB as u64, "{checkpoints:?}");
    }
}

#[test]
fn a_checkpoint_that_the_disk_contradicts_starts_the_layer_again() {
    let tar =
        tar(&[Entry::File("a", &noise(20, 2_000_000)), Entry::File("b", &noise(21, 2_000_000))]);
    let layer = layer_of(&tar, Compression::None);
    let (_dir, store) = store();
    let _ = unpack(&store, &tar, layer, Digest::of(&tar), Some(3_000_000));
    let folder = store.root().join("ingest").join(layer.blob.digest.hex());
    std::fs::remove_file(folder.join("0000000")).unwrap();
    let (from, _) = unpack(&store, &tar, layer, Digest::of(&tar), None).unwrap();
    assert_eq!((from, objects(&store)), (0, 2));
}

#[test]
fn a_layer_that_was_compressed_in_one_piece_starts_again_and_leaves_nothing_meanwhile() {
    let tar = tar(&[Entry::File("a", &noise(30, 5_000_000))]);
    let (_dir, store) = store();
    for compression in [Compression::Gzip, Compression::Zstd] {
        let blob = compress(&tar, compression);
        let layer = layer_of(&blob, compression);
        let error = unpack(&store, &blob, layer, Digest::of(&tar), Some(3_000_000)).err().unwrap();
        assert!(matches!(error, LayerError::Stopped(_)), "{error}");
        assert!(ingest_is_empty(&store));
        let (from, _) = unpack(&store, &blob, layer, Digest::of(&tar), None).unwrap();
        assert_eq!(from, 0);
    }
}

#[test]
fn a_layer_of_one_gzip_member_goes_on_in_the_middle_of_it() {
    // Every other byte of a number compresses, as of weights; zeros make matches without end.
    let mut weights = noise(38, 90 * MIB);
    weights.iter_mut().step_by(2).for_each(|byte| *byte &= 0x1f);
    let tar = tar(&[Entry::File("a", &weights), Entry::File("zeros", &vec![0; 30 * MIB])]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(3));
    std::io::Write::write_all(&mut gzip, &tar).unwrap();
    let blob = gzip.finish().unwrap();
    let layer = layer_of(&blob, Compression::Gzip);
    let (_dir, store) = store();
    let mut froms = Vec::new();
    // The third goes on from what the second, which itself went on, left.
    for until in [50 * MIB, 70 * MIB, blob.len()] {
        let ran = unpack(&store, &blob, layer, Digest::of(&tar), Some(until));
        match ran {
            Ok((from, done)) => {
                froms.push(from);
                assert_eq!(done.written_bytes, 120 * MIB as u64);
            }
            Err(error) => assert!(matches!(error, LayerError::Stopped(1..)), "{error}"),
        }
        if until < blob.len() {
            let ingest = store.ingest(&layer.blob.digest).unwrap().unwrap();
            froms.push(Resumed::open(ingest, layer, None).unwrap().offset());
        }
    }
    let mib = MIB as u64;
    assert!((32 * mib..33 * mib).contains(&froms[0]), "{froms:?}");
    assert!((64 * mib..67 * mib).contains(&froms[1]), "{froms:?}");
    assert_eq!(froms[2], froms[1]);

    // The state of a decoder that is damaged is as good as none.
    let _ =
        unpack(&store, &blob, raw_of(&blob, Compression::Gzip), Digest::of(&tar), Some(50 * MIB));
    let checkpoint =
        store.root().join("ingest").join(layer.blob.digest.hex()).join("checkpoint.json");
    let text = std::fs::read_to_string(&checkpoint).unwrap();
    let damaged = text.replacen(r#""window":""#, r#""window":"zz"#, 1);
    assert_ne!(text, damaged);
    std::fs::write(&checkpoint, damaged).unwrap();
    let (from, _) =
        unpack(&store, &blob, raw_of(&blob, Compression::Gzip), Digest::of(&tar), None).unwrap();
    assert_eq!(from, 0);
    assert_eq!(store.layer(&layer).unwrap().unwrap().diff_id, Digest::of(&tar));
    assert_offsets(&store, &layer, &tar);
    assert!(ingest_is_empty(&store));
}

#[test]
fn a_layer_of_frames_or_members_goes_on_at_one_of_them() {
    let files = [noise(31, 20 * MIB), noise(32, 30 * MIB), noise(33, 40 * MIB), noise(34, MIB)];
    let entries: Vec<_> = files
        .iter()
        .zip(["a", "b", "c", "d"])
        .map(|(file, name)| Entry::File(name, file))
        .collect();
    let tar = tar(&entries);
    for compression in [Compression::Gzip, Compression::Zstd] {
        let (_dir, store) = store();
        // As eStargz, zstd:chunked and pzstd write them, in which files begin anywhere.
        let frames: Vec<_> =
            tar.chunks(4 * MIB + 77).map(|part| compress(part, compression)).collect();
        let blob = frames.concat();
        let layer = layer_of(&blob, compression);
        let stopped = unpack(&store, &blob, layer, Digest::of(&tar), Some(75 * MIB));
        assert!(matches!(stopped, Err(LayerError::Stopped(_))));
        let (from, done) = unpack(&store, &blob, layer, Digest::of(&tar), None).unwrap();
        assert!((64 * MIB as u64..75 * MIB as u64).contains(&from), "{compression:?}: {from}");
        let mut borders = frames.iter().scan(0, |at, frame| {
            *at += frame.len() as u64;
            Some(*at)
        });
        let at_border = borders.any(|border| border == from);
        assert!(at_border || compression == Compression::Gzip, "{from}");
        assert_eq!(done.written_bytes, files.iter().map(|file| file.len() as u64).sum::<u64>());
        assert_eq!(store.layer(&layer).unwrap().unwrap().diff_id, Digest::of(&tar));
        assert_offsets(&store, &layer, &tar);
        assert!(ingest_is_empty(&store));
    }
}

#[test]
fn what_local_files_stood_in_for_is_proved_by_the_diff_id_after_a_stop_too() {
    let (_dir, store) = store();
    let shared = noise(35, 2 * MIB);
    let base = tar(&[Entry::File("x", &shared)]);
    let layer = layer_of(&base, Compression::None);
    unpack(&store, &base, layer, Digest::of(&base), None).unwrap();
    let object = ObjectId::new(blake3::hash(&shared), false);

    let own = [noise(36, 40 * MIB), noise(37, 20 * MIB)];
    let tar =
        tar(&[Entry::File("a", &shared), Entry::File("b", &own[0]), Entry::File("c", &own[1])]);
    let cut = [0, 512, 512 + 2 * MIB, 1024 + 42 * MIB, tar.len()];
    let frames: Vec<_> =
        cut.windows(2).map(|cut| compress(&tar[cut[0]..cut[1]], Compression::Zstd)).collect();
    let blob = frames.concat();
    let layer = layer_of(&blob, Compression::Zstd);
    let range = frames[0].len() as u64..(frames[0].len() + frames[1].len()) as u64;
    let size = shared.len() as u64;
    let run = |until: usize| {
        let ingest = store.ingest(&layer.blob.digest).unwrap().unwrap();
        let mut resumed = Resumed::open(ingest, layer, Some(Digest::of(&tar))).unwrap();
        let outset = resumed.outset();
        if outset.offset == 0 {
            let name = store.link_object(&object, size, &outset.folder).unwrap().unwrap();
            let executable = object.executable();
            let (object, range) = (Some(object), range.clone());
            let local = Local { name, object, executable, size, range, again: 0, known: 0 };
            let plan = Plan::of(0..layer.blob.size, vec![local], &[], Arc::new(|_| true));
            resumed.follow(plan);
        }
        // The blob without what the local file stands in for; no chunk is of two ranges.
        let network = match outset.offset {
            0 => vec![&blob[..range.start as usize], &blob[range.end as usize..until]],
            offset => vec![&blob[offset as usize..until]],
        };
        let chunks = network.iter().flat_map(|range| range.chunks(1_000_003));
        let mut chunks = chunks.map(Bytes::copy_from_slice);
        let done = resumed.unpack(|| chunks.next().map(|bytes| Chunk { bytes, _credit: () }));
        (outset.offset, done)
    };
    let (from, stopped) = run(50 * MIB);
    let stopped = stopped.err().unwrap();
    assert!(from == 0 && matches!(stopped, LayerError::Stopped(_)), "{stopped}");
    let (from, done) = run(blob.len());
    done.unwrap();
    assert_eq!(from, range.end + frames[2].len() as u64);
    assert!(store.layer(&layer).unwrap().is_none(), "the blob was never seen whole");
    let record = store.layer_as(&layer, Some(&Digest::of(&tar))).unwrap().unwrap();
    assert_eq!(record.entries.len(), 3);
}

/// As [`layer_of`], of one raw file.
fn raw_of(blob: &[u8], compression: Compression) -> Layer {
    Layer { content: Content::File, ..layer_of(blob, compression) }
}

#[test]
fn a_raw_layer_is_one_file_without_a_name() {
    let (_dir, store) = store();
    for size in [0, 1, 5_000_001] {
        let content = noise(50, size);
        let object = ObjectId::new(blake3::hash(&content), false);
        let expected = [file("", size as u64, object, (size > 0).then_some(0))];
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let blob = compress(&content, compression);
            let layer = raw_of(&blob, compression);
            unpack(&store, &blob, layer, Digest::of(&content), None).unwrap();
            let record = store.layer(&layer).unwrap().expect("recorded");
            assert_eq!(record.entries, expected, "{size} bytes, {compression:?}");
            assert_eq!(record.diff_id, Digest::of(&content));
            assert!(ingest_is_empty(&store));
            if size > 0 {
                let path = store.root().join("objects").join(object.path());
                assert!(std::fs::read(path).unwrap() == content);
            }
        }
    }
    assert_eq!(objects(&store), 2);
}

#[test]
fn the_same_bytes_are_a_tar_to_one_image_and_a_file_to_another() {
    let (_dir, store) = store();
    let tar = tar(&[Entry::File("weights", &noise(51, 10_000))]);
    let (as_tar, as_file) = (layer_of(&tar, Compression::None), raw_of(&tar, Compression::None));
    unpack(&store, &tar, as_tar, Digest::of(&tar), None).unwrap();
    assert!(store.layer(&as_file).unwrap().is_none());
    unpack(&store, &tar, as_file, Digest::of(&tar), None).unwrap();
    assert_eq!(
        store.layer(&as_tar).unwrap().unwrap().entries[0].clone(),
        file("weights", 10_000, ObjectId::new(blake3::hash(&noise(51, 10_000)), false), Some(512))
    );
    let blob = compress(&tar, Compression::Gzip);
    let archive = raw_of(&blob, Compression::None);
    unpack(&store, &blob, archive, Digest::of(&blob), None).unwrap();
    assert!(store.layer(&raw_of(&blob, Compression::Gzip)).unwrap().is_none());
    // What a stopped pull left of the one is nothing to the other.
    let big = noise(52, 40_000_000);
    let _ =
        unpack(&store, &big, raw_of(&big, Compression::None), Digest::of(&big), Some(20_000_000));
    let error = unpack(&store, &big, layer_of(&big, Compression::None), Digest::of(&big), None);
    assert!(matches!(error, Err(LayerError::Refused(_))), "no tar");
}

#[test]
fn a_stopped_raw_layer_goes_on_where_it_was() {
    let content = noise(53, 70_000_001);
    let layer = raw_of(&content, Compression::None);
    let (_dir, store) = store();
    for stop in [1, 33_000_000, 69_999_999] {
        let error =
            unpack(&store, &content, layer, Digest::of(&content), Some(stop)).err().unwrap();
        assert!(matches!(error, LayerError::Stopped(_)), "{error}");
        Store::open(store.root()).unwrap();
    }
    let (from, done) = unpack(&store, &content, layer, Digest::of(&content), None).unwrap();
    assert_eq!((from, done.written_bytes), (69_999_999, 70_000_001));
    let path = ObjectId::new(blake3::hash(&content), false).path();
    assert!(std::fs::read(store.root().join("objects").join(path)).unwrap() == content);
}

#[test]
fn without_a_diff_id_the_digest_answers_for_the_content() {
    let (_dir, store) = store();
    let tar = tar(&[Entry::File("a", b"x")]);
    for compression in [Compression::None, Compression::Gzip] {
        let blob = compress(&tar, compression);
        let layer = layer_of(&blob, compression);
        let ingest = store.ingest(&layer.blob.digest).unwrap().unwrap();
        let resumed = Resumed::open(ingest, layer, None).unwrap();
        let mut chunks = [Chunk { bytes: Bytes::from(blob.clone()), _credit: () }].into_iter();
        resumed.unpack(|| chunks.next()).unwrap();
        assert_eq!(store.layer(&layer).unwrap().unwrap().diff_id, Digest::of(&tar));

        let mut altered = blob;
        *altered.last_mut().unwrap() ^= 1;
        let ingest = store.ingest(&layer.blob.digest).unwrap().unwrap();
        let resumed = Resumed::open(ingest, layer, None).unwrap();
        let mut chunks = [Chunk { bytes: Bytes::from(altered), _credit: () }].into_iter();
        let error = resumed.unpack(|| chunks.next()).err().unwrap();
        assert!(matches!(error, LayerError::Mismatch(_)), "{error}");
    }
}

#[test]
fn a_wrong_diff_id_of_an_uncompressed_layer_does_not_become_the_layers() {
    let (_dir, store) = store();
    let tar = tar(&[Entry::File("a", b"x")]);
    let layer = layer_of(&tar, Compression::None);
    let error = unpack(&store, &tar, layer, Digest::of(b"other"), None).err().unwrap();
    assert!(matches!(&error, LayerError::Mismatch(why) if why.contains("the image is broken")));
    assert!(store.layer(&layer).unwrap().is_none() && ingest_is_empty(&store));
}

#[test]
fn what_estargz_adds_is_no_file_of_the_image() {
    let (_dir, store) = store();
    let tar = tar(&[
        Entry::File(".prefetch.landmark", &[0xf]),
        Entry::File("./.no.prefetch.landmark", &[0xf]),
        Entry::File("models/stargz.index.json", b"one's own"),
        Entry::File("stargz.index.json", &noise(54, 10_000)),
    ]);
    let blob = compress(&tar, Compression::Gzip);
    let layer = layer_of(&blob, Compression::Gzip);
    let (_, done) = unpack(&store, &blob, layer, Digest::of(&tar), None).unwrap();
    assert_eq!(done.written_bytes, 9);
    let object = ObjectId::new(blake3::hash(b"one's own"), false);
    let own = file("models/stargz.index.json", 9, object, Some(2 * 1024 + 512));
    assert_eq!(store.layer(&layer).unwrap().unwrap().entries, [own]);
}

#[test]
fn a_file_that_is_not_the_stores_yet_becomes_an_object_as_it_is_where_the_digest_proves_it() {
    use std::os::unix::fs::MetadataExt as _;
    let (folder, store) = store();
    let content = noise(7, 3 * MIB + 5);
    let tar = tar(&[Entry::File("small", b"s"), Entry::File("model", &content)]);
    let layer = layer_of(&tar, Compression::None);
    // Two headers, and the small file in a block of its own.
    let range = 3 * 512..3 * 512 + content.len() as u64;
    let theirs = folder.path().join("theirs");
    let run = |bytes: &[u8]| {
        std::fs::write(&theirs, bytes).unwrap();
        let ingest = store.ingest(&layer.blob.digest).unwrap().unwrap();
        let mut resumed = Resumed::open(ingest, layer, None).unwrap();
        let name = "adopted".to_owned();
        std::fs::hard_link(&theirs, resumed.outset().folder.join(&name)).unwrap();
        let (size, range) = (bytes.len() as u64, range.clone());
        let network = [&tar[..range.start as usize], &tar[range.end as usize..]];
        let local =
            Local { name, object: None, executable: false, size, range, again: 0, known: 0 };
        resumed.follow(Plan::of(0..layer.blob.size, vec![local], &[], Arc::new(|_| true)));
        let mut chunks = network.into_iter().map(Bytes::copy_from_slice);
        resumed.unpack(|| chunks.next().map(|bytes| Chunk { bytes, _credit: () }))
    };
    let mut other = content.clone();
    other[MIB] ^= 1;
    assert!(matches!(run(&other), Err(LayerError::Mismatch(_))));
    assert!(store.layer(&layer).unwrap().is_none());
    assert_eq!(std::fs::metadata(&theirs).unwrap().nlink(), 1);

    assert_eq!(run(&content).unwrap().written_bytes, 1);
    let record = store.layer(&layer).unwrap().unwrap();
    let object = ObjectId::new(blake3::hash(&content), false);
    let objects: Vec<_> = record.objects().collect();
    assert!(objects.contains(&(object, content.len() as u64)), "{objects:?}");
    let (ours, theirs) = (store.object_path(&object), std::fs::metadata(&theirs).unwrap());
    assert_eq!((std::fs::metadata(ours).unwrap().ino(), theirs.nlink()), (theirs.ino(), 2));
}
