//! The C functions, by NVML's published names and signatures.
//!
//! Each one asks the scenario first whether it shall hang or fail, then whether
//! the library is initialised, then answers. Device handles are index + 1; a part's handle
//! has slot + 1 in its upper half.

// The file is a C interface: it takes the caller's pointers and gives out
// unmangled names, which is what `unsafe_code` is about.
#![allow(unsafe_code)]
// The names and contracts are NVML's own; the caller is whoever loads the library.
#![allow(non_snake_case, non_upper_case_globals, missing_docs, unreachable_pub)]
#![allow(clippy::missing_safety_doc)]

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint};
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nvml_wrapper_sys::bindings::*;

use crate::copy::scenario_beside;
use crate::scenario::{Device, Memory, MigDevice, Scenario};

/// Clients between init and shutdown, and what they are told.
struct State {
    clients: u32,
    scenario: Option<Arc<Scenario>>,
    /// What the real library holds open from init to shutdown.
    control: Option<File>,
}

static STATE: Mutex<State> = Mutex::new(State { clients: 0, scenario: None, control: None });

/// Where a part's slot begins in its handle.
const PART_SHIFT: u32 = 16;

/// A call's outcome before it becomes a code.
type Answer<T> = Result<T, nvmlReturn_t>;

fn with_state<T>(f: impl FnOnce(&mut State) -> T) -> T {
    f(&mut STATE.lock().unwrap_or_else(PoisonError::into_inner))
}

/// This library's own path, as the loader was given it.
fn own_path() -> Option<PathBuf> {
    // SAFETY: all-zero is a valid Dl_info (null pointers).
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: the address is one of this library, `info` is ours to write.
    let found = unsafe { libc::dladdr((&raw const STATE).cast(), &mut info) };
    if found == 0 || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: dladdr gives a NUL-terminated name that lives as long as the library.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    Some(Path::new(OsStr::from_bytes(name.to_bytes())).to_owned())
}

/// Where the scenario is.
fn path() -> Answer<PathBuf> {
    match std::env::var_os("FAKE_NVML_SCENARIO") {
        Some(path) => Ok(PathBuf::from(path)),
        None => Ok(scenario_beside(&own_path().ok_or(nvmlReturn_enum_NVML_ERROR_UNKNOWN)?)),
    }
}

/// Reads the scenario's file. A file that cannot be read or parsed is a broken
/// test: said on stderr, and every call fails.
fn load() -> Answer<Arc<Scenario>> {
    let path = path()?;
    let parsed = std::fs::read(&path)
        .map_err(|error| error.to_string())
        .and_then(|json| serde_json::from_slice(&json).map_err(|error| error.to_string()));
    match parsed {
        Ok(scenario) => Ok(Arc::new(scenario)),
        Err(error) => {
            eprintln!("fake NVML: read scenario {}: {error}", path.display());
            Err(nvmlReturn_enum_NVML_ERROR_UNKNOWN)
        }
    }
}

fn hang(ms: Option<&u64>) {
    if let Some(ms) = ms {
        std::thread::sleep(Duration::from_millis(*ms));
    }
}

fn fail(code: Option<&u32>) -> Answer<()> {
    code.map_or(Ok(()), |code| Err(*code))
}

/// A function of the library as a whole; `fresh` reads the scenario again.
fn system(function: &str, fresh: bool) -> Answer<Arc<Scenario>> {
    let scenario = with_state(|state| {
        if state.clients == 0 {
            return Err(nvmlReturn_enum_NVML_ERROR_UNINITIALIZED);
        }
        if fresh {
            state.scenario = Some(load()?);
        }
        state.scenario.clone().ok_or(nvmlReturn_enum_NVML_ERROR_UNINITIALIZED)
    })?;
    // Outside of the lock: a hanging call must not hold up others.
    hang(scenario.hang_ms.get(function));
    fail(scenario.errors.get(function))?;
    Ok(scenario)
}

/// A function of the GPU at `index`.
fn at<T>(function: &str, index: usize, answer: impl FnOnce(&Device) -> Answer<T>) -> Answer<T> {
    let scenario = system(function, false)?;
    let device = scenario.devices.get(index).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
    hang(device.hang_ms.get(function).or_else(|| device.hang_ms.get("*")));
    fail(device.errors.get(function).or_else(|| device.errors.get("*")))?;
    answer(device)
}

