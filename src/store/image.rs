//! What a table was like at one moment, written down while it goes on changing: a snapshot without a second process.
//!
//! The hashes are divided into *cells*, for about one item each. A walk writes down one cell after the other, a bounded piece at
//! a time. Whoever is about to change a cell which the walk has not reached saves it first: its items are copied as they still are,
//! to be written down with the next piece, and a bit says that the walk passes over the cell. That holds for whoever inserts an
//! item, too. So it makes no difference who comes to a cell first: what is written down is what was there in the beginning,
//! once.
//!
//! A cell is a range of hashes and no place in the index ([`Index::visit_part`]): it is the same cell when a segment grows, splits,
//! shrinks or is merged, and nothing needs to be done when that happens. The bits are two bytes for 256 fractions, or some
//! 16 items. A cell has so few items that saving one costs whoever changes it hardly more than what it changes, and the home bucket
//! where they stand is the one it has just looked at.
//!
//! A large value is not copied to be saved, but held. The table counts it as one that is still being sent, so it is charged once
//! however long it is held.

use super::index::{FRACTIONS, Index, Keys, Location, part_of};
use super::item::{ItemRef, KEY_ENCODED, STALE, WON};
use super::{ItemKeys, Position, Store, item_at};
use crate::budget::Budget;
use crate::effect;
use crate::model::{Deadline, UnixMillis, Value};
use bytes::Bytes;
use std::collections::VecDeque;

/// The bits of an item's state that outlive the process. Whether it was read does not.
pub(crate) const IMAGE_STATE: u8 = STALE | WON | KEY_ENCODED;

/// A segment of some 2000 items has 32 768 fractions.
const CELL_FRACTIONS: u32 = 16;
/// What the walk looks at in one go: as many cells as a word has bits.
const STRIPE_FRACTIONS: u32 = CELL_FRACTIONS * u16::BITS;
/// Stripes of each prefix.
const STRIPES: usize = (FRACTIONS / STRIPE_FRACTIONS) as usize;
/// Saved items are copied to buffers of this size, so that nothing that grows has to be copied once more.
const BUFFER_BYTES: usize = 1 << 14;

/// What came of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ImageStep {
    /// So many items were appended.
    pub(crate) items: u64,
    /// They were the last.
    pub(crate) done: bool,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Image {
    /// When it began: what was over then is not in it.
    begun: UnixMillis,
    /// Cells are told apart by so many bits of the hash, and by the fraction.
    prefix_bits: u32,
    /// By stripe, a bit for each cell that was saved.
    saved: Vec<u16>,
    /// The stripe that the walk comes to next.
    next: usize,
    backlog: Backlog,
    /// Reused: items that are about to be written down.
    met: Vec<Location>,
    /// Bytes charged for all this.
    charged: usize,
}

/// Items that were saved and not written down yet.
#[derive(Debug, Default)]
struct Backlog {
    pieces: VecDeque<Piece>,
    /// Memory that the pieces refer to, without large values.
    memory_bytes: usize,
    /// How long all will be when they are written down.
    bytes: usize,
}

#[derive(Debug)]
enum Piece {
    /// So many items, as effects.
    Small { items: u64, effects: Vec<u8> },
    /// One with a large value.
    Large(Large),
}

#[derive(Debug)]
struct Large {
    key: Box<[u8]>,
    value: Bytes,
    flags: u32,
    deadline: Deadline,
    state: u8,
}

/// Nearly how long an item is as an effect, and no less.
fn effect_bytes(image: &effect::Image<'_>) -> usize {
    const HEAD_BYTES_MAX: usize = 8 + 4 + 8 + 1;
    HEAD_BYTES_MAX + image.key.len() + image.value.len()
}

