//! Volumes: how a stored image appears in a pod.
//!
//! ```text
//! kubelet ──► driver ─── identity, node ───► volume ───► mount ───► pod
//!    ▲          │     gRPC, codes, deadlines    │ records    kernel
//!    └── registration                           └──► carport-image: pulls, store
//! ```
//!
//! - [`mount`]: the edge of the world: showing a tree of the store at a path;
//! - [`fuse`]: the same for who may not mount: a tree served through FUSE;
//! - [`stream`]: images that pods read while they arrive, served by a process of its own;
//! - [`volume`]: publishing and taking away, by name, idempotent, recorded;
//! - [`Call`]: what is told of each publish and unpublish when it has ended;
//! - [`socket`], [`accept`]: unix sockets whose file stays in place, and accept loops that do not spin;
//! - [`driver`]: the CSI services on their sockets, and the registration with the kubelet.
//!
//! What an image is and how it comes to the node is `carport-image`'s; when the driver
//! starts and stops is the agent's.

pub mod accept;
mod call;
mod crash;
mod deadline;
pub mod driver;
pub mod fuse;
mod identity;
mod kubelet;
pub mod mount;
mod node;
mod registration;
pub mod socket;
pub mod stream;
#[cfg(test)]
mod testing;
pub mod volume;

pub use call::{Call, Operation, code_name};
pub use driver::{BoundDriver, Driver, DriverConfig, TokenLogin};
pub use kubelet::{KubeletStatus, RegistrationState};
pub use socket::{BindError, Sockets};
pub use stream::Streams;
pub use volume::Volumes;
