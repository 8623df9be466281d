//! A proxy of the open registry with limited speed, under the name `slow.example`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use carport_tests::cluster::ADDRESS;
use carport_tests::cluster::registries::Served;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Each connection forwards this many pieces per second.
const PIECES_PER_SECOND: u64 = 20;

/// A proxy that ends when it is dropped.
pub(crate) struct Slow {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    /// Bytes per second of each connection.
    rate: AtomicU64,
    served: AtomicU64,
}

impl Slow {
    /// Serves this many bytes per second and connection.
    pub(crate) async fn start(rate: u64) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.rate.store(rate, Ordering::Relaxed);
        let listener = TcpListener::bind((ADDRESS, Served::Slow.port())).await?;
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { shared, task })
    }

    /// Changes the rate, also of open connections.
    pub(crate) fn set_rate(&self, rate: u64) {
        self.shared.rate.store(rate, Ordering::Relaxed);
    }

    /// Bytes that went to clients.
    pub(crate) fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Relaxed)
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    // Dropped with this task, which closes the connections.
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let shared = Arc::clone(&shared);
        connections.spawn(async move {
            // An error closes the connection; the client sees that.
            let _ = forward(client, &shared).await;
        });
    }
}

async fn forward(mut client: TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut server = TcpStream::connect((ADDRESS, Served::Open.port())).await?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let there = tokio::io::copy(&mut from_client, &mut to_server);
    let back = async {
        let mut piece = vec![0; 64 * 1024];
        loop {
            let rate = shared.rate.load(Ordering::Relaxed);
            let most = usize::try_from(rate / PIECES_PER_SECOND)
                .unwrap_or(usize::MAX)
                .clamp(1, piece.len());
            let count = from_server.read(&mut piece[..most]).await?;
            if count == 0 {
                return Ok(());
            }
            to_client.write_all(&piece[..count]).await?;
            shared.served.fetch_add(count as u64, Ordering::Relaxed);
            if rate < u64::MAX {
                tokio::time::sleep(Duration::from_millis(1000 / PIECES_PER_SECOND)).await;
            }
        }
    };
    tokio::select! {
        done = there => done.map(drop),
        done = back => done,
    }
}
