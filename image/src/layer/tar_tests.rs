use super::*;
use proptest::prelude::*;

/// A flat record of events: members, and files with their content put together.
fn read(tar: &[u8], chunk: usize) -> Result<Vec<(Member, Vec<u8>)>, TarError> {
    let mut parser = Parser::new();
    let mut out: Vec<(Member, Vec<u8>)> = Vec::new();
    for mut input in tar.chunks(chunk.max(1)) {
        loop {
            let (used, event) = parser.next(input)?;
            input = &input[used..];
            match event {
                Event::More => break,
                Event::Member(member) => out.push((member, Vec::new())),
                Event::Data(bytes) => out.last_mut().unwrap().1.extend_from_slice(bytes),
                Event::End => {
                    let (member, content) = out.last().unwrap();
                    let MemberKind::File { size, .. } = member.kind else {
                        panic!("end of no file")
                    };
                    assert_eq!(content.len() as u64, size);
                }
            }
        }
        // A state that was saved and read back goes on the same.
        parser = serde_json::from_str(&serde_json::to_string(&parser).unwrap()).unwrap();
    }
    assert_eq!(parser.offset(), tar.len() as u64);
    parser.finish()?;
    Ok(out)
}

fn builder() -> tar::Builder<Vec<u8>> {
    tar::Builder::new(Vec::new())
}

fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_cksum();
    header
}

/// Writes `name` into the header as it is, which the builder's own checks would refuse.
fn hostile(name: &[u8], kind: tar::EntryType, link: &[u8]) -> Vec<u8> {
    let mut header = header(kind, 0);
    let old = header.as_old_mut();
    old.name[..name.len()].copy_from_slice(name);
    old.linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(&[0; 1024]);
    bytes
}

fn refusal(tar: &[u8]) -> String {
    read(tar, 4096).unwrap_err().to_string()
}

#[test]
fn members_come_out_whatever_the_chunks_are() {
    let long = "long/".repeat(40) + "name.safetensors";
    let mut tar = builder();
    tar.append_data(&mut header(tar::EntryType::Directory, 0), "models/", std::io::empty())
        .unwrap();
    let mut exec = header(tar::EntryType::Regular, 3);
    exec.set_mode(0o755);
    tar.append_data(&mut exec, "./models/run", &b"run"[..]).unwrap();
    let body = vec![7; 1500];
    tar.append_data(&mut header(tar::EntryType::Regular, 1500), &long, &body[..]).unwrap();
    tar.append_data(&mut header(tar::EntryType::Regular, 0), "empty", std::io::empty()).unwrap();
    tar.append_link(&mut header(tar::EntryType::Symlink, 0), "ln", "/abs/../where").unwrap();
    tar.append_link(&mut header(tar::EntryType::Link, 0), "hl", &long).unwrap();
    let tar = tar.into_inner().unwrap();

    let member = |path: &str, kind| Member { path: path.to_owned(), kind };
    let expected = vec![
        (member("models", MemberKind::Directory), vec![]),
        (member("models/run", MemberKind::File { size: 3, executable: true }), b"run".to_vec()),
        (member(&long, MemberKind::File { size: 1500, executable: false }), body),
        (member("empty", MemberKind::File { size: 0, executable: false }), vec![]),
        (member("ln", MemberKind::Symlink { target: "/abs/../where".into() }), vec![]),
        (member("hl", MemberKind::Hardlink { target: long.clone() }), vec![]),
    ];
    for chunk in [1, 7, 511, 512, 513, 4096, tar.len()] {
        assert_eq!(read(&tar, chunk).unwrap(), expected, "chunks of {chunk}");
    }
}

#[test]
fn names_are_bounded_together() {
    let name = |n: usize| format!("{n:08}/{}", "d/".repeat(120) + &"n".repeat(255));
    let mut parser = Parser::new();
    let mut read = |n: usize| {
        let mut tar = builder();
        tar.append_pax_extensions([("path", name(n).as_bytes())]).unwrap();
        let mut bytes = tar.get_ref().clone();
        bytes.extend_from_slice(header(tar::EntryType::Regular, 0).as_bytes());
        let mut input = &bytes[..];
        while !input.is_empty() {
            let (used, _) = parser.next(input)?;
            input = &input[used..];
        }
        // The end of the empty file.
        parser.next(&[]).map(drop)
    };
    let fit = 64 * 1024 * 1024 / name(0).len();
    (0..fit).try_for_each(&mut read).unwrap();
    let why = read(fit).unwrap_err().to_string();
    assert!(why.ends_with("names of more than 64 MiB together"), "{why}");
}

