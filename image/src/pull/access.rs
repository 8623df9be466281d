//! The right to an image that is here already.
//!
//! A pull proves it by itself: the registry served this caller. What was pulled for somebody
//! else is given only after the registry was asked, with this caller's credentials, whether
//! it would serve it to them too; the answer is remembered in the store.
//!
//! Asked is the repository that *this* reference names, and the registry itself: a mirror may
//! serve whom it likes. A repository that was never seen to hold the
//! image must serve its manifest, not only say that it has it: a registry can claim any
//! digest, and this one may have been named by whoever wants the image.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::fetch::retry;
use super::{Inner, PullError, PullRequest};
use crate::digest::Digest;
use crate::reference::Reference;
use crate::source::{Audience, ManifestName, Source, SourceError};
use crate::store::{AccessRecord, Standing};

/// How the right to an image that is here is looked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AccessCheck {
    /// For how long an answer of the registry counts.
    pub remember_for: Duration,
    /// What to do when the registry gives none.
    pub registry_away: RegistryAway,
}

/// What becomes of a caller whose right cannot be looked into now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegistryAway {
    /// They wait until the registry is back.
    Deny,
    /// Who had a right when the registry was asked last has it.
    #[default]
    AllowKnown,
}

impl Inner {
    /// Returns when the caller may have the stored image `digest`.
    pub(super) async fn entitled(
        &self,
        request: &PullRequest,
        digest: Digest,
    ) -> Result<(), PullError> {
        let Some(check) = request.access else { return Ok(()) };
        let reference = &request.reference;
        let source = self.sources.open_origin(reference, &request.secret)?;
        let repository = source.name();
        let credential = request.secret.fingerprint(reference);
        let record = self.disk(move |store| store.access(&digest)).await?;
        let now = SystemTime::now();
        let known = match record.standing(&repository, &credential, check.remember_for, now) {
            Standing::Entitled => return Ok(()),
            Standing::Known => true,
            Standing::Unknown => false,
        };
        // Who will be let in anyway must not wait for a registry that is away.
        let lenient = known && check.registry_away == RegistryAway::AllowKnown;
        let attempts = if lenient { 1 } else { self.attempts };
        let ask = || ask(&*source, &record, digest);
        match retry(attempts, "look into the right to an image", ask).await {
            Ok(()) => self.granted(&*source, request, digest).await,
            Err(error) if error.is_transient() && lenient => {
                tracing::warn!(%reference, %error, "the registry is away; went by an earlier answer");
                Ok(())
            }
            Err(SourceError::Denied(why) | SourceError::NotFound(why)) => {
                self.disk(move |store| store.revoke(&digest, &repository, credential)).await?;
                let why = refused(reference, &without_digest(&why, reference, &digest));
                Err(SourceError::Denied(why).into())
            }
            Err(error) => {
                Err(error.map_message(|why| without_digest(why, reference, &digest)).into())
            }
        }
    }

    /// Remembers that `source` has just served the image, or its name, to the caller. What
    /// a mirror serves says nothing.
    pub(super) async fn granted(
        &self,
        source: &dyn Source,
        request: &PullRequest,
        digest: Digest,
    ) -> Result<(), PullError> {
        let credential = match source.audience() {
            Audience::Nobody => return Ok(()),
            Audience::Caller => Some(request.secret.fingerprint(&request.reference)),
            Audience::Everybody => None,
        };
        let repository = source.name();
        let turn = self.grants.lock().await;
        let noted = self.disk(move |store| store.grant(&digest, &repository, credential)).await;
        drop(turn);
        noted
    }
}

async fn ask(
    source: &dyn Source,
    record: &AccessRecord,
    digest: Digest,
) -> Result<(), SourceError> {
    let name = ManifestName::Digest(digest);
    let found = match record.holds(&source.name()) {
        true => source.resolve(&name).await?,
        false => source.manifest(&name).await?.digest(),
    };
    match found == digest {
        true => Ok(()),
        false => Err(SourceError::NotFound(format!(
            "manifest {digest}: {} served something else",
            source.name()
        ))),
    }
}

fn refused(reference: &Reference, why: &str) -> String {
    format!("image {reference}: its registry refuses this pod's credentials: {why}")
}

/// The message without the digest that the caller did not name: who has no right to an image must not
/// learn from the error that the node has it, nor which one it is.
fn without_digest(why: &str, reference: &Reference, digest: &Digest) -> String {
    match reference.digest() == Some(*digest) {
        true => why.to_owned(),
        false => {
            let name = reference.tag().map_or_else(|| "of it".to_owned(), ToOwned::to_owned);
            why.replace(&digest.to_string(), &name).replace(&digest.hex(), &name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_only_the_digest_that_its_reader_named() {
        let digest = Digest::of(b"private");
        let why = format!("manifest {digest}: GET https://r/v2/a/manifests/{digest}: 403");
        let tagged: Reference = "r/a:v1".parse().unwrap();
        let text = without_digest(&why, &tagged, &digest);
        assert_eq!(text, "manifest v1: GET https://r/v2/a/manifests/v1: 403");
        let named: Reference = format!("r/a:v1@{digest}").parse().unwrap();
        assert_eq!(without_digest(&why, &named, &digest), why);
    }
}
