//! The index of one shard: extendible hashing over segments of 64-byte buckets.
//!
//! A directory of 2^depth words leads from the top bits of a hash to a segment; its low bits choose a bucket. A bucket is
//! one cache line: nine tags of 8 bits, a byte about spilled items, and nine slots of 48 bits. A slot holds where the item
//! is, not the item: a lookup reads one bucket and then one item, two waits for memory. An item whose bucket is full goes to
//! one of three other buckets, which its home bucket notes. Where all four are full, an item in them moves to another of
//! its own four, so buckets fill to almost nine tenths before the segment must grow.
//!
//! ```text
//! slot:  47..36 twelve bits of the hash   35..34 distance: which of its four buckets this is   33..0 location of the item
//! ```
//!
//! **Growth.** A segment has one of four sizes. A full one is replaced by one of the next size, a full one of the last size by
//! two of the first. Either moves some 2000 slots and reads no item, because the place of an item within its segment is an
//! order-preserving function of the 15 low bits of its hash, its *fraction*, and a slot still tells that fraction:
//!
//! - The tag is the low byte of the fraction, and the home bucket is `fraction * buckets >> 15`.
//! - So the fractions of one home are at most `ceil(2^15 / buckets)` neighbouring numbers. No segment has fewer than 128
//!   buckets, so these are at most 256, and no two of them have the same low byte: home and tag give the fraction back.
//! - The tag must not be 0, which marks a free slot. A fraction whose low byte is 0 is therefore *defined* as the next one,
//!   with low byte 1, before anything is computed from it: home, tag and the fraction given back agree also there.
//!
//! The twelve bits in the slot say to which half of a split it goes. They start at the segment's *base*: bit 0 of the hash at
//! first. When twelve splits have used them up, the next one asks for the hash of every item of the segment once, and the base
//! moves.
//!
//! **Shrinking.** Where most items are gone ([`Index::is_sparse`]), a walk round the directory replaces segments by smaller ones
//! and pairs of segments by one ([`Index::shrink`]): the same moves backwards. The directory stays as large as it was.
//!
//! **Evenness.** If all segments were equally likely, they would all grow at nearly the same time: the memory per item would
//! swing, and so would the time of insertions, and the allocator would be left with a heap of segments of the last size.
//! [`spread`] makes the first segments of the directory about half as likely as the last ones, so at any time there are
//! segments of all sizes.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;

const SLOTS: usize = 9;
/// A segment of class c has `BUCKETS_MIN + c * BUCKETS_STEP` buckets. One bucket less than a round number, because an
/// allocator may need the alignment on top, and its size classes are round.
const BUCKETS_MIN: usize = 159;
const BUCKETS_STEP: usize = 32;
const CLASSES: usize = 4;
/// How far from its home bucket an item may be. Not neighbours: where one bucket is full its neighbours' places are then
/// not needed by the same items, so more fits.
const DISTANCES: [usize; 4] = [0, 1, 5, 17];
const FRACTION_BITS: u32 = 15;
const FRACTION_MAX: u64 = (1 << FRACTION_BITS) - 1;
/// So many fractions there are.
pub(crate) const FRACTIONS: u32 = 1 << FRACTION_BITS;
const LOCATION_BITS: u32 = 34;
const LOCATION_MAX: u64 = (1 << LOCATION_BITS) - 1;
const DISTANCE_MASK: u64 = 3 << LOCATION_BITS;
const WINDOW_BITS: u32 = 12;
/// A directory of this many places may grow only while it has a segment for every [`PLACES_PER_SEGMENT_MAX`] of them: keys
/// with equal hashes, which no split can part, must not double it for ever.
const DIRECTORY_FREE_PLACES: usize = if cfg!(miri) { 1 << 10 } else { 1 << 20 };
const PLACES_PER_SEGMENT_MAX: usize = 64;
/// An index with more bytes than this for each item, and some more, is sparse; a dense one has nine.
const SPARSE_BYTES_PER_ITEM: usize = 14;
const SPARSE_BYTES_MIN: usize = 1 << 16;
/// What shrinks is filled up to here, in eighths, so that it need not grow again at once.
const SHRUNK_EIGHTHS_MAX: usize = 6;
/// Where all items of a segment are looked at, those of so many buckets are on their way into the cache.
const BUCKETS_AHEAD: usize = 2;

// What the recovery of fractions, the byte-sized bucket numbers and the tagged pointers rely on.
const _: () = assert!((1 << FRACTION_BITS) / BUCKETS_MIN < 256);
const _: () = assert!(buckets_of(CLASSES - 1) <= 256 && CLASSES == 4 && align_of::<Bucket>() == 64);

/// Where an item is: a number below 2^34 that only the owner of the items understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Location(u64);

impl Location {
    /// `None` when the number does not fit a slot.
    pub(crate) fn new(number: u64) -> Option<Self> {
        (number <= LOCATION_MAX).then_some(Self(number))
    }

    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

/// Knows the keys of items.
pub(crate) trait Keys {
    /// Asks the processor for the key of the item at a location.
    fn ask(&self, location: Location);
    /// The hash of that key.
    fn hash(&self, location: Location) -> u64;
}

/// The allocator has no memory, or too many hashes are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoMemory;

/// Where an item stands in the index. Valid until the next insertion or removal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Position {
    segment: Segment,
    bucket: u8,
    slot: u8,
}

/// One cache line: 9 tags, where 0 marks a free slot; the byte `spilled`; 9 slots of 6 bytes, the lowest first.
///
/// `spilled` is about the items that have their home here and their slot in another bucket: in its five low bits how many
/// (at most 27), above them a bit for each distance that one of them had since there were none.
#[repr(C, align(64))]
struct Bucket([u8; 64]);

const SPILLED: usize = SLOTS;
const SPILLED_COUNT: u8 = 31;
const SPILLED_COUNT_BITS: u32 = 5;

