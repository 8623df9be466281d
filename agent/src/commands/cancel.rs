//! `carport cancel`.

use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use serde::Serialize;

use super::Failures;
use super::ask;
use super::locate::model_ref;
use crate::cli::{CancelArgs, Output};
use crate::config::Config;
use crate::output::{print, table};

#[derive(Debug, Serialize)]
struct Cancelled {
    reference: String,
    cancelled: bool,
    stopped: bool,
}

impl Cancelled {
    fn state(&self) -> &'static str {
        match (self.cancelled, self.stopped) {
            (_, true) => "stopped",
            (true, false) => "taken back; the pull goes on, since somebody else needs it",
            (false, false) => "no pull in flight",
        }
    }
}

pub(super) async fn run(
    output: Output,
    config: &Config,
    arguments: CancelArgs,
) -> anyhow::Result<()> {
    let mut client = CacheServiceClient::new(ask::reach(config, &arguments.remote).await?);
    let (mut pulls, mut failures) = (Vec::new(), Failures(Vec::new()));
    for reference in arguments.references {
        let model = Some(model_ref(reference.clone()));
        let force = arguments.force;
        let request = v1::CancelPrefetchRequest { model, force, ..Default::default() };
        match client.cancel_prefetch(ask::request(request)).await {
            Ok(answer) => {
                let v1::CancelPrefetchResponse { cancelled, stopped } = answer.into_inner();
                pulls.push(Cancelled { reference, cancelled, stopped });
            }
            Err(status) => failures.0.push(ask::refused(&status)),
        }
    }
    print(output, &pulls, |pulls| {
        let rows = pulls.iter().map(|pull| vec![pull.reference.clone(), pull.state().into()]);
        table(&["MODEL", "STATE"], rows)
    })?;
    failures.into_result()
}
