//! Memory of an emulated card: buffers that start where a card's do, with bytes around each that belong to nobody.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;

use cubecl::server::IoError;
use cubecl_common::backtrace::BackTrace;
use cubecl_runtime::storage::{ComputeStorage, StorageHandle, StorageId, StorageUtilization};

/// What a card's buffers are aligned to, in bytes.
pub(super) const ALIGNMENT: usize = 512;

/// Bytes before and behind a buffer, which a sanitizer watches (`edge_bytes` in `emulation.h` is less).
const EDGE: usize = ALIGNMENT;

/// Every buffer of one device.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    buffers: HashMap<StorageId, Allocation>,
}

#[derive(Debug)]
struct Allocation {
    start: *mut u8,
    layout: Layout,
}

/// A buffer, or a part of one.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub(super) start: *mut u8,
    /// Bytes.
    pub(super) length: usize,
}

// SAFETY: the server has its own thread, and nobody else looks at the memory.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Send for Resource {}

impl Resource {
    /// The bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the storage made it of an allocation of this length, which lives as long as its handle.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }
}

impl ComputeStorage for Memory {
    type Resource = Resource;

    fn alignment(&self) -> usize {
        ALIGNMENT
    }

    fn get(&mut self, handle: &StorageHandle) -> Resource {
        let allocation = &self.buffers[&handle.id];
        // SAFETY: a handle lies within its allocation.
        let start = unsafe { allocation.start.add(EDGE + handle.offset() as usize) };
        Resource { start, length: handle.size() as usize }
    }

    fn alloc(&mut self, size: u64) -> Result<StorageHandle, IoError> {
        let too_big = || IoError::BufferTooBig { size, backtrace: BackTrace::capture() };
        let bytes = usize::try_from(size).ok().and_then(|bytes| bytes.checked_add(2 * EDGE)).ok_or_else(too_big)?;
        let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| too_big())?;
        // SAFETY: the edges make it longer than nothing.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            return Err(too_big());
        }
        let id = StorageId::new();
        self.buffers.insert(id, Allocation { start, layout });
        Ok(StorageHandle { id, utilization: StorageUtilization { offset: 0, size } })
    }

    fn dealloc(&mut self, id: StorageId) {
        if let Some(Allocation { start, layout }) = self.buffers.remove(&id) {
            // SAFETY: it was allocated with this layout.
            unsafe { dealloc(start, layout) };
        }
    }

    fn flush(&mut self) {}
}

impl Drop for Memory {
    fn drop(&mut self) {
        for id in self.buffers.keys().copied().collect::<Vec<_>>() {
            self.dealloc(id);
        }
    }
}
