//! One key-range shard: decides what a command does, in the order in which commands arrive.
//!
//! A command is evaluated against the present items, turned into writes, and answered, all in one call: nothing can come
//! between. Time, memory and counters come in as arguments.

use crate::budget::Budget;
use crate::effect::{Effect, Image};
use crate::metrics::Counters;
use crate::model::{
    Check, Combine, Command, Condition, Deadline, Delete, GetEffects, Increment, ItemView, LARGE_VALUE_BYTES,
    NewVersion, Op, Put, Removal, Reply, UnixMillis, Value, Version,
};
use crate::partition::Partitioner;
use crate::store::{
    Access, FETCHED, IMAGE_STATE, ImageStep, ItemRef, KEY_ENCODED, OutOfMemory, Parts, Position, STALE, Store, WON,
};
use crate::wal::Log;
use bytes::Bytes;

/// What a shard needs from its core to do anything.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    /// The turn's time.
    pub(crate) now: UnixMillis,
    /// The core's part of the memory limit.
    pub(crate) budget: &'a mut Budget,
    /// The core's counters.
    pub(crate) counters: &'a mut Counters,
    /// The largest value, in bytes.
    pub(crate) value_bytes_max: usize,
    /// Where effects are noted, with a data directory.
    pub(crate) log: Option<&'a mut Log>,
}

/// What commands may cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Price {
    /// Bytes of memory that they charge more than now.
    pub(crate) charged_bytes: usize,
    /// Bytes of values that they read.
    pub(crate) read_bytes: u64,
}

impl std::ops::AddAssign for Price {
    fn add_assign(&mut self, more: Self) {
        self.charged_bytes += more.charged_bytes;
        self.read_bytes += more.read_bytes;
    }
}

/// The owner of one token range.
pub(crate) struct Shard {
    store: Store,
    /// The version given last. Starts from the wall clock in nanoseconds, so that a restarted server, which cannot have given
    /// a version per nanosecond, never repeats one.
    last_version: u64,
    /// For values that are built from two: reused, so that appending small values does not allocate twice.
    scratch: Vec<u8>,
}

impl Shard {
    /// An empty shard. `evicts`: at the memory limit items make place, instead of writes being refused.
    pub(crate) fn new(partitioner: Partitioner, evicts: bool, now: UnixMillis, budget: &mut Budget) -> Self {
        Self {
            store: Store::new(partitioner, evicts, now, budget),
            last_version: now.0.saturating_mul(1_000_000),
            scratch: vec![],
        }
    }

    /// First stage of looking ahead to a command: asks for the index.
    #[inline]
    pub(crate) fn prefetch_bucket(&self, hash: u64) {
        self.store.prefetch_bucket(hash);
    }

    /// Second stage of looking ahead to a command: asks for the item.
    #[inline]
    pub(crate) fn prefetch_item(&self, hash: u64) {
        self.store.prefetch_item(hash);
    }

    /// Adds what it holds to the gauges.
    pub(crate) fn count(&self, counters: &mut Counters) {
        counters.items += self.store.len() as u64;
        counters.payload_bytes += self.store.payload_bytes() as u64;
        counters.item_bytes += self.store.item_bytes() as u64;
        counters.item_resident_bytes += self.store.resident_bytes() as u64;
        counters.index_bytes += self.store.index_bytes() as u64;
        counters.order_bytes += self.store.order_bytes() as u64;
        counters.image_bytes += self.store.image_bytes() as u64;
        counters.lingering_bytes += self.store.lingering_bytes() as u64;
    }

    /// Empties the shard at once; the memory comes back through [`Shard::tick`]. True when an image was under way: that is given
    /// up, and whoever needs one begins another.
    pub(crate) fn flush(&mut self, context: &mut Context<'_>) -> bool {
        self.store.clear(context.budget)
    }

    /// Begins an image of the shard as it is now; one that is under way is given up. False when there is no memory for it.
    pub(crate) fn begin_image(&mut self, context: &mut Context<'_>) -> bool {
        self.store.begin_image(context.budget, context.now)
    }

