//! carport on a real cluster, as users run it: `make test-cluster`, `make test-cluster-short`.
//!
//! One cluster for all checks, in the order of [`CHECKS`]. Each prints one line: `ok NAME: what was seen`, or `FAIL`
//! with the reason, the pods' events and the logs. `CLUSTER` says what is run: `short`, `full`, or names of checks
//! separated by commas, of which the first must be `register`. Without it, as in `make test`, nothing is run.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use carport_tests::carport;
use carport_tests::cluster::{Machine, build, deployed, images, machine, session};
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;

mod arrive;
mod bench;
mod choose;
mod helm;
mod node;
mod restarts;
mod short;
mod slow;
mod wrong;

use bench::Bench;

/// The cluster's name. `make cluster` uses another one.
const NAME: &str = "test";

/// Time limits of all checks together.
const SHORT_LIMIT: Duration = Duration::from_secs(5 * 60);
const FULL_LIMIT: Duration = Duration::from_secs(20 * 60);

type Check = for<'a> fn(&'a mut Bench) -> LocalBoxFuture<'a, anyhow::Result<String>>;

macro_rules! check {
    ($path:path) => {
        |bench| $path(bench).boxed_local()
    };
}

/// Name, whether it is in the short form, and the check.
const CHECKS: &[(&str, bool, Check)] = &[
    ("register", true, check!(short::register)),
    ("inline", true, check!(short::inline)),
    ("claim", true, check!(short::claim)),
    ("private", true, check!(short::private)),
    ("refused", true, check!(short::refused)),
    ("choose", false, check!(choose::choose)),
    ("replicas", false, check!(choose::replicas)),
    ("restricted", false, check!(choose::restricted)),
    ("storm", false, check!(choose::storm)),
    ("stream", false, check!(arrive::stream)),
    ("deleted", false, check!(arrive::deleted)),
    ("wrong", false, check!(wrong::wrong)),
    ("agent-killed", false, check!(restarts::agent_killed)),
    ("sessions-killed", false, check!(restarts::sessions_killed)),
    ("kubelet", false, check!(restarts::kubelet)),
    ("reapplied", false, check!(restarts::reapplied)),
    ("pre-pull", false, check!(node::prepull)),
    ("runtime", false, check!(node::runtime)),
    ("csi-sanity", false, check!(node::csi_sanity)),
    ("uninstall", true, check!(short::uninstall)),
    ("chart", false, check!(helm::chart)),
    ("tls", false, check!(helm::tls)),
    ("chart-uninstall", false, check!(helm::uninstall)),
];

fn main() -> ExitCode {
    let Some(wanted) = std::env::var("CLUSTER").ok().filter(|wanted| !wanted.is_empty()) else {
        eprintln!("SKIPPED: `make test-cluster` runs this: it builds Kubernetes");
        return ExitCode::SUCCESS;
    };
    let known = |name: &str| CHECKS.iter().any(|(known, ..)| *known == name);
    let mut names: Vec<&str> = wanted.split(',').collect();
    let limit = if wanted == "short" { SHORT_LIMIT } else { FULL_LIMIT };
    if wanted == "short" || wanted == "full" {
        names = CHECKS
            .iter()
            .filter(|(_, short, _)| *short || wanted == "full")
            .map(|(name, ..)| *name)
            .collect();
    } else if let Some(name) = names.iter().find(|name| !known(name)) {
        eprintln!("CLUSTER={wanted}: no check {name:?}; write short, full, or names of checks");
        return ExitCode::FAILURE;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let done = match std::env::args().nth(1).as_deref() {
        Some("inside") => {
            let arguments: Vec<String> = std::env::args().skip(2).collect();
            let [state, image] = &arguments[..] else { panic!("inside STATE IMAGE") };
            runtime.block_on(inside(Path::new(state), Path::new(image), &names))
        }
        _ => runtime.block_on(outside(limit)),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("FAIL cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Builds what is needed, makes the machine, runs this program again inside, and removes the machine.
async fn outside(limit: Duration) -> anyhow::Result<()> {
    if !build()? {
        return Ok(());
    }
    let start = Instant::now();
    println!("cluster: building carport and its image");
    let image =
        images::carport(&deployed(carport::binary)?, &machine::folder())?.display().to_string();
    println!("cluster: carport's image made after {:.1} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let machine = Machine::make(NAME)?;
    let state = machine.state().display().to_string();
    let done = session::run(&machine, &["inside", &state, &image], limit).await;
    let failed = !done.as_ref().is_ok_and(std::process::ExitStatus::success);
    if failed {
        println!("{}", session::logs(machine.state()));
    }
    let removing = Instant::now();
    machine.remove()?;
    println!(
        "ok removed: no process, mount, cgroup, namespace or file is left, after {:.1} s",
        removing.elapsed().as_secs_f64()
    );
    println!("cluster: {:.0} s in all", start.elapsed().as_secs_f64());
    anyhow::ensure!(
        !failed,
        "{}",
        done.map_or_else(|error| format!("{error:#}"), |status| status.to_string())
    );
    Ok(())
}

async fn inside(state: &Path, image: &Path, names: &[&str]) -> anyhow::Result<()> {
    let mut bench = Bench::start(state, image).await?;
    let mut failed = Vec::new();
    for (name, _, check) in CHECKS.iter().filter(|(name, ..)| names.contains(name)) {
        let start = Instant::now();
        bench.begin(name);
        let done = std::panic::AssertUnwindSafe(check(&mut bench)).catch_unwind().await;
        let took = start.elapsed().as_secs_f64();
        match done {
            Ok(Ok(seen)) => {
                println!("ok {name}: {seen} ({took:.1} s)");
                bench.end(false).await;
                continue;
            }
            Ok(Err(error)) => println!("FAIL {name}: {error:#} ({took:.1} s)"),
            Err(_) => println!("FAIL {name}: panicked, see above ({took:.1} s)"),
        }
        failed.push(*name);
        bench.report().await;
        bench.end(true).await;
        // The other checks need the driver.
        if *name == "register" {
            break;
        }
    }
    anyhow::ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}
