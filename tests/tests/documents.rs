//! Documents name files, sections, commands, metrics and flags that there are.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use carport_tests::carport::{binary, workspace};

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
