//! `carport doctor` from outside: what it finds, and its exit status.

use std::process::Output;

use serde_json::Value;

use crate::support::{Home, is_root, stderr, stdout};

/// The checks by what they say: (level, message, advice).
struct Report(Value);

impl Report {
    fn of(output: &Output) -> Self {
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}{}", stdout(output), stderr(output)));
        assert_eq!(report["healthy"], output.status.success(), "{report:#}");
        let failed = report["checks"].as_array().unwrap().iter().any(|c| c["level"] == "fail");
        assert_eq!(report["healthy"], !failed);
        Self(report)
    }

    fn run(home: &Home, arguments: &[&str]) -> Self {
        Self::of(&home.run(&[&["doctor", "-o", "json"], arguments].concat()))
    }

    fn all(&self, name: &str) -> Vec<(String, String)> {
        let checks = self.0["checks"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        checks
            .filter(|check| check["name"] == name)
            .inspect(|check| assert_eq!(check["advice"].is_null(), check["level"] == "ok"))
            .map(|check| (text(&check["level"]), text(&check["message"])))
            .collect()
    }

    /// The one check of this name.
    fn one(&self, name: &str) -> (String, String) {
        let mut found = self.all(name);
        assert_eq!(found.len(), 1, "{name} in {:#}", self.0);
        found.remove(0)
    }

    fn is(&self, name: &str, level: &str, part: &str) {
        let (found, message) = self.one(name);
        assert!(found == level && message.contains(part), "{name}: {found}: {message}");
    }
}

fn configure(home: &Home, text: &str) {
    // Another agent may have the usual port; the doctor would say so.
    let text = format!("http: {{listen: '127.0.0.1:0'}}\ngpu: {{enabled: false}}\n{text}");
    std::fs::write(home.path("config.yaml"), text).unwrap();
}

#[test]
fn a_machine_without_a_cluster_is_well() {
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\n");
    let report = Report::run(&home, &[]);
    assert_eq!(report.0["healthy"], true, "{:#}", report.0);
    report.is("configuration", "ok", "");
    report.is("store", "ok", "is made when it is first used");
    report.is("agent", "warn", "none runs");
    report.is("kubelet", "ok", "csi.enabled: false");
    report.is("gpus", "ok", "switched off");
    report.is("credentials", "ok", "none: ");
    assert!(!home.path("store").exists(), "it has changed something");
    assert_eq!(report.all("http").len(), 0, "the system chooses the port");

    let output = home.run(&["doctor"]);
    assert!(output.status.success());
    let text = stdout(&output);
    assert!(text.lines().any(|line| line.starts_with("ok    configuration  ")), "{text}");
    assert!(text.lines().any(|line| line.trim_start().starts_with("→ start `carport agent`")));
}

#[test]
fn the_store_and_the_agent_that_serves_it_are_found() {
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\nstore: {quota: 1MiB, keepFor: 1ms}\n");
    let reference = home.image("a", &[("config.json", "{}")]);
    home.json(&["pull", &reference]);
    let before = crate::support::names(&home.path("store"));
    let agent = home.agent(&[]);
    let report = Report::run(&home, &[&reference]);
    report.is("store", "ok", ": 1 images");
    report.is("agent", "ok", &format!("version {}", env!("CARGO_PKG_VERSION")));
    let digest = home.json(&["ls"])[0]["digest"].as_str().unwrap().to_owned();
    report.is("registry", "ok", &digest["sha256:".len()..][..12]);
    agent.terminate();
    // But for the agent's own.
    let mut after = crate::support::names(&home.path("store"));
    after.retain(|name| before.contains(name) || name.starts_with(".doctor"));
    assert_eq!(after, before);
}

#[test]
fn a_socket_that_a_killed_agent_left_is_told_from_one_that_is_served() {
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\n");
    std::fs::create_dir(home.path("run")).unwrap();
    drop(std::os::unix::net::UnixListener::bind(home.socket()).unwrap());
    Report::run(&home, &[]).is("agent", "warn", "that was killed has left");
}

