//! The bytes of model images: references, sources, pulls, and the store.
//!
//! ```text
//! Reference ─► Sources::open ─► Source ─► manifest ─► Puller ─► Store
//!                                  └─ ranges of blobs ──┘         ├ objects   one file per content
//!                                                                 ├ layers    what a layer unpacked to
//!                                                                 └ trees     hard links: what a pod sees
//! ```
//!
//! Nothing here knows Kubernetes, a gRPC server or a GPU; volumes are made of
//! trees in `carport-csi`, and `carport-agent` decides what to pull and when.

mod crash;
pub mod digest;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod layer;
pub mod manifest;
pub mod pack;
pub mod pull;
pub mod reference;
pub mod runtime;
pub mod source;
pub mod store;
#[cfg(test)]
mod testing;
pub mod tree;

pub use digest::{Digest, ObjectId};
pub use pull::{PullError, Puller};
pub use reference::Reference;
pub use runtime::Runtime;
pub use store::Store;
