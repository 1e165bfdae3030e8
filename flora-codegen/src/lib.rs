//! From steps to launches: blueprints, routines and the cubecl kernels.
//!
//! [`pipeline`] is the whole way from an equation to launches, top to bottom. `flora-plan` prices a batch's lowerings and lays out
//! its steps; [`routine`] fits tiles to a device, [`launch::launch`] runs the kernels, or [`target::emit`] prints them.

pub mod kernels;
pub mod launch;
pub mod pipeline;
pub mod routine;
pub mod target;
pub mod traffic;

pub use flora_plan::{batch, blueprints, cost, layer, lowering, model_planner, plan, schedule, weight};
