//! How GPUs reach each other.

use super::*;
use crate::scenario::NvLink;

/// A function of two GPUs.
fn of_two<T>(
    function: &str,
    first: nvmlDevice_t,
    second: nvmlDevice_t,
    answer: impl FnOnce(&Device, &Device) -> T,
) -> Answer<T> {
    let other = of(function, second, |gpu| Ok(gpu.clone()))?;
    of(function, first, |gpu| Ok(answer(gpu, &other)))
}

/// A function of an NVLink.
fn of_link<T>(
    function: &str,
    device: nvmlDevice_t,
    link: c_uint,
    answer: impl FnOnce(Option<NvLink>, &Scenario) -> Answer<T>,
) -> Answer<T> {
    if link >= NVML_NVLINK_MAX_LINKS {
        return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
    }
    let scenario = system(function, false)?;
    of(function, device, |gpu| {
        if gpu.nvlinks.is_empty() {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED);
        }
        answer(gpu.nvlinks.get(link as usize).copied(), &scenario)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTopologyCommonAncestor(
    first: nvmlDevice_t,
    second: nvmlDevice_t,
    to: *mut nvmlGpuTopologyLevel_t,
) -> nvmlReturn_t {
    let answer = of_two("nvmlDeviceGetTopologyCommonAncestor", first, second, |a, b| {
        if a.pcie_switch.is_some() && a.pcie_switch == b.pcie_switch {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_SINGLE
        } else if a.numa_node == b.numa_node {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_NODE
        } else {
            nvmlGpuLevel_enum_NVML_TOPOLOGY_SYSTEM
        }
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetP2PStatus(
    first: nvmlDevice_t,
    second: nvmlDevice_t,
    _capability: nvmlGpuP2PCapsIndex_t,
    to: *mut nvmlGpuP2PStatus_t,
) -> nvmlReturn_t {
    let answer = of_two("nvmlDeviceGetP2PStatus", first, second, |a, b| {
        if !a.nvlinks.is_empty() && !b.nvlinks.is_empty() || a.numa_node == b.numa_node {
            nvmlGpuP2PStatus_enum_NVML_P2P_STATUS_OK
        } else {
            nvmlGpuP2PStatus_enum_NVML_P2P_STATUS_NOT_SUPPORTED
        }
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkState(
    device: nvmlDevice_t,
    link: c_uint,
    to: *mut nvmlEnableState_t,
) -> nvmlReturn_t {
    let answer =
        of_link("nvmlDeviceGetNvLinkState", device, link, |link, _| Ok(link.is_some().into()));
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkRemoteDeviceType(
    device: nvmlDevice_t,
    link: c_uint,
    to: *mut nvmlIntNvLinkDeviceType_t,
) -> nvmlReturn_t {
    let answer = of_link("nvmlDeviceGetNvLinkRemoteDeviceType", device, link, |link, _| {
        Ok(match supported(link)? {
            NvLink::Gpu(_) => nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_GPU,
            NvLink::Switch(_) => nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_SWITCH,
        })
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(
    device: nvmlDevice_t,
    link: c_uint,
    to: *mut nvmlPciInfo_t,
) -> nvmlReturn_t {
    let answer = of_link("nvmlDeviceGetNvLinkRemotePciInfo_v2", device, link, |link, scenario| {
        let (domain, bus, device) = match supported(link)? {
            NvLink::Switch(bus) => (0, bus, 0),
            NvLink::Gpu(index) => {
                let gpu = scenario.devices.get(index as usize);
                gpu.ok_or(nvmlReturn_enum_NVML_ERROR_UNKNOWN)?.pci
            }
        };
        Ok(nvmlPciInfo_t {
            busIdLegacy: field(&format!("{domain:04X}:{bus:02X}:{device:02X}.0")),
            domain,
            bus,
            device,
            pciDeviceId: 0,
            pciSubSystemId: 0,
            busId: field(&format!("{domain:08X}:{bus:02X}:{device:02X}.0")),
        })
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

fn fabric(function: &str, device: nvmlDevice_t) -> Answer<nvmlGpuFabricInfo_v2_t> {
    of(function, device, |gpu| {
        let (clusterUuid, cliqueId) = gpu.fabric.unwrap_or_default();
        let state = match gpu.fabric {
            Some(_) => NVML_GPU_FABRIC_STATE_COMPLETED,
            None => NVML_GPU_FABRIC_STATE_NOT_SUPPORTED,
        };
        Ok(nvmlGpuFabricInfo_v2_t {
            version: 0,
            clusterUuid,
            status: nvmlReturn_enum_NVML_SUCCESS,
            cliqueId,
            state: state as nvmlGpuFabricState_t,
            healthMask: 0,
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuFabricInfo(
    device: nvmlDevice_t,
    to: *mut nvmlGpuFabricInfo_t,
) -> nvmlReturn_t {
    let answer = fabric("nvmlDeviceGetGpuFabricInfo", device).map(|info| nvmlGpuFabricInfo_t {
        clusterUuid: info.clusterUuid,
        status: info.status,
        cliqueId: info.cliqueId,
        state: info.state,
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetGpuFabricInfoV(
    device: nvmlDevice_t,
    to: *mut nvmlGpuFabricInfo_v2_t,
) -> nvmlReturn_t {
    const VERSION: c_uint = size_of::<nvmlGpuFabricInfo_v2_t>() as c_uint | (2 << 24);
    let answer = fabric("nvmlDeviceGetGpuFabricInfoV", device).and_then(|info| {
        // SAFETY: NVML's contract: `to` is null or points to a struct whose `version` the
        // caller has set.
        if to.is_null() || unsafe { (*to).version } != VERSION {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        Ok(nvmlGpuFabricInfo_v2_t { version: VERSION, ..info })
    });
    // SAFETY: as above; the struct is of the version that the caller asked for.
    unsafe { put(to, answer) }
}
