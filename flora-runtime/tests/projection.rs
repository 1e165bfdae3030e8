//! Which adapter's weight a batch meets, whatever was loaded, merged and removed before.

use flora_ir::Activation;
use flora_ir::algebra::{FoldedAdapter, VirtualRow};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::pipeline::compile;
use flora_plan::plan::Plan;
use flora_plan::schedule::ScheduleError;
use flora_plan::weight::PackedWeight;
use flora_runtime::{
    Batch, BatchError, DeviceError, LayerOperands, OperandError, PoolBuffer, Projection, ProjectionError,
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
fn a_merged_weight_serves_its_own_adapter_alone() {
    let mut projection = projection();
    projection.merge("alice").unwrap();
    assert_eq!(forward(&projection, &[(Some("alice"), 2)]).unwrap(), [30.0; 4]);
    for other in [Some("bob"), Some("idle"), None] {
        let refused = forward(&projection, &[(other, 2)]);
        let Err(ProjectionError::Device(DeviceError::Operands(error))) = refused else {
            panic!("{other:?}: {refused:?}");
        };
        assert!(error.to_string().contains("merge the adapter first"), "{error}");
        for mixed in [[(Some("alice"), 1), (other, 1)], [(other, 1), (Some("alice"), 1)]] {
            let refused = forward(&projection, &mixed);
            let expected = ProjectionError::Schedule(ScheduleError::NotOneAdapter { adapters: 2 });
            assert_eq!(refused.unwrap_err().to_string(), expected.to_string(), "{mixed:?}");
        }
    }
    projection.merge("bob").unwrap();
    assert_eq!(forward(&projection, &[(Some("bob"), 1)]).unwrap(), [300.0; 2]);
    assert!(forward(&projection, &[(Some("alice"), 1)]).is_err());
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
