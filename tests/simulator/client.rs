//! Clients: what they ask, as bytes; and what they are told, from bytes.

use super::json_line::{self, Line, Talk};
use super::model::{Act, Ends, Held, Key, Must, NUMBERS_APART, Op, Outcome, Said, Value};
use super::random::Random;
use super::support::protobuf::{only_if, request};
use super::support::{BEGAN_MS, Client};
use memkv::proto::condition::Is;
use memkv::proto::entry::Expiry;
use memkv::proto::message::Command;
use memkv::proto::operation::Operation as Of;
use memkv::proto::{
    Code, Compare, Condition, Delete, Entry, Flush, Get, KeyResult, Message as Request, Metrics, Operation, Ping,
    Response, Set, Topology, Txn,
};
use memkv::protocol::Protocol;
use prost::Message;
use std::collections::{HashSet, VecDeque};

/// What a seed's clients like to do.
#[derive(Clone, Debug)]
pub struct Habits {
    pub large_percent: usize,
    pub ends_percent: usize,
    pub flush_percent: usize,
    pub reads_percent: usize,
    pub condition_percent: usize,
    pub several_percent: usize,
    /// Keys of one request, at most.
    pub keys_max: usize,
    /// Requests that are refused for lack of room are no mistake.
    pub tight: bool,
    /// Nor are transactions that are refused for their size.
    pub limited: bool,
    /// How often in a hundred a request asks to be safe before it is answered.
    pub durable_percent: usize,
    /// Disks fail: what is answered may not be safe, and writes may be refused.
    pub failing: bool,
}

/// What all clients of a seed know together.
pub struct Common {
    pub keys: Vec<Vec<u8>>,
    pub habits: Habits,
    pub random: Random,
    /// By number.
    texts: Vec<Vec<u8>>,
    numbers: u64,
    /// Of a protocol without flags.
    plain: HashSet<Value>,
    /// By key: versions that somebody was told, the latest last.
    versions: Vec<Vec<u64>>,
}

/// Flags of a value tell its kind, and so whether they stayed with it.
const NUMBER_FLAGS: u32 = 9;

impl Common {
    pub fn new(keys: Vec<Vec<u8>>, habits: Habits, random: Random) -> Self {
        Self {
            versions: vec![vec![]; keys.len()],
            keys,
            habits,
            random,
            texts: vec![],
            numbers: 0,
            plain: HashSet::new(),
        }
    }

    pub fn key(&mut self) -> Key {
        self.random.below(self.keys.len())
    }

    fn key_list(&mut self) -> Vec<Key> {
        if self.random.chance(20) {
            // Some of them may be the same.
            let count = self.random.between(1, self.habits.keys_max);
            return (0..count).map(|_| self.key()).collect();
        }
        let mut keys: Vec<Key> = (0..self.keys.len()).collect();
        self.random.shuffle(&mut keys);
        keys.truncate(self.random.between(2, self.habits.keys_max));
        keys
    }

    fn value(&mut self) -> Value {
        if self.random.chance(20) {
            self.numbers += 1;
            return Value::Number(self.numbers * NUMBERS_APART);
        }
        let number = self.texts.len();
        let mut text = format!("v{number}:").into_bytes();
        let length = if self.random.chance(self.habits.large_percent) {
            self.random.between(4090, 6000)
        } else {
            self.random.below(60)
        };
        text.extend((text.len()..length).map(|at| b'a' + (at * 7 + number) as u8 % 26));
        self.texts.push(text);
        Value::Text(number as u32)
    }

    /// A value to be written without flags.
    pub fn plain_value(&mut self) -> Value {
        let value = self.value();
        self.plain.insert(value);
        value
    }

    /// The bytes of a value, and its flags.
    pub fn bytes(&self, value: Value) -> (Vec<u8>, u32) {
        let (bytes, flags) = match value {
            Value::Text(number) => (self.texts[number as usize].clone(), number % 7),
            Value::Number(number) => (number.to_string().into_bytes(), NUMBER_FLAGS),
        };
        let is_plain = self.plain.contains(&value.written());
        (bytes, if is_plain { 0 } else { flags })
    }

