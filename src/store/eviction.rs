//! Which items make place when memory is used up: S3-FIFO (Yang et al., SOSP 2023), with the index as its main queue.
//!
//! New items stand in a *small* queue, a tenth of all bytes. Who comes up there without having been used twice is evicted, and
//! leaves a fingerprint among the *ghosts*; the others join the *main* part, and so does at once who comes again while its ghost is
//! there. So what is read once, as by a scan, does not push out what is read often. The main part is walked by a hand, in
//! the order of the index: who was used loses a use, who was not is evicted. That order says nothing of age, which a second
//! chance does not need, and so an item of the main part costs no memory for its place in a queue.

use super::index::{Location, Position, prefetch};
use super::item::{Access, Standing};
use super::queue::{PIECE_BYTES, Queue};
use super::{Store, item_at};
use crate::budget::Budget;
use arrayvec::ArrayVec;

/// The small queue's share of all bytes.
const SMALL_SHARE: usize = 10;
/// Uses that bring an item from the small queue to the main part.
const USES_FOR_MAIN: u16 = 2;
/// How many items are looked at together, so that waiting for the memory of one overlaps with that of the others.
const BATCH: usize = 16;
/// How many buckets the hand goes on for an item that was not used; then the one that was used least must go.
const BUCKETS_MAX: usize = 16;
/// Entries of the small queue that lead to nothing do no harm up to here.
const SUPERFLUOUS_MAX: usize = 1024;

/// Items evicted since somebody last asked.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Evicted {
    /// From the small queue, and from the main part.
    pub(crate) new: u64,
    pub(crate) old: u64,
    /// Among both, those never read since they were written.
    pub(crate) unread: u64,
    /// Among both, by the time since their last use: two minutes (nearly), an hour, a day, more.
    pub(crate) by_idle_time: [u64; 4],
}

/// The state of the policy. See the module's text.
#[derive(Debug, Default)]
pub(super) struct Eviction {
    small: Queue,
    /// Items that stand in the small queue, and what they are charged with.
    small_items: usize,
    small_bytes: usize,
    ghosts: Ghosts,
    /// Where the hand is in the main part.
    hand: u64,
    evicted: Evicted,
}

impl Eviction {
    /// Bytes of memory of the queue and the ghosts.
    pub(super) fn bytes(&self) -> usize {
        self.small.pieces() * PIECE_BYTES + self.ghosts.bytes()
    }

    /// The standing of an item that is new.
    pub(super) fn admit(&mut self, hash: u64) -> Standing {
        // Without memory for a place in the queue it stands where it needs none.
        if self.ghosts.take(hash) || !self.small.push(hash) {
            Standing::NEW_IN_MAIN
        } else {
            Standing::default()
        }
    }

    /// An item of this standing is there now, and is charged so much.
    pub(super) fn came(&mut self, standing: Standing, bytes: usize) {
        if !standing.is_main() {
            self.small_items += 1;
            self.small_bytes += bytes;
        }
    }

    /// It is no longer.
    pub(super) fn went(&mut self, standing: Standing, bytes: usize) {
        if !standing.is_main() {
            self.small_items -= 1;
            self.small_bytes -= bytes;
        }
    }

    /// All are gone.
    pub(super) fn cleared(&mut self) {
        (self.small_items, self.small_bytes, self.hand) = (0, 0, 0);
    }

    /// Most of the small queue leads to nothing.
    pub(super) fn has_too_many(&self) -> bool {
        self.small.len() > 2 * self.small_items + SUPERFLUOUS_MAX
    }

    pub(super) fn take_evicted(&mut self) -> Evicted {
        std::mem::take(&mut self.evicted)
    }
}

impl Store {
    /// Evicts some items, but not the one at `keep`; returns how many.
    #[cold]
    pub(super) fn evict(&mut self, budget: &mut Budget, keep: Option<Position>, now: Access) -> usize {
        let items = self.len();
        let Some(eviction) = &self.eviction else { return 0 };
        let batch = (items / 64).clamp(1, BATCH);
        let small_first = eviction.small_bytes * SMALL_SHARE >= self.item_bytes();
        let evicted = match small_first {
            true => self.evict_small(budget, keep, now, batch),
            false => self.evict_main(budget, keep, now, batch),
        };
        match (evicted, small_first) {
            (0, true) => self.evict_main(budget, keep, now, batch),
            (0, false) => self.evict_small(budget, keep, now, batch),
            _ => evicted,
        }
    }

    /// The next items of the small queue: each is evicted or joins the main part.
    fn evict_small(&mut self, budget: &mut Budget, keep: Option<Position>, now: Access, batch: usize) -> usize {
        let mut evicted = 0;
        while evicted == 0 {
            let hashes = self.next_small(batch);
            if hashes.is_empty() {
                break;
            }
            for hash in hashes {
                let Some(position) = self.small_item(hash) else {
                    continue;
                };
                let location = self.index.location(position);
                let standing = item_at(&self.memory, location).standing();
                if standing.uses() >= USES_FOR_MAIN || self.is_at(keep, location) {
                    self.join_main(position);
                } else {
                    if let Some(eviction) = &mut self.eviction {
                        eviction.evicted.new += 1;
                        eviction.ghosts.add(hash, self.index.len());
                    }
                    self.evict_at(budget, position, now);
                    evicted += 1;
                }
            }
        }
        evicted
    }

    /// Takes entries of the small queue, and asks for the memory that looking at them needs.
    fn next_small(&mut self, batch: usize) -> ArrayVec<u64, BATCH> {
        let small = self.eviction.iter_mut().map(|eviction| &mut eviction.small);
        let hashes: ArrayVec<u64, BATCH> = small.flat_map(|small| (0..batch).map_while(|_| small.pop())).collect();
        hashes.iter().for_each(|hash| self.prefetch_bucket(*hash));
        hashes.iter().for_each(|hash| self.prefetch_item(*hash));
        hashes
    }

