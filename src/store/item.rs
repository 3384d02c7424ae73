//! One item in memory: a run of bytes whose first one says which fields it has.
//!
//! ```text
//! 0       marks            which of the fields below there are, and whether the item was read since it was written
//! 1..3    last access      13 bits, in units of 64 seconds; above them the item's standing: three bits
//! 3       key length       u8; LONG_KEY: u16
//!         value length     u8; LONG_VALUE: u16; LARGE: none
//! LARGE:  padding up to 8, then a `bytes::Bytes`: the value is referenced, and the item begins at a multiple of 8
//! STATE:  u8    FLAGS: u32    DEADLINE: u64, milliseconds    VERSION: u64
//! key, then (unless LARGE) value
//! ```
//! Nothing is aligned but the `Bytes`. A field that an item does not use costs nothing: an item of 19 bytes of key and 32 of
//! value takes 56.

use crate::model::{Deadline, UnixMillis, Value, Version};
use bytes::Bytes;
use std::marker::PhantomData;
use std::ptr::NonNull;

const FLAGS: u8 = 1;
const DEADLINE: u8 = 2;
const VERSION: u8 = 4;
const LARGE: u8 = 8;
const STATE: u8 = 16;
const LONG_KEY: u8 = 32;
const LONG_VALUE: u8 = 64;
const READ: u8 = 128;

/// The item was invalidated and not replaced yet.
pub(crate) const STALE: u8 = 1;
/// Somebody was told that it may refresh the item.
pub(crate) const WON: u8 = 2;
/// Its writer gave the key in an encoded form.
pub(crate) const KEY_ENCODED: u8 = 4;
/// The item has been read since it was written. The one state that has its place in any item.
pub(crate) const FETCHED: u8 = 8;

const ACCESS_AT: usize = 1;
const KEY_LENGTH_AT: usize = 3;
const LARGE_AT: usize = 8;

/// When an item was last used, to 64 seconds; good for six days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access(u16);

impl Access {
    const UNIT_S: u32 = 64;
    const BITS: u32 = 13;
    const MASK: u16 = (1 << Self::BITS) - 1;

    /// At this moment, in Unix seconds.
    #[inline]
    pub(crate) fn at(now_s: u32) -> Self {
        Self((now_s / Self::UNIT_S) as u16 & Self::MASK)
    }

    /// Seconds from this moment to a later one, to 64 seconds.
    pub(crate) fn seconds_until(self, later: Self) -> u32 {
        u32::from(later.0.wrapping_sub(self.0) & Self::MASK) * Self::UNIT_S
    }

    /// The moment, in Unix seconds, seen from a later one: not before the truth, and within a unit of it.
    pub(crate) fn seconds(self, now_s: u32) -> u32 {
        let passed_s = self
            .seconds_until(Self::at(now_s))
            .min(now_s / Self::UNIT_S * Self::UNIT_S);
        let end = now_s / Self::UNIT_S * Self::UNIT_S - passed_s + (Self::UNIT_S - 1);
        end.min(now_s)
    }
}

/// What is known of an item for the choice of what to evict: whether it is one of the main part, and how often, up to three
/// times, it was used since that was last asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing(u16);

impl Standing {
    const MAIN: u16 = 1 << Access::BITS;
    const USE: u16 = 2 << Access::BITS;

    /// In the main part, and not used there yet.
    pub(crate) const NEW_IN_MAIN: Self = Self(Self::MAIN);

    pub(crate) fn is_main(self) -> bool {
        self.0 & Self::MAIN != 0
    }

    /// 0 to 3.
    pub(crate) fn uses(self) -> u16 {
        self.0 / Self::USE
    }

    /// Used once more.
    #[inline]
    pub(crate) fn used(self) -> Self {
        match self.0.checked_add(Self::USE) {
            Some(more) => Self(more),
            None => self,
        }
    }

    /// One use less.
    pub(crate) fn forgiven(self) -> Self {
        Self(self.0.checked_sub(Self::USE).unwrap_or(self.0))
    }
}

/// What an item is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: Value<'a>,
    pub(crate) flags: u32,
    pub(crate) deadline: Deadline,
    pub(crate) version: Version,
    pub(crate) accessed: Access,
    /// Any of STALE, WON, FETCHED, KEY_ENCODED.
    pub(crate) state: u8,
}