impl Bucket {
    /// A bit for every slot whose tag is `tag`.
    #[cfg(target_arch = "x86_64")]
    fn matches(&self, tag: u8) -> u32 {
        use std::arch::x86_64::{_mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_set1_epi8};
        // SAFETY: SSE2 is part of x86-64; the first 16 of the bucket's 64 bytes are read, which are aligned to 64.
        let equal = unsafe {
            let tags = _mm_load_si128((&raw const self.0).cast());
            _mm_movemask_epi8(_mm_cmpeq_epi8(tags, _mm_set1_epi8(tag.cast_signed())))
        };
        equal.cast_unsigned() & ((1 << SLOTS) - 1)
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn matches(&self, tag: u8) -> u32 {
        self.matches_portable(tag)
    }

    /// The same without special instructions.
    #[cfg(any(test, not(target_arch = "x86_64")))]
    fn matches_portable(&self, tag: u8) -> u32 {
        (0..SLOTS).fold(0, |bits, slot| bits | u32::from(self.0[slot] == tag) << slot)
    }

    fn free_slot(&self) -> Option<usize> {
        let free = self.matches(0);
        (free != 0).then(|| free.trailing_zeros() as usize)
    }

    /// The slots in use that hold what `belongs` picks.
    fn used<F: Fn(u64) -> bool>(&self, belongs: F) -> impl Iterator<Item = usize> + use<F> {
        // All are asked before the first is given, without branches: half of them may belong.
        let picked = (0..SLOTS).fold(0, |bits, slot| bits | u32::from(belongs(self.word(slot))) << slot);
        let mut left = picked & !self.matches(0);
        std::iter::from_fn(move || {
            let slot = (left != 0).then(|| left.trailing_zeros() as usize);
            left &= left.wrapping_sub(1);
            slot
        })
    }

    /// What a slot holds: eight bytes are read at once, the slot and the two before it.
    fn word(&self, slot: usize) -> u64 {
        let start = SPILLED - 1 + slot * 6;
        let bytes = self.0[start..start + 8].try_into().expect("eight bytes");
        u64::from_le_bytes(bytes) >> 16
    }

    fn set(&mut self, slot: usize, tag: u8, word: u64) {
        let start = SPILLED + 1 + slot * 6;
        self.0[start..start + 6].copy_from_slice(&word.to_le_bytes()[..6]);
        self.0[slot] = tag;
    }
}

fn location_in(word: u64) -> Location {
    Location(word & LOCATION_MAX)
}

fn distance_in(word: u64) -> usize {
    (word >> LOCATION_BITS & 3) as usize
}

/// Spreads a shard's hashes, which share their top bits, over all 64 bits, but not evenly: x in 0..1 becomes
/// x + 3/8 x (1 - x), so that low results are about half as frequent as high ones. The module's comment says why.
fn spread(hash: u64) -> u64 {
    let even = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let bow = ((u128::from(even) * u128::from(!even)) >> 64) as u64;
    even + bow * 3 / 8
}

/// The low bits of a spread hash, with a low byte that is not 0: it is the tag.
fn fraction_of(spread: u64) -> u32 {
    let tag = (spread as u8).max(1);
    (spread & FRACTION_MAX & !0xff) as u32 | u32::from(tag)
}

/// The first `bits` bits of a spread hash.
fn prefix_of(spread: u64, bits: u32) -> usize {
    // Two shifts, because a shift by all 64 bits is not defined.
    ((spread >> 1) >> (63 - bits)) as usize
}

/// In which part of the hashes one is ([`Index::visit_part`]): its first bits, once spread, and its fraction.
pub(crate) fn part_of(hash: u64, prefix_bits: u32) -> (usize, u32) {
    let spread = spread(hash);
    (prefix_of(spread, prefix_bits), fraction_of(spread))
}

fn home_of(fraction: u32, buckets: usize) -> usize {
    (fraction as usize * buckets) >> FRACTION_BITS
}

/// The lowest fraction that has its home here.
fn first_fraction(home: usize, buckets: usize) -> u32 {
    ((home as u32) << FRACTION_BITS).div_ceil(buckets as u32)
}

/// The fraction with this tag among the at most 256 neighbouring ones of a home, the lowest of which is `first`.
fn fraction_from(first: u32, tag: u8) -> u32 {
    first + u32::from(tag.wrapping_sub(first as u8))
}

const fn buckets_of(class: usize) -> usize {
    BUCKETS_MIN + class * BUCKETS_STEP
}

/// The bucket at a distance from a home.
fn away(home: usize, distance: usize, buckets: usize) -> usize {
    let at = home + DISTANCES[distance];
    if at < buckets { at } else { at - buckets }
}

/// The home of what stands at a distance from it.
fn back(at: usize, distance: usize, buckets: usize) -> usize {
    let home = at + buckets - DISTANCES[distance];
    if home < buckets { home } else { home - buckets }
}

/// A segment is nothing but its buckets. The pointer's low six bits, free because a bucket is aligned to 64, tell what a
/// lookup needs to know before it reads one: the class in two, a quarter of the base in four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment(NonNull<Bucket>);

impl Segment {
    fn layout(class: usize) -> Layout {
        Layout::array::<Bucket>(buckets_of(class)).expect("a segment is small")
    }

    /// A segment that begins with this bucket; `None` when there is no bucket.
    fn tagged(first: *mut Bucket, class: usize, base: u32) -> Option<Self> {
        Some(Self(
            NonNull::new(first)?.map_addr(|address| address | base as usize | class),
        ))
    }

    fn allocate(class: usize, base: u32) -> Option<Self> {
        // SAFETY: the layout is not of size zero. All bytes zero is an array of empty buckets.
        Self::tagged(unsafe { alloc_zeroed(Self::layout(class)) }.cast(), class, base)
    }

    /// # Safety
    /// Nobody may use the segment after this.
    unsafe fn free(self) {
        // SAFETY: allocated with this layout; the caller vouches for the rest.
        unsafe { dealloc(self.first().cast(), Self::layout(self.class())) };
    }

    fn class(self) -> usize {
        self.0.addr().get() & 3
    }

    /// The number of the first hash bit that the slots hold: a multiple of four.
    fn base(self) -> u32 {
        (self.0.addr().get() & 60) as u32
    }

    fn first(self) -> *mut Bucket {
        self.0.as_ptr().map_addr(|address| address & !63)
    }

    /// All buckets, which are initialised as long as the segment is not freed.
    fn buckets(self) -> *mut [Bucket] {
        std::ptr::slice_from_raw_parts_mut(self.first(), buckets_of(self.class()))
    }

    fn bytes(self) -> usize {
        self.buckets().len() * size_of::<Bucket>()
    }

