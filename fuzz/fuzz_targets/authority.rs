#![no_main]

//! Connections through the adapter of `carport_proto::authority`, before h2's decoder.

use libfuzzer_sys::arbitrary::{Result, Unstructured};

#[path = "../../proto/tests/authority_connections/connection.rs"]
mod connection;

use connection::{Block, Choice, encode, expected, serve};

const NAMES: [&[u8]; 9] =
    [b"accept-encoding", b"cookie", b"user-agent", b"via", b"referer", b"x-a", b"x-b", b"0", b"123"];

/// Enough to fill the table many times, and to end soon.
const MAX_BLOCKS: usize = 200;

fn choice(data: &mut Unstructured<'_>, name: &[u8]) -> Result<Choice> {
    let flags: u8 = data.arbitrary()?;
    let value = match flags >> 4 & 3 {
        0 => b"%2Fvar%2Flib%2Fx.sock".to_vec(),
        1 => vec![b'0' + flags % 10; data.int_in_range(0..=4200)?],
        2 => vec![b'/'; data.int_in_range(0..=20)?],
        _ => {
            let length = data.int_in_range(0..=40)?;
            data.bytes(length)?.iter().map(|byte| b'!' + byte % 94).collect()
        }
    };
    Ok(Choice {
        field: (name.to_vec(), value),
        kind: usize::from(flags & 3) % 3,
        whole: flags & 4 != 0,
        name: flags & 8 != 0,
    })
}

fn block(data: &mut Unstructured<'_>) -> Result<Block> {
    let flags: u8 = data.arbitrary()?;
    let authority = choice(data, b":authority")?;
    let fields = (0..flags & 3).map(|_| {
        let name = data.choose(&NAMES)?;
        choice(data, name)
    });
    let fields = fields.collect::<Result<_>>()?;
    let resize = if flags & 0x1c == 0 { Some(data.int_in_range(0..=4096)?) } else { None };
    let padding = if flags & 0x20 != 0 { Some(data.arbitrary()?) } else { None };
    let cuts = (0..flags >> 6).map(|_| data.arbitrary()).collect::<Result<_>>()?;
    Ok(Block { authority, fields, resize, padding, priority: flags & 0x40 != 0, cuts })
}

fn connection(data: &mut Unstructured<'_>) -> Result<(Vec<Block>, usize)> {
    let size = data.int_in_range(1..=3000)?;
    let mut blocks = vec![];
    while !data.is_empty() && blocks.len() < MAX_BLOCKS {
        blocks.push(block(data)?);
    }
    Ok((blocks, size))
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok((blocks, size)) = connection(&mut Unstructured::new(data)) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let seen = runtime.expect("a runtime").block_on(async {
        let serving = serve(encode(&blocks), vec![size], blocks.len());
        tokio::time::timeout(std::time::Duration::from_secs(20), serving).await
    });
    assert_eq!(seen.expect("an answer in time"), expected(&blocks));
});
