//! What an adapter does to its own rows beside the launch over the base weight: sparse products before, behind and beside it, and
//! a bias of its own. Few adapters have any, so that rows go by way of the host for it, and no kernel of a schedule knows of it.
//!
//! A row meets the matrices of its own adapter alone, and sums in one order, so that its bits don't depend on its batch.

use std::ops::Range;
use std::sync::Arc;

use flora_ir::algebra::SparseParts;
use flora_ir::evaluate::apply_activation;
use flora_ir::{Activation, SparseMatrix};
use flora_plan::batch::{BatchShape, Segment};
use flora_plan::plan::Plan;
use flora_plan::schedule::Schedule;

use crate::backend::{RankGates, ReplacedRows, SparseRows};
use crate::batch::BatchError;
use crate::buffer::Buffer;
use crate::device::{Device, DeviceError, RowInputs};
use crate::gates::BatchGates;
use crate::operands::{LayerOperands, OperandError};
use crate::projection::{Projection, ProjectionError};
use crate::step::StepBatch;

/// What one adapter does.
#[derive(Clone, Debug, Default)]
pub(crate) struct Passes {
    pub(crate) sparse: SparseParts,
    /// `[k]`, added to the sum.
    pub(crate) offset: Option<Vec<f32>>,
}

impl Passes {
    /// Whether the sum that a launch gives isn't the whole sum.
    fn changes_sums(&self) -> bool {
        self.sparse.outputs.is_some() || !self.sparse.added.is_empty() || self.offset.is_some()
    }

    /// Whether the launch has to leave its epilogue out, because what it would apply to the sum comes before what is done here.
    fn needs_bare_sums(&self, operands: &LayerOperands) -> bool {
        let epilogue = operands.epilogue();
        let is_additive = epilogue.activation == Activation::Identity;
        // What is added may be added later.
        (self.changes_sums() && !is_additive) || (self.sparse.outputs.is_some() && !epilogue.is_identity())
    }
}

/// Rows of a launch, and what their adapter does to them.
#[derive(Clone, Debug)]
pub(crate) struct RowPasses {
    pub(crate) rows: Range<usize>,
    pub(crate) own: Arc<Passes>,
}

/// A batch of a projection, laid out: one launch, or two where rows have passes that come before the epilogue.
pub(crate) struct Work {
    operands: LayerOperands,
    rows: usize,
    gates: Option<BatchGates>,
    launches: Vec<Launch>,
}

struct Launch {
    schedule: Arc<Schedule>,
    /// The rows of the batch that it is of, in pieces; `None`: all.
    of: Option<Vec<Range<usize>>>,
    /// By its own rows.
    passes: Vec<RowPasses>,
    /// Whether it leaves the epilogue to what follows.
    is_bare: bool,
}

impl Work {
    /// `choose` picks a plan for a batch, by whether its launch has an epilogue.
    pub(crate) fn of(
        projection: &Projection,
        batch: &StepBatch,
        choose: impl Fn(&BatchShape, bool) -> Plan,
    ) -> Result<Self, ProjectionError> {
        let operands = projection.operands().clone();
        let finishes = !operands.epilogue().is_identity();
        let gates = BatchGates::of(projection, batch)?;
        let passes = projection.passes_of(batch.segments());
        let bare: Vec<_> = passes.iter().filter(|pass| pass.own.needs_bare_sums(&operands)).collect();
        if bare.is_empty() {
            let schedule = batch.schedule(projection, finishes, |shape| choose(shape, finishes))?;
            let launches = vec![Launch { schedule, of: None, passes, is_bare: false }];
            return Ok(Self { operands, rows: batch.rows(), gates, launches });
        }
        let mut first = 0;
        let mut parts: [Vec<(Range<usize>, Segment)>; 2] = Default::default();
        for segment in batch.segments().iter().filter(|segment| segment.rows > 0) {
            let rows = first..first + segment.rows as usize;
            first = rows.end;
            let is_bare = bare.iter().any(|pass| pass.rows == rows);
            parts[usize::from(is_bare)].push((rows, *segment));
        }
        let mut launches = Vec::new();
        for (part, is_bare) in parts.into_iter().zip([false, true]).filter(|(part, _)| !part.is_empty()) {
            let finishes = finishes && !is_bare;
            let own = StepBatch::new(part.iter().map(|(_, segment)| (segment.adapter, segment.rows)));
            let schedule = own.schedule(projection, finishes, |shape| choose(shape, finishes))?;
            let passes = projection.passes_of(own.segments());
            launches.push(Launch {
                schedule,
                of: Some(part.into_iter().map(|(rows, _)| rows).collect()),
                passes,
                is_bare,
            });
        }
        Ok(Self { operands, rows: batch.rows(), gates, launches })
    }

