//! The shards of one core, with what they share: the core's part of the memory limit, and the work that time brings.

use crate::budget::{Budget, Pool};
use crate::effect::Effect;
use crate::metrics::Counters;
use crate::model::{Check, Command, CoreId, Reply, UnixMillis};
use crate::partition::RangeTable;
use crate::shard::{Context, Price, Shard};
use crate::store::ImageStep;
use crate::wal::Log;
use std::sync::Arc;

/// Items looked at because their time may be over: this many for each millisecond that passed, and at most so many in one
/// turn. The shards of a core take turns.
const EXPIRE_PER_MS: u64 = 512;
const EXPIRE_MAX: u64 = 1024;
/// Times in one turn that a core evicts some items ahead of need.
const YIELDS_MAX: usize = 16;
/// Memory that is kept ready where items are evicted: a share of the limit, or room for two of the largest values, but no more
/// than another share.
const READY_SHARE: u64 = 64;
const READY_SHARE_MAX: u64 = 16;

/// Times that a core evicts some items for one reservation.
const RESERVE_YIELDS_MAX: usize = 4096;

/// Too little memory is ready, and this core is one of those that have the most of it.
fn wants_room(budget: &Budget, cores: u64, value_bytes_max: usize) -> bool {
    let (limit, room) = (budget.pool().limit(), budget.room());
    let ready = (limit / READY_SHARE).max((2 * value_bytes_max as u64).min(limit / READY_SHARE_MAX));
    let charged = limit.saturating_sub(u64::try_from(room).unwrap_or(0));
    room < ready as i64 && budget.charged() >= charged / cores / 16 * 15
}

/// Where writes are refused: the command is one, and is counted.
#[cold]
#[inline(never)]
fn is_refused(command: &Command<'_>, counters: &mut Counters) -> bool {
    let refused = command.asks_for_a_change();
    counters.read_only_refusals += u64::from(refused);
    refused
}

/// The shards that one core owns: a contiguous run.
pub(crate) struct Shards {
    shards: Vec<Shard>,
    /// The number of the first of them among all shards.
    first: u16,
    /// The core's part of the memory limit: items, indexes, and values that were announced.
    pub(crate) budget: Budget,
    /// The largest value, in bytes.
    value_bytes_max: usize,
    /// What is done to them, on its way to the disk; none without a data directory.
    pub(crate) log: Option<Log>,
    /// At the memory limit items make place.
    evicts: bool,
    /// No client's write is executed.
    refuses_writes: bool,
    /// How many cores share the limit.
    cores: u64,
    /// The shard that work was done for last.
    served: usize,
    /// There is more work that needs no request.
    busy: bool,
}

impl Shards {
    /// The empty shards of `core`.
    pub(crate) fn new(
        core: CoreId,
        table: &RangeTable,
        pool: Arc<Pool>,
        value_bytes_max: usize,
        evicts: bool,
        now: UnixMillis,
    ) -> Self {
        let mut budget = Budget::new(pool);
        let mut first = None;
        let mut shards = vec![];
        for shard in table.shards_of(core) {
            first.get_or_insert(shard.0);
            shards.push(Shard::new(table.partitioner(), evicts, now, &mut budget));
        }
        Self {
            shards,
            first: first.unwrap_or(0),
            budget,
            value_bytes_max,
            log: None,
            evicts,
            refuses_writes: false,
            cores: u64::from(table.cores()),
            served: 0,
            busy: false,
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

    /// No client's write is executed.
    pub(crate) fn refuses_writes(&self) -> bool {
        self.refuses_writes
    }

    /// Sets whether clients' writes are refused from now on.
    pub(crate) fn refuse_writes(&mut self, refuse: bool) {
        self.refuses_writes = refuse;
    }

    /// Executes a client's command on one of them, unless it is a write and those are refused.
    #[inline(always)]
    pub(crate) fn execute(
        &mut self,
        shard: u16,
        hash: u64,
        command: &Command<'_>,
        now: UnixMillis,
        counters: &mut Counters,
    ) -> Reply<'_> {
        if self.refuses_writes && is_refused(command, counters) {
            return Reply::ReadOnly;
        }
        self.execute_always(shard, hash, command, now, counters)
    }

    /// Executes a command that nobody may refuse: what is stored already is brought back by it.
    #[inline(always)]
    pub(crate) fn execute_always(
        &mut self,
        shard: u16,
        hash: u64,
        command: &Command<'_>,
        now: UnixMillis,
        counters: &mut Counters,
    ) -> Reply<'_> {
        let place = self.place(shard);
        let (shards, mut context) = self.parts(now, counters);
        shards[place].execute(hash, command, &mut context)
    }

