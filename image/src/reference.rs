//! What a person writes to name an image, parsed.
//!
//! In comes text from a command line, a pod's volume attributes or a
//! configuration file; out goes a [`Reference`] that cannot be wrong in form:
//!
//! ```text
//! host[:port]/repository[:tag][@sha256:…]     a registry's
//! repository[:tag][@sha256:…]                 docker.io's, as docker reads it
//! oci://host/repository[:tag][@sha256:…]      a registry's, as KServe's storageUri writes it
//! oci:PATH[:TAG][@sha256:…]                   an OCI layout folder
//! oci-archive:PATH[:TAG][@sha256:…]           a tar of one
//! docker-archive:PATH[:NAME:TAG][@sha256:…]   what `docker save` writes
//! ```
//!
//! `Display` is the canonical form: it parses back to the same value, and two
//! spellings of one reference become equal (`index.docker.io/x` and `x`, upper
//! case in a host name, `oci:./a//b/` and `oci:a/b`). Where a tag and a digest
//! stand together the digest decides and the tag is kept for the reader.
//!
//! Whether the thing named exists is the business of [`crate::source`].

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use oci_spec::distribution::Reference as SpecReference;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::source::ManifestName;

/// Longer text is refused unread. A host name of 255, a repository of 255, a tag
/// of 128 and a digest of 71 characters fit; so does a path of PATH_MAX.
const MAX_TEXT_BYTES: usize = 4096 + 256;

/// An image by name: in a registry, or in a folder or file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Reference {
    /// An image in a registry.
    Registry(RegistryReference),
    /// An image in an OCI layout folder or an archive.
    Layout(LayoutReference),
}

/// An image in a registry; always with a tag, a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegistryReference {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// What a layout lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayoutForm {
    /// An OCI layout folder, `oci:`.
    Folder,
    /// A tar of one, `oci-archive:`.
    OciArchive,
    /// A tar as `docker save` writes it, `docker-archive:`.
    DockerArchive,
}

impl LayoutForm {
    const ALL: [Self; 3] = [Self::Folder, Self::OciArchive, Self::DockerArchive];

    fn scheme(self) -> &'static str {
        match self {
            Self::Folder => "oci",
            Self::OciArchive => "oci-archive",
            Self::DockerArchive => "docker-archive",
        }
    }
}

/// An image in an OCI layout folder, or in an archive.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayoutReference {
    form: LayoutForm,
    path: PathBuf,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not a [`Reference`], and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("reference {text:?}: {why}")]
pub struct InvalidReference {
    text: String,
    why: String,
}

impl Reference {
    /// What to ask the source for: the digest where there is one, else the tag.
    pub fn name(&self) -> ManifestName {
        let (tag, digest) = match self {
            Self::Registry(reference) => (&reference.tag, reference.digest),
            Self::Layout(reference) => (&reference.tag, reference.digest),
        };
        match (digest, tag) {
            (Some(digest), _) => ManifestName::Digest(digest),
            (None, Some(tag)) => ManifestName::Tag(tag.clone()),
            (None, None) => ManifestName::Only,
        }
    }

    /// The digest, when the reference fixes one.
    pub fn digest(&self) -> Option<Digest> {
        match self {
            Self::Registry(reference) => reference.digest,
            Self::Layout(reference) => reference.digest,
        }
    }

    /// The tag, when the reference has one.
    pub fn tag(&self) -> Option<&str> {
        match self {
            Self::Registry(reference) => reference.tag.as_deref(),
            Self::Layout(reference) => reference.tag.as_deref(),
        }
    }

    /// The registry's `host` or `host:port`; nothing for a layout.
    pub fn registry(&self) -> Option<&str> {
        match self {
            Self::Registry(reference) => Some(&reference.host),
            Self::Layout(_) => None,
        }
    }

