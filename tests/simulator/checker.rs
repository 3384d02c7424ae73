//! Is there an order of the calls, each at one instant between its request and its answer, in which a single map would have
//! said the same? For requests about several keys that is strict serializability, for each key alone linearizability.
//!
//! The search is the one of Wing and Gong with the memory of Lowe: from a set of calls that are done and the state they
//! leave, any call may be next that did not begin after another, which is not done, had ended; a pair of such a set and such
//! a state is visited once. What changes nothing, whenever it is done, is done as soon as it agrees with the state. And no
//! two writes write the same text, so what somebody has still to read must not be written already and gone.
//!
//! Beyond that, calls of one connection that share a key are done in the order in which they were asked.
//!
//! A crash that may forget the end of a history asks for one more thing: a moment of that order, the cut, at which the map was
//! what was found afterwards. What is done after the cut does not depend on it, so the search remembers only that there was one.

use super::model::{Call, Key, Outcome, Said, State, Value, apply};
use ahash::{AHashSet, RandomState};
use std::collections::HashMap;
use std::fmt::{self, Display, Formatter, Write};

/// Calls that a history may have: bits of a number.
pub const CALLS_MAX: usize = 128;

/// Pairs after which the search gives up, and after which it does so while a counterexample is made shorter.
const PAIRS_MAX: usize = 1_000_000;
const PAIRS_TO_SHRINK_MAX: usize = 20_000;

/// What came of a check.
#[derive(Debug)]
pub enum Checked {
    Serializable,
    /// There is no order. The fewest calls that show it, readable.
    Not(String),
    /// The history is too tangled for this checker.
    GaveUp,
}

/// What is asked of a history.
#[derive(Clone, Debug, Default)]
pub struct Question {
    /// What was there before.
    pub initial: State,
    /// In the order in which each client asked.
    pub calls: Vec<Call>,
    /// It was forgotten from some moment on.
    pub cut: Option<Cut>,
}

/// What is known of the moment up to which a history was kept.
#[derive(Clone, Debug)]
pub struct Cut {
    /// What was answered before this step is kept, and so is each call that was to be safe before its answer.
    pub keeps_before: u64,
    /// A read, at one instant, of what was kept.
    pub found: Call,
}

struct Search<'a> {
    calls: &'a [Call],
    initial: State,
    cut: Option<&'a Cut>,
    /// Those that must be done before the cut.
    kept: u128,
    /// For each call, those that must be done before.
    before: Vec<u128>,
    /// Those that were answered: they must be done.
    answered: u128,
    /// Those of them that change nothing, whenever they are done.
    idle: u128,
    /// What is read from the store: by which call, at which key, which text, and the call that wrote it.
    reads: Vec<Reading<usize>>,
    /// The same for what was found after the cut.
    found: Vec<Reading<()>>,
    /// Fingerprints of the pairs that were visited.
    seen: AHashSet<u128>,
    hashers: [RandomState; 2],
    pairs_max: usize,
    /// The most answered calls that were put in order, with what was done and what it left.
    best: (u32, u128, State),
}

/// A text that was read.
struct Reading<R> {
    reader: R,
    key: Key,
    text: u32,
    /// The call that wrote it; if it was there in the beginning, none.
    writer: Option<usize>,
}

impl<R> Reading<R> {
    /// It was written, and is there no more.
    fn is_gone(&self, done: u128, state: &State) -> bool {
        self.writer.is_none_or(|writer| done & 1 << writer != 0)
            && state[self.key].is_none_or(|item| item.value != Value::Text(self.text))
    }
}