    /// x `[rows, d]`, residual `[rows, k]` where the layer adds one; the result `[rows, k]`.
    pub(crate) fn run(
        &self,
        device: &Device,
        x: &Buffer,
        residual: Option<&Buffer>,
    ) -> Result<Buffer, ProjectionError> {
        let (rows, d, k) = (self.rows, self.operands.shape().d as usize, self.operands.shape().k as usize);
        if x.len() != rows * d {
            return Err(BatchError::WrongInput { rows, d, expected: rows * d, found: x.len() }.into());
        }
        if let [Launch { of: None, .. }] = &self.launches[..] {
            let gates = self.gates.as_ref().map(BatchGates::as_gates);
            return self.launches[0].run(device, &self.operands, (x, gates), residual);
        }
        if self.operands.epilogue().residual && residual.is_none() {
            return Err(DeviceError::from(OperandError::NoResidual).into());
        }
        let activations = self.operands.format().activations;
        let residual = residual.filter(|_| self.operands.epilogue().residual);
        let all_x = device.read(x)?;
        let all_residual = residual.map(|residual| device.read(residual)).transpose()?;
        if let Some(residual) = all_residual.as_ref().filter(|residual| residual.len() != rows * k) {
            let (what, expected, found) = ("the residual", rows * k, residual.len());
            return Err(DeviceError::from(OperandError::WrongSize { what, expected, found }).into());
        }
        let mut y = vec![0.0; rows * k];
        for launch in &self.launches {
            let pieces = launch.of.as_deref().unwrap_or_default();
            let x = device.upload_as(&gathered(&all_x, pieces, d), activations)?;
            let residual = all_residual.as_ref().map(|residual| gathered(residual, pieces, k));
            let gates = self.gates.as_ref().map(|gates| gates.of_rows(pieces));
            let x = (&x, gates.as_ref().map(BatchGates::as_gates));
            let own = match launch.is_bare {
                true => launch.finished(device, &self.operands, x, residual.as_deref())?,
                false => {
                    let residual = residual.map(|residual| device.upload_as(&residual, activations)).transpose()?;
                    device.read(&launch.run(device, &self.operands, x, residual.as_ref())?)?
                }
            };
            let mut own = &own[..];
            for piece in pieces {
                let (numbers, rest) = own.split_at(piece.len() * k);
                y[piece.start * k..piece.end * k].copy_from_slice(numbers);
                own = rest;
            }
        }
        Ok(device.upload_as(&y, activations)?)
    }
}

/// The rows of `pieces`, `width` numbers each.
fn gathered(values: &[f32], pieces: &[Range<usize>], width: usize) -> Vec<f32> {
    pieces.iter().flat_map(|piece| &values[piece.start * width..piece.end * width]).copied().collect()
}

