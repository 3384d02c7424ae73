//! One shard's table: items found by key, charged to the core's budget, reclaimed when their time is over.
//!
//! It knows nothing of conditions or commands: [`crate::shard`] decides what to write, this module holds it. All `unsafe`
//! code of the data path lives in its two parts: [`index`] (where an item is) and [`item`] (what an item is).

mod index;
mod item;

pub(crate) use index::Position;
pub(crate) use item::{FETCHED, ItemRef, KEY_ENCODED, Parts, STALE, WON};

use crate::budget::Budget;
use crate::model::{Deadline, UnixMillis};
use crate::partition::Partitioner;
use index::Index;
use item::Item;

/// The memory limit, or the allocator, refuses the write. What was there before is unchanged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OutOfMemory;

/// The table of one shard.
pub(crate) struct Store {
    index: Index,
    /// Emptied tables whose memory is still to be given back, a segment at a time.
    emptied: Vec<Index>,
    partitioner: Partitioner,
    item_bytes: usize,
    /// How many items have a deadline: without any, sweeping is skipped.
    with_deadline: usize,
    sweep_at: u64,
    /// No item ends before this moment: until then there is nothing to sweep.
    due: UnixMillis,
    /// The same for what the round of sweeping under way has seen.
    due_seen: UnixMillis,
}

const NEVER_DUE: UnixMillis = UnixMillis(u64::MAX);

impl Store {
    /// An empty table.
    ///
    /// # Panics
    /// When the allocator has not even 16 KiB: there is no server without an index.
    pub(crate) fn new(partitioner: Partitioner, budget: &mut Budget) -> Self {
        let index = Index::new().expect("memory for an empty index");
        budget.charge_always(index.bytes());
        Self {
            index,
            emptied: vec![],
            partitioner,
            item_bytes: 0,
            with_deadline: 0,
            sweep_at: 0,
            due: NEVER_DUE,
            due_seen: NEVER_DUE,
        }
    }

    /// How many items there are, those whose time is over but which nobody met yet included.
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// Bytes charged for the items.
    pub(crate) fn item_bytes(&self) -> usize {
        self.item_bytes
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
        self.index.prefetch_item(hash);
    }

    /// Where the item of `key` is, whether its time is over or not. The position is good until the next write or removal.
    #[inline]
    pub(crate) fn find(&self, hash: u64, key: &[u8]) -> Option<Position> {
        self.index.find(hash, key)
    }

