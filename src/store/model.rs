//! A table beside a `HashMap` that knows nothing of buckets, slots, queues and budgets: what a run of bytes does to both must
//! be the same, but for items that were evicted, and those are counted. For tests with random bytes, and for fuzzing.

use super::{Access, IMAGE_STATE, OutOfMemory, Parts, Store, WON};
use crate::budget::{Budget, Pool};
use crate::effect::{self, Effect};
use crate::model::{Deadline, UnixMillis, Value, Version};
use crate::partition::Partitioner;
use bytes::Bytes;
use std::collections::HashMap;

const PARTITIONER: Partitioner = Partitioner::Hashed { seed: 3 };
const START: UnixMillis = UnixMillis(1_800_000_000_000);
/// Values from here on are referenced.
const LARGE_BYTES: usize = 4096;

/// What an item should be.
#[derive(Clone, Debug, PartialEq)]
struct Expected {
    value: Vec<u8>,
    flags: u32,
    version: u64,
    deadline: Deadline,
    /// Without what readers did.
    state: u8,
}

struct Machine {
    store: Store,
    budget: Budget,
    limit: usize,
    evicts: bool,
    now: UnixMillis,
    model: HashMap<Vec<u8>, Expected>,
    /// Items of the model that were missing.
    evicted: u64,
    /// Values that are being sent.
    held: Vec<Bytes>,
    /// What must still come of the image that is under way.
    image: Option<HashMap<Vec<u8>, Expected>>,
    /// Reused: pieces of it.
    out: Vec<u8>,
}

/// Takes bytes from the front; zeros when there are none.
fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let mut taken = [0; N];
    let count = N.min(data.len());
    taken[..count].copy_from_slice(&data[..count]);
    *data = &data[count..];
    taken
}

/// Does to a table what `data` says, and panics when it is not what it should be.
pub(crate) fn check(mut data: &[u8]) {
    let [kind] = take(&mut data);
    let limit = [60_000, 300_000, 3_000_000][usize::from(kind) % 3];
    let evicts = kind & 128 != 0;
    let mut budget = Budget::new(Pool::new(limit as u64));
    let mut machine = Machine {
        store: Store::new(PARTITIONER, evicts, START, &mut budget),
        budget,
        limit,
        evicts,
        now: START,
        model: HashMap::new(),
        evicted: 0,
        held: vec![],
        image: None,
        out: vec![],
    };
    while !data.is_empty() {
        let [op, a, b, c] = take(&mut data);
        machine.step(op, a, b, c);
        machine.check_sums();
    }
    machine.end();
}

impl Machine {
    fn step(&mut self, op: u8, a: u8, b: u8, c: u8) {
        match op % 20 {
            0..=4 => self.set(a, b, c),
            // Many at once, so that there are more items than a few.
            5 => (0..=b).for_each(|number| self.set(a.wrapping_add(number), c, number)),
            6 | 7 => self.remove(a),
            8 => self.get(a, b),
            9 => self.touch(a, b),
            10 => self.amend(a, b),
            11 => {
                self.held.truncate(usize::from(a) % 8);
                self.pass(0);
            }
            12 | 13 => self.pass(u64::from(a) << (b % 24)),
            14 => _ = self.store.yield_memory(&mut self.budget),
            15 if a == 0 => {
                assert_eq!(self.store.clear(&mut self.budget), self.image.is_some());
                self.model.clear();
                self.image = None;
            }
            16 if b == 0 => {
                assert_eq!(self.store.drop_image(&mut self.budget), self.image.is_some());
                self.image = None;
            }
            16 if self.image.is_none() || a == 0 => self.begin_image(),
            16..=18 => _ = self.image_step(usize::from(a % 64), 1 << (b % 17)),
            _ => _ = self.store.tick(&mut self.budget, self.now),
        }
    }

    fn key(number: u8) -> Vec<u8> {
        vec![b'a' + number % 26; 1 + usize::from(number)]
    }

    fn deadline(&self, choice: u8) -> Deadline {
        match choice % 4 {
            0 | 1 => Deadline::Never,
            2 => Deadline::At(UnixMillis(self.now.0 + 1 + u64::from(choice) * 100)),
            _ => Deadline::At(UnixMillis(self.now.0 + (1000 << (choice / 4 % 34)))),
        }
    }

