//! Families whose blocks are Llama's but for a few fields, in folders and in GGUF files.

use crate::decoder::{LLAMA_CONFIG, decoder, llama_tensors};
use crate::gguf_writer::{File, Tensor, Value};
use crate::model::open_gguf;
use flora_checkpoint::model::{DecoderConfig, Gelu, GptBigCodeConfig, LlamaConfig};

type Tensors = Vec<(&'static str, &'static [usize])>;

const INPUT_BIASES: [(&str, &[usize]); 3] = [
    ("model.layers.0.self_attn.q_proj.bias", &[8]),
    ("model.layers.0.self_attn.k_proj.bias", &[4]),
    ("model.layers.0.self_attn.v_proj.bias", &[4]),
];

const NORMS: [(&str, &[usize]); 2] =
    [("model.layers.0.self_attn.q_norm.weight", &[2]), ("model.layers.0.self_attn.k_norm.weight", &[2])];

fn with(more: &[(&'static str, &'static [usize])]) -> Tensors {
    llama_tensors().into_iter().chain(more.iter().copied()).collect()
}

/// `LLAMA_CONFIG` of another family, with more settings.
fn config(architecture: &str, more: &str) -> String {
    LLAMA_CONFIG
        .replace("LlamaForCausalLM", architecture)
        .replace(r#""attention_bias": false"#, &format!(r#""attention_bias": false{more}"#))
}

fn llama(config: &str, tensors: &[(&str, &[usize])]) -> LlamaConfig {
    match decoder(config, tensors).unwrap_or_else(|error| panic!("{config}: {error}")) {
        DecoderConfig::Llama(config) => config,
        other => panic!("{other:?}"),
    }
}

#[test]
fn windows_are_those_of_transformers() {
    let of = |architecture: &str, more: &str, tensors: &[(&str, &[usize])]| {
        llama(&config(architecture, more), tensors).windows
    };
    let norms = with(&NORMS);
    for (window, more) in [(Some(20), r#", "sliding_window": 20"#), (None, r#", "sliding_window": null"#)] {
        assert_eq!(of("MistralForCausalLM", more, &llama_tensors()), [window]);
        assert_eq!(of("LlamaForCausalLM", more, &llama_tensors()), [None], "Llama has none");
    }
    // 4096 where nothing is said, which is more than there are positions.
    assert_eq!(of("MistralForCausalLM", "", &llama_tensors()), [None]);
    let long = config("MistralForCausalLM", "").replace("77", "5000");
    assert_eq!(llama(&long, &llama_tensors()).windows, [Some(4096)]);
    for (right, more) in [
        (None, r#", "sliding_window": 20, "max_window_layers": 0"#),
        (None, r#", "sliding_window": 20, "use_sliding_window": false, "max_window_layers": 0"#),
        (Some(20), r#", "sliding_window": 20, "use_sliding_window": true, "max_window_layers": 0"#),
        (None, r#", "sliding_window": 20, "use_sliding_window": true, "max_window_layers": 1"#),
        (None, r#", "sliding_window": 20, "use_sliding_window": true"#),
        (None, r#", "sliding_window": null, "use_sliding_window": true, "max_window_layers": 0"#),
        (Some(20), r#", "sliding_window": 20, "use_sliding_window": true, "layer_types": ["sliding_attention"]"#),
        (None, r#", "sliding_window": 20, "use_sliding_window": true, "layer_types": ["full_attention"]"#),
    ] {
        assert_eq!(of("Qwen2ForCausalLM", more, &with(&INPUT_BIASES)), [right], "{more}");
        assert_eq!(of("Qwen3ForCausalLM", &format!(r#"{more}, "head_dim": 2"#), &norms), [right], "{more}");
    }
    for (more, expected) in [
        (r#", "layer_types": ["sliding_attention"]"#, "say no length"),
        (r#", "layer_types": ["chunked_attention"]"#, "has `chunked_attention`"),
        (r#", "layer_types": []"#, "has 0 entries for 1 layers"),
        (r#", "layer_types": "full_attention""#, "is not a list of texts"),
        (r#", "layer_types": [1]"#, "is not a list of texts"),
        (r#", "use_sliding_window": true, "sliding_window": 0"#, "`sliding_window` is 0"),
    ] {
        let error = decoder(&config("Qwen2ForCausalLM", more), &with(&INPUT_BIASES)).expect_err(more).to_string();
        assert!(error.contains(expected), "{more}: {error}");
    }
}

#[test]
fn biases_are_the_family_s() {
    let some = with(&INPUT_BIASES[..2]);
    let all = with(&INPUT_BIASES);
    let output = with(&[("model.layers.0.self_attn.o_proj.bias", &[8])]);
    assert!(decoder(&config("Qwen2ForCausalLM", ""), &all).is_ok());
    assert!(decoder(&config("Qwen2ForCausalLM", ""), &llama_tensors()).is_ok(), "all of them 0, as in transformers");
    for (architecture, tensors, expected) in [
        ("Qwen2ForCausalLM", &some, "v_proj.bias"),
        ("Qwen2ForCausalLM", &output, "o_proj.bias"),
        ("MistralForCausalLM", &all, "q_proj.bias"),
        ("LlamaForCausalLM", &all, "q_proj.bias"),
    ] {
        let error = decoder(&config(architecture, ""), tensors).expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
    // Mistral has no such setting; a config may say it nevertheless.
    let flag = config("MistralForCausalLM", "").replace(r#""attention_bias": false"#, r#""attention_bias": true"#);
    assert!(decoder(&flag, &llama_tensors()).is_ok());
}

#[test]
fn norms_of_queries_and_keys_are_qwen3_s() {
    let with_size = config("Qwen3ForCausalLM", r#", "head_dim": 2"#);
    assert!(llama(&with_size, &with(&NORMS)).query_key_norms);
    let error = decoder(&with_size, &with(&NORMS[..1])).expect_err("one missing").to_string();
    assert!(error.contains("k_norm.weight"), "{error}");
    let error = decoder(&config("Qwen3ForCausalLM", ""), &with(&NORMS)).expect_err("heads of 128").to_string();
    assert!(error.contains("512 outputs") || error.contains("[128]"), "{error}");
    let error = decoder(LLAMA_CONFIG, &with(&NORMS)).expect_err("a norm too many").to_string();
    assert!(error.contains("q_norm.weight") && error.contains("LlamaForCausalLM has none"), "{error}");
}

/// `File::llama` of another architecture.
fn of_architecture(architecture: &str) -> File {
    let mut file = File::llama(1, 3, 1, 6, 5, 3);
    for (key, _) in &mut file.metadata {
        if let Some(rest) = key.strip_prefix("llama.") {
            *key = format!("{architecture}.{rest}");
        }
    }
    file.metadata[0].1 = Value::string(architecture);
    file
}

#[test]
fn only_llama_s_rows_are_interleaved() {
    let mut file = of_architecture("qwen2");
    for (name, rows) in [("q", 18), ("k", 6), ("v", 6)] {
        file.tensors.push(Tensor::f32(&format!("blk.0.attn_{name}.bias"), &[rows], &vec![0.5; rows as usize]));
    }
    let model = open_gguf(&file).expect("a model");
    let weight = model.stored("model.layers.0.self_attn.q_proj").expect("a weight").tensor.to_f32();
    assert!(weight.iter().enumerate().all(|(at, value)| *value == at as f32), "{weight:?}");
    let DecoderConfig::Llama(config) = model.decoder().expect("a decoder") else { panic!("not Llama's blocks") };
    assert!(!config.query_key_norms && config.windows == [None]);
    assert_eq!(model.bias("model.layers.0.self_attn.v_proj").expect("a bias"), Some(vec![0.5; 6]));
    file.tensors.pop();
    let error = open_gguf(&file).expect("a model").decoder().expect_err("a bias is missing").to_string();
    assert!(error.contains("v_proj.bias"), "{error}");

    let mut file = of_architecture("qwen3");
    let error = open_gguf(&file).expect("a model").decoder().expect_err("no norms").to_string();
    assert!(error.contains("q_norm.weight"), "{error}");
    for name in ["q", "k"] {
        file.tensors.push(Tensor::f32(&format!("blk.0.attn_{name}_norm.weight"), &[6], &[1.5; 6]));
    }
    let model = open_gguf(&file).expect("a model");
    let DecoderConfig::Llama(config) = model.decoder().expect("a decoder") else { panic!("not Llama's blocks") };
    assert!(config.query_key_norms);
    let norm = model.parameter("model.layers.0.self_attn.k_norm.weight").expect("a norm");
    assert_eq!(norm.to_f32().expect("numbers"), [1.5; 6]);
}

#[test]
fn a_gguf_s_window_is_of_all_layers() {
    let mut file = File::llama(2, 4, 2, 6, 5, 3);
    file.metadata.push(("llama.attention.sliding_window".into(), Value::u32(9)));
    let model = open_gguf(&file).expect("a model");
    let DecoderConfig::Llama(config) = model.decoder().expect("a decoder") else { panic!("not Llama's blocks") };
    assert_eq!(config.windows, [Some(9), Some(9)]);
}

#[test]
fn settings_of_another_architecture_are_not_taken() {
    let mut file = File::llama(1, 3, 1, 6, 5, 3);
    file.metadata[0].1 = Value::string("qwen2");
    let error = open_gguf(&file).expect_err("settings of llama").to_string();
    assert!(error.contains("`qwen2.block_count` is missing, and `llama.block_count` is there"), "{error}");
}

/// A StarCoder of one block, as llama.cpp's converter writes it: d = 4, two heads, 7 between the feed-forward projections.
pub(crate) fn starcoder() -> File {
    let metadata = vec![
        ("general.architecture".into(), Value::string("starcoder")),
        ("starcoder.context_length".into(), Value::u32(9)),
        ("starcoder.embedding_length".into(), Value::u32(4)),
        ("starcoder.feed_forward_length".into(), Value::u32(7)),
        ("starcoder.block_count".into(), Value::u32(1)),
        ("starcoder.attention.head_count".into(), Value::u32(2)),
        ("starcoder.attention.head_count_kv".into(), Value::u32(1)),
        ("starcoder.attention.layer_norm_epsilon".into(), Value::f32(1e-5)),
    ];
    let shapes: [(&str, &[u64]); 16] = [
        ("token_embd.weight", &[11, 4]),
        ("position_embd.weight", &[9, 4]),
        ("output_norm.weight", &[4]),
        ("output_norm.bias", &[4]),
        ("blk.0.attn_norm.weight", &[4]),
        ("blk.0.attn_norm.bias", &[4]),
        ("blk.0.attn_qkv.weight", &[8, 4]),
        ("blk.0.attn_qkv.bias", &[8]),
        ("blk.0.attn_output.weight", &[4, 4]),
        ("blk.0.attn_output.bias", &[4]),
        ("blk.0.ffn_norm.weight", &[4]),
        ("blk.0.ffn_norm.bias", &[4]),
        ("blk.0.ffn_up.weight", &[7, 4]),
        ("blk.0.ffn_up.bias", &[7]),
        ("blk.0.ffn_down.weight", &[4, 7]),
        ("blk.0.ffn_down.bias", &[4]),
    ];
    let tensor = |(name, shape): (&str, &[u64])| {
        let values: Vec<f32> = (0..shape.iter().product::<u64>()).map(|at| at as f32).collect();
        Tensor::f32(name, shape, &values)
    };
    File { version: 3, metadata, tensors: shapes.into_iter().map(tensor).collect() }
}

#[test]
fn a_gguf_starcoder_is_a_gpt_big_code() {
    let model = open_gguf(&starcoder()).expect("a model");
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
    assert_eq!(model.decoder().expect("a decoder"), DecoderConfig::GptBigCode(expected.clone()));
    let joined = model.weight("transformer.h.0.attn.c_attn").expect("a weight");
    assert_eq!((joined.d, joined.k, joined.bias.map(|bias| bias.len())), (4, 8, Some(8)));

    let mut file = starcoder();
    file.tensors.push(Tensor::f32("output.weight", &[11, 4], &[0.5; 44]));
    let untied = GptBigCodeConfig { tied_embedding: false, ..expected };
    let model = open_gguf(&file).expect("a model");
    assert_eq!(model.decoder().expect("a decoder"), DecoderConfig::GptBigCode(untied));

    for (key, value, expected) in [
        ("starcoder.attention.head_count_kv", 2, "only multi-query"),
        ("starcoder.attention.head_count", 3, "does not divide"),
        ("starcoder.context_length", 8, "[8, 4]"),
        ("starcoder.feed_forward_length", 8, "a layer of 4 inputs and 8 outputs"),
    ] {
        let mut file = starcoder();
        crate::decoder::set(&mut file, key, Value::u32(value));
        let error = open_gguf(&file).expect("a model").decoder().expect_err(expected).to_string();
        assert!(error.contains(expected), "{error}");
    }
}
