//! A golden model with its adapters, loaded for a device.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flora_adapters::BaseForm;
use flora_checkpoint::Model;
use flora_checkpoint::model::DecoderConfig;
use flora_engine::{AdapterId, AdapterSource, Decoder, StepSegment};
use flora_model::{AdapterDirectory, DeviceModel, ServeError, ServeOptions};
use flora_plan::layer::Element;

use crate::device;

/// A golden model on the tests' device.
pub(crate) struct Served {
    pub(crate) name: String,
    /// Where its golden outputs are.
    pub(crate) outputs: PathBuf,
    pub(crate) decoder: DeviceModel,
    source: AdapterDirectory,
    placed: Vec<String>,
    /// What rounding may do to a logit, of the largest logit: four standard deviations, as everywhere. A block has eight steps that
    /// round (two norms, the products with four kinds of weights, attention's two), the model two more. Each is a sum whose
    /// rounding walks at random, √width of a unit; the steps' add up likewise, and those of transformers' side too.
    pub(crate) rounding: f32,
}

pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

/// The real model; `None` where it wasn't fetched and `FLORA_MODEL` doesn't say that it has to be.
pub(crate) fn smollm2() -> Option<PathBuf> {
    flora_toolchain::smollm2_from_environment().expect("FLORA_MODEL=required, but SmolLM2 can't be had")
}

/// Loads the golden model of this name, activations and adapters in f32.
pub(crate) fn load(name: &str) -> Served {
    load_in(name, Element::F32)
}

/// The same in another type.
pub(crate) fn load_in(name: &str, element: Element) -> Served {
    load_by(name, element, |model, options| flora_model::load(&device(), model, options))
}

/// The same by another way of loading.
pub(crate) fn load_by(
    name: &str,
    element: Element,
    load: impl FnOnce(&Model, &ServeOptions<'_>) -> Result<DeviceModel, ServeError>,
) -> Served {
    let path = match name {
        "smollm2" => smollm2().expect("the real model is here"),
        tiny => golden(tiny).join("model"),
    };
    let (outputs, adapters) = (golden(name).join("outputs"), golden(name).join("adapters"));
    let files = Files { model: path, outputs, adapters, base: BaseForm::default() };
    load_files(name, &files, element, load)
}

/// Where the parts of a golden model are.
pub(crate) struct Files {
    pub(crate) model: PathBuf,
    pub(crate) outputs: PathBuf,
    pub(crate) adapters: PathBuf,
    /// The form of base weights.
    pub(crate) base: BaseForm,
}

/// Loads a model whose parts are anywhere, activations and adapters in f32.
pub(crate) fn load_model(name: &str, files: &Files) -> Served {
    load_files(name, files, Element::F32, |model, options| flora_model::load(&device(), model, options))
}

/// The same in another type, by another way of loading.
pub(crate) fn load_files(
    name: &str,
    files: &Files,
    element: Element,
    load: impl FnOnce(&Model, &ServeOptions<'_>) -> Result<DeviceModel, ServeError>,
) -> Served {
    let checkpoint = Arc::new(Model::open(&files.model).expect("a golden model"));
    let (activations, adapters) = (element, element);
    let options =
        ServeOptions { base: files.base, activations, adapters, adapter_bytes: 32 << 20, ..ServeOptions::default() };
    let decoder = load(&checkpoint, &options).expect("a decoder of a known family");
    let source = AdapterDirectory::new(Some(&files.adapters), &checkpoint, options.adapters);
    let (layers, width) = match checkpoint.decoder().expect("a decoder") {
        DecoderConfig::Llama(config) => (config.layers, config.feed_forward.max(config.d)),
        DecoderConfig::GptBigCode(config) => (config.layers, config.feed_forward.max(config.d)),
    };
    let steps = (8 * layers + 2) as f32;
    // Sums are in f32 whatever the type: a half type rounds what a step leaves, and is alone in it.
    let variance = if element == Element::F32 { 2.0 * width as f32 } else { 1.0 };
    let rounding = 4.0 * element.rounding() as f32 * (steps * variance).sqrt();
    Served {
        name: name.to_owned(),
        outputs: files.outputs.clone(),
        decoder,
        source: source.expect("built-in layers").over(files.base),
        placed: Vec::new(),
        rounding,
    }
}

impl Served {
    pub(crate) fn step(&mut self, segments: &[StepSegment<'_>]) -> Vec<f32> {
        self.decoder.step(segments).expect("a step of known sequences")
    }

    pub(crate) fn vocabulary(&self) -> usize {
        self.decoder.limits().vocabulary as usize
    }

    /// The adapter of this name, placed on the device when it is first asked for.
    pub(crate) fn adapter(&mut self, name: &str) -> AdapterId {
        let position = self.placed.iter().position(|placed| placed == name).unwrap_or_else(|| {
            let prepared = self.source.prepare(name).expect("a golden adapter").prepared;
            let id = AdapterId(self.placed.len() as u32);
            self.decoder.place(id, prepared).map_err(|error| error.to_string()).expect("there is room");
            self.placed.push(name.to_owned());
            self.placed.len() - 1
        });
        AdapterId(position as u32)
    }
}
