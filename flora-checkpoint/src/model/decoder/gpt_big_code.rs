//! The settings of a GPTBigCode decoder, as `config.json` writes them. Absent ones have the defaults of `transformers`.

use super::{Gelu, GptBigCodeConfig, Parts};
use crate::model::{Model, ModelError};

/// The architecture that `config.json` names.
pub(super) const HUGGING_FACE: &str = "GPTBigCodeForCausalLM";

pub(super) fn read(model: &Model) -> Result<GptBigCodeConfig, ModelError> {
    let settings = &*model.settings;
    for (key, supported) in [("multi_query", true), ("scale_attn_weights", true), ("add_cross_attention", false)] {
        if settings.optional_flag(key)?.is_some_and(|found| found != supported) {
            return Err(settings.error(key, format!("is {}; only {supported} is supported", !supported)));
        }
    }
    let activation = match settings.optional_text("activation_function")?.unwrap_or("gelu_pytorch_tanh") {
        "gelu" | "gelu_python" => Gelu::Exact,
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Gelu::Tanh,
        other => {
            let problem = format!("is `{other}`; supported: gelu, gelu_python, gelu_pytorch_tanh, gelu_new, gelu_fast");
            return Err(settings.error("activation_function", problem));
        }
    };
    let (d, heads) = (settings.count("n_embd")?, settings.count("n_head")?);
    if !d.is_multiple_of(heads) {
        return Err(settings.error("n_head", format!("is {heads}, which does not divide the width {d}")));
    }
    let feed_forward = match settings.optional_count("n_inner")? {
        Some(width) => width,
        None => d.checked_mul(4).ok_or_else(|| settings.error("n_embd", "is too large"))?,
    };
    let config = GptBigCodeConfig {
        layers: settings.count("n_layer")?,
        d,
        heads,
        head_size: d / heads,
        feed_forward,
        norm_epsilon: settings.optional_positive("layer_norm_epsilon")?.unwrap_or(1e-5),
        context_length: settings.count("n_positions")?,
        vocabulary: settings.count("vocab_size")?,
        activation,
        tied_embedding: settings.optional_flag("tie_word_embeddings")?.unwrap_or(true),
    };
    check_tensors(model, &config)?;
    Ok(config)
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
