//! Which code each error gets; what a request is parsed to.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::time::Duration;

use carport_image::pull::{PullProgress, PullState};
use carport_proto::csi::v1::volume_capability::BlockVolume;

use super::*;

fn is_final(code: Code) -> bool {
    !matches!(
        code,
        Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Unavailable
            | Code::ResourceExhausted
            | Code::Aborted
    )
}

fn pull(error: SourceError) -> PublishError {
    PublishError::Pull(PullError::Source(error))
}

#[test]
fn each_error_has_the_code_that_the_kubelet_must_act_on() {
    let text = || "why".to_owned();
    let progress = PullProgress {
        reference: "registry.example/model:v1".parse().unwrap(),
        digest: None,
        state: PullState::Resolving,
        priority: carport_image::pull::Priority::Demand,
        done_bytes: 0,
        fetched_bytes: 0,
        total_bytes: 0,
        started_at: std::time::SystemTime::UNIX_EPOCH,
        bytes_per_second: 0.0,
    };
    let throttled = SourceError::Throttled { message: text(), retry_after: None };
    let no_space = StoreError::NoSpace { what: text() };
    let cases = [
        (pull(SourceError::NotFound(text())), Code::NotFound),
        (pull(SourceError::Denied(text())), Code::PermissionDenied),
        (pull(throttled), Code::Unavailable),
        (pull(SourceError::Unavailable(text())), Code::Unavailable),
        (pull(SourceError::Invalid(text())), Code::FailedPrecondition),
        (PublishError::Pull(PullError::Mismatch(text())), Code::DataLoss),
        (PublishError::Pull(PullError::Unpack(text())), Code::FailedPrecondition),
        (PublishError::Pull(PullError::NotStored(text())), Code::FailedPrecondition),
        (PublishError::Pull(PullError::Cancelled(text())), Code::Unavailable),
        (PublishError::from(no_space), Code::ResourceExhausted),
        (PublishError::StillPulling(Box::new(progress)), Code::DeadlineExceeded),
        (PublishError::Withdrawn(text()), Code::Aborted),
        (PublishError::Busy(text()), Code::Aborted),
        (PublishError::Stopping, Code::Unavailable),
        (PublishError::Occupied { target: text(), what: "a file" }, Code::FailedPrecondition),
        (
            PublishError::Incompatible { target: text(), volume: text(), image: text() },
            Code::AlreadyExists,
        ),
        (PublishError::LayoutRefused { folder: text(), why: "why" }, Code::PermissionDenied),
        (PublishError::Mount(MountError::TreeGone("/tree".into())), Code::Unavailable),
        (
            PublishError::Mount(MountError::NotInImage { path: text(), why: "is not there" }),
            Code::NotFound,
        ),
        (PublishError::Mount(MountError::Denied { what: text() }), Code::Internal),
        (PublishError::Mount(MountError::new("mount", io::Error::other("why"))), Code::Internal),
    ];
    for (error, code) in cases {
        assert_eq!(publish_code(&error), code, "{error:?}");
    }
}

#[test]
fn what_could_not_be_undone_is_never_final() {
    let error = PublishError::Unclean {
        error: Box::new(pull(SourceError::NotFound("why".into()))),
        undo: "remove /target: input/output error".into(),
    };
    assert!(!is_final(publish_code(&error)));
    assert_eq!(error.to_string(), "why; and undoing it: remove /target: input/output error");
}

#[test]
fn a_long_message_is_cut() {
    let error = InvalidRequest("x".repeat(5000));
    assert_eq!(Status::from(error).message().len(), MAX_MESSAGE_CHARS);
}

fn mount_capability(flags: &[&str]) -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume {
            mount_flags: flags.iter().map(|&flag| flag.to_owned()).collect(),
            ..MountVolume::default()
        })),
        access_mode: None,
    }
}

fn publish_request() -> NodePublishVolumeRequest {
    NodePublishVolumeRequest {
        volume_id: "csi-1".into(),
        target_path: "/target".into(),
        volume_capability: Some(mount_capability(&[])),
        volume_context: HashMap::from([("image".into(), "registry.example/model:v1".into())]),
        ..NodePublishVolumeRequest::default()
    }
}

