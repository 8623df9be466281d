use super::*;

/// `:authority: /x` not indexed, and what the server gets.
const BLOCK: [u8; 4] = [0x01, 0x02, b'/', b'x'];
const REPLACED: [u8; 4] = [0x01, 0x82, 0x00, 0x3f];
/// `:authority: /some/where`, and its shorter replacement: 11 zeros are 55 bits.
const LONG: [u8; 13] = *b"\x01\x0b/some/where";
const LONG_REPLACED: [u8; 9] = [0x01, 0x87, 0, 0, 0, 0, 0, 0, 0x01];

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let [_, length @ ..] = (payload.len() as u32).to_be_bytes();
    [&length[..], &[kind, flags, 0, 0, 0, stream], payload].concat()
}

fn preface() -> Vec<u8> {
    [PREFACE, &frame(0x4, 0, 0, &[])].concat()
}

/// What the server gets, which is the same however the bytes arrive.
fn given(input: &[u8]) -> Vec<u8> {
    let in_pieces = |size| {
        let (mut frames, mut out) = (Frames::new(), BytesMut::new());
        for piece in input.chunks(size) {
            frames.feed(piece, &mut out);
        }
        frames.end(&mut out);
        out.to_vec()
    };
    let at_once = in_pieces(input.len().max(1));
    for size in [1, 2, 7, 9, 100] {
        assert_eq!(in_pieces(size), at_once, "in pieces of {size}");
    }
    at_once
}

#[test]
fn a_block_is_rewritten_and_its_neighbours_pass() {
    let data = frame(0x0, 0x1, 1, &[0xab; 300]);
    let ping = frame(0x6, 0, 0, &[1; 8]);
    let sent = [preface(), frame(HEADERS, END_HEADERS, 1, &LONG), data.clone(), ping.clone()];
    let expected = [preface(), frame(HEADERS, END_HEADERS, 1, &LONG_REPLACED), data, ping];
    assert_eq!(given(&sent.concat()), expected.concat());
}

#[test]
fn padding_and_priority_stay() {
    let payload = |block: &[u8]| [&[3, 0, 0, 0, 7, 200], block, &[0; 3]].concat();
    let flags = END_HEADERS | PADDED | PRIORITY;
    let sent = [preface(), frame(HEADERS, flags, 9, &payload(&LONG))].concat();
    let expected = [preface(), frame(HEADERS, flags, 9, &payload(&LONG_REPLACED))].concat();
    assert_eq!(given(&sent), expected);
}

#[test]
fn a_field_may_lie_in_several_frames() {
    let parts = |first: &[u8], second: &[u8], third: &[u8]| {
        let padded = [&[2], first, &[0; 2]].concat();
        [
            preface(),
            frame(HEADERS, PADDED | 0x1, 1, &padded),
            frame(CONTINUATION, 0, 1, second),
            frame(CONTINUATION, END_HEADERS, 1, third),
        ]
        .concat()
    };
    let sent = parts(&LONG[..1], &LONG[1..6], &LONG[6..]);
    assert_eq!(given(&sent), parts(&LONG_REPLACED[..1], &LONG_REPLACED[1..6], &LONG_REPLACED[6..]));
    // Frames that have nothing more to carry stay, too.
    let sent = parts(&LONG[..12], &[], &LONG[12..]);
    assert_eq!(given(&sent), parts(&LONG_REPLACED, &[], &[]));
}

#[test]
fn the_table_lives_as_long_as_the_connection() {
    let insert = [&[0x41][..], &LONG[1..]].concat();
    let inserted = [&[0x41][..], &LONG_REPLACED[1..]].concat();
    // Its name from the dynamic table, in another stream.
    let by_name = [&[0x0f, 0x2f][..], &BLOCK[1..]].concat();
    let replaced = [&[0x0f, 0x2f][..], &REPLACED[1..]].concat();
    let sent = |first: &[u8], second: &[u8]| {
        [preface(), frame(HEADERS, END_HEADERS, 1, first), frame(HEADERS, END_HEADERS, 3, second)]
            .concat()
    };
    assert_eq!(given(&sent(&insert, &by_name)), sent(&inserted, &replaced));
}

#[test]
fn after_a_malformed_block_everything_passes() {
    let good = frame(HEADERS, END_HEADERS, 5, &BLOCK);
    for wrong in [
        frame(HEADERS, END_HEADERS, 1, &[0x80]),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[]),
        frame(HEADERS, END_HEADERS | PADDED, 1, &[4, 0x82, 0, 0]),
        frame(HEADERS, END_HEADERS | PRIORITY, 1, &[0; 4]),
        // Something between the parts of a block, and a part of another stream's.
        [frame(HEADERS, 0, 1, &BLOCK), frame(0x6, 0, 0, &[1; 8])].concat(),
        [frame(HEADERS, 0, 1, &BLOCK), frame(CONTINUATION, END_HEADERS, 3, &[])].concat(),
    ] {
        let sent = [preface(), wrong, good.clone()].concat();
        assert_eq!(given(&sent), sent);
    }
}

#[test]
fn what_is_not_http_2_passes() {
    for sent in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", b"PRI", b""] {
        assert_eq!(given(sent), sent);
    }
}

#[test]
fn what_has_not_ended_passes_at_the_end() {
    let whole = [preface(), frame(HEADERS, END_HEADERS, 1, &BLOCK)].concat();
    for end in PREFACE.len()..whole.len() {
        assert_eq!(given(&whole[..end]), &whole[..end]);
    }
}

#[test]
fn a_block_without_end_is_not_held_without_end() {
    let part = frame(CONTINUATION, 0, 1, &[0; 16 << 10]);
    let (mut frames, mut out) = (Frames::new(), BytesMut::new());
    frames.feed(&[preface(), frame(HEADERS, 0, 1, &BLOCK)].concat(), &mut out);
    let mut sent = preface().len() + 13;
    for _ in 0..7 {
        frames.feed(&part, &mut out);
        sent += part.len();
        assert_eq!(out.len(), preface().len());
    }
    assert!(frames.held.len() <= MAX_HELD_BYTES);
    frames.feed(&part, &mut out);
    assert_eq!(out.len(), sent + part.len());
    assert_eq!(frames.held.capacity(), 0);
}

#[test]
fn a_block_of_many_frames_that_h2_takes_is_rewritten() {
    // HEADERS and 6 CONTINUATION frames of 16 KiB; the authority is in the last.
    let other = [&[0x00, 0x01, b'x', 0x7f][..], &[0x81, 0x7f], &vec![b'y'; 16 * 1024]].concat();
    let mut block = vec![];
    for _ in 0..6 {
        block.extend_from_slice(&other);
    }
    let split = |last: &[u8]| {
        let whole = [&block[..], last].concat();
        let mut frames = vec![];
        for (at, part) in whole.chunks(16 << 10).enumerate() {
            let end = if (at + 1) * (16 << 10) >= whole.len() { END_HEADERS } else { 0 };
            frames.extend(frame(if at == 0 { HEADERS } else { CONTINUATION }, end, 1, part));
        }
        [preface(), frames].concat()
    };
    assert!(given(&split(&LONG)) == split(&LONG_REPLACED));
}