impl Backlog {
    fn push(&mut self, image: &effect::Image<'_>, value: Value<'_>) {
        let bytes = effect_bytes(image);
        if let Value::Large(value) = value {
            self.bytes += bytes;
            self.memory_bytes += image.key.len();
            return self.pieces.push_back(Piece::Large(Large {
                key: image.key.into(),
                value: value.clone(),
                flags: image.flags,
                deadline: image.deadline,
                state: image.state,
            }));
        }
        let has_room = |effects: &Vec<u8>| effects.capacity() - effects.len() >= bytes;
        if !matches!(self.pieces.back(), Some(Piece::Small { effects, .. }) if has_room(effects)) {
            let effects = Vec::with_capacity(bytes.max(BUFFER_BYTES));
            self.memory_bytes += effects.capacity();
            self.pieces.push_back(Piece::Small { items: 0, effects });
        }
        if let Some(Piece::Small { items, effects }) = self.pieces.back_mut() {
            let before = effects.len();
            effect::push_put(effects, image);
            self.bytes += effects.len() - before;
            *items += 1;
        }
    }

    /// Appends a piece, and says how many items that was.
    fn pop(&mut self, out: &mut Vec<u8>) -> Option<u64> {
        match self.pieces.pop_front()? {
            Piece::Small { items, effects } => {
                out.extend_from_slice(&effects);
                self.bytes -= effects.len();
                self.memory_bytes -= effects.capacity();
                Some(items)
            }
            Piece::Large(large) => {
                let image = effect::Image {
                    key: &large.key,
                    value: &large.value,
                    flags: large.flags,
                    deadline: large.deadline,
                    state: large.state,
                };
                effect::push_put(out, &image);
                self.bytes -= effect_bytes(&image);
                self.memory_bytes -= large.key.len();
                Some(1)
            }
        }
    }
}

impl Image {
    /// An image of what the index leads to now. `None` when there is no memory for the bits.
    fn new(index: &Index, begun: UnixMillis) -> Option<Self> {
        let prefix_bits = index.prefix_bits();
        let (mut saved, stripes) = (Vec::new(), STRIPES << prefix_bits);
        saved.try_reserve_exact(stripes).ok()?;
        saved.resize(stripes, 0);
        Some(Self {
            begun,
            prefix_bits,
            saved,
            next: 0,
            backlog: Backlog::default(),
            met: vec![],
            charged: 0,
        })
    }

    fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.saved.capacity() * size_of::<u16>()
            + self.met.capacity() * size_of::<Location>()
            + self.backlog.pieces.capacity() * size_of::<Piece>()
            + self.backlog.memory_bytes
    }

    fn recharge(&mut self, budget: &mut Budget) {
        let bytes = self.bytes();
        let before = std::mem::replace(&mut self.charged, bytes);
        // What an item was cannot be forgotten for want of memory: whoever begins an image looks after its backlog.
        budget.charge_always(bytes.saturating_sub(before));
        budget.release(before.saturating_sub(bytes));
    }

    /// An item as the image has it. `None` when it was over.
    fn of<'a>(item: ItemRef<'a>, begun: UnixMillis) -> Option<effect::Image<'a>> {
        let deadline = item.deadline();
        (!deadline.is_over(begun)).then(|| effect::Image {
            key: item.key(),
            value: item.value().bytes(),
            flags: item.flags(),
            deadline,
            state: item.state() & IMAGE_STATE,
        })
    }

    /// The cell of this hash is about to change.
    fn save(&mut self, index: &Index, keys: &ItemKeys<'_>, hash: u64) {
        let (prefix, fraction) = part_of(hash, self.prefix_bits);
        let stripe = prefix * STRIPES + (fraction / STRIPE_FRACTIONS) as usize;
        let bit = 1 << (fraction % STRIPE_FRACTIONS / CELL_FRACTIONS);
        if stripe < self.next || self.saved[stripe] & bit != 0 {
            return;
        }
        self.saved[stripe] |= bit;
        let start = fraction / CELL_FRACTIONS * CELL_FRACTIONS;
        let (begun, backlog) = (self.begun, &mut self.backlog);
        let cell = start..start + CELL_FRACTIONS;
        index.visit_part(self.prefix_bits, prefix, cell, keys, |location, _| {
            let item = item_at(keys.0, location);
            if let Some(image) = Self::of(item, begun) {
                backlog.push(&image, item.value());
            }
        });
    }

    /// Walks on by one stripe: appends its items, but for those with large values, which join the backlog. Says how many it
    /// appended.
    fn walk(&mut self, index: &Index, keys: &ItemKeys<'_>, out: &mut Vec<u8>) -> u64 {
        let (stripe, saved) = (self.next, self.saved[self.next]);
        self.next += 1;
        if saved == u16::MAX {
            return 0;
        }
        let start = (stripe % STRIPES) as u32 * STRIPE_FRACTIONS;
        let fractions = start..start + STRIPE_FRACTIONS;
        let mut met = std::mem::take(&mut self.met);
        index.visit_part(
            self.prefix_bits,
            stripe / STRIPES,
            fractions,
            keys,
            |location, fraction| {
                if saved >> ((fraction - start) / CELL_FRACTIONS) & 1 == 0 {
                    // All are asked for before the first is looked at.
                    keys.ask(location);
                    met.push(location);
                }
            },
        );
        let mut items = 0;
        for location in met.drain(..) {
            let item = item_at(keys.0, location);
            let Some(image) = Self::of(item, self.begun) else {
                continue;
            };
            match item.value() {
                Value::Small(_) => {
                    effect::push_put(out, &image);
                    items += 1;
                }
                large => self.backlog.push(&image, large),
            }
        }
        self.met = met;
        items
    }
}

