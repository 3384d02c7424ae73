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

/// Has the system leave huge pages out in this process. The allocator would ask for them: 2 MiB of memory where a few pages
/// are used, on each core, and nobody has charged them.
pub(super) fn leave_huge_pages_out() {
    // SAFETY: a flag of the process, no pointers. A system that does not know it has no such pages either.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}
