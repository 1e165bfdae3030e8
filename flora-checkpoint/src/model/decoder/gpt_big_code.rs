//! The settings of a GPTBigCode decoder, as `config.json` writes them and as GGUF's `starcoder` does. Absent ones have the defaults of
//! `transformers`.

use super::{Gelu, GptBigCodeConfig, Parts};
use crate::model::settings::{Key, Settings, in_gguf, key};
use crate::model::{Model, ModelError};

/// The architecture that `config.json` names.
pub(super) const HUGGING_FACE: &str = "GPTBigCodeForCausalLM";

/// The architecture that GGUF files name.
pub(super) const GGUF: &str = "starcoder";

const LAYERS: Key = key("block_count", "n_layer");
const WIDTH: Key = key("embedding_length", "n_embd");
const HEADS: Key = key("attention.head_count", "n_head");
const KEY_VALUE_HEADS: Key = in_gguf("attention.head_count_kv");
const FEED_FORWARD: Key = key("feed_forward_length", "n_inner");
const NORM_EPSILON: Key = key("attention.layer_norm_epsilon", "layer_norm_epsilon");
const CONTEXT_LENGTH: Key = key("context_length", "n_positions");
const VOCABULARY: Key = key("vocab_size", "vocab_size");

pub(super) fn read(model: &Model) -> Result<GptBigCodeConfig, ModelError> {
    let settings = &*model.settings;
    let (activation, tied_embedding) = match settings {
        Settings::Gguf { .. } => {
            let key = settings.name(KEY_VALUE_HEADS);
            if settings.optional_count(&key)?.is_some_and(|found| found != 1) {
                return Err(settings.error(&key, "is not 1; only multi-query attention is supported"));
            }
            // llama.cpp computes the approximation, whatever the model was trained with.
            (Gelu::Tanh, !model.parameters.contains_key("lm_head.weight"))
        }
        Settings::Config { .. } => {
            refuse_config_variants(settings)?;
            (activation(settings)?, settings.optional_flag("tie_word_embeddings")?.unwrap_or(true))
        }
    };
    let count = |key: Key| settings.count(&settings.name(key));
    let optional_count = |key: Key| settings.optional_count(&settings.name(key));
    let (d, heads) = (count(WIDTH)?, count(HEADS)?);
    if !d.is_multiple_of(heads) {
        let problem = format!("is {heads}, which does not divide the width {d}");
        return Err(settings.error(&settings.name(HEADS), problem));
    }
    let feed_forward = match optional_count(FEED_FORWARD)? {
        Some(width) => width,
        None => d.checked_mul(4).ok_or_else(|| settings.error(&settings.name(WIDTH), "is too large"))?,
    };
    let vocabulary = match (settings, optional_count(VOCABULARY)?) {
        (_, Some(vocabulary)) => vocabulary,
        (Settings::Gguf { .. }, None) => {
            model.parameter("transformer.wte.weight")?.shape().first().copied().unwrap_or(0)
        }
        (Settings::Config { .. }, None) => count(VOCABULARY)?,
    };
    let config = GptBigCodeConfig {
        layers: count(LAYERS)?,
        d,
        heads,
        head_size: d / heads,
        feed_forward,
        norm_epsilon: settings.positive_f32(&settings.name(NORM_EPSILON))?.unwrap_or(1e-5),
        context_length: count(CONTEXT_LENGTH)?,
        vocabulary,
        activation,
        tied_embedding,
    };
    check_tensors(model, &config)?;
    Ok(config)
}

/// Refuses what a config may say that would change the result.
fn refuse_config_variants(settings: &Settings) -> Result<(), ModelError> {
    for (key, supported) in [("multi_query", true), ("scale_attn_weights", true), ("add_cross_attention", false)] {
        if settings.optional_flag(key)?.is_some_and(|found| found != supported) {
            return Err(settings.error(key, format!("is {}; only {supported} is supported", !supported)));
        }
    }
    Ok(())
}

fn activation(settings: &Settings) -> Result<Gelu, ModelError> {
    match settings.optional_text("activation_function")?.unwrap_or("gelu_pytorch_tanh") {
        "gelu" | "gelu_python" => Ok(Gelu::Exact),
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Ok(Gelu::Tanh),
        other => {
            let problem = format!("is `{other}`; supported: gelu, gelu_python, gelu_pytorch_tanh, gelu_new, gelu_fast");
            Err(settings.error("activation_function", problem))
        }
    }
}

/// Holds every tensor against the sizes in `config`.
fn check_tensors(model: &Model, config: &GptBigCodeConfig) -> Result<(), ModelError> {
    let GptBigCodeConfig { layers, d, head_size, feed_forward, context_length, vocabulary, .. } = *config;
    let parts = Parts::of(model);
    let embedding = parts.parameter("transformer.wte.weight", &[vocabulary, d], "vocabulary, width")?;
    parts.output(&embedding, config.tied_embedding)?;
    parts.parameter("transformer.wpe.weight", &[context_length, d], "positions, width")?;
    let norm = |path: &str| {
        parts.parameter(&format!("{path}.weight"), &[d], "the width")?;
        parts.parameter(&format!("{path}.bias"), &[d], "the width")
    };
    norm("transformer.ln_f")?;
    // At most 3 d, of an n_embd below 2³².
    let attention = d.saturating_add(2 * head_size);
    for layer in 0..layers {
        let block = format!("transformer.h.{layer}");
        norm(&format!("{block}.ln_1"))?;
        norm(&format!("{block}.ln_2"))?;
        for (module, inputs, outputs) in [
            ("attn.c_attn", d, attention),
            ("attn.c_proj", d, d),
            ("mlp.c_fc", d, feed_forward),
            ("mlp.c_proj", feed_forward, d),
        ] {
            parts.projection(&format!("{block}.{module}"), inputs, outputs, Some(true))?;
        }
    }
    Ok(())
}
