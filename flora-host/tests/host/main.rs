//! The host's steps and operations against the sums that define them, in f64; isolation; refusals.

mod adjoint;
mod attached;
mod attention;
mod gradients;
mod isolation;
mod problem;
mod projections;
mod refusals;
mod rounded;
mod rows;
mod steps;
