//! From a normalised layer and a batch to launches: lowerings, the cost model, the planner, and the cubecl kernels.
//!
//! Per layer, once: a verified equation is normalised and its legal lowerings are listed. Per batch: [`plan::plan`] prices
//! them, [`schedule::schedule`] lays out rows and vectors, [`launch::launch`] runs the kernels.

pub mod batch;
pub mod cost;
pub mod kernels;
pub mod launch;
pub mod lowering;
pub mod plan;
pub mod schedule;
pub mod target;
