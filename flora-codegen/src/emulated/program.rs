//! A kernel's text as a library of the processor's: what is added to it, what it is linked to, and how it is called.

use std::ffi::{CStr, c_char, c_void};
use std::sync::{Mutex, PoisonError};

use flora_toolchain::{CxxCompiler, CxxError, Sanitizer};
use libloading::Library;

use super::memory::Resource;

/// What stands in for CUDA's headers, and for a block of threads.
const HEADERS: [(&str, &str); 6] = [
    ("emulation.h", include_str!("include/emulation.h")),
    ("cuda_runtime.h", include_str!("include/cuda_runtime.h")),
    ("cuda_fp16.h", include_str!("include/cuda_fp16.h")),
    ("cuda_bf16.h", include_str!("include/cuda_bf16.h")),
    ("mma.h", include_str!("include/mma.h")),
    ("ptx.h", include_str!("include/ptx.h")),
];

/// What precedes the size of a shared array in the text, and what its place.
const SHARED_SIZE: &str = "// Shared array size: ";
const SHARED_PLACE: &str = "&dynamic_shared_mem[";

/// What functions of inline PTX begin with, and their names, by which `ptx.h` has them.
const PTX_FUNCTION: &str = "inline __device__ void";
const PTX_NAMES: [&str; 2] = ["__ldmatrix_m8n8_", "__mma_m16n8k16_"];

/// Why a kernel doesn't run.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProgramError {
    #[error(transparent)]
    Compile(#[from] CxxError),
    #[error("a kernel's library can't be loaded: {0}")]
    Load(#[from] libloading::Error),
    #[error("`{kernel}` breaks the rules of a card: {reason}")]
    Run { kernel: String, reason: String },
}

/// A kernel that can be launched.
pub(super) struct Program {
    name: String,
    shared: Vec<SharedArray>,
    launch: unsafe extern "C" fn(*const Launch) -> *const c_char,
    /// Holds the function.
    _library: Library,
}

impl std::fmt::Debug for Program {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Program").field(&self.name).finish()
    }
}

/// `emulation::SharedArray`: where an array lies in a block's shared memory, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SharedArray {
    offset: usize,
    bytes: usize,
}

/// `emulation::Buffer`.
#[repr(C)]
struct BufferRange {
    start: *mut c_void,
    bytes: usize,
}

/// `emulation::Launch`.
#[repr(C)]
struct Launch {
    grid: [u32; 3],
    block: [u32; 3],
    arguments: *const *const c_void,
    buffers: *const BufferRange,
    buffer_count: usize,
    shared_arrays: *const SharedArray,
    shared_array_count: usize,
    shared_bytes: usize,
}

impl Program {
    /// Compiles a kernel's text.
    pub(super) fn new(
        compiler: &CxxCompiler,
        (name, source): (&str, &str),
        sanitizer: Option<Sanitizer>,
    ) -> Result<Self, ProgramError> {
        let (source, shared) = spread_shared_arrays(&without_ptx(source));
        #[cfg(test)]
        let source = super::tests::broken(source);
        let source = format!(
            "#include \"ptx.h\"\n{source}\nextern \"C\" const char* flora_launch(const emulation::Launch* launch) {{\n\
             return emulation::run([](void** arguments) {{ emulation::call({name}, arguments); }}, *launch);\n}}\n"
        );
        let path = compiler.library(&source, &HEADERS, sanitizer)?;
        // SAFETY: the library is what was just compiled, and has no constructors.
        let (library, launch) = unsafe {
            let library = Library::new(path)?;
            let launch = *library.get(b"flora_launch\0")?;
            (library, launch)
        };
        Ok(Self { name: name.to_owned(), shared, launch, _library: library })
    }

