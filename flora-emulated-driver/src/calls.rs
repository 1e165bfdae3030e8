//! Cards, contexts, memory and modules.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use flora_codegen::emulated::EmulatedKernel;

use crate::nvrtc::HEADER;
use crate::state::{CARDS, Driver, Function, Module, Operation, UNASKED_SHARED_BYTES};
use crate::status::*;

thread_local! {
    /// The context that is current: a card's number and 1; 0 is none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

pub(crate) fn driver() -> MutexGuard<'static, Driver> {
    static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(Mutex::default);
    DRIVER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The current context, or why there is none.
pub(crate) fn current() -> Result<usize, Status> {
    match CURRENT.get() {
        0 => Err(INVALID_CONTEXT),
        context => Ok(context),
    }
}

pub(crate) fn status(outcome: Result<(), Status>) -> Status {
    outcome.err().unwrap_or(SUCCESS)
}

/// Writes to a place of the caller's.
///
/// # Safety
/// It is null, or a place for such a value.
pub(crate) unsafe fn give<T>(place: *mut T, value: T) -> Result<(), Status> {
    if place.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's.
    unsafe { place.write(value) };
    Ok(())
}

pub(crate) fn handle<T>(number: usize) -> *mut T {
    std::ptr::without_provenance_mut(number)
}

fn card(device: c_int) -> Result<(u16, &'static str, i32), Status> {
    usize::try_from(device).ok().and_then(|at| CARDS.get(at)).copied().ok_or(INVALID_DEVICE)
}

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> Status {
    driver().initialized = true;
    SUCCESS
}

/// # Safety
/// As of the driver's: a place for the answer. So it is below.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    if !driver().initialized {
        return NOT_INITIALIZED;
    }
    // SAFETY: the caller's.
    status(unsafe { give(count, CARDS.len() as c_int) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    // SAFETY: the caller's.
    status(card(ordinal).and_then(|_| unsafe { give(device, ordinal) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) -> Status {
    let copy = |(_, own, _): (u16, &str, i32)| {
        if name.is_null() || usize::try_from(length).is_ok_and(|length| length <= own.len()) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: there is room for the name and a zero.
        unsafe {
            std::ptr::copy_nonoverlapping(own.as_ptr().cast(), name, own.len());
            name.add(own.len()).write(0);
        }
        Ok(())
    };
    status(card(device).and_then(copy))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> Status {
    let of = |(capability, _, shared): (u16, &str, i32)| match attribute {
        75 => Ok(c_int::from(capability / 10)),
        76 => Ok(c_int::from(capability % 10)),
        97 => Ok(shared << 10),
        _ => Err(INVALID_VALUE),
    };
    // SAFETY: the caller's.
    status(card(device).and_then(of).and_then(|own| unsafe { give(value, own) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> Status {
    // SAFETY: the caller's.
    status(card(device).and_then(|_| unsafe { give(context, handle(device as usize + 1)) }))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    status(card(device).map(drop))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut *mut c_void) -> Status {
    // SAFETY: the caller's.
    status(unsafe { give(context, handle(CURRENT.get())) })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: *mut c_void) -> Status {
    if context.addr() > CARDS.len() {
        return INVALID_CONTEXT;
    }
    CURRENT.set(context.addr());
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Status {
    // SAFETY: the caller's.
    status(current().and_then(|context| unsafe { give(device, context as c_int - 1) }))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    let mut driver = driver();
    if driver.breaks_captures() { CAPTURE_UNSUPPORTED } else { driver.drain_all() }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    let allocate = |context| {
        let mut driver = driver();
        if driver.breaks_captures() {
            return Err(CAPTURE_UNSUPPORTED);
        }
        let own = driver.allocate(context, bytes)?;
        // SAFETY: the caller's.
        unsafe { give(address, own) }
    };
    status(current().and_then(allocate))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> Status {
    let mut driver = driver();
    if driver.breaks_captures() { CAPTURE_UNSUPPORTED } else { driver.free(address) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetAddressRange_v2(base: *mut u64, length: *mut usize, address: u64) -> Status {
    let find = |context| {
        let (own, bytes) = driver().range(context, address).ok_or(NOT_FOUND)?;
        // SAFETY: the caller's.
        unsafe { give(base, own).and_then(|()| give(length, bytes)) }
    };
    status(current().and_then(find))
}

/// A copy that waits: for streams that wait for the default one, and no others.
fn wait(driver: &mut Driver, context: usize) -> Result<(), Status> {
    if driver.breaks_captures() {
        return Err(CAPTURE_UNSUPPORTED);
    }
    match driver.drain_blocking(context) {
        SUCCESS => Ok(()),
        failed => Err(failed),
    }
}

/// # Safety
/// As many bytes are at `from`.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) -> Status {
    let copy = |context| {
        let mut driver = driver();
        wait(&mut driver, context)?;
        let to = driver.bytes(context, to, bytes)?;
        // SAFETY: within the allocation, and the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        Ok(())
    };
    status(current().and_then(copy))
}

/// # Safety
/// There is room for as many bytes at `to`.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) -> Status {
    let copy = |context| {
        let mut driver = driver();
        wait(&mut driver, context)?;
        let from = driver.bytes(context, from, bytes)?;
        // SAFETY: within the allocation, and the caller's.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        Ok(())
    };
    status(current().and_then(copy))
}

/// # Safety
/// As many bytes are at `from`, which are taken before it returns, as those of pageable memory are.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: *mut c_void) -> Status {
    let queue = |context| {
        let mut driver = driver();
        if driver.streams.get(&stream.addr()).is_some_and(|own| own.capture.is_some()) {
            driver.breaks_captures();
            return Err(CAPTURE_UNSUPPORTED);
        }
        driver.bytes(context, to, bytes)?;
        // SAFETY: the caller's.
        let bytes = unsafe { std::slice::from_raw_parts(from, bytes) }.to_vec();
        match driver.push(context, stream.addr(), Operation::Write { to, bytes }) {
            SUCCESS => Ok(()),
            failed => Err(failed),
        }
    };
    status(current().and_then(queue))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: *mut c_void) -> Status {
    let queue = |context| {
        let mut driver = driver();
        driver.bytes(context, to, bytes)?;
        driver.bytes(context, from, bytes)?;
        match driver.push(context, stream.addr(), Operation::Copy { to, from, bytes }) {
            SUCCESS => Ok(()),
            failed => Err(failed),
        }
    };
    status(current().and_then(queue))
}

/// # Safety
/// `image` is a text that ends with a zero.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_char) -> Status {
    let load = |context: usize| {
        if image.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's.
        let image = unsafe { CStr::from_ptr(image) }.to_str().map_err(|_| INVALID_IMAGE)?;
        let (first, text) = image.split_once('\n').ok_or(INVALID_IMAGE)?;
        let architecture = first.strip_prefix(HEADER).ok_or(INVALID_IMAGE)?;
        let (capability, _, _) = CARDS[context - 1];
        if architecture.trim_end_matches('a') != format!("sm_{capability}") {
            return Err(NO_BINARY_FOR_GPU);
        }
        let mut driver = driver();
        let own = driver.handle();
        driver.modules.insert(own, Module { context, text: text.to_owned() });
        // SAFETY: the caller's.
        unsafe { give(module, handle(own)) }
    };
    status(current().and_then(load))
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: *mut c_void) -> Status {
    let mut driver = driver();
    driver.functions.retain(|_, function| function.module != module.addr());
    if driver.modules.remove(&module.addr()).is_some() { SUCCESS } else { INVALID_HANDLE }
}

/// # Safety
/// `name` is a C string.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *mut c_void,
    name: *const c_char,
) -> Status {
    let find = |context: usize| {
        let mut driver = driver();
        let own = driver.modules.get(&module.addr()).filter(|own| own.context == context).ok_or(INVALID_HANDLE)?;
        if name.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller's.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let kernel = EmulatedKernel::compile(&name, &own.text, CARDS[context - 1].0).map_err(|error| {
            eprintln!("the emulated driver: {error}");
            NOT_FOUND
        })?;
        let (kernel, module, shared_bytes) = (Arc::new(kernel), module.addr(), UNASKED_SHARED_BYTES);
        let own = driver.handle();
        driver.functions.insert(own, Function { context, module, kernel, shared_bytes });
        // SAFETY: the caller's.
        unsafe { give(function, handle(own)) }
    };
    status(current().and_then(find))
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: *mut c_void, attribute: c_int, value: c_int) -> Status {
    let mut driver = driver();
    let Some(own) = driver.functions.get_mut(&function.addr()) else { return INVALID_HANDLE };
    let limit = CARDS[own.context - 1].2 << 10;
    match (attribute, u32::try_from(value)) {
        (8, Ok(bytes)) if value <= limit => {
            own.shared_bytes = bytes;
            SUCCESS
        }
        _ => INVALID_VALUE,
    }
}

/// # Safety
/// `parameters` are pointers to as many values as the kernel takes.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    block_x: c_uint,
    block_y: c_uint,
    block_z: c_uint,
    shared_bytes: c_uint,
    stream: *mut c_void,
    parameters: *const *const u64,
    _extra: *mut *mut c_void,
) -> Status {
    let launch = |context: usize| {
        let mut driver = driver();
        let function = driver.functions.get(&function.addr()).cloned().ok_or(INVALID_HANDLE)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads: u64 = block.iter().map(|extent| u64::from(*extent)).product();
        let is_wrong = grid.contains(&0) || threads == 0 || threads > function.kernel.most_threads();
        if function.context != context || is_wrong || shared_bytes > function.shared_bytes || parameters.is_null() {
            return Err(INVALID_VALUE);
        }
        if shared_bytes < function.kernel.shared_bytes() {
            eprintln!("the emulated driver: {shared_bytes} bytes of shared memory are less than the kernel has");
            return Err(INVALID_VALUE);
        }
        let count = function.kernel.pointers();
        // SAFETY: the caller's: one for each pointer, then one to the structure, whose words come in pairs.
        let pointers = (0..count).map(|at| unsafe { **parameters.add(at) }).collect();
        let words = function.kernel.by_value_words().div_ceil(2);
        // SAFETY: as above.
        let by_value = (0..words).map(|at| unsafe { *(*parameters.add(count)).add(at) }).collect();
        match driver.push(context, stream.addr(), Operation::Launch { function, grid, block, pointers, by_value }) {
            SUCCESS => Ok(()),
            failed => Err(failed),
        }
    };
    status(current().and_then(launch))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(error: Status, text: *mut *const c_char) -> Status {
    // SAFETY: the caller's.
    status(name(error).ok_or(INVALID_VALUE).and_then(|name| unsafe { give(text, name.as_ptr()) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(error: Status, text: *mut *const c_char) -> Status {
    // SAFETY: the caller's.
    unsafe { cuGetErrorName(error, text) }
}

/// A text of C's without the zeros in it.
pub(crate) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}
