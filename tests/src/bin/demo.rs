//! `make demo`: see [`carport_tests::demo`].
//!
//! `carport-demo PROGRAM` shows that program instead of the `carport` of this source tree.

use std::process::ExitCode;

use carport_tests::{carport, demo};

#[tokio::main]
async fn main() -> ExitCode {
    // The agent starts in another folder.
    let given = std::env::args_os().nth(1).map(|path| std::path::absolute(path).expect("a path"));
    // The demo shows the optimised binary where it is one itself.
    let binary = given.unwrap_or_else(|| carport::beside_this().to_owned());
    match demo::run(&binary, &mut std::io::stdout()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
