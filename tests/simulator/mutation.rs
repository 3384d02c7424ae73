//! Bugs made on purpose, to see that they are caught. They are made on the way between two cores: what a core says about a
//! transaction is changed, held back or made up, so that the server needs no hooks. The format is the one of `src/link.rs`.
//!
//! A core's own part of a transaction does not travel and stays as it is.

use super::random::Random;
use memkv::link::{Batch, Direction};
use memkv::protocol::Protocol;
use std::collections::BTreeMap;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// Nothing.
    Nothing,
    /// A read of several cores takes each core's part by itself: nothing stays locked until all have been read.
    ReadWithoutLocks,
    /// A participant that is ready to write unlocks at once, and writes when it is told to.
    UnlockEarly,
    /// A decision to write is lost.
    DropDecision,
    /// A decision to write is lost, and the coordinator is told that it was carried out.
    FeignDecision,
    /// A transaction of the JSON-line protocol is committed though what it read has changed.
    CommitUnchecked,
    /// A participant unlocks as soon as it has written, and not when what all have written is safe.
    SettleEarly,
    /// Two requests of one connection to the same core change places.
    SwapRequests,
}

// Fields of a request, by their offset, and of what follows its header.
const SESSION_AND_NUMBER: std::ops::Range<usize> = 4..12;
const PROTOCOL: usize = 22;
const KIND: usize = 23;
const TEXT_LENGTH: usize = 28;
const HEADER: usize = 32;
const SCOPE_OR_DECISION: usize = 10;
const MEMBERS: usize = 11;
const MEMBER_ROLE: usize = 4;
const MEMBER_COMMAND: usize = 15;
const MEMBER_CHECK: usize = 15;

const COMMAND: u8 = 0;
const WHOLE: u8 = 2;
const PREPARE: u8 = 3;
const DECIDE: u8 = 4;

const SCOPE_KEYS: u8 = 0;
const SCOPE_READS: u8 = 1;

const AGAIN: u8 = 0;
const RELEASE: u8 = 1;
const SUCCESS: u8 = 2;
const FAILURE: u8 = 3;
const SETTLE: u8 = 4;

const ROLE_CHECK: u8 = 0;
const ROLE_SUCCESS: u8 = 1;

const CONDITION_ALWAYS: u8 = 0;

const VOTE_PREPARED: u8 = 2;
const VOTE_DONE: u8 = 3;

/// A put without condition or version.
const PLAIN_PUT: u8 = 3;

const REPLY_HEADER: usize = 16;

type Record = Vec<u8>;

/// A participant's part of a transaction: the participant, and the transaction's id as it travels.
type PartId = (usize, Vec<u8>);

struct Part {
    prepare: Record,
    coordinator: usize,
    /// It is to be answered with a vote.
    asked: bool,
    /// The participant knows nothing of it any more.
    forgotten: bool,
}

pub struct Mutator {
    mutation: Mutation,
    random: Random,
    parts: BTreeMap<PartId, Part>,
}

fn number(bytes: &[u8]) -> usize {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | usize::from(*byte))
}

fn body_at(record: &[u8]) -> usize {
    HEADER + number(&record[TEXT_LENGTH..TEXT_LENGTH + 2])
}

/// The records of a batch of requests, each with its length in front.
fn requests(flat: &[u8]) -> Vec<Record> {
    let (mut records, mut rest) = (vec![], flat);
    while !rest.is_empty() {
        let (record, behind) = rest.split_at(number(&rest[..4]));
        records.push(record.to_vec());
        rest = behind;
    }
    records
}

/// The members of a part, each with its length in front.
fn members(prepare: &[u8]) -> Vec<&[u8]> {
    let (mut members, mut rest) = (vec![], &prepare[body_at(prepare) + MEMBERS..]);
    while !rest.is_empty() {
        let (member, behind) = rest.split_at(4 + number(&rest[..4]));
        members.push(member);
        rest = behind;
    }
    members
}

fn is_distributed(record: &[u8]) -> bool {
    matches!(record[KIND], PREPARE | DECIDE)
}

