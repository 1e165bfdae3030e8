//! Arbitrary and mutated files: whatever they hold, an answer comes soon and is no panic.
//!
//! `FLORA_FUZZ_CASES` sets the cases per property (64 where it is not set); the seed is fixed.

use crate::decoder;
use crate::families::starcoder;
use crate::gguf_writer::{File, Tensor, Value};
use crate::kinds;
use crate::model::{BIGCODE, safetensors_file};
use crate::mutation::{changed, changes, settings, soon};
use crate::peft::{LORA, folder};
use crate::split;
use flora_checkpoint::gguf::{Gguf, MetadataValue};
use flora_checkpoint::{AdapterFolder, AdapterKinds, DecoderConfig, Matrix, Model, read_matrices, write_matrices};
use proptest::prelude::*;
use std::path::Path;

/// Text pieces that JSON configs are made of, in any order.
fn config_text() -> impl Strategy<Value = String> {
    let pieces = [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "\"",
        "\\",
        "null",
        "true",
        "NaN",
        "1e999",
        "-1",
        "0.5",
        "\"peft_type\"",
        "\"LORA\"",
        "\"IA3\"",
        "\"HIRA\"",
        "\"FLORA\"",
        "\"LOHA\"",
        "\"VERA\"",
        "\"LOKR\"",
        "\"save_projection\"",
        "\"r\"",
        "\"lora_alpha\"",
        "\"target_modules\"",
        "\"rank_pattern\"",
        "(a*)*b",
        "(?=.*)*",
        "\\\\1",
        "q_proj",
        "\u{fffd}",
    ];
    prop::collection::vec(prop::sample::select(pieces.to_vec()).prop_map(str::to_string), 0..60)
        .prop_map(|pieces| pieces.concat())
}

/// Opens `path` as a model and reads everything of it.
fn read_model(path: &Path) {
    let Ok(model) = Model::open(path) else { return };
    for projection in model.projections() {
        if let Ok(weight) = model.weight(&projection.path) {
            assert_eq!(weight.values.len(), weight.d * weight.k);
            assert!(weight.values.iter().all(|value| value.is_finite()));
        }
    }
    for path in model.parameters() {
        let Ok(parameter) = model.parameter(path) else { continue };
        if let Ok(values) = parameter.to_f32() {
            assert_eq!(values.len(), parameter.shape().iter().product::<usize>());
        }
        let rows = [0, 1, usize::MAX / 2];
        for count in 0..=rows.len() {
            if let Ok(values) = parameter.rows_f32(&rows[..count]) {
                assert_eq!(values.len(), count * parameter.shape()[1]);
                assert!(values.iter().all(|value| value.is_finite()));
            }
        }
    }
    match model.decoder() {
        Ok(DecoderConfig::Llama(config)) => {
            assert!(config.layers * 7 <= model.projections().len() && config.windows.len() == config.layers);
            let turns = config.rotary.frequencies(config.head_size);
            assert!(turns.frequencies.iter().all(|frequency| frequency.is_finite()) && turns.attention_factor > 0.0);
        }
        Ok(DecoderConfig::GptBigCode(config)) => assert!(config.layers * 4 <= model.projections().len()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

fn read_adapter(folder: &Path) {
    let Ok(adapter) = AdapterFolder::open(folder, &kinds::kinds()) else { return };
    assert!(!adapter.modules.is_empty());
    for operand in adapter.modules.values().flat_map(|module| module.operands.values()) {
        assert_eq!(operand.shape.iter().product::<usize>(), operand.values.len());
        assert!(operand.values.iter().all(|value| value.is_finite()));
    }
}

fn read_file(name: &str, bytes: &[u8]) {
    let (_folder, path) = crate::file(name, bytes);
    soon(|| {
        read_model(&path);
        if name.ends_with("safetensors") {
            let _ = read_matrices(&path);
        } else if let Ok(gguf) = Gguf::open(&path) {
            for value in gguf.metadata().values() {
                if let MetadataValue::Array(array) = value {
                    assert_eq!(array.iter().count() as u64, array.len());
                }
            }
        }
    });
}

/// A Llama whose rotary positions are scaled.
fn scaled_llama() -> File {
    let mut file = File::llama(1, 2, 1, 4, 5, 3);
    file.metadata.push(("llama.rope.scaling.type".into(), Value::string("linear")));
    file.metadata.push(("llama.rope.scaling.factor".into(), Value::f32(2.0)));
    file.tensors.push(Tensor::f32("rope_freqs.weight", &[2], &[1.0, 8.0]));
    file
}

fn safetensors() -> Vec<u8> {
    let (_folder, path) = crate::file("x.safetensors", b"");
    let matrix = |rows, columns| Matrix { rows, columns, values: vec![0.5; rows * columns] };
    let matrices = [("l.0.q_proj.weight".to_string(), matrix(5, 3)), ("l.1.q_proj.weight".to_string(), matrix(2, 7))];
    write_matrices(&path, &matrices.into()).expect("writable matrices");
    std::fs::read(&path).expect("what was written")
}

/// A decoder with every setting of rotary positions and windows that there is.
const QWEN2_CONFIG: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 1, "hidden_size": 8,
 "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 5, "rms_norm_eps": 1e-06,
 "max_position_embeddings": 77, "vocab_size": 11, "rope_theta": 7.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
 "original_max_position_embeddings": 64, "mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2,
 "truncate": false}, "rope_parameters": {"full_attention": {"rope_theta": 7.0}}, "use_sliding_window": true,
 "sliding_window": 9, "layer_types": ["sliding_attention"]}"#;

const CONFIG: &str = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "use_dora": false,
 "rank_pattern": {"layers.0.*q_proj": 2}, "alpha_pattern": {"(?!k)q_proj": 5}, "layers_to_transform": [0], "bias": "none"}"#;

