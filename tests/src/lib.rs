//! Support for tests over whole nodes: real servers, fixtures, and suites that several
//! implementations pass.
//!
//! Nothing here is mocked where the real thing can run: [`registry`] starts Debian's
//! docker-registry, [`containerd`] Debian's containerd. What the real thing never does on request is scripted: [`scripted`]
//! is an HTTP server that answers, stalls and breaks off as a test says; [`cri`] is a container runtime that is
//! none.

pub mod api_reference;
pub mod carport;
pub mod cluster;
pub mod containerd;
pub mod cri;
pub mod demo;
pub mod helm;
pub mod images;
pub mod kustomize;
pub mod layouts;
pub mod models;
pub mod node;
pub mod pod_security;
pub mod registry;
pub mod sanity;
pub mod scripted;
pub mod sources;
