//! A kernel of a text that somebody brings, for whoever plays a card's driver (`flora-emulated-driver`).

use flora_toolchain::{CxxCompiler, CxxError};

use super::keep::{KeepFailure, Keeper};
use super::memory::Resource;
use super::program::{Program, ProgramError};
use crate::target::stable::shared_bytes;

/// Why a text isn't a kernel that runs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmulationError {
    /// There is no C++ compiler, or it refuses the text.
    #[error(transparent)]
    Compile(#[from] CxxError),
    /// The text has no such kernel, or one whose parameters aren't those of emitted text.
    #[error("the text has no kernel `{kernel}` as flora emits them: {problem}")]
    Text {
        /// What was asked for.
        kernel: String,
        /// What is missing.
        problem: &'static str,
    },
    /// The compiled kernel can't be loaded, or broke the rules of a card.
    #[error("{0}")]
    Run(String),
    /// Its machine code can't be kept where that is asked for.
    #[error("{0}")]
    Keep(String),
}

impl From<ProgramError> for EmulationError {
    fn from(error: ProgramError) -> Self {
        match error {
            ProgramError::Compile(error) => Self::Compile(error),
            other => Self::Run(other.to_string()),
        }
    }
}

impl From<KeepFailure> for EmulationError {
    fn from(error: KeepFailure) -> Self {
        Self::Keep(error.to_string())
    }
}

/// A kernel that the processor runs.
#[derive(Debug)]
pub struct EmulatedKernel {
    program: Program,
    parameters: Parameters,
}

/// What a kernel takes, as its text says.
#[derive(Debug, PartialEq, Eq)]
struct Parameters {
    /// Of a block, at most.
    threads: u64,
    shared_bytes: u32,
    pointers: usize,
    by_value_words: usize,
}

impl EmulatedKernel {
    /// Compiles the kernel `name` of a text. Where machine code is kept ([`flora_toolchain::KeptKernels`]), so is that of cards of this compute
    /// capability (80, 90, 100).
    ///
    /// # Errors
    /// No compiler, a text that it refuses or that has no such kernel.
    pub fn compile(name: &str, source: &str, capability: u16) -> Result<Self, EmulationError> {
        let missing = |problem| EmulationError::Text { kernel: name.to_owned(), problem };
        let parameters = parameters(name, source).map_err(missing)?;
        let program = Program::new(&CxxCompiler::find()?, (name, source), None)?;
        if let Some(keeper) = Keeper::from_environment(capability)? {
            keeper.keep(source)?;
        }
        Ok(Self { program, parameters })
    }

    /// How many pointers it takes.
    pub fn pointers(&self) -> usize {
        self.parameters.pointers
    }

    /// 32-bit words of the one structure behind them; 0 where there is none.
    pub fn by_value_words(&self) -> usize {
        self.parameters.by_value_words
    }

    /// Threads that a block may have.
    pub fn most_threads(&self) -> u64 {
        self.parameters.threads
    }

    /// Bytes of shared memory that a launch on a card has to ask for.
    pub fn shared_bytes(&self) -> u32 {
        self.parameters.shared_bytes
    }

    /// Runs all blocks of a launch.
    ///
    /// # Safety
    /// As many pointers and words as it takes; behind the pointers is as much memory as the kernel reads and writes.
    ///
    /// # Errors
    /// What the emulator finds wrong.
    pub unsafe fn run(
        &self,
        (grid, block): ([u32; 3], [u32; 3]),
        pointers: &[*mut u8],
        by_value: &[u64],
    ) -> Result<(), EmulationError> {
        let buffers: Vec<_> = pointers.iter().map(|start| Resource { start: *start, length: 0 }).collect();
        // SAFETY: the caller's.
        Ok(unsafe { self.program.run((grid, block), &buffers, by_value) }?)
    }
}

/// Reads `extern "C" __global__ void … name ( a* b, …, const __grid_constant__ info_st info )`.
fn parameters(name: &str, source: &str) -> Result<Parameters, &'static str> {
    let (_, rest) = source.split_once("__global__ void").ok_or("no `__global__` function")?;
    let (head, list) = rest.split_once(&format!("{name} (")).ok_or("another name")?;
    if head.contains('{') {
        return Err("another name");
    }
    let bounds = head.split_once("__launch_bounds__(").and_then(|(_, bounds)| bounds.split_once(')'));
    let threads = bounds.and_then(|(threads, _)| threads.trim().parse().ok()).ok_or("no `__launch_bounds__`")?;
    let (list, _) = list.split_once(')').ok_or("its parameters don't end")?;
    let parameters = list.split(',').map(str::trim).filter(|parameter| !parameter.is_empty());
    let (pointers, others): (Vec<_>, Vec<_>) = parameters.partition(|parameter| parameter.contains('*'));
    let by_value_words = match others[..] {
        [] => 0,
        [info] if info.contains("info_st") => info_words(source)?,
        _ => return Err("parameters that are no pointers"),
    };
    let shared_bytes = shared_bytes(source).ok_or("shared memory of unknown size")?;
    Ok(Parameters { threads, shared_bytes, pointers: pointers.len(), by_value_words })
}

/// Words of `struct info_st { uint32 scalars_uint32[14];uint32 static_meta[20]; };`
fn info_words(source: &str) -> Result<usize, &'static str> {
    let unknown = "a structure of unknown size";
    let (_, rest) = source.split_once("struct info_st {").ok_or(unknown)?;
    let (fields, _) = rest.split_once('}').ok_or(unknown)?;
    fields.split(';').map(str::trim).filter(|field| !field.is_empty()).try_fold(0, |words, field| {
        let (kind, rest) = field.split_once(' ').ok_or(unknown)?;
        let words_of_one = match kind {
            "uint32" | "int32" | "float" => 1,
            "uint64" | "int64" | "double" => 2,
            _ => return Err(unknown),
        };
        let count = rest.split_once('[').and_then(|(_, count)| count.strip_suffix(']')?.parse::<usize>().ok());
        Ok(words + words_of_one * count.ok_or(unknown)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "struct info_st {\n    uint32 scalars_uint32[14];uint32 static_meta[20];\n};\n\
        extern \"C\" __global__ void __launch_bounds__(128)tile (\n    const float* __restrict__ buffer_0, float* buffer_1, \
        const __grid_constant__ info_st info\n) {\n}\n";

    #[test]
    fn what_a_kernel_takes_is_read_from_its_text() {
        assert_eq!(
            parameters("tile", TEXT),
            Ok(Parameters { threads: 128, shared_bytes: 0, pointers: 2, by_value_words: 34 })
        );
        let without = TEXT.replace(", const __grid_constant__ info_st info", "");
        assert_eq!(
            parameters("tile", &without),
            Ok(Parameters { threads: 128, shared_bytes: 0, pointers: 2, by_value_words: 0 })
        );
        for wrong in ["reduce", "buffer_1"] {
            assert!(parameters(wrong, TEXT).is_err(), "{wrong}");
        }
        assert!(parameters("tile", &TEXT.replace("uint32 static", "__half static")).is_err());
        assert!(parameters("tile", &TEXT.replace("float* buffer_1", "float factor")).is_err());
    }
}
