//! Publishes and unpublishes, as the driver answered them.

use carport_csi::{Call, Operation, code_name};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::Code;

/// From a mount of what is here to the kubelet's deadline of two minutes.
const SECONDS: [f64; 10] = [0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0, 10.0, 60.0, 120.0];

/// How many codes gRPC has.
const CODES: i32 = 17;

/// What became of the calls that change what pods see.
#[derive(Debug, Clone)]
pub struct VolumeMetrics {
    calls: Family<CallLabels, Counter>,
    seconds: Family<OperationLabel, Histogram, fn() -> Histogram>,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CallLabels {
    operation: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OperationLabel {
    operation: &'static str,
}

impl VolumeMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            calls: Family::default(),
            seconds: Family::new_with_constructor(|| Histogram::new(SECONDS)),
        };
        for operation in [Operation::Publish, Operation::Unpublish].map(Operation::name) {
            for code in (0..CODES).map(Code::from_i32).map(code_name) {
                let _ = metrics.calls.get_or_create(&CallLabels { operation, code });
            }
            let _ = metrics.seconds.get_or_create(&OperationLabel { operation });
        }
        registry.register(
            "volume_calls",
            "Publishes and unpublishes of volumes that ended, by gRPC code",
            metrics.calls.clone(),
        );
        registry.register(
            "volume_call_seconds",
            "Duration of publishes and unpublishes, waits for pulls included",
            metrics.seconds.clone(),
        );
        metrics
    }

    /// Counts a call that has ended.
    pub fn observe(&self, call: &Call) {
        let operation = call.operation.name();
        self.calls.get_or_create(&CallLabels { operation, code: code_name(call.code) }).inc();
        let seconds = self.seconds.get_or_create(&OperationLabel { operation });
        seconds.observe(call.elapsed.as_secs_f64());
    }
}
