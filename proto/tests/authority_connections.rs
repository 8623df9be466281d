//! Long random connections through the adapter, before h2's own decoder: what it gets must be what was meant, but
//! for the authorities that it would refuse.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use proptest::prelude::*;

#[path = "authority_connections/connection.rs"]
mod connection;

use connection::{Block, Choice, Field, encode, expected, serve};

fn authority() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => prop::sample::select(vec!["localhost", "%2Fvar%2Flib%2Fx.sock", "/x", "", "[::1]:1", "a:b:c", "%"])
            .prop_map(|text| text.as_bytes().to_vec()),
        2 => "[0-9%/]{0,60}".prop_map(String::into_bytes),
        1 => "[ -~]{0,30}".prop_map(String::into_bytes),
        1 => (0..3000_usize).prop_map(|length| vec![b'%'; length]),
    ]
}

fn field() -> impl Strategy<Value = Field> {
    let names =
        ["accept-encoding", "cookie", "user-agent", "via", "referer", "x-a", "x-b", "0", "123"];
    let value = prop_oneof![
        3 => prop::sample::select(vec!["", "1", "0123", "same"]).prop_map(str::to_owned),
        2 => "[!-~]{0,40}",
        1 => (0..5000_usize).prop_map(|length| "y".repeat(length)),
    ];
    (prop::sample::select(names.to_vec()), value)
        .prop_map(|(name, value)| (name.as_bytes().to_vec(), value.into_bytes()))
}

fn choice(field: impl Strategy<Value = Field>) -> impl Strategy<Value = Choice> {
    (field, 0..3_usize, any::<bool>(), any::<bool>())
        .prop_map(|(field, kind, whole, name)| Choice { field, kind, whole, name })
}

fn block() -> impl Strategy<Value = Block> {
    let size = prop_oneof![Just(0), Just(4096), 0..4097_usize];
    (
        choice(authority().prop_map(|value| (b":authority".to_vec(), value))),
        prop::collection::vec(choice(field()), 0..6),
        prop::option::weighted(0.1, size),
        prop::option::weighted(0.2, 0..20_u8),
        prop::bool::weighted(0.2),
        prop::collection::vec(any::<usize>(), 0..4),
    )
        .prop_map(|(authority, fields, resize, padding, priority, cuts)| Block {
            authority,
            fields,
            resize,
            padding,
            priority,
            cuts,
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, max_shrink_time: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn a_server_sees_what_was_sent_but_for_the_authorities_it_would_refuse(
        blocks in prop::collection::vec(block(), 1..80),
        sizes in prop::collection::vec(1..3000_usize, 1..10),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let seen = runtime.block_on(async {
            let serving = serve(encode(&blocks), sizes, blocks.len());
            tokio::time::timeout(std::time::Duration::from_secs(20), serving).await
        });
        prop_assert_eq!(seen.unwrap(), expected(&blocks));
    }
}
