//! What is kept of a layer's inputs: the sum of xᵀx over rows, which is all that a fit of outputs reads of them.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};

/// C = xᵀx, `[d, d]`, of some rows x.
#[derive(Clone, Debug)]
pub struct Gram {
    sums: Mat<f64>,
    rows: u64,
}

/// Rows that can't be added, or sums that can't be decomposed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GramError {
    /// No whole rows.
    #[error("{numbers} numbers are no whole rows of {d}")]
    Ragged {
        /// How many there are.
        numbers: usize,
        /// Inputs of the layer.
        d: usize,
    },
    /// NaN or infinite inputs.
    #[error("the inputs of the layer are not finite")]
    NotFinite,
    /// The eigenvalues weren't found.
    #[error("the spectrum of the inputs doesn't converge")]
    NoSpectrum,
}

/// How much of the inputs lies in how many directions.
#[derive(Clone, Debug, PartialEq)]
pub struct Spectrum(Vec<f64>);

impl Gram {
    /// Of no rows of `d` inputs.
    pub fn new(d: usize) -> Self {
        Self { sums: Mat::zeros(d, d), rows: 0 }
    }

    /// Inputs of the layer.
    pub fn d(&self) -> usize {
        self.sums.nrows()
    }

    /// How many rows were added.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds rows x `[rows, d]`, row-major.
    ///
    /// # Errors
    /// No whole rows, or numbers that aren't finite; nothing is added then.
    pub fn add(&mut self, x: &[f32]) -> Result<(), GramError> {
        let d = self.d();
        if d == 0 || !x.len().is_multiple_of(d) {
            return Err(GramError::Ragged { numbers: x.len(), d });
        }
        if x.iter().any(|number| !number.is_finite()) {
            return Err(GramError::NotFinite);
        }
        let rows = x.len() / d;
        // xᵀ, whose columns are the rows.
        let transposed = Mat::from_fn(d, rows, |input, row| f64::from(x[row * d + input]));
        matmul(&mut self.sums, Accum::Add, &transposed, transposed.transpose(), 1.0, Par::Seq);
        self.rows += rows as u64;
        Ok(())
    }

    /// The eigenvalues of C.
    ///
    /// # Errors
    /// They aren't found.
    pub fn spectrum(&self) -> Result<Spectrum, GramError> {
        let mut values = self.sums.self_adjoint_eigenvalues(Side::Lower).map_err(|_| GramError::NoSpectrum)?;
        values.sort_by(|one, other| other.total_cmp(one));
        Ok(Spectrum(values))
    }

    pub(crate) fn matrix(&self) -> MatRef<'_, f64> {
        self.sums.as_ref()
    }
}

impl Spectrum {
    /// The part of the inputs' energy Σ x² that lies in their `leading` strongest directions: squares of singular values of x over the
    /// sum of all. 1 where there is none.
    pub fn share(&self, leading: usize) -> f64 {
        let total: f64 = self.0.iter().sum();
        let share = self.0.iter().take(leading).sum::<f64>() / total;
        if total > 0.0 { share.min(1.0) } else { 1.0 }
    }
}
