//! What a decoder is made of: settings and tensors of both file kinds, and what is refused.

use crate::gguf_writer::{File, Tensor, Value};
use crate::model::{BIGCODE, folder, open_gguf, safetensors_file};
use flora_checkpoint::model::{Rotary, RotaryScaling};
use flora_checkpoint::{DecoderConfig, Encoding, Gelu, GptBigCodeConfig, LlamaConfig, Model, ModelError};

type Tensors = Vec<(&'static str, &'static [usize])>;

pub(crate) const LLAMA_CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama",
 "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 5,
 "rms_norm_eps": 1e-06, "max_position_embeddings": 77, "vocab_size": 11, "rope_theta": 500000.0, "rope_scaling": null,
 "hidden_act": "silu", "attention_bias": false, "tie_word_embeddings": false}"#;

pub(crate) fn llama_tensors() -> Tensors {
    vec![
        ("model.embed_tokens.weight", &[11, 8]),
        ("model.norm.weight", &[8]),
        ("lm_head.weight", &[11, 8]),
        ("model.layers.0.input_layernorm.weight", &[8]),
        ("model.layers.0.post_attention_layernorm.weight", &[8]),
        ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
        ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
        ("model.layers.0.mlp.gate_proj.weight", &[5, 8]),
        ("model.layers.0.mlp.up_proj.weight", &[5, 8]),
        ("model.layers.0.mlp.down_proj.weight", &[8, 5]),
    ]
}

pub(crate) const BIGCODE_CONFIG: &str = r#"{"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode",
 "n_layer": 1, "n_embd": 4, "n_head": 2, "n_inner": 7, "n_positions": 9, "vocab_size": 11, "multi_query": true,
 "layer_norm_epsilon": 1e-05, "activation_function": "gelu_pytorch_tanh", "scale_attn_weights": true}"#;

/// Without `lm_head.weight`, which is not the embedding there.
fn bigcode_tensors() -> Tensors {
    BIGCODE.iter().copied().filter(|(name, _)| *name != "lm_head.weight").collect()
}

pub(crate) fn decoder(config: &str, tensors: &[(&str, &[usize])]) -> Result<DecoderConfig, ModelError> {
    let folder = folder(config, &[("model.safetensors", safetensors_file(tensors))]);
    Model::open(folder.path())?.decoder()
}

/// Rotary positions that aren't scaled.
pub(crate) fn unscaled(base: f64) -> Rotary {
    Rotary { base, scaling: RotaryScaling::None }
}

pub(crate) fn set(gguf: &mut File, key: &str, value: Value) {
    gguf.metadata.retain(|(name, _)| name != key);
    gguf.metadata.push((key.into(), value));
}

#[test]
fn a_gguf_llama_says_what_it_is_made_of() {
    let gguf = File::llama(2, 4, 2, 6, 37, 29);
    let expected = LlamaConfig {
        layers: 2,
        d: 37,
        query_heads: 4,
        key_value_heads: 2,
        head_size: 6,
        feed_forward: 29,
        rotary: unscaled(100_000.0),
        query_key_norms: false,
        windows: vec![None; 2],
        norm_epsilon: 1e-5,
        context_length: 64,
        vocabulary: 3,
        tied_embedding: true,
    };
    let model = open_gguf(&gguf).expect("a model");
    assert_eq!(model.decoder().expect("a decoder"), DecoderConfig::Llama(expected.clone()));

    // θ and the vocabulary may be left to the defaults and to the embedding; an output matrix unties it.
    let mut gguf = gguf;
    gguf.metadata.retain(|(key, _)| !["llama.rope.freq_base", "llama.vocab_size"].contains(&&key[..]));
    gguf.tensors.push(Tensor::f32("output.weight", &[3, 37], &[0.5; 3 * 37]));
    let model = open_gguf(&gguf).expect("a model");
    let expected = LlamaConfig { rotary: unscaled(10_000.0), tied_embedding: false, ..expected };
    assert_eq!(model.decoder().expect("a decoder"), DecoderConfig::Llama(expected));
}