    /// Whose value these bytes are; they must be all of it.
    fn recognize(&self, bytes: &[u8], flags: u32) -> Value {
        let value = self.recognize_plain(bytes);
        assert_eq!(self.bytes(value).1, flags, "{value} came back with other flags");
        value
    }

    /// The same, told without flags.
    pub fn recognize_plain(&self, bytes: &[u8]) -> Value {
        let value = match bytes.strip_prefix(b"v") {
            Some(rest) => {
                let digits = rest.split(|byte| *byte == b':').next().unwrap_or_default();
                std::str::from_utf8(digits)
                    .ok()
                    .and_then(|digits| digits.parse().ok())
                    .map(Value::Text)
            }
            None => std::str::from_utf8(bytes)
                .ok()
                .and_then(|digits| digits.parse().ok())
                .map(Value::Number),
        };
        let value = value.filter(|value| match value {
            Value::Text(number) => (*number as usize) < self.texts.len(),
            Value::Number(_) => true,
        });
        let value = value.unwrap_or_else(|| panic!("a value that nobody wrote: {:?}", String::from_utf8_lossy(bytes)));
        assert!(self.bytes(value).0 == bytes, "{value} came back changed");
        value
    }

    fn ends(&mut self) -> Ends {
        if !self.random.chance(self.habits.ends_percent) {
            return Ends::Never;
        }
        // Moments are chosen so that some are shared.
        match self.random.chance(60) {
            true => Ends::At(10 * self.random.between(1, 12) as u64),
            false => Ends::In(self.random.between(1, 60) as u64),
        }
    }

    fn must(&mut self, key: Key) -> Must {
        let known = &self.versions[key];
        match self.random.below(10) {
            0..4 => Must::Absent,
            4..6 => Must::Present,
            // Rarely one of another key.
            _ if known.is_empty() => Must::Version(1),
            6..9 => Must::Version(known[known.len() - 1]),
            _ => Must::Version(self.random.pick(known)),
        }
    }

    fn saw(&mut self, key: Key, version: Option<u64>) {
        if let Some(version) = version {
            self.versions[key].retain(|known| *known != version);
            self.versions[key].push(version);
        }
    }
}

/// How the answer to a request is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Protobuf: a result for each act.
    Results,
    /// Protobuf: a code for each check, one of each key, if one of them failed.
    Conditional,
    Branch,
    Flushed,
    /// Nothing that the history has.
    Other,
    /// memcached.
    Stored,
    Swapped,
    Values {
        versions: bool,
    },
    Deleted,
    Counted,
    FlushedText,
    /// JSON-line.
    Line(Line),
}

/// A request that is to be sent, or was, and is not answered.
#[derive(Debug)]
pub struct Asked {
    id: u64,
    /// Its calls in the history, one for each instant it may take.
    pub calls: Vec<usize>,
    /// What they ask.
    pub ops: Vec<Op>,
    answer: Answer,
    versions: bool,
    /// It flushes so many milliseconds later.
    pub flushes_in: Option<u64>,
    /// After this byte of all that the client sends, it may have been begun.
    pub begins_at: u64,
    /// The step and the moment at which it was invoked.
    pub invoked: Option<(u64, u64)>,
    /// It is not answered, and may have been refused.
    pub may_be_refused: bool,
    /// It is to be safe before it is answered.
    pub durable: bool,
}

/// One connection and who is behind it.
pub struct Actor {
    pub number: usize,
    pub client: Client,
    protocol: Protocol,
    /// Requests that it leaves unanswered, at most.
    pub depth: usize,
    /// Requests that it has still to make.
    pub left: usize,
    /// With so many left it is gone all at once.
    pub vanishes_at: Option<usize>,
    /// It closes its half after its last request.
    pub finishes: bool,
    pub stalled: bool,
    pub gone: bool,
    pub outbox: Vec<u8>,
    inbox: Vec<u8>,
    pub asked: VecDeque<Asked>,
    queued_bytes: u64,
    pub sent_bytes: u64,
    ids: u64,
    talk: Talk,
}

/// A request as it is made.
pub struct Draft {
    bytes: Vec<u8>,
    pub ops: Vec<Op>,
    answer: Answer,
    versions: bool,
    flushes_in: Option<u64>,
    /// It may be begun with its first byte.
    early: bool,
    durable: bool,
}

