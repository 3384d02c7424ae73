//! memkv: a thread-per-core, shared-nothing in-memory key-value store.
//!
//! One thread per core, and no locks: each core owns a contiguous range of keys and is the only one to touch them. A
//! connection is served by one core; a request for another core's key travels there and back in a batch.
//!
//! # Start a server
//!
//! ```
//! use memkv::config::{Config, Listen};
//! use memkv::protocol::Protocol;
//! use memkv::runtime::Server;
//! use std::io::{Read, Write};
//!
//! let config = Config {
//!     cores: Some(1),
//!     memcached: "127.0.0.1:0".parse()?,
//!     text: Some(Listen::Off),
//!     protobuf: Listen::Off,
//!     json_line: Listen::Off,
//!     http: Listen::Off,
//!     grpc: Listen::Off,
//!     ..Config::default()
//! };
//! let server = Server::start(config)?;
//! let address = server.address(Protocol::Memcached).ok_or("not listening")?;
//! let mut client = std::net::TcpStream::connect(address)?;
//! client.write_all(b"set greeting 0 0 5\r\nhello\r\n")?;
//! let mut reply = [0; 8];
//! client.read_exact(&mut reply)?;
//! assert_eq!(&reply, b"STORED\r\n");
//! server.stop();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The map
//!
//! Everything below [`runtime`] is synchronous and does no I/O: bytes, messages and time come in as arguments, bytes and
//! messages go out. So nothing can suspend while a shard is borrowed, and a whole server runs single-threaded in a test.
//! A module imports only what stands above it:
//!
//! | layer | modules | what they hold |
//! |---|---|---|
//! | L0 | [`model`] [`partition`] [`encoding`] [`effect`] [`disk`] [`budget`] [`config`] [`metrics`] | words and values |
//! | L1 | `store`, [`protocol`], [`wal`], [`frame`] | one shard's table; bytes to commands and replies to bytes; effects in memory and in files |
//! | L2 | `shard`, `shards`, [`keeper`], [`data_dir`] | what a command does; the shards of one core; its files; all files |
//! | L3 | `gather`, `interactive`, `session`, `sessions`, [`link`], [`engine`] | one connection and what it waits for, one neighbour, one core |
//! | L4 | [`runtime`] | threads, executors, sockets, files, clocks: the only place that waits |
//! | L5 | [`client`], the binaries | the other end of a connection; command lines |
//!
//! # The life of one GET
//!
//! 1. `runtime/net.rs` collects a completion of the network ring: bytes in a receive buffer.
//! 2. [`engine::Engine::received`] takes the session and decodes up to sixteen requests before it executes the first.
//! 3. `protocol/memcached.rs` turns `get key\r\n` into a [`model::Command`] that borrows the key from the buffer.
//! 4. `partition.rs` hashes the key: token, range, shard, core. If the core is this one, the index line is prefetched; else
//!    the command joins the batch for its owner ([`link`]), and what follows happens there.
//! 5. `shard.rs` executes it against `store.rs` and answers with a [`model::Reply`] that borrows the value.
//! 6. `protocol/memcached.rs` writes the reply straight into the connection's output, which the turn's end sends.
//!
//! No allocation, no lock and no system call belongs to the request alone.

pub mod budget;
pub mod client;
pub mod config;
pub mod data_dir;
pub mod disk;
pub mod effect;
pub mod encoding;
pub mod engine;
pub mod frame;
pub(crate) mod gather;
pub(crate) mod interactive;
pub mod keeper;
pub mod link;
pub(crate) mod locks;
pub mod metrics;
pub mod model;
pub mod partition;
pub mod protocol;
pub mod runtime;
pub(crate) mod session;
pub(crate) mod sessions;
pub(crate) mod shard;
pub(crate) mod shards;
pub(crate) mod store;
pub(crate) mod txn;
pub mod wal;

/// Entrances for fuzzing.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    /// Does to a shard's table what `data` says, beside a model of it.
    ///
    /// # Panics
    /// When the two differ.
    pub fn store(data: &[u8]) {
        crate::store::model::check(data);
    }

    /// Reads a log that `data` made or damaged.
    ///
    /// # Panics
    /// When reading finds what nobody wrote.
    pub fn log(data: &[u8]) {
        crate::data_dir::fuzz::log(data);
    }

    /// Reads an image that `data` made or damaged.
    ///
    /// # Panics
    /// When reading finds what nobody wrote.
    pub fn image(data: &[u8]) {
        crate::data_dir::fuzz::image(data);
    }
}

/// The messages of the protobuf protocol, as `proto/memkv.proto` defines them.
pub mod proto {
    #![allow(missing_docs, reason = "generated; the definitions carry the comments")]
    include!(concat!(env!("OUT_DIR"), "/memkv.rs"));
}
