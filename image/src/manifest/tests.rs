use super::declared::FILEPATH;
use super::image::OCI_CONFIG;
use super::*;
use serde_json::{Value, json};

fn digest(n: u8) -> String {
    Digest::of(&[n]).to_string()
}

fn parse(value: &Value) -> Result<Manifest, ManifestError> {
    let bytes = serde_json::to_vec(value).unwrap().into();
    Manifest::parse(&RawManifest { media_type: String::new(), bytes })
}

fn image(config_type: &str, layer_types: &[&str]) -> Value {
    let layers: Vec<_> = layer_types
        .iter()
        .enumerate()
        .map(|(n, t)| json!({"mediaType": t, "digest": digest(n as u8), "size": 10 * (n + 1)}))
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": config_type, "digest": digest(200), "size": 7},
        "layers": layers,
    })
}

#[test]
fn layers_of_images_are_known_by_media_type() {
    let value = image(
        OCI_CONFIG,
        &[
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ],
    );
    let Manifest::Image(image) = parse(&value).unwrap() else { panic!("not an image") };
    let compressions: Vec<_> = image.layers.iter().map(|l| l.layer.compression).collect();
    use Compression::{Gzip, None, Zstd};
    assert_eq!(compressions, [None, Gzip, Zstd, Gzip]);
    assert_eq!(image.packaging, Packaging::OciImage);
    assert_eq!(image.download_bytes(), 100);
}

#[test]
fn a_layer_named_twice_is_downloaded_once() {
    let mut value = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"; 2]);
    value["layers"][1] = value["layers"][0].clone();
    let Manifest::Image(image) = parse(&value).unwrap() else { panic!("not an image") };
    assert_eq!((image.layers.len(), image.download_bytes()), (2, 10));
}

#[test]
fn what_is_not_an_image_is_refused_by_its_media_type() {
    let why = |value: &Value| parse(value).unwrap_err().to_string();
    let unknown = image("application/vnd.example.thing.v1+json", &[]);
    assert!(why(&unknown).contains("application/vnd.example.thing.v1+json"), "{}", why(&unknown));
    let layer = image(OCI_CONFIG, &["application/x-rar"]);
    assert!(
        why(&layer).ends_with(
            "media type application/x-rar is not supported: layers of images are tars, \
             uncompressed or with gzip or zstd"
        ),
        "{}",
        why(&layer)
    );
    let mut both = image(OCI_CONFIG, &[]);
    both["manifests"] = json!([]);
    assert!(why(&both).ends_with("has both layers and manifests"));
    assert!(why(&json!({})).contains("neither layers nor manifests"));
    let mut huge = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"; 2]);
    huge["layers"][0]["size"] = json!(u64::MAX);
    assert!(why(&huge).contains("exbibyte"), "{}", why(&huge));
    let mut sha512 = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"]);
    sha512["layers"][0]["digest"] = json!(format!("sha512:{}", "a".repeat(128)));
    assert!(why(&sha512).contains("only sha256"), "{}", why(&sha512));
}

#[test]
fn an_index_gives_this_platform_or_lists_what_it_has() {
    let entry = |n: u8, os: &str, arch: &str| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(n),
               "size": 1, "platform": {"os": os, "architecture": arch}})
    };
    let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
        entry(1, "linux", "arm64"), entry(2, "linux", "amd64"), entry(3, "unknown", "unknown")]});
    let Manifest::Index(index) = parse(&value).unwrap() else { panic!("not an index") };
    let platform = |arch: &str| Platform { os: "linux".into(), architecture: arch.into() };
    assert_eq!(index.choose(&platform("amd64")).unwrap().to_string(), digest(2));
    let why = index.choose(&platform("riscv64")).unwrap_err().to_string();
    assert!(
        why.ends_with("no image for linux/riscv64; there is: linux/arm64, linux/amd64"),
        "{why}"
    );
}

#[test]
fn of_variants_the_one_is_chosen_that_every_processor_has() {
    let entry = |n: u8, arch: &str, variant: Value| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(n),
               "size": 1, "platform": {"os": "linux", "architecture": arch, "variant": variant}})
    };
    let choose = |entries: &[Value], arch: &str| {
        let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        let Manifest::Index(index) = parse(&value).unwrap() else { panic!("not an index") };
        let platform = Platform { os: "linux".into(), architecture: arch.into() };
        index.choose(&platform).unwrap().to_string()
    };
    let amd64 = [entry(1, "amd64", json!("v3")), entry(2, "amd64", Value::Null)];
    assert_eq!(choose(&amd64, "amd64"), digest(2));
    let arm64 = [entry(1, "arm64", json!("v9")), entry(2, "arm64", json!("v8"))];
    assert_eq!(choose(&arm64, "arm64"), digest(2));
    // Where there is no other, it is the one that is meant.
    assert_eq!(choose(&amd64[..1], "amd64"), digest(1));
}