impl Draft {
    pub fn new(bytes: Vec<u8>, op: Op, answer: Answer) -> Self {
        Self {
            bytes,
            ops: vec![op],
            answer,
            versions: false,
            flushes_in: None,
            early: false,
            durable: false,
        }
    }
}

impl Draft {
    /// The same request of a protobuf client, to be safe before it is answered.
    fn durable(mut self) -> Self {
        let mut request = Request::decode_length_delimited(self.bytes.as_slice()).expect("a request");
        // Asking how the server is does not wait for anything.
        if self.answer != Answer::Other {
            request.durable = true;
            self.bytes = request.encode_length_delimited_to_vec();
            self.durable = true;
        }
        self
    }
}

impl Actor {
    pub fn new(number: usize, client: Client, protocol: Protocol) -> Self {
        Self {
            number,
            client,
            protocol,
            depth: 1,
            left: 0,
            vanishes_at: None,
            finishes: false,
            stalled: false,
            gone: false,
            outbox: vec![],
            inbox: vec![],
            asked: VecDeque::new(),
            queued_bytes: 0,
            sent_bytes: 0,
            ids: 0,
            talk: Talk::default(),
        }
    }

    /// How many requests it makes for each of another's: many lines of a transaction are calls to nobody.
    pub fn lines(&self) -> usize {
        if self.protocol == Protocol::JsonLine { 3 } else { 1 }
    }

    /// Nothing is to be done and nothing is owed.
    pub fn is_done(&self) -> bool {
        self.gone || self.left == 0 && self.asked.is_empty() && self.outbox.is_empty()
    }

    /// Makes up a request.
    pub fn ask(&mut self, common: &mut Common) {
        let draft = match self.protocol {
            Protocol::Protobuf => {
                let draft = self.protobuf(common);
                match common.habits.durable_percent {
                    percent if percent > 0 && common.random.chance(percent) => draft.durable(),
                    _ => draft,
                }
            }
            Protocol::JsonLine => self.talk.ask(common),
            _ => memcached(common),
        };
        self.left -= 1;
        self.push(draft);
    }

    /// Asks for the value of each key.
    pub fn ask_all(&mut self, common: &Common) {
        let keys: Vec<Key> = (0..common.keys.len()).collect();
        match self.protocol {
            // At one instant.
            Protocol::Protobuf => {
                let draft = self.protobuf_get(common, &keys, false);
                self.push(draft);
            }
            Protocol::JsonLine => keys.iter().for_each(|key| self.push(json_line::get(common, *key))),
            _ => self.push(memcached_get(common, &keys, false)),
        }
    }

    /// Asks, with protobuf, what the server knows of each key, at one instant.
    pub fn find_all(&mut self, common: &Common) {
        let keys: Vec<Key> = (0..common.keys.len()).collect();
        let draft = self.protobuf_get(common, &keys, true);
        self.push(draft);
    }

    /// Empties the store, all at once or key by key.
    pub fn ask_to_empty(&mut self, common: &Common, at_once: bool) {
        let draft = if at_once {
            Draft::new(
                self.encode(Command::Flush(Flush { delay_ms: 0 })),
                Op::of(Act::Flush),
                Answer::Flushed,
            )
        } else {
            let keys: Vec<Key> = (0..common.keys.len()).collect();
            self.protobuf_delete(common, &keys, &[])
        };
        self.push(draft);
    }

    fn push(&mut self, draft: Draft) {
        let begins_at = self.queued_bytes;
        self.queued_bytes += draft.bytes.len() as u64;
        self.outbox.extend_from_slice(&draft.bytes);
        self.asked.push_back(Asked {
            id: self.ids,
            calls: vec![],
            ops: draft.ops,
            answer: draft.answer,
            versions: draft.versions,
            flushes_in: draft.flushes_in,
            begins_at: if draft.early { begins_at } else { self.queued_bytes - 1 },
            invoked: None,
            may_be_refused: false,
            durable: draft.durable,
        });
    }

    fn encode(&mut self, command: Command) -> Vec<u8> {
        self.ids += 1;
        request(self.ids, command)
    }

    // ---- protobuf ----

