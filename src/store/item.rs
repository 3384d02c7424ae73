//! One item in memory: a single allocation whose header says which fields it has.
//!
//! ```text
//! bytes 0..4   value length          u32
//!       4..8   last access           u32, Unix seconds
//!       8..10  key length            u16
//!      10..12  marks                 u16: which optional fields follow, and the state bits
//!      LARGE:  4 bytes of padding, then a `bytes::Bytes` (its alignment is 8, and so is the allocation's)
//!      FLAGS:  u32     DEADLINE: u64 milliseconds     VERSION: u64     (each only when the mark is set, unaligned)
//!      key, then (unless LARGE) value
//! ```
//! A field that an item does not use costs nothing.

use crate::model::{Deadline, UnixMillis, Value, Version};
use bytes::Bytes;
use std::alloc::{Layout, alloc, dealloc};
use std::marker::PhantomData;
use std::ptr::NonNull;

const FLAGS: u16 = 1;
const DEADLINE: u16 = 2;
const VERSION: u16 = 4;
const LARGE: u16 = 8;
/// The item was invalidated and not replaced yet.
pub(crate) const STALE: u16 = 16;
/// Somebody was told that it may refresh the item.
pub(crate) const WON: u16 = 32;
/// The item has been read since it was written.
pub(crate) const FETCHED: u16 = 64;
/// Its writer gave the key in an encoded form.
pub(crate) const KEY_ENCODED: u16 = 128;
const STATE: u16 = STALE | WON | FETCHED | KEY_ENCODED;

const HEADER_BYTES: usize = 12;
const LARGE_AT: usize = 16;
const ALIGN: usize = 8;

/// What an item is made from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) key: &'a [u8],
    pub(crate) value: Value<'a>,
    pub(crate) flags: u32,
    pub(crate) deadline: Deadline,
    pub(crate) version: Version,
    pub(crate) accessed_s: u32,
    /// Any of STALE, WON, FETCHED, KEY_ENCODED.
    pub(crate) state: u16,
}

impl Parts<'_> {
    fn marks(&self) -> u16 {
        let mut marks = self.state & STATE;
        if self.flags != 0 {
            marks |= FLAGS;
        }
        if self.deadline != Deadline::Never {
            marks |= DEADLINE;
        }
        if self.version != Version(0) {
            marks |= VERSION;
        }
        if matches!(self.value, Value::Large(_)) {
            marks |= LARGE;
        }
        marks
    }

    /// Bytes that an item of these parts is charged with: its allocation as the allocator rounds it, and the value it
    /// refers to.
    pub(crate) fn charged_bytes(&self) -> usize {
        let referenced = match self.value {
            Value::Small(_) => 0,
            Value::Large(bytes) => bytes.len(),
        };
        rounded(self.allocation_bytes()) + referenced
    }

    fn allocation_bytes(&self) -> usize {
        let inline = match self.value {
            Value::Small(bytes) => bytes.len(),
            Value::Large(_) => 0,
        };
        key_offset(self.marks()) + self.key.len() + inline
    }
}

/// The allocator hands out multiples of 16 bytes at the least.
fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(16)
}

fn fields_offset(marks: u16) -> usize {
    if marks & LARGE != 0 {
        LARGE_AT + size_of::<Bytes>()
    } else {
        HEADER_BYTES
    }
}

fn deadline_offset(marks: u16) -> usize {
    fields_offset(marks) + if marks & FLAGS != 0 { 4 } else { 0 }
}

fn version_offset(marks: u16) -> usize {
    deadline_offset(marks) + if marks & DEADLINE != 0 { 8 } else { 0 }
}

#[inline]
fn key_offset(marks: u16) -> usize {
    if marks & (FLAGS | DEADLINE | VERSION | LARGE) == 0 {
        return HEADER_BYTES;
    }
    version_offset(marks) + if marks & VERSION != 0 { 8 } else { 0 }
}

/// An owned item. Its address is stable, a multiple of 8, and freed on drop.
#[derive(Debug)]
pub(crate) struct Item {
    /// Points to an allocation made by `new` with the layout that the header describes; owned by this value alone.
    start: NonNull<u8>,
}