impl Store {
    /// Begins an image of what is in the table and not over `now`; one that is under way is given up. False when there is no
    /// memory for it.
    pub(crate) fn begin_image(&mut self, budget: &mut Budget, now: UnixMillis) -> bool {
        self.drop_image(budget);
        self.image = Image::new(&self.index, now).map(Box::new);
        if let Some(image) = &mut self.image {
            image.recharge(budget);
        }
        self.image.is_some()
    }

    /// Appends more items of the image, each as [`effect::push_put`]: looks at up to `stripes` stripes, for some 16 items each, and
    /// appends `bytes` bytes, or a little more: an item, or a buffer of saved ones. With the last of them the image is over. `None`
    /// when none is under way.
    pub(crate) fn image_step(
        &mut self,
        budget: &mut Budget,
        stripes: usize,
        bytes: usize,
        out: &mut Vec<u8>,
    ) -> Option<ImageStep> {
        let image = self.image.as_deref_mut()?;
        let keys = ItemKeys(&self.memory, self.partitioner);
        let (end, last) = (out.len().saturating_add(bytes), image.next.saturating_add(stripes));
        let mut step = ImageStep::default();
        while out.len() < end {
            // What was saved goes first: the sooner its memory comes back.
            if let Some(items) = image.backlog.pop(out) {
                step.items += items;
            } else if image.next == image.saved.len() {
                step.done = true;
                break;
            } else if image.next < last {
                step.items += image.walk(&self.index, &keys, out);
            } else {
                break;
            }
        }
        if step.done {
            self.drop_image(budget);
        } else {
            image.recharge(budget);
        }
        Some(step)
    }

    /// Gives up the image; true when one was under way.
    pub(crate) fn drop_image(&mut self, budget: &mut Budget) -> bool {
        let image = self.image.take();
        image.iter().for_each(|image| budget.release(image.charged));
        image.is_some()
    }

    /// Bytes of items that were saved and that [`Store::image_step`] has not appended yet. They grow as clients write, up to
    /// what the table held when the image began: whoever cannot take them must keep the clients from writing.
    pub(crate) fn image_backlog_bytes(&self) -> usize {
        self.image.as_ref().map_or(0, |image| image.backlog.bytes)
    }

    /// Where items are evicted, so many bytes may be charged above the limit, because the backlog takes as many and gives them
    /// back soon. Evicting what is then saved frees nothing: for one large value all others would go.
    #[cold]
    pub(super) fn image_lends(&self, budget: &Budget, bytes: usize) -> bool {
        let backlog = self.image_backlog_bytes() as i64;
        backlog > 0 && self.evicts() && budget.room() + backlog >= bytes as i64
    }

    /// Bytes charged for the image, without large values, which are charged as the table's.
    pub(crate) fn image_bytes(&self) -> usize {
        self.image.as_ref().map_or(0, |image| image.charged)
    }

    /// An item of this hash is about to change, go or come.
    #[cold]
    #[inline(never)]
    pub(super) fn save_cell(&mut self, budget: &mut Budget, hash: u64) {
        if let Some(image) = &mut self.image {
            let keys = ItemKeys(&self.memory, self.partitioner);
            image.save(&self.index, &keys, hash);
            image.recharge(budget);
        }
    }

