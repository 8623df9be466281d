//! Parts of GPUs, and the links between GPUs.

use super::*;

/// What an H100 can be cut into; `remaining` of each more fit.
pub(super) fn profiles(remaining: Option<[u32; 3]>) -> Vec<MigProfile> {
    let profile = |at: usize, name: &str, mib: u64, max_instances| MigProfile {
        name: name.into(),
        memory_bytes: mib << 20,
        max_instances,
        remaining_instances: remaining.map(|remaining| remaining[at]),
    };
    vec![
        profile(0, "1g.10gb", 9_984, 7),
        profile(1, "3g.40gb", 40_448, 2),
        profile(2, "7g.80gb", 81_152, 1),
    ]
}

/// A GPU in two parts.
fn split() -> Device {
    let mut device = Device {
        mig: Some(FakeMig { current: true, pending: true }),
        mig_devices: vec![FakePart::small(0, 0), FakePart::small(0, 1)],
        ..Device::h100(0)
    };
    device.mig_profiles[0].remaining = 5;
    device
}

fn part(slot: u32) -> MigDevice {
    MigDevice {
        uuid: Some(format!("MIG-00000000-0000-4000-8000-000000{slot:06x}")),
        slot,
        profile: Some("1g.10gb".into()),
        gpu_instance_id: Some(7 + slot),
        compute_instance_id: Some(0),
        memory: Some(GpuMemory {
            total_bytes: 9_984 << 20,
            used_bytes: 0,
            free_bytes: 9_984 << 20,
            reserved_bytes: Some(0),
            bar1_total_bytes: None,
            bar1_used_bytes: None,
        }),
        multiprocessor_count: Some(16),
        allocations: vec![],
    }
}

#[test]
fn parts_are_listed_with_their_ids_and_what_still_fits() {
    let gpu = one(split());
    let expected = Mig {
        capable: true,
        enabled: true,
        pending_enabled: true,
        devices: vec![part(0), part(1)],
        profiles: profiles(Some([5, 2, 1])),
    };
    assert_eq!(gpu.mig, Some(expected));
    assert_eq!(gpu.health, Health::ok(), "an empty slot is no sickness");
}

#[test]
fn an_old_drivers_parts_and_profiles_are_named_all_the_same() {
    let mut device = split();
    device.mig_devices[1].name = String::new();
    let fake = FakeNvml::without_symbols(
        &node(vec![device]),
        &["nvmlDeviceGetGpuInstanceProfileInfoV", "nvmlDeviceGetGpuInstanceRemainingCapacity"],
    );
    let mut sample = probe(&fake, Path::new("/nonexistent")).sample().unwrap();
    let mig = sample.gpus.remove(0).mig.unwrap();
    assert_eq!(mig.devices[1].profile.as_deref(), Some("1g.10gb"));
    let names: Vec<_> = mig.profiles.iter().map(|profile| profile.name.as_str()).collect();
    assert_eq!(names, ["1g.10gb", "3g.40gb", "7g.80gb"]);
    assert!(mig.profiles.iter().all(|profile| profile.remaining_instances.is_none()));
}

#[test]
fn a_gpu_that_is_split_while_the_agent_runs_tells_what_it_can_be_cut_into() {
    // Outside of MIG mode a driver may know of no sizes.
    let function = "nvmlDeviceGetGpuInstanceProfileInfoV";
    let whole = Device::h100(0).failing(function, code::NOT_SUPPORTED);
    let fake = FakeNvml::new(&node(vec![whole]));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    let mut profiles = || probe.sample().unwrap().gpus.remove(0).mig.unwrap().profiles.len();
    assert_eq!(profiles(), 0);
    fake.set(&node(vec![split()]));
    assert_eq!(profiles(), 3);
}

#[test]
fn a_part_that_is_taken_away_during_a_look_is_not_told_of() {
    let gpu = one(split().failing("part:nvmlDeviceGetUUID", code::NOT_FOUND));
    assert_eq!(gpu.mig.unwrap().devices, []);
    assert_eq!(gpu.health, Health::ok());
    // It goes after it has said its name.
    let gpu = one(split().failing("part:nvmlDeviceGetMemoryInfo_v2", code::NOT_FOUND));
    assert_eq!(gpu.mig.unwrap().devices[1].memory, None);
    assert_eq!(gpu.health, Health::ok());
}

