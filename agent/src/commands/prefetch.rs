//! `carport prefetch`.

use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;

use super::Failures;
use super::ask::{self, Model};
use super::locate::model_ref;
use crate::cli::{Output, PrefetchArgs};
use crate::config::Config;
use crate::output::{print, table};

pub(super) async fn run(
    output: Output,
    config: &Config,
    arguments: PrefetchArgs,
) -> anyhow::Result<()> {
    let mut client = CacheServiceClient::new(ask::reach(config, &arguments.remote).await?);
    let pin_ttl = arguments.pin.map(prost_types::Duration::try_from).transpose()?;
    let (mut models, mut failures) = (Vec::new(), Failures(Vec::new()));
    for reference in arguments.references {
        let model = Some(model_ref(reference.clone()));
        let answer = if arguments.cancel {
            let request = v1::CancelPrefetchRequest { model, ..Default::default() };
            client.cancel_prefetch(ask::request(request)).await.map(|answer| {
                let state =
                    if answer.into_inner().cancelled { "cancelled" } else { "not under way" };
                Model { reference, state: state.into(), ..Model::default() }
            })
        } else {
            let request = v1::PrefetchRequest {
                model,
                priority: arguments.priority,
                pin_ttl,
                warm_page_cache: arguments.warm,
                ..Default::default()
            };
            let answer = client.prefetch(ask::request(request)).await;
            answer.map(|answer| Model::from(answer.into_inner().model.unwrap_or_default()))
        };
        match answer {
            Ok(model) => models.push(model),
            Err(status) => failures.0.push(ask::refused(&status)),
        }
    }
    print(output, &models, |models| {
        let rows = models.iter().map(|model| vec![model.name(), model.state.clone(), model.size()]);
        table(&["MODEL", "STATE", "SIZE"], rows)
    })?;
    failures.into_result()
}
