//! Asking the daemon, and its answers as they are printed.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use carport_proto::carport::v1;
use carport_proto::client::{self, Bearer, Tls};
use serde::Serialize;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::cli::Remote;
use crate::config::Config;

/// A daemon answers from memory; one that takes longer is not well.
const DEADLINE: Duration = Duration::from_secs(10);

/// A channel to the daemon.
pub(super) async fn connect(config: &Config) -> Result<Channel, client::ConnectError> {
    client::connect(&config.api.socket).await
}

/// A channel to an agent, with the caller's token where there is one.
pub(super) type Way = InterceptedService<Channel, Token>;

/// What is sent with each call.
#[derive(Clone)]
pub(super) struct Token(Option<Bearer>);

impl Interceptor for Token {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        match &mut self.0 {
            Some(bearer) => bearer.call(request),
            None => Ok(request),
        }
    }
}

/// The agent over TCP that is named, or else the daemon of this node.
pub(super) async fn reach(config: &Config, remote: &Remote) -> anyhow::Result<Way> {
    let (Some(address), Some(ca)) = (&remote.address, &remote.tls_ca) else {
        return Ok(InterceptedService::new(connect(config).await?, Token(None)));
    };
    let tls = Tls {
        ca: ca.clone(),
        identity: remote.tls_certificate.clone().zip(remote.tls_key.clone()),
        server_name: remote.tls_server_name.clone(),
    };
    let channel = client::connect_tls(address, &tls)?;
    let bearer = |path: &PathBuf| {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("read the token in {}", path.display()))?;
        Bearer::new(text.trim())
            .with_context(|| format!("{}: write one line, the token", path.display()))
    };
    let bearer = remote.token_file.as_ref().map(bearer).transpose()?;
    Ok(InterceptedService::new(channel, Token(bearer)))
}

/// A request with a deadline.
pub(super) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

/// What the daemon said, without the wire's clothes.
pub(super) fn refused(status: &Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => {
            anyhow!("ask the agent: {}; see its log", because(status))
        }
        _ => anyhow!("{}", status.message()),
    }
}

/// The status and what caused it: a connection that was refused says so at the end of the chain.
fn because(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let why = error.to_string();
        if !text.contains(&why) {
            text = format!("{text}: {why}");
        }
        cause = error.source();
    }
    text
}

/// One model on a node.
#[derive(Debug, Default, Serialize)]
pub(super) struct Model {
    pub(super) reference: String,
    pub(super) digest: String,
    pub(super) state: String,
    pub(super) places: Vec<String>,
    pub(super) total_bytes: Option<u64>,
    pub(super) present_bytes: u64,
    pub(super) download_bytes: Option<u64>,
    pub(super) mount_count: u32,
    pub(super) pull: Option<Pull>,
    pub(super) error: Option<String>,
}

/// A pull under way.
#[derive(Debug, Serialize)]
pub(super) struct Pull {
    pub(super) done_bytes: u64,
    pub(super) total_bytes: Option<u64>,
    pub(super) bytes_per_second: f64,
    pub(super) eta_seconds: Option<f64>,
}

/// A code and a sentence.
#[derive(Debug, Serialize)]
pub(super) struct Reason {
    pub(super) code: String,
    pub(super) message: String,
}

impl From<v1::ModelLocality> for Model {
    fn from(message: v1::ModelLocality) -> Self {
        let state = message.state().as_str_name();
        let state = name(state, "MODEL_STATE_");
        let places = message.places().map(|place| name(place.as_str_name(), "PLACE_")).collect();
        let model = message.model.unwrap_or_default();
        Self {
            reference: model.reference,
            digest: model.digest,
            state,
            places,
            total_bytes: message.total_bytes,
            present_bytes: message.present_bytes,
            download_bytes: message.download_bytes,
            mount_count: message.mount_count,
            pull: message.pull.map(|pull| Pull {
                done_bytes: pull.done_bytes,
                total_bytes: pull.total_bytes,
                bytes_per_second: pull.rate_bytes_per_second,
                eta_seconds: pull.eta.and_then(seconds),
            }),
            error: message.last_error.map(|error| error.message),
        }
    }
}

impl Model {
    /// `3.0 GiB`, or how far its pull is.
    pub(super) fn size(&self) -> String {
        use crate::output::{size, size_or_dash};
        match &self.pull {
            Some(Pull { done_bytes, total_bytes: Some(total), .. }) => {
                format!("{} of {}", size(*done_bytes), size(*total))
            }
            _ => size_or_dash(self.total_bytes),
        }
    }

    /// Where it is complete: `store`, `runtime`, both, or `-`.
    pub(super) fn places(&self) -> String {
        match self.places.as_slice() {
            [] => "-".into(),
            places => places.join(", "),
        }
    }

    /// For a table.
    pub(super) fn name(&self) -> String {
        if self.reference.is_empty() { self.digest.clone() } else { self.reference.clone() }
    }
}

impl From<v1::Reason> for Reason {
    fn from(reason: v1::Reason) -> Self {
        Self { code: reason.code, message: reason.message }
    }
}

/// `NODE_STATE_READY` → `ready`.
pub(super) fn name(text: &str, prefix: &str) -> String {
    text.strip_prefix(prefix).unwrap_or(text).to_ascii_lowercase()
}

/// A length of time in seconds; `None` for what is no length of time.
pub(super) fn seconds(duration: prost_types::Duration) -> Option<f64> {
    Duration::try_from(duration).ok().map(|duration| duration.as_secs_f64())
}

/// `12ab34cd56ef` of `sha256:12ab…`.
pub(super) fn short(digest: &str) -> String {
    match digest.parse::<carport_image::Digest>() {
        Ok(digest) => digest.short(),
        Err(_) => "-".into(),
    }
}