    /// The shards, and what each of them needs to do anything.
    #[inline(always)]
    fn parts<'s: 'c, 'c>(&'s mut self, now: UnixMillis, counters: &'c mut Counters) -> (&'s mut [Shard], Context<'c>) {
        let context = Context {
            now,
            budget: &mut self.budget,
            counters,
            value_bytes_max: self.value_bytes_max,
            log: self.log.as_mut(),
        };
        (&mut self.shards, context)
    }

    fn with<T>(
        &mut self,
        shard: u16,
        now: UnixMillis,
        counters: &mut Counters,
        act: impl FnOnce(&mut Shard, &mut Context<'_>) -> T,
    ) -> T {
        let place = self.place(shard);
        let (shards, mut context) = self.parts(now, counters);
        act(&mut shards[place], &mut context)
    }

    /// Does again what was done to a key; false when there is no memory for it.
    pub(crate) fn restore(
        &mut self,
        shard: u16,
        hash: u64,
        effect: &Effect<'_>,
        now: UnixMillis,
        counters: &mut Counters,
    ) -> bool {
        let restored = self.with(shard, now, counters, |shard, context| {
            shard.restore(hash, effect, context)
        });
        restored.is_ok()
    }

    /// Empties one of them, of which nothing is noted.
    pub(crate) fn empty(&mut self, shard: u16, now: UnixMillis, counters: &mut Counters) {
        self.with(shard, now, counters, |shard, context| shard.flush(context));
        self.busy = true;
    }

    /// Begins an image of one of them; false when there is no memory for that.
    pub(crate) fn begin_image(&mut self, shard: u16, now: UnixMillis) -> bool {
        let counters = &mut Counters::default();
        self.with(shard, now, counters, |shard, context| shard.begin_image(context))
    }

    /// Appends more of it: see [`Shard::image_step`].
    pub(crate) fn image_step(
        &mut self,
        shard: u16,
        stripes: usize,
        bytes: usize,
        out: &mut Vec<u8>,
        now: UnixMillis,
    ) -> Option<ImageStep> {
        let counters = &mut Counters::default();
        self.with(shard, now, counters, |shard, context| {
            shard.image_step(stripes, bytes, out, context)
        })
    }

    /// Gives up the image that is under way.
    pub(crate) fn drop_images(&mut self, now: UnixMillis) {
        self.each(now, &mut Counters::default(), |shard, context| {
            shard.drop_image(context);
        });
    }

    /// Bytes that were saved for an image and that nobody has taken.
    pub(crate) fn image_backlog_bytes(&self) -> usize {
        self.shards.iter().map(Shard::image_backlog_bytes).sum()
    }

    /// Does something with each shard in turn.
    fn each(&mut self, now: UnixMillis, counters: &mut Counters, mut act: impl FnMut(&mut Shard, &mut Context<'_>)) {
        let (shards, mut context) = self.parts(now, counters);
        shards.iter_mut().for_each(|shard| act(shard, &mut context));
    }

    /// Empties them.
    pub(crate) fn flush(&mut self, now: UnixMillis, counters: &mut Counters) {
        self.each(now, counters, |shard, context| _ = shard.flush(context));
        if let Some(log) = &mut self.log {
            log.empty();
        }
        self.busy = true;
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
        // What an emptied table still holds must not make a write fail; nor other items, where those make place.
        let mut yields = 0;
        while !self.budget.charge(bytes) {
            let mut any = false;
            self.each(now, counters, |shard, context| any |= shard.tick(context));
            if !any && yields < RESERVE_YIELDS_MAX {
                yields += 1;
                self.each(now, counters, |shard, context| any |= shard.yield_memory(context));
            }
            if !any {
                return false;
            }
        }
        true
    }

    /// Work that time brings, a bounded piece of it: `passed_ms` since the last time.
    pub(crate) fn tick(&mut self, passed_ms: u64, now: UnixMillis, counters: &mut Counters) {
        let entries = passed_ms.saturating_mul(EXPIRE_PER_MS).min(EXPIRE_MAX);
        self.work(entries as usize, now, counters);
    }

    /// There is more work that time brings than was done.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy
    }

    fn work(&mut self, mut entries: usize, now: UnixMillis, counters: &mut Counters) {
        let mut busy = false;
        self.each(now, counters, |shard, context| busy |= shard.tick(context));
        let (evicts, cores, mut served) = (self.evicts, self.cores, self.served);
        let (shards, mut context) = self.parts(now, counters);
        let count = shards.len();
        for _ in 0..count {
            let place = served % count;
            if shards[place].is_due(now) {
                let seen = shards[place].expire(&mut context, entries);
                entries = entries.saturating_sub(seen);
                if entries == 0 {
                    busy = true;
                    break;
                }
            }
            served = place + 1;
        }
        for _ in 0..YIELDS_MAX {
            if !evicts || !wants_room(context.budget, cores, context.value_bytes_max) {
                break;
            }
            served += 1;
            if !shards[served % count].yield_memory(&mut context) {
                break;
            }
            busy = true;
        }
        self.served = served;
        self.busy = busy;
    }

    /// Adds what they hold to the gauges.
    pub(crate) fn count(&self, counters: &mut Counters) {
        self.shards.iter().for_each(|shard| shard.count(counters));
        counters.charged_bytes = self.budget.charged();
    }
}
