//! From a normalised layer and a batch to a list of steps, with nothing of any device in it: weight formats, lowerings, the cost
//! model, the planner and the schedule. The host backend and every kernel read the same schedules, and this crate builds in
//! seconds because it knows no kernel.
//!
//! Per batch: [`plan::plan`] prices the legal lowerings and [`schedule::schedule`] lays out rows and vectors.

pub mod batch;
pub mod blueprints;
pub mod cost;
pub mod gradient;
pub mod layer;
pub mod lowering;
pub mod model_planner;
pub mod pipeline;
pub mod plan;
pub mod schedule;
pub mod weight;
