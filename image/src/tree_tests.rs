use super::*;
use proptest::prelude::*;

fn object(n: u8) -> ObjectId {
    ObjectId::new(blake3::hash(&[n]), false)
}

fn file(path: &str, n: u8) -> LayerEntry {
    LayerEntry::File { path: path.into(), size: u64::from(n), object: object(n), offset: None }
}

fn dir(path: &str) -> LayerEntry {
    LayerEntry::Directory { path: path.into() }
}

fn symlink(path: &str, target: &str) -> LayerEntry {
    LayerEntry::Symlink { path: path.into(), target: target.into() }
}

fn whiteout(path: &str) -> LayerEntry {
    LayerEntry::Whiteout { path: path.into() }
}

fn opaque(path: &str) -> LayerEntry {
    LayerEntry::Opaque { path: path.into() }
}

fn hardlink(path: &str, target: &str) -> LayerEntry {
    LayerEntry::Hardlink { path: path.into(), target: target.into() }
}

fn merged(layers: &[&[LayerEntry]]) -> Result<Vec<String>, String> {
    let mut tree = Tree::default();
    for layer in layers {
        tree.apply(layer).map_err(|e| e.to_string())?;
    }
    Ok(tree.files().into_iter().map(|(path, size, _)| format!("{path}={size}")).collect())
}

#[test]
fn upper_layers_replace_and_hide_what_is_below() {
    let base = [dir("m"), file("m/a", 1), file("m/b", 2), file("m/sub/c", 3), file("top", 4)];
    let all = ["m/a=1", "m/b=2", "m/sub/c=3", "top=4"];
    assert_eq!(merged(&[&base]).unwrap(), all);
    assert_eq!(merged(&[&base, &[file("m/a", 9)]]).unwrap()[0], "m/a=9");
    assert_eq!(merged(&[&base, &[whiteout("m/sub")]]).unwrap(), ["m/a=1", "m/b=2", "top=4"]);
    assert_eq!(merged(&[&base, &[opaque("m"), file("m/new", 5)]]).unwrap(), ["m/new=5", "top=4"]);
    assert_eq!(merged(&[&base, &[opaque("")]]).unwrap(), Vec::<String>::new());
    assert_eq!(merged(&[&base, &[dir("m")]]).unwrap(), all, "a directory over a directory merges");
    assert_eq!(merged(&[&base, &[file("m", 7)]]).unwrap(), ["m=7", "top=4"]);
    assert_eq!(merged(&[&base, &[dir("top"), file("top/x", 8)]]).unwrap()[3], "top/x=8");
}

#[test]
fn whiteouts_hide_lower_layers_only_wherever_they_stand() {
    let base = [file("d/old", 1)];
    for layer in [
        [opaque("d"), file("d/new", 2)],
        [file("d/new", 2), opaque("d")],
        [whiteout("d"), file("d/new", 2)],
        [file("d/new", 2), whiteout("d")],
    ] {
        assert_eq!(merged(&[&base, &layer]).unwrap(), ["d/new=2"], "{layer:?}");
    }
    assert_eq!(merged(&[&[whiteout("never/was")]]).unwrap(), Vec::<String>::new());
}