impl<'a> Search<'a> {
    fn new(question: &'a Question) -> Self {
        let Question { initial, calls, cut } = question;
        assert!(calls.len() <= CALLS_MAX, "{} calls are too many", calls.len());
        let mut before = vec![0u128; calls.len()];
        for (later, mask) in before.iter_mut().enumerate() {
            for earlier in 0..calls.len() {
                let (first, second) = (&calls[earlier], &calls[later]);
                let in_session =
                    earlier < later && first.client == second.client && first.op.keys() & second.op.keys() != 0;
                if first.responded < second.invoked || in_session {
                    *mask |= 1 << earlier;
                }
            }
        }
        let those = |are: &dyn Fn(&Call) -> bool| {
            let those = (0..calls.len()).filter(|at| are(&calls[*at]));
            those.fold(0u128, |mask, at| mask | 1 << at)
        };
        let keeps_before = cut.as_ref().map_or(0, |cut| cut.keeps_before);
        let mut reads = vec![];
        let writers = writers(calls);
        for (at, call) in calls.iter().enumerate() {
            readings(initial, &writers, at, call, &mut reads);
        }
        reads.retain(|reading| reading.writer != Some(reading.reader));
        let mut found = vec![];
        if let Some(cut) = cut {
            readings(initial, &writers, (), &cut.found, &mut found);
        }
        Self {
            calls,
            initial: *initial,
            cut: cut.as_ref(),
            kept: those(&|call| call.answered() && (call.durable || call.responded < keeps_before)),
            before,
            answered: those(&Call::answered),
            idle: those(&Call::changes_nothing),
            reads,
            found,
            seen: AHashSet::new(),
            hashers: [1, 2].map(|seed| RandomState::with_seeds(seed, 0, 0, 0)),
            pairs_max: PAIRS_MAX,
            best: (0, 0, State::default()),
        }
    }

    fn is_new(&mut self, done: u128, state: &State, is_cut: bool) -> bool {
        let [high, low] = [&self.hashers[0], &self.hashers[1]].map(|hasher| hasher.hash_one((done, state, is_cut)));
        self.seen.insert(u128::from(high) << 64 | u128::from(low))
    }

    /// Somebody has still to read what was there and is no more.
    fn is_too_late(&self, done: u128, state: &State, is_cut: bool) -> bool {
        let mut open = self.reads.iter().filter(|reading| done & 1 << reading.reader == 0);
        open.any(|reading| reading.is_gone(done, state))
            || !is_cut && self.found.iter().any(|reading| reading.is_gone(done, state))
    }

    /// `None`: gave up.
    fn serializable(&mut self) -> Option<bool> {
        let found = self.from(0, self.initial, self.cut.is_none());
        if !found && self.seen.len() >= self.pairs_max {
            return None;
        }
        Some(found)
    }

    /// The history may be cut here.
    fn may_be_cut(&self, done: u128, state: &State, next: &mut Vec<State>) -> bool {
        self.cut.is_some_and(|cut| {
            self.kept & !done == 0 && {
                apply(state, &cut.found, next);
                !next.is_empty()
            }
        })
    }

    fn from(&mut self, mut done: u128, state: State, is_cut: bool) -> bool {
        let mut next = vec![];
        loop {
            let before = done;
            for at in 0..self.calls.len() {
                if self.idle & 1 << at != 0 && self.may_be_next(at, done) {
                    apply(&state, &self.calls[at], &mut next);
                    if next.contains(&state) {
                        done |= 1 << at;
                    }
                }
            }
            if done == before {
                break;
            }
        }
        // Where it may be cut it should be: what comes after the cut is asked for less.
        let is_cut = is_cut || self.may_be_cut(done, &state, &mut next);
        if is_cut && done & self.answered == self.answered {
            return true;
        }
        if self.is_too_late(done, &state, is_cut)
            || self.seen.len() >= self.pairs_max
            || !self.is_new(done, &state, is_cut)
        {
            return false;
        }
        let reached = (done & self.answered).count_ones();
        if reached >= self.best.0 {
            self.best = (reached, done, state);
        }
        // What was answered first was probably done first.
        let mut candidates: Vec<usize> = (0..self.calls.len()).filter(|at| self.may_be_next(*at, done)).collect();
        candidates.sort_by_key(|at| self.calls[*at].responded);
        for at in candidates {
            apply(&state, &self.calls[at], &mut next);
            for state in std::mem::take(&mut next) {
                if self.from(done | 1 << at, state, is_cut) {
                    return true;
                }
            }
        }
        false
    }

