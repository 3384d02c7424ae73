//! What clients ask, what they are told, and what a single map that does one thing after the other would have said.

use std::fmt::{self, Display, Formatter};

pub const KEYS_MAX: usize = 8;

/// Numbers that are written are multiples of this, and counting goes on from there.
pub const NUMBERS_APART: u64 = 1_000_000;

/// A key, by its number in the seed's list of keys.
pub type Key = usize;

/// A value that says who wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Value {
    /// The text with this number; no two writes share one.
    Text(u32),
    /// A number that can be counted on.
    Number(u64),
}

/// When an item ends, as its writer asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    Never,
    At(u64),
    /// So many milliseconds after the server understood the request.
    In(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Item {
    pub value: Value,
    /// The earliest and the latest moment at which it may end: the client does not know when the server read the clock.
    pub ends: Option<(u64, u64)>,
    /// 0: nobody has seen one.
    pub version: u64,
}

/// The whole store.
pub type State = [Option<Item>; KEYS_MAX];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Must {
    Always,
    Absent,
    Present,
    Version(u64),
    /// With this value. No two writes write the same one, so nothing was written in between.
    Be(Value),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Act {
    Get(Key),
    Put(Key, Value, Ends),
    Delete(Key),
    Add(Key, u64),
    Flush,
}

/// One request: at one instant, all checks are made, and the acts for success or those for failure are done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Op {
    pub checks: Vec<(Key, Must)>,
    pub success: Vec<Act>,
    pub failure: Vec<Act>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Whether all checks held.
    All(bool),
    /// Which of them did.
    Each(Vec<bool>),
}

impl Held {
    fn all(&self) -> bool {
        match self {
            Held::All(held) => *held,
            Held::Each(held) => held.iter().all(|held| *held),
        }
    }
}

/// What came of an act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Found {
        value: Value,
        version: Option<u64>,
        /// When it ends, if the protocol tells; 0: never.
        ends: Option<u64>,
    },
    Missing,
    Stored {
        version: Option<u64>,
    },
    Deleted,
    /// Deleted, or missing anyhow.
    Gone,
    Counted(u64),
    NotANumber,
    Flushed,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// None came: it was done, or will be, or was not and never will be.
    Nothing,
    /// It was refused for lack of room: nothing was done.
    Refused,
    Done {
        held: Held,
        outcomes: Vec<Outcome>,
    },
}

/// One request of a history.
#[derive(Clone, Debug)]
pub struct Call {
    pub client: usize,
    pub op: Op,
    pub said: Said,
    /// Steps of the simulation: not before `invoked` it was done, and before `responded`, if it was answered.
    pub invoked: u64,
    pub responded: u64,
    /// The same moments on the clock of the cores.
    pub invoked_ms: u64,
    pub responded_ms: u64,
    /// If it was not answered, it may have been refused: for lack of room, or for a reason that only its answer tells.
    pub may_be_refused: bool,
    /// It was to be safe before it was answered.
    pub durable: bool,
}

impl Call {
    /// Nobody asked for anything.
    pub fn nothing() -> Self {
        Self {
            client: usize::MAX,
            op: Op::default(),
            said: Said::Nothing,
            invoked: u64::MAX,
            responded: u64::MAX,
            invoked_ms: u64::MAX,
            responded_ms: u64::MAX,
            may_be_refused: false,
            durable: false,
        }
    }

    pub fn answered(&self) -> bool {
        self.responded != u64::MAX
    }
}

impl Call {
    /// The acts that were done, each with what came of it, if that is known.
    fn told(&self) -> impl Iterator<Item = (&Act, &Outcome)> {
        let (held, outcomes): (_, &[Outcome]) = match &self.said {
            Said::Done { held, outcomes } => (held.all(), outcomes),
            _ => (true, &[]),
        };
        let acts = if held { &self.op.success } else { &self.op.failure };
        acts.iter().zip(outcomes)
    }

    /// It was answered so that it changes nothing, whenever it was done.
    pub fn changes_nothing(&self) -> bool {
        self.said != Said::Nothing
            && self.told().all(|(_, outcome)| match outcome {
                Outcome::Missing | Outcome::NotANumber => true,
                // A version may be the first that was given to this item; but a text is always the same item.
                Outcome::Found { value, version, .. } => version.is_none() || matches!(value, Value::Text(_)),
                _ => false,
            })
    }

