//! What the server itself counts, where it can be asked: its items, and requests for several keys.

use crate::driver::RunConfig;
use crate::protocol::ProtocolName;
use memkv::client::Client;
use serde::Serialize;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// How long to wait for a server to connect, or to tell a number.
const PATIENCE: Duration = Duration::from_secs(10);

/// The items that a server says it holds, asked over a connection of its own; `None` when its protocol has no such question,
/// or it does not answer.
pub fn items(protocol: ProtocolName, target: SocketAddr) -> Option<u64> {
    match protocol {
        ProtocolName::Memcached => statistic(&ask(target, b"stats\r\n", "END")?, "curr_items"),
        ProtocolName::Resp => ask(target, b"DBSIZE\r\n", ":")?.trim().strip_prefix(':')?.parse().ok(),
        ProtocolName::Protobuf => {
            let counters = Client::connect(target).ok()?.metrics().ok()?.counters;
            counters.get("items").copied()
        }
        ProtocolName::Text | ProtocolName::JsonLine | ProtocolName::Http | ProtocolName::Grpc => None,
    }
}

/// The number behind this name in memcached's reply to `stats`; `None` if there is none.
pub(crate) fn statistic(stats: &str, name: &str) -> Option<u64> {
    stats.lines().find_map(|line| {
        let (known, value) = line.strip_prefix("STAT ")?.split_once(' ')?;
        (known == name).then(|| value.trim().parse().ok()).flatten()
    })
}

/// Sends a request, and reads lines up to and with the first that begins with `last`; `None` if there is none.
fn ask(target: SocketAddr, request: &[u8], last: &str) -> Option<String> {
    let mut socket = TcpStream::connect_timeout(&target, PATIENCE).ok()?;
    socket.set_read_timeout(Some(PATIENCE)).ok()?;
    socket.write_all(request).ok()?;
    let mut lines = BufReader::new(socket);
    let mut text = String::new();
    loop {
        let start = text.len();
        if lines.read_line(&mut text).ok()? == 0 || text.len() > ANSWER_BYTES_MAX {
            return None;
        }
        if text[start..].starts_with(last) {
            return Some(text);
        }
    }
}

/// Longer than any answer to a question that is asked here.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// The server's counters of requests for several keys, or what they grew by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TxnCounts {
    /// Transactions and requests for several keys that were finished.
    pub txns: u64,
    /// How often one of them locked anew, because an older request wanted what it had locked.
    pub txn_retries: u64,
    /// Requests that waited for a transaction to end.
    pub lock_waits: u64,
}

impl TxnCounts {
    /// `None` when the server does not answer, or counts nothing of the kind.
    fn ask(client: &mut Client) -> Option<Self> {
        let counters = client.metrics().ok()?.counters;
        let counter = |name: &str| counters.get(name).copied();
        Some(TxnCounts {
            txns: counter("txns")?,
            txn_retries: counter("txn_retries")?,
            lock_waits: counter("lock_waits")?,
        })
    }
}

/// Asks the server for its counters at both ends of a run's window, over a connection of its own.
#[derive(Debug)]
pub(crate) struct Counter {
    client: Option<Client>,
    before: Option<TxnCounts>,
}

impl Counter {
    /// Asks nothing unless requests of `config` are for several keys, in a protocol that tells the counters.
    pub(crate) fn new(config: &RunConfig) -> Self {
        let several = config.txn.is_some() || config.multi_get > 1 || config.multi_set > 1;
        let told = several && config.protocol == ProtocolName::Protobuf;
        Counter {
            client: told.then(|| Client::connect(config.target).ok()).flatten(),
            before: None,
        }
    }

    /// The window begins.
    pub(crate) fn begin(&mut self) {
        self.before = self.client.as_mut().and_then(TxnCounts::ask);
    }

    /// What was counted since it began; `None` when that is unknown.
    pub(crate) fn end(&mut self) -> Option<TxnCounts> {
        let before = self.before?;
        let after = self.client.as_mut().and_then(TxnCounts::ask)?;
        Some(TxnCounts {
            txns: after.txns.checked_sub(before.txns)?,
            txn_retries: after.txn_retries.checked_sub(before.txn_retries)?,
            lock_waits: after.lock_waits.checked_sub(before.lock_waits)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn statistics_are_found() {
        let stats = "STAT pid 7\r\nSTAT curr_items 12\r\nSTAT curr_items_more 13\r\nSTAT version 1.6\r\nEND\r\n";
        assert_eq!(statistic(stats, "curr_items"), Some(12));
        assert_eq!(statistic(stats, "curr"), None);
        assert_eq!(statistic(stats, "version"), None);
    }

    /// The address of a server that says the same to everybody, once.
    fn saying(answer: &'static [u8]) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut question = String::new();
            BufReader::new(socket.try_clone().unwrap())
                .read_line(&mut question)
                .unwrap();
            socket.write_all(answer).unwrap();
        });
        address
    }

    #[test]
    fn items_are_asked_for() {
        let stats = b"STAT pid 1\r\nSTAT curr_items 5000000\r\nEND\r\n";
        assert_eq!(items(ProtocolName::Memcached, saying(stats)), Some(5_000_000));
        assert_eq!(items(ProtocolName::Memcached, saying(b"STAT pid 1\r\n")), None);
        assert_eq!(items(ProtocolName::Resp, saying(b":42\r\n")), Some(42));
        assert_eq!(items(ProtocolName::Resp, saying(b"-ERR no\r\n")), None);
        assert_eq!(items(ProtocolName::Text, saying(b"")), None);
    }
}
