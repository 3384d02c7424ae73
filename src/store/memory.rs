//! The memory of one shard's items: slots of some hundred and fifty sizes, in blocks that each have slots of one size.
//!
//! A block is 64 KiB of a range of addresses that is reserved once, so a [`Location`] is an offset and leads to its item without
//! a table. A block's memory becomes real, and is charged, page by page as its slots are first used, and goes back to the
//! system when its last item leaves. A size whose blocks have many slots free is *loose*: the emptiest block's items are
//! moved into the others ([`Memory::loose_block`]), so what is deleted comes back although something is left everywhere.
//!
//! Sizes are multiples of four bytes up to 256, then a sixteenth apart: a slot wastes 1.5 bytes of a small item and 3 % of
//! a large one on average.

use super::index::Location;
use crate::budget::Budget;
use region::Region;
use std::ptr::NonNull;

/// What a location counts in. Slots begin at multiples of it; those whose size is a multiple of 8 begin at multiples of 8.
const UNIT_BYTES: usize = 4;
const BLOCK_BYTES: usize = 1 << 16;
const BLOCK_UNITS: u64 = (BLOCK_BYTES / UNIT_BYTES) as u64;
const PAGE_BYTES: usize = 4096;
/// The address space of one shard: what 34 bits of units reach.
const REGION_BYTES_MAX: usize = if cfg!(miri) { 1 << 21 } else { UNIT_BYTES << 34 };
const REGION_BYTES_MIN: usize = if cfg!(miri) { 1 << 21 } else { 1 << 24 };
/// The largest slot: a key as long as a configuration may allow and a value that is just not referenced have room in it.
const SLOT_BYTES_MAX: usize = 8192;

/// Sizes up to here are a unit apart, and from here on so many to a doubling.
const FINE_BYTES_MAX: usize = 256;
const FINE_CLASSES: usize = FINE_BYTES_MAX / UNIT_BYTES;
const CLASSES_PER_DOUBLING: usize = 16;
const CLASSES: usize = FINE_CLASSES + CLASSES_PER_DOUBLING * (SLOT_BYTES_MAX / FINE_BYTES_MAX).ilog2() as usize;

/// A size is loose when more than one in so many of its slots is free, and more than two blocks' worth.
const LOOSE_SHARE: u64 = 8;
/// How many of a size's blocks are looked at for the emptiest one.
const BLOCKS_COMPARED_MAX: usize = 64;

const NONE: u32 = u32::MAX;
const NO_SLOT: u16 = u16::MAX;

/// Where a block stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// In the list of its size: it has a slot to give.
    Listed,
    /// It has none to give.
    Full,
    /// Its items are moved out, so it gives none.
    Emptied,
}

/// A block of slots of one size.
#[derive(Clone, Copy, Debug)]
struct Block {
    class: u8,
    standing: Standing,
    /// Pages of it that are real.
    pages: u8,
    /// Slots that hold an item.
    live: u16,
    /// Slots that were ever handed out since the block was empty.
    used: u16,
    /// The first of those that are free again; each names the next in its first two bytes.
    free: u16,
    /// Neighbours among the blocks of its size that have a slot to give.
    next: u32,
    previous: u32,
}

impl Block {
    const EMPTY: Self = Self {
        class: 0,
        standing: Standing::Full,
        pages: 0,
        live: 0,
        used: 0,
        free: NO_SLOT,
        next: NONE,
        previous: NONE,
    };
}

#[derive(Clone, Copy, Debug)]
struct Class {
    slot_bytes: u32,
    slots_per_block: u16,
    /// The first block that has a slot to give.
    first: u32,
    /// Slots of all its blocks that were handed out, and that hold an item.
    used: u64,
    live: u64,
    /// It is among those that may be loose.
    noted: bool,
}

impl Class {
    fn is_loose(&self) -> bool {
        let free = self.used - self.live;
        free > (self.used / LOOSE_SHARE).max(2 * u64::from(self.slots_per_block))
    }

    /// The free slots of other blocks suffice for the items of any one of them.
    fn can_spare_a_block(&self) -> bool {
        self.used - self.live > u64::from(self.slots_per_block)
    }
}

