//! Memory of a card: the caller's, by its address, and ours.

use cudarc::driver::result;
use cudarc::driver::sys;

use crate::card::{Card, Stream, call};
use crate::error::{DriverError, OperandProblem};

/// Memory on a card by its address; whose it is nobody says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceMemory {
    /// `CUdeviceptr`, PyTorch's `data_ptr()`.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

impl DeviceMemory {
    /// Whether all of it is memory of the context that is current, at an address that is a multiple of `alignment`.
    pub(crate) fn check(self, needed: u64, alignment: u64) -> Result<(), OperandProblem> {
        let Self { address, bytes } = self;
        if address == 0 {
            return Err(OperandProblem::Null);
        }
        if bytes < needed {
            return Err(OperandProblem::Short { needed, found: bytes });
        }
        if !address.is_multiple_of(alignment) {
            return Err(OperandProblem::Misaligned { address, alignment });
        }
        let elsewhere = || OperandProblem::Elsewhere { address, bytes };
        let end = address.checked_add(bytes).ok_or_else(elsewhere)?;
        // An allocation that is put together of physical pieces, as PyTorch's expandable segments are, has a range for each.
        let mut next = address;
        while next < end {
            let (mut base, mut length) = (0, 0);
            // SAFETY: the driver writes two numbers, and takes any address.
            let found = unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut length, next) }.result();
            let range_end = found.ok().and_then(|()| base.checked_add(length as u64));
            next = range_end.filter(|range_end| *range_end > next).ok_or_else(elsewhere)?;
        }
        Ok(())
    }

    /// Whether two have a byte in common.
    pub(crate) fn meets(self, other: Self) -> bool {
        let end = |memory: Self| memory.address.saturating_add(memory.bytes);
        self.bytes > 0 && other.bytes > 0 && self.address < end(other) && other.address < end(self)
    }
}

/// Writes bytes to an address of the context that is current.
///
/// # Safety
/// As many are there; the stream is alive and not captured.
pub(crate) unsafe fn write_behind(
    address: u64,
    bytes: &[u8],
    stream: Stream,
    about: impl FnOnce() -> String,
) -> Result<(), DriverError> {
    // SAFETY: the caller's. Of pageable memory the driver has taken a copy when the call returns.
    call("cuMemcpyHtoDAsync", about, unsafe { result::memcpy_htod_async(address, bytes, stream.raw()) })
}

/// Writes bytes to an address of the context that is current, and waits until they are there: of pageable memory the driver returns before,
/// and streams that wait for no other would read what was there.
///
/// # Safety
/// As many are there.
pub(crate) unsafe fn write_now(address: u64, bytes: &[u8], about: impl Fn() -> String) -> Result<(), DriverError> {
    // SAFETY: the caller's; the default stream is always there.
    unsafe {
        call("cuMemcpyHtoD", &about, result::memcpy_htod_sync(address, bytes))?;
        call("cuStreamSynchronize", &about, result::stream::synchronize(std::ptr::null_mut()))
    }
}

/// Memory that was allocated here and is freed with this.
#[derive(Debug)]
pub struct OwnedMemory {
    card: Card,
    memory: DeviceMemory,
}

impl OwnedMemory {
    /// Allocates bytes, at least one. Not while a stream is captured.
    ///
    /// # Errors
    /// The card has not so many.
    pub fn new(card: &Card, bytes: u64) -> Result<Self, DriverError> {
        let _current = card.enter()?;
        let bytes = bytes.max(1);
        // SAFETY: nobody reads the memory before it is written.
        let allocated = unsafe { result::malloc_sync(bytes as usize) };
        let address = call("cuMemAlloc", || format!("{bytes} bytes"), allocated)?;
        Ok(Self { card: card.clone(), memory: DeviceMemory { address, bytes } })
    }

    /// The memory with these bytes in it.
    ///
    /// # Errors
    /// As [`Self::new`], and what the driver answers to the copy.
    pub fn with(card: &Card, bytes: &[u8]) -> Result<Self, DriverError> {
        let own = Self::new(card, bytes.len() as u64)?;
        own.write(0, bytes)?;
        Ok(own)
    }

    /// Where it is.
    pub fn memory(&self) -> DeviceMemory {
        self.memory
    }

    /// Writes bytes from the byte `first` on, and waits for it. Launches that read it have to be over.
    ///
    /// # Errors
    /// Bytes beyond its end, and what the driver answers.
    pub fn write(&self, first: u64, bytes: &[u8]) -> Result<(), DriverError> {
        let place = self.part(first, bytes.len() as u64)?;
        let _current = self.card.enter()?;
        // SAFETY: the part is within the allocation.
        unsafe { write_now(place, bytes, || self.about()) }
    }

    /// Writes bytes from the byte `first` on, behind what is on the stream.
    ///
    /// # Safety
    /// The stream is alive. What reads the bytes on other streams is over.
    ///
    /// # Errors
    /// Bytes beyond its end, a stream that is captured or of another card, and what the driver answers.
    pub unsafe fn write_behind(&self, first: u64, bytes: &[u8], stream: Stream) -> Result<(), DriverError> {
        let place = self.part(first, bytes.len() as u64)?;
        let _current = self.card.enter()?;
        // SAFETY: the part is within the allocation; the rest is the caller's.
        unsafe {
            self.card.is_writable(stream)?;
            write_behind(place, bytes, stream, || self.about())
        }
    }

    /// Reads bytes from the byte `first` on. Launches that write it have to be over.
    ///
    /// # Errors
    /// Bytes beyond its end, and what the driver answers.
    pub fn read(&self, first: u64, bytes: &mut [u8]) -> Result<(), DriverError> {
        let place = self.part(first, bytes.len() as u64)?;
        let _current = self.card.enter()?;
        // SAFETY: as above.
        call("cuMemcpyDtoH", || self.about(), unsafe { result::memcpy_dtoh_sync(bytes, place) })
    }

    fn part(&self, first: u64, bytes: u64) -> Result<u64, DriverError> {
        let DeviceMemory { address, bytes: found } = self.memory;
        match first.checked_add(bytes) {
            Some(end) if end <= found => Ok(address + first),
            end => {
                let needed = end.unwrap_or(u64::MAX);
                Err(DriverError::Memory { problem: OperandProblem::Short { needed, found } })
            }
        }
    }

    fn about(&self) -> String {
        format!("{} bytes at {:#x}", self.memory.bytes, self.memory.address)
    }
}

impl Drop for OwnedMemory {
    fn drop(&mut self) {
        if let Ok(_current) = self.card.enter() {
            // SAFETY: allocated in this context, and freed once. The driver waits for launches that use it.
            let _ = unsafe { result::free_sync(self.memory.address) };
        }
    }
}