    /// The hash bits that a slot of this segment holds.
    fn window(self, spread: u64) -> u64 {
        spread << self.base() >> (64 - WINDOW_BITS)
    }
}

/// Puts a word, whose distance is not in it yet, into a free slot and notes it at its home.
fn put(buckets: &mut [Bucket], home: usize, distance: usize, slot: usize, tag: u8, word: u64) {
    let at = away(home, distance, buckets.len());
    buckets[at].set(slot, tag, word | (distance as u64) << LOCATION_BITS);
    if distance > 0 {
        let spilled = &mut buckets[home].0[SPILLED];
        *spilled = (*spilled + 1) | 1 << (SPILLED_COUNT_BITS as usize + distance - 1);
    }
}

/// Empties a slot and returns what it held: home, tag and word without the distance.
fn take(buckets: &mut [Bucket], at: usize, slot: usize) -> (usize, u8, u64) {
    let (tag, word) = (buckets[at].0[slot], buckets[at].word(slot));
    let distance = distance_in(word);
    let home = back(at, distance, buckets.len());
    buckets[at].set(slot, 0, 0);
    if distance > 0 {
        let spilled = &mut buckets[home].0[SPILLED];
        *spilled -= 1;
        if *spilled & SPILLED_COUNT == 0 {
            *spilled = 0;
        }
    }
    (home, tag, word & !DISTANCE_MASK)
}

/// A place for an item: a slot at a distance from its home. When it is in use, what it holds can move to a free slot, at
/// another distance from its own home.
struct Room {
    distance: usize,
    slot: usize,
    moves_to: Option<(usize, usize)>,
}

fn room(buckets: &[Bucket], home: usize) -> Option<Room> {
    (0..DISTANCES.len())
        .find_map(|distance| {
            let slot = buckets[away(home, distance, buckets.len())].free_slot()?;
            Some(Room {
                distance,
                slot,
                moves_to: None,
            })
        })
        .or_else(|| room_by_moving(buckets, home))
}

#[cold]
fn room_by_moving(buckets: &[Bucket], home: usize) -> Option<Room> {
    let count = buckets.len();
    (0..DISTANCES.len() * SLOTS).find_map(|candidate| {
        let (distance, slot) = (candidate / SLOTS, candidate % SLOTS);
        let at = away(home, distance, count);
        let other_home = back(at, distance_in(buckets[at].word(slot)), count);
        let moves_to = (0..DISTANCES.len()).find_map(|other_distance| {
            let free = buckets[away(other_home, other_distance, count)].free_slot()?;
            Some((other_distance, free))
        })?;
        Some(Room {
            distance,
            slot,
            moves_to: Some(moves_to),
        })
    })
}

/// Puts a word into its room. Returns its bucket and the one where one more slot is in use than before.
fn put_in_room(buckets: &mut [Bucket], home: usize, room: &Room, tag: u8, word: u64) -> (usize, usize) {
    let at = away(home, room.distance, buckets.len());
    let mut taken = at;
    if let Some((distance, slot)) = room.moves_to {
        let (other_home, other_tag, other_word) = take(buckets, at, room.slot);
        put(buckets, other_home, distance, slot, other_tag, other_word);
        taken = away(other_home, distance, buckets.len());
    }
    put(buckets, home, room.distance, room.slot, tag, word);
    (at, taken)
}

/// The index of one shard: where the item of each key is.
pub(crate) struct Index {
    /// 2^depth places; a segment of less depth stands in several neighbouring ones.
    directory: Vec<Segment>,
    depth: u32,
    segment_bytes: usize,
    items: usize,
    /// Where the walk of [`Index::shrink`] is.
    shrink_at: usize,
}

// SAFETY: the index owns all it points to; nothing in it is tied to a thread.
unsafe impl Send for Index {}

impl Index {
    /// An empty index; `None` when the allocator has no memory for it.
    pub(crate) fn new() -> Option<Self> {
        let mut directory = Vec::new();
        directory.try_reserve_exact(1).ok()?;
        let segment = Segment::allocate(0, 0)?;
        directory.push(segment);
        Some(Self {
            directory,
            depth: 0,
            segment_bytes: segment.bytes(),
            items: 0,
            shrink_at: 0,
        })
    }

    /// How many items it holds.
    pub(crate) fn len(&self) -> usize {
        self.items
    }

    /// Bytes of memory of the index itself.
    pub(crate) fn bytes(&self) -> usize {
        self.segment_bytes + self.directory.capacity() * size_of::<Segment>()
    }

    fn place_of(&self, spread: u64) -> usize {
        prefix_of(spread, self.depth)
    }

    /// Where a spread hash leads: its segment, its home bucket there, and its tag.
    #[inline(always)]
    fn way(&self, spread: u64) -> (Segment, usize, u8) {
        let segment = self.directory[self.place_of(spread)];
        let fraction = fraction_of(spread);
        (segment, home_of(fraction, segment.buckets().len()), fraction as u8)
    }

    /// The places of the segment at a place: the first and how many. A power of two of them, at a multiple of it.
    fn span_at(&self, place: usize) -> (usize, usize) {
        let mut span = 1;
        loop {
            let (first, last) = (place & !(2 * span - 1), place | (2 * span - 1));
            if last >= self.directory.len() || self.directory[first] != self.directory[last] {
                return (place & !(span - 1), span);
            }
            span *= 2;
        }
    }

    fn buckets(&self, segment: Segment) -> &[Bucket] {
        // SAFETY: segments from the directory or from a valid position live; nothing changes them while `&self` is borrowed.
        unsafe { &*segment.buckets() }
    }

    fn buckets_mut(&mut self, segment: Segment) -> &mut [Bucket] {
        // SAFETY: as in `buckets`, and `&mut self` makes this the only access.
        unsafe { &mut *segment.buckets() }
    }

    /// Asks the processor for the bucket that `hash` leads to.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, hash: u64) {
        let (segment, home, _) = self.way(spread(hash));
        prefetch(segment.first().wrapping_add(home).cast());
    }

    /// Where the item of `hash` most likely is, to ask the processor for it; its bucket should have been asked for before.
    #[inline]
    pub(crate) fn likely(&self, hash: u64) -> Option<Location> {
        let (segment, home, tag) = self.way(spread(hash));
        let bucket = &self.buckets(segment)[home];
        let matches = bucket.matches(tag);
        (matches != 0).then(|| location_in(bucket.word(matches.trailing_zeros() as usize)))
    }

    /// Finds the item of a key: `is_it` says whether the item at a location has it.
    #[inline(always)]
    pub(crate) fn find(&self, hash: u64, mut is_it: impl FnMut(Location) -> bool) -> Option<Position> {
        let spread = spread(hash);
        let (segment, home, tag) = self.way(spread);
        let buckets = self.buckets(segment);
        let mut at = home;
        // What a slot of this key holds above the location: the distance, and the hash bits of this segment.
        let mut expected = segment.window(spread) << 2;
        let mut distances = buckets[home].0[SPILLED] >> SPILLED_COUNT_BITS;
        loop {
            let bucket = &buckets[at];
            let mut matches = bucket.matches(tag);
            while matches != 0 {
                let slot = matches.trailing_zeros();
                matches &= matches - 1;
                let word = bucket.word(slot as usize);
                if word >> LOCATION_BITS == expected && is_it(location_in(word)) {
                    return Some(Position {
                        segment,
                        bucket: at as u8,
                        slot: slot as u8,
                    });
                }
            }
            if distances == 0 {
                return None;
            }
            let distance = distances.trailing_zeros() as usize + 1;
            distances &= distances - 1;
            at = away(home, distance, buckets.len());
            expected = expected & !3 | distance as u64;
        }
    }

