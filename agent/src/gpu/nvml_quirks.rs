//! Where nvml-wrapper 0.13 does not do what is needed, each with its way around.
//!
//! Two faults need no code here. `EventSet` panics when it is dropped and the library lacks
//! `nvmlEventSetFree`: [`super::nvml_events`] calls the library itself.
//! `possible_placements` returns nothing: [`super::nvml_mig`] asks how many more parts fit,
//! which is what is needed of it.
//!
//! Everything here is to be deleted once the wrapper does it; the tests against
//! the fake library say what "it" is.

// Raw calls in place of the wrapper's.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::Deref;

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings as sys;

use super::inventory::{Architecture, GpuMemory};

/// An open NVML that can be dropped.
///
/// `Nvml`'s own `drop` (and its `shutdown`, on the way out) calls `nvmlShutdown`
/// through a `Result` that it unwraps: where the library has no such symbol, that
/// is a panic. Such a library stays loaded instead.
#[derive(Debug)]
pub(super) struct OpenNvml(ManuallyDrop<Nvml>);

impl OpenNvml {
    pub(super) fn new(nvml: Nvml) -> Self {
        Self(ManuallyDrop::new(nvml))
    }
}

impl Deref for OpenNvml {
    type Target = Nvml;

    fn deref(&self) -> &Nvml {
        &self.0
    }
}

