//! Connections as a client may make them, written by an encoder that knows nothing of h2, and what a real h2
//! server sees of them behind the adapter. Also for the fuzz target `authority`.
//!
//! Each field is written as it is asked for: from a table, inserted, not indexed, never indexed, plain or (where
//! the text has digits, `/` and `%` only) coded. The table's size changes; blocks are cut into frames, with
//! padding and priority.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub)] // a part of tests

use std::collections::VecDeque;

use bytes::Bytes;
use carport_proto::authority::AnyAuthority;
use h2::RecvStream;
use h2::server::SendResponse;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::task::JoinSet;

pub type Field = (Vec<u8>, Vec<u8>);

/// How a literal is written, as a number: inserted, not indexed, never indexed.
const KINDS: [(u8, u8); 3] = [(0x40, 6), (0x00, 4), (0x10, 4)];

#[derive(Debug, Clone)]
pub struct Choice {
    pub field: Field,
    pub kind: usize,
    /// From a table where it is there: the whole field, or its name.
    pub whole: bool,
    pub name: bool,
}

#[derive(Debug, Clone)]
pub struct Block {
    pub authority: Choice,
    pub fields: Vec<Choice>,
    /// A new size of the table, before the block.
    pub resize: Option<usize>,
    pub padding: Option<u8>,
    pub priority: bool,
    /// Where the block is cut into frames.
    pub cuts: Vec<usize>,
}

/// Static names and values that h2 takes in any request (RFC 7541, appendix A).
const STATIC: [(usize, &[u8], &[u8]); 8] = [
    (1, b":authority", b""),
    (16, b"accept-encoding", b"gzip, deflate"),
    (17, b"accept-language", b""),
    (19, b"accept", b""),
    (32, b"cookie", b""),
    (51, b"referer", b""),
    (58, b"user-agent", b""),
    (60, b"via", b""),
];

struct Encoder {
    table: VecDeque<Field>,
    max: usize,
}

impl Encoder {
    fn size(field: &Field) -> usize {
        field.0.len() + field.1.len() + 32
    }

    fn evict(&mut self, max: usize) {
        while self.table.iter().map(Self::size).sum::<usize>() > max {
            self.table.pop_back();
        }
    }

    fn integer(flags: u8, bits: u8, value: usize, out: &mut Vec<u8>) {
        let most = (1_usize << bits) - 1;
        out.push(flags | value.min(most) as u8);
        if value >= most {
            let mut rest = value - most;
            while rest > 127 {
                out.push(rest as u8 | 0x80);
                rest /= 128;
            }
            out.push(rest as u8);
        }
    }

    /// Coded where all characters have the same 6 bits or fewer, which needs no table: `/` and `%` and digits.
    fn string(text: &[u8], out: &mut Vec<u8>) {
        let code = |byte: &u8| match byte {
            b'0'..=b'2' => Some((u32::from(byte - b'0'), 5)),
            b'%' => Some((0x15, 6)),
            b'/' => Some((0x18, 6)),
            b'3'..=b'9' => Some((0x19 + u32::from(byte - b'3'), 6)),
            _ => None,
        };
        let Some(codes) = text.iter().map(code).collect::<Option<Vec<_>>>() else {
            Self::integer(0, 7, text.len(), out);
            return out.extend_from_slice(text);
        };
        let bits = codes.iter().flat_map(|(code, n)| (0..*n).rev().map(move |bit| code >> bit & 1));
        let mut bits: Vec<u32> = bits.collect();
        bits.resize(bits.len().next_multiple_of(8), 1);
        let bytes: Vec<u8> = bits
            .chunks(8)
            .map(|byte| byte.iter().fold(0, |all, bit| all << 1 | *bit as u8))
            .collect();
        Self::integer(0x80, 7, bytes.len(), out);
        out.extend_from_slice(&bytes);
    }

    fn resize(&mut self, max: usize, out: &mut Vec<u8>) {
        Self::integer(0x20, 5, max, out);
        self.max = max;
        self.evict(max);
    }