    fn may_be_next(&self, at: usize, done: u128) -> bool {
        done & 1 << at == 0 && self.before[at] & !done == 0
    }
}

/// Who wrote which text.
fn writers(calls: &[Call]) -> HashMap<(Key, u32), usize> {
    let mut writers = HashMap::new();
    for (at, call) in calls.iter().enumerate() {
        for (key, value) in call.op.writes() {
            if let Value::Text(text) = value {
                writers.insert((key, text), at);
            }
        }
    }
    writers
}

/// The texts that a call read, of which it is known where they come from.
fn readings<R: Copy>(
    initial: &State,
    writers: &HashMap<(Key, u32), usize>,
    reader: R,
    call: &Call,
    readings: &mut Vec<Reading<R>>,
) {
    for (key, value) in call.read() {
        let Value::Text(text) = value else { continue };
        let writer = writers.get(&(key, text)).copied();
        if writer.is_some() || initial[key].is_some_and(|item| item.value == value) {
            readings.push(Reading {
                reader,
                key,
                text,
                writer,
            });
        }
    }
}

/// Looks for an order of `calls`, which stand in the order in which each client asked.
pub fn check(calls: &[Call]) -> Checked {
    check_all(Question {
        calls: calls.to_vec(),
        ..Question::default()
    })
}

/// Looks for an order that answers the question.
pub fn check_all(question: Question) -> Checked {
    match Search::new(&question).serializable() {
        Some(true) => Checked::Serializable,
        Some(false) => Checked::Not(explain(&shrink(question))),
        None => Checked::GaveUp,
    }
}

/// The answer told a version, which conditions of others may name.
fn tells_version(call: &Call) -> bool {
    let Said::Done { outcomes, .. } = &call.said else {
        return false;
    };
    outcomes.iter().any(|outcome| {
        matches!(
            outcome,
            Outcome::Found { version: Some(_), .. } | Outcome::Stored { version: Some(_) }
        )
    })
}

fn fails(question: &Question) -> bool {
    let mut search = Search::new(question);
    search.pairs_max = PAIRS_TO_SHRINK_MAX;
    search.serializable() == Some(false)
}

fn forget_answer(call: &mut Call) {
    (call.said, call.responded, call.responded_ms) = (Said::Nothing, u64::MAX, u64::MAX);
}

/// The history up to a step: what was answered later is not answered yet.
fn until(calls: &[Call], step: u64) -> Vec<Call> {
    let mut prefix: Vec<Call> = calls.iter().filter(|call| call.invoked <= step).cloned().collect();
    for call in prefix.iter_mut().filter(|call| call.responded > step) {
        forget_answer(call);
    }
    prefix
}

/// The part of a history that has no order, if the end of it is not needed.
fn beginning(question: &Question) -> Option<Question> {
    let of = |calls| Question {
        initial: question.initial,
        calls,
        cut: None,
    };
    let calls = &question.calls;
    let mut ends: Vec<u64> = calls
        .iter()
        .filter(|call| call.answered())
        .map(|call| call.responded)
        .collect();
    ends.sort_unstable();
    let mut prefixes = ends.into_iter().map(|end| of(until(calls, end)));
    prefixes.find(fails)
}

/// What was found of fewer keys, if it still cannot be.
fn shrink_found(question: &mut Question) {
    let acts = question.cut.as_ref().map_or(0, |cut| cut.found.op.success.len());
    for at in (0..acts).rev() {
        let mut fewer = question.clone();
        if let Some(Cut { found, .. }) = &mut fewer.cut
            && let Said::Done { outcomes, .. } = &mut found.said
        {
            found.op.success.remove(at);
            outcomes.remove(at);
        }
        if fails(&fewer) {
            *question = fewer;
        }
    }
}

