//! Parts of GPUs (MIG).

use super::*;
use crate::scenario::MigProfile;

/// A function that is for parts alone.
fn of_part<T>(
    function: &str,
    handle: nvmlDevice_t,
    answer: impl FnOnce(&MigDevice) -> T,
) -> Answer<T> {
    of_any(function, handle, |_, part| {
        part.map(answer).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)
    })
}

/// A function of a size of parts.
fn of_profile<T>(
    function: &str,
    device: nvmlDevice_t,
    is: impl Fn(&MigProfile) -> bool,
    answer: impl FnOnce(&MigProfile) -> T,
) -> Answer<T> {
    of(function, device, |gpu| {
        supported(gpu.mig)?;
        supported(gpu.mig_profiles.iter().find(|profile| is(profile)).map(answer))
    })
}

value!(nvmlDeviceGetMaxMigDeviceCount, c_uint, |gpu: &Device| {
    Ok(if gpu.mig.is_some() { 7 } else { 0 })
});

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigDeviceHandleByIndex(
    device: nvmlDevice_t,
    slot: c_uint,
    to: *mut nvmlDevice_t,
) -> nvmlReturn_t {
    let answer = of("nvmlDeviceGetMigDeviceHandleByIndex", device, |gpu| {
        let enabled = supported(gpu.mig)?.current;
        if !enabled || gpu.mig_devices.len() <= slot as usize {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_FOUND);
        }
        let part = (slot as usize + 1) << PART_SHIFT;
        Ok(std::ptr::without_provenance_mut(device.addr() | part))
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuInstanceId(
    part: nvmlDevice_t,
    to: *mut c_uint,
) -> nvmlReturn_t {
    let answer = of_part("nvmlDeviceGetGpuInstanceId", part, |part| part.gpu_instance);
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeInstanceId(
    part: nvmlDevice_t,
    to: *mut c_uint,
) -> nvmlReturn_t {
    let answer = of_part("nvmlDeviceGetComputeInstanceId", part, |part| part.compute_instance);
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetAttributes_v2(
    part: nvmlDevice_t,
    to: *mut nvmlDeviceAttributes_t,
) -> nvmlReturn_t {
    let answer = of_part("nvmlDeviceGetAttributes_v2", part, |part| nvmlDeviceAttributes_t {
        multiprocessorCount: part.multiprocessors,
        sharedCopyEngineCount: 1,
        sharedDecoderCount: 1,
        sharedEncoderCount: 0,
        sharedJpegCount: 1,
        sharedOfaCount: 0,
        gpuInstanceSliceCount: part.slices.1,
        computeInstanceSliceCount: part.slices.0,
        memorySizeMB: part.memory.total >> 20,
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuInstanceProfileInfo(
    device: nvmlDevice_t,
    profile: c_uint,
    to: *mut nvmlGpuInstanceProfileInfo_t,
) -> nvmlReturn_t {
    let answer = of_profile(
        "nvmlDeviceGetGpuInstanceProfileInfo",
        device,
        |known| known.index == profile,
        |profile| nvmlGpuInstanceProfileInfo_t {
            id: profile.id,
            isP2pSupported: 0,
            sliceCount: profile.slices,
            instanceCount: profile.instances,
            multiprocessorCount: 16 * profile.slices,
            copyEngineCount: 1,
            decoderCount: 1,
            encoderCount: 0,
            jpegCount: 1,
            ofaCount: 0,
            memorySizeMB: profile.memory_mib,
        },
    );
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuInstanceProfileInfoV(
    device: nvmlDevice_t,
    profile: c_uint,
    to: *mut nvmlGpuInstanceProfileInfo_v2_t,
) -> nvmlReturn_t {
    const VERSION: c_uint = size_of::<nvmlGpuInstanceProfileInfo_v2_t>() as c_uint | (2 << 24);
    let answer = of_profile(
        "nvmlDeviceGetGpuInstanceProfileInfoV",
        device,
        |known| known.index == profile,
        |profile| nvmlGpuInstanceProfileInfo_v2_t {
            version: VERSION,
            id: profile.id,
            isP2pSupported: 0,
            sliceCount: profile.slices,
            instanceCount: profile.instances,
            multiprocessorCount: 16 * profile.slices,
            copyEngineCount: 1,
            decoderCount: 1,
            encoderCount: 0,
            jpegCount: 1,
            ofaCount: 0,
            memorySizeMB: profile.memory_mib,
            name: field(&profile.name),
        },
    );
    // SAFETY: NVML's contract: `to` is null or points to a struct whose `version` the caller
    // has set.
    if to.is_null() || unsafe { (*to).version } != VERSION {
        return nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    }
    // SAFETY: as above.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuInstanceRemainingCapacity(
    device: nvmlDevice_t,
    id: c_uint,
    to: *mut c_uint,
) -> nvmlReturn_t {
    let function = "nvmlDeviceGetGpuInstanceRemainingCapacity";
    let answer = of_profile(function, device, |known| known.id == id, |profile| profile.remaining);
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}
