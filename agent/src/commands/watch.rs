//! `carport watch`.

use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use carport_proto::carport::v1;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use carport_proto::carport::v1::watch_response::Event;
use serde::Serialize;
use tonic::Code;

use super::ask::{self, Model};
use super::locate::model_ref;
use crate::cli::{Output, Remote};
use crate::config::Config;

/// From a watch that broke to the next try.
const AGAIN: Duration = Duration::from_secs(1);

/// One event as it is printed.
#[derive(Debug, Default, Serialize)]
struct Line {
    event: &'static str,
    sequence: Option<u64>,
    model: Option<Model>,
    reference: Option<String>,
    digest: Option<String>,
}

pub(super) async fn run(
    output: Output,
    config: &Config,
    references: Vec<String>,
    once: bool,
    remote: &Remote,
) -> anyhow::Result<()> {
    let mut client = LocalityServiceClient::new(ask::reach(config, remote).await?);
    let mut request = v1::WatchRequest {
        models: references.into_iter().map(model_ref).collect(),
        include_gpus: true,
        ..Default::default()
    };
    loop {
        // Without a deadline: it goes on until somebody ends it.
        let status = match client.watch(request.clone()).await {
            Ok(stream) => {
                let mut stream = stream.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(message)) => {
                            request.resume_from = message.revision.clone().or(request.resume_from);
                            let synced = matches!(message.event, Some(Event::Synced(_)));
                            if !show(output, message)? || (synced && once) {
                                return Ok(());
                            }
                        }
                        Ok(None) => break None,
                        Err(status) => break Some(status),
                    }
                }
            }
            Err(status) => Some(status),
        };
        match status {
            // What was missed is lost, and all there is will be shown anew.
            Some(status) if status.code() == Code::OutOfRange => request.resume_from = None,
            Some(status)
                if !matches!(status.code(), Code::Unavailable | Code::ResourceExhausted) =>
            {
                return Err(ask::refused(&status));
            }
            Some(_) | None => {}
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// Prints one event; false when nobody reads any more.
fn show(output: Output, message: v1::WatchResponse) -> anyhow::Result<bool> {
    let mut line =
        Line { sequence: message.revision.map(|revision| revision.sequence), ..Line::default() };
    let name = |line: &mut Line, model: Option<v1::ModelRef>| {
        let model = model.unwrap_or_default();
        line.reference = Some(model.reference);
        line.digest = Some(model.digest);
    };
    let mut text = String::new();
    match message.event {
        Some(Event::Node(node)) => {
            line.event = "node";
            text = ask::name(node.state().as_str_name(), "NODE_STATE_");
        }
        Some(Event::Upsert(model)) => {
            line.event = "model";
            name(&mut line, model.model.clone());
            let model = Model::from(model);
            text = format!("{} {}, {}", model.name(), model.state, model.size());
            line.model = Some(model);
        }
        Some(Event::Delete(model)) => {
            line.event = "gone";
            text.clone_from(&model.reference);
            name(&mut line, Some(model));
        }
        Some(Event::Progress(progress)) => {
            line.event = "progress";
            name(&mut line, progress.model.clone());
            let model = v1::ModelLocality {
                model: progress.model,
                pull: progress.pull,
                ..Default::default()
            };
            let model = Model { state: "pulling".into(), ..Model::from(model) };
            text = format!("{} {}", model.name(), model.size());
            line.model = Some(model);
        }
        Some(Event::Gpus(gpus)) => {
            line.event = "gpus";
            text = format!("{} GPUs", gpus.gpus.len());
        }
        Some(Event::Synced(_)) => line.event = "synced",
        Some(Event::Heartbeat(_)) | None => line.event = "heartbeat",
    }
    let rendered = match output {
        Output::Json => serde_json::to_string(&line).context("write json")?,
        // For people, silence says the same.
        Output::Text | Output::Wide if line.event == "heartbeat" => return Ok(true),
        Output::Text | Output::Wide => format!("{:<8} {text}", line.event).trim_end().to_owned(),
    };
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{rendered}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        result => result.map(|()| true).context("write to standard output"),
    }
}
