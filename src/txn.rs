//! The coordinator of a transaction: what it has asked, what it was told, and what it does next. It sends nothing itself.
//!
//! All cores that own a key of the transaction are asked to prepare at once: to lock their keys, to evaluate their
//! checks, and to set memory aside. When all have, and not before, it decides, and each executes its part and unlocks.
//! Until then a core may say that an older request waits for what it has locked: then those that have locked unlock, and
//! prepare again.
//! Where only reads are asked for, the first answer carries them and the decision is not awaited. With a single core the first
//! request is executed at once, and there is nothing to decide.

use crate::encoding::{Reader, Rope};
use crate::locks::TxnId;
use crate::model::TxnEnd;
use crate::protocol::TxnResults;
use smallvec::SmallVec;

/// What a command of a transaction is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Its condition decides what is executed.
    Check = 0,
    /// Executed when all conditions hold.
    Success = 1,
    /// Executed when one does not.
    Failure = 2,
}

impl Role {
    /// The role with this number.
    pub(crate) fn from_number(number: u8) -> Self {
        [Role::Check, Role::Success, Role::Failure][usize::from(number)]
    }
}

/// What a transaction is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Its commands.
    Keys = 0,
    /// Its commands, which only read, without a check: the first answer carries their results.
    Reads = 1,
    /// The whole store, which it empties.
    Store = 2,
}

impl Scope {
    /// The scope with this number.
    pub(crate) fn from_number(number: u8) -> Self {
        [Scope::Keys, Scope::Reads, Scope::Store][usize::from(number)]
    }
}

/// What a participant is told after it has prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Give the locks back and prepare once more: they are in the way of an older request.
    Again = 0,
    /// Give the locks back; nothing is executed.
    Release = 1,
    /// Execute what is there for success, and answer.
    Success = 2,
    /// Execute what is there for failure, and answer.
    Failure = 3,
    /// What was executed is safe on all cores: unlock.
    Settle = 4,
    /// What was executed is not known to be safe on all cores: unlock, but do not show it.
    Distrust = 5,
}

impl Decision {
    /// The decision with this number.
    pub(crate) fn from_number(number: u8) -> Self {
        let all = [
            Decision::Again,
            Decision::Release,
            Decision::Success,
            Decision::Failure,
            Decision::Settle,
            Decision::Distrust,
        ];
        all[usize::from(number)]
    }
}

/// What a participant says first in its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    /// There is not enough memory. What was locked is locked.
    NoMemory = 0,
    /// What it would read is too large. What was locked is locked.
    TooLarge = 1,
    /// It is ready to execute what will be decided, or has read what is to be read.
    Prepared = 2,
    /// It has executed its part and unlocked.
    Done = 3,
    /// It takes no writes, and its part has one. What was locked is locked.
    ReadOnly = 4,
    /// It has executed its part, and cannot make it durable.
    NotDurable = 5,
}

impl Vote {
    fn from_number(number: u8) -> Self {
        let all = [
            Vote::NoMemory,
            Vote::TooLarge,
            Vote::Prepared,
            Vote::Done,
            Vote::ReadOnly,
            Vote::NotDurable,
        ];
        all[usize::from(number)]
    }
}

/// Appends what stands before the results in a participant's answer: the vote, how many bytes of values it reads, and which
/// checks held, in their order.
pub(crate) fn push_vote(out: &mut Vec<u8>, vote: Vote, read_bytes: u64, checks: &[bool]) {
    out.push(vote as u8);
    out.extend_from_slice(&read_bytes.to_le_bytes());
    out.extend_from_slice(&(checks.len() as u16).to_le_bytes());
    out.extend(checks.iter().map(|held| u8::from(*held)));
}

/// Writes vote and bytes anew at `start`, where [`push_vote`] wrote them before the results were known.
pub(crate) fn amend_vote(out: &mut [u8], start: usize, vote: Vote, read_bytes: u64) {
    out[start] = vote as u8;
    out[start + 1..start + 9].copy_from_slice(&read_bytes.to_le_bytes());
}

/// Where a result began.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResultStart {
    flat: usize,
    splices: usize,
}

const RESULT_HEADER_BYTES: usize = 6;

/// Begins one result in a participant's answer. What is written behind it is its content, until [`finish_result`].
#[inline]
pub(crate) fn begin_result(out: &mut Rope) -> ResultStart {
    let start = ResultStart {
        flat: out.flat.len(),
        splices: out.splices.len(),
    };
    out.push(&[0; RESULT_HEADER_BYTES]);
    start
}

