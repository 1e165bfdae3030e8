//! What is done once, when an adapter is loaded: its scales, means and norms are computed in f64 and folded into the vectors
//! that the kernels read, each rounded to f32 once.

use std::collections::BTreeMap;

use super::layout::{Folding, Pair};
use super::{Core, FoldedAdapter, NormalForm, RankOne, SparseProduct, Term, VirtualRow};
use crate::arena::Handle;
use crate::evaluate::{Bindings, EvaluateError, Extents, Value, apply_activation, evaluate_graph};
use crate::layer::{Activation, Node, Operand, Reduce};
use crate::sparse::SparseMatrix;
use crate::text::print_node;
use crate::types::{Dimension, Shape};

/// Why an adapter can't be folded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// A tensor is missing or has the wrong extents.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// An extent that no bound operand shows.
    #[error(
        "the extent of {dimension} is not known: bind an operand that has it, or give it with Bindings::insert_extent"
    )]
    UnknownExtent {
        /// The dimension.
        dimension: Dimension,
    },
    /// Finite tensors gave a value that f32 can't hold, such as a division by a norm of 0.
    #[error(
        "`{term}` gives {value}, which is not a finite f32: check the adapter's tensors for zeros or extreme values"
    )]
    NotFinite {
        /// The part of the equation that was folded.
        term: String,
        /// The value.
        value: f64,
    },
    /// The layer's adapters add a vector of their own, which a folded adapter doesn't hold.
    #[error("adapters of the layer `{layer}` add a vector to the output: use fold_with_offset and unfold_with_offset")]
    Offset {
        /// The layer.
        layer: String,
    },
    /// Gradients of sparse matrices, which nothing computes.
    #[error(
        "adapters of `{layer}` multiply rows by sparse matrices, which have no gradients here: such adapters can't be trained"
    )]
    SparseGradient {
        /// The layer.
        layer: String,
    },
    /// The tensors that [`FoldedAdapter::apply`] got don't fit.
    #[error("{what} has the shape {found:?}, expected {expected:?}")]
    WrongShape {
        /// Which tensor.
        what: &'static str,
        /// Its extents.
        found: Vec<usize>,
        /// What the others ask for.
        expected: Vec<usize>,
    },
}

/// A scale that is one number, or one for each element.
#[derive(Clone)]
enum Scale {
    Scalar(f64),
    Vector(Vec<f64>),
}

impl Scale {
    /// This scale for each of `extent` elements, times `other`'s.
    fn times(&self, other: &[f64]) -> Vec<f64> {
        match self {
            Scale::Scalar(scale) => other.iter().map(|other| scale * other).collect(),
            Scale::Vector(scale) => scale.iter().zip(other).map(|(scale, other)| scale * other).collect(),
        }
    }

    /// The scale of one element.
    fn at(&self, index: usize) -> f64 {
        match self {
            Scale::Scalar(scale) => *scale,
            Scale::Vector(scale) => scale.get(index).copied().unwrap_or(f64::NAN),
        }
    }

    /// A vector, if it is one, and the number that is left.
    fn split(self) -> (Option<Vec<f64>>, Scale) {
        match self {
            Scale::Scalar(_) => (None, self),
            Scale::Vector(scale) => (Some(scale), Scale::Scalar(1.0)),
        }
    }

    fn scaled(self, factor: f64) -> Scale {
        match self {
            Scale::Scalar(scale) => Scale::Scalar(scale * factor),
            Scale::Vector(scale) => Scale::Vector(scale.into_iter().map(|scale| scale * factor).collect()),
        }
    }

    fn plus(self, other: Scale) -> Scale {
        match (self, other) {
            (Scale::Scalar(one), Scale::Scalar(other)) => Scale::Scalar(one + other),
            (Scale::Vector(vector), Scale::Scalar(scalar)) | (Scale::Scalar(scalar), Scale::Vector(vector)) => {
                Scale::Vector(vector.into_iter().map(|element| element + scalar).collect())
            }
            (Scale::Vector(one), Scale::Vector(other)) => {
                Scale::Vector(one.into_iter().zip(other).map(|(one, other)| one + other).collect())
            }
        }
    }
}

