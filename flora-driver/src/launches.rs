//! A list of launches on a card: its tables, state and scratch memory at addresses that stay, and its launches on any stream.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::result;
use flora_codegen::target::export::{Contents, LaunchList, Operand};

use crate::card::{Stream, call};
use crate::error::{DriverError, OperandProblem};
use crate::kernels::{Kernels, Loaded};
use crate::list::{ALIGNMENT, Layout, Place, difference};
use crate::memory::{DeviceMemory, OwnedMemory, write_behind, write_now};

/// A batch's launches on a card. A graph that captured them runs what the tables say when it is replayed, and needs this to live.
#[derive(Debug)]
pub struct Launches {
    kernels: Kernels,
    loaded: Vec<Arc<Loaded>>,
    list: LaunchList,
    layout: Layout,
    memory: DeviceMemory,
    /// Whether the tables on the card are the list's.
    whole: bool,
    /// The memory, where it isn't the caller's.
    _owned: Option<OwnedMemory>,
}

impl Launches {
    /// Bytes that a list's tables, state and scratch take.
    ///
    /// # Errors
    /// The list contradicts itself.
    pub fn bytes(list: &LaunchList) -> Result<u64, DriverError> {
        Ok(Layout::of(list)?.bytes)
    }

    /// Compiles and loads what a list needs, and writes its tables into memory of its own. Not while a stream is captured.
    ///
    /// # Errors
    /// A list that contradicts itself, a kernel that can't be compiled or loaded, too little memory.
    pub fn new(kernels: &Kernels, list: LaunchList) -> Result<Self, DriverError> {
        let owned = OwnedMemory::new(kernels.card(), Self::bytes(&list)?)?;
        // SAFETY: the memory is of this length, nobody else's, and lives as long as what uses it.
        unsafe { Self::within(kernels, list, owned.memory(), Some(owned)) }
    }

    /// The same in memory of the caller's, as long as the largest list that it is for: lists that come one after the other then have their
    /// buffers at fixed places.
    ///
    /// # Safety
    /// The memory stays, and nobody else uses it, for as long as this and all graphs with its launches live.
    ///
    /// # Errors
    /// As [`Self::new`], and memory that is too short or isn't the card's.
    pub unsafe fn in_memory(kernels: &Kernels, list: LaunchList, memory: DeviceMemory) -> Result<Self, DriverError> {
        // SAFETY: the caller's.
        unsafe { Self::within(kernels, list, memory, None) }
    }

    unsafe fn within(
        kernels: &Kernels,
        list: LaunchList,
        memory: DeviceMemory,
        owned: Option<OwnedMemory>,
    ) -> Result<Self, DriverError> {
        let layout = Layout::of(&list)?;
        let _current = kernels.card().enter()?;
        if layout.bytes > 0 {
            memory.check(layout.bytes, ALIGNMENT).map_err(|problem| DriverError::Memory { problem })?;
        }
        let loaded = list.kernels.iter().map(|kernel| kernels.load(kernel)).collect::<Result<_, _>>()?;
        let own = Self { kernels: kernels.clone(), loaded, list, layout, memory, whole: true, _owned: owned };
        for (position, buffer) in own.list.buffers.iter().enumerate() {
            let (words, offset) = match (&buffer.contents, own.layout.places[position]) {
                (Contents::Table(words), Place::Own(offset)) => (words, offset),
                (Contents::State(words), Place::State { pristine, .. }) => (words, pristine),
                _ => continue,
            };
            let bytes: &[u8] = bytemuck::cast_slice(words);
            // SAFETY: the place is within the memory and as long as the buffer, which the words don't exceed.
            unsafe { write_now(memory.address + offset, bytes, || format!("buffer {position}"))? };
        }
        Ok(own)
    }

    /// The list.
    pub fn list(&self) -> &LaunchList {
        &self.list
    }

    /// Where tables, state and scratch lie.
    pub fn memory(&self) -> DeviceMemory {
        self.memory
    }

    /// Whether a list differs from this one's in its tables alone.
    ///
    /// # Errors
    /// [`DriverError::OtherLaunches`], and a list that contradicts itself.
    pub fn runs(&self, list: &LaunchList) -> Result<(), DriverError> {
        Layout::of(list)?;
        match difference(&self.list, list) {
            Some(difference) => Err(DriverError::OtherLaunches { difference }),
            None => Ok(()),
        }
    }

    /// Makes this another batch's, whose launches differ in their tables alone: the same segments with other adapters of the same ranks, in
    /// pools of the same lengths ([`flora_codegen::target::export::export_with_pools`]). Tables that have changed are written behind
    /// what is on the stream; `false` where none has. Graphs run the new batch from then on.
    ///
    /// # Safety
    /// The stream is alive. What was launched or replayed on other streams is over.
    ///
    /// # Errors
    /// Other launches, a stream that is captured or of another card, and what the driver answers.
    pub unsafe fn retable(&mut self, list: LaunchList, stream: Stream) -> Result<bool, DriverError> {
        self.runs(&list)?;
        let _current = self.kernels.card().enter()?;
        // SAFETY: the caller's word that the stream is alive.
        unsafe { self.kernels.card().is_writable(stream)? };
        let changes = |position: usize| !self.whole || self.list.buffers[position] != list.buffers[position];
        let changed: Vec<_> = (0..list.buffers.len()).filter(|position| changes(*position)).collect();
        (self.whole, self.list) = (false, list);
        let mut written = false;
        for position in changed {
            let (Contents::Table(words), Place::Own(offset)) =
                (&self.list.buffers[position].contents, self.layout.places[position])
            else {
                continue;
            };
            let (bytes, place): (&[u8], _) = (bytemuck::cast_slice(words), self.memory.address + offset);
            // SAFETY: the place is the buffer's, which the words don't exceed; the stream was asked.
            unsafe { write_behind(place, bytes, stream, || format!("buffer {position}"))? };
            written = true;
        }
        self.whole = true;
        Ok(written)
    }

