//! `carport gpus`.

use std::time::Duration;

use carport_proto::carport::v1;
use carport_proto::carport::v1::gpu_service_client::GpuServiceClient;
use carport_proto::client::ConnectError;

use super::ask;
use crate::api::gpu::from_wire;
use crate::cli::Output;
use crate::config::Config;
use crate::gpu::{look_once, table, topo};
use crate::output::print;

/// A driver that is awake answers in milliseconds; one without persistence mode wakes each GPU
/// first, which takes a second or two.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) async fn run(output: Output, topo: bool, config: &Config) -> anyhow::Result<()> {
    let inventory = match ask::connect(config).await {
        Ok(channel) => {
            let question = ask::request(v1::GetGpuInventoryRequest::default());
            let answer = GpuServiceClient::new(channel).get_gpu_inventory(question).await;
            from_wire(&answer.map_err(|status| ask::refused(&status))?.into_inner())
        }
        // No daemon, or not one for this user: the driver tells as well.
        Err(ConnectError::NotRunning { .. } | ConnectError::Denied { .. }) => {
            look_once(config.gpu_options(), PATIENCE).await?
        }
        Err(error) => return Err(error.into()),
    };
    let render = match output {
        _ if topo => topo::render,
        Output::Wide => table::render_wide,
        Output::Text | Output::Json => table::render,
    };
    print(output, &inventory, render)
}
