//! What a device takes: times layers as a model would run them, fits the cost model's coefficients to that, and keeps them in a
//! file for the device. Planning itself is in `flora-plan`; this is the part of it that needs a device.

pub mod measure;
pub mod planner;
pub mod tune;

pub use planner::Planner;