impl Item {
    /// Copies `parts` into a new item; `None` when the allocator has no memory.
    pub(crate) fn new(parts: &Parts<'_>) -> Option<Self> {
        let layout = Layout::from_size_align(parts.allocation_bytes(), ALIGN).ok()?;
        // SAFETY: the layout is at least HEADER_BYTES long, so not of size zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        // SAFETY: the allocation was made for exactly these parts.
        unsafe { fill(start, parts) };
        Some(Self { start })
    }

    /// The address, for the index to keep; take it back with [`Item::from_address`].
    pub(crate) fn into_address(self) -> u64 {
        let address = self.start.as_ptr().expose_provenance() as u64;
        std::mem::forget(self);
        address
    }

    /// The item at an address.
    ///
    /// # Safety
    /// The address came from [`Item::into_address`], and nothing else refers to the item from now on.
    pub(crate) unsafe fn from_address(address: u64) -> Self {
        Self {
            // SAFETY: as the caller promises.
            start: unsafe { at_address(address) },
        }
    }

    /// What it holds.
    pub(crate) fn view(&self) -> ItemRef<'_> {
        ItemRef {
            start: self.start,
            life: PhantomData,
        }
    }
}

/// The pointer that became an address.
///
/// # Safety
/// The address came from [`Item::into_address`], so it is not null.
#[inline]
unsafe fn at_address(address: u64) -> NonNull<u8> {
    let start = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: as the caller promises.
    unsafe { NonNull::new_unchecked(start) }
}

impl Drop for Item {
    fn drop(&mut self) {
        let bytes = self.view().allocation_bytes();
        let large = self.view().marks() & LARGE != 0;
        // SAFETY: the layout is the one `new` used (rewriting keeps the size); the `Bytes` is there with LARGE and is
        // dropped once, because this value is gone afterwards.
        unsafe {
            if large {
                self.start.add(LARGE_AT).cast::<Bytes>().drop_in_place();
            }
            dealloc(self.start.as_ptr(), Layout::from_size_align_unchecked(bytes, ALIGN));
        }
    }
}

