//! From a plan and a batch to the steps that run it: which rows, which vectors, in which order. Index tables, no tensor data;
//! the host backend and every kernel read the same ones.

mod backward;
mod error;
mod kept;
mod lay_out;
mod limits;
mod steps;

pub use backward::{AdapterGradient, BackwardSchedule, RowRun, backward_schedule, backward_schedule_by};
pub use error::ScheduleError;
pub use kept::Kept;
pub use lay_out::{Schedule, schedule};
pub use limits::{
    EXPAND_ITEM_WORDS, MATERIALISED_ADAPTER_WORDS, SCALE_WORDS, SHRINK_TASK_WORDS, SPLIT_DEPTH, TILE_ROW_WORDS,
    can_hold, most_splits,
};
pub use steps::{
    Gemm, LowRankBmm, LowRankRows, Materialised, MaterialisedAdapter, Merged, NO_ROW, OnChipSegment, Packing,
    SEGMENT_ITEM_ROWS, Scale, ScheduledRow, SegmentItem, Step, WeightRun,
};