/// See the module's text.
pub(crate) struct Memory {
    /// Where the region starts.
    base: NonNull<u8>,
    region: Region,
    blocks: Vec<Block>,
    /// Blocks without memory.
    free_blocks: Vec<u32>,
    /// An empty block that still has its memory, so that a size which comes and goes does not ask the system each time.
    spare: Option<u32>,
    classes: Box<[Class; CLASSES]>,
    /// Sizes that may be loose.
    loose: Vec<u8>,
    /// Bytes of memory that are real: whole pages.
    resident_bytes: usize,
    /// Bytes of slots that hold an item.
    live_bytes: usize,
}

// SAFETY: the region is owned by this value alone; nothing in it is tied to a thread.
unsafe impl Send for Memory {}

const fn class_of(bytes: usize) -> usize {
    if bytes <= FINE_BYTES_MAX {
        return bytes.div_ceil(UNIT_BYTES).saturating_sub(1);
    }
    // Sixteen steps to the doubling: the step is a sixteenth of the power of two below.
    let doubling = (bytes - 1).ilog2();
    let step = 1usize << (doubling - CLASSES_PER_DOUBLING.ilog2());
    let of_doubling = (bytes - (1 << doubling)).div_ceil(step) - 1;
    FINE_CLASSES + (doubling - FINE_BYTES_MAX.ilog2()) as usize * CLASSES_PER_DOUBLING + of_doubling
}

const fn slot_bytes_of(class: usize) -> usize {
    if class < FINE_CLASSES {
        return (class + 1) * UNIT_BYTES;
    }
    let coarse = class - FINE_CLASSES;
    let doubling = FINE_BYTES_MAX.ilog2() as usize + coarse / CLASSES_PER_DOUBLING;
    let step = 1 << (doubling - CLASSES_PER_DOUBLING.ilog2() as usize);
    (1 << doubling) + (coarse % CLASSES_PER_DOUBLING + 1) * step
}

/// What an item of so many bytes takes.
pub(crate) const fn slot_bytes(bytes: usize) -> usize {
    slot_bytes_of(class_of(bytes))
}

impl Memory {
    /// Nothing but addresses; `None` when the system has not even those.
    pub(crate) fn new() -> Option<Self> {
        let mut region_bytes = REGION_BYTES_MAX;
        let mut region = loop {
            if let Some(region) = Region::reserve(region_bytes) {
                break region;
            }
            // Addresses are rationed here (`ulimit -v`, or a system that promises no more memory than it has): others need some, too.
            region_bytes /= 16;
            if region_bytes < REGION_BYTES_MIN {
                return None;
            }
        };
        let classes = std::array::from_fn(|class| Class {
            slot_bytes: slot_bytes_of(class) as u32,
            slots_per_block: (BLOCK_BYTES / slot_bytes_of(class)) as u16,
            first: NONE,
            used: 0,
            live: 0,
            noted: false,
        });
        Some(Self {
            base: region.start(),
            region,
            blocks: vec![],
            free_blocks: vec![],
            spare: None,
            classes: Box::new(classes),
            loose: vec![],
            resident_bytes: 0,
            live_bytes: 0,
        })
    }

    /// Bytes of memory that it takes, as they are charged: whole pages.
    pub(crate) fn resident_bytes(&self) -> usize {
        self.resident_bytes
    }

    /// Bytes of slots that hold an item.
    pub(crate) fn live_bytes(&self) -> usize {
        self.live_bytes
    }

    /// Where a location is. The address is good for as long as the slot is.
    #[inline]
    pub(crate) fn address(&self, location: Location) -> NonNull<u8> {
        let offset = location.number() as usize * UNIT_BYTES;
        debug_assert!(offset < self.blocks.len() * BLOCK_BYTES, "a slot of this memory");
        // SAFETY: a location of this memory lies inside the region.
        unsafe { self.base.add(offset) }
    }