#[test]
fn hard_links_share_content_with_this_or_a_lower_layer() {
    let base = [file("a", 1), hardlink("b", "a")];
    assert_eq!(merged(&[&base, &[hardlink("c", "b")]]).unwrap(), ["a=1", "b=1", "c=1"]);
    let missing = merged(&[&base, &[hardlink("c", "zzz")]]).unwrap_err();
    assert_eq!(missing, r#"entry "c": hard link to "zzz", which is not there"#);
    let directory = merged(&[&[dir("d"), hardlink("c", "d")]]).unwrap_err();
    assert_eq!(directory, r#"entry "c": hard link to the directory "d""#);
}

#[test]
fn nothing_is_followed() {
    let through = merged(&[&[symlink("evil", "/etc"), file("evil/passwd", 1)]]).unwrap_err();
    assert_eq!(through, r#"entry "evil/passwd": leads through the symlink "evil""#);
    let lower = merged(&[&[symlink("evil", "../..")], &[file("evil/x", 1)]]).unwrap_err();
    assert!(lower.contains("leads through the symlink"), "{lower}");
    let link = merged(&[&[symlink("evil", "/etc"), hardlink("x", "evil/shadow")]]).unwrap_err();
    assert!(link.contains("which is not there"), "{link}");
    let file_parent = merged(&[&[file("f", 1), file("f/x", 1)]]).unwrap_err();
    assert!(file_parent.contains("which is a file"), "{file_parent}");
    // A directory that the layer brings takes the symlink's place first.
    let replaced = [dir("evil"), file("evil/x", 1)];
    assert_eq!(merged(&[&[symlink("evil", "/etc")], &replaced]).unwrap(), ["evil/x=1"]);
    // A whiteout through a symlink hides nothing elsewhere.
    let base = [file("real/x", 1), symlink("alias", "real")];
    assert_eq!(merged(&[&base, &[whiteout("alias/x")]]).unwrap(), ["real/x=1"]);
}

/// The same rules over a flat map of paths, written as plainly as possible.
#[derive(Default)]
struct Naive {
    nodes: BTreeMap<String, Option<u8>>,
}

impl Naive {
    fn remove(&mut self, path: &str, itself: bool) {
        let below = format!("{path}/");
        let all = path.is_empty();
        self.nodes.retain(|p, _| !(all || p.starts_with(&below) || (itself && p == path)));
    }

    fn apply(&mut self, layer: &[LayerEntry]) -> Option<()> {
        for entry in layer {
            match entry {
                LayerEntry::Whiteout { path } => self.remove(path, true),
                LayerEntry::Opaque { path } => self.remove(path, false),
                _ => {}
            }
        }
        for entry in layer {
            let (path, value) = match entry {
                LayerEntry::Directory { path } => (path, None),
                LayerEntry::File { path, size, .. } => (path, Some(*size as u8)),
                LayerEntry::Hardlink { path, target } => (path, Some((*self.nodes.get(target)?)?)),
                _ => continue,
            };
            let parts: Vec<_> = path.split('/').collect();
            for n in 1..parts.len() {
                if self.nodes.entry(parts[..n].join("/")).or_insert(None).is_some() {
                    return None;
                }
            }
            if value.is_some() {
                self.remove(path, true);
            }
            if value.is_some() || self.nodes.get(path).is_none_or(Option::is_some) {
                self.nodes.insert(path.clone(), value);
            }
        }
        Some(())
    }

    fn files(&self) -> Vec<String> {
        self.nodes.iter().filter_map(|(p, v)| v.map(|v| format!("{p}={v}"))).collect()
    }
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["a", "b", "c"], 1..4).prop_map(|names| names.join("/"))
}

fn entry() -> impl Strategy<Value = LayerEntry> {
    prop_oneof![
        4 => (path(), 1..9_u8).prop_map(|(path, n)| file(&path, n)),
        2 => path().prop_map(|path| dir(&path)),
        1 => path().prop_map(|path| whiteout(&path)),
        1 => path().prop_map(|path| opaque(&path)),
        1 => (path(), path()).prop_map(|(path, target)| hardlink(&path, &target)),
    ]
}

proptest! {
    #[test]
    fn layers_add_up_as_in_the_naive_model(
        layers in proptest::collection::vec(proptest::collection::vec(entry(), 0..8), 1..5)
    ) {
        let mut naive = Naive::default();
        let expected = layers.iter().try_for_each(|layer| naive.apply(layer)).map(|()| {
            let mut files = naive.files();
            files.sort();
            files
        });
        let slices: Vec<_> = layers.iter().map(Vec::as_slice).collect();
        let found = merged(&slices).ok().map(|mut files| { files.sort(); files });
        prop_assert_eq!(found, expected);
    }
}
