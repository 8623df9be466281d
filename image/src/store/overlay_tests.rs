use std::collections::BTreeMap;

use super::*;
use crate::digest::ObjectId;

/// `a` a file, `d/` a folder, `l->t` a link, `.wh.` as in tars.
fn entries(text: &str) -> Vec<LayerEntry> {
    let entry = |word: &str| {
        let path = word.to_owned();
        if let Some((path, target)) = word.split_once("->") {
            return LayerEntry::Symlink { path: path.into(), target: target.into() };
        }
        if let Some((path, target)) = word.split_once('=') {
            return LayerEntry::Hardlink { path: path.into(), target: target.into() };
        }
        if let Some(path) = word.strip_suffix('/') {
            return LayerEntry::Directory { path: path.into() };
        }
        let (folder, name) = word.rsplit_once('/').unwrap_or(("", word));
        if name == ".wh..wh..opq" {
            return LayerEntry::Opaque { path: folder.to_owned() };
        }
        if let Some(name) = name.strip_prefix(".wh.") {
            let slash = if folder.is_empty() { "" } else { "/" };
            return LayerEntry::Whiteout { path: format!("{folder}{slash}{name}") };
        }
        let object = ObjectId::new(blake3::hash(word.as_bytes()), false);
        LayerEntry::File { path, size: 1, object, offset: None }
    };
    text.split_whitespace().map(entry).collect()
}

fn tree(layers: &[&str]) -> Tree {
    let mut tree = Tree::default();
    for layer in layers {
        tree.apply(&entries(layer)).unwrap();
    }
    tree
}

/// What overlayfs shows of `own` over `lower`.
fn merged(lower: &BTreeMap<String, Node>, own: &Own, at: &str) -> BTreeMap<String, Node> {
    let path = |name: &str| match at {
        "" => name.to_owned(),
        at => format!("{at}/{name}"),
    };
    let upper = match at {
        "" => own.tree.root(),
        at => own.tree.get(at).and_then(folder).unwrap(),
    };
    let mut shown = BTreeMap::new();
    if !own.opaque.iter().any(|opaque| opaque == at) {
        shown.clone_from(lower);
        shown.retain(|name, _| !own.hidden.contains(&path(name)));
    }
    for (name, node) in upper {
        let there = shown.get(name).and_then(folder).cloned();
        let node = match node {
            Node::Directory(_) => {
                Node::Directory(merged(&there.unwrap_or_default(), own, &path(name)))
            }
            node => node.clone(),
        };
        shown.insert(name.clone(), node);
    }
    shown
}

#[test]
fn overlayfs_shows_what_the_layers_add_up_to() {
    let cases = [
        ("a b", ".wh.a"),
        ("d/a d/b", "d/.wh.a"),
        ("d/a", ".wh.d"),
        ("d/a", ".wh.d d/b"),
        ("d/a", "d/b .wh.d"),
        ("d/a d/b", "d/.wh..wh..opq d/c"),
        ("d/a d/e/b", "d/c d/e/x d/.wh..wh..opq"),
        ("a d/b e/c", ".wh..wh..opq c e/y"),
        ("a", ".wh.never-was x/.wh.never-was"),
        ("d/a", "d/"),
        ("d/a", "d"),
        ("d/a d/e/b", ".wh.d d"),
        ("d/a", "d d/.wh.a"),
        ("a", "a/ a/b"),
        ("d/a l->d", "l/ l/b"),
        ("d/a", "d->elsewhere"),
        ("d/a l->x", "b=d/a c=l e=b"),
        ("d/e/f/a d/e/b", "d/e/f/.wh.a"),
        ("d/e/a d/b", ".wh.d d/e/c"),
        ("d/a d/b c", "d/.wh.a .wh.d"),
        ("d/e/a", "d/e/.wh.a d/.wh..wh..opq"),
    ];
    for (lower, upper) in cases {
        let (below, upper_entries) = (tree(&[lower]), entries(upper));
        let own = own(&below, &upper_entries).unwrap();
        let expected = tree(&[lower, upper]);
        assert_eq!(&merged(below.root(), &own, ""), expected.root(), "{lower} | {upper}: {own:?}");
    }
}

#[test]
fn only_what_is_there_is_hidden_and_once() {
    let lower = tree(&["a d/b d/c"]);
    let of = |upper: &str| {
        let own = own(&lower, &entries(upper)).unwrap();
        (own.hidden.join(" "), own.opaque.join(" "))
    };
    assert_eq!(of(".wh.a .wh.a .wh.z d/.wh.z"), ("a".into(), String::new()));
    assert_eq!(of(".wh.d d/.wh.b d/x"), (String::new(), "d".into()));
    assert_eq!(of("d/.wh..wh..opq"), ("d/b d/c".into(), String::new()));
}

#[test]
fn a_layer_laid_out_is_links_whiteouts_and_opaque_folders() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: whiteouts need root");
        return;
    }
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    let (folder, store) = crate::testing::store();
    let object = ObjectId::new(blake3::hash(b"x"), false);
    std::fs::write(store.object(&object), b"x").unwrap();
    let file = |path: &str| LayerEntry::File { path: path.into(), size: 1, object, offset: None };
    let mut lower = Tree::default();
    lower.apply(&[file("a"), file("d/b")]).unwrap();
    let upper = [
        file("d/new"),
        LayerEntry::Whiteout { path: "a".into() },
        LayerEntry::Whiteout { path: "d".into() },
    ];
    let at = folder.path().join("fs");
    std::fs::create_dir(&at).unwrap();
    store.lay_out(&lower, &upper, &at).unwrap();
    let meta = |path: &str| std::fs::symlink_metadata(at.join(path)).unwrap();
    assert_eq!(meta("d/new").ino(), std::fs::metadata(store.object(&object)).unwrap().ino());
    assert!(meta("a").file_type().is_char_device() && meta("a").rdev() == 0);
    let mut value = [0; 8];
    let length = rustix::fs::getxattr(at.join("d"), OPAQUE, &mut value).unwrap();
    assert_eq!(&value[..length], b"y");
    assert_eq!((meta("d").mode() & 0o7777, meta("d").mtime()), (0o755, 0));
    assert_eq!((meta("").mode() & 0o7777, meta("").mtime()), (0o755, 0));
    assert_eq!(crate::testing::listing(&at), ["a", "d/", "d/new"]);
}
