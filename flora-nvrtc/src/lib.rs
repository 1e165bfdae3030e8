//! Stands in for NVRTC: gives machine code that was kept for a kernel's text, and passes what there is none of on to the real one.
//!
//! A program compiles each kernel when it first runs it, seconds apiece, and on a card minutes are few. The same compilers run without
//! a card, so that a folder can bring the machine code along ([`KeptKernels`]). cubecl has a cache of its own, whose key has the
//! runtime's type in it, so that nothing but a card fills it. This library is put where the program looks for `libnvrtc.so`: that is a
//! public interface, and what is asked there is the text itself. A kernel that has changed has another text, and is compiled.
//!
//! The functions are those that cubecl's CUDA runtime and `flora-driver` call, with the types of `nvrtc.h`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;

use flora_codegen::target::stable_cuda_text;
use flora_toolchain::{Architecture, KeptKernels};
use libloading::Library;

/// Names the real library.
const REAL: &str = "FLORA_NVRTC";
/// Names a file that gets a line for each kernel: `kept` or `compiled`, and its name.
const LOG: &str = "FLORA_KERNELS_LOG";

/// `nvrtcResult`.
type Status = c_int;
const SUCCESS: Status = 0;
const INVALID_INPUT: Status = 3;
const INVALID_PROGRAM: Status = 4;
/// There is no real library to pass a kernel on to.
const INTERNAL_ERROR: Status = 11;

type Create = unsafe extern "C" fn(
    *mut *mut c_void,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Status;
type Compile = unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> Status;
type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> Status;
type Text = unsafe extern "C" fn(*mut c_void, *mut c_char) -> Status;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status;
type Destroy = unsafe extern "C" fn(*mut *mut c_void) -> Status;

/// The real library's functions; it stays loaded to the end of the process.
struct Real {
    create: Create,
    compile: Compile,
    version: Version,
    ptx: (Size, Text),
    cubin: (Size, Text),
    log: (Size, Text),
    destroy: Destroy,
    _library: Library,
}

impl Real {
    /// The one that the environment names, loaded when it is first needed.
    fn get() -> Option<&'static Self> {
        static REAL_LIBRARY: OnceLock<Option<Real>> = OnceLock::new();
        REAL_LIBRARY.get_or_init(|| Self::load().ok()).as_ref()
    }

    fn load() -> Result<Self, libloading::Error> {
        let path = std::env::var_os(REAL).unwrap_or_else(|| "libnvrtc.so.12".into());
        // SAFETY: whoever sets the variable names NVIDIA's library, whose functions have these types.
        unsafe {
            let library = Library::new(path)?;
            Ok(Self {
                create: *library.get(b"nvrtcCreateProgram\0")?,
                compile: *library.get(b"nvrtcCompileProgram\0")?,
                version: *library.get(b"nvrtcVersion\0")?,
                cubin: (*library.get(b"nvrtcGetCUBINSize\0")?, *library.get(b"nvrtcGetCUBIN\0")?),
                ptx: (*library.get(b"nvrtcGetPTXSize\0")?, *library.get(b"nvrtcGetPTX\0")?),
                log: (*library.get(b"nvrtcGetProgramLogSize\0")?, *library.get(b"nvrtcGetProgramLog\0")?),
                destroy: *library.get(b"nvrtcDestroyProgram\0")?,
                _library: library,
            })
        }
    }
}

/// What `nvrtcProgram` points to.
struct Program {
    source: CString,
    name: Option<CString>,
    made: Made,
}

/// What has come of a program.
enum Made {
    /// It wasn't compiled yet.
    Nothing,
    /// Machine code that was kept.
    Kept(Vec<u8>),
    /// The real library's program.
    Passed(*mut c_void),
}