    /// The versions that it was told, of which keys with which values.
    pub fn versions(&self) -> impl Iterator<Item = (Key, u64, Value)> {
        self.told().filter_map(|(act, outcome)| match (act, outcome) {
            (Act::Put(key, value, _), Outcome::Stored { version }) => Some((*key, (*version)?, *value)),
            (Act::Get(key), Outcome::Found { value, version, .. }) => Some((*key, (*version)?, *value)),
            _ => None,
        })
    }

    /// What was there when it read, of the keys that it read.
    pub fn found(&self) -> State {
        let mut state = State::default();
        for (act, outcome) in self.told() {
            if let (Act::Get(key), Outcome::Found { value, version, ends }) = (act, outcome) {
                state[*key] = Some(Item {
                    value: *value,
                    ends: ends.filter(|ends| *ends > 0).map(|ends| (ends, ends)),
                    version: version.unwrap_or(0),
                });
            }
        }
        state
    }

    /// The same, but what versions it was told.
    pub fn without_versions(mut self) -> Self {
        if let Said::Done { outcomes, .. } = &mut self.said {
            for outcome in outcomes {
                if let Outcome::Found { version, .. } | Outcome::Stored { version } = outcome {
                    *version = None;
                }
            }
        }
        self
    }

    /// It is the COMMIT of a transaction that has read something.
    pub fn depends_on_values(&self) -> bool {
        self.op.checks.iter().any(|(_, must)| matches!(must, Must::Be(_)))
    }

    /// The values that it was told, of keys that have them, or that must have been there when it was done.
    pub fn read(&self) -> impl Iterator<Item = (Key, Value)> {
        let held = matches!(&self.said, Said::Done { held, .. } if held.all());
        let told = self.told().filter_map(|(act, outcome)| match outcome {
            Outcome::Found { value, .. } => Some((act.key()?, *value)),
            _ => None,
        });
        let checked = self.op.checks.iter().filter_map(move |(key, must)| match must {
            Must::Be(value) if held => Some((*key, *value)),
            _ => None,
        });
        told.chain(checked)
    }
}

impl Act {
    pub fn key(&self) -> Option<Key> {
        match self {
            Act::Get(key) | Act::Put(key, ..) | Act::Delete(key) | Act::Add(key, _) => Some(*key),
            Act::Flush => None,
        }
    }
}

impl Op {
    pub fn of(act: Act) -> Self {
        Self {
            success: vec![act],
            ..Self::default()
        }
    }

    fn acts(&self) -> impl Iterator<Item = &Act> {
        self.success.iter().chain(&self.failure)
    }

    pub fn flushes(&self) -> bool {
        self.acts().any(|act| *act == Act::Flush)
    }

    pub fn only_reads(&self) -> bool {
        self.acts().all(|act| matches!(act, Act::Get(_)))
    }

    /// What it may write.
    pub fn writes(&self) -> impl Iterator<Item = (Key, Value)> {
        self.acts().filter_map(|act| match act {
            Act::Put(key, value, _) => Some((*key, *value)),
            _ => None,
        })
    }

    /// A bit for each key that it is about.
    pub fn keys(&self) -> u8 {
        if self.flushes() {
            return u8::MAX;
        }
        let acts = self.acts().filter_map(Act::key);
        let checks = self.checks.iter().map(|(key, _)| *key);
        acts.chain(checks).fold(0, |keys, key| keys | 1 << key)
    }
}

