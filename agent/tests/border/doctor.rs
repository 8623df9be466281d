//! `carport doctor` from outside: what it finds, and its exit status.

use std::process::{Command, Output};

use fake_nvml::{FakeNvml, Scenario};
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

    /// In a mount namespace of its own, after a shell script, with words before the program.
    fn within(home: &Home, script: &str, before: &[&str]) -> Self {
        let carport = home.command(&[]);
        let script = format!("set -eu\n{script}\nexec \"$@\" doctor -o json");
        let mut command = Command::new("unshare");
        // Private: what is mounted in it is seen nowhere else.
        command.args(["--mount", "sh", "-c", &script, "sh"]).args(before);
        command.arg(carport.get_program()).env_clear();
        command.envs(carport.get_envs().filter_map(|(name, value)| Some((name, value?))));
        Self::of(&command.output().unwrap())
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

fn may_mount() -> bool {
    let may = is_root() && std::path::Path::new("/usr/bin/unshare").exists();
    if !may {
        eprintln!("SKIPPED: mounts need root and unshare");
    }
    may
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
    report.is("list", "ok", "there is none at");
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
    if !may_mount() {
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
        let prepared = format!(
            r#"mount --bind "$HOME/kubelet/pods" "$HOME/kubelet/pods"
            mount --make-{propagation} "$HOME/kubelet/pods""#
        );
        let report = Report::within(&home, &prepared, &[]);
        report.is("propagation", level, "pods");
        report.is("mounts", "ok", "Linux");
        report.is("csi", "ok", "no agent runs");
    }
}

#[test]
fn a_disk_that_is_full_small_or_not_to_be_written_is_told() {
    if !may_mount() {
        return;
    }
    let home = Home::new();
    configure(&home, "csi: {enabled: false}\nstore: {quota: 100MiB}\n");
    home.json(&["pull", &home.image("a", &[("config.json", "{}")])]);
    let small = r#"mkdir "$HOME/small" && mount -t tmpfs -o size=8m tmpfs "$HOME/small"
        cp -a "$HOME/store" "$HOME/small" && export CARPORT_ROOT="$HOME/small/store""#;
    let small = format!("{small}\n");
    let report = Report::within(&home, &small, &[]);
    report.is("disk", "warn", "store.quota is 100.0 MiB, the disk has 8.0 MiB");
    report.is("store", "ok", "1 images");

    std::fs::remove_dir(home.path("small")).unwrap();
    configure(&home, "csi: {enabled: false}\n");
    let full = small.clone() + r#"head -c 8100000 /dev/zero >"$HOME/small/fill""#;
    Report::within(&home, &full, &[]).is("disk", "warn", "free of 8.0 MiB");

    std::fs::remove_dir(home.path("small")).unwrap();
    let read_only = r#"mount --bind "$HOME/store" "$HOME/store"
        mount -o remount,bind,ro "$HOME/store""#;
    let report = Report::within(&home, read_only, &[]);
    report.is("store", "fail", "Read-only file system");
    let absent = r#"export CARPORT_ROOT="$HOME/store/below""#;
    let report = Report::within(&home, &format!("{read_only}\n{absent}"), &[]);
    report.is("store", "fail", "cannot be written");
}

#[test]
fn rights_and_devices_that_are_missing_are_told() {
    if !may_mount() {
        return;
    }
    let home = Home::new();
    let kubelet = home.path("kubelet");
    for folder in ["pods", "plugins_registry"] {
        std::fs::create_dir_all(kubelet.join(folder)).unwrap();
    }
    configure(&home, &format!("csi: {{enabled: true, kubeletDir: {}}}\n", kubelet.display()));
    // As in a container that is not privileged.
    let bare = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"];
    let report = Report::within(&home, "", &bare);
    report.is("mounts", "fail", "not permitted; run the agent as root with CAP_SYS_ADMIN");

    // In a pod without hostPID, on a kernel that would do.
    let alone = ["unshare", "--pid", "--fork", "--mount-proc"];
    Report::within(&home, "", &alone).is("native", "warn", "of pods are not seen from here");
    // With hostPID on a node that is a container itself, as kind makes them.
    let nested = r#"unshare --mount "$@"; exit $?"#;
    let nested = [&alone[..], &["sh", "-c", nested, "sh"]].concat();
    Report::within(&home, "", &nested).is("native", "ok", "this node is a container itself");
    Report::within(&home, "", &bare).is("native", "warn", "not mount beneath another mount");

    let no_device = "mount -t tmpfs tmpfs /dev";
    Report::within(&home, no_device, &[]).is("fuse", "warn", "/dev/fuse: No such file");
    let no_helper = r#"export PATH="$HOME""#;
    Report::within(&home, no_helper, &[]).is("fuse", "warn", "fusermount3 is not in PATH");
}

#[test]
fn somebody_else_at_the_sockets_or_the_port_is_told() {
    let home = Home::new();
    let kubelet = home.path("kubelet");
    for folder in ["pods", "plugins_registry", "plugins/csi.carport.dev"] {
        std::fs::create_dir_all(kubelet.join(folder)).unwrap();
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap();
    let text = format!(
        "csi: {{enabled: true, kubeletDir: {}, layoutFolders: [{}]}}\n\
         http: {{listen: '{port}'}}\ngpu: {{enabled: false}}\n",
        kubelet.display(),
        home.path("layouts").display()
    );
    std::fs::write(home.path("config.yaml"), text).unwrap();
    let socket = kubelet.join("plugins/csi.carport.dev/csi.sock");
    let _other = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let report = Report::run(&home, &[]);
    // This process, which is no carport.
    report.is("csi", "fail", "is served by border");
    report.is("http", "fail", &port.to_string());
    report.is("layouts", "warn", "no such folder");

    // An agent that serves no volumes, where some are wanted.
    std::fs::remove_file(&socket).unwrap();
    let _agent = home.agent(&[]);
    let report = Report::run(&home, &[]);
    report.is("csi", "fail", "an agent runs, and does not serve");
    report.is("registration", "fail", "an agent runs, and does not serve");
    assert!(report.0.to_string().contains("csi.enabled: false"));
}

#[test]
fn the_state_of_the_gpus_decides_how_bad_it_is() {
    // NVML's numbers: not permitted, driver not loaded, library of another version.
    for (code, level) in [(4, "fail"), (9, "warn"), (18, "fail")] {
        let home = Home::new();
        let fake = FakeNvml::new(&Scenario::h100s(1).failing("nvmlInit_v2", code));
        let text = format!(
            "csi: {{enabled: false}}\nhttp: {{listen: '127.0.0.1:0'}}\ngpu: {{library: {}}}\n",
            fake.library().display()
        );
        std::fs::write(home.path("config.yaml"), text).unwrap();
        Report::run(&home, &[]).is("gpus", level, "");
    }
    let home = Home::new();
    let fake = FakeNvml::new(&Scenario::h100s(2));
    let text = format!("csi: {{enabled: false}}\ngpu: {{library: {}}}\n", fake.library().display());
    std::fs::write(home.path("config.yaml"), text).unwrap();
    Report::run(&home, &[]).is("gpus", "ok", "2 through NVML, driver ");
}

#[test]
fn credentials_that_are_no_json_are_told() {
    let home = Home::new();
    let login = home.path("login.json");
    std::fs::write(&login, "{auths").unwrap();
    configure(
        &home,
        &format!("csi: {{enabled: false}}\nregistries: {{dockerConfig: {}}}\n", login.display()),
    );
    Report::run(&home, &[]).is("credentials", "fail", "is not JSON");
}
