//! The memory limit of the whole process, divided among cores without a lock.
//!
//! A core takes quota from the common pool in pieces of [`PIECE_BYTES`] and counts inside its piece without touching
//! shared memory; it gives whole pieces back when it has more than two to spare. So the limit is one for all cores: a
//! core that holds most of the data may use what the others leave, and the pool is touched once per megabyte.
//!
//! Data, which can be refused, may use the limit down to a reserve. Connections, whose bytes are there before anybody can say
//! no, may use that too, and when it runs out there is a [`Shortage`]: they are held short until it is over. What is resident
//! and was charged by nobody (code, stacks, what the allocator holds) is measured by the runtime and taken off the limit as
//! well ([`Pool::set_other`]), so that the limit is that of the process, not of a sum of estimates.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// What a core takes from, and gives back to, the pool at a time.
const PIECE_BYTES: u64 = 256 * 1024;
/// With more to spare than this it gives some back.
const SPARE_BYTES_MAX: u64 = 2 * PIECE_BYTES;
/// A core tells the others of what it has charged when that has changed by more than this; of less, once in a while.
const PUBLISH_BYTES: u64 = 64 * 1024;

/// How short of memory the process is, as far as connections are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shortage {
    /// It is not.
    No,
    /// Connections have used up half of what is kept for them: they get by with less.
    Some,
    /// Less than a quarter is left of it: none may grow.
    Severe,
}

/// The bytes that no core has taken yet.
#[derive(Debug)]
pub struct Pool {
    /// The limit without what cores have taken and without `other`. May be negative, for instance after the limit was lowered.
    free: AtomicI64,
    /// So much of it is for connections only.
    reserve: AtomicI64,
    /// Freed since `other` was measured, and not yet part of `free`.
    unmeasured: AtomicI64,
    limit: AtomicU64,
    other: AtomicU64,
    published: Published,
}

/// What the cores have said of themselves. By itself in memory: it is written to more often than what the hot path reads.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Published {
    resident: AtomicI64,
    connections: AtomicI64,
}

impl Pool {
    /// A pool of `limit` bytes, without a reserve.
    pub fn new(limit: u64) -> Arc<Self> {
        let limit = limit.min(i64::MAX as u64);
        Arc::new(Self {
            free: AtomicI64::new(limit as i64),
            reserve: AtomicI64::new(0),
            unmeasured: AtomicI64::new(0),
            limit: AtomicU64::new(limit),
            other: AtomicU64::new(0),
            published: Published::default(),
        })
    }

    /// The limit now in force, in bytes.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Changes the limit. Lowering it below what is in use makes new charges fail until enough was released.
    pub fn set_limit(&self, limit: u64) {
        // More than this is as good as no limit, and the free bytes are counted with a sign.
        let limit = limit.min(i64::MAX as u64);
        let before = self.limit.swap(limit, Ordering::Relaxed);
        self.free.fetch_add(limit as i64 - before as i64, Ordering::Relaxed);
    }

    /// Keeps so many bytes for connections: what can be refused gets nothing of them. Without such a reserve there is never a
    /// [`Shortage`].
    pub fn keep_for_connections(&self, bytes: u64) {
        self.reserve.store(bytes.min(i64::MAX as u64) as i64, Ordering::Relaxed);
    }

    /// What is kept for connections, in bytes.
    pub fn reserve(&self) -> u64 {
        self.reserve.load(Ordering::Relaxed) as u64
    }

    /// Compares what is charged with what is resident, which `ask` finds out; says how many bytes nobody has charged.
    pub fn measure(&self, ask: impl FnOnce() -> Option<u64>) -> Option<u64> {
        // In this order: what is freed meanwhile counts twice until the next time. The other way round it would not count at all.
        let freed = self.unmeasured.swap(0, Ordering::Acquire);
        let Some(resident) = ask() else {
            self.unmeasured.fetch_add(freed, Ordering::Release);
            return None;
        };
        let other = resident.saturating_sub(self.resident());
        self.replace_other(other, freed);
        Some(other)
    }

    /// Says how many bytes are resident that nobody has charged, and that what was freed is known with that.
    pub fn set_other(&self, bytes: u64) {
        let freed = self.unmeasured.swap(0, Ordering::Relaxed);
        self.replace_other(bytes, freed);
    }

