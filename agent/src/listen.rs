//! TCP listeners that strangers can reach: both families of addresses, and so many connections at a time
//! that descriptors are left for the unix sockets, pulls and mounts.
//!
//! ```text
//! accept ─► a slot? ─ yes ─► served, the slot is free at its end
//!              └ no ─► closed at once, and counted
//! ```
//!
//! The node's own processes have slots apart: the kubelet probes from there, and must not be kept out by
//! who holds all the others.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use carport_csi::accept::AcceptErrors;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::metrics::ConnectionMetrics;

/// As many as the standard library has.
const BACKLOG: i32 = 128;

/// As many open files as all that is bounded here could take, many times over.
const OPEN_FILES: u64 = 65_536;

/// Why a connection is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// All slots are taken.
    Limit,
    /// All slots of this peer are.
    PeerLimit,
    /// The kernel gave none, mostly for want of descriptors.
    NotAccepted,
}

impl Refusal {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Limit, Self::PeerLimit, Self::NotAccepted];

    /// As in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::PeerLimit => "peer_limit",
            Self::NotAccepted => "not_accepted",
        }
    }
}

/// How many connections there may be at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of all peers together, but for this machine.
    pub all: usize,
    /// Of one peer: an IPv4 address, or an IPv6 network of 64 bits.
    pub peer: usize,
    /// Of this machine, apart from the others.
    pub own: usize,
}

impl Limits {
    /// At most `all` connections and a `part`-th of the open files that this process may have: the rest
    /// is for what pods wait for.
    pub fn within(all: usize, part: usize) -> Self {
        let files = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(OPEN_FILES);
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        let all = all.min(files / part).max(4);
        Self { all, peer: (all / 4).max(2), own: (all / 8).max(2) }
    }
}

/// Raises the number of files that this process may have open: 1,024 is a shell's measure, and containerd's
/// since 2.0. The hard limit needs no right.
///
/// # Errors
///
/// What the kernel said.
pub fn raise_open_files() -> rustix::io::Result<()> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or(OPEN_FILES, |hard| hard.min(OPEN_FILES));
    if limit.current.is_none_or(|soft| soft >= most) {
        return Ok(());
    }
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit })
}

/// Listens on `address`. `[::]` means both families, and all of IPv4 where the kernel has no IPv6.
///
/// # Errors
///
/// When the address is taken or not this machine's.
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    bind_with(address, open)
}

fn bind_with(
    address: SocketAddr,
    open: impl Fn(SocketAddr) -> io::Result<std::net::TcpListener>,
) -> io::Result<TcpListener> {
    let listener = match open(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && is_without_ipv6(&error) => {
            let instead = SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
            tracing::info!(%address, %instead, why = %error, "no IPv6 on this node; listening on IPv4 alone");
            open(instead)
        }
        opened => opened,
    };
    TcpListener::from_std(listener?)
}

/// IPv6 is not in the kernel, or switched off.
fn is_without_ipv6(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    errno.is_some_and(|errno| matches!(errno, Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL))
}

fn open(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // Whatever net.ipv6.bindv6only says.
        socket.set_only_v6(address.ip() != Ipv6Addr::UNSPECIFIED)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A listener that gives away no more than its slots.
pub struct LimitedListener {
    name: &'static str,
    listener: TcpListener,
    slots: Arc<Slots>,
    errors: AcceptErrors,
    metrics: ConnectionMetrics,
}

impl LimitedListener {
    /// Accepts at `listener`, called `name` in logs and metrics.
    pub fn new(
        name: &'static str,
        listener: TcpListener,
        limits: Limits,
        metrics: ConnectionMetrics,
    ) -> Self {
        let (slots, errors) = (Arc::new(Slots::new(limits)), AcceptErrors::new(name));
        Self { name, listener, slots, errors, metrics }
    }

    /// The next connection that may be served, with its slot. Waits where there is no descriptor for one.
    ///
    /// # Cancel safety
    ///
    /// No connection is lost.
    pub async fn accept(&mut self) -> (TcpStream, SocketAddr, Slot) {
        loop {
            let (stream, peer) = match self.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.metrics.refused(self.name, Refusal::NotAccepted);
                    self.errors.wait(&error).await;
                    continue;
                }
            };
            self.errors.over();
            let own = stream.local_addr().is_ok_and(|local| local.ip() == peer.ip());
            match self.slots.take(Peer::of(peer.ip(), own)) {
                Ok(slot) => return (stream, peer, slot),
                Err(why) => self.refuse(why),
            }
        }
    }

    /// Counts a connection that ends unserved.
    fn refuse(&self, why: Refusal) {
        self.metrics.refused(self.name, why);
        if self.slots.is_first_refusal() {
            tracing::warn!(
                listener = self.name,
                reason = why.name(),
                "too many connections; refusing more until some end"
            );
        }
    }
}