impl Parts<'_> {
    fn marks(&self) -> u8 {
        let mark = |present, mark| if present { mark } else { 0 };
        let value = match self.value {
            Value::Large(_) => LARGE,
            Value::Small(bytes) => mark(bytes.len() > usize::from(u8::MAX), LONG_VALUE),
        };
        value
            | mark(self.key.len() > usize::from(u8::MAX), LONG_KEY)
            | mark(self.flags != 0, FLAGS)
            | mark(self.deadline != Deadline::Never, DEADLINE)
            | mark(self.version != Version(0), VERSION)
            | mark(self.state & !FETCHED != 0, STATE)
            | mark(self.state & FETCHED != 0, READ)
    }

    /// How many bytes the item takes, without a value that it refers to.
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        let inline = match self.value {
            Value::Small(bytes) => bytes.len(),
            Value::Large(_) => 0,
        };
        room(key_offset(self.marks()) + self.key.len() + inline, self.marks())
    }

    /// Bytes of key and value.
    #[inline]
    pub(crate) fn payload_bytes(&self) -> usize {
        self.key.len() + self.value.bytes().len()
    }

    /// Bytes of the value that the item refers to; 0 when it holds the value itself.
    #[inline]
    pub(crate) fn referenced_bytes(&self) -> usize {
        match self.value {
            Value::Small(_) => 0,
            Value::Large(bytes) => bytes.len(),
        }
    }
}

/// An item with a reference takes a multiple of 8, so that it gets a slot that begins at one.
#[inline]
fn room(bytes: usize, marks: u8) -> usize {
    if marks & LARGE != 0 {
        bytes.next_multiple_of(8)
    } else {
        bytes
    }
}

const fn has(marks: u8, mark: u8) -> usize {
    (marks & mark != 0) as usize
}

const fn fields_offset(marks: u8) -> usize {
    if marks & LARGE != 0 {
        return LARGE_AT + size_of::<Bytes>();
    }
    KEY_LENGTH_AT + 1 + has(marks, LONG_KEY) + 1 + has(marks, LONG_VALUE)
}

const fn flags_offset(marks: u8) -> usize {
    fields_offset(marks) + has(marks, STATE)
}

const fn deadline_offset(marks: u8) -> usize {
    flags_offset(marks) + 4 * has(marks, FLAGS)
}

const fn version_offset(marks: u8) -> usize {
    deadline_offset(marks) + 8 * has(marks, DEADLINE)
}

/// By marks: where the key begins.
const KEY_OFFSETS: [u8; 256] = {
    let mut offsets = [0; 256];
    let mut marks = 0;
    while marks < 256 {
        offsets[marks] = (version_offset(marks as u8) + 8 * has(marks as u8, VERSION)) as u8;
        marks += 1;
    }
    offsets
};

#[inline]
fn key_offset(marks: u8) -> usize {
    usize::from(KEY_OFFSETS[usize::from(marks)])
}

/// Writes an item.
///
/// # Safety
/// `start` leads to `parts.bytes()` bytes of memory, begins at a multiple of 8 when the value is referenced, nothing refers
/// to that memory, `parts` does not point into it, and a reference that it held was dropped.
#[inline(always)]
pub(crate) unsafe fn write(start: NonNull<u8>, parts: &Parts<'_>, standing: Standing) {
    let marks = parts.marks();
    let start = start.as_ptr();
    // SAFETY: `parts.bytes()` covers each offset below by construction of the offset functions; the rest is as the caller
    // promises.
    unsafe {
        let put = |at: usize, bytes: &[u8]| std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.add(at), bytes.len());
        start.write(marks);
        put(ACCESS_AT, &(parts.accessed.0 | standing.0).to_le_bytes());
        // A short length is written as a long one: its second byte is part of what follows, and that is written later.
        put(KEY_LENGTH_AT, &(parts.key.len() as u16).to_le_bytes());
        let key = start.add(key_offset(marks));
        match parts.value {
            Value::Small(value) => {
                let length = (value.len() as u16).to_le_bytes();
                put(KEY_LENGTH_AT + 1 + has(marks, LONG_KEY), &length);
                std::ptr::copy_nonoverlapping(value.as_ptr(), key.add(parts.key.len()), value.len());
            }
            Value::Large(bytes) => start.add(LARGE_AT).cast::<Bytes>().write(bytes.clone()),
        }
        if marks & STATE != 0 {
            put(fields_offset(marks), &[parts.state & !FETCHED]);
        }
        if marks & FLAGS != 0 {
            put(flags_offset(marks), &parts.flags.to_le_bytes());
        }
        if let Deadline::At(moment) = parts.deadline {
            put(deadline_offset(marks), &moment.0.to_le_bytes());
        }
        if marks & VERSION != 0 {
            put(version_offset(marks), &parts.version.0.to_le_bytes());
        }
        std::ptr::copy_nonoverlapping(parts.key.as_ptr(), key, parts.key.len());
    }
}

