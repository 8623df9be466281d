//! `docs/api-reference.md` is what the .proto files say, and these say enough.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use carport_tests::api_reference::{files, markdown, numbers};
use carport_tests::carport::workspace;
use prost_types::{DescriptorProto, EnumDescriptorProto};

/// With `CARPORT_WRITE_API_REFERENCE` it is written instead: `make api-reference`.
#[test]
fn the_reference_is_made_from_the_proto_files() {
    let path = workspace().join("docs/api-reference.md");
    let made = markdown(&files());
    if std::env::var_os("CARPORT_WRITE_API_REFERENCE").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    for (n, (kept, made)) in kept.lines().zip(made.lines()).enumerate() {
        assert_eq!(kept, made, "docs/api-reference.md:{}: run `make api-reference`", n + 1);
    }
    assert_eq!(kept, made, "docs/api-reference.md: run `make api-reference`");
}

#[test]
fn every_number_says_what_it_counts() {
    // The unit is a part of the name, or stands in the comment.
    let units = ["bytes", "bytes_each", "ratio", "watts", "celsius", "count", "per_second"];
    let mut mute = numbers(&files());
    assert!(mute.len() > 70, "{}", mute.len());
    mute.retain(|number| {
        !units.iter().any(|unit| number.name.ends_with(unit)) && number.comment.is_empty()
    });
    let names: Vec<&str> = mute.iter().map(|number| &*number.name).collect();
    assert!(names.is_empty(), "neither a unit nor a comment: {names:?}");
}

#[test]
fn every_call_message_and_value_has_a_section_or_a_word() {
    let files = files();
    let text = markdown(&files);
    let mut calls = 0;
    for file in &files {
        for call in file.service.iter().flat_map(|service| &service.method) {
            let row = text.lines().find(|line| line.starts_with(&format!("| `{}` |", call.name())));
            let row = row.unwrap_or_else(|| panic!("{}", call.name()));
            assert!(!row.ends_with("|  |"), "{row}");
            calls += 1;
        }
        let messages = file.message_type.iter().map(DescriptorProto::name);
        for name in messages.chain(file.enum_type.iter().map(EnumDescriptorProto::name)) {
            assert!(text.contains(&format!("\n### {name}\n")), "{name}");
        }
    }
    assert!(calls >= 12, "{calls}");
}
