//! The CUDA compilers without a GPU: what generated CUDA C++ costs as machine code.
//!
//! A launch has NVRTC make PTX, which the driver then assembles. Here the same NVRTC makes the PTX and `ptxas` stands in
//! for the driver, so a spill, or a half-precision kernel without tensor-core instructions, shows on any machine.
//! Everything comes from NVIDIA's own wheels and lies in the cache folder; no CUDA is installed.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::OnceLock;

use rayon::prelude::*;
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::cache::{Cache, from_environment};
use crate::error::FetchError;
use crate::pypi::Wheel;

mod architecture;
mod bound;
mod check;
mod kept;
mod launch;
mod listing;
mod loops;
mod mix;
mod nvrtc;
mod occupancy;
mod ptxas;
mod results;
mod row;

pub use architecture::{Architecture, UnknownArchitecture};
pub use bound::{Bound, Source, Unit};
pub use check::{Defect, Expectations};
pub use kept::KeptKernels;
pub use loops::MainLoop;
pub use mix::{Class, Mix};
pub use occupancy::{Block, Limiter, MAX_WARPS, Occupancy, OccupancyError};
pub use row::heading;

use listing::Listing;
use nvrtc::{Failure, Nvrtc};
use results::Results;

/// The run-time compiler.
const NVRTC: Wheel = Wheel {
    package: "nvidia-cuda-nvrtc-cu12",
    version: "12.9.86",
    bytes: 89_568_129,
    sha256: "210cf05005a447e29214e9ce50851e83fc5f4358df8b453155d5e1918094dcb4",
    members: &["nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc-builtins.so.12.9"],
};
/// The headers that generated kernels include.
const RUNTIME: Wheel = Wheel {
    package: "nvidia-cuda-runtime-cu12",
    version: "12.9.79",
    bytes: 3_493_179,
    sha256: "25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3",
    members: &["nvidia/cuda_runtime/include/"],
};
/// The assembler, and the headers below `crt/` that those of [`RUNTIME`] include in turn.
const NVCC: Wheel = Wheel {
    package: "nvidia-cuda-nvcc-cu12",
    version: "12.9.86",
    bytes: 40_546_229,
    sha256: "5d6a0d32fdc7ea39917c20065614ae93add6f577d840233237ff08e9a38f58f0",
    members: &["nvidia/cuda_nvcc/bin/ptxas", "nvidia/cuda_nvcc/include/"],
};
/// The disassembler, which CUDA 12's wheels lack; a later one reads what an earlier assembler wrote.
const NVDISASM: Wheel = Wheel {
    package: "nvidia-cuda-nvdisasm",
    version: "13.5.37",
    bytes: 5_170_654,
    sha256: "d3fdbdd49fa53e2e4aacd3db8259d052bd2b049ececdcb69e92e083c6728e7ca",
    members: &["nvidia/cu13/bin/nvdisasm"],
};

/// A kernel's machine code, as far as its cost goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    /// The kernel's name.
    pub kernel: String,
    /// What it is compiled for.
    pub architecture: Architecture,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes a thread stores to and loads from local memory because registers ran out; 0 in a good kernel.
    pub spill_bytes: u32,
    /// Those of them that are stores.
    pub spill_store_bytes: u32,
    /// Bytes of local memory a thread: spilled values, and arrays that are indexed by a variable.
    pub stack_bytes: u32,
    /// Bytes of static shared memory a block.
    pub shared_bytes: u32,
    /// Bytes of dynamic shared memory that a launch must give a block, as the source says it; `None` when there is some
    /// and the source doesn't say how much.
    pub dynamic_shared_bytes: Option<u32>,
    /// Threads of a block, where the source binds them (`__launch_bounds__`).
    pub threads: Option<u32>,
    /// How often each machine instruction occurs, by opcode without modifiers: `HMMA`, `FFMA`, `LDG`. The `NOP`s that fill
    /// up the end of a kernel are left out.
    pub instructions: BTreeMap<String, u32>,
    /// How often a load from global memory occurs, by its width: the forms of [`Class::GlobalLoad`] in `mix`.
    pub global_loads: BTreeMap<String, u32>,
    /// The same instructions by class.
    pub mix: Mix,
    /// The loop that does the multiplications; `None` when no loop multiplies.
    pub main_loop: Option<MainLoop>,
}