/// A decision for the transaction of `like`, which is a record of it.
fn decision(like: &[u8], decision: u8) -> Record {
    let body = body_at(like);
    // Of an epoch that does not matter, without writers.
    let decided = [&[decision][..], &[0; 8]].concat();
    let mut record = [&like[..HEADER], &like[body..body + SCOPE_OR_DECISION], &decided].concat();
    let length = record.len() as u32;
    record[..4].copy_from_slice(&length.to_le_bytes());
    record[KIND] = DECIDE;
    record[TEXT_LENGTH..TEXT_LENGTH + 2].fill(0);
    record
}

/// A transaction that needs no other core, of what `prepare` would do if all conditions held, or did not.
fn whole(prepare: &[u8], decided: u8) -> Record {
    let mut record = prepare[..body_at(prepare) + MEMBERS].to_vec();
    record[KIND] = WHOLE;
    let role = ROLE_SUCCESS + (decided - SUCCESS);
    for member in members(prepare)
        .into_iter()
        .filter(|member| member[MEMBER_ROLE] == role)
    {
        let at = record.len();
        record.extend_from_slice(member);
        record[at + MEMBER_ROLE] = ROLE_SUCCESS;
    }
    let length = record.len() as u32;
    record[..4].copy_from_slice(&length.to_le_bytes());
    record
}

/// The same part with conditions that always hold.
fn unchecked(part: &[u8]) -> Record {
    let mut record = part[..body_at(part) + MEMBERS].to_vec();
    for member in members(part) {
        let at = record.len();
        record.extend_from_slice(member);
        if member[MEMBER_ROLE] == ROLE_CHECK {
            let key_length = number(&member[MEMBER_CHECK..MEMBER_CHECK + 2]);
            record.truncate(at + MEMBER_CHECK + 2 + key_length);
            record.push(CONDITION_ALWAYS);
            let length = (record.len() - at - 4) as u32;
            record[at..at + 4].copy_from_slice(&length.to_le_bytes());
        }
    }
    let length = record.len() as u32;
    record[..4].copy_from_slice(&length.to_le_bytes());
    record
}

/// What a participant answers that has executed `writes` plain writes of a protobuf client.
fn feigned(prepare: &[u8], writes: usize) -> Record {
    // A vote, no bytes read, no checks, and for each write a result of two bytes: an empty one, behind its tag.
    let mut content = vec![VOTE_DONE];
    content.extend_from_slice(&[0; 10]);
    for _ in 0..writes {
        content.extend_from_slice(&[2, 0, 0, 0, 0, 0, 0x22, 0]);
    }
    let mut reply = prepare[SESSION_AND_NUMBER].to_vec();
    reply.extend_from_slice(&(content.len() as u32).to_le_bytes());
    reply.extend_from_slice(&[0; 4]);
    reply.extend_from_slice(&content);
    reply
}

fn batch_of(record: &[u8]) -> Box<Batch> {
    let mut batch = Box::<Batch>::default();
    batch.rope.push(record);
    batch
}

impl Mutator {
    pub fn new(mutation: Mutation, random: Random) -> Self {
        Self {
            mutation,
            random,
            parts: BTreeMap::new(),
        }
    }

    /// A batch is on its way. What is made up, if anything, travels the other way, in this direction.
    pub fn pass(
        &mut self,
        from: usize,
        to: usize,
        direction: Direction,
        batch: &mut Batch,
    ) -> Option<(Direction, Box<Batch>)> {
        match direction {
            Direction::Requests => {
                assert!(batch.rope.splices.is_empty(), "large values are not for mutations");
                let (mut passed, mut made_up) = (vec![], vec![]);
                for record in requests(&batch.rope.flat) {
                    self.request(from, to, record, &mut passed, &mut made_up);
                }
                if self.mutation == Mutation::SwapRequests {
                    swap(&mut passed);
                }
                batch.rope.flat = passed.concat();
                (!made_up.is_empty()).then(|| (Direction::Replies, batch_of(&made_up.concat())))
            }
            Direction::Replies if self.mutation == Mutation::UnlockEarly => {
                let releases = self.releases(from, to, &batch.rope.flat);
                (!releases.is_empty()).then(|| (Direction::Requests, batch_of(&releases.concat())))
            }
            Direction::Replies => None,
        }
    }