    /// Where the item is, which must be as expected; none where none is expected, or it was evicted.
    fn find(&mut self, key: &[u8]) -> Option<super::Position> {
        let position = self.store.find(PARTITIONER.place(key).hash, key);
        match (position, self.model.get(key)) {
            (None, None) => {}
            (None, Some(_)) => {
                assert!(self.evicts, "it was lost");
                self.evicted += 1;
                self.model.remove(key);
            }
            (Some(_), None) => panic!("it should not be there"),
            (Some(position), Some(expected)) => {
                let item = self.store.item(position);
                let found = Expected {
                    value: item.value().bytes().to_vec(),
                    flags: item.flags(),
                    version: item.version().0,
                    deadline: item.deadline(),
                    state: item.state() & IMAGE_STATE,
                };
                assert_eq!(found, *expected);
                assert_eq!(item.key(), key);
            }
        }
        position
    }

    fn set(&mut self, a: u8, b: u8, c: u8) {
        let key = Self::key(a);
        let old = self.find(&key);
        let length =
            [0, 3, 40, 250, 260, 900, 3000, 4095, 4096, 9000, 30_000][usize::from(b) % 11] + usize::from(b / 11);
        let value = Bytes::from(vec![c; length]);
        let parts = Parts {
            key: &key,
            value: match length {
                LARGE_BYTES.. => Value::Large(&value),
                _ => Value::Small(&value),
            },
            flags: u32::from(c & 1),
            deadline: self.deadline(c),
            version: Version(u64::from(c & 2)),
            accessed: Access::at(self.now.seconds()),
            state: c >> 3,
        };
        // What an item that refers to nothing has now, it may keep.
        let shrinks_to = old.map_or(0, |position| match self.store.item(position) {
            item if item.referenced_bytes() == 0 && parts.referenced_bytes() == 0 => item.bytes(),
            _ => 0,
        });
        let hash = PARTITIONER.place(&key).hash;
        match self.store.write(&mut self.budget, hash, old, &parts) {
            Ok(_) => {
                let expected = Expected {
                    value: value.to_vec(),
                    flags: parts.flags,
                    version: parts.version.0,
                    deadline: parts.deadline,
                    state: parts.state & IMAGE_STATE,
                };
                self.model.insert(key.clone(), expected);
            }
            Err(OutOfMemory) => {
                // A page more, a step of the index, and its larger value might have been too much; a shrinking item is not.
                let spare = self.limit.saturating_sub(self.budget.charged() as usize);
                assert!(spare < length + 70_000, "{length} refused with {spare} to spare");
                assert!(parts.bytes() > shrinks_to, "{shrinks_to} to {}", parts.bytes());
            }
        }
        // What others held makes no difference to it.
        drop(value);
        self.find(&key);
    }

    fn remove(&mut self, a: u8) {
        let key = Self::key(a);
        if let Some(position) = self.find(&key) {
            self.store.remove(&mut self.budget, position);
            self.model.remove(&key);
        }
    }

    fn get(&mut self, a: u8, b: u8) {
        if let Some(position) = self.find(&Self::key(a)) {
            self.store.mark_access(position, self.now.seconds());
            if b.is_multiple_of(5) {
                // A write, perhaps: the position is good no more.
                if self.store.set_state(&mut self.budget, position, WON, 0)
                    && let Some(expected) = self.model.get_mut(&Self::key(a))
                {
                    expected.state |= WON;
                }
                return;
            }
            if b.is_multiple_of(2)
                && let Value::Large(value) = self.store.item(position).value()
            {
                self.held.push(value.clone());
            }
        }
    }

    fn touch(&mut self, a: u8, b: u8) {
        let (key, deadline) = (Self::key(a), self.deadline(b));
        if let Some(position) = self.find(&key)
            && self.store.touch(&mut self.budget, position, deadline)
            && let Some(expected) = self.model.get_mut(&key)
        {
            expected.deadline = deadline;
        }
    }

    fn amend(&mut self, a: u8, b: u8) {
        let key = Self::key(a);
        if let Some(position) = self.find(&key)
            && self.store.amend(&mut self.budget, position, |parts| {
                parts.version = Version(u64::from(b));
                parts.flags = u32::from(b / 2);
                parts.state ^= b & IMAGE_STATE;
            })
            && let Some(expected) = self.model.get_mut(&key)
        {
            (expected.version, expected.flags) = (u64::from(b), u32::from(b / 2));
            expected.state ^= b & IMAGE_STATE;
        }
    }

