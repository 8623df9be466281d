//! NVML functions that nvml-wrapper has no safe form of.
//!
//! Names, structs and numbers are those of the published header, as nvml-wrapper-sys has
//! them. What the wrapper has and does wrongly is in [`super::nvml_quirks`].

// A file of calls into C.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_uint};
use std::mem::size_of;

use nvml_wrapper::Device;
use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper_sys::bindings as sys;

use super::inventory::{Faults, RecoveryAction};
use super::links::Fabric;
use super::nvml_quirks::is_too_new;

/// `NVML_STRUCT_VERSION` of the header: the size, with the version in the highest byte.
const fn version_of<T>(version: u32) -> c_uint {
    size_of::<T>() as c_uint | (version << 24)
}

/// Rows of memory that were replaced, into `faults`. From Ampere on.
pub(super) fn remapped_rows(device: &Device<'_>, faults: &mut Faults) -> Result<(), NvmlError> {
    let symbol = nvml_sym(device.nvml().lib().nvmlDeviceGetRemappedRows.as_ref())?;
    let (mut correctable, mut uncorrectable, mut pending, mut failed) = (0, 0, 0, 0);
    // SAFETY: the handle is of this library, which the device borrows and so keeps open; the
    // four numbers are ours to write.
    nvml_try(unsafe {
        symbol(device.handle(), &mut correctable, &mut uncorrectable, &mut pending, &mut failed)
    })?;
    faults.remapped_rows_uncorrectable = Some(uncorrectable);
    faults.remap_pending = Some(pending != 0);
    faults.remap_failed = Some(failed != 0);
    Ok(())
}

/// Why the clocks are held down, as bits; those unknown to the wrapper included.
pub(super) fn throttle_reasons(device: &Device<'_>) -> Result<u64, NvmlError> {
    let lib = device.nvml().lib();
    // The new name since driver 535; the bits are the same.
    let symbol = nvml_sym(lib.nvmlDeviceGetCurrentClocksEventReasons.as_ref())
        .or_else(|_| nvml_sym(lib.nvmlDeviceGetCurrentClocksThrottleReasons.as_ref()))?;
    let mut bits = 0;
    // SAFETY: the handle is of this library, `bits` is ours to write.
    nvml_try(unsafe { symbol(device.handle(), &mut bits) })?;
    Ok(bits)
}

/// What is between two GPUs on PCIe: `nvmlGpuTopologyLevel_t`.
pub(super) fn common_ancestor(a: &Device<'_>, b: &Device<'_>) -> Result<u32, NvmlError> {
    let symbol = nvml_sym(a.nvml().lib().nvmlDeviceGetTopologyCommonAncestor.as_ref())?;
    let mut level = 0;
    // SAFETY: both handles are of this library, `level` is ours to write.
    nvml_try(unsafe { symbol(a.handle(), b.handle(), &mut level) })?;
    Ok(level)
}

/// What the driver wants done. From driver 570 on.
pub(super) fn recovery_action(device: &Device<'_>) -> Result<RecoveryAction, NvmlError> {
    let action = field(device, sys::field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)?;
    Ok(match u32::try_from(action).unwrap_or(u32::MAX) {
        sys::nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_NONE => RecoveryAction::None,
        sys::nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_GPU_RESET => {
            RecoveryAction::GpuReset
        }
        sys::nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_NODE_REBOOT => {
            RecoveryAction::NodeReboot
        }
        sys::nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_DRAIN_P2P => {
            RecoveryAction::DrainP2p
        }
        sys::nvmlDeviceGpuRecoveryAction_s_NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET => {
            RecoveryAction::DrainAndReset
        }
        other => RecoveryAction::Other(other),
    })
}

/// What one NVLink carries in one direction, in bytes a second.
pub(super) fn nvlink_bytes_per_second(device: &Device<'_>) -> Result<u64, NvmlError> {
    let megabytes = field(device, sys::field_id::NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON)?;
    Ok(megabytes.saturating_mul(1_000_000))
}

fn field(device: &Device<'_>, id: u32) -> Result<u64, NvmlError> {
    let mut answers = device.field_values_for(&[FieldId(id)])?;
    match answers.pop().ok_or(NvmlError::NoData)??.value? {
        SampleValue::U32(value) => Ok(value.into()),
        SampleValue::U64(value) => Ok(value),
        // Not a number that was asked for, and nothing against the GPU.
        SampleValue::I64(value) => u64::try_from(value).map_err(|_| NvmlError::NoData),
        SampleValue::F64(_) => Err(NvmlError::NoData),
    }
}

