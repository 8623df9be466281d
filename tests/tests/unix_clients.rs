//! Other people's gRPC clients on all three unix sockets of the agent. Most of them send a socket's path as
//! `:authority`, which h2 refuses: see `docs/decisions/unix-socket-authority.md`.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use carport_tests::carport::{binary, workspace};
use carport_tests::node::Node;

/// What builds or installs a client: only where `CARPORT_TEST_CLIENTS` asks for it, as `make test-clients` does.
fn prepare(what: &str, steps: &mut [Command]) -> bool {
    if std::env::var_os("CARPORT_TEST_CLIENTS").is_none() {
        eprintln!("SKIPPED: no {what}: run `make test-clients`");
        return false;
    }
    for step in steps {
        let said = match step.output() {
            Ok(output) if output.status.success() => continue,
            Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(error) => error.to_string(),
        };
        eprintln!("SKIPPED: no {what}: {}: {said}", step.get_program().display());
        return false;
    }
    true
}

fn tools() -> PathBuf {
    workspace().join("target/tools")
}

fn clients() -> PathBuf {
    workspace().join("tests/clients")
}

/// Runs a client, in the node's mount namespace, against its three sockets.
fn calls_all_sockets(node: &Node, client: &[&Path]) {
    let mut command = node.within(client[0]);
    command.args(&client[1..]);
    command.args([node.registration_socket(), node.csi_socket(), node.socket()]);
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (said, error) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    println!("{said}");
    assert!(status.success(), "{said}\n{error}\n{}", node.log());
    for socket in ["registration", "csi", "carport"] {
        assert!(said.contains(&format!("{socket}, ")), "{said}");
    }
    // A client that names an authority of its own is normal.
    let log = node.log();
    assert!(!log.contains("authority") && !log.contains("PROTOCOL_ERROR"), "{log}");
}

#[test]
fn grpc_go_calls_all_sockets_dialling_as_the_kubelet_does() {
    let program = tools().join("carport-grpc-go");
    let mut build = Command::new("go");
    build.args(["build", "-o"]).arg(&program).arg(".").current_dir(clients().join("grpc-go"));
    if !prepare("grpc-go", &mut [build]) {
        return;
    }
    let Some(node) = Node::start(binary(), &[]) else { return };
    calls_all_sockets(&node, &[&program, Path::new("call")]);
}

#[test]
fn grpcio_calls_all_sockets() {
    let venv = tools().join("clients");
    let mut make = Command::new("python3");
    make.args(["-m", "venv"]).arg(&venv);
    let mut install = Command::new(venv.join("bin/pip"));
    install.args(["install", "--quiet", "grpcio==1.85.0"]);
    if !prepare("grpcio", &mut [make, install]) {
        return;
    }
    let Some(node) = Node::start(binary(), &[]) else { return };
    let script = clients().join("grpcio_client.py");
    calls_all_sockets(&node, &[&venv.join("bin/python"), &script]);
}
