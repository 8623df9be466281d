//! `make demo`: see [`carport_tests::demo`].

use std::process::ExitCode;

use carport_tests::{carport, demo};

#[tokio::main]
async fn main() -> ExitCode {
    // The demo shows the optimised binary where it is one itself.
    match demo::run(carport::beside_this(), &mut std::io::stdout()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
