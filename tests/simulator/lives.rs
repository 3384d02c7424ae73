//! A history that goes on after the server has crashed and come back.
//!
//! A *life* is what happens from one start of the server to its end. A crash breaks all connections: what was not answered
//! was done before the crash, as a whole, or never will be. The first call of the next life, before any other is made, reads
//! all keys at one instant. With what it found, each life can be judged by itself, from what the one before had left:
//!
//! - Where everything is kept, that read is one more call at the end of the life that is over. So whatever was acknowledged,
//!   and whatever somebody has read, must be there, in the one order that explains the answers as well.
//! - Where the end may be lost, there is a moment in that order at which the store was what was found: all that was done before
//!   it was kept, and nothing that was done after it, each call as a whole. The answers before the crash are explained by the
//!   whole order, those after it by what was found.
//!
//! In both cases nothing else comes back: a value that appears later was written by nobody in that life.
//!
//! Versions are not kept, but none is given twice: a client that names one which it was told in an earlier life must not change
//! what others have written since.

use super::checker::{Checked, Cut, Question, check_all};
use super::model::{Call, Key, State, Value};
use std::collections::HashMap;

/// What must be there after a life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// All of it: the server ended in order, or was told to acknowledge nothing that is not safe.
    All,
    /// What was done up to some moment.
    Prefix {
        /// It is after everything that was answered before this step; and after each call that was to be safe before its answer.
        keeps_before: u64,
    },
}

/// How a life ended.
#[derive(Clone, Debug)]
pub struct End {
    pub kept: Kept,
    /// The next life's first call: it reads all keys at one instant.
    pub found: Call,
}

/// From a start of the server to its end.
#[derive(Clone, Debug, Default)]
pub struct Life {
    /// In the order in which each client asked, without the read of what the life before had left.
    pub calls: Vec<Call>,
    /// None of the last one.
    pub end: Option<End>,
}

/// The client that reads what was left.
pub const FINDER: usize = usize::MAX;

/// Looks for an order of all calls of all lives, the first of which begins with nothing.
pub fn check_lives(lives: &[Life]) -> Checked {
    if let Some(why) = version_of_two_items(lives) {
        return Checked::Not(why);
    }
    let mut initial = State::default();
    for (number, life) in lives.iter().enumerate() {
        let mut question = Question {
            initial,
            calls: life.calls.clone(),
            cut: None,
        };
        if let Some(End { kept, found }) = &life.end {
            initial = found.found();
            let mut found = found.clone().without_versions();
            found.client = FINDER;
            match *kept {
                Kept::All => question.calls.push(found),
                Kept::Prefix { keeps_before } => question.cut = Some(Cut { keeps_before, found }),
            }
        }
        match check_all(question) {
            Checked::Serializable => {}
            Checked::Not(why) => return Checked::Not(format!("in life {}: {why}", number + 1)),
            Checked::GaveUp => return Checked::GaveUp,
        }
    }
    Checked::Serializable
}

