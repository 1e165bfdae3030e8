//! Rows of an adapter whose weight is resident, in batches that it shares and has to itself.

use flora_plan::batch::{AdapterSlots, BatchShape, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::LayerShape;
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Merged, Schedule, ScheduleError, Step, WeightRun, can_hold, schedule};

const SHAPE: LayerShape = LayerShape { d: 5, k: 3 };
const FLORA: u32 = 1;
const LORA: u32 = 2;
const DORA: u32 = 3;

/// Base, fLoRA, LoRA and DoRA; the weight of one of them resident.
fn adapters(merged: Option<u32>) -> Vec<AdapterSlots> {
    let row = |slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) };
    let low_rank = |first| LowRankSlots { shrink: first, expand: first, rank: 2 };
    let mut adapters = vec![
        AdapterSlots::base(),
        AdapterSlots { virtual_rows: vec![row(0), row(1)], ..AdapterSlots::base() },
        AdapterSlots { low_rank: low_rank(2), ..AdapterSlots::base() },
        AdapterSlots { virtual_rows: vec![row(4)], low_rank: low_rank(5), ..AdapterSlots::base() },
    ];
    if let Some(own) = merged {
        adapters[own as usize].is_merged = true;
    }
    adapters
}

fn segments(of: &[(u32, u32)]) -> Vec<Segment> {
    of.iter().map(|(adapter, rows)| Segment { rows: *rows, adapter: *adapter }).collect()
}

fn laid_out(plan: Plan, of: &[(u32, u32)], merged: Option<u32>, finishes: bool) -> Schedule {
    schedule(&plan, SHAPE, &segments(of), &adapters(merged), finishes).unwrap()
}

const MIXED: [(u32, u32); 8] =
    [(FLORA, 3), (0, 2), (FLORA, 1), (FLORA, 9), (LORA, 2), (DORA, 1), (FLORA, 0), (DORA, 4)];

/// The rows that a step writes, and whether it finishes them.
fn written(step: &Step) -> (Vec<u32>, bool) {
    let runs = |runs: &[WeightRun]| runs.iter().flat_map(|run| run.first_row..run.first_row + run.rows).collect();
    match step {
        Step::Gemm(gemm) => {
            let whole = gemm.segments.iter().flat_map(|segment| segment.first_row..segment.first_row + segment.rows);
            let rows = gemm.rows.iter().filter(|row| row.last == 1).map(|row| row.row);
            (rows.chain(whole).collect(), gemm.finishes)
        }
        Step::Materialised(step) => (runs(&step.runs), step.finishes),
        Step::Merged(step) => (runs(&step.runs), step.finishes),
        Step::Segmented { .. } | Step::LowRankBmm(_) | Step::Finish => (Vec::new(), false),
    }
}

/// By every pair of lowerings and for each adapter: every row is written once, the merged adapter's by its step alone; every row is
/// finished once.
#[test]
fn every_row_is_written_once_and_finished_once() {
    let rows: u32 = MIXED.iter().map(|(_, rows)| rows).sum();
    for (plan, own) in Plan::all().flat_map(|plan| [FLORA, LORA, DORA].map(|own| (plan, own))) {
        let laid_out = laid_out(plan, &MIXED, Some(own), true);
        let mut seen = Vec::new();
        let finished_apart = laid_out.steps().contains(&Step::Finish);
        for step in laid_out.steps() {
            let (rows, finishes) = written(step);
            assert!(rows.is_empty() || finishes != finished_apart, "{plan} {own}: finished by one of them");
            seen.extend(rows);
        }
        seen.sort_unstable();
        assert!(seen.into_iter().eq(0..rows), "{plan} {own}");
        assert_eq!(laid_out.merged_adapter(), plan.merges().then_some(own), "{plan}");
    }
}

#[test]
fn the_merged_step_has_its_adapter_s_rows() {
    for plan in Plan::all().filter(Plan::merges) {
        let laid_out = laid_out(plan, &MIXED, Some(FLORA), false);
        let merged = laid_out.steps().iter().find_map(|step| match step {
            Step::Merged(merged) => Some(merged),
            _ => None,
        });
        let run = |first_row, rows| WeightRun { first_row, rows, weight: 0 };
        let expected = Merged { adapter: FLORA, runs: vec![run(0, 3), run(5, 10)], finishes: false };
        assert_eq!(merged, Some(&expected), "{plan}");
    }
}

