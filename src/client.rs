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
//!     json_line: Listen::Off,
//!     http: Listen::Off,
//!     grpc: Listen::Off,
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
    /// Each answer comes when what it tells is safe on the server's disk. A server without `--data-dir` refuses what is asked so. Off
    /// unless set.
    pub durable: bool,
    /// A longer answer, in bytes, is not read. 1 GiB unless set.
    pub answer_bytes_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            timeout: Duration::from_secs(5),
            route: false,
            durable: false,
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
    /// There is no connection. Nothing was changed.
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
            Error::Lost { address, cause } => write!(f, "{address} {cause}"),
            Error::Unknown { address, cause } => {
                write!(
                    f,
                    "{address} {cause}; the write may have been executed or not: read before it is repeated"
                )
            }
            Error::Refused { code, message } if message.is_empty() => {
                write!(
                    f,
                    "the server answered {}",
                    code.as_str_name().trim_start_matches("CODE_")
                )
            }
            Error::Refused { code, message } => write!(
                f,
                "the server answered {}: {message}",
                code.as_str_name().trim_start_matches("CODE_")
            ),
            Error::Foreign { address, what } => write!(
                f,
                "{address} does not speak the protobuf protocol of memkv-tpc: {what}; is it the right port?"
            ),
        }
    }
}

impl std::error::Error for Error {}

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
            value: self.value.into(),
            flags: self.flags,
            expiry: match self.expiry {
                Expiry::Never => None,
                Expiry::In(ttl) if ttl > Duration::ZERO => Some(proto::entry::Expiry::TtlMs(milliseconds(ttl))),
                // On the wire, 0 stands for never. The first moment of all is long past.
                Expiry::In(_) => Some(proto::entry::Expiry::ExpiresAtMs(1)),
                Expiry::At(moment) => Some(proto::entry::Expiry::ExpiresAtMs(
                    milliseconds(moment.duration_since(UNIX_EPOCH).unwrap_or_default()).max(1),
                )),
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
    /// Its condition did not hold.
    ConditionFailed,
    /// The condition of another one of the same request did not hold, so none was written.
    Aborted,
    /// The server's memory limit is reached; what was there is still there.
    OutOfMemory,
}

impl Written {
    /// The version, if it was asked for.
    ///
    /// # Errors
    /// [`Error::Refused`] when nothing was written.
    pub fn stored(self) -> Result<Option<Version>, Error> {
        let (code, message) = match self {
            Written::Stored(version) => return Ok(version),
            Written::ConditionFailed => (Code::ConditionFailed, "the write's condition did not hold"),
            Written::Aborted => (
                Code::Aborted,
                "the condition of another write of the request did not hold",
            ),
            Written::OutOfMemory => (Code::OutOfMemory, "the server's memory limit is reached"),
        };
        Err(Error::Refused {
            code,
            message: message.to_owned(),
        })
    }
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
    /// The condition of another one of the same request did not hold, so none was deleted.
    Aborted,
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

    /// The core that owns `key`, with its own port if it has one.
    fn route(&self, key: &[u8]) -> Option<(CoreId, u16)> {
        let core = self.owner(key)?;
        let port = self.core_ports.get(usize::from(core.0))?;
        Some((core, *port))
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
                _ => {
                    return Err(format!(
                        "a topology of {} cores whose range {number} cannot be",
                        report.cores
                    ));
                }
            }
        }
        if ranges.first().is_none_or(|first| first.tokens.start != 0) {
            return Err("a topology whose ranges do not begin with token 0".to_owned());
        }
        let ports = report
            .core_ports
            .iter()
            .map(|port| u16::try_from(*port).ok().filter(|port| *port > 0));
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
            _ => Err(format!(
                "a topology of {cores} cores with the ports {:?}",
                report.core_ports
            )),
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

/// The server's cores, as long as they are known.
#[derive(Debug)]
struct Map {
    /// Whose ports they are.
    server: SocketAddr,
    topology: Topology,
    /// By core, if it has a port of its own: the connection, once it was asked something.
    connections: Vec<Option<Connection>>,
}