fn parse(request: &NodePublishVolumeRequest) -> Result<PublishRequest, Status> {
    parse_publish(request, Viewer::Myself, &[], Instant::now() + Duration::from_secs(1))
}

#[test]
fn what_is_missing_or_wrong_is_an_invalid_argument() {
    assert!(parse(&publish_request()).is_ok());
    let block = VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        access_mode: None,
    };
    type Change = fn(&mut NodePublishVolumeRequest);
    let changes: [(&str, Change); 5] = [
        ("volume id: missing", |request| request.volume_id.clear()),
        ("target path: missing", |request| request.target_path.clear()),
        ("volume capability: missing", |request| request.volume_capability = None),
        ("volume attribute image: missing", |request| request.volume_context.clear()),
        ("nodePublishSecretRef: the secret has no key .dockerconfigjson", |request| {
            request.secrets.insert("password".into(), "hunter2".into());
        }),
    ];
    for (message, change) in changes {
        let mut request = publish_request();
        change(&mut request);
        let status = parse(&request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{message}");
        assert!(status.message().starts_with(message), "{} is not {message}", status.message());
        assert!(!status.message().contains("hunter2"));
    }
    let request = NodePublishVolumeRequest { volume_capability: Some(block), ..publish_request() };
    assert!(parse(&request).unwrap_err().message().contains("no block device"));
}

#[test]
fn mount_options_are_granted_or_refused_and_never_repeated() {
    assert!(check_capability(Some(&mount_capability(&["ro", "nodev"]))).is_ok());
    let refused = check_capability(Some(&mount_capability(&["ro", "password=hunter2"])));
    let status = refused.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(!status.message().contains("hunter2"), "{}", status.message());
}

#[test]
fn a_pull_secret_is_read_and_a_broken_one_refused_without_repeating_it() {
    let mut request = publish_request();
    let config = r#"{"auths":{"registry.example":{"auth":"dXNlcjpodW50ZXIy"}}}"#;
    request.secrets.insert(DOCKER_CONFIG_KEY.into(), config.into());
    assert!(!format!("{:?}", parse(&request).unwrap()).contains("hunter2"));
    request.secrets.insert(DOCKER_CONFIG_KEY.into(), "hunter2".into());
    let status = parse(&request).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("nodePublishSecretRef: "), "{}", status.message());
    assert!(!status.message().contains("hunter2"), "{}", status.message());
}

#[test]
fn the_uncertain_codes_are_those_of_the_kubelet() {
    let uncertain: BTreeSet<i32> =
        (0..17).filter(|&code| !is_final(Code::from_i32(code))).collect();
    assert_eq!(uncertain, BTreeSet::from([1, 4, 8, 10, 14]));
}

#[test]
fn a_pods_token_is_its_login_where_the_registry_takes_it() {
    let login = |registry: &str, audience: &str| TokenLogin {
        registry: registry.to_owned(),
        audience: audience.to_owned(),
        username: "pod".to_owned(),
    };
    let logins = [login("a.example", "a"), login("b.example", "b")];
    let tokens = r#"{"a": {"token": "hunter2", "expirationTimestamp": "2030-01-01T00:00:00Z"}}"#;
    let request = |tokens: &str, secrets: &[(&str, &str)]| NodePublishVolumeRequest {
        volume_context: [(TOKENS_KEY.to_owned(), tokens.to_owned())].into(),
        secrets: secrets.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        ..NodePublishVolumeRequest::default()
    };
    let with = |request: &NodePublishVolumeRequest, logins| {
        with_tokens(parse_secret(request).unwrap(), request, logins)
    };
    let expected = PullSecret::none().or_login("a.example", "pod".into(), "hunter2".into());
    assert!(with(&request(tokens, &[]), &logins).unwrap() == expected);
    // As newer kubelets give them.
    assert!(with(&request("", &[(TOKENS_KEY, tokens)]), &logins).unwrap() == expected);
    assert!(with(&request(tokens, &[]), &[]).unwrap() == PullSecret::none());
    assert!(with(&request("", &[]), &logins).unwrap() == PullSecret::none());
    let wrong = with(&request("hunter2", &[]), &logins).err().unwrap();
    assert_eq!(wrong.code(), Code::InvalidArgument);
    assert!(!wrong.message().contains("hunter2"), "{wrong}");
}
