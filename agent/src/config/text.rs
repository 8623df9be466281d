//! How single values are read from text, the same from a file, a flag or the environment.
//!
//! Each `parse_*` says in its error what was read and what to write. The functions
//! that serde calls wrap them, so that an error carries the line it stands in.

use std::fmt::Display;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use carport_image::runtime::Namespace;
use serde::de::{Deserialize, Deserializer, Error as _};
use serde::ser::{Serialize, Serializer};

/// `sun_path` of a unix socket holds 108 bytes, the last one NUL. Seven are kept free: a
/// socket stands under another name in the same directory before it is renamed into place.
const MAX_SOCKET_PATH: usize = 100;

/// What pulling needs at least.
const MIN_WINDOW: u64 = 16 << 20;
/// Above this something else than a window was meant.
const MAX_WINDOW: u64 = 64 << 30;

/// A range of one request takes minutes at this rate; below, time-outs would come first.
const MIN_RATE: u64 = 64 << 10;
/// A store of less was meant to be more.
const MIN_QUOTA: u64 = 1 << 20;
/// Above this, no end was meant.
const MAX_PIN_SECONDS: u64 = 3653 * 86_400;

/// A Kubernetes node name: lower-case letters, digits, `-` and `.`.
///
/// # Errors
///
/// Says what a node name looks like.
pub fn parse_node_name(text: &str) -> Result<String, String> {
    if is_dns_name(text, 253) {
        return Ok(text.to_string());
    }
    Err(format!(
        "{text:?} is no node name; write the Kubernetes node's name: at most 253 lower-case \
         letters, digits, '-' and '.'"
    ))
}

/// A CSI driver's name: a domain name of at most 63 characters.
///
/// # Errors
///
/// Says what a driver name looks like.
pub fn parse_driver_name(text: &str) -> Result<String, String> {
    if is_dns_name(text, 63) {
        return Ok(text.to_string());
    }
    Err(format!(
        "{text:?} is no driver name; write a domain name such as csi.carport.dev: at most 63 \
         lower-case letters, digits, '-' and '.'"
    ))
}

/// A registry's host, with or without a port.
///
/// # Errors
///
/// Says what a host looks like.
pub fn parse_host(text: &str) -> Result<String, String> {
    let plain = !text.is_empty()
        && !text.contains(['/', '@', ' ', ','])
        && text.chars().all(|c| c.is_ascii_graphic());
    if plain {
        return Ok(text.to_ascii_lowercase());
    }
    Err(format!("{text:?} is no registry host; write HOST or HOST:PORT, without http://"))
}

/// The name of a containerd namespace.
///
/// # Errors
///
/// Says what one looks like.
pub fn parse_namespace(text: &str) -> Result<Namespace, String> {
    Namespace::parse(text).ok_or_else(|| {
        format!(
            "{text:?} is no containerd namespace; write one such as k8s.io: letters and digits, \
             parted by '.', '-' or '_'"
        )
    })
}

/// A path from the root, without `..`.
///
/// # Errors
///
/// When it is not.
pub fn parse_absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if super::is_plain_absolute(&path) {
        return Ok(path);
    }
    Err(format!("{text:?} is no absolute path; write it from / and without '..'"))
}

/// A path where a unix socket can stand.
///
/// # Errors
///
/// When it is not absolute, or longer than the kernel takes.
pub fn parse_socket_path(text: &str) -> Result<PathBuf, String> {
    let path = parse_absolute(text)?;
    check_socket_path(&path)?;
    Ok(path)
}

/// Whether the kernel takes `path` as a socket's.
pub(crate) fn check_socket_path(path: &Path) -> Result<(), String> {
    let length = path.as_os_str().len();
    if length <= MAX_SOCKET_PATH {
        return Ok(());
    }
    Err(format!(
        "{} has {length} bytes; at most {MAX_SOCKET_PATH} fit for a socket, choose a shorter path",
        path.display()
    ))
}

/// An address and a port.
///
/// # Errors
///
/// When it is not.
pub fn parse_socket_addr(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        format!("{text:?} is no address; write IP:PORT, such as 127.0.0.1:9760 or [::]:9760")
    })
}

/// A duration of at least a millisecond and at most a day.
///
/// # Errors
///
/// When it is not.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    duration_within(text, Duration::from_millis(1), Duration::from_secs(86_400))
}

