//! Adapted layers under Burn's autodiff: what a user would write of an adapter are parameters, and their gradients and that of the
//! input are the compiler's. The base weight stays frozen, in any format.
//!
//! ```text
//! parameters ──fold (f64)──▶ vectors ──forward──▶ y        dy ──backward──▶ dx, vectors' gradients ──unfold (f64)──▶ parameters'
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::Autodiff;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::module::{Module, Param};
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Shape, Tensor, TensorData, TensorMetadata, TensorPrimitive};
use flora_ir::algebra::{FoldError, FoldedAdapter, NormalForm};
use flora_ir::gradient::{FoldedGradient, Unfolding};
use flora_ir::{Activation, Bindings, EvaluateError, Value};
use flora_plan::layer::LayerShape;
use flora_plan::pipeline::CompiledLayer;
use flora_runtime::{PlannedProjection, Projection, ProjectionError, StepBatch, Wanted};

use crate::backend::{FloraBackend, TensorError};
use crate::linear::{AdaptedLinear, LinearError, execute};

/// What a user would write of one layer's adapter, as parameters that Burn's optimizers change: a tensor for each operand of the
/// equation that is no single number.
///
/// Which equation it is and the numbers that aren't trained are no part of a Burn record.
#[derive(Module, Debug)]
pub struct AdapterParameters<B: Backend> {
    /// The numbers of each operand, row-major, in the order of [`Self::names`].
    pub operands: Vec<Param<Tensor<B, 1>>>,
    #[module(skip)]
    equation: Equation,
}

/// What folds parameters and takes gradients back.
#[derive(Clone)]
struct Equation(Arc<EquationParts>);

struct EquationParts {
    name: String,
    linear: NormalForm,
    unfolding: Unfolding,
    /// Names and extents of what is trained.
    trained: Vec<(String, Vec<usize>)>,
    /// Single numbers, and the base weight where folding reads it.
    constants: Bindings,
}

impl fmt::Debug for Equation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0.name)
    }
}

impl fmt::Display for Equation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, formatter)
    }
}

/// Why an adapter has no parameters here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ParametersError {
    /// An operand that isn't bound, or of another shape than the equation says.
    #[error(transparent)]
    Operands(#[from] FoldError),
}

impl From<EvaluateError> for ParametersError {
    fn from(error: EvaluateError) -> Self {
        Self::Operands(error.into())
    }
}

impl<B: Backend> AdapterParameters<B> {
    /// Parameters that start as `operands` say: the adapter's, by the names of the equation, and the base weight `[d, k]` where the
    /// equation reads more of it than x @ w0 (DoRA's norms).
    ///
    /// # Errors
    /// Operands that are missing or don't fit one another.
    pub fn new(layer: &CompiledLayer, operands: &Bindings, device: &B::Device) -> Result<Self, ParametersError> {
        let written = layer.written.layer();
        let (mut trained, mut parameters, mut constants) = (Vec::new(), Vec::new(), Bindings::new());
        for (handle, operand) in written.operands.iter() {
            let is_base = handle == layer.written.base_weight() && layer.linear.reads_base_weight();
            if !operand.role.is_adapters() && !is_base {
                continue;
            }
            let unbound = || EvaluateError::Unbound { operand: operand.name.clone() };
            let value = operands.get(&operand.name).ok_or_else(unbound)?;
            if is_base || value.shape().is_empty() {
                constants.insert(operand.name.clone(), value.clone());
            } else {
                let numbers: Vec<f32> = value.data().iter().map(|number| *number as f32).collect();
                let data = TensorData::new(numbers, [value.data().len()]);
                let tensor = Tensor::from_data(data, (device, DType::F32));
                parameters.push(Param::from_tensor(tensor));
                trained.push((operand.name.clone(), value.shape().to_vec()));
            }
        }
        let (linear, unfolding) = (layer.linear.clone(), layer.linear.unfolding());
        let name = written.name.clone();
        let equation = Equation(Arc::new(EquationParts { name, linear, unfolding, trained, constants }));
        equation.fold(&equation.bindings(&flat(&parameters)?)?)?;
        Ok(Self { operands: parameters, equation })
    }

    /// The names of the operands that are trained, and their extents.
    pub fn names(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.equation.0.trained.iter().map(|(name, extents)| (name.as_str(), extents.as_slice()))
    }

    /// The adapter's operands as they are now, by name: what another adapter can start from, and what a checkpoint holds.
    ///
    /// # Errors
    /// A tensor that was put in place of an operand and has another length.
    pub fn bindings(&self) -> Result<Bindings, ParametersError> {
        self.equation.bindings(&flat(&self.operands)?)
    }

    /// The vectors of the adapter as it is now: what serving loads.
    ///
    /// # Errors
    /// As [`Self::bindings`]; a value beyond f32, such as a quotient by a norm of 0.
    pub fn fold(&self) -> Result<FoldedAdapter, ParametersError> {
        Ok(self.equation.fold(&self.bindings()?)?)
    }
}

