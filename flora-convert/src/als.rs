//! Alternating least squares. Each half-step adds to one factor what solves its problem, with the other one given. A small multiple of
//! the identity keeps systems solvable whose inputs leave a direction out; it weighs the change and not the factor, so the residual
//! still never rises, and a solution stays one.

use std::cmp::Ordering;

use faer::linalg::matmul::matmul;
use faer::prelude::Solve;
use faer::{Accum, Mat, MatRef, Par, Side};

use crate::gram::Gram;

/// What is made of the update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// y = x @ (w0 ∘ (b a)): the product stands for the base weight, too.
    Flora,
    /// y = x @ (w0 + w0 ∘ (b a)).
    Hira,
}

/// What is fitted to what.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// What is made of it.
    pub kind: Kind,
    /// w0, `[d, k]`, row-major.
    pub base: &'a [f32],
    /// What the trained adapter adds to w0, `[d, k]`, row-major.
    pub update: &'a [f64],
    /// C of the inputs, `[d, d]`.
    pub inputs: &'a Gram,
}

/// When to stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// The most rounds, of two half-steps each.
    pub rounds: usize,
    /// A round that lowers the residual by a smaller part of it is the last.
    pub least_gain: f64,
}

/// The factors that were found.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// `[d, r]`, row-major.
    pub b: Vec<f64>,
    /// `[r, k]`, row-major.
    pub a: Vec<f64>,
    /// ‖x (T − w0 ∘ (b a))‖ over ‖x U‖, which is 1 for the base model: at the start, and after each half-step.
    pub residuals: Vec<f64>,
}

/// Why nothing is fitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FitError {
    /// Matrices whose shapes don't go together.
    #[error("{what} has {found} numbers and not {expected}")]
    Shape {
        /// Which.
        what: &'static str,
        /// How many it has.
        found: usize,
        /// How many it must have.
        expected: usize,
    },
    /// A rank that the layer can't have.
    #[error("rank {rank} is asked for, and a layer of {d} inputs and {k} outputs has ranks from 1 to {most} here")]
    Rank {
        /// What is asked for.
        rank: usize,
        /// Inputs.
        d: usize,
        /// Outputs.
        k: usize,
        /// The largest that is possible.
        most: usize,
    },
    /// NaN or infinite numbers in a weight or an update.
    #[error("{0} has numbers that are not finite")]
    NotFinite(&'static str),
    /// A system that isn't solved at all.
    #[error("the least-squares problem can't be solved in f64; more calibration text may help")]
    Singular,
}

/// The most unknowns of the half-step that solves for b: their system is a square matrix of so many, 512 MiB.
const UNKNOWNS: usize = 8192;

/// Factors of rank `rank` for `problem`: what the better of two starts comes to: the base model, and the update over w0.
///
/// # Errors
/// See [`FitError`].
pub fn fit(problem: &Problem<'_>, rank: usize, limits: Limits) -> Result<Fit, FitError> {
    let system = System::new(problem)?;
    let (d, k) = (system.base.nrows(), system.base.ncols());
    let ones = usize::from(problem.kind == Kind::Flora);
    let most = (d.min(k) + ones).min(UNKNOWNS / d.max(1));
    if rank == 0 || rank > most {
        return Err(FitError::Rank { rank, d, k, most });
    }
    let tried = |start| system.improve(system.start(start, rank, problem.kind)?, trial(limits));
    let (descent, quotient) = (tried(Start::Descent)?, tried(Start::Quotient)?);
    let better = if quotient.last() < descent.last() { quotient } else { descent };
    let Walk { mut b, mut a, residuals } = system.improve(better, limits)?;
    balance(&mut b, &mut a);
    Ok(Fit { b: rows(b.as_ref()), a: rows(a.as_ref()), residuals })
}

/// What the walk starts from: the leading singular vectors of a matrix. Either start has local minima where the other one has none.
#[derive(Clone, Copy)]
enum Start {
    /// The base model, with those of (C U) ∘ w0 for b, along which the residual falls fastest.
    Descent,
    /// Those of T over w0 where w0 isn't small: right for an update that is a product with w0, whatever the inputs.
    Quotient,
}

