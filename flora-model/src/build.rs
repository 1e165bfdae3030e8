//! From a model's files to a decoder's blocks: the one place that knows how each family names its parts.

use std::collections::BTreeMap;

use flora_checkpoint::model::{DecoderConfig, Gelu, GptBigCodeConfig, LlamaConfig, Parameter};
use flora_checkpoint::{DecoderEnds, Model};
use flora_host::decoder::{Heads, RotaryFrequencies};
use flora_ir::Activation;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Device, PlannedProjection};

use crate::block::{Block, FeedForward, InputProjections};
use crate::embedding::Embedding;
use crate::error::ServeError;
use crate::form::{Finish, ProjectionForm};
use crate::operations::{AttentionConfig, Linear, NormParameters, Operations};
use crate::options::ServeOptions;

/// The module path of the output matrix.
pub(crate) const OUTPUT: &str = "lm_head";

/// A decoder's parts.
pub(crate) struct Parts<O: Operations> {
    pub(crate) operations: O,
    pub(crate) embedding: Embedding,
    pub(crate) blocks: Vec<Block<O>>,
    pub(crate) norm: O::Norm,
    /// d to the vocabulary.
    pub(crate) output: O::Linear,
    pub(crate) context_length: usize,
    pub(crate) vocabulary: usize,
    /// How projections are made.
    pub(crate) form: ProjectionForm,
    /// The modules that adapters may adapt.
    pub(crate) adaptable: Adaptable,
    /// The projections that adapters may adapt, by module path; the output matrix among them.
    pub(crate) adapted: BTreeMap<String, PlannedProjection>,
    /// The paths of the blocks' projections as transformers' model has its modules, one after the other.
    pub(crate) order: Vec<String>,
}

/// The last parts of the paths of modules that may be adapted.
#[derive(Clone, Debug)]
pub(crate) enum Adaptable {
    All,
    Only(Vec<String>),
}

impl Adaptable {
    pub(crate) fn has(&self, path: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.iter().any(|name| last(path) == name),
        }
    }
}

impl std::fmt::Display for Adaptable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("every module"),
            Self::Only(names) => f.write_str(&names.join(", ")),
        }
    }
}

/// The last part of a path.
fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Makes the parts of one model.
struct Builder<'a, O> {
    form: ProjectionForm,
    operations: O,
    model: &'a Model,
    adaptable: Adaptable,
    projections: BTreeMap<String, PlannedProjection>,
    order: Vec<String>,
}

pub(crate) fn build<O: Operations>(
    device: &Device,
    model: &Model,
    options: &ServeOptions<'_>,
) -> Result<Parts<O>, ServeError> {
    let config = model.decoder()?;
    let adaptable = adaptable(model, &options.adapted)?;
    let operations = O::new(device, attention(&config, options), options.activations)?;
    let form = ProjectionForm::new(device, options);
    let builder = Builder { form, operations, model, adaptable, projections: BTreeMap::new(), order: Vec::new() };
    match config {
        DecoderConfig::Llama(config) => builder.llama(&config),
        DecoderConfig::GptBigCode(config) => builder.gpt_big_code(&config),
    }
}

fn attention(config: &DecoderConfig, options: &ServeOptions<'_>) -> AttentionConfig {
    let (heads, rotary) = match config {
        DecoderConfig::Llama(config) => (
            Heads { queries: config.query_heads, keys: config.key_value_heads, size: config.head_size },
            Some(config.rotary.frequencies(config.head_size)),
        ),
        DecoderConfig::GptBigCode(config) => (Heads { queries: config.heads, keys: 1, size: config.head_size }, None),
    };
    let rotary = rotary.map(|rotary| RotaryFrequencies::new(rotary.frequencies, rotary.attention_factor));
    AttentionConfig { heads, rotary, cache_tokens: options.cache_tokens }
}

/// The modules that may be adapted: those that are wanted, all where none is named.
pub(crate) fn adaptable(model: &Model, wanted: &[String]) -> Result<Adaptable, ServeError> {
    if wanted.is_empty() {
        return Ok(Adaptable::All);
    }
    let ends = DecoderEnds::of(model);
    let ends = ends.iter().flat_map(|ends| [ends.embedding.as_str(), ends.head]);
    let projections = model.projections().iter().map(|projection| projection.path.as_str());
    let mut known: Vec<_> = projections.chain(ends).map(last).collect();
    known.sort_unstable();
    known.dedup();
    if let Some(name) = wanted.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(ServeError::UnknownModule { name: name.clone(), known: known.join(", ") });
    }
    Ok(Adaptable::Only(wanted.to_vec()))
}

/// The projections that the paper adapts (§4.1): queries and keys.
pub fn adapted_in_the_paper(config: &DecoderConfig) -> Vec<String> {
    let names: &[&str] = match config {
        DecoderConfig::Llama(_) => &["q_proj", "k_proj"],
        // Queries, keys and values are one projection.
        DecoderConfig::GptBigCode(_) => &["c_attn"],
    };
    names.iter().map(|name| (*name).to_owned()).collect()
}

