//! The host's steps and operations against the sums that define them, in f64; isolation; refusals.

mod attention;
mod isolation;
mod problem;
mod refusals;
mod rows;
mod steps;
