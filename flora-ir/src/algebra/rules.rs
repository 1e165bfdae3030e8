//! The algebra: every step from an equation to the adapted linear, one directed rule a row.
//!
//! A rule is written in the text form. Its letters stand for parts of an equation:
//!
//! | letter | stands for |
//! |---|---|
//! | `x` | what depends on the input and has passed no matmul yet |
//! | `y`, `z` | anything that depends on the input |
//! | `w` | the base weight itself |
//! | `t`, `u`, `v` | a matrix known when the adapter is loaded, of the base weight's shape |
//! | `a`, `b`, `c`, `d` | any matrix known when the adapter is loaded, without rank axis |
//! | `f` | as `a`, but not the base weight itself |
//! | `r` | as `a`, but not of the base weight's shape |
//! | `k` | a square sparse matrix known when the adapter is loaded |
//! | `g` | as `a`, but not such a one |
//! | `s` | a scalar known when the adapter is loaded, without rank axis |
//! | `l`, `m` | a scalar or vector known when the adapter is loaded, without rank axis |
//! | `p`, `q` | a scalar or vector known when the adapter is loaded, over the rank axis |
//! | `e` | the residual itself |
//! | `n`, `o` | anything that the residual is no part of |
//!
//! `+` and `*` match either way round. A rule without a letter for the input rewrites what is known when the adapter is loaded. A rule applies only where it keeps the type of what it rewrites, and a rewritten
//! equation is verified anew. No rule undoes another: sums move to the root, scales outwards, matmuls inwards to the input.

use std::sync::LazyLock;

use super::pattern::Pattern;

/// One directed rewrite rule.
#[derive(Debug)]
pub struct Rule {
    /// The name that a derivation shows.
    pub name: &'static str,
    /// What it says, in words.
    pub words: &'static str,
    /// The equation that it takes, in the text form.
    pub from_text: &'static str,
    /// The equation that it gives, in the text form.
    pub to_text: &'static str,
    pub(super) from: Pattern,
    pub(super) to: Pattern,
}

/// Every rule, in the order in which they are tried at each place of an equation.
pub fn rules() -> &'static [Rule] {
    &RULES
}

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let rule = |&[name, from_text, to_text, words]: &[&'static str; 4]| {
        let (from, to) = (Pattern::parse(from_text)?, Pattern::parse(to_text)?);
        Some(Rule { name, words, from_text, to_text, from, to })
    };
    TABLE.iter().filter_map(rule).collect()
});