/// A function of the GPU behind `handle`.
fn of<T>(
    function: &str,
    handle: nvmlDevice_t,
    answer: impl FnOnce(&Device) -> Answer<T>,
) -> Answer<T> {
    let index = handle.addr().checked_sub(1).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
    at(function, index, answer)
}

/// A function of the GPU or part behind `handle`.
fn of_any<T>(
    function: &str,
    handle: nvmlDevice_t,
    answer: impl FnOnce(&Device, Option<&MigDevice>) -> Answer<T>,
) -> Answer<T> {
    let invalid = nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT;
    let gpu = handle.addr() & ((1 << PART_SHIFT) - 1);
    let slot = handle.addr() >> PART_SHIFT;
    at(function, gpu.checked_sub(1).ok_or(invalid)?, |gpu| match slot.checked_sub(1) {
        None => answer(gpu, None),
        Some(slot) => {
            let enabled = gpu.mig.is_some_and(|mig| mig.current);
            fail(gpu.errors.get(&format!("part:{function}")))?;
            let part = gpu.mig_devices.get(slot).filter(|_| enabled);
            answer(gpu, Some(part.ok_or(invalid)?))
        }
    })
}

fn supported<T>(value: Option<T>) -> Answer<T> {
    value.ok_or(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED)
}

fn code(answer: Answer<()>) -> nvmlReturn_t {
    answer.err().unwrap_or(nvmlReturn_enum_NVML_SUCCESS)
}

/// Hands `answer` out through `to`.
///
/// SAFETY (of calling): `to` is null or valid for one write.
unsafe fn put<T>(to: *mut T, answer: Answer<T>) -> nvmlReturn_t {
    code(answer.and_then(|value| {
        if to.is_null() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        // SAFETY: not null, and the caller vouches for it.
        unsafe { to.write(value) };
        Ok(())
    }))
}

/// Hands two values out.
///
/// SAFETY (of calling): as for [`put`].
unsafe fn put2<T>(a: *mut T, b: *mut T, answer: Answer<(T, T)>) -> nvmlReturn_t {
    match answer {
        Err(code) => code,
        // SAFETY: the caller vouches for both.
        Ok((first, second)) => unsafe {
            let done = put(a, Ok(first));
            if done == nvmlReturn_enum_NVML_SUCCESS { put(b, Ok(second)) } else { done }
        },
    }
}

/// Hands a text out with its NUL, or says that it does not fit. U+FFFD stands for a byte that is
/// no UTF-8.
///
/// SAFETY (of calling): `to` is null or valid for `length` bytes.
unsafe fn put_text(to: *mut c_char, length: c_uint, answer: Answer<String>) -> nvmlReturn_t {
    code(answer.and_then(|text| {
        if to.is_null() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        }
        let text: Vec<u8> =
            text.split('\u{fffd}').map(str::as_bytes).collect::<Vec<_>>().join(&0xff);
        if text.len() >= length as usize {
            return Err(nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE);
        }
        // SAFETY: `length` bytes are the caller's, and text plus NUL fit.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
            to.add(text.len()).write(0);
        }
        Ok(())
    }))
}

/// A text in a fixed field of a C struct, cut where it does not fit.
fn field<const N: usize>(text: &str) -> [c_char; N] {
    let mut chars = [0; N];
    for (to, byte) in chars[..N - 1].iter_mut().zip(text.bytes()) {
        *to = byte as c_char;
    }
    chars
}

