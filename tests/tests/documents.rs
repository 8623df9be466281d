//! Documents name files, sections, commands, metrics and flags that there are.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use carport_agent::prepull::List;
use carport_csi::volume::VolumeAttributes;
use carport_tests::carport::{binary, workspace};
use serde_json::Value;

fn documents() -> Vec<(PathBuf, String)> {
    let folder = std::fs::read_dir(workspace().join("docs")).unwrap();
    let mut paths: Vec<PathBuf> = folder.map(|entry| entry.unwrap().path()).collect();
    paths.extend(["README.md", "CONTRIBUTING.md"].map(|name| workspace().join(name)));
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    let text = |path: PathBuf| (path.clone(), std::fs::read_to_string(path).unwrap());
    paths.into_iter().map(text).collect()
}

/// As GitHub names a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || "-_".contains(*c)).collect()
}

fn anchors(path: &Path) -> BTreeSet<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut seen = 0;
    for (path, text) in documents() {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.with_file_name(file) };
            assert!(target.exists(), "{}: {link}", path.display());
            let found = section.is_empty() || anchors(&target).contains(section);
            assert!(found, "{}: {link}: {:?}", path.display(), anchors(&target));
            seen += 1;
        }
    }
    assert!(seen > 50, "{seen}");
}

/// Commands in blocks of shell: their first words are a subcommand, their flags are known to it.
#[test]
fn commands_are_those_of_the_program() {
    let mut seen = BTreeSet::new();
    for (path, text) in documents() {
        let blocks = text.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
        for line in blocks.flat_map(str::lines) {
            let line = line.split(" #").next().unwrap();
            let own = line.rsplit(" -- ").next().unwrap().trim();
            let Some(words) = own.strip_prefix("carport ") else { continue };
            let mut words = words.split_whitespace();
            let command = words.next().unwrap();
            let output = Command::new(binary()).args([command, "--help"]).output().unwrap();
            let help = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success(), "{}: {line}", path.display());
            for flag in words.filter(|word| word.starts_with('-')) {
                assert!(help.contains(flag), "{}: {line}: no {flag}", path.display());
            }
            seen.insert(command.to_owned());
        }
    }
    assert!(seen.contains("doctor") && seen.contains("pack"), "{seen:?}");
}

#[test]
fn make_targets_and_deployed_files_are_there() {
    let makefile = std::fs::read_to_string(workspace().join("Makefile")).unwrap();
    for (path, text) in documents() {
        for part in text.split("`make ").skip(1).filter_map(|rest| rest.split('`').next()) {
            let target = part.split_whitespace().next().unwrap();
            assert!(makefile.contains(&format!("\n{target}:")), "{}: {target}", path.display());
        }
        for part in text.split("deploy/").skip(1) {
            let end = part.find(|c: char| !(c.is_alphanumeric() || "-_./".contains(c)));
            let file = part[..end.unwrap_or(part.len())].trim_end_matches('.');
            let found = workspace().join("deploy").join(file);
            assert!(found.exists(), "{}: deploy/{file}", path.display());
        }
    }
}

/// The fields of the configuration file at its top.
fn sections() -> BTreeSet<String> {
    let mut agent = Command::new(binary());
    let empty = tempfile::NamedTempFile::new().unwrap();
    agent.args(["agent", "--print-config", "-o", "json", "--config"]).arg(empty.path());
    let output = output_of(agent.env_clear());
    let config: Value = serde_json::from_str(&output).unwrap();
    config.as_object().unwrap().keys().cloned().collect()
}

fn output_of(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The CSI volumes anywhere in `value`.
fn volumes<'a>(value: &'a Value, found: &mut Vec<&'a Value>) {
    match value {
        Value::Object(fields) => {
            if fields.contains_key("volumeAttributes") {
                found.push(value);
            }
            fields.values().for_each(|value| volumes(value, found));
        }
        Value::Array(items) => items.iter().for_each(|value| volumes(value, found)),
        _ => {}
    }
}

/// What it is for is told by what is in it: every block must be something that somebody reads.
#[test]
fn blocks_of_yaml_are_what_the_agent_or_kubernetes_takes() {
    let sections = sections();
    let (mut configurations, mut lists, mut mounted, mut objects) = (0, 0, 0, 0);
    for (path, text) in documents() {
        for block in text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()) {
            let shown = format!("{}:\n{block}", path.display());
            let found: Vec<Value> = serde_saphyr::from_multiple(block)
                .unwrap_or_else(|error| panic!("{shown}: {error}"));
            let first = &found[0];
            let has = |key: &str| first.get(key).is_some();
            let of_pods = ["volumes", "apiVersion", "spec"].iter().any(|key| has(key));
            let mut csi = Vec::new();
            found.iter().for_each(|value| volumes(value, &mut csi));
            for volume in &csi {
                assert_eq!(volume["driver"], "csi.carport.dev", "{shown}");
                let attributes = volume["volumeAttributes"].as_object().unwrap();
                let context =
                    attributes.iter().map(|(key, value)| (&**key, value.as_str().unwrap()));
                let parsed = VolumeAttributes::parse(context);
                parsed.unwrap_or_else(|error| panic!("{shown}: {error}"));
                mounted += 1;
            }
            if has("images") {
                let text = block.replace('…', &"0".repeat(60));
                List::parse("list.yaml".as_ref(), &text)
                    .unwrap_or_else(|error| panic!("{shown}: {error}"));
                lists += 1;
            } else if !csi.is_empty() || of_pods || first.is_array() {
                objects += 1;
            } else {
                let keys = first.as_object().unwrap_or_else(|| panic!("{shown}")).keys();
                assert!(keys.into_iter().all(|key| sections.contains(key)), "{shown}");
                let file = tempfile::NamedTempFile::new().unwrap();
                std::fs::write(file.path(), block).unwrap();
                let mut agent = Command::new(binary());
                agent.args(["agent", "--print-config", "--config"]).arg(file.path());
                output_of(agent.env_clear());
                configurations += 1;
            }
        }
    }
    assert!(configurations >= 4 && lists >= 1 && mounted >= 4 && objects >= 5);
}