/// Ends the result that began at `start`: writes its length and the number of its large values before it.
#[inline]
pub(crate) fn finish_result(out: &mut Rope, start: ResultStart) {
    let length = (out.flat.len() - start.flat - RESULT_HEADER_BYTES) as u32;
    let splices = (out.splices.len() - start.splices) as u16;
    let header = &mut out.flat[start.flat..start.flat + RESULT_HEADER_BYTES];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4..].copy_from_slice(&splices.to_le_bytes());
}

/// One core's part, as the coordinator sees it.
#[derive(Debug)]
struct Participant {
    core: u16,
    /// What its part costs of the credit of its link, in bytes.
    cost_bytes: u32,
    /// How often it was told to prepare again.
    attempt: u32,
    /// What it said last, unless that is still to come.
    vote: Option<Vote>,
    /// Answers on their way that it was told to forget since.
    outdated: u32,
    /// Bytes that it reads.
    read_bytes: u64,
    /// Which of its checks held.
    checks: Vec<bool>,
    /// Its results, each from [`begin_result`] to [`finish_result`].
    results: Rope,
}

/// What the coordinator does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Somebody has not answered.
    Wait,
    /// Tell all participants, and wait for their answers.
    Ask(Decision),
    /// Tell all participants, who do not answer, and finish.
    FinishAnd(Decision),
    /// All is done.
    Finish,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prepare,
    Decide(TxnEnd),
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Coordinator {
    /// Its age.
    pub(crate) id: TxnId,
    participants: Vec<Participant>,
    /// For each command, in order.
    order: Box<[Ordered]>,
    phase: Phase,
    /// The most bytes of values that may be read.
    read_bytes_max: u64,
    scope: Scope,
    /// Writing cores keep what they wrote locked until all of it is durable.
    settles: bool,
    /// The participants' last answers are to wait, also when they have nothing to execute: what their checks saw is to be safe.
    waits: bool,
}

/// A command of a transaction, as its coordinator keeps it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ordered {
    /// What it is there for.
    pub(crate) role: Role,
    /// Whose it is.
    pub(crate) core: u16,
    /// It may change something.
    pub(crate) writes: bool,
}

impl Coordinator {
    /// Of commands in `order`; `costs` are those of the participants, each with its core. All were asked to prepare.
    pub(crate) fn new(
        id: TxnId,
        order: Box<[Ordered]>,
        costs: &[(u16, u32)],
        scope: Scope,
        read_bytes_max: u64,
        settles: bool,
    ) -> Self {
        let participants = costs.iter().map(|(core, cost_bytes)| Participant {
            core: *core,
            cost_bytes: *cost_bytes,
            attempt: 0,
            vote: None,
            outdated: 0,
            read_bytes: 0,
            checks: vec![],
            results: Rope::default(),
        });
        Self {
            id,
            participants: participants.collect(),
            order,
            phase: Phase::Prepare,
            read_bytes_max,
            scope,
            settles,
            waits: false,
        }
    }

    /// The same, of a request that asks for durability where nothing else waits for the disk. A check that does not hold is
    /// told with the first answers, which do not wait: then there is to be a second one, of the epoch of the decision.
    pub(crate) fn waiting(mut self, waits: bool) -> Self {
        self.waits = waits;
        self
    }

    /// The cores that write, of what was decided, when they are more than one: to find that out after a crash, each notes them.
    pub(crate) fn writers(&self) -> SmallVec<[u16; 8]> {
        let executed = match self.phase {
            Phase::Decide(TxnEnd::Success) => Role::Success,
            Phase::Decide(TxnEnd::Failure) => Role::Failure,
            _ => return SmallVec::new(),
        };
        let writes = |core: u16| {
            let mut of_core = self.order.iter().filter(|ordered| ordered.core == core);
            self.scope == Scope::Store || of_core.any(|ordered| ordered.role == executed && ordered.writes)
        };
        let writers: SmallVec<[u16; 8]> = self.cores().filter(|core| writes(*core)).collect();
        if writers.len() > 1 { writers } else { SmallVec::new() }
    }

