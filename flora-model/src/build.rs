//! From a model's files to a decoder's blocks: the one place that knows how each family names its parts.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Param;
use burn::nn::{LayerNorm, LayerNormConfig, RmsNorm, RmsNormConfig};
use flora_burn::{AdaptedLinear, BurnDevice, FloraBackend, Planning};
use flora_checkpoint::Model;
use flora_checkpoint::model::{DecoderConfig, Gelu, GptBigCodeConfig, LlamaConfig, Parameter};
use flora_ir::Activation;
use flora_plan::cost::{LayerPrices, PricedLayer};
use flora_plan::layer::LayerFormat;
use flora_plan::weight::PackedWeight;
use flora_runtime::ProjectionOptions;

use crate::attention::Heads;
use crate::block::{AttentionInputs, Block, FeedForward, Norm};
use crate::embedding::Embedding;
use crate::error::ServeError;
use crate::options::{PlanningChoice, ServeOptions};
use crate::rotary::RotaryTable;

/// A decoder's parts.
pub(crate) struct Parts<B: FloraBackend> {
    pub(crate) embedding: Embedding,
    pub(crate) rotary: Option<RotaryTable<B>>,
    pub(crate) blocks: Vec<Block<B>>,
    pub(crate) norm: Norm<B>,
    /// d to the vocabulary.
    pub(crate) output: AdaptedLinear<B>,
    pub(crate) heads: Heads,
    pub(crate) context_length: usize,
    pub(crate) vocabulary: usize,
    /// The projections that adapters may adapt, by module path.
    pub(crate) adapted: BTreeMap<String, AdaptedLinear<B>>,
}

/// What follows a projection's product.
#[derive(Clone, Copy, Debug, Default)]
struct Finish {
    activation: Activation,
    residual: bool,
}

const ADDED: Finish = Finish { activation: Activation::Identity, residual: true };

/// Makes the parts of one model.
struct Builder<'a, B: FloraBackend> {
    target: &'a BurnDevice<B>,
    model: &'a Model,
    options: &'a ServeOptions<'a>,
    adapted: Vec<String>,
    projections: BTreeMap<String, AdaptedLinear<B>>,
}

pub(crate) fn build<B: FloraBackend>(
    target: &BurnDevice<B>,
    model: &Arc<Model>,
    options: &ServeOptions<'_>,
) -> Result<Parts<B>, ServeError> {
    let config = model.decoder()?;
    let adapted = adapted_modules(model, &config, &options.adapted)?;
    let builder = Builder { target, model, options, adapted, projections: BTreeMap::new() };
    match config {
        DecoderConfig::Llama(config) => builder.llama(&config),
        DecoderConfig::GptBigCode(config) => builder.gpt_big_code(&config),
    }
}

/// The last parts of the paths that may be adapted.
fn adapted_modules(model: &Model, config: &DecoderConfig, wanted: &[String]) -> Result<Vec<String>, ServeError> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let mut known: Vec<_> = model.projections().iter().map(|projection| last(&projection.path)).collect();
    known.sort_unstable();
    known.dedup();
    if let Some(name) = wanted.iter().find(|name| !known.contains(name)) {
        return Err(ServeError::UnknownModule { name: name.clone(), known: known.join(", ") });
    }
    Ok(if wanted.is_empty() { adapted_by_default(config) } else { wanted.to_vec() })
}

/// The projections that the paper adapts (§4.1): queries and keys.
pub fn adapted_by_default(config: &DecoderConfig) -> Vec<String> {
    let names: &[&str] = match config {
        DecoderConfig::Llama(_) => &["q_proj", "k_proj"],
        // Queries, keys and values are one projection.
        DecoderConfig::GptBigCode(_) => &["c_attn"],
    };
    names.iter().map(|name| (*name).to_owned()).collect()
}