    /// The item at a position is about to change or go.
    #[cold]
    #[inline(never)]
    pub(super) fn save_item(&mut self, budget: &mut Budget, position: Position) {
        let hash = self.hash_at(self.index.location(position));
        self.save_cell(budget, hash);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Access, FETCHED, Parts, WON};
    use super::*;
    use crate::budget::Pool;
    use crate::effect::Effect;
    use crate::model::Version;
    use crate::partition::Partitioner;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const PARTITIONER: Partitioner = Partitioner::Hashed { seed: 9 };
    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    /// What the item of a key is after so many changes.
    struct Item {
        key: Vec<u8>,
        value: Bytes,
        flags: u32,
        deadline: Deadline,
        state: u8,
    }

    fn item(number: u32, change: u32) -> Item {
        let length = match (number + change) % 50 {
            0 => 5000,
            _ => (number * 7 + change * 13) as usize % 300,
        };
        let mut value = change.to_le_bytes().to_vec();
        value.resize(4 + length, number as u8);
        Item {
            key: format!("key{number}").into_bytes(),
            value: value.into(),
            flags: if change.is_multiple_of(3) { change } else { 0 },
            deadline: match change % 5 {
                0 => Deadline::At(UnixMillis(NOW.0 + 1_000_000_000 + u64::from(change))),
                _ => Deadline::Never,
            },
            state: [0, STALE, KEY_ENCODED, STALE | KEY_ENCODED][change as usize % 4]
                | [0, WON, FETCHED][change as usize % 3],
        }
    }

    fn budget() -> Budget {
        Budget::new(Pool::new(1 << 30))
    }

    /// A table and what should be in it: by number, how often it was changed.
    struct World {
        store: Store,
        budget: Budget,
        model: HashMap<u32, u32>,
        changes: u32,
        image: Option<Expected>,
        out: Vec<u8>,
    }

    /// What should be in the image, and was not seen yet.
    struct Expected {
        missing: HashMap<u32, u32>,
        items: u64,
    }

    impl World {
        fn new(evicts: bool, mut budget: Budget) -> Self {
            Self {
                store: Store::new(PARTITIONER, evicts, NOW, &mut budget),
                budget,
                model: HashMap::new(),
                changes: 0,
                image: None,
                out: vec![],
            }
        }

        fn find(&self, number: u32) -> Option<Position> {
            let key = format!("key{number}").into_bytes();
            self.store.find(PARTITIONER.place(&key).hash, &key)
        }

        fn set(&mut self, number: u32) {
            self.changes += 1;
            let old = self.find(number);
            let item = item(number, self.changes);
            let parts = Parts {
                key: &item.key,
                value: match item.value.len() {
                    4096.. => Value::Large(&item.value),
                    _ => Value::Small(&item.value),
                },
                flags: item.flags,
                deadline: item.deadline,
                version: Version(u64::from(self.changes % 2)),
                accessed: Access::at(NOW.seconds()),
                state: item.state,
            };
            let hash = PARTITIONER.place(&item.key).hash;
            self.store.write(&mut self.budget, hash, old, &parts).unwrap();
            self.model.insert(number, self.changes);
        }

        fn remove(&mut self, number: u32) {
            if let Some(position) = self.find(number) {
                self.store.remove(&mut self.budget, position);
            }
            self.model.remove(&number);
        }

        fn begin(&mut self) {
            let mut missing = std::mem::take(&mut self.model);
            missing.retain(|number, _| self.find(*number).is_some());
            self.model = missing.clone();
            assert!(self.store.begin_image(&mut self.budget, NOW));
            self.image = Some(Expected {
                items: missing.len() as u64,
                missing,
            });
        }

