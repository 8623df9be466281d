//! Event sets: errors that the driver reports while somebody listens.

use std::collections::BTreeMap;

use super::*;

/// A listener. Its handle is its place in the list, plus one.
struct Listener {
    /// GPU index → how many of its errors have been told.
    told: BTreeMap<usize, usize>,
    /// What the real library holds open for it.
    _descriptor: Option<File>,
}

/// The scenario's file as it was read last, and which file that was. A flood of events asks for
/// each one, and the file may be long.
static READ: Mutex<Option<(FileId, Arc<Scenario>)>> = Mutex::new(None);

/// A file replaced by rename has another number.
type FileId = (u64, i64, i64);

fn read() -> Answer<Arc<Scenario>> {
    use std::os::unix::fs::MetadataExt as _;
    let unknown = nvmlReturn_enum_NVML_ERROR_UNKNOWN;
    let meta = std::fs::metadata(path()?).map_err(|_| unknown)?;
    let id = (meta.ino(), meta.mtime(), meta.mtime_nsec());
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((known, scenario)) = &*read
        && *known == id
    {
        return Ok(Arc::clone(scenario));
    }
    let scenario = load()?;
    *read = Some((id, Arc::clone(&scenario)));
    Ok(scenario)
}

/// What would stay behind when the library is unloaded.
pub(super) fn forget() {
    *READ.lock().unwrap_or_else(PoisonError::into_inner) = None;
    *LISTENERS.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
}

static LISTENERS: Mutex<Vec<Option<Listener>>> = Mutex::new(Vec::new());

fn listener<T>(
    set: nvmlEventSet_t,
    f: impl FnOnce(&mut Option<Listener>) -> Answer<T>,
) -> Answer<T> {
    let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
    let place = set.addr().checked_sub(1).and_then(|at| listeners.get_mut(at));
    f(place.ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetCreate(to: *mut nvmlEventSet_t) -> nvmlReturn_t {
    let answer = system("nvmlEventSetCreate", false).map(|_| {
        let new = Listener { told: BTreeMap::new(), _descriptor: File::open("/dev/null").ok() };
        let mut listeners = LISTENERS.lock().unwrap_or_else(PoisonError::into_inner);
        // A place that was given back serves again.
        let place = listeners.iter().position(Option::is_none).unwrap_or(listeners.len());
        match listeners.get_mut(place) {
            Some(free) => *free = Some(new),
            None => listeners.push(Some(new)),
        }
        std::ptr::without_provenance_mut(place + 1)
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlEventSetFree(set: nvmlEventSet_t) -> nvmlReturn_t {
    let free = |listener: &mut Option<Listener>| {
        listener.take().map(drop).ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)
    };
    code(system("nvmlEventSetFree", false).and_then(|_| listener(set, free)))
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlDeviceRegisterEvents(
    device: nvmlDevice_t,
    types: u64,
    set: nvmlEventSet_t,
) -> nvmlReturn_t {
    code(of("nvmlDeviceRegisterEvents", device, |gpu| {
        if types != u64::from(nvmlEventTypeXidCriticalError) {
            return Err(nvmlReturn_enum_NVML_ERROR_NOT_SUPPORTED);
        }
        listener(set, |listener| {
            let listener = listener.as_mut().ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
            listener.told.insert(device.addr() - 1, gpu.xids.len());
            Ok(())
        })
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlEventSetWait_v2(
    set: nvmlEventSet_t,
    to: *mut nvmlEventData_t,
    _timeout_ms: c_uint,
) -> nvmlReturn_t {
    // A test does not wait: what is not there now is not there.
    let answer = system("nvmlEventSetWait_v2", false).and_then(|_| read()).and_then(|scenario| {
        listener(set, |listener| {
            let listener = listener.as_mut().ok_or(nvmlReturn_enum_NVML_ERROR_INVALID_ARGUMENT)?;
            for (index, told) in &mut listener.told {
                let gpu = scenario.devices.get(*index);
                let Some(xid) = gpu.and_then(|gpu| gpu.xids.get(*told)) else { continue };
                *told += 1;
                return Ok(nvmlEventData_t {
                    device: std::ptr::without_provenance_mut(index + 1),
                    eventType: nvmlEventTypeXidCriticalError.into(),
                    eventData: *xid,
                    gpuInstanceId: u32::MAX,
                    computeInstanceId: u32::MAX,
                });
            }
            Err(nvmlReturn_enum_NVML_ERROR_TIMEOUT)
        })
    });
    // SAFETY: NVML's contract: `to` is valid.
    unsafe { put(to, answer) }
}
