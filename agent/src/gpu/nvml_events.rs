//! Errors that the driver reports (XIDs), through NVML's event sets.
//!
//! Called raw: `EventSet` of nvml-wrapper borrows the library, so that it cannot live beside
//! it, and its `drop` panics where the library lacks the function.
//!
//! An event set hears what happens while it exists. What happens between two openings of the
//! library is in the kernel log alone.

// A file of calls into C.
#![allow(unsafe_code)]

use std::time::SystemTime;

use nvml_wrapper::Nvml;
use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings as sys;

/// Of a flood of errors the rest is heard a second later: what is asked at once must end.
const MAX_EVENTS: usize = 10_000;

/// Different errors kept from one look to the next.
const MAX_HEARD: usize = 256;

/// An error that the driver reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct XidEvent {
    /// NVML's index of the GPU. `None`: it could not be told which.
    pub(super) index: Option<u32>,
    pub(super) xid: u64,
}

/// What was heard since the last look. An error that is reported over and over counts once, as
/// of when it was heard last: a flood from one GPU hides no other's error, and fills nothing.
#[derive(Debug, Default)]
pub(super) struct Heard(Vec<(XidEvent, SystemTime)>);

impl Heard {
    fn add(&mut self, event: XidEvent, at: SystemTime) {
        self.0.retain(|(known, _)| *known != event);
        // Each look empties it; without looks the oldest are no news.
        if self.0.len() == MAX_HEARD {
            self.0.remove(0);
        }
        self.0.push((event, at));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In the order in which they were heard last.
    pub(super) fn take(&mut self) -> Vec<(XidEvent, SystemTime)> {
        std::mem::take(&mut self.0)
    }
}

/// Listens to all GPUs of one opening of the library.
#[derive(Debug, Default)]
pub(super) struct Events {
    set: Option<EventSet>,
    /// Handles by address, and the index of each. A lost GPU does not tell its name any
    /// more; its handle stays the same.
    watched: Vec<(usize, u32)>,
}

#[derive(Clone, Copy, Debug)]
struct EventSet(sys::nvmlEventSet_t);

// SAFETY: NVML's event sets may be used from any thread, one at a time; this one moves with
// its owner.
unsafe impl Send for EventSet {}

impl Events {
    /// Listens to the GPUs that there are. Where the driver has no events, to none.
    pub(super) fn listen(nvml: &Nvml) -> Self {
        let mut events = Self { set: create(nvml).ok(), watched: Vec::new() };
        let Some(set) = events.set else { return events };
        let Ok(symbol) = nvml_sym(nvml.lib().nvmlDeviceRegisterEvents.as_ref()) else {
            return events;
        };
        for index in 0..nvml.device_count().unwrap_or(0).min(super::nvml::MAX_GPUS) {
            let Ok(device) = nvml.device_by_index(index) else { continue };
            // SAFETY: the handle is used below only as a number and for this library.
            let handle = unsafe { device.handle() };
            // SAFETY: handle and set are of this library, which is open.
            let code = unsafe { symbol(handle, sys::nvmlEventTypeXidCriticalError.into(), set.0) };
            // A GPU that reports no events is no worse for it.
            if nvml_try(code).is_ok() {
                events.watched.push((handle.addr(), index));
            }
        }
        events
    }

    /// Adds to `heard` what was reported since the last call; never waits.
    pub(super) fn hear(&self, nvml: &Nvml, heard: &mut Heard) {
        if self.watched.is_empty() {
            return;
        }
        let Some(set) = self.set else { return };
        for _ in 0..MAX_EVENTS {
            // A time-out says that there is nothing; other errors, that there will be nothing.
            let Ok(data) = next(nvml, set) else { break };
            if data.eventType & u64::from(sys::nvmlEventTypeXidCriticalError) == 0 {
                continue;
            }
            let address = data.device.addr();
            let known = self.watched.iter().find(|(handle, _)| *handle == address);
            let index = known.map(|(_, index)| *index);
            heard.add(XidEvent { index, xid: data.eventData }, SystemTime::now());
        }
    }

    /// Gives the event set back; before the library is closed.
    pub(super) fn close(&mut self, nvml: &Nvml) {
        let Some(set) = self.set.take() else { return };
        if let Ok(symbol) = nvml_sym(nvml.lib().nvmlEventSetFree.as_ref()) {
            // SAFETY: the set is of this library, which is open, and is not used any more.
            // A failure leaves it to the library's end.
            let _ = unsafe { symbol(set.0) };
        }
    }
}

fn create(nvml: &Nvml) -> Result<EventSet, NvmlError> {
    // Without the function to give it back, or to hear of anything, better none.
    nvml_sym(nvml.lib().nvmlEventSetFree.as_ref())?;
    nvml_sym(nvml.lib().nvmlEventSetWait_v2.as_ref())?;
    let symbol = nvml_sym(nvml.lib().nvmlEventSetCreate.as_ref())?;
    let mut set = std::ptr::null_mut();
    // SAFETY: the library is open, `set` is ours to write.
    nvml_try(unsafe { symbol(&mut set) })?;
    Ok(EventSet(set))
}

fn next(nvml: &Nvml, set: EventSet) -> Result<sys::nvmlEventData_t, NvmlError> {
    let symbol = nvml_sym(nvml.lib().nvmlEventSetWait_v2.as_ref())?;
    // SAFETY: all zero is a valid value of this struct of numbers and a null handle.
    let mut data: sys::nvmlEventData_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is of this library, which is open; the struct is of its type.
    nvml_try(unsafe { symbol(set.0, &mut data, 0) })?;
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_hides_no_other_error_and_fills_nothing() {
        let mut heard = Heard::default();
        let event = |index, xid| XidEvent { index: Some(index), xid };
        let at = SystemTime::UNIX_EPOCH;
        heard.add(event(1, 79), at);
        for _ in 0..100_000 {
            heard.add(event(0, 31), at);
        }
        heard.add(event(0, 13), at);
        heard.add(event(0, 31), at);
        let told: Vec<_> = heard.take().into_iter().map(|(event, _)| event).collect();
        assert_eq!(told, [event(1, 79), event(0, 13), event(0, 31)], "the last of them is last");
        assert!(heard.is_empty());

        for xid in 0..100_000 {
            heard.add(event(0, xid), at);
        }
        assert_eq!(heard.take().len(), MAX_HEARD);
    }
}
