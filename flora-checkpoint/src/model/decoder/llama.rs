//! Llama and the families whose blocks are Llama's but for a few fields: which projections have biases, whether queries and keys are
//! normalised, which layers see a window. A family is a row of [`FAMILIES`].

use super::{LlamaConfig, Parts, Rotary, window};
use crate::model::settings::{Key, Settings, in_gguf, key};
use crate::model::{Model, ModelError};

/// What tells one family from another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// What `general.architecture` of a GGUF file says, where it has a name of its own there.
    gguf: Option<&'static str>,
    /// What `architectures` of a `config.json` says.
    pub(super) hugging_face: &'static str,
    /// Of queries, keys and values.
    input_biases: Biases,
    output_bias: Biases,
    feed_forward_biases: Biases,
    /// Whether every head of queries and keys is normalised before it turns.
    query_key_norms: bool,
    window: window::Settings,
    /// The size of a head where a `config.json` says none, if not the width shared among the heads.
    head_size: Option<usize>,
}

/// Which projections have biases.
#[derive(Clone, Copy, Debug)]
enum Biases {
    None,
    /// Those have whose flag is set in `config.json`. GGUF files have no flag: there, those have whose tensors are there.
    Flag(&'static str),
    /// All have. Without a single one in the files they are 0, as transformers takes them.
    All,
}

const LLAMA: Family = Family {
    gguf: Some("llama"),
    hugging_face: "LlamaForCausalLM",
    input_biases: Biases::Flag("attention_bias"),
    output_bias: Biases::Flag("attention_bias"),
    feed_forward_biases: Biases::Flag("mlp_bias"),
    query_key_norms: false,
    window: window::Settings::None,
    head_size: None,
};

pub(super) const FAMILIES: [Family; 4] = [
    LLAMA,
    Family {
        gguf: None,
        hugging_face: "MistralForCausalLM",
        input_biases: Biases::None,
        output_bias: Biases::None,
        feed_forward_biases: Biases::None,
        window: window::Settings::AllLayers,
        ..LLAMA
    },
    Family {
        gguf: Some("qwen2"),
        hugging_face: "Qwen2ForCausalLM",
        input_biases: Biases::All,
        output_bias: Biases::None,
        feed_forward_biases: Biases::None,
        window: window::Settings::ByLayer,
        ..LLAMA
    },
    Family {
        gguf: Some("qwen3"),
        hugging_face: "Qwen3ForCausalLM",
        feed_forward_biases: Biases::None,
        query_key_norms: true,
        window: window::Settings::ByLayer,
        head_size: Some(128),
        ..LLAMA
    },
];

impl Family {
    /// The family of that name in the model's files.
    pub(super) fn of(model: &Model) -> Option<&'static Family> {
        let found = model.architecture();
        FAMILIES.iter().find(|family| match &*model.settings {
            Settings::Gguf { .. } => family.gguf == Some(found),
            Settings::Config { .. } => family.hugging_face == found,
        })
    }
}

const LAYERS: Key = key("block_count", "num_hidden_layers");
const WIDTH: Key = key("embedding_length", "hidden_size");
const QUERY_HEADS: Key = key("attention.head_count", "num_attention_heads");
const KEY_VALUE_HEADS: Key = key("attention.head_count_kv", "num_key_value_heads");
const HEAD_SIZE: Key = key("attention.key_length", "head_dim");
const FEED_FORWARD: Key = key("feed_forward_length", "intermediate_size");
pub(super) const ROPE_BASE: Key = key("rope.freq_base", "rope_theta");
const NORM_EPSILON: Key = key("attention.layer_norm_rms_epsilon", "rms_norm_eps");
const CONTEXT_LENGTH: Key = key("context_length", "max_position_embeddings");
const VOCABULARY: Key = key("vocab_size", "vocab_size");

pub(super) fn read(model: &Model, family: &Family) -> Result<LlamaConfig, ModelError> {
    let settings = &*model.settings;
    let count = |key| settings.count(&settings.name(key));
    let tied_embedding = match settings {
        Settings::Gguf { .. } => {
            refuse_gguf_variants(settings)?;
            !model.parameters.contains_key("lm_head.weight")
        }
        Settings::Config { .. } => {
            refuse_config_variants(settings)?;
            settings.optional_flag("tie_word_embeddings")?.unwrap_or(false)
        }
    };
    let d = count(WIDTH)?;
    let (query_heads, key_value_heads, head_size) = heads(settings, family, d)?;
    let vocabulary = match settings.optional_count(&settings.name(VOCABULARY))? {
        Some(vocabulary) => vocabulary,
        None => model.parameter("model.embed_tokens.weight")?.shape().first().copied().unwrap_or(0),
    };
    let epsilon = settings.name(NORM_EPSILON);
    let sizes = Sizes {
        layers: count(LAYERS)?,
        d,
        query_heads,
        key_value_heads,
        head_size,
        feed_forward: count(FEED_FORWARD)?,
        vocabulary,
        tied_embedding,
    };
    let norm_epsilon = settings.positive_f32(&epsilon)?.ok_or_else(|| settings.error(&epsilon, "is missing"))?;
    let context_length = count(CONTEXT_LENGTH)?;
    check_tensors(model, family, &sizes)?;
    // What grows with the sizes is made when the tensors have borne them out.
    Ok(LlamaConfig {
        layers: sizes.layers,
        d,
        query_heads,
        key_value_heads,
        head_size,
        feed_forward: sizes.feed_forward,
        rotary: Rotary::read(model, head_size, context_length)?,
        query_key_norms: family.query_key_norms,
        windows: window::read(settings, family.window, sizes.layers, context_length)?,
        norm_epsilon,
        context_length,
        vocabulary,
        tied_embedding,
    })
}