#[test]
fn an_odd_entry_of_an_index_counts_only_where_it_is_chosen() {
    let good = json!({"digest": digest(1), "size": 1,
                      "platform": {"os": "linux", "architecture": "amd64"}});
    let read = |other: Value| {
        let value =
            json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other, good.clone()]});
        let Manifest::Index(index) = parse(&value).unwrap() else { panic!("not an index") };
        index
    };
    let platform = |arch: &str| Platform { os: "linux".into(), architecture: arch.into() };
    let sha512 = read(json!({"digest": format!("sha512:{}", "a".repeat(128)), "size": 1,
                             "platform": {"os": "linux", "architecture": "s390x"}}));
    assert_eq!(sha512.choose(&platform("amd64")).unwrap().to_string(), digest(1));
    let why = sha512.choose(&platform("s390x")).unwrap_err().to_string();
    assert!(why.contains("only sha256"), "{why}");
    let empty = read(json!({"digest": digest(2), "platform": {}}));
    assert_eq!(empty.choose(&platform("amd64")).unwrap().to_string(), digest(1));
    let none = parse(&json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}));
    let Manifest::Index(none) = none.unwrap() else { panic!("not an index") };
    let why = none.choose(&platform("amd64")).unwrap_err().to_string();
    assert!(why.ends_with("no image for linux/amd64; there is: none"), "{why}");
}

#[test]
fn a_config_must_name_a_diff_id_for_each_layer() {
    let value = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"]);
    let Manifest::Image(image) = parse(&value).unwrap() else { panic!("not an image") };
    let config =
        |ids: &[String]| serde_json::to_vec(&json!({"rootfs": {"diff_ids": ids}})).unwrap();
    let layers = image.layers_with(&config(&[digest(9)])).unwrap();
    assert_eq!(layers[0].diff_id.unwrap().to_string(), digest(9));
    assert!(
        image
            .layers_with(&config(&[]))
            .unwrap_err()
            .to_string()
            .ends_with("0 diff_ids for 1 layers")
    );
    assert!(image.layers_with(b"{}").is_err());
}

/// An artifact; each layer has a media type and maybe annotations.
fn artifact(artifact_type: &str, config_type: &str, layers: &[(&str, Value)]) -> Value {
    let types: Vec<&str> = layers.iter().map(|(t, _)| *t).collect();
    let mut value = image(config_type, &types);
    for (n, (_, annotations)) in layers.iter().enumerate() {
        value["layers"][n]["annotations"] = annotations.clone();
    }
    if !artifact_type.is_empty() {
        value["artifactType"] = json!(artifact_type);
    }
    value
}

fn read(value: &Value) -> ImageManifest {
    match parse(value).unwrap() {
        Manifest::Image(image) => image,
        Manifest::Index(_) => panic!("an index"),
    }
}

fn why(value: &Value) -> String {
    parse(value).unwrap_err().to_string()
}

fn path(path: &str) -> Value {
    json!({FILEPATH: path})
}

fn title(title: &str) -> Value {
    json!({TITLE: title})
}

/// `what place`, a layer each.
fn shown(layers: &[PlacedLayer]) -> Vec<String> {
    let show = |placed: &PlacedLayer| {
        let what = format!("{:?} {:?}", placed.layer.content, placed.layer.compression);
        format!("{what} {:?}", placed.place)
    };
    layers.iter().map(show).collect()
}