    /// Appends more of the image: see [`Store::image_step`].
    pub(crate) fn image_step(
        &mut self,
        stripes: usize,
        bytes: usize,
        out: &mut Vec<u8>,
        context: &mut Context<'_>,
    ) -> Option<ImageStep> {
        self.store.image_step(context.budget, stripes, bytes, out)
    }

    /// Gives up the image; true when one was under way.
    pub(crate) fn drop_image(&mut self, context: &mut Context<'_>) -> bool {
        self.store.drop_image(context.budget)
    }

    /// Bytes of the image that were saved from being overwritten and wait for [`Shard::image_step`].
    pub(crate) fn image_backlog_bytes(&self) -> usize {
        self.store.image_backlog_bytes()
    }

    /// Does again what was done before the server was started, with one key: no client asked for it, and no client is counted. What
    /// is over by now is not brought back. Not for [`Effect::Empty`], which is about all shards, nor for [`Effect::Part`], which
    /// holds effects of several.
    pub(crate) fn restore(
        &mut self,
        hash: u64,
        effect: &Effect<'_>,
        context: &mut Context<'_>,
    ) -> Result<(), OutOfMemory> {
        match *effect {
            Effect::Put(image) => {
                let old = self.store.find(hash, image.key);
                if image.deadline.is_over(context.now) {
                    old.into_iter()
                        .for_each(|position| self.store.remove(context.budget, position));
                    return Ok(());
                }
                let own;
                let value = match image.value.len() {
                    LARGE_VALUE_BYTES.. => {
                        own = owned(image.value)?;
                        Value::Large(&own)
                    }
                    _ => Value::Small(image.value),
                };
                let parts = Parts {
                    value,
                    flags: image.flags,
                    deadline: image.deadline,
                    state: image.state & IMAGE_STATE,
                    ..empty(image.key, context.now)
                };
                let written = self.store.write(context.budget, hash, old, &parts);
                if self.store.evicts() {
                    self.count_evicted(context.counters);
                }
                written.map(drop)
            }
            Effect::Delete(key) => {
                if let Some(position) = self.store.find(hash, key) {
                    self.store.remove(context.budget, position);
                }
                Ok(())
            }
            Effect::Amend { key, deadline, state } => {
                let Some(position) = self.store.find(hash, key) else {
                    return Ok(());
                };
                if deadline.is_over(context.now) {
                    self.store.remove(context.budget, position);
                    return Ok(());
                }
                let amended = self.store.amend(context.budget, position, |parts| {
                    parts.deadline = deadline;
                    parts.state = state & IMAGE_STATE;
                });
                if amended { Ok(()) } else { Err(OutOfMemory) }
            }
            Effect::Empty | Effect::Part(_) => Ok(()),
        }
    }

    /// Gives back a bounded piece of memory that nobody needs. False when there was none.
    pub(crate) fn tick(&mut self, context: &mut Context<'_>) -> bool {
        self.store.tick(context.budget, context.now)
    }

    /// Evicts some items to leave memory to others; false when nothing is evicted here, or nothing is left.
    pub(crate) fn yield_memory(&mut self, context: &mut Context<'_>) -> bool {
        let yielded = self.store.yield_memory(context.budget);
        let before = context.counters.evictions();
        self.count_evicted(context.counters);
        context.counters.evicted_ahead += context.counters.evictions() - before;
        yielded
    }

    /// Counts what was evicted.
    fn count_evicted(&mut self, counters: &mut Counters) {
        let Some(evicted) = self.store.take_evicted() else {
            return;
        };
        let [within_2m, within_1h, within_1d, later] = evicted.by_idle_time;
        counters.evicted_new += evicted.new;
        counters.evicted_old += evicted.old;
        counters.evicted_unread += evicted.unread;
        counters.evicted_within_2m += within_2m;
        counters.evicted_within_1h += within_1h;
        counters.evicted_within_1d += within_1d;
        counters.evicted_later += later;
    }

