//! From a normalised layer and a batch to launches: lowerings, the cost model, the planner, and the cubecl kernels.
//!
//! [`pipeline`] is the whole of it, top to bottom. Per layer, once: a verified equation is normalised and its legal lowerings
//! are listed. Per batch: [`plan::plan`] prices them, [`schedule::schedule`] lays out rows and vectors, [`launch::launch`] runs
//! the kernels, or [`target::emit`] prints them.

pub mod batch;
pub mod cost;
pub mod kernels;
pub mod launch;
pub mod lowering;
pub mod pipeline;
pub mod plan;
pub mod schedule;
pub mod target;