impl NormalForm {
    /// The adapter in the form that the kernels read. `bindings` holds the adapter's tensors by operand name, and the base
    /// weight and shared operands where a load-time value depends on them (DoRA's norm). Base terms whose input is not scaled by
    /// a vector become one virtual row, the first. Which vectors there are doesn't depend on the numbers: [`layout`](Self::layout).
    ///
    /// A tensor that holds a NaN or an infinity gives an adapter that does; finite tensors never do.
    ///
    /// # Errors
    /// A missing tensor, extents that disagree or aren't known, a mean over rank 0, a value beyond f32; a layer with an
    /// [`offset`](Self::offset).
    pub fn fold(&self, bindings: &Bindings) -> Result<FoldedAdapter, FoldError> {
        match &self.offset[..] {
            [] => Ok(self.fold_with_offset(bindings)?.0),
            _ => Err(FoldError::Offset { layer: self.layer.layer().name.clone() }),
        }
    }

    /// [`fold`](Self::fold), and the vector `[k]` that the adapter adds to the sum, where it adds one.
    ///
    /// # Errors
    /// As [`fold`](Self::fold).
    pub fn fold_with_offset(&self, bindings: &Bindings) -> Result<(FoldedAdapter, Option<Vec<f32>>), FoldError> {
        self.fold_weighted(bindings, 1.0)
    }

    /// [`fold_with_offset`](Self::fold_with_offset) of a part of a sum of adapters: all that it gives is `weight` times as much, but a
    /// virtual row without scales, which [`FoldedAdapter::compose`] accounts for. The weight is multiplied in f64, so that everything
    /// is still rounded once.
    ///
    /// # Errors
    /// As [`fold`](Self::fold).
    pub fn fold_weighted(
        &self,
        bindings: &Bindings,
        weight: f64,
    ) -> Result<(FoldedAdapter, Option<Vec<f32>>), FoldError> {
        let extents = bindings.extents(self.layer.layer().operands.iter().map(|(_, operand)| operand))?;
        // Of a sparse operand itself, the entries are all that is wanted.
        let nodes: Vec<_> =
            self.load_time_values().into_iter().filter(|node| self.sparse_operand(*node, bindings).is_none()).collect();
        let values = evaluate_graph(self.layer.layer(), &nodes, bindings)?;
        let values = nodes.into_iter().zip(values).collect();
        let mut fold = Fold { linear: self, bindings, extents, values, weight, folded: FoldedAdapter::default() };
        for folding in self.foldings() {
            fold.add(&folding)?;
        }
        let offset = fold.offset()?;
        Ok((fold.folded, offset))
    }
}

/// One run of [`NormalForm::fold`].
struct Fold<'a> {
    linear: &'a NormalForm,
    bindings: &'a Bindings,
    extents: Extents,
    values: BTreeMap<Handle<Node>, Value>,
    /// What all outputs are multiplied by.
    weight: f64,
    folded: FoldedAdapter,
}

