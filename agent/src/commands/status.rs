//! `carport status`.

use carport_proto::carport::v1;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use serde::Serialize;

use super::ask::{self, Model, Reason, Way};
use crate::api::gpu::from_wire;
use crate::cli::{Output, Remote};
use crate::config::Config;
use crate::gpu::{GpuInventory, table as gpu_table};
use crate::output::{print, size, table};

/// What the agent of one node says of it.
#[derive(Debug, Serialize)]
struct Node {
    node_name: String,
    agent_version: String,
    state: String,
    epoch: String,
    sequence: u64,
    reasons: Vec<Reason>,
    store: Store,
    runtime: Option<Runtime>,
    models: Vec<Model>,
    gpus: GpuInventory,
}

#[derive(Debug, Serialize)]
struct Runtime {
    connected: bool,
    image_count: u32,
}

#[derive(Debug, Serialize)]
struct Store {
    capacity_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    mounted_bytes: u64,
    reclaimable_bytes: u64,
    dedupe_saved_bytes: u64,
}

pub(super) async fn run(output: Output, config: &Config, remote: &Remote) -> anyhow::Result<()> {
    let mut client = LocalityServiceClient::new(ask::reach(config, remote).await?);
    let node = client.get_node(ask::request(v1::GetNodeRequest::default())).await;
    let node = node.map_err(|status| ask::refused(&status))?.into_inner();
    let state = ask::name(node.state().as_str_name(), "NODE_STATE_");
    let models = models(&mut client).await?;
    let revision = node.revision.unwrap_or_default();
    let store = node.store.unwrap_or_default();
    let node = Node {
        node_name: node.node_name,
        agent_version: node.agent_version,
        state,
        epoch: revision.epoch,
        sequence: revision.sequence,
        reasons: node.reasons.into_iter().map(Reason::from).collect(),
        store: Store {
            capacity_bytes: store.capacity_bytes,
            used_bytes: store.used_bytes,
            free_bytes: store.free_bytes,
            mounted_bytes: store.mounted_bytes,
            reclaimable_bytes: store.reclaimable_bytes,
            dedupe_saved_bytes: store.dedupe_saved_bytes,
        },
        runtime: node.runtime.map(|runtime| Runtime {
            connected: runtime.connected,
            image_count: runtime.image_count,
        }),
        models,
        gpus: from_wire(&node.gpus.unwrap_or_default()),
    };
    print(output, &node, text)
}

/// All models, page by page.
async fn models(client: &mut LocalityServiceClient<Way>) -> anyhow::Result<Vec<Model>> {
    let mut models = Vec::new();
    let mut page_token = String::new();
    loop {
        let question = v1::ListModelsRequest { page_token, ..Default::default() };
        let page = client.list_models(ask::request(question)).await;
        let page = page.map_err(|status| ask::refused(&status))?.into_inner();
        models.extend(page.models.into_iter().map(Model::from));
        if page.next_page_token.is_empty() {
            return Ok(models);
        }
        page_token = page.next_page_token;
    }
}

fn text(node: &Node) -> String {
    let store = &node.store;
    let mut text = format!(
        "node {}: {}, agent {}\nstore: {} used, {} free of {}; sharing saves {}\n",
        node.node_name,
        node.state,
        node.agent_version,
        size(store.used_bytes),
        size(store.free_bytes),
        size(store.capacity_bytes),
        size(store.dedupe_saved_bytes),
    );
    if let Some(runtime) = &node.runtime {
        text += &match runtime.connected {
            true => format!("container runtime: {} images\n", runtime.image_count),
            false => "container runtime: does not answer\n".to_owned(),
        };
    }
    for reason in &node.reasons {
        text += &format!("{}: {}\n", reason.code, reason.message);
    }
    text.push('\n');
    if node.models.is_empty() {
        text += "no models\n";
    } else {
        let rows = node.models.iter().map(|model| {
            vec![
                model.name(),
                ask::short(&model.digest),
                model.state.clone(),
                model.places(),
                model.size(),
                model.mount_count.to_string(),
            ]
        });
        text += &table(&["MODEL", "DIGEST", "STATE", "WHERE", "SIZE", "VOLUMES"], rows);
        text.push('\n');
        for model in &node.models {
            if let Some(error) = &model.error {
                text += &format!("{}: {error}\n", model.name());
            }
        }
    }
    text.push('\n');
    text + &gpu_table::render(&node.gpus)
}