    /// Runs every cube of these units, one after the other.
    ///
    /// # Safety
    /// The buffers and what is passed by value are what the kernel's parameters say.
    pub(super) unsafe fn run(
        &self,
        (grid, block): ([u32; 3], [u32; 3]),
        buffers: &[Resource],
        by_value: &[u64],
    ) -> Result<(), ProgramError> {
        let ranges: Vec<_> = buffers
            .iter()
            .map(|resource| BufferRange { start: resource.start.cast(), bytes: resource.length })
            .collect();
        // As CUDA's driver takes them: a pointer to each.
        let mut arguments: Vec<*const c_void> = ranges.iter().map(|range| (&raw const range.start).cast()).collect();
        arguments.push(by_value.as_ptr().cast());
        let last = self.shared.last();
        let launch = Launch {
            grid,
            block,
            arguments: arguments.as_ptr(),
            buffers: ranges.as_ptr(),
            buffer_count: ranges.len(),
            shared_arrays: self.shared.as_ptr(),
            shared_array_count: self.shared.len(),
            shared_bytes: last.map_or(0, |last| last.offset + last.bytes),
        };
        // A library's block is one, whichever devices have loaded it.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the layout is that of `emulation.h`, and what it points to lives until the call returns.
        let failure = unsafe { (self.launch)(&raw const launch) };
        if failure.is_null() {
            return Ok(());
        }
        // SAFETY: what is not null is a text of the library's.
        let reason = unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned();
        Err(ProgramError::Run { kernel: self.name.clone(), reason })
    }
}

/// The text without the functions of inline PTX that `ptx.h` has others for.
fn without_ptx(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut lines = source.lines().peekable();
    while let Some(line) = lines.next() {
        let named = |next: &&str| PTX_NAMES.iter().any(|name| next.starts_with(name));
        if line.trim() == PTX_FUNCTION && lines.peek().is_some_and(named) {
            lines.by_ref().find(|line| line.trim() == "}");
            continue;
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// The text with its shared memory where the emulator keeps it, and with room between its arrays, so that an index beyond one hits
/// no other.
fn spread_shared_arrays(source: &str) -> (String, Vec<SharedArray>) {
    /// Between two arrays; a multiple of what any array is aligned to.
    const GAP: usize = 256;
    let (mut text, mut arrays, mut bytes) = (String::with_capacity(source.len()), Vec::new(), None);
    let mut next = 0usize;
    for line in source.lines() {
        if line.starts_with("extern __shared__ ") {
            text.push_str("uint8* dynamic_shared_mem = emulation::block.shared;\n");
            continue;
        }
        // The size is on the line before the place.
        let size = line.strip_prefix(SHARED_SIZE).and_then(|sizes| sizes.split_once(", "));
        let size = size.and_then(|(_, size)| size.strip_suffix(" bytes")?.parse::<usize>().ok());
        match (bytes, line.split_once(SHARED_PLACE)) {
            (Some(bytes), Some((before, after))) => {
                let after = after.split_once(']').map_or("", |(_, after)| after);
                text.push_str(&format!("{before}{SHARED_PLACE}{next}]{after}\n"));
                arrays.push(SharedArray { offset: next, bytes });
                next = (next + bytes).next_multiple_of(GAP) + GAP;
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
        bytes = size;
    }
    (text, arrays)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_ptx_are_replaced() {
        let kept = "inline __device__ void\n__cp_async(int a) {\n  asm(\"\");\n    }\n";
        let dropped = "inline __device__ void\n__ldmatrix_m8n8___half_4x(int a) {\n  asm(\"\");\n    }\n";
        assert_eq!(without_ptx(&format!("{kept}{dropped}void f() {{\n}}\n")), format!("{kept}void f() {{\n}}\n"));
    }

    #[test]
    fn shared_arrays_are_apart() {
        let source = "void f() {\nextern __shared__ __align__(4) uint8 dynamic_shared_mem[];\n\
                      // Shared array size: 4, 16 bytes\nfloat *a = cast(&dynamic_shared_mem[0]);\n\
                      // Shared array size: 300, 1200 bytes\nfloat *b = cast(&dynamic_shared_mem[128]);\n}\n";
        let (text, arrays) = spread_shared_arrays(source);
        let expected = source
            .replace(
                "extern __shared__ __align__(4) uint8 dynamic_shared_mem[];",
                "uint8* dynamic_shared_mem = emulation::block.shared;",
            )
            .replace("mem[128]", "mem[512]");
        assert_eq!(text, expected);
        assert_eq!(arrays, [SharedArray { offset: 0, bytes: 16 }, SharedArray { offset: 512, bytes: 1200 }]);
    }
}
