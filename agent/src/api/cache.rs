//! `CacheService`: what the node should hold.

use carport_image::Reference;
use carport_image::pull::{Priority, PullRequest};
use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_server::CacheService;
use tonic::{Request, Response, Status};

use super::Api;
use super::convert::{self, invalid};
use crate::placement::{Model, Wanted};
use crate::run::Phase;
use crate::state::in_flight;

/// Pulls at a time; a caller that asks for more should ask again later.
const MAX_PULLS: usize = 256;

#[tonic::async_trait]
impl CacheService for Api {
    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Result<Response<v1::PrefetchResponse>, Status> {
        let request = request.into_inner();
        for name in &request.node_names {
            self.is_this_node(name)?;
        }
        refuse_what_is_not_served(&request)?;
        let asked = request.model.as_ref().ok_or_else(|| invalid("model", "name a model"))?;
        let wanted = convert::wanted(asked, "model")?;
        let reference = exact(&wanted)?;
        if self.phase() == Phase::Draining {
            return Err(Status::unavailable("the agent is stopping; ask again when it is back"));
        }
        let stored = Model::find(&wanted, &self.state(), &[]).image.is_some();
        if !stored && !request.validate_only {
            let pulls = self.puller.pulls();
            let new = !pulls.iter().any(|p| in_flight(p) && p.reference == reference);
            if new && pulls.iter().filter(|pull| in_flight(pull)).count() >= MAX_PULLS {
                return Err(Status::resource_exhausted(format!(
                    "{MAX_PULLS} pulls are under way; ask again when some are done"
                )));
            }
            // The puller owns it from here on, and logs how it ends.
            let priority = Priority::Prefetch(0);
            let request = PullRequest { priority, ..PullRequest::new(reference) };
            self.puller.start(request).detach();
        }
        let state = self.state();
        let pulls = state.pulls(self.puller.pulls());
        let model = Model::find(&wanted, &state, &pulls);
        let model = convert::model(&model, &state, &pulls, false);
        Ok(Response::new(v1::PrefetchResponse { model: Some(model), nodes: Vec::new() }))
    }
}

/// What the field promises must not be dropped in silence.
fn refuse_what_is_not_served(request: &v1::PrefetchRequest) -> Result<(), Status> {
    let refused = [
        ("priority", request.priority != 0),
        ("pin_ttl", request.pin_ttl.is_some()),
        ("warm_page_cache", request.warm_page_cache),
    ];
    match refused.iter().find(|(_, set)| *set) {
        Some((field, _)) => Err(invalid(field, "not served by this version; leave it out")),
        None => Ok(()),
    }
}

/// The reference to pull, held to the digest where one is given.
fn exact(wanted: &Wanted) -> Result<Reference, Status> {
    let Some(reference) = &wanted.reference else {
        return Err(invalid("model.reference", "a digest alone does not say where to pull from"));
    };
    match (wanted.digest, reference.digest()) {
        (Some(digest), None) => {
            format!("{reference}@{digest}").parse().map_err(|why| invalid("model.digest", why))
        }
        (Some(digest), Some(own)) if digest != own => {
            Err(invalid("model.digest", format!("the reference says {own}")))
        }
        _ => Ok(reference.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use carport_image::Digest;

    #[test]
    fn a_digest_beside_a_tag_decides() {
        let digest = Digest::of(b"x");
        let reference: Reference = "r:5000/a:1".parse().unwrap();
        let wanted = Wanted { reference: Some(reference), digest: Some(digest) };
        assert_eq!(exact(&wanted).unwrap().digest(), Some(digest));
        let other =
            Wanted { digest: Some(Digest::of(b"y")), reference: Some(exact(&wanted).unwrap()) };
        assert_eq!(exact(&other).unwrap_err().code(), tonic::Code::InvalidArgument);
        let nowhere = Wanted { reference: None, digest: Some(digest) };
        assert!(exact(&nowhere).unwrap_err().message().starts_with("model.reference: "));
    }

    #[test]
    fn promises_that_are_not_kept_are_refused_by_name() {
        let request = v1::PrefetchRequest { priority: 1, ..Default::default() };
        let error = refuse_what_is_not_served(&request).unwrap_err();
        assert!(error.message().starts_with("priority: "), "{}", error.message());
    }
}