/// The kubelet pauses for 2 min 2 s at most between two attempts, and each takes up to 2 min: a pull must
/// not stop in the pause.
fn parse_grace(text: &str) -> Result<Duration, String> {
    duration_within(text, Duration::from_secs(150), Duration::from_secs(86_400))
}

fn duration_within(text: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is no duration; write a number and a unit, such as 10s"))?;
    if (least..=most).contains(&duration) {
        return Ok(duration);
    }
    let [least, most] = [least, most].map(humantime::format_duration);
    Err(format!("{text:?} is out of range; write something from {least} to {most}"))
}

/// A label of a node, `KEY=VALUE`.
///
/// # Errors
///
/// When it is not.
pub fn parse_label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_string(), value.to_string())),
        _ => Err(format!("{text:?} is no label; write KEY=VALUE")),
    }
}

/// Log directives.
///
/// # Errors
///
/// When `tracing` cannot read them. A word alone must be a level: `tracing` takes any other for
/// the name of a target, and then a slip of the hand would silence all the rest.
pub fn parse_log_level(text: &str) -> Result<String, String> {
    let is_level =
        |word: &str| word.trim().parse::<tracing_subscriber::filter::LevelFilter>().is_ok();
    let sound = text.split(',').all(|part| part.contains(['=', '[']) || is_level(part));
    match tracing_subscriber::EnvFilter::builder().parse(text) {
        Ok(_) if sound => Ok(text.to_string()),
        _ => Err(format!(
            "{text:?} is no log level; write error, warn, info, debug or trace, or directives \
             such as info,carport_image=debug"
        )),
    }
}

/// How long a pin lasts: at least a second and at most ten years.
///
/// # Errors
///
/// When it is not.
pub fn parse_pin_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|_| {
        format!("{text:?} is no duration; write a number and a unit, such as 7days")
    })?;
    if (Duration::from_secs(1)..=Duration::from_secs(MAX_PIN_SECONDS)).contains(&time) {
        return Ok(time);
    }
    Err(format!("{text:?} is out of range; write something from 1s to 10years"))
}

fn parse_quota(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|_| format!("{text:?} is no size; write a number and a unit, such as 500GiB"))?;
    if size.as_u64() >= MIN_QUOTA {
        return Ok(size);
    }
    Err(format!("{text:?} is out of range; write at least 1MiB"))
}

fn parse_window(text: &str) -> Result<ByteSize, String> {
    let size: ByteSize = text
        .parse()
        .map_err(|_| format!("{text:?} is no size; write a number and a unit, such as 64MiB"))?;
    if (MIN_WINDOW..=MAX_WINDOW).contains(&size.as_u64()) {
        return Ok(size);
    }
    Err(format!("{text:?} is out of range; write something from 16MiB to 64GiB"))
}

/// Bytes a second; never none at all, which would be a stop and not a cap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(NonZeroU64);

impl Rate {
    /// What the scrub reads at unless told otherwise.
    pub(super) const SCRUB: Self = Self(NonZeroU64::new(64 << 20).unwrap());

    /// In bytes a second.
    pub fn bytes_per_second(self) -> NonZeroU64 {
        self.0
    }
}

/// `100MB/s`, or `100MB`.
impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size: ByteSize = text.trim_end_matches("/s").parse().map_err(|_| {
            format!("{text:?} is no rate; write a number and a unit, such as 100MB/s")
        })?;
        NonZeroU64::new(size.as_u64())
            .filter(|rate| rate.get() >= MIN_RATE)
            .map(Self)
            .ok_or_else(|| format!("{text:?} is out of range; write 64KiB/s or more"))
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        parsed(from, Self::from_str)
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{}/s", exact_size(self.0.get())))
    }
}

fn is_dns_name(text: &str, max: usize) -> bool {
    !text.is_empty()
        && text.len() <= max
        && text.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        })
}

/// `text`, parsed, with the error as serde wants it.
fn parsed<'de, D, T, E>(from: D, parse: impl Fn(&str) -> Result<T, E>) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    E: Display,
{
    let text = String::deserialize(from)?;
    parse(&text).map_err(D::Error::custom)
}

/// As [`parsed`], for a list.
fn each<'de, D, T, E>(from: D, parse: impl Fn(&str) -> Result<T, E>) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    E: Display,
{
    let texts = Vec::<String>::deserialize(from)?;
    texts.iter().map(|text| parse(text).map_err(D::Error::custom)).collect()
}

pub(super) fn node_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    parsed(from, parse_node_name)
}

pub(super) fn driver_name<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    parsed(from, parse_driver_name)
}

