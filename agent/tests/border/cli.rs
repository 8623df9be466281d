//! Commands that work on the store, and those that ask the agent.

use crate::support::{Home, is_root, stderr, stdout};

const FILES: &[(&str, &str)] = &[("config.json", "{}"), ("weights/a.bin", "123456789")];

#[test]
fn pack_pull_ls_rm_gc() {
    let home = Home::new();
    let reference = home.image("a", FILES);
    let pulled = home.json(&["pull", &reference]);
    assert_eq!(pulled[0]["reference"], reference.as_str());
    assert_eq!(pulled[0]["unpacked_bytes"], 11);
    assert_eq!(pulled[0]["files"], 2);
    assert_eq!(pulled[0]["already_present"], false);
    assert_eq!(home.json(&["pull", &reference])[0]["already_present"], true);

    let listed = home.json(&["ls"]);
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["references"][0], reference.as_str());
    assert_eq!(listed[0]["digest"], pulled[0]["digest"]);
    let text = stdout(&home.run(&["ls"]));
    assert!(text.starts_with("REFERENCE") && text.contains(&reference), "{text}");

    let digest = pulled[0]["digest"].as_str().unwrap();
    let removed = home.json(&["rm", &digest[7..19]]);
    assert_eq!(removed[0]["digest"], digest);
    assert_eq!(removed[0]["removed"], true);
    assert_eq!(home.json(&["ls"]).as_array().unwrap().len(), 0);
    assert_eq!(home.json(&["gc"])["objects"], 2);
    assert_eq!(home.json(&["gc"])["objects"], 0);
}

#[test]
fn where_no_terminal_is_a_pull_is_two_lines() {
    let home = Home::new();
    let reference = home.image("a", FILES);
    let output = home.run(&["pull", &reference]);
    let text = stderr(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert_eq!(lines[0], format!("pulling {reference}"));
    assert!(lines[1].starts_with(&format!("pulled {reference}: ")), "{text}");
    let data = stdout(&output);
    assert!(data.starts_with("sha256:") && data.ends_with(&format!(" {reference}\n")), "{data}");
}

#[test]
fn of_several_pulls_each_failure_is_told_and_the_others_succeed() {
    let home = Home::new();
    let good = home.image("a", FILES);
    let bad = [
        format!("oci:{}:v1", home.path("x").display()),
        format!("oci:{}:v1", home.path("y").display()),
    ];
    let output = home.run(&["pull", &good, &bad[0], &bad[1], "-o", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert_eq!(text.lines().filter(|line| line.starts_with("carport: ")).count(), 2, "{text}");
    let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(done.as_array().unwrap().len(), 1);
    assert_eq!(home.json(&["ls"]).as_array().unwrap().len(), 1);
}

#[test]
fn what_is_not_there_is_named() {
    let home = Home::new();
    let absent = format!("oci:{}:v1", home.path("absent").display());
    assert!(home.fails(&["pull", &absent]).contains("absent"));
    assert!(home.fails(&["rm", "r:5000/a:1"]).contains("r:5000/a:1: not in the store"));
    assert!(home.fails(&["rm", "Not A Ref"]).contains("Not A Ref"));
    let folder = home.path("absent");
    assert!(home.fails(&["pack", folder.to_str().unwrap(), &absent]).contains("absent"));
}

#[test]
fn without_an_agent_the_question_fails_and_says_what_to_start() {
    let home = Home::new();
    for arguments in [&["status"][..], &["locate", "r:5000/a:1"]] {
        let error = home.fails(arguments);
        assert!(error.contains("carport.sock") && error.contains("carport agent"), "{error}");
    }
}

#[test]
fn gpus_are_answered_without_an_agent() {
    let home = Home::new();
    let answer = home.json(&["gpus"]);
    let state = answer["provider"]["state"].as_str().unwrap();
    assert_ne!(state, "disabled");
    assert_ne!(state, "stale");
    if state != "ok" {
        assert_eq!(answer["gpus"].as_array().unwrap().len(), 0);
        assert_ne!(answer["provider"]["message"], "");
    }
}

#[test]
fn an_image_is_mounted_read_only_and_taken_away() {
    if !is_root() || !std::path::Path::new("/usr/bin/unshare").exists() {
        eprintln!("SKIPPED: mounting needs root and unshare");
        return;
    }
    let home = Home::new();
    let reference = home.image("a", FILES);
    let target = home.path("target");
    // In a mount namespace of its own, so that nothing is left behind whatever happens.
    let script = r#"
        set -eu
        "$1" mount "$2" "$3" --path /models
        test "$(cat "$3/weights/a.bin")" = 123456789
        ! touch "$3/new" 2>/dev/null
        "$1" mount "$2" "$3" --path /models
        "$1" pins | grep -q "mount:.*$2"
        if "$1" rm "$2" 2>"$4"; then exit 1; fi
        grep -q "mounted at $3" "$4"
        if "$1" umount /proc 2>"$4"; then exit 1; fi
        grep -q "no image is mounted there" "$4"
        "$1" umount "$3"
        test ! -e "$3/weights"
        test "$("$1" pins -o json)" = "[]"
        "$1" rm "$2"
    "#;
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh", env!("CARGO_BIN_EXE_carport"), &reference]);
    command.arg(&target).arg(home.path("error"));
    command.env("CARPORT_ROOT", home.path("store")).env("CARPORT_CONFIG", home.path("config.yaml"));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}{}", stdout(&output), stderr(&output));
}