#[test]
fn a_gguf_s_parameters_have_hugging_face_s_names() {
    let mut gguf = File::llama(2, 2, 1, 6, 5, 3);
    gguf.tensors.push(Tensor::f32("output.weight", &[3, 5], &[0.5; 15]));
    let model = open_gguf(&gguf).expect("a model");
    let paths: Vec<&str> = model.parameters().collect();
    assert_eq!(
        paths,
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.post_attention_layernorm.weight",
            "model.layers.1.input_layernorm.weight",
            "model.layers.1.post_attention_layernorm.weight",
            "model.norm.weight",
        ]
    );
    assert_eq!(model.parameter("model.norm.weight").expect("a norm").to_f32().expect("numbers"), [1.25; 5]);
    let embedding = model.parameter("model.embed_tokens.weight").expect("an embedding");
    assert_eq!((embedding.shape(), embedding.encoding()), (&[3, 5][..], Encoding::F32));
    assert_eq!(embedding.rows_f32(&[2, 0]).expect("rows")[4..6], [13.5, -0.5]);
    assert!(embedding.rows_f32(&[3]).expect_err("row 3 of 3").to_string().contains("has 3 rows, of which 3 is none"));
    let error = model.parameter("model.norms.weight").expect_err("no such parameter").to_string();
    assert!(error.contains("did you mean `model.norm.weight`?"), "{error}");
}

#[test]
fn a_quantised_embedding_stays_quantised_and_gives_rows() {
    let mut gguf = File::llama(1, 2, 1, 16, 32, 3);
    let place = gguf.tensors.iter().position(|tensor| tensor.name == "token_embd.weight").expect("the embedding");
    let row = |scale: f32, quantum: i8| {
        let mut bytes = half::f16::from_f32(scale).to_le_bytes().to_vec();
        bytes.extend([quantum as u8; 32]);
        bytes
    };
    let bytes = [row(0.5, 3), row(f32::NAN, 1), row(2.0, -7)].concat();
    let ggml_type = Encoding::Q8_0.ggml_id();
    gguf.tensors[place] =
        Tensor { name: "token_embd.weight".into(), shape: vec![3, 32], ggml_type, bytes, offset: None };
    let model = open_gguf(&gguf).expect("a model");
    assert!(model.decoder().is_ok());
    let embedding = model.parameter("model.embed_tokens.weight").expect("an embedding");
    assert_eq!((embedding.encoding(), embedding.stored().bytes().len()), (Encoding::Q8_0, 3 * 34));
    assert_eq!(embedding.rows_f32(&[2, 0]).expect("finite rows"), [[-14.0; 32], [1.5; 32]].concat());
    for error in [embedding.rows_f32(&[0, 1]), embedding.to_f32()].map(|values| values.expect_err("NaN")) {
        let error = error.to_string();
        assert!(error.contains("token_embd.weight") && error.contains("NaN at element 32"), "{error}");
    }
}

#[test]
fn a_gguf_that_would_compute_something_else_is_refused() {
    let cases: [(&str, Value, &str); 12] = [
        ("llama.rope.dimension_count", Value::u32(4), "must be the size of a head, 6"),
        ("llama.attention.value_length", Value::u32(8), "must be the size of a head, 6"),
        ("llama.expert_count", Value::u32(8), "mixture of experts"),
        ("llama.attention.key_length", Value::u32(8), "must be the size of a head, 8"),
        ("llama.attention.key_length", Value::u32(u32::MAX), "an even number"),
        ("llama.embedding_length", Value::u32(7), "[3, 7]"),
        ("llama.feed_forward_length", Value::u32(4), "a layer of 5 inputs and 4 outputs"),
        ("llama.context_length", Value::u32(0), "`llama.context_length` is 0"),
        ("llama.vocab_size", Value::u32(4), "[4, 5]"),
        ("llama.rope.freq_base", Value::f32(f32::NAN), "`llama.rope.freq_base` is NaN"),
        ("llama.attention.layer_norm_rms_epsilon", Value::f32(0.0), "must be positive"),
        ("llama.attention.layer_norm_rms_epsilon", Value::string("1e-5"), "is not a number"),
    ];
    for (key, value, expected) in cases {
        let mut gguf = File::llama(1, 4, 2, 6, 5, 3);
        set(&mut gguf, key, value);
        let error = open_gguf(&gguf).expect("a model").decoder().expect_err(key).to_string();
        assert!(error.contains(expected), "{key}: {error}");
    }
    for tensor in ["token_embd.weight", "output_norm.weight", "blk.0.ffn_norm.weight"] {
        let mut gguf = File::llama(1, 4, 2, 6, 5, 3);
        gguf.tensors.retain(|other| other.name != tensor);
        let error = open_gguf(&gguf).expect("a model").decoder().expect_err(tensor);
        assert!(matches!(error, ModelError::UnknownParameter { .. }), "{error}");
    }
}

