//! Every option and every limit, each with its reason and what happens at it.
//!
//! A binary parses [`Config`] from its command line; a program that embeds the server fills it in, usually from
//! [`Config::default`].

use clap::{Args, Parser, ValueEnum};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where a protocol listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Nowhere.
    Off,
    /// At this address; port 0 lets the system choose.
    At(SocketAddr),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Listen::Off);
        }
        text.to_socket_addrs()
            .map_err(|error| format!("{error}: write HOST:PORT (port 0 lets the system choose), or off"))?
            .next()
            .map(Listen::At)
            .ok_or_else(|| format!("{text} has no address"))
    }
}

/// How keys are spread over shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PartitionerChoice {
    /// By a hash: evenly, whatever the keys look like.
    Hashed,
    /// By order, at the given boundaries: neighbouring keys stay together.
    Ordered,
}

/// What happens when a write needs more memory than the limit allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Eviction {
    /// It is refused, and nothing is lost.
    None,
    /// Items that are not worth their room make place, by the policy S3-FIFO: items that were not read again soon after they
    /// came go first.
    S3Fifo,
}

impl std::fmt::Display for Eviction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Eviction::None => "none",
            Eviction::S3Fifo => "s3-fifo",
        })
    }
}

/// How safe a write is when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DurabilityChoice {
    /// It is in the log soon; the system decides when it is safe.
    None,
    /// It is safe within --sync-interval.
    Interval,
    /// It is safe. Nobody sees it before.
    Always,
}

/// What happens when what is on disk is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Recover {
    /// The server does not start.
    Stop,
    /// What is readable is kept.
    Salvage,
}

/// A number of bytes, written with an optional k, m or g (powers of 1024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let lower = text.trim().to_ascii_lowercase();
        let number = lower.trim_end_matches("ib").trim_end_matches('b');
        let (digits, factor) = match number.as_bytes().last() {
            Some(b'k') => (&number[..number.len() - 1], 1u64 << 10),
            Some(b'm') => (&number[..number.len() - 1], 1 << 20),
            Some(b'g') => (&number[..number.len() - 1], 1 << 30),
            _ => (number, 1),
        };
        digits
            .parse::<u64>()
            .ok()
            .and_then(|count| count.checked_mul(factor))
            .map(Bytes)
            .ok_or_else(|| format!("'{text}' is not a number of bytes: write 1048576, 1024k, 1m or 1g"))
    }
}

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (shift, unit) in [(30, "g"), (20, "m"), (10, "k")] {
            if self.0 > 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)];
    let (digits, factor) = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
        .unwrap_or((text, &1.0));
    digits
        .parse::<f64>()
        .ok()
        .and_then(|count| Duration::try_from_secs_f64(count * factor).ok())
        .ok_or_else(|| format!("'{text}' is not a duration: write 0, 500ms, 30s, 5m or 1h"))
}

fn parse_receive_buffers(text: &str) -> Result<u16, String> {
    let count = text
        .parse::<u16>()
        .ok()
        .filter(|count| count.is_power_of_two() && *count <= 16384);
    count.ok_or_else(|| "it must be a power of two, 1 to 16384".to_owned())
}

/// A thread-per-core, shared-nothing in-memory key-value server.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "memkv-tpc",
    version,
    about,
    after_help = "`memkv-tpc inspect DIR` describes a data directory; `memkv-tpc inspect --help` tells more."
)]
pub struct Config {
    /// Cores to serve with, one thread and one key range each [default: all CPUs this process may use].
    ///
    /// More than there are CPUs works, unpinned and without spinning.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub cores: Option<u16>,

    /// Key-range shards; each belongs to one core [default: one per core; 64 with --data-dir, for good].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16384))]
    pub shards: Option<u16>,

    /// How keys are spread over shards [default: hashed; with --data-dir, for good].
    #[arg(long, value_enum)]
    pub partitioner: Option<PartitionerChoice>,

    /// With --partitioner ordered: the first keys of the second and all later shards, in order.
    #[arg(long, value_name = "K1,K2,...", value_delimiter = ',')]
    pub boundaries: Vec<String>,

    /// Where clients of the memcached text protocol connect.
    #[arg(long, value_name = "HOST:PORT|off", default_value = "127.0.0.1:11211")]
    pub memcached: Listen,

    /// Where clients of the simple text protocol connect [default: 127.0.0.1:7002, or the port in SERVER_PORT].
    #[arg(long, value_name = "HOST:PORT|off")]
    pub text: Option<Listen>,

    /// Where clients of the protobuf protocol (proto/memkv.proto) connect.
    #[arg(long, value_name = "HOST:PORT|off", default_value = "127.0.0.1:7001")]
    pub protobuf: Listen,

    /// Where clients of the JSON-line protocol connect.
    #[arg(long, value_name = "HOST:PORT|off", default_value = "127.0.0.1:9888")]
    pub json_line: Listen,