#[test]
fn a_size_that_no_file_has_is_refused() {
    let with_size = |field: [u8; 12]| {
        let mut header = header(tar::EntryType::Regular, 0);
        header.as_old_mut().size = field;
        header.as_old_mut().name[0] = b'x';
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(&[0; 1024]);
        bytes
    };
    // In base-256: -1, and one more than an exbibyte.
    let mut large = [0; 12];
    (large[0], large[4], large[11]) = (0x80, 0x10, 1);
    for field in [[0xff; 12], large] {
        let why = refusal(&with_size(field));
        assert_eq!(why, "at byte 0: a size of more than an exbibyte in header");
    }
    let mut pax = builder();
    pax.append_pax_extensions([("size", &b"18446744073709551615"[..])]).unwrap();
    let mut bytes = pax.get_ref().clone();
    bytes.extend(with_size(*b"00000000000\0"));
    assert_eq!(refusal(&bytes), "at byte 1024: a size of more than an exbibyte in header");
}

#[test]
fn pax_records_name_and_size_the_next_member_only() {
    let mut tar = builder();
    let name = format!("pax/{}", "n".repeat(200));
    tar.append_pax_extensions([("path", name.as_bytes()), ("size", b"5"), ("mtime", b"1.5")])
        .unwrap();
    let mut short = header(tar::EntryType::Regular, 0);
    short.as_old_mut().name[..1].copy_from_slice(b"x");
    short.set_cksum();
    let mut bytes = tar.into_inner().unwrap();
    bytes.truncate(bytes.len() - 1024);
    bytes.extend_from_slice(short.as_bytes());
    bytes.extend_from_slice(b"hello");
    bytes.extend_from_slice(&[0; 507]);
    bytes.extend_from_slice(&hostile(b"next", tar::EntryType::Regular, b""));
    let members = read(&bytes, 100).unwrap();
    assert_eq!(members[0].0.path, name);
    assert_eq!(members[0].1, b"hello");
    assert_eq!(members[1].0.path, "next");
}

#[test]
fn names_that_leave_the_root_are_refused() {
    use tar::EntryType::{Link, Regular};
    assert_eq!(
        refusal(&hostile(b"../evil", Regular, b"")),
        r#"entry "../evil": climbs out with "..""#
    );
    assert_eq!(
        refusal(&hostile(b"a/../../evil", Regular, b"")),
        r#"entry "a/../../evil": climbs out with "..""#
    );
    assert!(refusal(&hostile(b"/etc/passwd", Regular, b"")).contains("absolute names"));
    assert!(refusal(&hostile(b"a", Link, b"/etc/shadow")).contains("absolute names"));
    assert!(refusal(&hostile(b"a", Link, b"../../etc/shadow")).contains("climbs out"));
    assert!(refusal(&hostile(b"\xff\xfe", Regular, b"")).contains("not UTF-8"));
    assert!(
        refusal(&hostile(b"./", tar::EntryType::Symlink, b"/etc")).contains("in place of the root")
    );
}

#[test]
fn what_is_no_model_content_is_refused_by_kind() {
    use tar::EntryType;
    assert!(refusal(&hostile(b"dev", EntryType::Char, b"")).contains("device nodes"));
    assert!(refusal(&hostile(b"dev", EntryType::Block, b"")).contains("device nodes"));
    assert!(refusal(&hostile(b"fifo", EntryType::Fifo, b"")).contains("pipes"));
    assert!(refusal(&hostile(b"sparse", EntryType::GNUSparse, b"")).contains("sparse"));
    assert!(
        refusal(&hostile(b"odd", EntryType::new(b'Q'), b"")).contains("unknown entry type 'Q'")
    );
}