/// Takes out what the item refers to. Its memory may be used for something else then.
///
/// # Safety
/// `start` leads to an item, and nobody refers to it from now on.
#[inline]
pub(crate) unsafe fn take_reference(start: NonNull<u8>) -> Option<Bytes> {
    // SAFETY: an item begins with its marks; with LARGE, `write` put a `Bytes` there, which is taken once.
    unsafe { (start.read() & LARGE != 0).then(|| start.add(LARGE_AT).cast::<Bytes>().read()) }
}

/// A borrowed item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ItemRef<'a> {
    start: NonNull<u8>,
    life: PhantomData<&'a u8>,
}

impl<'a> ItemRef<'a> {
    /// The item at an address.
    ///
    /// # Safety
    /// [`write()`] wrote it there; it stays, and nothing changes it, for `'a`.
    #[inline]
    pub(crate) unsafe fn at(start: NonNull<u8>) -> Self {
        Self {
            start,
            life: PhantomData,
        }
    }

    #[inline]
    fn field<const N: usize>(self, at: usize) -> [u8; N] {
        // SAFETY: asked only for offsets at which the marks say that there are N bytes of a field.
        unsafe { self.start.add(at).cast::<[u8; N]>().read() }
    }

    #[inline]
    fn marks(self) -> u8 {
        let [marks] = self.field(0);
        marks
    }

    #[inline]
    fn length(self, at: usize, long: bool) -> usize {
        if long {
            usize::from(u16::from_le_bytes(self.field(at)))
        } else {
            let [length] = self.field(at);
            usize::from(length)
        }
    }

    #[inline]
    fn key_len(self) -> usize {
        self.length(KEY_LENGTH_AT, self.marks() & LONG_KEY != 0)
    }

    /// How many bytes the value has that the item holds itself.
    #[inline]
    pub(crate) fn small_value_len(self) -> usize {
        let marks = self.marks();
        self.length(KEY_LENGTH_AT + 1 + has(marks, LONG_KEY), marks & LONG_VALUE != 0)
    }

    /// Parts of the same room can be written in its place without further ado: neither refers to anything.
    #[inline]
    pub(crate) fn is_as_large_as(self, parts: &Parts<'_>) -> bool {
        self.marks() & LARGE == 0 && !matches!(parts.value, Value::Large(_)) && self.bytes() == parts.bytes()
    }

    /// How many bytes the value has.
    #[inline]
    pub(crate) fn value_len(self) -> usize {
        self.value().bytes().len()
    }

    /// It refers to the same bytes, not only to equal ones.
    pub(crate) fn refers_to(self, value: Value<'_>) -> bool {
        matches!((self.value(), value), (Value::Large(own), Value::Large(other)) if std::ptr::eq(&own[..], &other[..]))
    }

    /// The value that it refers to is referred to by others, too.
    pub(crate) fn is_shared(self) -> bool {
        matches!(self.value(), Value::Large(bytes) if !bytes.is_unique())
    }

    /// See [`Parts::payload_bytes`].
    #[inline]
    pub(crate) fn payload_bytes(self) -> usize {
        self.key_len() + self.value_len()
    }

    /// It has been read since it was written.
    pub(crate) fn was_read(self) -> bool {
        self.marks() & READ != 0
    }

    /// See [`Parts::bytes`].
    #[inline]
    pub(crate) fn bytes(self) -> usize {
        let marks = self.marks();
        let inline = if marks & LARGE != 0 { 0 } else { self.small_value_len() };
        room(key_offset(marks) + self.key_len() + inline, marks)
    }

    /// See [`Parts::referenced_bytes`].
    #[inline]
    pub(crate) fn referenced_bytes(self) -> usize {
        if self.marks() & LARGE != 0 { self.value_len() } else { 0 }
    }

