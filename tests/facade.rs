//! What others implement can be written with the facade's names alone: a decoder and a kind of device.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use flora::planning::{Element, LayerFormat, Schedule, WeightFormat};
use flora::runtime::{
    Backend, BackendKind, Blueprints, Device, DeviceError, DeviceInfo, LayerOperands, Materialised, PackedWeight,
    Queueing, Storage, Tile,
};
use flora::serving::{AdapterId, Decoder, DecoderLimits, LogitRows, PlaceError, SequenceId, StepSegment};

/// Says the token after the last one.
struct Counting;

impl Decoder for Counting {
    type Prepared = ();
    type Error = std::io::Error;

    fn limits(&self) -> DecoderLimits {
        DecoderLimits { vocabulary: 4, context_length: 16, cache_bytes_per_token: 1 }
    }

    fn step(&mut self, segments: &[StepSegment<'_>]) -> Result<Vec<f32>, Self::Error> {
        let logits = |segment: &StepSegment<'_>| {
            let next = segment.tokens.last().map_or(0, |token| token + 1);
            (0..4).map(move |token| if token == next { 1.0 } else { 0.0 })
        };
        Ok(segments.iter().filter(|segment| segment.logits != LogitRows::None).flat_map(logits).collect())
    }

    fn release(&mut self, _sequence: SequenceId) {}

    fn place(&mut self, _adapter: AdapterId, (): ()) -> Result<(), PlaceError<()>> {
        Ok(())
    }

    fn remove(&mut self, _adapter: AdapterId) {}
}

#[test]
fn a_decoder_of_ones_own() {
    let segment = StepSegment {
        sequence: SequenceId(1),
        adapter: None,
        first_position: 0,
        tokens: &[0, 1],
        prompt_tokens: 2,
        logits: LogitRows::Last,
    };
    assert_eq!(Counting.step(&[segment]).expect("it can't fail"), [0.0, 0.0, 1.0, 0.0]);
}

/// Keeps numbers and runs nothing.
struct Shelf;

fn numbers(storage: &Storage) -> Result<&Vec<f32>, DeviceError> {
    storage.get().ok_or_else(|| DeviceError::Execution("no numbers of this device".to_owned()))
}

impl Backend for Shelf {
    fn upload(&self, values: &[f32], _element: Element) -> Storage {
        Storage::new(values.to_vec())
    }

    fn upload_weight(&self, weight: &PackedWeight) -> Storage {
        Storage::new(weight.clone())
    }

    fn capacity(&self, storage: &Storage, _element: Element) -> Option<usize> {
        numbers(storage).ok().map(Vec::len)
    }

    fn resized(&self, storage: &Storage, elements: usize, _element: Element) -> Result<Storage, DeviceError> {
        let mut values = numbers(storage)?.clone();
        values.resize(elements, 0.0);
        Ok(Storage::new(values))
    }

    fn write(&self, storage: &mut Storage, first: usize, values: &[f32], _element: Element) -> Result<(), DeviceError> {
        let mut all = numbers(storage)?.clone();
        all[first..first + values.len()].copy_from_slice(values);
        *storage = Storage::new(all);
        Ok(())
    }

    fn read(&self, storage: &Storage, parts: &[Range<usize>], _element: Element) -> Result<Vec<f32>, DeviceError> {
        let numbers = numbers(storage)?;
        Ok(parts.iter().flat_map(|part| &numbers[part.clone()]).copied().collect())
    }

    fn execute(
        &self,
        _layer: &LayerOperands,
        _schedule: &Schedule,
        _x: &Storage,
        _residual: Option<&Storage>,
    ) -> Result<Storage, DeviceError> {
        Err(DeviceError::Execution("a shelf runs nothing".to_owned()))
    }

    fn merge(&self, _layer: &LayerOperands, _step: &Materialised) -> Result<Storage, DeviceError> {
        Err(DeviceError::Execution("a shelf runs nothing".to_owned()))
    }

    fn merged_format(&self, format: LayerFormat) -> WeightFormat {
        WeightFormat::Float(format.activations)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn device_seconds(&self, _work: &mut Queueing<'_>) -> Option<Result<f64, DeviceError>> {
        None
    }

    fn tuned(&self, _blueprints: &Blueprints) -> Arc<dyn Backend> {
        Arc::new(Shelf)
    }

    fn tiles(&self, _format: LayerFormat) -> Vec<Tile> {
        Vec::new()
    }

    fn place(&self) -> &dyn Any {
        self
    }
}

#[test]
fn a_kind_of_device_of_ones_own() {
    let mut info = DeviceInfo::unstarted("shelf".into(), "shelf".into(), BackendKind::Host, String::new(), true);
    info.element_types.push("f32".to_owned());
    let shelf = Device::new(info, Shelf);
    let buffer = shelf.upload(&[1.0, 2.0, 3.0]).expect("a shelf holds numbers");
    assert_eq!(shelf.read(&buffer).expect("and gives them back"), [1.0, 2.0, 3.0]);
    // Memory of one device isn't another's.
    assert!(flora::devices::host().read(&buffer).is_err());
}