    /// Where the item at a position is.
    #[inline]
    pub(crate) fn location(&self, position: Position) -> Location {
        location_in(self.buckets(position.segment)[usize::from(position.bucket)].word(usize::from(position.slot)))
    }

    /// The item at a position is now elsewhere, or another one of the same key takes its place.
    #[inline]
    pub(crate) fn relocate(&mut self, position: Position, location: Location) {
        let bucket = &mut self.buckets_mut(position.segment)[usize::from(position.bucket)];
        let slot = usize::from(position.slot);
        bucket.set(slot, bucket.0[slot], bucket.word(slot) & !LOCATION_MAX | location.0);
    }

    /// Takes an item out and tells where it was.
    pub(crate) fn remove(&mut self, position: Position) -> Location {
        let buckets = self.buckets_mut(position.segment);
        let (_, _, word) = take(buckets, usize::from(position.bucket), usize::from(position.slot));
        self.items -= 1;
        location_in(word)
    }

    /// How many bytes more the index will take when an item of this hash is inserted: 0 nearly always. Seldom, one step of
    /// growth does not suffice and it takes more. While the insertion lasts, the old segment is there as well.
    pub(crate) fn growth_bytes(&self, hash: u64) -> usize {
        let spread = spread(hash);
        let (segment, home, _) = self.way(spread);
        if room(self.buckets(segment), home).is_some() {
            return 0;
        }
        if segment.class() + 1 < CLASSES {
            return BUCKETS_STEP * size_of::<Bucket>();
        }
        let (_, span) = self.span_at(self.place_of(spread));
        let doubling = usize::from(span == 1) * self.directory.len() * size_of::<Segment>();
        2 * BUCKETS_MIN * size_of::<Bucket>() - segment.bytes() + doubling
    }

    /// Puts in where the item of a key is that is not there yet. `keys`, of the other items, are asked for only in shards of
    /// millions of items.
    pub(crate) fn insert(&mut self, hash: u64, location: Location, keys: &impl Keys) -> Result<Position, NoMemory> {
        let spread = spread(hash);
        loop {
            let (segment, home, tag) = self.way(spread);
            let buckets = self.buckets_mut(segment);
            if let Some(room) = room(buckets, home) {
                let word = segment.window(spread) << (LOCATION_BITS + 2) | location.0;
                let (at, _) = put_in_room(buckets, home, &room, tag, word);
                self.items += 1;
                return Ok(Position {
                    segment,
                    bucket: at as u8,
                    slot: room.slot as u8,
                });
            }
            self.grow(spread, keys)?;
        }
    }

    /// Replaces the segment that `spread_hash` leads to by a larger one or by two.
    #[cold]
    fn grow(&mut self, spread_hash: u64, keys: &impl Keys) -> Result<(), NoMemory> {
        let (first, span) = self.span_at(self.place_of(spread_hash));
        let old = self.directory[first];
        if let Some(new) = self.rebuilt(old, old.class() + 1, |_| true) {
            self.replace(old, first, span, [new, new]);
            return Ok(());
        }
        if span == 1 {
            self.double_directory()?;
        }
        let (first, span) = self.span_at(self.place_of(spread_hash));
        let depth = self.depth - span.trailing_zeros();
        if depth >= self.directory[first].base() + WINDOW_BITS {
            self.rebase(first, span, depth, keys);
        }
        let old = self.directory[first];
        // The bit of a word that is bit `depth` of the hash.
        let bit = 1 << (LOCATION_BITS + 1 + WINDOW_BITS + old.base() - depth);
        let zero = self.rebuilt(old, 0, |word| word & bit == 0).ok_or(NoMemory)?;
        let Some(one) = self.rebuilt(old, 0, |word| word & bit != 0) else {
            // SAFETY: it was made here and is nowhere else.
            unsafe { zero.free() };
            return Err(NoMemory);
        };
        self.replace(old, first, span, [zero, one]);
        Ok(())
    }

    /// Gives the places of a segment to its successors, one half to each, and frees it.
    fn replace(&mut self, old: Segment, first: usize, span: usize, new: [Segment; 2]) {
        self.directory[first..first + span].fill(new[1]);
        self.directory[first..first + span / 2].fill(new[0]);
        let added = new[0].bytes() + if new[0] == new[1] { 0 } else { new[1].bytes() };
        self.segment_bytes = self.segment_bytes + added - old.bytes();
        // SAFETY: it stood in these places only, and positions in it are no longer valid.
        unsafe { old.free() };
    }

    fn double_directory(&mut self) -> Result<(), NoMemory> {
        let segments = self.segment_bytes / size_of::<Bucket>() / buckets_of(CLASSES - 1);
        if self.directory.len() >= DIRECTORY_FREE_PLACES.max(segments * PLACES_PER_SEGMENT_MAX) {
            return Err(NoMemory);
        }
        let (mut doubled, places) = (Vec::new(), self.directory.len() * 2);
        doubled.try_reserve_exact(places).map_err(|_| NoMemory)?;
        doubled.extend(self.directory.iter().flat_map(|segment| [*segment; 2]));
        self.directory = doubled;
        self.depth += 1;
        Ok(())
    }

    /// A segment with those slots of another that `belongs` picks: of the lowest class, from the given one on, in which they
    /// have room. `None` when there is none or no memory.
    fn rebuilt(&self, old: Segment, class: usize, belongs: impl Fn(u64) -> bool) -> Option<Segment> {
        (class..CLASSES).find_map(|class| {
            let new = Segment::allocate(class, old.base())?;
            // SAFETY: freshly allocated and not shared.
            let buckets = unsafe { &mut *new.buckets() };
            if fill(buckets, &mut none_used(), self.buckets(old), &belongs) {
                return Some(new);
            }
            // SAFETY: it is nowhere else.
            unsafe { new.free() };
            None
        })
    }

    /// It has much more room than its items need.
    pub(crate) fn is_sparse(&self) -> bool {
        self.segment_bytes > self.items * SPARSE_BYTES_PER_ITEM + SPARSE_BYTES_MIN
    }

