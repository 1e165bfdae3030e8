//! What the projections of one step share: a schedule for each set of them whose adapters lie alike, and never another one's.

use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_plan::layer::{LayerShape, WeightFormat};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::ScheduleError;
use flora_plan::weight::PackedWeight;
use flora_runtime::operands::{OperandError, check_slots};
use flora_runtime::{Batch, Device, PlannedProjection, Planning, ProjectionOptions, StepBatch};

const QUERY: LayerShape = LayerShape { d: 64, k: 48 };
const DOWN: LayerShape = LayerShape { d: 96, k: 64 };
/// Alternately of fLoRA's form and of LoRA's.
const ADAPTERS: u32 = 8;
const SEQUENCES: u32 = 32;

/// Numbers that repeat nothing over a few thousand.
fn numbers(count: u32, seed: u32) -> Vec<f32> {
    (0..count).map(|at| (((at * 7919 + seed * 104_729) % 2003) as f32 - 1001.0) / 1001.0).collect()
}

fn adapter(position: u32, LayerShape { d, k }: LayerShape) -> FoldedAdapter {
    let vectors = |index: u32| (numbers(d, 10 * position + index), numbers(k, 20 * position + index));
    let row = |index| {
        let (in_scale, out_scale) = vectors(index);
        VirtualRow { in_scale: Some(in_scale), out_scale: Some(out_scale) }
    };
    let pair = |index| {
        let (shrink, expand) = vectors(index);
        RankOne { shrink, expand }
    };
    match position % 2 {
        0 => FoldedAdapter { virtual_rows: (0..3).map(row).collect(), ..FoldedAdapter::default() },
        _ => FoldedAdapter {
            virtual_rows: vec![VirtualRow { in_scale: None, out_scale: None }],
            low_rank: (0..2).map(pair).collect(),
            ..FoldedAdapter::default()
        },
    }
}

/// A projection with adapters at these positions, placed in this order.
fn projection(device: &Device, shape: LayerShape, positions: &[u32], plan: Plan) -> PlannedProjection {
    let weight = numbers(shape.d * shape.k, shape.d);
    let weight = PackedWeight::from_f32(WeightFormat::default(), shape, &weight).unwrap();
    let planned = PlannedProjection::new(device, &weight, ProjectionOptions::default(), Planning::Fixed(plan)).unwrap();
    planned.change(|projection| {
        projection.reserve(64, 64).unwrap();
        for position in positions {
            projection.place(*position, &adapter(*position, shape)).unwrap();
        }
    });
    planned
}

fn all() -> Vec<u32> {
    (1..=ADAPTERS).collect()
}

/// Sequences that decode: the base's, and each adapter's.
fn decoding() -> StepBatch {
    StepBatch::new((0..SEQUENCES).map(|sequence| (sequence % (ADAPTERS + 1), 1)))
}

fn forward(projection: &PlannedProjection, batch: &StepBatch) -> Vec<u32> {
    let x = projection.device().upload(&numbers(SEQUENCES * projection.shape().d, 3)).unwrap();
    let y = projection.forward(&x, batch, None).unwrap();
    projection.device().read(&y).unwrap().into_iter().map(f32::to_bits).collect()
}

/// Runs the projections through one step; the schedules that were laid out. Outputs are those of a step of each one's own.
fn schedules(projections: &[PlannedProjection]) -> usize {
    let step = decoding();
    for projection in projections {
        assert_eq!(forward(projection, &step), forward(projection, &decoding()), "{projection:?}");
    }
    step.schedules()
}

#[test]
fn projections_whose_adapters_lie_alike_share_a_schedule() {
    let device = flora_host::device();
    for plan in Plan::unmerged() {
        let layers = [QUERY, QUERY, DOWN, QUERY, DOWN].map(|shape| projection(&device, shape, &all(), plan));
        assert_eq!(schedules(&layers), 1, "{plan}");
    }
}

