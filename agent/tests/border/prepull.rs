//! The list as a ConfigMap is mounted: a link to a file below `..data`, which is swapped.

use std::os::unix::fs::symlink;
use std::path::Path;

use crate::support::{Home, eventually};

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

#[test]
fn the_list_is_followed_and_a_bad_one_changes_nothing() {
    let home = Home::new();
    let (a, b) = (home.image("a", &[("w", "1")]), home.image("b", &[("w", "2")]));
    let volume = home.path("list");
    swap(&volume, "1", &format!("images:\n- image: {a}\n"));
    let list = volume.join("list.yaml");
    let agent = home.agent(&["--prepull-list", list.to_str().unwrap()]);
    let ready = || agent.metric("carport_prepull_entries{state=\"ready\"}");
    eventually("the first image", || (ready() == Some(1.0)).then_some(()));
    assert_eq!(home.json(&["ls"])[0]["references"][0], a.as_str());

    swap(&volume, "2", &format!("images:\n- imgae: {b}\n"));
    eventually("the bad list is told", || {
        (agent.metric("carport_prepull_list_valid") == Some(0.0)).then_some(())
    });
    assert_eq!(ready(), Some(1.0), "the last good list stays in force");

    let absent = format!("oci:{}:v1", home.path("absent").display());
    swap(&volume, "3", &format!("images:\n- image: {b}\n- image: {absent}\n"));
    eventually("the second image, and the failure of the third", || {
        let failed = agent.metric("carport_prepull_entries{state=\"failed\"}");
        (ready() == Some(1.0) && failed == Some(1.0)).then_some(())
    });
    assert_eq!(agent.metric("carport_prepull_list_valid"), Some(1.0));
    assert_eq!(home.json(&["ls"]).as_array().unwrap().len(), 2, "what left the list stays");
    agent.terminate();
}

#[test]
fn a_list_that_comes_later_is_found() {
    let home = Home::new();
    let a = home.image("a", &[("w", "1")]);
    let volume = home.path("list");
    std::fs::create_dir(&volume).unwrap();
    let list = volume.join("list.yaml");
    let agent = home.agent(&["--prepull-list", list.to_str().unwrap()]);
    swap(&volume, "1", &format!("images:\n- image: {a}\n"));
    eventually("the image", || {
        (agent.metric("carport_prepull_entries{state=\"ready\"}") == Some(1.0)).then_some(())
    });
    agent.terminate();
}