    /// Looks at the next segment on a walk round the directory, and replaces it, alone or with its neighbour, by a smaller one
    /// where that suffices; false when there was nothing to gain. `keys` are as for [`Index::insert`].
    pub(crate) fn shrink(&mut self, keys: &impl Keys) -> bool {
        let (first, span) = self.span_at(self.shrink_at);
        let buddy = first ^ span;
        self.shrink_at = (first + span) % self.directory.len();
        let old = self.directory[first];
        let items = self.items_in(old);
        if span < self.directory.len() && self.span_at(buddy) == (buddy, span) {
            let both = items + self.items_in(self.directory[buddy]);
            if let Some(class) = class_for(both)
                && let Some(new) = self.merged(first & buddy, span, class, keys)
            {
                let gone = [first, buddy].map(|place| self.directory[place]);
                self.directory[first & buddy..(first & buddy) + 2 * span].fill(new);
                self.segment_bytes += new.bytes();
                for segment in gone {
                    self.segment_bytes -= segment.bytes();
                    // SAFETY: it stood in these places only, and positions in it are no longer valid.
                    unsafe { segment.free() };
                }
                return true;
            }
        }
        let smaller = class_for(items).filter(|class| *class < old.class());
        let Some(new) = smaller.and_then(|class| self.rebuilt(old, class, |_| true)) else {
            return false;
        };
        if new.class() >= old.class() {
            // SAFETY: it was made here and is nowhere else.
            unsafe { new.free() };
            return false;
        }
        self.replace(old, first, span, [new, new]);
        true
    }

    fn items_in(&self, segment: Segment) -> usize {
        let used = |bucket: &Bucket| SLOTS - bucket.matches(0).count_ones() as usize;
        self.buckets(segment).iter().map(used).sum()
    }

    /// A segment of a class with all slots of the two that stand side by side in `2 * span` places from `first` on. `None` when
    /// there is no room or no memory.
    fn merged(&mut self, first: usize, span: usize, class: usize, keys: &impl Keys) -> Option<Segment> {
        let depth = self.depth - (2 * span).trailing_zeros();
        for half in [first, first + span] {
            // Both must hold the same bits of the hash, and among them the one by which they may be parted again.
            let base = self.directory[half].base();
            if base > depth || base != self.directory[first].base() {
                self.rebase(half, span, depth, keys);
            }
        }
        if self.directory[first].base() != self.directory[first + span].base() {
            self.rebase(first, span, depth, keys);
        }
        let new = Segment::allocate(class, self.directory[first].base())?;
        let mut used = none_used();
        let fits = [first, first + span].into_iter().all(|half| {
            let old = self.buckets(self.directory[half]);
            // SAFETY: freshly allocated and not shared.
            fill(unsafe { &mut *new.buckets() }, &mut used, old, |_| true)
        });
        if !fits {
            // SAFETY: it is nowhere else.
            unsafe { new.free() };
        }
        fits.then_some(new)
    }

    /// Makes the slots of a segment hold other hash bits: those from its depth on, a few earlier ones at most.
    fn rebase(&mut self, first: usize, span: usize, depth: u32, keys: &impl Keys) {
        let old = self.directory[first];
        let new = Segment::tagged(old.first(), old.class(), depth & 60).expect("it was there");
        let buckets = self.buckets_mut(old);
        for at in 0..buckets.len() + BUCKETS_AHEAD {
            // Waiting for one item after the other would take a millisecond.
            if let Some(ahead) = buckets.get(at) {
                ahead
                    .used(|_| true)
                    .for_each(|slot| keys.ask(location_in(ahead.word(slot))));
            }
            let Some(bucket) = at.checked_sub(BUCKETS_AHEAD).map(|at| &mut buckets[at]) else {
                continue;
            };
            for slot in bucket.used(|_| true) {
                let word = bucket.word(slot);
                let window = new.window(spread(keys.hash(location_in(word)))) << (LOCATION_BITS + 2);
                bucket.set(slot, bucket.0[slot], window | word & ((1 << (LOCATION_BITS + 2)) - 1));
            }
        }
        self.directory[first..first + span].fill(new);
    }

    /// Shows where the items of the next `buckets` home buckets are, and returns where to go on. Started at 0, a walk ends
    /// when it returns 0 again; it sees every item that stays in the index from its start to its end, also when the index
    /// grows meanwhile, but for some where it shrinks.
    pub(crate) fn visit(&self, cursor: u64, buckets: usize, mut visit: impl FnMut(Location)) -> u64 {
        // The cursor is a segment's hash prefix with a fraction in its low bits: everything below it has been seen. Both
        // keep their meaning when segments grow and split, because neither changes the order of homes. So the walk goes by
        // homes, not by where the items stand.
        let mut cursor = cursor;
        for _ in 0..buckets {
            let place = self.place_of(cursor);
            let content = self.buckets(self.directory[place]);
            let home = home_of((cursor & FRACTION_MAX) as u32, content.len());
            for distance in 0..DISTANCES.len() {
                let bucket = &content[away(home, distance, content.len())];
                for word in bucket.used(|_| true).map(|slot| bucket.word(slot)) {
                    if distance_in(word) == distance {
                        visit(location_in(word));
                    }
                }
                if content[home].0[SPILLED] == 0 {
                    break;
                }
            }
            if home + 1 < content.len() {
                cursor = cursor & !FRACTION_MAX | u64::from(first_fraction(home + 1, content.len()));
                continue;
            }
            let (first, span) = self.span_at(place);
            cursor = match first + span {
                end if end == self.directory.len() => return 0,
                end => (end as u64) << (64 - self.depth),
            };
        }
        cursor
    }

    /// Into how many parts, by the first bits of the hash, it is fit to be divided now: a part has about a segment.
    pub(crate) fn prefix_bits(&self) -> u32 {
        // Where few segments stand in very many places, some parts have more.
        let segments = self.segment_bytes / size_of::<Bucket>() / buckets_of(CLASSES - 1);
        self.depth.min(segments.max(1).ilog2() + 2)
    }

    /// Shows where the items of a part are, each once, with their fractions: those whose hashes begin with this prefix, of no more
    /// bits than [`Index::prefix_bits`] once was, and have a fraction in this range. Unlike a place, a part is the same for ever,
    /// however the index grows and shrinks. `keys` are as for [`Index::insert`].
    pub(crate) fn visit_part(
        &self,
        prefix_bits: u32,
        prefix: usize,
        fractions: Range<u32>,
        keys: &impl Keys,
        mut visit: impl FnMut(Location, u32),
    ) {
        let places = 1 << (self.depth - prefix_bits);
        let (mut place, end) = (prefix * places, (prefix + 1) * places);
        while place < end {
            let (first, span) = self.span_at(place);
            let segment = self.directory[place];
            place = first + span;
            // A segment that other prefixes share: the words tell them apart, nearly always.
            let shared = span > places;
            let known = prefix_bits.saturating_sub(segment.base());
            let belongs = |word: u64| {
                if known <= WINDOW_BITS {
                    let window = word >> (LOCATION_BITS + 2);
                    return window >> (WINDOW_BITS - known) == prefix as u64 & ((1 << known) - 1);
                }
                prefix_of(spread(keys.hash(location_in(word))), prefix_bits) == prefix
            };
            let buckets = self.buckets(segment);
            let last = home_of(fractions.end - 1, buckets.len());
            for home in home_of(fractions.start, buckets.len())..=last {
                let lowest = first_fraction(home, buckets.len());
                // One more bit, for the home itself.
                let mut distances = buckets[home].0[SPILLED] >> SPILLED_COUNT_BITS << 1 | 1;
                while distances != 0 {
                    let distance = distances.trailing_zeros() as usize;
                    distances &= distances - 1;
                    let bucket = &buckets[away(home, distance, buckets.len())];
                    for slot in bucket.used(|word| distance_in(word) == distance) {
                        let (word, fraction) = (bucket.word(slot), fraction_from(lowest, bucket.0[slot]));
                        if fractions.contains(&fraction) && (!shared || belongs(word)) {
                            visit(location_in(word), fraction);
                        }
                    }
                }
            }
        }
    }

