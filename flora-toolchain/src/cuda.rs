//! The CUDA compilers without a GPU: what generated CUDA C++ costs as machine code.
//!
//! A launch has NVRTC make PTX, which the driver then assembles. Here the same NVRTC makes the PTX and `ptxas` stands in
//! for the driver, so a spill, or a half-precision kernel without tensor-core instructions, shows on any machine.
//! Everything comes from NVIDIA's own wheels and lies in the cache folder; no CUDA is installed.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::str::FromStr;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::cache::{Cache, from_environment};
use crate::error::FetchError;
use crate::nvrtc::{Failure, Nvrtc};
use crate::pypi::Wheel;
use crate::sass;

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

/// A generation of NVIDIA GPUs that kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Architecture {
    /// Ampere (A100): compute capability 8.0.
    #[serde(rename = "sm_80")]
    Sm80,
    /// Hopper (H100, H200): compute capability 9.0 with the features of that generation alone, as a launch there uses.
    #[serde(rename = "sm_90a")]
    Sm90a,
    /// Blackwell (B100, B200): compute capability 10.0.
    #[serde(rename = "sm_100")]
    Sm100,
}

/// A name that is none of [`Architecture`]'s.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown architecture `{0}`: use sm_80, sm_90 (or sm_90a) or sm_100")]
pub struct UnknownArchitecture(
    /// The name.
    pub String,
);

impl Architecture {
    /// Every architecture, oldest first.
    pub const ALL: [Self; 3] = [Self::Sm80, Self::Sm90a, Self::Sm100];

    /// The number and features after `sm_` and `compute_`.
    fn number(self) -> &'static str {
        match self {
            Self::Sm80 => "80",
            Self::Sm90a => "90a",
            Self::Sm100 => "100",
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sm_{}", self.number())
    }
}

impl FromStr for Architecture {
    type Err = UnknownArchitecture;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "sm_80" => Ok(Self::Sm80),
            "sm_90" | "sm_90a" => Ok(Self::Sm90a),
            "sm_100" => Ok(Self::Sm100),
            _ => Err(UnknownArchitecture(name.to_owned())),
        }
    }
}

/// What a source becomes. Numbers are those of all its kernels together: the largest registers and shared memory, the
/// sum of the rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compiled {
    /// The PTX that NVRTC made.
    pub ptx: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes a thread stores to and loads from local memory because registers ran out; 0 in a good kernel.
    pub spill_bytes: u32,
    /// Bytes of statically allocated shared memory a block.
    pub shared_bytes: u32,
    /// How often each machine instruction occurs, by opcode without modifiers: `HMMA`, `FFMA`, `LDG`. The `NOP`s that fill
    /// up the end of a kernel are left out.
    pub instructions: BTreeMap<String, u32>,
    /// How often a load from global memory (`LDG`) occurs, by its width: `32`, `64` or `128` bits, `U8`, `S8`, `U16` or
    /// `S16` for those that extend to a register.
    pub global_loads: BTreeMap<String, u32>,
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
        Ok(Self::of([NVRTC.ensure(cache)?, RUNTIME.ensure(cache)?, NVCC.ensure(cache)?, NVDISASM.ensure(cache)?]))
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
        Some(Self::of([nvrtc?, runtime?, nvcc?, nvdisasm?]))
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
    fn of([nvrtc, runtime, nvcc, nvdisasm]: [PathBuf; 4]) -> Self {
        Self {
            nvrtc: nvrtc.join(NVRTC.members[0]),
            ptxas: nvcc.join(NVCC.members[0]),
            nvdisasm: nvdisasm.join(NVDISASM.members[0]),
            includes: [runtime.join(RUNTIME.members[0]), nvcc.join(NVCC.members[1])],
            loaded: OnceLock::new(),
        }
    }

    /// Compiles CUDA C++ for `architecture` and reads what the machine code costs. The CUDA headers can be included.
    ///
    /// # Errors
    /// [`CompileError::Source`] with the compiler's log when the source is wrong; [`CompileError::NoKernel`] when there is
    /// nothing in it to launch.
    pub fn compile(&self, source: &str, architecture: Architecture) -> Result<Compiled, CompileError> {
        let nvrtc = match self.loaded.get_or_init(|| Nvrtc::load(&self.nvrtc)) {
            Ok(nvrtc) => nvrtc,
            Err(reason) => return Err(CompileError::Load { library: self.nvrtc.clone(), reason: reason.clone() }),
        };
        let source = CString::new(source).map_err(|error| CompileError::ZeroByte { offset: error.nul_position() })?;
        let mut options = vec![format!("--gpu-architecture=compute_{}", architecture.number())];
        options.extend(self.includes.iter().map(|folder| format!("--include-path={}", folder.display())));
        let ptx = nvrtc.ptx(&source, &options).map_err(|failure| match failure {
            Failure::Log(log) => CompileError::Source { architecture, log },
            Failure::Call { call, status } => CompileError::Nvrtc { call, status },
        })?;

        let work = tempfile::tempdir()?;
        let (assembly, binary) = (work.path().join("kernel.ptx"), work.path().join("kernel.cubin"));
        fs::write(&assembly, &ptx)?;
        let mut assemble = Command::new(&self.ptxas);
        assemble.arg("-v").arg(format!("-arch={architecture}")).arg(&assembly).arg("-o").arg(&binary);
        let report = run("ptxas", architecture, assemble)?;
        let usage = sass::Usage::parse(&String::from_utf8_lossy(&report.stderr)).ok_or(CompileError::NoKernel)?;
        let mut disassemble = Command::new(&self.nvdisasm);
        disassemble.arg("-c").arg(&binary);
        let listing = run("nvdisasm", architecture, disassemble)?;
        let mix = sass::Mix::parse(&String::from_utf8_lossy(&listing.stdout));
        Ok(Compiled {
            ptx,
            registers: usage.registers,
            spill_bytes: usage.spill_bytes,
            shared_bytes: usage.shared_bytes,
            instructions: mix.instructions,
            global_loads: mix.global_loads,
        })
    }
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
mod tests {
    use super::*;

    #[test]
    fn architectures_parse_back_and_serialise_as_printed() {
        for architecture in Architecture::ALL {
            assert_eq!(architecture.to_string().parse(), Ok(architecture));
            assert_eq!(serde_json::to_string(&architecture).unwrap(), format!("\"{architecture}\""));
        }
        assert_eq!("sm_90".parse(), Ok(Architecture::Sm90a));
        assert!("sm_75".parse::<Architecture>().unwrap_err().to_string().contains("sm_80"));
    }
}