#[tokio::test]
async fn a_new_part_is_a_new_generation() {
    let fake = FakeNvml::new(&node(vec![split()]));
    let handle = start(quick(&fake)).unwrap();
    let reader = handle.reader();
    let parts = |it: &GpuInventory| {
        it.gpus.first().and_then(|gpu| gpu.mig.as_ref()).map_or(0, |mig| mig.devices.len())
    };
    let two = wait_for(&reader, |it| parts(it) == 2).await;
    let mut device = split();
    device.mig_devices.push(FakePart::small(0, 2));
    fake.set(&node(vec![device]));
    let three = wait_for(&reader, |it| parts(it) == 3).await;
    assert_eq!(three.generation, two.generation + 1);
    handle.shutdown(PATIENCE).await;
}

fn links(devices: Vec<Device>) -> Vec<GpuLink> {
    look(&node(devices)).unwrap().links
}

#[test]
fn gpus_on_switches_have_all_their_nvlinks_to_each_other() {
    let links = look(&Scenario::h100s(8)).unwrap().links;
    assert_eq!(links.len(), 28, "one a pair");
    let uuid = |n: u32| format!("GPU-00000000-0000-4000-8000-{n:012x}");
    let first = GpuLink {
        uuid_a: uuid(0),
        uuid_b: uuid(1),
        kind: Some(LinkType::Nvswitch),
        link_count: 18,
        bandwidth_bytes_per_second: Some(478_116_000_000),
        p2p_read: Some(true),
        p2p_write: Some(true),
    };
    assert_eq!(links[0], first);
    assert_eq!(links[27], GpuLink { uuid_a: uuid(6), uuid_b: uuid(7), ..first });
}

#[test]
fn direct_nvlinks_are_counted_a_pair() {
    let to = |peers: &[u32]| peers.iter().map(|peer| NvLink::Gpu(*peer)).collect();
    let devices = vec![
        Device { nvlinks: to(&[1, 1, 2]), ..Device::h100(0) },
        Device { nvlinks: to(&[0, 0]), ..Device::h100(1) },
        Device { nvlinks: to(&[0]), ..Device::h100(2) },
    ];
    let found: Vec<_> =
        links(devices).into_iter().map(|link| (link.kind.unwrap(), link.link_count)).collect();
    // The second and third share a NUMA node, and no switch.
    assert_eq!(found, [(LinkType::Nvlink, 2), (LinkType::Nvlink, 1), (LinkType::Node, 0)]);
}

#[test]
fn without_nvlinks_the_way_over_pcie_is_told() {
    let plain = |index| Device { nvlinks: vec![], ..Device::h100(index) };
    let links = links(vec![plain(0), plain(1), plain(2), plain(4)]);
    let kinds: Vec<_> = links.iter().map(|link| link.kind.unwrap()).collect();
    use LinkType::{Node, Pix, Sys};
    assert_eq!(kinds, [Pix, Node, Sys, Node, Sys, Sys]);
    assert_eq!((links[0].p2p_read, links[2].p2p_read), (Some(true), Some(false)));
    assert_eq!(links[0].bandwidth_bytes_per_second, None);
}

#[test]
fn a_lost_gpu_has_no_links_and_the_others_keep_theirs() {
    let fake = FakeNvml::new(&Scenario::h100s(3));
    let mut probe = probe(&fake, Path::new("/nonexistent"));
    assert_eq!(probe.sample().unwrap().links.len(), 3);
    let mut scenario = Scenario::h100s(3);
    scenario.devices[1] = Device::h100(1).failing("*", code::GPU_IS_LOST);
    fake.set(&scenario);
    let links = probe.sample().unwrap().links;
    assert_eq!(links.len(), 1);
    assert_eq!(links[0].link_count, 18);
}