    /// Takes the last segment apart, shows `freed` the locations that were in it and frees it; false when nothing is left.
    /// To empty an index of millions of items step by step; after the first step there is nothing else to do with it.
    pub(crate) fn free_segment(&mut self, mut freed: impl FnMut(Location)) -> bool {
        let Some(&segment) = self.directory.last() else {
            return false;
        };
        while self.directory.last() == Some(&segment) {
            self.directory.pop();
        }
        let mut count = 0;
        for bucket in self.buckets(segment) {
            for slot in bucket.used(|_| true) {
                freed(location_in(bucket.word(slot)));
                count += 1;
            }
        }
        self.items -= count;
        self.segment_bytes -= segment.bytes();
        // SAFETY: all places that led to the segment are gone.
        unsafe { segment.free() };
        true
    }
}

/// By bucket, how many slots are in use, the first ones, in a segment that is being filled. Asking the tags just written would
/// wait for the writes.
type Used = [usize; buckets_of(CLASSES - 1)];

fn none_used() -> Used {
    [0; buckets_of(CLASSES - 1)]
}

/// The smallest class in which so many items have ample room.
fn class_for(items: usize) -> Option<usize> {
    (0..CLASSES).find(|class| items <= buckets_of(*class) * SLOTS / 8 * SHRUNK_EIGHTHS_MAX)
}

/// Copies those slots that `belongs` picks from one segment to another that is only filled this way; false when there is no
/// room for all. There always is in an empty segment of the same size.
fn fill(new: &mut [Bucket], used: &mut Used, old: &[Bucket], belongs: impl Fn(u64) -> bool) -> bool {
    for (at, bucket) in old.iter().enumerate() {
        let first_here = first_fraction(at, old.len());
        for slot in bucket.used(&belongs) {
            let (tag, word) = (bucket.0[slot], bucket.word(slot));
            let distance = distance_in(word);
            let first = match distance {
                0 => first_here,
                _ => first_fraction(back(at, distance, old.len()), old.len()),
            };
            let home = home_of(fraction_from(first, tag), new.len());
            let word = word & !DISTANCE_MASK;
            // In a segment of the same size an item stays in its bucket, where only items of the old one come.
            let nearest = if new.len() == old.len() { distance } else { 0 };
            let free = (nearest..DISTANCES.len()).find(|distance| used[away(home, *distance, new.len())] < SLOTS);
            let taken = if let Some(distance) = free {
                let at = away(home, distance, new.len());
                put(new, home, distance, used[at], tag, word);
                at
            } else if let Some(room) = room_by_moving(new, home) {
                put_in_room(new, home, &room, tag, word).1
            } else {
                return false;
            };
            used[taken] += 1;
        }
    }
    true
}

impl Drop for Index {
    fn drop(&mut self) {
        while self.free_segment(|_| ()) {}
    }
}

