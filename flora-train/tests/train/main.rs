//! Jobs over a small model in f64, and data from files, through the public interface.

mod data;
mod jobs;
mod learning;
mod model;
mod resuming;
