//! Layers on a card, as `flora.cuda` takes them: tensors are (address, bytes), streams the driver's numbers.

use std::path::PathBuf;
use std::sync::Arc;

use flora_driver::{DeviceMemory, DriverError, Stream};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use super::row_slots;
use crate::cuda::{CudaBatch, CudaLinear};
use crate::error::Error;
use crate::linear::open;

pyo3::create_exception!(
    _native,
    OtherLaunchesError,
    PyRuntimeError,
    "A batch whose launches differ from those that were made, so that no graph of them runs it."
);

/// What is raised for the driver's errors.
pub(super) fn exception(error: &DriverError) -> PyErr {
    let said = error.to_string();
    match error {
        DriverError::OtherLaunches { .. } => OtherLaunchesError::new_err(said),
        DriverError::Operand { .. } | DriverError::ForeignStream { .. } | DriverError::NoCard { .. } => {
            PyValueError::new_err(said)
        }
        _ => PyRuntimeError::new_err(said),
    }
}

/// A layer's weights and adapters on a card.
#[pyclass(frozen, module = "flora._native", name = "CudaLinear")]
struct PyCudaLinear(Arc<CudaLinear>);

#[pymethods]
impl PyCudaLinear {
    #[new]
    fn new(py: Python<'_>, handle: i64, card: u32, includes: Vec<PathBuf>) -> Result<Self, Error> {
        let linear = open(handle)?;
        py.detach(|| CudaLinear::new(linear, card, includes)).map(Self)
    }

    #[getter]
    fn parts(&self) -> Vec<usize> {
        self.0.part_sizes()
    }

    #[getter]
    fn compiled(&self) -> usize {
        self.0.compiled()
    }

    /// The launches of a batch whose slots lie in host memory; all base where the address is 0.
    fn batch(&self, py: Python<'_>, slots: usize, rows: usize, stream: usize) -> Result<PyCudaBatch, Error> {
        py.detach(|| CudaBatch::new(&self.0, row_slots(slots, rows, -1)?, Stream(stream))).map(PyCudaBatch)
    }
}

/// A batch's launches.
#[pyclass(frozen, module = "flora._native", name = "CudaBatch")]
struct PyCudaBatch(CudaBatch);

#[pymethods]
impl PyCudaBatch {
    fn assign(&self, py: Python<'_>, slots: usize, rows: usize, stream: usize) -> Result<bool, Error> {
        py.detach(|| self.0.assign(Some(row_slots(slots, rows, -1)?), Stream(stream)))
    }

    fn refresh(&self, py: Python<'_>, stream: usize) -> Result<bool, Error> {
        py.detach(|| self.0.assign(None, Stream(stream)))
    }

    #[expect(unsafe_code, reason = "the package says that the tensors are there, and holds them")]
    fn forward(&self, py: Python<'_>, x: (u64, u64), y: Vec<(u64, u64)>, stream: usize) -> Result<(), Error> {
        let memory = |(address, bytes)| DeviceMemory { address, bytes };
        let y: Vec<_> = y.into_iter().map(memory).collect();
        // SAFETY: as in the reason. PyTorch keeps memory of a tensor that is gone for the same stream.
        py.detach(|| unsafe { self.0.forward(memory(x), &y, Stream(stream)) })
    }
}

pub(super) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("OtherLaunchesError", module.py().get_type::<OtherLaunchesError>())?;
    module.add_class::<PyCudaLinear>()?;
    module.add_class::<PyCudaBatch>()
}
