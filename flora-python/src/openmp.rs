//! The threads of OpenMP, where the program that we are in has them. PyTorch computes on them, and they spin for a while after each of
//! its operations: threads of ours beside them would wait for a processor.
//!
//! What this relies on: a symbol `GOMP_parallel` that the process has among its global ones is that of GCC's OpenMP or of Intel's and
//! LLVM's, which have the same one, and calls a function with an argument once on every thread of a team, the caller's among them, and
//! returns when all calls have returned.
#![allow(unsafe_code, reason = "OpenMP is called through a symbol that is looked up")]

use std::any::Any;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, OnceLock, PoisonError};

use flora_host::Team;

type Function = extern "C" fn(*mut c_void);
type Parallel = unsafe extern "C" fn(Function, *mut c_void, c_uint, c_uint);

/// OpenMP's threads, or ours where this process has none.
pub(crate) fn team() -> Team {
    if parallel().is_some() { Team::Foreign(run) } else { Team::Rayon }
}

/// `GOMP_parallel`, if there is one.
fn parallel() -> Option<Parallel> {
    static PARALLEL: OnceLock<Option<Parallel>> = OnceLock::new();
    *PARALLEL.get_or_init(|| {
        // SAFETY: the name ends with a zero.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
        // SAFETY: a function of this name has this type (see above).
        (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
    })
}

/// What a team's threads are given.
struct Shared<'a> {
    work: &'a (dyn Fn() + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

fn run(work: &(dyn Fn() + Sync)) {
    let shared = Shared { work, panic: Mutex::new(None) };
    let Some(parallel) = parallel() else { return work() };
    let argument = std::ptr::from_ref(&shared).cast_mut().cast();
    // SAFETY: `shared` lives until all calls have returned; 0 threads are as many as OpenMP would take.
    unsafe { parallel(call, argument, 0, 0) };
    if let Some(panic) = shared.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

extern "C" fn call(argument: *mut c_void) {
    // SAFETY: `run` gives this argument, which is only read.
    let shared: &Shared<'_> = unsafe { &*argument.cast() };
    // A panic must not leave through OpenMP's frames.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(shared.work)) {
        *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
}