    /// A slot for `bytes` bytes, at most [`SLOT_BYTES_MAX`], whose content is arbitrary. `None`, and nothing done, when the limit
    /// or the addresses are used up.
    #[inline]
    pub(crate) fn allocate(&mut self, budget: &mut Budget, bytes: usize) -> Option<Location> {
        let class = class_of(bytes);
        let mut number = self.classes[class].first;
        if number == NONE {
            number = self.begin_block(class)?;
        }
        let of = &mut self.classes[class];
        let slot_bytes = of.slot_bytes as usize;
        let block = &mut self.blocks[number as usize];
        let start = number as usize * BLOCK_BYTES;
        let slot = if block.free != NO_SLOT {
            let slot = block.free;
            // SAFETY: the slot is free and was handed out before, so its first two bytes, inside the region and aligned to
            // 4, name the next one (see `free`).
            block.free = unsafe {
                self.base
                    .add(start + usize::from(slot) * slot_bytes)
                    .cast::<u16>()
                    .read()
            };
            slot
        } else {
            let slot = block.used;
            let pages = (usize::from(slot + 1) * slot_bytes).div_ceil(PAGE_BYTES);
            let fresh = pages.saturating_sub(usize::from(block.pages));
            if fresh > 0 {
                if !budget.charge(fresh * PAGE_BYTES) {
                    if block.live == 0 {
                        // Begun for nothing: no item's end would give it back.
                        self.unlist(number, Standing::Full);
                        self.give_back(budget, number);
                    }
                    return None;
                }
                block.pages = pages as u8;
                self.resident_bytes += fresh * PAGE_BYTES;
            }
            block.used += 1;
            of.used += 1;
            slot
        };
        block.live += 1;
        of.live += 1;
        self.live_bytes += slot_bytes;
        if block.free == NO_SLOT && block.used == of.slots_per_block {
            self.unlist(number, Standing::Full);
        }
        let offset = start + usize::from(slot) * slot_bytes;
        Location::new((offset / UNIT_BYTES) as u64)
    }

    /// An empty block for a size, in front of its list.
    #[cold]
    fn begin_block(&mut self, class: usize) -> Option<u32> {
        let number = match self.spare.take().or_else(|| self.free_blocks.pop()) {
            Some(number) => number,
            None if (self.blocks.len() + 1) * BLOCK_BYTES > self.region.bytes() => return None,
            None => {
                self.blocks.push(Block::EMPTY);
                (self.blocks.len() - 1) as u32
            }
        };
        let block = &mut self.blocks[number as usize];
        *block = Block {
            class: class as u8,
            pages: block.pages,
            ..Block::EMPTY
        };
        self.list(number);
        Some(number)
    }

    /// Takes a slot back. What it held is gone.
    #[inline]
    pub(crate) fn free(&mut self, budget: &mut Budget, location: Location) {
        let (number, slot) = self.slot_of(location);
        let block = &mut self.blocks[number as usize];
        let class = &mut self.classes[usize::from(block.class)];
        block.live -= 1;
        class.live -= 1;
        self.live_bytes -= class.slot_bytes as usize;
        if block.live == 0 {
            return self.release(budget, number);
        }
        // SAFETY: the slot is free from now on, inside the region, aligned to 4 and at least four bytes long.
        unsafe {
            let start = self.base.add(location.number() as usize * UNIT_BYTES);
            start.cast::<u16>().write(block.free);
        }
        block.free = slot;
        if class.is_loose() && !class.noted {
            class.noted = true;
            self.loose.push(block.class);
        }
        if block.standing == Standing::Full {
            self.list(number);
        }
    }

    /// How large the slot at a location is, in bytes.
    pub(crate) fn slot_bytes_at(&self, location: Location) -> usize {
        let (number, _) = self.slot_of(location);
        slot_bytes_of(usize::from(self.blocks[number as usize].class))
    }

    #[inline]
    fn slot_of(&self, location: Location) -> (u32, u16) {
        let number = (location.number() / BLOCK_UNITS) as u32;
        let offset = (location.number() % BLOCK_UNITS) as u32 * UNIT_BYTES as u32;
        let class = self.blocks[number as usize].class;
        (number, (offset / self.classes[usize::from(class)].slot_bytes) as u16)
    }

