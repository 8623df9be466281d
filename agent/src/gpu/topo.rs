//! The links between GPUs as a matrix, for `carport gpus --topo`.

use std::fmt::Write as _;

use super::inventory::{Gpu, GpuInventory, ProviderState};
use super::links::{GpuLink, LinkType};
use crate::output;

/// What the words in the matrix mean.
const LEGEND: &str = "\
X    itself
NV#  so many NVLinks, to the other GPU or into the same switches
PSB  one board
PIX  one PCIe switch
PXB  several PCIe switches
PHB  a PCIe host bridge
NODE host bridges of one NUMA node
SYS  the link between NUMA nodes
";

/// The matrix, with each GPU's NUMA node and CPUs behind it. Ends with a newline.
pub fn render(inventory: &GpuInventory) -> String {
    let mut text = String::new();
    let provider = &inventory.provider;
    if provider.state != ProviderState::Ok {
        let _ = writeln!(text, "GPUs: {}: {}", provider.state, provider.message);
    }
    if inventory.gpus.is_empty() {
        return text;
    }
    let gpus = &inventory.gpus;
    let mut header = vec![String::new()];
    header.extend(gpus.iter().map(|gpu| format!("GPU{}", gpu.index)));
    header.extend(["NUMA", "CPUS", "PCI ROOT"].map(String::from));
    let rows = gpus.iter().map(|gpu| {
        let mut row = vec![format!("GPU{}", gpu.index)];
        row.extend(gpus.iter().map(|other| cell(inventory, gpu, other)));
        row.push(gpu.numa_node.map_or_else(|| "-".into(), |node| node.to_string()));
        row.push(gpu.cpu_list.clone().unwrap_or_else(|| "-".into()));
        row.push(gpu.pcie_root.clone().unwrap_or_else(|| "-".into()));
        row
    });
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    for line in output::table(&header, rows).lines() {
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text + "\n" + LEGEND
}

fn cell(inventory: &GpuInventory, a: &Gpu, b: &Gpu) -> String {
    if std::ptr::eq(a, b) {
        return "X".into();
    }
    match between(inventory, a, b) {
        Some(GpuLink { kind: Some(kind), link_count, .. }) => match kind {
            LinkType::Nvlink | LinkType::Nvswitch => format!("{kind}{link_count}"),
            _ => kind.to_string(),
        },
        _ => "-".into(),
    }
}

fn between<'a>(inventory: &'a GpuInventory, a: &Gpu, b: &Gpu) -> Option<&'a GpuLink> {
    let (a, b) = (a.uuid.as_deref()?, b.uuid.as_deref()?);
    inventory.links.iter().find(|link| {
        let ends = (link.uuid_a.as_str(), link.uuid_b.as_str());
        ends == (a, b) || ends == (b, a)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_is_there_both_ways() {
        let gpu = |index: u32, name: &str| Gpu {
            uuid: Some(name.into()),
            numa_node: Some(0),
            cpu_list: Some("0-31".into()),
            ..Gpu::unknown(index)
        };
        let link = |a: &str, b: &str, kind, link_count| GpuLink {
            uuid_a: a.into(),
            uuid_b: b.into(),
            kind,
            link_count,
            bandwidth_bytes_per_second: None,
            p2p_read: None,
            p2p_write: None,
        };
        let mut inventory = GpuInventory::none(ProviderState::Ok, "");
        inventory.gpus = vec![gpu(0, "a"), gpu(1, "b"), gpu(2, "c")];
        inventory.links = vec![
            link("a", "b", Some(LinkType::Nvswitch), 18),
            link("a", "c", Some(LinkType::Sys), 0),
            link("b", "c", None, 0),
        ];
        let expected = "      GPU0  GPU1  GPU2  NUMA  CPUS  PCI ROOT
GPU0  X     NV18  SYS   0     0-31  -
GPU1  NV18  X     -     0     0-31  -
GPU2  SYS   -     X     0     0-31  -

";
        assert_eq!(render(&inventory), expected.to_owned() + LEGEND);
    }
}