/// The numbers of all operands.
fn flat<B: Backend>(operands: &[Param<Tensor<B, 1>>]) -> Result<Vec<f64>, ParametersError> {
    let numbers = operands.iter().map(|operand| numbers_of(operand.val().into_data()));
    Ok(numbers.collect::<Vec<_>>().concat())
}

/// A value of one or two extents.
fn value(extents: &[usize], numbers: &[f64]) -> Result<Value, EvaluateError> {
    match *extents {
        [rows, columns] => Value::matrix(rows, columns, numbers.to_vec()),
        _ => Ok(Value::vector(numbers.to_vec())),
    }
}

fn numbers_of(data: TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}

impl Equation {
    /// What folding reads, of the numbers of all that is trained.
    fn bindings(&self, numbers: &[f64]) -> Result<Bindings, ParametersError> {
        let EquationParts { trained, constants, .. } = &*self.0;
        let mut bindings = constants.clone();
        let mut rest = numbers;
        for (name, extents) in trained {
            let (own, others) = rest.split_at_checked(extents.iter().product()).ok_or_else(|| self.size(numbers))?;
            bindings.insert(name.clone(), value(extents, own)?);
            rest = others;
        }
        if rest.is_empty() { Ok(bindings) } else { Err(self.size(numbers).into()) }
    }

    fn size(&self, numbers: &[f64]) -> FoldError {
        let expected = vec![self.len()];
        FoldError::WrongShape { what: "the parameters of an adapter", found: vec![numbers.len()], expected }
    }

    fn len(&self) -> usize {
        self.0.trained.iter().map(|(_, extents)| extents.iter().product::<usize>()).sum()
    }

    fn fold(&self, bindings: &Bindings) -> Result<FoldedAdapter, FoldError> {
        self.0.linear.fold(bindings)
    }

    /// The gradients of the numbers of all that is trained.
    fn unfold(&self, bindings: &Bindings, gradient: &FoldedGradient) -> Result<Vec<f64>, FoldError> {
        let gradients = self.0.unfolding.unfold(bindings, gradient)?;
        let mut numbers = Vec::with_capacity(self.len());
        for (name, _) in &self.0.trained {
            let unbound = || EvaluateError::Unbound { operand: name.clone() };
            numbers.extend_from_slice(gradients.get(name).ok_or_else(unbound)?.data());
        }
        Ok(numbers)
    }
}

/// The adapters that training has put into a layer, to tell whether they are there still when the backward pass comes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placed(Arc<Mutex<BTreeMap<u32, Arc<FoldedAdapter>>>>);

impl Placed {
    /// Puts adapters at their positions, where they aren't already, in place of what was there.
    fn put(&self, projection: &PlannedProjection, adapters: &[TrainedAdapter]) -> Result<(), ProjectionError> {
        let mut placed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for TrainedAdapter { position, folded, .. } in adapters {
            if placed.get(position).is_none_or(|own| !Arc::ptr_eq(own, folded)) {
                projection.change(|projection| replace(projection, *position, folded))?;
                placed.insert(*position, folded.clone());
            }
        }
        Ok(())
    }

