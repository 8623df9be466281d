//! Starting, stopping, being killed, being refused.

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Home, is_root, names, stderr, stdout};

#[test]
fn it_serves_until_sigterm_and_removes_its_socket() {
    let home = Home::new();
    let agent = home.agent(&[]);
    assert_eq!(agent.get("/readyz").0, 200);
    assert_eq!(agent.get("/healthz").0, 200);
    let (status, metrics) = agent.get("/metrics");
    assert_eq!(status, 200);
    assert!(
        metrics.contains("content-type: application/openmetrics-text; version=1.0.0"),
        "{metrics}"
    );
    assert!(metrics.trim_end().ends_with("# EOF"));
    assert_eq!(agent.get("/nothing").0, 404);
    assert!(home.socket().exists());
    agent.terminate();
    assert_eq!(names(&home.path("run")), [""; 0]);
}

#[test]
fn sigint_ends_it_as_well() {
    let home = Home::new();
    let agent = home.agent(&[]);
    agent.signal(Signal::INT);
    assert!(agent.ended().success());
}

#[test]
fn after_sigkill_the_next_start_replaces_the_stale_socket() {
    let home = Home::new();
    let reference = home.image("a", &[("weights.bin", "12345")]);
    let agent = home.agent(&[]);
    home.json(&["pull", &reference]);
    agent.signal(Signal::KILL);
    agent.ended();
    assert!(home.socket().exists(), "a killed agent removes nothing");
    let agent = home.agent(&[]);
    assert_eq!(home.json(&["status"])["models"][0]["reference"], reference.as_str());
    agent.terminate();
}

#[test]
fn a_second_agent_on_the_same_socket_is_refused_and_the_first_goes_on() {
    let home = Home::new();
    let agent = home.agent(&[]);
    let error = home.fails(&["agent", "--csi", "false", "--http-listen", "127.0.0.1:0"]);
    assert!(
        error.contains("api.socket (--socket): ") && error.contains("another process serves there")
    );
    assert_eq!(home.json(&["status"])["node_name"], "node-1");
    agent.terminate();
}

#[test]
fn a_taken_http_port_is_refused_and_leaves_no_socket() {
    let home = Home::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = home.fails(&["agent", "--csi", "false", "--http-listen", &address]);
    assert!(error.contains(&address) && error.contains("--http-listen"), "{error}");
    assert!(!home.socket().exists());
}

#[test]
fn a_bad_configuration_is_told_before_anything_is_made() {
    let home = Home::new();
    for (text, part) in [
        ("pull:\n  atempts: 3\n", "config.yaml:2:3: "),
        ("pull: {attempts: 0}\n", "pull.attempts: "),
        ("pull: {attempts: [}\n", "config.yaml:1:"),
    ] {
        std::fs::write(home.path("config.yaml"), text).unwrap();
        let error = home.fails(&["agent"]);
        assert!(error.contains(part), "{error}");
    }
    let absent = home.path("absent.yaml");
    let error = home.fails(&["agent", "--config", absent.to_str().unwrap()]);
    assert!(error.contains("absent.yaml") && error.contains("--config"), "{error}");
    let folder = home.path("");
    let error = home.fails(&["agent", "--config", folder.to_str().unwrap()]);
    assert!(error.contains("not a regular file"), "{error}");
    assert!(!home.path("store").exists() && !home.path("run").exists());
}

#[test]
fn flags_win_over_the_environment_and_that_over_the_file() {
    let home = Home::new();
    let text = "nodeName: file\nlog: {level: debug}\ncsi: {driverName: file.example}\n";
    std::fs::write(home.path("config.yaml"), text).unwrap();
    let mut command = home.command(&["agent", "--print-config", "--node-name", "flag"]);
    command.env("CARPORT_NODE_NAME", "environment");
    command.env("CARPORT_CSI_DRIVER_NAME", "environment.example");
    let yaml = stdout(&command.output().unwrap());
    for line in ["nodeName: flag", "  driverName: environment.example", "  level: debug"] {
        assert!(yaml.lines().any(|found| found == line), "{line} is not in {yaml}");
    }
    let json = home.json(&["agent", "--print-config"]);
    assert_eq!(json["nodeName"], "file");
    assert!(!home.path("store").exists(), "printing starts nothing");
}

#[test]
fn wrong_usage_is_2() {
    let home = Home::new();
    for arguments in [&["agnet"][..], &["pull"], &["ls", "-o", "xml"], &[]] {
        let output = home.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(stderr(&output).contains("--help") || stderr(&output).contains("Usage"));
    }
    let output = home.run(&["--help"]);
    assert!(output.status.success());
    assert!(stdout(&output).contains("carport pack ./llama oci:/tmp/llama:v1"));
}

#[test]
fn the_driver_s_sockets_come_and_go() {
    if !is_root() {
        eprintln!("SKIPPED: the CSI driver needs root");
        return;
    }
    let home = Home::new();
    let kubelet = home.path("kubelet");
    let agent = home.agent(&["--csi", "true", "--kubelet-dir", kubelet.to_str().unwrap()]);
    let registration = kubelet.join("plugins_registry");
    crate::support::eventually("the registration socket", || {
        registration.join("csi.carport.dev-reg.sock").exists().then_some(())
    });
    assert!(kubelet.join("plugins/csi.carport.dev/csi.sock").exists());
    agent.terminate();
    assert_eq!(names(&registration), [""; 0]);
    assert_eq!(names(&kubelet.join("plugins/csi.carport.dev")), [""; 0]);
}

#[test]
fn what_is_logged_in_a_pull_names_it() {
    let home = Home::new();
    let reference = home.image("a", &[("weights.bin", "12345")]);
    let output = home.run(&["pull", &reference, "--log-level", "info", "--log-format", "json"]);
    let text = stderr(&output);
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let spans: Vec<Value> = lines.map(|line| line["span"].clone()).collect();
    let expected = json!({"name": "pull", "reference": reference});
    assert!(spans.contains(&expected), "{text}");
}