        /// True when there is nothing more to do.
        fn step(&mut self, stripes: usize, bytes: usize) -> bool {
            let Some(expected) = &mut self.image else { return true };
            self.out.clear();
            let step = self
                .store
                .image_step(&mut self.budget, stripes, bytes, &mut self.out)
                .unwrap();
            let mut rest = &self.out[..];
            let mut items = 0;
            while !rest.is_empty() {
                let Ok(Effect::Put(put)) = effect::read(&mut rest) else {
                    panic!("another effect")
                };
                let number = std::str::from_utf8(&put.key[3..]).unwrap().parse().unwrap();
                let change = expected
                    .missing
                    .remove(&number)
                    .expect("it was there, and was not seen yet");
                let item = item(number, change);
                assert!(put.value == &item.value[..], "{number}");
                assert_eq!(
                    (put.flags, put.deadline, put.state),
                    (item.flags, item.deadline, item.state & IMAGE_STATE)
                );
                items += 1;
            }
            assert_eq!(step.items, items);
            expected.items -= items;
            // Up to an item, or a buffer, more than was asked for; or up to what a stripe has.
            assert!(
                self.out.len() < bytes + 2 * BUFFER_BYTES,
                "{} of {bytes}",
                self.out.len()
            );
            if step.done {
                assert_eq!((expected.missing.len(), expected.items), (0, 0));
                assert_eq!((self.store.image_backlog_bytes(), self.store.image_bytes()), (0, 0));
                self.image = None;
            }
            step.done
        }

        fn check_charges(&self) {
            let store = &self.store;
            let sum = store.resident_bytes() + store.index_bytes() + store.order_bytes() + store.lingering_bytes();
            assert_eq!(self.budget.charged() as usize, sum + store.image_bytes());
        }
    }