impl Program {
    /// Compiles it, or finds what was kept.
    ///
    /// # Safety
    /// `options` are `count` pointers to C strings.
    unsafe fn compile(&mut self, count: c_int, options: *const *const c_char) -> Status {
        let option = |at: c_int| {
            // SAFETY: the caller's.
            let option = unsafe { CStr::from_ptr(*options.add(usize::try_from(at).unwrap_or(0))) };
            option.to_string_lossy().into_owned()
        };
        let architecture = (0..count).find_map(|at| {
            let name = option(at);
            name.strip_prefix("--gpu-architecture=")?.parse::<Architecture>().ok()
        });
        let found = architecture.zip(KeptKernels::from_environment()).and_then(|(architecture, kept)| {
            kept.find(&stable_cuda_text(&self.source.to_string_lossy()), architecture)
        });
        note(if found.is_some() { "kept" } else { "compiled" }, &self.source);
        if let Some(code) = found {
            self.made = Made::Kept(code);
            return SUCCESS;
        }
        let Some(real) = Real::get() else { return INTERNAL_ERROR };
        let name = self.name.as_ref().map_or(std::ptr::null(), |name| name.as_ptr());
        let mut program = std::ptr::null_mut();
        // SAFETY: the texts are C strings that live as long as this program; there are no headers.
        let status =
            unsafe { (real.create)(&mut program, self.source.as_ptr(), name, 0, std::ptr::null(), std::ptr::null()) };
        if status != SUCCESS {
            return status;
        }
        self.made = Made::Passed(program);
        // SAFETY: the program was just created; the options are the caller's.
        unsafe { (real.compile)(program, count, options) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let (Made::Passed(program), Some(real)) = (&mut self.made, Real::get()) {
            // SAFETY: it was created by the real library and is destroyed only here.
            unsafe { (real.destroy)(program) };
        }
    }
}

/// Writes a line about a kernel where that is asked for. Without it nothing is known of it, and nothing else changes.
fn note(word: &str, source: &CStr) {
    let Some(path) = std::env::var_os(LOG) else { return };
    let source = source.to_string_lossy();
    let name = name(&source).unwrap_or("?");
    if let Ok(mut file) = File::options().create(true).append(true).open(path) {
        let _ = file.write_all(format!("{word} {name}\n").as_bytes());
    }
}

/// The kernel's name: `__global__ void __launch_bounds__(128) tile(`.
fn name(source: &str) -> Option<&str> {
    let (_, rest) = source.split_once("__global__ void ")?;
    let bounds = rest.trim_start().strip_prefix("__launch_bounds__").and_then(|rest| rest.split_once(')'));
    let (name, _) = bounds.map_or(rest, |(_, rest)| rest).split_once('(')?;
    Some(name.trim())
}

/// # Safety
/// As of NVRTC's: `source` and `name` are C strings, the latter may be null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    source: *const c_char,
    name: *const c_char,
    headers: c_int,
    _texts: *const *const c_char,
    _names: *const *const c_char,
) -> Status {
    // cubecl passes no header's text.
    if program.is_null() || source.is_null() || headers != 0 {
        return INVALID_INPUT;
    }
    let owned = |text: *const c_char| {
        // SAFETY: the caller's.
        unsafe { CStr::from_ptr(text) }.to_owned()
    };
    let name = (!name.is_null()).then(|| owned(name));
    let made = Box::new(Program { source: owned(source), name, made: Made::Nothing });
    // SAFETY: the caller gives a place for it.
    unsafe { *program = Box::into_raw(made).cast() };
    SUCCESS
}

/// # Safety
/// As of NVRTC's: `program` was created, and `options` are `count` pointers to C strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: *mut c_void,
    count: c_int,
    options: *const *const c_char,
) -> Status {
    // SAFETY: the caller's.
    match unsafe { program.cast::<Program>().as_mut() } {
        // SAFETY: the caller's.
        Some(program) => unsafe { program.compile(count, options) },
        None => INVALID_PROGRAM,
    }
}

/// The size of one of a program's texts: of the kept one, or of the real library's.
///
/// # Safety
/// `program` was created, and `size` is a place.
unsafe fn size_of_text(program: *mut c_void, size: *mut usize, kept: usize, which: fn(&Real) -> Size) -> Status {
    // SAFETY: the caller's.
    let Some(program) = (unsafe { program.cast::<Program>().as_ref() }) else { return INVALID_PROGRAM };
    match (&program.made, Real::get()) {
        (Made::Kept(_), _) => {
            // SAFETY: the caller's.
            unsafe { *size = kept };
            SUCCESS
        }
        // SAFETY: the program is the real library's.
        (Made::Passed(program), Some(real)) => unsafe { which(real)(*program, size) },
        _ => INVALID_PROGRAM,
    }
}