impl Fold<'_> {
    fn add(&mut self, folding: &Folding<'_>) -> Result<(), FoldError> {
        match folding {
            Folding::SharedRow { terms, out_scale } => {
                let out_scale = out_scale.then(|| self.sum_of_scales(terms)).transpose()?;
                self.folded.virtual_rows.push(VirtualRow { in_scale: None, out_scale });
            }
            Folding::ScaledRow { term, .. } => {
                // A scalar goes into the vector of the other side, so that a row holds no vector of equal numbers.
                let (inner, outer) = match (self.scale(term.inner)?, self.outer(term)?) {
                    (inner, Scale::Scalar(outer)) => (inner.scaled(outer), None),
                    (inner, Scale::Vector(outer)) => (inner, Some(outer)),
                };
                let in_scale = match inner {
                    Scale::Vector(inner) => Some(self.round(inner, term)?),
                    Scale::Scalar(_) => None,
                };
                let out_scale = outer.map(|outer| self.round(outer, term)).transpose()?;
                self.folded.virtual_rows.push(VirtualRow { in_scale, out_scale });
            }
            Folding::RankRows { term, pair } => {
                let rows = self.rank_one_pairs(term, *pair)?.into_iter();
                let rows = rows.map(|pair| VirtualRow { in_scale: Some(pair.shrink), out_scale: Some(pair.expand) });
                self.folded.virtual_rows.extend(rows);
            }
            Folding::LowRank { term, pair } => {
                let pairs = self.rank_one_pairs(term, *pair)?;
                self.folded.low_rank.extend(pairs);
            }
            Folding::Transformed { term, matrix, .. } => self.transformed(term, *matrix)?,
            Folding::Sparse { term, first, second } => {
                let (inner, outer, one) = (self.scale(term.inner)?, self.outer(term)?, Scale::Scalar(1.0));
                let product = match second {
                    None => SparseProduct { first: self.sparse(*first, &inner, &outer)?, second: None },
                    Some(second) => SparseProduct {
                        first: self.sparse(*first, &inner, &one)?,
                        second: Some(self.sparse(*second, &one, &outer)?),
                    },
                };
                self.folded.sparse.added.push(product);
            }
        }
        Ok(())
    }

    /// A term over the base weight whose input or output is transformed. A vector on the other side is the virtual row's; all other
    /// scales go into the matrix.
    fn transformed(&mut self, term: &Term, matrix: Handle<Node>) -> Result<(), FoldError> {
        let (inner, outer) = (self.scale(term.inner)?, self.outer(term)?);
        let mut row = VirtualRow::default();
        if let Core::TransformedOutputs(_) = term.core {
            let (in_scale, inner) = inner.split();
            self.folded.sparse.outputs = Some(self.sparse(matrix, &inner, &outer)?);
            row.in_scale = in_scale.map(|scale| self.round(scale, term)).transpose()?;
        } else {
            let (out_scale, outer) = outer.split();
            self.folded.sparse.inputs = Some(self.sparse(matrix, &inner, &outer)?);
            row.out_scale = out_scale.map(|scale| self.round(scale, term)).transpose()?;
        }
        self.folded.virtual_rows.push(row);
        Ok(())
    }

    /// The entries of a matrix, its rows and columns scaled.
    fn sparse(&self, node: Handle<Node>, rows: &Scale, columns: &Scale) -> Result<SparseMatrix, FoldError> {
        if let Some(matrix) = self.linear.sparse_operand(node, self.bindings) {
            let scaled = matrix.map(|row, column, number| rows.at(row) * number * columns.at(column));
            let mut rounded = self.rounded(scaled.values().to_vec(), node)?.into_iter();
            let matrix = scaled.map(|_, _, _| rounded.next().unwrap_or(f32::NAN));
            return Ok(matrix);
        }
        let value = self.value(node)?;
        let &[height, width] = value.shape() else { return Ok(SparseMatrix::default()) };
        let scaled = value.data().chunks(width.max(1)).enumerate().flat_map(|(row, numbers)| {
            numbers.iter().enumerate().map(move |(column, number)| rows.at(row) * number * columns.at(column))
        });
        Ok(SparseMatrix::of_dense(height, width, &self.rounded(scaled.collect(), node)?))
    }

    /// The sum of the scales of base terms that scale the input by no vector, for each output.
    fn sum_of_scales(&self, terms: &[&Term]) -> Result<Vec<f32>, FoldError> {
        let mut sum = Scale::Scalar(0.0);
        for term in terms {
            let inner = match self.scale(term.inner)? {
                Scale::Scalar(inner) => inner,
                Scale::Vector(_) => continue,
            };
            sum = sum.plus(self.outer(term)?.scaled(inner));
        }
        let sum = match sum {
            Scale::Scalar(scale) => vec![scale; self.out_extent()?],
            Scale::Vector(vector) => vector,
        };
        match terms {
            [first, ..] => self.round(sum, first),
            [] => Ok(Vec::new()),
        }
    }

    /// The sum of what the adapter adds to every row, `[k]`.
    fn offset(&self) -> Result<Option<Vec<f32>>, FoldError> {
        let Some(last) = self.linear.offset.last() else { return Ok(None) };
        let mut sum = Scale::Scalar(0.0);
        for node in &self.linear.offset {
            sum = sum.plus(self.scale(Some(*node))?.scaled(self.weight));
        }
        let sum = match sum {
            Scale::Scalar(number) => vec![number; self.out_extent()?],
            Scale::Vector(vector) => vector,
        };
        self.rounded(sum, *last).map(Some)
    }

    /// (inner ∘ b_r, outer ∘ a_r) for each r; a mean's 1/r goes to the second.
    fn rank_one_pairs(&self, term: &Term, Pair { b, a, reduce }: Pair) -> Result<Vec<RankOne>, FoldError> {
        let (b, a) = (self.value(b)?, self.value(a)?);
        let (&[_, rank], &[_, k]) = (b.shape(), a.shape()) else { return Ok(Vec::new()) };
        if reduce == Reduce::Mean && rank == 0 {
            return Err(EvaluateError::EmptyMean.into());
        }
        let (inner, outer) = (self.scale(term.inner)?, self.outer(term)?);
        let outer = if reduce == Reduce::Mean { outer.scaled(1.0 / rank as f64) } else { outer };
        let pair = |r: usize| {
            let column: Vec<f64> = b.data().iter().skip(r).step_by(rank).copied().collect();
            let row = &a.data()[r * k..][..k];
            let (shrink, expand) = (inner.times(&column), outer.times(row));
            Ok(RankOne { shrink: self.round(shrink, term)?, expand: self.round(expand, term)? })
        };
        (0..rank).map(pair).collect()
    }

    fn value(&self, node: Handle<Node>) -> Result<&Value, FoldError> {
        Ok(self.values.get(&node).ok_or(EvaluateError::UnknownNode { node: node.index() })?)
    }

    fn scale(&self, node: Option<Handle<Node>>) -> Result<Scale, FoldError> {
        let Some(node) = node else { return Ok(Scale::Scalar(1.0)) };
        let value = self.value(node)?;
        Ok(match *value.data() {
            [scalar] if value.shape().is_empty() => Scale::Scalar(scalar),
            _ => Scale::Vector(value.data().to_vec()),
        })
    }

    /// What a term's outputs are multiplied by.
    fn outer(&self, term: &Term) -> Result<Scale, FoldError> {
        Ok(self.scale(term.outer)?.scaled(self.weight))
    }

    /// k
    fn out_extent(&self) -> Result<usize, FoldError> {
        match &self.linear.layer.type_of(self.linear.layer.root()).shape {
            Shape::Matrix(_, k) => self.extents.get(k).ok_or_else(|| FoldError::UnknownExtent { dimension: k.clone() }),
            _ => Ok(1),
        }
    }

    fn round(&self, values: Vec<f64>, term: &Term) -> Result<Vec<f32>, FoldError> {
        self.rounded(values, term.outer.or(term.inner).unwrap_or(self.linear.layer.root()))
    }

    /// The values of a part of the equation, in f32.
    fn rounded(&self, values: Vec<f64>, node: Handle<Node>) -> Result<Vec<f32>, FoldError> {
        let rounded: Vec<f32> = values.iter().map(|value| *value as f32).collect();
        match rounded.iter().position(|value| !value.is_finite()) {
            Some(index) if self.linear.is_finite(self.bindings) => {
                let term = print_node(self.linear.layer.layer(), node);
                Err(FoldError::NotFinite { term, value: values[index] })
            }
            _ => Ok(rounded),
        }
    }
}

