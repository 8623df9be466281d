//! The list as a ConfigMap is mounted: a link to a file below `..data`, which is swapped.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::support::{Agent, Home, eventually};

/// Puts a new content in place as the kubelet does.
fn swap(volume: &Path, version: &str, text: &str) {
    let data = volume.join(format!("..{version}"));
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("list.yaml"), text).unwrap();
    symlink(format!("..{version}"), volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if !volume.join("list.yaml").exists() {
        symlink("..data/list.yaml", volume.join("list.yaml")).unwrap();
    }
}

/// An agent that follows a list and does not wait before it begins; and the list's volume.
fn following(home: &Home, text: &str, arguments: &[&str]) -> (Agent, PathBuf) {
    let volume = home.path("list");
    std::fs::create_dir(&volume).unwrap();
    if !text.is_empty() {
        swap(&volume, "0", text);
    }
    std::fs::write(home.path("config.yaml"), "prepull: {startJitter: 1ms}\n").unwrap();
    let list = volume.join("list.yaml");
    let mut all = vec!["--prepull-list", list.to_str().unwrap()];
    all.extend(arguments);
    (home.agent(&all), volume)
}

fn entries(agent: &Agent, state: &str) -> f64 {
    agent.metric(&format!("carport_prepull_entries{{state=\"{state}\"}}")).unwrap()
}

/// Waits for so many entries in a state.
fn until(agent: &Agent, state: &str, count: f64) {
    eventually(&format!("{count} {state}"), || (entries(agent, state) == count).then_some(()));
}

/// Its ConfigMap is optional.
#[test]
fn a_list_may_come_later_and_one_that_is_deleted_stays_in_force() {
    let home = Home::new();
    let image = home.image("a", &[("w", "1")]);
    let (agent, volume) = following(&home, "", &[]);
    let reasons = || home.json(&["status"])["reasons"].as_array().unwrap().clone();
    assert_eq!(reasons(), Vec::<serde_json::Value>::new());
    assert_eq!(agent.metric("carport_prepull_list_reads_total{result=\"failed\"}"), Some(0.0));
    swap(&volume, "1", &format!("images:\n- image: {image}\n"));
    until(&agent, "ready", 1.0);

    std::fs::remove_file(volume.join("list.yaml")).unwrap();
    let told = eventually("the deleted list is reported", || reasons().first().cloned());
    assert_eq!(told["code"], "PREPULL_LIST_INVALID");
    assert!(told["message"].as_str().unwrap().contains("write `images: []`"), "{told}");
    assert_eq!(entries(&agent, "ready"), 1.0);
    agent.terminate();
}

#[test]
fn the_list_is_followed_and_a_bad_one_changes_nothing() {
    let home = Home::new();
    let (a, b) = (home.image("a", &[("w", "1")]), home.image("b", &[("w", "2")]));
    let (agent, volume) = following(&home, &format!("images:\n- image: {a}\n"), &[]);
    until(&agent, "ready", 1.0);
    assert_eq!(home.json(&["ls"])[0]["references"][0], a.as_str());

    swap(&volume, "2", &format!("images:\n- imgae: {b}\n"));
    let told = eventually("the bad list is told", || {
        let status = home.json(&["status"]);
        status["reasons"].get(0).cloned()
    });
    assert_eq!(told["code"], "PREPULL_LIST_INVALID");
    let message = told["message"].as_str().unwrap();
    assert!(message.contains("list.yaml:2:3: ") && message.contains("`image`?"), "{message}");
    assert_eq!(agent.metric("carport_prepull_list_valid"), Some(0.0));
    assert_eq!(entries(&agent, "ready"), 1.0, "the last good list stays in force");

    let absent = format!("oci:{}:v1", home.path("absent").display());
    swap(&volume, "3", &format!("images:\n- image: {b}\n- image: {absent}\n"));
    until(&agent, "failed", 1.0);
    until(&agent, "ready", 1.0);
    assert_eq!(agent.metric("carport_prepull_list_valid"), Some(1.0));
    eventually("the node is well again", || {
        (home.json(&["status"])["state"] == "ready").then_some(())
    });
    eventually("both images: what left the list stays", || {
        (home.json(&["ls"]).as_array().unwrap().len() == 2).then_some(())
    });
    agent.terminate();
}

