//! Adapters and models that are made up from a seed: as large as real ones, and near enough to the base model for every number to
//! stay finite.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use flora::prelude::*;
use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, AdapterModule, Model, Projection};
use flora_engine::{AdapterFacts, AdapterFailure, AdapterSource, Read, Unread};
use flora_model::PreparedAdapter;
use half::bf16;
use safetensors::{Dtype, SafeTensorError, View};
use serde_json::json;

use crate::commands::run::samples::{Random, made_up};
use crate::models::is_target;

/// Adapters that are made when they are asked for: `lora-0`, `lora-1`, …
pub(crate) struct SeededAdapters {
    pub(crate) model: Arc<Model>,
    pub(crate) layers: Layers,
    /// The last parts of the paths that they adapt.
    pub(crate) adapted: Vec<String>,
    /// The built-in layer of all modules; `None` for no adapters.
    pub(crate) layer: Option<&'static str>,
    pub(crate) rank: usize,
    pub(crate) element: Element,
    pub(crate) seed: u64,
}

impl SeededAdapters {
    /// The name of the adapter of request `number`.
    pub(crate) fn name(number: usize) -> String {
        format!("adapter-{number}")
    }

    fn module(&self, name: &str, path: &str, d: usize, k: usize) -> Option<AdapterModule> {
        let layer = self.layer?;
        let mut random = Random::new(self.seed, &["serving", name, path]);
        Some(made_up(&mut random, (layer, self.rank, 2.0), d, k))
    }
}

impl AdapterSource for SeededAdapters {
    type Prepared = PreparedAdapter;

    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn version(&self, _name: &str) -> Result<u64, AdapterFailure> {
        Ok(self.seed)
    }

    fn prepare(&self, name: &str) -> Result<Read<PreparedAdapter>, Unread> {
        let kind = self.layer.and_then(|layer| self.layers.kinds().kind_of_layer(layer));
        let Some(kind) = kind else { return Err(AdapterFailure::Unknown(name.to_owned()).into()) };
        let adapts = |projection: &&Projection| self.adapted.iter().any(|name| is_target(&projection.path, name));
        let adapted = self.model.projections().iter().filter(adapts);
        let modules = adapted.filter_map(|projection| {
            let module = self.module(name, &projection.path, projection.d, projection.k)?;
            Some((projection.path.clone(), module))
        });
        let folder = AdapterFolder::new(name, kind, modules.collect());
        let folded = self.layers.prepare(&folder, &self.model);
        let folded =
            folded.map_err(|error| AdapterFailure::Unusable { name: name.to_owned(), reason: error.to_string() })?;
        let prepared = PreparedAdapter::new(name.to_owned(), folded, self.element);
        Ok(Read { version: self.seed, prepared })
    }

    fn facts(prepared: &PreparedAdapter) -> AdapterFacts {
        prepared.facts()
    }
}

/// The sizes of a GPTBigCode decoder.
#[derive(Clone, Copy, Debug)]
pub(super) struct StarCoder {
    pub(super) name: &'static str,
    d: usize,
    layers: usize,
    feed_forward: usize,
}

/// The models of the paper's serving experiment (§4.1).
pub(super) const STARCODERS: [StarCoder; 3] = [
    StarCoder { name: "starcoder-1b", d: 2048, layers: 24, feed_forward: 8192 },
    StarCoder { name: "starcoder-3b", d: 2816, layers: 36, feed_forward: 11264 },
    StarCoder { name: "starcoder-15b", d: 6144, layers: 40, feed_forward: 24576 },
];

const HEAD: usize = 128;
const VOCABULARY: usize = 49_152;
const POSITIONS: usize = 2048;

/// A tensor whose numbers are made when they are written.
struct Seeded {
    shape: Vec<usize>,
    centre: f32,
    half_width: f32,
    seed: u64,
    name: String,
}

impl View for Seeded {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let count = self.shape.iter().product();
        let values = Random::new(self.seed, &["weight", &self.name]).around(self.centre, self.half_width, count);
        let bytes = values.into_iter().flat_map(|value| bf16::from_f32(value).to_le_bytes());
        Cow::Owned(bytes.collect())
    }

    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

/// Writes a model of StarCoder's shapes with random weights, bf16, as a Hugging Face folder.
pub(super) fn write(model: &StarCoder, folder: &Path, seed: u64) -> Result<(), SafeTensorError> {
    let &StarCoder { d, layers, feed_forward, .. } = model;
    let config = json!({
        "architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", "n_embd": d, "n_head": d / HEAD,
        "n_layer": layers, "n_inner": feed_forward, "n_positions": POSITIONS, "vocab_size": VOCABULARY,
        "multi_query": true, "activation_function": "gelu_pytorch_tanh", "tie_word_embeddings": true,
    });
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let mut tensors = Vec::new();
    let mut tensor = |name: String, shape: Vec<usize>, centre: f32, half_width: f32| {
        tensors.push((name.clone(), Seeded { shape, centre, half_width, seed, name }));
    };
    tensor("transformer.wte.weight".to_owned(), vec![VOCABULARY, d], 0.0, 0.05);
    tensor("transformer.wpe.weight".to_owned(), vec![POSITIONS, d], 0.0, 0.05);
    for layer in 0..layers {
        let path = |name: &str| format!("transformer.h.{layer}.{name}");
        let projections = [
            ("attn.c_attn", d, d + 2 * HEAD),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, feed_forward),
            ("mlp.c_proj", feed_forward, d),
        ];
        for (name, inputs, outputs) in projections {
            // A product of such weights with inputs of variance 1 has variance 1.
            let half_width = (3.0 / inputs as f32).sqrt();
            tensor(path(&format!("{name}.weight")), vec![outputs, inputs], 0.0, half_width);
            tensor(path(&format!("{name}.bias")), vec![outputs], 0.0, 0.05);
        }
        for name in ["ln_1", "ln_2"] {
            tensor(path(&format!("{name}.weight")), vec![d], 1.0, 0.1);
            tensor(path(&format!("{name}.bias")), vec![d], 0.0, 0.05);
        }
    }
    tensor("transformer.ln_f.weight".to_owned(), vec![d], 1.0, 0.1);
    tensor("transformer.ln_f.bias".to_owned(), vec![d], 0.0, 0.05);
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors"))
}
