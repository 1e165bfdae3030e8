//! Factors whose numbers are looked up in a bank that all modules share, and what is measured of a factor.

use super::{Call, DeriveError, Tensor};

/// The least norm that DeLoRA divides by.
const LEAST_NORM: f64 = 1e-4;

/// Uni-LoRA: every number of a factor is one of a short vector's, scaled.
pub(super) fn gathered(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([length], bank) = call.of_extents(0, "it must be a vector")?;
    let (indices, scales) = (call.input(1)?, call.input(2)?);
    if scales.shape != indices.shape {
        return Err(call.misshapen(2, "it must have the shape of the indices"));
    }
    let number = |(index, scale): (&f64, &f64)| Ok(scale * bank[place(call, 1, *index, length)?]);
    let values = indices.values.iter().zip(&scales.values).map(number).collect::<Result<_, DeriveError>>()?;
    Ok(Tensor::new(indices.shape.clone(), values))
}

/// A number that is a place of a list of `length`.
pub(super) fn place(call: &Call<'_>, input: usize, number: f64, length: usize) -> Result<usize, DeriveError> {
    match number.fract() == 0.0 && number >= 0.0 && number < length as f64 {
        true => Ok(number as usize),
        false => {
            let expected = "an index must be a whole number below the length of what it is of";
            Err(DeriveError::Number { input: call.name(input), value: number, expected })
        }
    }
}

/// VB-LoRA: each tile of a row is a mixture of a few vectors of the bank.
pub(super) fn bank_inputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([rank, tiles, vectors], logits) = call.of_extents(0, "it must have an extent for rank, tiles and vectors")?;
    let bank = Bank::of(call, vectors)?;
    let mixed: Vec<Vec<f64>> = logits.chunks_exact(vectors.max(1)).map(|logits| bank.mixed(logits)).collect();
    let length = bank.length;
    call.matrix(tiles * length, rank, |input, component| mixed[component * tiles + input / length][input % length])
}

/// The same for the factor of the outputs.
pub(super) fn bank_outputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([tiles, rank, vectors], logits) = call.of_extents(0, "it must have an extent for tiles, rank and vectors")?;
    let bank = Bank::of(call, vectors)?;
    let mixed: Vec<Vec<f64>> = logits.chunks_exact(vectors.max(1)).map(|logits| bank.mixed(logits)).collect();
    let length = bank.length;
    call.matrix(rank, tiles * length, |component, output| mixed[(output / length) * rank + component][output % length])
}

/// Vectors, of which the likeliest few are mixed.
struct Bank<'a> {
    length: usize,
    vectors: &'a [f64],
    few: usize,
}

impl<'a> Bank<'a> {
    fn of(call: &Call<'a>, wanted: usize) -> Result<Self, DeriveError> {
        let ([count, length], vectors) = call.of_extents(1, "it must have an extent for vectors and their length")?;
        if count != wanted || length == 0 {
            return Err(call.misshapen(1, "it must have a vector for each logit"));
        }
        let few = call.count(2, 1)?;
        match few <= count {
            true => Ok(Self { length, vectors, few }),
            false => {
                let expected = "it must be no more than the vectors of the bank";
                Err(DeriveError::Number { input: call.name(2), value: few as f64, expected })
            }
        }
    }

    /// The sum of the few vectors of the largest logits, weighted by their softmax.
    fn mixed(&self, logits: &[f64]) -> Vec<f64> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|one, other| logits[*other].total_cmp(&logits[*one]));
        order.truncate(self.few);
        let largest = order.first().map_or(0.0, |first| logits[*first]);
        let weights: Vec<f64> = order.iter().map(|index| (logits[*index] - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let number = |at: usize| {
            let parts =
                order.iter().zip(&weights).map(|(index, weight)| weight * self.vectors[index * self.length + at]);
            parts.sum::<f64>() / sum
        };
        (0..self.length).map(number).collect()
    }
}