/// The part of the mean square of w0 below which a weight is small.
const SMALL: f64 = 1e-2;

/// Rounds from either start before one is chosen.
const TRIAL: usize = 4;

fn trial(limits: Limits) -> Limits {
    Limits { rounds: TRIAL.min(limits.rounds), ..limits }
}

/// Factors on their way.
struct Walk {
    /// `[d, r]`
    b: Mat<f64>,
    /// `[r, k]`
    a: Mat<f64>,
    residuals: Vec<f64>,
}

impl Walk {
    fn last(&self) -> f64 {
        self.residuals.last().copied().unwrap_or(f64::NAN)
    }
}

/// ‖x (T − w0 ∘ (b a))‖ over ‖x U‖ for factors b `[d, r]` and a `[r, k]`, row-major, on other inputs than those of the fit, or these.
///
/// # Errors
/// Shapes that don't go together.
pub fn residual(problem: &Problem<'_>, b: &[f64], a: &[f64]) -> Result<f64, FitError> {
    let system = System::new(problem)?;
    let (d, k) = (system.base.nrows(), system.base.ncols());
    let rank = b.len() / d.max(1);
    length("b", b.len(), d * rank)?;
    length("a", a.len(), rank * k)?;
    let b = Mat::from_fn(d, rank, |row, column| b[row * rank + column]);
    let a = Mat::from_fn(rank, k, |row, column| a[row * k + column]);
    Ok(system.relative(&system.errors(&b, &a)))
}

fn length(what: &'static str, found: usize, expected: usize) -> Result<(), FitError> {
    if found == expected { Ok(()) } else { Err(FitError::Shape { what, found, expected }) }
}

/// A problem in f64.
struct System<'a> {
    /// w0, `[d, k]`.
    base: Mat<f64>,
    /// T
    target: Mat<f64>,
    /// U
    update: Mat<f64>,
    inputs: MatRef<'a, f64>,
    /// ‖x U‖²
    energy: f64,
}

/// What is left of the target.
struct Errors {
    /// C (T − w0 ∘ (b a))
    weighted: Mat<f64>,
    /// ‖x (T − w0 ∘ (b a))‖²
    sum: f64,
}

impl<'a> System<'a> {
    fn new(problem: &Problem<'a>) -> Result<Self, FitError> {
        let Problem { kind, base, update, inputs } = *problem;
        let d = inputs.d();
        let k = base.len().checked_div(d).unwrap_or(0);
        length("the base weight", base.len(), d * k)?;
        length("the update", update.len(), d * k)?;
        if base.iter().any(|number| !number.is_finite()) {
            return Err(FitError::NotFinite("the base weight"));
        }
        if update.iter().any(|number| !number.is_finite()) {
            return Err(FitError::NotFinite("the update"));
        }
        let base = Mat::from_fn(d, k, |row, column| f64::from(base[row * k + column]));
        let update = Mat::from_fn(d, k, |row, column| update[row * k + column]);
        let target = if kind == Kind::Flora { &base + &update } else { update.clone() };
        let inputs = inputs.matrix();
        let energy = inner(&update, &product(inputs, update.as_ref()));
        Ok(Self { base, target, update, inputs, energy })
    }

    fn start(&self, start: Start, rank: usize, kind: Kind) -> Result<Walk, FitError> {
        let (d, k) = (self.base.nrows(), self.base.ncols());
        let vectors = |matrix: Mat<f64>| Ok(matrix.thin_svd().map_err(|_| FitError::Singular)?.U().to_owned());
        let (b, a) = match start {
            Start::Descent => {
                let ones = usize::from(kind == Kind::Flora);
                let vectors = vectors(hadamard(&product(self.inputs, self.update.as_ref()), &self.base))?;
                let of_b = |row, column: usize| column.checked_sub(ones).map_or(1.0, |own| vectors[(row, own)]);
                let of_a = |row, _| if row < ones { 1.0 } else { 0.0 };
                (Mat::from_fn(d, rank, of_b), Mat::from_fn(rank, k, of_a))
            }
            Start::Quotient => {
                let small = SMALL * inner(&self.base, &self.base) / (d * k) as f64;
                let quotient = |row, column| {
                    let base: f64 = self.base[(row, column)];
                    self.target[(row, column)] * base / (base * base + small).max(f64::MIN_POSITIVE)
                };
                let quotient = Mat::from_fn(d, k, quotient);
                let vectors = vectors(quotient.clone())?;
                let b = Mat::from_fn(d, rank, |row, own| if own < vectors.ncols() { vectors[(row, own)] } else { 0.0 });
                let a = product(b.transpose(), quotient.as_ref());
                (b, a)
            }
        };
        let errors = self.errors(&b, &a);
        let residuals = vec![self.relative(&errors)];
        Ok(Walk { b, a, residuals })
    }

