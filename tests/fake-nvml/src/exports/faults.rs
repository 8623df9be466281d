//! What a GPU has been through, and its link to the host.

use super::*;

value!(nvmlDeviceGetCurrentClocksThrottleReasons, u64, |gpu: &Device| {
    supported(gpu.throttle_reasons)
});
// The newer name of the same.
value!(nvmlDeviceGetCurrentClocksEventReasons, u64, |gpu: &Device| {
    supported(gpu.throttle_reasons)
});
value!(nvmlDeviceGetCurrPcieLinkGeneration, c_uint, |gpu: &Device| {
    supported(gpu.pcie.map(|pcie| pcie[0]))
});
value!(nvmlDeviceGetCurrPcieLinkWidth, c_uint, |gpu: &Device| {
    supported(gpu.pcie.map(|pcie| pcie[1]))
});
value!(nvmlDeviceGetMaxPcieLinkGeneration, c_uint, |gpu: &Device| {
    supported(gpu.pcie.map(|pcie| pcie[2]))
});
value!(nvmlDeviceGetMaxPcieLinkWidth, c_uint, |gpu: &Device| {
    supported(gpu.pcie.map(|pcie| pcie[3]))
});

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEccErrors(
    device: nvmlDevice_t,
    kind: nvmlMemoryErrorType_t,
    counter: nvmlEccCounterType_t,
    to: *mut u64,
) -> nvmlReturn_t {
    let answer = of("nvmlDeviceGetTotalEccErrors", device, |gpu| {
        let known = kind == nvmlMemoryErrorType_enum_NVML_MEMORY_ERROR_TYPE_UNCORRECTED
            && counter == nvmlEccCounterType_enum_NVML_VOLATILE_ECC;
        if known { supported(gpu.ecc_uncorrected) } else { Ok(0) }
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetRemappedRows(
    device: nvmlDevice_t,
    correctable: *mut c_uint,
    uncorrectable: *mut c_uint,
    pending: *mut c_uint,
    failed: *mut c_uint,
) -> nvmlReturn_t {
    let rows = of("nvmlDeviceGetRemappedRows", device, |gpu| supported(gpu.remapped_rows));
    match rows {
        Err(code) => code,
        // SAFETY: NVML's contract: all four are valid.
        Ok((rows, is_pending, has_failed)) => unsafe {
            let first = put2(correctable, uncorrectable, Ok((0, rows)));
            if first != nvmlReturn_enum_NVML_SUCCESS {
                return first;
            }
            put2(pending, failed, Ok((is_pending.into(), has_failed.into())))
        },
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(
    device: nvmlDevice_t,
    count: c_int,
    values: *mut nvmlFieldValue_t,
) -> nvmlReturn_t {
    code(of("nvmlDeviceGetFieldValues", device, |gpu| {
        if values.is_null() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        let count = usize::try_from(count).unwrap_or(0);
        // SAFETY: NVML's contract: `values` holds `count` structs, of which the caller has
        // written `fieldId`.
        for value in unsafe { std::slice::from_raw_parts_mut(values, count) } {
            let number = match value.fieldId {
                field_id::NVML_FI_DEV_GET_GPU_RECOVERY_ACTION => gpu.recovery_action,
                field_id::NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON => gpu.nvlink_megabytes_per_second,
                _ => None,
            };
            value.valueType = nvmlValueType_enum_NVML_VALUE_TYPE_UNSIGNED_INT;
            value.value.uiVal = number.unwrap_or(0);
            value.nvmlReturn = code(supported(number).map(drop));
        }
        Ok(())
    }))
}
