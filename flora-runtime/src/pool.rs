//! The vectors of a projection's adapters: a buffer on the device that adapters are written into and taken out of while batches run.
//! It grows and shrinks as they do, and the vectors that are there keep their places.

use std::ops::Range;

use flora_plan::layer::Element;
use range_alloc::RangeAllocator;

use crate::buffer::PoolBuffer;
use crate::device::{Device, DeviceError};

/// No kernel indexes more.
const MOST_SLOTS: u32 = i32::MAX as u32;

/// A pool of vectors of one width with its places.
#[derive(Debug)]
pub(crate) struct Pool {
    width: u32,
    /// Of all slots that there could be; the buffer has the first of them.
    places: RangeAllocator<u32>,
    used: u32,
    slots: u32,
}

impl Pool {
    /// A pool of one vector, because no device has buffers of no bytes; the vector is free.
    pub(crate) fn new(device: &Device, width: u32, element: Element) -> Result<(Self, PoolBuffer), DeviceError> {
        let buffer = device.upload_as(&vec![0.0; width as usize], element)?;
        let pool = Self { width, places: RangeAllocator::new(0..MOST_SLOTS), used: 0, slots: 1 };
        Ok((pool, PoolBuffer::new(buffer, 1)))
    }

    /// Makes room for `slots` vectors in all. The vectors that are there keep their places.
    pub(crate) fn grow(&mut self, device: &Device, buffer: &mut PoolBuffer, slots: u32) -> Result<(), DeviceError> {
        if slots > self.slots { self.resize(device, buffer, slots) } else { Ok(()) }
    }

    /// Gives back the room behind the last vector.
    pub(crate) fn trim(&mut self, device: &Device, buffer: &mut PoolBuffer) -> Result<(), DeviceError> {
        let needed = self.places.allocated_ranges().map(|place| place.end).max().unwrap_or(0).max(1);
        if needed < self.slots { self.resize(device, buffer, needed) } else { Ok(()) }
    }

    fn resize(&mut self, device: &Device, buffer: &mut PoolBuffer, slots: u32) -> Result<(), DeviceError> {
        buffer.buffer = device.resized(&buffer.buffer, slots as usize * self.width as usize)?;
        buffer.slots = slots;
        self.slots = slots;
        Ok(())
    }

    /// Slots that there have to be in all before [`Self::take`] finds a place for so many vectors.
    pub(crate) fn slots_with(&mut self, vectors: u32) -> u32 {
        if vectors == 0 {
            return self.slots;
        }
        let Ok(place) = self.places.allocate_range(vectors) else { return u32::MAX };
        let end = place.end;
        self.places.free_range(place);
        self.slots.max(end)
    }

    /// A place for so many vectors side by side; `None` where there is none.
    pub(crate) fn take(&mut self, vectors: u32) -> Option<Range<u32>> {
        if vectors == 0 {
            return Some(0..0);
        }
        let place = self.places.allocate_range(vectors).ok()?;
        if place.end > self.slots {
            self.places.free_range(place);
            return None;
        }
        self.used += vectors;
        Some(place)
    }

    /// Frees a place.
    pub(crate) fn give_back(&mut self, place: Range<u32>) {
        if !place.is_empty() {
            self.used -= place.end - place.start;
            self.places.free_range(place);
        }
    }

    /// Vectors that adapters hold.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }
}