/// What is laid out for the other rows is what is laid out for them where nothing is merged, in the same rows of the batch.
#[test]
fn the_others_steps_are_those_that_they_have_without() {
    for plan in Plan::unmerged() {
        // In place of the merged rows none at all, so that the others' positions are those of the shorter batch.
        let behind = [(0, 2), (LORA, 2), (DORA, 5), (FLORA, 12)];
        let with = laid_out(plan.with_merged(), &behind, Some(FLORA), true);
        let without = laid_out(plan, &behind[..3], None, true);
        let others: Vec<_> = with.steps().iter().filter(|step| !matches!(step, Step::Merged(_))).collect();
        assert!(others.into_iter().eq(without.steps()), "{plan}");
    }
}

#[test]
fn an_adapter_alone_has_one_step() {
    for plan in Plan::all().filter(Plan::merges) {
        for own in [FLORA, LORA, DORA] {
            let laid_out = laid_out(plan, &[(own, 2), (own, 11)], Some(own), true);
            let [Step::Merged(Merged { adapter, runs, finishes: true })] = laid_out.steps() else {
                panic!("{plan} {own}: {:?}", laid_out.steps());
            };
            let rows: u32 = runs.iter().map(|run| run.rows).sum();
            assert_eq!((*adapter, rows), (own, 13));
        }
    }
}

/// A plan that merges and a batch without the resident adapter's rows, or a table without a resident weight: nothing is otherwise.
#[test]
fn without_such_rows_nothing_changes() {
    for plan in Plan::unmerged() {
        let without = laid_out(plan, &MIXED, None, true);
        assert_eq!(laid_out(plan.with_merged(), &MIXED, None, true), without, "{plan}");
        assert_eq!(laid_out(plan, &MIXED, Some(FLORA), true), without, "{plan}: it doesn't merge");
        let others = [(0, 3), (LORA, 2)];
        assert_eq!(laid_out(plan.with_merged(), &others, Some(FLORA), true), laid_out(plan, &others, None, true));
    }
}

#[test]
fn two_resident_weights_are_refused() {
    let mut adapters = adapters(Some(FLORA));
    adapters[DORA as usize].is_merged = true;
    let refused = schedule(&Plan::fixed(), SHAPE, &segments(&MIXED), &adapters, false).unwrap_err();
    assert_eq!(refused, ScheduleError::NotOneAdapter { first: FLORA, second: DORA });
    assert!(refused.to_string().contains("say it of one alone"), "{refused}");
}

/// What is apart is counted apart, and joined it is what it was.
#[test]
fn the_shape_of_a_batch_has_the_merged_rows_apart() {
    let shape = |of: &[(u32, u32)], merged| BatchShape::of(&segments(of), &adapters(merged));
    let without = shape(&MIXED, None);
    for own in [FLORA, LORA, DORA] {
        let apart = shape(&MIXED, Some(own));
        let others: Vec<_> = MIXED.into_iter().filter(|(adapter, _)| *adapter != own).collect();
        assert_eq!(BatchShape { merged: None, ..apart }, shape(&others, None));
        assert_eq!(apart.joined(), without);
        assert_eq!((apart.all_rows(), apart.merged_rows()), (22, 22 - apart.tokens));
    }
    assert_eq!(without.joined(), without);
}

/// y is of all rows, and the table of merged ones is counted.
#[test]
fn merged_rows_count_for_what_is_held() {
    let rows = 1 << 16;
    let batch = BatchShape::of(&segments(&[(0, 1), (FLORA, rows)]), &adapters(Some(FLORA)));
    let words = 16 * u64::from(rows);
    for plan in [Plan::MERGED, Plan::new(MultiplicativeLowering::Bmm, AdditiveLowering::Bmm).with_merged()] {
        assert!(can_hold(&plan, SHAPE, &batch, Some(4 * words)));
        assert!(!can_hold(&plan, SHAPE, &batch, Some(4 * words - 4)));
    }
    // The cubes that share the depth of rows that aren't the base's.
    let deep = LayerShape { d: 4096, k: 3 };
    assert!(can_hold(&Plan::MERGED, deep, &batch, Some(4 * words)));
    assert!(!can_hold(&Plan::MERGED.with_split(), deep, &batch, Some(4 * words)));
    let many = LayerShape { d: 1, k: 1 << 16 };
    assert!(schedule(&Plan::MERGED, many, &segments(&[(FLORA, rows)]), &adapters(Some(FLORA)), false).is_err());
}
