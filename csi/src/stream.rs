//! Streaming volumes: images that pods read while they arrive.
//!
//! ```text
//! agent ── Streams ──► fuse.sock ──► serve: Puller ─► store        one process a node,
//!   │                                  │                           which outlives the agent
//!   │ bind mounts                      └─► FuseMount on <folder>/<digest>.<number>
//!   └──────────────────► targets ◄── clones of it
//! ```
//!
//! The process with the sessions ([`serve`], the command `carport fuse`) pulls what it shows, by itself:
//! nothing of a read or of the pull goes through the agent, so the agent's end is not felt. The
//! agent ([`Streams`]) asks for images, hears how far they are, and makes the volumes.
//!
//! # What always holds
//!
//! - **One session an image**, whatever it is called and however many volumes show it, but for one
//!   whose pull has failed: the next one has a session of its own.
//! - **Who asks proves their right**: each request pulls with its own credentials, joins what is
//!   on its way, and gets nothing that the registry would not give it.
//! - **A session ends when nobody can reach it**: the agent says so, and what is still open is
//!   served until it is closed.
//! - **Credentials pass through a socket of root's** and are kept in memory only.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncReadExt as _, AsyncWrite};
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

mod client;
mod serve;
mod wire;

pub use client::{Event, Starter, Streams, check};
pub(crate) use client::{Known, Unopened};
pub use serve::{ServeOptions, serve};
pub(crate) use wire::{Failure, Open, Session, Shown, State};

/// Where the process listens, in the folder of the sessions.
fn socket(folder: &Path) -> PathBuf {
    folder.join("fuse.sock")
}

/// A connection's two ends.
struct Line {
    read: BufReader<OwnedReadHalf>,
    write: OwnedWriteHalf,
}

impl Line {
    fn new(stream: UnixStream) -> Self {
        let (read, write) = stream.into_split();
        Self { read: BufReader::new(read), write }
    }
}

/// The next object; `None` at the end.
async fn hear<T: DeserializeOwned>(
    from: &mut (impl AsyncBufRead + Unpin),
) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.take(wire::MAX_LINE_BYTES).read_until(b'\n', &mut line).await?;
    match line.last() {
        None => Ok(None),
        // Not what serde_json says of it, which may repeat a part.
        Some(b'\n') => serde_json::from_slice(&line).map(Some).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, "not a message that this version knows")
        }),
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

async fn say(to: &mut (impl AsyncWrite + Unpin), what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    to.write_all(&line).await
}

#[cfg(test)]
mod tests {
    use carport_image::pull::PullPolicy;
    use carport_image::source::PullSecret;

    use super::*;

    async fn heard(mut bytes: &[u8]) -> Result<Option<String>, io::ErrorKind> {
        hear(&mut bytes).await.map_err(|error| error.kind())
    }

    #[tokio::test]
    async fn a_message_is_a_whole_line_of_bounded_length() {
        assert_eq!(heard(b"\"ended\"\n").await, Ok(Some("ended".into())));
        assert_eq!(heard(b"").await, Ok(None));
        assert_eq!(heard(b"\"ended\"").await, Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(heard(b"{}\n").await, Err(io::ErrorKind::InvalidData));
        let endless = vec![b' '; usize::try_from(wire::MAX_LINE_BYTES).unwrap() + 10];
        assert_eq!(heard(&endless).await, Err(io::ErrorKind::UnexpectedEof));
    }

    #[tokio::test]
    async fn what_is_asked_for_arrives_with_its_credentials_and_what_is_new_is_ignored() {
        let secret = PullSecret::none().or_login("r.example", "u".into(), "p".into());
        let image = "r.example/models/llama:v1".parse().unwrap();
        let mut line = Vec::new();
        let open = Open::new(image, PullPolicy::Always, None, &secret);
        say(&mut line, &wire::Ask::Open(open)).await.unwrap();
        let text = String::from_utf8(line).unwrap().replacen("\"image\"", "\"new\":1,\"image\"", 1);
        let Some(wire::Ask::Open(open)) = hear(&mut text.as_bytes()).await.unwrap() else {
            panic!("{text}");
        };
        let request = open.request().unwrap();
        assert!(request.secret == secret && request.stream);
        assert_eq!(request.policy, PullPolicy::Always);
        assert_eq!(request.reference.to_string(), "r.example/models/llama:v1");
    }
}