    /// Makes a layout's relative path absolute: below `folder`. What a person
    /// types is relative to their shell; a daemon stands elsewhere.
    #[must_use]
    pub fn absolute_below(self, folder: &Path) -> Self {
        match self {
            Self::Layout(mut reference) => {
                reference.path = normal_path(&folder.join(&reference.path));
                Self::Layout(reference)
            }
            registry @ Self::Registry(_) => registry,
        }
    }
}

impl RegistryReference {
    /// `host` or `host:port`, lower case; Docker Hub is `docker.io`.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository's path below the host: `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }
}

impl LayoutReference {
    /// What lies at the path.
    pub fn form(&self) -> LayoutForm {
        self.form
    }

    /// The layout's folder or file, as written: maybe relative to the working directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let fail = |why: &str| InvalidReference {
            text: text.chars().take(200).collect(),
            why: why.to_owned(),
        };
        if text.len() > MAX_TEXT_BYTES {
            return Err(fail("too long"));
        }
        if text.is_empty() {
            return Err(fail("empty; write host/repository:tag or oci:/folder:tag"));
        }
        if text.chars().any(char::is_control) {
            return Err(fail("holds a control character"));
        }
        if let Some(rest) = text.strip_prefix("oci://") {
            if rest.starts_with('/') {
                return Err(fail("a layout folder is written oci:/folder:tag, with one slash"));
            }
            parse_registry(rest).map(Self::Registry).map_err(|why| fail(&why))
        } else if let Some((form, rest)) = layout_form(text) {
            parse_layout(form, rest).map(Self::Layout).map_err(|why| fail(&why))
        } else if let Some((scheme, _)) = text.split_once("://") {
            Err(fail(&format!("leave out {scheme}://; write host/repository:tag")))
        } else if text.starts_with(['/', '.']) {
            Err(fail("a layout folder is written oci:/folder:tag"))
        } else {
            parse_registry(text).map(Self::Registry).map_err(|why| fail(&why))
        }
    }
}

/// Reads what stands behind an optional `oci://`.
///
/// The grammar is `oci_spec`'s, the one docker uses. It lets a few things pass
/// that no registry can serve, and which are refused here: letters beyond ASCII
/// in a tag, upper case in a repository whose first part is no host name, ports
/// above 65535, other digests than sha256.
fn parse_registry(text: &str) -> Result<RegistryReference, String> {
    if !text.is_ascii() {
        return Err("holds a character beyond ASCII".into());
    }
    if text.starts_with('[') {
        return Err("an IPv6 address cannot be a registry's name; give it a host name".into());
    }
    // The grammar's own complaints do not say where it stopped; say it for the usual slips.
    if let Some((_, digest)) = text.split_once('@') {
        digest.parse::<Digest>().map_err(|error| error.to_string())?;
    }
    let parsed: SpecReference = text.parse().map_err(|error| {
        let name = text.split('@').next().unwrap_or(text);
        let (path, tag) = match name.rsplit_once(':') {
            Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
            _ => (name, None),
        };
        let repository = path.split_once('/').map_or(path, |(_, repository)| repository);
        if tag.is_some_and(str::is_empty) {
            "the tag behind ':' is empty; write host/repository:tag".to_owned()
        } else if repository.bytes().any(|b| b.is_ascii_uppercase()) {
            "a repository is lower case".to_owned()
        } else {
            format!("{error}; write host/repository:tag or host/repository@sha256:<64 hex digits>")
        }
    })?;
    let (host, repository) = (parsed.registry(), parsed.repository());
    if repository.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err("a repository is lower case".into());
    }
    if let Some((_, port)) = host.split_once(':') {
        port.parse::<u16>().ok().filter(|port| *port != 0).ok_or("port out of range")?;
    }
    let digest = parsed.digest().map(str::parse::<Digest>).transpose();
    Ok(RegistryReference {
        host: host.to_ascii_lowercase(),
        repository: repository.to_owned(),
        tag: parsed.tag().map(str::to_owned),
        digest: digest.map_err(|error| error.to_string())?,
    })
}

