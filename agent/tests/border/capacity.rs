//! Quota, pins, plans: what the store keeps and what goes.

use crate::support::{Home, eventually, stdout};

/// A model of one file of so many bytes, unlike those of other names.
fn model(home: &Home, name: &str, bytes: usize) -> String {
    let content = name.repeat(bytes / name.len());
    home.image(name, &[("weights", &content)])
}

fn with_quota(home: &Home, quota: &str) {
    let text = format!("store: {{quota: {quota}, keepFor: 1ms}}\n");
    std::fs::write(home.path("config.yaml"), text).unwrap();
}

fn stored(home: &Home) -> Vec<String> {
    let listed = home.json(&["ls"]);
    let images = listed.as_array().unwrap().iter();
    let mut names: Vec<_> =
        images.map(|image| image["references"][0].as_str().unwrap().to_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_pin_keeps_an_image_until_its_owner_takes_it_away() {
    let home = Home::new();
    let reference = model(&home, "aa", 1000);
    let digest = home.json(&["pull", &reference])[0]["digest"].as_str().unwrap().to_owned();
    let pinned = home.json(&["pin", &reference, "--owner", "team-a", "--for", "7days"]);
    assert_eq!(pinned["owner"], "team-a");
    assert_eq!(
        (&pinned["digest"], &pinned["reference"]),
        (&digest.as_str().into(), &reference.as_str().into())
    );
    assert!(pinned["expires_at"].as_str().unwrap() > pinned["created_at"].as_str().unwrap());
    let pinned = home.json(&["pin", &digest[7..19]]);
    assert_eq!((pinned["owner"].as_str(), pinned["expires_at"].as_str()), (Some("cli"), None));
    assert_eq!(home.json(&["pins"]).as_array().unwrap().len(), 2);
    let text = stdout(&home.run(&["pins"]));
    assert!(text.starts_with("OWNER") && text.contains(&reference), "{text}");

    let error = home.fails(&["rm", &reference]);
    assert!(error.contains("pinned by ") && error.contains("carport unpin sha256:"), "{error}");
    assert_eq!(home.json(&["unpin", &digest])["removed"], true);
    assert_eq!(home.json(&["unpin", &digest])["removed"], false);
    let error = home.fails(&["rm", &reference]);
    assert!(error.contains("pinned by team-a until 20"), "{error}");
    home.json(&["unpin", &reference, "--owner", "team-a"]);
    home.json(&["rm", &reference]);
    assert!(home.fails(&["pin", &reference]).contains("not in the store"));
}

#[test]
fn a_plan_says_what_a_pull_then_does() {
    let home = Home::new();
    with_quota(&home, "1MiB");
    let [a, b, c, large] = [("aa", 400_000), ("bb", 300_000), ("cc", 400_000), ("dd", 1_200_000)]
        .map(|(name, bytes)| model(&home, name, bytes));
    home.json(&["pull", &a]);
    home.json(&["pull", &b]);
    let du = home.json(&["du"]);
    let of_a =
        du["images"].as_array().unwrap().iter().find(|one| one["references"][0] == a.as_str());
    assert_eq!(of_a.unwrap()["unique_bytes"], 401_408);
    assert_eq!((&du["saved_bytes"], &du["unused_bytes"]), (&0.into(), &0.into()));
    assert_eq!(du["object_bytes"], 401_408 + 303_104);

    let plan = home.json(&["plan", &a, &c, &c]);
    assert_eq!(
        (&plan["images"][0]["present"], &plan["images"][0]["missing_bytes"]),
        (&true.into(), &0.into())
    );
    assert_eq!(plan["images"][2]["missing_bytes"], 0, "named twice it comes once");
    assert!((400_000..410_000).contains(&plan["missing_bytes"].as_u64().unwrap()), "{plan}");
    assert_eq!((&plan["fits"], &plan["at_least"]), (&true.into(), &false.into()));
    assert_eq!(plan["room"]["limit_bytes"], 1 << 20);
    // `a` is wanted, too: `b` has to go.
    assert_eq!(plan["evict"].as_array().unwrap().len(), 1);
    assert_eq!(plan["evict"][0]["references"][0], b.as_str());
    assert_eq!(plan["evict"][0]["freed_bytes"], 303_104);
    let text = stdout(&home.run(&["plan", &a, &c]));
    assert!(text.contains(&format!("evict     {b}: 296.0 KiB")), "{text}");
    assert!(text.ends_with("fits      yes, after these evictions\n"), "{text}");
    assert_eq!(stored(&home), [a.clone(), b.clone()], "a plan changes nothing");

    home.json(&["pin", &a]);
    home.json(&["pull", &c]);
    assert_eq!(stored(&home), [a.clone(), c.clone()]);
    assert_eq!(home.json(&["plan", &large])["fits"], false);
    let error = home.fails(&["pull", &large]);
    assert!(
        error.contains("of the quota of 1.0 MiB") && error.contains("392.0 KiB is pinned"),
        "{error}"
    );
    assert_eq!(stored(&home), [a, c], "nothing was evicted in vain");
}

#[test]
fn the_agent_brings_the_store_below_its_watermark_and_says_why_each_image_went() {
    let home = Home::new();
    let [a, b, c] = ["aa", "bb", "cc"].map(|name| model(&home, name, 400_000));
    for reference in [&a, &b, &c] {
        home.json(&["pull", reference]);
    }
    home.json(&["pin", &a]);
    with_quota(&home, "1MiB");
    let agent = home.agent(&[]);
    let event = agent.event("image evicted");
    assert_eq!((&event["reason"], &event["freed"]), (&"watermark".into(), &"392.0 KiB".into()));
    for field in ["image", "references", "idle", "rate", "expected_seconds"] {
        assert!(!event[field].is_null(), "{field}: {event}");
    }
    // Above 85 % of a MiB, down to 80 %: one of the two that are not pinned.
    eventually("the eviction is counted", || {
        (agent.metric("carport_evictions_total{reason=\"watermark\"}")? > 0.0).then_some(())
    });
    let metric = |name| agent.metric(name);
    assert_eq!(metric("carport_evicted_bytes_total{reason=\"watermark\"}"), Some(401_408.0));
    assert_eq!(metric("carport_store_quota_bytes"), Some(1_048_576.0));
    assert_eq!(metric("carport_pins"), Some(1.0));
    assert_eq!(stored(&home).len(), 2);
    assert!(stored(&home).contains(&a));
    agent.terminate();
}

#[test]
fn the_agent_tells_of_room_what_the_store_admits() {
    let home = Home::new();
    with_quota(&home, "1MiB");
    let [a, b] = [("aa", 400_000), ("bb", 300_000)].map(|(name, bytes)| model(&home, name, bytes));
    home.json(&["pull", &a, &b]);
    home.json(&["pin", &a]);
    let agent = home.agent(&[]);
    let store = home.json(&["status"])["store"].clone();
    assert_eq!(
        (&store["capacity_bytes"], &store["used_bytes"]),
        (&(1 << 20).into(), &704_512.into())
    );
    assert_eq!(store["free_bytes"], (1 << 20) - 704_512, "of the quota, not of the disk");
    assert_eq!(store["reclaimable_bytes"], 303_104, "what is pinned is not to be had");
    home.json(&["pin", &b]);
    let told = |bytes: u64| {
        eventually("what could go", || {
            (home.json(&["status"])["store"]["reclaimable_bytes"] == bytes).then_some(())
        });
    };
    told(0);
    home.json(&["unpin", &a]);
    told(401_408);
    agent.terminate();
}