    fn field(&mut self, Choice { field, kind, whole, name }: &Choice, out: &mut Vec<u8>) {
        if *whole && let Some(at) = self.table.iter().position(|entry| entry == field) {
            return Self::integer(0x80, 7, at + 62, out);
        }
        let (flags, bits) = KINDS[*kind];
        // From the dynamic table where it is there, else from the static one.
        let dynamic = self.table.iter().position(|entry| entry.0 == field.0).map(|at| at + 62);
        let fixed = STATIC.iter().find(|entry| entry.1 == field.0).map(|entry| entry.0);
        let index = if *name {
            dynamic.or(fixed)
        } else if *whole {
            fixed
        } else {
            None
        };
        Self::integer(flags, bits, index.unwrap_or(0), out);
        if index.is_none() {
            Self::string(&field.0, out);
        }
        Self::string(&field.1, out);
        if *kind == 0 {
            self.evict(self.max.saturating_sub(Self::size(field)));
            if Self::size(field) <= self.max {
                self.table.push_front(field.clone());
            }
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// What a client sends for these blocks: each a request with a message.
pub fn encode(blocks: &[Block]) -> Vec<u8> {
    let mut encoder = Encoder { table: VecDeque::new(), max: 4096 };
    let mut out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    frame(0x4, 0, 0, &[], &mut out);
    for (stream, block) in (1..).step_by(2).zip(blocks) {
        let mut coded = vec![];
        if let Some(max) = block.resize {
            encoder.resize(max, &mut coded);
        }
        // POST, http.
        coded.extend_from_slice(&[0x83, 0x86]);
        encoder.field(&block.authority, &mut coded);
        let path = (b":path".to_vec(), format!("/{stream}").into_bytes());
        encoder.field(&Choice { field: path, ..block.authority.clone() }, &mut coded);
        for field in &block.fields {
            encoder.field(field, &mut coded);
        }
        let mut cuts: Vec<usize> = block.cuts.iter().map(|cut| cut % coded.len()).collect();
        // And so that no frame is too large.
        cuts.extend((0..coded.len()).step_by(16_000).skip(1));
        cuts.push(coded.len());
        cuts.sort_unstable();
        let mut start = 0;
        for (at, end) in cuts.iter().enumerate() {
            let last = if at + 1 == cuts.len() { 0x4 } else { 0 };
            if at > 0 {
                frame(0x9, last, stream, &coded[start..*end], &mut out);
            } else {
                let mut payload = vec![];
                payload.extend(block.padding);
                if block.priority {
                    payload.extend_from_slice(&[0, 0, 0, 0, 16]);
                }
                payload.extend_from_slice(&coded[start..*end]);
                payload.resize(payload.len() + usize::from(block.padding.unwrap_or(0)), 0);
                let padded = if block.padding.is_some() { 0x8 } else { 0 };
                let priority = if block.priority { 0x20 } else { 0 };
                frame(0x1, last | padded | priority, stream, &payload, &mut out);
            }
            start = *end;
        }
        frame(0x0, 0x1, stream, &vec![0x01; stream as usize % 50], &mut out);
    }
    out
}

/// A request as the server sees it.
#[derive(Debug, PartialEq, Eq)]
pub struct Seen {
    pub path: String,
    pub authority: Option<String>,
    pub fields: Vec<Field>,
    pub body: usize,
}

/// What a real h2 server makes of the bytes, which arrive in reads of `sizes`.
pub async fn serve(sent: Vec<u8>, sizes: Vec<usize>, count: usize) -> Vec<Seen> {
    let (client, server) = tokio::io::duplex(1 << 16);
    let client = tokio::spawn(talk(client, sent, sizes));
    let mut connection = h2::server::handshake(AnyAuthority::new(server)).await.unwrap();
    let (mut calls, mut seen) = (JoinSet::new(), vec![]);
    while seen.len() < count {
        tokio::select! {
            call = connection.accept() => {
                let call = call.expect("the connection stays open").unwrap();
                calls.spawn(answer(call));
            }
            Some(call) = calls.join_next() => seen.push(call.unwrap()),
        }
    }
    client.abort();
    seen.sort_by_key(|seen| seen.path[1..].parse::<usize>().unwrap());
    seen
}

async fn answer(call: (http::Request<RecvStream>, SendResponse<Bytes>)) -> Seen {
    let (request, mut response) = call;
    let (head, mut body) = request.into_parts();
    let mut bytes = 0;
    while let Some(data) = body.data().await {
        bytes += data.unwrap().len();
    }
    response.send_response(http::Response::new(()), true).unwrap();
    Seen {
        path: head.uri.path().to_owned(),
        authority: head.uri.authority().map(ToString::to_string),
        fields: listed(&head.headers),
        body: bytes,
    }
}

fn listed(fields: &http::HeaderMap) -> Vec<Field> {
    let fields = fields.iter();
    fields.map(|(name, value)| (name.as_str().into(), value.as_bytes().into())).collect()
}

async fn talk(stream: DuplexStream, sent: Vec<u8>, sizes: Vec<usize>) {
    let (mut answers, mut stream) = tokio::io::split(stream);
    let reading = tokio::spawn(async move { answers.read_to_end(&mut vec![]).await });
    let (mut rest, mut sizes) = (&sent[..], sizes.iter().cycle());
    while !rest.is_empty() {
        let size = rest.len().min(*sizes.next().unwrap());
        stream.write_all(&rest[..size]).await.unwrap();
        tokio::task::yield_now().await;
        rest = &rest[size..];
    }
    // Stays open until the server has seen everything.
    reading.await.unwrap().unwrap();
}

/// What the server is to see: as sent, but for authorities that `http` cannot parse.
pub fn expected(blocks: &[Block]) -> Vec<Seen> {
    let seen = |(stream, block): (usize, &Block)| {
        let authority = &block.authority.field.1;
        let authority = match http::uri::Authority::try_from(&authority[..]) {
            Ok(_) => Some(String::from_utf8(authority.clone()).unwrap()),
            Err(_) if authority.is_empty() => None,
            Err(_) => Some("0".repeat(authority.len())),
        };
        // The map groups the values of a name.
        let mut fields = http::HeaderMap::new();
        for Choice { field: (name, value), .. } in &block.fields {
            let name = http::HeaderName::from_bytes(name).unwrap();
            fields.append(name, http::HeaderValue::from_bytes(value).unwrap());
        }
        Seen { path: format!("/{stream}"), authority, fields: listed(&fields), body: stream % 50 }
    };
    (1..).step_by(2).zip(blocks).map(seen).collect()
}