/// Fewer calls that still have no order. Each change asks less of the order, so it cannot make a good history a bad one.
fn shrink(mut question: Question) -> Question {
    question.calls.retain(|call| call.said != Said::Refused);
    let mut question = beginning(&question).unwrap_or(question);
    shrink_found(&mut question);
    // A read that is not needed goes. An answer that is not needed goes.
    for at in (0..question.calls.len()).rev() {
        let call = &question.calls[at];
        if tells_version(call) {
            continue;
        }
        let mut fewer = question.clone();
        if call.op.only_reads() {
            fewer.calls.remove(at);
        } else {
            forget_answer(&mut fewer.calls[at]);
        }
        if fails(&fewer) {
            question = fewer;
        }
    }
    // What has no answer matters only through the keys of what has one.
    let left = &mut question.calls;
    let found = question.cut.as_ref().map_or(0, |cut| cut.found.op.keys());
    let mut keys = left
        .iter()
        .filter(|call| call.answered())
        .fold(found, |keys, call| keys | call.op.keys());
    loop {
        let more = left
            .iter()
            .filter(|call| call.op.keys() & keys != 0 && !call.op.flushes())
            .fold(keys, |keys, call| keys | call.op.keys());
        if more == keys {
            break;
        }
        keys = more;
    }
    left.retain(|call| call.op.keys() & keys != 0);
    question
}

/// What was written where this was read.
fn origin((key, value): (Key, Value)) -> (Key, Value) {
    (key, value.written())
}

fn explain(question: &Question) -> String {
    let mut search = Search::new(question);
    search.serializable();
    let (_, done, state) = search.best;
    let Question { initial, calls, cut } = question;
    let mut text =
        "no order of these calls explains their answers (client, first to last step, what it asked, what it \
                    was told; + can be put in order, - cannot):\n"
            .to_owned();
    // Of those whose answers do not matter: what was read of them.
    let answered = || calls.iter().filter(|call| call.answered());
    let found = cut.iter().map(|cut| &cut.found);
    let read: Vec<(Key, Value)> = answered().chain(found).flat_map(Call::read).map(origin).collect();
    let was_read = |call: &Call| call.op.writes().any(|written| read.contains(&written));
    let is_shown = |at: &usize| calls[*at].answered() || was_read(&calls[*at]);
    let mut shown: Vec<usize> = (0..calls.len()).filter(is_shown).collect();
    shown.sort_by_key(|at| calls[*at].invoked);
    for at in &shown {
        let mark = match (done & 1 << at != 0, calls[*at].answered()) {
            (true, _) => '+',
            (false, true) => '-',
            (false, false) => ' ',
        };
        let _ = writeln!(text, "  {mark} {}", calls[*at]);
    }
    let _ = writeln!(
        text,
        "  and {} that may be done at any time, which does not help",
        calls.len() - shown.len()
    );
    if let Some(cut) = cut {
        let keeps = match cut.keeps_before {
            0 => String::new(),
            step => format!(", not before what was answered up to step {step}"),
        };
        let _ = writeln!(
            text,
            "  and at some moment{keeps}, it was as it was found after a crash:\n    {}",
            cut.found
        );
    }
    if initial.iter().any(Option::is_some) {
        let _ = writeln!(text, "  the store in the beginning:{}", Items(initial));
    }
    let _ = writeln!(text, "  the store after those with +:{}", Items(&state));
    text
}

struct Items<'a>(&'a State);

