//! The last requests that took too long, with where their time went.

use super::{push_text, read_text};
use crate::encoding::Reader;
use crate::model::Class;
use std::collections::VecDeque;

/// Requests that came together and took too long together, from their arrival to when the client's socket had taken the last of
/// their replies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlowRequest {
    /// When they came, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The protocol's name.
    pub protocol: String,
    /// The client's address; empty for a request that a handler of this process made for its client.
    pub client: String,
    /// What the first of them does.
    pub class: Class,
    /// The start of its key, [`KEY_BYTES_SHOWN`] bytes at the most. Empty when it has none.
    pub key: Vec<u8>,
    /// How long that key is.
    pub key_bytes: u32,
    /// How many they were.
    pub requests: u32,
    /// Microseconds that they waited to be begun.
    pub queue_us: u64,
    /// Microseconds that this core worked for them.
    pub execute_us: u64,
    /// Microseconds that replies were missing after that: of other cores, or of transactions that were in the way.
    pub hop_us: u64,
    /// Microseconds from the last reply to when the socket had taken it.
    pub flush_us: u64,
}

/// So much of a key is remembered while its request is under way.
pub const KEY_BYTES_SHOWN: usize = 32;

impl SlowRequest {
    /// All of it, in microseconds.
    pub fn total_us(&self) -> u64 {
        self.queue_us + self.execute_us + self.hop_us + self.flush_us
    }

    pub(super) fn push(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.at_ms.to_le_bytes());
        push_text(out, self.protocol.as_bytes());
        push_text(out, self.client.as_bytes());
        out.push(self.class as u8);
        push_text(out, &self.key);
        out.extend_from_slice(&self.key_bytes.to_le_bytes());
        out.extend_from_slice(&self.requests.to_le_bytes());
        for us in [self.queue_us, self.execute_us, self.hop_us, self.flush_us] {
            out.extend_from_slice(&us.to_le_bytes());
        }
    }

    pub(super) fn read(reader: &mut Reader<'_>) -> Self {
        let text = |reader: &mut Reader<'_>| String::from_utf8_lossy(&read_text(reader)).into_owned();
        Self {
            at_ms: reader.u64(),
            protocol: text(reader),
            client: text(reader),
            class: Class::ALL[usize::from(reader.u8())],
            key: read_text(reader),
            key_bytes: reader.u32(),
            requests: reader.u32(),
            queue_us: reader.u64(),
            execute_us: reader.u64(),
            hop_us: reader.u64(),
            flush_us: reader.u64(),
        }
    }
}

/// The last of them, as many as there is room for.
#[derive(Debug)]
pub struct SlowLog {
    entries: VecDeque<SlowRequest>,
    entries_max: usize,
}

impl SlowLog {
    /// An empty one for so many entries, at least one.
    pub fn new(entries_max: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            entries_max: entries_max.max(1),
        }
    }

    /// Adds an entry; the oldest one goes when there is no room.
    pub fn add(&mut self, entry: SlowRequest) {
        if self.entries.len() >= self.entries_max {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.entries = VecDeque::new();
    }

    /// All there are, the newest first.
    pub fn entries(&self) -> Vec<SlowRequest> {
        self.entries.iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept() {
        let entry = |at_ms| SlowRequest {
            at_ms,
            protocol: "memcached".to_owned(),
            client: "127.0.0.1:5".to_owned(),
            class: Class::Touch,
            key: b"key".to_vec(),
            key_bytes: 3,
            requests: 7,
            queue_us: 1,
            execute_us: 20,
            hop_us: 300,
            flush_us: 4000,
        };
        let mut log = SlowLog::new(3);
        (1..=5).for_each(|at_ms| log.add(entry(at_ms)));
        let times: Vec<u64> = log.entries().iter().map(|entry| entry.at_ms).collect();
        assert_eq!(times, [5, 4, 3]);
        assert_eq!(log.entries()[0].total_us(), 4321);
        let mut wire = vec![];
        entry(9).push(&mut wire);
        let mut reader = Reader(&wire);
        assert_eq!(SlowRequest::read(&mut reader), entry(9));
        assert!(reader.0.is_empty());
        log.clear();
        assert_eq!(log.entries(), []);
    }
}
