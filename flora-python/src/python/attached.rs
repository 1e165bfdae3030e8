//! Adapters of layers whose products with the base weight others compute (`flora_host::attached`), as the Python package has them.

use std::sync::Arc;

use flora_adapters::layers::HeldBase;
use flora_host::Rows;
use flora_host::attached::{AttachedAdapters, Grouping, Work};
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_plan::layer::Element;
use pyo3::prelude::*;

use super::{Described, PyAdapter, element, tensor};
use crate::error::Error;
use crate::kinds::{self, Shard};
use crate::memory::{self, RowsAt};
use crate::openmp;

/// Adapters in the slots of one layer.
#[pyclass(frozen, module = "flora._native", name = "Attached")]
pub(super) struct PyAttached {
    adapters: AttachedAdapters,
    activations: Element,
}

/// A module of an adapter, folded for a base weight.
#[pyclass(frozen, module = "flora._native", name = "Folded")]
pub(super) struct PyFolded {
    folded: Arc<FoldedAdapter>,
    offset: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

/// Rows at an address: (address, numbers from one row to the next).
type At = (usize, usize);

#[pymethods]
impl PyFolded {
    /// Folds a module; `weight` `[outputs, inputs]` is asked for where `Adapter.reads_base` says so.
    #[new]
    #[pyo3(signature = (adapter, module, inputs, outputs, weight, bias))]
    fn new(
        py: Python<'_>,
        adapter: &PyAdapter,
        module: &str,
        inputs: usize,
        outputs: usize,
        weight: Option<Described>,
        bias: Option<Described>,
    ) -> Result<Self, Error> {
        py.detach(|| {
            let bias = bias.map(|bias| tensor(bias, "the bias")?.to_f32("the bias")).transpose()?;
            if let Some(bias) = bias.as_ref().filter(|bias| bias.len() != outputs) {
                return Err(Error::shape("the bias", format!("has {} numbers; the module has {outputs}", bias.len())));
            }
            let weight = weight.map(|weight| tensor(weight, "the base weight")).transpose()?;
            if let Some(weight) = weight.as_ref().filter(|weight| weight.shape != [outputs, inputs]) {
                let problem = format!("has the shape {:?}; the module's is [{outputs}, {inputs}]", weight.shape);
                return Err(Error::shape("the base weight", problem));
            }
            if weight.is_none() && kinds::layers()?.read_base(adapter.module(module)?) {
                let problem = format!("is needed to fold `{module}` of the adapter `{}`", adapter.0.name);
                return Err(Error::shape("the base weight", problem));
            }
            let weight = weight.map(|weight| weight.transposed().to_f32("the base weight")).transpose()?;
            let base = HeldBase {
                d: inputs,
                k: outputs,
                weight: &|| weight.clone().unwrap_or_default(),
                bias: bias.as_deref(),
            };
            let (folded, offset) = kinds::fold(&adapter.0, module, &Shard::default(), base)?;
            Ok(Self { folded: Arc::new(folded), offset, inputs, outputs })
        })
    }

    #[getter]
    fn inputs(&self) -> usize {
        self.inputs
    }

    #[getter]
    fn outputs(&self) -> usize {
        self.outputs
    }

    /// Whether it scales its inputs, so that the base multiplies rows for this module alone.
    #[getter]
    fn scales_inputs(&self) -> bool {
        self.folded.virtual_rows.iter().any(|row| row.in_scale.is_some())
    }

    /// The rank of the low-rank sum, or the number of virtual rows where that is more.
    #[getter]
    fn rank(&self) -> usize {
        let scaled = self.folded.virtual_rows.iter().filter(|row| row.in_scale.is_some() || row.out_scale.is_some());
        self.folded.low_rank.len().max(scaled.count())
    }
}

/// Whether a module of an adapter is folded with the base weight.
#[pyfunction]
pub(super) fn reads_base(adapter: &PyAdapter, module: &str) -> Result<bool, Error> {
    Ok(kinds::layers()?.read_base(adapter.module(module)?))
}

#[pymethods]
impl PyAttached {
    #[new]
    fn new(inputs: usize, parts: Vec<usize>, slots: u32, activations: &str, adapters: &str) -> Result<Self, Error> {
        let (activations, adapters) = (element(activations, "the activations")?, element(adapters, "the adapters")?);
        Ok(Self { adapters: AttachedAdapters::new(inputs, &parts, slots, adapters)?, activations })
    }

