//! The models of a node in order, page by page.

use carport_image::pull::PullProgress;
use carport_image::{Digest, Reference};
use carport_proto::carport::v1;
use tonic::Status;

use super::convert::invalid;
use crate::placement::Wanted;
use crate::state::NodeState;

/// What a caller gets who names no size.
const DEFAULT_PAGE: usize = 100;
/// A page of so many models stays well below gRPC's customary 4 MiB.
const MAX_PAGE: usize = 1_000;
/// Longer than any key that was ever handed out.
const MAX_TOKEN_BYTES: usize = 16_384;

/// One model under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// What the list is ordered by: digest (empty where it is not known), then reference.
    pub(super) key: (String, String),
    /// The same, to be looked up.
    pub(super) wanted: Wanted,
}

impl Entry {
    fn new(digest: Option<Digest>, reference: Option<Reference>) -> Self {
        let key = (
            digest.map(|digest| digest.to_string()).unwrap_or_default(),
            reference.as_ref().map(ToString::to_string).unwrap_or_default(),
        );
        Self { key, wanted: Wanted { reference, digest } }
    }
}

/// All models that the node has, is pulling, or failed to pull lately, in order; where a place is named,
/// those that are complete there.
pub(super) fn entries(
    state: &NodeState,
    pulls: &[PullProgress],
    place: Option<v1::Place>,
) -> Vec<Entry> {
    let mut entries = Vec::with_capacity(state.images.len() + pulls.len());
    let mut add = |digest: Digest, references: &[String]| {
        let named = references.iter().filter_map(|text| text.parse().ok());
        let before = entries.len();
        entries.extend(named.map(|reference| Entry::new(Some(digest), Some(reference))));
        if entries.len() == before {
            entries.push(Entry::new(Some(digest), None));
        }
    };
    if place != Some(v1::Place::Runtime) {
        state.images.iter().for_each(|(digest, image)| add(*digest, &image.references));
    }
    if place != Some(v1::Place::Store) {
        let connected = state.runtime.connected.then_some(&state.runtime.images);
        let complete = connected.into_iter().flatten().filter(|(_, image)| image.is_complete());
        for (digest, image) in complete {
            // One that the store has, too, is there under its own names.
            let is_stored = place.is_none() && state.images.contains_key(digest);
            if !(image.references.is_empty() && is_stored) {
                add(*digest, &image.references);
            }
        }
    }
    for pull in pulls.iter().filter(|_| place.is_none()) {
        // A pull that has just ended may still be listed beside its image.
        let stored = pull.digest.is_some_and(|digest| state.images.contains_key(&digest));
        if !stored && state.resolve(&pull.reference).is_none_or(|d| !state.images.contains_key(&d))
        {
            entries.push(Entry::new(pull.digest, Some(pull.reference.clone())));
        }
    }
    entries.sort_by(|a, b| a.key.cmp(&b.key));
    entries.dedup();
    entries
}

/// Which part of the list is wanted.
#[derive(Debug)]
pub(super) struct Page {
    size: usize,
    after: Option<(String, String)>,
    filter: String,
    /// Where its models are; absent: anywhere.
    pub(super) place: Option<v1::Place>,
}

impl Page {
    /// Reads the request.
    pub(super) fn read(request: &v1::ListModelsRequest) -> Result<Self, Status> {
        let size = match request.page_size {
            0 => DEFAULT_PAGE,
            size => usize::try_from(size)
                .map_err(|_| invalid("page_size", format!("{size}; write 0 to {MAX_PAGE}")))?
                .min(MAX_PAGE),
        };
        let after = match request.page_token.as_str() {
            "" => None,
            token => Some(read_token(token).ok_or_else(|| {
                invalid("page_token", "not one of ours; pass on next_page_token as it was")
            })?),
        };
        let place = match v1::Place::try_from(request.place) {
            Ok(v1::Place::Unspecified) => None,
            Ok(place) => Some(place),
            Err(_) => return Err(invalid("place", "not one that is known here")),
        };
        Ok(Self { size, after, filter: request.filter.clone(), place })
    }

    /// This page of `entries`, and the token of the next one; empty on the last.
    pub(super) fn cut(&self, mut entries: Vec<Entry>) -> (Vec<Entry>, String) {
        entries.retain(|entry| {
            let (digest, reference) = &entry.key;
            self.after.as_ref().is_none_or(|after| entry.key > *after)
                && (digest.contains(&self.filter) || reference.contains(&self.filter))
        });
        let more = entries.len() > self.size;
        entries.truncate(self.size);
        let token = match entries.last() {
            Some(last) if more => write_token(&last.key),
            _ => String::new(),
        };
        (entries, token)
    }
}