/// Every state that the store may be in after `call`, if it was done in `state` and answered as it was. Only the end of
/// items leaves a choice. It is a fixed moment, which the clients do not know exactly, and each command finds out by the
/// clock of its core, at some moment while the call was under way, whether its item is over.
pub fn apply(state: &State, call: &Call, next: &mut Vec<State>) {
    next.clear();
    let op = &call.op;
    let (said_held, outcomes) = match &call.said {
        Said::Refused => {
            next.push(*state);
            return;
        }
        Said::Nothing => (None, None),
        Said::Done { held, outcomes } => (Some(held), Some(outcomes)),
    };
    if outcomes.is_none() && call.may_be_refused {
        next.push(*state);
    }
    let mut checked = vec![(*state, vec![])];
    for (key, must) in &op.checks {
        let before = std::mem::take(&mut checked);
        for (state, held) in before {
            look(&state, *key, call, |state, item| {
                let held = held.iter().copied().chain([holds(item, *must)]);
                checked.push((*state, held.collect()));
            });
        }
    }
    for (state, held) in checked {
        let all = held.iter().all(|held| *held);
        let acts = if all { &op.success } else { &op.failure };
        let agrees = match said_held {
            None => true,
            Some(Held::All(said)) => *said == all,
            Some(Held::Each(said)) => *said == held,
        };
        if !agrees || outcomes.is_some_and(|outcomes| outcomes.len() != acts.len()) {
            continue;
        }
        let mut states = vec![state];
        for (at, act) in acts.iter().enumerate() {
            let outcome = outcomes.map(|outcomes| &outcomes[at]);
            let before = std::mem::take(&mut states);
            for state in before {
                match act.key() {
                    None => states.push(State::default()),
                    Some(key) => look(&state, key, call, |state, item| {
                        let mut state = *state;
                        if act_on(&mut state[key], item, act, outcome, call) {
                            states.push(state);
                        }
                    }),
                }
            }
        }
        for state in states {
            if !next.contains(&state) {
                next.push(state);
            }
        }
    }
}

/// Looks for the item of a key: once for each way in which its end may have come out, with what that tells about it.
fn look(state: &State, key: Key, call: &Call, mut found: impl FnMut(&State, Option<Item>)) {
    let Some(item) = state[key] else {
        return found(state, None);
    };
    let Some((earliest, latest)) = item.ends else {
        return found(state, Some(item));
    };
    let mut told = *state;
    if call.invoked_ms < latest {
        let ends = Some((earliest.max(call.invoked_ms + 1), latest));
        told[key] = Some(Item { ends, ..item });
        found(&told, told[key]);
    }
    if call.responded_ms >= earliest {
        let ends = Some((earliest, latest.min(call.responded_ms)));
        told[key] = Some(Item { ends, ..item });
        found(&told, None);
    }
}

fn holds(item: Option<Item>, must: Must) -> bool {
    match (must, item) {
        (Must::Always, _) | (Must::Absent, None) | (Must::Present, Some(_)) => true,
        (Must::Version(version), Some(item)) => item.version == version && version != 0,
        (Must::Be(value), Some(item)) => item.value == value,
        _ => false,
    }
}

/// Does one act to the slot of its key, in which it found `item`; false when it was told otherwise.
fn act_on(slot: &mut Option<Item>, item: Option<Item>, act: &Act, outcome: Option<&Outcome>, call: &Call) -> bool {
    match act {
        Act::Get(_) => {
            let Some(outcome) = outcome else { return true };
            let Some(mut item) = item else {
                return *outcome == Outcome::Missing;
            };
            let Outcome::Found { value, version, ends } = outcome else {
                return false;
            };
            if let Some(version) = version {
                if item.version != 0 && item.version != *version {
                    return false;
                }
                item.version = *version;
            }
            match (ends, item.ends) {
                (None, _) | (Some(0), None) => {}
                (Some(ends), Some((earliest, latest))) if (earliest..=latest).contains(ends) => {
                    item.ends = Some((*ends, *ends));
                }
                _ => return false,
            }
            *slot = Some(item);
            item.value == *value
        }
        Act::Put(_, value, ends) => {
            let version = match outcome {
                None => 0,
                Some(Outcome::Stored { version }) => version.unwrap_or(0),
                Some(_) => return false,
            };
            *slot = Some(Item {
                value: *value,
                ends: match *ends {
                    Ends::Never => None,
                    Ends::At(moment) => Some((moment, moment)),
                    Ends::In(ms) => Some((call.invoked_ms.saturating_add(ms), call.responded_ms.saturating_add(ms))),
                },
                version,
            });
            true
        }
        Act::Delete(_) => {
            *slot = None;
            let expected = match item {
                Some(_) => Outcome::Deleted,
                None => Outcome::Missing,
            };
            outcome.is_none_or(|outcome| [&expected, &Outcome::Gone].contains(&outcome))
        }
        Act::Add(_, by) => {
            let expected = match item {
                None => Outcome::Missing,
                Some(Item {
                    value: Value::Text(_), ..
                }) => Outcome::NotANumber,
                Some(Item {
                    value: Value::Number(number),
                    ends,
                    ..
                }) => {
                    *slot = Some(Item {
                        value: Value::Number(number + by),
                        ends,
                        version: 0,
                    });
                    Outcome::Counted(number + by)
                }
            };
            outcome.is_none_or(|outcome| *outcome == expected)
        }
        Act::Flush => unreachable!("it has no key"),
    }
}

