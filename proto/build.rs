//! Generates the code for the .proto files, into `OUT_DIR` only. `PROTOC` is `proto/protoc`.

use std::io;
use std::path::PathBuf;

const CARPORT: [&str; 4] = [
    "proto/carport/v1/common.proto",
    "proto/carport/v1/gpu.proto",
    "proto/carport/v1/locality.proto",
    "proto/carport/v1/cache.proto",
];

const KUBELET: [&str; 4] = [
    "proto/csi/v1/csi.proto",
    "proto/pluginregistration/v1/api.proto",
    "proto/podresources/v1/api.proto",
    "proto/cri/v1/api.proto",
];

/// Messages whose derived `Debug` would print secrets, pod tokens or mount
/// options; `src/redact.rs` writes theirs by hand.
const SECRET: [&str; 3] = [
    ".csi.v1.NodePublishVolumeRequest",
    ".csi.v1.VolumeCapability.MountVolume",
    ".runtime.v1.AuthConfig",
];

fn main() -> io::Result<()> {
    // Whoever prints one such line has to name everything.
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    tonic_prost_build::configure()
        // What reflection tells about; the kubelet's services are not reflected.
        .file_descriptor_set_path(out.join("carport.v1.bin"))
        .compile_protos(&CARPORT, &["proto"])?;
    tonic_prost_build::configure().skip_debug(SECRET).compile_protos(&KUBELET, &["proto"])
}