    /// Rounds of two half-steps, in all that the walk has made as many as `limits` says.
    fn improve(&self, mut walk: Walk, limits: Limits) -> Result<Walk, FitError> {
        let mut errors = self.errors(&walk.b, &walk.a);
        for _ in walk.residuals.len() / 2..limits.rounds {
            let before = self.relative(&errors);
            if before == 0.0 {
                break;
            }
            walk.a = self.solve_outputs(&walk.b, &walk.a, &errors)?;
            errors = self.errors(&walk.b, &walk.a);
            walk.residuals.push(self.relative(&errors));
            walk.b = self.solve_inputs(&walk.b, &walk.a, &errors)?;
            errors = self.errors(&walk.b, &walk.a);
            walk.residuals.push(self.relative(&errors));
            if self.relative(&errors) >= (1.0 - limits.least_gain) * before {
                break;
            }
        }
        Ok(walk)
    }

    /// Over what the update does; an update that does nothing leaves all to be fitted, unless nothing is left.
    fn relative(&self, errors: &Errors) -> f64 {
        if errors.sum == 0.0 { 0.0 } else { (errors.sum / self.energy).sqrt() }
    }

    fn errors(&self, b: &Mat<f64>, a: &Mat<f64>) -> Errors {
        let product_of_factors = product(b.as_ref(), a.as_ref());
        let left = &self.target - &hadamard(&self.base, &product_of_factors);
        let weighted = product(self.inputs, left.as_ref());
        let sum = inner(&left, &weighted).max(0.0);
        Errors { weighted, sum }
    }

    /// a, with b given: for each output j, r numbers of which x (w0_j ∘ b) makes what is left.
    fn solve_outputs(&self, b: &Mat<f64>, a: &Mat<f64>, errors: &Errors) -> Result<Mat<f64>, FitError> {
        let (rank, k) = (a.nrows(), a.ncols());
        let scaled: Vec<Mat<f64>> = (0..rank).map(|own| scale_rows(&self.base, b.col_as_slice(own))).collect();
        let weighted: Vec<Mat<f64>> = scaled.iter().map(|scaled| product(self.inputs, scaled.as_ref())).collect();
        let mut solved = a.clone();
        for output in 0..k {
            let column = |of: &Mat<f64>, other: &Mat<f64>| dot(of.col_as_slice(output), other.col_as_slice(output));
            let system = Mat::from_fn(rank, rank, |one, other| column(&scaled[one], &weighted[other]));
            let right = Mat::from_fn(rank, 1, |own, _| column(&scaled[own], &errors.weighted));
            let change = solve(system, &right)?;
            (0..rank).for_each(|own| solved[(own, output)] += change[(own, 0)]);
        }
        Ok(solved)
    }

