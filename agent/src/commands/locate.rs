//! `carport locate`.

use carport_proto::carport::v1;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use serde::Serialize;

use super::ask::{self, Model, Reason};
use crate::cli::{LocateArgs, Output};
use crate::config::Config;
use crate::output::{print, size, size_or_dash, span, table};

/// One node's answer.
#[derive(Debug, Serialize)]
struct Node {
    node_name: String,
    score: u32,
    state: String,
    missing_bytes: Option<u64>,
    eta_seconds: Option<f64>,
    eta_p90_seconds: Option<f64>,
    fits: Option<bool>,
    fits_without_eviction: Option<bool>,
    free_bytes: Option<u64>,
    models: Vec<Model>,
    gpu: Option<GpuMatch>,
    reasons: Vec<Reason>,
}

#[derive(Debug, Serialize)]
struct GpuMatch {
    free_count: u32,
    matching_count: u32,
    candidate_uuids: Vec<String>,
}

impl From<v1::NodeEvaluation> for Node {
    fn from(node: v1::NodeEvaluation) -> Self {
        let state = ask::name(node.state().as_str_name(), "NODE_STATE_");
        Self {
            node_name: node.node_name,
            score: node.score,
            state,
            missing_bytes: node.missing_bytes,
            eta_seconds: node.eta.and_then(ask::seconds),
            eta_p90_seconds: node.eta_p90.and_then(ask::seconds),
            fits: node.fit.as_ref().map(|fit| fit.fits),
            fits_without_eviction: node.fit.as_ref().map(|fit| fit.fits_without_eviction),
            free_bytes: node.fit.as_ref().map(|fit| fit.free_bytes),
            models: node.models.into_iter().map(Model::from).collect(),
            gpu: node.gpu.map(|gpu| GpuMatch {
                free_count: gpu.free_count,
                matching_count: gpu.matching_count,
                candidate_uuids: gpu.candidate_uuids,
            }),
            reasons: node.reasons.into_iter().map(Reason::from).collect(),
        }
    }
}

pub(super) async fn run(
    output: Output,
    config: &Config,
    arguments: LocateArgs,
) -> anyhow::Result<()> {
    let gpu = arguments.gpus.map(|count| v1::GpuRequirement {
        count,
        free_memory_bytes_each: arguments.gpu_memory.map_or(0, |memory| memory.as_u64()),
        min_compute_capability: arguments.compute_capability.unwrap_or_default(),
        product_regex: arguments.gpu_product.unwrap_or_default(),
        ..Default::default()
    });
    let models = arguments.references.into_iter().map(model_ref).collect();
    let question = v1::EvaluatePlacementRequest { models, gpu, ..Default::default() };
    let way = ask::reach(config, &arguments.remote).await?;
    let mut client = LocalityServiceClient::new(way);
    let answer = client.evaluate_placement(ask::request(question)).await;
    let answer = answer.map_err(|status| ask::refused(&status))?.into_inner();
    let nodes: Vec<Node> = answer.nodes.into_iter().map(Node::from).collect();
    print(output, &nodes, |nodes| nodes.iter().map(text).collect::<Vec<_>>().join("\n"))
}

pub(super) fn model_ref(text: String) -> v1::ModelRef {
    // A digest alone asks about an image by what it is.
    match text.parse::<carport_image::Digest>() {
        Ok(_) => v1::ModelRef { digest: text, ..Default::default() },
        Err(_) => v1::ModelRef { reference: text, ..Default::default() },
    }
}

fn text(node: &Node) -> String {
    let eta = match node.eta_seconds {
        Some(0.0) => "now".into(),
        Some(seconds) => format!("in {}", span(std::time::Duration::from_secs_f64(seconds))),
        None => "not known when".into(),
    };
    let room = match (node.fits_without_eviction, node.fits, node.free_bytes) {
        (Some(true), _, Some(free)) => format!("fits, {} free", size(free)),
        (_, Some(true), Some(free)) => {
            format!("fits after removing unused images, {} free", size(free))
        }
        (_, Some(false), Some(free)) => format!("does not fit, {} free", size(free)),
        _ => "room not known".into(),
    };
    let mut text = format!(
        "{}: score {}, {}; local {eta}, {} missing; {room}\n",
        node.node_name,
        node.score,
        node.state,
        size_or_dash(node.missing_bytes),
    );
    if let Some(gpu) = &node.gpu {
        text += &format!("GPUs: {} free, {} match\n", gpu.free_count, gpu.matching_count);
    }
    let rows = node.models.iter().map(|model| {
        let (digest, state) = (ask::short(&model.digest), model.state.clone());
        vec![model.name(), digest, state, model.places(), model.size()]
    });
    text += &table(&["MODEL", "DIGEST", "STATE", "WHERE", "SIZE"], rows);
    text.push('\n');
    for reason in &node.reasons {
        text += &format!("{}: {}\n", reason.code, reason.message);
    }
    text
}