    /// A block has no items any more.
    #[cold]
    fn release(&mut self, budget: &mut Budget, number: u32) {
        if self.blocks[number as usize].standing == Standing::Listed {
            self.unlist(number, Standing::Full);
        }
        let block = &mut self.blocks[number as usize];
        self.classes[usize::from(block.class)].used -= u64::from(block.used);
        (block.used, block.free) = (0, NO_SLOT);
        if self.spare.is_none() {
            self.spare = Some(number);
        } else {
            self.give_back(budget, number);
        }
    }

    /// Gives an empty block's memory back to the system.
    fn give_back(&mut self, budget: &mut Budget, number: u32) {
        let block = &mut self.blocks[number as usize];
        let bytes = usize::from(std::mem::take(&mut block.pages)) * PAGE_BYTES;
        // SAFETY: the block holds no item, so nothing leads into it.
        unsafe { self.region.give_back(number as usize * BLOCK_BYTES, bytes) };
        self.resident_bytes -= bytes;
        budget.release(bytes);
        self.free_blocks.push(number);
    }

    /// Gives back what is kept only in case it is needed soon; false when there is nothing like that.
    pub(crate) fn trim(&mut self, budget: &mut Budget) -> bool {
        let spare = self.spare.take();
        spare.inspect(|spare| self.give_back(budget, *spare)).is_some()
    }

    /// Some size is loose.
    pub(crate) fn is_loose(&self) -> bool {
        !self.loose.is_empty()
    }

    /// The size that is noted as loose and still is.
    fn loose_class(&mut self) -> Option<usize> {
        loop {
            let number = usize::from(*self.loose.last()?);
            let class = &mut self.classes[number];
            if class.is_loose() {
                return Some(number);
            }
            class.noted = false;
            self.loose.pop();
        }
    }

    /// The size with the most free bytes, if it can do without one of its blocks.
    fn loosest_class(&self) -> Option<usize> {
        let free_bytes = |class: &Class| (class.used - class.live) * u64::from(class.slot_bytes);
        (0..CLASSES)
            .filter(|class| self.classes[*class].can_spare_a_block())
            .max_by_key(|class| free_bytes(&self.classes[*class]))
    }

    /// Chooses a block of a loose size and adds the locations of its items to `items`: they are to be moved, each to a slot that
    /// [`Memory::allocate`] gives, which it does for all of them, and freed. Then [`Memory::emptied`]. `None`: nothing is loose, or
    /// `urgently`: no size can do without one of its blocks.
    #[cold]
    pub(crate) fn loose_block(&mut self, urgently: bool, items: &mut Vec<Location>) -> Option<u32> {
        let number = match self.loose_class() {
            None if urgently => self.loosest_class()?,
            number => number?,
        };
        let class = self.classes[number];
        let mut emptiest = class.first;
        let mut next = class.first;
        for _ in 0..BLOCKS_COMPARED_MAX {
            if next == NONE {
                break;
            }
            if self.blocks[next as usize].live < self.blocks[emptiest as usize].live {
                emptiest = next;
            }
            next = self.blocks[next as usize].next;
        }
        self.unlist(emptiest, Standing::Emptied);
        let block = self.blocks[emptiest as usize];
        let start = emptiest as usize * BLOCK_BYTES;
        let mut is_free = [false; BLOCK_BYTES / UNIT_BYTES];
        let mut free = block.free;
        while free != NO_SLOT {
            is_free[usize::from(free)] = true;
            let offset = start + usize::from(free) * class.slot_bytes as usize;
            // SAFETY: as in `allocate`: a free slot names the next one.
            free = unsafe { self.base.add(offset).cast::<u16>().read() };
        }
        items.extend(
            (0..usize::from(block.used))
                .filter(|slot| !is_free[*slot])
                .filter_map(|slot| Location::new(((start + slot * class.slot_bytes as usize) / UNIT_BYTES) as u64)),
        );
        Some(emptiest)
    }

    /// What could be moved out of a block of [`Memory::loose_block`] has been. If something is left, the block is used on.
    pub(crate) fn emptied(&mut self, number: u32) {
        let block = self.blocks[number as usize];
        if block.live > 0 && block.standing == Standing::Emptied {
            self.list(number);
        }
    }

