//! Reservations: room that is promised to what is still to come.
//!
//! ```text
//! reservations/<hash of the id>.json    id, owner, bytes, reference, expires_at
//! ```
//!
//! A reservation takes no disk; admission counts its bytes as taken until it is released or its
//! time is over. One that names a reference is used up by the pull of that reference.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::error::StoreError;
use super::evict::Reason;
use super::pins::Owner;
use super::{Records, Store, ref_name};
use crate::reference::Reference;

/// Reservations at a time; more are a program that forgets its own.
const MAX_RESERVATIONS: usize = 1024;

/// As long as anybody needs it.
const MAX_ID_BYTES: usize = 200;

/// Room that is kept free for somebody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Named by who asks: asking again with the same id changes it.
    pub id: String,
    /// For whom.
    pub owner: Owner,
    /// How much.
    pub bytes: u64,
    /// What will be pulled: that pull takes the reservation over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<Reference>,
    /// From then on it counts for nothing.
    pub expires_at: SystemTime,
}

impl Store {
    /// Keeps room free, evicting images where that is needed. Asking again with the same id replaces
    /// what was asked for before.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] when the room is not to be had: an earlier reservation with this id
    /// stays as it was. [`StoreError::InUse`] when there are too many.
    pub fn reserve(&self, reservation: &Reservation) -> Result<(), StoreError> {
        if reservation.id.is_empty() || reservation.id.len() > MAX_ID_BYTES {
            return Err(StoreError::InUse(format!(
                "a reservation's id has 1 to {MAX_ID_BYTES} bytes, this one {}",
                reservation.id.len()
            )));
        }
        let _turn = self.admission()?;
        self.drop_expired_reservations()?;
        let others = self.reservations()?;
        let others = others.iter().filter(|other| other.id != reservation.id).count();
        if others >= MAX_RESERVATIONS {
            return Err(StoreError::InUse(format!(
                "there are {MAX_RESERVATIONS} reservations: release those that are not needed"
            )));
        }
        let what = format!("reservation {:?} of {}", reservation.id, reservation.owner);
        self.make_room(&what, Reason::Reservation, || {
            let (_, taken) = self.promised(|one| one.id == reservation.id)?;
            Ok((reservation.bytes, taken))
        })?;
        self.reservation_records().put(&ref_name(&reservation.id), reservation)
    }

    /// Gives the room back; false when there was no such reservation.
    pub fn release(&self, id: &str) -> Result<bool, StoreError> {
        self.reservation_records().remove(&ref_name(id))
    }

    /// All reservations whose time is not over, by id.
    pub fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        let now = SystemTime::now();
        let mut all: Vec<Reservation> =
            self.reservation_records().list()?.into_iter().map(|(_, one)| one).collect();
        all.retain(|one: &Reservation| one.expires_at > now);
        all.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(all)
    }

    pub(super) fn drop_expired_reservations(&self) -> Result<(), StoreError> {
        let now = SystemTime::now();
        for (name, one) in self.reservation_records().list::<Reservation>()? {
            if one.expires_at <= now {
                self.reservation_records().remove(&name)?;
            }
        }
        Ok(())
    }

    fn reservation_records(&self) -> Records {
        Records::new(self.path("reservations"))
    }
}
