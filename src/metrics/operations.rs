//! What came of each command, by protocol, class, and whether it was executed for another core.

use crate::encoding::Reader;
use crate::model::{Class, Command, Op, Reply};

/// Protocols that are told apart, by their numbers.
pub const PROTOCOLS_MAX: usize = 6;
const PATHS: usize = 2;
/// Powers of two: then a place in the table costs no multiplication.
const OPS_MAX: usize = 8;
const REPLIES_MAX: usize = 16;
const PLACES: usize = PROTOCOLS_MAX * PATHS * OPS_MAX * REPLIES_MAX;

/// The class of each operation, and the outcome that each reply is, by their numbers.
const CLASSES: [Class; 6] = [
    Class::Get,
    Class::Set,
    Class::Delete,
    Class::Count,
    Class::Touch,
    Class::Get,
];
const OUTCOMES: [Outcome; 13] = [
    Outcome::Done,
    Outcome::NotFound,
    Outcome::Done,
    Outcome::ConditionFailed,
    Outcome::ConditionFailed,
    Outcome::Done,
    Outcome::Done,
    Outcome::Done,
    Outcome::Error,
    Outcome::OutOfMemory,
    Outcome::TooLarge,
    Outcome::ReadOnly,
    Outcome::NotDurable,
];
const _: () = assert!(CLASSES.len() <= OPS_MAX && OUTCOMES.len() <= REPLIES_MAX);

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
    /// It cannot be made durable.
    NotDurable = 7,
}

impl Outcome {
    /// All of them, in the order of their numbers.
    pub const ALL: [Outcome; 8] = [
        Outcome::Done,
        Outcome::NotFound,
        Outcome::ConditionFailed,
        Outcome::OutOfMemory,
        Outcome::TooLarge,
        Outcome::Error,
        Outcome::ReadOnly,
        Outcome::NotDurable,
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
            "not_durable",
        ][self as usize]
    }
}

/// Operations and replies are numbered as they are declared, so that finding a number is reading it: every command is counted,
/// and what a number stands for is looked up when somebody asks.
#[inline]
fn number_of_op(op: &Op<'_>) -> usize {
    match op {
        Op::Get { .. } => 0,
        Op::Put(_) => 1,
        Op::Delete(_) => 2,
        Op::Increment(_) => 3,
        Op::Touch(_) => 4,
        Op::Inspect => 5,
    }
}

#[inline]
fn number_of_reply(reply: &Reply<'_>) -> usize {
    match reply {
        Reply::Found(_) => 0,
        Reply::NotFound => 1,
        Reply::Stored { .. } => 2,
        Reply::NotStored => 3,
        Reply::VersionMismatch => 4,
        Reply::Deleted(_) => 5,
        Reply::Touched => 6,
        Reply::Counted(..) => 7,
        Reply::NotANumber => 8,
        Reply::OutOfMemory => 9,
        Reply::TooLarge => 10,
        Reply::ReadOnly => 11,
        Reply::NotDurable => 12,
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
    fn place(protocol: usize, op: usize, reply: usize, forwarded: bool) -> usize {
        let path = protocol * PATHS + usize::from(forwarded);
        (path * OPS_MAX + op) * REPLIES_MAX + reply
    }

    /// Counts a command that was executed. `forwarded`: for another core.
    #[inline]
    pub fn count(&mut self, protocol: usize, command: &Command<'_>, reply: &Reply<'_>, forwarded: bool) {
        let (op, reply) = (number_of_op(&command.op), number_of_reply(reply));
        self.executed[Self::place(protocol, op, reply, forwarded)] += 1;
    }

    /// Counts a request that the protocol refused.
    pub fn count_refused(&mut self, protocol: usize) {
        self.refused[protocol] += 1;
    }

    /// How many commands of a class ended so.
    pub fn executed(&self, protocol: usize, class: Class, outcome: Outcome, forwarded: bool) -> u64 {
        let ops = (0..CLASSES.len()).filter(|op| CLASSES[*op] == class);
        let replies = || (0..OUTCOMES.len()).filter(|reply| OUTCOMES[*reply] == outcome);
        ops.flat_map(|op| replies().map(move |reply| self.executed[Self::place(protocol, op, reply, forwarded)]))
            .sum()
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
    use crate::model::{Condition, Deadline, Delete, Increment, ItemView, NewVersion, Put, Value, Version};

    /// No two kinds share a place.
    #[test]
    fn everything_is_told_apart() {
        let mut places = vec![];
        for protocol in 0..PROTOCOLS_MAX {
            for op in 0..CLASSES.len() {
                for reply in 0..OUTCOMES.len() {
                    places.extend([false, true].map(|forwarded| Operations::place(protocol, op, reply, forwarded)));
                }
            }
        }
        let all = places.len();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), all);
        assert!(places.iter().all(|place| *place < PLACES));
    }

    /// What is counted under a number is what the number is said to stand for.
    #[test]
    fn numbers_stand_for_what_they_are() {
        let put = Put::new(Value::Small(b""));
        let increment = Increment {
            delta: 1,
            subtract: false,
            create: None,
            touch: None,
            condition: Condition::Always,
            version: NewVersion::OnDemand,
        };
        let get = Op::Get {
            version: false,
            effects: None,
        };
        let ops = [
            get,
            Op::Put(put),
            Op::Delete(Delete::default()),
            Op::Increment(increment),
            Op::Touch(Deadline::Never),
            Op::Inspect,
        ];
        let item = ItemView {
            value: Value::Small(b""),
            flags: 0,
            version: Version(0),
            deadline: Deadline::Never,
            deadline_before: Deadline::Never,
            accessed_s: 0,
            hit_before: false,
            stale: false,
            won: false,
            won_before: false,
            key_encoded: false,
            charged_bytes: 0,
        };
        let replies = [
            (Reply::Found(item), Outcome::Done),
            (Reply::NotFound, Outcome::NotFound),
            (
                Reply::Stored {
                    version: Version(0),
                    created: true,
                },
                Outcome::Done,
            ),
            (Reply::NotStored, Outcome::ConditionFailed),
            (Reply::VersionMismatch, Outcome::ConditionFailed),
            (Reply::Deleted(Version(0)), Outcome::Done),
            (Reply::Touched, Outcome::Done),
            (Reply::Counted(1, item), Outcome::Done),
            (Reply::NotANumber, Outcome::Error),
            (Reply::OutOfMemory, Outcome::OutOfMemory),
            (Reply::TooLarge, Outcome::TooLarge),
            (Reply::ReadOnly, Outcome::ReadOnly),
            (Reply::NotDurable, Outcome::NotDurable),
        ];
        assert_eq!((ops.len(), replies.len()), (CLASSES.len(), OUTCOMES.len()));
        for op in ops {
            for (reply, outcome) in &replies {
                let mut operations = Operations::default();
                operations.count(5, &Command { key: b"k", op }, reply, true);
                assert_eq!(
                    operations.executed(5, op.class(), *outcome, true),
                    1,
                    "{op:?} {reply:?}"
                );
                assert_eq!(operations.executed.iter().sum::<u64>(), 1);
            }
        }
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
