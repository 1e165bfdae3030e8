//! Batches that a projection plans by itself.

use flora_ir::algebra::{FoldedAdapter, VirtualRow};
use flora_plan::layer::{LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{BatchError, PlannedProjection, Planning, ProjectionError, ProjectionOptions, StepBatch};

fn scaled(factor: f32) -> FoldedAdapter {
    let row = VirtualRow { in_scale: None, out_scale: Some(vec![1.0, factor]) };
    FoldedAdapter { virtual_rows: vec![row], ..FoldedAdapter::default() }
}

/// Two outputs, each the sum of two inputs.
fn projection() -> PlannedProjection {
    let weight = PackedWeight::from_f32(WeightFormat::default(), LayerShape { d: 2, k: 2 }, &[1.0; 4]).unwrap();
    let options = ProjectionOptions { residual: true, ..ProjectionOptions::default() };
    let planned =
        PlannedProjection::new(&flora_host::device(), &weight, options, Planning::Fixed(Plan::default())).unwrap();
    planned.change(|projection| {
        projection.reserve(4, 4).unwrap();
        projection.place(2, &scaled(10.0)).unwrap();
    });
    planned
}

#[test]
fn segments_name_positions_and_an_unknown_one_is_the_base() {
    let planned = projection();
    let upload = |values: &[f32]| planned.device().upload(values).unwrap();
    // The base, a position that no adapter has, the adapter, one beyond the table.
    let batch = StepBatch::new([(0, 1), (1, 1), (2, 2), (7, 1)]);
    let y = planned.forward(&upload(&[1.0; 10]), &batch, Some(&upload(&[0.5; 10]))).unwrap();
    let y = planned.device().read(&y).unwrap();
    assert_eq!(y, [2.5, 2.5, 2.5, 2.5, 2.5, 20.5, 2.5, 20.5, 2.5, 2.5]);
}

#[test]
fn clones_share_adapters() {
    let planned = projection();
    let clone = planned.clone();
    clone.change(|projection| projection.remove(2));
    let upload = |values: &[f32]| planned.device().upload(values).unwrap();
    let y = planned.forward(&upload(&[1.0; 2]), &StepBatch::new([(2, 1)]), Some(&upload(&[0.0; 2]))).unwrap();
    assert_eq!(planned.device().read(&y).unwrap(), [2.0, 2.0]);
}

#[test]
fn another_number_of_rows_is_refused() {
    let planned = projection();
    let x = planned.device().upload(&[1.0; 6]).unwrap();
    let refused = planned.forward(&x, &StepBatch::new([(0, 2)]), Some(&x));
    let found =
        matches!(refused, Err(ProjectionError::Batch(BatchError::WrongInput { rows: 2, d: 2, expected: 4, found: 6 })));
    assert!(found, "{refused:?}");
}
