//! The settings of a Llama decoder, under GGUF's names and under Hugging Face's.

use super::{LlamaConfig, Parts};
use crate::model::settings::Settings;
use crate::model::{Model, ModelError};

/// The architecture that `config.json` names.
pub(super) const HUGGING_FACE: &str = "LlamaForCausalLM";

/// The names that a file has for what both kinds of files say.
struct Names {
    layers: &'static str,
    d: &'static str,
    query_heads: &'static str,
    key_value_heads: &'static str,
    head_size: &'static str,
    feed_forward: &'static str,
    rope_base: &'static str,
    norm_epsilon: &'static str,
    context_length: &'static str,
    vocabulary: &'static str,
}

const GGUF: Names = Names {
    layers: "llama.block_count",
    d: "llama.embedding_length",
    query_heads: "llama.attention.head_count",
    key_value_heads: "llama.attention.head_count_kv",
    head_size: "llama.attention.key_length",
    feed_forward: "llama.feed_forward_length",
    rope_base: "llama.rope.freq_base",
    norm_epsilon: "llama.attention.layer_norm_rms_epsilon",
    context_length: "llama.context_length",
    vocabulary: "llama.vocab_size",
};

const CONFIG: Names = Names {
    layers: "num_hidden_layers",
    d: "hidden_size",
    query_heads: "num_attention_heads",
    key_value_heads: "num_key_value_heads",
    head_size: "head_dim",
    feed_forward: "intermediate_size",
    rope_base: "rope_theta",
    norm_epsilon: "rms_norm_eps",
    context_length: "max_position_embeddings",
    vocabulary: "vocab_size",
};

/// θ where none is given, in both formats.
const DEFAULT_ROPE_BASE: f32 = 10_000.0;

pub(super) fn read(model: &Model) -> Result<LlamaConfig, ModelError> {
    let settings = &*model.settings;
    let (names, tied_embedding, biases) = match settings {
        Settings::Gguf(gguf) => {
            refuse_gguf_variants(settings)?;
            if gguf.tensors().entries().contains_key("rope_freqs.weight") {
                return Err(settings.error("rope_freqs.weight", NO_SCALING));
            }
            (&GGUF, !model.parameters.contains_key("lm_head.weight"), Biases::default())
        }
        Settings::Config { .. } => {
            refuse_config_variants(settings)?;
            let flag = |key| Ok::<_, ModelError>(settings.optional_flag(key)?.unwrap_or(false));
            let biases = Biases { attention: Some(flag("attention_bias")?), feed_forward: Some(flag("mlp_bias")?) };
            (&CONFIG, flag("tie_word_embeddings")?, biases)
        }
    };
    let d = settings.count(names.d)?;
    let (query_heads, key_value_heads, head_size) = heads(settings, names, d)?;
    // Newer versions of `transformers` write θ among `rope_parameters`.
    let rope_base = match settings.optional_positive("rope_parameters.rope_theta")? {
        None => settings.optional_positive(names.rope_base)?,
        base => base,
    };
    let vocabulary = match settings.optional_count(names.vocabulary)? {
        Some(vocabulary) => vocabulary,
        None => model.parameter("model.embed_tokens.weight")?.shape().first().copied().unwrap_or(0),
    };
    let missing = || settings.error(names.norm_epsilon, "is missing");
    let config = LlamaConfig {
        layers: settings.count(names.layers)?,
        d,
        query_heads,
        key_value_heads,
        head_size,
        feed_forward: settings.count(names.feed_forward)?,
        rope_base: rope_base.unwrap_or(DEFAULT_ROPE_BASE),
        norm_epsilon: settings.optional_positive(names.norm_epsilon)?.ok_or_else(missing)?,
        context_length: settings.count(names.context_length)?,
        vocabulary,
        tied_embedding,
    };
    check_tensors(model, &config, names, biases)?;
    Ok(config)
}

