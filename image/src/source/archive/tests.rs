use super::*;
use crate::manifest::Compression;
use crate::testing::{Entry, compress, noise, tar};

fn archive(folder: &tempfile::TempDir, bytes: &[u8]) -> ArchiveFile {
    let path = folder.path().join("a.tar");
    std::fs::write(&path, bytes).unwrap();
    ArchiveFile::new(&path)
}

fn why(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let error = archive(&folder, bytes).open().err().unwrap();
    assert!(matches!(error, SourceError::Invalid(_)), "{error:?}");
    error.to_string()
}

fn read(archive: &Archive, path: &str) -> Result<Vec<u8>, String> {
    let part = archive.part(path).map_err(|error| error.to_string())?;
    Ok(part.read_all(path, 1 << 30).unwrap().to_vec())
}

#[test]
fn members_are_read_where_they_lie() {
    let big = noise(1, 3_000_000);
    let bytes = tar(&[
        Entry::Dir("blobs"),
        Entry::File("./blobs/big", &big),
        Entry::File("empty", b""),
        Entry::Symlink("old/layer.tar", "../blobs/big"),
        Entry::Hardlink("same", "blobs/big"),
        Entry::Symlink("twice", "old/layer.tar"),
        Entry::Symlink("round", "round"),
        Entry::Symlink("gone", "nowhere"),
        Entry::File("last", b"end"),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let file = archive(&folder, &bytes);
    let open = file.open().unwrap();
    for path in ["blobs/big", "old/layer.tar", "same", "twice"] {
        assert!(read(&open, path).unwrap() == big, "{path}");
    }
    assert_eq!(read(&open, "empty").unwrap(), b"");
    assert_eq!(read(&open, "last").unwrap(), b"end");
    assert!(read(&open, "round").unwrap_err().contains("a chain of links"));
    let gone = read(&open, "gone").unwrap_err();
    assert!(gone.starts_with("nowhere in ") && gone.ends_with("the archive lacks it"), "{gone}");
    assert!(Arc::ptr_eq(&open, &file.open().unwrap()), "walked once");

    // Whoever replaced it gets a new walk; whoever reads the old one goes on.
    let path = folder.path().join("new");
    std::fs::write(&path, tar(&[Entry::File("last", b"other")])).unwrap();
    std::fs::rename(&path, file.path()).unwrap();
    assert_eq!(read(&file.open().unwrap(), "last").unwrap(), b"other");
    assert!(read(&open, "blobs/big").unwrap() == big);
}

#[test]
fn what_is_no_sound_tar_is_refused_with_the_reason() {
    let good = tar(&[Entry::File("a", &noise(2, 5000))]);
    assert!(why(&good[..3000]).ends_with(r#"ends in the middle of "a": copy it again"#));
    assert!(why(&good[..300]).contains("ends in the middle of"));
    assert!(why(&[7; 1024]).contains("header checksum does not match: not a tar"));
    assert!(why(&tar(&[Entry::File("../a", b"x")])).contains("climbs out"));
    assert!(
        why(&tar(&[Entry::Symlink("a/b", "../../c")]))
            .ends_with(r#"the link "a/b" leads out of it"#)
    );
    assert!(why(&tar(&[Entry::Symlink("a", "/etc/shadow")])).contains("leads out of it"));
    for (compression, name) in [(Compression::Gzip, "gzip"), (Compression::Zstd, "zstd")] {
        let why = why(&compress(&good, compression));
        assert!(why.contains(&format!("is compressed with {name}")), "{why}");
    }
}

#[test]
fn what_an_archive_claims_costs_no_more_than_it_has() {
    // A file of an exbibyte, a folder of one, and an extension header of a gigabyte.
    for (kind, size) in [(tar::EntryType::Regular, 1 << 60), (tar::EntryType::XHeader, 1 << 30)] {
        let mut header = tar::Header::new_gnu();
        header.set_path("huge").unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        let why = why(header.as_bytes());
        assert!(why.contains("ends in the middle") || why.contains("longer than 1 MiB"), "{why}");
    }
    let mut header = tar::Header::new_gnu();
    header.set_path("huge").unwrap();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_size(1 << 60);
    header.set_cksum();
    let folder = tempfile::tempdir().unwrap();
    assert!(archive(&folder, header.as_bytes()).open().unwrap().part("huge").is_err());
    // Only regular files are read.
    assert!(
        ArchiveFile::new(Path::new("/dev/zero"))
            .open()
            .err()
            .unwrap()
            .to_string()
            .contains("no regular")
    );
    let missing = ArchiveFile::new(&folder.path().join("none")).open().err().unwrap();
    assert!(matches!(missing, SourceError::NotFound(_)));
}
