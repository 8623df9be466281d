//! What the fuzz targets in `fuzz/` call: each reads bytes that a stranger chose with the real
//! parsers, and checks what must hold of whatever they accept.
//!
//! Only with the feature `fuzzing`; the tests run each of them over the corpus.

use crate::layer::tar::{Event, Member, MemberKind, Parser, TarError};
use crate::manifest::{Manifest, Platform};
use crate::reference::Reference;
use crate::source::{PullSecret, RawManifest};
use crate::tree::{LayerEntry, Tree};

/// A reference: what was read is written so that it is read as the same.
///
/// # Panics
///
/// When that does not hold.
pub fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(reference) = text.parse::<Reference>() else { return };
    let again = reference.to_string().parse::<Reference>();
    assert_eq!(again.ok().as_ref(), Some(&reference), "{text:?}");
}

/// A manifest or an index, and behind a NUL byte a config: no accepted file name leaves the root.
///
/// # Panics
///
/// When one does.
pub fn manifest(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let (manifest, config) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let raw = RawManifest { media_type: String::new(), bytes: manifest.to_vec().into() };
    match Manifest::parse(&raw) {
        Ok(Manifest::Index(index)) => {
            let _ = index.choose(&Platform::default());
        }
        Ok(Manifest::Image(image)) => {
            assert_eq!(image.digest, raw.digest());
            assert!(image.download_bytes() < 1 << 60);
            let mut tree = Tree::default();
            for placed in image.layers_with(config).unwrap_or(image.layers) {
                let object = crate::ObjectId::new(blake3::hash(b"x"), false);
                let file = LayerEntry::File { path: "file".into(), size: 1, object, offset: None };
                let _ = placed.place.lay(&mut tree, &[file]);
            }
            assert_clean(&tree);
        }
        Err(_) => {}
    }
}

/// A tar, whose first two bytes say how it is cut: any cut gives the same events, content is as long
/// as its header says, and no name leaves the root.
///
/// # Panics
///
/// When one of these does not hold.
pub fn tar(data: &[u8]) {
    let Some((cut, tar)) = data.split_at_checked(2) else { return };
    let whole = events(tar, tar.len());
    let size = usize::from(u16::from_le_bytes([cut[0], cut[1]])) % 1500 + 1;
    let parts = events(tar, size);
    assert_eq!(whole, parts, "cut in pieces of {size}");
    let (members, error) = whole;
    let mut tree = Tree::default();
    for (member, length) in &members {
        let path = member.path.clone();
        let entry = match &member.kind {
            MemberKind::File { size, executable } => {
                assert!(length <= size, "{path}: longer than its header says");
                assert!(length == size || error.is_some(), "{path}: cut short in silence");
                let object = crate::ObjectId::new(blake3::hash(path.as_bytes()), *executable);
                LayerEntry::File { path, size: *size, object, offset: None }
            }
            _ if member.path.is_empty() => continue,
            MemberKind::Directory => LayerEntry::Directory { path },
            MemberKind::Symlink { target } => LayerEntry::Symlink { path, target: target.clone() },
            MemberKind::Hardlink { target } => {
                LayerEntry::Hardlink { path, target: target.clone() }
            }
        };
        if tree.apply(&[entry]).is_err() {
            return;
        }
    }
    assert_clean(&tree);
}

/// A docker `config.json`: read, or refused without a word of what is in it.
pub fn credentials(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = PullSecret::from_docker_config_json(text);
    }
}

/// A table of contents of zstd:chunked or eStargz: read, or refused; what is accepted lies in the layer.
///
/// # Panics
///
/// When it does not.
pub fn contents(data: &[u8]) {
    crate::pull::read_table(data);
}

type Events = (Vec<(Member, u64)>, Option<String>);

