//! The index of one shard: extendible hashing over segments of 64-byte buckets.
//!
//! A directory of 2^depth pointers leads from a hash's top bits to a segment; its low bits choose one of 256 buckets. A
//! bucket is one cache line: seven tags of 8 bits, a count, and seven slots. A lookup reads one bucket and then one item:
//! two waits for memory. An item whose bucket is full goes to one of the next three, and its home bucket counts it.
//! When all four are full the segment splits in two, which moves some 900 slots of eight bytes and reads no item: a slot
//! carries the sixteen top bits of its hash. So growth never stops the core for more than some microseconds.
//!
//! ```text
//! slot:  63..48 top bits of the hash   47..2 address of the item (a multiple of 8)   1..0 distance from the home bucket
//! ```

use super::item::{Item, ItemMut, ItemRef};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

const BUCKETS: usize = 256;
const SLOTS: usize = 7;
const NEIGHBOURS: usize = 4;
/// A directory of this many places may grow only while it has a segment for every [`PLACES_PER_SEGMENT_MAX`] of them: keys
/// with equal hashes, which no split can part, must not double it for ever.
const DIRECTORY_FREE_PLACES: usize = 1 << 20;
const PLACES_PER_SEGMENT_MAX: usize = 64;
const SLOT_HASH_BITS: u8 = 16;
const ADDRESS_MASK: u64 = 0x0000_ffff_ffff_fff8;

/// One cache line.
#[repr(C, align(64))]
struct Bucket {
    /// 0 marks a free slot.
    tags: [u8; SLOTS],
    /// How many items have their home here and their slot in one of the next buckets.
    spilled: u8,
    slots: [u64; SLOTS],
}

struct Segment {
    buckets: [Bucket; BUCKETS],
    /// How many of the hash's top bits all items here share.
    depth: u8,
}

/// What a segment costs.
pub(crate) const SEGMENT_BYTES: usize = size_of::<Segment>();

/// Where an item stands. Valid until the next insertion.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    segment: NonNull<Segment>,
    bucket: u16,
    slot: u8,
}

