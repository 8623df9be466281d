//! The parts of a GPU (MIG), asked of NVML.

use std::collections::BTreeMap;

use nvml_wrapper::Device;
use nvml_wrapper::error::NvmlError;

use super::inventory::Gpu;
use super::mig::{Mig, MigDevice, MigProfile, profile_name};
use super::nvml_raw::{self as raw, ProfileInfo};
use super::{nvml::ask, nvml_quirks as quirks};

/// More parts than any GPU has.
const MAX_PARTS: u32 = 64;

/// What GPUs can be cut into, by UUID and MIG mode: asked once an opening of the library, since it
/// does not change as long as the mode does not.
#[derive(Debug, Default)]
pub(super) struct Profiles(BTreeMap<(String, bool), Vec<ProfileInfo>>);

/// Whether the GPU is split, how, and how it could be.
pub(super) fn look(gpu: &mut Gpu, device: &Device<'_>, profiles: &mut Profiles) {
    let mode = ask(gpu, || match device.mig_mode() {
        Ok(mode) => Ok(Some(mode)),
        // How a GPU says that it cannot, and a driver that it is older than MIG.
        Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => Ok(None),
        Err(error) => Err(error),
    });
    let Some(mode) = mode else { return };
    let Some(mode) = mode else {
        gpu.mig = Some(Mig::default());
        return;
    };
    let enabled = mode.current == 1;
    let devices = if enabled { parts(gpu, device) } else { Vec::new() };
    gpu.mig = Some(Mig {
        capable: true,
        enabled,
        pending_enabled: mode.pending == 1,
        devices,
        profiles: profiles.of(gpu, device, enabled),
    });
}

fn parts(gpu: &mut Gpu, device: &Device<'_>) -> Vec<MigDevice> {
    let slots = ask(gpu, || device.mig_device_count()).unwrap_or(0).min(MAX_PARTS);
    // An empty slot is "not found", which says nothing about the GPU.
    let parts = (0..slots).filter_map(|slot| {
        let part = ask(gpu, || device.mig_device_by_index(slot))?;
        // One that does not say its name was taken away meanwhile: the GPU is being cut anew.
        let uuid = ask(gpu, || part.uuid())?;
        Some(look_at_part(gpu, &part, slot, uuid))
    });
    parts.collect()
}

fn look_at_part(gpu: &mut Gpu, part: &Device<'_>, slot: u32, uuid: String) -> MigDevice {
    let size = ask(gpu, || raw::part_size(part));
    // The name is the product's with the profile behind it; old drivers leave that out.
    let name = ask(gpu, || part.name());
    let named = name.as_deref().and_then(|name| name.rsplit_once(" MIG ")).map(|(_, p)| p.into());
    let total = gpu.memory.map(|memory| memory.total_bytes);
    let reckoned = size.zip(total).map(|(size, total)| {
        profile_name(size.compute_slices, size.gpu_slices, size.memory_bytes, total)
    });
    MigDevice {
        uuid: Some(uuid),
        slot,
        profile: named.or(reckoned),
        gpu_instance_id: ask(gpu, || raw::gpu_instance_id(part)),
        compute_instance_id: ask(gpu, || raw::compute_instance_id(part)),
        memory: ask(gpu, || quirks::memory(part)),
        multiprocessor_count: size.map(|size| size.multiprocessors),
        allocations: Vec::new(),
    }
}

impl Profiles {
    fn of(&mut self, gpu: &mut Gpu, device: &Device<'_>, enabled: bool) -> Vec<MigProfile> {
        let Some(uuid) = gpu.uuid.clone() else { return Vec::new() };
        let known = self.0.entry((uuid, enabled)).or_insert_with(|| {
            (0..raw::PROFILES)
                .filter_map(|profile| ask(gpu, || raw::profile(device, profile)))
                .collect()
        });
        let total = gpu.memory.map_or(0, |memory| memory.total_bytes);
        let profiles = known.iter().map(|profile| MigProfile {
            name: match &profile.name {
                Some(name) => name.strip_prefix("MIG ").unwrap_or(name).into(),
                None => profile_name(profile.slices, profile.slices, profile.memory_bytes, total),
            },
            memory_bytes: profile.memory_bytes,
            max_instances: profile.instances,
            // NVIDIA's `possible_placements` would say where; the wrapper's returns nothing,
            // and how many is what a scheduler asks.
            remaining_instances: enabled
                .then(|| ask(gpu, || raw::remaining_instances(device, profile.id)))
                .flatten(),
        });
        profiles.collect()
    }
}