    fn protobuf(&mut self, common: &mut Common) -> Draft {
        let (several, kind) = (
            common.random.chance(common.habits.several_percent),
            common.random.below(100),
        );
        if common.random.chance(common.habits.flush_percent) {
            return self.protobuf_flush(common);
        }
        if common.random.chance(3) {
            let command = match common.random.below(3) {
                0 => Command::Ping(Ping {}),
                1 => Command::Metrics(Metrics {}),
                _ => Command::Topology(Topology {}),
            };
            return Draft {
                ops: vec![],
                ..Draft::new(self.encode(command), Op::default(), Answer::Other)
            };
        }
        let keys = if several { common.key_list() } else { vec![common.key()] };
        if common.random.chance(common.habits.reads_percent) {
            let versions = common.random.chance(common.habits.condition_percent);
            return self.protobuf_get(common, &keys, versions);
        }
        match kind {
            0..50 => self.protobuf_set(common, &keys),
            50..65 => {
                let musts: Vec<Must> = keys.iter().map(|key| self.delete_must(common, *key)).collect();
                let any = musts.iter().any(|must| *must != Must::Always);
                self.protobuf_delete(common, &keys, if any { &musts } else { &[] })
            }
            _ => self.protobuf_txn(common),
        }
    }

    fn delete_must(&mut self, common: &mut Common, key: Key) -> Must {
        if !common.random.chance(common.habits.condition_percent / 2) {
            return Must::Always;
        }
        match common.must(key) {
            Must::Absent => Must::Present,
            must => must,
        }
    }

    fn protobuf_flush(&mut self, common: &mut Common) -> Draft {
        let delay_ms = if common.random.chance(40) {
            common.random.between(1, 60) as u64
        } else {
            0
        };
        let bytes = self.encode(Command::Flush(Flush { delay_ms }));
        let draft = Draft::new(bytes, Op::of(Act::Flush), Answer::Flushed);
        if delay_ms == 0 {
            return draft;
        }
        Draft {
            ops: vec![],
            answer: Answer::Other,
            flushes_in: Some(delay_ms),
            ..draft
        }
    }

    fn protobuf_get(&mut self, common: &Common, keys: &[Key], versions: bool) -> Draft {
        let get = Get {
            keys: keys.iter().map(|key| common.keys[*key].clone()).collect(),
            with_version: versions,
        };
        let op = Op {
            success: keys.iter().map(|key| Act::Get(*key)).collect(),
            ..Op::default()
        };
        Draft {
            versions,
            ..Draft::new(self.encode(Command::Get(get)), op, Answer::Results)
        }
    }

    fn protobuf_set(&mut self, common: &mut Common, keys: &[Key]) -> Draft {
        let versions = common.random.chance(common.habits.condition_percent);
        let conditional = common.random.chance(common.habits.condition_percent);
        let (mut op, mut entries) = (Op::default(), vec![]);
        for key in keys {
            let must = match conditional && common.random.chance(60) {
                true => common.must(*key),
                false => Must::Always,
            };
            let (value, ends) = (common.value(), common.ends());
            op.checks.push((*key, must));
            op.success.push(Act::Put(*key, value, ends));
            entries.push(Entry {
                condition: condition(must),
                with_version: versions,
                ..entry(common, *key, value, ends)
            });
        }
        let answer = if op.checks.iter().any(|(_, must)| *must != Must::Always) {
            Answer::Conditional
        } else {
            op.checks.clear();
            Answer::Results
        };
        Draft {
            versions,
            ..Draft::new(self.encode(Command::Set(Set { entries })), op, answer)
        }
    }

    fn protobuf_delete(&mut self, common: &Common, keys: &[Key], musts: &[Must]) -> Draft {
        let delete = Delete {
            keys: keys.iter().map(|key| common.keys[*key].clone()).collect(),
            conditions: musts.iter().map(|must| condition(*must).unwrap_or_default()).collect(),
        };
        let op = Op {
            checks: keys.iter().copied().zip(musts.iter().copied()).collect(),
            success: keys.iter().map(|key| Act::Delete(*key)).collect(),
            failure: vec![],
        };
        let answer = match musts {
            [] => Answer::Results,
            _ => Answer::Conditional,
        };
        Draft::new(self.encode(Command::Delete(delete)), op, answer)
    }