    #[getter]
    fn slots(&self) -> usize {
        self.adapters.slots()
    }

    /// Bytes that the adapters take.
    #[getter]
    fn bytes(&self) -> usize {
        self.adapters.bytes()
    }

    /// Puts what a module was folded to, or some of its inputs and outputs, by their numbers. What is added once to a row is left out
    /// where `inputs` doesn't begin with the first.
    #[pyo3(signature = (slot, part, folded, inputs, outputs))]
    fn put(
        &self,
        py: Python<'_>,
        slot: usize,
        part: usize,
        folded: &PyFolded,
        inputs: Option<Vec<usize>>,
        outputs: Option<Vec<usize>>,
    ) -> Result<(), Error> {
        py.detach(|| {
            let cut = |indices: &Option<Vec<usize>>, what: &str, count: usize| match indices {
                Some(indices) if indices.iter().any(|index| *index >= count) => {
                    Err(Error::shape(what, format!("of a shard are beyond the {count} of the module")))
                }
                indices => Ok(indices.clone()),
            };
            let inputs = cut(&inputs, "the inputs", folded.inputs)?;
            let outputs = cut(&outputs, "the outputs", folded.outputs)?;
            let is_first = inputs.as_ref().is_none_or(|inputs| inputs.first() == Some(&0));
            let offset = folded.offset.as_deref().filter(|_| is_first).map(|offset| pick(offset, outputs.as_deref()));
            let adapter = match (&inputs, &outputs) {
                (None, None) => folded.folded.clone(),
                (inputs, outputs) => Arc::new(shard(&folded.folded, inputs.as_deref(), outputs.as_deref())),
            };
            Ok(self.adapters.put(slot, part, &adapter, offset.as_deref())?)
        })
    }

    /// Puts a low-rank sum: shrink vectors `[r, inputs]` and expand vectors `[outputs of the part, r]`, as PEFT and vLLM have them.
    fn put_low_rank(
        &self,
        py: Python<'_>,
        slot: usize,
        part: usize,
        shrink: Described,
        expand: Described,
    ) -> Result<(), Error> {
        py.detach(|| {
            let shrink = tensor(shrink, "lora_a")?;
            let expand = tensor(expand, "lora_b")?.transposed();
            let ([rank, d], [other, k]) = (&shrink.shape[..], &expand.shape[..]) else {
                return Err(Error::shape("lora_a and lora_b", "are no matrices"));
            };
            if rank != other {
                return Err(Error::shape("lora_b", format!("has the rank {other}; that of lora_a is {rank}")));
            }
            let (shrinks, expands) = (shrink.to_f32("lora_a")?, expand.to_f32("lora_b")?);
            let vectors = shrinks.chunks_exact((*d).max(1)).zip(expands.chunks_exact((*k).max(1)));
            let low_rank = vectors.map(|(shrink, expand)| RankOne { shrink: shrink.to_vec(), expand: expand.to_vec() });
            let adapter = FoldedAdapter {
                virtual_rows: vec![VirtualRow::default()],
                low_rank: low_rank.collect(),
                ..FoldedAdapter::default()
            };
            Ok(self.adapters.put(slot, part, &adapter, None)?)
        })
    }

    fn clear(&self, py: Python<'_>, slot: usize) -> Result<(), Error> {
        py.detach(|| Ok(self.adapters.clear(slot)?))
    }

    /// 0: the base alone, 1: sums to add to its product, 2: scales.
    fn work(&self, slots: usize, rows: usize) -> Result<u8, Error> {
        Ok(match self.adapters.work(memory::slots(slots, rows)?)? {
            Work::Base => 0,
            Work::Sums => 1,
            Work::Scales => 2,
        })
    }

