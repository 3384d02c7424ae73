//! Is there an order of the calls, each at one instant between its request and its answer, in which a single map would have
//! said the same? For requests about several keys that is strict serializability, for each key alone linearizability.
//!
//! The search is the one of Wing and Gong with the memory of Lowe: from a set of calls that are done and the state they
//! leave, any call may be next that did not begin after another, which is not done, had ended; a pair of such a set and such
//! a state is visited once. What changes nothing, whenever it is done, is done as soon as it agrees with the state. And no
//! two writes write the same text, so what somebody has still to read must not be written already and gone.
//!
//! Beyond that, calls of one connection that share a key are done in the order in which they were asked.

use super::model::{Call, Key, Outcome, Said, State, Value, apply};
use ahash::{AHashSet, RandomState};
use std::collections::HashMap;
use std::fmt::Write;

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

struct Search<'a> {
    calls: &'a [Call],
    /// For each call, those that must be done before.
    before: Vec<u128>,
    /// Those that were answered: they must be done.
    answered: u128,
    /// Those of them that change nothing, whenever they are done.
    idle: u128,
    /// What is read from the store: by which call, at which key, which text, and the call that wrote it.
    reads: Vec<(usize, Key, u32, usize)>,
    /// Fingerprints of the pairs that were visited.
    seen: AHashSet<u128>,
    hashers: [RandomState; 2],
    pairs_max: usize,
    /// The most answered calls that were put in order, with what was done and what it left.
    best: (u32, u128, State),
}

impl<'a> Search<'a> {
    fn new(calls: &'a [Call]) -> Self {
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
        let those = |are: fn(&Call) -> bool| {
            let those = (0..calls.len()).filter(|at| are(&calls[*at]));
            those.fold(0u128, |mask, at| mask | 1 << at)
        };
        Self {
            calls,
            before,
            answered: those(Call::answered),
            idle: those(Call::changes_nothing),
            reads: reads(calls),
            seen: AHashSet::new(),
            hashers: [1, 2].map(|seed| RandomState::with_seeds(seed, 0, 0, 0)),
            pairs_max: PAIRS_MAX,
            best: (0, 0, State::default()),
        }
    }

    fn is_new(&mut self, done: u128, state: &State) -> bool {
        let [high, low] = [&self.hashers[0], &self.hashers[1]].map(|hasher| hasher.hash_one((done, state)));
        self.seen.insert(u128::from(high) << 64 | u128::from(low))
    }

    /// Somebody has still to read what was there and is no more.
    fn is_too_late(&self, done: u128, state: &State) -> bool {
        self.reads.iter().any(|(reader, key, text, writer)| {
            done & 1 << reader == 0
                && done & 1 << writer != 0
                && state[*key].is_none_or(|item| item.value != Value::Text(*text))
        })
    }

    /// `None`: gave up.
    fn serializable(&mut self) -> Option<bool> {
        let found = self.from(0, State::default());
        if !found && self.seen.len() >= self.pairs_max {
            return None;
        }
        Some(found)
    }

    fn from(&mut self, mut done: u128, state: State) -> bool {
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
        if done & self.answered == self.answered {
            return true;
        }
        if self.is_too_late(done, &state) || self.seen.len() >= self.pairs_max || !self.is_new(done, &state) {
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
                if self.from(done | 1 << at, state) {
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

fn reads(calls: &[Call]) -> Vec<(usize, Key, u32, usize)> {
    let mut writers = HashMap::new();
    for (at, call) in calls.iter().enumerate() {
        for (key, value) in call.op.writes() {
            if let Value::Text(text) = value {
                writers.insert((key, text), at);
            }
        }
    }
    let mut reads = vec![];
    for (at, call) in calls.iter().enumerate() {
        for (key, value) in call.read() {
            if let Value::Text(text) = value
                && let Some(writer) = writers.get(&(key, text)).filter(|writer| **writer != at)
            {
                reads.push((at, key, text, *writer));
            }
        }
    }
    reads
}

/// Looks for an order of `calls`, which stand in the order in which each client asked.
pub fn check(calls: &[Call]) -> Checked {
    match Search::new(calls).serializable() {
        Some(true) => Checked::Serializable,
        Some(false) => Checked::Not(explain(&shrink(calls))),
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

fn fails(calls: &[Call]) -> bool {
    let mut search = Search::new(calls);
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

/// Fewer calls that still have no order. Each change asks less of the order, so it cannot make a good history a bad one.
fn shrink(calls: &[Call]) -> Vec<Call> {
    let calls: Vec<Call> = calls
        .iter()
        .filter(|call| call.said != Said::Refused)
        .cloned()
        .collect();
    let mut ends: Vec<u64> = calls
        .iter()
        .filter(|call| call.answered())
        .map(|call| call.responded)
        .collect();
    ends.sort_unstable();
    let first = ends.into_iter().find(|end| fails(&until(&calls, *end)));
    let mut left = first.map_or_else(|| calls.clone(), |end| until(&calls, end));
    // A read that is not needed goes. An answer that is not needed goes.
    for at in (0..left.len()).rev() {
        if tells_version(&left[at]) {
            continue;
        }
        let mut fewer = left.clone();
        if left[at].op.only_reads() {
            fewer.remove(at);
        } else {
            forget_answer(&mut fewer[at]);
        }
        if fails(&fewer) {
            left = fewer;
        }
    }
    // What has no answer matters only through the keys of what has one.
    let mut keys = left
        .iter()
        .filter(|call| call.answered())
        .fold(0, |keys, call| keys | call.op.keys());
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
    left
}

/// What was written where this was read.
fn origin((key, value): (Key, Value)) -> (Key, Value) {
    (key, value.written())
}

fn explain(calls: &[Call]) -> String {
    let mut search = Search::new(calls);
    search.serializable();
    let (_, done, state) = search.best;
    let mut text =
        "no order of these calls explains their answers (client, first to last step, what it asked, what it \
                    was told; + can be put in order, - cannot):\n"
            .to_owned();
    // Of those whose answers do not matter: what was read of them.
    let answered = || calls.iter().filter(|call| call.answered());
    let read: Vec<(Key, Value)> = answered().flat_map(Call::read).map(origin).collect();
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
    let _ = write!(text, "  the store after those with +:");
    for (key, item) in state.iter().enumerate() {
        if let Some(item) = item {
            let _ = write!(text, " k{key} = {}", item.value);
        }
    }
    text.push('\n');
    text
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
