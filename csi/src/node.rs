//! CSI Node: the adapter between the kubelet's calls and [`Volumes`].
//!
//! In come gRPC messages; they are parsed here into types that cannot be wrong. Out go
//! answers, or one of the codes that the kubelet acts on:
//!
//! - after an *uncertain* code (Cancelled, DeadlineExceeded, Unavailable, ResourceExhausted,
//!   Aborted) it unpublishes when the pod goes;
//! - after any other, a *final* one, it does not: nothing may be left behind.
//!
//! A request is never logged or repeated as a whole: it carries secrets and tokens. What is
//! told of a call is in [`crate::call`].

use std::collections::HashMap;
use std::sync::Arc;

use carport_image::PullError;
use carport_image::source::{PullSecret, SourceError};
use carport_image::store::StoreError;
use carport_proto::csi::v1::node_server::Node;
use carport_proto::csi::v1::node_service_capability::{self, Rpc, rpc};
use carport_proto::csi::v1::volume_capability::{AccessType, MountVolume};
use carport_proto::csi::v1::volume_usage::Unit;
use carport_proto::csi::v1::{
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest,
    NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability,
    NodeUnpublishVolumeRequest, NodeUnpublishVolumeResponse, VolumeCapability, VolumeCondition,
    VolumeUsage,
};
use tokio::time::Instant;
use tonic::{Code, Request, Response, Status};
use tracing::Instrument as _;

use crate::call::{Observer, Operation, Report, shown};
use crate::deadline::deadline;
use crate::driver::{DriverConfig, TokenLogin};
use crate::kubelet::Kubelet;
use crate::mount::{MountError, Viewer};
use crate::socket::Caller;
use crate::volume::{
    Condition, InvalidRequest, PublishError, PublishRequest, StatsError, TargetPath,
    UnpublishError, VolumeAttributes, VolumeId, Volumes,
};

/// The key of a Secret of type `kubernetes.io/dockerconfigjson`.
const DOCKER_CONFIG_KEY: &str = ".dockerconfigjson";

/// Where the kubelet puts the pod's service-account tokens, as JSON by audience.
const TOKENS_KEY: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// Mount options that say what is the case anyway. Others are refused: dropping them
/// silently would be worse.
const GRANTED_OPTIONS: [&str; 3] = ["ro", "nosuid", "nodev"];

/// The one that is a choice: what the attribute of the same name says.
const NOEXEC: &str = "noexec";

/// gRPC sends messages in a header; some peers take 8 KiB of headers and no more.
const MAX_MESSAGE_CHARS: usize = 1000;

/// The adapter from gRPC to volumes.
pub(crate) struct NodeService {
    pub(crate) config: Arc<DriverConfig>,
    pub(crate) volumes: Volumes,
    pub(crate) observer: Observer,
    pub(crate) kubelet: Kubelet,
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let deadline = deadline(request.metadata());
        let viewer = viewer(&request);
        self.kubelet.seen_by(viewer);
        let request = request.into_inner();
        let (volume, target) = (&request.volume_id, &request.target_path);
        let mut report = Report::begin(Operation::Publish, volume, target, &self.observer);
        let span = tracing::info_span!("publish", volume = shown(volume));
        let outcome = self.publish(&request, viewer, deadline, &mut report).instrument(span).await;
        report.end(outcome).map(|()| Response::new(NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let (volume, target) = (&request.volume_id, &request.target_path);
        let mut report = Report::begin(Operation::Unpublish, volume, target, &self.observer);
        let outcome = self.unpublish(&request, deadline, &mut report).await;
        report.end(outcome).map(|()| Response::new(NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let volume_id = VolumeId::parse(&request.volume_id)?;
        let target = match TargetPath::parse(&request.volume_path) {
            Ok(target) => target,
            Err(error) if request.volume_path.is_empty() => return Err(error.into()),
            // Where nothing can be published nothing is: the conformance suite asks for
            // `some/path`, and wants to hear that.
            Err(error) => return Err(status(Code::NotFound, &error)),
        };
        let stats = self
            .volumes
            .stats(&volume_id, &target)
            .await
            .map_err(|error| status(stats_code(&error), &error))?;
        // All of it is used, and nothing can be added: the volume is read-only.
        let usage = |count: u64, unit: Unit| {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            VolumeUsage { available: 0, total: count, used: count, unit: unit.into() }
        };
        let condition = match stats.condition {
            Condition::Normal => {
                VolumeCondition { abnormal: false, message: "the image is mounted".to_owned() }
            }
            Condition::Abnormal(message) => VolumeCondition { abnormal: true, message },
        };
        Ok(Response::new(NodeGetVolumeStatsResponse {
            usage: vec![usage(stats.bytes, Unit::Bytes), usage(stats.files, Unit::Inodes)],
            volume_condition: Some(condition),
        }))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: rpc::Type| NodeServiceCapability {
            r#type: Some(node_service_capability::Type::Rpc(Rpc { r#type: kind.into() })),
        };
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: vec![
                capability(rpc::Type::GetVolumeStats),
                capability(rpc::Type::VolumeCondition),
            ],
        }))
    }

