//! OFT and BOFT: blocks of the inputs that are turned, by rotations that follow from skew-symmetric matrices (Cayley).

use flora_ir::SparseMatrix;

use super::{Call, DeriveError};

/// A square matrix.
#[derive(Clone)]
struct Square {
    size: usize,
    values: Vec<f64>,
}

impl Square {
    fn new(size: usize, mut element: impl FnMut(usize, usize) -> f64) -> Self {
        let places = (0..size).flat_map(|row| (0..size).map(move |column| (row, column)));
        Self { size, values: places.map(|(row, column)| element(row, column)).collect() }
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.size + column]
    }

    fn times(&self, other: &Self) -> Self {
        Self::new(self.size, |row, column| (0..self.size).map(|at| self.at(row, at) * other.at(at, column)).sum())
    }

    /// The skew-symmetric matrix whose upper triangle is `upper`, by rows.
    fn skew(size: usize, upper: &[f64]) -> Self {
        let place = |row: usize, column: usize| row * size - row * (row + 1) / 2 + column - row - 1;
        Self::new(size, |row, column| match row.cmp(&column) {
            std::cmp::Ordering::Less => upper[place(row, column)],
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Greater => -upper[place(column, row)],
        })
    }

    /// I + 2 Σ_{0 < n < terms − 1} Qⁿ + Q^(terms − 1), the first terms of (I + Q)(I − Q)⁻¹; PEFT ends the series so. Of three terms it
    /// computes four, and of two both whole.
    fn cayley_series(&self, terms: usize) -> Self {
        let terms = if terms == 3 { 4 } else { terms };
        let identity = Self::new(self.size, |row, column| f64::from(u8::from(row == column)));
        let (mut sum, mut power) = (identity.clone(), identity);
        for term in 1..terms {
            power = power.times(self);
            let factor = if term + 1 == terms && term > 2 { 1.0 } else { 2.0 };
            sum.values.iter_mut().zip(&power.values).for_each(|(sum, power)| *sum += factor * power);
        }
        sum
    }

    /// (I − Q)(I + Q)⁻¹ of a skew-symmetric Q. I + Q needs no exchange of rows: its symmetric part is I.
    fn cayley(&self) -> Self {
        // (I − Q)(I + Q)⁻¹ = (I + Q)⁻¹(I − Q), which is what elimination leaves on the right.
        let one = |row: usize, column: usize| f64::from(u8::from(row == column));
        let mut left = Self::new(self.size, |row, column| one(row, column) + self.at(row, column));
        let mut right = Self::new(self.size, |row, column| one(row, column) - self.at(row, column));
        for pivot in 0..self.size {
            let inverse = 1.0 / left.at(pivot, pivot);
            for matrix in [&mut left, &mut right] {
                matrix.values[pivot * self.size..][..self.size].iter_mut().for_each(|number| *number *= inverse);
            }
            for row in (0..self.size).filter(|row| *row != pivot) {
                let factor = left.at(row, pivot);
                for matrix in [&mut left, &mut right] {
                    for column in 0..self.size {
                        matrix.values[row * self.size + column] -= factor * matrix.at(pivot, column);
                    }
                }
            }
        }
        right
    }
}

/// `[D, D]`, the blocks one after the other; a single block is all of them.
fn turned(call: &Call<'_>, blocks: &[Square]) -> Result<SparseMatrix<f64>, DeriveError> {
    let size = blocks.first().map_or(0, |block| block.size);
    let fits = match blocks {
        [_] => size > 0 && call.d.is_multiple_of(size),
        _ => blocks.len() * size == call.d,
    };
    if !fits {
        return Err(call.misshapen(0, "its blocks must make up the inputs of the module"));
    }
    let column = |turned: usize| {
        let block = turned / size;
        let turn = &blocks[if blocks.len() == 1 { 0 } else { block }];
        (0..size).map(|row| ((block * size + row) as u32, turn.at(row, turned % size))).collect()
    };
    Ok(SparseMatrix::of_columns(call.d, (0..call.d).map(column)))
}

pub(super) fn turned_inputs(call: &Call<'_>) -> Result<SparseMatrix<f64>, DeriveError> {
    let ([blocks, angles], values) = call.of_extents(0, "it must be a matrix")?;
    let terms = call.count(1, 1)?;
    // A block of n inputs has n (n − 1) / 2 angles.
    let size = (1..=call.d).find(|size| size * (size - 1) / 2 == angles).filter(|_| blocks > 0 && angles > 0);
    let size = size.ok_or_else(|| call.misshapen(0, "its rows must be upper triangles of square blocks"))?;
    if terms > 64 {
        let expected = "more than 64 terms of a series aren't computed";
        return Err(DeriveError::Number { input: call.name(1), value: terms as f64, expected });
    }
    let block = |upper: &[f64]| Square::skew(size, upper).cayley_series(terms);
    turned(call, &values.chunks_exact(angles).map(block).collect::<Vec<_>>())
}

pub(super) fn turned_input_blocks(call: &Call<'_>) -> Result<SparseMatrix<f64>, DeriveError> {
    let ([_, size, columns], values) = call.of_extents(0, "it must be a list of square blocks")?;
    if size != columns || size == 0 {
        return Err(call.misshapen(0, "it must be a list of square blocks"));
    }
    let block = |values: &[f64]| {
        // PEFT takes the skew-symmetric part.
        Square::new(size, |row, column| 0.5 * (values[row * size + column] - values[column * size + row])).cayley()
    };
    turned(call, &values.chunks_exact(size * size).map(block).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_keep_lengths_and_the_series_comes_near() {
        let upper: Vec<f64> = (0..10).map(|at| 0.01 * f64::from(at) - 0.04).collect();
        let skew = Square::skew(5, &upper);
        let negated = Square::new(5, |row, column| -skew.at(row, column));
        let (exact, series) = (negated.cayley(), skew.cayley_series(20));
        let transposed = Square::new(5, |row, column| exact.at(column, row));
        let product = exact.times(&transposed);
        for (row, column) in (0..25).map(|at| (at / 5, at % 5)) {
            assert!((product.at(row, column) - f64::from(u8::from(row == column))).abs() < 1e-14);
            assert!((exact.at(row, column) - series.at(row, column)).abs() < 1e-14);
        }
    }
}