    fn protobuf_txn(&mut self, common: &mut Common) -> Draft {
        let versions = common.random.chance(50);
        let (mut op, mut txn) = (Op::default(), Txn::default());
        if common.random.chance(70) {
            for _ in 0..common.random.between(1, 2) {
                let key = common.key();
                let must = common.must(key);
                op.checks.push((key, must));
                txn.compare.push(Compare {
                    key: common.keys[key].clone(),
                    condition: condition(must),
                });
            }
        }
        let most = common.habits.keys_max;
        let at_least = usize::from(op.checks.is_empty());
        for _ in 0..common.random.between(at_least, most) {
            let (act, operation) = operation(common, versions);
            op.success.push(act);
            txn.success.push(operation);
        }
        for _ in 0..common.random.below(most) {
            let (act, operation) = operation(common, versions);
            op.failure.push(act);
            txn.failure.push(operation);
        }
        Draft {
            versions,
            ..Draft::new(self.encode(Command::Txn(txn)), op, Answer::Branch)
        }
    }

    // ---- answers ----

    pub fn received(&mut self, bytes: &[u8]) {
        self.inbox.extend_from_slice(bytes);
    }

    /// The next request that has its answer, and for each of its calls what was said.
    pub fn answered(&mut self, common: &mut Common) -> Option<(Asked, Vec<Said>)> {
        if self.inbox.is_empty() {
            return None;
        }
        let asked = self.asked.front_mut().expect("an answer that nobody asked for");
        let (said, used) = match self.protocol {
            Protocol::Protobuf => {
                let mut rest = self.inbox.as_slice();
                let length = prost::decode_length_delimiter(rest).ok()?;
                if rest.len() < prost::length_delimiter_len(length) + length {
                    return None;
                }
                let response = Response::decode_length_delimited(&mut rest).expect("a response");
                (understand(asked, &response, common), self.inbox.len() - rest.len())
            }
            Protocol::JsonLine => {
                let end = self.inbox.iter().position(|byte| *byte == b'\n')?;
                let line = std::str::from_utf8(&self.inbox[..end]).expect("ASCII");
                let Answer::Line(asked_line) = asked.answer else {
                    unreachable!("lines are what it asks")
                };
                let said = self.talk.understand(asked_line, &mut asked.ops, line, common);
                (said, end + 1)
            }
            _ => understand_text(asked, &self.inbox, common)?,
        };
        self.inbox.drain(..used);
        Some((self.asked.pop_front()?, said))
    }

    /// It goes away: what it has asked and was not told.
    pub fn leave(&mut self, common: &Common) -> VecDeque<Asked> {
        let mut asked = std::mem::take(&mut self.asked);
        for asked in &mut asked {
            if let Answer::Line(line) = asked.answer {
                asked.may_be_refused = !self.talk.leave(line, &mut asked.ops, common);
            }
        }
        asked
    }
}

fn condition(must: Must) -> Option<Condition> {
    match must {
        Must::Always => None,
        Must::Absent => only_if(Is::Absent(true)),
        Must::Present => only_if(Is::Present(true)),
        Must::Version(version) => only_if(Is::Version(version)),
        Must::Be(_) => unreachable!("protobuf compares no values"),
    }
}

fn entry(common: &Common, key: Key, value: Value, ends: Ends) -> Entry {
    let (value, flags) = common.bytes(value);
    Entry {
        key: common.keys[key].clone(),
        value: value.into(),
        flags,
        expiry: match ends {
            Ends::Never => None,
            Ends::At(moment) => Some(Expiry::ExpiresAtMs(BEGAN_MS + moment)),
            Ends::In(ms) => Some(Expiry::TtlMs(ms)),
        },
        ..Entry::default()
    }
}

/// An operation of a transaction.
fn operation(common: &mut Common, with_version: bool) -> (Act, Operation) {
    let key = common.key();
    let name = common.keys[key].clone();
    let (act, operation) = match common.random.below(10) {
        0..4 => (Act::Get(key), Of::Get(name)),
        4..9 => {
            let (value, ends) = (common.value(), common.ends());
            let entry = Entry {
                with_version,
                ..entry(common, key, value, ends)
            };
            (Act::Put(key, value, ends), Of::Set(entry))
        }
        _ => (Act::Delete(key), Of::Delete(name)),
    };
    let operation = Operation {
        operation: Some(operation),
        with_version,
    };
    (act, operation)
}

