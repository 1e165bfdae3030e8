//! The vectors of a projection's adapters: a buffer on the device that adapters are written into and taken out of while batches run.

use std::ops::Range;

use flora_plan::layer::Element;
use range_alloc::RangeAllocator;

use crate::buffer::PoolBuffer;
use crate::device::{Device, DeviceError};

/// A pool of vectors of one width with its free places.
#[derive(Debug)]
pub(crate) struct Pool {
    width: u32,
    free: RangeAllocator<u32>,
    used: u32,
    slots: u32,
}

impl Pool {
    /// A pool of one vector, because no device has buffers of no bytes; the vector is free.
    pub(crate) fn new(device: &Device, width: u32, element: Element) -> Result<(Self, PoolBuffer), DeviceError> {
        let buffer = device.upload_as(&vec![0.0; width as usize], element)?;
        let pool = Self { width, free: RangeAllocator::new(0..1), used: 0, slots: 1 };
        Ok((pool, PoolBuffer::new(buffer, 1)))
    }

    /// Makes room for `slots` vectors in all. The vectors that are there keep their places.
    pub(crate) fn grow(&mut self, device: &Device, buffer: &mut PoolBuffer, slots: u32) -> Result<(), DeviceError> {
        if slots > self.slots {
            buffer.buffer = device.resized(&buffer.buffer, slots as usize * self.width as usize)?;
            buffer.slots = slots;
            self.free.grow_to(slots);
            self.slots = slots;
        }
        Ok(())
    }

    /// A place for so many vectors side by side; `None` where there is none.
    pub(crate) fn take(&mut self, vectors: u32) -> Option<Range<u32>> {
        if vectors == 0 {
            return Some(0..0);
        }
        let place = self.free.allocate_range(vectors).ok()?;
        self.used += vectors;
        Some(place)
    }

    /// Frees a place.
    pub(crate) fn give_back(&mut self, place: Range<u32>) {
        if !place.is_empty() {
            self.used -= place.end - place.start;
            self.free.free_range(place);
        }
    }

    /// Vectors that adapters hold.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }
}