impl<B: FloraBackend> Builder<'_, B> {
    fn llama(mut self, config: &LlamaConfig) -> Result<Parts<B>, ServeError> {
        let heads = Heads { queries: config.query_heads, keys: config.key_value_heads, size: config.head_size };
        let epsilon = f64::from(config.norm_epsilon);
        let gated = Finish { activation: Activation::Silu, residual: false };
        let mut blocks = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let path = |name: &str| format!("model.layers.{layer}.{name}");
            blocks.push(Block {
                attention_norm: self.rms_norm(&path("input_layernorm"), epsilon)?,
                inputs: AttentionInputs::Separate {
                    queries: self.linear(&path("self_attn.q_proj"), Finish::default())?,
                    keys: self.linear(&path("self_attn.k_proj"), Finish::default())?,
                    values: self.linear(&path("self_attn.v_proj"), Finish::default())?,
                },
                attention_output: self.linear(&path("self_attn.o_proj"), ADDED)?,
                feed_forward_norm: self.rms_norm(&path("post_attention_layernorm"), epsilon)?,
                feed_forward: FeedForward::Gated {
                    gate: self.linear(&path("mlp.gate_proj"), gated)?,
                    up: self.linear(&path("mlp.up_proj"), Finish::default())?,
                    down: self.linear(&path("mlp.down_proj"), ADDED)?,
                },
            });
        }
        let (element, target) = (self.options.activations, self.target);
        let base = f64::from(config.rope_base);
        let tokens = self.model.parameter("model.embed_tokens.weight")?;
        Ok(Parts {
            rotary: Some(RotaryTable::new(target, config.context_length, config.head_size, base, element)?),
            blocks,
            norm: self.rms_norm("model.norm", epsilon)?,
            output: self.output(config.tied_embedding, &tokens)?,
            embedding: Embedding { tokens, positions: None },
            heads,
            context_length: config.context_length,
            vocabulary: config.vocabulary,
            adapted: self.projections,
        })
    }

    fn gpt_big_code(mut self, config: &GptBigCodeConfig) -> Result<Parts<B>, ServeError> {
        let heads = Heads { queries: config.heads, keys: 1, size: config.head_size };
        let epsilon = f64::from(config.norm_epsilon);
        let activation = match config.activation {
            Gelu::Exact => Activation::GeluErf,
            Gelu::Tanh => Activation::GeluTanh,
        };
        let mut blocks = Vec::with_capacity(config.layers);
        for layer in 0..config.layers {
            let path = |name: &str| format!("transformer.h.{layer}.{name}");
            blocks.push(Block {
                attention_norm: self.layer_norm(&path("ln_1"), epsilon)?,
                inputs: AttentionInputs::Joined(self.linear(&path("attn.c_attn"), Finish::default())?),
                attention_output: self.linear(&path("attn.c_proj"), ADDED)?,
                feed_forward_norm: self.layer_norm(&path("ln_2"), epsilon)?,
                feed_forward: FeedForward::Plain {
                    up: self.linear(&path("mlp.c_fc"), Finish { activation, residual: false })?,
                    down: self.linear(&path("mlp.c_proj"), ADDED)?,
                },
            });
        }
        let tokens = self.model.parameter("transformer.wte.weight")?;
        Ok(Parts {
            rotary: None,
            blocks,
            norm: self.layer_norm("transformer.ln_f", epsilon)?,
            output: self.output(config.tied_embedding, &tokens)?,
            embedding: Embedding { tokens, positions: Some(self.model.parameter("transformer.wpe.weight")?) },
            heads,
            context_length: config.context_length,
            vocabulary: config.vocabulary,
            adapted: self.projections,
        })
    }

    /// The projection at `path`.
    fn linear(&mut self, path: &str, finish: Finish) -> Result<AdaptedLinear<B>, ServeError> {
        let weight = self.options.base.pack(self.model, path, &self.target.flora)?;
        let bias = self.model.bias(path)?;
        let linear = self.packed(&weight, bias.as_deref(), finish)?;
        if self.adapted.iter().any(|name| path.rsplit('.').next() == Some(name)) {
            self.projections.insert(path.to_owned(), linear.clone());
        }
        Ok(linear)
    }

    fn packed(
        &self,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        Finish { activation, residual }: Finish,
    ) -> Result<AdaptedLinear<B>, ServeError> {
        let (activations, adapters) = (self.options.activations, self.options.adapters);
        let options = ProjectionOptions { bias, activation, residual, activations, adapters, fragments: true };
        let planning = match self.options.planning {
            PlanningChoice::Fixed(plan) => Planning::Fixed(plan),
            PlanningChoice::Priced(coefficients) => {
                let format = LayerFormat { activations, adapters, weight: weight.format(), fragments: true };
                let layer = PricedLayer { shape: weight.shape(), format };
                Planning::Priced(Box::new(LayerPrices::new(coefficients, layer)))
            }
        };
        Ok(AdaptedLinear::new(self.target, weight, options, planning)?)
    }

    /// The output matrix, which makes logits.
    fn output(&self, tied: bool, tokens: &Parameter) -> Result<AdaptedLinear<B>, ServeError> {
        let own;
        let matrix = if tied {
            tokens
        } else {
            own = self.model.parameter("lm_head.weight")?;
            &own
        };
        let weight = self.options.base.pack_rows("the output matrix", matrix.stored(), &self.target.flora)?;
        self.packed(&weight, None, Finish::default())
    }

    fn rms_norm(&self, path: &str, epsilon: f64) -> Result<Norm<B>, ServeError> {
        let gamma = self.vector(&format!("{path}.weight"))?;
        let config = RmsNormConfig::new(gamma.len()).with_epsilon(epsilon);
        let norm = RmsNorm { gamma: self.parameter(&gamma)?, ..config.init(&self.target.burn) };
        Ok(Norm::Rms(norm))
    }

    fn layer_norm(&self, path: &str, epsilon: f64) -> Result<Norm<B>, ServeError> {
        let gamma = self.vector(&format!("{path}.weight"))?;
        let beta = self.vector(&format!("{path}.bias"))?;
        let mut norm: LayerNorm<B> = LayerNormConfig::new(gamma.len()).with_epsilon(epsilon).init(&self.target.burn);
        norm.gamma = self.parameter(&gamma)?;
        norm.beta = Some(self.parameter(&beta)?);
        Ok(Norm::Layer(norm))
    }

    fn vector(&self, path: &str) -> Result<Vec<f32>, ServeError> {
        Ok(self.model.parameter(path)?.to_f32()?)
    }

    fn parameter(&self, values: &[f32]) -> Result<Param<burn::tensor::Tensor<B, 1>>, ServeError> {
        Ok(Param::from_tensor(self.target.upload(values, [values.len()], self.options.activations)?))
    }
}