impl NormalForm {
    /// What is bound to `node`, where that is an operand to which a sparse matrix is bound.
    fn sparse_operand<'b>(&self, node: Handle<Node>, bindings: &'b Bindings) -> Option<&'b SparseMatrix<f64>> {
        let Node::Operand(operand) = *self.layer.layer().nodes.get(node)? else { return None };
        bindings.get_sparse(&self.layer.layer().operands.get(operand)?.name)
    }

    /// Whether every bound operand is finite.
    fn is_finite(&self, bindings: &Bindings) -> bool {
        let sparse = |operand: &Operand| bindings.get_sparse(&operand.name);
        let mut matrices = self.layer.layer().operands.iter().filter_map(|(_, operand)| sparse(operand));
        if matrices.any(|matrix| matrix.values().iter().any(|value| !value.is_finite())) {
            return false;
        }
        let operands = self.layer.layer().operands.iter();
        let mut values = operands.filter_map(|(_, operand)| bindings.get(&operand.name));
        values.all(|value| value.data().iter().all(|element| element.is_finite()))
    }
}

impl FoldedAdapter {
    /// φ( Σ_v out_v ∘ ((in_v ∘ x) @ w0) + Σ_q (x · shrink_q) expand_q + bias ) in f64, with the sparse parts around the sums: what a
    /// device must give for x `[t, d]` and w0 `[d, k]`.
    ///
    /// # Errors
    /// [`FoldError::WrongShape`] when a tensor or a vector of the adapter doesn't fit the others.
    pub fn apply(
        &self,
        x: &Value,
        w0: &Value,
        bias: Option<&Value>,
        activation: Activation,
    ) -> Result<Value, FoldError> {
        let &[tokens, d] = x.shape() else { return Err(wrong("x", x.shape(), &[0, 0])) };
        let &[inputs, k] = w0.shape() else { return Err(wrong("w0", w0.shape(), &[d, 0])) };
        if inputs != d {
            return Err(wrong("w0", w0.shape(), &[d, k]));
        }
        self.check(d, k)?;
        if let Some(bias) = bias.filter(|bias| bias.shape() != [k]) {
            return Err(wrong("the bias", bias.shape(), &[k]));
        }
        let mut y = vec![0.0; tokens * k];
        for (token, y) in y.chunks_mut(k.max(1)).enumerate().take(tokens) {
            let own = &x.data()[token * d..][..d];
            let transformed = self.sparse.inputs.as_ref().map(|matrix| matrix.times_row(own));
            let x = transformed.as_deref().unwrap_or(own);
            for row in &self.virtual_rows {
                let scale =
                    |scales: &Option<Vec<f32>>, index: usize| scales.as_ref().map_or(1.0, |s| f64::from(s[index]));
                for (column, y) in y.iter_mut().enumerate() {
                    let products =
                        (0..d).map(|index| scale(&row.in_scale, index) * x[index] * w0.data()[index * k + column]);
                    *y += scale(&row.out_scale, column) * products.sum::<f64>();
                }
            }
            for RankOne { shrink, expand } in &self.low_rank {
                let shrunk: f64 = shrink.iter().zip(x).map(|(shrink, x)| f64::from(*shrink) * x).sum();
                y.iter_mut().zip(expand).for_each(|(y, expand)| *y += shrunk * f64::from(*expand));
            }
            if let Some(matrix) = &self.sparse.outputs {
                y.copy_from_slice(&matrix.times_row(y));
            }
            for product in &self.sparse.added {
                y.iter_mut().zip(product.times_row(own)).for_each(|(y, product)| *y += product);
            }
            for (column, y) in y.iter_mut().enumerate() {
                *y = apply_activation(activation, *y + bias.map_or(0.0, |bias| bias.data()[column]));
            }
        }
        Ok(Value::matrix(tokens, k, y)?)
    }