#[test]
fn other_adapters_or_slots_are_another_schedule() {
    let (device, plan) = (flora_host::device(), Plan::default());
    let of = |positions: &[u32]| projection(&device, QUERY, positions, plan);
    let reversed: Vec<_> = all().into_iter().rev().collect();
    // Adapted alike, in other slots, some adapters alone, and not at all: twice each.
    let layers = [of(&all()), of(&reversed), of(&[2, 5]), of(&[]), of(&all()), of(&reversed), of(&[2, 5]), of(&[])];
    assert_eq!(schedules(&layers), 4);
}

#[test]
fn a_freed_position_is_the_base_s() {
    let (device, plan) = (flora_host::device(), Plan::default());
    let freed = projection(&device, QUERY, &[1, 2], plan);
    freed.change(|projection| projection.remove(2));
    let never = projection(&device, DOWN, &[1], plan);
    assert_eq!(schedules(&[freed, never]), 1);
}

#[test]
fn another_plan_or_epilogue_is_another_schedule() {
    let device = flora_host::device();
    let plans = [
        Plan::default(),
        Plan::default().with_split(),
        Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused),
        Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(4),
    ];
    let twice = plans.into_iter().chain(plans);
    let layers: Vec<_> = twice.map(|plan| projection(&device, QUERY, &all(), plan)).collect();
    assert_eq!(schedules(&layers), plans.len());

    let weight = PackedWeight::from_f32(WeightFormat::default(), QUERY, &[1.0; 64 * 48]).unwrap();
    let options = ProjectionOptions { bias: Some(&[0.5; 48]), ..ProjectionOptions::default() };
    let biased = PlannedProjection::new(&device, &weight, options, Planning::Fixed(Plan::default())).unwrap();
    assert_eq!(schedules(&[projection(&device, QUERY, &[], Plan::default()), biased]), 2);
}

/// A step's batch may live on while adapters move.
#[test]
fn an_adapter_that_moved_is_found() {
    let device = flora_host::device();
    let (layer, step) = (projection(&device, QUERY, &all(), Plan::default()), decoding());
    let before = forward(&layer, &step);
    layer.change(|projection| {
        projection.remove(2);
        projection.remove(3);
        projection.place(3, &adapter(3, QUERY)).unwrap();
        projection.place(2, &adapter(2, QUERY)).unwrap();
    });
    assert_eq!(forward(&layer, &step), before);
    layer.change(|projection| {
        projection.remove(2);
        projection.place(2, &adapter(4, QUERY)).unwrap();
    });
    let replaced = forward(&layer, &step);
    assert_ne!(replaced, before);
    assert_eq!(replaced, forward(&layer, &decoding()));
    assert_eq!(step.clone().schedules(), 0);
}

/// A schedule that was laid out for one layer is held against the limits of every other that runs it.
#[test]
fn a_shared_schedule_may_be_too_large_for_another_layer() {
    let plan = Plan::new(MultiplicativeLowering::Bmm, AdditiveLowering::Fused);
    let layer = projection(&flora_host::device(), QUERY, &[], plan);
    let schedule = layer.change(|projection| {
        projection.load([("two", Some(&adapter(6, QUERY))), ("four", Some(&adapter(8, QUERY)))]).unwrap();
        let batch = Batch::new([(Some("two"), 1), (Some("four"), 1)]);
        projection.schedule(&batch, &plan).unwrap()
    });
    let slots = (schedule.in_slots(), schedule.out_slots());
    assert_eq!(check_slots(&schedule, DOWN, slots), Ok(()));
    // Each W_i can be indexed, but not both.
    let wide = LayerShape { d: 40_000, k: 40_000 };
    let refused = check_slots(&schedule, wide, slots);
    let Err(OperandError::Schedule(ScheduleError::TooLarge { elements, .. })) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(elements, 2 * 40_000 * 40_000);
}