/// A client of one server. It asks one thing at a time; for more at once, use several.
///
/// Every request fails in the same ways: see [`Error`].
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

    /// What a key has.
    pub fn get(&mut self, key: impl AsRef<[u8]>) -> Result<Option<Item>, Error> {
        Ok(self.read(&[key], false)?.pop().flatten())
    }

    /// The same with the item's version, for a later [`Condition::VersionIs`].
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
    /// [`Code::OutOfMemory`] and [`Code::ReadOnly`] among the usual ones.
    pub fn set(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Result<(), Error> {
        self.set_with(Put::new(key, value))?.stored().map(drop)
    }

    /// Writes a value in all its particulars.
    pub fn set_with(&mut self, put: Put) -> Result<Written, Error> {
        // One result for one entry was made sure of.
        Ok(self.set_many([put])?[0])
    }

    /// Writes several values in one request; what came of each, in their order. Without values nothing is asked.
    pub fn set_many(&mut self, puts: impl IntoIterator<Item = Put>) -> Result<Vec<Written>, Error> {
        let entries: Vec<proto::Entry> = puts.into_iter().map(Put::into_entry).collect();
        let count = entries.len();
        let set = Command::Set(proto::Set { entries });
        let written = self.ask_keys(set, |code, result| match code {
            Code::Ok => Some(Written::Stored(version(result.version))),
            Code::ConditionFailed => Some(Written::ConditionFailed),
            Code::Aborted => Some(Written::Aborted),
            Code::OutOfMemory => Some(Written::OutOfMemory),
            _ => None,
        });
        match written {
            // There was not even room for the request: the same, for whoever wrote it.
            Err(Error::Refused {
                code: Code::OutOfMemory,
                ..
            }) => Ok(vec![Written::OutOfMemory; count]),
            written => written,
        }
    }

    /// Deletes a key; false: there was nothing.
    pub fn delete(&mut self, key: impl Into<Vec<u8>>) -> Result<bool, Error> {
        Ok(self.delete_if(key, Condition::Always)? == Deleted::Deleted)
    }

    /// Deletes a key if the condition holds.
    pub fn delete_if(&mut self, key: impl Into<Vec<u8>>, condition: Condition) -> Result<Deleted, Error> {
        let conditions = wire_condition(condition).into_iter().collect();
        Ok(self.remove(vec![key.into()], conditions)?[0])
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
        let response = self.ask(Command::Metrics(proto::Metrics {}))?;
        response
            .metrics
            .ok_or_else(|| self.foreign("an answer without metrics"))
    }

    /// Which core owns which keys.
    pub fn topology(&mut self) -> Result<Topology, Error> {
        let response = self.ask(Command::Topology(proto::Topology {}))?;
        let report = response.topology.unwrap_or_default();
        Topology::read(&report).map_err(|what| self.foreign(&what))
    }

    /// Begins a snapshot of the server's data directory; it is made when this has long returned.
    ///
    /// # Errors
    /// [`Code::NotDurable`] from a server that has none, among the usual ones.
    pub fn snapshot(&mut self) -> Result<(), Error> {
        self.ask(Command::Snapshot(proto::Snapshot {})).map(drop)
    }

    /// Goes to the server and back.
    pub fn ping(&mut self) -> Result<(), Error> {
        self.ask(Command::Ping(proto::Ping {})).map(drop)
    }

    /// Empties the store after a time, rounded up to milliseconds; 0: at once. A later one replaces one that waits.
    pub fn flush(&mut self, delay: Duration) -> Result<(), Error> {
        let delay_ms = milliseconds(delay);
        self.ask(Command::Flush(proto::Flush { delay_ms })).map(drop)
    }

    fn read(&mut self, keys: &[impl AsRef<[u8]>], with_version: bool) -> Result<Vec<Option<Item>>, Error> {
        let keys = keys.iter().map(|key| key.as_ref().to_vec()).collect();
        let get = Command::Get(proto::Get { keys, with_version });
        self.ask_keys(get, |code, result| match code {
            Code::Ok => Some(Some(Item {
                value: result.value,
                flags: result.flags,
                expires_at: match result.expires_at_ms {
                    0 => None,
                    moment => UNIX_EPOCH.checked_add(Duration::from_millis(moment)),
                },
                version: version(result.version),
            })),
            Code::NotFound => Some(None),
            _ => None,
        })
    }

    fn remove(&mut self, keys: Vec<Vec<u8>>, conditions: Vec<proto::Condition>) -> Result<Vec<Deleted>, Error> {
        let delete = Command::Delete(proto::Delete { keys, conditions });
        self.ask_keys(delete, |code, _| match code {
            Code::Ok => Some(Deleted::Deleted),
            Code::NotFound => Some(Deleted::NotFound),
            Code::ConditionFailed => Some(Deleted::ConditionFailed),
            Code::Aborted => Some(Deleted::Aborted),
            _ => None,
        })
    }

    /// One result for each key of the command; `read` knows the codes that belong there.
    fn ask_keys<T>(
        &mut self,
        command: Command,
        read: impl Fn(Code, proto::KeyResult) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let (_, keys) = keys_of(&command);
        if keys == 0 {
            return Ok(vec![]);
        }
        let results = self.ask(command)?.results;
        if results.len() != keys {
            return Err(self.foreign(&format!("{} results for {keys} keys", results.len())));
        }
        let refusals = [
            (Code::ReadOnly, "the server is read-only"),
            (Code::NotDurable, "the server cannot make it durable"),
        ];
        for (code, message) in refusals {
            // All of a request is done, or nothing.
            if results.iter().any(|result| result.code() == code) {
                let message = message.to_owned();
                return Err(Error::Refused { code, message });
            }
        }
        let read = |result: proto::KeyResult| {
            let code = result.code;
            let read = Code::try_from(code).ok().and_then(|code| read(code, result));
            read.ok_or_else(|| format!("a result with the code {code}"))
        };
        let results: Result<Vec<T>, String> = results.into_iter().map(read).collect();
        results.map_err(|what| self.foreign(&what))
    }

    /// The address that the client is connected to; without a connection, the first one.
    fn address(&self) -> SocketAddr {
        let connected = self.any_core.as_ref().map(|connection| connection.address);
        connected.unwrap_or(self.addresses[0])
    }

    /// What is to be said of an answer that cannot be. Whoever gave it is not trusted with a further request.
    fn foreign(&mut self, what: &str) -> Error {
        let address = self.address();
        self.forget();
        Error::Foreign {
            address,
            what: format!("it answered with {what}"),
        }
    }

    /// Sends a request to the owner of its first key, or to any core, and waits for the answer.
    fn ask(&mut self, command: Command) -> Result<Response, Error> {
        // A snapshot more does no harm, either.
        let only_reads = matches!(
            command,
            Command::Get(_) | Command::Metrics(_) | Command::Ping(_) | Command::Snapshot(_) | Command::Topology(_)
        );
        self.last_id += 1;
        let id = self.last_id;
        let message = proto::Message {
            id,
            command: Some(command),
            durable: self.options.durable,
        };
        let request = message.encode_length_delimited_to_vec();
        let key = message.command.as_ref().and_then(|command| keys_of(command).0);
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
            let (cause, is_harmless) = match connection.ask(&request, id, &self.options) {
                Ok(response) => return self.finish(core, connection, response),
                Err(Broken::Foreign(what)) => {
                    self.forget();
                    return Err(Error::Foreign { address, what });
                }
                // The server executes nothing but whole requests.
                Err(Broken::Sending(cause)) => (cause, true),
                Err(Broken::Answering(cause)) => (cause, only_reads),
            };
            self.forget();
            if !is_harmless {
                return Err(Error::Unknown { address, cause });
            }
            if is_repeated || cause.kind() == ErrorKind::TimedOut {
                return Err(Error::Lost { address, cause });
            }
            is_repeated = true;
        }
    }

    /// Puts the connection of a whole answer back, and tells a refusal from a result.
    fn finish(&mut self, core: Option<CoreId>, connection: Connection, response: Response) -> Result<Response, Error> {
        let address = connection.address;
        if !is_last(&response) {
            match (core, &mut self.map) {
                (None, _) => self.any_core = Some(connection),
                (Some(core), Some(map)) => map.connections[usize::from(core.0)] = Some(connection),
                (Some(_), None) => {}
            }
        }
        match Code::try_from(response.code) {
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

    /// A connection for a request about `key`, and the core whose port it leads to. It is put back with the whole answer and
    /// not before: what comes later would be taken for the answer to the next request.
    fn take_connection(&mut self, key: Option<&[u8]>) -> Result<(Option<CoreId>, Connection), Error> {
        if let Some(key) = key
            && self.options.route
        {
            if !self.is_map_valid(key) {
                self.forget();
                self.load_map()?;
            }
            if let Some(map) = &mut self.map
                && let Some((core, port)) = map.topology.route(key)
            {
                let connection = match map.connections[usize::from(core.0)].take() {
                    Some(connection) => connection,
                    None => {
                        let mut address = map.server;
                        address.set_port(port);
                        Connection::open(address, &self.options).map_err(|cause| Error::Connect {
                            address,
                            cause: io::Error::new(cause.kind(), format!("{cause} (it is the port of core {})", core.0)),
                        })?
                    }
                };
                return Ok((Some(core), connection));
            }
        }
        match self.any_core.take() {
            Some(connection) if connection.is_fresh() => Ok((None, connection)),
            lost => {
                if lost.is_some() {
                    self.forget();
                }
                Ok((None, self.open_any()?))
            }
        }
    }

    /// Whether the server is still the one that the map was made of, as the connection tells that a request for `key` would
    /// take, or, when there is none yet, the one that brought the map.
    fn is_map_valid(&self, key: &[u8]) -> bool {
        let Some(map) = &self.map else { return false };
        let route = map.topology.route(key);
        let kept = route.and_then(|(core, _)| map.connections[usize::from(core.0)].as_ref());
        kept.or(self.any_core.as_ref()).is_some_and(Connection::is_fresh)
    }

    /// Asks which core owns what.
    fn load_map(&mut self) -> Result<(), Error> {
        let topology = self.topology()?;
        self.map = Some(Map {
            server: self.address(),
            connections: topology.core_ports.iter().map(|_| None).collect(),
            topology,
        });
        Ok(())
    }

    /// Opens a connection to the first address that works.
    fn open_any(&self) -> Result<Connection, Error> {
        let mut failure = Error::Lookup(io::Error::other("the name has no address"));
        for address in &self.addresses {
            match Connection::open(*address, &self.options) {
                Ok(connection) => return Ok(connection),
                Err(cause) => {
                    failure = Error::Connect {
                        address: *address,
                        cause,
                    }
                }
            }
        }
        Err(failure)
    }

    /// Closes what is open and begins anew with the next request: whoever ended one connection ended all, in most cases.
    fn forget(&mut self) {
        self.any_core = None;
        self.map = None;
    }
}

/// Why there is no answer.
enum Broken {
    /// The request was not sent to its end.
    Sending(io::Error),
    /// It was, and no whole answer came.
    Answering(io::Error),
    /// Something else came.
    Foreign(String),
}

/// An open connection.
#[derive(Debug)]
struct Connection {
    address: SocketAddr,
    input: BufReader<Timed>,
}

impl Connection {
    fn open(address: SocketAddr, options: &Options) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, options.connect_timeout)?;
        stream.set_nodelay(true)?;
        let timed = Timed { stream, deadline: None };
        Ok(Self {
            address,
            input: BufReader::new(timed),
        })
    }

    /// Whether it is still there, with nothing to read. Asked before a request is sent, because afterwards nobody knows
    /// whether the server has executed it.
    fn is_fresh(&self) -> bool {
        let peek = |stream: &TcpStream| {
            stream.set_nonblocking(true)?;
            let peeked = stream.peek(&mut [0]);
            stream.set_nonblocking(false)?;
            peeked
        };
        let peeked = peek(&self.input.get_ref().stream);
        self.input.buffer().is_empty() && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    /// Sends a request and reads its answer.
    fn ask(&mut self, request: &[u8], id: u64, options: &Options) -> Result<Response, Broken> {
        let timed = self.input.get_mut();
        // Without one, when it is too far away to be said.
        timed.deadline = Instant::now().checked_add(options.timeout);
        let sent = timed.write_all(request);
        let answer = match sent {
            Ok(()) => self.answer(options)?,
            Err(error) => match self.answer(options) {
                // A server that has no room for a client says so and closes; its words explain more than a broken pipe.
                Ok(answer) if is_last(&answer) => answer,
                _ => {
                    let what = match error.kind() {
                        ErrorKind::TimedOut => format!("did not take the request within {:?}", options.timeout),
                        _ => format!("closed the connection before it had the request: {error}"),
                    };
                    return Err(Broken::Sending(io::Error::new(error.kind(), what)));
                }
            },
        };
        if answer.id == id || is_last(&answer) {
            return Ok(answer);
        }
        Err(Broken::Foreign(format!(
            "it answered request {} where {id} was asked",
            answer.id
        )))
    }

    /// Reads an answer.
    fn answer(&mut self, options: &Options) -> Result<Response, Broken> {
        let mut came = vec![];
        let incomplete = |error: io::Error, came: &[u8]| {
            let what = match error.kind() {
                ErrorKind::TimedOut => format!("did not answer within {:?}", options.timeout),
                ErrorKind::UnexpectedEof => "closed the connection before it had answered".to_owned(),
                _ => format!("broke the connection before it had answered: {error}"),
            };
            let what = match came {
                [] => what,
                came => format!("{what}; it began with {}", shown(came)),
            };
            Broken::Answering(io::Error::new(error.kind(), what))
        };
        let length = loop {
            let mut byte = [0];
            if let Err(error) = self.input.read_exact(&mut byte) {
                return Err(incomplete(error, &came));
            }
            came.extend(byte);
            if byte[0] < 0x80 {
                match prost::decode_length_delimiter(came.as_slice()) {
                    Ok(length) if length as u64 <= options.answer_bytes_max => break length,
                    _ => {}
                }
            } else if came.len() < 10 {
                continue;
            }
            came.extend_from_slice(self.input.buffer());
            let most = options.answer_bytes_max;
            return Err(Broken::Foreign(format!(
                "it announced an answer of more than {most} bytes: {}",
                shown(&came)
            )));
        };
        let head = came.len();
        came.reserve(length.min(ANSWER_BYTES_AT_ONCE));
        let read = (&mut self.input).take(length as u64).read_to_end(&mut came);
        let read = read.and_then(|read| {
            if read < length {
                Err(ErrorKind::UnexpectedEof.into())
            } else {
                Ok(())
            }
        });
        if let Err(error) = read {
            return Err(incomplete(error, &came));
        }
        let came = Bytes::from(came);
        Response::decode(came.slice(head..))
            .map_err(|error| Broken::Foreign(format!("it answered {}, which is no Response ({error})", shown(&came))))
    }
}

