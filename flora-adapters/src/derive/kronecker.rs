//! LoKr: the Kronecker product of two matrices as a product of two sparse ones.
//!
//! (p₁ q₁) ⊗ (p₂ q₂) = (p₁ ⊗ p₂) (q₁ ⊗ q₂), and any matrix is a product of itself and the identity on either side. So there are
//! several such products, and the one of the fewest entries is taken: of two square matrices it is (w₁ ⊗ I) (I ⊗ w₂).

use flora_ir::evaluate::MAX_ELEMENTS;
use flora_ir::{EvaluateError, SparseMatrix};

use super::{Call, DeriveError, Tensor};

/// The most inner extent of the product.
const MOST_INNER: usize = 1 << 26;

/// A factor of a matrix.
#[derive(Clone)]
enum Factor {
    Identity(usize),
    Own(Tensor),
}

impl Factor {
    /// Rows and columns.
    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Identity(extent) => [*extent; 2],
            Self::Own(tensor) => extents(tensor),
        }
    }

    fn entries(&self) -> usize {
        match self {
            Self::Identity(extent) => *extent,
            Self::Own(tensor) => tensor.values.iter().filter(|value| **value != 0.0).count(),
        }
    }

    /// The numbers of each row that aren't 0, with their places.
    fn rows(&self) -> Vec<Vec<(usize, f64)>> {
        let Self::Own(tensor) = self else { return (0..self.shape()[0]).map(|at| vec![(at, 1.0)]).collect() };
        let [rows, columns] = self.shape();
        let row = |at: usize| {
            let numbers = tensor.values[at * columns..][..columns].iter().copied().enumerate();
            numbers.filter(|(_, number)| *number != 0.0).collect()
        };
        (0..rows).map(row).collect()
    }
}

fn extents(tensor: &Tensor) -> [usize; 2] {
    [tensor.shape.first().copied().unwrap_or(0), tensor.shape.last().copied().unwrap_or(0)]
}

/// Of `[rows, inner]` and `[inner, columns]`.
fn product(left: &Tensor, right: &Tensor) -> Tensor {
    let ([rows, inner], [_, columns]) = (extents(left), extents(right));
    Tensor::matrix(rows, columns, |row, column| {
        (0..inner).map(|at| left.values[row * inner + at] * right.values[at * columns + column]).sum()
    })
}

/// A matrix as a product of two, `[rows, inner]` and `[inner, columns]`.
#[derive(Clone)]
struct Factored {
    left: Factor,
    right: Factor,
}

impl Factored {
    /// The ways to write LoKr's matrix whose whole is the input at `first`, or whose factors are the two behind it.
    fn ways(call: &Call<'_>, first: usize) -> Result<Vec<Self>, DeriveError> {
        let beside_identities = |whole: Tensor| {
            let [rows, columns] = extents(&whole);
            let before = Self { left: Factor::Identity(rows), right: Factor::Own(whole.clone()) };
            [before, Self { left: Factor::Own(whole), right: Factor::Identity(columns) }]
        };
        if let Some(whole) = call.optional(first) {
            call.of_extents::<2>(first, "it must be a matrix")?;
            return Ok(beside_identities(whole.clone()).into());
        }
        let ([rows, rank], _) = call.of_extents(first + 1, "it must be a matrix")?;
        let ([inner, columns], _) = call.of_extents(first + 2, "it must be a matrix")?;
        if rank != inner {
            return Err(call.misshapen(first + 2, "the factors of one matrix must have one rank"));
        }
        if rows > call.k || columns > call.d {
            return Err(
                call.misshapen(first + 1, "the matrix that it is a factor of must be no larger than the weight")
            );
        }
        let (left, right) = (call.input(first + 1)?.clone(), call.input(first + 2)?.clone());
        let whole = beside_identities(product(&left, &right));
        let own = Self { left: Factor::Own(left), right: Factor::Own(right) };
        Ok(std::iter::once(own).chain(whole).collect())
    }

    /// Entries of both factors of the Kronecker product with another.
    fn entries(&self, other: &Self) -> usize {
        let both = |one: &Factor, other: &Factor| one.entries().saturating_mul(other.entries());
        both(&self.left, &other.left).saturating_add(both(&self.right, &other.right))
    }
}

