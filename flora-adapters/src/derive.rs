//! Operands that an adapter's file doesn't hold as its equation has them: projections that all modules share, entries of a bank,
//! reflections, blocks. What equations can't say of them is a function here, a row of one table; a description names it.
//!
//! Functions are evaluated in f64 when an adapter is folded, since the sizes of its module are known then.

mod blocks;
mod dense;
mod factors;
mod kronecker;
mod reflections;
mod rotations;
mod sparse;
mod vectors;

use std::collections::BTreeMap;

use flora_checkpoint::peft::description::{Extent, LayerDescription};
use flora_checkpoint::{AdapterFolder, AdapterModule, Operand};
use flora_ir::evaluate::MAX_ELEMENTS;
use flora_ir::{Bindings, EvaluateError, Layer, SparseMatrix, Value};

/// A function of the table.
pub(crate) struct Function {
    name: &'static str,
    /// How many components of a pair, or entries of sparse matrices, it makes, in words; none where the operand's shape says it.
    pub(crate) amount: Option<&'static str>,
    make: Make,
}

/// What a function makes.
enum Make {
    Tensor(fn(&Call<'_>) -> Result<Tensor, DeriveError>),
    /// A matrix by its entries, for an operand that is declared sparse. No function reads it.
    Sparse(fn(&Call<'_>) -> Result<SparseMatrix<f64>, DeriveError>),
}

const fn function_of(name: &'static str, make: fn(&Call<'_>) -> Result<Tensor, DeriveError>) -> Function {
    Function { name, amount: None, make: Make::Tensor(make) }
}

/// One of a factor with as many components as it makes.
const fn factor(
    name: &'static str,
    amount: &'static str,
    make: fn(&Call<'_>) -> Result<Tensor, DeriveError>,
) -> Function {
    Function { name, amount: Some(amount), make: Make::Tensor(make) }
}

/// One of a sparse matrix with as many entries as it makes.
const fn sparse_matrix(
    name: &'static str,
    amount: &'static str,
    make: fn(&Call<'_>) -> Result<SparseMatrix<f64>, DeriveError>,
) -> Function {
    Function { name, amount: Some(amount), make: Make::Sparse(make) }
}

const DENSE: &str = "min(d, k)";
const GROUPED: &str = "r for each block, and those of the general part";
const KRONECKER: &str = "those of two Kronecker products with an identity, the fewest that there are";
const BLOCKS: &str = "d · the size of a block";
const RANDOM: &str = "min(d, k), up to the next multiple of r";

/// Every function. `[D, R]` and the like are the shapes of what they make, `{}` what they read.
const TABLE: [Function; 26] = [
    // {m}: the leading part of m that has the operand's shape.
    function_of("leading", factors::leading),
    // {}: [D, R], row i is the unit vector of i mod r.
    function_of("tiled_identity", factors::tiled_identity),
    // {m [R, n]}: [R, K], m beside itself.
    function_of("tiled_columns", factors::tiled_columns),
    // {a, b, ...}: the product of numbers.
    function_of("alpha_over_ranks", factors::alpha_over_ranks),
    // {bank [m], indices, scales}: scales ∘ bank[indices], in their shape.
    function_of("gathered", vectors::gathered),
    // {logits [R, tiles, vectors], bank [vectors, length], k}: [D, R], mixtures of the k likeliest vectors.
    function_of("vector_bank_inputs", vectors::bank_inputs),
    // {logits [tiles, R, vectors], bank, k}: [R, K]
    function_of("vector_bank_outputs", vectors::bank_outputs),
    // {v [u], p [u, R, R]}: [R, R], Σ_i v_i p_i.
    function_of("combined", vectors::combined),
    // {b [D, R]}: [R], the norms of its columns, at least 1e-4.
    function_of("column_norms_from_1e_4", vectors::column_norms),
    // {a [R, K]}: [R], the norms of its rows, at least 1e-4.
    function_of("row_norms_from_1e_4", vectors::row_norms),
    // {u [D, R]}: its columns, each divided by its norm.
    function_of("unit_columns", reflections::unit_columns),
    // {u [D, R]}: its columns, orthonormalised by Gram and Schmidt.
    function_of("orthonormal_columns", reflections::orthonormal_columns),
    // {u [D, R], unit columns}: v [D, R] of (I − 2 u_r u_rᵀ) ⋯ (I − 2 u_1 u_1ᵀ) = I + v uᵀ.
    function_of("reflections", reflections::reflections),
    // {shrink [n, D/n, R], general [h, D]}: [D, Q], the inputs of each of the n · r components.
    factor("grouped_inputs", GROUPED, blocks::grouped_inputs),
    // {expand [n, R, K/n], general [K, h]}: [Q, K]
    factor("grouped_outputs", GROUPED, blocks::grouped_outputs),
    // {w1, w1_a, w1_b, w2, w2_a, w2_b}: [D, Q], sparse, of their Kronecker product, transposed.
    sparse_matrix("kronecker_inputs", KRONECKER, kronecker::inputs),
    // The same: [Q, K].
    sparse_matrix("kronecker_outputs", KRONECKER, kronecker::outputs),
    // {kernel [K/n, D/n, n]}: [D, K], circulant blocks over d.
    function_of("circulant_blocks", dense::circulant_blocks),
    // {values [n], places [2, n]}: [D, K], zero but there.
    sparse_matrix("scattered", "one for each changed weight", sparse::scattered),
    // {upper triangles [blocks, n], terms}: [D, D], which turns blocks of the inputs; turns are power series.
    sparse_matrix("turned_inputs", BLOCKS, rotations::turned_inputs),
    // {blocks [blocks, n, n]}: the same; turns are exact.
    sparse_matrix("turned_input_blocks", BLOCKS, rotations::turned_input_blocks),
    // {lambda [R, n], gamma [n, min(d, k)], one [R, ·], many [·, ·, R]}: [D, Q] of n · r components.
    factor("random_inputs", RANDOM, vectors::random_inputs),
    // The same: [Q, K].
    factor("random_outputs", RANDOM, vectors::random_outputs),
    // {angles, scales, group size}: [K, K], which turns pairs of outputs.
    sparse_matrix("turned_outputs", "2 · k", sparse::turned_outputs),
    // {m [D, K]}: [D, Q] of m = b a, q the lesser of d and k.
    factor("dense_inputs", DENSE, dense::inputs),
    // The same: [Q, K].
    factor("dense_outputs", DENSE, dense::outputs),
];

/// The function called `name`.
pub(crate) fn function(name: &str) -> Option<&'static Function> {
    TABLE.iter().find(|function| function.name == name)
}

/// The names of all functions.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    TABLE.iter().map(|function| function.name)
}

/// Why an operand can't be made.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DeriveError {
    /// An input that isn't there.
    #[error("it is made of `{input}`, which the file doesn't have")]
    Missing {
        /// The input.
        input: String,
    },
    /// An input of another shape.
    #[error("`{input}` has the shape {found:?}; {expected}")]
    Shape {
        /// The input.
        input: String,
        /// Its extents.
        found: Vec<usize>,
        /// What is right.
        expected: &'static str,
    },
    /// What was made has another shape than the module asks for.
    #[error("it would have the shape {found:?}, but the module asks for {expected:?}")]
    Result {
        /// The extents that it would have.
        found: Vec<usize>,
        /// Those that it has to have.
        expected: Vec<usize>,
    },
    /// A number that an input can't have.
    #[error("`{input}` is {value}, but {expected}")]
    Number {
        /// The input.
        input: String,
        /// What it is.
        value: f64,
        /// What is right.
        expected: &'static str,
    },
    /// Finite inputs that give a number that isn't.
    #[error("it would hold {value}: check what it is made of for zeros or extreme values")]
    NotFinite {
        /// The number.
        value: f64,
    },
    /// More numbers than a value may have.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
}

/// Numbers of any number of extents, row-major.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Tensor {
    pub(crate) fn new(shape: Vec<usize>, values: Vec<f64>) -> Self {
        Self { shape, values }
    }

    /// `[rows, columns]`, each number by `element`.
    pub(crate) fn matrix(rows: usize, columns: usize, mut element: impl FnMut(usize, usize) -> f64) -> Self {
        let values = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
        let values = values.map(|(row, column)| element(row, column)).collect();
        Self { shape: vec![rows, columns], values }
    }

    fn of(operand: &Operand) -> Self {
        Self { shape: operand.shape.clone(), values: operand.values.iter().map(|value| f64::from(*value)).collect() }
    }

    fn value(self) -> Result<Value, EvaluateError> {
        match self.shape[..] {
            [] => Ok(Value::scalar(self.values.first().copied().unwrap_or(f64::NAN))),
            [rows, columns] => Value::matrix(rows, columns, self.values),
            _ => Ok(Value::vector(self.values)),
        }
    }
}

/// One use of a function.
pub(crate) struct Call<'a> {
    inputs: Vec<(&'a str, Option<&'a Tensor>)>,
    /// The operand's extents; `None` is left to the function.
    pub(crate) shape: Vec<Option<usize>>,
    /// The module's inputs.
    pub(crate) d: usize,
    /// Its outputs.
    pub(crate) k: usize,
    pub(crate) rank: usize,
}

