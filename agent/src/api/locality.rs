//! `LocalityService`: where models are. Read from memory, never from disk or network.

use std::time::Instant;

use carport_image::pull::PullProgress;
use carport_proto::carport::v1;
use carport_proto::carport::v1::locality_service_server::LocalityService;
use tonic::{Request, Response, Status};

use super::convert::{self, invalid, reason};
use super::watching::WatchStream;
use super::{Api, gpu, list, mask};
use crate::gpu::ProviderState;
use crate::placement::gpus::Requirement;
use crate::placement::{Model, Wanted, evaluate, score};
use crate::run::Phase;
use crate::state::NodeState;

/// Models in one question; more than a pod ever mounts.
const MAX_MODELS: usize = 32;
/// Nodes in one question; this agent answers for one.
const MAX_NODES: usize = 10_000;

#[tonic::async_trait]
impl LocalityService for Api {
    async fn evaluate_placement(
        &self,
        request: Request<v1::EvaluatePlacementRequest>,
    ) -> Result<Response<v1::EvaluatePlacementResponse>, Status> {
        let request = request.into_inner();
        let question = Question::read(&request)?;
        if !request.node_names.is_empty() && !request.node_names.contains(&self.node_name) {
            self.is_this_node(&request.node_names[0])?;
        }
        let state = self.state();
        let pulls = state.pulls(self.puller.pulls());
        let models: Vec<Model<'_>> =
            question.wanted.iter().map(|wanted| Model::find(wanted, &state, &pulls)).collect();
        let unresolved = models.iter().zip(&request.models).filter(|(model, _)| !model.is_known());
        let unresolved = unresolved.map(|(_, asked)| asked.clone()).collect();

        let age = self.state_age();
        let mut own = self.evaluation(&question, &models, &state, &pulls);
        if question.max_staleness.is_some_and(|most| age > most) {
            own.state = v1::NodeState::Stale.into();
        }
        let own = mask::node_evaluation(own, request.read_mask.as_ref())?;
        let nodes = if request.node_names.is_empty() {
            vec![own]
        } else {
            // In the order asked for, none left out.
            let answer = |name: &String| match *name == self.node_name {
                true => own.clone(),
                false => other_node(name, &self.node_name),
            };
            request.node_names.iter().map(answer).collect()
        };
        Ok(Response::new(v1::EvaluatePlacementResponse {
            nodes,
            snapshot_age: Some(convert::duration(age)),
            unresolved,
        }))
    }

    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::Node>, Status> {
        let request = request.into_inner();
        self.is_this_node(&request.node_name)?;
        let state = self.state();
        let pulls = state.pulls(self.puller.pulls());
        let node = self.node(&state, &pulls);
        Ok(Response::new(mask::node(node, request.read_mask.as_ref())?))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let request = request.into_inner();
        self.is_this_node(&request.node_name)?;
        let page = list::Page::read(&request)?;
        let with_pods = mask::wants_pods(request.read_mask.as_ref(), "pods");
        let state = self.state();
        let pulls = state.pulls(self.puller.pulls());
        let (entries, next_page_token) = page.cut(list::entries(&state, &pulls, page.place));
        let models = entries
            .iter()
            .map(|entry| {
                let model = Model::find(&entry.wanted, &state, &pulls);
                let message = convert::model(&model, &state, &pulls, with_pods);
                mask::model(message, request.read_mask.as_ref())
            })
            .collect::<Result<_, Status>>()?;
        let revision = Some(convert::revision(&state.revision));
        Ok(Response::new(v1::ListModelsResponse { models, next_page_token, revision }))
    }

    type WatchStream = WatchStream;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<WatchStream>, Status> {
        Ok(Response::new(self.watch_from(request.get_ref())?))
    }
}

impl Api {
    /// The node as a whole.
    pub(super) fn node(&self, state: &NodeState, pulls: &[PullProgress]) -> v1::Node {
        v1::Node {
            node_name: self.node_name.clone(),
            node_uid: String::new(),
            revision: Some(convert::revision(&state.revision)),
            state: self.node_state(state).into(),
            observe_time: Some(convert::timestamp(state.observed_at)),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            store: Some(convert::store(state, pulls)),
            bandwidth: Some(convert::bandwidth(state, pulls)),
            gpus: Some(gpu::inventory(&state.gpus.as_of(Instant::now()))),
            reasons: convert::reasons(&state.troubles),
            runtime: convert::runtime(&state.runtime),
            kubelet: self.kubelet.as_ref().map(|kubelet| convert::kubelet(&kubelet.report())),
        }
    }
}