#[test]
fn a_hugging_face_llama_says_what_it_is_made_of() {
    let expected = LlamaConfig {
        layers: 1,
        d: 8,
        query_heads: 4,
        key_value_heads: 2,
        head_size: 2,
        feed_forward: 5,
        rotary: unscaled(500_000.0),
        query_key_norms: false,
        windows: vec![None],
        norm_epsilon: 1e-6,
        context_length: 77,
        vocabulary: 11,
        tied_embedding: false,
    };
    let found = decoder(LLAMA_CONFIG, &llama_tensors()).expect("a decoder");
    assert_eq!(found, DecoderConfig::Llama(expected.clone()));

    let new = LLAMA_CONFIG.replace(
        r#""rope_theta": 500000.0, "rope_scaling": null"#,
        r#""rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}"#,
    );
    assert_eq!(decoder(&new, &llama_tensors()).expect("a decoder"), DecoderConfig::Llama(expected));
}

/// `config` with `from` replaced by `to`, which must be an error that says `expected`.
pub(crate) fn refused(config: &str, from: &str, to: &str, tensors: &[(&str, &[usize])], expected: &str) {
    let changed = config.replace(from, to);
    assert_ne!(changed, config, "{from}");
    let error = decoder(&changed, tensors).expect_err(to).to_string();
    assert!(error.contains(expected), "{to}: {error}");
}

