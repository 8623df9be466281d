//! What is told of each publish and unpublish: one line in the log, and a word to
//! whoever counts.
//!
//! The line says who had which image put where and what became of it; never a secret, a
//! token, or a volume context as a whole. It comes also when the caller goes away first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use carport_image::Digest;
use tonic::{Code, Status};

use crate::volume::PodInfo;

/// What the kubelet sends is short; more than this is not worth a line.
const MAX_SHOWN_CHARS: usize = 256;

/// A call that changes what pods see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// NodePublishVolume.
    Publish,
    /// NodeUnpublishVolume.
    Unpublish,
}

impl Operation {
    /// `publish` or `unpublish`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Unpublish => "unpublish",
        }
    }
}

/// A call that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub operation: Operation,
    /// What it was answered with; Cancelled when the caller went away before.
    pub code: Code,
    /// From its arrival to its end.
    pub elapsed: Duration,
}

/// A code as gRPC spells it: `OK`, `DEADLINE_EXCEEDED`.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// Hears of each call that has ended.
pub(crate) type Observer = Arc<dyn Fn(&Call) + Send + Sync>;

/// A call under way. Dropping it tells of its end.
pub(crate) struct Report {
    operation: Operation,
    volume: String,
    target: String,
    observer: Observer,
    began: Instant,
    outcome: Result<(), Status>,
    /// The pod that it is for, once that is known.
    pub(crate) pod: Option<PodInfo>,
    /// The image that it shows or showed, once that is known.
    pub(crate) digest: Option<Digest>,
}

impl Report {
    /// A call that has just arrived.
    pub(crate) fn begin(
        operation: Operation,
        volume: &str,
        target: &str,
        observer: &Observer,
    ) -> Self {
        Self {
            operation,
            volume: shown(volume),
            target: shown(target),
            observer: Arc::clone(observer),
            began: Instant::now(),
            outcome: Err(Status::cancelled("the caller went away")),
            pod: None,
            digest: None,
        }
    }

    /// Ends it, and hands its outcome on.
    pub(crate) fn end(mut self, outcome: Result<(), Status>) -> Result<(), Status> {
        self.outcome = outcome.clone();
        outcome
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        let elapsed = self.began.elapsed();
        let (code, why) = match &self.outcome {
            Ok(()) => (Code::Ok, None),
            Err(status) => (status.code(), Some(status.message())),
        };
        let pod = self.pod.as_ref().map(|pod| shown(&format!("{}/{}", pod.namespace, pod.name)));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    volume = self.volume,
                    target = self.target,
                    pod,
                    digest = self.digest.map(tracing::field::display),
                    result = code_name(code),
                    elapsed_ms = elapsed.as_millis() as u64,
                    why,
                    "{} volume",
                    self.operation.name()
                )
            };
        }
        match code {
            // A long pull ends in the middle ones until it is done.
            Code::Ok | Code::DeadlineExceeded | Code::Aborted | Code::Cancelled => line!(info),
            _ => line!(warn),
        }
        (self.observer)(&Call { operation: self.operation, code, elapsed });
    }
}

/// What a caller named, cut to what a line of a log takes.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(MAX_SHOWN_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_call_is_told_of_once_also_when_its_caller_goes_away() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&heard);
        let observer: Observer = Arc::new(move |call: &Call| {
            into.lock().unwrap().push((call.operation.name(), code_name(call.code)));
        });
        let begin = |operation| Report::begin(operation, "csi-1", "/target", &observer);
        begin(Operation::Publish).end(Ok(())).unwrap();
        begin(Operation::Unpublish).end(Err(Status::aborted("busy"))).unwrap_err();
        drop(begin(Operation::Publish));
        assert_eq!(
            *heard.lock().unwrap(),
            [("publish", "OK"), ("unpublish", "ABORTED"), ("publish", "CANCELLED")]
        );
    }
}