    #[inline]
    pub(crate) fn key(self) -> &'a [u8] {
        // SAFETY: `write` wrote `key_len` bytes there; they stay for `'a`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(key_offset(self.marks())), self.key_len()) }
    }

    #[inline]
    pub(crate) fn value(self) -> Value<'a> {
        let marks = self.marks();
        if marks & LARGE != 0 {
            // SAFETY: with LARGE, `write` wrote a `Bytes` there, and the item begins at a multiple of 8.
            return Value::Large(unsafe { self.start.add(LARGE_AT).cast::<Bytes>().as_ref() });
        }
        let at = key_offset(marks) + self.key_len();
        // SAFETY: without LARGE, `write` wrote the value behind the key.
        Value::Small(unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), self.small_value_len()) })
    }

    #[inline]
    pub(crate) fn flags(self) -> u32 {
        let marks = self.marks();
        if marks & FLAGS == 0 {
            return 0;
        }
        u32::from_le_bytes(self.field(flags_offset(marks)))
    }

    #[inline]
    pub(crate) fn deadline(self) -> Deadline {
        let marks = self.marks();
        if marks & DEADLINE == 0 {
            return Deadline::Never;
        }
        Deadline::At(UnixMillis(u64::from_le_bytes(self.field(deadline_offset(marks)))))
    }

    #[inline]
    pub(crate) fn version(self) -> Version {
        let marks = self.marks();
        if marks & VERSION == 0 {
            return Version(0);
        }
        Version(u64::from_le_bytes(self.field(version_offset(marks))))
    }

    #[inline]
    pub(crate) fn accessed(self) -> Access {
        Access(u16::from_le_bytes(self.field(ACCESS_AT)) & Access::MASK)
    }

    #[inline]
    pub(crate) fn standing(self) -> Standing {
        Standing(u16::from_le_bytes(self.field(ACCESS_AT)) & !Access::MASK)
    }

    /// The state bits that are set.
    #[inline]
    pub(crate) fn state(self) -> u8 {
        let marks = self.marks();
        let rare = if marks & STATE != 0 {
            let [state] = self.field(fields_offset(marks));
            state
        } else {
            0
        };
        rare | if marks & READ != 0 { FETCHED } else { 0 }
    }

    /// All parts, to make a changed copy from.
    pub(crate) fn parts(self) -> Parts<'a> {
        Parts {
            key: self.key(),
            value: self.value(),
            flags: self.flags(),
            deadline: self.deadline(),
            version: self.version(),
            accessed: self.accessed(),
            state: self.state(),
        }
    }
}

/// An item borrowed to be changed in place.
#[derive(Debug)]
pub(crate) struct ItemMut<'a> {
    start: NonNull<u8>,
    life: PhantomData<&'a mut u8>,
}