fn layout_form(text: &str) -> Option<(LayoutForm, &str)> {
    let (scheme, rest) = text.split_once(':')?;
    let form = LayoutForm::ALL.into_iter().find(|form| form.scheme() == scheme)?;
    Some((form, rest))
}

/// Reads what stands behind `oci:` and its like. As for skopeo, the first `:` ends the path.
fn parse_layout(form: LayoutForm, text: &str) -> Result<LayoutReference, String> {
    // `@` may stand in a path; `@algorithm:hex` at the end is a digest.
    let (text, digest) = match text.rsplit_once('@') {
        Some((rest, digest)) if digest.contains(':') && !digest.contains('/') => {
            let digest = digest.parse::<Digest>().map_err(|error| error.to_string())?;
            (rest, Some(digest))
        }
        _ => (text, None),
    };
    let (path, tag) = match text.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (text, None),
    };
    if path.is_empty() {
        return Err(match form {
            LayoutForm::Folder => "the folder is missing; write oci:/folder:tag".into(),
            _ => format!("the file is missing; write {}:/file.tar:tag", form.scheme()),
        });
    }
    let tag = match (tag, form) {
        (None, _) => None,
        (Some(tag), LayoutForm::DockerArchive) => Some(clean_docker_tag(tag)?),
        (Some(tag), _) => {
            check_layout_tag(tag)?;
            Some(tag.to_owned())
        }
    };
    let path = normal_path(Path::new(path));
    // Without the slash that it may have had, `a@b:tag` would read as a digest.
    let name = path.file_name().map(|name| name.to_string_lossy());
    if tag.is_some() && digest.is_none() && name.is_some_and(|name| name.contains('@')) {
        return Err("a name with @ before a tag would read as a digest; rename it".into());
    }
    Ok(LayoutReference { form, path, tag, digest })
}

/// `busybox` → `docker.io/library/busybox:latest`: what images are tagged with in an archive.
pub(crate) fn clean_docker_tag(text: &str) -> Result<String, String> {
    let reference = parse_registry(text)?;
    if reference.digest.is_some() {
        return Err(format!("{text:?} holds a digest; write docker-archive:/file.tar:name:tag"));
    }
    Ok(reference.to_string())
}

/// The grammar of `org.opencontainers.image.ref.name`, without `@`, which starts a digest here.
/// <https://github.com/opencontainers/image-spec/blob/main/annotations.md>
fn check_layout_tag(tag: &str) -> Result<(), String> {
    let fits = tag.len() <= 255
        && tag.split('/').all(|component| {
            component.starts_with(|c: char| c.is_ascii_alphanumeric())
                && component.ends_with(|c: char| c.is_ascii_alphanumeric())
                && component.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:+".contains(&b))
        });
    if fits {
        Ok(())
    } else {
        let tag: String = tag.chars().take(100).collect();
        Err(format!("tag {tag:?} is none; letters, digits and -._:+/ make one"))
    }
}

/// `.`, doubled and trailing slashes dropped; `..` is left to the kernel, since
/// the folder before it may be a symlink.
fn normal_path(path: &Path) -> PathBuf {
    let normal: PathBuf =
        path.components().filter(|part| !matches!(part, Component::CurDir)).collect();
    if normal.as_os_str().is_empty() { PathBuf::from(".") } else { normal }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => fmt::Display::fmt(reference, f),
            Self::Layout(reference) => fmt::Display::fmt(reference, f),
        }
    }
}

impl fmt::Display for RegistryReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        write_name(f, self.tag.as_deref(), self.digest)
    }
}

impl fmt::Display for LayoutReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.form.scheme(), self.path.display())?;
        write_name(f, self.tag.as_deref(), self.digest)
    }
}

