//! GGUF files under Hugging Face's names: which tensors of which architecture are which parameters and projections.
//!
//! llama.cpp rotates the pairs (2i, 2i + 1) of a head in the `llama` architecture, Hugging Face the pairs (i, i + h/2), h being the
//! head's size. Its converter therefore interleaves the two halves of every head's rows in the query and key weights. PEFT adapters
//! are trained on Hugging Face's order, so the interleaving is undone here. In the other architectures llama.cpp rotates as Hugging
//! Face does, and nothing is interleaved.

use super::settings::{Settings, in_gguf};
use super::{Layout, Model, ModelError, Place, Projection, Source, assemble, stem};
use crate::gguf::{Gguf, MetadataValue, without_number};
use std::collections::BTreeMap;
use std::sync::Arc;

/// What is known of one value of `general.architecture`.
struct Architecture {
    name: &'static str,
    names: &'static Names,
    /// Whether the rows of queries and keys are interleaved.
    interleaved: bool,
}

const ARCHITECTURES: [Architecture; 4] = [
    Architecture { name: "llama", names: &ROTARY, interleaved: true },
    Architecture { name: "qwen2", names: &ROTARY, interleaved: false },
    Architecture { name: "qwen3", names: &ROTARY, interleaved: false },
    Architecture { name: "starcoder", names: &STARCODER, interleaved: false },
];

/// GGUF's names and Hugging Face's. A parameter that a file doesn't have is left out; a projection must be there.
struct Names {
    /// Hugging Face's blocks; GGUF's are `blk.N`.
    blocks: &'static str,
    /// In a block, without `.weight` and `.bias`.
    projections: &'static [(&'static str, &'static str, Heads)],
    /// In a block.
    block_parameters: &'static [(&'static str, &'static str)],
    /// What is there once.
    parameters: &'static [(&'static str, &'static str)],
}

/// Which heads the rows of a projection belong to.
#[derive(Clone, Copy)]
enum Heads {
    None,
    Query,
    Key,
}

const ROTARY: Names = Names {
    blocks: "model.layers",
    projections: &[
        ("attn_q", "self_attn.q_proj", Heads::Query),
        ("attn_k", "self_attn.k_proj", Heads::Key),
        ("attn_v", "self_attn.v_proj", Heads::None),
        ("attn_output", "self_attn.o_proj", Heads::None),
        ("ffn_gate", "mlp.gate_proj", Heads::None),
        ("ffn_up", "mlp.up_proj", Heads::None),
        ("ffn_down", "mlp.down_proj", Heads::None),
    ],
    block_parameters: &[
        ("attn_norm.weight", "input_layernorm.weight"),
        ("ffn_norm.weight", "post_attention_layernorm.weight"),
        ("attn_q_norm.weight", "self_attn.q_norm.weight"),
        ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ],
    parameters: &[
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("output.weight", "lm_head.weight"),
        (ROTARY_DIVISORS, ROTARY_DIVISORS),
    ],
};

const STARCODER: Names = Names {
    blocks: "transformer.h",
    projections: &[
        ("attn_qkv", "attn.c_attn", Heads::None),
        ("attn_output", "attn.c_proj", Heads::None),
        ("ffn_up", "mlp.c_fc", Heads::None),
        ("ffn_down", "mlp.c_proj", Heads::None),
    ],
    block_parameters: &[
        ("attn_norm.weight", "ln_1.weight"),
        ("attn_norm.bias", "ln_1.bias"),
        ("ffn_norm.weight", "ln_2.weight"),
        ("ffn_norm.bias", "ln_2.bias"),
    ],
    parameters: &[
        ("token_embd.weight", "transformer.wte.weight"),
        ("position_embd.weight", "transformer.wpe.weight"),
        ("output_norm.weight", "transformer.ln_f.weight"),
        ("output_norm.bias", "transformer.ln_f.bias"),
        ("output.weight", "lm_head.weight"),
    ],
};

/// What the frequencies of a head's pairs are divided by; Hugging Face has settings for it instead.
pub(super) const ROTARY_DIVISORS: &str = "rope_freqs.weight";