impl ItemMut<'_> {
    /// The item at an address.
    ///
    /// # Safety
    /// [`write()`] wrote it there; it stays for `'a`, and nothing else refers to it meanwhile.
    #[inline]
    pub(crate) unsafe fn at(start: NonNull<u8>) -> Self {
        Self {
            start,
            life: PhantomData,
        }
    }

    #[inline]
    fn view(&self) -> ItemRef<'_> {
        ItemRef {
            start: self.start,
            life: PhantomData,
        }
    }

    #[inline]
    fn put(&mut self, at: usize, bytes: &[u8]) {
        // SAFETY: called only for offsets at which the marks say that there are so many bytes of a field, and nothing else
        // refers to the item.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(at), bytes.len()) };
    }

    /// Changes the deadline in place; false, and nothing changed, when the item has no field for it or needs none.
    pub(crate) fn set_deadline(&mut self, deadline: Deadline) -> bool {
        let marks = self.view().marks();
        let (Deadline::At(moment), true) = (deadline, marks & DEADLINE != 0) else {
            return deadline == Deadline::Never && marks & DEADLINE == 0;
        };
        self.put(deadline_offset(marks), &moment.0.to_le_bytes());
        true
    }

    /// Notes an access; writes only what changes, so that a hot item's cache line stays clean.
    #[inline]
    pub(crate) fn mark_access(&mut self, accessed: Access) {
        let standing = self.view().standing().used();
        if (self.view().accessed(), self.view().standing()) != (accessed, standing) {
            self.put(ACCESS_AT, &(accessed.0 | standing.0).to_le_bytes());
        }
        let marks = self.view().marks();
        if marks & READ == 0 {
            self.put(0, &[marks | READ]);
        }
    }

    /// Gives it another standing.
    pub(crate) fn set_standing(&mut self, standing: Standing) {
        let accessed = self.view().accessed();
        self.put(ACCESS_AT, &(accessed.0 | standing.0).to_le_bytes());
    }

    /// Sets and clears state bits; false, and nothing changed, when the item has no field for those that are set.
    pub(crate) fn set_state(&mut self, set: u8, clear: u8) -> bool {
        let marks = self.view().marks();
        let state = self.view().state() & !clear | set;
        if marks & STATE == 0 && state & !FETCHED != 0 {
            return false;
        }
        if marks & STATE != 0 {
            self.put(fields_offset(marks), &[state & !FETCHED]);
        }
        let read = if state & FETCHED != 0 { READ } else { 0 };
        self.put(0, &[marks & !READ | read]);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory for one item.
    struct Room(Vec<u64>);

    impl Room {
        fn with(parts: &Parts<'_>) -> Self {
            let mut room = Self(vec![0; parts.bytes().div_ceil(8)]);
            // SAFETY: the room is made for these parts, and aligned to 8.
            unsafe { write(room.start(), parts, Standing::default()) };
            room
        }

        fn start(&mut self) -> NonNull<u8> {
            NonNull::new(self.0.as_mut_ptr().cast()).unwrap()
        }
    }

    impl Drop for Room {
        fn drop(&mut self) {
            // SAFETY: an item lies there, and goes with the room.
            drop(unsafe { take_reference(self.start()) });
        }
    }

    /// Every combination of optional fields gives back what was put in, and drops what it refers to (Miri watches).
    #[test]
    fn every_layout_round_trips() {
        let large = Bytes::from(vec![3; 5000]);
        let small = vec![7; 300];
        for bits in 0..64u32 {
            for (key, value) in [(&b"k"[..], &b"value"[..]), (&[0xff; 250], b""), (&[9; 256], &small)] {
                let on = |bit: u32| bits >> bit & 1 != 0;
                let parts = Parts {
                    key,
                    value: if on(0) {
                        Value::Large(&large)
                    } else {
                        Value::Small(value)
                    },
                    flags: if on(1) { 77 } else { 0 },
                    deadline: if on(2) {
                        Deadline::At(UnixMillis(1 << 40))
                    } else {
                        Deadline::Never
                    },
                    version: Version(if on(3) { u64::MAX } else { 0 }),
                    accessed: Access::at(500),
                    state: if on(4) { STALE } else { 0 } | if on(5) { FETCHED } else { 0 },
                };
                let mut room = Room::with(&parts);
                let start = room.start();
                // SAFETY: an item lies there; views are not used any more when it is changed.
                let view = unsafe { ItemRef::at(start) };
                assert_eq!((view.key(), view.value().bytes()), (key, parts.value.bytes()));
                assert_eq!((view.flags(), view.deadline()), (parts.flags, parts.deadline));
                assert_eq!((view.version(), view.accessed()), (parts.version, parts.accessed));
                assert_eq!((view.state(), view.bytes()), (parts.state, parts.bytes()));
                assert_eq!(view.referenced_bytes(), parts.referenced_bytes());
                // SAFETY: as above.
                let mut change = unsafe { ItemMut::at(start) };
                assert_eq!(change.set_state(WON, STALE), on(4));
                change.mark_access(Access::at(900));
                assert_eq!(change.set_deadline(Deadline::At(UnixMillis(5))), on(2));
                assert_eq!(change.set_deadline(Deadline::Never), !on(2));
                // SAFETY: an item lies there; views are not used any more when it is changed.
                let view = unsafe { ItemRef::at(start) };
                assert_eq!(view.state(), FETCHED | if on(4) { WON } else { 0 });
                assert_eq!((view.accessed(), view.standing().uses()), (Access::at(900), 1));
                assert_eq!((view.key(), view.value().bytes()), (key, parts.value.bytes()));
            }
        }
    }

    #[test]
    fn small_items_are_small() {
        let parts = Parts {
            key: &[b'k'; 19],
            value: Value::Small(&[b'v'; 32]),
            flags: 0,
            deadline: Deadline::Never,
            version: Version(0),
            accessed: Access::at(0),
            state: FETCHED,
        };
        assert_eq!(parts.bytes(), 19 + 32 + 5);
    }

    #[test]
    fn access_times() {
        let now = 1_800_000_000u32;
        for ago in [0, 1, 63, 64, 65, 1000, 86_400, 6 * 86_400] {
            let seen = Access::at(now - ago).seconds(now);
            assert!(
                seen >= now - ago && seen - (now - ago) < 64 && seen <= now,
                "{ago} {seen}"
            );
        }
        assert_eq!(Access::at(10).seconds(20), 20);
    }

    #[test]
    fn standings() {
        let mut standing = Standing::NEW_IN_MAIN;
        for uses in [1, 2, 3, 3] {
            standing = standing.used();
            assert_eq!((standing.uses(), standing.is_main()), (uses, true));
        }
        for uses in [2, 1, 0, 0] {
            standing = standing.forgiven();
            assert_eq!((standing.uses(), standing.is_main()), (uses, true));
        }
        assert!(!Standing::default().used().is_main());
    }
}
