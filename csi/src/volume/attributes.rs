//! What a volume asks for, parsed from the text that the kubelet passes on.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use carport_image::Reference;
use carport_image::pull::PullPolicy;
use serde::{Deserialize, Serialize};

use super::Filter;
use crate::mount::{ImagePath, MountOptions};

/// The attributes that a volume may have, as users write them.
const KNOWN: [&str; 8] =
    ["image", "path", "include", "exclude", "pullPolicy", "mode", "noexec", "pin"];

/// What the kubelet adds on its own: the pod's identity and tokens.
const KUBELET_PREFIX: &str = "csi.storage.k8s.io/";

/// The kubelet's ids have 68 characters, a PV's handle is written by a person.
const MAX_VOLUME_ID_BYTES: usize = 1024;

/// PATH_MAX, without the NUL.
const MAX_TARGET_BYTES: usize = 4095;

/// An error message repeats at most so much of what it was given.
const MAX_SHOWN_CHARS: usize = 100;

/// A request that cannot be meant so: what of it, why, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct InvalidRequest(pub(crate) String);

/// What a volume is called: by the kubelet for an inline volume, by its handle for a PV.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumeId(String);

impl VolumeId {
    /// Takes any text that is neither empty nor very long.
    ///
    /// # Errors
    ///
    /// When it is.
    pub fn parse(text: &str) -> Result<Self, InvalidRequest> {
        match text.len() {
            0 => Err(InvalidRequest("volume id: missing".into())),
            1..=MAX_VOLUME_ID_BYTES => Ok(Self(text.to_owned())),
            _ => Err(InvalidRequest(format!("volume id: longer than {MAX_VOLUME_ID_BYTES} bytes"))),
        }
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a volume appears: an absolute path other than `/`, without `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TargetPath(PathBuf);

impl TargetPath {
    /// Parses a path; `//` and `/./` become `/`.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, InvalidRequest> {
        let invalid = |why| InvalidRequest(format!("target path {:?}: {why}", shown(text)));
        if text.is_empty() {
            return Err(InvalidRequest("target path: missing".into()));
        }
        if text.len() > MAX_TARGET_BYTES || text.contains('\0') {
            return Err(invalid("longer than 4095 bytes, or with a NUL in it"));
        }
        let path = Path::new(text);
        if !path.is_absolute() {
            return Err(invalid("must be absolute"));
        }
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(invalid("must not have `..` in it"));
        }
        let path: PathBuf = path.components().collect();
        if path.parent().is_none() {
            return Err(invalid("must not be the root folder"));
        }
        Ok(Self(path))
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for TargetPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// The pod that a volume is for, as the kubelet tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodInfo {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// When a pod starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// When all of the image is here and verified.
    #[default]
    Wait,
    /// As soon as its files are known; bytes may be read before they are verified.
    Stream,
}

/// What a volume shows, and how it comes to the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeAttributes {
    /// `image`: which image. Required.
    pub image: Reference,
    /// `path`: a folder inside it to show instead of all of it.
    pub path: Option<ImagePath>,
    /// `include` and `exclude`: of that folder, which files to show.
    pub filter: Option<Filter>,
    /// `noexec`, and mount options that say the same.
    pub options: MountOptions,
    /// `mode`: whether the pod starts before all of the image is here.
    pub mode: Mode,
    /// `pullPolicy`: when the registry is asked. `IfNotPresent` unless said otherwise.
    pub pull_policy: PullPolicy,
    /// `pin`: for how long the image stays on the node after the volume is gone.
    pub pin: Option<Duration>,
    /// The pod, when the kubelet says (`podInfoOnMount`).
    pub pod: Option<PodInfo>,
}

impl VolumeAttributes {
    /// Attributes of a volume that shows all of `image`.
    pub fn new(image: Reference) -> Self {
        Self {
            image,
            path: None,
            filter: None,
            options: MountOptions::default(),
            mode: Mode::default(),
            pull_policy: PullPolicy::default(),
            pin: None,
            pod: None,
        }
    }

