//! Memory for adapters is taken by what they have, and goes to whom needs it.

use std::collections::BTreeMap;
use std::sync::Arc;

use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, Model};
use flora_engine::{AdapterId, Decoder, LogitRows, PlaceError, SequenceId, StepSegment};
use flora_model::{DeviceModel, PreparedAdapter, ServeOptions};
use flora_plan::layer::Element;

use crate::compositions::random_module;
use crate::device;
use crate::served::golden;

fn adapter(model: &Model, module: &str, rank: usize, seed: u64) -> PreparedAdapter {
    let layers = Layers::builtin().expect("built-in layers");
    let mut random = fastrand::Rng::with_seed(seed);
    let kind = layers.kinds().kind_of_layer("lora").expect("a built-in layer");
    let own = model.projections().iter().filter(|own| own.path.ends_with(module));
    let modules: BTreeMap<_, _> =
        own.map(|own| (own.path.clone(), random_module(&mut random, "lora", rank, own.d, own.k))).collect();
    let folder = AdapterFolder::new(format!("{module}-{seed}"), kind, modules);
    let adapted = layers.prepare(&folder, model).expect("an adapter of the model's shapes");
    PreparedAdapter::new(folder.name, adapted, Element::F32)
}

fn load(model: &Model, adapter_bytes: u64) -> DeviceModel {
    let options = ServeOptions { adapter_bytes, ..ServeOptions::default() };
    flora_model::load(&device(), model, &options).expect("a decoder of a known family")
}

fn logits(decoder: &mut DeviceModel, adapter: u32) -> Vec<f32> {
    let (sequence, adapter) = (SequenceId(7), Some(AdapterId(adapter)));
    let tokens = &[3, 90, 41, 12];
    let segment =
        StepSegment { sequence, adapter, first_position: 0, tokens, prompt_tokens: 4, logits: LogitRows::Last };
    let logits = decoder.step(&[segment]).expect("a step");
    decoder.release(sequence);
    logits
}

#[test]
fn memory_goes_to_whom_needs_it() {
    let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
    let of = |module: &str, rank: usize, seed: u64| adapter(&model, module, rank, seed);
    let budget = 2 * of("q_proj", 8, 0).bytes;
    let mut decoder = load(&model, budget);
    let place = |decoder: &mut DeviceModel, id: u32, adapter: PreparedAdapter| {
        decoder.place(AdapterId(id), adapter).map_err(|error| match error {
            PlaceError::Full(_) => "full".to_owned(),
            PlaceError::Unfit(failure) => failure.to_string(),
        })
    };
    for id in 0..2 {
        place(&mut decoder, id, of("q_proj", 8, u64::from(id))).expect("there is room for two");
    }
    assert_eq!(place(&mut decoder, 2, of("q_proj", 8, 2)), Err("full".to_owned()));
    assert_eq!(place(&mut decoder, 2, of("v_proj", 8, 2)), Err("full".to_owned()));

    // What one leaves, another gets, of whatever modules; those that stay don't notice.
    let before = logits(&mut decoder, 0);
    decoder.remove(AdapterId(1));
    let other = of("v_proj", 8, 3);
    assert!(other.bytes <= budget / 2, "narrower than queries");
    place(&mut decoder, 3, other.clone()).expect("the other's memory");
    assert_eq!(logits(&mut decoder, 0), before);
    let mut alone = load(&model, 1 << 30);
    place(&mut alone, 3, other).expect("there is room");
    assert_eq!(logits(&mut decoder, 3), logits(&mut alone, 3));

    decoder.remove(AdapterId(0));
    decoder.remove(AdapterId(3));
    let large = of("down_proj", 8, 4);
    let fits = large.bytes <= budget;
    let placed = place(&mut decoder, 4, large);
    assert_eq!(placed.is_ok(), fits, "{placed:?}");
    let error = place(&mut load(&model, budget), 5, of("up_proj", 64, 5)).expect_err("larger than all there is");
    assert!(error.contains("--adapter-memory"), "{error}");
}