    /// Where HTTP clients connect, and browsers: keys, metrics, and a page about the server.
    #[arg(long, value_name = "HOST:PORT|off", default_value = "127.0.0.1:8080")]
    pub http: Listen,

    /// Names by which HTTP clients may address the server to write, beside localhost and addresses. A web page elsewhere could
    /// have its own name lead here.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    pub http_hosts: Vec<String>,

    /// Where gRPC clients connect.
    #[arg(long, value_name = "HOST:PORT|off", default_value = "127.0.0.1:7000")]
    pub grpc: Listen,

    /// One more protobuf port for each core, on the same address: core N serves BASE + N alone, so that a client which knows
    /// the topology reaches the owner of a key without a detour. 0 lets the system choose the ports.
    #[arg(long, value_name = "BASE")]
    pub core_ports: Option<u16>,

    /// Where data outlives the server: a log of what is written, and snapshots. Made when it is not there. Without it everything is
    /// in memory only.
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,

    /// How safe a write is when it is answered, with --data-dir.
    #[arg(long, value_enum, default_value_t = DurabilityChoice::Interval)]
    pub durability: DurabilityChoice,

    /// With --durability interval: how often what was written is made safe.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    pub sync_interval: Duration,

    /// Bytes of the log, of all cores together, after which snapshots are made and the log begins anew. 0: not by its size.
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(1 << 30))]
    pub snapshot_log_bytes: Bytes,

    /// How often snapshots are made when something was written. 0: not by time.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_duration)]
    pub snapshot_interval: Duration,

    /// What happens when what is on disk is damaged, other than at the end of a log that a crash cut short. stop: the start ends with
    /// the place and the cause. salvage: what is readable is kept.
    #[arg(long, value_enum, default_value_t = Recover::Stop)]
    pub recover: Recover,

    /// Rows `<key> <value>` to load before serving. With --data-dir, only into one that holds no data.
    #[arg(long, value_name = "FILE", env = "KV_DATA_FILE_PATH")]
    pub load: Option<PathBuf>,

    /// Load them also when --data-dir holds data.
    #[arg(long)]
    pub load_again: bool,

    /// A malformed row ends the start instead of being counted.
    #[arg(long)]
    pub load_strict: bool,

    /// Refuse every write, with the error of its protocol. Reads and statistics go on, and --load works.
    #[arg(long)]
    pub read_only: bool,

    /// Let clients stop the server with memcached's `shutdown` command.
    #[arg(long)]
    pub enable_shutdown: bool,

    /// What there is a limit to.
    #[command(flatten)]
    pub limits: Limits,

    /// How long a core polls for work before it sleeps, at most, in microseconds. 0: not at all. Halves the latency of a
    /// single client and costs CPU time while there is little to do, so it is off, and adapts itself when on.
    #[arg(long, value_name = "US", default_value_t = 0)]
    pub spin_us: u32,

    /// Requests that take longer than this, from their arrival to when the client's socket has taken the last of their replies,
    /// go to the slow log. 0: none.
    #[arg(long, value_name = "TIME", default_value = "10ms", value_parser = parse_duration)]
    pub slow_log_threshold: Duration,

    /// Entries of the slow log, for each core. Beyond it the oldest are forgotten.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=10000))]
    pub slow_log_len: u16,

    /// Seed of the hash that spreads keys. Set it to compare runs; otherwise every start draws a new one, so that nobody can
    /// prepare keys that all land in one place.
    #[arg(long, value_name = "N")]
    pub token_seed: Option<u64>,
}

/// Every limit.
#[derive(Clone, Debug, Args)]
pub struct Limits {
    /// Memory of the whole process: items, index, connections, all [default: 75 % of what this process may use]. At it,
    /// --eviction says what happens.
    #[arg(long, value_name = "BYTES")]
    pub max_memory: Option<Bytes>,

    /// What happens at the memory limit. none: writes that need more are answered with the protocol's out-of-memory error,
    /// and the old value stays. s3-fifo: other items make place.
    #[arg(long, value_enum, default_value_t = Eviction::None)]
    pub eviction: Eviction,

    /// The longest key, the same for all protocols. A longer one is refused.
    #[arg(long, value_name = "BYTES", default_value_t = 250, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub key_size_max: u16,

