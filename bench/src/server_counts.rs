//! What the server itself counts of requests for several keys, where it can be asked.

use crate::driver::RunConfig;
use crate::protocol::ProtocolName;
use memkv::client::Client;
use serde::Serialize;

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
