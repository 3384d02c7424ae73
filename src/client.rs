//! A small blocking client of the protobuf protocol.
//!
//! A [`Client`] asks one thing at a time over connections that it keeps. Told to [`Options::route`], it learns which core
//! owns which keys and asks each core at its own port, so that no request travels between the server's cores.
//!
//! ```
//! use memkv::client::Client;
//! use memkv::config::{Config, Listen};
//! use memkv::protocol::Protocol;
//! use memkv::runtime::Server;
//!
//! let config = Config {
//!     cores: Some(1),
//!     memcached: Listen::Off,
//!     text: Some(Listen::Off),
//!     protobuf: "127.0.0.1:0".parse()?,
//!     ..Config::default()
//! };
//! let server = Server::start(config)?;
//! let address = server.address(Protocol::Protobuf).ok_or("not listening")?;
//!
//! let mut client = Client::connect(address)?;
//! client.set("greeting", "hello")?;
//! let item = client.get("greeting")?.ok_or("nothing there")?;
//! assert_eq!(item.value, "hello");
//! assert!(client.delete("greeting")?);
//! assert_eq!(client.get("greeting")?, None);
//! server.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is repeated
//!
//! A broken connection is replaced at the next request. When a connection breaks during a request, the request is repeated
//! once, on a fresh connection, if that does no harm: if it only reads, or if it was not sent to its end, because a server
//! executes nothing but whole requests. A write that was sent and not answered ends in [`Error::Unknown`] instead.

use crate::model::{Condition, CoreId, Version};
use crate::partition::{Partitioner, TokenRange};
use crate::proto::topology_report::TokenFunction;
use crate::proto::{self, Code, MetricsReport, Response, message::Command};
use bytes::Bytes;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{DeserializeError, Deserializer};
use prost::Message;
use std::io::{self, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How many bytes of a strange answer an error shows.
const SHOWN_BYTES_MAX: usize = 80;
/// Room that an announced answer gets at once; more follows with its bytes, so that the number alone costs no memory.
const ANSWER_BYTES_AT_ONCE: usize = 1 << 20;

/// How to connect and how to ask.
#[derive(Clone, Debug)]
pub struct Options {
    /// The longest wait for a connection to one address. 5 seconds unless set; 0 is refused.
    pub connect_timeout: Duration,
    /// The longest wait for a request to be sent and answered; a repetition begins anew. 5 seconds unless set.
    pub timeout: Duration,
    /// Ask each core for its own keys, if the server was started with `--core-ports`; else it changes nothing. Off unless
    /// set.
    pub route: bool,
    /// A longer answer, in bytes, is not read. 1 GiB unless set.
    pub answer_bytes_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(5),
            route: false,
            answer_bytes_max: 1 << 30,
        }
    }
}

impl Options {
    /// Connects to the first of the name's addresses that works. The addresses are kept: the name is not looked up again.
    ///
    /// # Errors
    /// When the name has no address, or none takes a connection, or with [`Options::route`] the topology cannot be had.
    pub fn connect(&self, address: impl ToSocketAddrs) -> Result<Client, Error> {
        let addresses: Vec<SocketAddr> = address.to_socket_addrs().map_err(Error::Lookup)?.collect();
        let mut client = Client {
            options: self.clone(),
            addresses,
            any_core: None,
            map: None,
            last_id: 0,
        };
        client.any_core = Some(client.open_any()?);
        if self.route {
            client.load_map()?;
        }
        Ok(client)
    }
}

