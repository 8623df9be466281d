use super::*;

const PATH: &[u8] = b"%2Fvar%2Flib%2Fx.sock";
/// The same, coded.
const PATH_CODED: &[u8] = &[
    0x54, 0x58, 0x7b, 0x8e, 0xc5, 0x45, 0x86, 0x83, 0x46, 0xa8, 0xb0, 0xf9, 0x5d, 0x07, 0x27, 0x5f,
];

/// A string as it is, or coded.
fn text(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![];
    Prefix { flags: 0, bits: 7 }.write(bytes.len(), &mut out);
    [out, bytes.to_vec()].concat()
}

fn coded(bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![];
    HUFFMAN.write(bytes.len(), &mut out);
    [out, bytes.to_vec()].concat()
}

fn index(prefix: Prefix, index: usize) -> Vec<u8> {
    let mut out = vec![];
    prefix.write(index, &mut out);
    out
}

/// So many zeros, as the server gets them.
fn zeros(count: usize) -> Vec<u8> {
    coded(&huffman::zeros(count))
}

fn fields(parts: &[Vec<u8>]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn a_valid_authority_is_left_as_it_is() {
    let mut connection = Fields::new();
    for valid in [&b"localhost"[..], b"127.0.0.1:50051", b"[::1]:80", b"a.b", b"user%40x@host"] {
        for kind in [INSERTED, NOT_INDEXED, NEVER_INDEXED] {
            let block = fields(&[index(INDEXED, 3), index(kind, 1), text(valid)]);
            assert_eq!(connection.rewrite(&block), Ok(block));
        }
    }
}

#[test]
fn a_refused_authority_becomes_as_many_zeros_and_keeps_its_kind() {
    for refused in [PATH, b"/var/lib/x.sock", b"/", b"a:1:2", b"\xff", b" ", &[b'%'; 5000]] {
        for kind in [INSERTED, NOT_INDEXED, NEVER_INDEXED] {
            let before_and_after = [index(INDEXED, 3), text(b"x")];
            let [before, _] = &before_and_after;
            for (name, written) in [
                (index(kind, 1), "static"),
                ([index(kind, 0), text(b":authority")].concat(), "literal"),
                (
                    [index(kind, 0), coded(&[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f])]
                        .concat(),
                    "coded",
                ),
            ] {
                let block =
                    fields(&[before.clone(), name.clone(), text(refused), index(INDEXED, 4)]);
                let expected =
                    fields(&[before.clone(), name, zeros(refused.len()), index(INDEXED, 4)]);
                let rewritten = Fields::new().rewrite(&block);
                assert_eq!(rewritten, Ok(expected), "{written} {refused:?}");
                assert!(rewritten.unwrap().len() <= block.len());
            }
        }
    }
}

#[test]
fn a_coded_value_is_understood() {
    assert_eq!(huffman::decode(PATH_CODED).as_deref(), Some(PATH));
    let block = fields(&[index(INSERTED, 1), coded(PATH_CODED)]);
    let expected = fields(&[index(INSERTED, 1), zeros(PATH.len())]);
    assert_eq!(Fields::new().rewrite(&block), Ok(expected));
}

#[test]
fn the_name_and_the_field_are_found_in_the_dynamic_table() {
    let mut connection = Fields::new();
    connection.rewrite(&fields(&[index(INSERTED, 1), text(PATH)])).unwrap();
    // Another field before it: the authority is at 63 now.
    connection.rewrite(&fields(&[index(INSERTED, 0), text(b"x-a"), text(b"b")])).unwrap();
    // As a whole: the server has the replacement there.
    let block = index(INDEXED, 63);
    assert_eq!(connection.rewrite(&block), Ok(block));
    for kind in [NOT_INDEXED, NEVER_INDEXED, INSERTED] {
        let block = fields(&[index(kind, 63), text(b"/run/other.sock")]);
        let expected = fields(&[index(kind, 63), zeros(15)]);
        assert_eq!(connection.rewrite(&block), Ok(expected));
    }
    // The last one was inserted, before the others.
    let block = fields(&[index(NOT_INDEXED, 62), text(b"/run/third.sock")]);
    assert_eq!(connection.rewrite(&block), Ok(fields(&[index(NOT_INDEXED, 62), zeros(15)])));
    // The names of others are none.
    let block = fields(&[index(NOT_INDEXED, 63), text(b"/run/third.sock")]);
    assert_eq!(connection.rewrite(&block), Ok(block));
}

#[test]
fn an_authority_that_was_evicted_is_forgotten() {
    let mut connection = Fields::new();
    connection.rewrite(&fields(&[index(INSERTED, 1), text(PATH)])).unwrap();
    // 32 + 3 + 4029 + 32 + 10 + 21 = 4127 > 4096.
    connection.rewrite(&fields(&[index(INSERTED, 0), text(b"x-a"), text(&[b'b'; 4029])])).unwrap();
    assert_eq!(connection.rewrite(&index(INDEXED, 62)), Ok(index(INDEXED, 62)));
    assert_eq!(connection.rewrite(&index(INDEXED, 63)), Err(Malformed));
}

#[test]
fn an_entry_that_is_larger_than_the_table_empties_it() {
    let mut connection = Fields::new();
    connection.rewrite(&fields(&[index(INSERTED, 1), text(PATH)])).unwrap();
    connection.rewrite(&fields(&[index(INSERTED, 1), text(&[b'/'; 4096])])).unwrap();
    assert_eq!(connection.rewrite(&index(INDEXED, 62)), Err(Malformed));
}

#[test]
fn entries_are_kept_as_long_as_they_fit() {
    // 10 + 21 + 32 bytes, and as much as is left of 4096.
    let filling = 4096 - (10 + PATH.len() + 32) - 32 - 3;
    let mut connection = Fields::new();
    connection.rewrite(&fields(&[index(INSERTED, 1), text(PATH)])).unwrap();
    let other = [index(INSERTED, 0), text(b"x-a"), text(&vec![b'b'; filling])];
    connection.rewrite(&fields(&other)).unwrap();
    assert_eq!(connection.rewrite(&index(INDEXED, 63)), Ok(index(INDEXED, 63)));
    // One byte less of room, and the older one goes.
    connection.rewrite(&index(TABLE_SIZE, 4095)).unwrap();
    assert_eq!(connection.rewrite(&index(INDEXED, 62)), Ok(index(INDEXED, 62)));
    assert_eq!(connection.rewrite(&index(INDEXED, 63)), Err(Malformed));
}

#[test]
fn table_size_updates_pass_and_evict() {
    let mut connection = Fields::new();
    let block =
        fields(&[index(TABLE_SIZE, 0), index(TABLE_SIZE, 4096), index(INSERTED, 1), text(PATH)]);
    let expected =
        fields(&[index(TABLE_SIZE, 0), index(TABLE_SIZE, 4096), index(INSERTED, 1), zeros(21)]);
    assert_eq!(connection.rewrite(&block), Ok(expected));
    assert_eq!(connection.rewrite(&index(TABLE_SIZE, 0)), Ok(index(TABLE_SIZE, 0)));
    assert_eq!(connection.rewrite(&index(INDEXED, 62)), Err(Malformed));
    assert_eq!(Fields::new().rewrite(&index(TABLE_SIZE, 4097)), Err(Malformed));
}

#[test]
fn an_empty_authority_is_left_out_and_indices_count_without_it() {
    let mut connection = Fields::new();
    let old = [index(INSERTED, 0), text(b"x-old"), text(b"1")];
    let empty = [index(INSERTED, 1), text(b"")];
    let new = [index(INSERTED, 0), text(b"x-new"), text(b"2")];
    let block = fields(&[old.concat(), empty.concat(), new.concat()]);
    assert_eq!(connection.rewrite(&block), Ok(fields(&[old.concat(), new.concat()])));
    // The client: 62 is new, 63 the authority, 64 old. The server: 62 is new, 63 old.
    let block = fields(&[index(INDEXED, 62), index(INDEXED, 63), index(INDEXED, 64)]);
    assert_eq!(connection.rewrite(&block), Ok(fields(&[index(INDEXED, 62), index(INDEXED, 63)])));
    let block = fields(&[index(NOT_INDEXED, 64), text(b"3")]);
    assert_eq!(connection.rewrite(&block), Ok(fields(&[index(NOT_INDEXED, 63), text(b"3")])));
    // Its name is the static one for the server.
    let block = fields(&[index(NEVER_INDEXED, 63), text(PATH)]);
    assert_eq!(
        connection.rewrite(&block),
        Ok(fields(&[index(NEVER_INDEXED, 1), zeros(PATH.len())]))
    );
    let block = fields(&[index(INSERTED, 63), text(b"localhost")]);
    assert_eq!(connection.rewrite(&block), Ok(fields(&[index(INSERTED, 1), text(b"localhost")])));
    // Where it is not inserted, nothing moves.
    for kind in [NOT_INDEXED, NEVER_INDEXED] {
        assert_eq!(connection.rewrite(&fields(&[index(kind, 1), text(b"")])), Ok(vec![]));
    }
    assert_eq!(connection.rewrite(&index(INDEXED, 63)), Ok(index(INDEXED, 63)));
    assert_eq!(connection.rewrite(&index(INDEXED, 65)), Ok(index(INDEXED, 64)));
}

#[test]
fn what_is_malformed_is_said_so() {
    for wrong in [
        index(INDEXED, 0),
        index(INDEXED, 62),
        index(NOT_INDEXED, 1),
        fields(&[index(NOT_INDEXED, 62), text(b"")]),
        fields(&[index(NOT_INDEXED, 1), vec![5, b'a']]),
        fields(&[index(NOT_INDEXED, 1), coded(&[0xff; 4])]),
        fields(&[index(NOT_INDEXED, 0), coded(&[0xff; 4]), text(b"")]),
        fields(&[index(INSERTED, 2), coded(&[0xff; 4])]),
        vec![0xff, 0x80],
        vec![0xff, 0x80, 0x80, 0x80, 0x80, 0x01],
        vec![0x00, 0x7f, 0xff, 0xff, 0xff, 0xff],
    ] {
        assert_eq!(Fields::new().rewrite(&wrong), Err(Malformed), "{wrong:x?}");
    }
}

#[test]
fn integers_are_read_as_they_are_written() {
    for bits in [4, 5, 6, 7] {
        for value in
            [0, 1, 14, 15, 16, 30, 31, 62, 63, 126, 127, 128, 254, 255, 4096, 16383, 1 << 20]
        {
            let mut block = vec![];
            Prefix { flags: 0, bits }.write(value, &mut block);
            assert_eq!(Reader { block: &block, at: 0 }.integer(bits), Ok(value));
        }
    }
}
