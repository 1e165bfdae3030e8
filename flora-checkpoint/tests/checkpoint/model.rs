//! Models: names, shapes and orientation of their projections.

use crate::file;
use crate::gguf_writer::{File, Tensor, Value};
use flora_checkpoint::{FileError, Model, ModelError, TensorProblem};
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

pub(crate) fn open_gguf(gguf: &File) -> Result<Model, ModelError> {
    let (_folder, path) = file("tiny.gguf", &gguf.bytes().0);
    Model::open(&path)
}

#[test]
fn a_gguf_has_hugging_face_s_paths_in_the_order_of_the_layers() {
    let model = open_gguf(&File::llama(11, 2, 1, 6, 37, 29)).expect("a model");
    assert_eq!((model.name(), model.architecture(), model.projections().len()), ("tiny", "llama", 77));
    let paths: Vec<&str> = model.projections().iter().map(|projection| &projection.path[..]).collect();
    assert_eq!(paths[0], "model.layers.0.mlp.down_proj");
    assert_eq!(paths[76], "model.layers.10.self_attn.v_proj");
    let down = model.projection("model.layers.2.mlp.down_proj").expect("a projection");
    assert_eq!((down.d, down.k, down.has_bias), (29, 37, false));
}

#[test]
fn weights_are_transposed_to_inputs_by_outputs() {
    let model = open_gguf(&File::llama(1, 2, 1, 6, 37, 29)).expect("a model");
    let weight = model.weight("model.layers.0.mlp.gate_proj").expect("a weight");
    assert_eq!((weight.d, weight.k, weight.bias), (37, 29, None));
    for (input, output) in [(0, 0), (36, 0), (5, 28), (36, 28)] {
        assert_eq!(weight.values[input * 29 + output], 4000.0 + (output * 37 + input) as f32);
    }
}

#[test]
fn the_row_interleaving_of_queries_and_keys_is_undone() {
    let (d, head) = (5, 6);
    let mut gguf = File::llama(1, 3, 2, head, d, 3);
    let bias: Vec<f32> = (0..18).map(|i| i as f32).collect();
    gguf.tensors.push(Tensor::f32("blk.0.attn_q.bias", &[18], &bias));
    let model = open_gguf(&gguf).expect("a model");
    for (path, heads, start) in [("q_proj", 3, 0.0), ("k_proj", 2, 1000.0)] {
        let path = format!("model.layers.0.self_attn.{path}");
        let weight = model.weight(&path).expect("a weight");
        let stored = model.stored(&path).expect("a stored weight").tensor.to_f32();
        for h in 0..heads {
            for (s, j) in (0..2).flat_map(|s| (0..head / 2).map(move |j| (s, j))) {
                // Hugging Face's row s·h/2 + j lies at row 2j + s of the file.
                let (ours, file) = (h * head + s * (head / 2) + j, h * head + 2 * j + s);
                let k = heads * head;
                assert_eq!(weight.values[(2 * k + ours) as usize], start + (file * d + 2) as f32);
                assert_eq!(stored[(ours * d + 2) as usize], start + (file * d + 2) as f32);
            }
        }
    }
    let bias = model.weight("model.layers.0.self_attn.q_proj").expect("a weight").bias.expect("a bias");
    assert_eq!(bias[..6], [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    let value = model.weight("model.layers.0.self_attn.v_proj").expect("a weight");
    assert_eq!(value.values[12 + 3], 2000.0 + (3 * 5 + 1) as f32, "values are not interleaved");
}

#[test]
fn mistakes_in_a_gguf_model_are_named() {
    let mut gguf = File::llama(2, 2, 1, 6, 5, 3);
    gguf.metadata[0].1 = Value::string("mamba");
    let error = open_gguf(&gguf).expect_err("another architecture").to_string();
    assert!(error.contains("`mamba`") && error.contains("supported: llama"), "{error}");

    for (heads, expected) in [(Value::u32(5), "5 heads"), (Value::u32(4), "4 heads")] {
        let mut gguf = File::llama(2, 2, 1, 6, 5, 3);
        gguf.metadata[3].1 = heads;
        let error = open_gguf(&gguf).expect_err("heads that don't divide").to_string();
        assert!(error.contains(expected) && error.contains("blk.0.attn_q.weight"), "{error}");
    }

    let mut gguf = File::llama(2, 2, 1, 6, 5, 3);
    gguf.metadata[3].1 = Value::u32(0);
    let error = open_gguf(&gguf).expect_err("no heads").to_string();
    assert!(error.contains("`llama.attention.head_count` is 0"), "{error}");

    let mut gguf = File::llama(2, 2, 1, 6, 5, 3);
    gguf.metadata[2].1 = Value::u32(u32::MAX);
    let error = open_gguf(&gguf).expect_err("blocks that are not there").to_string();
    assert!(error.contains("`blk.2.attn_q.weight` is missing"), "{error}");

    gguf.metadata.remove(2);
    let error = open_gguf(&gguf).expect_err("no block count").to_string();
    assert!(error.contains("`llama.block_count` is missing"), "{error}");

    let mut gguf = File::llama(1, 2, 1, 6, 5, 3);
    gguf.tensors[4].bytes[8..12].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let model = open_gguf(&gguf).expect("weights are read later");
    let error = model.weight("model.layers.0.mlp.gate_proj").expect_err("an infinite weight");
    assert!(matches!(
        error,
        ModelError::File(FileError::Tensor { problem: TensorProblem::NotFinite { index: 2, .. }, .. })
    ));
    let error = model.weight("model.layers.0.mlp.gate_prj").expect_err("no such projection").to_string();
    assert!(error.contains("did you mean `model.layers.0.mlp.gate_proj`?"), "{error}");
}

fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// A safetensors file of F32 tensors that count up from 0.
pub(crate) fn safetensors_file(tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, shape)| f32s((0..shape.iter().product()).map(|i| i as f32))).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).expect("matching bytes"))
    });
    safetensors::serialize(views, None).expect("serialisable tensors")
}