    async fn node_get_info(
        &self,
        request: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        self.kubelet.node_info(viewer(&request));
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.config.node_id().to_owned(),
            max_volumes_per_node: 0,
        }))
    }
}

impl NodeService {
    async fn publish(
        &self,
        request: &NodePublishVolumeRequest,
        viewer: Viewer,
        deadline: Instant,
        report: &mut Report,
    ) -> Result<(), Status> {
        let request = parse_publish(request, viewer, self.config.logins(), deadline)?;
        report.pod.clone_from(&request.attributes.pod);
        report.digest = request.attributes.image.digest();
        match self.volumes.publish(request).await {
            Ok(published) => {
                report.digest = Some(published.digest);
                Ok(())
            }
            Err(error) => {
                if let PublishError::StillPulling(pull) = &error {
                    report.digest = pull.digest.or(report.digest);
                }
                Err(status(publish_code(&error), &error))
            }
        }
    }

    async fn unpublish(
        &self,
        request: &NodeUnpublishVolumeRequest,
        deadline: Instant,
        report: &mut Report,
    ) -> Result<(), Status> {
        let (volume_id, target) = parse_place(&request.volume_id, &request.target_path)?;
        match self.volumes.unpublish(&volume_id, &target, deadline).await {
            Ok(record) => {
                report.digest = record.as_ref().map(|record| record.digest);
                report.pod = record.and_then(|record| record.pod);
                Ok(())
            }
            Err(error) => Err(status(unpublish_code(&error), &error)),
        }
    }
}

/// From which mount namespace a call comes.
fn viewer<T>(request: &Request<T>) -> Viewer {
    Viewer::of(request.extensions().get::<Caller>().and_then(Caller::pid))
}

fn parse_publish(
    request: &NodePublishVolumeRequest,
    viewer: Viewer,
    logins: &[TokenLogin],
    deadline: Instant,
) -> Result<PublishRequest, Status> {
    let (volume_id, target) = parse_place(&request.volume_id, &request.target_path)?;
    let noexec = check_capability(request.volume_capability.as_ref())?;
    let context = request.volume_context.iter().map(|(key, value)| (&**key, &**value));
    // `readonly` is not looked at: the kubelet says false for inline volumes that nobody
    // means to write, and every volume is read-only.
    let mut attributes = VolumeAttributes::parse(context)?;
    attributes.options.noexec |= noexec;
    let secret = with_tokens(parse_secret(request)?, request, logins)?;
    Ok(PublishRequest { volume_id, target, attributes, secret, viewer, deadline })
}

fn parse_place(volume_id: &str, target: &str) -> Result<(VolumeId, TargetPath), InvalidRequest> {
    Ok((VolumeId::parse(volume_id)?, TargetPath::parse(target)?))
}

/// Any access mode will do: all that is given is reading. `fs_type` says nothing about
/// a tree of files. Answers whether no program may be started.
fn check_capability(capability: Option<&VolumeCapability>) -> Result<bool, Status> {
    let invalid = |why: &str| Err(Status::invalid_argument(format!("volume capability: {why}")));
    match capability.map(|capability| &capability.access_type) {
        None => invalid("missing"),
        Some(None) => invalid("access type missing; use mount"),
        Some(Some(AccessType::Block(_))) => {
            invalid("an image is no block device; set volumeMode: Filesystem")
        }
        Some(Some(AccessType::Mount(MountVolume { mount_flags, .. }))) => {
            // Not repeated: mount options may hold secrets.
            let granted = |flag: &String| *flag == NOEXEC || GRANTED_OPTIONS.contains(&&**flag);
            match mount_flags.iter().all(granted) {
                true => Ok(mount_flags.iter().any(|flag| flag == NOEXEC)),
                false => {
                    invalid("mount options other than ro, nosuid, nodev, noexec are not supported")
                }
            }
        }
    }
}

fn parse_secret(request: &NodePublishVolumeRequest) -> Result<PullSecret, Status> {
    if request.secrets.keys().all(|key| key == TOKENS_KEY) {
        return Ok(PullSecret::none());
    }
    let Some(text) = request.secrets.get(DOCKER_CONFIG_KEY) else {
        return Err(Status::invalid_argument(format!(
            "nodePublishSecretRef: the secret has no key {DOCKER_CONFIG_KEY}; use one of type \
             kubernetes.io/dockerconfigjson"
        )));
    };
    PullSecret::from_docker_config_json(text)
        .map_err(|error| Status::invalid_argument(format!("nodePublishSecretRef: {error}")))
}