#[test]
fn a_hugging_face_llama_that_would_compute_something_else_is_refused() {
    for (from, to, expected) in [
        (r#""silu""#, r#""gelu""#, "only `silu`"),
        (r#""attention_bias": false"#, r#""attention_bias": true"#, "q_proj.bias"),
        (r#""num_attention_heads": 4"#, r#""num_attention_heads": 3"#, "does not divide the 3 heads"),
        (r#""num_attention_heads": 4"#, r#""num_attention_heads": 8"#, "an even number"),
        (r#""num_attention_heads": 4"#, r#""num_attention_heads": -4"#, "is not a whole number"),
        (r#""num_attention_heads": 4"#, r#""num_attention_heads": 4294967296"#, "is too large"),
        (r#""num_attention_heads": 4"#, r#""num_attention_heads": 4, "head_dim": 4294967294"#, "needed"),
        (r#""num_hidden_layers": 1"#, r#""num_hidden_layers": 4294967295"#, "`model.layers.1."),
        (r#""vocab_size": 11"#, r#""vocab_size": 12"#, "[12, 8]"),
        (r#""tie_word_embeddings": false"#, r#""tie_word_embeddings": 1"#, "neither true nor false"),
        (r#""hidden_size": 8"#, r#""hidden_sizes": 8"#, "`hidden_size` is missing"),
        (r#""rms_norm_eps": 1e-06"#, r#""rms_norm_eps": 1e-60"#, "must be positive"),
        ("LlamaForCausalLM", "LlamaModel", "LlamaForCausalLM, MistralForCausalLM"),
    ] {
        refused(LLAMA_CONFIG, from, to, &llama_tensors(), expected);
    }
    let without_output: Tensors = llama_tensors().into_iter().filter(|(name, _)| *name != "lm_head.weight").collect();
    let error = decoder(LLAMA_CONFIG, &without_output).expect_err("no output matrix").to_string();
    assert!(error.contains("`lm_head.weight`"), "{error}");

    let mut biased = llama_tensors();
    biased.push(("model.layers.0.self_attn.k_proj.bias", &[4]));
    let error = decoder(LLAMA_CONFIG, &biased).expect_err("a bias too many").to_string();
    assert!(error.contains("k_proj.bias"), "{error}");
}

#[test]
fn a_gpt_big_code_says_what_it_is_made_of() {
    let expected = GptBigCodeConfig {
        layers: 1,
        d: 4,
        heads: 2,
        head_size: 2,
        feed_forward: 7,
        norm_epsilon: 1e-5,
        context_length: 9,
        vocabulary: 11,
        activation: Gelu::Tanh,
        tied_embedding: true,
    };
    let found = decoder(BIGCODE_CONFIG, &bigcode_tensors()).expect("a decoder");
    assert_eq!(found, DecoderConfig::GptBigCode(expected.clone()));

    // Both count up from 0, so the output matrix is the embedding, whichever the config says.
    for (tied, text) in [(true, r#""n_layer": 1"#), (false, r#""n_layer": 1, "tie_word_embeddings": false"#)] {
        let config = BIGCODE_CONFIG.replace(r#""n_layer": 1"#, text).replace("gelu_pytorch_tanh", "gelu");
        let found = decoder(&config, BIGCODE).expect("a decoder");
        let expected = GptBigCodeConfig { activation: Gelu::Exact, tied_embedding: tied, ..expected.clone() };
        assert_eq!(found, DecoderConfig::GptBigCode(expected));
    }
}

#[test]
fn a_gpt_big_code_s_projections_and_parameters_are_those_of_its_modules() {
    let folder = folder(BIGCODE_CONFIG, &[("model.safetensors", safetensors_file(&bigcode_tensors()))]);
    let model = Model::open(folder.path()).expect("a model");
    let projections: Vec<(&str, usize, usize, bool)> = model
        .projections()
        .iter()
        .map(|projection| (&projection.path[..], projection.d, projection.k, projection.has_bias))
        .collect();
    assert_eq!(
        projections,
        [
            ("transformer.h.0.attn.c_attn", 4, 4 + 2 * 2, true),
            ("transformer.h.0.attn.c_proj", 4, 4, true),
            ("transformer.h.0.mlp.c_fc", 4, 7, true),
            ("transformer.h.0.mlp.c_proj", 7, 4, true),
        ]
    );
    assert!(!model.stored("transformer.h.0.attn.c_attn").expect("a weight").rows_are_inputs);
    let parameters: Vec<&str> = model.parameters().collect();
    assert_eq!(
        parameters,
        [
            "transformer.h.0.ln_1.bias",
            "transformer.h.0.ln_1.weight",
            "transformer.h.0.ln_2.bias",
            "transformer.h.0.ln_2.weight",
            "transformer.ln_f.bias",
            "transformer.ln_f.weight",
            "transformer.wpe.weight",
            "transformer.wte.weight",
        ]
    );
}

#[test]
fn a_gpt_big_code_that_would_compute_something_else_is_refused() {
    for (from, to, expected) in [
        (r#""multi_query": true"#, r#""multi_query": false"#, "`multi_query` is false; only true is supported"),
        (r#""scale_attn_weights": true"#, r#""scale_attn_weights": false"#, "only true is supported"),
        (r#""n_layer": 1"#, r#""n_layer": 1, "add_cross_attention": true"#, "only false is supported"),
        ("gelu_pytorch_tanh", "quick_gelu", "is `quick_gelu`; supported: gelu,"),
        (r#""n_head": 2"#, r#""n_head": 3"#, "does not divide the width 4"),
        (r#""n_head": 2"#, r#""n_head": 1"#, "a layer of 4 inputs and 12 outputs"),
        (r#""n_inner": 7"#, r#""n_inner": null"#, "a layer of 4 inputs and 16 outputs"),
        (r#""n_positions": 9"#, r#""n_positions": 8"#, "[8, 4]"),
        (r#""n_layer": 1"#, r#""n_layer": 2"#, "`transformer.h.1.ln_1.weight`"),
        (r#""n_layer": 1"#, r#""n_layer": "1""#, "is not a whole number"),
    ] {
        refused(BIGCODE_CONFIG, from, to, &bigcode_tensors(), expected);
    }
    for missing in ["transformer.h.0.attn.c_proj.bias", "transformer.ln_f.bias", "transformer.wpe.weight"] {
        let tensors: Tensors = bigcode_tensors().into_iter().filter(|(name, _)| *name != missing).collect();
        let error = decoder(BIGCODE_CONFIG, &tensors).expect_err(missing).to_string();
        assert!(error.contains(missing), "{error}");
    }
    let other_output: Tensors = bigcode_tensors().into_iter().chain([("lm_head.weight", &[22, 2][..])]).collect();
    let error = decoder(BIGCODE_CONFIG, &other_output).expect_err("another output matrix").to_string();
    assert!(error.contains("`lm_head.weight`"), "{error}");
}

/// `FLORA_MODEL=required` fetches the model; without it this test uses the file that was fetched before.
#[test]
fn the_real_smollm2_says_what_it_is_made_of() {
    let path = flora_toolchain::smollm2_from_environment().expect("FLORA_MODEL=required, but SmolLM2 can't be had");
    let Some(path) = path else {
        eprintln!("NOT RUN: SmolLM2 was not fetched; FLORA_MODEL=required fetches it");
        return;
    };
    let model = Model::open(&path).expect("a model");
    let expected = LlamaConfig {
        layers: 30,
        d: 576,
        query_heads: 9,
        key_value_heads: 3,
        head_size: 64,
        feed_forward: 1536,
        rotary: unscaled(100_000.0),
        query_key_norms: false,
        windows: vec![None; 30],
        norm_epsilon: 1e-5,
        context_length: 8192,
        vocabulary: 49_152,
        tied_embedding: true,
    };
    assert_eq!(model.decoder().expect("a decoder"), DecoderConfig::Llama(expected));
    let embedding = model.parameter("model.embed_tokens.weight").expect("an embedding");
    let whole = embedding.to_f32().expect("finite numbers");
    assert_eq!(embedding.rows_f32(&[49_151]).expect("the last row"), whole[49_151 * 576..]);
    assert_eq!(embedding.encoding(), Encoding::Q8_0);
}
