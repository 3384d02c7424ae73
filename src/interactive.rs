//! A transaction that a connection builds up command by command: its writes are kept here until it is committed.

use crate::model::{Check, Command, Condition, Delete, Op, Put, Value, Version};
use ahash::AHashMap;
use bytes::Bytes;

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct OpenTxn {
    /// What it wrote, by key; `None` stands for a delete. A large value is stored as it lies here, without copying.
    writes: AHashMap<Vec<u8>, Option<Bytes>>,
    /// What must still hold of the keys it read, when that matters.
    reads: AHashMap<Vec<u8>, Condition>,
    /// Bytes of keys and values, for the limit.
    pub(crate) bytes: usize,
    commands: usize,
    /// Why it cannot be committed any more.
    doomed: Option<&'static str>,
}

/// Bytes that an entry takes beside its key and value, about.
const ENTRY_BYTES: usize = 64;

impl OpenTxn {
    /// Why it cannot be committed any more.
    pub(crate) fn doomed(&self) -> Option<&'static str> {
        self.doomed
    }

    /// It cannot be committed any more, and forgets what it holds.
    pub(crate) fn doom(&mut self, why: &'static str) {
        (self.writes, self.reads) = (AHashMap::new(), AHashMap::new());
        self.doomed = Some(why);
    }

    /// What a write or a read takes of memory.
    pub(crate) fn bytes_of(key: &[u8], value: Option<&[u8]>) -> usize {
        ENTRY_BYTES + key.len() + value.map_or(0, <[u8]>::len)
    }

    /// Counts a command; false when there are too many.
    pub(crate) fn count(&mut self, commands_max: usize) -> bool {
        self.commands += 1;
        self.commands <= commands_max
    }

    /// Keeps a write; a later one to the same key takes its place. False, and nothing kept, when the system has no memory for it.
    pub(crate) fn write(&mut self, key: &[u8], value: Option<&[u8]>) -> bool {
        let mut own = vec![];
        let bytes = value.unwrap_or_default();
        if own.try_reserve_exact(bytes.len()).is_err() {
            return false;
        }
        own.extend_from_slice(bytes);
        self.writes.insert(key.to_vec(), value.map(|_| Bytes::from(own)));
        true
    }

    /// What it wrote to a key, if it did.
    pub(crate) fn written(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        self.writes.get(key).map(Option::as_deref)
    }

    /// Notes what a key held when it was first read.
    pub(crate) fn note_read(&mut self, key: &[u8], version: Option<Version>) {
        let condition = version.map_or(Condition::Absent, Condition::VersionIs);
        self.reads.entry(key.to_vec()).or_insert(condition);
    }

    /// The commands that it is made of: checks, and writes.
    pub(crate) fn commands(&self) -> (Vec<Check<'_>>, Vec<Command<'_>>) {
        let checks = self.reads.iter().map(|(key, condition)| Check {
            key,
            condition: *condition,
        });
        let writes = self.writes.iter().map(|(key, value)| Command {
            key,
            op: match value {
                Some(value) => Op::Put(Put::new(Value::collected(value))),
                None => Op::Delete(Delete::default()),
            },
        });
        (checks.collect(), writes.collect())
    }
}
