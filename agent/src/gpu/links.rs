//! How GPUs reach each other and their host, as plain values.

use std::fmt;

use serde::Serialize;

/// How two GPUs reach each other; one value a pair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuLink {
    /// The one with the lower index.
    pub uuid_a: String,
    /// The other one.
    pub uuid_b: String,
    /// The best way between the two. `None`: not known.
    #[serde(rename = "type")]
    pub kind: Option<LinkType>,
    /// NVLinks between the two, or into the switch; 0 for other types.
    pub link_count: u32,
    /// One direction, all NVLinks together. `None`: not known, as for PCIe.
    pub bandwidth_bytes_per_second: Option<u64>,
    /// Whether one may read the other's memory.
    pub p2p_read: Option<bool>,
    /// Whether one may write it.
    pub p2p_write: Option<bool>,
}

/// A kind of way between two GPUs; ordered from near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkType {
    /// NVLinks from one to the other.
    Nvlink,
    /// NVLinks into the same NVSwitches.
    Nvswitch,
    /// Two GPUs on one board.
    SameBoard,
    /// One PCIe switch between them.
    Pix,
    /// Several PCIe switches.
    Pxb,
    /// A PCIe host bridge.
    Phb,
    /// Host bridges of one NUMA node.
    Node,
    /// The link between NUMA nodes.
    Sys,
}

/// A GPU's link to its host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PcieLink {
    /// The generation that is spoken now; an idle GPU lowers it.
    pub generation: Option<u32>,
    /// Lanes in use.
    pub width: Option<u32>,
    /// The best that GPU and slot do together.
    pub max_generation: Option<u32>,
    /// The most that they do together.
    pub max_width: Option<u32>,
}

/// A GPU's place in an NVLink network that spans nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fabric {
    /// Which network.
    pub cluster_uuid: String,
    /// GPUs of one clique reach each other's memory.
    pub clique_id: u32,
}

impl fmt::Display for LinkType {
    /// As `nvidia-smi topo -m` has them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nvlink | Self::Nvswitch => "NV",
            Self::SameBoard => "PSB",
            Self::Pix => "PIX",
            Self::Pxb => "PXB",
            Self::Phb => "PHB",
            Self::Node => "NODE",
            Self::Sys => "SYS",
        })
    }
}