    /// [`apply`](Self::apply), and then the residual `[t, k]` added: what a kernel with the whole epilogue must give.
    ///
    /// # Errors
    /// [`FoldError::WrongShape`] when a tensor or a vector of the adapter doesn't fit the others.
    pub fn apply_with_residual(
        &self,
        x: &Value,
        w0: &Value,
        bias: Option<&Value>,
        activation: Activation,
        residual: Option<&Value>,
    ) -> Result<Value, FoldError> {
        let y = self.apply(x, w0, bias, activation)?;
        let Some(residual) = residual else { return Ok(y) };
        let &[tokens, k] = y.shape() else { return Ok(y) };
        if residual.shape() != [tokens, k] {
            return Err(wrong("the residual", residual.shape(), &[tokens, k]));
        }
        let sums = y.data().iter().zip(residual.data()).map(|(y, residual)| y + residual);
        Ok(Value::matrix(tokens, k, sums.collect())?)
    }

    /// Whether every vector has the length that a weight `[d, k]` asks for.
    ///
    /// # Errors
    /// [`FoldError::WrongShape`] for the first that hasn't.
    pub fn check(&self, d: usize, k: usize) -> Result<(), FoldError> {
        let fits = |what, vector: &[f32], extent| match vector.len() == extent {
            true => Ok(()),
            false => Err(wrong(what, &[vector.len()], &[extent])),
        };
        for VirtualRow { in_scale, out_scale } in &self.virtual_rows {
            in_scale.as_deref().map_or(Ok(()), |vector| fits("a virtual row's in-scale", vector, d))?;
            out_scale.as_deref().map_or(Ok(()), |vector| fits("a virtual row's out-scale", vector, k))?;
        }
        for RankOne { shrink, expand } in &self.low_rank {
            fits("a shrink vector", shrink, d)?;
            fits("an expand vector", expand, k)?;
        }
        self.sparse.check(d, k)
    }
}

pub(super) fn wrong(what: &'static str, found: &[usize], expected: &[usize]) -> FoldError {
    FoldError::WrongShape { what, found: found.to_vec(), expected: expected.to_vec() }
}
