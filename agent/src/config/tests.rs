use super::*;

fn parse(text: &str) -> Result<Config, String> {
    load::parse(Path::new("/etc/c.yaml"), text).map_err(|error| error.to_string())
}

#[test]
fn an_empty_file_is_the_defaults() {
    assert_eq!(parse("").unwrap(), Config::default());
    assert_eq!(parse("# nothing\n---\n").unwrap(), Config::default());
}

#[test]
fn sizes_and_durations_are_text() {
    let text = "pull: {windowBytes: 128MiB}\nregistries: {readTimeout: 2m, connectTimeout: 500ms}";
    let config = parse(text).unwrap();
    assert_eq!(config.pull.window_bytes.as_u64(), 128 << 20);
    assert_eq!(config.registries.read_timeout, Duration::from_secs(120));
    assert_eq!(config.registries.connect_timeout, Duration::from_millis(500));
    assert_eq!(parse("pull: {windowBytes: 64Mi}").unwrap().pull.window_bytes.as_u64(), 64 << 20);

    let caps = parse("pull: {bandwidth: 1GB/s, prefetchBandwidth: 200MiB}").unwrap().bandwidth();
    assert_eq!(caps.total_bytes_per_second.unwrap().get(), 1_000_000_000);
    assert_eq!(caps.prefetch_bytes_per_second.unwrap().get(), 200 << 20);
    assert_eq!(parse("pull: {bandwidth: null}").unwrap().bandwidth(), Bandwidth::default());
}

#[test]
fn an_unknown_field_is_refused_with_its_place_and_the_known_ones() {
    let error = parse("nodeName: a\npull:\n  atempts: 3\n").unwrap_err();
    assert!(error.starts_with("/etc/c.yaml:3:3: "), "{error}");
    assert!(error.contains("atempts") && error.contains("attempts"), "{error}");
}