pub(crate) fn prefetch(address: *const u8) {
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
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};
    use xxhash_rust::xxh3::xxh3_64;

    impl<F: Fn(Location) -> u64> Keys for F {
        fn ask(&self, _: Location) {}

        fn hash(&self, location: Location) -> u64 {
            self(location)
        }
    }

    fn hash(number: u64) -> u64 {
        xxh3_64(&number.to_le_bytes())
    }

    fn at(number: u64) -> Location {
        Location::new(number).unwrap()
    }

    /// Sums and counts that the index keeps agree with what is in it.
    fn check(index: &Index) {
        let mut segments: Vec<Segment> = index.directory.clone();
        segments.dedup();
        assert_eq!(
            segments.len(),
            segments.iter().map(|s| s.first()).collect::<HashSet<_>>().len()
        );
        let bytes: usize = segments.iter().map(|s| s.buckets().len() * 64).sum();
        assert_eq!(index.bytes(), bytes + index.directory.capacity() * 8);
        let mut items = 0;
        for segment in segments {
            let buckets = index.buckets(segment);
            let mut spilled = vec![0u8; buckets.len()];
            for (place, bucket) in buckets.iter().enumerate() {
                for slot in bucket.used(|_| true) {
                    items += 1;
                    let distance = distance_in(bucket.word(slot));
                    let home = back(place, distance, buckets.len());
                    assert_eq!(away(home, distance, buckets.len()), place);
                    if distance > 0 {
                        spilled[home] += 1;
                        assert!(buckets[home].0[SPILLED] >> SPILLED_COUNT_BITS >> (distance - 1) & 1 == 1);
                    }
                }
            }
            for (bucket, spilled) in buckets.iter().zip(spilled) {
                assert_eq!(bucket.0[SPILLED] & SPILLED_COUNT, spilled);
                assert!(spilled > 0 || bucket.0[SPILLED] == 0);
            }
        }
        assert_eq!(items, index.len());
    }

    /// The module's comment: home and tag give the fraction back, for every fraction in every size.
    #[test]
    fn home_and_tag_give_the_fraction_back() {
        for buckets in (0..CLASSES).map(buckets_of) {
            let mut last = 0;
            for bits in (0..1 << FRACTION_BITS).step_by(if cfg!(miri) { 61 } else { 1 }) {
                let fraction = fraction_of(0xabcd_0000 | bits);
                assert_ne!(fraction as u8, 0);
                let home = home_of(fraction, buckets);
                assert!(home < buckets && home >= last, "an order-preserving function");
                last = home;
                assert_eq!(fraction_from(first_fraction(home, buckets), fraction as u8), fraction);
            }
            for home in 0..buckets {
                let first = first_fraction(home, buckets);
                assert_eq!(home_of(first, buckets), home);
                assert!(first == 0 || home_of(first - 1, buckets) + 1 == home);
            }
        }
    }

    /// Layouts: the sizes that the module's comment and `growth_bytes` speak of.
    #[test]
    fn sizes_are_as_said() {
        assert_eq!(
            (size_of::<Bucket>(), align_of::<Bucket>(), size_of::<Option<Position>>()),
            (64, 64, 16)
        );
        for class in 0..CLASSES {
            let segment = Segment::allocate(class, 12).unwrap();
            assert_eq!(
                (segment.class(), segment.base(), segment.bytes()),
                (class, 12, (159 + 32 * class) * 64)
            );
            assert_eq!(segment.first().addr() % 64, 0);
            // SAFETY: used nowhere else.
            unsafe { segment.free() };
        }
        // A full segment of the last size has room in two of the first.
        assert!(2 * buckets_of(0) > buckets_of(CLASSES - 1));
        assert_eq!(Location::new(1 << 34), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 128 }))]

        #[test]
        fn both_ways_to_match_tags_agree(bytes: [[u8; 16]; 4], tag: u8, few in 0..9usize) {
            let mut bucket = Bucket(bytes.concat().try_into().unwrap());
            bucket.0[few] = tag;
            bucket.0[8 - few] = tag ^ 1;
            prop_assert_eq!(bucket.matches(tag), bucket.matches_portable(tag));
            prop_assert_eq!(bucket.matches(0), bucket.matches_portable(0));
            for slot in 0..SLOTS {
                let mut expected = [0; 8];
                expected[..6].copy_from_slice(&bucket.0[10 + 6 * slot..16 + 6 * slot]);
                prop_assert_eq!(bucket.word(slot), u64::from_le_bytes(expected));
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64, u64),
        Remove(u64, u64),
        Relocate(u64, u64),
        Visit(usize),
        Shrink(usize),
        Clear,
    }

    const KEYS: u64 = if cfg!(miri) { 1 << 11 } else { 1 << 14 };

    fn op() -> impl Strategy<Value = Op> {
        let range = (0..KEYS, 1..KEYS / 8);
        prop_oneof![
            8 => range.clone().prop_map(|(first, count)| Op::Insert(first, count)),
            3 => range.clone().prop_map(|(first, count)| Op::Remove(first, count)),
            2 => range.prop_map(|(first, count)| Op::Relocate(first, count / 8)),
            8 => (1..400usize).prop_map(Op::Visit),
            4 => (1..50usize).prop_map(Op::Shrink),
            1 => Just(Op::Clear),
        ]
    }

    /// A hash whose spread is this number or very nearly so.
    fn unspread(spread_hash: u64) -> u64 {
        // Undoes the multiplication.
        let inverse = (0..6).fold(1u64, |x, _| {
            x.wrapping_mul(2u64.wrapping_sub(0x9e37_79b9_7f4a_7c15u64.wrapping_mul(x)))
        });
        let (mut low, mut high) = (0, u64::MAX);
        while low < high {
            let middle = low + (high - low) / 2;
            if spread(middle.wrapping_mul(inverse)) < spread_hash {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low.wrapping_mul(inverse)
    }

    /// Hashes of several kinds: good ones; few homes; splits that do not help for long; few values altogether; all to one side.
    fn hash_of_kind(kind: u8, key: u64) -> u64 {
        match kind {
            0 => hash(key),
            1 => unspread(hash(key) & !0x7fff | hash(key) >> 20 & 0x0700),
            2 => unspread(hash(key) >> 17),
            3 => unspread(hash(key % 97) & !0xff),
            _ => unspread(hash(key) | 0xf << 60),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 3 } else { 200 }))]

        #[test]
        fn behaves_like_a_map(kind in 0..5u8, ops in prop::collection::vec(op(), 1..60)) {
            let hash = |key| hash_of_kind(kind, key);
            let key_at = |location: Location| location.number() % KEYS;
            let hash_of = |location: Location| hash(key_at(location));
            let mut index = Index::new().unwrap();
            let mut model: HashMap<u64, Location> = HashMap::new();
            // A walk: its cursor, who has been there since its start, and who was seen.
            let (mut cursor, mut staying, mut seen) = (0, HashSet::new(), HashSet::new());
            for op in ops {
                match op {
                    Op::Insert(first, count) => for key in (first..first + count).map(|key| key % KEYS) {
                        if model.contains_key(&key) {
                            continue;
                        }
                        let location = at(key);
                        match index.insert(hash(key), location, &hash_of) {
                            Ok(position) => {
                                prop_assert_eq!(index.location(position), location);
                                model.insert(key, location);
                            }
                            Err(NoMemory) => prop_assert_ne!(kind, 0),
                        }
                    },
                    Op::Remove(first, count) => for key in (first..first + count).map(|key| key % KEYS) {
                        let found = index.find(hash(key), |location| key_at(location) == key);
                        prop_assert_eq!(found.map(|position| index.remove(position)), model.remove(&key));
                        staying.remove(&key);
                    },
                    Op::Relocate(first, count) => for key in (first..first + count).map(|key| key % KEYS) {
                        if let Some(position) = index.find(hash(key), |location| key_at(location) == key) {
                            let location = at((index.location(position).number() + 12_345 * KEYS) % (LOCATION_MAX + 1));
                            index.relocate(position, location);
                            prop_assert!(model.insert(key, location).is_some());
                        }
                    },
                    Op::Visit(buckets) => {
                        if cursor == 0 {
                            staying = model.keys().copied().collect();
                            seen.clear();
                        }
                        cursor = index.visit(cursor, buckets, |location| { seen.insert(key_at(location)); });
                        if cursor == 0 {
                            prop_assert!(staying.is_subset(&seen));
                        }
                    }
                    Op::Shrink(steps) => {
                        (0..steps).for_each(|_| _ = index.shrink(&hash_of));
                        // The walk may miss some now.
                        staying.clear();
                    }
                    Op::Clear => {
                        let mut freed = HashSet::new();
                        while index.free_segment(|location| { freed.insert(location); }) {}
                        prop_assert_eq!(index.len(), 0);
                        prop_assert_eq!(freed, model.drain().map(|(_, location)| location).collect::<HashSet<_>>());
                        index = Index::new().unwrap();
                        (cursor, staying) = (0, HashSet::new());
                    }
                }
                check(&index);
                prop_assert_eq!(index.len(), model.len());
            }
            for key in 0..KEYS {
                let found = index.find(hash(key), |location| key_at(location) == key);
                prop_assert_eq!(found.map(|position| index.location(position)), model.get(&key).copied());
            }
            let mut all = Vec::new();
            while { cursor = index.visit(cursor, 1000, |_| ()); cursor != 0 } {}
            prop_assert_eq!(index.visit(0, usize::MAX, |location| all.push(location)), 0);
            prop_assert_eq!(all.len(), model.len(), "at rest, a walk sees everything once");
            // So do the parts, of whatever depth; and each item is in its own.
            let (bits, mut parts) = (index.prefix_bits().min(3 * u32::from(kind)), HashSet::new());
            let ranges = |prefix| (0..FRACTIONS).step_by(1 << 13).map(move |start| (prefix, start));
            for (prefix, start) in (0..1 << bits).flat_map(ranges) {
                index.visit_part(bits, prefix, start..start + (1 << 13), &hash_of, |location, fraction| {
                    assert_eq!(part_of(hash_of(location), bits), (prefix, fraction));
                    assert!((start..start + (1 << 13)).contains(&fraction) && parts.insert(location));
                });
            }
            prop_assert_eq!(parts.len(), model.len());
            for location in all.into_iter().step_by(7) {
                let (prefix, fraction) = part_of(hash_of(location), index.depth);
                let mut seen = false;
                index.visit_part(index.depth, prefix, fraction..fraction + 1, &hash_of, |found, _| seen |= found == location);
                prop_assert!(seen);
            }
        }
    }

    /// From nothing to millions: everything is findable, the memory is as said, and insertions take what was announced.
    #[test]
    fn grows_densely_and_loses_nothing() {
        let count = if cfg!(miri) { 4_000 } else { 3_000_000 };
        let mut index = Index::new().unwrap();
        let mut step = 100_000f64;
        let (mut worst, mut unannounced) = (0f64, 0);
        for number in 0..count {
            let (announced, before) = (index.growth_bytes(hash(number)), index.bytes());
            index
                .insert(hash(number), at(number), &|_: Location| -> u64 {
                    panic!("the slots suffice")
                })
                .unwrap();
            unannounced += usize::from(index.bytes() - before > announced);
            assert!(announced > 0 || index.bytes() == before);
            if number as f64 >= step {
                let bytes = index.bytes() as f64 / index.len() as f64;
                worst = worst.max(bytes);
                step *= 1.1;
                check(&index);
                for number in (0..=number).step_by(7) {
                    let found = index
                        .find(hash(number), |location| location.number() == number)
                        .unwrap();
                    assert_eq!(index.location(found), at(number));
                }
            }
        }
        assert!(
            worst <= 9.5 && unannounced <= 20,
            "{worst} bytes per item, {unannounced} more than announced"
        );
        for number in 0..count {
            assert!(
                index
                    .find(hash(number), |location| location.number() == number)
                    .is_some()
            );
            assert!(
                index
                    .find(hash(number + count), |location| location.number() == number + count)
                    .is_none()
            );
        }
    }

    /// From millions to few, in steps: everything is findable, and memory comes back.
    #[test]
    fn shrinks_and_loses_nothing() {
        let count = if cfg!(miri) { 4_000 } else { 1_000_000 };
        let mut index = Index::new().unwrap();
        for number in 0..count {
            index
                .insert(hash(number), at(number), &|_: Location| -> u64 {
                    panic!("the slots suffice")
                })
                .unwrap();
        }
        assert!(!index.is_sparse());
        let mut left = count;
        while left > 1000 {
            for number in left / 3..left {
                let position = index
                    .find(hash(number), |location| location.number() == number)
                    .unwrap();
                index.remove(position);
            }
            left /= 3;
            let mut steps = 0;
            while index.is_sparse() {
                index.shrink(&|_: Location| -> u64 { panic!("the slots suffice") });
                steps += 1;
                assert!(steps < 2 * count, "it stays sparse at {left}: {} bytes", index.bytes());
            }
            check(&index);
            for number in 0..left {
                assert!(
                    index
                        .find(hash(number), |location| location.number() == number)
                        .is_some()
                );
            }
        }
        assert!(index.segment_bytes <= left as usize * SPARSE_BYTES_PER_ITEM + SPARSE_BYTES_MIN);
        // And grows again.
        for number in left..count {
            index
                .insert(hash(number), at(number), &|_: Location| -> u64 {
                    panic!("the slots suffice")
                })
                .unwrap();
        }
        check(&index);
        assert!(index.bytes() <= count as usize * 19 / 2 + SPARSE_BYTES_MIN);
    }

    /// Splits past the bits that a slot keeps: it asks for hashes, but only once in many splits.
    #[test]
    fn splits_on_hash_bits_that_the_slots_do_not_keep() {
        let hash_of = |location: Location| unspread(hash(location.number()) >> 17);
        let asked = std::cell::Cell::new(0);
        let mut index = Index::new().unwrap();
        let count = 5_000;
        for number in 0..count {
            let counting = |location: Location| {
                asked.set(asked.get() + 1);
                hash_of(location)
            };
            index.insert(hash_of(at(number)), at(number), &counting).unwrap();
        }
        check(&index);
        for number in 0..count {
            assert!(
                index
                    .find(hash_of(at(number)), |location| location.number() == number)
                    .is_some()
            );
        }
        // Merged again, past the same bits, and grown once more.
        for number in 50..count {
            let position = index
                .find(hash_of(at(number)), |location| location.number() == number)
                .unwrap();
            index.remove(position);
        }
        for _ in 0..100 {
            index.shrink(&hash_of);
            check(&index);
        }
        assert!(index.segment_bytes <= 40 * BUCKETS_MIN * 64, "{}", index.segment_bytes);
        for number in 50..count {
            index.insert(hash_of(at(number)), at(number), &hash_of).unwrap();
        }
        check(&index);
        for number in 0..count {
            assert!(
                index
                    .find(hash_of(at(number)), |location| location.number() == number)
                    .is_some()
            );
        }
        assert!(
            index.depth >= 17 && asked.get() > 0 && asked.get() < 3 * SLOTS * buckets_of(CLASSES - 1),
            "{}",
            asked.get()
        );
    }

    /// Keys whose hashes are all equal run out of places: an error, not an endless loop. Others still find theirs.
    #[test]
    fn equal_hashes_end_in_an_error() {
        let mut index = Index::new().unwrap();
        let oks = (0..60)
            .filter(|n| index.insert(0, at(*n), &|_: Location| -> u64 { 0 }).is_ok())
            .count();
        assert_eq!(oks, DISTANCES.len() * SLOTS);
        check(&index);
        for number in 0..oks as u64 {
            assert!(index.find(0, |location| location.number() == number).is_some());
        }
        assert!(index.insert(hash(1), at(77), &|_: Location| -> u64 { 0 }).is_ok());
        assert!(index.find(hash(1), |location| location.number() == 77).is_some());
    }

    /// What is asked for ahead is what `find` then finds.
    #[test]
    fn tells_ahead_where_the_item_likely_is() {
        let mut index = Index::new().unwrap();
        let count = if cfg!(miri) { 500 } else { 100_000 };
        for number in 0..count {
            index
                .insert(hash(number), at(number), &|_: Location| -> u64 { unreachable!() })
                .unwrap();
            index.prefetch_bucket(hash(number));
        }
        let right = (0..count).filter(|n| index.likely(hash(*n)) == Some(at(*n))).count();
        assert!(right as u64 > count * 8 / 10, "{right} of {count}");
    }
}