/// How long the kept machine code is, or what the real library answers.
///
/// # Safety
/// `program` was created and compiled, and `size` is a place.
unsafe fn size_of_code(program: *mut c_void, size: *mut usize, which: fn(&Real) -> Size) -> Status {
    // SAFETY: the caller's.
    let kept = match unsafe { program.cast::<Program>().as_ref() } {
        Some(Program { made: Made::Kept(code), .. }) => code.len(),
        _ => 0,
    };
    // SAFETY: the caller's.
    unsafe { size_of_text(program, size, kept, which) }
}

/// The machine code where it was kept, which CUDA's driver loads as it loads PTX; else what the real library has.
///
/// # Safety
/// `program` was created and compiled, and `text` has as many bytes as was said.
unsafe fn code(program: *mut c_void, text: *mut c_char, which: fn(&Real) -> Text) -> Status {
    // SAFETY: the caller's.
    let Some(program) = (unsafe { program.cast::<Program>().as_ref() }) else { return INVALID_PROGRAM };
    match (&program.made, Real::get()) {
        (Made::Kept(code), _) => {
            // SAFETY: the caller's buffer is as long as the size that was given.
            unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), text.cast(), code.len()) };
            SUCCESS
        }
        // SAFETY: the program is the real library's.
        (Made::Passed(program), Some(real)) => unsafe { which(real)(*program, text) },
        _ => INVALID_PROGRAM,
    }
}

/// # Safety
/// As of NVRTC's: `program` was created and compiled, and `size` is a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetPTXSize(program: *mut c_void, size: *mut usize) -> Status {
    // SAFETY: the caller's.
    unsafe { size_of_code(program, size, |real| real.ptx.0) }
}

/// # Safety
/// As of NVRTC's: `program` was created and compiled, and `text` has as many bytes as was said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetPTX(program: *mut c_void, text: *mut c_char) -> Status {
    // SAFETY: the caller's.
    unsafe { code(program, text, |real| real.ptx.1) }
}

/// # Safety
/// As of [`nvrtcGetPTXSize`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, size: *mut usize) -> Status {
    // SAFETY: the caller's.
    unsafe { size_of_code(program, size, |real| real.cubin.0) }
}

/// # Safety
/// As of [`nvrtcGetPTX`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, code_of_it: *mut c_char) -> Status {
    // SAFETY: the caller's.
    unsafe { code(program, code_of_it, |real| real.cubin.1) }
}

/// # Safety
/// As of NVRTC's: places for both numbers, which are those of the real library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> Status {
    match Real::get() {
        // SAFETY: the caller's.
        Some(real) => unsafe { (real.version)(major, minor) },
        None => INTERNAL_ERROR,
    }
}

/// # Safety
/// As of NVRTC's: `program` was created and compiled, and `size` is a place.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut c_void, size: *mut usize) -> Status {
    // An empty text has its closing zero.
    // SAFETY: the caller's.
    unsafe { size_of_text(program, size, 1, |real| real.log.0) }
}

/// # Safety
/// As of NVRTC's: `program` was created and compiled, and `text` has as many bytes as was said.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetProgramLog(program: *mut c_void, text: *mut c_char) -> Status {
    // SAFETY: the caller's.
    let Some(program) = (unsafe { program.cast::<Program>().as_ref() }) else { return INVALID_PROGRAM };
    match (&program.made, Real::get()) {
        (Made::Kept(_), _) => {
            // SAFETY: the caller's buffer is as long as the size that was given.
            unsafe { *text = 0 };
            SUCCESS
        }
        // SAFETY: the program is the real library's.
        (Made::Passed(program), Some(real)) => unsafe { real.log.1(*program, text) },
        _ => INVALID_PROGRAM,
    }
}