    /// What a command may cost before it is executed.
    pub(crate) fn price(&self, hash: u64, command: &Command<'_>) -> Price {
        let put = match &command.op {
            Op::Put(put) => put,
            Op::Get { .. } => {
                let read_bytes = self.store.value_len(hash, command.key) as u64;
                return Price {
                    read_bytes,
                    ..Price::default()
                };
            }
            _ => return Price::default(),
        };
        let parts = Parts {
            value: put.value,
            flags: put.flags,
            deadline: put.deadline,
            version: match put.version {
                NewVersion::OnDemand => Version(0),
                _ => Version(1),
            },
            ..empty(command.key, UnixMillis(0))
        };
        let charged_bytes = self
            .store
            .needed_bytes(hash, self.store.find(hash, command.key), &parts);
        Price {
            charged_bytes,
            read_bytes: 0,
        }
    }

    /// What a check asks for is so.
    pub(crate) fn holds(&self, hash: u64, check: &Check<'_>, now: UnixMillis) -> bool {
        let item = self
            .store
            .find(hash, check.key)
            .map(|position| self.store.item(position));
        match (check.condition, item.filter(|item| !item.deadline().is_over(now))) {
            (Condition::Always, _) | (Condition::Absent, None) | (Condition::Present, Some(_)) => true,
            (Condition::VersionIs(expected), Some(item)) => matches(item, expected),
            _ => false,
        }
    }

    /// Some item's time may be over: [`Shard::expire`] has something to look for.
    pub(crate) fn is_due(&self, now: UnixMillis) -> bool {
        self.store.is_due(now)
    }

    /// Removes items whose time is over; looks at up to `entries` that may be, a few more at most. Returns how many those were.
    pub(crate) fn expire(&mut self, context: &mut Context<'_>, entries: usize) -> usize {
        let (seen, removed) = self.store.expire(context.budget, context.now, entries);
        context.counters.expired += removed as u64;
        seen
    }

