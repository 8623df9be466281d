//! Flags of the commands that ask an agent.

use std::path::PathBuf;

use clap::Args;

/// Flags of `carport locate`.
#[derive(Debug, Args)]
pub struct LocateArgs {
    /// The models that must all be there: references, or digests (sha256:…).
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<String>,
    /// Ask for this many free GPUs, too.
    #[arg(long, value_name = "COUNT")]
    pub gpus: Option<u32>,
    /// Free memory on each of them.
    #[arg(long, value_name = "SIZE", requires = "gpus")]
    pub gpu_memory: Option<bytesize::ByteSize>,
    /// At least this compute capability, such as 9.0.
    #[arg(long, value_name = "X.Y", requires = "gpus")]
    pub compute_capability: Option<String>,
    /// A regular expression that the GPU's product name matches.
    #[arg(long, value_name = "REGEX", requires = "gpus")]
    pub gpu_product: Option<String>,
    /// Where the agent is.
    #[command(flatten)]
    pub remote: Remote,
}

/// Flags of `carport prefetch`.
#[derive(Debug, Args)]
pub struct PrefetchArgs {
    /// What to bring here.
    #[arg(value_name = "REF", required = true)]
    pub references: Vec<String>,
    /// Higher goes first among prefetches.
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub priority: u32,
    /// Keep them for so long once they are here.
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub pin: Option<std::time::Duration>,
    /// Read their files into the page cache when they are here.
    #[arg(long)]
    pub warm: bool,
    /// Take earlier prefetches of them back.
    #[arg(long, conflicts_with_all = ["priority", "pin", "warm"])]
    pub cancel: bool,
    /// Where the agent is.
    #[command(flatten)]
    pub remote: Remote,
}

/// An agent that serves its API over TCP (`api.tcp`). Files are PEM.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "For an agent over TCP")]
pub struct Remote {
    /// Ask the agent at this address, instead of the one behind the socket.
    #[arg(long, env = "CARPORT_ADDRESS", value_name = "HOST:PORT", requires = "tls_ca")]
    pub address: Option<String>,
    /// The authorities that its certificate must come from.
    #[arg(long, env = "CARPORT_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// The name in its certificate [default: the host].
    #[arg(long, value_name = "NAME", requires = "address")]
    pub tls_server_name: Option<String>,
    /// One's own certificate, where it asks for one.
    #[arg(long, env = "CARPORT_TLS_CERTIFICATE", value_name = "FILE", requires = "tls_key")]
    pub tls_certificate: Option<PathBuf>,
    /// Its key.
    #[arg(long, env = "CARPORT_TLS_KEY", value_name = "FILE", requires = "tls_certificate")]
    pub tls_key: Option<PathBuf>,
    /// A file with one's token, where it asks for one.
    #[arg(long, env = "CARPORT_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}