#[rustfmt::skip]
const TABLE: &[[&str; 4]] = &[
    // Activations that do nothing.
    ["drop-identity", "identity(y)", "y",
     "the identity changes nothing"],

    // Division becomes multiplication by a value known at load time.
    ["divide-output", "y / l", "(1 / l) * y",
     "dividing by a vector is scaling by its inverse"],
    ["divide-weight", "x @ (u / l)", "x @ ((1 / l) * u)",
     "dividing the columns of a weight is scaling them by the inverse"],
    ["divide-factor", "x @ (t * (u / l))", "x @ ((1 / l) * (t * u))",
     "dividing one factor of a product divides the product"],

    // Sums move to the root.
    ["distribute-weights", "x @ (u + v)", "x @ u + x @ v",
     "a sum of weights gives a sum of outputs"],
    ["distribute-hadamard", "t * (u + v)", "t * u + t * v",
     "elementwise multiplication distributes over a sum"],
    ["distribute-hadamard-scale", "t * (u + l)", "t * u + l * t",
     "elementwise multiplication distributes over a matrix and a broadcast scale"],
    ["distribute-inputs", "(y + z) @ a", "y @ a + z @ a",
     "a sum of inputs gives a sum of outputs"],
    ["distribute-inputs-mean", "matmul_mean(y + z, a)", "matmul_mean(y, a) + matmul_mean(z, a)",
     "a sum of inputs gives a sum of outputs, in the mean too"],
    ["distribute-scale", "l * (y + z)", "l * y + l * z",
     "a scale goes to every summand"],
    ["distribute-rank-scale", "p * (y + z)", "p * y + p * z",
     "a scale over the rank goes to every summand"],
    ["distribute-rank-sum", "sum_rank(y + z)", "sum_rank(y) + sum_rank(z)",
     "the sum over the rank of a sum is the sum of both"],
    ["distribute-rank-mean", "mean_rank(y + z)", "mean_rank(y) + mean_rank(z)",
     "the mean over the rank of a sum is the sum of both means"],

    // The residual leaves sums.
    ["residual-last", "(n + e) + o", "(n + o) + e",
     "the residual is added to everything else"],

    // Scales leave matmuls: those of a weight's columns to the output, scalars of the input as well.
    ["scale-columns", "x @ (l * u)", "l * (x @ u)",
     "scaling the columns of a weight scales the output"],
    ["scale-columns-over-rank", "x @ (p * u)", "p * (x @ u)",
     "scaling the columns of a weight scales the output, for each rank"],
    ["scale-factor", "t * (l * u)", "l * (t * u)",
     "a scale of one factor scales the product"],
    ["scale-input", "(s * y) @ a", "s * (y @ a)",
     "a scalar commutes with a matmul"],
    ["scale-input-mean", "matmul_mean(s * y, a)", "s * matmul_mean(y, a)",
     "a scalar commutes with a mean"],
    ["scale-rank", "(l * (x @ r)) @ a", "(x @ (l * r)) @ a",
     "scaling between two low-rank matmuls scales the columns of the first factor"],
    ["scale-rank-mean", "matmul_mean(l * (x @ r), a)", "matmul_mean(x @ (l * r), a)",
     "scaling between two low-rank matmuls scales the columns of the first factor"],

    // Hadamard products of any number of low-rank weights become one low-rank weight, with the base weight as a factor or without.
    ["merge-hadamard", "(b @ a) * (d @ c)", "face_splitting(b, d) @ khatri_rao(a, c)",
     "low-rank matrices multiply elementwise to a low-rank matrix, which has a component for each two of theirs"],
    ["merge-hadamard-factors", "(t * (b @ a)) * (d @ c)", "t * (face_splitting(b, d) @ khatri_rao(a, c))",
     "low-rank factors multiply elementwise to a low-rank factor, which has a component for each two of theirs"],

    // Square low-rank updates of the identity beside the base weight: what stands beside it becomes a factor known at load time.
    ["update-outputs", "x @ (w @ (g @ a))", "(x @ (w @ g)) @ a",
     "a low-rank update of the outputs: the base weight meets its first factor at load time"],
    ["update-outputs-of-base", "(x @ w) @ (g @ a)", "(x @ (w @ g)) @ a",
     "a low-rank update of the outputs: the base weight meets its first factor at load time"],
    ["update-outputs-chain", "((x @ w) @ g) @ a", "(x @ (w @ g)) @ a",
     "a low-rank update of the outputs: the base weight meets its first factor at load time"],

    // Sparse transforms of rows: `associate` brings those of the inputs before the base weight.
    ["transform-outputs", "x @ (w @ k)", "(x @ w) @ k",
     "a sparse matrix behind the base weight transforms the outputs"],

    // Low-rank weights: Eq. 2 to Eq. 5, and the two matmuls of A.2.
    ["hadamard-to-scales", "x @ (w * (b @ a))", "sum_rank(rows(a) * ((columns(b) * x) @ w))",
     "Eq. 2 to Eq. 5: the columns of b scale the input, the rows of a the output, summed over the rank"],
    ["hadamard-to-scales-mean", "x @ (w * matmul_mean(b, a))", "mean_rank(rows(a) * ((columns(b) * x) @ w))",
     "Eq. 2 to Eq. 5, with the mean over the rank"],
    ["associate", "x @ (f @ a)", "(x @ f) @ a",
     "a low-rank weight is two small matmuls"],
    ["associate-mean", "x @ matmul_mean(b, a)", "matmul_mean(x @ b, a)",
     "a low-rank weight is two small matmuls, the second a mean"],
    ["associate-chain", "((x @ b) @ c) @ a", "(x @ b) @ (c @ a)",
     "what follows the first factor is one matrix known at load time"],

    // What has no rank axis leaves the reduction over the rank.
    ["rank-sum-of-scaled", "sum_rank(l * y)", "l * sum_rank(y)",
     "a common factor leaves the sum over the rank"],
    ["rank-mean-of-scaled", "mean_rank(l * y)", "l * mean_rank(y)",
     "a common factor leaves the mean over the rank"],
    ["rank-sum-of-scales", "sum_rank(p * y)", "sum_rank(p) * y",
     "a value without rank axis leaves the sum over the rank"],
    ["rank-mean-of-scales", "mean_rank(p * y)", "mean_rank(p) * y",
     "a value without rank axis leaves the mean over the rank"],
    ["rank-sum-of-matmul", "sum_rank(y @ a)", "sum_rank(y) @ a",
     "the sum over the rank commutes with a matmul"],
    ["rank-mean-of-matmul", "mean_rank(y @ a)", "mean_rank(y) @ a",
     "the mean over the rank commutes with a matmul"],

    // Products: the scales of one value become one, those over the rank innermost.
    ["collect-scales", "l * (m * y)", "(l * m) * y",
     "two scales are one"],
    ["order-scales", "p * (l * y)", "l * (p * y)",
     "scales over the rank come last"],
    ["split-scales", "(l * p) * y", "l * (p * y)",
     "scales over the rank come last"],
    ["collect-rank-scales", "p * (q * y)", "(p * q) * y",
     "two scales over the rank are one"],
    ["collect-rows", "(rows(a) * rows(c)) * y", "rows(a * c) * y",
     "the product of rows is the rows of the product"],
    ["collect-columns", "(columns(b) * columns(c)) * y", "columns(b * c) * y",
     "the product of columns is the columns of the product"],
];

#[cfg(test)]
mod tests;
