//! Matrices that are mostly zeros, by their entries: what an adapter multiplies its rows by costs by those alone.

/// `[rows, columns]`, column by column, since a product with a row vector sums over a column. In a column, rows rise. Numbers are f32
/// as kernels read them, or f64 before an adapter is folded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SparseMatrix<N = f32> {
    rows: usize,
    /// Where each column's entries begin, and where the last one's end.
    starts: Vec<usize>,
    /// The row of each entry.
    places: Vec<u32>,
    values: Vec<N>,
}

impl<N: Copy + Default + PartialEq> SparseMatrix<N> {
    /// The entries of each column, by row; several of one place count as the last, and zeros aren't kept. A NaN is an entry.
    pub fn of_columns(rows: usize, columns: impl IntoIterator<Item = Vec<(u32, N)>>) -> Self {
        let mut matrix = Self { rows, starts: vec![0], places: Vec::new(), values: Vec::new() };
        for mut column in columns {
            column.sort_by_key(|(row, _)| *row);
            column.retain(|(row, value)| (*row as usize) < rows && *value != N::default());
            matrix.places.extend(column.iter().map(|(row, _)| row));
            matrix.values.extend(column.iter().map(|(_, value)| value));
            matrix.starts.push(matrix.places.len());
        }
        matrix
    }

    /// The entries of a dense matrix, row-major, that aren't 0. Numbers beyond the last whole row are none of it.
    pub fn of_dense(rows: usize, columns: usize, values: &[N]) -> Self {
        let column = |column: usize| {
            let values = values.iter().skip(column).step_by(columns.max(1)).take(rows).enumerate();
            values.filter(|(_, value)| **value != N::default()).map(|(row, value)| (row as u32, *value)).collect()
        };
        Self::of_columns(rows, (0..columns).map(column))
    }

    /// The numbers, row-major.
    pub fn to_dense(&self) -> Vec<N> {
        let [rows, columns] = self.shape();
        let mut dense = vec![N::default(); rows * columns];
        for column in 0..columns {
            let (places, values) = self.column(column);
            places.iter().zip(values).for_each(|(place, value)| dense[*place as usize * columns + column] = *value);
        }
        dense
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.rows, self.starts.len().saturating_sub(1)]
    }

    /// How many entries it has: the multiply-adds of a row.
    pub fn entries(&self) -> usize {
        self.values.len()
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.starts[..]) + size_of_val(&self.places[..]) + size_of_val(&self.values[..])
    }

    /// The rows and the values of the entries of one column; none of a column that there isn't.
    pub fn column(&self, column: usize) -> (&[u32], &[N]) {
        let range = match self.starts.get(column..).unwrap_or_default() {
            [start, end, ..] => *start..*end,
            _ => 0..0,
        };
        (&self.places[range.clone()], &self.values[range])
    }

    /// The most entries of a column.
    pub fn longest_column(&self) -> usize {
        self.starts.windows(2).map(|ends| ends[1] - ends[0]).max().unwrap_or(0)
    }

    /// All numbers.
    pub fn values(&self) -> &[N] {
        &self.values
    }

    /// `[columns, rows]`
    #[must_use]
    pub fn transposed(&self) -> Self {
        let [rows, columns] = self.shape();
        let mut by_row: Vec<Vec<(u32, N)>> = vec![Vec::new(); rows];
        for column in 0..columns {
            let (places, values) = self.column(column);
            for (place, value) in places.iter().zip(values) {
                by_row[*place as usize].push((column as u32, *value));
            }
        }
        Self::of_columns(columns, by_row)
    }

    /// Some of its columns, in this order.
    #[must_use]
    pub fn with_columns(&self, columns: &[usize]) -> Self {
        let column = |column: &usize| {
            let (places, values) = self.column(*column);
            places.iter().copied().zip(values.iter().copied()).collect()
        };
        Self::of_columns(self.rows, columns.iter().map(column))
    }

    /// The same places with other numbers, each by its row, column and number.
    #[must_use]
    pub fn map<M>(&self, mut number: impl FnMut(usize, usize, N) -> M) -> SparseMatrix<M> {
        let columns = self
            .starts
            .windows(2)
            .enumerate()
            .flat_map(|(column, ends)| std::iter::repeat_n(column, ends[1] - ends[0]));
        let entries = self.places.iter().zip(columns).zip(&self.values);
        let values = entries.map(|((row, column), value)| number(*row as usize, column, *value)).collect();
        SparseMatrix { rows: self.rows, starts: self.starts.clone(), places: self.places.clone(), values }
    }
}

impl<N: Copy + Default + PartialEq + Into<f64>> SparseMatrix<N> {
    /// x @ self for one row x in f64, plain sums: the reference of kernels. Of x beyond its end, zeros.
    pub fn times_row(&self, x: &[f64]) -> Vec<f64> {
        let sum = |column: usize| {
            let (places, values) = self.column(column);
            let product =
                |(place, value): (&u32, &N)| Into::<f64>::into(*value) * x.get(*place as usize).copied().unwrap_or(0.0);
            places.iter().zip(values).map(product).sum()
        };
        (0..self.shape()[1]).map(sum).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_sums_over_entries() {
        let matrix = SparseMatrix::of_dense(2, 3, &[1.0, 0.0, 2.0, 0.0, 0.0, f32::NAN]);
        assert_eq!((matrix.shape(), matrix.entries(), matrix.longest_column()), ([2, 3], 3, 2));
        let y = matrix.times_row(&[10.0, 1.0]);
        assert_eq!(y[..2], [10.0, 0.0]);
        assert!(y[2].is_nan());
        assert_eq!(matrix.column(3), (&[][..], &[][..]));
        let finite = matrix.map(|_, _, value| if value.is_nan() { 4.0 } else { value });
        assert_eq!(finite.to_dense(), [1.0, 0.0, 2.0, 0.0, 0.0, 4.0]);
        assert_eq!(finite.map(|row, column, _| 10 * row + column).values(), [0, 2, 12]);
        assert_eq!(finite.transposed(), SparseMatrix::of_dense(3, 2, &[1.0, 0.0, 0.0, 0.0, 2.0, 4.0]));
        assert_eq!(finite.transposed().transposed(), finite);
        assert_eq!(finite.with_columns(&[2, 0]), SparseMatrix::of_dense(2, 2, &[2.0, 1.0, 4.0, 0.0]));
    }
}
