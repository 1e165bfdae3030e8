//! How the process keeps memory that it has freed.

/// Keeps what was freed for what comes next. The host's buffers of rows come and go with every projection; where each is mapped anew or
/// given back, the system clears its pages every time, which took 5 % of a decoding step of 32 sequences. To be called before there are
/// threads.
pub(crate) fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest threshold that the allocator takes.
        const MAPPED_FROM: libc::c_int = 32 << 20;
        /// More than a step frees at once.
        const KEPT: libc::c_int = 1 << 30;
        // SAFETY: the calls set parameters of the allocator, and no other thread is there to allocate.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM);
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
        }
    }
}