    /// The launches with these operands; what they don't take is ignored.
    ///
    /// # Errors
    /// An operand that is missing, passed twice, too short, at an address that vectors can't be read from or that isn't the card's; y over another one.
    pub fn bind(&self, operands: &[(Operand, DeviceMemory)]) -> Result<Bound<'_>, DriverError> {
        if !self.whole {
            return Err(DriverError::HalfWritten);
        }
        let _current = self.kernels.card().enter()?;
        let mut bases = Vec::with_capacity(self.layout.places.len());
        let mut taken = Vec::new();
        for (buffer, place) in self.list.buffers.iter().zip(&self.layout.places) {
            let operand = match *place {
                Place::Own(offset) | Place::State { live: offset, .. } => {
                    bases.push(self.memory.address + offset);
                    continue;
                }
                Place::Operand(operand) => operand,
            };
            let refused = |problem| DriverError::Operand { operand, problem };
            let mut given = operands.iter().filter(|(own, _)| *own == operand);
            let (_, memory) = given.next().ok_or_else(|| refused(OperandProblem::Missing { needed: buffer.bytes }))?;
            if given.next().is_some() {
                return Err(refused(OperandProblem::Twice));
            }
            memory.check(buffer.bytes, self.layout.alignment).map_err(refused)?;
            bases.push(memory.address);
            taken.push((operand, DeviceMemory { bytes: buffer.bytes, ..*memory }));
        }
        if let Some((_, y)) = taken.iter().find(|(operand, _)| *operand == Operand::Y) {
            let over = taken.iter().find(|(operand, memory)| *operand != Operand::Y && y.meets(*memory));
            if let Some((other, _)) = over {
                return Err(DriverError::Operand { operand: Operand::Y, problem: OperandProblem::Overlap(*other) });
            }
        }
        let parameters = self.list.launches.iter().map(|launch| {
            let pointers = launch.arguments.iter().map(|argument| bases[argument.buffer] + argument.offset);
            let by_value = launch.by_value.chunks_exact(2);
            let by_value = by_value.map(|halves| u64::from(halves[0]) | u64::from(halves[1]) << 32);
            Parameters { pointers: pointers.collect(), by_value: by_value.collect() }
        });
        Ok(Bound { launches: self, parameters: parameters.collect() })
    }
}

/// What a launch is passed.
#[derive(Debug)]
struct Parameters {
    pointers: Vec<u64>,
    /// One structure, aligned to 8 bytes.
    by_value: Vec<u64>,
}

/// Launches with the caller's operands.
#[derive(Debug)]
pub struct Bound<'a> {
    launches: &'a Launches,
    parameters: Vec<Parameters>,
}

impl Bound<'_> {
    /// Queues the launches behind what is on the stream. Nothing is allocated on the card, nothing waits, and no memory of the host is read
    /// later, so that a graph may capture it.
    ///
    /// # Safety
    /// The stream is alive. Operands hold numbers of the types and extents that the list was made for, and stay until the launches are
    /// over; `y` is nobody else's until then. The same [`Launches`] run on one stream at a time, graphs included.
    ///
    /// # Errors
    /// A stream of another card, and what the driver answers.
    pub unsafe fn launch(&self, stream: Stream) -> Result<(), DriverError> {
        let Launches { kernels, loaded, list, layout, memory, .. } = self.launches;
        let _current = kernels.card().enter()?;
        kernels.card().owns(stream)?;
        for (buffer, place) in list.buffers.iter().zip(&layout.places) {
            let Place::State { live, pristine } = place else { continue };
            let (to, from) = (memory.address + live, memory.address + pristine);
            // SAFETY: both are within the memory and as long as the buffer, and don't meet.
            let copied = unsafe { result::memcpy_dtod_async(to, from, buffer.bytes as usize, stream.raw()) };
            call("cuMemcpyDtoDAsync", || "the state of the launches".to_owned(), copied)?;
        }
        for (launch, Parameters { pointers, by_value }) in list.launches.iter().zip(&self.parameters) {
            let kernel = &list.kernels[launch.kernel];
            let place = |value: &u64| std::ptr::from_ref(value).cast::<c_void>().cast_mut();
            let mut parameters: Vec<_> = pointers.iter().map(place).chain(by_value.first().map(place)).collect();
            let tuple = |[x, y, z]: [u32; 3]| (x, y, z);
            let (grid, block) = (tuple(launch.grid), tuple(kernel.block));
            // SAFETY: the driver reads the parameters during the call. They are what the text of the kernel says, as it was recorded;
            // buffers are as long as the list says, which was checked; the rest is the caller's word.
            let launched = unsafe {
                let function = loaded[launch.kernel].function;
                result::launch_kernel(function, grid, block, kernel.dynamic_shared_bytes, stream.raw(), &mut parameters)
            };
            call("cuLaunchKernel", || format!("the kernel `{}`", kernel.name), launched)?;
        }
        Ok(())
    }
}