    fn list(&mut self, number: u32) {
        let class = usize::from(self.blocks[number as usize].class);
        let first = std::mem::replace(&mut self.classes[class].first, number);
        if first != NONE {
            self.blocks[first as usize].previous = number;
        }
        let block = &mut self.blocks[number as usize];
        (block.next, block.previous, block.standing) = (first, NONE, Standing::Listed);
    }

    fn unlist(&mut self, number: u32, standing: Standing) {
        let Block {
            class, next, previous, ..
        } = self.blocks[number as usize];
        match previous {
            NONE => self.classes[usize::from(class)].first = next,
            _ => self.blocks[previous as usize].next = next,
        }
        if next != NONE {
            self.blocks[next as usize].previous = previous;
        }
        self.blocks[number as usize].standing = standing;
    }
}

/// The addresses, and what the system puts behind them.
#[cfg(not(miri))]
mod region {
    use memmap2::{Advice, MmapMut, MmapOptions, UncheckedAdvice};
    use std::ptr::NonNull;

    pub(super) struct Region(MmapMut);

    impl Region {
        /// Addresses that become memory, of zeros, page by page when they are first touched.
        pub(super) fn reserve(bytes: usize) -> Option<Self> {
            let map = MmapOptions::new().len(bytes).no_reserve_swap().map_anon().ok()?;
            // A huge page would be memory that nobody has charged. A system without them refuses to leave them out.
            let _ = map.advise(Advice::NoHugePage);
            Some(Self(map))
        }

        pub(super) fn start(&mut self) -> NonNull<u8> {
            NonNull::new(self.0.as_mut_ptr()).expect("a mapping is somewhere")
        }

        pub(super) fn bytes(&self) -> usize {
            self.0.len()
        }

        /// Gives whole pages back; they are zeros when they are touched again.
        ///
        /// # Safety
        /// Nothing refers to them, or expects anything of their content.
        pub(super) unsafe fn give_back(&mut self, at: usize, bytes: usize) {
            // Should the system refuse, the pages only stay.
            // SAFETY: as the caller promises.
            let _ = unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, at, bytes) };
        }
    }
}

/// Miri has no mappings of this kind.
#[cfg(miri)]
mod region {
    use std::ptr::NonNull;

    pub(super) struct Region(Vec<u64>);

    impl Region {
        pub(super) fn reserve(bytes: usize) -> Option<Self> {
            Some(Self(vec![0; bytes / 8]))
        }

        pub(super) fn start(&mut self) -> NonNull<u8> {
            NonNull::new(self.0.as_mut_ptr()).expect("not empty").cast()
        }

        pub(super) fn bytes(&self) -> usize {
            self.0.len() * 8
        }

