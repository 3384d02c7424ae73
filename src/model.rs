//! The neutral command model: what every protocol decodes to and encodes from.
//!
//! No word of a wire protocol appears here. A [`Command`] borrows its key and small values from the connection's input,
//! a [`Reply`] borrows from the store, so a request that is served by the core that received it allocates nothing.

use bytes::Bytes;

/// Index of a core: one thread, one executor. Dense from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CoreId(pub u16);

/// Index of a key-range shard. Dense from 0, in token order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShardId(pub u16);

/// Opaque match token of an item's present value; 0 stands for "none given yet" and matches nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Version(pub u64);

/// A moment in milliseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct UnixMillis(pub u64);

impl UnixMillis {
    /// This moment plus `seconds`, saturating.
    pub fn plus_seconds(self, seconds: u64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1000)))
    }

    /// Whole seconds since the epoch, as items store their last access.
    pub fn seconds(self) -> u32 {
        (self.0 / 1000) as u32
    }
}

/// When an item ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Deadline {
    /// It stays until it is deleted.
    #[default]
    Never,
    /// It is gone from this moment on. A moment in the past means: gone at once.
    At(UnixMillis),
}

impl Deadline {
    /// True when an item with this deadline no longer exists at `now`.
    pub fn is_over(self, now: UnixMillis) -> bool {
        matches!(self, Deadline::At(moment) if moment <= now)
    }

    /// Remaining seconds, to the nearest, and at least one while the item lives; `None` for an item that stays. Not rounded
    /// up: the clock of the core that set the deadline may be a moment ahead of the one that asks.
    pub fn remaining_seconds(self, now: UnixMillis) -> Option<u64> {
        match self {
            Deadline::Never => None,
            Deadline::At(moment) => Some(((moment.0.saturating_sub(now.0) + 500) / 1000).max(1)),
        }
    }
}

/// What must hold for a write to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Condition {
    /// Nothing: write in any case.
    #[default]
    Always,
    /// The key has no item.
    Absent,
    /// The key has an item.
    Present,
    /// The key has an item of exactly this version.
    VersionIs(Version),
}

/// Values of this many bytes and more are kept by reference: never copied again after they were received.
pub const LARGE_VALUE_BYTES: usize = 4096;

/// A value on its way in or out.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// Bytes to copy.
    Small(&'a [u8]),
    /// A reference-counted value; taking it costs a counter increment.
    Large(&'a Bytes),
}

impl<'a> Value<'a> {
    /// A value that was collected into memory of its own: kept there when it is large.
    pub fn collected(bytes: &'a Bytes) -> Self {
        if bytes.len() >= LARGE_VALUE_BYTES {
            Value::Large(bytes)
        } else {
            Value::Small(bytes)
        }
    }

    /// The bytes themselves.
    pub fn bytes(&self) -> &'a [u8] {
        match *self {
            Value::Small(bytes) => bytes,
            Value::Large(bytes) => bytes,
        }
    }
}

/// The version that a write gives an item. Versions are opaque and never repeat, also not after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum NewVersion {
    /// None until somebody asks, so that it costs no memory; what had one before has one no longer.
    #[default]
    OnDemand,
    /// A fresh one, because the reply carries it.
    Now,
    /// This one, by the client's wish.
    Exactly(Version),
}

/// How a [`Put`] combines its value with the one that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Combine {
    /// The new value takes the place of the old.
    #[default]
    Replace,
    /// The new bytes go behind the old ones; flags and deadline of the item stay.
    Append,
    /// The new bytes go before the old ones; flags and deadline of the item stay.
    Prepend,
}

/// Writes a value.
#[derive(Clone, Copy, Debug)]
pub struct Put<'a> {
    /// The bytes to store.
    pub value: Value<'a>,
    /// Opaque to the server; protocols give them back as they came.
    pub flags: u32,
    /// When the item ends.
    pub deadline: Deadline,
    /// How the value meets an old one.
    pub combine: Combine,
    /// When to write at all.
    pub condition: Condition,
    /// The version it gets.
    pub version: NewVersion,
    /// With `VersionIs(v)` and an item newer than `v`: write all the same, but mark the item stale.
    pub accept_as_stale: bool,
    /// `Append`/`Prepend` to a missing item creates it with this deadline.
    pub create: Option<Deadline>,
    /// The client wrote the key in an encoded form and wants it shown so.
    pub key_encoded: bool,
}