impl Display for Items<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (key, item) in self.0.iter().enumerate() {
            if let Some(item) = item {
                write!(f, " k{key} = {}", item.value)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::{Act, Ends, Held, Must, Op, Value};
    use super::*;

    fn call(client: usize, invoked: u64, responded: u64, op: Op, outcomes: &[Outcome]) -> Call {
        Call {
            client,
            op,
            said: Said::Done {
                held: Held::All(true),
                outcomes: outcomes.to_vec(),
            },
            invoked,
            responded,
            invoked_ms: invoked,
            responded_ms: responded,
            may_be_refused: false,
            durable: false,
        }
    }

    fn put(client: usize, invoked: u64, responded: u64, values: &[(usize, u32)]) -> Call {
        let op = Op {
            success: values
                .iter()
                .map(|(key, value)| Act::Put(*key, Value::Text(*value), Ends::Never))
                .collect(),
            ..Op::default()
        };
        let stored = vec![Outcome::Stored { version: None }; values.len()];
        call(client, invoked, responded, op, &stored)
    }

    fn get(client: usize, invoked: u64, responded: u64, values: &[(usize, Option<u32>)]) -> Call {
        let op = Op {
            success: values.iter().map(|(key, _)| Act::Get(*key)).collect(),
            ..Op::default()
        };
        let outcomes: Vec<Outcome> = values.iter().map(|(_, value)| found(*value)).collect();
        call(client, invoked, responded, op, &outcomes)
    }

    fn found(value: Option<u32>) -> Outcome {
        value.map_or(Outcome::Missing, |value| Outcome::Found {
            value: Value::Text(value),
            version: None,
            ends: None,
        })
    }

    fn is_good(calls: &[Call]) -> bool {
        matches!(check(calls), Checked::Serializable)
    }

    #[test]
    fn one_key() {
        // Overlapping calls may be done in either order, others may not.
        assert!(is_good(&[
            put(0, 1, 9, &[(0, 1)]),
            get(1, 2, 3, &[(0, Some(1))]),
            get(2, 4, 5, &[(0, Some(1))])
        ]));
        assert!(is_good(&[put(0, 1, 9, &[(0, 1)]), get(1, 2, 3, &[(0, None)])]));
        assert!(!is_good(&[put(0, 1, 2, &[(0, 1)]), get(1, 3, 4, &[(0, None)])]));
        // What was seen stays.
        let calls = [
            put(0, 1, 9, &[(0, 1)]),
            get(1, 2, 3, &[(0, Some(1))]),
            get(2, 4, 5, &[(0, None)]),
        ];
        assert!(!is_good(&calls));
        // A value that nobody wrote.
        assert!(!is_good(&[get(0, 1, 2, &[(0, Some(7))])]));
    }

    #[test]
    fn several_keys_are_one_instant() {
        let write = put(0, 1, 9, &[(0, 1), (1, 1)]);
        assert!(is_good(&[write.clone(), get(1, 2, 3, &[(0, Some(1)), (1, Some(1))])]));
        assert!(!is_good(&[write.clone(), get(1, 2, 3, &[(0, Some(1)), (1, None)])]));
        // Two readers that see two writers in different orders.
        let calls = [
            put(0, 1, 9, &[(0, 1)]),
            put(1, 1, 9, &[(1, 2)]),
            get(2, 2, 3, &[(0, Some(1)), (1, None)]),
            get(3, 2, 3, &[(0, None), (1, Some(2))]),
        ];
        assert!(is_good(&calls[..3]) && !is_good(&calls));
        // Serializable, and each key linearizable, but not in real time.
        let calls = [
            get(1, 2, 9, &[(0, Some(1)), (1, None)]),
            put(0, 3, 4, &[(1, 2)]),
            put(0, 5, 6, &[(0, 1)]),
        ];
        assert!(!is_good(&calls));
    }

    #[test]
    fn conditions() {
        let claim = |client, value| {
            let op = Op {
                checks: vec![(0, Must::Absent), (1, Must::Absent)],
                success: vec![Act::Put(client, Value::Text(value), Ends::Never)],
                failure: vec![],
            };
            call(client, 1, 9, op, &[Outcome::Stored { version: None }])
        };
        // Write skew: both found both absent.
        assert!(is_good(&[claim(0, 1)]) && !is_good(&[claim(0, 1), claim(1, 2)]));
    }

    /// A COMMIT that depends on what was read before.
    #[test]
    fn checked_commits() {
        let commit = |client, held, checks: &[(Key, Must)], key: Key, value| {
            let op = Op {
                checks: checks.to_vec(),
                success: vec![Act::Put(key, Value::Text(value), Ends::Never)],
                failure: vec![],
            };
            let mut call = call(client, 5, 9, op, &[]);
            let outcomes = if held {
                vec![Outcome::Stored { version: None }]
            } else {
                vec![]
            };
            call.said = Said::Done {
                held: Held::All(held),
                outcomes,
            };
            call
        };
        let before = put(0, 1, 2, &[(0, 1), (1, 1)]);
        let (one, two) = ([(0, Must::Be(Value::Text(1)))], [(1, Must::Be(Value::Text(1)))]);
        let first = commit(1, true, &one, 1, 2);
        assert!(is_good(&[before.clone(), first.clone()]));
        // Write skew: each read what the other one wrote.
        assert!(!is_good(&[before.clone(), first.clone(), commit(2, true, &two, 0, 3)]));
        let failed = commit(2, false, &two, 0, 3);
        assert!(is_good(&[before.clone(), first.clone(), failed.clone()]));
        // It failed, and yet it wrote; it failed without a reason.
        let seen = get(3, 10, 11, &[(0, Some(3))]);
        assert!(!is_good(&[before.clone(), first, failed.clone(), seen]));
        assert!(!is_good(&[before, failed]));
    }

    #[test]
    fn without_an_answer() {
        let mut lost = put(0, 1, 2, &[(0, 1), (1, 1)]);
        forget_answer(&mut lost);
        for seen in [Some(1), None] {
            assert!(is_good(&[lost.clone(), get(1, 5, 6, &[(0, seen), (1, seen)])]));
        }
        assert!(!is_good(&[lost.clone(), get(1, 5, 6, &[(0, Some(1)), (1, None)])]));
        // Of one connection's requests for a key the later one is not done without the earlier one.
        let mut later = put(0, 3, 4, &[(0, 2)]);
        forget_answer(&mut later);
        let read = get(1, 5, 6, &[(1, None), (0, Some(2))]);
        assert!(!is_good(&[lost, later, read]));
    }

    #[test]
    fn sessions() {
        let of = |client| {
            [
                put(0, 1, 9, &[(0, 1)]),
                put(client, 1, 9, &[(0, 2)]),
                get(2, 10, 11, &[(0, Some(1))]),
            ]
        };
        assert!(is_good(&of(1)) && !is_good(&of(0)));
    }

    #[test]
    fn ends() {
        let op = Op::of(Act::Put(0, Value::Text(1), Ends::At(10)));
        let write = call(0, 1, 2, op, &[Outcome::Stored { version: None }]);
        let read = |from, to, value| get(1, from, to, &[(0, value)]);
        assert!(is_good(&[write.clone(), read(3, 9, Some(1))]) && !is_good(&[write.clone(), read(3, 9, None)]));
        assert!(is_good(&[write.clone(), read(9, 11, Some(1))]) && is_good(&[write.clone(), read(9, 11, None)]));
        assert!(!is_good(&[write.clone(), read(10, 11, Some(1))]) && is_good(&[write.clone(), read(10, 11, None)]));
        assert!(!is_good(&[
            write,
            read(8, 11, None),
            read(8, 9, Some(1)),
            read(12, 13, Some(1))
        ]));
    }

    #[test]
    fn a_counterexample_is_short() {
        let mut calls: Vec<Call> = (0..20)
            .map(|at| put(0, 10 * at, 10 * at + 5, &[(2, at as u32)]))
            .collect();
        calls.extend((0..20).map(|at| get(1, 10 * at + 6, 10 * at + 9, &[(2, Some(at as u32))])));
        calls.push(put(3, 50, 60, &[(0, 100), (1, 100)]));
        calls.push(get(4, 61, 62, &[(0, Some(100)), (1, None)]));
        let Checked::Not(text) = check(&calls) else {
            panic!("it should not be serializable")
        };
        // The write, the read, and three lines about them.
        assert_eq!(text.lines().count(), 5, "{text}");
    }
}