#[test]
fn a_wrong_value_names_line_field_and_what_to_write() {
    let cases = [
        ("pull:\n  attempts: 0\n", "/etc/c.yaml:2:13: pull.attempts: ", "a number from 1 to 100"),
        ("root: carport\n", "/etc/c.yaml:1:7: root: ", "write it from /"),
        ("http: {listen: localhost}\n", "/etc/c.yaml:1:16: http.listen: ", "127.0.0.1:9760"),
        ("gpu: {interval: 10}\n", "/etc/c.yaml:1:17: gpu.interval: ", "such as 10s"),
        ("pull: {windowBytes: 1KiB}\n", "/etc/c.yaml:1:21: pull.windowBytes: ", "from 16MiB"),
        ("pull: {bandwidth: 10B/s}\n", "/etc/c.yaml:1:19: pull.bandwidth: ", "64KiB/s or more"),
        ("store: {quota: 1KiB}\n", "/etc/c.yaml:1:16: store.quota: ", "at least 1MiB"),
        (
            "store: {highWatermark: 85}\n",
            "/etc/c.yaml:1:24: store.highWatermark: ",
            "from 0.01 to 1",
        ),
        ("log: {level: 'a=b=c'}\n", "/etc/c.yaml:1:14: log.level: ", "error, warn, info"),
        ("log: {format: xml}\n", "/etc/c.yaml:1:15: log.format: ", "json"),
        (
            "csi: {layoutFolders: [/a, srv/models]}\n",
            "/etc/c.yaml:1:22: csi.layoutFolders",
            "write it from /",
        ),
        (
            "runtime: {containerd: {namespaces: [k8s.io, a/b]}}\n",
            "/etc/c.yaml:1:36: runtime.containerd.namespaces",
            "write one such as k8s.io",
        ),
        ("csi: {driverName: Carport}\n", "/etc/c.yaml:1:19: csi.driverName: ", "csi.carport.dev"),
        (
            "registries: {plainHttp: ['http://a']}\n",
            "/etc/c.yaml:1:25: registries.plainHttp",
            "HOST:PORT",
        ),
    ];
    for (text, start, hint) in cases {
        let error = parse(text).unwrap_err();
        assert!(error.starts_with(start), "{error}");
        assert!(error.contains(hint), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(!error.contains(" at line"), "{error}");
    }
}

#[test]
fn broken_yaml_is_refused_with_its_line() {
    let error = parse("pull:\n  attempts: [\n").unwrap_err();
    assert!(error.starts_with("/etc/c.yaml:"), "{error}");
    let error = parse("pull: {attempts: 1, attempts: 2}").unwrap_err();
    assert!(error.contains("attempts"), "{error}");
}

#[test]
fn a_socket_path_that_the_kernel_would_refuse_is_refused_first() {
    let error = parse(&format!("api: {{socket: /{}}}", "x".repeat(120))).unwrap_err();
    assert!(error.contains("shorter path"), "{error}");
    let mut config = Config::default();
    config.csi.enabled = true;
    config.csi.kubelet_dir = PathBuf::from(format!("/{}", "k".repeat(80)));
    let error = config.check().unwrap_err().to_string();
    assert!(error.starts_with("configuration: csi.kubeletDir: "), "{error}");
}

#[test]
fn connections_must_suffice_for_one_layer_and_be_more_than_layers() {
    let mut config = Config::default();
    config.registries.connections = 2;
    let error = config.check().unwrap_err().to_string();
    assert!(error.contains("registries.connections: 2 is less than"), "{error}");
    config.registries.connections = 8;
    config.pull.concurrent_layers = 8;
    let error = config.check().unwrap_err().to_string();
    let start =
        "configuration: registries.connections: 8 is not more than twice pull.concurrentLayers (8)";
    assert!(error.starts_with(start), "{error}");
    config.registries.connections = 17;
    config.check().unwrap();
}

#[test]
fn the_low_watermark_is_not_above_the_high_one() {
    let config = parse("store: {quota: 2TiB, lowWatermark: 0.9}").unwrap();
    assert_eq!(config.limits().quota_bytes, Some(2 << 40));
    let error = config.check().unwrap_err().to_string();
    assert!(error.starts_with("configuration: store.lowWatermark: 0.9 is more than"), "{error}");
}

#[test]
fn what_is_printed_reads_back_as_the_same() {
    let mut config = Config::default();
    config.pull.window_bytes = ByteSize(100_000_001);
    config.pull.bandwidth = Some("100MB/s".parse().unwrap());
    config.store.quota = Some(ByteSize(3 << 40));
    config.registries.docker_config = Some("/etc/docker.json".into());
    let yaml = serde_saphyr::to_string(&config).unwrap();
    assert_eq!(parse(&yaml).unwrap(), config, "{yaml}");
}

/// Every leaf of a value as `a.b.c`, with what it holds.
fn leaves(prefix: &str, value: &serde_json::Value, into: &mut Vec<(String, serde_json::Value)>) {
    match value {
        serde_json::Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let name =
                    if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                leaves(&name, value, into);
            }
        }
        leaf => into.push((prefix.to_string(), leaf.clone())),
    }
}

#[test]
fn the_document_names_every_field_and_no_other() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let mut fields = Vec::new();
    leaves("", &serde_json::to_value(Config::default()).unwrap(), &mut fields);
    for (field, default) in &fields {
        let row = format!("| `{field}` | ");
        let line = document.lines().find(|line| line.starts_with(&row));
        let line = line.unwrap_or_else(|| panic!("docs/configuration.md lacks a row for {field}"));
        // What depends on the user and the machine is described in words.
        let varies = [
            "nodeName",
            "root",
            "api.socket",
            "csi.enabled",
            "runtime.containerd.enabled",
            "runtime.cri.enabled",
        ]
        .contains(&field.as_str());
        let default = match default {
            serde_json::Value::String(text) => format!("`{text}`"),
            serde_json::Value::Null => "none".into(),
            other => format!("`{other}`"),
        };
        assert!(varies || line.contains(&format!("| {default} |")), "{line}: expected {default}");
    }
    for line in
        document.lines().filter(|line| line.starts_with("| `") && !line.starts_with("| `--"))
    {
        let field = line.split('`').nth(1).unwrap();
        assert!(fields.iter().any(|(name, _)| name == field), "there is no field {field}");
    }
}

#[test]
fn the_document_names_every_flag_and_variable() {
    use clap::CommandFactory as _;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/configuration.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let mut command = crate::cli::Cli::command();
    command.build();
    let agent = command.find_subcommand("agent").unwrap();
    let mut variables = 0;
    for argument in agent.get_arguments() {
        let Some(variable) = argument.get_env() else { continue };
        let row =
            format!("`--{}` / `{}`", argument.get_long().unwrap(), variable.to_str().unwrap());
        assert!(document.contains(&row), "docs/configuration.md lacks {row}");
        variables += 1;
    }
    assert!(variables >= 10);
}