fn version(asked: &Asked, told: u64, tight: bool) -> Option<u64> {
    assert!(asked.versions || told == 0, "a version that nobody asked for");
    assert!(!asked.versions || told != 0 || tight, "a version is missing");
    (told != 0).then_some(told)
}

fn outcome(asked: &Asked, act: &Act, result: &KeyResult, common: &mut Common) -> Outcome {
    let tight = common.habits.tight;
    match (act, result.code()) {
        (Act::Get(key), Code::Ok) => {
            let version = version(asked, result.version, tight);
            common.saw(*key, version);
            Outcome::Found {
                value: common.recognize(&result.value, result.flags),
                version,
                ends: Some(result.expires_at_ms.saturating_sub(BEGAN_MS)),
            }
        }
        (Act::Get(_) | Act::Delete(_), Code::NotFound) => Outcome::Missing,
        (Act::Put(key, ..), Code::Ok) => {
            let version = version(asked, result.version, tight);
            common.saw(*key, version);
            Outcome::Stored { version }
        }
        (Act::Delete(_), Code::Ok) => Outcome::Deleted,
        (act, code) => panic!("{act} was answered with {code:?}"),
    }
}

fn done(held: Held, outcomes: Vec<Outcome>) -> Vec<Said> {
    vec![Said::Done { held, outcomes }]
}

fn understand(asked: &Asked, response: &Response, common: &mut Common) -> Vec<Said> {
    assert_eq!(response.id, asked.id, "the answer to another request");
    let tight = common.habits.tight;
    let results = &response.results;
    let mut codes = results.iter().map(KeyResult::code).chain([response.code()]);
    if let Some(unsafe_code) = codes.find(|code| matches!(code, Code::NotDurable | Code::ReadOnly)) {
        assert!(common.habits.failing, "{unsafe_code:?}: {}", response.message);
        return refused_by_the_disk(asked, unsafe_code == Code::NotDurable);
    }
    if asked.answer == Answer::Other {
        assert_eq!(response.code(), Code::Ok);
        return vec![];
    }
    let op = &asked.ops[0];
    if matches!(response.code(), Code::OutOfMemory | Code::TooLarge) {
        assert!(
            tight && results.is_empty(),
            "{:?}: {}",
            response.code(),
            response.message
        );
        return vec![Said::Refused];
    }
    assert_eq!(response.code(), Code::Ok, "{}", response.message);
    let codes: Vec<Code> = results.iter().map(KeyResult::code).collect();
    if codes.contains(&Code::OutOfMemory) {
        assert!(
            tight && codes.iter().all(|code| *code == Code::OutOfMemory),
            "{codes:?}"
        );
        return vec![Said::Refused];
    }
    let mut outcomes_of = |acts: &[Act]| -> Vec<Outcome> {
        assert_eq!(acts.len(), results.len(), "{op}");
        let results = acts.iter().zip(results);
        results
            .map(|(act, result)| outcome(asked, act, result, common))
            .collect()
    };
    match asked.answer {
        Answer::Results => done(Held::All(true), outcomes_of(&op.success)),
        Answer::Conditional if codes.contains(&Code::ConditionFailed) => {
            let held = codes.iter().map(|code| match code {
                Code::ConditionFailed => false,
                Code::Aborted => true,
                code => panic!("{code:?} beside a condition that failed"),
            });
            done(Held::Each(held.collect()), vec![])
        }
        Answer::Conditional => done(Held::Each(vec![true; op.checks.len()]), outcomes_of(&op.success)),
        Answer::Branch => {
            let succeeded = response.txn.expect("a report on a transaction").succeeded;
            let acts = if succeeded { &op.success } else { &op.failure };
            done(Held::All(succeeded), outcomes_of(acts))
        }
        Answer::Flushed => done(Held::All(true), vec![Outcome::Flushed]),
        answer => unreachable!("{answer:?} is none of protobuf"),
    }
}

/// What is said of calls that the server could not make safe, or does not take any more. What was not made safe may be done
/// or not; a read of it says nothing.
fn refused_by_the_disk(asked: &Asked, may_be_done: bool) -> Vec<Said> {
    let said = |op: &Op| match may_be_done && !op.only_reads() {
        true => Said::Nothing,
        false => Said::Refused,
    };
    asked.ops.iter().map(said).collect()
}

