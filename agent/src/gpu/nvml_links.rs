//! How the GPUs reach each other, asked of NVML.
//!
//! Some five hundred questions for eight GPUs, about what hardly ever changes: asked when the
//! library is opened, when another set of GPUs answers, and now and then.

use nvml_wrapper::enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use nvml_wrapper_sys::bindings as sys;

use super::inventory::{Gpu, HealthState};
use super::links::{GpuLink, LinkType};
use super::nvml::bus_id;
use super::{nvml_quirks as quirks, nvml_raw as raw};

/// How many looks an answer is good for: five minutes at the usual pace.
const LOOKS: u32 = 30;

/// The links as last asked.
#[derive(Debug, Default)]
pub(super) struct Links {
    links: Vec<GpuLink>,
    /// The GPUs that answered then.
    of: Vec<String>,
    looks_left: u32,
}

impl Links {
    /// The links between those of `gpus` that answer.
    pub(super) fn between(&mut self, nvml: &Nvml, gpus: &[Gpu]) -> Vec<GpuLink> {
        let answering: Vec<(&str, u32)> = gpus
            .iter()
            .filter(|gpu| gpu.health.state != HealthState::Lost)
            .filter_map(|gpu| Some((gpu.uuid.as_deref()?, gpu.index)))
            .collect();
        let same = answering.iter().map(|(uuid, _)| *uuid).eq(self.of.iter().map(String::as_str));
        if !same || self.looks_left == 0 {
            self.links = ask(nvml, &answering);
            self.of = answering.iter().map(|(uuid, _)| (*uuid).to_owned()).collect();
            self.looks_left = LOOKS;
        }
        self.looks_left -= 1;
        self.links.clone()
    }
}

/// A GPU and its NVLinks.
struct End<'nvml> {
    uuid: String,
    bus_id: Option<String>,
    device: Device<'nvml>,
    /// Links into a switch.
    to_switch: u32,
    /// PCI addresses at the other end of the rest.
    to_peers: Vec<String>,
    bytes_per_second: Option<u64>,
}

fn ask(nvml: &Nvml, gpus: &[(&str, u32)]) -> Vec<GpuLink> {
    let ends: Vec<End<'_>> =
        gpus.iter().filter_map(|(uuid, index)| End::new(nvml, uuid, *index).ok()).collect();
    let mut links = Vec::new();
    for (at, a) in ends.iter().enumerate() {
        links.extend(ends[at + 1..].iter().map(|b| link(a, b)));
    }
    links
}

impl<'nvml> End<'nvml> {
    fn new(nvml: &'nvml Nvml, uuid: &str, index: u32) -> Result<Self, NvmlError> {
        let device = nvml.device_by_index(index)?;
        let bus_id = device.pci_info().ok().map(|pci| bus_id(&pci));
        let mut end = Self {
            uuid: uuid.into(),
            bus_id,
            device,
            to_switch: 0,
            to_peers: Vec::new(),
            bytes_per_second: None,
        };
        end.follow_nvlinks();
        Ok(end)
    }

    fn follow_nvlinks(&mut self) {
        for number in 0..sys::NVML_NVLINK_MAX_LINKS {
            let link = self.device.link_wrapper_for(number);
            match link.is_active() {
                Ok(true) => {}
                Ok(false) => continue,
                // It has no more, or none at all.
                Err(_) => break,
            }
            if quirks::leads_to_switch(&self.device, number).unwrap_or(false) {
                self.to_switch += 1;
            } else if let Ok(pci) = link.remote_pci_info() {
                self.to_peers.push(bus_id(&pci));
            }
        }
        if self.to_switch > 0 || !self.to_peers.is_empty() {
            self.bytes_per_second = raw::nvlink_bytes_per_second(&self.device).ok();
        }
    }

    fn nvlinks_to(&self, other: &Self) -> u32 {
        let count =
            self.to_peers.iter().filter(|peer| Some(*peer) == other.bus_id.as_ref()).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

fn link(a: &End<'_>, b: &End<'_>) -> GpuLink {
    let direct = a.nvlinks_to(b).max(b.nvlinks_to(a));
    let switched = a.to_switch.min(b.to_switch);
    let (kind, link_count) = if direct > 0 {
        (Some(LinkType::Nvlink), direct)
    } else if switched > 0 {
        (Some(LinkType::Nvswitch), switched)
    } else {
        (pcie(&a.device, &b.device), 0)
    };
    let each = a.bytes_per_second.zip(b.bytes_per_second).map(|(a, b)| a.min(b));
    let p2p = |capability| match a.device.p2p_status(&b.device, capability) {
        Ok(status) => Some(status == P2pStatus::Ok),
        Err(_) => None,
    };
    GpuLink {
        uuid_a: a.uuid.clone(),
        uuid_b: b.uuid.clone(),
        kind,
        link_count,
        bandwidth_bytes_per_second: each
            .filter(|_| link_count > 0)
            .map(|each| each.saturating_mul(link_count.into())),
        p2p_read: p2p(P2pCapabilitiesIndex::Read),
        p2p_write: p2p(P2pCapabilitiesIndex::Write),
    }
}

fn pcie(a: &Device<'_>, b: &Device<'_>) -> Option<LinkType> {
    match raw::common_ancestor(a, b).ok()? {
        sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_INTERNAL => Some(LinkType::SameBoard),
        sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_SINGLE => Some(LinkType::Pix),
        sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_MULTIPLE => Some(LinkType::Pxb),
        sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_HOSTBRIDGE => Some(LinkType::Phb),
        sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_NODE => Some(LinkType::Node),
        sys::nvmlGpuLevel_enum_NVML_TOPOLOGY_SYSTEM => Some(LinkType::Sys),
        _ => None,
    }
}