/// Why a request came to nothing.
#[derive(Debug)]
pub enum Error {
    /// The server's name has no address.
    Lookup(io::Error),
    /// There is no connection. Nothing was sent.
    Connect {
        /// Where to.
        address: SocketAddr,
        /// Why not.
        cause: io::Error,
    },
    /// The connection ended, or nothing came for too long (then the cause is [`ErrorKind::TimedOut`]). The request changed
    /// nothing.
    Lost {
        /// The other end.
        address: SocketAddr,
        /// What happened.
        cause: io::Error,
    },
    /// The same, when a write had been sent: it was executed, or it will be, or it will not.
    Unknown {
        /// The other end.
        address: SocketAddr,
        /// What happened.
        cause: io::Error,
    },
    /// The server refused, and changed nothing.
    Refused {
        /// The reason as a number.
        code: Code,
        /// The reason in the server's words.
        message: String,
    },
    /// What came is not an answer to the request. What a write has done at such a server is unknown.
    Foreign {
        /// The other end.
        address: SocketAddr,
        /// What came, in words.
        what: String,
    },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::Lookup(cause) => write!(f, "the server's name cannot be looked up: {cause}"),
            Error::Connect { address, cause } => write!(f, "cannot connect to {address}: {cause}"),
            Error::Lost { address, cause } => write!(f, "{address}: {cause}"),
            Error::Unknown { address, cause } => {
                write!(f, "{address}: {cause}; the write may have been executed or not: read before it is repeated")
            }
            Error::Refused { code, message } if message.is_empty() => write!(f, "the server answered {}", code.as_str_name()),
            Error::Refused { code, message } => write!(f, "the server answered {}: {message}", code.as_str_name()),
            Error::Foreign { address, what } => write!(
                f,
                "{address} does not speak the protobuf protocol of memkv-tpc: {what}; is it the right port?"
            ),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Lookup(cause)
            | Error::Connect { cause, .. }
            | Error::Lost { cause, .. }
            | Error::Unknown { cause, .. } => Some(cause),
            Error::Refused { .. } | Error::Foreign { .. } => None,
        }
    }
}

/// What a key has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The value. The values of one answer share its memory: to keep a small one long, copy it.
    pub value: Bytes,
    /// As the item's writer gave them.
    pub flags: u32,
    /// When the item ends, to the millisecond; none: it stays until it is deleted.
    pub expires_at: Option<SystemTime>,
    /// The item's version, when it was asked for.
    pub version: Option<Version>,
}

/// A value to write.
#[derive(Clone, Debug)]
pub struct Put {
    /// 1 byte to the server's `--key-size-max`, any bytes.
    pub key: Vec<u8>,
    /// Up to the server's `--item-size-max`, any bytes.
    pub value: Vec<u8>,
    /// Kept with the value; the server gives them no meaning.
    pub flags: u32,
    /// When the item ends.
    pub expiry: Expiry,
    /// When to write at all.
    pub condition: Condition,
    /// The result carries the version that the item gets.
    pub with_version: bool,
}

impl Put {
    /// A value without flags, that stays, to be written in any case: for the fields that differ, write
    /// `Put { flags: 3, ..Put::new(key, value) }`.
    pub fn new(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self {
            key: key.into(),
            value: value.into(),
            flags: 0,
            expiry: Expiry::Never,
            condition: Condition::Always,
            with_version: false,
        }
    }

    fn into_entry(self) -> proto::Entry {
        proto::Entry {
            key: self.key,
            value: self.value,
            flags: self.flags,
            expiry: match self.expiry {
                Expiry::Never => None,
                Expiry::In(ttl) => Some(proto::entry::Expiry::TtlMs(milliseconds(ttl))),
                Expiry::At(moment) => Some(proto::entry::Expiry::ExpiresAtMs(milliseconds(
                    moment.duration_since(UNIX_EPOCH).unwrap_or_default(),
                ))),
            },
            condition: wire_condition(self.condition),
            with_version: self.with_version,
        }
    }
}

/// When an item ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expiry {
    /// It stays until it is deleted.
    #[default]
    Never,
    /// After this time, rounded up to milliseconds, by the server's clock; 0: at once.
    In(Duration),
    /// At this moment, rounded up to milliseconds; in the past: at once.
    At(SystemTime),
}

