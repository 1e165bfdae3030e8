//! NVRTC: from a kernel's text to machine code.

use std::env;
use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;

use cudarc::nvrtc::{result, sys};

use crate::error::DriverError;

/// Folders with CUDA's headers, in which kernels' `#include`s are looked for in order.
#[derive(Clone, Debug, Default)]
pub struct Includes(pub Vec<PathBuf>);

/// What every kernel includes.
const HEADER: &str = "cuda_runtime.h";

impl Includes {
    /// Those of the toolkits that `CUDA_PATH` and `CUDA_HOME` name, and of `/usr/local/cuda`.
    pub fn of_toolkit() -> Self {
        let named = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(env::var_os).filter(|path| !path.is_empty());
        let toolkits = named.map(PathBuf::from).chain([PathBuf::from("/usr/local/cuda")]);
        Self(toolkits.map(|toolkit| toolkit.join("include")).filter(|folder| folder.is_dir()).collect())
    }

    fn check(&self) -> Result<(), DriverError> {
        if self.0.iter().any(|folder| folder.join(HEADER).is_file()) {
            return Ok(());
        }
        let looked: Vec<_> = self.0.iter().map(|folder| folder.display().to_string()).collect();
        let looked = if looked.is_empty() { "any folder that is known".to_owned() } else { looked.join(", ") };
        Err(DriverError::NoHeaders { looked })
    }

    fn options(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|folder| format!("--include-path={}", folder.display()))
    }
}

/// NVRTC's version.
///
/// # Errors
/// There is no NVRTC.
pub(crate) fn version() -> Result<(i32, i32), DriverError> {
    static PRESENT: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: NVIDIA's own library, which is made to be loaded.
    if !*PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
        let help = "it comes with CUDA's toolkit and with PyTorch (`nvidia-cuda-nvrtc-cu12`): name its folder in LD_LIBRARY_PATH";
        return Err(DriverError::NoLibrary { library: "NVRTC", help });
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC writes two numbers.
    let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result();
    status.map_err(|error| failed("nvrtcVersion", "NVRTC", error))?;
    Ok((major, minor))
}

/// Machine code of a text.
///
/// # Errors
/// NVRTC doesn't take it, or hasn't CUDA's headers.
pub(crate) fn machine_code(
    (kernel, text): (&str, &str),
    architecture: &str,
    includes: &Includes,
) -> Result<Vec<u8>, DriverError> {
    includes.check()?;
    let text = CString::new(text)
        .map_err(|_| DriverError::List { problem: format!("the text of `{kernel}` has a zero byte in it") })?;
    let program = result::create_program(&text, None).map_err(|error| failed("nvrtcCreateProgram", kernel, error))?;
    let program = Program(program);
    let options: Vec<_> =
        [format!("--gpu-architecture={architecture}")].into_iter().chain(includes.options()).collect();
    if let Some(zero) = options.iter().find(|option| option.contains('\0')) {
        return Err(DriverError::List { problem: format!("the folder of an option has a zero byte in it: {zero:?}") });
    }
    // SAFETY: the program was just created, and `text` lives until it is destroyed.
    match unsafe { result::compile_program(program.0, &options) } {
        Ok(()) => {}
        Err(result::NvrtcError(sys::nvrtcResult::NVRTC_ERROR_COMPILATION)) => {
            // SAFETY: as above.
            let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
            let (kernel, architecture) = (kernel.to_owned(), architecture.to_owned());
            return Err(DriverError::Compile { kernel, architecture, log: said(&log) });
        }
        Err(error) => return Err(failed("nvrtcCompileProgram", kernel, error)),
    }
    let mut bytes = 0;
    // SAFETY: the program was compiled; NVRTC writes one number.
    let status = unsafe { sys::nvrtcGetCUBINSize(program.0, &mut bytes) }.result();
    status.map_err(|error| failed("nvrtcGetCUBINSize", kernel, error))?;
    let mut code = vec![0u8; bytes];
    // SAFETY: there is room for as many bytes as NVRTC has said.
    let status = unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }.result();
    status.map_err(|error| failed("nvrtcGetCUBIN", kernel, error))?;
    Ok(code)
}

/// A program of NVRTC's.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: it was created, and is destroyed only here.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn failed(call: &'static str, about: &str, error: result::NvrtcError) -> DriverError {
    DriverError::Call { call, about: about.to_owned(), status: format!("{:?}", error.0) }
}

/// A text that ends with a zero, or where its memory does.
fn said(text: &[c_char]) -> String {
    let text: &[u8] = bytemuck::cast_slice(text);
    CStr::from_bytes_until_nul(text)
        .map_or_else(|_| String::from_utf8_lossy(text), CStr::to_string_lossy)
        .trim()
        .to_owned()
}
