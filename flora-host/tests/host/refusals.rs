//! What doesn't fit together is refused, and y stays as it was.

use flora_host::{
    GradientsMut, HostEngine, HostError, NOT_REPLACED, Operands, Replaced, Rows, RowsMut, Values, ValuesMut, Weight,
};
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Epilogue, LayerShape, WeightFormat};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{backward_schedule, schedule};
use flora_plan::weight::PackedWeight;

const SHAPE: LayerShape = LayerShape { d: 4, k: 3 };

fn weight(shape: LayerShape) -> Weight {
    let ones = vec![1.0; (shape.d * shape.k) as usize];
    Weight::new(&PackedWeight::from_f32(WeightFormat::default(), shape, &ones).unwrap())
}

/// Two rows of an adapter with a virtual row and a low-rank sum, both of slot 2.
fn run(plan: Plan, operands: Operands<'_>, x: usize, y: usize) -> Result<(), HostError> {
    let adapter = AdapterSlots {
        virtual_rows: vec![VirtualRowSlots { in_scale: Some(2), out_scale: Some(2) }; 2],
        low_rank: LowRankSlots { shrink: 2, expand: 2, rank: 1 },
        is_merged: true,
    };
    let schedule = schedule(&plan, SHAPE, &[Segment { rows: 2, adapter: 0 }], &[adapter], true).unwrap();
    let (x, mut y) = (vec![1.0; x], vec![7.0; y]);
    let result = HostEngine::new().execute(&operands, &schedule, Values::F32(&x), ValuesMut::F32(&mut y), None);
    assert_eq!(result.is_err(), y.iter().all(|y| *y == 7.0), "{result:?}: {y:?}");
    result
}

#[test]
fn what_does_not_fit_is_refused() {
    let (fits, other) = (weight(SHAPE), weight(LayerShape { d: 3, k: 4 }));
    let (in_pool, out_pool, bias) = ([0.5; 12], [0.5; 9], [0.0; 2]);
    let right = Operands {
        weight: &fits,
        bias: None,
        in_pool: Values::F32(&in_pool),
        out_pool: Values::F32(&out_pool),
        epilogue: Epilogue::default(),
        merged: None,
    };
    let plans = MultiplicativeLowering::ALL.into_iter().zip(AdditiveLowering::ALL);
    let (biased, added) =
        (Epilogue { bias: true, ..Epilogue::default() }, Epilogue { residual: true, ..Epilogue::default() });
    for (multiplicative, additive) in plans {
        let plan = Plan::new(multiplicative, additive);
        assert_eq!(run(plan, right, 8, 6), Ok(()));
        let refused = |operands, x, y| run(plan, operands, x, y).unwrap_err().to_string();
        assert_eq!(refused(right, 7, 6), "x has 7 numbers and takes 8");
        assert_eq!(refused(right, 8, 9), "y has 9 numbers and takes 6");
        let wrong = Operands { weight: &other, ..right };
        assert_eq!(refused(wrong, 8, 6), "x has 8 numbers and takes 6");
        let few = Operands { in_pool: Values::F32(&in_pool[..8]), ..right };
        assert!(refused(few, 8, 6).starts_with("the schedule names in-vector 2 and there are 2;"));
        let few = Operands { out_pool: Values::F32(&[]), ..right };
        assert!(refused(few, 8, 6).starts_with("the schedule names out-vector 2 and there are 0;"));
        let partial = Operands { out_pool: Values::F32(&out_pool[..8]), ..right };
        assert_eq!(refused(partial, 8, 6), "the pool of out-vectors has 8 numbers, which are not whole vectors of 3");
        assert_eq!(
            refused(Operands { epilogue: biased, ..right }, 8, 6),
            "the layer needs a bias, and none was passed"
        );
        let short = Operands { epilogue: biased, bias: Some(&bias), ..right };
        assert_eq!(refused(short, 8, 6), "the bias has 2 numbers and takes 3");
        let missing = Operands { epilogue: added, ..right };
        assert_eq!(refused(missing, 8, 6), "the layer needs a residual, and none was passed");
    }
    let missing = run(Plan::MERGED, right, 8, 6).unwrap_err();
    assert_eq!(missing, HostError::Missing { what: "a merged weight" });
    let wrong = Operands { merged: Some(&other), ..right };
    assert!(matches!(run(Plan::MERGED, wrong, 8, 6), Err(HostError::WrongShape { .. })));
    assert_eq!(run(Plan::MERGED, Operands { merged: Some(&fits), ..right }, 8, 6), Ok(()));
}