/// A GPTBigCode decoder of one block: d = 4, two heads, 7 between the feed-forward projections.
pub(crate) const BIGCODE: &[(&str, &[usize])] = &[
    ("transformer.wte.weight", &[11, 4]),
    ("transformer.wpe.weight", &[9, 4]),
    ("transformer.h.0.ln_1.weight", &[4]),
    ("transformer.h.0.ln_1.bias", &[4]),
    ("transformer.h.0.attn.c_attn.weight", &[8, 4]),
    ("transformer.h.0.attn.c_attn.bias", &[8]),
    ("transformer.h.0.attn.c_proj.weight", &[4, 4]),
    ("transformer.h.0.attn.c_proj.bias", &[4]),
    ("transformer.h.0.ln_2.weight", &[4]),
    ("transformer.h.0.ln_2.bias", &[4]),
    ("transformer.h.0.mlp.c_fc.weight", &[7, 4]),
    ("transformer.h.0.mlp.c_fc.bias", &[7]),
    ("transformer.h.0.mlp.c_proj.weight", &[4, 7]),
    ("transformer.h.0.mlp.c_proj.bias", &[4]),
    ("transformer.ln_f.weight", &[4]),
    ("transformer.ln_f.bias", &[4]),
    ("lm_head.weight", &[11, 4]),
];

pub(crate) fn folder(config: &str, files: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("config.json"), config).expect("writing a config");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("writing a file");
    }
    folder
}

#[test]
fn a_safetensors_folder_lists_its_linear_layers() {
    let config = r#"{"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode"}"#;
    let folder = folder(config, &[("model.safetensors", safetensors_file(BIGCODE))]);
    let model = Model::open(folder.path()).expect("a model");
    assert_eq!(model.architecture(), "GPTBigCodeForCausalLM");
    let paths: Vec<&str> = model.projections().iter().map(|projection| &projection.path[..]).collect();
    assert_eq!(
        paths,
        [
            "transformer.h.0.attn.c_attn",
            "transformer.h.0.attn.c_proj",
            "transformer.h.0.mlp.c_fc",
            "transformer.h.0.mlp.c_proj"
        ]
    );
    let weight = model.weight("transformer.h.0.attn.c_attn").expect("a weight");
    assert_eq!((weight.d, weight.k), (4, 8));
    assert_eq!(weight.values[8 + 2], 9.0, "row 2, column 1 of [8, 4]");
    assert_eq!(weight.bias.expect("a bias").len(), 8);
}