/// What came of a [`Put`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a value may not have been written"]
pub enum Written {
    /// It is stored, under this version if the version was asked for.
    Stored(Option<Version>),
    /// Its condition asks for an item, and there is none.
    NotFound,
    /// Its condition did not hold.
    ConditionFailed,
    /// The server's memory limit is reached; what was there is still there.
    OutOfMemory,
}

/// What came of a [`Client::delete_if`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "an item may not have been deleted"]
pub enum Deleted {
    /// It is gone.
    Deleted,
    /// There was none.
    NotFound,
    /// Its condition did not hold.
    ConditionFailed,
}

/// Which core owns which keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// How a key becomes a token. None: in a way that this client does not know.
    pub partitioner: Option<Partitioner>,
    /// All tokens, in order and without gaps.
    pub ranges: Vec<Owned>,
    /// By core: its own port, on the server's address. Empty unless the server was started with `--core-ports`.
    pub core_ports: Vec<u16>,
    /// How many cores there are.
    pub cores: u16,
}

/// A range of tokens and its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned {
    /// The tokens.
    pub tokens: TokenRange,
    /// The core that owns them.
    pub core: CoreId,
}

impl Topology {
    /// The core that owns `key`; none if the server makes tokens in a way that this client does not know.
    pub fn owner(&self, key: &[u8]) -> Option<CoreId> {
        let token = self.partitioner?.place(key).token;
        let after = self.ranges.partition_point(|range| range.tokens.start <= token);
        self.ranges.get(after.checked_sub(1)?).map(|range| range.core)
    }

    /// What the report says; in words, why it makes no sense.
    fn read(report: &proto::TopologyReport) -> Result<Self, String> {
        let cores = u16::try_from(report.cores).unwrap_or_default();
        let mut ranges: Vec<Owned> = vec![];
        for (number, range) in report.ranges.iter().enumerate() {
            let next = report.ranges.get(number + 1).map(|next| next.start);
            let tokens = TokenRange {
                start: range.start,
                end: next.map_or(u64::MAX, |next| next.saturating_sub(1)),
            };
            let core = u16::try_from(range.core).ok().filter(|core| *core < cores);
            match core {
                Some(core) if next.is_none_or(|next| next > range.start) => ranges.push(Owned {
                    tokens,
                    core: CoreId(core),
                }),
                _ => return Err(format!("a topology of {} cores whose range {number} cannot be", report.cores)),
            }
        }
        if ranges.first().is_none_or(|first| first.tokens.start != 0) {
            return Err("a topology whose ranges do not begin with token 0".to_owned());
        }
        let ports = report.core_ports.iter().map(|port| u16::try_from(*port).ok().filter(|port| *port > 0));
        let core_ports: Option<Vec<u16>> = ports.collect();
        let partitioner = match TokenFunction::try_from(report.token_function) {
            Ok(TokenFunction::Xxh3) => Some(Partitioner::Hashed { seed: report.seed }),
            Ok(TokenFunction::FirstBytes) => Some(Partitioner::Ordered { seed: report.seed }),
            Err(_) => None,
        };
        match core_ports {
            Some(core_ports) if core_ports.is_empty() || core_ports.len() == usize::from(cores) => Ok(Self {
                partitioner,
                ranges,
                core_ports,
                cores,
            }),
            _ => Err(format!("a topology of {cores} cores with the ports {:?}", report.core_ports)),
        }
    }
}

impl proto::Latency {
    /// The whole histogram, in nanoseconds.
    ///
    /// # Errors
    /// When the bytes are no histogram in HdrHistogram's V2 encoding.
    pub fn decode_histogram(&self) -> Result<Histogram<u64>, DeserializeError> {
        Deserializer::new().deserialize(&mut self.histogram.as_slice())
    }
}

/// What is known of the server's cores.
#[derive(Debug)]
struct Map {
    topology: Topology,
    /// By core, once it was asked something.
    connections: Vec<Option<Connection>>,
}