#[test]
fn what_is_pinned_stays_until_it_leaves_the_list_also_when_the_agent_was_away() {
    let home = Home::new();
    let (a, b) = (home.image("a", &[("w", "1")]), home.image("b", &[("w", "2")]));
    let pinned = format!("images:\n- image: {a}\n  pin: forever\n- image: {b}\n  pin: 1h\n");
    let (agent, volume) = following(&home, &pinned, &[]);
    until(&agent, "ready", 2.0);
    for image in [&a, &b] {
        let refused = home.fails(&["rm", image]);
        assert!(refused.contains("pinned by prepull"), "{refused}");
    }
    swap(&volume, "1", &format!("images:\n- image: {b}\n  pin: 1h\n"));
    eventually("a is anybody's to remove", || home.run(&["rm", &a]).status.success().then_some(()));
    home.fails(&["rm", &b]);
    agent.terminate();

    swap(&volume, "2", "images: []\n");
    let list = volume.join("list.yaml");
    let agent = home.agent(&["--prepull-list", list.to_str().unwrap()]);
    eventually("and b", || home.run(&["rm", &b]).status.success().then_some(()));
    agent.terminate();
}

#[test]
fn a_list_that_comes_later_is_found() {
    let home = Home::new();
    let a = home.image("a", &[("w", "1")]);
    let (agent, volume) = following(&home, "", &[]);
    swap(&volume, "1", &format!("images:\n- image: {a}\n"));
    until(&agent, "ready", 1.0);
    agent.terminate();
}

#[test]
fn conditions_and_windows_leave_entries_alone_until_they_are_met() {
    let home = Home::new();
    let image = |name: &str| home.image(name, &[("w", name)]);
    let (a, b, c) = (image("a"), image("b"), image("c"));
    let labels = home.path("labels");
    std::fs::write(&labels, "zone=\"z1\"\n").unwrap();
    // Two hours from now, for an hour: shut, whenever this runs.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let hour = (now.as_secs() / 3600 + 2) % 24;
    let window = format!("[{{from: '{hour:02}:00', to: '{:02}:00'}}]", (hour + 1) % 24);
    let text = format!(
        "images:\n- image: {a}\n  when: {{labels: {{pool: h100, zone: z1}}}}\n\
         - image: {b}\n  when: {{gpus: {{count: 1}}}}\n\
         - image: {c}\n  schedule: {window}\n"
    );
    let labels = labels.to_str().unwrap();
    let more = ["--node-label", "pool=h100", "--node-labels-file", labels];
    let (agent, volume) = following(&home, &text, &more);
    until(&agent, "ready", 1.0);
    until(&agent, "excluded", 1.0);
    until(&agent, "waiting", 1.0);
    assert_eq!(home.json(&["ls"])[0]["references"][0], a.as_str());

    std::fs::write(labels, "zone=\"z2\"\n").unwrap();
    swap(&volume, "1", &text.replace("z1", "z2").replace(&window, "[]").replace(&a, &b));
    // Twice b now: not accepted; the first list stays, and so does its image.
    eventually("refused", || {
        (agent.metric("carport_prepull_list_valid") == Some(0.0)).then_some(())
    });
    swap(&volume, "2", &text.replace("z1", "z2").replace(&window, "[]"));
    until(&agent, "ready", 2.0);
    agent.terminate();
}

#[test]
fn a_tag_that_moves_is_followed_and_thousands_of_entries_are_no_burden() {
    let home = Home::new();
    let a = home.image("a", &[("w", "1")]);
    // Layouts that do not exist fail at once, and are tried again later and later.
    let others: String = (0..2000).map(|n| format!("- image: oci:/absent/{n}:v1\n")).collect();
    let text = format!("refresh: 10s\nimages:\n- image: {a}\n  priority: 1\n{others}");
    let (agent, _volume) = following(&home, &text, &[]);
    until(&agent, "ready", 1.0);
    until(&agent, "failed", 2000.0);
    let before = home.json(&["ls"])[0]["digest"].clone();
    home.image("a", &[("w", "other weights")]);
    eventually("the new image", || {
        let now = home.json(&["status"])["models"].clone();
        let of_a = |model: &&serde_json::Value| model["reference"] == a.as_str();
        let digest = now.as_array()?.iter().find(of_a)?["digest"].clone();
        (digest != before && !digest.as_str()?.is_empty()).then_some(())
    });
    assert_eq!(entries(&agent, "ready"), 1.0);
    agent.terminate();
}
