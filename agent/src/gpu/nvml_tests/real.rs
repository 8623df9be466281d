//! The same, against the library of this machine's driver, where there is one; and a record of
//! what it answers beside what `nvidia-smi` says.

use std::fmt::Write as _;
use std::process::Command;
use std::time::Instant;

use super::cost::{cpu, descriptors};
use super::smi::{Smi, beside};
use super::*;

/// Set by `make test-gpu`: a GPU that is on this machine has to be seen.
const REQUIRED: &str = "CARPORT_TEST_GPU";

/// Where the record goes.
const RECORD: &str = "CARPORT_GPU_RECORD";

/// Whether the machine has an NVIDIA GPU, by other signs than the library's.
fn gpu_is_here() -> bool {
    let on_the_bus = std::fs::read_dir("/sys/bus/pci/devices").is_ok_and(|devices| {
        devices.flatten().any(|device| {
            let says = |file: &str, start: &str| {
                std::fs::read_to_string(device.path().join(file))
                    .is_ok_and(|text| text.starts_with(start))
            };
            // A display controller: the sound and USB functions beside it are none.
            says("vendor", "0x10de") && says("class", "0x03")
        })
    });
    on_the_bus || Path::new("/dev/nvidiactl").exists() || Path::new("/dev/nvidia0").exists()
}

fn printed(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} {arguments:?}: {}", output.status));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test]
async fn the_real_library_tells_what_nvidia_smi_tells() {
    // A driver without persistence mode wakes each GPU first.
    let patience = Duration::from_secs(60);
    let inventory = look_once(GpuOptions::default(), patience).await.unwrap();
    if inventory.provider.state != ProviderState::Ok {
        let why = format!("{}: {}", inventory.provider.state, inventory.provider.message);
        let must = std::env::var_os(REQUIRED).is_some() && gpu_is_here();
        assert!(!must, "there is a GPU on this machine, and it cannot be seen: {why}");
        println!("SKIPPED: no GPU here: {why}");
        return;
    }
    let mut record = String::from("# What this machine's GPUs reported\n");
    let mut faults = Vec::new();
    for gpu in &inventory.gpus {
        let mut must = |is: bool, what: &str| {
            if !is {
                faults.push(format!("GPU {}: {what}: {gpu:?}", gpu.index));
            }
        };
        must(gpu.uuid.as_ref().is_some_and(|uuid| uuid.starts_with("GPU-")), "its name");
        must(gpu.compute_capability.is_some() && gpu.architecture.is_some(), "its chip");
        must(gpu.pci_bus_id.is_some(), "its place");
        // Chips that share the host's memory have none of their own.
        if let Some(memory) = gpu.memory {
            let parts = memory.used_bytes + memory.free_bytes + memory.reserved_bytes.unwrap_or(0);
            must(parts <= memory.total_bytes && memory.total_bytes > 0, "its memory");
        }
    }
    let answering = inventory.gpus.iter().filter(|gpu| gpu.health.state != HealthState::Lost);
    let count = answering.count();
    if inventory.links.len() != count * count.saturating_sub(1) / 2 {
        faults.push(format!("{} links between {count} GPUs", inventory.links.len()));
    }

    match printed("nvidia-smi", &["-q"]) {
        Ok(text) => {
            let (table, differences) = beside(&inventory, &Smi::read(&text));
            let _ = writeln!(record, "\n{table}");
            faults.extend(differences);
        }
        Err(why) => {
            let _ = writeln!(record, "\nNothing to compare with: {why}\n");
        }
    }
    // `-q` has no compute capability, and nvidia-smi before driver 510 has none at all.
    let asked = ["--query-gpu=uuid,compute_cap", "--format=csv,noheader"];
    for line in printed("nvidia-smi", &asked).unwrap_or_default().lines() {
        let Some((uuid, theirs)) = line.split_once(", ") else { continue };
        let gpu = inventory.gpus.iter().find(|gpu| gpu.uuid.as_deref() == Some(uuid));
        let ours = gpu.and_then(|gpu| gpu.compute_capability).map(|ours| ours.to_string());
        let _ = writeln!(record, "`compute_capability` of {uuid}: {ours:?}, nvidia-smi: {theirs}");
        if ours.as_deref() != Some(theirs) {
            faults.push(format!("{uuid}: compute capability {ours:?}, nvidia-smi says {theirs}"));
        }
    }
    let _ = writeln!(record, "\n```\n{}\n```", costs());
    let _ = writeln!(record, "\n```\n{}```", super::super::topo::render(&inventory));
    if let Ok(theirs) = printed("nvidia-smi", &["topo", "-m"]) {
        let _ = writeln!(record, "\n```\n{theirs}```");
    }
    let json = serde_json::to_string_pretty(&inventory).unwrap();
    let _ = writeln!(record, "\n```json\n{json}\n```");
    println!("{record}");
    if let Some(path) = std::env::var_os(RECORD) {
        std::fs::write(&path, &record).unwrap();
        println!("recorded in {}", path.display());
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What looking costs with this driver, and whether opening it again leaves anything behind.
fn costs() -> String {
    let open = || NvmlProbe::new(None, Sysfs::new("/sys"), xid::FATAL.to_vec());
    let mut probe = open();
    let began = Instant::now();
    probe.sample().unwrap();
    let first = began.elapsed();
    const LOOKS: u32 = 30;
    let (began, before) = (Instant::now(), cpu());
    for _ in 0..LOOKS {
        probe.sample().unwrap();
    }
    let (each, each_cpu) = (began.elapsed() / LOOKS, (cpu() - before) / LOOKS);
    let began = Instant::now();
    let news = probe.has_news();
    let listening = began.elapsed();
    let before = descriptors();
    const OPENINGS: u32 = 10;
    let began = Instant::now();
    for _ in 0..OPENINGS {
        probe.close();
        probe.sample().unwrap();
    }
    let opening = began.elapsed() / OPENINGS;
    let after = descriptors();
    assert!(after <= before + 2, "{before} descriptors before, {after} after {OPENINGS} openings");
    format!(
        "first look {first:.2?} with loading, then {each:.2?} ({each_cpu:.2?} CPU); listening \
         {listening:.2?} (news: {news}); closing, opening and a look {opening:.2?}; {before} \
         descriptors before {OPENINGS} openings, {after} after"
    )
}
