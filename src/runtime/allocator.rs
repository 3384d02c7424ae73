//! The allocator: small items come and go in the millions.

#[cfg(feature = "allocator")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Gives memory that this thread has freed back to the system. The allocator does so by itself only while it is used, so a
/// core that has become idle asks for it.
pub(super) fn give_back() {
    #[cfg(feature = "allocator")]
    // SAFETY: no arguments of consequence; it may be called at any time from any thread.
    unsafe {
        libmimalloc_sys::mi_collect(true);
    }
}

/// The option that says for how long freed memory is kept, in milliseconds, and what is usual. The bindings do not name it.
#[cfg(feature = "allocator")]
const PURGE_DELAY: libmimalloc_sys::mi_option_t = 15;
#[cfg(feature = "allocator")]
const PURGE_DELAY_MS: std::ffi::c_long = 1000;

/// Has what is freed from now on go back to the system at once, or, as is usual, after a while: most of it is wanted again.
pub(super) fn give_back_at_once(on: bool) {
    #[cfg(feature = "allocator")]
    // SAFETY: sets a number that the allocator reads when it frees a block; it may change at any time.
    unsafe {
        libmimalloc_sys::mi_option_set(PURGE_DELAY, if on { 0 } else { PURGE_DELAY_MS });
    }
    #[cfg(not(feature = "allocator"))]
    let _ = on;
}

/// Has the system leave huge pages out in this process. The allocator would ask for them: 2 MiB of memory where a few pages
/// are used, on each core, and nobody has charged them.
pub(super) fn leave_huge_pages_out() {
    // SAFETY: a flag of the process, no pointers. A system that does not know it has no such pages either.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}
