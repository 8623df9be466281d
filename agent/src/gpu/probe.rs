//! The edge to the GPU library.

use super::inventory::{Gpu, ProviderState};
use super::links::GpuLink;

/// What looks at the GPUs: NVML, or a stand-in in tests.
///
/// One thread owns a probe and calls nothing else of the library. Any call may
/// block for as long as the driver does.
///
/// A probe reports; it remembers nothing about a GPU from one look to the next.
/// [`super::history`] does that.
pub(super) trait GpuProbe: Send {
    /// Looks once, opening the library first if it is not open.
    ///
    /// The trouble of one GPU is in its health and in no other GPU's answer.
    /// A node without GPUs is a sample with none.
    ///
    /// # Errors
    ///
    /// When there is nothing to ask. The library is then closed, so that the next
    /// call starts afresh and sees a driver that has come since.
    fn sample(&mut self) -> Result<Sample, ProbeError>;

    /// Whether something happened since the last look that should not wait for the next
    /// one. Cheap, and asked every second.
    fn has_news(&mut self) -> bool {
        false
    }

    /// Gives the library up; the next look opens it again.
    fn close(&mut self);
}

/// What one look saw.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    /// Which opening of the library answered: another number, another session.
    pub(super) session: u64,
    pub(super) driver_version: Option<String>,
    pub(super) nvml_version: Option<String>,
    pub(super) cuda_driver_version: Option<String>,
    pub(super) gpus: Vec<Gpu>,
    /// Between those that answered.
    pub(super) links: Vec<GpuLink>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct ProbeError {
    pub(super) state: ProviderState,
    /// What is the matter and what to do.
    pub(super) message: String,
}