    fn request(
        &mut self,
        from: usize,
        to: usize,
        mut record: Record,
        passed: &mut Vec<Record>,
        made_up: &mut Vec<Record>,
    ) {
        let is_part = matches!(record[KIND], WHOLE | PREPARE) && record[PROTOCOL] == Protocol::JsonLine as u8;
        if self.mutation == Mutation::CommitUnchecked && is_part {
            record = unchecked(&record);
        }
        if !is_distributed(&record) {
            passed.push(record);
            return;
        }
        let body = body_at(&record);
        let of = (to, record[body..body + SCOPE_OR_DECISION].to_vec());
        let scope_or_decision = record[body + SCOPE_OR_DECISION];
        if record[KIND] == PREPARE {
            let part = Part {
                prepare: record.clone(),
                coordinator: from,
                asked: true,
                forgotten: false,
            };
            self.parts.insert(of, part);
            if self.mutation == Mutation::ReadWithoutLocks && scope_or_decision == SCOPE_READS {
                record[KIND] = WHOLE;
            }
            passed.push(record);
            return;
        }
        let Some(part) = self.parts.get_mut(&of) else {
            passed.push(record);
            return;
        };
        let scope = part.prepare[body_at(&part.prepare) + SCOPE_OR_DECISION];
        match (self.mutation, scope_or_decision) {
            (Mutation::ReadWithoutLocks, AGAIN) if scope == SCOPE_READS => {
                record = part.prepare.clone();
                record[KIND] = WHOLE;
            }
            (Mutation::DropDecision, SUCCESS | FAILURE) if self.random.chance(30) => return,
            (Mutation::FeignDecision, SUCCESS) => {
                let writes: Vec<&[u8]> = members(&part.prepare)
                    .into_iter()
                    .filter(|member| member[MEMBER_ROLE] == ROLE_SUCCESS)
                    .collect();
                if scope == SCOPE_KEYS && writes.iter().all(|member| member[MEMBER_COMMAND] == PLAIN_PUT) {
                    record[body + SCOPE_OR_DECISION] = RELEASE;
                    made_up.push(feigned(&part.prepare, writes.len()));
                }
            }
            (Mutation::UnlockEarly, AGAIN) => {
                part.asked = true;
                if std::mem::take(&mut part.forgotten) {
                    record = part.prepare.clone();
                }
            }
            (Mutation::UnlockEarly, decided @ (SUCCESS | FAILURE)) if part.forgotten => {
                record = whole(&part.prepare, decided);
            }
            _ => {}
        }
        if matches!(scope_or_decision, RELEASE | SUCCESS | FAILURE) {
            self.parts.remove(&of);
        }
        let settles = self.mutation == Mutation::SettleEarly && matches!(scope_or_decision, SUCCESS | FAILURE);
        let early = settles.then(|| decision(&record, SETTLE));
        passed.push(record);
        passed.extend(early);
    }

    /// Of the parts that say in these replies that they are ready to write: what makes their cores unlock and forget them.
    fn releases(&mut self, from: usize, to: usize, mut replies: &[u8]) -> Vec<Record> {
        let mut releases = vec![];
        while !replies.is_empty() {
            let length = number(&replies[8..12]);
            let (reply, behind) = replies.split_at(REPLY_HEADER + length);
            replies = behind;
            let of_reply = self.parts.iter_mut().find(|((participant, _), part)| {
                *participant == from
                    && part.coordinator == to
                    && part.asked
                    && part.prepare[SESSION_AND_NUMBER] == reply[..8]
            });
            let Some((_, part)) = of_reply else { continue };
            part.asked = false;
            let scope = part.prepare[body_at(&part.prepare) + SCOPE_OR_DECISION];
            if scope == SCOPE_KEYS && reply[REPLY_HEADER] == VOTE_PREPARED {
                part.forgotten = true;
                releases.push(decision(&part.prepare, RELEASE));
            }
        }
        releases
    }
}

/// Swaps neighbours that are single commands of one connection.
fn swap(records: &mut [Record]) {
    let mut at = 0;
    while at + 1 < records.len() {
        let [first, second] = [&records[at], &records[at + 1]];
        if first[KIND] == COMMAND && second[KIND] == COMMAND && first[4..8] == second[4..8] {
            records.swap(at, at + 1);
            at += 1;
        }
        at += 1;
    }
}