/// A socket with a moment at which all waiting ends in [`ErrorKind::TimedOut`].
#[derive(Debug)]
struct Timed {
    stream: TcpStream,
    deadline: Option<Instant>,
}

impl Timed {
    /// How long may be waited yet.
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match left {
            Some(Duration::ZERO) => Err(ErrorKind::TimedOut.into()),
            left => Ok(left),
        }
    }
}

/// The system's word for a timeout is the one for a socket that does not wait.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buffer).map_err(timed_out)
    }
}

impl Write for Timed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(bytes).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// The first key of a command, and how many there are.
fn keys_of(command: &Command) -> (Option<&[u8]>, usize) {
    match command {
        Command::Get(proto::Get { keys, .. }) | Command::Delete(proto::Delete { keys, .. }) => {
            (keys.first().map(Vec::as_slice), keys.len())
        }
        Command::Set(proto::Set { entries }) => (entries.first().map(|entry| entry.key.as_slice()), entries.len()),
        _ => (None, 0),
    }
}

/// An answer to the connection more than to a request: it need not repeat an id, and nothing is asked there afterwards.
fn is_last(answer: &Response) -> bool {
    let code = Code::try_from(answer.code);
    code == Ok(Code::Unavailable) || answer.id == 0 && code != Ok(Code::Ok)
}

/// The beginning of something strange, in quotes.
fn shown(bytes: &[u8]) -> String {
    let front = &bytes[..bytes.len().min(SHOWN_BYTES_MAX)];
    format!("\"{}\"", front.escape_ascii())
}

/// Rounded up, so that a short time does not become none.
fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

fn version(number: u64) -> Option<Version> {
    (number != 0).then_some(Version(number))
}

fn wire_condition(condition: Condition) -> Option<proto::Condition> {
    use proto::condition::Is;
    let is = match condition {
        Condition::Always => return None,
        Condition::Absent => Is::Absent(true),
        Condition::Present => Is::Present(true),
        Condition::VersionIs(Version(version)) => Is::Version(version),
    };
    Some(proto::Condition { is: Some(is) })
}
