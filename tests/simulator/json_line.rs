//! A client of the JSON-line protocol: what it asks, as lines; and what it is told, from answers.
//!
//! In the history a transaction is its reads, each a call by itself, and its COMMIT: a call that writes all it wrote, and,
//! if it is checked, only if what it read is still there. What is never committed writes nothing.

use super::client::{Answer, Common, Draft};
use super::model::{Act, Ends, Held, Key, Must, Op, Outcome, Said, Value};
use std::collections::BTreeMap;

/// What a line asks, and so how its answer is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    Put,
    Get,
    Delete,
    Start {
        checked: bool,
    },
    /// A write of a transaction.
    Keep,
    /// A read of what the transaction wrote itself.
    GetOwn(Option<Value>),
    /// Another read of a transaction.
    GetInside(Key),
    Commit,
    Rollback,
    /// It is answered with an Error and changes nothing.
    Wrong,
}

impl Line {
    fn is_inside(self) -> bool {
        matches!(self, Line::Keep | Line::GetOwn(_) | Line::GetInside(_))
    }
}

/// A transaction as its answers tell it.
#[derive(Debug, Default)]
struct Told {
    /// What its COMMIT depends on: what a key held when it was first read.
    checks: Option<BTreeMap<Key, Must>>,
    /// It was said that it can only be rolled back.
    doomed: bool,
    /// A read was refused, or not answered: what it depends on is not known.
    unsure: bool,
}

/// Where a client stands.
#[derive(Debug, Default)]
pub struct Talk {
    /// What the transaction writes that it has asked for last, if that is open.
    writes: Option<BTreeMap<Key, Option<Value>>>,
    told: Told,
}

fn draft(text: String, line: Line, op: Option<Op>) -> Draft {
    let mut draft = Draft::new(format!("{text}\n").into_bytes(), Op::default(), Answer::Line(line));
    draft.ops = op.into_iter().collect();
    draft
}

impl Talk {
    /// Makes up a line.
    pub fn ask(&mut self, common: &mut Common) -> Draft {
        let key = common.key();
        if common.random.chance(3) {
            return self.wrong(common);
        }
        let Some(writes) = &mut self.writes else {
            if common.random.chance(40) {
                return self.start(common);
            }
            return match common.random.below(100) {
                0..50 => get(common, key),
                50..85 => {
                    let value = common.plain_value();
                    let op = Op::of(Act::Put(key, value, Ends::Never));
                    draft(put_line(common, key, value), Line::Put, Some(op))
                }
                _ => {
                    let text = format!("DEL {}", name(common, key));
                    draft(text, Line::Delete, Some(Op::of(Act::Delete(key))))
                }
            };
        };
        match common.random.below(100) {
            0..35 => match writes.get(&key) {
                Some(own) => draft(format!("get {}", name(common, key)), Line::GetOwn(*own), None),
                None => {
                    let text = format!("GET {}", name(common, key));
                    draft(text, Line::GetInside(key), Some(Op::of(Act::Get(key))))
                }
            },
            35..65 => {
                let value = common.plain_value();
                writes.insert(key, Some(value));
                draft(put_line(common, key, value), Line::Keep, None)
            }
            65..72 => {
                writes.insert(key, None);
                draft(format!("DEL {}", name(common, key)), Line::Keep, None)
            }
            72..80 => {
                self.writes = None;
                draft("ROLLBACK".to_owned(), Line::Rollback, None)
            }
            _ => {
                let acts = writes.iter().map(|(key, value)| match value {
                    Some(value) => Act::Put(*key, *value, Ends::Never),
                    None => Act::Delete(*key),
                });
                let op = Op {
                    success: acts.collect(),
                    ..Op::default()
                };
                self.writes = None;
                draft("COMMIT".to_owned(), Line::Commit, Some(op))
            }
        }
    }

    fn start(&mut self, common: &mut Common) -> Draft {
        self.writes = Some(BTreeMap::new());
        let checked = common.random.chance(70);
        let text = if checked { "START CHECKED" } else { "START" };
        draft(text.to_owned(), Line::Start { checked }, None)
    }

    fn wrong(&self, common: &mut Common) -> Draft {
        let of_state: &[&str] = match self.writes {
            Some(_) => &["START", "START CHECKED"],
            None => &["COMMIT", "ROLLBACK"],
        };
        let line = match common.random.chance(50) {
            true => common.random.pick(of_state),
            false => common
                .random
                .pick(&["PUT", "PUT k", "GET", "GET k 1", "COMMIT now", "FETCH k", "START now"]),
        };
        draft(line.to_owned(), Line::Wrong, None)
    }

