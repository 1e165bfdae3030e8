//! The cards: their memory, streams, modules and graphs. Handles are numbers that are never given twice.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use flora_codegen::emulated::EmulatedKernel;

use crate::status::*;

/// The cards that are played: compute capability, name and the shared memory of a block in KiB.
pub(crate) const CARDS: [(u16, &str, i32); 3] = [
    (80, "sm_80, played by the processor", 163),
    (90, "sm_90, played by the processor", 227),
    (100, "sm_100, played by the processor", 227),
];

/// What an allocation's address is a multiple of, and the bytes around it that belong to nobody.
const ALIGNMENT: usize = 512;

/// Of a block, where a function isn't asked for more.
pub(crate) const UNASKED_SHARED_BYTES: u32 = 48 << 10;

/// Everything there is.
#[derive(Default)]
pub(crate) struct Driver {
    pub(crate) initialized: bool,
    last: usize,
    /// By address.
    allocations: BTreeMap<u64, Allocation>,
    pub(crate) streams: HashMap<usize, Stream>,
    pub(crate) modules: HashMap<usize, Module>,
    pub(crate) functions: HashMap<usize, Function>,
    pub(crate) graphs: HashMap<usize, (usize, Vec<Operation>)>,
    /// Ends everything, as on a card.
    failed: Option<Status>,
}

struct Allocation {
    context: usize,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: memory of nobody's thread; the driver's lock is held wherever it is read and written.
unsafe impl Send for Allocation {}

/// What is queued, and what is captured, in order.
#[derive(Default)]
pub(crate) struct Stream {
    pub(crate) context: usize,
    /// Whether calls that wait for the default stream don't wait for this one.
    pub(crate) non_blocking: bool,
    pub(crate) queue: Vec<Operation>,
    pub(crate) capture: Option<Vec<Operation>>,
    /// A capture during which something was called that can't be captured.
    pub(crate) invalidated: bool,
}

pub(crate) struct Module {
    pub(crate) context: usize,
    pub(crate) text: String,
}

#[derive(Clone)]
pub(crate) struct Function {
    pub(crate) context: usize,
    pub(crate) module: usize,
    pub(crate) kernel: Arc<EmulatedKernel>,
    /// The most that a launch may ask for.
    pub(crate) shared_bytes: u32,
}

/// What a stream does.
#[derive(Clone)]
pub(crate) enum Operation {
    /// Bytes that were taken from the host when it was called.
    Write {
        to: u64,
        bytes: Vec<u8>,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Launch {
        function: Function,
        grid: [u32; 3],
        block: [u32; 3],
        pointers: Vec<u64>,
        by_value: Vec<u64>,
    },
}

impl Driver {
    /// A handle that nothing has.
    pub(crate) fn handle(&mut self) -> usize {
        self.last += 16;
        0x0f10_0000 + self.last
    }

    /// Memory with a NaN of every type in it: a card promises nothing.
    pub(crate) fn allocate(&mut self, context: usize, bytes: usize) -> Result<u64, Status> {
        let length = bytes.checked_add(2 * ALIGNMENT).ok_or(OUT_OF_MEMORY)?;
        let layout = Layout::from_size_align(length, ALIGNMENT).map_err(|_| OUT_OF_MEMORY)?;
        // SAFETY: the layout is longer than nothing.
        let start = unsafe { alloc(layout) };
        if start.is_null() || bytes == 0 {
            return Err(if bytes == 0 { INVALID_VALUE } else { OUT_OF_MEMORY });
        }
        // SAFETY: the allocation is as long.
        unsafe { start.write_bytes(0xff, length) };
        let address = (start.expose_provenance() + ALIGNMENT) as u64;
        self.allocations.insert(address, Allocation { context, start, bytes });
        Ok(address)
    }

    pub(crate) fn free(&mut self, address: u64) -> Status {
        // A card waits for what uses it.
        let status = self.drain_all();
        let Some(Allocation { start, bytes, .. }) = self.allocations.remove(&address) else { return INVALID_VALUE };
        if let Ok(layout) = Layout::from_size_align(bytes + 2 * ALIGNMENT, ALIGNMENT) {
            // SAFETY: it was allocated so, and is freed once.
            unsafe { dealloc(start, layout) };
        }
        status
    }

    /// The allocation that an address lies in: its own address and length.
    pub(crate) fn range(&self, context: usize, address: u64) -> Option<(u64, usize)> {
        let (base, own) = self.allocations.range(..=address).next_back()?;
        (own.context == context && address < base + own.bytes as u64).then_some((*base, own.bytes))
    }

