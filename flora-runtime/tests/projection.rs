//! Which adapter's weight a batch meets, whatever was loaded, merged and removed before.

use flora_ir::Activation;
use flora_ir::algebra::{FoldedAdapter, VirtualRow};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::pipeline::compile;
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{
    Batch, BatchError, DeviceError, LayerOperands, OperandError, PlannedProjection, Planning, PoolBuffer, Projection,
    ProjectionError, StepBatch,
};

/// Outputs scaled by a number.
fn scaled(by: f32) -> FoldedAdapter {
    let row = VirtualRow { in_scale: None, out_scale: Some(vec![by; 2]) };
    FoldedAdapter { virtual_rows: vec![row], ..FoldedAdapter::default() }
}

/// A weight of ones `[3, 2]`, with alice (10), bob (100) and one that leaves it alone.
fn projection() -> Projection {
    let shape = LayerShape { d: 3, k: 2 };
    let mut projection = Projection::new(&flora_host::device(), shape, &[1.0; 6], None, Activation::Identity).unwrap();
    let (alice, bob) = (scaled(10.0), scaled(100.0));
    projection.load([("alice", Some(&alice)), ("bob", Some(&bob)), ("idle", None)]).unwrap();
    projection
}

fn forward(projection: &Projection, segments: &[(Option<&str>, u32)]) -> Result<Vec<f32>, ProjectionError> {
    let rows: u32 = segments.iter().map(|(_, rows)| rows).sum();
    projection.forward(&Batch::new(segments.iter().copied()), &Plan::MERGED, &vec![1.0; 3 * rows as usize])
}

#[test]
fn a_merged_weight_serves_its_own_adapter_s_rows() {
    let mut projection = projection();
    let mixed = [(Some("alice"), 2), (None, 1), (Some("bob"), 1), (Some("idle"), 1), (Some("alice"), 1)];
    let right = [30.0, 30.0, 30.0, 30.0, 3.0, 3.0, 300.0, 300.0, 3.0, 3.0, 30.0, 30.0];
    assert_eq!(forward(&projection, &mixed).unwrap(), right, "nothing is merged");
    for (own, alone) in [("alice", 30.0), ("bob", 300.0), ("alice", 30.0)] {
        projection.merge(own).unwrap();
        assert_eq!(forward(&projection, &mixed).unwrap(), right, "{own} is merged");
        assert_eq!(forward(&projection, &[(Some(own), 2)]).unwrap(), [alone; 4], "{own} alone");
    }
    projection.unmerge();
    assert_eq!(projection.operands().merged_adapter(), None);
    assert_eq!(forward(&projection, &mixed).unwrap(), right, "nothing is merged any more");
}

/// What is laid out for a resident weight runs on no other.
#[test]
fn a_schedule_of_another_s_weight_is_refused() {
    let mut projection = projection();
    projection.merge("alice").unwrap();
    let x = projection.device().upload(&[1.0; 6]).unwrap();
    let schedule = projection.schedule(&Batch::new([(Some("alice"), 1), (None, 1)]), &Plan::MERGED).unwrap();
    assert_eq!(schedule.merged_adapter(), Some(1));
    assert_eq!(
        projection.device().read(&projection.execute(&schedule, &x, None).unwrap()).unwrap(),
        [30.0, 30.0, 3.0, 3.0]
    );
    projection.merge("bob").unwrap();
    let refused = |projection: &Projection| match projection.execute(&schedule, &x, None) {
        Err(ProjectionError::Device(DeviceError::Operands(OperandError::NotMerged { wanted: 1, found }))) => found,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(&projection), Some(2));
    projection.unmerge();
    assert_eq!(refused(&projection), None);
}

/// The weight of an adapter that is replaced goes with it, whatever is placed where it was.
#[test]
fn a_replaced_adapter_s_weight_is_gone() {
    let mut projection = projection();
    projection.merge("alice").unwrap();
    let batch = StepBatch::new([(1, 1), (2, 1), (0, 1)]);
    let planned = PlannedProjection::of(projection, Planning::Fixed(Plan::fixed()));
    let run = || {
        let y = planned.forward(&planned.device().upload(&[1.0; 9]).unwrap(), &batch, None).unwrap();
        planned.device().read(&y).unwrap()
    };
    assert_eq!(run(), [30.0, 30.0, 300.0, 300.0, 3.0, 3.0]);
    planned.change(|projection| {
        projection.remove(1);
        assert_eq!(projection.operands().merged_adapter(), None);
        assert!(matches!(projection.merge_at(1), Err(ProjectionError::NothingToMerge(1))));
        projection.place(1, &scaled(20.0)).unwrap();
    });
    assert_eq!(run(), [60.0, 60.0, 300.0, 300.0, 3.0, 3.0]);
    // The same batch, before and after: its schedules are those of what is resident.
    let merged = || planned.scheduled(&batch).unwrap().schedule.merged_adapter();
    assert_eq!(merged(), None);
    planned.change(|projection| projection.merge_at(1)).unwrap();
    assert_eq!((merged(), run()), (Some(1), vec![60.0, 60.0, 300.0, 300.0, 3.0, 3.0]));
    // Another one's weight in place of it.
    planned.change(|projection| projection.merge_at(2)).unwrap();
    assert_eq!((merged(), run()), (Some(2), vec![60.0, 60.0, 300.0, 300.0, 3.0, 3.0]));
    planned.change(|projection| projection.remove(1));
    assert_eq!((merged(), run()), (Some(2), vec![3.0, 3.0, 300.0, 300.0, 3.0, 3.0]), "another one's stays");
}