fn write_name(
    f: &mut fmt::Formatter<'_>,
    tag: Option<&str>,
    digest: Option<Digest>,
) -> fmt::Result {
    if let Some(tag) = tag {
        write!(f, ":{tag}")?;
    }
    if let Some(digest) = digest {
        write!(f, "@{digest}")?;
    }
    Ok(())
}

impl TryFrom<String> for Reference {
    type Error = InvalidReference;

    fn try_from(text: String) -> Result<Self, InvalidReference> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> Self {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn canonical(text: &str) -> String {
        text.parse::<Reference>().unwrap().to_string()
    }

    fn why(text: &str) -> String {
        text.parse::<Reference>().unwrap_err().why
    }

    #[test]
    fn a_registry_reference_is_read_as_docker_reads_it() {
        for (text, expected) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("team/model:v1", "docker.io/team/model:v1"),
            ("index.docker.io/busybox", "docker.io/library/busybox:latest"),
            ("localhost/model", "localhost/model:latest"),
            ("Quay.IO/team/model:V1", "quay.io/team/model:V1"),
            ("registry:5000/a/b/c:v1", "registry:5000/a/b/c:v1"),
            ("oci://quay.io/team/model:v1", "quay.io/team/model:v1"),
        ] {
            assert_eq!(canonical(text), expected, "{text}");
        }
        let digest = format!("quay.io/team/model@sha256:{HEX}");
        assert_eq!(canonical(&digest), digest);
    }

    #[test]
    fn the_digest_decides_and_the_tag_is_kept() {
        let text = format!("quay.io/team/model:v1@sha256:{HEX}");
        let reference: Reference = text.parse().unwrap();
        assert_eq!(reference.to_string(), text);
        assert_eq!(reference.name(), ManifestName::Digest(Digest::of(b"")));
        assert_eq!(reference.tag(), Some("v1"));
        assert_eq!(reference.registry(), Some("quay.io"));
    }

    #[test]
    fn a_layout_is_a_folder_and_maybe_a_tag_or_digest() {
        for (text, expected) in [
            ("oci:/models/llama:v1", "oci:/models/llama:v1"),
            ("oci:./llama//x/:v1", "oci:llama/x:v1"),
            ("oci:.", "oci:."),
            ("oci:/models/a@b", "oci:/models/a@b"),
            ("oci:/models:quay.io/team/model:v1", "oci:/models:quay.io/team/model:v1"),
            ("oci:../x", "oci:../x"),
        ] {
            assert_eq!(canonical(text), expected, "{text}");
        }
        let only: Reference = "oci:/models/llama".parse().unwrap();
        assert_eq!(only.name(), ManifestName::Only);
        assert_eq!(only.registry(), None);
        let fixed: Reference = format!("oci:/models/llama@sha256:{HEX}").parse().unwrap();
        assert_eq!(fixed.digest(), Some(Digest::of(b"")));
        let Reference::Layout(layout) = &fixed else { panic!("{fixed:?}") };
        assert_eq!(layout.path(), Path::new("/models/llama"));
    }

    #[test]
    fn an_archive_is_a_file_and_maybe_a_tag() {
        for (text, expected) in [
            ("oci-archive:/models/llama.tar:v1", "oci-archive:/models/llama.tar:v1"),
            ("oci-archive:./llama.tar", "oci-archive:llama.tar"),
            ("docker-archive:/m.tar", "docker-archive:/m.tar"),
            (
                "docker-archive:/m.tar:team/model",
                "docker-archive:/m.tar:docker.io/team/model:latest",
            ),
            ("docker-archive:/m.tar:Quay.io/a:v1", "docker-archive:/m.tar:quay.io/a:v1"),
        ] {
            assert_eq!(canonical(text), expected, "{text}");
            let reference: Reference = expected.parse().unwrap();
            assert_eq!(reference.registry(), None);
        }
        let tagged: Reference = "docker-archive:/m.tar:busybox".parse().unwrap();
        let tag = "docker.io/library/busybox:latest".to_owned();
        assert_eq!(tagged.name(), ManifestName::Tag(tag));
        let Reference::Layout(layout) = &tagged else { panic!("{tagged:?}") };
        assert_eq!(
            (layout.form(), layout.path()),
            (LayoutForm::DockerArchive, Path::new("/m.tar"))
        );
        assert_eq!(why("oci-archive::v1"), "the file is missing; write oci-archive:/file.tar:tag");
        assert_eq!(why("docker-archive:/m.tar:Team/a"), "a repository is lower case");
        // As containers' tools write it for the n-th image.
        assert!(why("docker-archive:/m.tar:@1").contains("digest"));
    }

