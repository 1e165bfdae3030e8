//! Jobs over a small model in f64, and data from files, through the public interface.

mod data;
mod encode;
mod jobs;
mod jobs_file;
mod learning;
mod model;
mod resuming;