/// Versions name one item, whenever they were told.
fn version_of_two_items(lives: &[Life]) -> Option<String> {
    let mut items: HashMap<(Key, u64), Value> = HashMap::new();
    let founds = lives.iter().filter_map(|life| life.end.as_ref()).map(|end| &end.found);
    for call in lives.iter().flat_map(|life| &life.calls).chain(founds) {
        for (key, version, value) in call.versions() {
            let known = *items.entry((key, version)).or_insert(value);
            if known != value {
                return Some(format!(
                    "version {version} of k{key} was told of {known} and of {value}\n"
                ));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::model::{Act, Ends, Held, Must, Op, Outcome, Said, apply};
    use super::super::random::Random;
    use super::*;

    fn put(client: usize, at: (u64, u64), values: &[(Key, u32)]) -> Call {
        let acts = values
            .iter()
            .map(|(key, value)| Act::Put(*key, Value::Text(*value), Ends::Never));
        let stored = vec![Outcome::Stored { version: None }; values.len()];
        call(client, at, acts.collect(), stored)
    }

    fn get(client: usize, at: (u64, u64), values: &[(Key, Option<u32>)]) -> Call {
        let acts = values.iter().map(|(key, _)| Act::Get(*key));
        let outcomes = values.iter().map(|(_, value)| seen(*value, None));
        call(client, at, acts.collect(), outcomes.collect())
    }

    fn seen(value: Option<u32>, version: Option<u64>) -> Outcome {
        value.map_or(Outcome::Missing, |value| Outcome::Found {
            value: Value::Text(value),
            version,
            ends: Some(0),
        })
    }

    fn call(client: usize, (invoked, responded): (u64, u64), success: Vec<Act>, outcomes: Vec<Outcome>) -> Call {
        Call {
            client,
            op: Op {
                success,
                ..Op::default()
            },
            said: Said::Done {
                held: Held::All(true),
                outcomes,
            },
            invoked,
            responded,
            invoked_ms: invoked,
            responded_ms: responded,
            may_be_refused: false,
            durable: false,
        }
    }

    fn unanswered(mut call: Call) -> Call {
        (call.said, call.responded, call.responded_ms) = (Said::Nothing, u64::MAX, u64::MAX);
        call
    }

    const PREFIX: Kept = Kept::Prefix { keeps_before: 0 };

    fn life(calls: &[Call], kept: Kept, found: &[Option<u32>]) -> Life {
        let values: Vec<(Key, Option<u32>)> = found.iter().copied().enumerate().collect();
        Life {
            calls: calls.to_vec(),
            end: Some(End {
                kept,
                found: get(0, (1000, 1001), &values),
            }),
        }
    }

    fn last(calls: &[Call]) -> Life {
        Life {
            calls: calls.to_vec(),
            end: None,
        }
    }

    fn is_good(lives: &[Life]) -> bool {
        matches!(check_lives(lives), Checked::Serializable)
    }

    fn why(lives: &[Life]) -> String {
        let Checked::Not(why) = check_lives(lives) else {
            panic!("there is an order")
        };
        why
    }

    #[test]
    fn an_acknowledged_write_is_there() {
        let calls = [put(0, (1, 2), &[(0, 1)]), put(0, (3, 4), &[(0, 2)])];
        let left = |kept, found| is_good(&[life(&calls, kept, &[found])]);
        assert!(left(Kept::All, Some(2)) && !left(Kept::All, Some(1)) && !left(Kept::All, None));
        // Where the end may be lost, each moment will do, but not one before what was safe.
        assert!(left(PREFIX, Some(2)) && left(PREFIX, Some(1)) && left(PREFIX, None));
        let safe = |step| Kept::Prefix { keeps_before: step };
        assert!(left(safe(2), None) && !left(safe(3), None) && left(safe(3), Some(1)) && !left(safe(5), Some(1)));
        // A value that nobody wrote.
        assert!(!left(Kept::All, Some(7)) && !left(PREFIX, Some(7)));
    }

    #[test]
    fn what_was_to_be_safe_keeps_what_was_before_it() {
        let mut calls = [
            put(0, (1, 2), &[(0, 1)]),
            put(1, (3, 4), &[(1, 2)]),
            put(0, (5, 6), &[(0, 3)]),
        ];
        let left = |calls: &[Call], found: &[Option<u32>]| is_good(&[life(calls, PREFIX, found)]);
        assert!(left(&calls, &[Some(1), None]));
        calls[1].durable = true;
        assert!(!left(&calls, &[Some(1), None]) && left(&calls, &[Some(1), Some(2)]));
        assert!(!left(&calls, &[None, Some(2)]));
        // But not if it was not acknowledged.
        calls[1] = unanswered(calls[1].clone());
        assert!(left(&calls, &[Some(1), None]));
    }

    #[test]
    fn what_was_not_answered_is_there_as_a_whole_or_not() {
        for kept in [Kept::All, PREFIX] {
            let lost = unanswered(put(0, (1, 2), &[(0, 1), (1, 1)]));
            for (found, good) in [
                ([Some(1), Some(1)], true),
                ([None, None], true),
                ([Some(1), None], false),
                ([None, Some(1)], false),
            ] {
                let lives = [life(std::slice::from_ref(&lost), kept, &found)];
                assert_eq!(is_good(&lives), good, "{kept:?} {found:?}");
            }
            // It does not come later.
            let next = last(&[get(1, (1002, 1003), &[(0, Some(1)), (1, Some(1))])]);
            assert!(!is_good(&[life(&[lost], kept, &[None, None]), next]));
        }
    }

    #[test]
    fn what_was_read_is_there() {
        let calls = [unanswered(put(0, (1, 2), &[(0, 1)])), get(1, (3, 4), &[(0, Some(1))])];
        assert!(is_good(&[life(&calls, Kept::All, &[Some(1)])]));
        assert!(!is_good(&[life(&calls, Kept::All, &[None])]));
        assert!(is_good(&[life(&calls, PREFIX, &[None])]));
    }

    /// Two keys are of one moment: what was read, or was answered before the other was asked, is not lost alone.
    #[test]
    fn a_cut_is_one_moment() {
        let calls = [put(0, (1, 2), &[(0, 1)]), put(1, (3, 4), &[(1, 2)])];
        assert!(!is_good(&[life(&calls, PREFIX, &[None, Some(2)])]));
        let at_once = [put(0, (1, 4), &[(0, 1)]), put(1, (3, 4), &[(1, 2)])];
        assert!(is_good(&[life(&at_once, PREFIX, &[None, Some(2)])]));
        // Somebody saw the other order.
        let mut seen = at_once.to_vec();
        seen.push(get(2, (3, 4), &[(0, Some(1)), (1, None)]));
        assert!(!is_good(&[life(&seen, PREFIX, &[None, Some(2)])]));
        // Half a transaction.
        let whole = [put(0, (1, 2), &[(0, 1), (1, 1)]), put(0, (3, 4), &[(0, 2), (1, 2)])];
        assert!(is_good(&[life(&whole, PREFIX, &[Some(1), Some(1)])]));
        assert!(!is_good(&[life(&whole, PREFIX, &[Some(2), Some(1)])]));
    }

    #[test]
    fn lives_go_on_from_what_was_found() {
        let before = [put(0, (1, 2), &[(0, 1)]), put(0, (3, 4), &[(0, 2)])];
        let first = life(&before, PREFIX, &[Some(1)]);
        let reads = |value| last(&[get(0, (1002, 1003), &[(0, value)])]);
        assert!(is_good(&[first.clone(), reads(Some(1))]));
        // Stale, or back from the dead.
        assert!(!is_good(&[first.clone(), reads(None)]) && !is_good(&[first.clone(), reads(Some(2))]));
        let mut second = life(&[put(0, (1002, 1003), &[(0, 3)])], PREFIX, &[Some(1)]);
        assert!(is_good(&[first.clone(), second.clone(), reads(Some(1))]));
        second.end.as_mut().unwrap().found = get(0, (1004, 1005), &[(0, None)]);
        let why = why(&[first, second]);
        assert!(
            why.starts_with("in life 2: ") && why.contains("the store in the beginning: k0 = v1"),
            "{why}"
        );
    }

    #[test]
    fn versions_are_given_once() {
        let told = |at, value, version| call(0, at, vec![Act::Get(0)], vec![seen(Some(value), Some(version))]);
        let mut first = life(&[put(0, (1, 2), &[(0, 1)]), told((3, 4), 1, 50)], Kept::All, &[Some(1)]);
        // After a restart the item has another version, which the read of what was left told.
        first.end.as_mut().unwrap().found = told((1000, 1001), 1, 90);
        let swap = |version, held: bool| {
            let mut swap = put(0, (1002, 1003), &[(0, 2)]);
            swap.op.checks = vec![(0, Must::Version(version))];
            if !held {
                swap.said = Said::Done {
                    held: Held::All(false),
                    outcomes: vec![],
                };
            }
            last(&[swap])
        };
        assert!(is_good(&[first.clone(), swap(90, true)]) && is_good(&[first.clone(), swap(50, false)]));
        assert!(!is_good(&[first.clone(), swap(50, true)]) && !is_good(&[first.clone(), swap(90, false)]));
        // Another item with a version that was told before.
        let again = last(&[put(0, (1002, 1003), &[(0, 2)]), told((1004, 1005), 2, 50)]);
        assert!(why(&[first, again]).contains("version 50 of k0 was told of v1 and of v2"));
    }

    #[test]
    fn items_end_between_lives() {
        let op = vec![Act::Put(0, Value::Text(1), Ends::At(500))];
        let write = call(0, (1, 2), op, vec![Outcome::Stored { version: None }]);
        for kept in [Kept::All, PREFIX] {
            // What was read at 1000 ms.
            assert!(is_good(&[life(std::slice::from_ref(&write), kept, &[None])]));
            assert!(!is_good(&[life(std::slice::from_ref(&write), kept, &[Some(1)])]));
        }
    }

    #[test]
    fn a_counterexample_is_short() {
        let mut calls: Vec<Call> = (0..20)
            .map(|at| put(0, (10 * at, 10 * at + 5), &[(2, at as u32)]))
            .collect();
        calls.push(put(3, (50, 60), &[(0, 100), (1, 100)]));
        for kept in [Kept::All, PREFIX] {
            let why = why(&[life(&calls, kept, &[Some(100), None, Some(19)])]);
            assert!(
                why.contains("k0 = v100, k1 = v100") && why.lines().count() <= 7,
                "{why}"
            );
        }
        let why = why(&[life(&calls, PREFIX, &[Some(100), None, Some(19)])]);
        assert!(
            why.contains("as it was found after a crash") && !why.contains("get k2"),
            "{why}"
        );
    }

    // ---- histories by chance ----

    /// What a client has under way: when it is done, if it is, and answered.
    struct Open {
        call: usize,
        done_at: u64,
        answered_at: u64,
    }

    /// A life of a store that works: several clients with pipelines, cut off in the middle.
    fn live(random: &mut Random, texts: &mut u32, mut state: State, began: u64, kept: Kept) -> (Life, State) {
        let (keys, clients, depth) = (random.between(2, 4), random.between(3, 6), random.between(1, 3));
        let ends = began + random.between(20, 120) as u64;
        let cut = match kept {
            Kept::All => ends,
            Kept::Prefix { .. } => random.between(began as usize, ends as usize) as u64,
        };
        let (mut calls, mut open): (Vec<Call>, Vec<Open>) = (vec![], vec![]);
        let mut left = state;
        for step in began + 1..ends {
            let client = random.below(clients);
            let asked = open.iter().filter(|open| calls[open.call].client == client).count();
            if asked < depth && calls.len() < 70 {
                let op = op(random, texts, keys);
                let mut call = unanswered(call(client, (step, 0), vec![], vec![]));
                call.op = op;
                // A connection's calls are done in order.
                let earlier = open.iter().filter(|open| calls[open.call].client == client);
                let (done, answered) = earlier.fold((step, step), |(done, answered), open| {
                    (done.max(open.done_at), answered.max(open.answered_at))
                });
                let done_at = done + random.below(20) as u64;
                open.push(Open {
                    call: calls.len(),
                    done_at,
                    answered_at: done_at.max(answered) + random.below(20) as u64,
                });
                calls.push(call);
            }
            for open in &open {
                if open.done_at == step {
                    let call = &mut calls[open.call];
                    call.said = perform(&mut state, call);
                }
                let call = &mut calls[open.call];
                if open.answered_at == step {
                    (call.responded, call.responded_ms) = (step, step);
                }
            }
            open.retain(|open| open.answered_at > step);
            if step == cut {
                left = state;
            }
        }
        if kept == Kept::All {
            left = state;
        }
        for open in open {
            calls[open.call] = unanswered(calls[open.call].clone());
        }
        calls.retain(|call| call.answered() || !call.op.only_reads());
        let found: Vec<(Key, Option<u32>)> = left
            .iter()
            .enumerate()
            .map(|(key, item)| {
                let text = item.map(|item| match item.value {
                    Value::Text(text) => text,
                    Value::Number(_) => unreachable!("only texts are written"),
                });
                (key, text)
            })
            .collect();
        let end = End {
            kept,
            found: get(0, (ends + 1, ends + 2), &found),
        };
        (Life { calls, end: Some(end) }, left)
    }

    fn op(random: &mut Random, texts: &mut u32, keys: usize) -> Op {
        let mut list: Vec<Key> = (0..keys).collect();
        random.shuffle(&mut list);
        list.truncate(random.between(1, keys));
        *texts += 1;
        let text = Value::Text(*texts);
        let acts = |act: &dyn Fn(Key) -> Act| list.iter().map(|key| act(*key)).collect();
        let checks = if random.chance(30) {
            vec![(list[0], Must::Absent)]
        } else {
            vec![]
        };
        match random.below(10) {
            0..4 => Op {
                success: acts(&Act::Get),
                ..Op::default()
            },
            4..9 => Op {
                success: acts(&|key| Act::Put(key, text, Ends::Never)),
                checks,
                failure: vec![],
            },
            _ => Op {
                success: acts(&Act::Delete),
                ..Op::default()
            },
        }
    }

    /// Does a call, and says what a store that works would have said.
    fn perform(state: &mut State, call: &Call) -> Said {
        let held = call.op.checks.iter().all(|(key, _)| state[*key].is_none());
        let outcomes = match (held, &call.op.success[..]) {
            (false, _) => vec![],
            (true, acts) => acts
                .iter()
                .map(|act| match act {
                    Act::Get(key) => state[*key].map_or(Outcome::Missing, |item| Outcome::Found {
                        value: item.value,
                        version: None,
                        ends: Some(0),
                    }),
                    Act::Put(..) => Outcome::Stored { version: None },
                    _ => Outcome::Gone,
                })
                .collect(),
        };
        let said = Said::Done {
            held: Held::All(held),
            outcomes,
        };
        let mut next = vec![];
        let done = Call {
            said: said.clone(),
            ..call.clone()
        };
        apply(state, &done, &mut next);
        assert_eq!(next.len(), 1, "{done}");
        *state = next[0];
        said
    }

    fn lives(seed: u64, kept: Kept) -> Vec<Life> {
        let mut random = Random::new(seed);
        let (mut texts, mut state, mut began) = (0, State::default(), 0);
        let mut lives = vec![];
        for _ in 0..random.between(1, 4) {
            let (life, left) = live(&mut random, &mut texts, state, began, kept);
            (state, began) = (left, began + 1000);
            lives.push(life);
        }
        lives
    }

    const SEEDS: u64 = 300;

    /// What a store that works leaves is good, however many calls were under way, and however much was lost.
    #[test]
    fn good_histories_are_good() {
        let mut unanswered = 0;
        for seed in 1..=SEEDS {
            for kept in [Kept::All, PREFIX] {
                let lives = lives(seed, kept);
                let calls = lives.iter().flat_map(|life| &life.calls);
                unanswered += calls.filter(|call| !call.answered()).count() as u64;
                let checked = check_lives(&lives);
                assert!(matches!(checked, Checked::Serializable), "{seed} {kept:?}: {checked:?}");
            }
        }
        assert!(unanswered > 5 * SEEDS, "{unanswered} are few");
    }

    /// In how many seeds one key of what was found could be set to a value that it cannot have had, all of which were caught.
    fn caught(kept: Kept, change: fn(&[Call], &State, Key) -> Option<Option<u32>>) -> u64 {
        let mut made = 0;
        for seed in 1..=40 {
            let mut lives = lives(seed, kept);
            let life = &mut lives[0];
            let end = life.end.as_mut().unwrap();
            let found = end.found.found();
            let keys = 0..found.len();
            let changed = keys
                .clone()
                .find_map(|key| Some((key, change(&life.calls, &found, key)?)));
            let Some((key, value)) = changed else { continue };
            let Said::Done { outcomes, .. } = &mut end.found.said else {
                unreachable!("it was answered")
            };
            outcomes[key] = seen(value, None);
            lives.truncate(1);
            made += 1;
            let checked = check_lives(&lives);
            assert!(matches!(checked, Checked::Not(_)), "{seed} {kept:?}: {checked:?}");
        }
        made
    }

    fn written_to(calls: &[Call], key: Key, text: u32) -> Option<&Call> {
        calls
            .iter()
            .find(|call| call.op.writes().any(|written| written == (key, Value::Text(text))))
    }

    fn text(found: &State, key: Key) -> Option<u32> {
        match found[key]?.value {
            Value::Text(text) => Some(text),
            Value::Number(_) => None,
        }
    }

    #[test]
    fn a_lost_write_is_caught() {
        // An acknowledged one, after which nobody deleted anything.
        let made = caught(Kept::All, |calls, found, key| {
            let deletes = |call: &Call| call.op.success.iter().any(|act| matches!(act, Act::Delete(_)));
            let lost = text(found, key)?;
            let writer = written_to(calls, key, lost)?;
            let may_delete = calls
                .iter()
                .any(|call| deletes(call) && call.responded > writer.invoked);
            (writer.answered() && !may_delete).then_some(None)
        });
        assert!(made >= 5, "{made}");
    }

    #[test]
    fn half_a_transaction_is_caught() {
        for kept in [Kept::All, PREFIX] {
            // One of two keys has what another call wrote that was answered before this one was asked.
            let made = caught(kept, |calls, found, key| {
                let new = text(found, key)?;
                let writer = written_to(calls, key, new)?;
                let both = (0..key).any(|other| text(found, other) == Some(new));
                let older = calls.iter().filter(|call| call.responded < writer.invoked);
                let mut values = older.flat_map(|call| call.op.writes().map(move |(at, value)| (call, at, value)));
                let old = values.find_map(|(call, at, value)| match value {
                    Value::Text(text) if at == key && matches!(call.said, Said::Done { .. }) => Some(text),
                    _ => None,
                });
                both.then_some(Some(old?))
            });
            assert!(made >= 5, "{kept:?}: {made}");
        }
    }
}
