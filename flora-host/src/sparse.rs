//! Rows times sparse matrices. The rows of a task lie beside one another for each input, so that an entry is multiplied by all of
//! them at once: vectors run over rows, and no entry has to be gathered. A sum waits for the one before it, so several columns are
//! summed side by side.
//!
//! Each product is rounded before it is added, in the order of a column. So a row has the same bits in any company and on any
//! instruction set.

use flora_ir::SparseMatrix;
use flora_runtime::SparseRows;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::partition::PARALLEL_MACS;

/// Rows of a task: one vector of AVX-512, or two of AVX2.
const TASK_ROWS: usize = 16;

/// Outputs of all rows that are put back at a time.
const COLUMNS: usize = 16;

/// Columns that are summed side by side: as many as hide an addition's four cycles, and leave registers for one set of AVX2's where
/// the rows fill vectors.
const fn beside(rows: usize) -> usize {
    if rows < TASK_ROWS { 8 } else { 4 }
}

/// Makes y of every product x @ matrix.
pub(crate) fn multiply(arch: Arch, products: &mut [SparseRows<'_>]) {
    let mut macs = 0;
    let mut tasks = Vec::new();
    for SparseRows { x, matrix, y } in products {
        let [inputs, outputs] = matrix.shape();
        if inputs == 0 || outputs == 0 {
            y.fill(0.0);
            continue;
        }
        macs += (y.len() / outputs) as u64 * matrix.entries() as u64;
        let pieces = x.chunks(TASK_ROWS * inputs).zip(y.chunks_mut(TASK_ROWS * outputs));
        tasks.extend(pieces.map(|(x, y)| Task { x, matrix, y }));
    }
    let run = |task: Task<'_>| arch.dispatch(task);
    if macs < PARALLEL_MACS { tasks.into_iter().for_each(run) } else { tasks.into_par_iter().for_each(run) }
}

struct Task<'a> {
    x: &'a [f32],
    matrix: &'a SparseMatrix,
    y: &'a mut [f32],
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, _: S) {
        let [inputs, _] = self.matrix.shape();
        match self.x.len() / inputs {
            0 => {}
            1 => {
                let x = self.x;
                self.columns::<1, { beside(1) }>(x);
            }
            2..=4 => {
                let x = self.beside::<4>();
                self.columns::<4, { beside(4) }>(&x);
            }
            5..=8 => {
                let x = self.beside::<8>();
                self.columns::<8, { beside(8) }>(&x);
            }
            _ => {
                let x = self.beside::<TASK_ROWS>();
                self.columns::<TASK_ROWS, { beside(TASK_ROWS) }>(&x);
            }
        }
    }
}

impl Task<'_> {
    /// `[inputs, ROWS]`, zeros for the rows that there aren't.
    #[inline(always)]
    fn beside<const ROWS: usize>(&self) -> Vec<f32> {
        let [inputs, _] = self.matrix.shape();
        let mut beside = vec![0.0; inputs * ROWS];
        for (row, x) in self.x.chunks_exact(inputs).enumerate() {
            beside.chunks_exact_mut(ROWS).zip(x).for_each(|(beside, x)| beside[row] = *x);
        }
        beside
    }

    /// y from x `[inputs, ROWS]`, `GROUP` columns side by side.
    #[inline(always)]
    fn columns<const ROWS: usize, const GROUP: usize>(&mut self, x: &[f32]) {
        let [_, outputs] = self.matrix.shape();
        for first in (0..outputs).step_by(COLUMNS) {
            let columns = COLUMNS.min(outputs - first);
            let mut tile = [[0.0f32; ROWS]; COLUMNS];
            let (groups, rest) = tile[..columns].as_chunks_mut::<GROUP>();
            let of_rest = first + groups.len() * GROUP;
            for (first, sums) in (first..).step_by(GROUP).zip(groups) {
                add_columns(self.matrix, first, x, sums);
            }
            for (column, sums) in (of_rest..).zip(rest) {
                add_columns(self.matrix, column, x, std::array::from_mut(sums));
            }
            for (row, y) in self.y.chunks_exact_mut(outputs).enumerate() {
                y[first..first + columns].iter_mut().zip(&tile).for_each(|(y, sums)| *y = sums[row]);
            }
        }
    }
}

/// Adds the products of the columns from `first` on to the sums of each, those of one column in its order.
#[inline(always)]
fn add_columns<const ROWS: usize, const GROUP: usize>(
    matrix: &SparseMatrix,
    first: usize,
    x: &[f32],
    sums: &mut [[f32; ROWS]; GROUP],
) {
    let columns: [_; GROUP] = std::array::from_fn(|column| matrix.column(first + column));
    let all_have = columns.iter().map(|(places, _)| places.len()).min().unwrap_or(0);
    let shared = columns.map(|(places, values)| (&places[..all_have], &values[..all_have]));
    for entry in 0..all_have {
        for ((places, values), sums) in shared.iter().zip(sums.iter_mut()) {
            add(places[entry], values[entry], x, sums);
        }
    }
    for ((places, values), sums) in columns.iter().zip(sums) {
        for (place, value) in places.iter().zip(*values).skip(all_have) {
            add(*place, *value, x, sums);
        }
    }
}

/// Adds one product of every row.
#[inline(always)]
fn add<const ROWS: usize>(place: u32, value: f32, x: &[f32], sums: &mut [f32; ROWS]) {
    let x = &x[place as usize * ROWS..][..ROWS];
    for (sum, x) in sums.iter_mut().zip(x) {
        *sum += value * x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::HostEngine;

    fn random(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
        (0..count).map(|_| random.f32() - 0.5).collect()
    }

    /// A row's bits are those that it has alone, on each instruction set, and its sums are the reference's.
    #[test]
    fn rows_keep_their_bits_in_any_company() {
        let mut draw = fastrand::Rng::with_seed(17);
        for (inputs, outputs, rows) in [(1, 1, 1), (5, 37, 3), (67, 35, 4), (33, 129, 21), (130, 64, 70), (3, 0, 2)] {
            let dense: Vec<f32> = random(inputs * outputs, &mut draw)
                .into_iter()
                .map(|value| if value < 0.2 { 0.0 } else { value })
                .collect();
            let matrix = SparseMatrix::of_dense(inputs, outputs, &dense);
            let x = random(rows * inputs, &mut draw);
            let mut alone = vec![f32::NAN; rows * outputs];
            for row in 0..rows {
                let (x, y) = (&x[row * inputs..][..inputs], &mut alone[row * outputs..][..outputs]);
                multiply(HostEngine::new().arch(), &mut [SparseRows { x, matrix: &matrix, y }]);
            }
            for engine in HostEngine::all() {
                let mut y = vec![f32::NAN; rows * outputs];
                // Two products of one call.
                let (head, tail) = y.split_at_mut((rows / 2) * outputs);
                let (first, second) = x.split_at((rows / 2) * inputs);
                let product = |x, y| SparseRows { x, matrix: &matrix, y };
                multiply(engine.arch(), &mut [product(first, head), product(second, tail)]);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&y), bits(&alone), "{} {inputs} {outputs} {rows}", engine.vectors());
            }
            for (x, y) in x.chunks(inputs).zip(alone.chunks(outputs.max(1))) {
                let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                for (found, expected) in y.iter().zip(matrix.times_row(&x)) {
                    // A sum of at most `inputs` products below 1/4, each rounded twice.
                    assert!(
                        (f64::from(*found) - expected).abs()
                            <= inputs as f64 * f64::from(f32::EPSILON) * 0.25 * inputs as f64
                    );
                }
            }
        }
    }
}
