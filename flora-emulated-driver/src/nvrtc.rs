//! NVRTC: machine code is the text, behind a line that says for which cards it is.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;

use crate::calls::c_text;

/// What machine code begins with.
pub(crate) const HEADER: &str = "// emulated ";

const SUCCESS: c_int = 0;
const INVALID_INPUT: c_int = 3;
const INVALID_PROGRAM: c_int = 4;
const INVALID_OPTION: c_int = 5;
const COMPILATION: c_int = 6;

/// What `nvrtcProgram` points to.
#[derive(Default)]
struct Program {
    text: CString,
    code: CString,
    log: CString,
}

/// # Safety
/// As of NVRTC's: places for both. So it is below: programs were created, and places are as long as was said.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    if major.is_null() || minor.is_null() {
        return INVALID_INPUT;
    }
    // No version of NVIDIA's, so that nobody takes what is kept on disk for machine code.
    // SAFETY: the caller's.
    unsafe {
        major.write(0);
        minor.write(0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut c_void,
    text: *const c_char,
    _name: *const c_char,
    headers: c_int,
    _texts: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    if program.is_null() || text.is_null() || headers != 0 {
        return INVALID_INPUT;
    }
    // SAFETY: the caller's.
    let text = unsafe { CStr::from_ptr(text) }.to_owned();
    let own = Box::new(Program { text, ..Program::default() });
    // SAFETY: the caller's.
    unsafe { program.write(Box::into_raw(own).cast()) };
    SUCCESS
}

/// # Safety
/// `options` are `count` pointers to C strings.
#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCompileProgram(program: *mut c_void, count: c_int, options: *const *const c_char) -> c_int {
    // SAFETY: the caller's.
    let Some(program) = (unsafe { program.cast::<Program>().as_mut() }) else { return INVALID_PROGRAM };
    // SAFETY: the caller's.
    let option = |at: usize| unsafe { CStr::from_ptr(*options.add(at)) }.to_string_lossy().into_owned();
    let options: Vec<_> = (0..usize::try_from(count).unwrap_or(0)).map(option).collect();
    let of = |prefix: &str| options.iter().filter_map(|option| option.strip_prefix(prefix)).collect::<Vec<_>>();
    let (architectures, includes) = (of("--gpu-architecture="), of("--include-path="));
    let [architecture] = architectures[..] else { return INVALID_OPTION };
    let text = program.text.to_string_lossy();
    let log = if !includes.iter().any(|folder| Path::new(folder).join("cuda_runtime.h").is_file()) {
        "catastrophic error: cannot open source file \"cuda_runtime.h\""
    } else if !text.contains("extern \"C\" __global__ void") {
        "error: no kernel"
    } else {
        program.code = c_text(&format!("{HEADER}{architecture}\n{text}"));
        return SUCCESS;
    };
    program.log = c_text(log);
    COMPILATION
}

/// Gives the length of one of a program's texts, or the text itself, which ends with a zero.
unsafe fn give(program: *mut c_void, which: fn(&Program) -> &CString, bytes: *mut usize, text: *mut c_char) -> c_int {
    // SAFETY: the caller's.
    let Some(program) = (unsafe { program.cast::<Program>().as_ref() }) else { return INVALID_PROGRAM };
    let own = which(program).as_bytes_with_nul();
    // SAFETY: the caller's.
    unsafe {
        if !bytes.is_null() {
            bytes.write(own.len());
        }
        if !text.is_null() {
            std::ptr::copy_nonoverlapping(own.as_ptr().cast(), text, own.len());
        }
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBINSize(program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(program, |program| &program.code, bytes, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetCUBIN(program: *mut c_void, code: *mut c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(program, |program| &program.code, std::ptr::null_mut(), code) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(program: *mut c_void, bytes: *mut usize) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(program, |program| &program.log, bytes, std::ptr::null_mut()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(program: *mut c_void, log: *mut c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { give(program, |program| &program.log, std::ptr::null_mut(), log) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut c_void) -> c_int {
    if program.is_null() {
        return INVALID_PROGRAM;
    }
    // SAFETY: the caller's: it was created, and is destroyed once.
    drop(unsafe { Box::from_raw((*program).cast::<Program>()) });
    SUCCESS
}
