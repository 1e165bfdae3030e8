//! The native module behind the Python package. It takes tensors as (address, type, shape, strides), which the package's own functions
//! make of PyTorch's and NumPy's, and gives the interpreter free while it computes.

mod attached;
#[cfg(feature = "cuda")]
mod cuda;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};

use flora_checkpoint::{AdapterFolder, Operand};
use flora_host::attached::AttachedError;
use flora_plan::layer::Element;
use pyo3::exceptions::{PyIndexError, PyKeyError, PyRuntimeError, PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;
use crate::kinds::{self, Shard};
use crate::linear::{Linear, LinearParts, open};
use crate::memory::{self, NumberType, RowsAt, Tensor};
use crate::step::RowSlots;
use crate::threads;
use crate::trained::{self, TrainedAdapter};

pyo3::create_exception!(_native, ClosedError, PyRuntimeError, "A layer that was closed, or made in another process.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let said = error.to_string();
        match error {
            Error::Type { .. } => PyTypeError::new_err(said),
            Error::RowSlot { .. }
            | Error::NoSuch { .. }
            | Error::Attached(
                AttachedError::RowSlot { .. } | AttachedError::NoSlot { .. } | AttachedError::NoPart { .. },
            ) => PyIndexError::new_err(said),
            Error::Closed(_) => ClosedError::new_err(said),
            Error::UnknownModule { .. } => PyKeyError::new_err(said),
            Error::Threads { .. } | Error::Device(_) => PyRuntimeError::new_err(said),
            #[cfg(feature = "cuda")]
            Error::Driver(error) => cuda::exception(&error),
            _ => PyValueError::new_err(with_causes(&error)),
        }
    }
}

/// What is said of an error and of what caused it, without saying anything twice.
fn with_causes(error: &Error) -> String {
    let mut said = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let own = error.to_string();
        if !said.contains(&own) {
            said = format!("{said}: {own}");
        }
        cause = error.source();
    }
    said
}

/// The names of types in Python.
fn number_type(name: &str, what: &str) -> Result<NumberType, Error> {
    match name {
        "float32" => Ok(NumberType::Element(Element::F32)),
        "float16" => Ok(NumberType::Element(Element::F16)),
        "bfloat16" => Ok(NumberType::Element(Element::Bf16)),
        "float64" => Ok(NumberType::F64),
        _ => Err(Error::Type {
            what: what.to_owned(),
            found: name.to_owned(),
            expected: "float32, float16, bfloat16 or float64".to_owned(),
        }),
    }
}

fn element(name: &str, what: &str) -> Result<Element, Error> {
    match number_type(name, what)? {
        NumberType::Element(element) => Ok(element),
        NumberType::F64 => Err(Error::Type {
            what: what.to_owned(),
            found: name.to_owned(),
            expected: "float32, float16 or bfloat16".to_owned(),
        }),
    }
}

fn element_name(element: Element) -> &'static str {
    match element {
        Element::F32 => "float32",
        Element::F16 => "float16",
        Element::Bf16 => "bfloat16",
    }
}

/// (address, type, shape, strides in numbers)
type Described = (usize, String, Vec<usize>, Vec<isize>);

fn tensor((address, name, shape, strides): Described, what: &str) -> Result<Tensor, Error> {
    Ok(Tensor { address, numbers: number_type(&name, what)?, shape, strides })
}

/// A layer.
#[pyclass(frozen, module = "flora._native", name = "Linear")]
struct PyLinear(RwLock<Option<Arc<Linear>>>, i64);

impl PyLinear {
    fn open(&self) -> Result<Arc<Linear>, Error> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone().ok_or(Error::Closed(self.1))
    }
}

#[pymethods]
impl PyLinear {
    #[new]
    #[pyo3(signature = (weight, bias, parts, slots, activations))]
    fn new(
        py: Python<'_>,
        weight: Described,
        bias: Option<Described>,
        parts: Option<Vec<usize>>,
        slots: u32,
        activations: Option<String>,
    ) -> Result<Self, Error> {
        let weight = tensor(weight, "the weight")?;
        let bias = bias.map(|bias| tensor(bias, "the bias")).transpose()?;
        let activations = activations.map(|name| element(&name, "the activations")).transpose()?;
        let made_of = LinearParts { weight: &weight, bias: bias.as_ref(), parts: parts.as_deref(), slots, activations };
        let linear = py.detach(|| Linear::new(&made_of))?;
        let handle = linear.handle();
        Ok(Self(RwLock::new(Some(linear)), handle))
    }

