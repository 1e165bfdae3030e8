//! What goes wrong between a list of launches and a card.

use std::io;
use std::path::PathBuf;

use flora_codegen::target::export::Operand;

/// Why launches can't be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// A library of NVIDIA's isn't there.
    #[error("{library} can't be loaded; {help}")]
    NoLibrary {
        /// "CUDA's driver" or "NVRTC".
        library: &'static str,
        /// How to mend it.
        help: &'static str,
    },
    /// No context is current on this thread.
    #[error(
        "no CUDA context is current on this thread; use the card first (`torch.cuda.init()`), or name it by its number"
    )]
    NoContext,
    /// The current context isn't the primary one, which PyTorch and CUDA's runtime have.
    #[error(
        "the current CUDA context isn't its card's primary one; call from a thread that uses CUDA's runtime or PyTorch"
    )]
    NotPrimary,
    /// No card of this number.
    #[error("there is no CUDA card {ordinal}; the driver lists {count}")]
    NoCard {
        /// What was asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// A card that no kernel is emitted for.
    #[error("`{card}` has the compute capability {}.{}, and kernels are emitted from 8.0 on", version / 10, version % 10)]
    TooOld {
        /// Its name.
        card: String,
        /// Ten times its compute capability.
        version: u32,
    },
    /// The driver refuses a call.
    #[error("{call} fails for {about}: {status}; {}", help(status))]
    Call {
        /// The function.
        call: &'static str,
        /// What it was called for: a kernel, a buffer.
        about: String,
        /// The driver's name for the failure.
        status: String,
    },
    /// NVRTC refuses a kernel.
    #[error("NVRTC doesn't compile `{kernel}` for {architecture}: {log}")]
    Compile {
        /// Which kernel.
        kernel: String,
        /// For which cards.
        architecture: String,
        /// NVRTC's words.
        log: String,
    },
    /// CUDA's headers, which kernels include, aren't where they are looked for.
    #[error(
        "CUDA's headers are not in {looked}; name a toolkit's folder in CUDA_PATH, or install `nvidia-cuda-runtime-cu12` and `nvidia-cuda-nvcc-cu12`"
    )]
    NoHeaders {
        /// Where.
        looked: String,
    },
    /// A block needs more shared memory than the card has.
    #[error(
        "`{kernel}` takes {needed} bytes of shared memory and a block of this card has {limit}; choose another lowering or type"
    )]
    SharedMemory {
        /// Which kernel.
        kernel: String,
        /// What it takes.
        needed: u32,
        /// What there is.
        limit: u32,
    },
    /// A list that contradicts itself.
    #[error("the list of launches can't be made: {problem}; take it as `export` gives it")]
    List {
        /// What is wrong.
        problem: String,
    },
    /// An operand that the launches can't take.
    #[error("the operand {operand:?} {problem}")]
    Operand {
        /// Which one.
        operand: Operand,
        /// What is wrong with it.
        problem: OperandProblem,
    },
    /// Memory for tables, state and scratch that is too small or isn't the card's.
    #[error("the memory for tables and scratch {problem}")]
    Memory {
        /// What is wrong with it.
        problem: OperandProblem,
    },
    /// Another list than one that differs in its tables alone.
    #[error(
        "the batch has other launches than this one: {difference}; make launches of its own for it, and capture them anew"
    )]
    OtherLaunches {
        /// The first difference.
        difference: String,
    },
    /// Tables of two batches lie beside one another, because the driver failed between them.
    #[error("the tables of a batch were written in part, after which the driver failed; write those of a batch anew")]
    HalfWritten,
    /// What can't be done while a stream is captured.
    #[error(
        "tables can't be written while the stream is captured, because a graph would copy them from host memory that is gone; write them before, or between two replays"
    )]
    Capturing,
    /// A stream of another context.
    #[error("the stream belongs to another card's context than the launches; pass one of card {ordinal}")]
    ForeignStream {
        /// The card of the launches.
        ordinal: u32,
    },
    /// A folder for kernels that can't be written.
    #[error("compiled kernels can't be kept in {}: {source}; name another folder in FLORA_CACHE", folder.display())]
    Cache {
        /// The folder.
        folder: PathBuf,
        /// What the system answers.
        source: io::Error,
    },
    /// Nobody knows where compiled kernels should be kept.
    #[error("there is no cache folder for compiled kernels; name one in FLORA_CACHE")]
    NoCacheFolder,
}

/// What is wrong with memory of the caller's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OperandProblem {
    /// The launches take it.
    #[error("is missing; the launches take {needed} bytes")]
    Missing {
        /// How many.
        needed: u64,
    },
    /// It was passed twice.
    #[error("was passed twice")]
    Twice,
    /// No address.
    #[error("is at the address 0")]
    Null,
    /// Too short.
    #[error("has {found} bytes and the launches take {needed}")]
    Short {
        /// What they take.
        needed: u64,
        /// What there is.
        found: u64,
    },
    /// An address that vectors can't be read from.
    #[error(
        "is at {address:#x}, and kernels read vectors at multiples of {alignment} bytes; copy it to memory of its own"
    )]
    Misaligned {
        /// Where it is.
        address: u64,
        /// What its address has to be a multiple of.
        alignment: u64,
    },
    /// Memory that the driver doesn't know, or less of it.
    #[error("is {bytes} bytes at {address:#x}, which are not all memory of this card; pass memory of the card")]
    Elsewhere {
        /// Where it is said to be.
        address: u64,
        /// How much.
        bytes: u64,
    },
    /// It would be written while another operand is read.
    #[error("lies over the operand {0:?}; give it memory of its own")]
    Overlap(Operand),
}

/// What to do about a failure that has a remedy of its own.
fn help(status: &str) -> &'static str {
    match status {
        "CUDA_ERROR_OUT_OF_MEMORY" => "free memory of the card",
        "CUDA_ERROR_NO_BINARY_FOR_GPU" | "CUDA_ERROR_INVALID_IMAGE" => "remove the kernels in the cache folder",
        "CUDA_ERROR_UNSUPPORTED_PTX_VERSION" => {
            "NVRTC is newer than the driver: update the driver, or use an older NVRTC"
        }
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" | "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT" => {
            "do it before the capture begins, or capture on another stream"
        }
        "CUDA_ERROR_INVALID_HANDLE" | "CUDA_ERROR_INVALID_CONTEXT" | "CUDA_ERROR_CONTEXT_IS_DESTROYED" => {
            "pass a stream that is alive, of the card's primary context"
        }
        "CUDA_ERROR_INVALID_DEVICE" | "CUDA_ERROR_NO_DEVICE" => "look at CUDA_VISIBLE_DEVICES",
        _ => "an earlier launch of this process may have failed; run with CUDA_LAUNCH_BLOCKING=1 to see which",
    }
}
