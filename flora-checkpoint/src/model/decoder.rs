//! What a decoder is made of: its sizes and variants, each checked against the tensors that are there.

mod gpt_big_code;
mod llama;
mod rotary;
mod window;

pub use rotary::{Rotary, RotaryFrequencies, RotaryScaling, Yarn};

use super::settings::Settings;
use super::{Model, ModelError, Parameter, Projection};
use std::collections::HashMap;

/// A decoder that can be run, by family.
#[derive(Clone, Debug, PartialEq)]
pub enum DecoderConfig {
    /// Llama, Mistral, Qwen2, Qwen3 and others: rotary positions, RMS norms, grouped queries, SwiGLU.
    Llama(LlamaConfig),
    /// StarCoder and others: learned positions, layer norms, one key-value head, GELU.
    GptBigCode(GptBigCodeConfig),
}

impl DecoderConfig {
    /// The most positions that it was made for.
    pub fn context_length(&self) -> usize {
        match self {
            DecoderConfig::Llama(config) => config.context_length,
            DecoderConfig::GptBigCode(config) => config.context_length,
        }
    }

    /// Numbers of a hidden state: the width of the residual stream.
    pub fn width(&self) -> usize {
        match self {
            DecoderConfig::Llama(config) => config.d,
            DecoderConfig::GptBigCode(config) => config.d,
        }
    }

    /// Rows of the token embedding.
    pub fn vocabulary(&self) -> usize {
        match self {
            DecoderConfig::Llama(config) => config.vocabulary,
            DecoderConfig::GptBigCode(config) => config.vocabulary,
        }
    }
}

/// The sizes of a Llama decoder, or of one whose blocks differ from Llama's in the fields below and in which projections have biases.
/// Every number is at least 1, and the tensors that they imply are in the model.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub d: usize,
    /// Heads of queries, a multiple of `key_value_heads`.
    pub query_heads: usize,
    /// Heads of keys and of values.
    pub key_value_heads: usize,
    /// Width of a head, even.
    pub head_size: usize,
    /// Width between the feed-forward projections.
    pub feed_forward: usize,
    /// How queries and keys turn with their positions.
    pub rotary: Rotary,
    /// Whether every head of queries and keys goes through an RMS norm before it turns: `self_attn.q_norm` and `self_attn.k_norm`.
    pub query_key_norms: bool,
    /// For each block, how many tokens a token attends to, itself and those before it; `None` where it is all.
    pub windows: Vec<Option<usize>>,
    /// ε of the RMS norms.
    pub norm_epsilon: f32,
    /// The most positions that it was made for.
    pub context_length: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Whether the embedding is the output matrix too; otherwise that is `lm_head.weight`.
    pub tied_embedding: bool,
}

/// The sizes of a GPTBigCode decoder with multi-query attention: `c_attn` gives queries of width d, then one key and one value.
/// Every number is at least 1, and the tensors that they imply are in the model.
#[derive(Clone, Debug, PartialEq)]
pub struct GptBigCodeConfig {
    /// Blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub d: usize,
    /// Heads of queries; all share one head of keys and one of values.
    pub heads: usize,
    /// Width of a head: d / heads.
    pub head_size: usize,
    /// Width between the feed-forward projections.
    pub feed_forward: usize,
    /// ε of the layer norms.
    pub norm_epsilon: f32,
    /// Rows of the position embedding.
    pub context_length: usize,
    /// Rows of the token embedding.
    pub vocabulary: usize,
    /// The activation between the feed-forward projections.
    pub activation: Gelu,
    /// Whether the token embedding is the output matrix too; otherwise that is `lm_head.weight`.
    pub tied_embedding: bool,
}

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gelu {
    /// x · Φ(x), by the error function.
    Exact,
    /// x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).
    Tanh,
}