fn init(function: &str) -> nvmlReturn_t {
    let scenario = match load() {
        Ok(scenario) => scenario,
        Err(code) => return code,
    };
    hang(scenario.hang_ms.get(function));
    code(fail(scenario.errors.get(function)).map(|()| {
        with_state(|state| {
            state.clients += 1;
            state.scenario = Some(scenario);
            state.control = File::open("/dev/null").ok();
        });
    }))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> nvmlReturn_t {
    init("nvmlInit_v2")
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> nvmlReturn_t {
    init("nvmlInitWithFlags")
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> nvmlReturn_t {
    let last = |state: &mut State| {
        state.clients -= 1;
        if state.clients == 0 {
            // Nothing drops a static when the library is unloaded.
            state.scenario = None;
            state.control = None;
            events::forget();
        }
    };
    code(system("nvmlShutdown", false).map(|_| with_state(last)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, n: c_uint) -> nvmlReturn_t {
    let answer = system("nvmlSystemGetDriverVersion", false);
    // SAFETY: NVML's contract: `to` holds `n` bytes.
    unsafe { put_text(to, n, answer.map(|scenario| scenario.driver_version.clone())) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetNVMLVersion(to: *mut c_char, n: c_uint) -> nvmlReturn_t {
    let answer = system("nvmlSystemGetNVMLVersion", false);
    // SAFETY: NVML's contract: `to` holds `n` bytes.
    unsafe { put_text(to, n, answer.map(|scenario| scenario.nvml_version.clone())) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(to: *mut c_int) -> nvmlReturn_t {
    let answer = system("nvmlSystemGetCudaDriverVersion_v2", false);
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer.map(|scenario| scenario.cuda_driver_version)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(to: *mut c_uint) -> nvmlReturn_t {
    let answer = system("nvmlDeviceGetCount_v2", true);
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer.map(|scenario| scenario.devices.len() as c_uint)) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(
    index: c_uint,
    to: *mut nvmlDevice_t,
) -> nvmlReturn_t {
    let index = index as usize;
    let answer = at("nvmlDeviceGetHandleByIndex_v2", index, |_| {
        Ok(std::ptr::without_provenance_mut(index + 1))
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

/// A function that fills a text buffer.
macro_rules! text {
    ($name:ident, $answer:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            device: nvmlDevice_t,
            to: *mut c_char,
            n: c_uint,
        ) -> nvmlReturn_t {
            let answer = of_any(stringify!($name), device, $answer);
            // SAFETY: NVML's contract: `to` holds `n` bytes.
            unsafe { put_text(to, n, answer) }
        }
    };
}

/// A function that fills one value.
macro_rules! value {
    ($name:ident, $type:ty, $answer:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(device: nvmlDevice_t, to: *mut $type) -> nvmlReturn_t {
            let answer = of(stringify!($name), device, $answer);
            // SAFETY: NVML's contract: `to` is valid.
            unsafe { put(to, answer) }
        }
    };
}

/// A function that fills two values of one type.
macro_rules! pair {
    ($name:ident, $type:ty, $answer:expr) => {
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            device: nvmlDevice_t,
            first: *mut $type,
            second: *mut $type,
        ) -> nvmlReturn_t {
            let answer = of(stringify!($name), device, $answer);
            // SAFETY: NVML's contract: both are valid.
            unsafe { put2(first, second, answer) }
        }
    };
}

text!(nvmlDeviceGetUUID, |gpu: &Device, part: Option<&MigDevice>| {
    Ok(part.map_or_else(|| gpu.uuid.clone(), |part| part.uuid.clone()))
});
text!(nvmlDeviceGetName, |gpu: &Device, part: Option<&MigDevice>| {
    Ok(part.map_or_else(|| gpu.name.clone(), |part| format!("{} {}", gpu.name, part.name)))
});
text!(nvmlDeviceGetSerial, |gpu: &Device, _| supported(gpu.serial.clone()));

value!(nvmlDeviceGetBrand, nvmlBrandType_t, |gpu: &Device| Ok(gpu.brand));
value!(nvmlDeviceGetArchitecture, nvmlDeviceArchitecture_t, |gpu: &Device| Ok(gpu.architecture));
value!(nvmlDeviceGetMinorNumber, c_uint, |gpu: &Device| supported(gpu.minor));
value!(nvmlDeviceGetPersistenceMode, nvmlEnableState_t, |gpu: &Device| Ok(gpu.persistence.into()));
value!(nvmlDeviceGetPowerUsage, c_uint, |gpu: &Device| {
    supported(gpu.power_milliwatts.map(|(draw, _)| draw))
});
value!(nvmlDeviceGetEnforcedPowerLimit, c_uint, |gpu: &Device| {
    supported(gpu.power_milliwatts.map(|(_, limit)| limit))
});
value!(nvmlDeviceGetUtilizationRates, nvmlUtilization_t, |gpu: &Device| {
    supported(gpu.utilization_percent.map(|(gpu, memory)| nvmlUtilization_t { gpu, memory }))
});
value!(nvmlDeviceGetBAR1MemoryInfo, nvmlBAR1Memory_t, |gpu: &Device| {
    supported(gpu.bar1_bytes.map(|(total, used)| nvmlBAR1Memory_t {
        bar1Total: total,
        bar1Free: total - used,
        bar1Used: used,
    }))
});
value!(nvmlDeviceGetPciInfo_v3, nvmlPciInfo_t, |gpu: &Device| {
    let (domain, bus, device) = gpu.pci;
    Ok(nvmlPciInfo_t {
        busIdLegacy: field(&format!("{domain:04X}:{bus:02X}:{device:02X}.0")),
        domain,
        bus,
        device,
        pciDeviceId: 0x2330_10de,
        pciSubSystemId: 0x16c1_10de,
        busId: field(&format!("{domain:08X}:{bus:02X}:{device:02X}.0")),
    })
});
// The first version counts what is reserved as used.
value!(nvmlDeviceGetMemoryInfo, nvmlMemory_t, |gpu: &Device| {
    supported(gpu.memory.map(|Memory { total, reserved, used }| nvmlMemory_t {
        total,
        free: total - reserved - used,
        used: reserved + used,
    }))
});

mod events;
mod faults;
mod links;
mod parts;

pair!(nvmlDeviceGetCudaComputeCapability, c_int, |gpu: &Device| Ok(gpu.compute_capability));
pair!(nvmlDeviceGetMigMode, c_uint, |gpu: &Device| {
    supported(gpu.mig.map(|mig| (mig.current.into(), mig.pending.into())))
});
pair!(nvmlDeviceGetEccMode, nvmlEnableState_t, |gpu: &Device| {
    supported(gpu.ecc.map(|on| (on.into(), on.into())))
});

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(
    device: nvmlDevice_t,
    to: *mut nvmlMemory_v2_t,
) -> nvmlReturn_t {
    const VERSION: c_uint = size_of::<nvmlMemory_v2_t>() as c_uint | (2 << 24);
    let answer = of_any("nvmlDeviceGetMemoryInfo_v2", device, |gpu, part| {
        // SAFETY: NVML's contract: `to` is null or points to a struct whose
        // `version` the caller has set.
        if to.is_null() || unsafe { (*to).version } != VERSION {
            return Err(nvmlReturn_enum_NVML_ERROR_ARGUMENT_VERSION_MISMATCH);
        }
        let memory = part.map_or(gpu.memory, |part| Some(part.memory));
        let Memory { total, reserved, used } = supported(memory)?;
        let free = total - reserved - used;
        Ok(nvmlMemory_v2_t { version: VERSION, total, reserved, free, used })
    });
    // SAFETY: as above.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTemperature(
    device: nvmlDevice_t,
    sensor: nvmlTemperatureSensors_t,
    to: *mut c_uint,
) -> nvmlReturn_t {
    let answer = of("nvmlDeviceGetTemperature", device, |gpu| match sensor {
        nvmlTemperatureSensors_enum_NVML_TEMPERATURE_GPU => supported(gpu.temperature_celsius),
        _ => Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT),
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    device: nvmlDevice_t,
    count: *mut c_uint,
    to: *mut nvmlProcessInfo_t,
) -> nvmlReturn_t {
    // SAFETY: NVML's contract, as below.
    unsafe { processes("nvmlDeviceGetComputeRunningProcesses_v3", device, count, to) }
}

// As the third, which fills the same struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v2(
    device: nvmlDevice_t,
    count: *mut c_uint,
    to: *mut nvmlProcessInfo_v2_t,
) -> nvmlReturn_t {
    // SAFETY: NVML's contract, as below.
    unsafe { processes("nvmlDeviceGetComputeRunningProcesses_v2", device, count, to) }
}

/// SAFETY (of calling): `count` is null or valid, and `to` holds as many structs as it says.
unsafe fn processes(
    function: &str,
    device: nvmlDevice_t,
    count: *mut c_uint,
    to: *mut nvmlProcessInfo_t,
) -> nvmlReturn_t {
    let answer = of(function, device, |gpu| {
        let room = if count.is_null() {
            return Err(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT);
        } else {
            // SAFETY: not null; NVML's contract: it says how many fit.
            unsafe { count.replace(gpu.processes.len() as c_uint) }
        };
        if gpu.processes.len() > room as usize {
            return Err(nvmlReturn_enum_NVML_ERROR_INSUFFICIENT_SIZE);
        }
        for (at, process) in gpu.processes.iter().enumerate() {
            let info = nvmlProcessInfo_t {
                pid: process.pid,
                usedGpuMemory: process.used_bytes.unwrap_or(u64::MAX),
                gpuInstanceId: u32::MAX,
                computeInstanceId: u32::MAX,
            };
            // SAFETY: there is room for `room` entries, and `at` is less.
            unsafe { to.add(at).write(info) };
        }
        Ok(())
    });
    code(answer)
}