    /// Numbers that look random.
    fn next(state: &mut u64) -> u32 {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as u32
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 2 } else { 16 }, failure_persistence: None, ..ProptestConfig::default() })]

        /// While the table doubles several times, shrinks to nearly nothing, or stays as large and changes all over: images
        /// that follow one another have what was there when each began.
        #[test]
        fn an_image_is_what_was_there(seed: u64, before in 1..20_000u32, after in 1..20_000u32, stripes in 1..40usize, bytes in 1..40_000usize, every in 1..60u32) {
            let scale = if cfg!(miri) { 200 } else { 1 };
            let (before, after) = (before / scale + 1, after / scale + 1);
            let mut world = World::new(false, budget());
            let mut random = seed;
            (0..before).for_each(|number| world.set(number));
            world.begin();
            // One more or one less in every second round, from the number before to the number after, and others.
            let mut last = before;
            let mut images = 0;
            while last != after || images < 2 {
                if last < after {
                    world.set(last);
                    last += 1;
                } else if last > after {
                    last -= 1;
                    world.remove(last);
                    world.store.tick(&mut world.budget, NOW);
                }
                let number = next(&mut random) % last;
                match next(&mut random) % 4 {
                    0 => world.set(number),
                    1 => {
                        world.remove(number);
                        world.set(number);
                    }
                    _ => {}
                }
                if next(&mut random).is_multiple_of(every) && world.step(stripes, bytes) {
                    images += 1;
                    world.check_charges();
                    world.begin();
                }
            }
            while !world.step(1000, 1 << 20) {
                world.check_charges();
            }
            world.check_charges();
        }
    }

    /// The same in a table that is full, and evicts for everything that comes.
    #[test]
    fn what_is_evicted_is_in_the_image() {
        let limit = if cfg!(miri) { 400_000 } else { 4_000_000 };
        let mut world = World::new(true, Budget::new(Pool::new(limit)));
        let count = limit as u32 / 50;
        (0..count).for_each(|number| world.set(number));
        for round in 1..4 {
            world.begin();
            let held = world.model.len();
            assert!(held > 1000 || cfg!(miri), "{held}");
            let mut number = round * count;
            while !world.step(2, 4000) {
                (0..4).for_each(|more| world.set(number + more));
                number += 4;
                world.check_charges();
            }
            assert!(number > round * count + count / 100);
            (0..count / 2).for_each(|more| world.set(number + more));
        }
    }

    /// Evicting what an image must save frees no memory; all the same, not everything is evicted for the sake of a few.
    #[test]
    fn an_image_does_not_empty_a_table_that_is_full() {
        let large = Bytes::from(vec![7; 20_000]);
        for value in [Value::Large(&large), Value::Small(&[7; 300])] {
            let limit = if cfg!(miri) { 200_000 } else { 4_000_000 };
            let mut budget = Budget::new(Pool::new(limit));
            let mut store = Store::new(PARTITIONER, true, NOW, &mut budget);
            let bytes = value.bytes().len();
            let count = 3 * limit as usize / bytes;
            // Each has memory of its own.
            let add = |store: &mut Store, budget: &mut Budget, number: usize| {
                let key = format!("key{number}").into_bytes();
                let own = Bytes::from(vec![7; bytes]);
                let value = match value {
                    Value::Large(_) => Value::Large(&own),
                    small => small,
                };
                put(store, budget, &key, value);
            };
            (0..count).for_each(|number| add(&mut store, &mut budget, number));
            let (items, more) = (store.len(), count / 20);
            store.take_evicted();
            assert!(store.begin_image(&mut budget, NOW));
            (count..count + more).for_each(|number| add(&mut store, &mut budget, number));
            let evicted = store.take_evicted().unwrap();
            assert!(store.image_backlog_bytes() > 0, "some were evicted, and saved");
            assert!(
                evicted.new + evicted.old < 2 * more as u64 + 32,
                "{evicted:?} of {items} for {more}"
            );
            // What is charged above the limit is not more than what is saved.
            assert!(budget.charged() < limit + store.image_backlog_bytes() as u64 + 100_000);
            store.drop_image(&mut budget);
            for _ in 0..100 {
                store.tick(&mut budget, NOW);
            }
            assert!(budget.charged() < limit + 100_000);
        }
    }

    /// Index segments do split, and do shrink, while the walk is under way.
    #[test]
    fn the_index_grows_and_shrinks_meanwhile() {
        let (few, many) = if cfg!(miri) { (200, 4000) } else { (2000, 60_000) };
        let mut world = World::new(false, budget());
        (0..few).for_each(|number| world.set(number));
        world.begin();
        assert!(!world.step(30, 1 << 20));
        let small = world.store.index_bytes();
        (few..many).for_each(|number| world.set(number));
        assert!(world.store.index_bytes() > 5 * small);
        assert!(!world.step(30, 1 << 20));
        while !world.step(30, 1 << 20) {}
        world.begin();
        assert!(!world.step(30, 1 << 20));
        let large = world.store.index_bytes();
        for number in 0..many - few / 10 {
            world.remove(number);
            world.store.tick(&mut world.budget, NOW);
        }
        while world.store.tick(&mut world.budget, NOW) {}
        assert!(world.store.index_bytes() < large / 4);
        // All that the walk had not reached is in the backlog.
        let backlog = world.store.image_backlog_bytes();
        assert!(backlog > (many - few) as usize * 100, "{backlog}");
        assert!(world.store.image_bytes() < backlog * 21 / 20 + BUFFER_BYTES);
        while !world.step(30, 1 << 20) {}
        world.check_charges();
    }

    fn put<'a>(store: &mut Store, budget: &mut Budget, key: &'a [u8], value: Value<'a>) {
        let hash = PARTITIONER.place(key).hash;
        let parts = Parts {
            key,
            value,
            flags: 0,
            deadline: Deadline::Never,
            version: Version(0),
            accessed: Access::at(NOW.seconds()),
            state: 0,
        };
        let old = store.find(hash, key);
        store.write(budget, hash, old, &parts).unwrap();
    }

    /// A large value that is replaced is held until the image has it, and charged once all the while.
    #[test]
    fn large_values_are_held_and_charged_once() {
        let mut budget = budget();
        let mut store = Store::new(PARTITIONER, false, NOW, &mut budget);
        let value = |byte| Bytes::from(vec![byte; 100_000]);
        let charged = |store: &Store, budget: &Budget| budget.charged() as usize - store.image_bytes();
        put(&mut store, &mut budget, b"key", Value::Large(&value(1)));
        let with_one = charged(&store, &budget);
        assert!(store.begin_image(&mut budget, NOW));
        put(&mut store, &mut budget, b"key", Value::Large(&value(2)));
        assert_eq!(
            (store.lingering_bytes(), store.image_backlog_bytes() / 1000),
            (100_000, 100)
        );
        put(&mut store, &mut budget, b"key", Value::Large(&value(3)));
        assert_eq!(store.lingering_bytes(), 100_000, "nobody needs the second");
        assert_eq!(charged(&store, &budget), with_one + 100_000);
        assert!(store.image_bytes() < 2000, "it is not copied");
        let mut out = vec![];
        while !store.image_step(&mut budget, 10, 10, &mut out).unwrap().done {}
        let Ok(Effect::Put(put)) = effect::read(&mut &out[..]) else {
            panic!("no item")
        };
        assert_eq!((put.key, put.value), (&b"key"[..], &value(1)[..]));
        store.tick(&mut budget, NOW);
        assert_eq!((store.lingering_bytes(), store.image_bytes()), (0, 0));
        assert_eq!(budget.charged() as usize, with_one);
    }

    /// Everything that can change an item goes through here: what is touched, marked, amended, and read.
    #[test]
    fn every_field_is_as_it_was() {
        let mut world = World::new(false, budget());
        (0..200).for_each(|number| world.set(number));
        world.begin();
        for number in 0..200 {
            let position = world.find(number).unwrap();
            let budget = &mut world.budget;
            match number % 6 {
                0 => assert!(world.store.touch(budget, position, Deadline::At(UnixMillis(NOW.0 + 5)))),
                1 => assert!(world.store.touch(budget, position, Deadline::Never)),
                2 => assert!(world.store.set_state(budget, position, STALE, KEY_ENCODED)),
                3 => assert!(world.store.set_state(budget, position, WON, 0)),
                4 => assert!(world.store.amend(budget, position, |parts| {
                    (parts.flags, parts.state, parts.value) = (7, STALE, Value::Small(b""));
                })),
                _ => world.store.mark_access(position, NOW.seconds() + 1000),
            }
        }
        // What is over a little later was not over then.
        let later = UnixMillis(NOW.0 + 5000);
        world.store.tick(&mut world.budget, later);
        while world.store.is_due(later) {
            world.store.expire(&mut world.budget, later, 100);
        }
        assert!(world.find(0).is_none());
        // Nor is what came since.
        (200..300).for_each(|number| world.set(number));
        while !world.step(1, 1) {}
        world.check_charges();
    }

    /// What was over when the image began is not in it, though it is still in the table.
    #[test]
    fn what_was_over_is_left_out() {
        let mut world = World::new(false, budget());
        (0..100).for_each(|number| world.set(number));
        for number in (0..100).step_by(3) {
            let position = world.find(number).unwrap();
            assert!(world.store.touch(&mut world.budget, position, Deadline::At(NOW)));
        }
        world.begin();
        let expected = world.image.as_mut().unwrap();
        expected.missing.retain(|number, _| number % 3 != 0);
        expected.items = 66;
        // Some are removed before the walk comes, some are not.
        (0..50).for_each(|number| world.remove(number));
        while !world.step(7, 100) {}
    }

    /// An image that is given up, by its owner or because the table is emptied, leaves nothing behind.
    #[test]
    fn what_is_given_up_is_gone() {
        let mut world = World::new(false, budget());
        (0..5000).for_each(|number| world.set(number));
        let charged = |world: &World| world.store.image_bytes();
        assert!(!world.store.drop_image(&mut world.budget));
        world.begin();
        (0..3000).for_each(|number| world.set(number));
        assert!(charged(&world) > world.store.image_backlog_bytes() / 2 && world.store.image_backlog_bytes() > 100_000);
        // Begun anew, it is about what there is now.
        world.begin();
        assert_eq!(world.store.image_backlog_bytes(), 0);
        (1000..2000).for_each(|number| world.remove(number));
        assert!(world.store.drop_image(&mut world.budget));
        assert_eq!((charged(&world), world.store.image_backlog_bytes()), (0, 0));
        assert_eq!(world.store.image_step(&mut world.budget, 1, 1, &mut vec![]), None);
        while world.store.lingering_bytes() > 0 {
            world.store.tick(&mut world.budget, NOW);
        }
        world.check_charges();
        world.begin();
        (2000..3000).for_each(|number| world.set(number));
        assert!(world.store.clear(&mut world.budget) && !world.store.clear(&mut world.budget));
        assert_eq!(charged(&world), 0);
        world.check_charges();
    }
}