    fn add(&self, py: Python<'_>, x: At, slots: usize, rows: usize, y: At) -> Result<(), Error> {
        py.detach(|| {
            let (x, y) = (self.inputs_at(x, rows), self.outputs_at(y, rows));
            let slots = memory::slots(slots, rows)?;
            let (x, y) = (x.read("x", self.activations)?, y.write("the output", self.activations)?);
            Ok(self.adapters.add(slots, x, y, openmp::team())?)
        })
    }

    /// How many virtual inputs each group has: the whole layer, or each part apart.
    fn virtual_inputs(&self, slots: usize, rows: usize, by_parts: bool) -> Result<Vec<usize>, Error> {
        Ok(self.adapters.virtual_inputs(memory::slots(slots, rows)?, grouping(by_parts))?)
    }

    /// Writes the virtual inputs of a group, as many rows as `virtual_inputs` says.
    #[expect(clippy::too_many_arguments, reason = "one call for each layer of a step: it takes plain numbers")]
    fn expand(
        &self,
        py: Python<'_>,
        by_parts: bool,
        group: usize,
        x: At,
        slots: usize,
        rows: usize,
        out: At,
        out_rows: usize,
    ) -> Result<(), Error> {
        py.detach(|| {
            let slots = memory::slots(slots, rows)?;
            let x = self.inputs_at(x, rows).read("x", self.activations)?;
            let out = self.inputs_at(out, out_rows).write("the virtual inputs", self.activations)?;
            Ok(self.adapters.expand(slots, (grouping(by_parts), group), x, out)?)
        })
    }

    /// Writes y from each group's products: (address, stride, rows, width).
    #[expect(clippy::too_many_arguments, reason = "as `expand`")]
    fn combine(
        &self,
        py: Python<'_>,
        by_parts: bool,
        products: Vec<(usize, usize, usize, usize)>,
        bias: Option<usize>,
        x: At,
        slots: usize,
        rows: usize,
        y: At,
    ) -> Result<(), Error> {
        py.detach(|| {
            let slots = memory::slots(slots, rows)?;
            let products = products.into_iter().map(|(address, pitch, rows, width)| {
                RowsAt { address, rows, width, pitch }.read("the base's product", self.activations)
            });
            let products: Vec<Rows<'_>> = products.collect::<Result<_, _>>()?;
            let bias = bias.map(|bias| self.outputs_at((bias, 0), 1).read("the bias", self.activations)).transpose()?;
            let x = self.inputs_at(x, rows).read("x", self.activations)?;
            let y = self.outputs_at(y, rows).write("the output", self.activations)?;
            let bias = bias.map(|bias| bias.values);
            Ok(self.adapters.combine(slots, (grouping(by_parts), &products), bias, x, y, openmp::team())?)
        })
    }
}

impl PyAttached {
    fn inputs_at(&self, (address, pitch): At, rows: usize) -> RowsAt {
        RowsAt { address, rows, width: self.adapters.inputs(), pitch }
    }

    fn outputs_at(&self, (address, pitch): At, rows: usize) -> RowsAt {
        RowsAt { address, rows, width: self.adapters.outputs(), pitch }
    }
}

fn grouping(by_parts: bool) -> Grouping {
    if by_parts { Grouping::Parts } else { Grouping::Whole }
}

/// The adapter of some inputs and outputs: each vector's own numbers.
fn shard(adapter: &FoldedAdapter, inputs: Option<&[usize]>, outputs: Option<&[usize]>) -> FoldedAdapter {
    let virtual_rows = adapter.virtual_rows.iter().map(|row| VirtualRow {
        in_scale: row.in_scale.as_deref().map(|scale| pick(scale, inputs)),
        out_scale: row.out_scale.as_deref().map(|scale| pick(scale, outputs)),
    });
    let low_rank = adapter
        .low_rank
        .iter()
        .map(|pair| RankOne { shrink: pick(&pair.shrink, inputs), expand: pick(&pair.expand, outputs) });
    FoldedAdapter { virtual_rows: virtual_rows.collect(), low_rank: low_rank.collect(), ..FoldedAdapter::default() }
}

fn pick(vector: &[f32], indices: Option<&[usize]>) -> Vec<f32> {
    match indices {
        None => vector.to_vec(),
        Some(indices) => indices.iter().filter_map(|index| vector.get(*index)).copied().collect(),
    }
}