    fn replace_other(&self, bytes: u64, freed: i64) {
        let bytes = bytes.min(i64::MAX as u64);
        let before = self.other.swap(bytes, Ordering::Relaxed);
        self.free
            .fetch_add(before as i64 - bytes as i64 + freed, Ordering::Relaxed);
    }

    /// So much was freed since it was last measured that it should be measured again soon.
    #[inline]
    pub fn is_to_measure(&self) -> bool {
        self.unmeasured.load(Ordering::Relaxed) > self.reserve.load(Ordering::Relaxed) / 8
    }

    /// Bytes that are resident and that nobody has charged, as they were last measured.
    pub fn other(&self) -> u64 {
        self.other.load(Ordering::Relaxed)
    }

    /// Bytes that the cores have charged and that are resident, as they last said.
    pub fn resident(&self) -> u64 {
        self.published.resident.load(Ordering::Relaxed).max(0) as u64
    }

    /// How many bytes data takes of the reserve, or would have to give up for the limit to be kept: 0 when all is well.
    pub fn missing(&self) -> u64 {
        (self.reserve.load(Ordering::Relaxed) - self.free.load(Ordering::Relaxed)).max(0) as u64
    }

    /// Data has little left, or nothing.
    pub fn is_nearly_full(&self) -> bool {
        let left = self.free.load(Ordering::Relaxed) - self.reserve.load(Ordering::Relaxed);
        left < (self.limit() / 64) as i64
    }

    /// How short of memory connections are. What was freed a moment ago is as good as free, until it is known better: nobody is
    /// sent away for it.
    pub fn shortage(&self) -> Shortage {
        let reserve = self.reserve.load(Ordering::Relaxed);
        let free = self.free.load(Ordering::Relaxed) + self.unmeasured.load(Ordering::Relaxed);
        if reserve == 0 || free >= reserve / 2 {
            Shortage::No
        } else if free >= reserve / 4 {
            Shortage::Some
        } else {
            Shortage::Severe
        }
    }

    /// Connections are short of memory.
    pub fn is_short(&self) -> bool {
        self.shortage() > Shortage::No
    }

    /// They are, and it is they who have used it up: further ones are to be refused. Where it is data, because the limit was
    /// lowered, somebody must come in to make room.
    pub fn is_full_of_connections(&self) -> bool {
        self.is_short() && self.published.connections.load(Ordering::Relaxed) > self.reserve() as i64 / 4
    }

    /// There is room to copy so many bytes for a connection, without making the others short. Always, without a reserve.
    pub fn has_room(&self, bytes: usize) -> bool {
        let reserve = self.reserve.load(Ordering::Relaxed);
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        reserve == 0 || self.free.load(Ordering::Relaxed).saturating_sub(bytes) >= reserve / 2
    }

    /// Bytes that data may still be charged with; below 0 when more is charged than the limit allows.
    pub fn room(&self) -> i64 {
        self.free.load(Ordering::Relaxed) - self.reserve.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        let reserve = self.reserve.load(Ordering::Relaxed);
        self.free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| {
                (free - reserve >= bytes as i64).then(|| free - bytes as i64)
            })
            .is_ok()
    }
}

/// One core's part of the limit.
#[derive(Debug)]
pub struct Budget {
    pool: Arc<Pool>,
    /// Taken from the pool and not charged.
    spare: u64,
    charged: u64,
    /// Bytes of those that are not resident: of values that were announced and have not come.
    absent: u64,
    unlimited: bool,
    /// What this core said last: bytes charged and resident, and bytes of connections.
    said: (i64, i64),
}