    /// The item of the small queue that an entry leads to.
    fn small_item(&self, hash: u64) -> Option<Position> {
        self.index.find(hash, |location| {
            let item = item_at(&self.memory, location);
            !item.standing().is_main() && self.partitioner.place(item.key()).hash == hash
        })
    }

    fn is_at(&self, keep: Option<Position>, location: Location) -> bool {
        keep.is_some_and(|keep| self.index.location(keep) == location)
    }

    fn join_main(&mut self, position: Position) {
        let standing = self.item(position).standing();
        let bytes = self.charged_bytes(position);
        self.item_mut(position).set_standing(Standing::NEW_IN_MAIN);
        if let Some(eviction) = &mut self.eviction {
            eviction.went(standing, bytes);
        }
    }

    /// The hand goes on until it has met items of the main part that were not used.
    fn evict_main(&mut self, budget: &mut Budget, keep: Option<Position>, now: Access, batch: usize) -> usize {
        let mut evicted = 0;
        let mut least_used: Option<(u16, Location)> = None;
        let mut met = std::mem::take(&mut self.chosen);
        for _ in 0..BUCKETS_MAX {
            let Some(eviction) = &mut self.eviction else { break };
            let memory = &self.memory;
            eviction.hand = self.index.visit(eviction.hand, 1, |location| {
                prefetch(memory.address(location).as_ptr());
                met.push(location);
            });
            for location in met.drain(..) {
                let standing = item_at(&self.memory, location).standing();
                if !standing.is_main() || self.is_at(keep, location) {
                    continue;
                }
                let Some(position) = self.position_of(location) else {
                    continue;
                };
                if standing.uses() > 0 {
                    self.item_mut(position).set_standing(standing.forgiven());
                    if least_used.is_none_or(|(uses, _)| standing.uses() < uses) {
                        least_used = Some((standing.uses(), location));
                    }
                } else if evicted < batch {
                    self.evict_old(budget, position, now);
                    evicted += 1;
                }
            }
            if evicted > 0 {
                break;
            }
        }
        self.chosen = met;
        if evicted == 0
            && let Some((_, location)) = least_used
            && let Some(position) = self.position_of(location)
        {
            self.evict_old(budget, position, now);
            evicted = 1;
        }
        evicted
    }

    fn evict_old(&mut self, budget: &mut Budget, position: Position, now: Access) {
        if let Some(eviction) = &mut self.eviction {
            eviction.evicted.old += 1;
        }
        self.evict_at(budget, position, now);
    }

    fn evict_at(&mut self, budget: &mut Budget, position: Position, now: Access) {
        let item = self.item(position);
        let (idle_s, was_read) = (item.accessed().seconds_until(now), item.was_read());
        if let Some(eviction) = &mut self.eviction {
            let age = [128, 3600, 86_400].iter().filter(|limit| idle_s > **limit).count();
            eviction.evicted.by_idle_time[age] += 1;
            eviction.evicted.unread += u64::from(!was_read);
        }
        self.remove(budget, position);
    }

    /// Shortens a small queue of which most leads to nothing, by a bounded piece.
    pub(super) fn shorten_small(&mut self) {
        for hash in self.next_small(BATCH) {
            if let Some(position) = self.small_item(hash) {
                self.join_main(position);
            }
        }
    }
}

/// Fingerprints of a page.
const GHOSTS_PER_PAGE: usize = 4096;

/// Fingerprints of items that were evicted from the small queue: one place for each hash, so a newer ghost drives out an
/// older one, and each stays for about as many evictions as there are places.
#[derive(Debug, Default)]
struct Ghosts {
    /// Pages, present when something was put there.
    pages: Vec<Option<Box<[u16]>>>,
    present: usize,
}

impl Ghosts {
    fn bytes(&self) -> usize {
        self.present * GHOSTS_PER_PAGE * size_of::<u16>()
    }

    /// A page, a place on it, and what stands there for a hash: never 0.
    fn way(&self, hash: u64) -> (usize, usize, u16) {
        // A shard's hashes share their top bits.
        let spread = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let page = (spread >> 32) as usize & self.pages.len().wrapping_sub(1);
        (page, (spread >> 20) as usize % GHOSTS_PER_PAGE, (spread as u16).max(1))
    }

    /// Remembers an item, as one of `items`.
    fn add(&mut self, hash: u64, items: usize) {
        let pages = items.div_ceil(GHOSTS_PER_PAGE).next_power_of_two();
        if pages > self.pages.len() {
            if self.pages.try_reserve(pages - self.pages.len()).is_err() {
                return;
            }
            self.pages.resize(pages, None);
        }
        let (page, place, fingerprint) = self.way(hash);
        let page = &mut self.pages[page];
        if page.is_none() {
            let mut fresh = Vec::new();
            if fresh.try_reserve_exact(GHOSTS_PER_PAGE).is_err() {
                return;
            }
            fresh.resize(GHOSTS_PER_PAGE, 0);
            *page = Some(fresh.into_boxed_slice());
            self.present += 1;
        }
        if let Some(page) = page {
            page[place] = fingerprint;
        }
    }

    /// There was a ghost of this item, and is none any more.
    fn take(&mut self, hash: u64) -> bool {
        let (page, place, fingerprint) = self.way(hash);
        match self.pages.get_mut(page) {
            Some(Some(page)) if page[place] == fingerprint => {
                page[place] = 0;
                true
            }
            _ => false,
        }
    }
}