/// TinyLoRA's matrix between two frozen factors.
pub(super) fn combined(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([count], numbers) = call.of_extents(0, "it must be a vector")?;
    let ([matrices, rows, columns], values) = call.of_extents(1, "it must be a list of matrices")?;
    if matrices != count {
        return Err(call.misshapen(1, "it must have a matrix for each number"));
    }
    call.matrix(rows, columns, |row, column| {
        (0..count).map(|at| numbers[at] * values[(at * rows + row) * columns + column]).sum()
    })
}

/// RandLoRA's factors: one of the lesser of inputs and outputs, scaled, and one of the greater. Their components are counted in
/// different orders, which random ones don't mind.
struct RandomFactors<'a> {
    rank: usize,
    bases: usize,
    lesser: usize,
    lambda: &'a [f64],
    gamma: &'a [f64],
    one: &'a [f64],
    /// Extents and numbers of the one for the greater.
    many: ([usize; 3], &'a [f64]),
    /// Of a row of `one`.
    width: usize,
}

impl<'a> RandomFactors<'a> {
    fn of(call: &Call<'a>) -> Result<Self, DeriveError> {
        let ([rank, bases], lambda) = call.of_extents(0, "it must be a matrix")?;
        let ([gamma_rows, gamma_columns], gamma) = call.of_extents(1, "it must be a matrix")?;
        let ([one_rows, width], one) = call.of_extents(2, "it must be a matrix")?;
        let many = call.of_extents::<3>(3, "it must have an extent for numbers, bases and rank")?;
        let (lesser, greater) = (call.d.min(call.k), call.d.max(call.k));
        if gamma_rows != bases || gamma_columns != lesser {
            return Err(call.misshapen(1, "it must have a row for each base, of the lesser of inputs and outputs"));
        }
        if one_rows != rank || width < lesser {
            return Err(call.misshapen(2, "it must have a row for each rank, as long as the module asks for"));
        }
        let [numbers, many_bases, many_rank] = many.0;
        if many_rank != rank || many_bases < bases || numbers < greater {
            return Err(call.misshapen(3, "it must be as large as the module asks for"));
        }
        Ok(Self { rank, bases, lesser, lambda, gamma, one, many, width })
    }

    fn components(&self) -> usize {
        self.rank * self.bases
    }

    fn of_lesser(&self, component: usize, at: usize) -> f64 {
        let (rank, base) = (component / self.bases, component % self.bases);
        self.lambda[component] * self.one[rank * self.width + at] * self.gamma[base * self.lesser + at]
    }

    fn of_greater(&self, component: usize, at: usize) -> f64 {
        let ([_, bases, rank], numbers) = self.many;
        numbers[(at * bases + component / self.rank) * rank + component % self.rank]
    }
}

/// `[D, Q]`
pub(super) fn random_inputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let factors = RandomFactors::of(call)?;
    call.matrix(call.d, factors.components(), |input, component| match call.d <= call.k {
        true => factors.of_lesser(component, input),
        false => factors.of_greater(component, input),
    })
}

/// `[Q, K]`
pub(super) fn random_outputs(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let factors = RandomFactors::of(call)?;
    call.matrix(factors.components(), call.k, |component, output| match call.d <= call.k {
        true => factors.of_greater(component, output),
        false => factors.of_lesser(component, output),
    })
}

/// `[R]` of `[D, R]`
pub(super) fn column_norms(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([rows, columns], values) = call.of_extents(0, "it must be a matrix")?;
    let norm = |column: usize| (0..rows).map(|row| values[row * columns + column].powi(2)).sum::<f64>().sqrt();
    Ok(Tensor::new(vec![columns], (0..columns).map(|column| norm(column).max(LEAST_NORM)).collect()))
}

/// `[R]` of `[R, K]`
pub(super) fn row_norms(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let ([rows, columns], values) = call.of_extents(0, "it must be a matrix")?;
    let norm = |row: usize| values[row * columns..][..columns].iter().map(|value| value * value).sum::<f64>().sqrt();
    Ok(Tensor::new(vec![rows], (0..rows).map(|row| norm(row).max(LEAST_NORM)).collect()))
}