// ---- memcached ----

fn memcached(common: &mut Common) -> Draft {
    let key = common.key();
    let name = String::from_utf8(common.keys[key].clone()).expect("a printable key");
    let line = |text: String| format!("{text}\r\n").into_bytes();
    if common.random.chance(common.habits.flush_percent) {
        let delay_s = if common.random.chance(20) { 1 } else { 0 };
        let draft = Draft::new(
            line(if delay_s > 0 {
                format!("flush_all {delay_s}")
            } else {
                "flush_all".to_owned()
            }),
            Op::of(Act::Flush),
            Answer::FlushedText,
        );
        if delay_s == 0 {
            return draft;
        }
        return Draft {
            ops: vec![],
            flushes_in: Some(1000 * delay_s),
            ..draft
        };
    }
    if common.random.chance(common.habits.reads_percent) {
        let mut keys = if common.random.chance(30) {
            common.key_list()
        } else {
            vec![key]
        };
        keys.sort_unstable();
        keys.dedup();
        let versions = common.random.chance(common.habits.condition_percent);
        return memcached_get(common, &keys, versions);
    }
    let kind = common.random.below(100);
    if kind < 15 {
        return Draft::new(
            line(format!("delete {name}")),
            Op::of(Act::Delete(key)),
            Answer::Deleted,
        );
    }
    if kind < 35 {
        let by = common.random.between(1, 9) as u64;
        return Draft::new(
            line(format!("incr {name} {by}")),
            Op::of(Act::Add(key, by)),
            Answer::Counted,
        );
    }
    let value = common.value();
    let seconds = u64::from(common.random.chance(common.habits.ends_percent / 3));
    let ends = if seconds > 0 {
        Ends::In(1000 * seconds)
    } else {
        Ends::Never
    };
    let mut op = Op::of(Act::Put(key, value, ends));
    let (verb, end, answer) = match kind {
        35..65 => ("set", String::new(), Answer::Stored),
        65..75 => {
            op.checks = vec![(key, Must::Absent)];
            ("add", String::new(), Answer::Stored)
        }
        75..83 => {
            op.checks = vec![(key, Must::Present)];
            ("replace", String::new(), Answer::Stored)
        }
        _ => {
            let version = common.versions[key].last().copied().unwrap_or(1);
            op.checks = vec![(key, Must::Present), (key, Must::Version(version))];
            ("cas", format!(" {version}"), Answer::Swapped)
        }
    };
    let (data, flags) = common.bytes(value);
    let mut bytes = line(format!("{verb} {name} {flags} {seconds} {}{end}", data.len()));
    bytes.extend_from_slice(&data);
    bytes.extend_from_slice(b"\r\n");
    Draft::new(bytes, op, answer)
}

/// Keys are read one by one, as they come.
fn memcached_get(common: &Common, keys: &[Key], versions: bool) -> Draft {
    let mut bytes = if versions { b"gets".to_vec() } else { b"get".to_vec() };
    for key in keys {
        bytes.push(b' ');
        bytes.extend_from_slice(&common.keys[*key]);
    }
    bytes.extend_from_slice(b"\r\n");
    Draft {
        ops: keys.iter().map(|key| Op::of(Act::Get(*key))).collect(),
        versions,
        early: true,
        ..Draft::new(bytes, Op::default(), Answer::Values { versions })
    }
}

/// The server says that it cannot make something safe, or that it takes no writes any more; true: it may have done it.
fn not_safe(line: &str) -> Option<bool> {
    match line {
        _ if line.starts_with("SERVER_ERROR not durable") => Some(true),
        _ if line.contains("read-only") => Some(false),
        _ => None,
    }
}

/// A line, and where the next one begins.
fn line_at(bytes: &[u8], at: usize) -> Option<(&str, usize)> {
    let rest = bytes.get(at..)?;
    let end = rest.windows(2).position(|two| two == b"\r\n")?;
    Some((std::str::from_utf8(&rest[..end]).ok()?, at + end + 2))
}