/// Adds the logins that the pod's service-account tokens make. The kubelet gives them in the volume
/// context or, where the CSIDriver says so, among the secrets.
fn with_tokens(
    secret: PullSecret,
    request: &NodePublishVolumeRequest,
    logins: &[TokenLogin],
) -> Result<PullSecret, Status> {
    #[derive(serde::Deserialize)]
    struct Given {
        token: String,
    }
    let text = request.secrets.get(TOKENS_KEY).or_else(|| request.volume_context.get(TOKENS_KEY));
    let Some(text) = text.filter(|text| !logins.is_empty() && !text.is_empty()) else {
        return Ok(secret);
    };
    // The error of the parser would repeat a part of it.
    let given: HashMap<String, Given> = serde_json::from_str(text)
        .map_err(|_| Status::invalid_argument(format!("{TOKENS_KEY}: not what a kubelet gives")))?;
    Ok(logins.iter().fold(secret, |secret, login| match given.get(&login.audience) {
        Some(Given { token }) => {
            secret.or_login(&login.registry, login.username.clone(), token.clone())
        }
        None => secret,
    }))
}

impl From<InvalidRequest> for Status {
    fn from(error: InvalidRequest) -> Self {
        status(Code::InvalidArgument, &error)
    }
}

fn publish_code(error: &PublishError) -> Code {
    match error {
        PublishError::Occupied { .. }
        | PublishError::NotSeen { .. }
        | PublishError::CannotMount(_) => Code::FailedPrecondition,
        PublishError::Incompatible { .. } => Code::AlreadyExists,
        PublishError::LayoutRefused { .. } | PublishError::PinRefused(_) => Code::PermissionDenied,
        PublishError::NothingShown(_) => Code::NotFound,
        PublishError::Pull(error) => pull_code(error),
        PublishError::NotArriving { reason, .. } => arriving_code(reason),
        PublishError::StillPulling(_) => Code::DeadlineExceeded,
        // Uncertain: another call may have done, or may do, what is asked for.
        PublishError::Busy(_) | PublishError::Withdrawn(_) => Code::Aborted,
        PublishError::Stopping => Code::Unavailable,
        PublishError::Mount(error) => mount_code(error),
        PublishError::Store(error) => store_code(error),
        // Whatever the error itself, an unpublish must come.
        PublishError::Unclean { .. } => Code::Aborted,
    }
}

fn unpublish_code(error: &UnpublishError) -> Code {
    match error {
        UnpublishError::Busy(_) => Code::Aborted,
        UnpublishError::Mount(error) => mount_code(error),
        UnpublishError::Store(error) => store_code(error),
    }
}

fn stats_code(error: &StatsError) -> Code {
    match error {
        StatsError::NotFound { .. } => Code::NotFound,
        StatsError::Store(error) => store_code(error),
        StatsError::Hung(_) => Code::Unavailable,
    }
}

fn pull_code(error: &PullError) -> Code {
    match error {
        PullError::Source(SourceError::NotFound(_)) => Code::NotFound,
        PullError::Source(SourceError::Denied(_)) => Code::PermissionDenied,
        PullError::Source(SourceError::Throttled { .. } | SourceError::Unavailable(_)) => {
            Code::Unavailable
        }
        PullError::Source(SourceError::Invalid(_)) => Code::FailedPrecondition,
        PullError::Mismatch(_) => Code::DataLoss,
        PullError::Unsupported(_) | PullError::Unpack(_) | PullError::NotStored(_) => {
            Code::FailedPrecondition
        }
        PullError::Store(error) => store_code(error),
        PullError::Cancelled(_) => Code::Unavailable,
    }
}

/// As [`pull_code`], of an error that another process told.
fn arriving_code(reason: &str) -> Code {
    match reason {
        "not_found" => Code::NotFound,
        "denied" => Code::PermissionDenied,
        "throttled" | "unavailable" | "cancelled" => Code::Unavailable,
        "mismatch" => Code::DataLoss,
        "no_space" => Code::ResourceExhausted,
        "store" => Code::Internal,
        _ => Code::FailedPrecondition,
    }
}

fn store_code(error: &StoreError) -> Code {
    match error {
        // Room may be made; until then the kubelet tries again ever more rarely.
        StoreError::NoSpace { .. } => Code::ResourceExhausted,
        StoreError::Io { .. } | StoreError::Corrupt(_) => Code::Internal,
        StoreError::Format(_) | StoreError::InUse(_) => Code::FailedPrecondition,
    }
}

fn mount_code(error: &MountError) -> Code {
    match error {
        MountError::NotInImage { .. } => Code::NotFound,
        // Removed between the pull and the mount: the next try pulls it again.
        MountError::TreeGone(_) => Code::Unavailable,
        MountError::Denied { .. } | MountError::Io { .. } => Code::Internal,
    }
}

fn status(code: Code, error: &dyn std::error::Error) -> Status {
    let message = error.to_string();
    Status::new(code, message.chars().take(MAX_MESSAGE_CHARS).collect::<String>())
}

#[cfg(test)]
mod tests;
