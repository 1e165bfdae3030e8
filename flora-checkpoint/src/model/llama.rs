//! GGUF files of the `llama` architecture (Llama, Mistral, SmolLM2 and others) under Hugging Face's names.
//!
//! llama.cpp rotates the pairs (2i, 2i + 1) of a head, Hugging Face the pairs (i, i + h/2), h being the head's size. Its
//! converter therefore interleaves the two halves of every head's rows in the query and key weights. PEFT adapters are trained
//! on Hugging Face's order, so the interleaving is undone here.

use super::{Layout, Model, ModelError, Projection, Source, assemble, stem};
use crate::gguf::{Gguf, MetadataValue};
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
    let blocks = number(&gguf, "llama.block_count")?;
    let query_heads = number(&gguf, "llama.attention.head_count")?;
    let key_heads = match gguf.metadata().contains_key("llama.attention.head_count_kv") {
        true => number(&gguf, "llama.attention.head_count_kv")?,
        false => query_heads,
    };
    let table = Arc::new(gguf.tensors().clone());
    let mut projections = Vec::new();
    for block in 0..blocks {
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
    assemble(name, architecture, projections, &path)
}

fn number(gguf: &Gguf, key: &str) -> Result<usize, ModelError> {
    let fail = |problem: &str| {
        let problem = problem.to_string();
        ModelError::Configuration { path: gguf.path(), key: key.to_string(), problem }
    };
    let value = gguf.metadata().get(key).ok_or_else(|| fail("is missing from the metadata"))?;
    // A list would give every layer its own number of heads, which no model of this architecture has.
    let number = value.as_u64().ok_or_else(|| fail("is not a whole number"))?;
    u32::try_from(number).map(|number| number as usize).map_err(|_| fail("is too large"))
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