    /// Executes one command. `hash` is the key's, as [`crate::partition::Place`] has it.
    #[inline(always)]
    pub(crate) fn execute(&mut self, hash: u64, command: &Command<'_>, context: &mut Context<'_>) -> Reply<'_> {
        if let Op::Get {
            version: false,
            effects: None,
        } = command.op
        {
            return self.get(hash, command.key, context);
        }
        match &command.op {
            Op::Get { version, effects } => {
                self.get_with(hash, command.key, *version, effects.unwrap_or_default(), context)
            }
            Op::Put(put) => self.put(hash, command.key, put, context),
            Op::Delete(delete) => self.delete(hash, command.key, delete, context),
            Op::Increment(increment) => self.increment(hash, command.key, increment, context),
            Op::Touch(deadline) => self.touch(hash, command.key, *deadline, context),
            Op::Inspect => match self.live(hash, command.key, context) {
                None => Reply::NotFound,
                Some(position) => {
                    self.give_version(position, context);
                    Reply::Found(ItemView {
                        charged_bytes: self.store.charged_bytes(position),
                        ..view(self.store.item(position), context.now)
                    })
                }
            },
        }
    }

    /// The item of `key`, unless its time is over: then it is removed.
    #[inline]
    fn live(&mut self, hash: u64, key: &[u8], context: &mut Context<'_>) -> Option<Position> {
        let position = self.store.find(hash, key)?;
        if self.store.item(position).deadline().is_over(context.now) {
            self.store.remove(context.budget, position);
            context.counters.expired += 1;
            return None;
        }
        Some(position)
    }

    #[inline]
    fn get(&mut self, hash: u64, key: &[u8], context: &mut Context<'_>) -> Reply<'_> {
        let expired = context.counters.expired;
        let Some(position) = self.live(hash, key, context) else {
            context.counters.get_misses += 1;
            context.counters.get_expired += context.counters.expired - expired;
            return Reply::NotFound;
        };
        context.counters.get_hits += 1;
        self.store.mark_access(position, context.now.seconds());
        let mut found = view(self.store.item(position), context.now);
        // Nobody asked for it.
        found.version = Version(0);
        Reply::Found(found)
    }

    fn get_with(
        &mut self,
        hash: u64,
        key: &[u8],
        version: bool,
        effects: GetEffects,
        context: &mut Context<'_>,
    ) -> Reply<'_> {
        let now = context.now;
        let Some(position) = self.live(hash, key, context) else {
            context.counters.get_misses += 1;
            if effects.touch.is_some() {
                context.counters.touch_misses += 1;
            }
            let Some((deadline, version)) = effects.create else {
                return Reply::NotFound;
            };
            let parts = Parts {
                deadline,
                version: self.version_of(version),
                state: WON,
                ..empty(key, now)
            };
            return match self.write(hash, None, &parts, context) {
                Err(OutOfMemory) => Reply::OutOfMemory,
                Ok(position) => Reply::Found(ItemView {
                    won: true,
                    won_before: false,
                    ..view(self.store.item(position), context.now)
                }),
            };
        };
        context.counters.get_hits += 1;
        let before = view(self.store.item(position), context.now);
        let remaining_s = before.deadline.remaining_seconds(now);
        let ItemView {
            deadline: deadline_before,
            hit_before,
            accessed_s,
            stale,
            won_before,
            ..
        } = before;
        let due =
            matches!((effects.refresh_below_s, remaining_s), (Some(limit), Some(left)) if left < u64::from(limit));
        let won = (due || stale) && !won_before;
        if won {
            self.store.set_state(context.budget, position, WON, 0);
        }
        if let Some(deadline) = effects.touch {
            context.counters.touch_hits += 1;
            self.store.touch(context.budget, position, deadline);
            self.log_amended(position, context);
        }
        if version {
            self.give_version(position, context);
        }
        if !effects.keep_access {
            self.store.mark_access(position, now.seconds());
        }
        Reply::Found(ItemView {
            deadline_before,
            hit_before,
            accessed_s,
            won,
            won_before,
            ..view(self.store.item(position), context.now)
        })
    }

    /// Gives the item a version if it has none. Without memory for one the read that asks still succeeds, with version 0,
    /// which matches no later condition.
    fn give_version(&mut self, position: Position, context: &mut Context<'_>) {
        if self.store.item(position).version() == Version(0) {
            let version = self.fresh_version();
            self.store
                .amend(context.budget, position, |parts| parts.version = version);
        }
    }

    fn put(&mut self, hash: u64, key: &[u8], put: &Put<'_>, context: &mut Context<'_>) -> Reply<'_> {
        context.counters.sets += 1;
        let old = self.live(hash, key, context);
        let mut state = if put.key_encoded { KEY_ENCODED } else { 0 };
        let mut deadline = put.deadline;
        match (put.condition, old) {
            (Condition::Always, _) | (Condition::Absent, None) | (Condition::Present, Some(_)) => {}
            (Condition::Absent, Some(_)) | (Condition::Present, None) => return Reply::NotStored,
            (Condition::VersionIs(_), None) => {
                context.counters.version_misses += 1;
                return Reply::NotFound;
            }
            (Condition::VersionIs(expected), Some(position)) => {
                let item = self.store.item(position);
                if matches(item, expected) {
                    context.counters.version_hits += 1;
                } else if put.accept_as_stale && self.is_newer(item, expected) {
                    state |= STALE | item.state() & WON;
                    deadline = item.deadline();
                } else {
                    context.counters.version_mismatches += 1;
                    return Reply::VersionMismatch;
                }
            }
        }
        let version = self.version_of(put.version);
        // A large value that came among others gets memory of its own, to be sent without copying.
        let own;
        let value = match put.value {
            Value::Small(bytes) if bytes.len() >= LARGE_VALUE_BYTES => {
                let Ok(copy) = owned(bytes) else {
                    context.counters.out_of_memory += 1;
                    return Reply::OutOfMemory;
                };
                own = copy;
                Value::Large(&own)
            }
            value => value,
        };
        let parts = Parts {
            key,
            value,
            flags: put.flags,
            deadline,
            version,
            accessed: Access::at(context.now.seconds()),
            state,
        };
        let written = match (put.combine, old) {
            (Combine::Replace, _) => self.write(hash, old, &parts, context),
            (Combine::Append | Combine::Prepend, None) => match put.create {
                None => return Reply::NotStored,
                Some(deadline) => self.write(hash, None, &Parts { deadline, ..parts }, context),
            },
            (Combine::Append | Combine::Prepend, Some(position)) => {
                let item = self.store.item(position);
                if item.value_len() + put.value.bytes().len() > context.value_bytes_max {
                    context.counters.too_large += 1;
                    return Reply::TooLarge;
                }
                let parts = Parts {
                    flags: item.flags(),
                    deadline: item.deadline(),
                    ..parts
                };
                let (first, second) = match put.combine {
                    Combine::Prepend => (put.value.bytes(), item.value().bytes()),
                    _ => (item.value().bytes(), put.value.bytes()),
                };
                let mut whole = std::mem::take(&mut self.scratch);
                whole.clear();
                if whole.try_reserve_exact(first.len() + second.len()).is_err() {
                    context.counters.out_of_memory += 1;
                    return Reply::OutOfMemory;
                }
                whole.extend_from_slice(first);
                whole.extend_from_slice(second);
                self.write_built(hash, position, parts, whole, context)
            }
        };
        match written {
            Ok(_) => Reply::Stored {
                version,
                created: old.is_none(),
            },
            Err(OutOfMemory) => Reply::OutOfMemory,
        }
    }

    /// Writes a value that was built in the scratch buffer, and takes the buffer back unless the value keeps it.
    fn write_built(
        &mut self,
        hash: u64,
        position: Position,
        parts: Parts<'_>,
        value: Vec<u8>,
        context: &mut Context<'_>,
    ) -> Result<Position, OutOfMemory> {
        if value.len() >= LARGE_VALUE_BYTES {
            let value = Bytes::from(value);
            let value = Value::Large(&value);
            return self.write(hash, Some(position), &Parts { value, ..parts }, context);
        }
        let small = Value::Small(&value);
        let written = self.write(hash, Some(position), &Parts { value: small, ..parts }, context);
        self.scratch = value;
        written
    }

    #[inline]
    fn write(
        &mut self,
        hash: u64,
        old: Option<Position>,
        parts: &Parts<'_>,
        context: &mut Context<'_>,
    ) -> Result<Position, OutOfMemory> {
        let written = self.store.write(context.budget, hash, old, parts);
        if self.store.evicts() {
            self.count_evicted(context.counters);
        }
        match written {
            Ok(_) => {
                context.counters.items_written += 1;
                if let Some(log) = &mut context.log {
                    log.put(&Image {
                        key: parts.key,
                        value: parts.value.bytes(),
                        flags: parts.flags,
                        deadline: parts.deadline,
                        state: parts.state & IMAGE_STATE,
                    });
                }
            }
            Err(OutOfMemory) => context.counters.out_of_memory += 1,
        }
        written
    }

    /// Notes that the item at a position has another deadline or state than it was written with.
    fn log_amended(&self, position: Position, context: &mut Context<'_>) {
        if let Some(log) = &mut context.log {
            let item = self.store.item(position);
            log.amend(item.key(), item.deadline(), item.state() & IMAGE_STATE);
        }
    }

    fn delete(&mut self, hash: u64, key: &[u8], delete: &Delete, context: &mut Context<'_>) -> Reply<'_> {
        let Some(position) = self.live(hash, key, context) else {
            context.counters.delete_misses += 1;
            return Reply::NotFound;
        };
        if let Condition::VersionIs(expected) = delete.condition
            && !matches(self.store.item(position), expected)
        {
            context.counters.delete_misses += 1;
            return Reply::VersionMismatch;
        }
        context.counters.delete_hits += 1;
        if delete.removal == Removal::Remove {
            self.store.remove(context.budget, position);
            if let Some(log) = &mut context.log {
                log.delete(key);
            }
            return Reply::Deleted(Version(0));
        }
        let version = self.version_of(delete.version);
        let amended = self.store.amend(context.budget, position, |parts| {
            parts.version = version;
            match delete.removal {
                Removal::MarkStale(deadline) => {
                    // The next reader may win the right to refresh it.
                    parts.state = parts.state & !WON | STALE;
                    parts.deadline = deadline.unwrap_or(parts.deadline);
                }
                _ => (parts.value, parts.flags) = (Value::Small(&[]), 0),
            }
        });
        if !amended {
            return Reply::OutOfMemory;
        }
        if let Removal::MarkStale(_) = delete.removal {
            self.log_amended(position, context);
        } else if let Some(log) = &mut context.log {
            let item = self.store.item(position);
            log.put(&Image {
                key,
                value: &[],
                flags: 0,
                deadline: item.deadline(),
                state: item.state() & IMAGE_STATE,
            });
        }
        Reply::Deleted(version)
    }

    fn increment(&mut self, hash: u64, key: &[u8], increment: &Increment, context: &mut Context<'_>) -> Reply<'_> {
        let old = self.live(hash, key, context);
        let counters_hits_misses = |counters: &mut Counters, hit: bool| match (increment.subtract, hit) {
            (false, true) => counters.increment_hits += 1,
            (false, false) => counters.increment_misses += 1,
            (true, true) => counters.decrement_hits += 1,
            (true, false) => counters.decrement_misses += 1,
        };
        let Some(position) = old else {
            counters_hits_misses(context.counters, false);
            let Some((initial, deadline)) = increment.create else {
                return Reply::NotFound;
            };
            let digits = Decimal::new(initial);
            let parts = Parts {
                value: Value::Small(digits.bytes()),
                deadline,
                version: self.version_of(increment.version),
                ..empty(key, context.now)
            };
            return match self.write(hash, None, &parts, context) {
                Ok(position) => Reply::Counted(
                    initial,
                    ItemView {
                        won: true,
                        ..view(self.store.item(position), context.now)
                    },
                ),
                Err(OutOfMemory) => Reply::OutOfMemory,
            };
        };
        let item = self.store.item(position);
        if let Condition::VersionIs(expected) = increment.condition
            && !matches(item, expected)
        {
            context.counters.version_mismatches += 1;
            return Reply::VersionMismatch;
        }
        let Some(number) = parse_number(item.value().bytes()) else {
            return Reply::NotANumber;
        };
        counters_hits_misses(context.counters, true);
        let result = if increment.subtract {
            number.saturating_sub(increment.delta)
        } else {
            number.wrapping_add(increment.delta)
        };
        let digits = Decimal::new(result);
        // A shorter number keeps the length of the old one, filled with blanks.
        let mut padded = [b' '; NUMBER_BYTES_MAX];
        padded[..digits.bytes().len()].copy_from_slice(digits.bytes());
        let length = digits.bytes().len().max(item.value_len());
        let (flags, deadline_before) = (item.flags(), item.deadline());
        let deadline = increment.touch.unwrap_or(deadline_before);
        let parts = Parts {
            value: Value::Small(&padded[..length]),
            flags,
            deadline,
            version: self.version_of(increment.version),
            ..empty(key, context.now)
        };
        // Counting neither reads the item nor replaces it: the marks and the time of the last access stay.
        let item = self.store.item(position);
        let parts = Parts {
            state: item.state(),
            accessed: item.accessed(),
            ..parts
        };
        match self.write(hash, Some(position), &parts, context) {
            Ok(position) => Reply::Counted(
                result,
                ItemView {
                    deadline_before,
                    ..view(self.store.item(position), context.now)
                },
            ),
            Err(OutOfMemory) => Reply::OutOfMemory,
        }
    }

    fn touch(&mut self, hash: u64, key: &[u8], deadline: Deadline, context: &mut Context<'_>) -> Reply<'_> {
        let Some(position) = self.live(hash, key, context) else {
            context.counters.touch_misses += 1;
            return Reply::NotFound;
        };
        context.counters.touch_hits += 1;
        if !self.store.touch(context.budget, position, deadline) {
            return Reply::OutOfMemory;
        }
        self.log_amended(position, context);
        self.store.mark_access(position, context.now.seconds());
        Reply::Touched
    }

    /// True when the item was written after somebody was given `version`: also when it has none, because it was overwritten
    /// since, if that version was ever given.
    fn is_newer(&self, item: ItemRef<'_>, version: Version) -> bool {
        match item.version() {
            Version(0) => version.0 <= self.last_version,
            own => own > version,
        }
    }

    fn fresh_version(&mut self) -> Version {
        self.last_version += 1;
        Version(self.last_version)
    }

    #[inline]
    fn version_of(&mut self, version: NewVersion) -> Version {
        match version {
            NewVersion::OnDemand => Version(0),
            NewVersion::Now => self.fresh_version(),
            NewVersion::Exactly(version) => version,
        }
    }
}

/// A copy of a value in memory of its own.
#[inline(never)]
fn owned(value: &[u8]) -> Result<Bytes, OutOfMemory> {
    let mut copy = Vec::new();
    copy.try_reserve_exact(value.len()).map_err(|_| OutOfMemory)?;
    copy.extend_from_slice(value);
    Ok(Bytes::from(copy))
}

fn empty(key: &[u8], now: UnixMillis) -> Parts<'_> {
    Parts {
        key,
        value: Value::Small(&[]),
        flags: 0,
        deadline: Deadline::Never,
        version: Version(0),
        accessed: Access::at(now.seconds()),
        state: 0,
    }
}

fn matches(item: ItemRef<'_>, expected: Version) -> bool {
    item.version() != Version(0) && item.version() == expected
}

#[inline(always)]
fn view(item: ItemRef<'_>, now: UnixMillis) -> ItemView<'_> {
    let state = item.state();
    ItemView {
        value: item.value(),
        flags: item.flags(),
        version: item.version(),
        deadline: item.deadline(),
        deadline_before: item.deadline(),
        accessed_s: item.accessed().seconds(now.seconds()),
        hit_before: state & FETCHED != 0,
        stale: state & STALE != 0,
        won: false,
        won_before: state & WON != 0,
        key_encoded: state & KEY_ENCODED != 0,
        charged_bytes: 0,
    }
}

/// The most digits a number of 64 bits has.
const DIGITS_MAX: usize = 20;
/// The most bytes a value that is counted on may have, leading zeros and padding included.
const NUMBER_BYTES_MAX: usize = 64;

/// A number in decimal, on the stack.
struct Decimal {
    digits: [u8; DIGITS_MAX],
    start: usize,
}

impl Decimal {
    fn new(mut number: u64) -> Self {
        let (mut digits, mut start) = ([0; DIGITS_MAX], DIGITS_MAX);
        loop {
            start -= 1;
            digits[start] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                return Self { digits, start };
            }
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.digits[self.start..]
    }
}

/// A decimal number of 64 bits at the start of a value: white space before it and anything behind white space or NUL after
/// it do not matter, because a number that shrank is padded with blanks.
fn parse_number(value: &[u8]) -> Option<u64> {
    if value.len() > NUMBER_BYTES_MAX {
        return None;
    }
    let value = value.trim_ascii_start();
    let ends = |byte: &u8| byte.is_ascii_whitespace() || *byte == 0;
    let end = value.iter().position(ends).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Pool;
    use crate::effect;

    const PARTITIONER: Partitioner = Partitioner::Hashed { seed: 5 };
    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    /// A shard with its core's part of things.
    struct World {
        shard: Shard,
        budget: Budget,
        counters: Counters,
        now: UnixMillis,
    }

    impl World {
        fn new() -> Self {
            let mut budget = Budget::new(Pool::new(1 << 30));
            Self {
                shard: Shard::new(PARTITIONER, false, NOW, &mut budget),
                budget,
                counters: Counters::default(),
                now: NOW,
            }
        }

        fn with<T>(&mut self, act: impl FnOnce(&mut Shard, &mut Context<'_>) -> T) -> T {
            let mut context = Context {
                now: self.now,
                budget: &mut self.budget,
                counters: &mut self.counters,
                value_bytes_max: 1 << 20,
                log: None,
            };
            act(&mut self.shard, &mut context)
        }

        fn restore(&mut self, effect: &Effect<'_>) {
            let key = match effect {
                Effect::Put(image) => image.key,
                Effect::Delete(key) | Effect::Amend { key, .. } => key,
                _ => panic!("of no key"),
            };
            let hash = PARTITIONER.place(key).hash;
            self.with(|shard, context| shard.restore(hash, effect, context))
                .unwrap();
        }

        /// All items, sorted.
        fn image(&mut self) -> Vec<Vec<u8>> {
            assert!(self.with(|shard, context| shard.begin_image(context)));
            let mut out = vec![];
            while !self
                .with(|shard, context| shard.image_step(100, 1 << 16, &mut out, context))
                .unwrap()
                .done
            {}
            let (mut rest, mut items) = (&out[..], vec![]);
            while !rest.is_empty() {
                let before = rest;
                effect::read(&mut rest).unwrap();
                items.push(before[..before.len() - rest.len()].to_vec());
            }
            items.sort();
            items
        }
    }

    fn image<'a>(key: &'a [u8], value: &'a [u8]) -> effect::Image<'a> {
        effect::Image {
            key,
            value,
            flags: 0,
            deadline: Deadline::Never,
            state: 0,
        }
    }

    /// An image brings back a shard with every field, in memory as it was, and counts no request.
    #[test]
    fn an_image_restores_a_shard() {
        let mut one = World::new();
        for number in 0..3000u32 {
            let (key, value) = (format!("key{number}"), vec![number as u8; number as usize * 3]);
            one.restore(&Effect::Put(effect::Image {
                flags: number % 3,
                deadline: match number % 4 {
                    0 => Deadline::Never,
                    more => Deadline::At(UnixMillis(NOW.0 + u64::from(more) * 1000)),
                },
                // Not all of these bits are an image's.
                state: number as u8,
                ..image(key.as_bytes(), &value)
            }));
        }
        assert_eq!(one.counters.sets, 0);
        let items = one.image();
        assert_eq!(items.len(), 3000);
        let mut other = World::new();
        for item in &items {
            let effect = effect::read(&mut &item[..]).unwrap();
            let Effect::Put(image) = effect else { panic!("an item") };
            assert_eq!(image.state & !IMAGE_STATE, 0);
            other.restore(&effect);
            // Twice is as good as once.
            other.restore(&effect);
        }
        assert_eq!(other.image(), items);
        assert_eq!(other.shard.store.payload_bytes(), one.shard.store.payload_bytes());
        let hash = PARTITIONER.place(b"key2000").hash;
        let command = Command {
            key: b"key2000",
            op: Op::Get {
                version: false,
                effects: None,
            },
        };
        let large = other.with(|shard, context| match shard.execute(hash, &command, context) {
            Reply::Found(found) => matches!(found.value, Value::Large(value) if value.len() == 6000),
            _ => false,
        });
        assert!(large, "in memory of its own");
        // A second later, a quarter of them is over.
        other.now = UnixMillis(NOW.0 + 1000);
        assert_eq!(other.image().len(), 2250);
        let mut later = World::new();
        later.now = other.now;
        for item in &items {
            later.restore(&effect::read(&mut &item[..]).unwrap());
        }
        assert_eq!(later.shard.store.len(), 2250);
    }

    /// What was done to a key since takes the place of what was there.
    #[test]
    fn later_effects_follow() {
        let mut world = World::new();
        let over = Deadline::At(NOW);
        let later = Deadline::At(UnixMillis(NOW.0 + 5));
        for key in [&b"a"[..], b"b", b"c", b"d", b"e"] {
            world.restore(&Effect::Put(image(key, b"value")));
        }
        world.restore(&Effect::Delete(b"a"));
        world.restore(&Effect::Delete(b"none"));
        world.restore(&Effect::Put(effect::Image {
            deadline: over,
            ..image(b"b", b"newer")
        }));
        world.restore(&Effect::Amend {
            key: b"c",
            deadline: over,
            state: 0,
        });
        world.restore(&Effect::Amend {
            key: b"d",
            deadline: later,
            state: STALE | WON,
        });
        world.restore(&Effect::Amend {
            key: b"none",
            deadline: later,
            state: 0,
        });
        world.restore(&Effect::Put(image(b"e", b"another")));
        let mut expected = [vec![], vec![]];
        effect::push_put(
            &mut expected[0],
            &effect::Image {
                deadline: later,
                state: STALE | WON,
                ..image(b"d", b"value")
            },
        );
        effect::push_put(&mut expected[1], &image(b"e", b"another"));
        expected.sort();
        assert_eq!(world.image(), expected);
        assert!(!world.with(|shard, context| shard.flush(context)));
        assert_eq!(world.image(), Vec::<Vec<u8>>::new());
    }
}