#[test]
fn what_is_not_a_store_is_refused_and_left_alone() {
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\n");
    std::fs::create_dir(home.path("store")).unwrap();
    std::fs::write(home.path("store/letter.txt"), "dear").unwrap();
    Report::run(&home, &[]).is("store", "fail", "letter.txt");
    assert_eq!(crate::support::names(&home.path("store")), ["letter.txt"]);
    std::fs::write(home.path("store/format"), "carport store 99\n").unwrap();
    Report::run(&home, &[]).is("store", "fail", "carport store 99");
}

#[test]
fn the_list_and_the_credentials_are_read() {
    let home = Home::new();
    let list = home.path("list.yaml");
    let login = home.path("login.json");
    configure(
        &home,
        &format!(
            "csi: {{enabled: false}}\nprepull: {{list: {}}}\nregistries: {{dockerConfig: {}}}\n",
            list.display(),
            login.display()
        ),
    );
    let report = Report::run(&home, &[]);
    report.is("list", "fail", "list.yaml");
    report.is("credentials", "fail", "login.json");

    std::fs::write(&list, "images:\n  - imag: r:5000/a:v1\n").unwrap();
    std::fs::write(&login, r#"{"auths": {"r.example": {"auth": "c2VjcmV0OnBhc3M="}}}"#).unwrap();
    let report = Report::run(&home, &[]);
    report.is("list", "fail", "imag");
    report.is("credentials", "ok", "for r.example, in ");
    assert!(!report.0.to_string().contains("c2VjcmV0"), "a secret is told");

    std::fs::write(&list, "images:\n  - image: r:5000/a:v1\n").unwrap();
    Report::run(&home, &[]).is("list", "ok", "1 images");
}

#[test]
fn references_that_cannot_be_had_fail_with_what_to_do() {
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\n");
    // A port that was free a moment ago: nobody listens.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    drop(listener);
    let absent = format!("oci:{}:v1", home.path("absent").display());
    let away = format!("{host}/a:v1");
    let output = home.run(&["doctor", "-o", "json", "--plain-http", &host, &absent, &away]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("something is wrong; see above"));
    let report = Report::of(&output);
    let found = report.all("registry");
    assert_eq!(found.len(), 2);
    assert!(found.iter().all(|(level, _)| level == "fail"), "{found:?}");
    assert!(found[0].1.contains("absent") && found[1].1.contains(&host), "{found:?}");
    assert!(report.0.to_string().contains(&format!("CA of {host}")));
}

#[test]
fn a_configuration_that_makes_no_sense_fails() {
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\nstore: {highWatermark: 0.5, lowWatermark: 0.6}\n");
    Report::run(&home, &[]).is("configuration", "fail", "store.lowWatermark");
}

#[test]
fn the_kubelets_folders_and_their_propagation_are_looked_at() {
    if !is_root() || !std::path::Path::new("/usr/bin/unshare").exists() {
        eprintln!("SKIPPED: mount propagation needs root and unshare");
        return;
    }
    let home = Home::new();
    let kubelet = home.path("kubelet");
    configure(&home, &format!("csi: {{enabled: true, kubeletDir: {}}}\n", kubelet.display()));
    Report::run(&home, &[]).is("kubelet", "fail", "no such folder");
    for folder in ["pods", "plugins_registry"] {
        std::fs::create_dir_all(kubelet.join(folder)).unwrap();
    }
    for (propagation, level) in [("private", "fail"), ("shared", "ok")] {
        let script = format!(
            r#"set -eu
            mount --bind "$2/pods" "$2/pods" && mount --make-{propagation} "$2/pods"
            "$1" doctor -o json || true"#
        );
        let carport = home.command(&[]);
        let mut command = std::process::Command::new("unshare");
        // A namespace of its own, private: what is mounted in it is seen nowhere else.
        command.args(["--mount", "sh", "-c", &script, "sh"]);
        command.arg(carport.get_program()).arg(&kubelet).env_clear();
        command.envs(carport.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let output = command.output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", stderr(&output)));
        let report = Report(report);
        report.is("propagation", level, "pods");
        report.is("mounts", "ok", "Linux");
        report.is("csi", "ok", "no agent runs");
    }
}