#[test]
fn conv1d_weights_are_inputs_by_outputs_already() {
    let tensors: &[(&str, &[usize])] = &[("h.0.attn.c_attn.weight", &[4, 6]), ("h.0.attn.c_attn.bias", &[6])];
    let folder = folder(r#"{"model_type": "gpt2"}"#, &[("model.safetensors", safetensors_file(tensors))]);
    let model = Model::open(folder.path()).expect("a model");
    let weight = model.weight("h.0.attn.c_attn").expect("a weight");
    assert_eq!((weight.d, weight.k), (4, 6));
    assert_eq!(weight.values, (0..24).map(|i| i as f32).collect::<Vec<_>>());
    assert!(model.stored("h.0.attn.c_attn").expect("a weight").rows_are_inputs);
}

#[test]
fn shards_are_read_through_the_index() {
    let files = [
        ("a.safetensors", safetensors_file(&[("l.0.q.weight", &[2, 3])])),
        ("b.safetensors", safetensors_file(&[("l.1.q.weight", &[2, 3])])),
    ];
    let with_index = |index: &str| {
        let folder = folder(r#"{"model_type": "llama"}"#, &files);
        std::fs::write(folder.path().join("model.safetensors.index.json"), index).expect("writing an index");
        Model::open(folder.path())
    };
    let both = r#"{"weight_map": {"l.0.q.weight": "a.safetensors", "l.1.q.weight": "b.safetensors"}}"#;
    assert_eq!(with_index(both).expect("a model").projections().len(), 2);
    let wrong = r#"{"weight_map": {"l.1.q.weight": "a.safetensors"}}"#;
    assert!(with_index(wrong).expect_err("not in that shard").to_string().contains("`l.1.q.weight` is missing"));
    for escaping in ["../a.safetensors", "/etc/passwd", "..", "", "x/../../y"] {
        let index = format!(r#"{{"weight_map": {{"l.0.q.weight": "{escaping}"}}}}"#);
        assert!(matches!(with_index(&index), Err(ModelError::ShardEscapes { .. })), "{escaping}");
    }
    for broken in ["{}", r#"{"weight_map": []}"#, r#"{"weight_map": {"a": 1}}"#, r#"{"weight_map": {"a": "missing"}}"#]
    {
        assert!(with_index(broken).is_err(), "{broken}");
    }
}

#[test]
fn what_is_no_model_is_refused() {
    let error = |path: &Path| Model::open(path).expect_err("no model").to_string();
    let (guard, path) = file("model.bin", b"x");
    assert!(error(&path).contains(".gguf"));
    assert!(error(guard.path()).contains("no config.json"));
    assert!(error(Path::new("/nonexistent")).contains("cannot open"));

    let empty = folder("{}", &[("model.safetensors", safetensors_file(&[("norm.weight", &[4])]))]);
    assert!(error(empty.path()).contains("no linear layer"));
    let quantised = folder(r#"{"quantization_config": {"bits": 4}}"#, &[]);
    assert!(error(quantised.path()).contains("quantization_config"));
    let tensors: &[(&str, &[usize])] = &[("q.weight", &[6, 4]), ("q.bias", &[4])];
    let bias = folder("{}", &[("model.safetensors", safetensors_file(tensors))]);
    assert!(error(bias.path()).contains("[6], the outputs of `q.weight`"));
    let twice = safetensors_file(&[("q.weight", &[6, 4])]);
    let twice = folder("{}", &[("a.safetensors", twice.clone()), ("b.safetensors", twice)]);
    assert!(error(twice.path()).contains("is also in"));
}
