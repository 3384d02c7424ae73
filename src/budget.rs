//! The memory limit of the whole process, divided among cores without a lock.
//!
//! A core takes quota from the common pool in pieces of [`PIECE_BYTES`] and counts inside its piece without touching
//! shared memory; it gives whole pieces back when it has more than two to spare. So the limit is one for all cores: a
//! core that holds most of the data may use what the others leave, and the pool is touched once per megabyte.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// What a core takes from, and gives back to, the pool at a time.
const PIECE_BYTES: u64 = 256 * 1024;

/// The bytes that no core has taken yet. May be negative after the limit was lowered.
#[derive(Debug)]
pub struct Pool {
    free: AtomicI64,
    limit: AtomicU64,
}

impl Pool {
    /// A pool of `limit` bytes.
    pub fn new(limit: u64) -> Arc<Self> {
        let limit = limit.min(i64::MAX as u64);
        Arc::new(Self {
            free: AtomicI64::new(limit as i64),
            limit: AtomicU64::new(limit),
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

    /// Bytes that may still be charged; below 0 when more is charged than the limit allows.
    pub fn room(&self) -> i64 {
        self.free.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        self.free
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| {
                (free >= bytes as i64).then(|| free - bytes as i64)
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
    unlimited: bool,
}

impl Budget {
    /// A core's empty part of `pool`.
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            spare: 0,
            charged: 0,
            unlimited: false,
        }
    }

    /// Charges `bytes`; false, and nothing charged, when the limit does not allow it.
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

    /// Charges `bytes` even above the limit: for what must not fail, such as a version that a read asks for.
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
        if self.spare > 2 * PIECE_BYTES {
            self.give_back();
        }
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

    /// While `on`, every charge succeeds: what was reserved is being used, and an estimate may be a little short.
    /// Returns what was so before.
    pub fn set_unlimited(&mut self, on: bool) -> bool {
        std::mem::replace(&mut self.unlimited, on)
    }

    /// Bytes that this core may still charge; below 0 when more is charged than the limit allows.
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
}

impl Drop for Budget {
    fn drop(&mut self) {
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
}