impl<'a> Put<'a> {
    /// Stores `value` for good, whatever was there.
    #[inline]
    pub fn new(value: Value<'a>) -> Self {
        Self {
            value,
            flags: 0,
            deadline: Deadline::Never,
            combine: Combine::Replace,
            condition: Condition::Always,
            version: NewVersion::OnDemand,
            accept_as_stale: false,
            create: None,
            key_encoded: false,
        }
    }
}

/// What happens to the item that a [`Delete`] hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Removal {
    /// The item goes.
    #[default]
    Remove,
    /// The item stays, marked stale and with a new version; optionally with a new deadline.
    MarkStale(Option<Deadline>),
    /// The item stays with an empty value and no flags.
    ClearValue,
}

/// Removes an item, or what makes it useful.
#[derive(Clone, Copy, Debug, Default)]
pub struct Delete {
    /// When to do so.
    pub condition: Condition,
    /// What to do.
    pub removal: Removal,
    /// The version that an item which stays gets.
    pub version: NewVersion,
}

/// Adds to, or subtracts from, a value that is a decimal number.
#[derive(Clone, Copy, Debug)]
pub struct Increment {
    /// By how much.
    pub delta: u64,
    /// Subtract (stopping at zero) instead of adding (wrapping at 2^64).
    pub subtract: bool,
    /// Create a missing item with this value and deadline.
    pub create: Option<(u64, Deadline)>,
    /// Give the item this deadline.
    pub touch: Option<Deadline>,
    /// When to do so.
    pub condition: Condition,
    /// The version it gets.
    pub version: NewVersion,
}

/// What a [`Op::Get`] changes beside reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GetEffects {
    /// Give the item this deadline.
    pub touch: Option<Deadline>,
    /// Create a missing item, empty, with this deadline and version; its creator is told that it won.
    pub create: Option<(Deadline, NewVersion)>,
    /// When fewer than this many seconds remain, one reader is told that it won the right to refresh the item.
    pub refresh_below_s: Option<u32>,
    /// Leave the access marks (hit before, last access) as they are.
    pub keep_access: bool,
}

/// What to do with one key.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// Read. `version`: the reply must carry one, so an item without gets one.
    Get {
        /// The reply needs the item's version.
        version: bool,
        /// Side effects; `None` on the hot path.
        effects: Option<GetEffects>,
    },
    /// Write.
    Put(Put<'a>),
    /// Remove.
    Delete(Delete),
    /// Count.
    Increment(Increment),
    /// Give the item a new deadline.
    Touch(Deadline),
    /// Read the item's bookkeeping without any effect on it.
    Inspect,
}

/// The classes that latency is recorded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Class {
    /// Reads.
    Get = 0,
    /// Writes.
    Set = 1,
    /// Removals.
    Delete = 2,
    /// Increments.
    Count = 3,
    /// Deadline changes.
    Touch = 4,
    /// Everything that is not about one key.
    Other = 5,
}

impl Class {
    /// All classes, in the order of their numbers.
    pub const ALL: [Class; 6] = [
        Class::Get,
        Class::Set,
        Class::Delete,
        Class::Count,
        Class::Touch,
        Class::Other,
    ];

    /// The name in statistics.
    pub fn name(self) -> &'static str {
        ["get", "set", "delete", "count", "touch", "other"][self as usize]
    }
}

impl Op<'_> {
    /// The class that this operation's latency counts to.
    pub fn class(&self) -> Class {
        match self {
            Op::Get { .. } | Op::Inspect => Class::Get,
            Op::Put(_) => Class::Set,
            Op::Delete(_) => Class::Delete,
            Op::Increment(_) => Class::Count,
            Op::Touch(_) => Class::Touch,
        }
    }
}

/// A request for one key, complete.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// 1 to `key_bytes_max` bytes.
    pub key: &'a [u8],
    /// What to do with it.
    pub op: Op<'a>,
}

impl Command<'_> {
    /// It changes nothing that another command could see.
    pub fn only_reads(&self) -> bool {
        matches!(self.op, Op::Get { effects: None, .. } | Op::Inspect)
    }

    /// Its client asks for a change. What a read leaves behind by itself is none: that the item was read, and when, and the
    /// version or the right to refresh it that this reader was given.
    pub fn asks_for_a_change(&self) -> bool {
        match &self.op {
            Op::Inspect | Op::Get { effects: None, .. } => false,
            Op::Get {
                effects: Some(effects), ..
            } => effects.touch.is_some() || effects.create.is_some() || effects.refresh_below_s.is_some(),
            Op::Put(_) | Op::Delete(_) | Op::Increment(_) | Op::Touch(_) => true,
        }
    }
}