    /// Parses a volume context. Service-account tokens in it are not kept.
    ///
    /// # Errors
    ///
    /// Names the attribute that is missing, unknown or wrong, and never repeats a value
    /// of the kubelet's.
    pub fn parse<'a>(
        context: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self, InvalidRequest> {
        // Sorted, so that of two mistakes always the same one is reported.
        let mut rest: BTreeMap<&str, &str> = context.into_iter().collect();
        let pod = pod_info(&rest);
        rest.retain(|key, _| !key.starts_with(KUBELET_PREFIX));
        let invalid = |attribute: &str, why: &dyn fmt::Display| {
            InvalidRequest(format!("volume attribute {attribute}: {why}"))
        };

        let image = rest.remove("image");
        let path = rest.remove("path");
        let pull_policy = rest.remove("pullPolicy");
        let (include, exclude) = (rest.remove("include"), rest.remove("exclude"));
        let (mode, noexec) = (rest.remove("mode"), rest.remove("noexec"));
        let pin = rest.remove("pin");
        if let Some(unknown) = rest.keys().next() {
            return Err(unknown_attribute(unknown));
        }
        let image = image.filter(|text| !text.is_empty()).ok_or_else(|| {
            invalid("image", &"missing; name the image to mount, such as registry.example/model:v1")
        })?;
        let mode = match mode {
            None | Some("wait") => Mode::Wait,
            Some("stream") if include.or(exclude).is_some() => {
                let why = "stream shows all files of a folder; leave out include and exclude, or \
                           leave out the mode, and the pod starts when all of the image is here";
                return Err(invalid("mode", &why));
            }
            Some("stream") => Mode::Stream,
            Some(other) => {
                return Err(invalid(
                    "mode",
                    &format!("{:?} is none of wait, stream", shown(other)),
                ));
            }
        };
        Ok(Self {
            image: image.parse().map_err(|why| invalid("image", &why))?,
            path: match path {
                Some(text) => ImagePath::parse(text).map_err(|why| invalid("path", &why))?,
                None => None,
            },
            filter: Filter::parse(include, exclude).map_err(|(name, why)| invalid(name, &why))?,
            options: MountOptions {
                noexec: match noexec {
                    None | Some("false") => false,
                    Some("true") => true,
                    Some(other) => {
                        let why = format!("{:?} is neither true nor false", shown(other));
                        return Err(invalid("noexec", &why));
                    }
                },
            },
            mode,
            pull_policy: match pull_policy {
                None => PullPolicy::default(),
                Some("IfNotPresent") => PullPolicy::IfNotPresent,
                Some("Always") => PullPolicy::Always,
                Some("Never") => PullPolicy::Never,
                Some(other) => {
                    let why = format!("{:?} is none of IfNotPresent, Always, Never", shown(other));
                    return Err(invalid("pullPolicy", &why));
                }
            },
            pin: pin.map(parse_pin).transpose().map_err(|why| invalid("pin", &why))?,
            pod,
        })
    }
}

/// Whole seconds, so that it is written as it was meant.
fn parse_pin(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if time.as_secs() > 0 => Ok(Duration::from_secs(time.as_secs())),
        _ => Err(format!("{:?} is no time; write how long, such as 24h", shown(text))),
    }
}

fn pod_info(context: &BTreeMap<&str, &str>) -> Option<PodInfo> {
    let get = |key: &str| {
        let value = context.get(format!("{KUBELET_PREFIX}pod.{key}").as_str())?;
        (!value.is_empty()).then(|| (*value).to_owned())
    };
    Some(PodInfo { namespace: get("namespace")?, name: get("name")?, uid: get("uid")? })
}

fn unknown_attribute(name: &str) -> InvalidRequest {
    // A slip of the hand changes a letter or two; a word in between is another word.
    let distance =
        |known: &&str| strsim::damerau_levenshtein(&name.to_lowercase(), &known.to_lowercase());
    let nearest =
        KNOWN.iter().min_by_key(|known| distance(known)).filter(|known| distance(known) <= 3);
    let name = shown(name);
    InvalidRequest(match nearest {
        Some(nearest) => format!("volume attribute {name:?}: unknown; did you mean {nearest:?}?"),
        None => format!("volume attribute {name:?}: unknown; known are {}", KNOWN.join(", ")),
    })
}

fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<VolumeAttributes, String> {
        VolumeAttributes::parse(pairs.iter().copied()).map_err(|e| e.to_string())
    }

    #[test]
    fn an_image_is_all_that_is_needed() {
        let attributes = parse(&[("image", "registry.example/model:v1")]).unwrap();
        assert_eq!(attributes.image.to_string(), "registry.example/model:v1");
        assert_eq!(attributes.path, None);
        assert_eq!(
            (attributes.mode, attributes.pull_policy),
            (Mode::Wait, PullPolicy::IfNotPresent)
        );
        assert_eq!(attributes.pod, None);
    }

    #[test]
    fn all_attributes_are_read() {
        let attributes = parse(&[
            ("image", "registry.example/model:v1"),
            ("path", "/models"),
            ("pullPolicy", "Always"),
            ("include", "*.safetensors"),
            ("exclude", "original"),
            ("mode", "wait"),
            ("noexec", "true"),
            ("csi.storage.k8s.io/pod.name", "server-0"),
            ("csi.storage.k8s.io/pod.namespace", "llm"),
            ("csi.storage.k8s.io/pod.uid", "1234"),
            ("csi.storage.k8s.io/serviceAccount.tokens", "hunter2"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ])
        .unwrap();
        assert_eq!(attributes.path.as_ref().unwrap().to_string(), "/models");
        assert_eq!(attributes.pull_policy, PullPolicy::Always);
        assert_eq!(
            attributes.filter,
            Filter::parse(Some("*.safetensors"), Some("original")).unwrap()
        );
        assert!(attributes.options.noexec);
        let pod = attributes.pod.as_ref().unwrap();
        assert_eq!((&*pod.namespace, &*pod.name, &*pod.uid), ("llm", "server-0", "1234"));
        assert!(!format!("{attributes:?}").contains("hunter2"));
    }

    #[test]
    fn an_unknown_attribute_is_named_and_the_nearest_suggested() {
        let error = |name| parse(&[("image", "a/b:c"), (name, "hunter2")]).unwrap_err();
        assert_eq!(
            error("pullpolicy"),
            r#"volume attribute "pullpolicy": unknown; did you mean "pullPolicy"?"#
        );
        assert_eq!(error("imgae"), r#"volume attribute "imgae": unknown; did you mean "image"?"#);
        assert_eq!(
            error("readOnlyRootFilesystem"),
            r#"volume attribute "readOnlyRootFilesystem": unknown; known are image, path, include, exclude, pullPolicy, mode, noexec, pin"#
        );
    }

    #[test]
    fn the_document_names_every_attribute_and_no_other() {
        let document = include_str!("../../../docs/volumes.md");
        let rows = document.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        assert_eq!(rows.collect::<Vec<_>>(), KNOWN);
    }

    #[test]
    fn wrong_values_are_named() {
        assert!(parse(&[]).unwrap_err().starts_with("volume attribute image: missing; name the"));
        assert!(parse(&[("image", "")]).unwrap_err().contains("image: missing"));
        let error = parse(&[("image", "registry.example/UPPER:v1")]).unwrap_err();
        assert!(error.starts_with("volume attribute image: reference "), "{error}");
        assert_eq!(
            parse(&[("image", "a/b:c"), ("path", "../etc")]).unwrap_err(),
            "volume attribute path: must not have `..` in it"
        );
        let error = |name, value| parse(&[("image", "a/b:c"), (name, value)]).unwrap_err();
        assert_eq!(error("mode", "x"), r#"volume attribute mode: "x" is none of wait, stream"#);
        let stream = [("image", "a/b:c"), ("mode", "stream")];
        assert_eq!(parse(&stream).unwrap().mode, Mode::Stream);
        for filter in ["include", "exclude"] {
            let error = parse(&[stream[0], stream[1], (filter, "*.bin")]).unwrap_err();
            assert!(error.starts_with("volume attribute mode: stream shows all files"), "{error}");
        }
        assert_eq!(
            error("noexec", "yes"),
            r#"volume attribute noexec: "yes" is neither true nor false"#
        );
        assert!(
            error("include", "[").starts_with(r#"volume attribute include: "[" is no pattern"#)
        );
        assert_eq!(
            error("pin", "true"),
            r#"volume attribute pin: "true" is no time; write how long, such as 24h"#
        );
        assert_eq!(
            parse(&[("image", "a/b:c"), ("pullPolicy", "Sometimes")]).unwrap_err(),
            r#"volume attribute pullPolicy: "Sometimes" is none of IfNotPresent, Always, Never"#
        );
    }

    #[test]
    fn a_target_is_absolute_and_normal() {
        let target = |text| TargetPath::parse(text).map(|path| path.to_string());
        assert_eq!(target("/pods//1/./mount/"), Ok("/pods/1/mount".into()));
        let why = |text| target(text).unwrap_err().to_string();
        assert_eq!(why(""), "target path: missing");
        assert_eq!(why("pods/1"), r#"target path "pods/1": must be absolute"#);
        assert_eq!(why("/pods/../etc"), r#"target path "/pods/../etc": must not have `..` in it"#);
        assert_eq!(why("//"), r#"target path "//": must not be the root folder"#);
        assert!(why(&"/a".repeat(3000)).contains("longer than 4095 bytes"));
    }

    #[test]
    fn a_volume_id_is_bounded() {
        assert_eq!(VolumeId::parse("").unwrap_err().to_string(), "volume id: missing");
        assert!(VolumeId::parse(&"x".repeat(1024)).is_ok());
        assert!(VolumeId::parse(&"x".repeat(1025)).is_err());
    }
}
