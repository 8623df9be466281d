//! `deploy/observability` speaks of metrics that there are, and each alert fires when it should.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Command;

use carport_tests::carport::workspace;
use carport_tests::registry::installed;
use serde_json::{Value, json};

fn folder() -> PathBuf {
    workspace().join("deploy/observability")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(workspace().join(path)).unwrap()
}

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&read(&format!("deploy/observability/{name}"))).unwrap()
}

fn alerts() -> Vec<Value> {
    let rules = yaml("alerts.yaml");
    rules["groups"][0]["rules"].as_array().unwrap().clone()
}

/// All panels that ask something.
fn panels() -> Vec<Value> {
    let dashboard: Value =
        serde_json::from_str(&read("deploy/observability/dashboard.json")).unwrap();
    dashboard["panels"].as_array().unwrap().clone()
}

/// The queries of the dashboard, with Grafana's variables filled in.
fn queries() -> Vec<String> {
    panels()
        .iter()
        .flat_map(|panel| panel["targets"].as_array().cloned().unwrap_or_default())
        .map(|target| target["expr"].as_str().unwrap().to_owned())
        .map(|text| text.replace("$__rate_interval", "5m").replace("$instance", ".*"))
        .collect()
}

/// The rows of docs/metrics.md by name.
fn documented() -> BTreeMap<String, String> {
    let rows = read("docs/metrics.md");
    let rows = rows.lines().filter_map(|line| {
        let name = line.strip_prefix("| `carport_")?.split('`').next()?;
        Some((format!("carport_{name}"), line.to_owned()))
    });
    rows.collect()
}