    #[test]
    fn a_relative_layout_can_be_made_absolute() {
        let reference: Reference = "oci:./out:v1".parse().unwrap();
        let absolute = reference.absolute_below(Path::new("/home/me"));
        assert_eq!(absolute.to_string(), "oci:/home/me/out:v1");
        assert_eq!(absolute.clone().absolute_below(Path::new("/elsewhere")), absolute);
    }

    #[test]
    fn what_is_wrong_is_refused_with_what_to_write() {
        assert_eq!(why(""), "empty; write host/repository:tag or oci:/folder:tag");
        assert_eq!(why("https://quay.io/a:b"), "leave out https://; write host/repository:tag");
        assert_eq!(why("docker://a/b"), "leave out docker://; write host/repository:tag");
        assert_eq!(why("/models/x"), "a layout folder is written oci:/folder:tag");
        assert_eq!(why("oci:///x"), "a layout folder is written oci:/folder:tag, with one slash");
        assert_eq!(why("oci:"), "the folder is missing; write oci:/folder:tag");
        assert_eq!(why("oci::v1"), "the folder is missing; write oci:/folder:tag");
        assert_eq!(why("oci:/x:"), r#"tag "" is none; letters, digits and -._:+/ make one"#);
        assert_eq!(why("quay.io/Team/model"), "a repository is lower case");
        // Upper case before the first slash that is no host would pass the grammar.
        assert_eq!(why("Team/model"), "a repository is lower case");
        assert_eq!(why("quay.io/a:"), "the tag behind ':' is empty; write host/repository:tag");
        assert_eq!(why("quay.io:99999/a"), "port out of range");
        assert_eq!(why("quay.io/a:ü"), "holds a character beyond ASCII");
        assert_eq!(why("a\nb"), "holds a control character");
        assert!(why("[::1]:5000/a").contains("IPv6"));
        assert!(why("a@sha512:00").contains("only sha256 is supported"));
        assert!(why("a@sha256:00").contains("expected 64 hex digits"));
        assert!(why("oci:a@b/:v1").contains("would read as a digest"));
        assert!(why(&format!("oci:/x@sha256:{}", HEX.to_uppercase())).contains("lower case"));
        assert!(why("quay.io/a b").starts_with("invalid reference format; write host/"));
        assert_eq!(why(&"a".repeat(10_000)), "too long");
    }

    #[test]
    fn serde_reads_and_writes_the_text() {
        let reference: Reference = serde_json::from_str(r#""oci://quay.io/a/b""#).unwrap();
        assert_eq!(serde_json::to_string(&reference).unwrap(), r#""quay.io/a/b:latest""#);
        let error = serde_json::from_str::<Reference>(r#""A B""#).unwrap_err();
        assert!(error.to_string().contains(r#"reference "A B""#), "{error}");
    }

    proptest! {
        #[test]
        fn canonical_text_parses_to_the_same_reference(text in "(oci:|oci://|oci-archive:|docker-archive:)?[a-z./:@0-9A-Z-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                let again: Reference = reference.to_string().parse().unwrap();
                prop_assert_eq!(again, reference);
            }
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,80}") {
            let _ = text.parse::<Reference>();
        }
    }
}