/// Spreads a shard's hashes, which share their top bits, over all 64 bits. Odd, so it is a bijection.
#[inline]
fn spread(hash: u64) -> u64 {
    hash.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[inline]
fn tag_of(spread: u64) -> u8 {
    ((spread >> 8) as u8).max(1)
}

#[inline]
fn home_of(spread: u64) -> usize {
    spread as usize % BUCKETS
}

impl Bucket {
    /// A bit in the top of every byte whose tag equals `tag`. A byte above a true match may be marked wrongly (a borrow), so
    /// the caller compares what the slot says; a true match is never missed.
    #[inline]
    fn matches(&self, tag: u8) -> u64 {
        let mut bytes = [0; 8];
        bytes[..SLOTS].copy_from_slice(&self.tags);
        let tags = u64::from_le_bytes(bytes);
        let difference = tags ^ (u64::from(tag) * 0x0101_0101_0101_0101);
        difference.wrapping_sub(0x0101_0101_0101_0101) & !difference & 0x0080_8080_8080_8080
    }

    fn free_slot(&self) -> Option<usize> {
        self.tags.iter().position(|tag| *tag == 0)
    }
}

/// The index of one shard. Owns its items.
pub(crate) struct Index {
    /// 2^depth pointers; a segment of less depth stands in several neighbouring places.
    directory: Vec<NonNull<Segment>>,
    depth: u8,
    segments: usize,
    items: usize,
}

// SAFETY: the index owns all it points to; nothing in it is tied to a thread.
unsafe impl Send for Index {}

fn new_segment(depth: u8) -> Option<NonNull<Segment>> {
    // SAFETY: `Segment` is not of size zero, and all bytes zero is a valid, empty segment of depth 0.
    let segment = NonNull::new(unsafe { alloc_zeroed(Layout::new::<Segment>()) })?.cast::<Segment>();
    // SAFETY: freshly allocated and initialised; nobody else has the pointer.
    unsafe { (*segment.as_ptr()).depth = depth };
    Some(segment)
}

impl Index {
    /// An empty index; `None` when the allocator has no memory for its first segment.
    pub(crate) fn new() -> Option<Self> {
        Some(Self {
            directory: vec![new_segment(0)?],
            depth: 0,
            segments: 1,
            items: 0,
        })
    }

    /// How many items it holds.
    pub(crate) fn len(&self) -> usize {
        self.items
    }

    /// Bytes of memory of the index itself.
    pub(crate) fn bytes(&self) -> usize {
        self.segments * SEGMENT_BYTES + self.directory.len() * size_of::<NonNull<Segment>>()
    }

    #[inline]
    fn directory_index(&self, spread: u64) -> usize {
        // Two shifts, because a shift by all 64 bits is not defined.
        ((spread >> 1) >> (63 - self.depth)) as usize
    }

    #[inline]
    fn segment_of(&self, spread: u64) -> NonNull<Segment> {
        self.directory[self.directory_index(spread)]
    }

    /// Asks the processor for the bucket that `hash` leads to.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, hash: u64) {
        let spread = spread(hash);
        let segment = self.segment_of(spread);
        // SAFETY: the address is inside the segment; only the address is computed.
        prefetch(unsafe { (&raw const (*segment.as_ptr()).buckets[home_of(spread)]).cast() });
    }

    /// Asks the processor for the item that `hash` most likely leads to; its bucket should have been asked for before.
    #[inline]
    pub(crate) fn prefetch_item(&self, hash: u64) {
        let spread = spread(hash);
        // SAFETY: segments live as long as the index, and nothing changes them while `&self` is borrowed.
        let bucket = unsafe { &self.segment_of(spread).as_ref().buckets[home_of(spread)] };
        let matches = bucket.matches(tag_of(spread));
        if matches != 0 {
            let slot = bucket.slots[(matches.trailing_zeros() / 8) as usize];
            let item: *const u8 = std::ptr::with_exposed_provenance((slot & ADDRESS_MASK) as usize);
            prefetch(item);
            prefetch(item.wrapping_add(64));
        }
    }

    #[inline]
    fn key_matches(&self, word: u64, key: &[u8]) -> bool {
        // SAFETY: a slot in use holds the address of an item that the index owns and `&self` keeps unchanged.
        unsafe { ItemRef::at(word & ADDRESS_MASK) }.key() == key
    }

    /// Finds the item of `key`.
    #[inline(always)]
    pub(crate) fn find(&self, hash: u64, key: &[u8]) -> Option<Position> {
        let spread = spread(hash);
        let tag = tag_of(spread);
        let home = home_of(spread);
        let segment = self.segment_of(spread);
        // SAFETY: as in `prefetch_item`.
        let buckets = unsafe { &segment.as_ref().buckets };
        for distance in 0..NEIGHBOURS {
            let at = (home + distance) % BUCKETS;
            let bucket = &buckets[at];
            let mut matches = bucket.matches(tag);
            while matches != 0 {
                let slot = (matches.trailing_zeros() / 8) as usize;
                matches &= matches - 1;
                let word = bucket.slots[slot];
                if word != 0 && word >> 48 == spread >> 48 && self.key_matches(word, key) {
                    return Some(Position {
                        segment,
                        bucket: at as u16,
                        slot: slot as u8,
                    });
                }
            }
            if buckets[home].spilled == 0 {
                return None;
            }
        }
        None
    }

    #[inline]
    fn word(&self, position: Position) -> u64 {
        // SAFETY: a position is only used before the next insertion or removal, so its segment lives and is unchanged.
        unsafe { self.bucket(position).as_ref() }.slots[usize::from(position.slot)]
    }

    #[inline]
    fn bucket(&self, position: Position) -> NonNull<Bucket> {
        // SAFETY: the bucket number is below BUCKETS, so the address is inside the segment; no reference is made.
        unsafe { NonNull::new_unchecked(&raw mut (*position.segment.as_ptr()).buckets[usize::from(position.bucket)]) }
    }

    /// The item at a position.
    #[inline]
    pub(crate) fn item(&self, position: Position) -> ItemRef<'_> {
        // SAFETY: a slot in use holds the address of an item that the index owns; changing it needs `&mut self`.
        unsafe { ItemRef::at(self.word(position) & ADDRESS_MASK) }
    }

    /// The item at a position, to change in place.
    #[inline]
    pub(crate) fn item_mut(&mut self, position: Position) -> ItemMut<'_> {
        // SAFETY: as in `item`, and `&mut self` excludes every other reference.
        unsafe { ItemMut::at(self.word(position) & ADDRESS_MASK) }
    }

    /// Puts another item of the same key in a position's place and returns the old one.
    pub(crate) fn replace(&mut self, position: Position, item: Item) -> Item {
        let word = self.word(position);
        // SAFETY: `&mut self` makes this the only access to the bucket.
        let bucket = unsafe { self.bucket(position).as_mut() };
        bucket.slots[usize::from(position.slot)] = word & !ADDRESS_MASK | item.into_address();
        // SAFETY: the slot held the address, and no longer does.
        unsafe { Item::from_address(word & ADDRESS_MASK) }
    }

    /// Takes an item out.
    pub(crate) fn remove(&mut self, position: Position) -> Item {
        let word = self.word(position);
        let distance = (word & 3) as usize;
        // SAFETY: `&mut self` makes these the only accesses to the buckets, one after the other.
        unsafe {
            let bucket = self.bucket(position).as_mut();
            bucket.tags[usize::from(position.slot)] = 0;
            bucket.slots[usize::from(position.slot)] = 0;
            if distance > 0 {
                let home = (usize::from(position.bucket) + BUCKETS - distance) % BUCKETS;
                (*position.segment.as_ptr()).buckets[home].spilled -= 1;
            }
        }
        self.items -= 1;
        // SAFETY: the slot held the address, and no longer does.
        unsafe { Item::from_address(word & ADDRESS_MASK) }
    }

    /// How many bytes more the index will take when an item of this hash is inserted: 0 nearly always.
    pub(crate) fn growth_bytes(&self, hash: u64) -> usize {
        let spread = spread(hash);
        // SAFETY: as in `prefetch_item`.
        let segment = unsafe { self.segment_of(spread).as_ref() };
        if segment.free_place(home_of(spread)).is_some() {
            return 0;
        }
        let doubling = segment.depth == self.depth;
        SEGMENT_BYTES
            + if doubling {
                self.directory.len() * size_of::<NonNull<Segment>>()
            } else {
                0
            }
    }

    /// Puts in an item whose key is not there yet. `hash_of` gives the hash of another item's key; it is asked only in
    /// shards of tens of millions of items. Gives the item back when the allocator has no memory for a segment.
    pub(crate) fn insert(&mut self, hash: u64, item: Item, hash_of: impl Fn(&[u8]) -> u64) -> Result<Position, Item> {
        let spread = spread(hash);
        loop {
            let mut segment = self.segment_of(spread);
            // SAFETY: `&mut self` makes this the only access to the segment.
            let content = unsafe { segment.as_mut() };
            let home = home_of(spread);
            if let Some((distance, slot)) = content.free_place(home) {
                let at = (home + distance) % BUCKETS;
                content.buckets[at].tags[slot] = tag_of(spread);
                content.buckets[at].slots[slot] = spread >> 48 << 48 | item.into_address() | distance as u64;
                if distance > 0 {
                    content.buckets[home].spilled += 1;
                }
                self.items += 1;
                return Ok(Position {
                    segment,
                    bucket: at as u16,
                    slot: slot as u8,
                });
            }
            if !self.split(spread, &hash_of) {
                return Err(item);
            }
        }
    }

    /// Splits the segment that `spread_hash` leads to; false when there is no memory for another or splitting
    /// cannot help.
    #[cold]
    fn split(&mut self, spread_hash: u64, hash_of: &impl Fn(&[u8]) -> u64) -> bool {
        let mut old = self.segment_of(spread_hash);
        // SAFETY: `&mut self` makes this the only access to the segment.
        let old_content = unsafe { old.as_mut() };
        let depth = old_content.depth;
        if depth == self.depth {
            if self.directory.len() >= DIRECTORY_FREE_PLACES.max(self.segments * PLACES_PER_SEGMENT_MAX) {
                return false;
            }
            let doubled: Vec<_> = self.directory.iter().flat_map(|segment| [*segment; 2]).collect();
            self.directory = doubled;
            self.depth += 1;
        }
        let Some(mut new) = new_segment(depth + 1) else {
            return false;
        };
        // SAFETY: freshly made and not shared.
        let new_content = unsafe { new.as_mut() };
        old_content.depth = depth + 1;
        self.segments += 1;
        // The places of the old segment whose next bit is one now lead to the new one.
        let span = 1usize << (self.depth - depth);
        let first = self.directory_index(spread_hash) / span * span;
        self.directory[first + span / 2..first + span].fill(new);

        for at in 0..BUCKETS {
            for slot in 0..SLOTS {
                let word = old_content.buckets[at].slots[slot];
                if word == 0 {
                    continue;
                }
                let moves = if depth < SLOT_HASH_BITS {
                    word >> (63 - depth) & 1 == 1
                } else {
                    // SAFETY: the slot's address is of a live item, borrowed for this expression.
                    let key = unsafe { ItemRef::at(word & ADDRESS_MASK) }.key();
                    spread(hash_of(key)) >> (63 - depth) & 1 == 1
                };
                if moves {
                    // The same place in the new segment is free: only items of this place's twin come here.
                    new_content.buckets[at].slots[slot] = word;
                    new_content.buckets[at].tags[slot] = old_content.buckets[at].tags[slot];
                    old_content.buckets[at].slots[slot] = 0;
                    old_content.buckets[at].tags[slot] = 0;
                    let distance = (word & 3) as usize;
                    if distance > 0 {
                        let home = (at + BUCKETS - distance) % BUCKETS;
                        old_content.buckets[home].spilled -= 1;
                        new_content.buckets[home].spilled += 1;
                    }
                }
            }
        }
        true
    }

    /// Shows the items of the next bucket to `visit`, with their positions, and returns where to go on. Started at 0, a
    /// walk ends when it returns 0 again; it sees every item that stays in the index from its start to its end, also when
    /// the index grows meanwhile.
    pub(crate) fn walk(&self, cursor: u64, mut visit: impl FnMut(Position, ItemRef<'_>)) -> u64 {
        // The cursor is the segment's hash prefix with the bucket number in its low bits.
        let segment = self.segment_of(cursor);
        let at = home_of(cursor);
        // SAFETY: as in `prefetch_item`.
        let content = unsafe { segment.as_ref() };
        for (slot, word) in content.buckets[at]
            .slots
            .iter()
            .enumerate()
            .filter(|(_, word)| **word != 0)
        {
            let position = Position {
                segment,
                bucket: at as u16,
                slot: slot as u8,
            };
            // SAFETY: a slot in use holds the address of an item that the index owns and `&self` keeps unchanged.
            visit(position, unsafe { ItemRef::at(word & ADDRESS_MASK) });
        }
        if at + 1 < BUCKETS {
            return cursor + 1;
        }
        let prefix = cursor & !(BUCKETS as u64 - 1);
        match content.depth {
            0 => 0,
            depth => (prefix >> (64 - depth))
                .wrapping_add(1)
                .checked_shl(u32::from(64 - depth))
                .unwrap_or(0),
        }
    }

    /// Frees the items of one segment and the segment, and returns how many bytes of items that were; `None` when nothing is
    /// left. To empty an index of millions of items step by step.
    pub(crate) fn free_segment(&mut self) -> Option<FreedSegment> {
        let segment = *self.directory.last()?;
        while self.directory.last() == Some(&segment) {
            self.directory.pop();
        }
        self.segments -= 1;
        let mut freed = FreedSegment::default();
        // SAFETY: `&mut self` makes this the only access; all places that led to the segment are gone.
        for word in unsafe { segment.as_ref() }
            .buckets
            .iter()
            .flat_map(|bucket| &bucket.slots)
        {
            if *word != 0 {
                // SAFETY: the slot held the address; the segment is freed below, so nothing else will.
                let item = unsafe { Item::from_address(word & ADDRESS_MASK) };
                freed.item_bytes += item.view().charged_bytes();
                freed.items += 1;
            }
        }
        self.items -= freed.items;
        // SAFETY: made by `new_segment` with this layout, and no longer referred to.
        unsafe { dealloc(segment.as_ptr().cast(), Layout::new::<Segment>()) };
        Some(freed)
    }
}