impl Launch {
    /// The launch with the passes around it.
    fn run(
        &self,
        device: &Device,
        operands: &LayerOperands,
        (x, gates): (&Buffer, Option<RankGates<'_>>),
        residual: Option<&Buffer>,
    ) -> Result<Buffer, ProjectionError> {
        let inputs = RowInputs { x, replaced: None, gates };
        if self.passes.is_empty() {
            return Ok(device.execute_inputs(operands, &self.schedule, inputs, residual)?);
        }
        let (d, k) = (operands.shape().d as usize, operands.shape().k as usize);
        let gathered = Gathered::of(&self.passes);
        let reads_x = |pass: &RowPasses| pass.own.sparse.inputs.is_some() || !pass.own.sparse.added.is_empty();
        let read = match self.passes.iter().any(reads_x) {
            true => device.read_parts(x, &gathered.numbers(d))?,
            false => Vec::new(),
        };
        let transformed = gathered.transformed_inputs(device, &read, d);
        let replaced = transformed.as_ref().map(|values| ReplacedRows { pieces: &gathered.pieces, values });
        let inputs = RowInputs { replaced, ..inputs };
        let mut y = device.execute_inputs(operands, &self.schedule, inputs, residual)?;
        if self.passes.iter().any(|pass| pass.own.changes_sums()) {
            let mut sums = device.read_parts(&y, &gathered.numbers(k))?;
            gathered.change_sums(device, (&read, d), (&mut sums, k));
            gathered.put_back(device, &mut y, &sums, k)?;
        }
        Ok(y)
    }

    /// The same with the epilogue applied here, as flora's algebra has it: φ(sum + bias) + residual.
    fn finished(
        &self,
        device: &Device,
        operands: &LayerOperands,
        x: (&Buffer, Option<RankGates<'_>>),
        residual: Option<&[f32]>,
    ) -> Result<Vec<f32>, ProjectionError> {
        let epilogue = operands.epilogue();
        let k = operands.shape().k as usize;
        let mut y = device.read(&self.run(device, &operands.without_epilogue(), x, None)?)?;
        let bias = operands.bias().filter(|_| epilogue.bias).map(|bias| device.read(bias)).transpose()?;
        for (row, y) in y.chunks_exact_mut(k).enumerate() {
            for (column, y) in y.iter_mut().enumerate() {
                let sum = f64::from(*y) + bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
                let residual = residual.map_or(0.0, |residual| f64::from(residual[row * k + column]));
                *y = (apply_activation(epilogue.activation, sum) + residual) as f32;
            }
        }
        Ok(y)
    }
}

/// The rows that have passes, one behind the other: what leaves the device, and comes back to it.
struct Gathered {
    /// Where they are in the batch: pieces that rise, and don't touch.
    pieces: Vec<Range<usize>>,
    /// By the gathered rows.
    passes: Vec<RowPasses>,
}

impl Gathered {
    /// Of passes that rise.
    fn of(passes: &[RowPasses]) -> Self {
        let mut pieces: Vec<Range<usize>> = Vec::new();
        let mut gathered = Vec::with_capacity(passes.len());
        let mut first = 0;
        for RowPasses { rows, own } in passes {
            match pieces.last_mut().filter(|last| last.end == rows.start) {
                Some(last) => last.end = rows.end,
                None => pieces.push(rows.clone()),
            }
            gathered.push(RowPasses { rows: first..first + rows.len(), own: Arc::clone(own) });
            first += rows.len();
        }
        Self { pieces, passes: gathered }
    }

    /// Where the numbers of the rows are in `[rows, width]`.
    fn numbers(&self, width: usize) -> Vec<Range<usize>> {
        self.pieces.iter().map(|rows| rows.start * width..rows.end * width).collect()
    }

    /// Writes the rows, `width` numbers each, to their places.
    fn put_back(&self, device: &Device, buffer: &mut Buffer, rows: &[f32], width: usize) -> Result<(), DeviceError> {
        let mut rest = rows;
        for place in self.numbers(width) {
            let (own, behind) = rest.split_at(place.len());
            device.overwrite(buffer, place.start, own)?;
            rest = behind;
        }
        Ok(())
    }

    /// x `[gathered rows, d]` with the rows transformed whose adapters do so; `None` where none does.
    fn transformed_inputs(&self, device: &Device, x: &[f32], d: usize) -> Option<Vec<f32>> {
        let matrix_of = |pass: &'_ RowPasses| pass.own.sparse.inputs.is_some();
        if !self.passes.iter().any(matrix_of) {
            return None;
        }
        let mut transformed = x.to_vec();
        let with_matrix = self.passes.iter().filter_map(|pass| Some((pass, pass.own.sparse.inputs.as_ref()?)));
        let products =
            products(with_matrix.map(|(pass, matrix)| (pass.rows.clone(), matrix)), (x, d), (&mut transformed, d));
        device.multiply_sparse(products);
        Some(transformed)
    }

    /// Makes the whole sums y `[gathered rows, k]` of what the launch gave; x is `[gathered rows, d]`.
    fn change_sums(&self, device: &Device, (x, d): (&[f32], usize), (y, k): (&mut [f32], usize)) {
        let turning: Vec<_> = self
            .passes
            .iter()
            .filter_map(|pass| Some((pass.rows.clone(), pass.own.sparse.outputs.as_ref()?)))
            .collect();
        if !turning.is_empty() {
            let before = y.to_vec();
            device.multiply_sparse(products(turning.into_iter(), (&before, k), (y, k)));
        }
        // The first product of each adapter, then the second: all rows have their products in the order of their own adapter.
        let most = self.passes.iter().map(|pass| pass.own.sparse.added.len()).max().unwrap_or(0);
        for at in 0..most {
            let adding: Vec<_> =
                self.passes.iter().filter_map(|pass| Some((&pass.rows, pass.own.sparse.added.get(at)?))).collect();
            let mut inner: Vec<Vec<f32>> = Vec::new();
            let mut sums: Vec<Vec<f32>> = Vec::new();
            let zeros = |rows: &Range<usize>, matrix: &SparseMatrix| vec![0.0; rows.len() * matrix.shape()[1]];
            for (rows, product) in &adding {
                inner.push(zeros(rows, &product.first));
                sums.push(product.second.as_ref().map_or_else(Vec::new, |second| zeros(rows, second)));
            }
            let first = adding.iter().zip(&mut inner).map(|((rows, product), y)| SparseRows {
                x: &x[rows.start * d..rows.end * d],
                matrix: &product.first,
                y,
            });
            device.multiply_sparse(first.collect());
            let second = adding
                .iter()
                .zip(&inner)
                .zip(&mut sums)
                .filter_map(|(((_, product), x), y)| Some(SparseRows { x, matrix: product.second.as_ref()?, y }));
            device.multiply_sparse(second.collect());
            for (((rows, product), inner), sums) in adding.iter().zip(&inner).zip(&sums) {
                let added = if product.second.is_some() { sums } else { inner };
                y[rows.start * k..rows.end * k].iter_mut().zip(added).for_each(|(y, added)| *y += added);
            }
        }
        for (rows, offset) in self.passes.iter().filter_map(|pass| Some((&pass.rows, pass.own.offset.as_ref()?))) {
            for row in y[rows.start * k..rows.end * k].chunks_exact_mut(k) {
                row.iter_mut().zip(offset).for_each(|(value, offset)| *value += offset);
            }
        }
    }
}

/// Products of some rows, which rise, of x `[rows, inputs]` into those of y `[rows, outputs]`.
fn products<'a>(
    of: impl Iterator<Item = (Range<usize>, &'a SparseMatrix)>,
    (x, inputs): (&'a [f32], usize),
    (y, outputs): (&'a mut [f32], usize),
) -> Vec<SparseRows<'a>> {
    let mut products = Vec::new();
    let (mut rest, mut at) = (y, 0);
    for (rows, matrix) in of {
        let (_, from) = rest.split_at_mut((rows.start - at) * outputs);
        let (y, after) = from.split_at_mut(rows.len() * outputs);
        products.push(SparseRows { x: &x[rows.start * inputs..rows.end * inputs], matrix, y });
        (rest, at) = (after, rows.end);
    }
    products
}
