//! Generates what the conformance suite's proxy speaks and the product does not.

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    tonic_prost_build::configure()
        .compile_protos(&["proto/controller.proto"], &["proto"])
        .map_err(std::io::Error::other)
}
