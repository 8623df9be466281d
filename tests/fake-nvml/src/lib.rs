//! A library that answers like NVIDIA's `libnvidia-ml.so.1`, for tests on
//! machines without a GPU.
//!
//! What it says stands in a JSON [`Scenario`]: the devices with their fields,
//! the calls that return an error code, the calls that hang. It exports the
//! published NVML functions that the agent's probe calls, with the struct
//! layouts of `nvml-wrapper-sys`; the agent loads it with its real NVML code.
//!
//! ```text
//! Scenario ─► <copy>.so.json ─┐
//! libfake_nvml.so ─► <copy>.so ─► dlopen by the code under test
//! ```
//!
//! # How a test uses it
//!
//! With this crate as a dev-dependency, cargo builds the shared library beside
//! the test, and [`FakeNvml::new`] makes a copy of it with its own scenario:
//!
//! ```no_run
//! let fake = fake_nvml::FakeNvml::new(&fake_nvml::Scenario::h100s(8));
//! // … hand `fake.library()` to the agent as the NVML library's path, then:
//! fake.set(&fake_nvml::Scenario::h100s(0));
//! ```
//!
//! Without Rust: `cargo build -p fake-nvml` writes `target/debug/libfake_nvml.so`.
//! The scenario is the file named by the environment variable
//! `FAKE_NVML_SCENARIO`, or else the library's own path with `.json` behind it.
//!
//! # What always holds
//!
//! - Two copies are two libraries: each is its own file, and no SONAME makes the
//!   loader take one for the other. So tests in one process do not meet.
//! - A scenario is read by `nvmlInit*` and by `nvmlDeviceGetCount_v2`, that is
//!   once per look at the GPUs; a look never sees half of a new scenario.
//! - Events are waited for in the file as it is: an error number (XID) that a test adds to
//!   a GPU is heard once by each event set that was there before.
//! - Between init and shutdown, and for each event set, a descriptor is open, as in the real
//!   library: who forgets to close one runs out of them.
//! - A struct whose `version` field is wrong is refused, as NVML does.

mod copy;
mod exports;
mod scenario;

pub use copy::FakeNvml;
pub use scenario::{Device, Memory, Mig, MigDevice, MigProfile, NvLink, Process, Scenario, code};