// The last key, so that models that come and go between two pages neither hide nor double others.
fn write_token((digest, reference): &(String, String)) -> String {
    let bytes = format!("{digest}\n{reference}");
    bytes.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn read_token(token: &str) -> Option<(String, String)> {
    if token.len() > MAX_TOKEN_BYTES || !token.len().is_multiple_of(2) || !token.is_ascii() {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(token.get(at..at + 2)?, 16).ok();
    let bytes: Vec<u8> = (0..token.len()).step_by(2).map(byte).collect::<Option<_>>()?;
    let text = String::from_utf8(bytes).ok()?;
    let (digest, reference) = text.split_once('\n')?;
    Some((digest.into(), reference.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::{image, node, pull};

    fn request(page_size: i32, page_token: &str, filter: &str) -> v1::ListModelsRequest {
        v1::ListModelsRequest {
            page_size,
            page_token: page_token.into(),
            filter: filter.into(),
            ..Default::default()
        }
    }

    fn names(entries: &[Entry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.key.1.as_str()).collect()
    }

    #[test]
    fn pages_cover_everything_once() {
        let state = node((0..25).map(|n| image(&format!("r:5000/m{n}:1"), 1)).collect());
        let pulls = [pull("r:5000/new:1", 0, 0)];
        let all = entries(&state, &pulls, None);
        assert_eq!(all.len(), 26);
        assert_eq!(all[0].key, (String::new(), "r:5000/new:1".to_string()));
        let (mut token, mut seen) = (String::new(), Vec::new());
        for page in 0..3 {
            let cut = Page::read(&request(10, &token, "")).unwrap().cut(all.clone());
            assert_eq!(cut.0.len(), if page < 2 { 10 } else { 6 });
            seen.extend(cut.0);
            token = cut.1;
            assert_eq!(token.is_empty(), page == 2);
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn a_model_that_vanishes_between_pages_hides_no_other() {
        let mut state = node((0..4).map(|n| image(&format!("r:5000/m{n}:1"), 1)).collect());
        let all = entries(&state, &[], None);
        let (first, token) = Page::read(&request(2, "", "")).unwrap().cut(all.clone());
        state.images.remove(&first[1].wanted.digest.unwrap());
        let rest = Page::read(&request(2, &token, "")).unwrap().cut(entries(&state, &[], None)).0;
        assert_eq!(rest, all[2..]);
    }

    #[test]
    fn the_filter_looks_at_reference_and_digest() {
        let state = node(vec![image("r:5000/llama:1", 1), image("r:5000/phi:1", 1)]);
        let find = |filter: &str| {
            let page = Page::read(&request(0, "", filter)).unwrap();
            names(&page.cut(entries(&state, &[], None)).0).join(",")
        };
        assert_eq!(find("llama"), "r:5000/llama:1");
        assert_eq!(find(&image("r:5000/phi:1", 1).digest.hex()), "r:5000/phi:1");
        assert_eq!(find("nothing"), "");
    }

    #[test]
    fn a_pull_that_has_just_ended_is_no_second_entry() {
        let state = node(vec![image("r:5000/a:1", 1)]);
        assert_eq!(entries(&state, &[pull("r:5000/a:1", 1, 1)], None).len(), 1);
    }

    #[test]
    fn images_of_the_runtime_are_listed_while_it_answers() {
        use carport_image::runtime::{Inventory, RuntimeImage};
        let both = image("r:5000/both:1", 1);
        let in_runtime = |digest, references: &[&str], unpacked| {
            let image = RuntimeImage {
                digest,
                references: references.iter().map(ToString::to_string).collect(),
                bytes: 1,
                unpacked,
                layers: vec![carport_image::runtime::RuntimeLayer {
                    digest: Digest::of(b"layer"),
                    bytes: 1,
                    present: false,
                }],
            };
            (digest, std::sync::Arc::new(image))
        };
        let images = [
            in_runtime(both.digest, &[], true),
            in_runtime(Digest::of(b"2"), &["r:5000/serving:1", "r:5000/serving:2"], true),
            in_runtime(Digest::of(b"3"), &["r:5000/half:1"], false),
        ];
        let mut state = node(vec![both, image("r:5000/stored:1", 1)]);
        let mut inventory =
            Inventory { images: images.into(), connected: true, ..Default::default() };
        state.runtime = std::sync::Arc::new(inventory.clone());
        let listed = |state: &NodeState, place| {
            let entries = entries(state, &[pull("r:5000/new:1", 0, 0)], place);
            let mut names: Vec<String> = entries.into_iter().map(|entry| entry.key.1).collect();
            names.sort();
            names.join(" ")
        };
        let all = "r:5000/both:1 r:5000/new:1 r:5000/serving:1 r:5000/serving:2 r:5000/stored:1";
        assert_eq!(listed(&state, None), all);
        let (store, runtime) = (Some(v1::Place::Store), Some(v1::Place::Runtime));
        assert_eq!(listed(&state, store), "r:5000/both:1 r:5000/stored:1");
        assert_eq!(listed(&state, runtime), " r:5000/serving:1 r:5000/serving:2");
        inventory.connected = false;
        state.runtime = std::sync::Arc::new(inventory);
        assert_eq!(listed(&state, runtime), "");
    }

    #[test]
    fn what_is_no_page_is_refused() {
        for (size, token) in [(-1, ""), (1, "zz"), (1, "6162"), (1, "é0")] {
            let error = Page::read(&request(size, token, "")).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
        }
        assert_eq!(Page::read(&request(i32::MAX, "", "")).unwrap().size, MAX_PAGE);
    }
}