        pub(super) unsafe fn give_back(&mut self, _: usize, _: usize) {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Pool;
    use std::collections::BTreeMap;

    #[test]
    fn sizes() {
        for bytes in 1..=SLOT_BYTES_MAX {
            let slot = slot_bytes(bytes);
            assert!(slot >= bytes, "{bytes} in {slot}");
            assert!(slot - bytes < UNIT_BYTES.max(bytes / 16 + 1), "{bytes} in {slot}");
            assert_eq!(slot_bytes(slot), slot);
            assert!(slot.is_multiple_of(8) || !bytes.is_multiple_of(8), "{bytes} in {slot}");
        }
        assert_eq!(class_of(SLOT_BYTES_MAX), CLASSES - 1);
    }

    fn fill(memory: &Memory, location: Location, bytes: usize, with: u8) {
        // SAFETY: a slot of at least so many bytes, to which nothing else refers.
        unsafe { memory.address(location).write_bytes(with, bytes) };
    }

    fn holds(memory: &Memory, location: Location, bytes: usize, what: u8) -> bool {
        // SAFETY: as in `fill`, and filled.
        let slot = unsafe { std::slice::from_raw_parts(memory.address(location).as_ptr(), bytes) };
        slot.iter().all(|byte| *byte == what)
    }

    /// Slots do not overlap, what is charged is what is resident, and what was deleted at random comes back.
    #[test]
    fn random_sizes() {
        let mut budget = Budget::new(Pool::new(1 << 40));
        let mut memory = Memory::new().unwrap();
        let mut random = 7u64;
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 33) as usize % below
        };
        let (count, rounds) = if cfg!(miri) { (60, 3) } else { (20_000, 10) };
        let mut items = BTreeMap::<usize, (Location, usize, u8)>::new();
        for round in 0..rounds {
            for number in 0..count {
                let bytes = 8 + next(if number % 50 == 0 { 8000 } else { 500 });
                if let Some((location, old, with)) = items.remove(&number) {
                    assert!(holds(&memory, location, old, with));
                    memory.free(&mut budget, location);
                }
                let location = memory.allocate(&mut budget, bytes).unwrap();
                let with = (number + round) as u8;
                fill(&memory, location, bytes, with);
                items.insert(number, (location, bytes, with));
            }
            assert_eq!(budget.charged() as usize, memory.resident_bytes());
        }
        let live: usize = items.values().map(|(_, bytes, _)| slot_bytes(*bytes)).sum();
        assert_eq!(memory.live_bytes(), live);
        // Nine of ten go, anywhere.
        for number in (0..count).filter(|number| number % 10 != 3) {
            let (location, bytes, with) = items.remove(&number).unwrap();
            assert!(holds(&memory, location, bytes, with));
            memory.free(&mut budget, location);
        }
        let mut moved = vec![];
        while let Some(block) = memory.loose_block(false, &mut moved) {
            for from in moved.drain(..) {
                let (location, bytes, with) = items.values_mut().find(|(at, ..)| *at == from).unwrap();
                *location = memory.allocate(&mut budget, *bytes).unwrap();
                fill(&memory, *location, *bytes, *with);
                memory.free(&mut budget, from);
            }
            memory.emptied(block);
        }
        assert!(!memory.is_loose());
        memory.trim(&mut budget);
        for (location, bytes, with) in items.values() {
            assert!(holds(&memory, *location, *bytes, *with));
        }
        let slack = 3
            * BLOCK_BYTES
            * items
                .values()
                .map(|(_, bytes, _)| class_of(*bytes))
                .collect::<std::collections::BTreeSet<_>>()
                .len();
        assert!(memory.resident_bytes() <= memory.live_bytes() * 5 / 4 + slack);
        for (location, ..) in items.values() {
            memory.free(&mut budget, *location);
        }
        memory.trim(&mut budget);
        assert_eq!(
            (memory.resident_bytes(), memory.live_bytes(), budget.charged()),
            (0, 0, 0)
        );
    }

    #[test]
    fn the_limit_refuses_and_changes_nothing() {
        let mut budget = Budget::new(Pool::new(3 * PAGE_BYTES as u64));
        let mut memory = Memory::new().unwrap();
        let mut slots = vec![];
        while let Some(location) = memory.allocate(&mut budget, 1000) {
            slots.push(location);
        }
        assert_eq!((slots.len(), memory.resident_bytes()), (12, 3 * PAGE_BYTES));
        memory.free(&mut budget, slots.pop().unwrap());
        assert!(memory.allocate(&mut budget, 100).is_none(), "another size has no page");
        assert!(memory.allocate(&mut budget, 1000).is_some());
    }

    /// An empty block that has a page, and gets no second one for a larger size, gives back what it has.
    #[test]
    fn a_block_begun_for_nothing_is_given_back() {
        let mut budget = Budget::new(Pool::new(3 * PAGE_BYTES as u64));
        let mut memory = Memory::new().unwrap();
        let small = memory.allocate(&mut budget, 1000).unwrap();
        memory.allocate(&mut budget, 5000).unwrap();
        memory.free(&mut budget, small);
        assert_eq!(memory.resident_bytes(), 3 * PAGE_BYTES, "one is kept for a moment");
        assert!(memory.allocate(&mut budget, 8000).is_none());
        assert_eq!(
            (memory.resident_bytes(), budget.charged() as usize),
            (2 * PAGE_BYTES, 2 * PAGE_BYTES)
        );
        assert!(memory.allocate(&mut budget, 3000).is_some());
    }
}
