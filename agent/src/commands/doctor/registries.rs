//! Whether registries can be reached, and what is known there of who asks.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use carport_image::Reference;
use carport_image::source::{Audience, PullSecret, SourceError, Sources};

use super::Check;
use crate::config::Config;
use crate::output::span;

/// For one reference, login included: a person waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// The file that the node's own credentials are in.
fn file(config: &Config) -> Option<PathBuf> {
    let folder = || {
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
        std::env::var_os("DOCKER_CONFIG").map(PathBuf::from).or_else(home)
    };
    config.registries.docker_config.clone().or_else(|| Some(folder()?.join("config.json")))
}

/// Names the registries that the node has credentials for, and nothing of these.
pub(super) fn credentials(config: &Config) -> Option<Check> {
    let file = file(config)?;
    let shown = file.display();
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        // Nobody asked for that one.
        Err(_) if config.registries.docker_config.is_none() => {
            return Some(Check::ok("credentials", format!("none: {shown} is not there")));
        }
        Err(error) => {
            let advice = "write it, or take registries.dockerConfig away";
            return Some(Check::fail("credentials", format!("{shown}: {error}"), advice));
        }
    };
    let Ok(json) = serde_json::from_str::<serde_json::Value>(&text) else {
        let advice = "write a docker config.json, as `docker login` does";
        return Some(Check::fail("credentials", format!("{shown} is not JSON"), advice));
    };
    let keys = |name: &str| json[name].as_object().into_iter().flat_map(|map| map.keys());
    let mut hosts: Vec<&str> =
        keys("auths").chain(keys("credHelpers")).map(String::as_str).collect();
    hosts.sort_unstable();
    hosts.dedup();
    let helper = json["credsStore"].as_str().map(|name| format!("docker-credential-{name}"));
    let hosts = match (hosts.is_empty(), helper) {
        (true, None) => "for no registry".to_owned(),
        (true, Some(helper)) => format!("from {helper}"),
        (false, _) => format!("for {}", hosts.join(", ")),
    };
    Some(Check::ok("credentials", format!("{hosts}, in {shown}")))
}

/// Asks what `reference` means, as a pull would begin.
pub(super) async fn reach(sources: &Sources, reference: &Reference, config: &Config) -> Check {
    let began = Instant::now();
    let answer = async {
        let source = sources.open(reference, &PullSecret::none())?;
        let digest = source.resolve(&reference.name()).await?;
        Ok::<_, SourceError>((source, digest))
    };
    let answer = match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer,
        Err(_) => {
            let within = span(PATIENCE);
            Err(SourceError::Unavailable(format!("{reference}: no answer within {within}")))
        }
    };
    let error = match answer {
        Ok((source, digest)) => {
            let rights = match source.audience() {
                _ if source.is_local() => "on this machine's disk",
                Audience::Everybody => "for everybody, no credentials needed",
                Audience::Caller => "with the node's credentials",
                Audience::Nobody => "from a mirror",
            };
            let took = span(began.elapsed());
            let message = format!("{reference} is {}, {rights}; {took}", digest.short());
            return Check::ok("registry", message);
        }
        Err(error) => error,
    };
    let host = reference.registry().unwrap_or("the registry");
    let advice = match &error {
        SourceError::Denied(_) => {
            let file =
                file(config).map_or_else(|| "a config.json".into(), |f| f.display().to_string());
            format!(
                "give the node a login for {host} in {file} (in a cluster: the Secret carport-registry), \
                 or the pods theirs, by nodePublishSecretRef"
            )
        }
        SourceError::NotFound(_) => {
            "look for a wrong name or tag, or a repository that hides itself \
                                     from who may not read it"
                .into()
        }
        SourceError::Throttled { .. } => {
            "wait; a mirror in registries.hostsDir or a login raises the limit".into()
        }
        SourceError::Unavailable(_) => format!(
            "look at DNS, firewall, proxy (HTTPS_PROXY) and CA of {host} from this node; without TLS it \
             must be named in registries.plainHttp"
        ),
        SourceError::Invalid(_) => format!(
            "{host} does not answer as a registry with TLS: trust its CA (registries.hostsDir), name it in \
             registries.plainHttp where it has none, or look for a proxy or a portal on the way"
        ),
    };
    Check::fail("registry", error.to_string(), advice)
}