impl Value {
    /// What was written of it: counting went on from there.
    pub fn written(self) -> Self {
        match self {
            Value::Number(number) => Value::Number(number - number % NUMBERS_APART),
            text => text,
        }
    }
}

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Value::Text(number) => write!(f, "v{number}"),
            Value::Number(number) => write!(f, "{number}"),
        }
    }
}

struct List<'a, T>(&'a [T]);

impl<T: Display> Display for List<'_, T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (at, each) in self.0.iter().enumerate() {
            write!(f, "{}{each}", if at > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

impl Display for Act {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Act::Get(key) => write!(f, "get k{key}"),
            Act::Put(key, value, Ends::Never) => write!(f, "k{key} = {value}"),
            Act::Put(key, value, Ends::At(moment)) => write!(f, "k{key} = {value} until {moment} ms"),
            Act::Put(key, value, Ends::In(ms)) => write!(f, "k{key} = {value} for {ms} ms"),
            Act::Delete(key) => write!(f, "delete k{key}"),
            Act::Add(key, by) => write!(f, "k{key} += {by}"),
            Act::Flush => write!(f, "flush"),
        }
    }
}

impl Display for Op {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        for (at, (key, must)) in self.checks.iter().enumerate() {
            write!(f, "{} k{key} ", if at > 0 { " and" } else { "if" })?;
            match must {
                Must::Always => write!(f, "is anything")?,
                Must::Absent => write!(f, "is absent")?,
                Must::Present => write!(f, "is present")?,
                Must::Version(version) => write!(f, "has version ..{}", version % 1000)?,
                Must::Be(value) => write!(f, "is {value}")?,
            }
        }
        if !self.checks.is_empty() {
            write!(f, ": ")?;
        }
        write!(f, "{}", List(&self.success))?;
        if !self.failure.is_empty() {
            write!(f, " else {}", List(&self.failure))?;
        }
        Ok(())
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Found { value, version, ends } => {
                write!(f, "{value}")?;
                if let Some(ends) = ends.filter(|ends| *ends > 0) {
                    write!(f, " until {ends} ms")?;
                }
                version.map_or(Ok(()), |version| write!(f, " (version ..{})", version % 1000))
            }
            Outcome::Missing => write!(f, "none"),
            Outcome::Stored { version } => {
                write!(f, "stored")?;
                version.map_or(Ok(()), |version| write!(f, " (version ..{})", version % 1000))
            }
            Outcome::Deleted => write!(f, "deleted"),
            Outcome::Gone => write!(f, "gone"),
            Outcome::Counted(number) => write!(f, "{number}"),
            Outcome::NotANumber => write!(f, "not a number"),
            Outcome::Flushed => write!(f, "flushed"),
        }
    }
}

impl Display for Said {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Said::Nothing => write!(f, "no answer"),
            Said::Refused => write!(f, "refused"),
            Said::Done { held, outcomes } => {
                match held {
                    Held::All(true) => {}
                    Held::All(false) => write!(f, "not all held; ")?,
                    Held::Each(held) if held.iter().all(|held| *held) => {}
                    Held::Each(held) => write!(f, "held: {}; ", List(held))?,
                }
                write!(f, "{}", List(outcomes))
            }
        }
    }
}

impl Display for Call {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let end = |moment: u64| match moment {
            u64::MAX => "-".to_owned(),
            moment => moment.to_string(),
        };
        write!(
            f,
            "client {:<2} {:>5} to {:<5} ({:>4} to {:<4} ms)  {}{}  ->  {}",
            self.client,
            self.invoked,
            end(self.responded),
            self.invoked_ms,
            end(self.responded_ms),
            if self.durable { "durably " } else { "" },
            self.op,
            self.said
        )
    }
}
