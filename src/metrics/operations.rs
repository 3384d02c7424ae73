//! What came of each command, by protocol, class, and whether it was executed for another core.

use crate::encoding::Reader;
use crate::model::{Class, Command, Reply};

/// Protocols that are told apart, by their numbers. A power of two, as are the other sides of the table: then a place in it
/// costs no multiplication.
pub const PROTOCOLS_MAX: usize = 8;
const PATHS: usize = 2;
const CLASSES_MAX: usize = 8;
const OUTCOMES_MAX: usize = 8;
const PLACES: usize = PROTOCOLS_MAX * PATHS * CLASSES_MAX * OUTCOMES_MAX;
const _: () = assert!(Class::ALL.len() <= CLASSES_MAX && Outcome::ALL.len() <= OUTCOMES_MAX);

/// What came of a command, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It was done; a read found the item.
    Done = 0,
    /// The key has no item.
    NotFound = 1,
    /// Its condition did not hold.
    ConditionFailed = 2,
    /// There was no memory within the limit.
    OutOfMemory = 3,
    /// The value would have been too large.
    TooLarge = 4,
    /// It cannot be done with the value that is there.
    Error = 5,
    /// Writes are refused.
    ReadOnly = 6,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Outcome; 7] = [
        Outcome::Done,
        Outcome::NotFound,
        Outcome::ConditionFailed,
        Outcome::OutOfMemory,
        Outcome::TooLarge,
        Outcome::Error,
        Outcome::ReadOnly,
    ];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        [
            "done",
            "not_found",
            "condition_failed",
            "out_of_memory",
            "too_large",
            "error",
            "read_only",
        ][self as usize]
    }

    #[inline]
    fn of(reply: &Reply<'_>) -> Self {
        match reply {
            Reply::Found(_) | Reply::Stored { .. } | Reply::Deleted(_) | Reply::Touched | Reply::Counted(..) => {
                Outcome::Done
            }
            Reply::NotFound => Outcome::NotFound,
            Reply::NotStored | Reply::VersionMismatch => Outcome::ConditionFailed,
            Reply::OutOfMemory => Outcome::OutOfMemory,
            Reply::TooLarge => Outcome::TooLarge,
            Reply::NotANumber => Outcome::Error,
            Reply::ReadOnly => Outcome::ReadOnly,
        }
    }
}

/// How often each came of what. Protocols are plain numbers here.
#[derive(Clone, Debug)]
pub struct Operations {
    executed: [u64; PLACES],
    refused: [u64; PROTOCOLS_MAX],
}

impl Default for Operations {
    fn default() -> Self {
        Self {
            executed: [0; PLACES],
            refused: [0; PROTOCOLS_MAX],
        }
    }
}

impl Operations {
    #[inline]
    fn place(protocol: usize, class: Class, outcome: Outcome, forwarded: bool) -> usize {
        let path = protocol * PATHS + usize::from(forwarded);
        (path * CLASSES_MAX + class as usize) * OUTCOMES_MAX + outcome as usize
    }

    /// Counts a command that was executed. `forwarded`: for another core.
    #[inline]
    pub fn count(&mut self, protocol: usize, command: &Command<'_>, reply: &Reply<'_>, forwarded: bool) {
        self.executed[Self::place(protocol, command.op.class(), Outcome::of(reply), forwarded)] += 1;
    }

    /// Counts a request that the protocol refused.
    pub fn count_refused(&mut self, protocol: usize) {
        self.refused[protocol] += 1;
    }

    /// How many commands of a class ended so.
    pub fn executed(&self, protocol: usize, class: Class, outcome: Outcome, forwarded: bool) -> u64 {
        self.executed[Self::place(protocol, class, outcome, forwarded)]
    }

    /// How many requests the protocol refused.
    pub fn refused(&self, protocol: usize) -> u64 {
        self.refused[protocol]
    }

    /// Adds another core's.
    pub fn merge(&mut self, other: &Operations) {
        let ours = self.executed.iter_mut().chain(&mut self.refused);
        for (ours, theirs) in ours.zip(other.executed.iter().chain(&other.refused)) {
            *ours += theirs;
        }
    }

    pub(super) fn push(&self, out: &mut Vec<u8>) {
        super::push_numbers(out, &self.executed);
        super::push_numbers(out, &self.refused);
    }

    pub(super) fn read(&mut self, reader: &mut Reader<'_>) {
        super::read_numbers(reader, &mut self.executed);
        super::read_numbers(reader, &mut self.refused);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Delete, Op, Version};

    /// No two kinds share a place.
    #[test]
    fn everything_is_told_apart() {
        let mut places = vec![];
        for protocol in 0..PROTOCOLS_MAX {
            for class in Class::ALL {
                for outcome in Outcome::ALL {
                    places
                        .extend([false, true].map(|forwarded| Operations::place(protocol, class, outcome, forwarded)));
                }
            }
        }
        let all = places.len();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), all);
        assert!(places.iter().all(|place| *place < PLACES));
    }

    #[test]
    fn commands_are_counted_where_they_belong() {
        let mut operations = Operations::default();
        let command = Command {
            key: b"k",
            op: Op::Delete(Delete::default()),
        };
        operations.count(3, &command, &Reply::Deleted(Version(0)), false);
        operations.count(3, &command, &Reply::NotFound, true);
        operations.count(3, &command, &Reply::NotFound, true);
        operations.count(3, &command, &Reply::VersionMismatch, false);
        operations.count_refused(1);
        let mut sum = operations.clone();
        sum.merge(&operations);
        let executed = |outcome, forwarded| sum.executed(3, Class::Delete, outcome, forwarded);
        assert_eq!((executed(Outcome::Done, false), executed(Outcome::Done, true)), (2, 0));
        assert_eq!(
            (executed(Outcome::NotFound, false), executed(Outcome::NotFound, true)),
            (0, 4)
        );
        assert_eq!(executed(Outcome::ConditionFailed, false), 2);
        assert_eq!((sum.refused(1), sum.refused(3)), (2, 0));
    }
}
