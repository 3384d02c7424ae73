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
