//! The server's end of a unix socket, for clients whose `:authority` is no host name.
//!
//! The kubelet dials a registration socket by its path. grpc-go, and other gRPC libraries, then send the
//! path as the authority: `%2Fvar%2Flib%2Fkubelet%2F…`. h2, the HTTP/2 library below tonic, cannot parse that
//! and answers RST_STREAM PROTOCOL_ERROR; it has no option. On a unix socket an authority says nothing.
//!
//! ```text
//! client ─► unix socket ─► AnyAuthority: frames ─► fields ─► tonic
//!        ◄──────────────────────────────────────────────────
//! ```
//!
//! - `frames` finds the header blocks in what the client sends;
//! - `fields` replaces an `:authority` that h2 would refuse, and keeps the dynamic tables in step;
//! - `huffman` is the code that strings may be written in.
//!
//! # What always holds
//!
//! - **Only what h2 would refuse is changed.** What a client with a valid authority sends arrives byte for
//!   byte. So does what is malformed otherwise: the answer is h2's.
//! - **Memory is bounded**: 128 KiB of a block that has not ended, and 128 entries of 32 bytes, for
//!   each connection.
//! - Frames other than HEADERS and CONTINUATION are not copied, unless they come in the same read after one.
//!
//! See `docs/decisions/unix-socket-authority.md`.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

mod fields;
mod frames;
mod huffman;

use frames::Frames;

/// An accepted connection, whose client may name any authority.
#[derive(Debug)]
pub struct AnyAuthority<S> {
    stream: S,
    frames: Frames,
    /// What the server has no room for yet.
    ready: BytesMut,
}

impl<S> AnyAuthority<S> {
    /// The server's end of `stream`, of which nothing was read yet.
    pub fn new(stream: S) -> Self {
        Self { stream, frames: Frames::new(), ready: BytesMut::new() }
    }

    /// Moves as much of what is ready as fits.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) {
        let now = self.ready.len().min(buffer.remaining());
        buffer.put_slice(&self.ready[..now]);
        self.ready.advance(now);
        if self.ready.is_empty() {
            // The capacity was for one read.
            self.ready = BytesMut::new();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AnyAuthority<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let start = buffer.filled().len();
        // What was read may all be held: that is not the end.
        while this.ready.is_empty() && buffer.filled().len() == start && buffer.remaining() > 0 {
            ready!(Pin::new(&mut this.stream).poll_read(context, buffer))?;
            let read = &buffer.filled()[start..];
            if read.is_empty() {
                this.frames.end(&mut this.ready);
                break;
            }
            let passed = this.frames.pass(read);
            this.frames.feed(&read[passed..], &mut this.ready);
            buffer.set_filled(start + passed);
        }
        this.give(buffer);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

impl<S: Connected> Connected for AnyAuthority<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}
