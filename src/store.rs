//! One shard's table: items found by key, charged to the core's budget, reclaimed when their time is over.
//!
//! It knows nothing of conditions or commands: [`crate::shard`] decides what to write, this module holds it. All `unsafe`
//! code of the data path lives here and in three of its parts: [`index`] (where an item is), [`memory`] (what room it has there)
//! and [`item`] (what it is). The index knows places and the memory slots; that there is an item in each slot to which the index
//! leads, and nowhere else, is this module's part of the bargain. Two more parts know in which order items go: [`expiry`] (whose
//! time is over) and [`eviction`] (who makes place); both lead to items by their hashes. [`image`] remembers what the table was
//! like at a moment, until that is written down.

mod eviction;
mod expiry;
mod image;
mod index;
mod item;
mod memory;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod model;
mod queue;

pub(crate) use eviction::Evicted;
pub(crate) use image::{IMAGE_STATE, ImageStep};
pub(crate) use index::Position;
pub(crate) use item::{Access, FETCHED, ItemRef, KEY_ENCODED, Parts, STALE, WON};

use crate::budget::Budget;
use crate::model::{Deadline, UnixMillis, Value};
use crate::partition::Partitioner;
use bytes::Bytes;
use eviction::Eviction;
use expiry::Expiry;
use image::Image;
use index::{Index, Keys, Location};
use item::{ItemMut, Standing};
use memory::{Memory, slot_bytes};
use std::collections::VecDeque;

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
    /// The time when [`Store::tick`] was last called.
    now: UnixMillis,
    /// Bytes of keys and values.
    payload_bytes: usize,
    /// Bytes of values that items refer to, those of emptied tables included.
    referenced_bytes: usize,
    /// Values that no item refers to any more, but replies that are still being sent: charged until those are.
    lingering: VecDeque<Bytes>,
    lingering_bytes: usize,
    /// How many items have a deadline.
    with_deadline: usize,
    expiry: Expiry,
    /// `None`: nothing is evicted.
    eviction: Option<Eviction>,
    /// What is charged for the memory of the two.
    order_bytes: usize,
    /// Under way: whoever changes an item says so first ([`Store::save_cell`]).
    image: Option<Box<Image>>,
    /// Reused: items to be moved or evicted.
    chosen: Vec<Location>,
    /// Reused: entries of items that may be over.
    due: Vec<u64>,
    /// Reused: an item that is being rewritten.
    copy: Vec<u8>,
}

/// At most so many items, some ten milliseconds of work, are evicted for one write; one that needs more is refused. Only a
/// large value that comes when no memory is kept ready needs more than a few.
const EVICTED_PER_WRITE_MAX: usize = 1 << 16;
/// An insertion evicts some items so many times, at most, when more is charged than the limit allows although it fits.
const YIELDS_PER_INSERT: usize = 8;
/// Entries of items that may be over are looked at so many together, so that waiting for the memory of one overlaps with that
/// of the others.
const DUE_BATCH: usize = 16;
/// Lingering values are looked at so many at a time.
const LINGERING_BATCH: usize = 64;

/// The item at a location, borrowed from the memory that it lies in.
#[inline(always)]
fn item_at(memory: &Memory, location: Location) -> ItemRef<'_> {
    // SAFETY: locations come from the index, which leads to items only; they change through `&mut Store` alone, and `memory` is
    // borrowed as long as the item.
    unsafe { ItemRef::at(memory.address(location)) }
}

/// The keys of items, for the index, which does not know them.
struct ItemKeys<'a>(&'a Memory, Partitioner);

impl Keys for ItemKeys<'_> {
    fn ask(&self, location: Location) {
        index::prefetch(self.0.address(location).as_ptr());
    }

    fn hash(&self, location: Location) -> u64 {
        self.1.place(item_at(self.0, location).key()).hash
    }
}

/// The item at a location is gone: frees its slot, and returns the value that it referred to.
fn free_item(memory: &mut Memory, budget: &mut Budget, location: Location) -> Option<Bytes> {
    // SAFETY: the caller has taken the location out of the index, so nobody leads to the item any more.
    let value = unsafe { item::take_reference(memory.address(location)) };
    memory.free(budget, location);
    value
}

