//! One shard's table: items found by key, charged to the core's budget, reclaimed when their time is over.
//!
//! It knows nothing of conditions or commands: [`crate::shard`] decides what to write, this module holds it. All `unsafe`
//! code of the data path lives here and in its three parts: [`index`] (where an item is), [`memory`] (what room it has there)
//! and [`item`] (what it is). The index knows places and the memory slots; that there is an item in each slot to which the index
//! leads, and nowhere else, is this module's part of the bargain.

mod index;
mod item;
mod memory;

pub(crate) use index::Position;
pub(crate) use item::{Access, FETCHED, ItemRef, KEY_ENCODED, Parts, STALE, WON};

use crate::budget::Budget;
use crate::model::{Deadline, UnixMillis, Value};
use crate::partition::Partitioner;
use index::{Index, Location};
use item::ItemMut;
use memory::{Memory, slot_bytes};

/// The memory limit, or the allocator, refuses the write. What was there before is unchanged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OutOfMemory;

/// The table of one shard.
pub(crate) struct Store {
    index: Index,
    memory: Memory,
    /// Indexes of emptied tables whose items are still to be freed, a segment at a time.
    emptied: Vec<Index>,
    partitioner: Partitioner,
    /// Bytes of values that items refer to, those of emptied tables included.
    referenced_bytes: usize,
    /// How many items have a deadline: without any, sweeping is skipped.
    with_deadline: usize,
    sweep_at: u64,
    /// No item ends before this moment: until then there is nothing to sweep.
    due: UnixMillis,
    /// The same for what the round of sweeping under way has seen.
    due_seen: UnixMillis,
    /// Reused: items to be moved, or whose time is over.
    chosen: Vec<Location>,
    /// Reused: an item that is being rewritten.
    copy: Vec<u8>,
}

const NEVER_DUE: UnixMillis = UnixMillis(u64::MAX);

/// The item at a location, borrowed from the memory that it lies in.
#[inline(always)]
fn item_at(memory: &Memory, location: Location) -> ItemRef<'_> {
    // SAFETY: locations come from the index, which leads to items only; they change through `&mut Store` alone, and `memory` is
    // borrowed as long as the item.
    unsafe { ItemRef::at(memory.address(location)) }
}

/// The item at a location is gone: frees its slot, and returns how many bytes it referred to.
fn free_item(memory: &mut Memory, budget: &mut Budget, location: Location) -> usize {
    let referenced = item_at(memory, location).referenced_bytes();
    // SAFETY: the caller has taken the location out of the index, so nobody leads to the item any more.
    unsafe { item::drop_reference(memory.address(location)) };
    memory.free(budget, location);
    budget.release(referenced);
    referenced
}

impl Store {
    /// An empty table.
    ///
    /// # Panics
    /// When the system has not even 16 KiB, or no addresses: there is no server without an index.
    pub(crate) fn new(partitioner: Partitioner, budget: &mut Budget) -> Self {
        let index = Index::new().expect("memory for an empty index");
        budget.charge_always(index.bytes());
        Self {
            index,
            memory: Memory::new().expect("a range of addresses"),
            emptied: vec![],
            partitioner,
            referenced_bytes: 0,
            with_deadline: 0,
            sweep_at: 0,
            due: NEVER_DUE,
            due_seen: NEVER_DUE,
            chosen: vec![],
            copy: vec![],
        }
    }

    /// How many items there are, those whose time is over but which nobody met yet included.
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// Bytes that items take: their slots, and what they refer to.
    pub(crate) fn item_bytes(&self) -> usize {
        self.memory.live_bytes() + self.referenced_bytes
    }