impl Compiled {
    /// Bytes that a thread loads from local memory because registers ran out.
    #[must_use]
    pub fn spill_load_bytes(&self) -> u32 {
        self.spill_bytes.saturating_sub(self.spill_store_bytes)
    }

    /// The theoretical occupancy of a launch as the source describes it.
    ///
    /// # Errors
    /// [`OccupancyError::UnknownThreads`] or [`OccupancyError::UnknownSharedBytes`] when the source leaves that open, and
    /// as [`Compiled::occupancy_of`].
    pub fn occupancy(&self) -> Result<Occupancy, OccupancyError> {
        let threads = self.threads.ok_or(OccupancyError::UnknownThreads)?;
        self.occupancy_of(threads, self.dynamic_shared_bytes.ok_or(OccupancyError::UnknownSharedBytes)?)
    }

    /// The theoretical occupancy of a launch with blocks of so many threads and bytes of dynamic shared memory.
    ///
    /// # Errors
    /// As [`Occupancy::of`].
    pub fn occupancy_of(&self, threads: u32, dynamic_shared_bytes: u32) -> Result<Occupancy, OccupancyError> {
        let shared_bytes = self.shared_bytes.saturating_add(dynamic_shared_bytes);
        Occupancy::of(self.architecture, Block { threads, registers: self.registers, shared_bytes })
    }
}

/// The file of machine code in a folder of temporary files.
const CUBIN: &str = "kernel.cubin";

/// What the assembler makes of PTX, and what it says about it.
struct Assembled {
    kernel: String,
    usage: ptxas::Usage,
    /// Holds the machine code, and goes with it.
    work: tempfile::TempDir,
}

impl Assembled {
    fn binary(&self) -> PathBuf {
        self.work.path().join(CUBIN)
    }
}

/// Why a source was not compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// NVRTC could not be loaded into this process.
    #[error("can't load the CUDA run-time compiler {library}: {reason}; remove its folder and fetch it again", library = library.display())]
    Load {
        /// The library.
        library: PathBuf,
        /// What the loader answered.
        reason: String,
    },
    /// The source holds a zero byte, which ends a C string.
    #[error("the CUDA source holds a zero byte at offset {offset}")]
    ZeroByte {
        /// The offset in bytes.
        offset: usize,
    },
    /// NVRTC turned the source down.
    #[error("the CUDA source does not compile for {architecture}:\n{log}")]
    Source {
        /// The architecture.
        architecture: Architecture,
        /// NVRTC's log; `kernel.cu(LINE)` is the place.
        log: String,
    },
    /// NVRTC failed in a call that does not depend on the source.
    #[error("the CUDA run-time compiler failed in {call} with status {status}")]
    Nvrtc {
        /// The call.
        call: &'static str,
        /// Its `nvrtcResult`.
        status: i32,
    },
    /// `ptxas` or `nvdisasm` failed.
    #[error("`{program}` failed for {architecture}: {output}")]
    Tool {
        /// The program.
        program: &'static str,
        /// The architecture.
        architecture: Architecture,
        /// What it printed, or why it could not be started.
        output: String,
    },
    /// The source holds no kernel.
    #[error("the CUDA source holds no kernel: it must have a `__global__` function that is no uninstantiated template")]
    NoKernel,
    /// The source holds several kernels, whose figures would be mixed up.
    #[error("the CUDA source holds several kernels ({}): compile each by itself", .0.join(", "))]
    SeveralKernels(
        /// Their names.
        Vec<String>,
    ),
    /// A temporary file could not be written.
    #[error("can't write a temporary file: {0}; set TMPDIR to a folder with space")]
    Temporary(#[from] std::io::Error),
}

/// The compilers, unpacked in the cache folder.
#[derive(Debug)]
pub struct CudaCompiler {
    nvrtc: PathBuf,
    ptxas: PathBuf,
    nvdisasm: PathBuf,
    includes: [PathBuf; 2],
    loaded: OnceLock<Result<Nvrtc, String>>,
    results: Results,
}

impl CudaCompiler {
    /// The compilers from the cache folder, fetched into it (139 MB) on first use.
    ///
    /// # Errors
    /// [`FetchError::Unsupported`] anywhere but on Linux on x86-64, [`FetchError::Offline`] without a network, and
    /// whatever else keeps them from being unpacked.
    pub fn ensure() -> Result<Self, FetchError> {
        Self::ensure_in(&Cache::open()?)
    }

