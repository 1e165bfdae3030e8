//! Writes small GGUF files, whole or wrong in a chosen way.

use flora_checkpoint::Encoding;

pub(crate) struct Tensor {
    pub(crate) name: String,
    /// Row-major: `[rows, columns]`.
    pub(crate) shape: Vec<u64>,
    pub(crate) ggml_type: u32,
    pub(crate) bytes: Vec<u8>,
    /// Replaces the computed offset.
    pub(crate) offset: Option<u64>,
}

impl Tensor {
    pub(crate) fn f32(name: &str, shape: &[u64], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), shape: shape.into(), ggml_type: Encoding::F32.ggml_id(), bytes, offset: None }
    }
}

/// A typed metadata value as the file stores it: type number and bytes.
#[derive(Clone)]
pub(crate) struct Value(u32, Vec<u8>);

impl Value {
    pub(crate) fn u32(value: u32) -> Self {
        Value(4, value.to_le_bytes().to_vec())
    }

    pub(crate) fn f32(value: f32) -> Self {
        Value(6, value.to_le_bytes().to_vec())
    }

    pub(crate) fn string(text: &str) -> Self {
        Value(8, string(text))
    }

    pub(crate) fn strings(texts: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((texts.len() as u64).to_le_bytes());
        texts.iter().for_each(|text| bytes.extend(string(text)));
        Value(9, bytes)
    }

    pub(crate) fn raw(kind: u32, bytes: &[u8]) -> Self {
        Value(kind, bytes.to_vec())
    }
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

pub(crate) struct File {
    pub(crate) version: u32,
    pub(crate) metadata: Vec<(String, Value)>,
    pub(crate) tensors: Vec<Tensor>,
}

impl File {
    /// A decoder of the `llama` architecture: `blocks` blocks of odd sizes, every weight of a projection distinct, three tokens,
    /// no output matrix of its own.
    pub(crate) fn llama(blocks: u32, query_heads: u64, key_heads: u64, head: u64, d: u64, hidden: u64) -> Self {
        let mut metadata = vec![
            ("general.architecture".into(), Value::string("llama")),
            ("general.name".into(), Value::string("tiny")),
            ("llama.block_count".into(), Value::u32(blocks)),
            ("llama.attention.head_count".into(), Value::u32(query_heads as u32)),
            ("llama.attention.head_count_kv".into(), Value::u32(key_heads as u32)),
        ];
        metadata.push(("tokenizer.ggml.tokens".into(), Value::strings(&["a", "bc", ""])));
        metadata.extend([
            ("llama.attention.key_length".into(), Value::u32(head as u32)),
            ("llama.rope.dimension_count".into(), Value::u32(head as u32)),
            ("llama.embedding_length".into(), Value::u32(d as u32)),
            ("llama.feed_forward_length".into(), Value::u32(hidden as u32)),
            ("llama.context_length".into(), Value::u32(64)),
            ("llama.vocab_size".into(), Value::u32(3)),
            ("llama.rope.freq_base".into(), Value::f32(100_000.0)),
            ("llama.attention.layer_norm_rms_epsilon".into(), Value::f32(1e-5)),
        ]);
        let mut tensors = vec![];
        for block in 0..blocks {
            let shapes = [
                ("attn_q", query_heads * head, d),
                ("attn_k", key_heads * head, d),
                ("attn_v", key_heads * head, d),
                ("attn_output", d, query_heads * head),
                ("ffn_gate", hidden, d),
                ("ffn_up", hidden, d),
                ("ffn_down", d, hidden),
            ];
            for (number, (name, rows, columns)) in shapes.into_iter().enumerate() {
                let start = (block as usize * 7 + number) as f32 * 1000.0;
                let values: Vec<f32> = (0..rows * columns).map(|i| start + i as f32).collect();
                tensors.push(Tensor::f32(&format!("blk.{block}.{name}.weight"), &[rows, columns], &values));
            }
            for norm in ["attn_norm", "ffn_norm"] {
                tensors.push(Tensor::f32(&format!("blk.{block}.{norm}.weight"), &[d], &vec![0.75; d as usize]));
            }
        }
        let embedding: Vec<f32> = (0..3 * d).map(|i| i as f32 - 0.5).collect();
        tensors.push(Tensor::f32("token_embd.weight", &[3, d], &embedding));
        tensors.push(Tensor::f32("output_norm.weight", &[d], &vec![1.25; d as usize]));
        File { version: 3, metadata, tensors }
    }

    /// The file, and the end of the last tensor's data in it (padding follows).
    pub(crate) fn bytes(&self) -> (Vec<u8>, usize) {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, Value(kind, value)) in &self.metadata {
            bytes.extend(string(key));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            bytes.extend(string(&tensor.name));
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|extent| bytes.extend(extent.to_le_bytes()));
            bytes.extend(tensor.ggml_type.to_le_bytes());
            bytes.extend(tensor.offset.unwrap_or(offset).to_le_bytes());
            offset += (tensor.bytes.len() as u64).next_multiple_of(32);
        }
        let mut end = bytes.len();
        for tensor in &self.tensors {
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes.extend(&tensor.bytes);
            end = bytes.len();
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        (bytes, end)
    }
}