    #[getter]
    fn handle(&self) -> i64 {
        self.1
    }

    #[getter]
    fn in_features(&self) -> Result<usize, Error> {
        Ok(self.open()?.inputs())
    }

    #[getter]
    fn out_features(&self) -> Result<usize, Error> {
        Ok(self.open()?.outputs())
    }

    #[getter]
    fn parts(&self) -> Result<Vec<usize>, Error> {
        Ok(self.open()?.part_sizes().collect())
    }

    #[getter]
    fn slots(&self) -> Result<u32, Error> {
        Ok(self.open()?.slots())
    }

    #[getter]
    fn activations(&self) -> Result<&'static str, Error> {
        Ok(element_name(self.open()?.activations()))
    }

    fn close(&self) {
        let linear = self.0.write().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(linear) = linear {
            linear.close();
        }
    }

    fn put(
        &self,
        py: Python<'_>,
        slot: u32,
        part: usize,
        layer: &str,
        operands: BTreeMap<String, Described>,
    ) -> Result<(), Error> {
        let linear = self.open()?;
        py.detach(|| {
            let mut own = BTreeMap::new();
            for (name, described) in operands {
                let what = format!("the operand `{name}`");
                let tensor = tensor(described, &what)?;
                let values = tensor.to_f32(&what)?;
                if let Some(number) = values.iter().find(|number| !number.is_finite()) {
                    return Err(Error::shape(what, format!("has the number {number}")));
                }
                own.insert(name, Operand { shape: tensor.shape, values });
            }
            let (folder, path) = kinds::of_operands(layer, own)?;
            linear.put((slot, part), &folder, &path, &Shard::default())
        })
    }

    #[expect(clippy::too_many_arguments, reason = "as the package's own function has them")]
    fn put_adapter(
        &self,
        py: Python<'_>,
        slot: u32,
        part: usize,
        adapter: &PyAdapter,
        module: &str,
        inputs: Option<(usize, usize)>,
        outputs: Option<(usize, usize)>,
    ) -> Result<(), Error> {
        let linear = self.open()?;
        let range = |(first, end): (usize, usize)| first..end;
        let shard = Shard { inputs: inputs.map(range), outputs: outputs.map(range) };
        py.detach(|| linear.put((slot, part), &adapter.0, module, &shard))
    }

    fn clear(&self, py: Python<'_>, slot: u32, part: Option<usize>) -> Result<(), Error> {
        let linear = self.open()?;
        py.detach(|| linear.clear(slot, part))
    }

    #[expect(clippy::too_many_arguments, reason = "one call for each layer of a step: it takes plain numbers")]
    fn forward(
        &self,
        py: Python<'_>,
        x: usize,
        x_stride: usize,
        slots: usize,
        rows: usize,
        y: usize,
        y_stride: usize,
    ) -> Result<(), Error> {
        let linear = self.open()?;
        py.detach(|| forward(&linear, (x, x_stride), (slots, rows), (y, y_stride)))
    }

    fn unpack(&self, py: Python<'_>, out: usize, rows: usize, width: usize, stride: usize) -> Result<(), Error> {
        let linear = self.open()?;
        py.detach(|| linear.unpack(&RowsAt { address: out, rows, width, pitch: stride }))
    }
}

/// The slots of rows at an address; all base where it is 0.
fn row_slots<'a>(slots: usize, rows: usize, otherwise: i64) -> Result<RowSlots<'a>, Error> {
    match slots {
        0 => Ok(RowSlots::All { slot: otherwise, rows }),
        address => Ok(RowSlots::Each(memory::slots(address, rows)?)),
    }
}

fn forward(
    linear: &Linear,
    (x, x_stride): (usize, usize),
    (slots, rows): (usize, usize),
    (y, y_stride): (usize, usize),
) -> Result<(), Error> {
    let activations = linear.activations();
    let x = RowsAt { address: x, rows, width: linear.inputs(), pitch: x_stride }.read("x", activations)?;
    let y = RowsAt { address: y, rows, width: linear.outputs(), pitch: y_stride }.write("the output", activations)?;
    linear.forward(x, row_slots(slots, rows, -1)?, y)
}