    /// The largest value. A larger one is read, dropped and refused.
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(1 << 20))]
    pub item_size_max: Bytes,

    /// The longest request of a protocol that frames its requests (protobuf) [default: --item-size-max and 64k, 16m at the
    /// least]. A longer one is read, dropped and refused.
    #[arg(long, value_name = "BYTES")]
    pub request_bytes_max: Option<Bytes>,

    /// Values in the answer to one request for several keys, together [default: as --request-bytes-max]. A request for more
    /// is refused.
    #[arg(long, value_name = "BYTES")]
    pub response_bytes_max: Option<Bytes>,

    /// Keys of one request on the protobuf protocol. One with more is refused.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=65535))]
    pub request_keys_max: u32,

    /// Writes of one transaction that is built up command by command. One with more cannot be committed.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=65535))]
    pub txn_ops_max: u32,

    /// Bytes of its keys and values, and 64 for each. One with more cannot be committed.
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(16 << 20))]
    pub txn_bytes_max: Bytes,

    /// A transaction whose connection sends nothing for this long cannot be committed any more. 0: for ever.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub txn_idle_timeout: Duration,

    /// Open connections. One more is told so, where its protocol can, and closed.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    pub connections_max: u32,

    /// Requests of one connection that wait for other cores. At it, the connection is not read until some are answered.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    pub requests_in_flight_max: u32,

    /// Bytes received on one connection and not yet understood. At it, the connection is not read until they are.
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(64 << 10))]
    pub input_bytes_max: Bytes,

    /// Bytes of replies that one connection has not taken yet. At it, none of its requests are begun until it takes some.
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(1 << 20))]
    pub output_bytes_max: Bytes,

    /// A connection that sends nothing for this long is closed. 0: never.
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_duration)]
    pub idle_timeout: Duration,

    /// An HTTP client that takes longer than this from one request's end to the end of the next one's headers is let go, and so
    /// is one that sends nothing of a request's body for as long. 0: never.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    pub http_timeout: Duration,

    /// A connection that takes none of its waiting replies for this long is closed. 0: never.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    pub write_timeout: Duration,

    /// Buffers of 8 KiB that a core receives into; a power of two. When one turn needs more, receiving goes on in the next.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = parse_receive_buffers)]
    pub receive_buffers: u16,

    /// Connections that the kernel holds until they are accepted, for each core and protocol. Further ones are dropped by
    /// the kernel and retried by their clients.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub backlog: u32,

    /// Requests from one core to another that are not yet answered. At it, connections that need more are not read.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub mesh_requests_max: u32,

    /// The same limit in bytes. One request is always let through, however large it is.
    #[arg(long, value_name = "BYTES", default_value_t = Bytes(4 << 20))]
    pub mesh_bytes_max: Bytes,
}

impl Config {
    /// Where the simple text protocol listens: the option, or the port in `SERVER_PORT` (for scripts written for servers
    /// that take it), or the default.
    pub fn text_listen(&self) -> Result<Listen, String> {
        if let Some(listen) = self.text {
            return Ok(listen);
        }
        match std::env::var("SERVER_PORT") {
            Err(_) => Ok(Listen::At(SocketAddr::from(([127, 0, 0, 1], 7002)))),
            Ok(port) => port
                .trim()
                .parse::<u16>()
                .map(|port| Listen::At(SocketAddr::from(([127, 0, 0, 1], port))))
                .map_err(|_| format!("SERVER_PORT is '{port}': it must be a port number, 0 to 65535")),
        }
    }
}

impl Limits {
    /// The longest framed request, in bytes: as the option says, or room for the largest item and for many small ones.
    pub fn request_bytes_max(&self) -> u64 {
        let default = (self.item_size_max.0 + (64 << 10)).max(16 << 20);
        self.request_bytes_max.map_or(default, |limit| limit.0)
    }

    /// The most bytes of values in one answer.
    pub fn response_bytes_max(&self) -> u64 {
        self.response_bytes_max
            .map_or_else(|| self.request_bytes_max(), |limit| limit.0)
    }
}

impl Default for Config {
    /// What the binary does without arguments.
    fn default() -> Self {
        Config::parse_from(["memkv-tpc"])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Config::command().debug_assert();
    }

    #[test]
    fn sizes_and_times() {
        for (text, bytes) in [
            ("5", 5),
            ("1k", 1024),
            ("64M", 64 << 20),
            ("2gb", 2 << 30),
            ("1MiB", 1 << 20),
        ] {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes));
        }
        for bad in ["", "x", "1t", "-1", "99999999999g"] {
            assert!(bad.parse::<Bytes>().is_err(), "{bad}");
        }
        assert_eq!(Bytes(1 << 20).to_string(), "1m");
        for eviction in Eviction::value_variants() {
            assert_eq!(Eviction::from_str(&eviction.to_string(), false).as_ref(), Ok(eviction));
        }
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        assert!(parse_duration("-1s").is_err());
    }

    #[test]
    fn listeners() {
        assert_eq!("off".parse(), Ok(Listen::Off));
        assert_eq!(
            "127.0.0.1:0".parse(),
            Ok(Listen::At(SocketAddr::from(([127, 0, 0, 1], 0))))
        );
        assert!("11211".parse::<Listen>().unwrap_err().contains("HOST:PORT"));
    }
}
