//! Planning allocates nothing once the planner is made and has seen as many adapters.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

#[path = "planner/coefficients.rs"]
mod coefficients;

use flora_plan::batch::{AdapterSlots, BatchSummary, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::cost::PricedLayer;
use flora_plan::layer::{LayerFormat, LayerShape};
use flora_plan::model_planner::ModelPlanner;

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.with(|count| count.set(count.get() + 1));
        // SAFETY: by the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: by the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn planning_allocates_nothing() {
    let coefficients = coefficients::device(5, false);
    let layer = |d, k| PricedLayer { shape: LayerShape { d, k }, format: LayerFormat::default() };
    let mut model = ModelPlanner::new(&coefficients, [(layer(576, 576), false), (layer(576, 192), true)]);
    let scales = VirtualRowSlots { in_scale: Some(0), out_scale: Some(0) };
    let adapters: Vec<AdapterSlots> = (0..32u32)
        .map(|position| AdapterSlots {
            virtual_rows: vec![scales; 1 + position as usize % 5],
            low_rank: LowRankSlots { shrink: 0, expand: 0, rank: position % 3 },
            is_merged: position == 7,
        })
        .collect();
    let batch = |seed: u32| -> Vec<Segment> {
        (0..40u32).map(|at| Segment { rows: (at * seed) % 37, adapter: (at + seed) % 32 }).collect()
    };
    let batches: Vec<Vec<Segment>> = (0..200).map(batch).collect();
    let mut summary = BatchSummary::default();
    summary.shape(&batches[0], &adapters);
    let before = COUNT.with(Cell::get);
    let mut plans = 0;
    for _ in 0..2 {
        for segments in &batches {
            plans += model.plans(&summary.shape(segments, &adapters)).filter(|plan| !plan.splits()).count();
        }
    }
    assert_eq!(COUNT.with(Cell::get) - before, 0);
    assert_eq!(plans, 2 * 2 * batches.len());
}