/// The NVLink network across nodes that the GPU has joined; `None`: it has joined none.
///
/// The versioned function came with driver 545; older ones have another one.
pub(super) fn fabric(device: &Device<'_>) -> Result<Option<Fabric>, NvmlError> {
    match fabric_v2(device) {
        Err(error) if is_too_new(&error) => fabric_v1(device),
        answer => answer,
    }
}

fn fabric_v2(device: &Device<'_>) -> Result<Option<Fabric>, NvmlError> {
    let symbol = nvml_sym(device.nvml().lib().nvmlDeviceGetGpuFabricInfoV.as_ref())?;
    // SAFETY: all zero is a valid value of this struct of numbers.
    let mut info: sys::nvmlGpuFabricInfoV_t = unsafe { std::mem::zeroed() };
    // The oldest version that knows all that is asked; a longer struct begins with it.
    info.version = version_of::<sys::nvmlGpuFabricInfo_v2_t>(2);
    // SAFETY: the handle is of this library; `info` is no shorter than its version says.
    nvml_try(unsafe { symbol(device.handle(), &mut info) })?;
    Ok(joined(info.state, info.status, info.clusterUuid, info.cliqueId))
}

fn fabric_v1(device: &Device<'_>) -> Result<Option<Fabric>, NvmlError> {
    let symbol = nvml_sym(device.nvml().lib().nvmlDeviceGetGpuFabricInfo.as_ref())?;
    // SAFETY: all zero is a valid value of this struct of numbers.
    let mut info: sys::nvmlGpuFabricInfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the handle is of this library; `info` is a struct of the type that it fills.
    nvml_try(unsafe { symbol(device.handle(), &mut info) })?;
    Ok(joined(info.state, info.status, info.clusterUuid, info.cliqueId))
}

fn joined(state: u8, status: u32, uuid: [u8; 16], clique_id: u32) -> Option<Fabric> {
    // GPUs on the NVSwitches of one node have completed, too, and no network's name.
    let complete = u32::from(state) == sys::NVML_GPU_FABRIC_STATE_COMPLETED
        && status == sys::nvmlReturn_enum_NVML_SUCCESS
        && uuid != [0; 16];
    complete.then(|| {
        let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let cluster_uuid =
            [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
        Fabric { cluster_uuid, clique_id }
    })
}

/// The GPU instance that a MIG device is in.
pub(super) fn gpu_instance_id(part: &Device<'_>) -> Result<u32, NvmlError> {
    let symbol = nvml_sym(part.nvml().lib().nvmlDeviceGetGpuInstanceId.as_ref())?;
    let mut id = 0;
    // SAFETY: the handle is of this library, `id` is ours to write.
    nvml_try(unsafe { symbol(part.handle(), &mut id) })?;
    Ok(id)
}

/// The compute instance that a MIG device is.
pub(super) fn compute_instance_id(part: &Device<'_>) -> Result<u32, NvmlError> {
    let symbol = nvml_sym(part.nvml().lib().nvmlDeviceGetComputeInstanceId.as_ref())?;
    let mut id = 0;
    // SAFETY: the handle is of this library, `id` is ours to write.
    nvml_try(unsafe { symbol(part.handle(), &mut id) })?;
    Ok(id)
}

/// The size of a MIG device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PartSize {
    pub(super) multiprocessors: u32,
    pub(super) gpu_slices: u32,
    pub(super) compute_slices: u32,
    pub(super) memory_bytes: u64,
}

pub(super) fn part_size(part: &Device<'_>) -> Result<PartSize, NvmlError> {
    let symbol = nvml_sym(part.nvml().lib().nvmlDeviceGetAttributes_v2.as_ref())?;
    // SAFETY: all zero is a valid value of this struct of numbers.
    let mut attributes: sys::nvmlDeviceAttributes_t = unsafe { std::mem::zeroed() };
    // SAFETY: the handle is of this library; the struct is of the type that it fills.
    nvml_try(unsafe { symbol(part.handle(), &mut attributes) })?;
    Ok(PartSize {
        multiprocessors: attributes.multiprocessorCount,
        gpu_slices: attributes.gpuInstanceSliceCount,
        compute_slices: attributes.computeInstanceSliceCount,
        memory_bytes: attributes.memorySizeMB.saturating_mul(1 << 20),
    })
}

