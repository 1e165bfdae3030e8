//! GGUF files of the golden models, written as llama.cpp's converter writes them: other names, other settings, and the rows of
//! Llama's queries and keys interleaved. They compute what transformers does with the folders that they are of.

use std::path::Path;

use flora_adapters::BaseForm;
use flora_plan::layer::Element;
use safetensors::SafeTensors;
use serde_json::Value as Json;

use crate::device;
use crate::families::{self, files, weights};
use crate::gguf_writer::{File, Tensor, Value};
use crate::golden::check;
use crate::served::{Files, Served, golden, load_files};

/// Hugging Face's names and GGUF's, in blocks where there is a `{}`.
const LLAMA: [(&str, &str); 14] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
];

const STARCODER: [(&str, &str); 9] = [
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("transformer.h.{}.ln_1", "blk.{}.attn_norm"),
    ("transformer.h.{}.ln_2", "blk.{}.ffn_norm"),
    ("transformer.h.{}.attn.c_attn", "blk.{}.attn_qkv"),
    ("transformer.h.{}.attn.c_proj", "blk.{}.attn_output"),
    ("transformer.h.{}.mlp.c_fc", "blk.{}.ffn_up"),
    ("transformer.h.{}.mlp.c_proj", "blk.{}.ffn_down"),
];

/// GGUF's name of a tensor.
fn name(of: &str, names: &[(&str, &str)]) -> String {
    let block = of.split('.').find(|part| part.parse::<u32>().is_ok()).unwrap_or_default();
    let (module, kind) = of.rsplit_once('.').expect("a module and what it is of it");
    let found = names.iter().find(|(theirs, _)| theirs.replace("{}", block) == module);
    let (_, gguf) = found.unwrap_or_else(|| panic!("{of} has no name in GGUF"));
    format!("{}.{kind}", gguf.replace("{}", block))
}

/// The tensors of a safetensors file under GGUF's names. `interleaved` gives the heads of a module whose rows are interleaved.
fn tensors(path: &Path, names: &[(&str, &str)], interleaved: impl Fn(&str) -> Option<usize>) -> Vec<Tensor> {
    let bytes = std::fs::read(path).expect("golden weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let one = |(theirs, view): (String, safetensors::tensor::TensorView<'_>)| {
        let values = view.data().chunks_exact(4).map(|number| f32::from_le_bytes(number.try_into().expect("4 bytes")));
        let mut values: Vec<f32> = values.collect();
        let shape: Vec<u64> = view.shape().iter().map(|extent| *extent as u64).collect();
        if let Some(heads) = interleaved(&theirs) {
            let rows = view.shape()[0];
            let (head, width) = (rows / heads, values.len() / rows);
            // Their converter swaps the axes of a head's [2, head / 2] rows.
            let from = |row: usize| row / head * head + row % head % 2 * (head / 2) + row % head / 2;
            values = (0..rows).flat_map(|row| values[from(row) * width..][..width].to_vec()).collect();
        }
        Tensor::f32(&name(&theirs, names), &shape, &values)
    };
    file.tensors().into_iter().map(one).collect()
}

/// A case of `families` as a GGUF file of `architecture`, with the settings of its rotary positions.
fn family(case: &str, architecture: &str, rotary: &[(&str, Value)], divisors: Option<Vec<f32>>) -> File {
    let text = std::fs::read_to_string(golden("families").join(case).join("config.json")).expect("a golden config");
    let config: Json = serde_json::from_str(&text).expect("JSON");
    let whole = |key: &str| config[key].as_u64().expect("a whole number") as u32;
    let (query_heads, key_heads) = (whole("num_attention_heads"), whole("num_key_value_heads"));
    let key = |name: &str| format!("{architecture}.{name}");
    let mut metadata = vec![("general.architecture".to_owned(), Value::string(architecture))];
    for (name, value) in [
        ("block_count", whole("num_hidden_layers")),
        ("context_length", whole("max_position_embeddings")),
        ("embedding_length", whole("hidden_size")),
        ("feed_forward_length", whole("intermediate_size")),
        ("attention.head_count", query_heads),
        ("attention.head_count_kv", key_heads),
        ("attention.key_length", whole("head_dim")),
        ("attention.value_length", whole("head_dim")),
        ("rope.dimension_count", whole("head_dim")),
    ] {
        metadata.push((key(name), Value::u32(value)));
    }
    metadata.push((key("attention.layer_norm_rms_epsilon"), Value::f32(1e-5)));
    metadata.push((key("rope.freq_base"), Value::f32(500.0)));
    metadata.extend(rotary.iter().map(|(name, value)| (key(name), value.clone())));
    let interleaved = |tensor: &str| match tensor.rsplit('.').nth(1) {
        Some("q_proj") if architecture == "llama" => Some(query_heads as usize),
        Some("k_proj") if architecture == "llama" => Some(key_heads as usize),
        _ => None,
    };
    let path = golden("families").join("weights").join(weights(case)).with_extension("safetensors");
    let mut tensors = tensors(&path, &LLAMA, interleaved);
    if let Some(divisors) = divisors {
        tensors.push(Tensor::f32("rope_freqs.weight", &[divisors.len() as u64], &divisors));
    }
    File { version: 3, metadata, tensors }
}