    fn begin_image(&mut self) {
        // Who was evicted is not in it.
        (0..=u8::MAX).for_each(|number| _ = self.find(&Self::key(number)));
        let mut expected = self.model.clone();
        expected.retain(|_, item| !item.deadline.is_over(self.now));
        assert!(self.store.begin_image(&mut self.budget, self.now));
        self.image = Some(expected);
    }

    /// A piece of the image; true when nothing is missing.
    fn image_step(&mut self, stripes: usize, bytes: usize) -> bool {
        self.out.clear();
        let step = self.store.image_step(&mut self.budget, stripes, bytes, &mut self.out);
        assert_eq!(step.is_some(), self.image.is_some());
        let (Some(expected), Some(step)) = (&mut self.image, step) else {
            return true;
        };
        let (mut rest, mut items) = (&self.out[..], 0);
        while !rest.is_empty() {
            let Ok(Effect::Put(image)) = effect::read(&mut rest) else {
                panic!("an image has items only")
            };
            let found = Expected {
                value: image.value.to_vec(),
                flags: image.flags,
                version: 0,
                deadline: image.deadline,
                state: image.state,
            };
            let item = expected.remove(image.key);
            assert_eq!(Some(found), item.map(|item| Expected { version: 0, ..item }));
            items += 1;
        }
        assert_eq!(step.items, items);
        let payload: usize = expected.iter().map(|(key, item)| key.len() + item.value.len()).sum();
        assert!(self.store.image_backlog_bytes() <= payload + 21 * expected.len());
        if step.done {
            assert!(expected.is_empty(), "{} are missing", expected.len());
            self.image = None;
        }
        step.done
    }

    /// Time passes, and what is over goes.
    fn pass(&mut self, ms: u64) {
        self.now = UnixMillis(self.now.0 + ms);
        self.store.tick(&mut self.budget, self.now);
        while self.store.is_due(self.now) {
            self.store.expire(&mut self.budget, self.now, 100);
        }
        let second = self.now.0 / 1000;
        self.model.retain(|key, expected| {
            let is_long_over = matches!(expected.deadline, Deadline::At(moment) if moment.0 / 1000 < second);
            let found = self.store.find(PARTITIONER.place(key).hash, key).is_some();
            assert!(!(is_long_over && found), "its time is over, and it is still there");
            // In its last second it may be there or not.
            found || !expected.deadline.is_over(self.now)
        });
    }

    fn check_sums(&self) {
        let store = &self.store;
        let sum = store.resident_bytes() + store.index_bytes() + store.order_bytes() + store.lingering_bytes();
        assert_eq!(self.budget.charged() as usize, sum + store.image_bytes());
        assert_eq!(store.image_bytes() > 0, self.image.is_some());
        if !self.evicts {
            let payload = |(key, expected): (&Vec<u8>, &Expected)| key.len() + expected.value.len();
            assert_eq!(store.payload_bytes(), self.model.iter().map(payload).sum::<usize>());
            assert_eq!(store.len(), self.model.len());
        }
        assert!(store.len() <= self.model.len());
    }

    /// All is looked at once more, and removed; nothing stays charged but an empty index.
    fn end(mut self) {
        for number in 0..=u8::MAX {
            self.remove(number);
        }
        while !self.image_step(100, 1 << 16) {}
        assert_eq!((self.store.len(), self.store.payload_bytes()), (0, 0));
        if let Some(evicted) = self.store.take_evicted() {
            assert!(
                self.evicted <= evicted.new + evicted.old,
                "more are missing than were evicted"
            );
        }
        self.held.clear();
        self.pass(40_000_000_000_000);
        while self.store.tick(&mut self.budget, self.now) {}
        // What was being sent, or held by an image, is looked at in pieces, and there is no more of it than was ever set.
        for _ in 0..1000 {
            self.store.tick(&mut self.budget, self.now);
        }
        self.check_sums();
        assert_eq!(self.store.resident_bytes() + self.store.lingering_bytes(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 3 } else { 300 }, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn the_table_is_like_a_map(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            check(&data);
        }
    }
}
