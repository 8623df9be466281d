//! The node process `carport`, as a library, so that tests can reach it.
//!
//! ```text
//! cli ─► config ─► run ─┬─► api ─► placement   gRPC on a unix socket   ◄─┐
//!                       ├─► http, metrics      for scrapers and probes ◄─┴─ state: one value
//!                       ├─► kubelet            whether it can use the volumes ▲
//!                       ├─► prepull, cri       what must be here             ▲ store, pulls, volumes
//!                       ├─► watermark          what must go                  │
//!                       ├─► gpu                NVML's thread ────────────────┘
//!                       └─► carport-csi        volumes for the kubelet
//! cli ─► commands       the other subcommands, on the store or through the API
//! ```
//!
//! Bytes are `carport-image`'s, volumes `carport-csi`'s, the wire `carport-proto`'s.

pub mod api;
pub mod cli;
pub mod commands;
pub mod config;
pub mod cri;
pub mod gpu;
pub mod http;
pub mod kubelet;
pub mod listen;
pub mod logging;
mod memory;
pub mod metrics;
pub mod output;
pub mod page_cache;
pub mod placement;
pub mod prepull;
pub mod progress;
pub mod run;
pub mod scrub;
pub mod state;
pub mod warm;
pub mod watermark;
