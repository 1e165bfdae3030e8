//! HRA: a chain of Householder reflections, as one low-rank update of the identity (the compact WY form of Schreiber and Van Loan).

use super::{Call, DeriveError, Tensor};

/// The columns of a matrix, each a vector.
struct Columns {
    rows: usize,
    columns: Vec<Vec<f64>>,
}

impl Columns {
    fn of(call: &Call<'_>) -> Result<Self, DeriveError> {
        let ([rows, columns], values) = call.of_extents(0, "it must be a matrix")?;
        let column = |column: usize| (0..rows).map(|row| values[row * columns + column]).collect();
        Ok(Self { rows, columns: (0..columns).map(column).collect() })
    }

    fn matrix(&self, call: &Call<'_>) -> Result<Tensor, DeriveError> {
        call.matrix(self.rows, self.columns.len(), |row, column| self.columns[column][row])
    }
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

/// Divides a column by its norm.
fn normalise(call: &Call<'_>, column: &mut [f64]) -> Result<(), DeriveError> {
    let norm = dot(column, column).sqrt();
    if norm == 0.0 {
        let expected = "each of its columns must have a direction";
        return Err(DeriveError::Number { input: call.name(0), value: norm, expected });
    }
    column.iter_mut().for_each(|number| *number /= norm);
    Ok(())
}

pub(super) fn unit_columns(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let mut columns = Columns::of(call)?;
    columns.columns.iter_mut().try_for_each(|column| normalise(call, column))?;
    columns.matrix(call)
}

/// Each column less its parts along those before it, one after the other.
pub(super) fn orthonormal_columns(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let mut columns = Columns::of(call)?;
    for index in 0..columns.columns.len() {
        let (earlier, rest) = columns.columns.split_at_mut(index);
        let Some(column) = rest.first_mut() else { break };
        for other in earlier {
            let along = dot(other, column);
            column.iter_mut().zip(other.iter()).for_each(|(number, other)| *number -= along * other);
        }
        normalise(call, column)?;
    }
    columns.matrix(call)
}

/// v of the product of the reflections, of which the last stands first: with H_r ⋯ H_1 = I + v uᵀ, H_{r+1} (I + v uᵀ) is
/// I + v uᵀ − 2 u_{r+1} (u_{r+1}ᵀ + (u_{r+1}ᵀ v) uᵀ).
pub(super) fn reflections(call: &Call<'_>) -> Result<Tensor, DeriveError> {
    let units = Columns::of(call)?;
    let mut product: Vec<Vec<f64>> = Vec::with_capacity(units.columns.len());
    for unit in &units.columns {
        for column in &mut product {
            let along = dot(unit, column);
            column.iter_mut().zip(unit).for_each(|(number, unit)| *number -= 2.0 * along * unit);
        }
        product.push(unit.iter().map(|number| -2.0 * number).collect());
    }
    Columns { rows: units.rows, columns: product }.matrix(call)
}
