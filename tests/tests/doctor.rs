//! `carport doctor` and real registries: logins, certificates, plain HTTP.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use carport_tests::carport::binary;
use carport_tests::registry::{PASSWORD, Registry, USERNAME};
use serde_json::{Value, json};

/// The check of the one reference, and what to do.
fn doctor(home: &Path, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new(binary());
    command.args(["doctor", "-o", "json", "--config"]).arg(home.join("config.yaml"));
    command.args(arguments).env_clear().env("HOME", home);
    let output = command.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{error}: {}", String::from_utf8_lossy(&output.stderr));
    });
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == "registry").unwrap();
    let text = |key: &str| check[key].as_str().unwrap_or_default().to_owned();
    (format!("{} {}", text("level"), text("message")), text("advice"))
}

fn home() -> tempfile::TempDir {
    let home = tempfile::tempdir().unwrap();
    let store = home.path().join("store");
    let text = format!(
        "root: {}\ncsi: {{enabled: false}}\ngpu: {{enabled: false}}\nhttp: {{listen: '127.0.0.1:0'}}\n",
        store.display()
    );
    std::fs::write(home.path().join("config.yaml"), text).unwrap();
    std::fs::create_dir(home.path().join("model")).unwrap();
    std::fs::write(home.path().join("model/config.json"), "{}").unwrap();
    home
}

fn pack(home: &Path, arguments: &[&str]) {
    let mut command = Command::new(binary());
    command.arg("pack").arg(home.join("model")).args(arguments).env_clear();
    let output = command.env("HOME", home).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_login_that_is_missing_wrong_or_right_is_told() {
    let Some(registry) = Registry::start_with_login() else { return };
    let (home, host) = (home(), registry.host());
    let (reference, login) = (format!("{host}/team/a:v1"), home.path().join("login.json"));
    let with_login = |password: &str| {
        let auth = STANDARD.encode(format!("{USERNAME}:{password}"));
        let text = json!({"auths": {host: {"auth": auth}}}).to_string();
        std::fs::write(&login, text).unwrap();
    };
    with_login(PASSWORD);
    let login = login.to_str().unwrap();
    pack(home.path(), &[&reference, "--plain-http", host, "--docker-config", login]);

    let (seen, advice) = doctor(home.path(), &[&reference, "--plain-http", host]);
    assert!(seen.starts_with("fail "), "{seen}");
    assert!(advice.contains(host) && advice.contains(".docker/config.json"), "{advice}");

    let asked = [&*reference, "--plain-http", host, "--docker-config", login];
    let (seen, _) = doctor(home.path(), &asked);
    assert!(seen.starts_with("ok ") && seen.contains("with the node's credentials"), "{seen}");

    with_login("wrong");
    let (seen, advice) = doctor(home.path(), &asked);
    assert!(seen.starts_with("fail ") && advice.contains(login), "{seen}: {advice}");

    with_login(PASSWORD);
    let (seen, _) = doctor(home.path(), &[&[&*format!("{host}/team/b:v1")], &asked[1..]].concat());
    assert!(seen.starts_with("fail ") && seen.contains("team/b"), "{seen}");
}

#[test]
fn an_authority_that_nobody_knows_and_plain_http_are_told() {
    let (Some(tls), Some(plain)) = (Registry::start_with_tls(), Registry::start()) else { return };
    let home = home();
    for registry in [&tls, &plain] {
        let (seen, advice) = doctor(home.path(), &[&format!("{}/a:v1", registry.host())]);
        assert!(seen.starts_with("fail ") && seen.contains("TLS"), "{seen}");
        assert!(advice.contains("CA (registries.hostsDir)"), "{advice}");
        assert!(advice.contains("registries.plainHttp"), "{advice}");
    }
    let (host, reference) = (plain.host(), format!("{}/a:v1", plain.host()));
    pack(home.path(), &[&reference, "--plain-http", host]);
    let (seen, _) = doctor(home.path(), &[&reference, "--plain-http", host]);
    assert!(seen.contains("for everybody, no credentials needed"), "{seen}");
}