    /// The same in a cache of the caller's choice.
    ///
    /// # Errors
    /// As [`CudaCompiler::ensure`].
    pub fn ensure_in(cache: &Cache) -> Result<Self, FetchError> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err(FetchError::Unsupported { what: "the CUDA compilers", needs: "Linux on x86-64" });
        }
        let wheels = [NVRTC.ensure(cache)?, RUNTIME.ensure(cache)?, NVCC.ensure(cache)?, NVDISASM.ensure(cache)?];
        Ok(Self::of(cache, wheels))
    }

    /// The compilers if they were fetched before; downloads nothing.
    #[must_use]
    pub fn installed() -> Option<Self> {
        Self::installed_in(&Cache::open().ok()?)
    }

    /// The same in a cache of the caller's choice.
    #[must_use]
    pub fn installed_in(cache: &Cache) -> Option<Self> {
        let [nvrtc, runtime, nvcc, nvdisasm] = [&NVRTC, &RUNTIME, &NVCC, &NVDISASM].map(|wheel| wheel.installed(cache));
        Some(Self::of(cache, [nvrtc?, runtime?, nvcc?, nvdisasm?]))
    }

    /// The compilers as the environment variable `FLORA_CUDA` has it, for tests: `required` fetches them and fails where
    /// that fails, `absent` is none, and without it there are those that were fetched before.
    ///
    /// # Errors
    /// As [`CudaCompiler::ensure`], with `required` only.
    pub fn from_environment() -> Result<Option<Self>, FetchError> {
        from_environment("FLORA_CUDA", Self::ensure, Self::installed)
    }

    /// The compilers in the folders of the unpacked wheels.
    fn of(cache: &Cache, [nvrtc, runtime, nvcc, nvdisasm]: [PathBuf; 4]) -> Self {
        let versions = [&NVRTC, &RUNTIME, &NVCC, &NVDISASM].map(Wheel::title).join(", ");
        Self {
            nvrtc: nvrtc.join(NVRTC.members[0]),
            ptxas: nvcc.join(NVCC.members[0]),
            nvdisasm: nvdisasm.join(NVDISASM.members[0]),
            includes: [runtime.join(RUNTIME.members[0]), nvcc.join(NVCC.members[1])],
            loaded: OnceLock::new(),
            results: Results::new(cache.root().join("compiled"), versions),
        }
    }

    /// Compiles the one kernel of a CUDA C++ source for `architecture` and reads what the machine code costs. The CUDA
    /// headers can be included. What was compiled before is read from the cache folder.
    ///
    /// # Errors
    /// [`CompileError::Source`] with the compiler's log when the source is wrong; [`CompileError::NoKernel`] and
    /// [`CompileError::SeveralKernels`] when there is not one kernel in it.
    pub fn compile(&self, source: &str, architecture: Architecture) -> Result<Compiled, CompileError> {
        self.results.get_or(source, architecture, || self.compile_anew(source, architecture))
    }

    /// Compiles many sources on all cores; the results are in the sources' order.
    #[must_use]
    pub fn compile_all(&self, sources: &[(&str, Architecture)]) -> Vec<Result<Compiled, CompileError>> {
        sources.par_iter().map(|(source, architecture)| self.compile(source, *architecture)).collect()
    }

    /// The machine code of the one kernel of a CUDA C++ source as CUDA's driver loads it, a cubin; made anew.
    ///
    /// # Errors
    /// As [`CudaCompiler::compile`].
    pub fn machine_code(&self, source: &str, architecture: Architecture) -> Result<Vec<u8>, CompileError> {
        let assembled = self.assemble(&self.ptx(source, architecture)?, architecture)?;
        Ok(fs::read(assembled.binary())?)
    }

    fn assemble(&self, ptx: &str, architecture: Architecture) -> Result<Assembled, CompileError> {
        let work = tempfile::tempdir()?;
        let assembly = work.path().join("kernel.ptx");
        fs::write(&assembly, ptx)?;
        let mut assemble = Command::new(&self.ptxas);
        let binary = work.path().join(CUBIN);
        assemble.arg("-v").arg(format!("-arch={architecture}")).arg(&assembly).arg("-o").arg(&binary);
        let report = run("ptxas", architecture, assemble)?;
        let usage = ptxas::Usage::parse(&String::from_utf8_lossy(&report.stderr)).ok_or(CompileError::NoKernel)?;
        let kernel = match usage.kernels.as_slice() {
            [kernel] => kernel.clone(),
            [] => return Err(CompileError::NoKernel),
            several => return Err(CompileError::SeveralKernels(several.to_vec())),
        };
        Ok(Assembled { kernel, usage, work })
    }

    /// The same of PTX that another program made, which says nothing of dynamic shared memory.
    ///
    /// # Errors
    /// [`CompileError::NoKernel`] and [`CompileError::SeveralKernels`] when there is not one kernel in it, and
    /// [`CompileError::Tool`] when it is wrong.
    pub fn compile_ptx(&self, ptx: &str, architecture: Architecture) -> Result<Compiled, CompileError> {
        self.results.get_or(ptx, architecture, || self.read(ptx, architecture, None))
    }

    fn compile_anew(&self, source: &str, architecture: Architecture) -> Result<Compiled, CompileError> {
        self.read(&self.ptx(source, architecture)?, architecture, launch::dynamic_shared_bytes(source))
    }

    /// Assembles PTX and reads what comes of it.
    fn read(
        &self,
        ptx: &str,
        architecture: Architecture,
        dynamic_shared_bytes: Option<u32>,
    ) -> Result<Compiled, CompileError> {
        let assembled = self.assemble(ptx, architecture)?;
        let mut disassemble = Command::new(&self.nvdisasm);
        disassemble.arg("-c").arg(assembled.binary());
        let listing = run("nvdisasm", architecture, disassemble)?;
        let listing = Listing::parse(&String::from_utf8_lossy(&listing.stdout));
        let mut instructions = BTreeMap::new();
        for instruction in &listing.instructions {
            *instructions.entry(instruction.opcode.clone()).or_default() += 1;
        }
        let mix = Mix::of(&listing.instructions);
        let Assembled { kernel, usage, .. } = assembled;
        Ok(Compiled {
            registers: usage.registers,
            spill_bytes: usage.spill_store_bytes.saturating_add(usage.spill_load_bytes),
            spill_store_bytes: usage.spill_store_bytes,
            stack_bytes: usage.stack_bytes,
            shared_bytes: usage.shared_bytes,
            dynamic_shared_bytes,
            threads: launch::threads(ptx),
            instructions,
            global_loads: check::loads(&mix),
            mix,
            main_loop: MainLoop::find(&listing, &kernel),
            kernel,
            architecture,
        })
    }

    /// The PTX that NVRTC makes of a source.
    fn ptx(&self, source: &str, architecture: Architecture) -> Result<String, CompileError> {
        let nvrtc = match self.loaded.get_or_init(|| Nvrtc::load(&self.nvrtc)) {
            Ok(nvrtc) => nvrtc,
            Err(reason) => return Err(CompileError::Load { library: self.nvrtc.clone(), reason: reason.clone() }),
        };
        let source = CString::new(source).map_err(|error| CompileError::ZeroByte { offset: error.nul_position() })?;
        let mut options = vec![format!("--gpu-architecture=compute_{}", architecture.number())];
        options.extend(self.includes.iter().map(|folder| format!("--include-path={}", folder.display())));
        nvrtc.ptx(&source, &options).map_err(|failure| match failure {
            Failure::Log(log) => CompileError::Source { architecture, log },
            Failure::Call { call, status } => CompileError::Nvrtc { call, status },
        })
    }
}

/// A pattern of the readers below.
fn pattern(text: &str) -> Regex {
    Regex::new(text).expect("the readers' patterns are constants that their tests compile")
}

/// Runs one of the tools to its end.
fn run(program: &'static str, architecture: Architecture, mut command: Command) -> Result<Output, CompileError> {
    let failed = |output: String| CompileError::Tool { program, architecture, output };
    let output = command.output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(failed([output.stderr.as_slice(), &output.stdout].map(String::from_utf8_lossy).join("\n").trim().to_owned()))
}

#[cfg(test)]
impl Compiled {
    /// A kernel that costs nothing, for tests to refine.
    fn example() -> Self {
        Self {
            kernel: "k".to_owned(),
            architecture: Architecture::Sm80,
            registers: 32,
            spill_bytes: 0,
            spill_store_bytes: 0,
            stack_bytes: 0,
            shared_bytes: 0,
            dynamic_shared_bytes: Some(0),
            threads: Some(128),
            instructions: BTreeMap::new(),
            global_loads: BTreeMap::new(),
            mix: Mix::default(),
            main_loop: None,
        }
    }
}