/// What the tensors' shapes follow from.
struct Sizes {
    layers: usize,
    d: usize,
    query_heads: usize,
    key_value_heads: usize,
    head_size: usize,
    feed_forward: usize,
    vocabulary: usize,
    tied_embedding: bool,
}

/// Heads of queries, heads of keys and values, and the size of one.
fn heads(settings: &Settings, family: &Family, d: usize) -> Result<(usize, usize, usize), ModelError> {
    let (queries, keys) = (settings.name(QUERY_HEADS), settings.name(KEY_VALUE_HEADS));
    let query_heads = settings.count(&queries)?;
    let key_value_heads = settings.optional_count(&keys)?.unwrap_or(query_heads);
    if !query_heads.is_multiple_of(key_value_heads) {
        let problem = format!("is {key_value_heads}, which does not divide the {query_heads} heads of queries");
        return Err(settings.error(&keys, problem));
    }
    let usual = match settings {
        Settings::Gguf { .. } => None,
        Settings::Config { .. } => family.head_size,
    };
    let head_size = match settings.optional_count(&settings.name(HEAD_SIZE))?.or(usual) {
        Some(head_size) => head_size,
        None if d.is_multiple_of(query_heads) => d / query_heads,
        None => {
            return Err(settings.error(&queries, format!("is {query_heads}, which does not divide the width {d}")));
        }
    };
    if !head_size.is_multiple_of(2) {
        let problem = format!("makes heads of {head_size}; rotary positions need an even number");
        return Err(settings.error(&queries, problem));
    }
    if let Settings::Gguf { .. } = settings {
        for key in ["attention.value_length", "rope.dimension_count"] {
            let key = settings.name(in_gguf(key));
            if settings.optional_count(&key)?.is_some_and(|found| found != head_size) {
                return Err(settings.error(&key, format!("must be the size of a head, {head_size}")));
            }
        }
    }
    Ok((query_heads, key_value_heads, head_size))
}

impl Biases {
    /// Whether projections must have one, or must not; `None` where either is right.
    fn of(self, settings: &Settings) -> Result<Option<bool>, ModelError> {
        match (self, settings) {
            (Biases::None, _) => Ok(Some(false)),
            (Biases::Flag(_), Settings::Gguf { .. }) | (Biases::All, _) => Ok(None),
            (Biases::Flag(key), Settings::Config { .. }) => Ok(Some(settings.optional_flag(key)?.unwrap_or(false))),
        }
    }
}

/// Holds every tensor against the sizes.
fn check_tensors(model: &Model, family: &Family, sizes: &Sizes) -> Result<(), ModelError> {
    let Sizes { layers, d, head_size, feed_forward, vocabulary, .. } = *sizes;
    let settings = &*model.settings;
    let width = |heads: usize| {
        let key = settings.name(QUERY_HEADS);
        heads
            .checked_mul(head_size)
            .ok_or_else(|| settings.error(&key, format!("of {head_size} make too wide a layer")))
    };
    let (queries, keys) = (width(sizes.query_heads)?, width(sizes.key_value_heads)?);
    let (inputs, output) = (family.input_biases.of(settings)?, family.output_bias.of(settings)?);
    let feed_forward_biases = family.feed_forward_biases.of(settings)?;
    let parts = Parts::of(model);
    let embedding = parts.parameter("model.embed_tokens.weight", &[vocabulary, d], "vocabulary, width")?;
    parts.output(&embedding, sizes.tied_embedding)?;
    parts.parameter("model.norm.weight", &[d], "the width")?;
    let mut input_projections = Vec::new();
    for layer in 0..layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            parts.parameter(&format!("model.layers.{layer}.{norm}.weight"), &[d], "the width")?;
        }
        for norm in ["self_attn.q_norm", "self_attn.k_norm"] {
            let path = format!("model.layers.{layer}.{norm}.weight");
            if family.query_key_norms {
                parts.parameter(&path, &[head_size], "the size of a head")?;
            } else if model.parameters.contains_key(&path) {
                return Err(settings.error(&path, format!("is there, though {} has none", family.hugging_face)));
            }
        }
        for (module, inputs, outputs, bias) in [
            ("self_attn.q_proj", d, queries, inputs),
            ("self_attn.k_proj", d, keys, inputs),
            ("self_attn.v_proj", d, keys, inputs),
            ("self_attn.o_proj", queries, d, output),
            ("mlp.gate_proj", d, feed_forward, feed_forward_biases),
            ("mlp.up_proj", d, feed_forward, feed_forward_biases),
            ("mlp.down_proj", feed_forward, d, feed_forward_biases),
        ] {
            let path = format!("model.layers.{layer}.{module}");
            parts.projection(&path, inputs, outputs, bias)?;
            if matches!(module, "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj") {
                input_projections.push(path);
            }
        }
    }
    match family.input_biases {
        Biases::All => parts.all_or_no_biases(&input_projections),
        Biases::None | Biases::Flag(_) => Ok(()),
    }
}

/// Refuses what a GGUF file may say that would change the result.
fn refuse_gguf_variants(settings: &Settings) -> Result<(), ModelError> {
    let experts = settings.name(in_gguf("expert_count"));
    if settings.optional_whole(&experts)?.is_some_and(|experts| experts != 0) {
        return Err(settings.error(&experts, "says a mixture of experts, which is not supported"));
    }
    Ok(())
}

/// Refuses what a config may say that would change the result.
fn refuse_config_variants(settings: &Settings) -> Result<(), ModelError> {
    let activation = settings.optional_text("hidden_act")?.unwrap_or("silu");
    if !["silu", "swish"].contains(&activation) {
        return Err(settings.error("hidden_act", format!("is `{activation}`; only `silu` is supported")));
    }
    Ok(())
}