/// Heads of queries, heads of keys and values, and the size of one.
fn heads(settings: &Settings, names: &Names, d: usize) -> Result<(usize, usize, usize), ModelError> {
    let query_heads = settings.count(names.query_heads)?;
    let key_value_heads = settings.optional_count(names.key_value_heads)?.unwrap_or(query_heads);
    if !query_heads.is_multiple_of(key_value_heads) {
        let problem = format!("is {key_value_heads}, which does not divide the {query_heads} heads of queries");
        return Err(settings.error(names.key_value_heads, problem));
    }
    let head_size = match settings.optional_count(names.head_size)? {
        Some(head_size) => head_size,
        None if d.is_multiple_of(query_heads) => d / query_heads,
        None => {
            let problem = format!("is {query_heads}, which does not divide the width {d}");
            return Err(settings.error(names.query_heads, problem));
        }
    };
    if !head_size.is_multiple_of(2) {
        let problem = format!("makes heads of {head_size}; rotary positions need an even number");
        return Err(settings.error(names.query_heads, problem));
    }
    for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
        if settings.optional_count(key)?.is_some_and(|found| found != head_size) {
            return Err(settings.error(key, format!("must be the size of a head, {head_size}")));
        }
    }
    Ok((query_heads, key_value_heads, head_size))
}

/// Whether layers have biases, where the settings say.
#[derive(Clone, Copy, Default)]
struct Biases {
    attention: Option<bool>,
    feed_forward: Option<bool>,
}

/// Holds every tensor against the sizes in `config`.
fn check_tensors(model: &Model, config: &LlamaConfig, names: &Names, biases: Biases) -> Result<(), ModelError> {
    let LlamaConfig { layers, d, head_size, feed_forward, vocabulary, .. } = *config;
    let width = |heads: usize| {
        let too_wide = || model.settings.error(names.query_heads, format!("of {head_size} make too wide a layer"));
        heads.checked_mul(head_size).ok_or_else(too_wide)
    };
    let (queries, keys) = (width(config.query_heads)?, width(config.key_value_heads)?);
    let parts = Parts::of(model);
    let embedding = parts.parameter("model.embed_tokens.weight", &[vocabulary, d], "vocabulary, width")?;
    parts.output(&embedding, config.tied_embedding)?;
    parts.parameter("model.norm.weight", &[d], "the width")?;
    for layer in 0..layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            parts.parameter(&format!("model.layers.{layer}.{norm}.weight"), &[d], "the width")?;
        }
        for (module, inputs, outputs, bias) in [
            ("self_attn.q_proj", d, queries, biases.attention),
            ("self_attn.k_proj", d, keys, biases.attention),
            ("self_attn.v_proj", d, keys, biases.attention),
            ("self_attn.o_proj", queries, d, biases.attention),
            ("mlp.gate_proj", d, feed_forward, biases.feed_forward),
            ("mlp.up_proj", d, feed_forward, biases.feed_forward),
            ("mlp.down_proj", feed_forward, d, biases.feed_forward),
        ] {
            parts.projection(&format!("model.layers.{layer}.{module}"), inputs, outputs, bias)?;
        }
    }
    Ok(())
}

const NO_SCALING: &str = "scales the rotary positions, which is not supported; use the model without it";

/// Refuses what a GGUF file may say that would change the result.
fn refuse_gguf_variants(settings: &Settings) -> Result<(), ModelError> {
    let scaling = "llama.rope.scaling.type";
    if settings.optional_text(scaling)?.is_some_and(|kind| kind != "none") {
        return Err(settings.error(scaling, NO_SCALING));
    }
    for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"] {
        if settings.optional_positive(key)?.is_some_and(|factor| factor != 1.0) {
            return Err(settings.error(key, NO_SCALING));
        }
    }
    if settings.optional_whole("llama.expert_count")?.is_some_and(|experts| experts != 0) {
        return Err(settings.error("llama.expert_count", "says a mixture of experts, which is not supported"));
    }
    Ok(())
}

/// Refuses what a config may say that would change the result.
fn refuse_config_variants(settings: &Settings) -> Result<(), ModelError> {
    let activation = settings.optional_text("hidden_act")?.unwrap_or("silu");
    if !["silu", "swish"].contains(&activation) {
        return Err(settings.error("hidden_act", format!("is `{activation}`; only `silu` is supported")));
    }
    for place in ["rope_scaling", "rope_parameters"] {
        settings.optional_group(place)?;
        for name in ["rope_type", "type"] {
            let key = format!("{place}.{name}");
            if settings.optional_text(&key)?.is_some_and(|kind| kind != "default") {
                return Err(settings.error(&key, NO_SCALING));
            }
        }
        for name in ["factor", "partial_rotary_factor"] {
            let key = format!("{place}.{name}");
            if settings.optional_positive(&key)?.is_some_and(|factor| factor != 1.0) {
                return Err(settings.error(&key, NO_SCALING));
            }
        }
    }
    if settings.optional_positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(settings.error("partial_rotary_factor", "is not 1; all of a head must turn"));
    }
    Ok(())
}