    /// So many bytes at an address of a card's.
    pub(crate) fn bytes(&self, context: usize, address: u64, bytes: usize) -> Result<*mut u8, Status> {
        let (base, length) = self.range(context, address).ok_or(INVALID_VALUE)?;
        let end = address.checked_add(bytes as u64).ok_or(INVALID_VALUE)?;
        if end > base + length as u64 {
            return Err(INVALID_VALUE);
        }
        Ok(std::ptr::with_exposed_provenance_mut(address as usize))
    }

    /// Whether a stream of any card is captured, so that what a graph can't have is forbidden everywhere; captures are broken then.
    pub(crate) fn breaks_captures(&mut self) -> bool {
        let mut any = false;
        for stream in self.streams.values_mut().filter(|stream| stream.capture.is_some()) {
            (stream.invalidated, any) = (true, true);
        }
        any
    }

    /// Queues something on a stream, or captures it.
    pub(crate) fn push(&mut self, context: usize, stream: usize, operation: Operation) -> Status {
        if let Some(status) = self.failed {
            return status;
        }
        if stream == 0 {
            // The default one runs behind all streams that wait for it.
            let status = self.drain_blocking(context);
            return if status == SUCCESS { self.run(context, operation) } else { status };
        }
        match self.streams.get_mut(&stream) {
            None => INVALID_HANDLE,
            Some(own) if own.context != context => INVALID_HANDLE,
            Some(Stream { invalidated: true, capture: Some(_), .. }) => CAPTURE_INVALIDATED,
            Some(Stream { capture: Some(captured), .. }) => {
                captured.push(operation);
                SUCCESS
            }
            Some(own) => {
                own.queue.push(operation);
                SUCCESS
            }
        }
    }

    /// Does all that is queued on a stream.
    pub(crate) fn drain(&mut self, stream: usize) -> Status {
        let Some(own) = self.streams.get_mut(&stream) else { return INVALID_HANDLE };
        let context = own.context;
        for operation in std::mem::take(&mut own.queue) {
            let status = self.run(context, operation);
            if status != SUCCESS {
                return status;
            }
        }
        self.failed.unwrap_or(SUCCESS)
    }

    fn drain_those(&mut self, wanted: impl Fn(&Stream) -> bool) -> Status {
        let mut handles: Vec<_> =
            self.streams.iter().filter(|(_, own)| wanted(own)).map(|(handle, _)| *handle).collect();
        handles.sort_unstable();
        handles.into_iter().map(|handle| self.drain(handle)).find(|status| *status != SUCCESS).unwrap_or(SUCCESS)
    }

    /// Does what a call waits for that waits for the default stream.
    pub(crate) fn drain_blocking(&mut self, context: usize) -> Status {
        self.drain_those(|own| own.context == context && !own.non_blocking)
    }

    pub(crate) fn drain_all(&mut self) -> Status {
        self.drain_those(|_| true)
    }

    fn run(&mut self, context: usize, operation: Operation) -> Status {
        let outcome = match operation {
            Operation::Write { to, bytes } => self.bytes(context, to, bytes.len()).map(|to| {
                // SAFETY: as many bytes are within the allocation.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
            }),
            Operation::Copy { to, from, bytes } => {
                self.bytes(context, to, bytes).and_then(|to| Ok((to, self.bytes(context, from, bytes)?))).map(
                    |(to, from)| {
                        // SAFETY: as above, of both.
                        unsafe { std::ptr::copy(from, to, bytes) };
                    },
                )
            }
            Operation::Launch { function, grid, block, pointers, by_value } => {
                let place = |address: &u64| self.bytes(context, *address, 1).map_err(|_| ILLEGAL_ADDRESS);
                pointers.iter().map(place).collect::<Result<Vec<_>, _>>().and_then(|pointers| {
                    // SAFETY: pointers and words are as many as the kernel takes; what lies behind them is as long as the launch says,
                    // which is what is tested.
                    unsafe { function.kernel.run((grid, block), &pointers, &by_value) }.map_err(|error| {
                        eprintln!("the emulated driver: {error}");
                        LAUNCH_FAILED
                    })
                })
            }
        };
        match outcome {
            Ok(()) => SUCCESS,
            Err(status) => {
                self.failed = Some(status);
                status
            }
        }
    }
}