    /// What the answer to `line` says. It also completes what a COMMIT asked.
    pub fn understand(&mut self, line: Line, ops: &mut [Op], answer: &str, common: &Common) -> Vec<Said> {
        let result = result_of(answer);
        if let Err(mesg) = &result
            && let Some(may_be_done) = not_safe(mesg)
        {
            assert!(common.habits.failing, "{mesg}");
            match line {
                Line::Commit => self.check(&mut ops[0]),
                Line::GetInside(_) => self.told.unsure = true,
                _ => {}
            }
            let said = |op: &Op| match may_be_done && !op.only_reads() {
                true => Said::Nothing,
                false => Said::Refused,
            };
            return ops.iter().map(said).collect();
        }
        if line.is_inside()
            && let Err(mesg) = &result
            && mesg.contains(": roll ")
        {
            assert!(common.habits.limited, "{mesg}");
            self.told.doomed = true;
        }
        if line.is_inside() && self.told.doomed {
            assert!(
                result.is_err(),
                "{line:?} of a transaction that cannot be committed: {answer}"
            );
            return ops.iter().map(|_| Said::Refused).collect();
        }
        match (line, result) {
            (Line::Wrong, Err(_)) => vec![],
            (Line::Rollback | Line::Keep, Ok(None)) => vec![],
            (Line::Start { checked }, Ok(None)) => {
                self.told = Told {
                    checks: checked.then(BTreeMap::new),
                    ..Told::default()
                };
                vec![]
            }
            (Line::GetOwn(own), result) => {
                assert_eq!(value_of(result, common), Some(own), "its own write");
                vec![]
            }
            (Line::Put, Ok(None)) => done(Held::All(true), vec![Outcome::Stored { version: None }]),
            (Line::Delete, Ok(None)) => done(Held::All(true), vec![Outcome::Gone]),
            (Line::Get | Line::GetInside(_), result) => {
                let Some(value) = value_of(result, common) else {
                    self.told.unsure |= line != Line::Get;
                    return vec![Said::Refused];
                };
                if let (Line::GetInside(key), Some(checks)) = (line, &mut self.told.checks) {
                    checks.entry(key).or_insert(value.map_or(Must::Absent, Must::Be));
                }
                done(Held::All(true), vec![value.map_or(Outcome::Missing, Outcome::plain)])
            }
            (Line::Commit, result) => {
                let op = &mut ops[0];
                self.check(op);
                assert!(!self.told.doomed || result.is_err(), "it could not be committed");
                match result {
                    Ok(None) => done(Held::All(true), op.success.iter().map(written).collect()),
                    // Without memory for a version nobody knows whether a key has changed.
                    Err(mesg) if mesg.contains("has changed") && !common.habits.tight && !self.told.unsure => {
                        assert!(self.told.checks.is_some(), "it was not checked: {mesg}");
                        done(Held::All(false), vec![])
                    }
                    Err(mesg) => {
                        assert!(common.habits.limited || self.told.unsure, "{mesg}");
                        vec![Said::Refused]
                    }
                    Ok(Some(value)) => panic!("COMMIT was answered with {value}"),
                }
            }
            (Line::Put, Err(mesg)) => {
                assert!(common.habits.tight, "{mesg}");
                vec![Said::Refused]
            }
            (line, result) => panic!("{line:?} was answered with {result:?}"),
        }
    }

    /// A COMMIT depends on what was read.
    fn check(&self, op: &mut Op) {
        op.checks = self
            .told
            .checks
            .iter()
            .flatten()
            .map(|(key, must)| (*key, *must))
            .collect();
    }

    /// A line will not be answered. Completes what a COMMIT asked, as far as that is known; false when it may also fail
    /// for reasons that are not known.
    pub fn leave(&mut self, line: Line, ops: &mut [Op], common: &Common) -> bool {
        match line {
            Line::Start { checked } => {
                self.told = Told {
                    checks: checked.then(BTreeMap::new),
                    ..Told::default()
                };
            }
            Line::GetInside(_) => self.told.unsure |= self.told.checks.is_some(),
            Line::Commit => {
                self.check(&mut ops[0]);
                return !self.told.unsure && !common.habits.limited;
            }
            _ => {}
        }
        true
    }
}

impl Outcome {
    /// A value without what this protocol does not tell.
    fn plain(value: Value) -> Self {
        Outcome::Found {
            value,
            version: None,
            ends: None,
        }
    }
}

fn written(act: &Act) -> Outcome {
    match act {
        Act::Put(..) => Outcome::Stored { version: None },
        _ => Outcome::Gone,
    }
}

fn done(held: Held, outcomes: Vec<Outcome>) -> Vec<Said> {
    vec![Said::Done { held, outcomes }]
}

/// What an answer carries, or why it is no.
fn result_of(answer: &str) -> Result<Option<&str>, &str> {
    let inside = |prefix| {
        answer
            .strip_prefix(prefix)
            .and_then(|rest: &str| rest.strip_suffix("\"}"))
    };
    if answer == "{\"status\": \"Ok\"}" {
        Ok(None)
    } else if let Some(value) = inside("{\"status\": \"Ok\", \"result\": \"") {
        Ok(Some(value))
    } else if let Some(mesg) = inside("{\"status\": \"Error\", \"mesg\": \"") {
        Err(mesg)
    } else {
        panic!("no answer of this protocol: {answer}")
    }
}

/// What a read has found; `None` when it was refused.
fn value_of(result: Result<Option<&str>, &str>, common: &Common) -> Option<Option<Value>> {
    match result {
        // Values that are written here need no escapes.
        Ok(Some(text)) => Some(Some(common.recognize_plain(text.as_bytes()))),
        Ok(None) => panic!("a read without a value"),
        Err("there is no such key") => Some(None),
        Err(mesg) => {
            assert!(common.habits.tight, "{mesg}");
            None
        }
    }
}

/// The server says that it cannot make something safe, or that it takes no writes any more; true: it may have done it.
fn not_safe(mesg: &str) -> Option<bool> {
    match mesg {
        _ if mesg.starts_with("not durable") => Some(true),
        _ if mesg.contains("read-only") => Some(false),
        _ => None,
    }
}

fn name(common: &Common, key: Key) -> String {
    String::from_utf8(common.keys[key].clone()).expect("a printable key")
}

fn put_line(common: &Common, key: Key, value: Value) -> String {
    let (bytes, _) = common.bytes(value);
    let text = String::from_utf8(bytes).expect("a printable value");
    format!("PUT {} {text}", name(common, key))
}

/// A read outside a transaction.
pub fn get(common: &Common, key: Key) -> Draft {
    draft(
        format!("GET {}", name(common, key)),
        Line::Get,
        Some(Op::of(Act::Get(key))),
    )
}