proptest! {
    #![proptest_config(settings())]

    #[test]
    fn arbitrary_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        read_file("x.gguf", &bytes);
        read_file("x.gguf", &[b"GGUF\x03\0\0\0", &bytes[..]].concat());
        read_file("x.safetensors", &bytes);
        let length = (bytes.len() as u64).to_le_bytes();
        read_file("x.safetensors", &[&length[..], &bytes].concat());
    }

    #[test]
    fn mutated_gguf(changes in changes()) {
        read_file("x.gguf", &changed(&File::llama(1, 2, 1, 2, 5, 3).bytes().0, &changes));
    }

    #[test]
    fn mutated_gguf_starcoder(changes in changes()) {
        read_file("x.gguf", &changed(&starcoder().bytes().0, &changes));
    }

    /// One file of two is changed, or both.
    #[test]
    fn mutated_split_gguf(first in changes(), second in changes(), which in 1u8..4) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let files = split::split(scaled_llama, 2);
        for (at, changes) in [first, second].iter().enumerate() {
            let bytes = files[at].bytes().0;
            let bytes = if which & (1 << at) == 0 { bytes } else { changed(&bytes, changes) };
            std::fs::write(folder.path().join(split::name(at + 1, 2)), bytes).expect("writing a file");
        }
        soon(|| read_model(&folder.path().join(split::name(1, 2))));
    }

    #[test]
    fn mutated_safetensors(changes in changes()) {
        read_file("x.safetensors", &changed(&safetensors(), &changes));
    }

    #[test]
    fn mutated_decoders(config in changes(), tensors in changes(), which in 1u8..4) {
        for (text, tensor_file) in [
            (decoder::LLAMA_CONFIG, safetensors_file(&decoder::llama_tensors())),
            (QWEN2_CONFIG, safetensors_file(&decoder::llama_tensors())),
            (decoder::BIGCODE_CONFIG, safetensors_file(&BIGCODE[..BIGCODE.len() - 1])),
        ] {
            let config = if which & 1 == 0 { text.into() } else { changed(text.as_bytes(), &config) };
            let file = if which & 2 == 0 { tensor_file } else { changed(&tensor_file, &tensors) };
            let folder = tempfile::tempdir().expect("a temporary folder");
            std::fs::write(folder.path().join("config.json"), config).expect("writing a config");
            std::fs::write(folder.path().join("model.safetensors"), file).expect("writing a model");
            soon(|| read_model(folder.path()));
        }
    }

    #[test]
    fn mutated_adapters(config in changes(), tensors in changes(), which in 1u8..4, registered in any::<bool>()) {
        let folder = if registered { folder(kinds::CONFIG, kinds::TENSORS) } else { folder(CONFIG, LORA) };
        for (bit, name, changes) in [(1, "adapter_config.json", config), (2, "adapter_model.safetensors", tensors)] {
            let path = folder.path().join(name);
            if which & bit != 0 {
                let bytes = std::fs::read(&path).expect("a file of the folder");
                std::fs::write(&path, changed(&bytes, &changes)).expect("writing a mutation");
            }
        }
        soon(|| read_adapter(folder.path()));
    }

    #[test]
    fn arbitrary_configs(text in config_text()) {
        let adapter = folder(&text, LORA);
        soon(|| read_adapter(adapter.path()));
        std::fs::write(adapter.path().join("config.json"), &text).expect("writing a config");
        std::fs::write(adapter.path().join("model.safetensors.index.json"), &text).expect("writing an index");
        soon(|| read_model(adapter.path()));
    }

    #[test]
    fn arbitrary_patterns(pattern in "[a-z.*+?(){}|\\\\^$=!<0-9\\[\\]-]{0,30}") {
        let pattern = serde_json::Value::from(pattern);
        let config = format!(
            r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": {pattern}, "rank_pattern": {{{pattern}: 2}}}}"#
        );
        let adapter = folder(&config, LORA);
        soon(|| read_adapter(adapter.path()));
    }
}

