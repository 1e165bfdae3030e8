//! The calls of NVRTC, loaded at run time: CUDA C++ in, PTX out.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::ptr;

use libloading::Library;

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Text = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

/// `NVRTC_ERROR_COMPILATION`: the source is wrong, and the log says where.
const COMPILATION: c_int = 6;

/// NVRTC's entry points. The library stays loaded to the end of the process: it isn't made to be unloaded.
pub(crate) struct Nvrtc {
    create: Create,
    compile: Compile,
    log: (Size, Text),
    ptx: (Size, Text),
    destroy: Destroy,
    _library: ManuallyDrop<Library>,
}

impl fmt::Debug for Nvrtc {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Nvrtc")
    }
}

/// Why there is no PTX.
pub(crate) enum Failure {
    /// The source is wrong; the compiler's log.
    Log(String),
    /// A call failed for another reason.
    Call { call: &'static str, status: c_int },
}

/// Makes a status a result.
fn check(call: &'static str, status: c_int) -> Result<(), Failure> {
    if status == 0 { Ok(()) } else { Err(Failure::Call { call, status }) }
}

impl Nvrtc {
    /// Loads the library at `path`; the reason as text when that fails.
    pub(crate) fn load(path: &Path) -> Result<Self, String> {
        let load = || {
            // SAFETY: the file is NVIDIA's own, checked against its SHA-256 when it was unpacked, and has no initialiser
            // with preconditions; the types above are those that nvrtc.h declares for these names.
            unsafe {
                let library = Library::new(path)?;
                Ok(Self {
                    create: *library.get::<Create>(b"nvrtcCreateProgram\0")?,
                    compile: *library.get::<Compile>(b"nvrtcCompileProgram\0")?,
                    log: (*library.get(b"nvrtcGetProgramLogSize\0")?, *library.get(b"nvrtcGetProgramLog\0")?),
                    ptx: (*library.get(b"nvrtcGetPTXSize\0")?, *library.get(b"nvrtcGetPTX\0")?),
                    destroy: *library.get::<Destroy>(b"nvrtcDestroyProgram\0")?,
                    _library: ManuallyDrop::new(library),
                })
            }
        };
        load().map_err(|error: libloading::Error| error.to_string())
    }

    /// PTX of `source`. Threads may call this at once.
    pub(crate) fn ptx(&self, source: &CStr, options: &[String]) -> Result<String, Failure> {
        // An option with a zero byte would be a path with one, which no system has.
        let options: Vec<CString> = options.iter().filter_map(|option| CString::new(option.as_str()).ok()).collect();
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program = Handle { nvrtc: self, program: ptr::null_mut() };
        // SAFETY: the pointers are to C strings and a place for the program, all alive during the call; there are no
        // headers, so their arrays may be null.
        let status = unsafe {
            (self.create)(&mut program.program, source.as_ptr(), c"kernel.cu".as_ptr(), 0, ptr::null(), ptr::null())
        };
        check("nvrtcCreateProgram", status)?;
        let count = c_int::try_from(options.len()).unwrap_or(0);
        // SAFETY: the program was created above, and the array holds `count` pointers to C strings that are alive.
        let status = unsafe { (self.compile)(program.program, count, options.as_ptr()) };
        if status == COMPILATION {
            return Err(Failure::Log(program.text("nvrtcGetProgramLog", self.log)?.trim().to_owned()));
        }
        check("nvrtcCompileProgram", status)?;
        program.text("nvrtcGetPTX", self.ptx)
    }
}

/// A program, destroyed when it is no longer needed.
struct Handle<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl Handle<'_> {
    /// One of the program's texts: its size, then its bytes.
    fn text(&self, call: &'static str, (size, text): (Size, Text)) -> Result<String, Failure> {
        let mut bytes = 0;
        // SAFETY: the program is alive, and `bytes` a place for the size.
        check(call, unsafe { size(self.program, &mut bytes) })?;
        let mut buffer = vec![0u8; bytes];
        // SAFETY: the buffer holds as many bytes as NVRTC said it will write, the closing zero among them.
        check(call, unsafe { text(self.program, buffer.as_mut_ptr().cast()) })?;
        let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(bytes);
        Ok(String::from_utf8_lossy(&buffer[..end]).into_owned())
    }
}

impl Drop for Handle<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: the program was created and is destroyed only here. A failure leaves nothing to be done.
            unsafe { (self.nvrtc.destroy)(&mut self.program) };
        }
    }
}