impl Budget {
    /// A core's empty part of `pool`.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            spare: 0,
            charged: 0,
            absent: 0,
            unlimited: false,
            said: (0, 0),
        }
    }

    /// Charges `bytes`; false, and nothing charged, when the limit does not allow it, or only out of the reserve.
    #[inline]
    pub fn charge(&mut self, bytes: usize) -> bool {
        let bytes = bytes as u64;
        if self.spare < bytes && !self.refill(bytes - self.spare) {
            return false;
        }
        self.spare -= bytes;
        self.charged += bytes;
        true
    }

    /// Charges `bytes` out of the reserve if need be, and even above the limit: for what must not fail, such as a version that
    /// a read asks for, or for what is there already, such as bytes that were received.
    pub fn charge_always(&mut self, bytes: usize) {
        if !self.charge(bytes) {
            self.pool.free.fetch_sub(bytes as i64, Ordering::Relaxed);
            self.charged += bytes as u64;
        }
    }

    #[cold]
    fn refill(&mut self, missing: u64) -> bool {
        // Near the limit a whole piece may not be left, though what is needed is.
        for bytes in [missing.next_multiple_of(PIECE_BYTES), missing] {
            if self.pool.take(bytes) {
                self.spare += bytes;
                return true;
            }
        }
        if self.unlimited {
            self.pool.free.fetch_sub(missing as i64, Ordering::Relaxed);
            self.spare += missing;
        }
        self.unlimited
    }

    /// Takes back a charge.
    #[inline]
    pub fn release(&mut self, bytes: usize) {
        let bytes = bytes as u64;
        debug_assert!(bytes <= self.charged, "released more than was charged");
        self.charged -= bytes;
        self.spare += bytes;
        if self.spare > SPARE_BYTES_MAX {
            self.give_back();
        }
    }

    /// Takes back a charge of memory that was freed and may be resident all the same: as long as it was not measured it cannot be
    /// charged anew. A connection that frees megabytes, and has others ask for as many, would drive the process over its limit.
    pub fn release_when_measured(&mut self, bytes: usize) {
        if self.pool.reserve() == 0 {
            // Nobody measures.
            return self.release(bytes);
        }
        debug_assert!(bytes as u64 <= self.charged, "released more than was charged");
        self.charged -= bytes as u64;
        if self.is_to_publish() {
            // Whoever measures must not take it for charged, whatever this core's turn is still busy with.
            self.publish_resident();
        }
        self.pool.unmeasured.fetch_add(bytes as i64, Ordering::Release);
    }

    #[cold]
    fn give_back(&mut self) {
        let whole = (self.spare / PIECE_BYTES - 1) * PIECE_BYTES;
        self.spare -= whole;
        self.pool.free.fetch_add(whole as i64, Ordering::Relaxed);
    }

    /// Takes back a charge that was made for what is about to be charged in truth: the bytes stay at hand.
    pub fn use_reserved(&mut self, bytes: usize) {
        debug_assert!(bytes as u64 <= self.charged, "used more than was reserved");
        self.charged -= bytes as u64;
        self.spare += bytes as u64;
    }

    /// Leaves a charge to another core, which takes it with [`Budget::take_over`].
    pub fn hand_over(&mut self, bytes: usize) {
        debug_assert!(bytes as u64 <= self.charged, "handed over more than was charged");
        self.charged -= bytes as u64;
    }

    /// Takes a charge that another core left.
    pub fn take_over(&mut self, bytes: usize) {
        self.charged += bytes as u64;
    }

    /// While `on`, every charge succeeds: what was reserved is being used, and an estimate may be a little short.
    /// Returns what was so before.
    pub fn set_unlimited(&mut self, on: bool) -> bool {
        std::mem::replace(&mut self.unlimited, on)
    }

    /// So many of the bytes that are charged are not resident yet.
    pub fn mark_absent(&mut self, bytes: usize) {
        self.absent += bytes as u64;
    }

    /// So many of those are resident now, or about to be released.
    #[inline]
    pub fn mark_present(&mut self, bytes: usize) {
        debug_assert!(bytes as u64 <= self.absent, "more came than was announced");
        self.absent -= bytes as u64;
    }

    fn resident(&self) -> i64 {
        self.charged as i64 - self.absent as i64
    }

    fn publish_resident(&mut self) {
        let resident = self.resident();
        let before = std::mem::replace(&mut self.said.0, resident);
        if self.said.0 != before {
            let published = &self.pool.published.resident;
            published.fetch_add(self.said.0 - before, Ordering::Relaxed);
        }
    }

    /// Tells the others how much this core has charged; `connections` bytes of it belong to those. And leaves them what it has no use
    /// for.
    pub fn publish(&mut self, connections: usize) {
        self.publish_resident();
        let before = std::mem::replace(&mut self.said.1, connections as i64);
        if self.said.1 != before {
            let published = &self.pool.published.connections;
            published.fetch_add(self.said.1 - before, Ordering::Relaxed);
        }
        if self.spare > 0 && self.pool.missing() > 0 {
            // It was the reserve's.
            self.pool
                .free
                .fetch_add(std::mem::take(&mut self.spare) as i64, Ordering::Relaxed);
        } else if self.spare > SPARE_BYTES_MAX {
            self.give_back();
        }
    }

    /// Much has changed since [`Budget::publish`] was called last.
    #[inline]
    pub fn is_to_publish(&self) -> bool {
        self.resident().abs_diff(self.said.0) > PUBLISH_BYTES
    }

    /// Bytes that data of this core may still be charged with; below 0 when more is charged than the limit allows.
    pub fn room(&self) -> i64 {
        self.pool.room() + self.spare as i64
    }

    /// Bytes charged on this core.
    pub fn charged(&self) -> u64 {
        self.charged
    }

    /// The common pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// [`Pool::is_short`].
    pub fn is_short(&self) -> bool {
        self.pool.is_short()
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.absent = self.charged;
        self.publish(0);
        self.pool
            .free
            .fetch_add((self.spare + self.charged) as i64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One core may use the whole limit to the byte when the other uses nothing, and not a byte more.
    #[test]
    fn a_core_may_use_what_others_leave() {
        let pool = Pool::new(10_000_000);
        let (mut a, mut b) = (Budget::new(pool.clone()), Budget::new(pool.clone()));
        assert!(a.charge(9_999_999));
        assert!(!b.charge(2));
        assert!(!a.charge(2));
        a.release(5_000_000);
        assert!(b.charge(4_000_000), "what one core releases, another can use");
        assert_eq!((a.charged(), b.charged()), (4_999_999, 4_000_000));
    }

    /// Absurd limits are no limit, not an overflow.
    #[test]
    fn absurd_limits() {
        let pool = Pool::new(u64::MAX);
        let mut budget = Budget::new(pool.clone());
        assert!(budget.charge(1 << 30));
        for limit in [1 << 63, u64::MAX, 1 << 20, u64::MAX] {
            pool.set_limit(limit);
        }
        assert!(budget.charge(1 << 30));
    }

    #[test]
    fn lowering_the_limit_refuses_new_charges_only() {
        let pool = Pool::new(1_000_000);
        let mut budget = Budget::new(pool.clone());
        assert!(budget.charge(900_000));
        pool.set_limit(500_000);
        budget.release(300_000);
        // 600 kB remain charged, above the new limit; spare quota kept by the core is at most two pieces.
        budget.release(100_000);
        assert!(!budget.charge(2 * PIECE_BYTES as usize + 1));
        drop(budget);
        assert_eq!(pool.free.load(Ordering::Relaxed), 500_000);
    }

    /// Data leaves the reserve alone, connections use it, and when it runs out there is a shortage, until there is room again.
    #[test]
    fn the_reserve_is_for_connections() {
        let pool = Pool::new(10 << 20);
        pool.keep_for_connections(2 << 20);
        let mut budget = Budget::new(pool.clone());
        let mut data = 0;
        while budget.charge(1000) {
            data += 1000;
        }
        assert!((8 << 20) - data < 1000, "{data}");
        assert_eq!(pool.shortage(), Shortage::No);
        let mut shortages = vec![];
        for _ in 0..20 {
            budget.charge_always(100 << 10);
            budget.publish((budget.charged() - data) as usize);
            shortages.push(pool.shortage());
        }
        assert_eq!(shortages[0], Shortage::No);
        assert!(shortages.is_sorted() && shortages.contains(&Shortage::Some));
        assert_eq!(shortages[19], Shortage::Severe);
        assert!(pool.is_full_of_connections());
        assert!(!budget.charge(1 << 20));
        budget.release(20 * (100 << 10));
        assert!(!pool.is_short() && pool.missing() <= 2 * PIECE_BYTES);
        budget.publish(0);
        assert_eq!(pool.missing(), 0);
        assert!(!budget.charge(1000), "it is kept again");
    }

    /// Where data has used up the reserve, because the limit was lowered, connections get by with less, and are not refused.
    #[test]
    fn a_lowered_limit_lets_connections_in() {
        let pool = Pool::new(10 << 20);
        pool.keep_for_connections(1 << 20);
        let mut budget = Budget::new(pool.clone());
        assert!(budget.charge(8 << 20));
        pool.set_limit(4 << 20);
        assert_eq!((pool.shortage(), pool.missing()), (Shortage::Severe, 5 << 20));
        assert!(!pool.is_full_of_connections());
        budget.charge_always(300 << 10);
        budget.publish(300 << 10);
        assert!(pool.is_full_of_connections());
    }

    /// What nobody has charged counts, and comes back.
    #[test]
    fn other_bytes_count() {
        let pool = Pool::new(1 << 20);
        let mut budget = Budget::new(pool.clone());
        pool.set_other(1 << 20);
        assert!(!budget.charge(1));
        pool.set_other(1 << 19);
        assert!(budget.charge(1 << 19) && !budget.charge(1));
        budget.mark_absent(1 << 18);
        budget.publish(0);
        assert_eq!((pool.other(), pool.resident()), (1 << 19, 1 << 18));
        drop(budget);
        assert_eq!((pool.resident(), pool.free.load(Ordering::Relaxed)), (0, 1 << 19));
    }

    /// What was freed counts until it is measured that it is gone.
    #[test]
    fn what_was_freed_is_measured() {
        let pool = Pool::new(10 << 20);
        pool.keep_for_connections(1 << 20);
        let mut budget = Budget::new(pool.clone());
        assert!(budget.charge(9 << 20));
        budget.release_when_measured(8 << 20);
        assert_eq!(budget.charged(), 1 << 20);
        assert!(!budget.charge(1 << 20) && pool.is_to_measure());
        pool.set_other(1 << 20);
        assert!(budget.charge(7 << 20) && !budget.charge(1));
    }

    /// What a core frees in the middle of a turn and the allocator keeps is nobody's, also when it is measured before the turn's
    /// end; and what it frees while it is being measured counts, too.
    #[test]
    fn what_was_freed_is_not_charged_any_more() {
        let pool = Pool::new(10 << 20);
        pool.keep_for_connections(1 << 20);
        let mut budget = Budget::new(pool.clone());
        assert!(budget.charge(8 << 20));
        budget.publish(0);
        budget.release_when_measured(6 << 20);
        assert_eq!(pool.measure(|| Some(8 << 20)), Some(6 << 20));
        assert!(!budget.charge(2 << 20), "all of it is resident");
        let other = pool.measure(|| {
            budget.release_when_measured(1 << 20);
            Some(8 << 20)
        });
        assert_eq!(other, Some(7 << 20));
        assert!(!budget.charge(1 << 20), "it is measured the next time");
        assert_eq!(pool.measure(|| Some(2 << 20)), Some(1 << 20));
        assert!(budget.charge(7 << 20) && !budget.charge(1 << 20));
        budget.release_when_measured(1 << 20);
        assert_eq!(pool.measure(|| None), None);
        assert!(!budget.charge(1 << 20), "the system did not say");
    }

    /// What a transaction had reserved and did not use is there for others.
    #[test]
    fn what_was_reserved_in_vain_comes_back() {
        let pool = Pool::new(10 << 20);
        let (mut a, mut b) = (Budget::new(pool.clone()), Budget::new(pool.clone()));
        assert!(a.charge(10 << 20));
        a.use_reserved(10 << 20);
        a.publish(0);
        assert!(b.charge(9 << 20));
    }

    /// A charge that travels with what it is for stays one.
    #[test]
    fn charges_are_handed_over() {
        let pool = Pool::new(1 << 20);
        let (mut a, mut b) = (Budget::new(pool.clone()), Budget::new(pool.clone()));
        assert!(a.charge(1 << 20));
        a.hand_over(1 << 19);
        assert!(!b.charge(1));
        b.take_over(1 << 19);
        b.release(1 << 19);
        assert!(b.charge(1 << 19));
        assert_eq!((a.charged(), b.charged()), (1 << 19, 1 << 19));
    }
}