/// Members with the length of their content, and what ended it.
fn events(tar: &[u8], size: usize) -> Events {
    let (mut parser, mut members) = (Parser::new(), Vec::<(Member, u64)>::new());
    let mut read = || -> Result<(), TarError> {
        for mut input in tar.chunks(size.max(1)) {
            loop {
                let (used, event) = parser.next(input)?;
                input = &input[used..];
                match event {
                    Event::More => break,
                    Event::Member(member) => members.push((member, 0)),
                    Event::Data(bytes) => {
                        if let Some((_, length)) = members.last_mut() {
                            *length += bytes.len() as u64;
                        }
                    }
                    Event::End => {}
                }
            }
        }
        assert_eq!(parser.offset(), tar.len() as u64);
        parser.finish()
    };
    let error = read().err().map(|error| error.to_string());
    (members, error)
}

/// No file's name is empty, absolute, or has a part that leads elsewhere.
fn assert_clean(tree: &Tree) {
    for (path, _, _) in tree.files() {
        let clean = |name: &str| !["", ".", ".."].contains(&name) && !name.contains('\0');
        assert!(path.split('/').all(clean), "{path:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    /// What fuzzing began with, and what it found since.
    #[test]
    fn the_corpus_is_read_or_refused() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        type Target = fn(&[u8]);
        let targets: [(&str, Target); 5] = [
            ("contents", contents),
            ("reference", reference),
            ("manifest", manifest),
            ("tar", tar),
            ("credentials", credentials),
        ];
        for (name, target) in targets {
            let mut seen = 0;
            for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
                target(&std::fs::read(entry.unwrap().path()).unwrap());
                seen += 1;
            }
            assert!(seen >= 3, "{name}: {seen} files");
        }
    }

    /// A tar of well-formed headers with names, kinds and sizes that no honest tool writes.
    fn hostile_tar() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![
            "(a|b|\\.|\\.\\.|/){1,5}",
            "[a-c]/[a-c]",
            "\\.wh\\.[a-c.]{0,8}",
            Just("a".repeat(99)),
        ];
        let kind = prop_oneof![
            Just(b'0'),
            Just(b'1'),
            Just(b'2'),
            Just(b'5'),
            Just(b'x'),
            Just(b'g'),
            Just(b'L'),
            Just(b'K'),
            Just(b'S'),
            Just(b'7'),
            any::<u8>(),
        ];
        let content = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..700),
            Just(b"18 path=a/../../b\n".to_vec()),
            Just(b"12 size=9999\n".to_vec()),
            Just(b"30 size=18446744073709551615\n".to_vec()),
            Just(b"22 GNU.sparse.major=1\n".to_vec()),
        ];
        let member = (name, kind, "(a|b|\\.\\.|/){0,4}", content, any::<bool>(), any::<u64>());
        proptest::collection::vec(member, 0..6).prop_map(|members| {
            let mut tar = Vec::new();
            for (name, kind, link, content, honest, size) in members {
                let mut header = ::tar::Header::new_gnu();
                let old = header.as_old_mut();
                old.name[..name.len()].copy_from_slice(name.as_bytes());
                old.linkname[..link.len()].copy_from_slice(link.as_bytes());
                old.linkflag = [kind];
                header.set_mode(0o644);
                header.set_size(if honest { content.len() as u64 } else { size });
                header.set_cksum();
                tar.extend_from_slice(header.as_bytes());
                tar.extend_from_slice(&content);
                tar.resize(tar.len().next_multiple_of(512), 0);
            }
            tar
        })
    }

    proptest! {
        #[test]
        fn hostile_tars_are_read_alike_however_they_are_cut(
            tar_bytes in hostile_tar(), cut in any::<[u8; 2]>(), length in 0..6000_usize
        ) {
            let mut data = cut.to_vec();
            data.extend_from_slice(&tar_bytes[..length.min(tar_bytes.len())]);
            tar(&data);
        }

        #[test]
        fn altered_manifests_are_read_or_refused(
            seed in 0..64_usize, flips in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..4)
        ) {
            let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/manifest");
            let mut files: Vec<_> =
                std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
            files.sort();
            let mut data = std::fs::read(&files[seed % files.len()]).unwrap();
            for (at, byte) in flips {
                let at = usize::from(at) % data.len();
                data[at] = byte;
            }
            manifest(&data);
        }
    }
}
