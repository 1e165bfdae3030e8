//! Machine code of what an emulated card is asked to run, for a card of its kind.
//!
//! cubecl's own cache of compiled kernels can't be filled here: its key has the runtime's type in it, so that only CUDA's runtime finds
//! what CUDA's runtime has put there.

use std::io;

use flora_toolchain::{Architecture, CompileError, CudaCompiler, FetchError, KeptKernels};

/// Why a kernel's machine code isn't kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeepFailure {
    #[error("machine code can't be kept: {0}")]
    Compilers(#[from] FetchError),
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("machine code can't be written where {variable} says: {0}", variable = KeptKernels::VARIABLE)]
    Write(#[from] io::Error),
}

/// Keeps machine code of one architecture.
pub(super) struct Keeper {
    compiler: CudaCompiler,
    architecture: Architecture,
    kept: KeptKernels,
}

impl Keeper {
    /// For cards of a compute capability; `None` where no folder is named.
    ///
    /// # Errors
    /// There is a folder, and the CUDA compilers can't be had.
    pub(super) fn from_environment(capability: u16) -> Result<Option<Self>, KeepFailure> {
        let architecture = match capability {
            80 => Architecture::Sm80,
            90 => Architecture::Sm90a,
            _ => Architecture::Sm100,
        };
        let Some(kept) = KeptKernels::from_environment() else { return Ok(None) };
        Ok(Some(Self { compiler: CudaCompiler::ensure()?, architecture, kept }))
    }

    /// Keeps a kernel's, unless it is there.
    ///
    /// # Errors
    /// It can't be compiled, or not written.
    pub(super) fn keep(&self, source: &str) -> Result<(), KeepFailure> {
        if self.kept.find(source, self.architecture).is_some() {
            return Ok(());
        }
        let code = self.compiler.machine_code(source, self.architecture)?;
        Ok(self.kept.keep(source, self.architecture, &code)?)
    }
}
