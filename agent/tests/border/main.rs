//! The binary from outside: processes, signals, sockets, files, exit codes.
//!
//! Each test has a folder of its own for store, sockets and configuration, and kills only
//! what it started. Images come from OCI layout folders; registries are for whole-node tests.

#![allow(clippy::unwrap_used, reason = "a test says by panicking that it fails")]

mod api;
mod cache;
mod capacity;
mod cli;
mod doctor;
mod prepull;
mod process;
mod status_page;
mod support;
mod tcp;
mod watch;