impl Model {
    /// What the model's decoder is made of.
    ///
    /// # Errors
    /// [`ModelError::UnsupportedDecoder`] for another architecture, [`ModelError::Configuration`] for a setting that is missing,
    /// wrong, or would change the result in a way that isn't supported, and the tensor's error where a tensor is missing or has
    /// another shape than the settings imply.
    pub fn decoder(&self) -> Result<DecoderConfig, ModelError> {
        if let Some(family) = llama::Family::of(self) {
            return Ok(DecoderConfig::Llama(llama::read(self, family)?));
        }
        match (&*self.settings, self.architecture()) {
            (Settings::Gguf { .. }, gpt_big_code::GGUF) | (Settings::Config { .. }, gpt_big_code::HUGGING_FACE) => {
                Ok(DecoderConfig::GptBigCode(gpt_big_code::read(self)?))
            }
            _ => Err(ModelError::UnsupportedDecoder {
                model: self.name().to_string(),
                architecture: self.architecture().to_string(),
            }),
        }
    }
}

/// The architectures of `config.json` that have decoders, for messages.
pub(super) fn architectures() -> String {
    let names = llama::FAMILIES.iter().map(|family| family.hugging_face).chain([gpt_big_code::HUGGING_FACE]);
    names.collect::<Vec<_>>().join(", ")
}

/// The tensors of a model, to be held against what its settings say.
struct Parts<'a> {
    model: &'a Model,
    projections: HashMap<&'a str, &'a Projection>,
}

impl<'a> Parts<'a> {
    fn of(model: &'a Model) -> Self {
        let by_path = |projection: &'a Projection| (&projection.path[..], projection);
        Self { model, projections: model.projections().iter().map(by_path).collect() }
    }

    /// Refuses a model without the projection `path`, with other sizes than `[d, k]`, or with a bias where `bias` says none or
    /// the other way round.
    fn projection(&self, path: &str, d: usize, k: usize, bias: Option<bool>) -> Result<(), ModelError> {
        let Some(projection) = self.projections.get(path) else { return self.model.projection(path).map(|_| ()) };
        let weight = &projection.source.weight;
        if (projection.d, projection.k) != (d, k) {
            let problem = weight.tensor()?.wrong_shape(format!("a layer of {d} inputs and {k} outputs"));
            return Err(weight.error(problem).into());
        }
        match bias {
            Some(true) if !projection.has_bias => Err(self.model.unknown_parameter(&format!("{path}.bias"))),
            Some(false) if projection.has_bias => Err(self
                .model
                .settings
                .error(&format!("{path}.bias"), "is there, though the settings say there is none")),
            _ => Ok(()),
        }
    }

    /// Refuses projections of which some have a bias and others have none.
    fn all_or_no_biases(&self, paths: &[String]) -> Result<(), ModelError> {
        let has_bias = |path: &&String| self.projections.get(&path[..]).is_some_and(|projection| projection.has_bias);
        match (paths.iter().find(has_bias), paths.iter().find(|path| !has_bias(path))) {
            (Some(_), Some(without)) => Err(self.model.unknown_parameter(&format!("{without}.bias"))),
            _ => Ok(()),
        }
    }

    /// The parameter `path`, of the shape `shape`.
    fn parameter(&self, path: &str, shape: &[usize], why: &str) -> Result<Parameter, ModelError> {
        let parameter = self.model.parameter(path)?;
        parameter.must_be(shape, why)?;
        Ok(parameter)
    }

    /// Checks the output matrix `[vocabulary, d]` beside `embedding`, which `tied` says it is the same as.
    fn output(&self, embedding: &Parameter, tied: bool) -> Result<(), ModelError> {
        const PATH: &str = "lm_head.weight";
        if !tied {
            return self.parameter(PATH, embedding.shape(), "as the embedding").map(|_| ());
        }
        let Some(output) = self.model.parameters.get(PATH).map(Parameter::new).transpose()? else { return Ok(()) };
        let same_type = (output.shape(), output.encoding()) == (embedding.shape(), embedding.encoding());
        if same_type && output.stored().bytes() == embedding.stored().bytes() {
            return Ok(());
        }
        // Loaders disagree on which of two different ones is meant.
        let problem = "is there and is not the embedding, though `tie_word_embeddings` says so";
        Err(self.model.settings.error(PATH, problem))
    }
}