    /// The item at a position.
    #[inline]
    pub(crate) fn item(&self, position: Position) -> ItemRef<'_> {
        self.index.item(position)
    }

    /// Notes that the item was read.
    #[inline]
    pub(crate) fn mark_access(&mut self, position: Position, accessed_s: u32) {
        self.index.item_mut(position).mark_access(accessed_s);
    }

    /// Sets and clears state bits of the item.
    pub(crate) fn set_state(&mut self, position: Position, set: u16, clear: u16) {
        self.index.item_mut(position).set_state(set, clear);
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
        match old {
            Some(position) => self.overwrite(budget, position, parts).map(|()| position),
            None => self.insert(budget, hash, parts),
        }
    }

    /// How long the value of `key` is; 0 when there is none.
    pub(crate) fn value_len(&self, hash: u64, key: &[u8]) -> usize {
        self.find(hash, key)
            .map_or(0, |position| self.item(position).value_len())
    }

    /// How many bytes more than now a write may charge.
    pub(crate) fn needed_bytes(&self, hash: u64, old: Option<Position>, parts: &Parts<'_>) -> usize {
        match old {
            Some(position) => parts
                .charged_bytes()
                .saturating_sub(self.item(position).charged_bytes()),
            None => parts.charged_bytes() + self.index.growth_bytes(hash),
        }
    }

    #[inline]
    fn overwrite(&mut self, budget: &mut Budget, position: Position, parts: &Parts<'_>) -> Result<(), OutOfMemory> {
        let had_deadline = self.item(position).deadline() != Deadline::Never;
        let has_deadline = parts.deadline != Deadline::Never;
        if !self.index.item_mut(position).rewrite(parts) {
            // Only growth is charged before it happens: at the limit, a write that shrinks an item must go through.
            let (before, after) = (self.item(position).charged_bytes(), parts.charged_bytes());
            if after > before {
                self.charge(budget, after - before)?;
            }
            let Some(item) = Item::new(parts) else {
                budget.release(after.saturating_sub(before));
                return Err(OutOfMemory);
            };
            drop(self.index.replace(position, item));
            budget.release(before.saturating_sub(after));
            self.item_bytes = self.item_bytes + after - before;
        }
        self.with_deadline = self.with_deadline + usize::from(has_deadline) - usize::from(had_deadline);
        self.note_deadline(parts.deadline);
        Ok(())
    }

    fn insert(&mut self, budget: &mut Budget, hash: u64, parts: &Parts<'_>) -> Result<Position, OutOfMemory> {
        let item_bytes = parts.charged_bytes();
        let charged = item_bytes + self.index.growth_bytes(hash);
        self.charge(budget, charged)?;
        let index_before = self.index.bytes();
        let partitioner = self.partitioner;
        let inserted =
            Item::new(parts).and_then(|item| self.index.insert(hash, item, |key| partitioner.place(key).hash).ok());
        let index_grown = self.index.bytes() - index_before;
        let used = index_grown + if inserted.is_some() { item_bytes } else { 0 };
        // Nearly always equal; a second split in a row makes it more, a failed allocation less.
        budget.charge_always(used.saturating_sub(charged));
        budget.release(charged.saturating_sub(used));
        let position = inserted.ok_or(OutOfMemory)?;
        self.item_bytes += item_bytes;
        self.with_deadline += usize::from(parts.deadline != Deadline::Never);
        self.note_deadline(parts.deadline);
        Ok(position)
    }

    #[inline]
    fn note_deadline(&mut self, deadline: Deadline) {
        if let Deadline::At(moment) = deadline {
            self.due = self.due.min(moment);
            self.due_seen = self.due_seen.min(moment);
        }
    }

    /// Gives the item another deadline; false when the allocator has no memory for the field.
    pub(crate) fn touch(&mut self, budget: &mut Budget, position: Position, deadline: Deadline) -> bool {
        if self.index.item_mut(position).set_deadline(deadline) {
            self.note_deadline(deadline);
            return true;
        }
        self.amend(budget, position, |parts| parts.deadline = deadline)
    }

    #[inline]
    fn charge(&mut self, budget: &mut Budget, bytes: usize) -> Result<(), OutOfMemory> {
        // What an emptied table still holds must not make a write fail.
        while !budget.charge(bytes) {
            if !self.free_emptied(budget, 16) {
                return Err(OutOfMemory);
            }
        }
        Ok(())
    }

    /// Rewrites an item with a change, even when the limit does not allow its growth: for the few bytes of bookkeeping
    /// that a read must not fail for. False when the allocator itself has no memory.
    pub(crate) fn amend(
        &mut self,
        budget: &mut Budget,
        position: Position,
        change: impl FnOnce(&mut Parts<'_>),
    ) -> bool {
        let old = self.item(position);
        let before = old.charged_bytes();
        let had_deadline = old.deadline() != Deadline::Never;
        let mut parts = old.parts();
        change(&mut parts);
        let (after, deadline) = (parts.charged_bytes(), parts.deadline);
        let has_deadline = deadline != Deadline::Never;
        let Some(item) = Item::new(&parts) else {
            return false;
        };
        drop(self.index.replace(position, item));
        budget.charge_always(after.saturating_sub(before));
        budget.release(before.saturating_sub(after));
        self.note_deadline(deadline);
        self.item_bytes = self.item_bytes + after - before;
        self.with_deadline = self.with_deadline + usize::from(has_deadline) - usize::from(had_deadline);
        true
    }

    /// Removes the item.
    pub(crate) fn remove(&mut self, budget: &mut Budget, position: Position) {
        let item = self.index.remove(position);
        let bytes = item.view().charged_bytes();
        self.item_bytes -= bytes;
        self.with_deadline -= usize::from(item.view().deadline() != Deadline::Never);
        budget.release(bytes);
    }

    /// Empties the table at once; its memory comes back through [`Store::free_emptied`]. Falls back to removing in place
    /// when there is no memory for an empty index.
    pub(crate) fn clear(&mut self, budget: &mut Budget) {
        match Index::new() {
            Some(empty) => {
                budget.charge_always(empty.bytes());
                self.emptied.push(std::mem::replace(&mut self.index, empty));
            }
            None => {
                let mut cursor = 0;
                loop {
                    let (next, found) = self.collect(cursor, |_| true);
                    found
                        .into_iter()
                        .flatten()
                        .for_each(|position| self.remove(budget, position));
                    cursor = next;
                    if cursor == 0 {
                        break;
                    }
                }
            }
        }
        (self.item_bytes, self.with_deadline, self.sweep_at) = (0, 0, 0);
        (self.due, self.due_seen) = (NEVER_DUE, NEVER_DUE);
    }

    /// Gives back the memory of up to `segments` segments of emptied tables; false when there was nothing to give back.
    pub(crate) fn free_emptied(&mut self, budget: &mut Budget, segments: usize) -> bool {
        let mut any = false;
        for _ in 0..segments {
            let Some(index) = self.emptied.last_mut() else {
                break;
            };
            any = true;
            let before = index.bytes();
            match index.free_segment() {
                Some(freed) => budget.release(freed.item_bytes + before - index.bytes()),
                None => drop(self.emptied.pop()),
            }
        }
        any
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
            let (next, over) = self.collect(self.sweep_at, |item| {
                let deadline = item.deadline();
                let is_over = deadline.is_over(now);
                if let (Deadline::At(moment), false) = (deadline, is_over) {
                    due_seen = due_seen.min(moment);
                }
                is_over
            });
            (self.sweep_at, self.due_seen) = (next, due_seen);
            if next == 0 {
                (self.due, self.due_seen) = (self.due_seen, NEVER_DUE);
            }
            for position in over.into_iter().flatten() {
                self.remove(budget, position);
                removed += 1;
            }
        }
        removed
    }

    fn collect(&self, cursor: u64, mut want: impl FnMut(ItemRef<'_>) -> bool) -> (u64, [Option<Position>; 7]) {
        let (mut found, mut count) = ([None; 7], 0);
        let next = self.index.walk(cursor, |position, item| {
            if want(item) {
                found[count] = Some(position);
                count += 1;
            }
        });
        (next, found)
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
            accessed_s: 0,
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
            assert_eq!(budget.charged() as usize, store.item_bytes() + store.index_bytes());
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
        while store.free_emptied(&mut budget, 1) {}
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