/// [`Linear::forward`] of the layer with a handle.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one call for each layer of a step: it takes plain numbers")]
fn forward_handle(
    py: Python<'_>,
    handle: i64,
    x: usize,
    x_stride: usize,
    slots: usize,
    rows: usize,
    y: usize,
    y_stride: usize,
) -> Result<(), Error> {
    let linear = open(handle)?;
    py.detach(|| forward(&linear, (x, x_stride), (slots, rows), (y, y_stride)))
}

/// (inputs, outputs, activations) of the layer with a handle.
#[pyfunction]
fn describe_handle(handle: i64) -> Result<(usize, usize, &'static str), Error> {
    let linear = open(handle)?;
    Ok((linear.inputs(), linear.outputs(), element_name(linear.activations())))
}

fn trained(adapters: Vec<(String, Vec<Described>)>) -> Result<Vec<TrainedAdapter>, Error> {
    let adapter = |(layer, described): (String, Vec<Described>)| {
        let operands = described.into_iter().map(|described| tensor(described, "an operand"));
        Ok(TrainedAdapter { layer, operands: operands.collect::<Result<_, Error>>()? })
    };
    adapters.into_iter().map(adapter).collect()
}

/// y of x by adapters that come with the call; without slots, all rows are of the first.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "as `forward_handle`, with adapters")]
fn trained_forward(
    py: Python<'_>,
    handle: i64,
    adapters: Vec<(String, Vec<Described>)>,
    x: usize,
    x_stride: usize,
    slots: usize,
    rows: usize,
    y: usize,
    y_stride: usize,
) -> Result<(), Error> {
    let linear = open(handle)?;
    py.detach(|| {
        let (adapters, activations) = (trained(adapters)?, linear.activations());
        let x = RowsAt { address: x, rows, width: linear.inputs(), pitch: x_stride }.read("x", activations)?;
        let y =
            RowsAt { address: y, rows, width: linear.outputs(), pitch: y_stride }.write("the output", activations)?;
        trained::forward(&linear, &adapters, x, row_slots(slots, rows, 0)?, y)
    })
}

/// The gradients of x and of adapters' operands. x, g and dx have no gaps; `dx` is 0 where it isn't wanted, and so is the address of an
/// operand's gradient. Those are f32, row-major.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "as `trained_forward`, with gradients")]
fn trained_backward(
    py: Python<'_>,
    handle: i64,
    adapters: Vec<(String, Vec<Described>)>,
    x: usize,
    g: usize,
    slots: usize,
    rows: usize,
    dx: usize,
    gradients: Vec<usize>,
) -> Result<(), Error> {
    let linear = open(handle)?;
    py.detach(|| {
        let (adapters, activations) = (trained(adapters)?, linear.activations());
        let (inputs, outputs) = (linear.inputs(), linear.outputs());
        let dense = |address: usize, width: usize| RowsAt { address, rows, width, pitch: width };
        let x = dense(x, inputs).read("x", activations)?.values;
        let g = dense(g, outputs).read("the output's gradient", activations)?.values;
        let dx = match dx {
            0 => None,
            dx => Some(dense(dx, inputs).write("the input's gradient", activations)?.values),
        };
        let operands = adapters.iter().flat_map(|adapter| &adapter.operands);
        let place = |(address, operand): (usize, &Tensor)| match address {
            0 => Ok(None),
            address => memory::floats_mut("a gradient", address, operand.shape.iter().product()).map(Some),
        };
        if gradients.len() != operands.clone().count() {
            return Err(Error::shape("the places for gradients", "are not as many as the operands"));
        }
        let mut places = gradients.into_iter().zip(operands).map(place).collect::<Result<Vec<_>, _>>()?;
        trained::backward(&linear, &adapters, (x, g), row_slots(slots, rows, 0)?, dx, &mut places)
    })
}

