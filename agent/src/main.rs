//! The `carport` binary; everything is in the library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    carport_agent::commands::main(carport_agent::cli::Cli::parse())
}