impl Drop for OpenNvml {
    fn drop(&mut self) {
        if self.0.lib().nvmlShutdown.is_ok() {
            // SAFETY: dropped once, here, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// The GPU's memory.
///
/// `Device::memory_info` knows only `nvmlDeviceGetMemoryInfo_v2`, which came with
/// driver 510. Older ones have the first version, which counts what is reserved
/// as used. The size of BAR1 is asked apart.
pub(super) fn memory(device: &Device<'_>) -> Result<GpuMemory, NvmlError> {
    match device.memory_info() {
        Ok(info) => Ok(GpuMemory {
            total_bytes: info.total,
            used_bytes: info.used,
            free_bytes: info.free,
            reserved_bytes: Some(info.reserved),
            bar1_total_bytes: None,
            bar1_used_bytes: None,
        }),
        Err(error) if is_too_new(&error) => memory_v1(device),
        Err(error) => Err(error),
    }
}

/// Whether the driver is too old for what it was asked, so that an older form may serve.
pub(super) fn is_too_new(error: &NvmlError) -> bool {
    const MISMATCH: u32 = sys::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    matches!(
        error,
        NvmlError::FailedToLoadSymbol(_)
            | NvmlError::FunctionNotFound
            | NvmlError::UnexpectedVariant(MISMATCH)
    )
}

fn memory_v1(device: &Device<'_>) -> Result<GpuMemory, NvmlError> {
    let symbol = nvml_sym(device.nvml().lib().nvmlDeviceGetMemoryInfo.as_ref())?;
    let mut info = sys::nvmlMemory_t { total: 0, free: 0, used: 0 };
    // SAFETY: the handle is of this library, which the device borrows and so keeps
    // open; `info` is a struct of the type that this function fills.
    nvml_try(unsafe { symbol(device.handle(), &mut info) })?;
    Ok(GpuMemory {
        total_bytes: info.total,
        used_bytes: info.used,
        free_bytes: info.free,
        reserved_bytes: None,
        bar1_total_bytes: None,
        bar1_used_bytes: None,
    })
}

/// Compute processes.
///
/// `Device::running_compute_processes` knows only the third version, which came with driver
/// 510; the second tells the same.
pub(super) fn processes(device: &Device<'_>) -> Result<Vec<ProcessInfo>, NvmlError> {
    match device.running_compute_processes() {
        Err(error) if is_too_new(&error) => device.running_compute_processes_v2(),
        answer => answer,
    }
}

/// The chip's generation.
///
/// A generation newer than the wrapper is its error `UnexpectedVariant`; the code
/// in it is what there is to know.
pub(super) fn architecture(device: &Device<'_>) -> Result<Architecture, NvmlError> {
    use nvml_wrapper::enums::device::DeviceArchitecture;
    match device.architecture() {
        Ok(known) => Ok(Architecture {
            name: (known != DeviceArchitecture::Unknown).then(|| known.to_string()),
            code: known.as_c(),
        }),
        Err(NvmlError::UnexpectedVariant(code)) => Ok(Architecture { name: None, code }),
        Err(error) => Err(error),
    }
}

/// The product line, by the names that `nvidia-smi` uses; the same fault, and no
/// names in the wrapper.
pub(super) fn brand(device: &Device<'_>) -> Result<String, NvmlError> {
    use nvml_wrapper::enum_wrappers::device::Brand;
    let name = match device.brand() {
        Ok(Brand::Unknown) => "Unknown",
        Ok(Brand::Quadro) => "Quadro",
        Ok(Brand::Tesla) => "Tesla",
        Ok(Brand::NVS) => "NVS",
        Ok(Brand::GRID) => "GRID",
        Ok(Brand::GeForce) => "GeForce",
        Ok(Brand::Titan) => "Titan",
        Ok(Brand::VApps) => "NVIDIA Virtual Applications",
        Ok(Brand::VPC) => "NVIDIA Virtual PC",
        Ok(Brand::VCS) => "NVIDIA Virtual Compute Server",
        Ok(Brand::VWS) => "NVIDIA RTX Virtual Workstation",
        Ok(Brand::CloudGaming | Brand::VGaming) => "NVIDIA Cloud Gaming",
        Ok(Brand::QuadroRTX) => "Quadro RTX",
        Ok(Brand::NvidiaRTX) => "NVIDIA RTX",
        Ok(Brand::Nvidia) => "NVIDIA",
        Ok(Brand::GeForceRTX) => "GeForce RTX",
        Ok(Brand::TitanRTX) => "Titan RTX",
        Err(NvmlError::UnexpectedVariant(code)) => return Ok(format!("unknown ({code})")),
        Err(error) => return Err(error),
    };
    Ok(name.to_owned())
}

/// Whether an NVLink leads into a switch, as opposed to another GPU.
///
/// `NvLink::remote_device_type` lets the library write into a copy and always answers
/// "unknown".
pub(super) fn leads_to_switch(device: &Device<'_>, link: u32) -> Result<bool, NvmlError> {
    let symbol = nvml_sym(device.nvml().lib().nvmlDeviceGetNvLinkRemoteDeviceType.as_ref())?;
    let mut kind = 0;
    // SAFETY: the handle is of this library, which the device borrows and so keeps open;
    // `kind` is ours to write.
    nvml_try(unsafe { symbol(device.handle(), link, &mut kind) })?;
    Ok(kind == sys::nvmlIntNvLinkDeviceType_enum_NVML_NVLINK_DEVICE_TYPE_SWITCH)
}

/// What an error says.
///
/// The wrapper knows return codes up to 22 and calls the others "unexpected enum
/// variant"; those that the header names are named here.
pub(super) fn describe(error: &NvmlError) -> String {
    let name = match error {
        NvmlError::UnexpectedVariant(code) => match *code {
            sys::nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_RESOURCES => "out of resources",
            sys::nvmlReturn_enum_NVML_ERROR_FREQ_NOT_SUPPORTED => "frequency not supported",
            sys::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH => {
                "a struct's version is not known to the driver"
            }
            sys::nvmlReturn_enum_NVML_ERROR_DEPRECATED => "the function is no longer served",
            sys::nvmlReturn_enum_NVML_ERROR_NOT_READY => "not ready",
            sys::nvmlReturn_enum_NVML_ERROR_GPU_NOT_FOUND => "no gpu found",
            sys::nvmlReturn_enum_NVML_ERROR_INVALID_STATE => "in the wrong state",
            code => return format!("nvml error {code}"),
        },
        other => return other.to_string(),
    };
    name.to_owned()
}

/// Whether `error` says that there is no GPU at all (code 28, new to the wrapper).
pub(super) fn is_no_gpu(error: &NvmlError) -> bool {
    matches!(error, NvmlError::UnexpectedVariant(sys::nvmlReturn_enum_NVML_ERROR_GPU_NOT_FOUND))
}

#[cfg(test)]
mod tests {
    use fake_nvml::{Device as FakeDevice, FakeNvml, Scenario};

    use super::*;

    fn open(fake: &FakeNvml) -> OpenNvml {
        let path = fake.library();
        OpenNvml::new(Nvml::builder().lib_path(path.as_os_str()).init().unwrap())
    }

    #[test]
    fn memory_counts_what_is_reserved_apart() {
        let fake = FakeNvml::new(&Scenario::h100s(1));
        let nvml = open(&fake);
        let memory = memory(&nvml.device_by_index(0).unwrap()).unwrap();
        assert_eq!(memory.total_bytes, 81_559 << 20);
        assert_eq!(memory.reserved_bytes, Some(551 << 20));
        assert_eq!(memory.used_bytes, 0);
        assert_eq!(memory.free_bytes, 81_008 << 20);
    }

    #[test]
    fn memory_of_a_driver_without_the_second_version_is_read_by_the_first() {
        let missing = ["nvmlDeviceGetMemoryInfo_v2"];
        let fake = FakeNvml::without_symbols(&Scenario::h100s(1), &missing);
        let nvml = open(&fake);
        let device = nvml.device_by_index(0).unwrap();
        let wrapper = device.memory_info().unwrap_err();
        assert!(matches!(wrapper, NvmlError::FailedToLoadSymbol(_)), "{wrapper:?}: fault is gone");

        let memory = memory(&device).unwrap();
        assert_eq!(memory.total_bytes, 81_559 << 20);
        assert_eq!(memory.reserved_bytes, None);
        assert_eq!(memory.used_bytes, 551 << 20);
        assert_eq!(memory.free_bytes, 81_008 << 20);
    }

    #[test]
    fn memory_of_a_driver_that_refuses_the_second_version_is_read_by_the_first() {
        let scenario = Scenario::h100s(1).failing(
            "nvmlDeviceGetMemoryInfo_v2",
            sys::nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        );
        let fake = FakeNvml::new(&scenario);
        let nvml = open(&fake);
        let memory = memory(&nvml.device_by_index(0).unwrap()).unwrap();
        assert_eq!(memory.total_bytes, 81_559 << 20);
        assert_eq!(memory.reserved_bytes, None);
    }

    #[test]
    fn an_unknown_generation_and_brand_keep_their_codes() {
        let device = FakeDevice { architecture: 77, brand: 99, ..FakeDevice::h100(0) };
        let fake = FakeNvml::new(&Scenario { devices: vec![device], ..Scenario::default() });
        let nvml = open(&fake);
        let device = nvml.device_by_index(0).unwrap();
        let wrapper = device.architecture().unwrap_err();
        assert!(matches!(wrapper, NvmlError::UnexpectedVariant(77)), "{wrapper:?}: fault is gone");

        assert_eq!(architecture(&device).unwrap(), Architecture { name: None, code: 77 });
        assert_eq!(brand(&device).unwrap(), "unknown (99)");
    }

    #[test]
    fn a_library_without_shutdown_is_dropped_without_a_panic() {
        let fake = FakeNvml::without_symbols(&Scenario::h100s(1), &["nvmlShutdown"]);
        let nvml = open(&fake);
        assert!(nvml.lib().nvmlShutdown.is_err());
        drop(nvml);
    }

    #[test]
    fn an_nvlink_tells_where_it_leads() {
        use nvml_wrapper::enum_wrappers::nv_link::IntDeviceType;
        let fake = FakeNvml::new(&Scenario::h100s(1));
        let nvml = open(&fake);
        let device = nvml.device_by_index(0).unwrap();
        let link = device.link_wrapper_for(0);
        let wrapper = link.remote_device_type(0).unwrap();
        assert!(matches!(wrapper, IntDeviceType::Unknown), "{wrapper:?}: fault is gone");
        assert!(leads_to_switch(&device, 0).unwrap());
    }

    #[test]
    fn newer_return_codes_are_named() {
        let text = |code| describe(&NvmlError::from(code));
        assert_eq!(text(27), "not ready");
        assert_eq!(text(28), "no gpu found");
        assert_eq!(text(1234), "nvml error 1234");
        assert_eq!(text(15), "device fell off the bus or has otherwise become inacessible");
        assert!(is_no_gpu(&NvmlError::from(28)));
    }
}