    /// The participating cores.
    pub(crate) fn cores(&self) -> impl Iterator<Item = u16> + '_ {
        self.participants.iter().map(|participant| participant.core)
    }

    /// More than one core takes part.
    pub(crate) fn is_distributed(&self) -> bool {
        self.participants.len() > 1
    }

    /// It is about the whole store, not about keys.
    pub(crate) fn empties_the_store(&self) -> bool {
        self.scope == Scope::Store
    }

    /// What the part of `core` costs of the credit of its link, in bytes.
    pub(crate) fn cost_bytes(&self, core: u16) -> u32 {
        let part = self.participants.iter().find(|participant| participant.core == core);
        part.map_or(0, |participant| participant.cost_bytes)
    }

    fn participant(&mut self, core: u16) -> &mut Participant {
        let mut participants = self.participants.iter_mut();
        let participant = participants.find(|participant| participant.core == core);
        participant.expect("only participants speak of it")
    }

    /// Takes a participant's answer: `length` flat bytes of `source` at `start`, with `splices` large values.
    pub(crate) fn take(&mut self, core: u16, source: &mut Rope, start: usize, length: usize, splices: usize) {
        let prepares = self.phase == Phase::Prepare;
        let participant = self.participant(core);
        if participant.outdated > 0 {
            participant.outdated -= 1;
            (0..splices).for_each(|_| drop(source.take_splice()));
            return;
        }
        let mut reader = Reader(&source.flat[start..start + length]);
        participant.vote = Some(Vote::from_number(reader.u8()));
        let read_bytes = reader.u64();
        let count = usize::from(reader.u16());
        let checks = reader.bytes(count);
        if prepares {
            participant.read_bytes = read_bytes;
            participant.checks.clear();
            participant.checks.extend(checks.iter().map(|held| *held == 1));
        }
        let left = reader.0.len();
        participant
            .results
            .append_from(source, start + length - left, left, splices);
    }

    /// A participant says that an older request waits for what it has locked, the time it was told to prepare for the
    /// `attempt`th time. Returns who is to be told [`Decision::Again`]; nobody when it is too late for that.
    pub(crate) fn wound(&mut self, core: u16, attempt: u32) -> Vec<u16> {
        if self.phase != Phase::Prepare || self.participant(core).attempt != attempt {
            return vec![];
        }
        let mut again = vec![];
        for participant in &mut self.participants {
            match participant.vote.take() {
                Some(_) => participant.results.clear(usize::MAX),
                // It has locked, or it would not be in the way: its answer is behind the wound.
                None if participant.core == core => participant.outdated += 1,
                None => continue,
            }
            participant.attempt += 1;
            again.push(participant.core);
        }
        again
    }

    fn said(&self, vote: Vote) -> bool {
        self.participants
            .iter()
            .any(|participant| participant.vote == Some(vote))
    }

    /// What to do now.
    pub(crate) fn next(&mut self) -> Next {
        if self.participants.iter().any(|participant| participant.vote.is_none()) {
            return Next::Wait;
        }
        if let Phase::Decide(_) = self.phase {
            return match self.settles && !self.writers().is_empty() {
                false => Next::Finish,
                true if self.said(Vote::NotDurable) => Next::FinishAnd(Decision::Distrust),
                true => Next::FinishAnd(Decision::Settle),
            };
        }
        let read_bytes: u64 = self.participants.iter().map(|participant| participant.read_bytes).sum();
        let mut checks = self.participants.iter().flat_map(|participant| &participant.checks);
        let end = if self.said(Vote::ReadOnly) {
            TxnEnd::ReadOnly
        } else if self.said(Vote::NotDurable) {
            TxnEnd::NotDurable
        } else if self.said(Vote::NoMemory) {
            TxnEnd::OutOfMemory
        } else if self.said(Vote::TooLarge) || read_bytes > self.read_bytes_max {
            TxnEnd::TooLarge
        } else if checks.all(|held| *held) {
            TxnEnd::Success
        } else {
            TxnEnd::Failure
        };
        self.phase = Phase::Decide(end);
        if !self.is_distributed() {
            return Next::Finish;
        }
        let role = match end {
            TxnEnd::Success => Role::Success,
            _ => Role::Failure,
        };
        let acts = match self.scope {
            Scope::Keys => self.waits || self.order.iter().any(|ordered| ordered.role == role),
            Scope::Reads => false,
            Scope::Store => true,
        };
        if !matches!(end, TxnEnd::Success | TxnEnd::Failure) || !acts {
            return Next::FinishAnd(Decision::Release);
        }
        for participant in &mut self.participants {
            participant.vote = None;
        }
        Next::Ask(match end {
            TxnEnd::Success => Decision::Success,
            _ => Decision::Failure,
        })
    }

    /// It changes nothing.
    pub(crate) fn only_reads(&self) -> bool {
        self.scope == Scope::Reads
    }

    /// Nothing was done, because a participant takes no writes.
    pub(crate) fn is_read_only(&self) -> bool {
        self.phase == Phase::Decide(TxnEnd::ReadOnly)
    }

    /// What is said in place of what it has read, when there is no memory to put that together.
    pub(crate) fn refuse(self) -> TxnResults {
        TxnResults::refused(TxnEnd::OutOfMemory, self.commands())
    }

    fn commands(&self) -> usize {
        let success = self.order.iter().filter(|ordered| ordered.role == Role::Success);
        success.count()
    }

    /// What came of it.
    pub(crate) fn finish(mut self) -> TxnResults {
        let Phase::Decide(end) = self.phase else {
            unreachable!("it finishes after its decision")
        };
        if self.said(Vote::NotDurable) {
            return TxnResults::refused(TxnEnd::NotDurable, self.commands());
        }
        let executed = match end {
            TxnEnd::Success => Some(Role::Success),
            TxnEnd::Failure => Some(Role::Failure),
            TxnEnd::OutOfMemory | TxnEnd::TooLarge | TxnEnd::ReadOnly | TxnEnd::NotDurable => None,
        };
        let (mut checks, mut replies) = (vec![], Rope::default());
        let bytes = self
            .participants
            .iter()
            .map(|participant| participant.results.flat.len());
        replies.flat.reserve(bytes.sum());
        let mut read = vec![(0, 0); self.participants.len()];
        for Ordered { role, core, .. } in &self.order {
            let at = self
                .participants
                .iter()
                .position(|participant| participant.core == *core);
            let at = at.expect("every command belongs to a participant");
            let (participant, (flat, seen)) = (&mut self.participants[at], &mut read[at]);
            if *role == Role::Check {
                checks.push(participant.checks.get(*seen).copied().unwrap_or(false));
                *seen += 1;
            } else if Some(*role) == executed {
                let source = &mut participant.results;
                let mut header = Reader(&source.flat[*flat..*flat + RESULT_HEADER_BYTES]);
                let (length, splices) = (header.u32() as usize, usize::from(header.u16()));
                *flat += RESULT_HEADER_BYTES;
                replies.append_from(source, *flat, length, splices);
                *flat += length;
            }
        }
        TxnResults {
            end,
            checks,
            replies,
            commands: self.commands(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    const ID: TxnId = TxnId { clock: 1, core: 0 };

    fn ordered(role: Role, core: u16, writes: bool) -> Ordered {
        Ordered { role, core, writes }
    }

    fn say(coordinator: &mut Coordinator, core: u16, vote: Vote, checks: &[bool], results: &[&str]) {
        let mut said = Rope::default();
        push_vote(&mut said.flat, vote, 7, checks);
        for (number, text) in results.iter().enumerate() {
            let start = begin_result(&mut said);
            said.push(b"<");
            if number % 2 == 0 {
                said.splice(Bytes::copy_from_slice(text.as_bytes()));
            } else {
                said.push(text.as_bytes());
            }
            said.push(b">");
            finish_result(&mut said, start);
        }
        let (length, splices) = (said.flat.len(), said.splices.len());
        coordinator.take(core, &mut said, 0, length, splices);
    }

    fn text(results: &Rope) -> String {
        String::from_utf8(results.to_vec()).unwrap()
    }

    /// Whoever answers first, the results stand in the order of the commands; reads need no second answer.
    #[test]
    fn reads_stand_in_order() {
        let order = [1u16, 0, 1, 1, 0].map(|core| ordered(Role::Success, core, false));
        let mut reads = Coordinator::new(ID, order.into(), &[(0, 0), (1, 50)], Scope::Reads, 14, true);
        assert_eq!((reads.next(), reads.cost_bytes(1)), (Next::Wait, 50));
        say(&mut reads, 1, Vote::Prepared, &[], &["a", "c", "d"]);
        assert_eq!(reads.next(), Next::Wait);
        say(&mut reads, 0, Vote::Prepared, &[], &["b", "e"]);
        assert_eq!(reads.next(), Next::FinishAnd(Decision::Release));
        let results = reads.finish();
        assert_eq!(
            (results.end, text(&results.replies)),
            (TxnEnd::Success, "<a><b><c><d><e>".to_owned())
        );
    }

    #[test]
    fn a_wounded_one_prepares_again() {
        let order = [
            (Role::Check, 0),
            (Role::Success, 0),
            (Role::Success, 1),
            (Role::Failure, 1),
            (Role::Check, 1),
        ]
        .map(|(role, core)| ordered(role, core, true));
        for (held, decision, expected) in [
            (true, Decision::Success, vec!["<s0>", "<s1>"]),
            (false, Decision::Failure, vec!["<f1>"]),
        ] {
            let mut txn = Coordinator::new(ID, order.into(), &[(0, 0), (1, 50)], Scope::Keys, 14, true);
            say(&mut txn, 0, Vote::Prepared, &[false], &[]);
            assert_eq!(txn.wound(0, 0), [0]);
            assert!(txn.wound(0, 0).is_empty(), "that was the attempt before");
            say(&mut txn, 0, Vote::Prepared, &[true], &[]);
            // The wound overtakes what the core answered before it.
            assert_eq!(txn.wound(1, 0), [0, 1]);
            say(&mut txn, 1, Vote::NoMemory, &[!held], &["old"]);
            say(&mut txn, 0, Vote::Prepared, &[true], &[]);
            assert_eq!(txn.next(), Next::Wait);
            say(&mut txn, 1, Vote::Prepared, &[held], &[]);
            assert_eq!(txn.next(), Next::Ask(decision));
            assert!(txn.wound(1, 1).is_empty(), "it is decided");
            let of = |core: u16| match (held, core) {
                (true, 0) => vec!["s0"],
                (true, _) => vec!["s1"],
                (false, 0) => vec![],
                (false, _) => vec!["f1"],
            };
            for core in [1, 0] {
                assert_eq!(txn.next(), Next::Wait);
                say(&mut txn, core, Vote::Done, &[], &of(core));
            }
            // With one writer there is nothing to settle.
            let last = match held {
                true => Next::FinishAnd(Decision::Settle),
                false => Next::Finish,
            };
            assert_eq!(txn.next(), last);
            let results = txn.finish();
            assert_eq!(
                (results.checks, text(&results.replies)),
                (vec![true, held], expected.concat())
            );
        }
    }

    /// A durable request whose check does not hold has a second answer, which can wait, though nothing is executed.
    #[test]
    fn what_a_failed_check_saw_can_wait() {
        for (waits, next) in [
            (false, Next::FinishAnd(Decision::Release)),
            (true, Next::Ask(Decision::Failure)),
        ] {
            let order = [ordered(Role::Check, 0, false), ordered(Role::Success, 1, true)];
            let txn = Coordinator::new(ID, order.into(), &[(0, 0), (1, 50)], Scope::Keys, 14, false);
            let mut txn = txn.waiting(waits);
            say(&mut txn, 0, Vote::Prepared, &[false], &[]);
            say(&mut txn, 1, Vote::Prepared, &[], &[]);
            assert_eq!(txn.next(), next);
            if waits {
                (0..2).for_each(|core| say(&mut txn, core, Vote::Done, &[], &[]));
                assert_eq!(txn.next(), Next::Finish);
            }
            let results = txn.finish();
            assert_eq!((results.end, results.checks), (TxnEnd::Failure, vec![false]));
        }
    }

    #[test]
    fn when_one_cannot_nothing_is_executed() {
        for (first, second, end) in [
            (Vote::Prepared, Vote::NoMemory, TxnEnd::OutOfMemory),
            (Vote::Prepared, Vote::ReadOnly, TxnEnd::ReadOnly),
            (Vote::ReadOnly, Vote::NoMemory, TxnEnd::ReadOnly),
        ] {
            let order = [0, 1].map(|core| ordered(Role::Success, core, true));
            let mut txn = Coordinator::new(ID, order.into(), &[(0, 0), (1, 50)], Scope::Keys, 14, true);
            say(&mut txn, 0, first, &[], &[]);
            say(&mut txn, 1, second, &[], &[]);
            assert_eq!(txn.next(), Next::FinishAnd(Decision::Release));
            assert_eq!(txn.is_read_only(), end == TxnEnd::ReadOnly);
            let results = txn.finish();
            assert_eq!((results.end, results.replies.len(), results.commands), (end, 0, 2));
        }
    }
}
