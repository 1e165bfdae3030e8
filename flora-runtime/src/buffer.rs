//! Numbers on a device, and who owns them.

use std::any::Any;
use std::sync::Arc;

use flora_plan::layer::{Element, LayerShape, WeightFormat};

use crate::backend::Storage;
use crate::info::DeviceInfo;

/// Numbers on a device. Cloning shares them.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub(crate) storage: Storage,
    pub(crate) elements: usize,
    pub(crate) element: Element,
    pub(crate) owner: Arc<DeviceInfo>,
}

impl Buffer {
    /// How many numbers.
    pub fn len(&self) -> usize {
        self.elements
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.elements == 0
    }

    /// Their type.
    pub fn element(&self) -> Element {
        self.element
    }

    /// The memory in its backend's form; `None` where it is another backend's. It may have room after the numbers.
    pub fn memory<T: Any>(&self) -> Option<&T> {
        self.storage.get()
    }

    /// The memory itself, where it is of this backend's form and nobody else shares it; else what was passed.
    ///
    /// # Errors
    /// Another backend's memory, or somebody else has it too.
    pub fn into_memory<T: Any + Send + Sync>(self) -> Result<T, Self> {
        let Self { storage, elements, element, owner } = self;
        storage.into_inner().map_err(|storage| Self { storage, elements, element, owner })
    }
}

/// A base weight, or a W_i, on a device. Cloning shares it.
#[derive(Clone, Debug)]
pub struct WeightBuffer {
    pub(crate) storage: Storage,
    pub(crate) shape: LayerShape,
    pub(crate) format: WeightFormat,
    pub(crate) owner: Arc<DeviceInfo>,
}

impl WeightBuffer {
    /// Inputs and outputs.
    pub fn shape(&self) -> LayerShape {
        self.shape
    }

    /// The form in which it is kept.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// The memory in its backend's form; `None` where it is another backend's.
    pub fn memory<T: Any>(&self) -> Option<&T> {
        self.storage.get()
    }
}

/// Vectors of adapters on a device: `[slots, width]`, one after the other.
#[derive(Clone, Debug)]
pub struct PoolBuffer {
    pub(crate) buffer: Buffer,
    pub(crate) slots: u32,
}

impl PoolBuffer {
    /// A pool of `slots` vectors in a buffer that holds nothing else.
    pub fn new(buffer: Buffer, slots: u32) -> Self {
        Self { buffer, slots }
    }

    /// How many vectors.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The memory in its backend's form; `None` where it is another backend's.
    pub fn memory<T: Any>(&self) -> Option<&T> {
        self.buffer.memory()
    }
}
