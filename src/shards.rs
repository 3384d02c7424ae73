//! The shards of one core, with what they share: the core's part of the memory limit, and the work that time brings.

use crate::budget::{Budget, Pool};
use crate::metrics::Counters;
use crate::model::{Check, Command, CoreId, Reply, UnixMillis};
use crate::partition::RangeTable;
use crate::shard::{Context, Price, Shard};
use std::sync::Arc;

/// Buckets of a shard looked at for expired items: this many for each millisecond that passed, and at most so many in one
/// turn. The shards of a core take turns.
const SWEEP_BUCKETS_PER_MS: u64 = 64;
const SWEEP_BUCKETS_MAX: u64 = 4096;

/// The shards that one core owns: a contiguous run.
pub(crate) struct Shards {
    shards: Vec<Shard>,
    /// The number of the first of them among all shards.
    first: u16,
    /// The core's part of the memory limit: items, indexes, and values that were announced.
    pub(crate) budget: Budget,
    /// The largest value, in bytes.
    value_bytes_max: usize,
    /// The shard that was swept last.
    swept: usize,
    /// Emptied tables still hold memory.
    emptying: bool,
}

impl Shards {
    /// The empty shards of `core`.
    pub(crate) fn new(
        core: CoreId,
        table: &RangeTable,
        pool: Arc<Pool>,
        value_bytes_max: usize,
        now: UnixMillis,
    ) -> Self {
        let mut budget = Budget::new(pool);
        let mut first = None;
        let mut shards = vec![];
        for shard in table.shards_of(core) {
            first.get_or_insert(shard.0);
            shards.push(Shard::new(table.partitioner(), now, &mut budget));
        }
        Self {
            shards,
            first: first.unwrap_or(0),
            budget,
            value_bytes_max,
            swept: 0,
            emptying: false,
        }
    }

    /// True when `shard` is one of them.
    #[inline]
    pub(crate) fn own(&self, shard: u16) -> bool {
        usize::from(shard.wrapping_sub(self.first)) < self.shards.len()
    }

    #[inline]
    fn place(&self, shard: u16) -> usize {
        usize::from(shard - self.first)
    }

    /// First stage of looking ahead to a command: asks for the index.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, shard: u16, hash: u64) {
        self.shards[self.place(shard)].prefetch_bucket(hash);
    }

    /// Second stage of looking ahead to a command: asks for the item.
    #[inline]
    pub(crate) fn prefetch_item(&self, shard: u16, hash: u64) {
        self.shards[self.place(shard)].prefetch_item(hash);
    }

    /// Executes a command on one of them.
    #[inline]
    pub(crate) fn execute(
        &mut self,
        shard: u16,
        hash: u64,
        command: &Command<'_>,
        now: UnixMillis,
        counters: &mut Counters,
    ) -> Reply<'_> {
        let place = self.place(shard);
        let mut context = Context {
            now,
            budget: &mut self.budget,
            counters,
            value_bytes_max: self.value_bytes_max,
        };
        self.shards[place].execute(hash, command, &mut context)
    }

    /// Does something with each shard in turn.
    fn each(&mut self, now: UnixMillis, counters: &mut Counters, mut act: impl FnMut(&mut Shard, &mut Context<'_>)) {
        let mut context = Context {
            now,
            budget: &mut self.budget,
            counters,
            value_bytes_max: self.value_bytes_max,
        };
        self.shards.iter_mut().for_each(|shard| act(shard, &mut context));
    }

    /// Empties them.
    pub(crate) fn flush(&mut self, now: UnixMillis, counters: &mut Counters) {
        self.each(now, counters, |shard, context| shard.flush(context));
        self.emptying = true;
    }

    /// What a check asks for is so.
    pub(crate) fn holds(&self, shard: u16, hash: u64, check: &Check<'_>, now: UnixMillis) -> bool {
        self.shards[self.place(shard)].holds(hash, check, now)
    }

    /// What a command may cost before it is executed.
    pub(crate) fn price(&self, shard: u16, hash: u64, command: &Command<'_>) -> Price {
        self.shards[self.place(shard)].price(hash, command)
    }

    /// Sets memory aside for writes that must not fail; false when the limit does not allow it.
    pub(crate) fn reserve(&mut self, bytes: usize, now: UnixMillis, counters: &mut Counters) -> bool {
        // What an emptied table still holds must not make a write fail.
        while !self.budget.charge(bytes) {
            let mut any = false;
            self.each(now, counters, |shard, context| any |= shard.give_back(context));
            if !any {
                return false;
            }
        }
        true
    }

    /// Work that time brings, a bounded piece of it: `passed_ms` since the last time.
    pub(crate) fn tick(&mut self, passed_ms: u64, now: UnixMillis, counters: &mut Counters) {
        self.tick_each(now, counters);
        let count = self.shards.len();
        let due = (1..=count)
            .map(|step| (self.swept + step) % count)
            .find(|place| self.shards[*place].is_due(now));
        let Some(due) = due else { return };
        self.swept = due;
        let buckets = passed_ms.saturating_mul(SWEEP_BUCKETS_PER_MS).min(SWEEP_BUCKETS_MAX);
        let mut context = Context {
            now,
            budget: &mut self.budget,
            counters,
            value_bytes_max: self.value_bytes_max,
        };
        self.shards[due].sweep(&mut context, buckets as usize);
    }

    fn tick_each(&mut self, now: UnixMillis, counters: &mut Counters) {
        let mut emptying = false;
        self.each(now, counters, |shard, context| emptying |= shard.give_back(context));
        self.emptying = emptying;
    }

    /// Gives back a piece of what emptied tables hold; true when there is more.
    pub(crate) fn go_on_emptying(&mut self, now: UnixMillis, counters: &mut Counters) -> bool {
        if self.emptying {
            self.tick_each(now, counters);
        }
        self.emptying
    }

    /// Adds what they hold to the gauges.
    pub(crate) fn count(&self, counters: &mut Counters) {
        self.shards.iter().for_each(|shard| shard.count(counters));
        counters.charged_bytes = self.budget.charged();
    }
}