#[test]
fn damage_is_told_from_a_short_archive() {
    let mut tar = builder();
    tar.append_data(&mut header(tar::EntryType::Regular, 1000), "weights", &[1; 1000][..]).unwrap();
    let tar = tar.into_inner().unwrap();
    assert_eq!(refusal(&tar[..900]), r#"ends in the middle of "weights""#);
    assert_eq!(read(&tar[..1536], 512).unwrap().len(), 1, "an end marker may be missing");
    let mut damaged = tar.clone();
    damaged[3] ^= 1;
    assert!(refusal(&damaged).starts_with("at byte 0: header checksum"), "{}", refusal(&damaged));
    assert!(refusal(b"<html>not found</html>".repeat(50).as_slice()).contains("not a tar"));
}

#[test]
fn a_huge_extension_header_is_refused_before_it_is_read() {
    let mut long = header(tar::EntryType::GNULongName, 10 << 30);
    long.set_cksum();
    let mut parser = Parser::new();
    let error = parser.next(long.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("longer than 1 MiB"), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), flips in proptest::collection::vec((0usize..2048, any::<u8>()), 0..6)) {
        let _ = read(&bytes, 700);
        let mut tar = builder();
        tar.append_data(&mut header(tar::EntryType::Regular, 600), "a/b", &[3; 600][..]).unwrap();
        let mut tar = tar.into_inner().unwrap();
        for (at, value) in flips {
            if let Some(byte) = tar.get_mut(at) { *byte = value; }
        }
        let _ = read(&tar, 333);
    }
}

/// What is said of the attributes of an archive with one member.
fn attributes(header: &tar::Header, pax: &[(&str, &[u8])]) -> Attributes {
    let mut builder = builder();
    builder.append_pax_extensions(pax.iter().copied()).unwrap();
    let mut header = header.clone();
    header.set_path("m/a").unwrap();
    header.set_cksum();
    builder.append(&header, std::io::empty()).unwrap();
    let tar = builder.into_inner().unwrap();
    let mut parser = Parser::new();
    let mut input = &tar[..];
    while !matches!(
        parser.next(input).map(|(used, event)| {
            input = &input[used..];
            event
        }),
        Ok(Event::More)
    ) {}
    parser.attributes().clone()
}

#[test]
fn what_a_tree_shows_otherwise_is_noted() {
    let of = |kind, mode, user, group| {
        let mut header = header(kind, 0);
        header.set_mode(mode);
        header.set_uid(user);
        header.set_gid(group);
        header
    };
    let file = |mode| of(tar::EntryType::Regular, mode, 0, 0);
    let changed = |why: &str| Attributes::Changed(format!("/m/a {why}"));
    for mode in [0o444, 0o644, 0o555, 0o755] {
        assert_eq!(attributes(&file(mode), &[]), Attributes::Kept, "{mode:o}");
    }
    for mode in [0o600, 0o640, 0o664, 0o666, 0o744, 0o4755, 0o2755] {
        assert_eq!(attributes(&file(mode), &[]), changed(&format!("has the mode {mode:04o}")));
    }
    assert_eq!(attributes(&of(tar::EntryType::Directory, 0o755, 0, 0), &[]), Attributes::Kept);
    let sticky = of(tar::EntryType::Directory, 0o1777, 0, 0);
    assert_eq!(attributes(&sticky, &[]), changed("has the mode 1777"));
    assert_eq!(
        attributes(&of(tar::EntryType::Regular, 0o644, 7, 0), &[]),
        changed("belongs to 7:0")
    );
    // Pax records go before the header; times and names say nothing.
    assert_eq!(attributes(&file(0o644), &[("gid", b"1000")]), changed("belongs to 0:1000"));
    let large = of(tar::EntryType::Regular, 0o644, 7, 7);
    assert_eq!(attributes(&large, &[("uid", b"0"), ("gid", b"0")]), Attributes::Kept);
    assert_eq!(attributes(&file(0o644), &[("mtime", b"1.5"), ("uname", b"me")]), Attributes::Kept);
    let extended = [("SCHILY.xattr.security.capability", &b"x"[..])];
    assert_eq!(attributes(&file(0o755), &extended), changed("has extended attributes"));
}