    /// Bytes charged for the items: whole pages, and what they refer to.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.memory.resident_bytes() + self.referenced_bytes
    }

    /// Bytes charged for the index.
    pub(crate) fn index_bytes(&self) -> usize {
        self.index.bytes()
    }

    /// First stage of looking ahead: fetches the bucket.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, hash: u64) {
        self.index.prefetch_bucket(hash);
    }

    /// Second stage of looking ahead: fetches the item.
    #[inline]
    pub(crate) fn prefetch_item(&self, hash: u64) {
        if let Some(location) = self.index.likely(hash) {
            let start = self.memory.address(location).as_ptr();
            index::prefetch(start);
            index::prefetch(start.wrapping_add(64));
        }
    }

    /// Where the item of `key` is, whether its time is over or not. The position is good until the next insertion or removal.
    #[inline(always)]
    pub(crate) fn find(&self, hash: u64, key: &[u8]) -> Option<Position> {
        self.index
            .find(hash, |location| item_at(&self.memory, location).key() == key)
    }

    /// The item at a position.
    #[inline]
    pub(crate) fn item(&self, position: Position) -> ItemRef<'_> {
        item_at(&self.memory, self.index.location(position))
    }

    #[inline]
    fn item_mut(&mut self, position: Position) -> ItemMut<'_> {
        let start = self.memory.address(self.index.location(position));
        // SAFETY: the index leads to items only, and `&mut self` excludes other references to them.
        unsafe { ItemMut::at(start) }
    }

    /// Notes that the item was read.
    #[inline]
    pub(crate) fn mark_access(&mut self, position: Position, now_s: u32) {
        self.item_mut(position).mark_access(Access::at(now_s));
    }

    /// Sets and clears state bits of the item; false when there is no memory for the field.
    pub(crate) fn set_state(&mut self, budget: &mut Budget, position: Position, set: u8, clear: u8) -> bool {
        self.item_mut(position).set_state(set, clear)
            || self.amend(budget, position, |parts| parts.state = parts.state & !clear | set)
    }

    /// Bytes that an item at a position is charged with.
    pub(crate) fn charged_bytes(&self, position: Position) -> usize {
        let location = self.index.location(position);
        self.memory.slot_bytes_at(location) + item_at(&self.memory, location).referenced_bytes()
    }

    /// How long the value of `key` is; 0 when there is none.
    pub(crate) fn value_len(&self, hash: u64, key: &[u8]) -> usize {
        self.find(hash, key)
            .map_or(0, |position| self.item(position).value_len())
    }

    /// How many bytes more than now a write may charge, nearly: it may have to begin a page.
    pub(crate) fn needed_bytes(&self, hash: u64, old: Option<Position>, parts: &Parts<'_>) -> usize {
        let after = slot_bytes(parts.bytes()) + parts.referenced_bytes();
        match old {
            Some(position) => after.saturating_sub(self.charged_bytes(position)),
            None => after + self.index.growth_bytes(hash),
        }
    }

    /// A slot for `bytes` bytes.
    #[inline]
    fn allocate(&mut self, budget: &mut Budget, bytes: usize) -> Result<Location, OutOfMemory> {
        loop {
            match self.memory.allocate(budget, bytes) {
                Some(location) => return Ok(location),
                None if self.reclaim(budget) => {}
                None => return Err(OutOfMemory),
            }
        }
    }

    /// Charges bytes that are not the memory's.
    #[inline]
    fn charge(&mut self, budget: &mut Budget, bytes: usize) -> Result<(), OutOfMemory> {
        while !budget.charge(bytes) {
            if !self.reclaim(budget) {
                return Err(OutOfMemory);
            }
        }
        Ok(())
    }

    /// What an emptied table, or a size with many free slots, still holds must not make a write fail. False when there is
    /// nothing like that.
    #[cold]
    fn reclaim(&mut self, budget: &mut Budget) -> bool {
        self.reclaim_some(budget, 16)
    }

    fn reclaim_some(&mut self, budget: &mut Budget, segments: usize) -> bool {
        self.free_emptied(budget, segments) || self.tighten(budget) || self.memory.trim(budget)
    }

    /// Writes an item in the place of `old`, or anew.
    #[inline]
    pub(crate) fn write(
        &mut self,
        budget: &mut Budget,
        hash: u64,
        old: Option<Position>,
        parts: &Parts<'_>,
    ) -> Result<Position, OutOfMemory> {
        let old_item = old.map(|position| self.item(position));
        if let (Some(position), Some(item)) = (old, old_item)
            && item.is_as_large_as(parts)
        {
            // The usual case.
            let had_deadline = item.deadline() != Deadline::Never;
            let location = self.index.location(position);
            // SAFETY: as in `overwrite`; there is no reference to drop.
            unsafe { item::write(self.memory.address(location), parts) };
            self.count_deadline(had_deadline, parts.deadline);
            return Ok(position);
        }
        let (referenced, referenced_before) = (parts.referenced_bytes(), old_item.map_or(0, ItemRef::referenced_bytes));
        let had_deadline = old_item.is_some_and(|item| item.deadline() != Deadline::Never);
        // Only growth is charged before it happens: at the limit, a write that shrinks an item must go through.
        let more = referenced.saturating_sub(referenced_before);
        if more > 0 {
            self.charge(budget, more)?;
        }
        let written = match old {
            Some(position) => self.overwrite(budget, position, parts).map(|()| position),
            None => self.insert(budget, hash, parts),
        };
        if written.is_err() {
            budget.release(more);
            return written;
        }
        budget.release(referenced_before.saturating_sub(referenced));
        self.referenced_bytes = self.referenced_bytes + referenced - referenced_before;
        self.count_deadline(had_deadline, parts.deadline);
        written
    }

    #[inline]
    fn count_deadline(&mut self, had_deadline: bool, deadline: Deadline) {
        let has_deadline = deadline != Deadline::Never;
        self.with_deadline = self.with_deadline + usize::from(has_deadline) - usize::from(had_deadline);
        self.note_deadline(deadline);
    }

    fn overwrite(&mut self, budget: &mut Budget, position: Position, parts: &Parts<'_>) -> Result<(), OutOfMemory> {
        let bytes = parts.bytes();
        let slot_now = self.memory.slot_bytes_at(self.index.location(position));
        let elsewhere = if slot_bytes(bytes) == slot_now {
            None
        } else {
            match self.allocate(budget, bytes) {
                Ok(location) => Some(location),
                // In a slot that is larger than it needs it wastes nothing that was not in use before.
                Err(OutOfMemory)
                    if bytes <= slot_now && (parts.referenced_bytes() == 0 || slot_now.is_multiple_of(8)) =>
                {
                    None
                }
                Err(OutOfMemory) => return Err(OutOfMemory),
            }
        };
        // Allocating may have moved the item.
        let before = self.index.location(position);
        let after = elsewhere.unwrap_or(before);
        // SAFETY: nobody else refers to the old item, which is not looked at any more; the slot is large enough, and begins at
        // a multiple of 8 if it must; `parts` points outside of the memory, because the borrow of `self` ends whatever came out of it.
        unsafe {
            item::drop_reference(self.memory.address(before));
            item::write(self.memory.address(after), parts);
        }
        if elsewhere.is_some() {
            self.index.relocate(position, after);
            self.memory.free(budget, before);
        }
        Ok(())
    }

    fn insert(&mut self, budget: &mut Budget, hash: u64, parts: &Parts<'_>) -> Result<Position, OutOfMemory> {
        let growth = self.index.growth_bytes(hash);
        if growth > 0 {
            self.charge(budget, growth)?;
        }
        let Ok(location) = self.allocate(budget, parts.bytes()) else {
            budget.release(growth);
            return Err(OutOfMemory);
        };
        // SAFETY: the slot is new, large enough, and begins at a multiple of 8 if the item's size is one; see `overwrite`.
        unsafe { item::write(self.memory.address(location), parts) };
        let index_before = self.index.bytes();
        let (memory, partitioner) = (&self.memory, self.partitioner);
        let hash_of = |location| partitioner.place(item_at(memory, location).key()).hash;
        let inserted = self.index.insert(hash, location, hash_of);
        let grown = self.index.bytes() - index_before;
        // Nearly always equal; a second split in a row makes it more, a failed allocation less.
        budget.charge_always(grown.saturating_sub(growth));
        budget.release(growth.saturating_sub(grown));
        inserted.map_err(|_| {
            // SAFETY: the index does not lead to it.
            unsafe { item::drop_reference(self.memory.address(location)) };
            self.memory.free(budget, location);
            OutOfMemory
        })
    }

    #[inline]
    fn note_deadline(&mut self, deadline: Deadline) {
        if let Deadline::At(moment) = deadline {
            self.due = self.due.min(moment);
            self.due_seen = self.due_seen.min(moment);
        }
    }

    /// Gives the item another deadline; false when there is no memory for the field.
    pub(crate) fn touch(&mut self, budget: &mut Budget, position: Position, deadline: Deadline) -> bool {
        if self.item_mut(position).set_deadline(deadline) {
            self.note_deadline(deadline);
            return true;
        }
        self.amend(budget, position, |parts| parts.deadline = deadline)
    }

    /// Rewrites an item with a change, even when the limit does not allow its growth: for the few bytes of bookkeeping
    /// that a read must not fail for. False when there are no addresses left.
    pub(crate) fn amend(
        &mut self,
        budget: &mut Budget,
        position: Position,
        change: impl FnOnce(&mut Parts<'_>),
    ) -> bool {
        let mut copy = std::mem::take(&mut self.copy);
        let old = self.item(position).parts();
        copy.clear();
        copy.extend_from_slice(old.key);
        let large = match old.value {
            Value::Small(bytes) => {
                copy.extend_from_slice(bytes);
                None
            }
            Value::Large(bytes) => Some(bytes.clone()),
        };
        let (key, value) = copy.split_at(old.key.len());
        let mut parts = Parts {
            key,
            value: large.as_ref().map_or(Value::Small(value), Value::Large),
            flags: old.flags,
            deadline: old.deadline,
            version: old.version,
            accessed: old.accessed,
            state: old.state,
        };
        change(&mut parts);
        let limited = budget.set_unlimited(true);
        let written = self.write(budget, 0, Some(position), &parts).is_ok();
        budget.set_unlimited(limited);
        self.copy = copy;
        written
    }

    /// Removes the item.
    pub(crate) fn remove(&mut self, budget: &mut Budget, position: Position) {
        let location = self.index.remove(position);
        self.with_deadline -= usize::from(item_at(&self.memory, location).deadline() != Deadline::Never);
        self.referenced_bytes -= free_item(&mut self.memory, budget, location);
    }

    fn position_of(&self, location: Location) -> Option<Position> {
        let hash = self.partitioner.place(item_at(&self.memory, location).key()).hash;
        self.index.find(hash, |found| found == location)
    }

    /// Empties the table at once; its memory comes back through [`Store::give_back`]. Falls back to removing one by one when
    /// there is no memory for an empty index.
    pub(crate) fn clear(&mut self, budget: &mut Budget) {
        match Index::new() {
            Some(empty) => {
                budget.charge_always(empty.bytes());
                self.emptied.push(std::mem::replace(&mut self.index, empty));
                self.with_deadline = 0;
            }
            None => {
                self.sweep_at = 0;
                while self.len() > 0 {
                    self.remove_some(budget, 64, |_| true);
                }
            }
        }
        self.sweep_at = 0;
        (self.due, self.due_seen) = (NEVER_DUE, NEVER_DUE);
    }

    /// Gives back a bounded piece of what emptied tables, sizes with many free slots, and an empty block hold; false when there
    /// is nothing like that.
    pub(crate) fn give_back(&mut self, budget: &mut Budget) -> bool {
        self.reclaim_some(budget, 1)
    }

    /// Frees the items of up to `segments` segments of emptied tables; false when there were none.
    fn free_emptied(&mut self, budget: &mut Budget, segments: usize) -> bool {
        let mut any = false;
        for _ in 0..segments {
            let Some(index) = self.emptied.last_mut() else {
                break;
            };
            any = true;
            let before = index.bytes();
            let (memory, mut referenced) = (&mut self.memory, 0);
            if index.free_segment(|location| referenced += free_item(memory, budget, location)) {
                budget.release(before - index.bytes());
            } else {
                budget.release(before);
                self.emptied.pop();
            }
            self.referenced_bytes -= referenced;
        }
        any
    }

    /// Moves the items of one block of a size that has many free slots; false when there is none.
    fn tighten(&mut self, budget: &mut Budget) -> bool {
        // Items of emptied tables could not be moved: no index of ours leads to them.
        if !self.memory.is_loose() || !self.emptied.is_empty() {
            return false;
        }
        let mut items = std::mem::take(&mut self.chosen);
        let block = self.memory.loose_block(&mut items);
        for from in items.drain(..) {
            let bytes = self.memory.slot_bytes_at(from);
            let (Some(position), Some(to)) = (self.position_of(from), self.memory.allocate(budget, bytes)) else {
                debug_assert!(false, "items are in the index, and there is a slot for each");
                continue;
            };
            // SAFETY: both are slots of this many bytes, and different ones. The old one is freed without dropping what the item
            // refers to, so that has moved.
            unsafe {
                let (from, to) = (self.memory.address(from), self.memory.address(to));
                std::ptr::copy_nonoverlapping(from.as_ptr(), to.as_ptr(), bytes);
            }
            self.index.relocate(position, to);
            self.memory.free(budget, from);
        }
        self.chosen = items;
        block.inspect(|block| self.memory.emptied(*block)).is_some()
    }

    /// Some item's time may be over.
    pub(crate) fn is_due(&self, now: UnixMillis) -> bool {
        self.with_deadline > 0 && self.due <= now
    }

    /// Looks at up to `buckets` buckets and removes the items whose time is over; returns how many those were. Calls go round
    /// the table, and rest after a round until the earliest deadline it has seen.
    pub(crate) fn sweep(&mut self, budget: &mut Budget, now: UnixMillis, buckets: usize) -> usize {
        let mut removed = 0;
        for _ in 0..buckets {
            if !self.is_due(now) {
                break;
            }
            let mut due_seen = self.due_seen;
            removed += self.remove_some(budget, 1, |item| {
                let deadline = item.deadline();
                let is_over = deadline.is_over(now);
                if let (Deadline::At(moment), false) = (deadline, is_over) {
                    due_seen = due_seen.min(moment);
                }
                is_over
            });
            self.due_seen = due_seen;
            if self.sweep_at == 0 {
                (self.due, self.due_seen) = (self.due_seen, NEVER_DUE);
            }
        }
        removed
    }

    /// Goes on walking round the table by some buckets and removes what is to be removed.
    fn remove_some(&mut self, budget: &mut Budget, buckets: usize, mut over: impl FnMut(ItemRef<'_>) -> bool) -> usize {
        let mut chosen = std::mem::take(&mut self.chosen);
        let memory = &self.memory;
        self.sweep_at = self.index.visit(self.sweep_at, buckets, |location| {
            if over(item_at(memory, location)) {
                chosen.push(location);
            }
        });
        let removed = chosen.len();
        for location in chosen.drain(..) {
            if let Some(position) = self.position_of(location) {
                self.remove(budget, position);
            }
        }
        self.chosen = chosen;
        removed
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Memory goes as a whole; what items refer to does not.
        let memory = &self.memory;
        for index in self.emptied.iter_mut().chain([&mut self.index]) {
            // SAFETY: the index forgets the item, and nothing else leads to it.
            while index.free_segment(|location| unsafe { item::drop_reference(memory.address(location)) }) {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Pool;
    use crate::model::{Value, Version};
    use std::sync::Arc;

    const PARTITIONER: Partitioner = Partitioner::Hashed { seed: 1 };

    fn parts<'a>(key: &'a [u8], value: &'a [u8], deadline: Deadline) -> Parts<'a> {
        Parts {
            key,
            value: Value::Small(value),
            flags: 0,
            deadline,
            version: Version(0),
            accessed: Access::at(0),
            state: 0,
        }
    }

    fn set(store: &mut Store, budget: &mut Budget, parts: &Parts<'_>) -> Result<(), OutOfMemory> {
        let hash = PARTITIONER.place(parts.key).hash;
        let old = store.find(hash, parts.key);
        store.write(budget, hash, old, parts).map(drop)
    }

    fn budget(limit: u64) -> (Arc<Pool>, Budget) {
        let pool = Pool::new(limit);
        (pool.clone(), Budget::new(pool))
    }

    /// What is charged is exactly what the table says it uses, through growth, overwriting, removal and emptying.
    #[test]
    fn charges_are_exact() {
        let (_, mut budget) = budget(1 << 30);
        let mut store = Store::new(PARTITIONER, &mut budget);
        let exact = |store: &Store, budget: &Budget| {
            assert_eq!(budget.charged() as usize, store.resident_bytes() + store.index_bytes());
        };
        for round in 0..3usize {
            for number in 0..5000usize {
                let key = number.to_string().into_bytes();
                let value = vec![b'x'; (number * 7 + round * 13) % 300];
                set(&mut store, &mut budget, &parts(&key, &value, Deadline::Never)).unwrap();
            }
            exact(&store, &budget);
        }
        for number in 0..2500usize {
            let key = number.to_string().into_bytes();
            let position = store.find(PARTITIONER.place(&key).hash, &key).unwrap();
            assert!(store.amend(&mut budget, position, |parts| parts.version = Version(5)));
            store.remove(&mut budget, position);
        }
        exact(&store, &budget);
        store.clear(&mut budget);
        assert_eq!(store.len(), 0);
        while store.give_back(&mut budget) {}
        exact(&store, &budget);
    }

    /// At the limit a new item is refused, the old value stays, and a write that shrinks an item goes through.
    #[test]
    fn the_limit_refuses_growth_and_nothing_else() {
        let (_, mut budget) = budget(200_000);
        let mut store = Store::new(PARTITIONER, &mut budget);
        let value = vec![b'v'; 1000];
        let mut stored = 0;
        while set(
            &mut store,
            &mut budget,
            &parts(format!("key{stored}").as_bytes(), &value, Deadline::Never),
        )
        .is_ok()
        {
            stored += 1;
        }
        assert!(stored > 100, "{stored}");
        assert_eq!(
            set(&mut store, &mut budget, &parts(b"key0", &[b'w'; 3000], Deadline::Never)),
            Err(OutOfMemory)
        );
        let position = store.find(PARTITIONER.place(b"key0").hash, b"key0").unwrap();
        assert_eq!(store.item(position).value().bytes(), value);
        set(&mut store, &mut budget, &parts(b"key0", b"small", Deadline::Never)).unwrap();
        // An emptied table counts until its memory is back, but never makes a write fail.
        store.clear(&mut budget);
        for number in 0..stored {
            set(
                &mut store,
                &mut budget,
                &parts(format!("new{number}").as_bytes(), &value, Deadline::Never),
            )
            .unwrap();
        }
    }

    /// What is left after most was deleted is moved together: its memory comes back, and every item is still itself.
    #[test]
    fn what_is_deleted_comes_back() {
        let (_, mut budget) = budget(1 << 30);
        let mut store = Store::new(PARTITIONER, &mut budget);
        let large = bytes::Bytes::from(vec![7; 5000]);
        let count = if cfg!(miri) { 300 } else { 30_000usize };
        let value_of = |number: usize| vec![number as u8; number % 4 * 200];
        let key_of = |number: usize| format!("key{number}").into_bytes();
        for number in 0..count {
            let (key, value) = (key_of(number), value_of(number));
            let small = parts(&key, &value, Deadline::Never);
            let parts = match number % 25 {
                3 => Parts {
                    value: Value::Large(&large),
                    flags: number as u32,
                    ..small
                },
                _ => small,
            };
            set(&mut store, &mut budget, &parts).unwrap();
        }
        let before = store.resident_bytes();
        for number in (0..count).filter(|number| number % 10 != 3) {
            let key = key_of(number);
            let position = store.find(PARTITIONER.place(&key).hash, &key).unwrap();
            store.remove(&mut budget, position);
        }
        let mut pieces = 0;
        while store.give_back(&mut budget) {
            pieces += 1;
        }
        assert!(pieces > 10 || cfg!(miri), "{pieces}");
        for number in 0..count {
            let key = key_of(number);
            let found = store.find(PARTITIONER.place(&key).hash, &key);
            assert_eq!(found.is_some(), number % 10 == 3, "{number}");
            let Some(position) = found else { continue };
            let item = store.item(position);
            if number % 25 == 3 {
                assert_eq!((item.value().bytes(), item.flags()), (&large[..], number as u32));
            } else {
                assert_eq!(item.value().bytes(), value_of(number));
            }
        }
        assert_eq!(budget.charged() as usize, store.resident_bytes() + store.index_bytes());
        // A tenth of the items, half of the large values, and two blocks of each size, which may stay loose.
        assert!(
            store.resident_bytes() < before / 3,
            "{} of {before}",
            store.resident_bytes()
        );
        drop(store);
        assert!(large.is_unique(), "dropped with the store");
    }

    /// Sweeping removes exactly what is over, in bounded steps.
    #[test]
    fn sweeping_goes_round_the_table() {
        let (_, mut budget) = budget(1 << 30);
        let mut store = Store::new(PARTITIONER, &mut budget);
        for number in 0..10_000u64 {
            let key = number.to_string().into_bytes();
            let deadline = if number % 4 == 0 {
                Deadline::Never
            } else {
                Deadline::At(UnixMillis(number))
            };
            set(&mut store, &mut budget, &parts(&key, b"v", deadline)).unwrap();
        }
        let mut removed = 0;
        assert_eq!(store.sweep(&mut budget, UnixMillis(0), 1000), 0, "nothing is due yet");
        for _ in 0..1000 {
            let step = store.sweep(&mut budget, UnixMillis(4999), 16);
            assert!(step <= 16 * 7);
            removed += step;
        }
        assert_eq!(removed, 3750);
        assert_eq!(store.len(), 6250);
        assert!(
            !store.is_due(UnixMillis(5000)) && store.is_due(UnixMillis(5001)),
            "it rests until the next deadline"
        );
        assert_eq!(store.with_deadline, 3750);
    }
}
