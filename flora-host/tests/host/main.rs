//! The host's steps against the sums that define them, in f64; isolation; refusals.

mod isolation;
mod problem;
mod refusals;
mod steps;
