//! Any artifact whose layers have titles: files as ORAS and podman make them, whatever their type.
//!
//! <https://github.com/oras-project/oras-go/tree/main/content/file>
//!
//! A layer is the file of its title, byte for byte, also where its media type says tar: only
//! `io.deis.oras.content.unpack` makes it a folder, a tar with gzip whose entries all stand below
//! the title. ORAS writes `io.deis.oras.content.digest` beside it, over the tar, which is what a
//! diff_id is.

use super::declared::Declared;
use super::{Compression, Content, Place, PlacedLayer};

const UNPACK: &str = "io.deis.oras.content.unpack";
const DIGEST: &str = "io.deis.oras.content.digest";

pub(super) fn layer(declared: &Declared<'_>) -> Result<PlacedLayer, String> {
    let file = declared.file(Compression::None)?;
    if declared.annotations.get(UNPACK).map(String::as_str) != Some("true") {
        return Ok(file);
    }
    let Place::File(folder) = file.place else { return Ok(file) };
    let diff_id = match declared.annotations.get(DIGEST) {
        Some(digest) => {
            let digest = digest.parse();
            Some(digest.map_err(|why| declared.refuse(format!("{DIGEST}: {why}")))?)
        }
        None => None,
    };
    let placed = declared.placed(Content::Tar, Compression::Gzip, Place::Within(folder));
    Ok(PlacedLayer { diff_id, ..placed })
}