/// A question about placement, read and checked.
struct Question {
    wanted: Vec<Wanted>,
    gpu: Option<Requirement>,
    max_staleness: Option<std::time::Duration>,
    with_pods: bool,
}

impl Question {
    fn read(request: &v1::EvaluatePlacementRequest) -> Result<Self, Status> {
        let count = request.models.len();
        if count == 0 || count > MAX_MODELS {
            let why = format!("{count} models; name 1 to {MAX_MODELS}");
            return Err(invalid("models", why));
        }
        if request.node_names.len() > MAX_NODES {
            return Err(invalid("node_names", format!("name at most {MAX_NODES}")));
        }
        let wanted = request.models.iter().enumerate();
        let wanted = wanted
            .map(|(index, model)| convert::wanted(model, &format!("models[{index}]")))
            .collect::<Result<_, _>>()?;
        let max_staleness =
            request.max_staleness.map(std::time::Duration::try_from).transpose().map_err(|_| {
                invalid("max_staleness", "write a length of time that is not negative")
            })?;
        let gpu = request.gpu.as_ref().map(convert::requirement).transpose()?;
        let with_pods = mask::wants_pods(request.read_mask.as_ref(), "models.pods");
        Ok(Self { wanted, gpu, max_staleness, with_pods })
    }
}

impl Api {
    fn evaluation(
        &self,
        question: &Question,
        models: &[Model<'_>],
        state: &NodeState,
        pulls: &[PullProgress],
    ) -> v1::NodeEvaluation {
        let answer = evaluate(models, state, pulls);
        let mut reasons = convert::reasons(&state.troubles);
        let mut excluded = false;
        let mut exclude = |code: &str, message: &str| {
            reasons.push(reason(code, message));
            excluded = true;
        };
        if self.phase() == Phase::Draining {
            exclude("DRAINING", "the agent of this node is stopping");
        }
        if let Some(fit) = answer.fit.filter(|fit| !fit.fits) {
            let missing = answer.missing_bytes.unwrap_or_default();
            let message = format!(
                "{missing} bytes are missing, {} are free and {} could be made free",
                fit.free_bytes, fit.reclaimable_bytes
            );
            exclude("DISK_FULL", &message);
        }
        let gpu = question.gpu.as_ref().map(|requirement| {
            let inventory = state.gpus.as_of(Instant::now());
            // Where the driver hangs, what it said last is no ground to send work there.
            let stale = inventory.provider.state == ProviderState::Stale;
            let found = requirement.find(if stale { &[] } else { &inventory.gpus });
            if !requirement.is_met(&found) {
                let message = format!(
                    "{} GPUs are asked for, {} of {} match and are free; {}",
                    requirement.count,
                    found.matching_count,
                    inventory.gpus.len(),
                    match inventory.provider.message.as_str() {
                        "" => "see `carport gpus`",
                        message => message,
                    }
                );
                exclude("GPU_MISMATCH", &message);
            }
            convert::gpu_match(found)
        });
        for model in models {
            if model.is_here() {
                continue;
            }
            let name = match (&model.wanted.reference, model.wanted.digest) {
                (Some(reference), _) => reference.to_string(),
                (None, digest) => digest.map(|digest| digest.to_string()).unwrap_or_default(),
            };
            match model.pull {
                Some(pull) => reasons.extend(convert::pull_failure(&pull.state)),
                None => {
                    let message = format!("{name}: this node has not met it; prefetch it");
                    reasons.push(reason("MODEL_UNKNOWN", &message));
                }
            }
        }
        v1::NodeEvaluation {
            node_name: self.node_name.clone(),
            score: if excluded { 0 } else { score(answer.eta) },
            state: self.node_state(state).into(),
            models: models
                .iter()
                .map(|model| convert::model(model, state, pulls, question.with_pods))
                .collect(),
            missing_bytes: answer.missing_bytes,
            eta: answer.eta.map(convert::duration),
            eta_p90: answer.eta_p90.map(convert::duration),
            fit: answer.fit.map(convert::fit),
            gpu,
            reasons,
        }
    }

    fn node_state(&self, state: &NodeState) -> v1::NodeState {
        match self.phase() {
            Phase::Draining => v1::NodeState::Draining,
            _ if !state.troubles.is_empty() => v1::NodeState::Degraded,
            _ => v1::NodeState::Ready,
        }
    }
}

fn other_node(name: &str, own: &str) -> v1::NodeEvaluation {
    v1::NodeEvaluation {
        node_name: name.into(),
        state: v1::NodeState::Unreachable.into(),
        reasons: vec![reason("OTHER_NODE", &format!("this agent answers for {own} only"))],
        ..Default::default()
    }
}
