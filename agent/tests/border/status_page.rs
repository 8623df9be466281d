//! The status page, as a browser sees it.

use std::process::Command;

use crate::support::{Home, eventually, stderr, stdout};

/// A browser; `None` where there is none.
fn browser() -> Option<&'static str> {
    let there = |name: &&str| Command::new(name).arg("--version").output().is_ok();
    let found = ["chromium", "chromium-browser", "google-chrome"].into_iter().find(there);
    if found.is_none() {
        eprintln!("SKIPPED: looking at the status page needs chromium");
    }
    found
}

#[test]
fn the_page_is_html_that_loads_and_runs_nothing() {
    let home = Home::new();
    let reference = home.image("a", &[("w.bin", "12345")]);
    home.json(&["pull", &reference]);
    let agent = home.agent(&[]);
    let (status, page) = agent.get("/");
    assert_eq!(status, 200);
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    let head = head.to_ascii_lowercase();
    assert!(head.contains("content-type: text/html; charset=utf-8"), "{head}");
    assert!(head.contains("content-security-policy: default-src 'none'"), "{head}");
    assert!(body.contains(&reference) && body.contains("<h1>node-1</h1>"), "{body}");
    for forbidden in ["<script", "src=", "href=", "javascript:"] {
        assert!(!body.contains(forbidden), "{forbidden} is in {body}");
    }
    agent.terminate();
}

#[test]
fn a_browser_shows_models_and_failed_pulls() {
    let Some(browser) = browser() else { return };
    let home = Home::new();
    let reference = home.image("a", &[("w.bin", "12345")]);
    home.json(&["pull", &reference]);
    let agent = home.agent(&[]);
    // A name that is one, and would be a headline if nobody looked.
    home.json(&["prefetch", "oci:/absent/<h1>model:v1"]);
    eventually("the failure", || agent.get("/").1.contains("class=bad").then_some(()));
    let url = format!("http://{}/", agent.http);
    let profile = home.path("profile");
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(["--virtual-time-budget=1000", "--dump-dom", &url])
        .output()
        .unwrap();
    let dom = stdout(&output);
    assert!(output.status.success() && dom.contains("<h1>node-1</h1>"), "{}", stderr(&output));
    // As the browser understood it: tables with closed rows, and the text in its place.
    for part in [
        &format!("<td>{reference}</td>") as &str,
        "<td>oci:/absent/&lt;h1&gt;model:v1</td>",
        "<td class=\"n\">5 B</td>",
        "<table id=\"models\">",
        "<table id=\"pulls\">",
    ] {
        assert!(dom.contains(part), "{part} is not in {dom}");
    }
    agent.terminate();
}
