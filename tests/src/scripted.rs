//! An HTTP server that does what a test says: answer, lie, stall, break off.
//!
//! One request a connection, on loopback, plain HTTP. Every request is written
//! down, so that a test can say what was asked, and with which headers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Bytes of a gated body between two looks at the gate.
const GATED_CHUNK: usize = 64 * 1024;

/// A running server; ends when dropped.
pub struct Scripted {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

/// What came in.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`, `HEAD`, …
    pub method: String,
    /// Path and query, as sent.
    pub target: String,
    /// By lower-case name.
    pub headers: HashMap<String, String>,
    /// As long as Content-Length says.
    pub body: Vec<u8>,
}

impl Request {
    /// A header's value, or nothing.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// What goes out: bytes, and then the end of the connection, or nothing more on it.
#[derive(Debug, Clone)]
pub struct Answer {
    head: String,
    body: Bytes,
    length: Option<u64>,
    stalls: bool,
    gate: Option<(Gate, u64)>,
}

/// Lets the bytes of a blob pass up to a place that the test sets, and counts them. Clones are one.
#[derive(Debug, Clone)]
pub struct Gate(Arc<GateState>);

#[derive(Debug)]
struct GateState {
    limit: watch::Sender<u64>,
    served: watch::Sender<u64>,
}

impl Gate {
    /// Bytes before `limit` pass.
    pub fn closed_at(limit: u64) -> Self {
        Self(Arc::new(GateState {
            limit: watch::Sender::new(limit),
            served: watch::Sender::new(0),
        }))
    }

    /// Lets the bytes before `limit` pass from now on.
    pub fn move_to(&self, limit: u64) {
        self.0.limit.send_replace(limit);
    }

    /// Lets everything pass.
    pub fn open(&self) {
        self.move_to(u64::MAX);
    }

    /// Bytes that went out through it, those that were asked for again included.
    pub fn served(&self) -> u64 {
        *self.0.served.borrow()
    }

    /// Waits until so many have gone out.
    ///
    /// # Panics
    ///
    /// When they do not within a minute.
    pub async fn reached(&self, bytes: u64) {
        let mut served = self.0.served.subscribe();
        let reached = served.wait_for(|served| *served >= bytes);
        let reached = tokio::time::timeout(std::time::Duration::from_secs(60), reached).await;
        assert!(reached.is_ok(), "{} of {bytes} bytes were asked for", self.served());
    }

    /// Sends `body`, whose first byte is that of the blob at `offset`.
    async fn send(&self, stream: &mut TcpStream, body: &[u8], offset: u64) -> std::io::Result<()> {
        let mut limit = self.0.limit.subscribe();
        let mut sent = 0;
        while sent < body.len() {
            let at = offset + sent as u64;
            let open = limit.wait_for(|limit| *limit > at);
            let open = *open.await.map_err(std::io::Error::other)?;
            let room = usize::try_from(open - at).unwrap_or(usize::MAX);
            let end = body.len().min(sent + GATED_CHUNK.min(room));
            stream.write_all(&body[sent..end]).await?;
            self.0.served.send_modify(|served| *served += (end - sent) as u64);
            sent = end;
        }
        Ok(())
    }
}

impl Answer {
    /// An empty answer with this status.
    pub fn status(status: u16) -> Self {
        let head = format!("HTTP/1.1 {status} Scripted\r\nConnection: close\r\n");
        Self { head, body: Bytes::new(), length: None, stalls: false, gate: None }
    }

    /// 200 with this body.
    pub fn ok(body: impl Into<Bytes>) -> Self {
        Self::status(200).body(body)
    }

    /// Adds a header.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.head.push_str(&format!("{name}: {value}\r\n"));
        self
    }

    /// Sets the body.
    #[must_use]
    pub fn body(mut self, body: impl Into<Bytes>) -> Self {
        self.body = body.into();
        self
    }

    /// Declares another length than the body has.
    #[must_use]
    pub fn declare(mut self, length: u64) -> Self {
        self.length = Some(length);
        self
    }

    /// Declares the whole body, and breaks off after `bytes` of it.
    #[must_use]
    pub fn cut(mut self, bytes: usize) -> Self {
        self.length = Some(self.length.unwrap_or(self.body.len() as u64));
        self.body.truncate(bytes);
        self
    }

    /// Sends the body as `gate` lets it pass; its first byte is the blob's at `offset`.
    #[must_use]
    pub fn through(mut self, gate: &Gate, offset: u64) -> Self {
        self.gate = Some((gate.clone(), offset));
        self
    }

    /// Sends what there is and then nothing, without closing.
    #[must_use]
    pub fn then_stall(mut self) -> Self {
        self.stalls = true;
        self
    }
}

impl Scripted {
    /// Answers each request with what `script` says to it.
    ///
    /// # Panics
    ///
    /// When no port of loopback can be had.
    pub async fn start(script: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let seen = requests.clone();
        let script = Arc::new(script);
        let task = tokio::spawn(async move {
            // Ends its connections with itself.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, script) = (seen.clone(), script.clone());
                connections.spawn(async move {
                    let _ = serve(stream, &seen, script.as_ref()).await;
                });
            }
        });
        Self { address, requests, task }
    }

    /// `127.0.0.1:<port>`.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// What was asked so far, in order.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    mut stream: TcpStream,
    seen: &Mutex<Vec<Request>>,
    script: &(dyn Fn(&Request) -> Answer + Send + Sync),
) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            return Ok(());
        }
        if !bytes[0].is_ascii_alphabetic() {
            // TLS, and this is not; what Go's server says to it.
            stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\n").await?;
            return stream.shutdown().await;
        }
    };
    let text = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let mut lines = text.lines();
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers.get("content-length").and_then(|text| text.parse().ok()).unwrap_or(0);
    let mut body = bytes.split_off(end);
    while body.len() < length {
        if stream.read_buf(&mut body).await? == 0 {
            break;
        }
    }
    let request = Request { method, target, headers, body };
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(request.clone());
    let answer = script(&request);
    let length = answer.length.unwrap_or(answer.body.len() as u64);
    let head = format!("{}Content-Length: {length}\r\n\r\n", answer.head);
    stream.write_all(head.as_bytes()).await?;
    if request.method != "HEAD" {
        match &answer.gate {
            Some((gate, offset)) => gate.send(&mut stream, &answer.body, *offset).await?,
            None => stream.write_all(&answer.body).await?,
        }
    }
    if answer.stalls {
        // Until the other side gives up.
        while stream.read(&mut [0; 64]).await? > 0 {}
    }
    stream.shutdown().await
}