impl Store {
    /// An empty table, which evicts items when memory is used up, or refuses writes then.
    ///
    /// # Panics
    /// When the system has not even 16 KiB, or no addresses: there is no server without an index.
    pub(crate) fn new(partitioner: Partitioner, evicts: bool, now: UnixMillis, budget: &mut Budget) -> Self {
        let index = Index::new().expect("memory for an empty index");
        budget.charge_always(index.bytes());
        Self {
            index,
            memory: Memory::new().expect("a range of addresses"),
            emptied: vec![],
            partitioner,
            now,
            payload_bytes: 0,
            referenced_bytes: 0,
            lingering: VecDeque::new(),
            lingering_bytes: 0,
            with_deadline: 0,
            expiry: Expiry::default(),
            eviction: evicts.then(Eviction::default),
            order_bytes: 0,
            image: None,
            chosen: vec![],
            due: vec![],
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

    /// Bytes of keys and values.
    pub(crate) fn payload_bytes(&self) -> usize {
        self.payload_bytes
    }

    /// Bytes charged for the order in which items expire and are evicted.
    pub(crate) fn order_bytes(&self) -> usize {
        self.order_bytes
    }

    /// Bytes charged for values that no item refers to any more, but replies that are still being sent.
    pub(crate) fn lingering_bytes(&self) -> usize {
        self.lingering_bytes
    }

    /// At the memory limit items make place.
    #[inline]
    pub(crate) fn evicts(&self) -> bool {
        self.eviction.is_some()
    }

    /// What was evicted since this was last asked. `None`: nothing is ever evicted.
    pub(crate) fn take_evicted(&mut self) -> Option<Evicted> {
        self.eviction.as_mut().map(Eviction::take_evicted)
    }

    /// Bytes charged for the items: whole pages, and what they refer to.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.memory.resident_bytes() + self.referenced_bytes
    }

    /// Bytes charged for the index, and for those of emptied tables that are still to be freed.
    pub(crate) fn index_bytes(&self) -> usize {
        self.index.bytes() + self.emptied.iter().map(Index::bytes).sum::<usize>()
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
        if (set | clear) & IMAGE_STATE != 0 && self.image.is_some() {
            self.save_item(budget, position);
        }
        self.item_mut(position).set_state(set, clear)
            || self.amend(budget, position, |parts| parts.state = parts.state & !clear | set)
    }

    /// Bytes that an item at a position is charged with.
    pub(crate) fn charged_bytes(&self, position: Position) -> usize {
        self.charged_at(self.index.location(position))
    }

    fn charged_at(&self, location: Location) -> usize {
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

    /// A slot for `bytes` bytes. What lies at `keep` stays in the table.
    #[inline]
    fn allocate(&mut self, budget: &mut Budget, bytes: usize, keep: Option<Position>) -> Result<Location, OutOfMemory> {
        let mut evicted = 0;
        loop {
            if let Some(location) = self.memory.allocate(budget, bytes) {
                return Ok(location);
            }
            if self.image_lends(budget, bytes) {
                let limited = budget.set_unlimited(true);
                let location = self.memory.allocate(budget, bytes);
                budget.set_unlimited(limited);
                return location.ok_or(OutOfMemory);
            }
            self.make_room(budget, keep, &mut evicted)?;
        }
    }

    /// Charges bytes that are not the memory's. What lies at `keep` stays in the table.
    #[inline]
    fn charge(&mut self, budget: &mut Budget, bytes: usize, keep: Option<Position>) -> Result<(), OutOfMemory> {
        let mut evicted = 0;
        while !budget.charge(bytes) {
            if self.image_lends(budget, bytes) {
                budget.charge_always(bytes);
                break;
            }
            self.make_room(budget, keep, &mut evicted)?;
        }
        Ok(())
    }

    /// What an emptied table, or a size with many free slots, still holds must not make a write fail; nor must other items,
    /// where those are evicted.
    #[cold]
    fn make_room(
        &mut self,
        budget: &mut Budget,
        keep: Option<Position>,
        evicted: &mut usize,
    ) -> Result<(), OutOfMemory> {
        if self.reclaim(budget, 16, true) {
            return Ok(());
        }
        let more = match *evicted {
            ..EVICTED_PER_WRITE_MAX => self.evict(budget, keep, Access::at(self.now.seconds())),
            _ => 0,
        };
        *evicted += more;
        self.recharge_order(budget);
        if more > 0 { Ok(()) } else { Err(OutOfMemory) }
    }

    /// Evicts some items to leave memory to others; false when there was nothing to evict.
    pub(crate) fn yield_memory(&mut self, budget: &mut Budget) -> bool {
        self.yield_memory_but(budget, None)
    }

    fn yield_memory_but(&mut self, budget: &mut Budget, keep: Option<Position>) -> bool {
        self.make_room(budget, keep, &mut 0).is_ok()
    }

    /// Gives back a bounded piece of what is charged and holds nothing; false when there is nothing like that. `urgently`: also
    /// what may come to use soon.
    fn reclaim(&mut self, budget: &mut Budget, segments: usize, urgently: bool) -> bool {
        self.free_emptied(budget, segments)
            || self.tighten(budget, urgently && self.eviction.is_some())
            || self.memory.trim(budget)
            || self.index.is_sparse() && self.shrink_index(budget)
    }

    fn shrink_index(&mut self, budget: &mut Budget) -> bool {
        let before = self.index.bytes();
        let shrunk = self.index.shrink(&ItemKeys(&self.memory, self.partitioner));
        // What is rebuilt for another reason may have become a little larger.
        let after = self.index.bytes();
        budget.release(before.saturating_sub(after));
        budget.charge_always(after.saturating_sub(before));
        shrunk
    }

    /// Charges what the order in which items go takes now.
    fn recharge_order(&mut self, budget: &mut Budget) {
        let bytes = self.expiry.bytes() + self.eviction.as_ref().map_or(0, Eviction::bytes);
        let before = std::mem::replace(&mut self.order_bytes, bytes);
        // It is little, and nothing could be evicted without it.
        budget.charge_always(bytes.saturating_sub(before));
        budget.release(before.saturating_sub(bytes));
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
        if self.image.is_some() {
            self.save_cell(budget, hash);
        }
        if let Some(position) = old
            && let item = self.item(position)
            && item.is_as_large_as(parts)
        {
            // The usual case.
            let (had, standing, value_len) = (item.deadline(), item.standing().used(), item.small_value_len());
            let location = self.index.location(position);
            // SAFETY: as in `overwrite`; there is no reference to take.
            unsafe { item::write(self.memory.address(location), parts, standing) };
            self.payload_bytes = self.payload_bytes + parts.value.bytes().len() - value_len;
            if (had, parts.deadline) != (Deadline::Never, Deadline::Never) {
                self.count_deadline(budget, hash, had, parts.deadline);
            }
            return Ok(position);
        }
        let had = old.map_or(Deadline::Never, |position| self.item(position).deadline());
        let payload = old.map_or(0, |position| self.item(position).payload_bytes());
        let written = match old {
            Some(position) => self.overwrite(budget, position, parts).map(|()| position),
            None => self.insert(budget, hash, parts),
        };
        if written.is_ok() {
            self.payload_bytes = self.payload_bytes + parts.payload_bytes() - payload;
            self.count_deadline(budget, hash, had, parts.deadline);
        }
        written
    }

    /// An item's deadline has changed; an item that is not there has none.
    fn count_deadline(&mut self, budget: &mut Budget, hash: u64, before: Deadline, after: Deadline) {
        self.with_deadline += usize::from(after != Deadline::Never);
        self.with_deadline -= usize::from(before != Deadline::Never);
        if let Deadline::At(moment) = after
            && !matches!(before, Deadline::At(earlier) if earlier <= moment)
        {
            self.expiry.add(hash, moment, self.now);
            self.recharge_order(budget);
        }
    }

    fn overwrite(&mut self, budget: &mut Budget, position: Position, parts: &Parts<'_>) -> Result<(), OutOfMemory> {
        let (referenced, old) = (parts.referenced_bytes(), self.item(position));
        // Only growth is charged before it happens: at the limit, a write that shrinks an item must go through. What is still
        // being sent does not make room for anything.
        let stays = old.refers_to(parts.value);
        let room = match old.is_shared() && !stays {
            true => 0,
            false => old.referenced_bytes(),
        };
        let more = referenced.saturating_sub(room);
        if more > 0 {
            self.charge(budget, more, Some(position))?;
        }
        let bytes = parts.bytes();
        let slot_now = self.memory.slot_bytes_at(self.index.location(position));
        let elsewhere = if slot_bytes(bytes) == slot_now {
            None
        } else {
            match self.allocate(budget, bytes, Some(position)) {
                Ok(location) => Some(location),
                // In a slot that is larger than it needs it wastes nothing that was not in use before.
                Err(OutOfMemory) if bytes <= slot_now && (referenced == 0 || slot_now.is_multiple_of(8)) => None,
                Err(OutOfMemory) => {
                    budget.release(more);
                    return Err(OutOfMemory);
                }
            }
        };
        // Allocating may have moved the item, and may have given it another standing.
        let before = self.index.location(position);
        let after = elsewhere.unwrap_or(before);
        let (standing, charged_before) = (item_at(&self.memory, before).standing(), self.charged_at(before));
        // SAFETY: nobody else refers to the old item, which is not looked at any more; the slot is large enough, and begins at
        // a multiple of 8 if it must; `parts` points outside of the memory, because the borrow of `self` ends whatever came out of it.
        let value = unsafe {
            let value = item::take_reference(self.memory.address(before));
            item::write(self.memory.address(after), parts, standing.used());
            value
        };
        if elsewhere.is_some() {
            self.index.relocate(position, after);
            self.memory.free(budget, before);
        }
        if !stays {
            // The new value's bytes above the old one's are charged already.
            self.referenced_bytes += referenced;
            budget.charge_always(referenced - more);
            self.let_go(budget, value);
        }
        if let Some(eviction) = &mut self.eviction {
            let charged = self.memory.slot_bytes_at(after) + referenced;
            eviction.went(standing, charged_before);
            eviction.came(standing, charged);
        }
        Ok(())
    }

    /// A value is not referred to by an item any more: it is not charged any more either, unless it is still being sent.
    #[inline]
    fn let_go(&mut self, budget: &mut Budget, value: Option<Bytes>) {
        let Some(value) = value else { return };
        self.referenced_bytes -= value.len();
        if value.is_unique() {
            budget.release(value.len());
        } else {
            self.lingering_bytes += value.len();
            self.lingering.push_back(value);
        }
    }

    fn insert(&mut self, budget: &mut Budget, hash: u64, parts: &Parts<'_>) -> Result<Position, OutOfMemory> {
        let referenced = parts.referenced_bytes();
        let growth = self.index.growth_bytes(hash);
        if growth + referenced > 0 {
            self.charge(budget, growth + referenced, None)?;
        }
        let Ok(location) = self.allocate(budget, parts.bytes(), None) else {
            budget.release(growth + referenced);
            return Err(OutOfMemory);
        };
        let standing = self
            .eviction
            .as_mut()
            .map_or(Standing::default(), |eviction| eviction.admit(hash));
        // SAFETY: the slot is new, large enough, and begins at a multiple of 8 if the item's size is one; see `overwrite`.
        unsafe { item::write(self.memory.address(location), parts, standing) };
        let index_before = self.index.bytes();
        let keys = ItemKeys(&self.memory, self.partitioner);
        let inserted = self.index.insert(hash, location, &keys);
        let grown = self.index.bytes() - index_before;
        // Nearly always equal; a second split in a row makes it more, a failed allocation less.
        budget.charge_always(grown.saturating_sub(growth));
        budget.release(growth.saturating_sub(grown));
        let Ok(position) = inserted else {
            // The index does not lead to it.
            drop(free_item(&mut self.memory, budget, location));
            budget.release(referenced);
            return Err(OutOfMemory);
        };
        self.referenced_bytes += referenced;
        let charged = self.memory.slot_bytes_at(location) + referenced;
        if let Some(eviction) = &mut self.eviction {
            eviction.came(standing, charged);
            self.recharge_order(budget);
            // Others make place for that, and by and by for whatever else was charged above the limit.
            for _ in 0..YIELDS_PER_INSERT {
                if budget.room() >= 0 || self.image_lends(budget, 0) || !self.yield_memory_but(budget, Some(position)) {
                    break;
                }
            }
        }
        Ok(position)
    }

    /// Gives the item another deadline; false when there is no memory for the field.
    pub(crate) fn touch(&mut self, budget: &mut Budget, position: Position, deadline: Deadline) -> bool {
        if self.image.is_some() {
            self.save_item(budget, position);
        }
        let before = self.item(position).deadline();
        if self.item_mut(position).set_deadline(deadline) {
            let hash = self.hash_at(self.index.location(position));
            self.count_deadline(budget, hash, before, deadline);
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
        let hash = self.partitioner.place(key).hash;
        let limited = budget.set_unlimited(true);
        let written = self.write(budget, hash, Some(position), &parts).is_ok();
        budget.set_unlimited(limited);
        self.copy = copy;
        written
    }

    /// Removes the item.
    pub(crate) fn remove(&mut self, budget: &mut Budget, position: Position) {
        if self.image.is_some() {
            self.save_item(budget, position);
        }
        let location = self.index.location(position);
        let item = item_at(&self.memory, location);
        self.with_deadline -= usize::from(item.deadline() != Deadline::Never);
        self.payload_bytes -= item.payload_bytes();
        if let Some(eviction) = &mut self.eviction {
            let charged = self.memory.slot_bytes_at(location) + item.referenced_bytes();
            eviction.went(item.standing(), charged);
        }
        self.index.remove(position);
        let value = free_item(&mut self.memory, budget, location);
        self.let_go(budget, value);
    }

    fn hash_at(&self, location: Location) -> u64 {
        self.partitioner.place(item_at(&self.memory, location).key()).hash
    }

    fn position_of(&self, location: Location) -> Option<Position> {
        self.index.find(self.hash_at(location), |found| found == location)
    }

    /// Empties the table at once; its memory comes back through [`Store::tick`]. Falls back to removing one by one when
    /// there is no memory for an empty index. True when an image was under way: that is given up.
    pub(crate) fn clear(&mut self, budget: &mut Budget) -> bool {
        let had_image = self.drop_image(budget);
        match Index::new() {
            Some(empty) => {
                budget.charge_always(empty.bytes());
                self.emptied.push(std::mem::replace(&mut self.index, empty));
                (self.with_deadline, self.payload_bytes) = (0, 0);
                // Entries in the order of things lead to nothing now, and go by and by.
                self.eviction.iter_mut().for_each(Eviction::cleared);
            }
            None => {
                let mut at = 0;
                while self.len() > 0 {
                    let mut chosen = std::mem::take(&mut self.chosen);
                    at = self.index.visit(at, 64, |location| chosen.push(location));
                    for location in chosen.drain(..) {
                        if let Some(position) = self.position_of(location) {
                            self.remove(budget, position);
                        }
                    }
                    self.chosen = chosen;
                }
            }
        }
        had_image
    }

    /// It is `now`. Does a bounded piece of what is to be done without a request: gives back memory that emptied tables, sizes
    /// with many free slots, an empty block, and values that were sent still hold. False when there is nothing like that.
    pub(crate) fn tick(&mut self, budget: &mut Budget, now: UnixMillis) -> bool {
        self.now = now;
        for _ in 0..LINGERING_BATCH.min(self.lingering.len()) {
            let Some(value) = self.lingering.pop_front() else { break };
            if value.is_unique() {
                self.lingering_bytes -= value.len();
                budget.release(value.len());
            } else {
                self.lingering.push_back(value);
            }
        }
        self.reclaim(budget, 1, false)
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
            let (memory, mut values) = (&mut self.memory, vec![]);
            if index.free_segment(|location| values.extend(free_item(memory, budget, location))) {
                budget.release(before - index.bytes());
            } else {
                budget.release(before);
                self.emptied.pop();
            }
            for value in values {
                self.let_go(budget, Some(value));
            }
        }
        any
    }

    /// Moves the items of one block of a size that has many free slots, or `urgently` just enough of them; false when there is
    /// none.
    fn tighten(&mut self, budget: &mut Budget, urgently: bool) -> bool {
        // Items of emptied tables could not be moved: no index of ours leads to them.
        if !(urgently || self.memory.is_loose()) || !self.emptied.is_empty() {
            return false;
        }
        let mut items = std::mem::take(&mut self.chosen);
        let block = self.memory.loose_block(urgently, &mut items);
        items.iter().for_each(|item| self.prefetch_bucket(self.hash_at(*item)));
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

    /// Some item's time may be over, or entries in the order of things lead to nothing: there is work for [`Store::expire`].
    pub(crate) fn is_due(&self, now: UnixMillis) -> bool {
        self.expiry.is_due(now)
            || self.expiry.has_too_many(self.with_deadline)
            || self.eviction.as_ref().is_some_and(Eviction::has_too_many)
    }

    /// Looks at up to `entries` entries that come up, a few more at most, and removes the items whose time is over. Returns how
    /// many entries it looked at and how many items those were.
    pub(crate) fn expire(&mut self, budget: &mut Budget, now: UnixMillis, entries: usize) -> (usize, usize) {
        let (mut seen, mut removed) = (0, 0);
        let mut due = std::mem::take(&mut self.due);
        while seen < entries {
            due.clear();
            if self.expiry.is_due(now) {
                due.extend((0..DUE_BATCH).map_while(|_| self.expiry.next_due(now)));
                // Seconds without an entry count, too.
                seen += due.len().max(1);
            } else if self.expiry.has_too_many(self.with_deadline) {
                self.expiry.take_some(8 * DUE_BATCH, &mut due);
                seen += 8 * DUE_BATCH;
            } else if self.eviction.as_ref().is_some_and(Eviction::has_too_many) {
                self.shorten_small();
                seen += DUE_BATCH;
            } else {
                break;
            }
            due.iter().for_each(|hash| self.prefetch_bucket(*hash));
            due.iter().for_each(|hash| self.prefetch_item(*hash));
            for hash in due.drain(..) {
                let partitioner = self.partitioner;
                let found = self.index.find(hash, |location| {
                    let item = item_at(&self.memory, location);
                    item.deadline() != Deadline::Never && partitioner.place(item.key()).hash == hash
                });
                let Some(position) = found else { continue };
                match self.item(position).deadline() {
                    deadline if deadline.is_over(now) => {
                        self.remove(budget, position);
                        removed += 1;
                    }
                    // Its deadline has moved, or it waits for a shorter stretch of time now.
                    Deadline::At(moment) => _ = self.expiry.add(hash, moment, now),
                    Deadline::Never => {}
                }
            }
        }
        self.due = due;
        if seen > 0 {
            self.recharge_order(budget);
        }
        (seen, removed)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Memory goes as a whole; what items refer to does not.
        let memory = &self.memory;
        for index in self.emptied.iter_mut().chain([&mut self.index]) {
            // SAFETY: the index forgets the item, and nothing else leads to it.
            while index.free_segment(|location| drop(unsafe { item::take_reference(memory.address(location)) })) {}
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
    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn parts<'a>(key: &'a [u8], value: &'a [u8], deadline: Deadline) -> Parts<'a> {
        Parts {
            key,
            value: Value::Small(value),
            flags: 0,
            deadline,
            version: Version(0),
            accessed: Access::at(NOW.seconds()),
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

    fn charged_for(store: &Store) -> usize {
        store.resident_bytes()
            + store.index_bytes()
            + store.order_bytes()
            + store.lingering_bytes()
            + store.image_bytes()
    }

    /// What is charged is exactly what the table says it uses, through growth, overwriting, removal and emptying.
    #[test]
    fn charges_are_exact() {
        let (_, mut budget) = budget(1 << 30);
        let mut store = Store::new(PARTITIONER, false, NOW, &mut budget);
        let exact = |store: &Store, budget: &Budget| {
            assert_eq!(budget.charged() as usize, charged_for(store));
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
        while store.tick(&mut budget, NOW) {}
        exact(&store, &budget);
    }

    /// At the limit a new item is refused, the old value stays, and a write that shrinks an item goes through.
    #[test]
    fn the_limit_refuses_growth_and_nothing_else() {
        let (_, mut budget) = budget(200_000);
        let mut store = Store::new(PARTITIONER, false, NOW, &mut budget);
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
        let mut store = Store::new(PARTITIONER, false, NOW, &mut budget);
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
        while store.tick(&mut budget, NOW) {
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
        assert_eq!(budget.charged() as usize, charged_for(&store));
        // A tenth of the items, half of the large values, and two blocks of each size, which may stay loose.
        assert!(
            store.resident_bytes() < before / 3,
            "{} of {before}",
            store.resident_bytes()
        );
        drop(store);
        assert!(large.is_unique(), "dropped with the store");
    }

    /// The ghosts, two bytes an item, come nearly at once when the first items must go. What they take is evicted by and by; the
    /// reserve for connections bridges that.
    const ORDER_SLACK: u64 = 200_000;

    fn at(second: u64) -> UnixMillis {
        UnixMillis(NOW.0 + second * 1000)
    }

    fn key(number: u64) -> Vec<u8> {
        format!("key{number}").into_bytes()
    }

    fn has(store: &Store, number: u64) -> bool {
        store.find(PARTITIONER.place(&key(number)).hash, &key(number)).is_some()
    }

    /// What is over goes in bounded steps, a second later at most, and nothing else; also when deadlines were moved.
    #[test]
    fn what_is_over_goes() {
        let (_, mut budget) = budget(1 << 30);
        let mut store = Store::new(PARTITIONER, false, NOW, &mut budget);
        let count = if cfg!(miri) { 200 } else { 10_000u64 };
        let mut deadlines: Vec<Option<u64>> = (0..count)
            .map(|number| (number % 4 > 0).then_some(1 + number * 37 % 9000))
            .collect();
        let deadline_of = |second: Option<u64>| second.map_or(Deadline::Never, |second| Deadline::At(at(second)));
        for (number, second) in deadlines.iter().enumerate() {
            set(
                &mut store,
                &mut budget,
                &parts(&key(number as u64), b"v", deadline_of(*second)),
            )
            .unwrap();
        }
        assert!(store.order_bytes() > 0);
        for (number, second) in deadlines.iter_mut().enumerate().filter(|(number, _)| number % 3 == 0) {
            let key = key(number as u64);
            let position = store.find(PARTITIONER.place(&key).hash, &key).unwrap();
            // Earlier, later, never, or for the first time.
            *second = match number % 4 {
                0 => Some(77),
                1 => second.map(|second| second / 2),
                2 => second.map(|second| second * 3),
                _ => None,
            };
            assert!(store.touch(&mut budget, position, deadline_of(*second)));
        }
        for now in (0..30_000).step_by(13) {
            store.tick(&mut budget, at(now));
            while store.is_due(at(now)) {
                let (seen, removed) = store.expire(&mut budget, at(now), 64);
                assert!(
                    seen > 0 && seen <= 64 + DUE_BATCH && removed <= seen,
                    "{seen} {removed}"
                );
            }
            if now % 1001 == 0 {
                for (number, second) in deadlines.iter().enumerate() {
                    assert_eq!(
                        has(&store, number as u64),
                        second.is_none_or(|second| second >= now),
                        "{number} at {now}"
                    );
                }
            }
        }
        assert_eq!((store.with_deadline, store.order_bytes()), (0, 0));
        assert_eq!(budget.charged() as usize, charged_for(&store));
    }

    /// Items that come and go with deadlines far away leave no trail of entries.
    #[test]
    fn entries_of_what_is_gone_are_few() {
        for evicts in [false, true] {
            let (_, mut budget) = budget(1 << 30);
            let mut store = Store::new(PARTITIONER, evicts, NOW, &mut budget);
            for number in 0..if cfg!(miri) { 10_000 } else { 300_000u64 } {
                let key = key(number % 50);
                set(
                    &mut store,
                    &mut budget,
                    &parts(&key, b"v", Deadline::At(at(86_400 + number))),
                )
                .unwrap();
                let position = store.find(PARTITIONER.place(&key).hash, &key).unwrap();
                store.remove(&mut budget, position);
                if number % 100 == 0 {
                    store.expire(&mut budget, NOW, 256);
                }
            }
            assert!(store.order_bytes() < 100_000, "{}", store.order_bytes());
        }
    }

    /// At the limit items make place: no write is refused, what is charged stays under the limit, and who is read often stays.
    #[test]
    fn eviction_keeps_what_is_read() {
        let limit = if cfg!(miri) { 400_000 } else { 4_000_000 };
        let (_, mut budget) = budget(limit);
        let mut store = Store::new(PARTITIONER, true, NOW, &mut budget);
        let value = [b'v'; 100];
        let room = limit / 150;
        for number in 0..room * 10 {
            set(&mut store, &mut budget, &parts(&key(number), &value, Deadline::Never)).unwrap();
            assert!(budget.charged() <= limit + ORDER_SLACK, "{number}");
            assert_eq!(budget.charged() as usize, charged_for(&store));
            for often in (0..room / 10).filter(|often| (often + number) % 50 == 0) {
                let key = key(often);
                if let Some(position) = store.find(PARTITIONER.place(&key).hash, &key) {
                    store.mark_access(position, NOW.seconds());
                }
            }
        }
        let kept = (0..room / 10).filter(|often| has(&store, *often)).count() as u64;
        assert!(kept > room / 10 * 9 / 10, "{kept} of {} that are read often", room / 10);
        let evicted = store.take_evicted().unwrap();
        assert_eq!(evicted.new + evicted.old, room * 10 - store.len() as u64);
        assert!(evicted.unread > 0 && evicted.by_idle_time[0] == evicted.new + evicted.old);
        assert!(store.len() as u64 > room / 2, "{} items", store.len());
    }

    /// Another size of items, and large values, take over a table that is full.
    #[test]
    fn eviction_makes_place_for_other_sizes() {
        let (_, mut budget) = budget(3_000_000);
        let mut store = Store::new(PARTITIONER, true, NOW, &mut budget);
        for (round, size) in [20, 700, 20, 2000, 200_000, 4000, 20].into_iter().enumerate() {
            let value = vec![b'v'; size.min(4000)];
            for number in 0..20_000_000 / (size as u64 + 500) {
                let key = format!("{round}:{number}").into_bytes();
                let large = bytes::Bytes::from(vec![7; 200_000]);
                let small = parts(&key, &value, Deadline::Never);
                let parts = match size {
                    200_000 => Parts {
                        value: Value::Large(&large),
                        ..small
                    },
                    _ => small,
                };
                set(&mut store, &mut budget, &parts).unwrap_or_else(|_| panic!("{size}: {number}"));
                assert!(budget.charged() <= 3_000_000 + ORDER_SLACK);
            }
            assert_eq!(budget.charged() as usize, charged_for(&store));
        }
    }

    /// An item that is being overwritten is not evicted for that.
    #[test]
    fn an_item_does_not_make_place_for_itself() {
        let (_, mut budget) = budget(300_000);
        let mut store = Store::new(PARTITIONER, true, NOW, &mut budget);
        for number in 0..3000u64 {
            for size in [10, 900, 3000, 50] {
                let value = vec![number as u8; size];
                set(
                    &mut store,
                    &mut budget,
                    &parts(&key(number % 100), &value, Deadline::Never),
                )
                .unwrap();
                let key = key(number % 100);
                let position = store.find(PARTITIONER.place(&key).hash, &key).unwrap();
                assert_eq!(store.item(position).value().bytes(), value);
            }
        }
        assert_eq!(budget.charged() as usize, charged_for(&store));
    }

    /// A value that is replaced while it is being sent counts until it is sent.
    #[test]
    fn what_is_being_sent_is_charged() {
        let (_, mut budget) = budget(1_000_000);
        let mut store = Store::new(PARTITIONER, false, NOW, &mut budget);
        let hash = PARTITIONER.place(b"key").hash;
        let mut sent = vec![];
        loop {
            let value = bytes::Bytes::from(vec![sent.len() as u8; 100_000]);
            let parts = Parts {
                value: Value::Large(&value),
                ..parts(b"key", b"", Deadline::Never)
            };
            if set(&mut store, &mut budget, &parts).is_err() {
                break;
            }
            let position = store.find(hash, b"key").unwrap();
            let Value::Large(value) = store.item(position).value() else {
                panic!("large")
            };
            sent.push(value.clone());
        }
        assert_eq!((sent.len(), store.lingering_bytes()), (9, 800_000));
        sent.truncate(3);
        store.tick(&mut budget, NOW);
        // The first three, and what is stored.
        assert_eq!(store.lingering_bytes(), 300_000);
        assert_eq!(budget.charged() as usize, charged_for(&store));
        // Rewritten for another field, the value is the same and counts once.
        let position = store.find(hash, b"key").unwrap();
        assert!(store.amend(&mut budget, position, |parts| parts.version = Version(7)));
        assert_eq!(store.lingering_bytes(), 300_000);
        assert_eq!(budget.charged() as usize, charged_for(&store));
        store.remove(&mut budget, position);
        sent.clear();
        store.tick(&mut budget, NOW);
        assert_eq!((store.lingering_bytes(), store.payload_bytes()), (0, 0));
        assert_eq!(budget.charged() as usize, charged_for(&store));
    }
}