fn understand_text(asked: &Asked, bytes: &[u8], common: &mut Common) -> Option<(Vec<Said>, usize)> {
    if let Answer::Values { versions } = asked.answer {
        return understand_values(asked, bytes, versions, common);
    }
    let (line, used) = line_at(bytes, 0)?;
    if let Some(may_be_done) = not_safe(line) {
        assert!(common.habits.failing, "{line}");
        return Some((refused_by_the_disk(asked, may_be_done), used));
    }
    if line.contains("out of memory") {
        assert!(common.habits.tight, "{line}");
        return Some((vec![Said::Refused], used));
    }
    let said = match (asked.answer, line) {
        (Answer::Stored | Answer::Swapped, "STORED") => done(Held::All(true), vec![Outcome::Stored { version: None }]),
        (Answer::Stored, "NOT_STORED") => done(Held::All(false), vec![]),
        (Answer::Swapped, "EXISTS") => done(Held::Each(vec![true, false]), vec![]),
        (Answer::Swapped, "NOT_FOUND") => done(Held::Each(vec![false, false]), vec![]),
        (Answer::Deleted, "DELETED") => done(Held::All(true), vec![Outcome::Deleted]),
        (Answer::Deleted | Answer::Counted, "NOT_FOUND") => done(Held::All(true), vec![Outcome::Missing]),
        (Answer::Counted, "CLIENT_ERROR cannot increment or decrement non-numeric value") => {
            done(Held::All(true), vec![Outcome::NotANumber])
        }
        (Answer::Counted, number) => {
            let number = number
                .parse()
                .unwrap_or_else(|_| panic!("{:?} was answered {line}", asked.ops));
            done(Held::All(true), vec![Outcome::Counted(number)])
        }
        (Answer::FlushedText, "OK") if asked.flushes_in.is_some() => vec![],
        (Answer::FlushedText, "OK") => done(Held::All(true), vec![Outcome::Flushed]),
        _ => panic!("{:?} was answered {line}", asked.ops),
    };
    Some((said, used))
}

/// `VALUE <key> <flags> <bytes> [<version>]` and a value for each key that was found, in their order, and `END`.
fn understand_values(asked: &Asked, bytes: &[u8], versions: bool, common: &mut Common) -> Option<(Vec<Said>, usize)> {
    let mut found = VecDeque::new();
    let mut at = 0;
    let refused_last = loop {
        let (line, next) = line_at(bytes, at)?;
        if line == "END" || not_safe(line).is_some() {
            let refused_last = line != "END";
            assert!(!refused_last || common.habits.failing, "{line}");
            at = next;
            break refused_last;
        }
        let words: Vec<&str> = line.split(' ').collect();
        assert!(
            words[0] == "VALUE" && words.len() == if versions { 5 } else { 4 },
            "{line}"
        );
        let number = |word: &str| word.parse::<u64>().expect("a number");
        let length = number(words[3]) as usize;
        let value = bytes.get(next..next + length)?;
        if bytes.get(next + length..next + length + 2)? != b"\r\n" {
            panic!("a value has another length than was said");
        }
        let told = if versions { number(words[4]) } else { 0 };
        found.push_back((
            words[1].as_bytes().to_vec(),
            value.to_vec(),
            number(words[2]) as u32,
            told,
        ));
        at = next + length + 2;
    };
    let mut said = vec![];
    for (number, op) in asked.ops.iter().enumerate() {
        let [Act::Get(key)] = op.success[..] else {
            unreachable!("a read")
        };
        // Of two reads of one key, only one of which finds it, it cannot be told which it was: readers take the first.
        let outcome = match found.front() {
            Some((name, ..)) if *name == common.keys[key] => {
                let (_, value, flags, told) = found.pop_front()?;
                let version = version(asked, told, common.habits.tight);
                common.saw(key, version);
                Outcome::Found {
                    value: common.recognize(&value, flags),
                    version,
                    ends: None,
                }
            }
            // This protocol has no word for a key that cannot be told of, unless it is the last.
            _ if common.habits.failing && (refused_last || number + 1 < asked.ops.len()) => {
                said.push(Said::Refused);
                continue;
            }
            _ => Outcome::Missing,
        };
        said.extend(done(Held::All(true), vec![outcome]));
    }
    assert!(found.is_empty(), "more values than were asked for");
    Some((said, at))
}