/// Each metric in `text` with what stands in its braces.
fn metrics(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (start, _) in text.match_indices("carport_") {
        let rest = &text[start..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let braces = rest[end..].strip_prefix('{').and_then(|rest| rest.split('}').next());
        found.push((rest[..end].to_owned(), braces.unwrap_or_default().to_owned()));
    }
    found
}

#[test]
fn every_metric_that_is_used_is_documented_with_its_labels_and_their_values() {
    let documented = documented();
    assert!(documented.len() > 40, "docs/metrics.md has another form");
    let rules = alerts().into_iter().map(|rule| rule["expr"].as_str().unwrap().to_owned());
    let tests = yaml("alerts_test.yaml");
    let series = tests["tests"].as_array().unwrap().iter().flat_map(|test| {
        let series = test["input_series"].as_array().unwrap().clone();
        series.into_iter().map(|series| series["series"].as_str().unwrap().to_owned())
    });
    let mut used = BTreeSet::new();
    for text in rules.chain(series).chain(queries()) {
        for (name, labels) in metrics(&text) {
            let histogram = ["_bucket", "_sum", "_count"];
            let family = histogram.iter().find_map(|suffix| name.strip_suffix(suffix));
            let row = documented.get(&name).or_else(|| documented.get(family?));
            let row = row.unwrap_or_else(|| panic!("{name} is not in docs/metrics.md: {text}"));
            for pair in labels.split(',').filter(|pair| !pair.is_empty()) {
                // =, !=, =~ or !~
                let (label, value) = pair.split_at(pair.find(['=', '!']).unwrap());
                let value = value.trim_matches(['=', '!', '~', '"']);
                // Of the scrape, not of the metric.
                if ["instance", "job"].contains(&label) {
                    continue;
                }
                assert!(row.contains(&format!("`{label}`")), "{name} has no label {label}: {text}");
                // gRPC codes are not listed one by one.
                let listed = label != "code" && !row.contains("as above");
                for value in value.split('|').filter(|_| listed) {
                    assert!(row.contains(&format!("`{value}`")), "{name}, {label}: no {value}");
                }
            }
            used.insert(name);
        }
    }
    assert!(used.len() > 25, "{used:?}");
}

#[test]
fn each_alert_has_a_test_that_it_fires_and_a_runbook() {
    let (tests, runbooks) = (yaml("alerts_test.yaml"), read("docs/runbooks.md"));
    let headings: Vec<&str> = runbooks.lines().filter_map(|l| l.strip_prefix("## ")).collect();
    let alerts = alerts();
    let names: Vec<&str> = alerts.iter().map(|rule| rule["alert"].as_str().unwrap()).collect();
    assert_eq!(headings, names, "one section an alert, in their order");
    for (rule, name) in alerts.iter().zip(names) {
        let anchor = format!("docs/runbooks.md#{}", name.to_lowercase());
        assert_eq!(rule["annotations"]["runbook"], anchor.as_str());
        for text in ["summary", "description"] {
            assert!(rule["annotations"][text].as_str().unwrap().ends_with('.'), "{name}: {text}");
        }
        let severity = rule["labels"]["severity"].as_str().unwrap();
        assert!(["critical", "warning", "info"].contains(&severity), "{name}");
        let expected: Vec<bool> = tests["tests"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|test| test["alert_rule_test"].as_array().unwrap())
            .filter(|test| test["alertname"] == name)
            .map(|test| !test["exp_alerts"].as_array().unwrap().is_empty())
            .collect();
        assert_eq!(expected, [false, true], "{name}: quiet, then firing");
    }
}

fn promtool(arguments: &[&str]) {
    let output = Command::new("promtool").args(arguments).current_dir(folder()).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
}

#[test]
fn prometheus_takes_the_rules_and_they_fire_as_expected() {
    if !installed("promtool") {
        return;
    }
    promtool(&["check", "rules", "alerts.yaml"]);
    promtool(&["test", "rules", "alerts_test.yaml"]);
}

#[test]
fn prometheus_takes_the_queries_of_the_dashboard() {
    if !installed("promtool") {
        return;
    }
    let rules: Vec<Value> = queries()
        .into_iter()
        .enumerate()
        .map(|(index, expr)| json!({"record": format!("panel:{index}"), "expr": expr}))
        .collect();
    assert!(rules.len() > 30, "{}", rules.len());
    let file = tempfile::NamedTempFile::new().unwrap();
    // JSON is YAML.
    let text = json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string();
    std::fs::write(file.path(), text).unwrap();
    promtool(&["check", "rules", file.path().to_str().unwrap()]);
}

#[test]
fn panels_have_names_of_their_own_and_do_not_overlap() {
    let panels = panels();
    let (mut ids, mut cells) = (BTreeSet::new(), BTreeSet::new());
    for panel in &panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}");
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            assert!(x < 24, "{title}");
            for y in at("y")..at("y") + at("h") {
                assert!(cells.insert((x, y)), "{title} lies on another panel");
            }
        }
        if panel["type"] != "row" {
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        }
    }
}

#[test]
fn the_monitors_find_the_agents() {
    let text = read("deploy/daemonset/base/daemonset.yaml");
    let set: Value = serde_saphyr::from_str(&text).unwrap();
    let text = read("deploy/daemonset/base/service.yaml");
    let service: Value = serde_saphyr::from_str(&text).unwrap();
    let port = &set["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"];
    for (file, endpoints) in
        [("podmonitor.yaml", "podMetricsEndpoints"), ("servicemonitor.yaml", "endpoints")]
    {
        let monitor = yaml(file);
        // Of the pods; the Service's own label is the same, which kustomize gives to every object.
        let selected = &monitor["spec"]["selector"]["matchLabels"];
        assert_eq!(&set["spec"]["template"]["metadata"]["labels"], selected, "{file}");
        assert_eq!(&monitor["spec"][endpoints][0]["port"], port, "{file}");
        // The job that CarportAgentDown looks for is <namespace>/<name> of a PodMonitor, and the
        // Service's name of a ServiceMonitor.
        assert_eq!(monitor["metadata"]["name"], "carport", "{file}");
    }
    assert_eq!(service["metadata"]["name"], "carport");
    assert_eq!(&service["spec"]["ports"][0]["name"], port);
}
