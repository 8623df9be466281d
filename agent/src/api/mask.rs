//! Read masks: only the fields that a caller names travel.
//!
//! A path is the name of a field of the answered message; deeper paths are refused,
//! but for `models.pods`, which has to be asked for by name.

use carport_proto::carport::v1;
use prost_types::FieldMask;
use tonic::Status;

use super::convert::invalid;

/// Sets each listed field of `$message` that the mask does not name to its default.
macro_rules! keep {
    ($message:expr, $mask:expr, [$($field:ident),* $(,)?]) => {{
        let mut message = $message;
        if let Some(mask) = $mask {
            const FIELDS: &[&str] = &[$(stringify!($field)),*];
            check(mask, FIELDS)?;
            $(if !names(mask, stringify!($field)) {
                message.$field = Default::default();
            })*
        }
        Ok(message)
    }};
}

/// Whether the mask asks for the pods of models.
pub(super) fn wants_pods(mask: Option<&FieldMask>, path: &str) -> bool {
    mask.is_some_and(|mask| mask.paths.iter().any(|named| named == path))
}

pub(super) fn node_evaluation(
    message: v1::NodeEvaluation,
    mask: Option<&FieldMask>,
) -> Result<v1::NodeEvaluation, Status> {
    keep!(
        message,
        mask,
        [node_name, score, state, models, missing_bytes, eta, eta_p90, fit, gpu, reasons,]
    )
}

pub(super) fn node(message: v1::Node, mask: Option<&FieldMask>) -> Result<v1::Node, Status> {
    keep!(
        message,
        mask,
        [
            node_name,
            node_uid,
            revision,
            state,
            observe_time,
            agent_version,
            store,
            bandwidth,
            gpus,
            reasons,
            runtime,
            kubelet,
        ]
    )
}

pub(super) fn model(
    message: v1::ModelLocality,
    mask: Option<&FieldMask>,
) -> Result<v1::ModelLocality, Status> {
    keep!(
        message,
        mask,
        [
            model,
            state,
            total_bytes,
            present_bytes,
            download_bytes,
            page_cache_bytes,
            sample_time,
            pull,
            pin,
            mount_count,
            pods,
            last_use_time,
            eviction_risk,
            streamable,
            last_error,
            places,
        ]
    )
}

pub(super) fn gpu_inventory(
    message: v1::GpuInventory,
    mask: Option<&FieldMask>,
) -> Result<v1::GpuInventory, Status> {
    keep!(
        message,
        mask,
        [
            provider_state,
            provider_message,
            driver_version,
            nvml_version,
            cuda_driver_version,
            gpus,
            links,
            sample_time,
            generation,
            allocation_source,
            allocation_message,
        ]
    )
}

fn check(mask: &FieldMask, fields: &[&str]) -> Result<(), Status> {
    let unknown = mask.paths.iter().find(|path| {
        let models_pods = *path == "models.pods" && fields.contains(&"models");
        path.as_str() != "*" && !fields.contains(&path.as_str()) && !models_pods
    });
    match unknown {
        None => Ok(()),
        Some(path) => {
            let path: String = path.chars().take(100).collect();
            Err(invalid("read_mask", format!("{path:?}: name fields of: {}", fields.join(", "))))
        }
    }
}

fn names(mask: &FieldMask, field: &str) -> bool {
    mask.paths.iter().any(|path| path == "*" || path.split('.').next() == Some(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(paths: &[&str]) -> FieldMask {
        FieldMask { paths: paths.iter().map(ToString::to_string).collect() }
    }

    #[test]
    fn only_named_fields_are_left() {
        let whole = v1::Node { node_name: "a".into(), node_uid: "b".into(), ..Default::default() };
        let named = node(whole.clone(), Some(&mask(&["node_name"]))).unwrap();
        assert_eq!((named.node_name.as_str(), named.node_uid.as_str()), ("a", ""));
        assert_eq!(node(whole.clone(), Some(&mask(&["*"]))).unwrap(), whole);
        assert_eq!(node(whole.clone(), None).unwrap(), whole);
    }

    #[test]
    fn an_unknown_path_is_refused_with_the_known_ones() {
        for path in ["nodename", "store.free_bytes", "", "models"] {
            let error = node(v1::Node::default(), Some(&mask(&[path]))).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            assert!(error.message().contains("node_name, node_uid"), "{}", error.message());
        }
        let asked = mask(&["models.pods"]);
        let whole = v1::NodeEvaluation { models: vec![Default::default()], ..Default::default() };
        assert_eq!(node_evaluation(whole, Some(&asked)).unwrap().models.len(), 1);
        assert!(wants_pods(Some(&asked), "models.pods"));
    }
}
