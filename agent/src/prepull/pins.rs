//! The list's wishes as pins of the store, under one owner.

use std::collections::HashSet;
use std::time::SystemTime;

use carport_image::pull::Pulled;
use carport_image::store::{Owner, PinRequest, StoreError};
use carport_image::{Digest, Reference, Store};

use super::list::Pin;

/// Whose pins they are.
const OWNER: &str = "prepull";

/// Pins what was brought here as the list wishes. False: it has been removed meanwhile.
pub(super) fn pin(
    store: &Store,
    reference: &Reference,
    pulled: &Pulled,
    pin: Pin,
) -> Result<bool, StoreError> {
    let Some(owner) = owner() else { return Ok(true) };
    let expires_at = match pin {
        Pin::Forever => None,
        // From when it came, so that a restart of the agent makes it no longer. A time that nobody
        // lives to see is no end.
        Pin::For(length) => pulled.image.pulled_at.checked_add(length),
    };
    if expires_at.is_some_and(|end| end <= SystemTime::now()) {
        return Ok(true);
    }
    let request = PinRequest { owner, expires_at };
    Ok(store.pin(&pulled.digest, Some(reference), &request)?.is_some())
}

/// Takes away the list's pins of all but `wanted`.
pub(super) fn keep_only(store: &Store, wanted: &HashSet<Digest>) -> Result<(), StoreError> {
    let Some(owner) = owner() else { return Ok(()) };
    for pin in store.pins()? {
        if pin.owner == owner && !wanted.contains(&pin.image) {
            store.unpin(&pin.image, &owner)?;
            tracing::info!(image = %pin.image, "no longer pinned by the pre-pull list");
        }
    }
    Ok(())
}

/// A constant that is an owner; the test below reads it.
fn owner() -> Option<Owner> {
    OWNER.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_s_owner_is_one() {
        assert_eq!(owner().unwrap().as_str(), OWNER);
    }
}
