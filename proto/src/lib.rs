//! The wire: generated types and services, a client's way to the agent, and the server's end of a unix socket.
//!
//! - [`carport::v1`]: the agent's own API, with [`FILE_DESCRIPTOR_SET`] for reflection;
//! - [`csi::v1`], [`pluginregistration::v1`]: what the kubelet calls, as much of it as is served;
//! - [`podresources::v1`]: what the kubelet answers, as much of it as is asked;
//! - [`cri::v1`]: what the container runtime answers, as much of it as is asked;
//! - [`client`]: a channel to an agent's unix socket;
//! - [`authority`]: the server's end of one, for clients that name it by its path.
//!
//! Generated types stop at the adapters that use this crate: nothing below
//! them sees a gRPC message. Messages that carry secrets print without them.

pub mod authority;
pub mod client;
mod redact;

/// The agent's API.
pub mod carport {
    /// Version 1: `LocalityService`, `CacheService`, `GpuService`.
    pub mod v1 {
        #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
        tonic::include_proto!("carport.v1");
    }
}

/// The Container Storage Interface, as far as a node-only plugin serves it.
pub mod csi {
    /// Version 1: `Identity` and `Node`.
    pub mod v1 {
        #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
        tonic::include_proto!("csi.v1");
    }
}

/// How a plugin registers with the kubelet.
pub mod pluginregistration {
    /// Version 1: `Registration`. The package's name on the wire has no version.
    pub mod v1 {
        #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
        tonic::include_proto!("pluginregistration");
    }
}

/// Which pods hold which devices, told by the kubelet.
pub mod podresources {
    /// Version 1: `PodResourcesLister`. The package's name on the wire is the version alone.
    pub mod v1 {
        #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
        tonic::include_proto!("v1");
    }
}

/// The Container Runtime Interface: images in the node's container runtime.
pub mod cri {
    /// Version 1: `ImageService`, and of `RuntimeService` who answers. The package's name on the wire is
    /// `runtime.v1`.
    pub mod v1 {
        #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
        tonic::include_proto!("runtime.v1");
    }
}

/// The encoded descriptors of [`carport::v1`], for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("carport.v1");
