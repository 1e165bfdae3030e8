//! A schedule is of a batch and of no layer: what a shape has to do with it is whether it fits.

use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::LayerShape;
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Schedule, ScheduleError, schedule};

const SMALL: LayerShape = LayerShape { d: 4, k: 3 };
/// One such matrix can be indexed, two can't.
const LARGE: LayerShape = LayerShape { d: 40_000, k: 40_000 };

fn flora(first: u32) -> AdapterSlots {
    let row = |slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) };
    AdapterSlots { virtual_rows: vec![row(first), row(first + 1)], ..AdapterSlots::base() }
}

fn batch() -> (Vec<Segment>, Vec<AdapterSlots>) {
    let lora = AdapterSlots { low_rank: LowRankSlots { shrink: 4, expand: 4, rank: 2 }, ..AdapterSlots::base() };
    let segments = (0..12).map(|at| Segment { rows: 1 + at % 3, adapter: at % 4 }).collect();
    (segments, vec![AdapterSlots::base(), flora(0), flora(2), lora])
}

#[test]
fn the_steps_do_not_depend_on_the_shape() {
    let (segments, adapters) = batch();
    for plan in Plan::unmerged() {
        for finishes in [false, true] {
            let of = |shape| schedule(&plan, shape, &segments, &adapters, finishes).expect("a small batch");
            assert_eq!(of(SMALL), of(LayerShape { d: 512, k: 64 }), "{plan}");
        }
    }
    assert_eq!(Schedule::base_gemm(SMALL, 5), Schedule::base_gemm(LARGE, 5));
}

/// What a shape makes too large isn't laid out for it, and doesn't fit it where it was laid out for another.
#[test]
fn a_schedule_fits_the_shapes_that_it_can_be_laid_out_for() {
    let (segments, adapters) = batch();
    let mut too_large = 0;
    for plan in Plan::unmerged() {
        let of = |shape| schedule(&plan, shape, &segments, &adapters, true);
        let small = of(SMALL).expect("a small batch");
        for shape in [SMALL, LARGE, LayerShape { d: 1 << 20, k: 1 }, LayerShape { d: 1 << 16, k: 1 << 16 }] {
            assert_eq!(small.fits(shape), of(shape).map(|_| ()), "{plan} {shape:?}");
            too_large += u32::from(small.fits(shape).is_err());
        }
    }
    // The largest base weight by every plan, two of the other by those that make both.
    assert_eq!(too_large, 9 + 3);
}

#[test]
fn rows_are_counted_with_the_shape() {
    let rows = 1 << 20;
    let gemm = Schedule::base_gemm(SMALL, rows).expect("a small layer");
    assert_eq!(gemm.fits(LayerShape { d: 2047, k: 3 }), Ok(()));
    let elements = u64::from(rows) << 11;
    assert_eq!(gemm.fits(LayerShape { d: 2048, k: 3 }), Err(ScheduleError::TooLarge { what: "x", elements }));
    assert_eq!(gemm.fits(LayerShape { d: 3, k: 2048 }), Err(ScheduleError::TooLarge { what: "y", elements }));
}

/// What is laid out for two plans that do the same is run once where each is measured.
#[test]
fn plans_that_do_the_same_have_equal_schedules() {
    let lora = AdapterSlots { low_rank: LowRankSlots { shrink: 0, expand: 0, rank: 2 }, ..AdapterSlots::base() };
    let (segments, adapters) = ([Segment { rows: 5, adapter: 0 }], [lora]);
    let of = |plan: Plan| schedule(&plan, SMALL, &segments, &adapters, false).expect("a small batch");
    for additive in AdditiveLowering::ALL {
        let first = of(Plan::new(MultiplicativeLowering::Stacked, additive));
        for multiplicative in MultiplicativeLowering::ALL {
            assert_eq!(of(Plan::new(multiplicative, additive)), first, "{multiplicative:?} {additive:?}");
        }
    }
}