impl<'a> Call<'a> {
    /// The input at `index`, where the file has it.
    pub(crate) fn optional(&self, index: usize) -> Option<&'a Tensor> {
        self.inputs.get(index)?.1
    }

    pub(crate) fn input(&self, index: usize) -> Result<&'a Tensor, DeriveError> {
        let missing = || DeriveError::Missing { input: self.name(index) };
        self.optional(index).ok_or_else(missing)
    }

    /// An input of `N` extents.
    pub(crate) fn of_extents<const N: usize>(
        &self,
        index: usize,
        expected: &'static str,
    ) -> Result<([usize; N], &'a [f64]), DeriveError> {
        let tensor = self.input(index)?;
        let shape = <[usize; N]>::try_from(&tensor.shape[..]).map_err(|_| self.misshapen(index, expected))?;
        Ok((shape, &tensor.values))
    }

    /// An input that is a whole number from `least` on.
    pub(crate) fn count(&self, index: usize, least: usize) -> Result<usize, DeriveError> {
        let ([], values) = self.of_extents::<0>(index, "it must be one number")?;
        let value = values.first().copied().unwrap_or(f64::NAN);
        let is_whole = value.fract() == 0.0 && value >= least as f64 && value <= (1u64 << 24) as f64;
        match is_whole {
            true => Ok(value as usize),
            false => Err(DeriveError::Number { input: self.name(index), value, expected: "it must be a whole number" }),
        }
    }

    /// `[rows, columns]`, each number by `element`, where that is the shape of the operand and not too large.
    pub(crate) fn matrix(
        &self,
        rows: usize,
        columns: usize,
        element: impl FnMut(usize, usize) -> f64,
    ) -> Result<Tensor, DeriveError> {
        self.check(&[rows, columns])?;
        match rows.checked_mul(columns) {
            Some(count) if count <= MAX_ELEMENTS => Ok(Tensor::matrix(rows, columns, element)),
            _ => Err(EvaluateError::TooLarge { extents: vec![rows, columns] }.into()),
        }
    }

    /// Whether the operand may have the extents `made`.
    pub(crate) fn check(&self, made: &[usize]) -> Result<(), DeriveError> {
        let fits = made.len() == self.shape.len()
            && made.iter().zip(&self.shape).all(|(made, asked)| asked.is_none_or(|asked| *made == asked));
        let expected = || made.iter().zip(&self.shape).map(|(made, asked)| asked.unwrap_or(*made)).collect();
        if fits { Ok(()) } else { Err(DeriveError::Result { found: made.to_vec(), expected: expected() }) }
    }

    pub(crate) fn name(&self, index: usize) -> String {
        self.inputs.get(index).map_or("an input", |(name, _)| name).to_owned()
    }

    pub(crate) fn misshapen(&self, index: usize, expected: &'static str) -> DeriveError {
        let found = self.optional(index).map_or_else(Vec::new, |tensor| tensor.shape.clone());
        DeriveError::Shape { input: self.name(index), found, expected }
    }
}