#[test]
fn a_model_pack_has_tars_and_files_under_both_of_its_names() {
    for project in ["cncf", "cnai"] {
        let t = |rest: &str| format!("application/vnd.{project}.model.{rest}");
        let types = [
            t("weight.v1.raw"),
            t("weight.v1.tar"),
            t("weight.config.v1.tar+gzip"),
            t("dataset.v1.tar+zstd"),
            t("weight.v1.gguf"),
        ];
        let key = format!("org.{project}.model.filepath");
        let value = artifact(
            &t("manifest.v1+json"),
            &t("config.v1+json"),
            &[
                (&types[0], json!({&key: "a/model.safetensors"})),
                (&types[1], json!({&key: "ignored"})),
                (&types[2], json!({})),
                (&types[3], json!({})),
                (&types[4], json!({&key: "b.gguf"})),
            ],
        );
        let image = read(&value);
        assert_eq!(image.packaging, Packaging::ModelPack);
        let expected = [
            r#"File None File("a/model.safetensors")"#,
            "Tar None Root",
            "Tar Gzip Root",
            "Tar Zstd Root",
            r#"File None File("b.gguf")"#,
        ];
        assert_eq!(shown(&image.layers), expected);
        assert_eq!(image.layers_with(b"{}").unwrap(), image.layers);
    }
    // What podman makes of it: the artifact type alone says what it is.
    let podman = artifact(modelpack::ARTIFACTS[0], EMPTY, &[("text/plain", title("README.md"))]);
    let image = read(&podman);
    assert_eq!(image.packaging, Packaging::ModelPack);
    assert_eq!(shown(&image.layers), [r#"File None File("README.md")"#]);
}

#[test]
fn names_in_annotations_are_as_hostile_as_names_in_tars() {
    let raw = "application/vnd.cncf.model.weight.v1.raw";
    let of = |layers: &[(&str, Value)]| artifact("", modelpack::CONFIGS[0], layers);
    for (name, expected) in [
        ("../../etc/cron.d/x", r#"climbs out with "..""#),
        ("/etc/passwd", "absolute names are not allowed"),
        ("a\0b", "NUL byte"),
        ("./.", r#"the name "./." is none"#),
        (&"x".repeat(256), "longer than 255 bytes"),
    ] {
        let why = why(&of(&[(raw, path(name))]));
        assert!(why.contains(expected) && why.contains(&digest(0)), "{why}");
    }
    let unnamed = why(&of(&[(raw, json!({FILEPATH: ""}))]));
    assert!(unnamed.contains("without a name: neither org.cncf.model.filepath nor"), "{unnamed}");
    let twice = why(&of(&[(raw, path("a/./b")), (raw, path("a//b"))]));
    assert!(twice.ends_with(r#"are both the file "a/b""#), "{twice}");
    let folder = why(&of(&[(raw, path("a")), (raw, path("a-b")), (raw, path("a/b"))]));
    assert!(folder.ends_with(r#""a" is a file, and the folder of the file "a/b""#), "{folder}");
    // The same layer twice is one file.
    let mut same = of(&[(raw, path("a")), (raw, path("a"))]);
    same["layers"][1] = same["layers"][0].clone();
    assert_eq!(read(&same).download_bytes(), 10);
}

#[test]
fn a_docker_model_has_the_tools_names_or_its_own_paths() {
    let t = |rest: &str| format!("application/vnd.docker.ai.{rest}");
    let types = [
        t("gguf.v3"),
        t("gguf.v3"),
        t("mmproj"),
        t("chat.template.jinja"),
        t("license"),
        t("model.file"),
        t("vllm.config.tar"),
    ];
    let layers: Vec<(&str, Value)> =
        types.iter().map(|t| (t.as_str(), json!({}))).collect::<Vec<_>>();
    let mut layers = layers;
    layers[0].1 = path("Llama-Q4.gguf");
    layers[5].1 = path("extra/tokenizer.json");
    let image = read(&artifact("", docker_model::CONFIG_V01, &layers));
    assert_eq!(image.packaging, Packaging::DockerModel);
    let expected = [
        r#"File None File("model-00001-of-00002.gguf")"#,
        r#"File None File("model-00002-of-00002.gguf")"#,
        r#"File None File("model.mmproj")"#,
        r#"File None File("template.jinja")"#,
        r#"File None File("LICENSE")"#,
        r#"File None File("extra/tokenizer.json")"#,
        "Tar None Root",
    ];
    assert_eq!(shown(&image.layers), expected);
    let one = read(&artifact("", docker_model::CONFIG_V01, &layers[1..2]));
    assert_eq!(shown(&one.layers), [r#"File None File("model.gguf")"#]);
    let new = read(&artifact("", docker_model::CONFIG_V02, &layers[..1]));
    assert_eq!(shown(&new.layers), [r#"File None File("Llama-Q4.gguf")"#]);
    let unknown = t("hologram");
    let why = why(&artifact("", docker_model::CONFIG_V02, &[(&unknown, path("a"))]));
    assert!(why.contains("docker.ai.hologram is not supported: of Docker models gguf.v3"), "{why}");
}

#[test]
fn a_model_kit_takes_diff_ids_from_its_kitfile() {
    let t = |rest: &str| format!("application/vnd.kitops.modelkit.{rest}");
    let types = [t("model.v1.tar+gzip"), t("modelpart.v1.raw"), t("docs.v1.tar")];
    let layers =
        [(&*types[0], json!({})), (&*types[1], path("lora.gguf")), (&*types[2], json!({}))];
    let image = read(&artifact("", kitops::CONFIG, &layers));
    assert_eq!(image.packaging, Packaging::ModelKit);
    let complete = |config: Value| image.layers_with(config.to_string().as_bytes());
    let kitfile = json!({
        "manifestVersion": "1.0.0",
        "model": {"path": "weights/m", "digest": digest(0), "diffId": digest(90),
                  "parts": [{"path": "lora.gguf", "digest": digest(1), "diffId": digest(1)}]},
        "docs": [{"path": "README.md", "digest": digest(2), "diffId": digest(2)}],
    });
    let layers = complete(kitfile.clone()).unwrap();
    let diff_ids: Vec<_> = layers.iter().map(|l| l.diff_id.unwrap().to_string()).collect();
    assert_eq!(diff_ids, [digest(90), digest(1), digest(2)]);
    let placed = ["Tar Gzip Root", r#"File None File("lora.gguf")"#, "Tar None Root"];
    assert_eq!(shown(&layers), placed);

    let mut other = kitfile;
    other["docs"][0]["digest"] = json!(digest(9));
    let why = complete(other).unwrap_err().to_string();
    assert!(why.contains(&format!("has no part for layer {}", digest(2))), "{why}");

    // Before kit 0.5: no digests, and tars that stand beside their part's path.
    let old = json!({"model": {"path": "./weights/deep/m", "parts": [{"path": "lora.gguf"}]},
                     "docs": [{"path": "README.md"}]});
    let layers = complete(old).unwrap();
    assert_eq!(shown(&layers)[0], r#"Tar Gzip Below("weights/deep")"#);
    assert_eq!(shown(&layers)[2], "Tar None Root");
    let hostile = json!({"model": {"path": "../../m", "parts": [{"path": "l"}]},
                         "docs": [{"path": "README.md"}]});
    assert!(complete(hostile).unwrap_err().to_string().contains("climbs out"));
    let short = json!({"model": {"path": "m", "parts": []}, "docs": [{"path": "README.md"}]});
    assert!(complete(short).unwrap_err().to_string().contains("has no modelpart for layer"));

    let adapter = read(&artifact("", kitops::CONFIG, &[(&types[1], path("lora.gguf"))]));
    let elsewhere = json!({"model": {"path": "jozu.ml/team/base:v1",
                                     "parts": [{"path": "lora.gguf", "digest": digest(0)}]}});
    let why = adapter.layers_with(elsewhere.to_string().as_bytes()).unwrap_err().to_string();
    assert!(why.contains(r#"not in this ModelKit but in "jozu.ml/team/base:v1""#), "{why}");
}

#[test]
fn any_artifact_with_titles_is_files() {
    let tar = "application/vnd.oci.image.layer.v1.tar";
    let folder = json!({TITLE: "tokenizer", "io.deis.oras.content.unpack": "true",
                        "io.deis.oras.content.digest": digest(70)});
    let layers = [
        ("application/octet-stream", title("model.gguf")),
        (tar, title("archive.tar")),
        ("application/vnd.oci.image.layer.v1.tar+gzip", folder),
        (EMPTY, json!({})),
    ];
    for config in [EMPTY, "application/vnd.unknown.config.v1+json", "application/vnd.me.v1+json"] {
        let image = read(&artifact("application/vnd.me.model", config, &layers));
        assert_eq!(image.packaging, Packaging::Files);
        let expected = [
            r#"File None File("model.gguf")"#,
            r#"File None File("archive.tar")"#,
            r#"Tar Gzip Within("tokenizer")"#,
        ];
        assert_eq!(shown(&image.layers), expected);
        assert_eq!(image.layers[2].diff_id.unwrap().to_string(), digest(70));
    }
    let unnamed = artifact("", EMPTY, &[("a/b", title("x")), ("a/c", json!({}))]);
    assert!(why(&unnamed).contains("a file of type a/c without a name"), "{}", why(&unnamed));
    let chart = "application/vnd.cncf.helm.config.v1+json";
    let chart = why(&artifact("", chart, &[("application/x-tar", json!({}))]));
    assert!(
        chart
            .contains("artifact of type application/vnd.cncf.helm.config.v1+json is not supported"),
        "{chart}"
    );
}

#[test]
fn a_version_to_come_is_refused_rather_than_guessed() {
    for config in [
        "application/vnd.cncf.model.config.v2+json",
        "application/vnd.kitops.modelkit.config.v2+json",
        "application/vnd.docker.ai.model.config.v0.3+json",
    ] {
        let why = why(&artifact("", config, &[("a/b", title("x"))]));
        assert!(why.contains(&format!("artifact of type {config} is not supported")), "{why}");
    }
    let raw = "application/vnd.cncf.model.weight.v2.raw";
    let why = why(&artifact("", modelpack::CONFIGS[0], &[(raw, path("a"))]));
    assert!(why.contains("weight.v2.raw is not supported: ModelPack's weight"), "{why}");
}
