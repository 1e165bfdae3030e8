//! The oracle: a naive evaluator in f64 that every rewrite rule and every lowering is held against. Plain loops, no blocking,
//! nothing shared with the code that it judges.

mod operations;
mod value;

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::arena::Handle;
use crate::layer::{Layer, Node, Operand};
use crate::sparse::SparseMatrix;
use crate::types::{Dimension, Shape, TensorType};
use crate::verify::VerifiedLayer;

pub use operations::{activation_derivative, apply_activation};
pub use value::Value;

/// The most elements of one value, 8 GiB of f64.
pub const MAX_ELEMENTS: usize = 1 << 30;

/// The values of a layer's operands by name, and extents that no bound operand shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bindings {
    values: BTreeMap<String, Value>,
    sparse: BTreeMap<String, SparseMatrix<f64>>,
    extents: BTreeMap<Dimension, usize>,
}

impl Bindings {
    /// No operand bound.
    pub fn new() -> Self {
        Self::default()
    }

    /// Binds `name` to `value`, in place of an earlier value.
    pub fn insert(&mut self, name: impl Into<String>, value: Value) -> &mut Self {
        let name = name.into();
        self.sparse.remove(&name);
        self.values.insert(name, value);
        self
    }

    /// Binds `name` to a matrix that is mostly zeros, in place of an earlier value. What evaluates an equation makes a dense matrix of
    /// it; folding doesn't.
    pub fn insert_sparse(&mut self, name: impl Into<String>, matrix: SparseMatrix<f64>) -> &mut Self {
        self.sparse.insert(name.into(), matrix);
        self
    }

    /// The sparse matrix bound to `name`.
    pub fn get_sparse(&self, name: &str) -> Option<&SparseMatrix<f64>> {
        self.sparse.get(name)
    }

    /// Says how long `dimension` is, where no bound operand has it.
    pub fn insert_extent(&mut self, dimension: Dimension, extent: usize) -> &mut Self {
        self.extents.insert(dimension, extent);
        self
    }

    /// The value bound to `name`.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(name)
    }

    /// The extents of all dimensions of `operands`, those that are bound.
    pub(crate) fn extents<'l>(&self, operands: impl Iterator<Item = &'l Operand>) -> Result<Extents, EvaluateError> {
        let mut extents = Extents::default();
        for (dimension, extent) in &self.extents {
            extents.unify(dimension, *extent, "the given extents")?;
        }
        for operand in operands {
            if let Some(matrix) = self.get_sparse(&operand.name) {
                extents.unify_operand(operand, &matrix.shape(), false)?;
            } else if let Some(value) = self.get(&operand.name) {
                extents.unify_operand(operand, &value.extents(), value.rank_extent().is_some())?;
            }
        }
        Ok(extents)
    }
}

impl<N: Into<String>> FromIterator<(N, Value)> for Bindings {
    fn from_iter<I: IntoIterator<Item = (N, Value)>>(iter: I) -> Self {
        let values = iter.into_iter().map(|(name, value)| (name.into(), value)).collect();
        Self { values, ..Self::default() }
    }
}

/// Why a layer can't be evaluated on some bindings.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// An operand that the node depends on has no value.
    #[error("operand `{operand}` has no value: bind a tensor to it")]
    Unbound {
        /// The operand's name.
        operand: String,
    },
    /// A value has another number of dimensions than its operand.
    #[error("operand `{operand}` is declared {declared}, but its value has the shape {extents:?}")]
    WrongShape {
        /// The operand's name.
        operand: String,
        /// The declared type.
        declared: String,
        /// The extents of the value, a rank axis first.
        extents: Vec<usize>,
    },
    /// Two operands disagree about an extent.
    #[error("dimension {dimension} is {extent} in {source_name} but {other_extent} in {other_name}")]
    ExtentMismatch {
        /// The dimension.
        dimension: Dimension,
        /// Who says so: an operand in backquotes, or the given extents.
        source_name: String,
        /// The extent there.
        extent: usize,
        /// Who says otherwise: an operand in backquotes, the given extents, or the declaration.
        other_name: String,
        /// The extent there.
        other_extent: usize,
    },
    /// The number of elements is not the product of the extents.
    #[error("{elements} elements can't have the shape {extents:?}")]
    WrongLength {
        /// The number of elements.
        elements: usize,
        /// The extents.
        extents: Vec<usize>,
    },
    /// The mean over no elements.
    #[error("the mean over an extent of 0 is not defined")]
    EmptyMean,
    /// A value would have more than [`MAX_ELEMENTS`] elements.
    #[error("a value of shape {extents:?} has more than {MAX_ELEMENTS} elements")]
    TooLarge {
        /// The extents of the value.
        extents: Vec<usize>,
    },
    /// The node is not one of the layer's.
    #[error("node {node} is not a node of this layer")]
    UnknownNode {
        /// The handle's index.
        node: usize,
    },
}

/// One extent for each dimension, and who brought it.
#[derive(Debug, Default)]
pub(crate) struct Extents(BTreeMap<Dimension, (usize, String)>);

impl Extents {
    pub(crate) fn get(&self, dimension: &Dimension) -> Option<usize> {
        match dimension {
            Dimension::Fixed(extent) => usize::try_from(*extent).ok(),
            Dimension::Product(first, second) => self.get(first)?.checked_mul(self.get(second)?),
            other => self.0.get(other).map(|(extent, _)| *extent),
        }
    }

