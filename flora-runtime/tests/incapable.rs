//! A device that can do little: what is left of an adapter that it failed to write is nothing, and its room is free again; gradients
//! that it doesn't compute are an error, and so are gates that it doesn't multiply by and activations that it doesn't round.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use flora_ir::algebra::{FoldedAdapter, VirtualRow};
use flora_plan::blueprints::{Blueprints, Tile};
use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};
use flora_plan::schedule::{Materialised, Schedule};
use flora_plan::weight::PackedWeight;
use flora_runtime::backend::{Backend, Queueing};
use flora_runtime::{
    Device, DeviceError, LayerOperands, OperandError, Projection, ProjectionError, ProjectionOptions, StepBatch,
    Storage, Wanted,
};

/// A device of memory alone whose writes fail once a countdown is over.
struct Failing {
    /// Writes until the one that fails.
    good_writes: Arc<AtomicUsize>,
}

fn lost() -> DeviceError {
    DeviceError::Execution("the device was lost".to_owned())
}

impl Backend for Failing {
    fn upload(&self, values: &[f32], _element: Element) -> Storage {
        Storage::new(values.to_vec())
    }

    fn upload_weight(&self, _weight: &PackedWeight) -> Storage {
        Storage::new(Vec::<f32>::new())
    }

    fn capacity(&self, storage: &Storage, _element: Element) -> Option<usize> {
        storage.get::<Vec<f32>>().map(Vec::len)
    }

    fn resized(&self, storage: &Storage, elements: usize, _element: Element) -> Result<Storage, DeviceError> {
        let mut values = storage.get::<Vec<f32>>().ok_or_else(lost)?.clone();
        values.resize(elements, 0.0);
        Ok(Storage::new(values))
    }

    fn write(&self, _storage: &mut Storage, _first: usize, _values: &[f32], _: Element) -> Result<(), DeviceError> {
        let left = self.good_writes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.map(drop).map_err(|_| lost())
    }

    fn read(&self, _storage: &Storage, _parts: &[Range<usize>], _element: Element) -> Result<Vec<f32>, DeviceError> {
        Err(lost())
    }

    fn execute(
        &self,
        _layer: &LayerOperands,
        _schedule: &Schedule,
        _x: &Storage,
        _residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        Err(lost())
    }

    fn merge(&self, _layer: &LayerOperands, _step: &Materialised) -> Result<Storage, DeviceError> {
        Err(lost())
    }

    fn merged_format(&self, format: LayerFormat) -> WeightFormat {
        format.weight
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn device_seconds(&self, _work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        None
    }

    fn tuned(&self, _blueprints: &Blueprints) -> Arc<dyn Backend> {
        Arc::new(Self { good_writes: Arc::clone(&self.good_writes) })
    }

    fn tiles(&self, _format: LayerFormat) -> Vec<Tile> {
        Vec::new()
    }

    fn place(&self) -> &dyn Any {
        &()
    }
}

#[test]
fn a_failed_write_leaks_no_room() {
    let shape = LayerShape { d: 3, k: 2 };
    let row = VirtualRow { in_scale: Some(vec![2.0; 3]), out_scale: Some(vec![3.0; 2]) };
    let adapter = FoldedAdapter { virtual_rows: vec![row], ..FoldedAdapter::default() };
    // The in-vectors are written first, then the out-vectors.
    for good in [0, 1] {
        let good_writes = Arc::new(AtomicUsize::new(usize::MAX));
        let device = Device::new(flora_host::describe(), Failing { good_writes: Arc::clone(&good_writes) });
        let weight = PackedWeight::from_f32(WeightFormat::default(), shape, &[1.0; 6]).unwrap();
        let mut projection = Projection::from_packed(&device, &weight, ProjectionOptions::default()).unwrap();
        projection.reserve(1, 1).unwrap();
        let (in_slots, out_slots) = projection.slots();
        // Every place that there is, over and over: a leak fills the pools.
        for _ in 0..=in_slots.max(out_slots) {
            good_writes.store(good, Ordering::Relaxed);
            let failed = projection.place(1, &adapter);
            assert!(matches!(failed, Err(ProjectionError::Device(DeviceError::Execution(_)))), "{good}: {failed:?}");
        }
        good_writes.store(usize::MAX, Ordering::Relaxed);
        projection.place(1, &adapter).unwrap();
    }
}

#[test]
fn a_device_without_gates_says_so() {
    let device = Device::new(flora_host::describe(), Failing { good_writes: Arc::new(AtomicUsize::new(usize::MAX)) });
    assert!(!device.has_gates() && flora_host::device().has_gates());
    let weight = PackedWeight::from_f32(WeightFormat::default(), LayerShape { d: 3, k: 2 }, &[1.0; 6]).unwrap();
    let mut projection = Projection::from_packed(&device, &weight, ProjectionOptions::default()).unwrap();
    let error = projection.set_gates(1, 0, &[0]).unwrap_err();
    assert!(matches!(error, ProjectionError::Device(DeviceError::NoGates { .. })), "{error:?}");
}

#[test]
fn a_device_that_rounds_no_activations_says_so() {
    let device = Device::new(flora_host::describe(), Failing { good_writes: Arc::new(AtomicUsize::new(usize::MAX)) });
    let error = device.rounding_activations().unwrap_err();
    assert!(matches!(error, DeviceError::NoRounding { .. }), "{error:?}");
    assert!(error.to_string().contains("--activations int8"), "{error}");
    // What isn't rounded runs as ever.
    let mut ran = false;
    device
        .unrounded(&mut || {
            ran = true;
            Ok(())
        })
        .unwrap();
    assert!(ran);
}

#[test]
fn a_device_without_gradients_says_so() {
    let device = Device::new(flora_host::describe(), Failing { good_writes: Arc::new(AtomicUsize::new(usize::MAX)) });
    let weight = PackedWeight::from_f32(WeightFormat::default(), LayerShape { d: 3, k: 2 }, &[1.0; 6]).unwrap();
    let projection = Projection::from_packed(&device, &weight, ProjectionOptions::default()).unwrap();
    let (x, g) = (device.upload(&[1.0; 12]).unwrap(), device.upload(&[1.0; 8]).unwrap());
    let refused = projection.backward(&StepBatch::new([(0, 4)]), &x, &g, Wanted::All);
    let error = refused.unwrap_err();
    assert!(matches!(error, ProjectionError::Device(DeviceError::NoBackward { .. })), "{error:?}");
    // What doesn't fit is found first.
    let refused = projection.backward(&StepBatch::new([(0, 4)]), &x, &x, Wanted::All);
    let what = match refused {
        Err(ProjectionError::Device(DeviceError::Operands(OperandError::WrongSize {
            what,
            expected: 8,
            found: 12,
        }))) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what, "the output's gradient");
}