#[test]
fn the_files_that_are_mutated_are_whole() {
    assert!(AdapterFolder::open(folder(CONFIG, LORA).path(), &AdapterKinds::builtin()).is_ok());
    let (_folder, path) = crate::file("x.safetensors", &safetensors());
    assert_eq!(Model::open(&path).expect("a model").projections().len(), 2);
    for gguf in [scaled_llama(), starcoder()] {
        assert!(crate::model::open_gguf(&gguf).expect("a model").decoder().is_ok());
    }
    let qwen2 = decoder::decoder(QWEN2_CONFIG, &decoder::llama_tensors()).expect("a decoder");
    assert!(matches!(qwen2, DecoderConfig::Llama(config) if config.windows == [Some(9)]));
}

#[test]
fn adapters_cut_at_every_byte_are_errors() {
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let folder = folder(CONFIG, LORA);
        let path = folder.path().join(name);
        let bytes = std::fs::read(&path).expect("a file of the folder");
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).expect("writing a cut file");
            assert!(
                AdapterFolder::open(folder.path(), &AdapterKinds::builtin()).is_err(),
                "{name} cut at byte {length}"
            );
        }
    }
}

/// Patterns that take exponential time in a plain backtracking matcher, on a name of the longest length.
#[test]
fn patterns_can_t_stall() {
    let name = "a".repeat(900);
    let tensors: Vec<(String, [usize; 2])> =
        vec![(format!("{name}.lora_A.weight"), [2, 5]), (format!("{name}.lora_B.weight"), [3, 2])];
    let tensors: Vec<(&str, &[usize])> = tensors.iter().map(|(name, shape)| (&name[..], &shape[..])).collect();
    for pattern in [
        "(a+)+b",
        r"(?:(a|aa)+)+\\1c",
        "(?=(a+)+b)a",
        "(a*)*(?!a)b",
        "((a{1,50}){1,50}){1,50}",
        r"(.*)(.*)(.*)(.*)\\3x",
    ] {
        let config = format!(r#"{{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {{"{pattern}": 2}}}}"#);
        let adapter = folder(&config, &tensors);
        soon(|| read_adapter(adapter.path()));
    }
}