    fn unify(&mut self, dimension: &Dimension, extent: usize, source_name: &str) -> Result<(), EvaluateError> {
        let mismatch = |other: &str, other_extent| EvaluateError::ExtentMismatch {
            dimension: dimension.clone(),
            source_name: source_name.to_owned(),
            extent,
            other_name: other.to_owned(),
            other_extent,
        };
        if let Dimension::Fixed(fixed) = dimension {
            let fixed = usize::try_from(*fixed).unwrap_or(usize::MAX);
            return if fixed == extent { Ok(()) } else { Err(mismatch("the declaration", fixed)) };
        }
        match self.0.get(dimension) {
            Some((known, _)) if *known == extent => Ok(()),
            Some((known, by)) => Err(mismatch(by, *known)),
            None => {
                self.0.insert(dimension.clone(), (extent, source_name.to_owned()));
                Ok(())
            }
        }
    }

    fn unify_operand(&mut self, operand: &Operand, extents: &[usize], has_rank: bool) -> Result<(), EvaluateError> {
        let dimensions = dimensions(&operand.ty);
        let source_name = format!("`{}`", operand.name);
        if dimensions.len() != extents.len() || has_rank != operand.ty.rank_axis.is_some() {
            return Err(EvaluateError::WrongShape {
                operand: operand.name.clone(),
                declared: operand.ty.to_string(),
                extents: extents.to_vec(),
            });
        }
        dimensions
            .into_iter()
            .zip(extents)
            .try_for_each(|(dimension, extent)| self.unify(dimension, *extent, &source_name))
    }
}

/// The dimensions of a type, the rank axis first.
fn dimensions(ty: &TensorType) -> Vec<&Dimension> {
    let mut dimensions: Vec<&Dimension> = ty.rank_axis.iter().collect();
    match &ty.shape {
        Shape::Scalar => {}
        Shape::Vector(n) => dimensions.push(n),
        Shape::Matrix(m, n) => dimensions.extend([m, n]),
    }
    dimensions
}

/// The value of `node`. Only the operands that it depends on need to be bound; bound ones that it doesn't depend on are
/// not looked at.
///
/// # Errors
/// An operand without a value, or values whose extents disagree with each other or with the declaration; the mean over an
/// empty rank; a value of more than [`MAX_ELEMENTS`] elements.
pub fn evaluate(layer: &VerifiedLayer, node: Handle<Node>, bindings: &Bindings) -> Result<Value, EvaluateError> {
    let unknown = EvaluateError::UnknownNode { node: node.index() };
    evaluate_graph(layer.layer(), &[node], bindings)?.pop().ok_or(unknown)
}

/// The output of the layer, `[tokens, k]`; every operand must be bound.
///
/// # Errors
/// As [`evaluate`].
pub fn evaluate_root(layer: &VerifiedLayer, bindings: &Bindings) -> Result<Value, EvaluateError> {
    evaluate(layer, layer.root(), bindings)
}

/// The values of several nodes of a graph whose nodes are known to have types.
pub(crate) fn evaluate_graph(
    layer: &Layer,
    wanted: &[Handle<Node>],
    bindings: &Bindings,
) -> Result<Vec<Value>, EvaluateError> {
    let mut uses = uses(layer, wanted)?;
    let needed: Vec<_> = layer.nodes.iter().filter(|(handle, _)| uses[handle.index()] > 0).collect();
    let operands = needed.iter().filter_map(|(_, node)| match node {
        Node::Operand(operand) => layer.operands.get(*operand),
        _ => None,
    });
    bindings.extents(operands)?;
    let mut values: Vec<Option<Cow<'_, Value>>> = vec![None; layer.nodes.len()];
    for (handle, operation) in needed {
        let value = match operation {
            Node::Operand(operand) => {
                let name = layer.operands.get(*operand).map_or("", |operand| operand.name.as_str());
                match bindings.get_sparse(name) {
                    Some(matrix) => Cow::Owned(dense(matrix)?),
                    None => Cow::Borrowed(
                        bindings.get(name).ok_or_else(|| EvaluateError::Unbound { operand: name.to_owned() })?,
                    ),
                }
            }
            operation => Cow::Owned(operations::evaluate_node(operation, |operand| {
                let unknown = EvaluateError::UnknownNode { node: operand.index() };
                values.get(operand.index()).and_then(|value| value.as_deref()).ok_or(unknown)
            })?),
        };
        values[handle.index()] = Some(value);
        for operand in operation.operands() {
            uses[operand.index()] -= 1;
            if uses[operand.index()] == 0 {
                values[operand.index()] = None;
            }
        }
    }
    let value = |node: &Handle<Node>| match &values[node.index()] {
        Some(value) => Ok(value.clone().into_owned()),
        None => Err(EvaluateError::UnknownNode { node: node.index() }),
    };
    wanted.iter().map(value).collect()
}

fn dense(matrix: &SparseMatrix<f64>) -> Result<Value, EvaluateError> {
    let [rows, columns] = matrix.shape();
    Value::count(None, &[rows, columns])?;
    Value::matrix(rows, columns, matrix.to_dense())
}

/// How often each node is read on the way to `wanted`, which count as read once more, so that values are dropped early.
fn uses(layer: &Layer, wanted: &[Handle<Node>]) -> Result<Vec<usize>, EvaluateError> {
    let mut uses = vec![0usize; layer.nodes.len()];
    for node in wanted {
        *uses.get_mut(node.index()).ok_or(EvaluateError::UnknownNode { node: node.index() })? += 1;
    }
    for (handle, node) in layer.nodes.iter().rev() {
        if uses[handle.index()] > 0 {
            for operand in node.operands() {
                *uses.get_mut(operand.index()).ok_or(EvaluateError::UnknownNode { node: operand.index() })? += 1;
            }
        }
    }
    Ok(uses)
}