pub(super) fn absolute<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    parsed(from, parse_absolute)
}

pub(super) fn optional_absolute<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<PathBuf>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| parse_absolute(&text).map_err(D::Error::custom)).transpose()
}

pub(super) fn absolutes<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    each(from, parse_absolute)
}

pub(super) fn socket_path<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    parsed(from, parse_socket_path)
}

pub(super) fn optional_socket_path<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<PathBuf>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| parse_socket_path(&text).map_err(D::Error::custom)).transpose()
}

pub(super) fn socket_addr<'de, D: Deserializer<'de>>(from: D) -> Result<SocketAddr, D::Error> {
    parsed(from, parse_socket_addr)
}

pub(super) fn optional_socket_addr<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<SocketAddr>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| parse_socket_addr(&text).map_err(D::Error::custom)).transpose()
}

pub(super) fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    parsed(from, parse_duration)
}

/// How long something is kept, from a second to a year; or `null`.
pub(super) fn grace<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    parsed(from, parse_grace)
}

pub(super) fn optional_long<'de, D>(from: D) -> Result<Option<Duration>, D::Error>
where
    D: Deserializer<'de>,
{
    let text = Option::<String>::deserialize(from)?;
    let (second, year) = (Duration::from_secs(1), Duration::from_secs(365 * 86_400));
    text.map(|text| duration_within(&text, second, year).map_err(D::Error::custom)).transpose()
}

/// Of an hour to a year; null for never.
pub(super) fn optional_long_duration<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<Duration>, D::Error> {
    let parse = |text: &str| {
        let duration = humantime::parse_duration(text).map_err(|_| {
            format!("{text:?} is no duration; write a number and a unit, such as 7days")
        })?;
        match (Duration::from_secs(3600)..=Duration::from_secs(366 * 86_400)).contains(&duration) {
            true => Ok(duration),
            false => {
                Err(format!("{text:?} is out of range; write something from 1h to 1year, or null"))
            }
        }
    };
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| parse(&text).map_err(D::Error::custom)).transpose()
}

pub(super) fn log_level<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    parsed(from, parse_log_level)
}

pub(super) fn hosts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    each(from, parse_host)
}

pub(super) fn namespaces<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Namespace>, D::Error> {
    each(from, parse_namespace)
}

pub(super) fn write_namespaces<S: Serializer>(
    namespaces: &[Namespace],
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_seq(namespaces.iter().map(Namespace::as_str))
}

pub(super) fn window<'de, D: Deserializer<'de>>(from: D) -> Result<ByteSize, D::Error> {
    parsed(from, parse_window)
}

pub(super) fn optional_size<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<ByteSize>, D::Error> {
    let text = Option::<String>::deserialize(from)?;
    text.map(|text| parse_quota(&text).map_err(D::Error::custom)).transpose()
}

/// A part of a whole.
pub(super) fn part<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    let part = f64::deserialize(from)?;
    if (0.01..=1.0).contains(&part) {
        return Ok(part);
    }
    Err(D::Error::custom(format!("{part} is out of range; write a number from 0.01 to 1")))
}

/// A whole number from `MIN` to `MAX`.
pub(super) fn count<'de, D, const MIN: usize, const MAX: usize>(from: D) -> Result<usize, D::Error>
where
    D: Deserializer<'de>,
{
    let count = usize::deserialize(from)?;
    if (MIN..=MAX).contains(&count) {
        return Ok(count);
    }
    Err(D::Error::custom(format!("{count} is out of range; write a number from {MIN} to {MAX}")))
}

/// Written exactly: in the largest unit that divides it.
pub(super) fn write_size<S: Serializer>(size: &ByteSize, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&exact_size(size.as_u64()))
}

fn exact_size(bytes: u64) -> String {
    let units = [(bytesize::GIB, "GiB"), (bytesize::MIB, "MiB"), (bytesize::KIB, "KiB")];
    units
        .iter()
        .find(|(unit, _)| bytes > 0 && bytes.is_multiple_of(*unit))
        .map_or_else(|| format!("{bytes}B"), |(unit, name)| format!("{}{name}", bytes / unit))
}

/// As [`write_size`], for a size that may be absent.
pub(super) fn write_optional_size<S: Serializer>(
    size: &Option<ByteSize>,
    to: S,
) -> Result<S::Ok, S::Error> {
    match size {
        Some(size) => write_size(size, to),
        None => to.serialize_none(),
    }
}