/// Whose slots are counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Peer {
    Own,
    V4(Ipv4Addr),
    /// Whoever has one address of such a network has all.
    V6([u8; 8]),
}

impl Peer {
    fn of(address: IpAddr, own: bool) -> Self {
        match address.to_canonical() {
            _ if own => Self::Own,
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let mut network = [0; 8];
                network.copy_from_slice(&address.octets()[..8]);
                Self::V6(network)
            }
        }
    }
}

/// How many connections there are.
#[derive(Debug)]
pub struct Slots {
    limits: Limits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    peers: HashMap<Peer, usize>,
    /// Some were refused since the slots were last free again; the log has said so.
    refusing: bool,
}

impl Slots {
    /// So many at a time.
    pub fn new(limits: Limits) -> Self {
        Self { limits, taken: Mutex::default() }
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot here for a peer that already has one elsewhere.
    pub fn take_for(self: &Arc<Self>, slot: &Slot) -> Result<Slot, Refusal> {
        self.take(slot.peer)
    }

    fn take(self: &Arc<Self>, peer: Peer) -> Result<Slot, Refusal> {
        let (own, mut taken) = (peer == Peer::Own, self.taken());
        let of_peer = taken.peers.get(&peer).copied().unwrap_or_default();
        let most = if own { self.limits.own } else { self.limits.peer };
        if of_peer >= most {
            return Err(Refusal::PeerLimit);
        }
        if !own {
            if taken.all >= self.limits.all {
                return Err(Refusal::Limit);
            }
            taken.all += 1;
        }
        taken.peers.insert(peer, of_peer + 1);
        Ok(Slot { slots: Arc::clone(self), peer })
    }

    fn is_first_refusal(&self) -> bool {
        !std::mem::replace(&mut self.taken().refusing, true)
    }
}

/// A place among the connections. Dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<Slots>,
    peer: Peer,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.slots.taken();
        if self.peer != Peer::Own {
            taken.all -= 1;
        }
        if let Some(n) = taken.peers.get_mut(&self.peer) {
            *n -= 1;
            if *n == 0 {
                taken.peers.remove(&self.peer);
            }
        }
        if taken.peers.is_empty() {
            taken.refusing = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn no_peer_takes_the_slots_of_others_or_of_this_machine() {
        let slots = Arc::new(Slots::new(Limits { all: 5, peer: 2, own: 1 }));
        let take = |text, own| slots.take(Peer::of(address(text), own));
        let held: Vec<Slot> = [
            take("192.0.2.1", false),
            // The same address, seen by a socket of both families.
            take("::ffff:192.0.2.1", false),
            take("2001:db8::1", false),
            take("2001:db8::ffff:0:0:1", false),
            take("192.0.2.3", false),
        ]
        .into_iter()
        .map(Result::unwrap)
        .collect();
        assert_eq!(take("192.0.2.1", false).unwrap_err(), Refusal::PeerLimit);
        assert_eq!(take("2001:db8::2", false).unwrap_err(), Refusal::PeerLimit);
        assert_eq!(take("192.0.2.4", false).unwrap_err(), Refusal::Limit);
        let own = take("192.0.2.9", true).unwrap();
        assert_eq!(take("192.0.2.9", true).unwrap_err(), Refusal::PeerLimit);
        drop((held, own));
        assert!(slots.taken().peers.is_empty());
        assert_eq!(slots.taken().all, 0);
    }

    #[tokio::test]
    async fn without_ipv6_all_of_ipv4_is_listened_on() {
        let wanted: SocketAddr = "[::]:0".parse().unwrap();
        for errno in [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL] {
            let opened = bind_with(wanted, |address| match address.is_ipv6() {
                true => Err(errno.into()),
                false => open(address),
            });
            assert_eq!(opened.unwrap().local_addr().unwrap().ip(), Ipv4Addr::UNSPECIFIED);
        }
        // Any other address, and any other error, is as it is.
        let refused = |address: &str, errno: Errno| {
            bind_with(address.parse().unwrap(), |_| Err(errno.into())).unwrap_err()
        };
        assert_eq!(refused("[::1]:0", Errno::ADDRNOTAVAIL).raw_os_error(), Some(99));
        assert_eq!(refused("[::]:0", Errno::ADDRINUSE).raw_os_error(), Some(98));
    }

    #[tokio::test]
    async fn both_families_reach_one_listener() {
        let Ok(listener) = bind("[::]:0".parse().unwrap()) else {
            panic!("cannot listen on both families");
        };
        let local = listener.local_addr().unwrap();
        std::net::TcpStream::connect((Ipv4Addr::LOCALHOST, local.port())).unwrap();
        if local.is_ipv4() {
            eprintln!("SKIPPED: no IPv6 here");
            return;
        }
        std::net::TcpStream::connect((Ipv6Addr::LOCALHOST, local.port())).unwrap();
    }
}