/// dx of a layer whose adapters are in its slots. x, g and dx have no gaps.
#[pyfunction]
fn input_gradient(
    py: Python<'_>,
    handle: i64,
    x: usize,
    g: usize,
    slots: usize,
    rows: usize,
    dx: usize,
) -> Result<(), Error> {
    let linear = open(handle)?;
    py.detach(|| {
        let activations = linear.activations();
        let dense = |address: usize, width: usize| RowsAt { address, rows, width, pitch: width };
        let x = dense(x, linear.inputs()).read("x", activations)?.values;
        let g = dense(g, linear.outputs()).read("the output's gradient", activations)?.values;
        let dx = dense(dx, linear.inputs()).write("the input's gradient", activations)?.values;
        trained::input_gradient(&linear, (x, g), row_slots(slots, rows, -1)?, dx)
    })
}

/// An adapter's folder, read and checked.
#[pyclass(frozen, module = "flora._native", name = "Adapter")]
struct PyAdapter(AdapterFolder);

impl PyAdapter {
    fn module(&self, path: &str) -> Result<&flora_checkpoint::AdapterModule, Error> {
        self.0.modules.get(path).ok_or_else(|| Error::UnknownModule {
            adapter: self.0.name.clone(),
            module: path.to_owned(),
            known: crate::error::shortened(self.0.modules.keys().map(String::as_str)),
        })
    }
}

#[pymethods]
impl PyAdapter {
    #[staticmethod]
    fn open(py: Python<'_>, folder: PathBuf) -> Result<Self, Error> {
        py.detach(|| {
            let layers = kinds::layers()?;
            let folder = AdapterFolder::open(&folder, layers.kinds())?;
            if folder.replaced.is_empty() {
                return Ok(Self(folder));
            }
            let reason = "it replaces weights or biases of the base model, which no layer by itself can take";
            Err(Error::Shard(format!("the adapter `{}` can't be used here: {reason}", folder.name)))
        })
    }

    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    #[getter]
    fn kind(&self) -> &str {
        self.0.kind.name()
    }

    #[getter]
    fn modules(&self) -> Vec<&str> {
        self.0.modules.keys().map(String::as_str).collect()
    }

    fn layer_of(&self, module: &str) -> Result<&str, Error> {
        Ok(&self.module(module)?.layer)
    }

    fn rank_of(&self, module: &str) -> Result<usize, Error> {
        Ok(self.module(module)?.rank)
    }
}

#[pyfunction]
fn layer_names() -> Result<Vec<&'static str>, Error> {
    kinds::names()
}

#[pyfunction]
fn layer_operands(layer: &str) -> Result<Vec<&'static str>, Error> {
    kinds::operands_of(layer)
}

#[pyfunction]
fn set_num_threads(py: Python<'_>, threads: usize) -> Result<(), Error> {
    py.detach(|| threads::set(threads))
}

#[pyfunction]
fn get_num_threads() -> Result<usize, Error> {
    threads::count()
}

/// The instruction set that kernels use on this processor.
#[pyfunction]
fn instruction_set() -> &'static str {
    flora_host::HostEngine::instruction_set()
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("ClosedError", module.py().get_type::<ClosedError>())?;
    module.add_class::<PyLinear>()?;
    module.add_class::<PyAdapter>()?;
    module.add("has_cuda", cfg!(feature = "cuda"))?;
    #[cfg(feature = "cuda")]
    cuda::add(module)?;
    module.add_class::<attached::PyAttached>()?;
    module.add_class::<attached::PyFolded>()?;
    module.add_function(wrap_pyfunction!(attached::reads_base, module)?)?;
    module.add_function(wrap_pyfunction!(forward_handle, module)?)?;
    module.add_function(wrap_pyfunction!(describe_handle, module)?)?;
    module.add_function(wrap_pyfunction!(trained_forward, module)?)?;
    module.add_function(wrap_pyfunction!(trained_backward, module)?)?;
    module.add_function(wrap_pyfunction!(input_gradient, module)?)?;
    module.add_function(wrap_pyfunction!(layer_names, module)?)?;
    module.add_function(wrap_pyfunction!(layer_operands, module)?)?;
    module.add_function(wrap_pyfunction!(set_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(get_num_threads, module)?)?;
    module.add_function(wrap_pyfunction!(instruction_set, module)?)?;
    Ok(())
}