/// A case of `families` in Q8_0, but for the matrices whose rows aren't whole blocks.
pub(crate) fn in_blocks(case: &str, architecture: &str) -> Vec<u8> {
    const BLOCK: usize = 32;
    let mut file = family(case, architecture, &[], None);
    let matrices = file.tensors.iter_mut().filter(|tensor| tensor.shape.len() == 2);
    for tensor in matrices.filter(|tensor| tensor.shape[1].is_multiple_of(BLOCK as u64)) {
        let values = tensor.bytes.chunks_exact(4);
        let values: Vec<_> = values.map(|bytes| f32::from_le_bytes(bytes.try_into().expect("4 bytes"))).collect();
        let mut bytes = Vec::new();
        for block in values.chunks_exact(BLOCK) {
            let largest = block.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            // A power of two, which f16 has.
            let scale = (largest / 127.0).log2().ceil().max(-14.0).exp2();
            let exponent = 15 + scale.log2() as i32;
            bytes.extend(((exponent as u16) << 10).to_le_bytes());
            bytes.extend(block.iter().flat_map(|value| ((value / scale).round() as i8).to_le_bytes()));
        }
        (tensor.ggml_type, tensor.bytes) = (flora_checkpoint::Encoding::Q8_0.ggml_id(), bytes);
    }
    file.bytes().0
}

fn load(name: &str, file: &File, of: impl FnOnce(&Path) -> Files) -> Served {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, file.bytes().0).expect("writing a file");
    load_files(name, &of(&path), Element::F32, |model, options| flora_model::load(&device(), model, options))
}

/// What llama.cpp's converter writes of Llama 3.1's scaling: the settings of `families/llama3`, heads of 12 numbers, θ = 500.
fn llama3_divisors() -> Vec<f32> {
    let one = |pair: i32| {
        let wave = std::f64::consts::TAU * 500f64.powf(2.0 * f64::from(pair) / 12.0);
        let divisor = if wave < 32.0 / 4.0 {
            1.0
        } else if wave > 32.0 / 1.0 {
            8.0
        } else {
            let smooth = (32.0 / wave - 1.0) / (4.0 - 1.0);
            1.0 / ((1.0 - smooth) / 8.0 + smooth)
        };
        divisor as f32
    };
    (0..6).map(one).collect()
}

#[test]
fn families_of_gguf_files_equal_transformers() {
    let scaled = |kind: &str, factor: f32| {
        vec![("rope.scaling.type", Value::string(kind)), ("rope.scaling.factor", Value::f32(factor))]
    };
    let mut yarn = scaled("yarn", 3.0);
    yarn.push(("rope.scaling.original_context_length", Value::u32(32)));
    let window = vec![("attention.sliding_window", Value::u32(20))];
    for (case, architecture, settings, divisors) in [
        ("llama", "llama", vec![], None),
        ("llama3", "llama", vec![], Some(llama3_divisors())),
        ("linear", "llama", scaled("linear", 4.0), None),
        ("yarn", "llama", yarn, None),
        ("mistral", "llama", window, None),
        ("qwen2", "qwen2", vec![], None),
        ("qwen3", "qwen3", vec![], None),
        ("qwen3_tied", "qwen3", vec![], None),
    ] {
        let file = family(case, architecture, &settings, divisors);
        let mut model = load(case, &file, |path| files(case, path));
        let outputs = families::CASES.iter().find(|(name, _)| *name == case).expect("a golden case").1;
        outputs.iter().for_each(|name| check(&mut model, name));
    }
}

#[test]
fn a_starcoder_of_a_gguf_file_equals_transformers() {
    let folder = golden("gpt_bigcode");
    let mut metadata = vec![("general.architecture".to_owned(), Value::string("starcoder"))];
    for (name, value) in [
        ("context_length", 96),
        ("embedding_length", 48),
        ("feed_forward_length", 104),
        ("block_count", 3),
        ("attention.head_count", 3),
        ("attention.head_count_kv", 1),
    ] {
        metadata.push((format!("starcoder.{name}"), Value::u32(value)));
    }
    metadata.push(("starcoder.attention.layer_norm_epsilon".to_owned(), Value::f32(1e-5)));
    let tensors = tensors(&folder.join("model/model.safetensors"), &STARCODER, |_| None);
    let file = File { version: 3, metadata, tensors };
    let of = |path: &Path| Files {
        model: path.to_owned(),
        outputs: folder.join("outputs"),
        adapters: folder.join("adapters"),
        base: BaseForm::default(),
    };
    let mut model = load("gpt_bigcode as GGUF", &file, of);
    ["base", "lora", "lora_all"].iter().for_each(|name| check(&mut model, name));
}