/// A client of one server. It asks one thing at a time; for more at once, use several.
#[derive(Debug)]
pub struct Client {
    options: Options,
    addresses: Vec<SocketAddr>,
    /// A connection to whatever core took it.
    any_core: Option<Connection>,
    /// Only with [`Options::route`], and only until a connection turns out broken: the server may have been restarted.
    map: Option<Map>,
    last_id: u64,
}

impl Client {
    /// [`Options::connect`] with the default options.
    ///
    /// # Errors
    /// See there.
    pub fn connect(address: impl ToSocketAddrs) -> Result<Self, Error> {
        Options::default().connect(address)
    }

    /// What a key has. Reading does no harm, so it is repeated once when its connection breaks.
    ///
    /// # Errors
    /// When the server cannot be asked, or refuses the key. This holds for all that follows.
    pub fn get(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Item>, Error> {
        Ok(self.read(&[key], false)?.pop().flatten())
    }

    /// The same with the item's version, for a later [`Condition::VersionIs`].
    #[expect(missing_errors_doc, reason = "see get")]
    pub fn get_versioned(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Item>, Error> {
        Ok(self.read(&[key], true)?.pop().flatten())
    }

    /// What each of the keys has, in their order, asked for in one request. Without keys nothing is asked.
    pub fn get_many(&mut self, keys: &[impl AsRef<[u8]>]) -> Result<Vec<Option<Item>>, Error> {
        self.read(keys, false)
    }

    /// The same with the items' versions.
    pub fn get_many_versioned(&mut self, keys: &[impl AsRef<[u8]>]) -> Result<Vec<Option<Item>>, Error> {
        self.read(keys, true)
    }

    /// Writes a value that stays until it is deleted.
    ///
    /// # Errors
    /// Also when the server's memory limit is reached.
    pub fn set(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Result<(), Error> {
        match self.set_with(Put::new(key, value))? {
            Written::Stored(_) => Ok(()),
            Written::OutOfMemory => Err(Error::Refused {
                code: Code::OutOfMemory,
                message: "the server's memory limit is reached".to_owned(),
            }),
            // Only of a condition.
            Written::NotFound | Written::ConditionFailed => Err(self.foreign("a plain write whose condition failed")),
        }
    }

    /// Writes a value in all its particulars.
    pub fn set_with(&mut self, put: Put) -> Result<Written, Error> {
        let mut results = self.set_many([put])?;
        results.pop().ok_or_else(|| self.foreign("no result"))
    }

    /// Writes several values in one request; what came of each, in their order. Without values nothing is asked.
    pub fn set_many(&mut self, puts: impl IntoIterator<Item = Put>) -> Result<Vec<Written>, Error> {
        let entries: Vec<proto::Entry> = puts.into_iter().map(Put::into_entry).collect();
        let Some(first) = entries.first() else {
            return Ok(vec![]);
        };
        let (key, count) = (first.key.clone(), entries.len());
        let results = self.ask_keys(Command::Set(proto::Set { entries }), &key, count)?;
        let written = |result: proto::KeyResult| match result.code() {
            Code::Ok => Some(Written::Stored(version(result.version))),
            Code::NotFound => Some(Written::NotFound),
            Code::ConditionFailed => Some(Written::ConditionFailed),
            Code::OutOfMemory => Some(Written::OutOfMemory),
            _ => None,
        };
        self.each(results, written)
    }

    /// Deletes a key; false: there was nothing.
    pub fn delete(&mut self, key: impl Into<Vec<u8>>) -> Result<bool, Error> {
        Ok(self.delete_if(key, Condition::Always)? == Deleted::Deleted)
    }

    /// Deletes a key if the condition holds.
    pub fn delete_if(&mut self, key: impl Into<Vec<u8>>, condition: Condition) -> Result<Deleted, Error> {
        let conditions = wire_condition(condition).into_iter().collect();
        let mut results = self.remove(vec![key.into()], conditions)?;
        results.pop().ok_or_else(|| self.foreign("no result"))
    }

    /// Deletes several keys in one request; for each, in their order, whether there was something. Without keys nothing is
    /// asked.
    pub fn delete_many(&mut self, keys: &[impl AsRef<[u8]>]) -> Result<Vec<bool>, Error> {
        let keys = keys.iter().map(|key| key.as_ref().to_vec()).collect();
        let results = self.remove(keys, vec![])?;
        Ok(results.iter().map(|result| *result == Deleted::Deleted).collect())
    }

    /// The counters and latencies of all cores.
    pub fn metrics(&mut self) -> Result<MetricsReport, Error> {
        let response = self.ask(Command::Metrics(proto::Metrics {}), None)?;
        response.metrics.ok_or_else(|| self.foreign("an answer without metrics"))
    }

    /// Which core owns which keys.
    pub fn topology(&mut self) -> Result<Topology, Error> {
        let response = self.ask(Command::Topology(proto::Topology {}), None)?;
        self.read_topology(response)
    }

    /// Goes to the server and back.
    pub fn ping(&mut self) -> Result<(), Error> {
        self.ask(Command::Ping(proto::Ping {}), None).map(drop)
    }

    /// Empties the store after a time, rounded up to milliseconds; 0: at once. A later one replaces one that waits.
    pub fn flush(&mut self, delay: Duration) -> Result<(), Error> {
        let delay_ms = milliseconds(delay);
        self.ask(Command::Flush(proto::Flush { delay_ms }), None).map(drop)
    }

    fn read(&mut self, keys: &[impl AsRef<[u8]>], with_version: bool) -> Result<Vec<Option<Item>>, Error> {
        let Some(first) = keys.first() else {
            return Ok(vec![]);
        };
        let get = proto::Get {
            keys: keys.iter().map(|key| key.as_ref().to_vec()).collect(),
            with_version,
        };
        let results = self.ask_keys(Command::Get(get), first.as_ref(), keys.len())?;
        let item = |result: proto::KeyResult| match result.code() {
            Code::Ok => Some(Some(Item {
                flags: result.flags,
                expires_at: match result.expires_at_ms {
                    0 => None,
                    moment => UNIX_EPOCH.checked_add(Duration::from_millis(moment)),
                },
                version: version(result.version),
                value: result.value,
            })),
            Code::NotFound => Some(None),
            _ => None,
        };
        self.each(results, item)
    }

    fn remove(&mut self, keys: Vec<Vec<u8>>, conditions: Vec<proto::Condition>) -> Result<Vec<Deleted>, Error> {
        let Some(first) = keys.first().cloned() else {
            return Ok(vec![]);
        };
        let count = keys.len();
        let results = self.ask_keys(Command::Delete(proto::Delete { keys, conditions }), &first, count)?;
        let deleted = |result: proto::KeyResult| match result.code() {
            Code::Ok => Some(Deleted::Deleted),
            Code::NotFound => Some(Deleted::NotFound),
            Code::ConditionFailed => Some(Deleted::ConditionFailed),
            _ => None,
        };
        self.each(results, deleted)
    }

    /// Asks something about `count` keys, of which `key` is the first.
    fn ask_keys(&mut self, command: Command, key: &[u8], count: usize) -> Result<Vec<proto::KeyResult>, Error> {
        let results = self.ask(command, Some(key))?.results;
        if results.len() == count {
            return Ok(results);
        }
        Err(self.foreign(&format!("{} results for {count} keys", results.len())))
    }

    /// Each result in this client's words; `None` from `read` is a code that does not belong there.
    fn each<T>(
        &self,
        results: Vec<proto::KeyResult>,
        read: impl Fn(proto::KeyResult) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let read = |result: proto::KeyResult| {
            let code = result.code;
            // An unknown code would be read as OK.
            let known = Code::try_from(code).is_ok();
            let result = known.then(|| read(result)).flatten();
            result.ok_or_else(|| self.foreign(&format!("a result with the code {code}")))
        };
        results.into_iter().map(read).collect()
    }

    /// An answer that cannot be.
    fn foreign(&self, what: &str) -> Error {
        let connected = self.any_core.as_ref().map(|connection| connection.address);
        let address = connected.or_else(|| self.addresses.first().copied());
        Error::Foreign {
            address: address.unwrap_or_else(|| SocketAddr::from(([0; 4], 0))),
            what: what.to_owned(),
        }
    }

    /// Sends a request to the owner of `key`, or to any core, and waits for the answer.
    fn ask(&mut self, command: Command, key: Option<&[u8]>) -> Result<Response, Error> {
        let reads = matches!(
            command,
            Command::Get(_) | Command::Metrics(_) | Command::Ping(_) | Command::Topology(_)
        );
        self.last_id += 1;
        let id = self.last_id;
        let command = Some(command);
        let request = proto::Message { id, command }.encode_length_delimited_to_vec();
        let mut is_repeated = false;
        loop {
            let (core, mut connection) = match self.take_connection(key) {
                // The server may have come back with other ports.
                Err(Error::Connect { .. }) if self.map.is_some() && !is_repeated => {
                    is_repeated = true;
                    self.forget();
                    continue;
                }
                taken => taken?,
            };
            let address = connection.address;
            let broken = match connection.ask(&request, id, &self.options) {
                Ok(response) => return self.finish(core, connection, response),
                Err(broken) => broken,
            };
            self.forget();
            let (is_harmless, cause) = match broken {
                Broken::Foreign(what) => return Err(Error::Foreign { address, what }),
                Broken::Sending(cause) => (true, cause),
                Broken::Answering(cause) => (reads, cause),
            };
            if !is_harmless {
                return Err(Error::Unknown { address, cause });
            }
            if std::mem::replace(&mut is_repeated, true) || cause.kind() == ErrorKind::TimedOut {
                return Err(Error::Lost { address, cause });
            }
        }
    }

    /// Keeps the connection of a whole answer, and tells a refusal from a result.
    fn finish(
        &mut self,
        core: Option<CoreId>,
        connection: Connection,
        response: Response,
    ) -> Result<Response, Error> {
        let address = connection.address;
        let code = Code::try_from(response.code);
        // An answer without the request's id ends the connection, and so does a server without room.
        if response.id != 0 && code != Ok(Code::Unavailable) {
            match (core, &mut self.map) {
                (None, _) => self.any_core = Some(connection),
                (Some(CoreId(core)), Some(map)) => map.connections[usize::from(core)] = Some(connection),
                (Some(_), None) => {}
            }
        }
        match code {
            Ok(Code::Ok) => Ok(response),
            Ok(code) => Err(Error::Refused {
                code,
                message: response.message,
            }),
            Err(_) => Err(Error::Foreign {
                address,
                what: format!("it answered with the code {}: {}", response.code, response.message),
            }),
        }
    }

    /// A connection for `key`, out of the client: it is put back with the whole answer, because what comes later would be
    /// taken for the answer to the next request.
    fn take_connection(&mut self, key: Option<&[u8]>) -> Result<(Option<CoreId>, Connection), Error> {
        if self.options.route && key.is_some() {
            if self.map.is_none() {
                self.load_map()?;
            }
            let owner = key.and_then(|key| self.map.as_ref()?.topology.owner(key));
            let mut map = self.map.as_mut();
            if let Some(owner) = owner
                && let Some(map) = &mut map
                && let Some(port) = map.topology.core_ports.get(usize::from(owner.0)).copied()
            {
                let connection = map.connections[usize::from(owner.0)].take();
                let Some(connection) = connection.filter(Connection::is_fresh) else {
                    return self.open_owner(key, owner, port);
                };
                return Ok((Some(owner), connection));
            }
        }
        if let Some(connection) = self.any_core.take() {
            if connection.is_fresh() {
                return Ok((None, connection));
            }
            self.forget();
        }
        Ok((None, self.open_any()?))
    }
}
