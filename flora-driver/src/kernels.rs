//! A list's kernels on a card: compiled once, loaded once.

use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{function, module};
use cudarc::driver::sys;
use cudarc::driver::sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC_SHARED_BYTES;
use flora_codegen::target::export::ExportedKernel;

use crate::cache::{KernelCache, Key};
use crate::card::{Card, call};
use crate::compile::{Includes, machine_code, version};
use crate::error::DriverError;

/// What a block may have without being asked for more.
const UNASKED_SHARED_BYTES: u32 = 48 << 10;

/// Compiles and loads kernels for one card. Clones share what is loaded.
#[derive(Clone, Debug)]
pub struct Kernels(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    card: Card,
    cache: KernelCache,
    includes: Includes,
    loaded: Mutex<HashMap<ExportedKernel, Arc<Loaded>>>,
    compiled: AtomicUsize,
}

impl Kernels {
    /// For a card, with a folder for machine code.
    pub fn new(card: Card, cache: KernelCache, includes: Includes) -> Self {
        let inner = Inner { card, cache, includes, loaded: Mutex::default(), compiled: AtomicUsize::new(0) };
        Self(Arc::new(inner))
    }

    /// The card.
    pub fn card(&self) -> &Card {
        &self.0.card
    }

    /// How many kernels NVRTC has compiled here; others were kept on disk.
    pub fn compiled(&self) -> usize {
        self.0.compiled.load(Ordering::Relaxed)
    }

    /// A kernel that can be launched.
    pub(crate) fn load(&self, kernel: &ExportedKernel) -> Result<Arc<Loaded>, DriverError> {
        // One at a time: two threads would compile the same.
        let mut loaded = self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = loaded.get(kernel) {
            return Ok(known.clone());
        }
        let limit = self.0.card.shared_memory();
        if kernel.dynamic_shared_bytes > limit {
            let (kernel, needed) = (kernel.name.clone(), kernel.dynamic_shared_bytes);
            return Err(DriverError::SharedMemory { kernel, needed, limit });
        }
        let own = Arc::new(Loaded::new(&self.0.card, kernel, &self.code(kernel)?)?);
        loaded.insert(kernel.clone(), own.clone());
        Ok(own)
    }

    fn code(&self, ExportedKernel { name, source, .. }: &ExportedKernel) -> Result<Vec<u8>, DriverError> {
        let architecture = self.0.card.architecture();
        let key = Key { text: source, architecture: &architecture, version: version()? };
        if let Some(code) = self.0.cache.find(key) {
            return Ok(code);
        }
        let code = machine_code((name, source), &architecture, &self.0.includes)?;
        self.0.compiled.fetch_add(1, Ordering::Relaxed);
        self.0.cache.keep(key, &code)?;
        Ok(code)
    }
}

/// A module with one function.
pub(crate) struct Loaded {
    card: Card,
    module: sys::CUmodule,
    pub(crate) function: sys::CUfunction,
}

// SAFETY: modules and functions are a context's, and may be used from any thread in which it is current.
unsafe impl Send for Loaded {}
// SAFETY: as above; nothing changes a function once it is made.
unsafe impl Sync for Loaded {}

impl fmt::Debug for Loaded {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Loaded({:?})", self.function)
    }
}

impl Loaded {
    fn new(card: &Card, kernel: &ExportedKernel, code: &[u8]) -> Result<Self, DriverError> {
        let _current = card.enter()?;
        let about = || format!("the kernel `{}`", kernel.name);
        let name = CString::new(kernel.name.as_str())
            .map_err(|_| DriverError::List { problem: format!("{:?} is no function's name", kernel.name) })?;
        // The driver finds the end of machine code by its header; that of anything else by a zero.
        let image = [code, &[0]].concat();
        // SAFETY: an image that ends, as above.
        let module = call("cuModuleLoadData", about, unsafe { module::load_data(image.as_ptr().cast()) })?;
        let mut own = Self { card: card.clone(), module, function: std::ptr::null_mut() };
        // SAFETY: the module was just loaded.
        own.function = call("cuModuleGetFunction", about, unsafe { module::get_function(module, name) })?;
        if kernel.dynamic_shared_bytes > UNASKED_SHARED_BYTES {
            let bytes = i32::try_from(kernel.dynamic_shared_bytes).unwrap_or(i32::MAX);
            // SAFETY: the function is the module's.
            let set = unsafe { function::set_function_attribute(own.function, DYNAMIC_SHARED_BYTES, bytes) };
            call("cuFuncSetAttribute", about, set)?;
        }
        Ok(own)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Ok(_current) = self.card.enter() {
            // SAFETY: loaded once and unloaded once. Launches hold it through what they are of.
            let _ = unsafe { module::unload(self.module) };
        }
    }
}