/// w₁ and w₂, each as the product that makes the fewest entries of theirs.
fn fewest(call: &Call<'_>) -> Result<[Factored; 2], DeriveError> {
    let (first, second) = (Factored::ways(call, 0)?, Factored::ways(call, 3)?);
    let pairs = first.iter().flat_map(|first| second.iter().map(move |second| (first, second)));
    let (first, second) = pairs
        .min_by_key(|(first, second)| first.entries(second))
        .ok_or_else(|| DeriveError::Missing { input: call.name(0) })?;
    let inner = first.left.shape()[1].saturating_mul(second.left.shape()[1]);
    let entries = first.entries(second);
    if inner > MOST_INNER || entries > MAX_ELEMENTS {
        return Err(EvaluateError::TooLarge { extents: vec![inner, entries] }.into());
    }
    Ok([first.clone(), second.clone()])
}

/// The entries that a row of each of two matrices makes in their Kronecker product, `width` the columns of the second.
fn paired(one: &[(usize, f64)], other: &[(usize, f64)], width: usize) -> Vec<(u32, f64)> {
    let pair = |(at, number): &(usize, f64)| {
        let (at, number) = (*at, *number);
        other.iter().map(move |(place, other)| ((at * width + place) as u32, number * other))
    };
    one.iter().flat_map(pair).collect()
}

/// `[D, Q]`, the right-hand factor transposed: PEFT's matrices map inputs to outputs from the left.
pub(super) fn inputs(call: &Call<'_>) -> Result<SparseMatrix<f64>, DeriveError> {
    let [first, second] = fewest(call)?;
    let ([rows, columns], [other_rows, other_columns]) = (first.right.shape(), second.right.shape());
    call.check(&[columns.saturating_mul(other_columns), rows.saturating_mul(other_rows)])?;
    let (first, second) = (first.right.rows(), second.right.rows());
    let column =
        |component: usize| paired(&first[component / other_rows], &second[component % other_rows], other_columns);
    Ok(SparseMatrix::of_columns(call.d, (0..rows * other_rows).map(column)))
}

/// `[Q, K]`, the left-hand factor transposed.
pub(super) fn outputs(call: &Call<'_>) -> Result<SparseMatrix<f64>, DeriveError> {
    let [first, second] = fewest(call)?;
    let ([rows, columns], [other_rows, other_columns]) = (first.left.shape(), second.left.shape());
    call.check(&[columns.saturating_mul(other_columns), rows.saturating_mul(other_rows)])?;
    let (first, second) = (first.left.rows(), second.left.rows());
    let column = |output: usize| paired(&first[output / other_rows], &second[output % other_rows], other_columns);
    Ok(SparseMatrix::of_columns(columns * other_columns, (0..rows * other_rows).map(column)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(rows: usize, columns: usize) -> Tensor {
        Tensor::matrix(rows, columns, |row, column| ((row * columns + column + 1) as f64 * 0.7).sin())
    }

    /// Whatever the matrices have, whole or factors: the product of the two sparse matrices is the transposed Kronecker product, and no
    /// pair of them has fewer entries.
    #[test]
    fn two_sparse_matrices_make_the_kronecker_product() {
        let wholes = [tensor(3, 2), tensor(4, 5)];
        let factors = [[tensor(3, 2), tensor(2, 2)], [tensor(4, 1), tensor(1, 5)]];
        for (one, other) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut inputs = Vec::new();
            for (is_whole, whole, [left, right]) in [(one, &wholes[0], &factors[0]), (other, &wholes[1], &factors[1])] {
                inputs.extend(if is_whole { [Some(whole), None, None] } else { [None, Some(left), Some(right)] });
            }
            let inputs = inputs.into_iter().map(|input| ("w", input)).collect();
            let (d, k) = (10, 12);
            let call =
                |shape: [Option<usize>; 2]| Call { inputs: Vec::clone(&inputs), shape: shape.into(), d, k, rank: 2 };
            let first = super::inputs(&call([Some(d), None])).expect("factors that fit");
            let second = outputs(&call([None, Some(k)])).expect("factors that fit");
            let matrix = |is_whole: bool, at: usize| match is_whole {
                true => wholes[at].clone(),
                false => product(&factors[at][0], &factors[at][1]),
            };
            let (w1, w2) = (matrix(one, 0), matrix(other, 1));
            for input in 0..d {
                let mut x = vec![0.0; d];
                x[input] = 1.0;
                for (output, found) in second.times_row(&first.times_row(&x)).into_iter().enumerate() {
                    let expected = w1.values[(output / 4) * 2 + input / 5] * w2.values[(output % 4) * 5 + input % 5];
                    assert!((found - expected).abs() < 1e-14, "{input} {output}: {found} is not {expected}");
                }
            }
            let ways = |first| Factored::ways(&call([Some(d), None]), first).expect("factors");
            let all = ways(0).into_iter().flat_map(|one| ways(3).into_iter().map(move |other| one.entries(&other)));
            assert_eq!(Some(first.entries() + second.entries()), all.min());
        }
    }
}