/// What [`Index::free_segment`] freed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct FreedSegment {
    pub(crate) items: usize,
    /// As charged, without the segment itself.
    pub(crate) item_bytes: usize,
}

impl Segment {
    /// The nearest free slot for an item of this home: (distance, slot).
    #[inline]
    fn free_place(&self, home: usize) -> Option<(usize, usize)> {
        (0..NEIGHBOURS).find_map(|distance| {
            let slot = self.buckets[(home + distance) % BUCKETS].free_slot()?;
            Some((distance, slot))
        })
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        while self.free_segment().is_some() {}
    }
}

#[inline]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: prefetching any address has no effect that a program can see.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests {
    use super::super::item::Parts;
    use super::*;
    use crate::model::{Deadline, Value, Version};
    use xxhash_rust::xxh3::xxh3_64;

    fn item(key: &[u8]) -> Item {
        Item::new(&Parts {
            key,
            value: Value::Small(key),
            flags: 0,
            deadline: Deadline::Never,
            version: Version(0),
            accessed_s: 0,
            state: 0,
        })
        .unwrap()
    }

    fn key(number: usize) -> Vec<u8> {
        format!("key:{number}").into_bytes()
    }

    const COUNT: usize = if cfg!(miri) { 2_500 } else { 200_000 };

    /// Grows through many splits, then shrinks: every key is found exactly while it is in.
    #[test]
    fn finds_what_is_in_and_nothing_else() {
        let mut index = Index::new().unwrap();
        for number in 0..COUNT {
            let key = key(number);
            assert!(index.find(xxh3_64(&key), &key).is_none());
            index.insert(xxh3_64(&key), item(&key), xxh3_64).unwrap();
        }
        assert_eq!(index.len(), COUNT);
        for number in 0..COUNT {
            let key = key(number);
            let position = index.find(xxh3_64(&key), &key).unwrap();
            assert_eq!(index.item(position).value().bytes(), key);
            if number % 2 == 0 {
                index.remove(position);
            }
        }
        for number in 0..COUNT {
            let key = key(number);
            assert_eq!(index.find(xxh3_64(&key), &key).is_some(), number % 2 == 1);
        }
        assert_eq!(index.len(), COUNT / 2);
    }

    /// Splits past the sixteen bits that a slot keeps: the deeper bits come from the keys.
    #[test]
    fn splits_on_hash_bits_that_the_slots_do_not_keep() {
        let mut index = Index::new().unwrap();
        let count = if cfg!(miri) { 100 } else { 3000 };
        // Undo `spread`, so that all keys share their top 17 bits and differ below.
        let inverse = (0..6).fold(1u64, |x, _| {
            x.wrapping_mul(2u64.wrapping_sub(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(x)))
        });
        let hash_of = |key: &[u8]| (xxh3_64(key) >> 17).wrapping_mul(inverse);
        for number in 0..count {
            let key = key(number);
            index.insert(hash_of(&key), item(&key), hash_of).unwrap();
        }
        for number in 0..count {
            let key = key(number);
            assert!(index.find(hash_of(&key), &key).is_some());
        }
    }

    /// Keys whose hashes are all equal run out of places: an error, not an endless loop.
    #[test]
    fn equal_hashes_end_in_an_error() {
        let mut index = Index::new().unwrap();
        let results: Vec<bool> = (0..40).map(|n| index.insert(0, item(&key(n)), |_| 0).is_ok()).collect();
        assert_eq!(results.iter().filter(|ok| **ok).count(), NEIGHBOURS * SLOTS);
    }

    /// A walk sees every item that was there all the time, though the index splits under it.
    #[test]
    fn walks_see_everything_also_while_growing() {
        let mut index = Index::new().unwrap();
        for number in 0..COUNT / 10 {
            let key = key(number);
            index.insert(xxh3_64(&key), item(&key), xxh3_64).unwrap();
        }
        let (mut cursor, mut next) = (0, COUNT / 10);
        let mut seen = std::collections::HashSet::new();
        loop {
            cursor = index.walk(cursor, |_, item| {
                seen.insert(item.key().to_vec());
            });
            if cursor == 0 {
                break;
            }
            if next < COUNT / 2 {
                let key = key(next);
                index.insert(xxh3_64(&key), item(&key), xxh3_64).unwrap();
                next += 1;
            }
        }
        for number in 0..COUNT / 10 {
            assert!(seen.contains(&key(number)), "{number}");
        }
    }

    #[test]
    fn empties_step_by_step() {
        let mut index = Index::new().unwrap();
        for number in 0..5000 {
            let key = key(number);
            index.insert(xxh3_64(&key), item(&key), xxh3_64).unwrap();
        }
        let mut freed = 0;
        while let Some(step) = index.free_segment() {
            assert!(step.items <= BUCKETS * SLOTS);
            freed += step.items;
        }
        assert_eq!((freed, index.len()), (5000, 0));
    }
}