/// What the operands of one module are made of.
pub(crate) struct Derivation<'a> {
    pub(crate) described: &'a LayerDescription,
    pub(crate) adapter: &'a AdapterFolder,
    pub(crate) module: &'a AdapterModule,
    pub(crate) d: usize,
    pub(crate) k: usize,
}

impl Derivation<'_> {
    /// The operands of `equation`, those that functions make among them.
    ///
    /// # Errors
    /// The operand that can't be made, and why.
    pub(crate) fn operands(&self, equation: &Layer) -> Result<Bindings, (String, DeriveError)> {
        let own = self.module.operands.iter().chain(&self.adapter.shared);
        let mut sparse: BTreeMap<&str, SparseMatrix<f64>> = BTreeMap::new();
        let mut known: BTreeMap<&str, Tensor> =
            own.map(|(name, operand)| (name.as_str(), Tensor::of(operand))).collect();
        for derived in &self.described.derived {
            let failed = |error| (derived.operand.clone(), error);
            let extent = |extent: &Extent| match extent {
                Extent::Inputs => Some(self.d),
                Extent::Outputs => Some(self.k),
                Extent::Rank => Some(self.module.rank),
                Extent::Fixed(number) => Some(*number),
                Extent::Components | Extent::Any => None,
            };
            let call = Call {
                inputs: derived.of.iter().map(|input| (input.as_str(), known.get(input.as_str()))).collect(),
                shape: derived.shape.iter().map(extent).collect(),
                d: self.d,
                k: self.k,
                rank: self.module.rank,
            };
            // Registering the kind has looked the function up.
            let unknown = || failed(DeriveError::Missing { input: derived.function.clone() });
            let not_finite = |values: &[f64]| match values.iter().find(|value| !value.is_finite()) {
                Some(value) => Err(DeriveError::NotFinite { value: *value }),
                None => Ok(()),
            };
            match function(&derived.function).ok_or_else(unknown)?.make {
                Make::Tensor(make) => {
                    let made = make(&call).map_err(failed)?;
                    call.check(&made.shape).and_then(|()| not_finite(&made.values)).map_err(failed)?;
                    known.insert(&derived.operand, made);
                }
                Make::Sparse(make) => {
                    let made = make(&call).map_err(failed)?;
                    call.check(&made.shape()).and_then(|()| not_finite(made.values())).map_err(failed)?;
                    sparse.insert(&derived.operand, made);
                }
            }
        }
        let operands = equation.operands.iter().filter(|(_, operand)| operand.role.is_adapters());
        let mut bindings = Bindings::new();
        for (_, operand) in operands {
            if let Some(matrix) = sparse.remove(operand.name.as_str()) {
                bindings.insert_sparse(operand.name.clone(), matrix);
                continue;
            }
            let value = known.remove(operand.name.as_str());
            let missing = || DeriveError::Missing { input: operand.name.clone() };
            let value = value.ok_or_else(missing).and_then(|tensor| Ok(tensor.value()?));
            bindings.insert(operand.name.clone(), value.map_err(|error| (operand.name.clone(), error))?);
        }
        Ok(bindings)
    }
}