/// What must hold of a key.
#[derive(Clone, Copy, Debug)]
pub struct Check<'a> {
    /// 1 to `key_bytes_max` bytes.
    pub key: &'a [u8],
    /// It holds, or it does not.
    pub condition: Condition,
}

/// Commands that are executed together, at one instant: what stands for success when all checks hold, else what stands for
/// failure. What is executed is read, written without a condition, or deleted.
#[derive(Clone, Copy, Debug)]
pub struct Transaction<'a> {
    /// What decides.
    pub checks: &'a [Check<'a>],
    /// Executed when all checks hold.
    pub success: &'a [Command<'a>],
    /// Executed when one does not.
    pub failure: &'a [Command<'a>],
}

/// How a [`Transaction`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum TxnEnd {
    /// All checks held.
    Success = 0,
    /// One did not.
    Failure,
    /// There was not enough memory within the limit. Nothing was executed.
    OutOfMemory,
    /// The values it would read are too large together. Nothing was executed.
    TooLarge,
    /// It has a write, and a core that it concerns takes none. Nothing was executed.
    ReadOnly,
    /// A log that it concerns cannot be written. What was executed, if anything was, may be lost or come back, as a whole.
    NotDurable,
}

impl TxnEnd {
    /// All of them, in the order of their numbers.
    pub const ALL: [TxnEnd; 6] = [
        TxnEnd::Success,
        TxnEnd::Failure,
        TxnEnd::OutOfMemory,
        TxnEnd::TooLarge,
        TxnEnd::ReadOnly,
        TxnEnd::NotDurable,
    ];
}

/// What is collected beside counters: it is large, or takes work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Histograms of latency.
    pub latencies: bool,
    /// The hottest keys.
    pub hot_keys: bool,
    /// The last slow requests.
    pub slow_log: bool,
}

/// A request that concerns every shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broadcast {
    /// Empty the store, at once or when the moment comes.
    Flush(Option<UnixMillis>),
    /// Collect counters, and what else is wanted.
    Metrics(Wanted),
    /// Set the counters to zero.
    ResetMetrics,
    /// List the connections.
    Connections,
    /// Turn the statistics by key prefix on (from zero) or off.
    PrefixStats(bool),
    /// Collect the statistics by key prefix.
    PrefixDump,
    /// Begin a snapshot of the data directory.
    Snapshot,
}

/// An item as a read shows it.
#[derive(Clone, Copy, Debug)]
pub struct ItemView<'a> {
    /// The value.
    pub value: Value<'a>,
    /// As stored by the client.
    pub flags: u32,
    /// 0 unless the command asked for it.
    pub version: Version,
    /// When the item ends.
    pub deadline: Deadline,
    /// When it would have ended without this command.
    pub deadline_before: Deadline,
    /// Unix seconds of the access before this one.
    pub accessed_s: u32,
    /// It had been read before this access.
    pub hit_before: bool,
    /// It was invalidated and not yet replaced.
    pub stale: bool,
    /// This reader is the one that may refresh it, or created it.
    pub won: bool,
    /// Another reader has that right already.
    pub won_before: bool,
    /// Its writer gave the key in an encoded form.
    pub key_encoded: bool,
    /// Bytes of memory the item is charged with.
    pub charged_bytes: usize,
}

/// What came of a [`Command`].
#[derive(Clone, Copy, Debug)]
pub enum Reply<'a> {
    /// The item.
    Found(ItemView<'a>),
    /// The key has no item.
    NotFound,
    /// Written.
    Stored {
        /// 0 unless it was given by this write.
        version: Version,
        /// The key had no item before.
        created: bool,
    },
    /// The condition on presence did not hold.
    NotStored,
    /// The condition on the version did not hold.
    VersionMismatch,
    /// Removed, or marked; the version is 0 unless it was given by this command.
    Deleted(Version),
    /// The deadline was changed.
    Touched,
    /// The number after counting, with the item it is now.
    Counted(u64, ItemView<'a>),
    /// The value is not a decimal number of 64 bits.
    NotANumber,
    /// No memory within the limit.
    OutOfMemory,
    /// Appending would make a value over the limit.
    TooLarge,
    /// Its owner takes no writes. Nothing was changed.
    ReadOnly,
    /// Its owner's log cannot be written. What was asked, or what there is to read, may be lost or come back; or the server has no
    /// log, and nothing was done.
    NotDurable,
}