/// The gradients of two rows of such an adapter, of x, g, dx and vectors of these lengths.
fn run_backward(operands: Operands<'_>, [x, g, dx, ins, outs]: [usize; 5]) -> Result<(), HostError> {
    let adapter = AdapterSlots {
        virtual_rows: vec![VirtualRowSlots { in_scale: Some(2), out_scale: Some(2) }; 2],
        low_rank: LowRankSlots { shrink: 2, expand: 2, rank: 1 },
        is_merged: false,
    };
    let plan = Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused);
    let schedule = backward_schedule(&plan, SHAPE, &[Segment { rows: 2, adapter: 0 }], &[adapter]).unwrap();
    let (x, g) = (vec![1.0; x], vec![1.0; g]);
    let (mut dx, mut ins, mut outs) = (vec![7.0; dx], vec![7.0; ins], vec![7.0; outs]);
    let gradients = GradientsMut { input: Some(ValuesMut::F32(&mut dx)), vectors: Some([&mut ins, &mut outs]) };
    let result = HostEngine::new().backward(&operands, &schedule, Values::F32(&x), Values::F32(&g), gradients);
    assert!(result.is_ok() || [dx, ins, outs].concat().iter().all(|number| *number == 7.0), "{result:?}");
    result
}

#[test]
fn gradients_of_what_does_not_fit_are_refused() {
    let (fits, other) = (weight(SHAPE), weight(LayerShape { d: 3, k: 4 }));
    let (in_pool, out_pool) = ([0.5; 12], [0.5; 9]);
    let right = Operands {
        weight: &fits,
        bias: None,
        in_pool: Values::F32(&in_pool),
        out_pool: Values::F32(&out_pool),
        epilogue: Epilogue::default(),
        merged: None,
    };
    let lengths = [8, 6, 8, 12, 9];
    assert_eq!(run_backward(right, lengths), Ok(()));
    let refused = |operands, lengths| run_backward(operands, lengths).unwrap_err().to_string();
    let names = ["x", "the output's gradient", "dx", "the gradients of in-vectors", "the gradients of out-vectors"];
    for (at, name) in names.into_iter().enumerate() {
        let mut wrong = lengths;
        wrong[at] += 1;
        assert_eq!(refused(right, wrong), format!("{name} has {} numbers and takes {}", wrong[at], lengths[at]));
    }
    assert!(refused(Operands { weight: &other, ..right }, lengths).starts_with("x has 8 numbers and takes 6"));
    let few = Operands { in_pool: Values::F32(&in_pool[..8]), ..right };
    assert!(refused(few, lengths).contains("vector 2 and there are 2;"));
    let few = Operands { out_pool: Values::F32(&out_pool[..6]), ..right };
    assert!(refused(few, lengths).contains("vector 2 and there are 2;"));
}

#[test]
fn places_beyond_the_rows_that_stand_in_for_others_are_refused() {
    let weight = weight(SHAPE);
    let operands = Operands {
        weight: &weight,
        bias: None,
        in_pool: Values::F32(&[]),
        out_pool: Values::F32(&[]),
        epilogue: Epilogue::default(),
        merged: None,
    };
    let plan = Plan::new(MultiplicativeLowering::Stacked, AdditiveLowering::Fused);
    let schedule = schedule(&plan, SHAPE, &[Segment { rows: 2, adapter: 0 }], &[AdapterSlots::base()], false).unwrap();
    let refused = |places: &[u32], values: &[f32]| {
        let (x, mut y) = ([1.0; 8], [7.0; 6]);
        let rows = Rows { values: Values::F32(&x), pitch: 4 };
        let sums = RowsMut { values: ValuesMut::F32(&mut y), pitch: 3 };
        let replaced = Some(Replaced { places, values });
        let result = HostEngine::new().execute_replaced(&operands, &schedule, (rows, replaced), sums, None);
        assert_eq!(result.is_err(), y == [7.0; 6]);
        result.map_err(|error| error.to_string())
    };
    assert_eq!(refused(&[NOT_REPLACED, 0], &[2.0; 4]), Ok(()));
    let few = "the rows in place of others has 4 numbers and takes 8";
    assert_eq!(refused(&[NOT_REPLACED, 1], &[2.0; 4]), Err(few.to_owned()));
    assert_eq!(refused(&[0], &[2.0; 4]), Err("the places of replaced rows has 1 numbers and takes 2".to_owned()));
}
