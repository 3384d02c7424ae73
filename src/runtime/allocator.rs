//! The allocator: small items come and go in the millions.

#[cfg(feature = "allocator")]
use mimalloc::MiMalloc;
#[cfg(feature = "allocator")]
use std::alloc::{GlobalAlloc, Layout};
#[cfg(feature = "allocator")]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(feature = "allocator")]
#[global_allocator]
static ALLOCATOR: Natural = Natural;

/// The alignment that the allocator gives by itself to blocks of that size or more.
#[cfg(feature = "allocator")]
const NATURAL_ALIGNMENT: usize = 16;

/// mimalloc, which is asked for an alignment only where it must: its bindings always ask, and that is twice the work, more where
/// a block is no multiple of its alignment.
#[cfg(feature = "allocator")]
struct Natural;

#[cfg(feature = "allocator")]
impl Natural {
    #[inline]
    fn gives(layout: Layout) -> bool {
        layout.align() <= NATURAL_ALIGNMENT && layout.align() <= layout.size()
    }
}

// SAFETY: blocks are mimalloc's, so they are as large as they should be, nobody else's, and freed by whichever function; where
// they are not asked to be aligned, they are by themselves: that is mimalloc's promise, and tested.
#[cfg(feature = "allocator")]
unsafe impl GlobalAlloc for Natural {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout is valid.
        unsafe {
            match Self::gives(layout) {
                true => libmimalloc_sys::mi_malloc(layout.size()).cast(),
                false => MiMalloc.alloc(layout),
            }
        }
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        unsafe {
            match Self::gives(layout) {
                true => libmimalloc_sys::mi_zalloc(layout.size()).cast(),
                false => MiMalloc.alloc_zeroed(layout),
            }
        }
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller has it from here.
        unsafe { MiMalloc.dealloc(block, layout) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller has it from here, and `size` makes a valid layout with the alignment.
        unsafe {
            match Self::gives(Layout::from_size_align_unchecked(size, layout.align())) {
                true => libmimalloc_sys::mi_realloc(block.cast(), size).cast(),
                false => MiMalloc.realloc(block, layout, size),
            }
        }
    }
}

/// Leaves memory that this thread has freed and keeps for itself to the process. The allocator does so by itself only while it is
/// used, so a core that has become idle asks for it.
pub(super) fn let_go() {
    #[cfg(feature = "allocator")]
    // SAFETY: no arguments of consequence; it may be called at any time from any thread.
    unsafe {
        libmimalloc_sys::mi_collect(false);
    }
}

/// Gives freed memory of the whole process back to the system. That takes a tenth of a second for a gigabyte: it is nothing for a core
/// to do.
pub(super) fn give_back() {
    #[cfg(feature = "allocator")]
    {
        // While all goes back at once, the allocator takes it that nothing waits for that; what was freed before does.
        set_purge_delay(PURGE_DELAY_MS);
        // SAFETY: as above.
        unsafe { libmimalloc_sys::mi_collect(true) };
        apply_at_once();
    }
}

/// The option that says for how long freed memory is kept, in milliseconds. The bindings do not name it. What is usual is longer than
/// whoever calls [`give_back`] waits: a thread that finds it over would give back all there is, by itself.
#[cfg(feature = "allocator")]
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
#[cfg(feature = "allocator")]
const PURGE_DELAY_MS: std::ffi::c_long = 60_000;

/// What is freed goes back at once.
#[cfg(feature = "allocator")]
static AT_ONCE: AtomicBool = AtomicBool::new(false);

/// Has what is freed from now on go back to the system at once, or, as is usual, with [`give_back`]: most of it is wanted again.
pub(super) fn give_back_at_once(on: bool) {
    #[cfg(feature = "allocator")]
    {
        AT_ONCE.store(on, Ordering::SeqCst);
        apply_at_once();
    }
    #[cfg(not(feature = "allocator"))]
    let _ = on;
}

/// Several cores may be at it: whoever sets what is out of date finds out, and sets it again.
#[cfg(feature = "allocator")]
fn apply_at_once() {
    loop {
        let on = AT_ONCE.load(Ordering::SeqCst);
        set_purge_delay(if on { 0 } else { PURGE_DELAY_MS });
        std::sync::atomic::fence(Ordering::SeqCst);
        if AT_ONCE.load(Ordering::SeqCst) == on {
            return;
        }
    }
}

#[cfg(feature = "allocator")]
fn set_purge_delay(milliseconds: std::ffi::c_long) {
    // SAFETY: sets a number that the allocator reads when it frees a block; it may change at any time.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY, milliseconds) };
}

/// Has the system leave huge pages out in this process. The allocator would ask for them: 2 MiB of memory where a few pages
/// are used, on each core, and nobody has charged them.
pub(super) fn leave_huge_pages_out() {
    // SAFETY: a flag of the process, no pointers. A system that does not know it has no such pages either.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

#[cfg(all(test, feature = "allocator"))]
mod tests {
    use super::super::memory::Resident;
    use super::*;

    #[test]
    fn blocks_are_aligned() {
        for align in [1, 2, 4, 8, 16, 32, 64, 4096] {
            for size in (1..600).chain([1000, 4095, 4096, 4097, 70_000, 1 << 20, (5 << 20) + 8]) {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: the size is not 0; blocks are as large as what is read of them, and freed once, as they are then.
                unsafe {
                    let [plain, zeroed] = [ALLOCATOR.alloc(layout), ALLOCATOR.alloc_zeroed(layout)];
                    for (block, last) in [(plain, 1), (zeroed, 0)] {
                        assert!(block.addr().is_multiple_of(align) && !block.is_null(), "{layout:?}");
                        assert!(last == 1 || (0..size).all(|at| block.add(at).read() == 0), "{layout:?}");
                        block.write(7);
                        let grown = ALLOCATOR.realloc(block, layout, size + 9);
                        assert!(grown.addr().is_multiple_of(align) && grown.read() == 7, "{layout:?}");
                        ALLOCATOR.dealloc(grown, Layout::from_size_align(size + 9, align).unwrap());
                    }
                }
            }
        }
    }

    /// What was freed before everything was to go back at once goes back, too.
    #[test]
    fn what_was_freed_before_goes_back() {
        const BYTES: u64 = 512 << 20;
        let resident = Resident::new().unwrap();
        let before = resident.bytes().unwrap();
        let blocks: Vec<Vec<u8>> = (0..BYTES >> 20).map(|_| vec![1; 1 << 20]).collect();
        let full = resident.bytes().unwrap();
        assert!(full > before + BYTES / 2, "{before} {full}");
        drop(blocks);
        give_back_at_once(true);
        give_back();
        let after = resident.bytes().unwrap();
        give_back_at_once(false);
        assert!(after < full - BYTES / 2, "{full} {after}");
    }
}