/// The architectures, for messages.
pub(super) fn architectures() -> String {
    ARCHITECTURES.map(|architecture| architecture.name).join(", ")
}

/// The row of the file that holds Hugging Face's row `row`, heads having `head` rows.
pub(super) fn interleaved_row(row: usize, head: usize) -> usize {
    let (first, within) = (row / head * head, row % head);
    let (half, pair) = (within / (head / 2), within % (head / 2));
    first + 2 * pair + half
}

pub(super) fn open(gguf: Gguf) -> Result<Model, ModelError> {
    let path = gguf.path();
    let text = |key: &str| gguf.metadata().get(key).and_then(MetadataValue::as_str);
    let found = text("general.architecture").unwrap_or("(none)").to_string();
    let Some(architecture) = ARCHITECTURES.iter().find(|architecture| architecture.name == found) else {
        return Err(ModelError::UnsupportedArchitecture { path, found });
    };
    let name = text("general.name").map_or_else(|| without_number(&stem(&path)).to_owned(), str::to_owned);
    let tables = gguf.shards().to_vec();
    let place = |name: String| {
        let table = tables.iter().find(|table| table.entries().contains_key(&name))?;
        Some(Place { table: table.clone(), name })
    };
    let settings = Settings::Gguf { gguf, architecture: architecture.name };
    let block_count = settings.name(in_gguf("block_count"));
    if let Some(other) = settings_of_another(&settings, &block_count) {
        let problem =
            format!("is missing, and `{other}` is there: the settings are another architecture's; convert it again");
        return Err(settings.error(&block_count, problem));
    }
    let blocks = settings.count(&block_count)?;
    let (query_heads, key_heads) = if architecture.interleaved {
        let query_heads = settings.count(&settings.name(in_gguf("attention.head_count")))?;
        let key_heads = settings.optional_count(&settings.name(in_gguf("attention.head_count_kv")))?;
        (query_heads, key_heads.unwrap_or(query_heads))
    } else {
        (0, 0)
    };
    let Names { blocks: block_path, projections: names, block_parameters, parameters: once } = architecture.names;
    let mut projections = Vec::new();
    let mut parameters = BTreeMap::new();
    let mut parameter = |stored: String, path: String| {
        if let Some(place) = place(stored) {
            parameters.insert(path, place);
        }
    };
    once.iter().for_each(|(stored, path)| parameter(stored.to_string(), path.to_string()));
    for block in 0..blocks {
        for (stored, path) in *block_parameters {
            parameter(format!("blk.{block}.{stored}"), format!("{block_path}.{block}.{path}"));
        }
        for (stored, module, heads) in *names {
            let (weight, bias) = (format!("blk.{block}.{stored}.weight"), format!("blk.{block}.{stored}.bias"));
            // Of what no file has, the first says that it is missing.
            let missing = || Place { table: tables[0].clone(), name: weight.clone() };
            let weight = place(weight.clone()).unwrap_or_else(missing);
            let layout = match heads {
                Heads::Query if architecture.interleaved => Layout::RotaryInterleaved { heads: query_heads },
                Heads::Key if architecture.interleaved => Layout::RotaryInterleaved { heads: key_heads },
                _ => Layout::OutputsByInputs,
            };
            let source = Source { weight, bias: place(bias), layout };
            projections.push(Projection::new(format!("{block_path}.{block}.{module}"), source)?);
        }
    }
    assemble(Model { name, architecture: found, projections, parameters, settings: Arc::new(settings) }, &path)
}

/// The entry that another architecture has in place of `key`, which isn't there.
fn settings_of_another(settings: &Settings, key: &str) -> Option<String> {
    let Settings::Gguf { gguf, .. } = settings else { return None };
    let (_, end) = key.split_once('.')?;
    let is_other = |found: &&String| found.split_once('.').is_some_and(|(_, rest)| rest == end);
    let missing = !gguf.metadata().contains_key(key);
    gguf.metadata().keys().find(is_other).filter(|_| missing).cloned()
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