    /// b, with a given: d · r numbers, of which number (i, r) and number (j, s) have C_ij Σ_o w0_io w0_jo a_ro a_so in common.
    fn solve_inputs(&self, b: &Mat<f64>, a: &Mat<f64>, errors: &Errors) -> Result<Mat<f64>, FitError> {
        let (d, rank) = (b.nrows(), b.ncols());
        let outputs: Vec<Vec<f64>> =
            (0..rank).map(|own| (0..a.ncols()).map(|output| a[(own, output)]).collect()).collect();
        let scaled: Vec<Mat<f64>> = outputs.iter().map(|outputs| scale_columns(&self.base, outputs)).collect();
        let mut system = Mat::<f64>::zeros(d * rank, d * rank);
        for one in 0..rank {
            // The lower triangle, which is all that is read.
            for other in 0..=one {
                let common = product(scaled[one].as_ref(), scaled[other].transpose());
                for column in 0..d {
                    let inputs = (0..d).map(|row| self.inputs[(row, column)]);
                    let own = &mut system.col_as_slice_mut(other * d + column)[one * d..(one + 1) * d];
                    for ((own, common), input) in own.iter_mut().zip(common.col_as_slice(column)).zip(inputs) {
                        *own = common * input;
                    }
                }
            }
        }
        let falls = hadamard(&errors.weighted, &self.base);
        let falls = product(falls.as_ref(), a.transpose());
        let right = Mat::from_fn(d * rank, 1, |at, _| falls[(at % d, at / d)]);
        let change = solve(system, &right)?;
        Ok(Mat::from_fn(d, rank, |row, own| b[(row, own)] + change[(own * d + row, 0)]))
    }
}

/// What `system`, of which the lower triangle is read, makes `right` of; with a multiple of the identity that is as small as rounding
/// allows. A system of zeros has zeros for a solution.
fn solve(mut system: Mat<f64>, right: &Mat<f64>) -> Result<Mat<f64>, FitError> {
    let size = system.nrows();
    let largest = (0..size).map(|at| system[(at, at)]).fold(0.0, f64::max);
    match largest.partial_cmp(&0.0) {
        Some(Ordering::Greater) => {}
        Some(_) => return Ok(Mat::zeros(size, 1)),
        None => return Err(FitError::Singular),
    }
    let mut added = 0.0;
    for exponent in [-13, -11, -9, -7, -5, -3] {
        let wanted = largest * 10f64.powi(exponent);
        (0..size).for_each(|at| system[(at, at)] += wanted - added);
        added = wanted;
        if let Ok(factors) = system.llt(Side::Lower) {
            let solved = factors.solve(right);
            if (0..size).all(|at| solved[(at, 0)].is_finite()) {
                return Ok(solved);
            }
        }
    }
    Err(FitError::Singular)
}

/// Makes the two factors of each component of one size, which training by AdamW wants.
fn balance(b: &mut Mat<f64>, a: &mut Mat<f64>) {
    for own in 0..b.ncols() {
        let of_b = (dot(b.col_as_slice(own), b.col_as_slice(own)) / b.nrows() as f64).sqrt();
        let outputs = a.ncols();
        let of_a = ((0..outputs).map(|output| a[(own, output)].powi(2)).sum::<f64>() / outputs as f64).sqrt();
        let scale = (of_a / of_b).sqrt();
        if scale.is_finite() && scale > 0.0 {
            b.col_as_slice_mut(own).iter_mut().for_each(|number| *number *= scale);
            (0..outputs).for_each(|output| a[(own, output)] /= scale);
        }
    }
}

fn product(one: MatRef<'_, f64>, other: MatRef<'_, f64>) -> Mat<f64> {
    let mut out = Mat::zeros(one.nrows(), other.ncols());
    matmul(&mut out, Accum::Replace, one, other, 1.0, Par::Seq);
    out
}

fn hadamard(one: &Mat<f64>, other: &Mat<f64>) -> Mat<f64> {
    Mat::from_fn(one.nrows(), one.ncols(), |row, column| one[(row, column)] * other[(row, column)])
}

fn scale_rows(of: &Mat<f64>, scales: &[f64]) -> Mat<f64> {
    Mat::from_fn(of.nrows(), of.ncols(), |row, column| of[(row, column)] * scales[row])
}

fn scale_columns(of: &Mat<f64>, scales: &[f64]) -> Mat<f64> {
    Mat::from_fn(of.nrows(), of.ncols(), |row, column| of[(row, column)] * scales[column])
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

/// Σ one ∘ other
fn inner(one: &Mat<f64>, other: &Mat<f64>) -> f64 {
    (0..one.ncols()).map(|column| dot(one.col_as_slice(column), other.col_as_slice(column))).sum()
}

/// Row-major.
fn rows(of: MatRef<'_, f64>) -> Vec<f64> {
    (0..of.nrows()).flat_map(|row| (0..of.ncols()).map(move |column| of[(row, column)])).collect()
}