/// A size that a GPU can be cut into, as the driver knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProfileInfo {
    pub(super) id: u32,
    /// `None`: a driver older than 510.
    pub(super) name: Option<String>,
    pub(super) slices: u32,
    pub(super) instances: u32,
    pub(super) memory_bytes: u64,
}

/// How many kinds of profile the header has.
pub(super) const PROFILES: u32 = sys::NVML_GPU_INSTANCE_PROFILE_COUNT;

pub(super) fn profile(device: &Device<'_>, profile: u32) -> Result<ProfileInfo, NvmlError> {
    match profile_v2(device, profile) {
        Err(error) if is_too_new(&error) => profile_v1(device, profile),
        answer => answer,
    }
}

fn profile_v2(device: &Device<'_>, profile: u32) -> Result<ProfileInfo, NvmlError> {
    let lib = device.nvml().lib();
    let symbol = nvml_sym(lib.nvmlDeviceGetGpuInstanceProfileInfoV.as_ref())?;
    // SAFETY: all zero is a valid value of this struct of numbers.
    let mut info: sys::nvmlGpuInstanceProfileInfo_v2_t = unsafe { std::mem::zeroed() };
    info.version = version_of::<sys::nvmlGpuInstanceProfileInfo_v2_t>(2);
    // SAFETY: the handle is of this library; the struct is of the version that it says.
    nvml_try(unsafe { symbol(device.handle(), profile, &mut info) })?;
    Ok(ProfileInfo {
        id: info.id,
        name: Some(text(&info.name)).filter(|name| !name.is_empty()),
        slices: info.sliceCount,
        instances: info.instanceCount,
        memory_bytes: info.memorySizeMB.saturating_mul(1 << 20),
    })
}

fn profile_v1(device: &Device<'_>, profile: u32) -> Result<ProfileInfo, NvmlError> {
    let lib = device.nvml().lib();
    let symbol = nvml_sym(lib.nvmlDeviceGetGpuInstanceProfileInfo.as_ref())?;
    // SAFETY: all zero is a valid value of this struct of numbers.
    let mut info: sys::nvmlGpuInstanceProfileInfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the handle is of this library; the struct is of the type that it fills.
    nvml_try(unsafe { symbol(device.handle(), profile, &mut info) })?;
    Ok(ProfileInfo {
        id: info.id,
        name: None,
        slices: info.sliceCount,
        instances: info.instanceCount,
        memory_bytes: info.memorySizeMB.saturating_mul(1 << 20),
    })
}

/// How many more GPU instances of a profile fit.
pub(super) fn remaining_instances(device: &Device<'_>, id: u32) -> Result<u32, NvmlError> {
    let lib = device.nvml().lib();
    let symbol = nvml_sym(lib.nvmlDeviceGetGpuInstanceRemainingCapacity.as_ref())?;
    let mut count = 0;
    // SAFETY: the handle is of this library, `count` is ours to write.
    nvml_try(unsafe { symbol(device.handle(), id, &mut count) })?;
    Ok(count)
}

/// A C text in a field of fixed length.
fn text(chars: &[c_char]) -> String {
    #[allow(clippy::cast_sign_loss, reason = "a C char is a byte")]
    let bytes = chars.iter().take_while(|char| **char != 0).map(|char| *char as u8).collect();
    String::from_utf8(bytes).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes in the published header, on a 64-bit machine.
    #[test]
    fn structs_are_as_long_as_the_header_says() {
        assert_eq!(size_of::<sys::nvmlGpuFabricInfo_v2_t>(), 36);
        assert_eq!(size_of::<sys::nvmlDeviceAttributes_t>(), 40);
        assert_eq!(size_of::<sys::nvmlGpuInstanceProfileInfo_t>(), 48);
        assert_eq!(size_of::<sys::nvmlGpuInstanceProfileInfo_v2_t>(), 152);
        assert_eq!(size_of::<sys::nvmlEventData_t>(), 32);
        assert_eq!(size_of::<sys::nvmlMemory_v2_t>(), 40);
        assert_eq!(size_of::<sys::nvmlProcessInfo_t>(), 24);
        assert_eq!(size_of::<sys::nvmlPciInfo_t>(), 68);
        assert_eq!(size_of::<sys::nvmlGpuFabricInfo_t>(), 28);
        assert_eq!(size_of::<sys::nvmlBAR1Memory_t>(), 24);
        assert_eq!(size_of::<sys::nvmlFieldValue_t>(), 40);
        assert_eq!(version_of::<sys::nvmlGpuFabricInfo_v2_t>(2), 0x0200_0024);
    }
}
