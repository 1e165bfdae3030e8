//! GGUF files of the `llama` architecture (Llama, Mistral, SmolLM2 and others) under Hugging Face's names.
//!
//! llama.cpp rotates the pairs (2i, 2i + 1) of a head, Hugging Face the pairs (i, i + h/2), h being the head's size. Its
//! converter therefore interleaves the two halves of every head's rows in the query and key weights. PEFT adapters are trained
//! on Hugging Face's order, so the interleaving is undone here.

use super::settings::Settings;
use super::{Layout, Model, ModelError, Place, Projection, Source, assemble, stem};
use crate::gguf::{Gguf, MetadataValue};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The value of `general.architecture` that is understood.
pub(super) const ARCHITECTURE: &str = "llama";

/// Which heads the rows of a projection belong to.
#[derive(Clone, Copy)]
enum Heads {
    None,
    Query,
    Key,
}

/// GGUF's name in `blk.N.*`, the path in `model.layers.N.*`, and whether the rows are interleaved.
const PROJECTIONS: [(&str, &str, Heads); 7] = [
    ("attn_q", "self_attn.q_proj", Heads::Query),
    ("attn_k", "self_attn.k_proj", Heads::Key),
    ("attn_v", "self_attn.v_proj", Heads::None),
    ("attn_output", "self_attn.o_proj", Heads::None),
    ("ffn_gate", "mlp.gate_proj", Heads::None),
    ("ffn_up", "mlp.up_proj", Heads::None),
    ("ffn_down", "mlp.down_proj", Heads::None),
];

/// GGUF's name and Hugging Face's of what is there once.
const PARAMETERS: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// GGUF's name in `blk.N.*` and the path in `model.layers.N.*`.
const BLOCK_PARAMETERS: [(&str, &str); 2] =
    [("attn_norm.weight", "input_layernorm.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight")];

/// The row of the file that holds Hugging Face's row `row`, heads having `head` rows.
pub(super) fn interleaved_row(row: usize, head: usize) -> usize {
    let (first, within) = (row / head * head, row % head);
    let (half, pair) = (within / (head / 2), within % (head / 2));
    first + 2 * pair + half
}

pub(super) fn open(gguf: Gguf) -> Result<Model, ModelError> {
    let path = gguf.path();
    let text = |key: &str| gguf.metadata().get(key).and_then(MetadataValue::as_str);
    let architecture = text("general.architecture").unwrap_or("(none)").to_string();
    if architecture != ARCHITECTURE {
        return Err(ModelError::UnsupportedArchitecture { path, found: architecture });
    }
    let name = text("general.name").map_or_else(|| stem(&path), str::to_string);
    let table = Arc::new(gguf.tensors().clone());
    let settings = Settings::Gguf(gguf);
    let blocks = settings.count("llama.block_count")?;
    let query_heads = settings.count("llama.attention.head_count")?;
    let key_heads = settings.optional_count("llama.attention.head_count_kv")?.unwrap_or(query_heads);
    let mut projections = Vec::new();
    let mut parameters = BTreeMap::new();
    let mut parameter = |stored: String, path: String| {
        if table.entries().contains_key(&stored) {
            parameters.insert(path, Place { table: table.clone(), name: stored });
        }
    };
    PARAMETERS.iter().for_each(|(stored, path)| parameter(stored.to_string(), path.to_string()));
    for block in 0..blocks {
        for (stored, path) in BLOCK_PARAMETERS {
            parameter(format!("blk.{block}.{stored}"), format!("model.layers.{block}.{path}"));
        }
        for (stored, module, heads) in PROJECTIONS {
            let bias = format!("blk.{block}.{stored}.bias");
            let source = Source {
                weight: format!("blk.{block}.{stored}.weight"),
                bias: table.entries().contains_key(&bias).then_some(bias),
                layout: match heads {
                    Heads::None => Layout::OutputsByInputs,
                    Heads::Query => Layout::RotaryInterleaved { heads: query_heads },
                    Heads::Key => Layout::RotaryInterleaved { heads: key_heads },
                },
                table: table.clone(),
            };
            projections.push(Projection::new(format!("model.layers.{block}.{module}"), source)?);
        }
    }
    assemble(Model { name, architecture, projections, parameters, settings: Arc::new(settings) }, &path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaving_is_llama_cpp_s_permutation() {
        // Its converter reshapes a head's rows to [2, h/2], swaps the axes and flattens: file row 2j + s holds row s·h/2 + j.
        for (heads, head) in [(1, 2), (3, 4), (2, 6), (9, 64)] {
            let mut file = vec![usize::MAX; heads * head];
            for first in (0..heads * head).step_by(head) {
                for (s, j) in (0..2).flat_map(|s| (0..head / 2).map(move |j| (s, j))) {
                    file[first + 2 * j + s] = first + s * (head / 2) + j;
                }
            }
            for row in 0..heads * head {
                assert_eq!(file[interleaved_row(row, head)], row);
            }
        }
    }
}