/// Writes all of `parts`.
///
/// # Safety
/// `start` is an allocation of exactly `parts.allocation_bytes()`, aligned to [`ALIGN`], that no reference points into;
/// a `Bytes` it held before has been dropped.
unsafe fn fill(start: NonNull<u8>, parts: &Parts<'_>) {
    let marks = parts.marks();
    let start = start.as_ptr();
    let value = parts.value.bytes();
    // SAFETY: the size covers every offset below by construction of the offset functions; `start` is aligned to 8, so the
    // header fields and the `Bytes` at 16 are aligned; `parts` is borrowed, so it does not point into the allocation.
    unsafe {
        start.cast::<u32>().write(value.len() as u32);
        start.add(4).cast::<u32>().write(parts.accessed_s);
        start.add(8).cast::<u16>().write(parts.key.len() as u16);
        start.add(10).cast::<u16>().write(marks);
        if let Value::Large(bytes) = parts.value {
            start.add(LARGE_AT).cast::<Bytes>().write(bytes.clone());
        }
        if marks & FLAGS != 0 {
            start
                .add(fields_offset(marks))
                .cast::<u32>()
                .write_unaligned(parts.flags);
        }
        if let Deadline::At(moment) = parts.deadline {
            start
                .add(deadline_offset(marks))
                .cast::<u64>()
                .write_unaligned(moment.0);
        }
        if marks & VERSION != 0 {
            start
                .add(version_offset(marks))
                .cast::<u64>()
                .write_unaligned(parts.version.0);
        }
        let key = start.add(key_offset(marks));
        std::ptr::copy_nonoverlapping(parts.key.as_ptr(), key, parts.key.len());
        if marks & LARGE == 0 {
            std::ptr::copy_nonoverlapping(value.as_ptr(), key.add(parts.key.len()), value.len());
        }
    }
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
    /// The address came from [`Item::into_address`]; the item lives, and nothing changes it, for `'a`.
    #[inline]
    pub(crate) unsafe fn at(address: u64) -> Self {
        Self {
            // SAFETY: as the caller promises.
            start: unsafe { at_address(address) },
            life: PhantomData,
        }
    }

    #[inline]
    fn marks(self) -> u16 {
        // SAFETY: the header is initialised and aligned (see `fill`).
        unsafe { self.start.add(10).cast::<u16>().read() }
    }

    #[inline]
    fn key_len(self) -> usize {
        // SAFETY: as in `marks`.
        usize::from(unsafe { self.start.add(8).cast::<u16>().read() })
    }

    #[inline]
    pub(crate) fn value_len(self) -> usize {
        // SAFETY: as in `marks`.
        unsafe { self.start.cast::<u32>().read() as usize }
    }

    fn allocation_bytes(self) -> usize {
        let marks = self.marks();
        key_offset(marks) + self.key_len() + if marks & LARGE != 0 { 0 } else { self.value_len() }
    }

    /// Bytes this item is charged with: see [`Parts::charged_bytes`].
    pub(crate) fn charged_bytes(self) -> usize {
        rounded(self.allocation_bytes()) + if self.marks() & LARGE != 0 { self.value_len() } else { 0 }
    }

    #[inline]
    pub(crate) fn key(self) -> &'a [u8] {
        let at = key_offset(self.marks());
        // SAFETY: `fill` wrote `key_len` bytes at this offset; they live for `'a`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), self.key_len()) }
    }

    #[inline]
    pub(crate) fn value(self) -> Value<'a> {
        let marks = self.marks();
        if marks & LARGE != 0 {
            // SAFETY: with LARGE, `fill` wrote a `Bytes` at this aligned offset.
            return Value::Large(unsafe { self.start.add(LARGE_AT).cast::<Bytes>().as_ref() });
        }
        let at = key_offset(marks) + self.key_len();
        // SAFETY: without LARGE, `fill` wrote `value_len` bytes behind the key.
        Value::Small(unsafe { std::slice::from_raw_parts(self.start.as_ptr().add(at), self.value_len()) })
    }

    #[inline]
    pub(crate) fn flags(self) -> u32 {
        let marks = self.marks();
        if marks & FLAGS == 0 {
            return 0;
        }
        // SAFETY: the mark says that the field is there.
        unsafe { self.start.add(fields_offset(marks)).cast::<u32>().read_unaligned() }
    }

    #[inline]
    pub(crate) fn deadline(self) -> Deadline {
        let marks = self.marks();
        if marks & DEADLINE == 0 {
            return Deadline::Never;
        }
        // SAFETY: the mark says that the field is there.
        let moment = unsafe { self.start.add(deadline_offset(marks)).cast::<u64>().read_unaligned() };
        Deadline::At(UnixMillis(moment))
    }

    #[inline]
    pub(crate) fn version(self) -> Version {
        let marks = self.marks();
        if marks & VERSION == 0 {
            return Version(0);
        }
        // SAFETY: the mark says that the field is there.
        Version(unsafe { self.start.add(version_offset(marks)).cast::<u64>().read_unaligned() })
    }

    #[inline]
    pub(crate) fn accessed_s(self) -> u32 {
        // SAFETY: as in `marks`.
        unsafe { self.start.add(4).cast::<u32>().read() }
    }

    /// The state bits that are set.
    #[inline]
    pub(crate) fn state(self) -> u16 {
        self.marks() & STATE
    }

    /// All parts, to make a changed copy from.
    pub(crate) fn parts(self) -> Parts<'a> {
        Parts {
            key: self.key(),
            value: self.value(),
            flags: self.flags(),
            deadline: self.deadline(),
            version: self.version(),
            accessed_s: self.accessed_s(),
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
    /// The address came from [`Item::into_address`]; the item lives for `'a`, and nothing else refers to it meanwhile.
    #[inline]
    pub(crate) unsafe fn at(address: u64) -> Self {
        Self {
            // SAFETY: as the caller promises.
            start: unsafe { at_address(address) },
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

    /// Overwrites the item in place when the new one takes the same room and neither holds a reference.
    #[inline]
    pub(crate) fn rewrite(&mut self, parts: &Parts<'_>) -> bool {
        let view = self.view();
        let fits = view.marks() & LARGE == 0
            && !matches!(parts.value, Value::Large(_))
            && parts.allocation_bytes() == view.allocation_bytes();
        if fits {
            // SAFETY: the allocation has this size and no `Bytes`, and `&mut self` excludes references into it.
            unsafe { fill(self.start, parts) };
        }
        fits
    }

    /// Changes the deadline in place; false, and nothing changed, when the item has no field for it or needs none.
    pub(crate) fn set_deadline(&mut self, deadline: Deadline) -> bool {
        let marks = self.view().marks();
        let Deadline::At(moment) = deadline else {
            return marks & DEADLINE == 0;
        };
        if marks & DEADLINE == 0 {
            return false;
        }
        // SAFETY: the mark says that the field is there, and nothing else refers to the item.
        unsafe {
            self.start
                .add(deadline_offset(marks))
                .cast::<u64>()
                .write_unaligned(moment.0);
        }
        true
    }

    /// Notes an access; writes only what changes, so that a hot item's cache line stays clean.
    #[inline]
    pub(crate) fn mark_access(&mut self, accessed_s: u32) {
        if self.view().accessed_s() != accessed_s {
            // SAFETY: the header field is initialised and aligned, and nothing else refers to the item.
            unsafe { self.start.add(4).cast::<u32>().write(accessed_s) };
        }
        if self.view().marks() & FETCHED == 0 {
            self.set_state(FETCHED, 0);
        }
    }

    /// Sets and clears state bits.
    pub(crate) fn set_state(&mut self, set: u16, clear: u16) {
        let marks = self.view().marks() & !(clear & STATE) | set & STATE;
        // SAFETY: as in `mark_access`; the bits that describe the layout are unchanged.
        unsafe { self.start.add(10).cast::<u16>().write(marks) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(item: &mut Item) -> ItemMut<'_> {
        ItemMut {
            start: item.start,
            life: PhantomData,
        }
    }

    /// Every combination of optional fields gives back what was put in, and is freed (Miri watches).
    #[test]
    fn every_layout_round_trips() {
        let large = Bytes::from(vec![3; 5000]);
        for bits in 0..16u32 {
            for key in [&b"k"[..], &[0xff; 250]] {
                let parts = Parts {
                    key,
                    value: if bits & 1 != 0 {
                        Value::Large(&large)
                    } else {
                        Value::Small(b"value")
                    },
                    flags: if bits & 2 != 0 { 77 } else { 0 },
                    deadline: if bits & 4 != 0 {
                        Deadline::At(UnixMillis(1 << 40))
                    } else {
                        Deadline::Never
                    },
                    version: Version(if bits & 8 != 0 { u64::MAX } else { 0 }),
                    accessed_s: 5,
                    state: STALE,
                };
                let mut item = Item::new(&parts).unwrap();
                change(&mut item).set_state(WON, STALE);
                change(&mut item).mark_access(9);
                let view = item.view();
                assert_eq!(view.key(), key);
                assert_eq!(view.value().bytes(), parts.value.bytes());
                assert_eq!((view.flags(), view.deadline()), (parts.flags, parts.deadline));
                assert_eq!((view.version(), view.accessed_s()), (parts.version, 9));
                assert_eq!(view.state(), WON | FETCHED);
                assert_eq!(view.charged_bytes(), parts.charged_bytes());
            }
        }
    }

    #[test]
    fn rewriting_needs_the_same_room() {
        let parts = |value| Parts {
            key: b"key",
            value: Value::Small(value),
            flags: 0,
            deadline: Deadline::Never,
            version: Version(0),
            accessed_s: 0,
            state: 0,
        };
        let mut item = Item::new(&parts(b"12345")).unwrap();
        assert!(change(&mut item).rewrite(&parts(b"54321")));
        assert_eq!(item.view().value().bytes(), b"54321");
        assert!(!change(&mut item).rewrite(&parts(b"1234")));
        assert!(!change(&mut item).rewrite(&Parts {
            flags: 1,
            ..parts(b"54321")
        }));
        // A field more and as many bytes of value less: the same room, another layout.
        assert!(change(&mut item).rewrite(&Parts {
            flags: 1,
            ..parts(b"1")
        }));
        assert_eq!((item.view().flags(), item.view().value().bytes()), (1, &b"1"[..]));
    }
}