    /// Somebody else changes the layer.
    pub(crate) fn forget(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn replace(projection: &mut Projection, position: u32, folded: &FoldedAdapter) -> Result<(), ProjectionError> {
    projection.remove(position);
    let (in_slots, out_slots) = projection.slots_with(folded);
    projection.reserve(in_slots, out_slots)?;
    projection.place(position, folded)
}

/// An adapter of a batch.
#[derive(Clone, Debug)]
struct TrainedAdapter {
    position: u32,
    folded: Arc<FoldedAdapter>,
    equation: Equation,
    bindings: Arc<Bindings>,
}

/// What the backward pass of a batch needs.
#[derive(Clone, Debug)]
struct State<B: FloraBackend> {
    projection: PlannedProjection,
    placed: Placed,
    batch: Arc<StepBatch>,
    x: FloatTensor<B>,
    adapters: Vec<TrainedAdapter>,
}

impl<B: FloraBackend, C: CheckpointStrategy> AdaptedLinear<Autodiff<B, C>> {
    /// Runs a batch whose gradients Burn then asks for: x `[.., d]`, y `[.., k]`. Segments that name a position of `adapters` have that
    /// adapter, which takes the place of what was there; others have what the layer holds there, which is not trained. The gradient
    /// of x is computed where something before the layer is trained, and those of parameters where they require one.
    ///
    /// The layer's bias is added and not trained. Activations and residuals belong behind it, as Burn's own operations.
    ///
    /// # Errors
    /// As [`forward`](AdaptedLinear::forward); a layer whose equation has an activation or a residual; parameters of another length
    /// than their equation's, or that can't be folded.
    ///
    /// # Panics
    /// Burn's backward pass can answer with no error: where a device fails in it, it panics with what the device says.
    pub fn forward_trained<const D: usize>(
        &self,
        x: Tensor<Autodiff<B, C>, D>,
        batch: &StepBatch,
        adapters: &[(u32, &AdapterParameters<Autodiff<B, C>>)],
    ) -> Result<Tensor<Autodiff<B, C>, D>, LinearError> {
        let projection = self.projection();
        let finishes = projection.change(|projection| projection.operands().epilogue());
        if finishes.residual || finishes.activation != Activation::Identity {
            return Err(LinearError::Finishes);
        }
        let shape = self.checked(x.dims(), batch)?;
        let device = x.device();
        let parameters = adapters.iter().flat_map(|(_, own)| &own.operands).map(Param::val).collect::<Vec<_>>();
        // A number that nothing depends on stands for no parameters.
        let parameters = match parameters.is_empty() {
            true => Tensor::zeros([1], &device),
            false => Tensor::cat(parameters, 0),
        };
        let numbers = numbers_of(parameters.clone().into_data());
        let mut rest = &numbers[..];
        let mut trained = Vec::new();
        for (position, own) in adapters {
            let (first, others) = rest.split_at_checked(own.equation.len()).unwrap_or((rest, &[]));
            rest = others;
            let bindings = own.equation.bindings(first)?;
            let folded = own.equation.fold(&bindings).map_err(ParametersError::from)?;
            let LayerShape { d, k } = projection.shape();
            folded.check(d as usize, k as usize).map_err(ParametersError::from)?;
            let equation = own.equation.clone();
            trained.push(TrainedAdapter {
                position: *position,
                folded: Arc::new(folded),
                equation,
                bindings: Arc::new(bindings),
            });
        }
        self.placed().put(projection, &trained)?;
        let x = x.into_primitive().tensor();
        let parameters = parameters.into_primitive().tensor();
        let y = execute::<B>(projection, &device, x.primitive.clone(), batch, None, shape)?;
        let nodes = [x.node.clone(), parameters.node.clone()];
        let y = match TrainedLinear.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prepared) => {
                let state: State<B> = State {
                    projection: projection.clone(),
                    placed: self.placed().clone(),
                    batch: Arc::new(batch.clone()),
                    x: x.primitive,
                    adapters: trained,
                };
                prepared.finish(state, y)
            }
            OpsKind::UnTracked(prepared) => prepared.finish(y),
        };
        Ok(Tensor::from_primitive(TensorPrimitive::Float(y)))
    }
}

/// The operation as Burn's autodiff knows it: of x and the numbers of all parameters.
#[derive(Debug)]
struct TrainedLinear;

impl<B: FloraBackend> Backward<B, 2> for TrainedLinear {
    type State = State<B>;

    #[expect(clippy::panic, reason = "Burn's backward pass can answer with no error")]
    fn backward(self, ops: Ops<State<B>, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let Ops { parents: [x, parameters], node, state } = ops;
        let g = grads.consume::<B>(&node);
        let wanted = match (x.is_some(), parameters.is_some()) {
            (true, true) => Wanted::All,
            (true, false) => Wanted::Input,
            (false, _) => Wanted::Adapters,
        };
        let (dx, numbers) = match state.backward(g, wanted) {
            Ok(gradients) => gradients,
            Err(error) => panic!("the backward pass of an adapted layer failed: {error}"),
        };
        if let Some((node, dx)) = x.zip(dx) {
            grads.register::<B>(node.id, dx);
        }
        if let Some((node, numbers)) = parameters.zip(numbers) {
            grads.register::<B>(node.id, numbers);
        }
    }
}

/// dx, and the gradients of the numbers of all parameters.
type OperationGradients<B> = (Option<FloatTensor<B>>, Option<FloatTensor<B>>);

impl<B: FloraBackend> State<B> {
    fn backward(self, g: FloatTensor<B>, wanted: Wanted) -> Result<OperationGradients<B>, LinearError> {
        let Self { projection, placed, batch, x, adapters } = self;
        // The layer may hold other adapters by now.
        placed.put(&projection, &adapters)?;
        let device = B::device(projection.device()).ok_or(TensorError::OtherDevice)?;
        let shape = x.shape();
        let buffer = |tensor| B::buffer(projection.device(), tensor);
        let gradient = projection.backward(&batch, &buffer(x)?, &buffer(g)?, wanted)?;
        let dx = gradient.dx.map(|dx| B::tensor(&device, dx, shape)).transpose()?;
        if !wanted.has_adapters() {
            return Ok((dx, None));
        }
        let mut numbers: Vec<f32> = Vec::new();
        for TrainedAdapter { position, equation, bindings, .. } in &adapters {
            let own = gradient.adapters.iter().find(|(at, _)| at == position);
            match own {
                Some((_, own)) => {
                    let own = equation.unfold(bindings, own).map_err(ParametersError::from)?;
                    numbers.extend(own.into_iter().map(|number| number as f32));
                }
                // No row of the batch is its own.
                None => numbers.resize(numbers.len() + equation.len(), 0.0),
            }
        }
        let buffer = projection.device().upload(&numbers).map_err(TensorError::from)?;
        let numbers = B::tensor(&device, buffer, Shape::from([numbers.len()]))?;
        Ok((dx, Some(numbers)))
    }
}
