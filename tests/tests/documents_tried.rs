//! The commands of the documents, run as they are written.
//!
//! `tests/fixtures/sandbox.sh` is the machine that they run on, with a registry and an agent. What is
//! printed after a command in a `console` block is compared, but for its figures.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::process::Command;

use carport_tests::carport::{binary, workspace};
use carport_tests::registry::installed;

/// Of these documents only what is named: `make demo` and the like have tests of their own.
const NOT_RUN: [(&str, &str); 4] = [
    ("README.md", "make demo"),
    ("CONTRIBUTING.md", "make test"),
    ("testing-on-a-cluster.md", "make test-cluster"),
    ("testing-on-a-cluster.md", "make cluster"),
];

/// The blocks of a document in this language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    text.split(&fence)
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .map(str::to_owned)
        .collect()
}

/// A line without what differs from run to run: numbers with their units, and digests.
fn shape(line: &str) -> String {
    let words = line.split_whitespace().map(|word| {
        let figure = word.trim_end_matches(',');
        // Documents show the first digits of long ones.
        let hex = figure.trim_start_matches("sha256:").trim_end_matches('…');
        let digest = hex.len() >= 12 && hex.chars().all(|c| c.is_ascii_hexdigit());
        let number = figure.chars().all(|c| c.is_ascii_digit() || c == '.');
        let unit = ["B", "KiB", "MiB", "GiB", "TiB"].contains(&figure);
        if digest || number || unit { word.replacen(figure, "#", 1) } else { word.to_owned() }
    });
    let line = words.collect::<Vec<_>>().join(" ");
    // A pull may have begun by the time it is told of.
    line.replace("pulling # # of # #", "queued -")
}

/// A script with every block in its order. Output that the document shows goes where it can be compared.
fn script(text: &str) -> (String, Vec<String>) {
    let (mut script, mut shown) = (String::new(), Vec::new());
    for block in blocks(text, "sh") {
        script += &block;
    }
    for block in blocks(text, "console") {
        for line in block.lines() {
            match line.strip_prefix("$ ") {
                Some(command) => {
                    script +=
                        &format!("{command} >>\"$folder/shown\"\n{{ read_on; }} 2>/dev/null\n");
                }
                None => shown.push(shape(line)),
            }
        }
    }
    (script, shown)
}

fn try_out(name: &str, text: &str) {
    let (commands, expected) = script(text);
    let dir = tempfile::tempdir().unwrap();
    let (folder, file) = (dir.path().join("sandbox"), dir.path().join("commands"));
    fs::create_dir(&folder).unwrap();
    fs::write(&file, commands).unwrap();
    let mut sandbox = Command::new("unshare");
    sandbox.args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash"]);
    sandbox.arg(workspace().join("tests/fixtures/sandbox.sh")).arg(&folder).arg(binary());
    let output = sandbox.arg(workspace()).arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8_lossy(&output.stdout);
    let log = fs::read_to_string(folder.join("agent.log")).unwrap_or_default();
    assert!(output.status.success(), "{name}:\n{said}\n{printed}\nthe agent's log:\n{log}");
    let shown = fs::read_to_string(folder.join("shown")).unwrap_or_default();
    let shown: Vec<String> = shown.lines().map(shape).collect();
    // A document may leave the end of the last output out.
    assert_eq!(shown[..expected.len().min(shown.len())], expected[..], "{name}");
}

fn can_run() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: the sandbox needs root");
        return false;
    }
    ["unshare", "docker-registry", "skopeo", "kubectl", "openssl", "curl", "python3"]
        .into_iter()
        .all(installed)
}

/// All documents with commands, but for those of `NOT_RUN`.
fn documents() -> Vec<(String, String)> {
    let folder = fs::read_dir(workspace().join("docs")).unwrap();
    let mut paths: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
    paths.extend(["README.md", "CONTRIBUTING.md"].map(|name| workspace().join(name)));
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let mut text = fs::read_to_string(&path).unwrap();
        for (_, first) in NOT_RUN.iter().filter(|(document, _)| *document == name) {
            let start = text.find(&format!("```sh\n{first}")).expect("the block that is not run");
            let end = start + text[start + 5..].find("```").unwrap() + 8;
            text.replace_range(start..end, "");
        }
        if text.contains("```sh\n") || text.contains("```console\n") {
            found.push((name, text));
        }
    }
    found
}

#[test]
fn every_command_of_the_documents_works_as_it_is_written() {
    if !can_run() {
        return;
    }
    let documents = documents();
    assert!(
        documents.len() >= 9,
        "{:?}",
        documents.iter().map(|(name, _)| name).collect::<Vec<_>>()
    );
    for (name, text) in documents {
        try_out(&name, &text);
    }
}

/// Else the test above would say nothing.
#[test]
fn a_command_that_does_not_work_is_told() {
    if !can_run() {
        return;
    }
    for wrong in ["carport pull registry.example/models/none:v1", "kubectl get pods --nmespace x"] {
        let text = format!("```sh\n{wrong}\n```\n");
        let tried = std::panic::catch_unwind(|| try_out("wrong", &text));
        assert!(tried.is_err(), "{wrong}");
    }
}