impl<O: Operations> Builder<'_, O> {
    /// Llama, and the families that differ from it in fields.
    fn llama(mut self, config: &LlamaConfig) -> Result<Parts<O>, ServeError> {
        let epsilon = config.norm_epsilon;
        let gated = Finish::Activation(Activation::Silu);
        // First, as the largest: what packing it takes is given back before the others come.
        let tokens = self.model.parameter("model.embed_tokens.weight")?;
        let output = self.output(config.tied_embedding, &tokens)?;
        let mut blocks = Vec::with_capacity(config.layers);
        for (layer, window) in config.windows.iter().enumerate() {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            let norms = match config.query_key_norms {
                true => Some([
                    self.rms_norm(&path("self_attn.q_norm"), epsilon)?,
                    self.rms_norm(&path("self_attn.k_norm"), epsilon)?,
                ]),
                false => None,
            };
            blocks.push(Block {
                attention_norm: self.rms_norm(&path("input_layernorm"), epsilon)?,
                inputs: InputProjections::Separate {
                    queries: self.linear(&path("self_attn.q_proj"), Finish::Nothing)?,
                    keys: self.linear(&path("self_attn.k_proj"), Finish::Nothing)?,
                    values: self.linear(&path("self_attn.v_proj"), Finish::Nothing)?,
                    norms,
                },
                window: *window,
                attention_output: self.linear(&path("self_attn.o_proj"), Finish::Residual)?,
                feed_forward_norm: self.rms_norm(&path("post_attention_layernorm"), epsilon)?,
                feed_forward: FeedForward::Gated {
                    gate: self.linear(&path("mlp.gate_proj"), gated)?,
                    up: self.linear(&path("mlp.up_proj"), Finish::Nothing)?,
                    down: self.linear(&path("mlp.down_proj"), Finish::Residual)?,
                },
            });
        }
        Ok(Parts {
            blocks,
            norm: self.rms_norm("model.norm", epsilon)?,
            output,
            embedding: Embedding { tokens, positions: None },
            context_length: config.context_length,
            vocabulary: config.vocabulary,
            form: self.form,
            adaptable: self.adaptable,
            adapted: self.projections,
            order: self.order,
            operations: self.operations,
        })
    }

    fn gpt_big_code(mut self, config: &GptBigCodeConfig) -> Result<Parts<O>, ServeError> {
        let epsilon = config.norm_epsilon;
        let activation = match config.activation {
            Gelu::Exact => Activation::GeluErf,
            Gelu::Tanh => Activation::GeluTanh,
        };
        // First, as the largest: what packing it takes is given back before the others come.
        let tokens = self.model.parameter("transformer.wte.weight")?;
        let output = self.output(config.tied_embedding, &tokens)?;
        let mut blocks = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let path = |name: &str| format!("transformer.h.{layer}.{name}");
            blocks.push(Block {
                attention_norm: self.layer_norm(&path("ln_1"), epsilon)?,
                inputs: InputProjections::Joined(self.linear(&path("attn.c_attn"), Finish::Nothing)?),
                window: None,
                attention_output: self.linear(&path("attn.c_proj"), Finish::Residual)?,
                feed_forward_norm: self.layer_norm(&path("ln_2"), epsilon)?,
                feed_forward: FeedForward::Plain {
                    up: self.linear(&path("mlp.c_fc"), Finish::Activation(activation))?,
                    down: self.linear(&path("mlp.c_proj"), Finish::Residual)?,
                },
            });
        }
        Ok(Parts {
            blocks,
            norm: self.layer_norm("transformer.ln_f", epsilon)?,
            output,
            embedding: Embedding { tokens, positions: Some(self.model.parameter("transformer.wpe.weight")?) },
            context_length: config.context_length,
            vocabulary: config.vocabulary,
            form: self.form,
            adaptable: self.adaptable,
            adapted: self.projections,
            order: self.order,
            operations: self.operations,
        })
    }

    /// The projection at `path`.
    fn linear(&mut self, path: &str, finish: Finish) -> Result<O::Linear, ServeError> {
        let weight = self.form.base.pack(self.model, path, &self.form.device)?;
        let bias = self.model.bias(path)?;
        self.order.push(path.to_owned());
        self.adaptable(path, &weight, bias.as_deref(), finish)
    }

    /// A projection that adapters adapt, where they may.
    fn adaptable(
        &mut self,
        path: &str,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        finish: Finish,
    ) -> Result<O::Linear, ServeError> {
        let linear = O::Linear::of(&self.form, path, weight, bias, finish)?;
        if self.adaptable.has(path) {
            self.projections.insert(path.to_owned(), linear.projection().clone());
        }
        Ok(linear)
    }

    /// The output matrix, which makes logits.
    fn output(&mut self, tied: bool, tokens: &Parameter) -> Result<O::Linear, ServeError> {
        let own;
        let matrix = if tied {
            tokens
        } else {
            own = self.model.parameter("lm_head.weight")?;
            &own
        };
        let weight = self.form.base.pack_rows("the output matrix", matrix.stored(), &self.form.device)?;
        self.adaptable(OUTPUT, &weight, None, Finish::Nothing)
    }

    fn rms_norm(&self, path: &str, epsilon: f32) -> Result<O::Norm, ServeError> {
        let gamma = self.vector(&format!("{path}.weight"))?;
        self.operations.norm(NormParameters { gamma, beta: None, epsilon })
    }

    fn layer_norm(&self, path: &str, epsilon: f32) -> Result<O::Norm, ServeError> {
        let gamma = self.vector(&format!("{path}.weight"))?;
        let beta = Some(self.vector(&format!("{path}.bias"))?);
        self.operations.norm(NormParameters { gamma, beta, epsilon })
    }

    fn vector(&self, path: &str) -> Result<Vec<f32>, ServeError> {
        Ok(self.model.parameter(path)?.to_f32()?)
    }
}