/// # Safety
/// As of NVRTC's: `program` points to one that was created, which is gone afterwards.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    let Some(place) = (unsafe { program.as_mut() }).filter(|place| !place.is_null()) else { return INVALID_PROGRAM };
    // SAFETY: it was made by `nvrtcCreateProgram`.
    drop(unsafe { Box::from_raw(place.cast::<Program>()) });
    *place = std::ptr::null_mut();
    SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    const KERNEL: &str =
        "extern \"C\" __global__ void __launch_bounds__(128) tile(float* a_0) {\nfloat l_mut_2;\nfloat l_mut_1;\n}\n";

    /// The status of each call, and the text that comes of it.
    fn compiled(source: &str, architecture: &str) -> (Status, Vec<u8>) {
        let source = CString::new(source).unwrap();
        let option = CString::new(format!("--gpu-architecture={architecture}")).unwrap();
        let options = [option.as_ptr(), c"-lineinfo".as_ptr()];
        let (mut program, null) = (std::ptr::null_mut(), std::ptr::null());
        // SAFETY: the texts are alive, and each place has the size that was said.
        unsafe {
            assert_eq!(nvrtcCreateProgram(&mut program, source.as_ptr(), null, 0, null.cast(), null.cast()), SUCCESS);
            let status = nvrtcCompileProgram(program, 2, options.as_ptr());
            let mut size = 0;
            let mut text = Vec::new();
            if nvrtcGetPTXSize(program, &mut size) == SUCCESS {
                text.resize(size, 7);
                assert_eq!(nvrtcGetPTX(program, text.as_mut_ptr().cast()), SUCCESS);
                let mut code = vec![7; size];
                assert_eq!(nvrtcGetCUBINSize(program, &mut size), SUCCESS);
                assert_eq!((nvrtcGetCUBIN(program, code.as_mut_ptr().cast()), size), (SUCCESS, code.len()));
                assert_eq!(code, text, "machine code is machine code, by either name");
                let mut log = [c_char::MAX];
                assert_eq!((nvrtcGetProgramLogSize(program, &mut size), size), (SUCCESS, 1));
                assert_eq!((nvrtcGetProgramLog(program, log.as_mut_ptr()), log), (SUCCESS, [0]));
            }
            assert_eq!((nvrtcDestroyProgram(&mut program), program), (SUCCESS, std::ptr::null_mut()));
            assert_eq!(nvrtcDestroyProgram(&mut program), INVALID_PROGRAM);
            assert_eq!(nvrtcCompileProgram(program, 0, options.as_ptr()), INVALID_PROGRAM);
            (status, text)
        }
    }

    #[test]
    fn a_kernel_is_named() {
        assert_eq!(name(KERNEL), Some("tile"));
        assert_eq!(name("__global__ void k(float* a) {}"), Some("k"));
        assert_eq!(name("nothing"), None);
    }

    #[test]
    fn what_was_kept_is_given_and_the_rest_is_passed_on() {
        let root = std::env::temp_dir().join(format!("flora-nvrtc-{}", std::process::id()));
        let (folder, log) = (root.join("kernels"), root.join("log"));
        // SAFETY: the only test of this program sets them before anything reads them.
        unsafe {
            std::env::set_var(KeptKernels::VARIABLE, &folder);
            std::env::set_var(LOG, &log);
            std::env::set_var(REAL, root.join("no-nvrtc.so"));
        }
        let code = [0, 0x7f, 0xff, 0];
        KeptKernels::at(folder).keep(&stable_cuda_text(KERNEL), Architecture::Sm90a, &code).unwrap();
        // The order of declarations is an accident of cubecl's compiler.
        let other = KERNEL.replace("float l_mut_2;\nfloat l_mut_1;", "float l_mut_1;\nfloat l_mut_2;");
        assert_eq!(compiled(KERNEL, "sm_90a"), (SUCCESS, code.to_vec()));
        assert_eq!(compiled(&other, "sm_90a"), (SUCCESS, code.to_vec()));
        // Another architecture's, another text's: there is no real library here.
        assert_eq!(compiled(KERNEL, "sm_80"), (INTERNAL_ERROR, Vec::new()));
        assert_eq!(compiled(&KERNEL.replace("float*", "double*"), "sm_90a"), (INTERNAL_ERROR, Vec::new()));
        let noted = std::fs::read_to_string(&log).unwrap();
        assert_eq!(noted, "kept tile\nkept tile\ncompiled tile\ncompiled tile\n");
        std::fs::remove_dir_all(root).unwrap();
    }
}