#[test]
fn what_has_no_weight_of_its_own_is_not_merged() {
    let mut projection = projection();
    projection.merge("bob").unwrap();
    assert!(matches!(projection.merge("idle"), Err(ProjectionError::NothingToMerge(0))));
    assert!(matches!(projection.merge_at(0), Err(ProjectionError::NothingToMerge(0))));
    assert!(matches!(projection.merge_at(7), Err(ProjectionError::NothingToMerge(7))));
    assert!(matches!(projection.merge("carol"), Err(ProjectionError::Batch(BatchError::UnknownAdapter { .. }))));
    // What was refused leaves the other resident.
    assert_eq!(projection.operands().merged_adapter(), Some(2));
}

#[test]
fn a_removed_name_is_nobody_elses() {
    let mut projection = projection();
    projection.merge("alice").unwrap();
    let batch = Batch::new([(Some("alice"), 1)]);
    let alice = projection.segments(&batch).unwrap()[0].adapter;
    projection.remove(alice);
    assert!(matches!(projection.segments(&batch), Err(BatchError::UnknownAdapter { .. })));
    // Bob's vectors at alice's position are not alice's.
    projection.place(alice, &scaled(100.0)).unwrap();
    let refused = projection.forward(&batch, &Plan::default(), &[1.0; 3]);
    assert!(matches!(refused, Err(ProjectionError::Batch(BatchError::UnknownAdapter { .. }))), "{refused:?}");
    // Names of others, and of adapters that leave the layer alone, stay.
    for (name, expected) in [("bob", 300.0), ("idle", 3.0)] {
        let batch = Batch::new([(Some(name), 1)]);
        assert_eq!(projection.forward(&batch, &Plan::default(), &[1.0; 3]).unwrap(), [expected; 2]);
    }
    projection.load([("alice", Some(&scaled(10.0)))]).unwrap();
    assert_eq!(projection.forward(&batch, &Plan::default(), &[1.0; 3]).unwrap(), [30.0; 2]);
}

#[test]
fn a_layer_is_of_the_formats_that_its_parts_have() {
    let (device, shape) = (flora_host::device(), LayerShape { d: 32, k: 2 });
    let pools = || {
        let pool = |width: usize| PoolBuffer::new(device.upload(&vec![1.0; width]).unwrap(), 1);
        (pool(32), pool(2))
    };
    let made = |kept: WeightFormat, said: WeightFormat| {
        let packed = PackedWeight::from_f32(kept, shape, &[1.0; 64]).unwrap();
        let format = LayerFormat { weight: said, ..LayerFormat::default() };
        LayerOperands::new(format, device.upload_weight(&packed).unwrap(), None, pools(), Epilogue::default())
    };
    let dense = WeightFormat::Float(Element::F32);
    for format in [WeightFormat::Q4_0, WeightFormat::Int8, WeightFormat::Float(Element::F16)] {
        assert!(made(format, format).is_ok());
        let refused = made(format, dense);
        assert!(matches!(refused, Err(OperandError::WrongFormat { what: "the base weight", .. })), "{refused:?}");
    }
}

/// An equation's types are those of its projection, and what isn't named is f32.
#[test]
fn a_projection_of_a_layer_has_the_types_of_its_equation() {
    let of = |source: &str, bias: Option<&[f32]>| {
        let layer = compile(flora_ir::parse(source).unwrap()).unwrap();
        let shape = LayerShape { d: 3, k: 2 };
        Projection::of_layer(&flora_host::device(), &layer, shape, &[0.1; 6], bias)
    };
    let body = "{ relu(x @ w0 + b) }";
    let typed = format!("layer f(x: input[tokens, D]: bf16, w0: weight[D, K]: f16, b: bias[K]) {body}");
    let projection = of(&typed, Some(&[-1.0, 1.0])).unwrap();
    assert_eq!(projection.format().to_string(), "bf16/f32/f16");
    let y = projection.forward(&Batch::new([(None, 1)]), &Plan::default(), &[1.0; 3]).unwrap();
    // 0.1 in f16, thrice, and 1, in bf16.
    assert_eq!(y, [0.0, Element::Bf16.round(3.0 * Element::F16.round(0.1) + 1.0)]);
    let untyped = format!("layer f(x: input[tokens, D], w0: weight[D, K], b: bias[K]) {body}");
    assert_eq!(of(&untyped, Some(&[0.0; 2])).unwrap().format(), LayerFormat::default());
    assert!(matches!(of(&untyped, None), Err(ProjectionError::WrongSize { .. })), "the equation has a bias");
}
