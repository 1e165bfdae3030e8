//! A decoder with adapters and its loss by plain loops in f64: what the gradients of training are held against.

use flora_checkpoint::Model;
use flora_checkpoint::model::{DecoderConfig, Gelu};
use flora_ir::algebra::FoldedAdapter;
use flora_ir::evaluate::apply_activation;
use flora_ir::{Activation, Value};
use flora_train::{TargetLayer, TrainSegment};

/// The adapters of one job: the index of a layer, and what adapts it.
pub(crate) type Adapters = Vec<(usize, FoldedAdapter)>;

/// A decoder's numbers in f64.
pub(crate) struct Reference {
    embedding: Vec<Vec<f64>>,
    positions: Option<Vec<Vec<f64>>>,
    blocks: Vec<Block>,
    norm: Norm,
    /// `[d, vocabulary]`
    output: Value,
    epsilon: f64,
    /// Query heads, key-value heads, size.
    heads: [usize; 3],
    /// By pair, and what is turned is multiplied by.
    rotary: Option<(Vec<f64>, f64)>,
}

struct Block {
    attention_norm: Norm,
    inputs: Vec<Linear>,
    head_norms: Option<[Norm; 2]>,
    window: Option<usize>,
    attention_output: Linear,
    feed_forward_norm: Norm,
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

struct Norm {
    gamma: Vec<f64>,
    beta: Option<Vec<f64>>,
}

struct Linear {
    /// Of the layers that may be adapted.
    index: usize,
    weight: Value,
    bias: Option<Value>,
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// Reads a model's numbers.
struct Reader<'a> {
    model: &'a Model,
    layers: &'a [TargetLayer],
}

impl Reader<'_> {
    fn vector(&self, path: &str) -> Vec<f64> {
        widened(&self.model.parameter(path).expect("a parameter").to_f32().expect("finite numbers"))
    }

    fn matrix(&self, path: &str) -> Vec<Vec<f64>> {
        let width = self.model.parameter(path).expect("a parameter").shape()[1];
        self.vector(path).chunks_exact(width).map(<[f64]>::to_vec).collect()
    }

    fn norm(&self, path: &str, centred: bool) -> Norm {
        Norm {
            gamma: self.vector(&format!("{path}.weight")),
            beta: centred.then(|| self.vector(&format!("{path}.bias"))),
        }
    }

    fn linear(&self, path: &str) -> Linear {
        let weight = self.model.weight(path).expect("a weight");
        Linear {
            index: self.layers.iter().position(|layer| layer.path == path).expect("a layer that may be adapted"),
            weight: Value::matrix(weight.d, weight.k, widened(&weight.values)).expect("as its shape says"),
            bias: weight.bias.as_deref().map(|bias| Value::vector(widened(bias))),
        }
    }

    fn output(&self, tied: bool, embedding: &str) -> Value {
        let rows = self.matrix(if tied { embedding } else { "lm_head.weight" });
        let columns = (0..rows[0].len()).flat_map(|input| rows.iter().map(move |row| row[input])).collect();
        Value::matrix(rows[0].len(), rows.len(), columns).expect("as its shape says")
    }
}

impl Reference {
    pub(crate) fn new(model: &Model, layers: &[TargetLayer]) -> Self {
        let reader = Reader { model, layers };
        match model.decoder().expect("a decoder") {
            DecoderConfig::Llama(config) => {
                let block = |(layer, window): (usize, &Option<usize>)| {
                    let path = |name: &str| format!("model.layers.{layer}.{name}");
                    let linear = |name: &str| reader.linear(&path(name));
                    let norm = |name: &str| reader.norm(&path(name), false);
                    Block {
                        attention_norm: norm("input_layernorm"),
                        inputs: ["q", "k", "v"].map(|name| linear(&format!("self_attn.{name}_proj"))).into(),
                        head_norms: config
                            .query_key_norms
                            .then(|| ["q", "k"].map(|name| norm(&format!("self_attn.{name}_norm")))),
                        window: *window,
                        attention_output: linear("self_attn.o_proj"),
                        feed_forward_norm: norm("post_attention_layernorm"),
                        gate: Some(linear("mlp.gate_proj")),
                        up: linear("mlp.up_proj"),
                        down: linear("mlp.down_proj"),
                        activation: Activation::Silu,
                    }
                };
                let rotary = config.rotary.frequencies(config.head_size);
                Self {
                    embedding: reader.matrix("model.embed_tokens.weight"),
                    positions: None,
                    blocks: config.windows.iter().enumerate().map(block).collect(),
                    norm: reader.norm("model.norm", false),
                    output: reader.output(config.tied_embedding, "model.embed_tokens.weight"),
                    epsilon: f64::from(config.norm_epsilon),
                    heads: [config.query_heads, config.key_value_heads, config.head_size],
                    rotary: Some((rotary.frequencies, rotary.attention_factor)),
                }
            }
            DecoderConfig::GptBigCode(config) => {
                let block = |layer: usize| {
                    let path = |name: &str| format!("transformer.h.{layer}.{name}");
                    Block {
                        attention_norm: reader.norm(&path("ln_1"), true),
                        inputs: vec![reader.linear(&path("attn.c_attn"))],
                        head_norms: None,
                        window: None,
                        attention_output: reader.linear(&path("attn.c_proj")),
                        feed_forward_norm: reader.norm(&path("ln_2"), true),
                        gate: None,
                        up: reader.linear(&path("mlp.c_fc")),
                        down: reader.linear(&path("mlp.c_proj")),
                        activation: match config.activation {
                            Gelu::Exact => Activation::GeluErf,
                            Gelu::Tanh => Activation::GeluTanh,
                        },
                    }
                };
                Self {
                    embedding: reader.matrix("transformer.wte.weight"),
                    positions: Some(reader.matrix("transformer.wpe.weight")),
                    blocks: (0..config.layers).map(block).collect(),
                    norm: reader.norm("transformer.ln_f", true),
                    output: reader.output(config.tied_embedding, "transformer.wte.weight"),
                    epsilon: f64::from(config.norm_epsilon),
                    heads: [config.heads, 1, config.head_size],
                    rotary: None,
                }
            }
        }
    }

    /// The sum of a segment's losses in nats, with a job's adapters.
    pub(crate) fn loss(&self, segment: &TrainSegment<'_>, adapters: &Adapters) -> f64 {
        let first = |(position, token): (usize, &u32)| {
            let mut row = self.embedding[*token as usize].clone();
            if let Some(positions) = &self.positions {
                add(&mut row, &positions[position]);
            }
            row
        };
        let mut rows: Vec<_> = segment.tokens.iter().enumerate().map(first).collect();
        for block in &self.blocks {
            let normed = self.normalised(&rows, &block.attention_norm);
            let inputs: Vec<_> = block.inputs.iter().map(|linear| linear.apply(&normed, adapters)).collect();
            let joined: Vec<_> =
                (0..rows.len()).map(|row| inputs.iter().flat_map(|input| input[row].clone()).collect()).collect();
            let attended = block.attention_output.apply(&self.attended(joined, block), adapters);
            rows.iter_mut().zip(&attended).for_each(|(row, attended)| add(row, attended));
            let normed = self.normalised(&rows, &block.feed_forward_norm);
            let mut inner = block.gate.as_ref().unwrap_or(&block.up).apply(&normed, adapters);
            inner.iter_mut().flatten().for_each(|value| *value = apply_activation(block.activation, *value));
            if block.gate.is_some() {
                let up = block.up.apply(&normed, adapters);
                inner.iter_mut().flatten().zip(up.iter().flatten()).for_each(|(inner, up)| *inner *= up);
            }
            let down = block.down.apply(&inner, adapters);
            rows.iter_mut().zip(&down).for_each(|(row, down)| add(row, down));
        }
        let normed = self.normalised(&rows, &self.norm);
        let output = FoldedAdapter { virtual_rows: vec![Default::default()], ..FoldedAdapter::default() };
        let logits = apply(&output, &normed, &self.output, None);
        let targets = segment.targets.iter().zip(logits);
        targets.filter_map(|(target, logits)| Some(cross_entropy(&logits, (*target)? as usize))).sum()
    }

    fn normalised(&self, rows: &[Vec<f64>], norm: &Norm) -> Vec<Vec<f64>> {
        rows.iter().map(|row| self.normalise(row, norm)).collect()
    }

    fn normalise(&self, row: &[f64], Norm { gamma, beta }: &Norm) -> Vec<f64> {
        let d = row.len() as f64;
        let mean = if beta.is_some() { row.iter().sum::<f64>() / d } else { 0.0 };
        let scale = 1.0 / (row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / d + self.epsilon).sqrt();
        let beta = |at: usize| beta.as_ref().map_or(0.0, |beta| beta[at]);
        row.iter().enumerate().map(|(at, x)| (x - mean) * scale * gamma[at] + beta(at)).collect()
    }

    /// Of rows that have their queries, then their keys, then their values.
    fn attended(&self, mut rows: Vec<Vec<f64>>, block: &Block) -> Vec<Vec<f64>> {
        let [queries, keys, size] = self.heads;
        for (position, row) in rows.iter_mut().enumerate() {
            for (head, own) in row.chunks_exact_mut(size).enumerate().take(queries + keys) {
                if let Some(norms) = &block.head_norms {
                    let normed = self.normalise(own, &norms[usize::from(head >= queries)]);
                    own.copy_from_slice(&normed);
                }
                if let Some((frequencies, factor)) = &self.rotary {
                    let (first, second) = own.split_at_mut(size / 2);
                    for ((a, b), frequency) in first.iter_mut().zip(second).zip(frequencies) {
                        let (sine, cosine) = (position as f64 * frequency).sin_cos();
                        (*a, *b) = (factor * (*a * cosine - *b * sine), factor * (*b * cosine + *a * sine));
                    }
                }
            }
        }
        let attend = |(position, row): (usize, &Vec<f64>)| {
            let first = block.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let head = |row: &[f64], head: usize| row[head * size..(head + 1) * size].to_vec();
            let of_head = |query: usize| {
                let own = query / (queries / keys);
                let score = |seen: &Vec<f64>| {
                    let products = head(row, query).into_iter().zip(head(seen, queries + own));
                    products.map(|(query, key)| query * key).sum::<f64>() / (size as f64).sqrt()
                };
                let scores: Vec<_> = rows[first..=position].iter().map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<_> = scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = powers.iter().sum();
                let mut out = vec![0.0; size];
                for (power, seen) in powers.iter().zip(&rows[first..=position]) {
                    let value = head(seen, queries + keys + own);
                    out.iter_mut().zip(value).for_each(|(out, value)| *out += power / sum * value);
                }
                out
            };
            (0..queries).flat_map(of_head).collect()
        };
        rows.iter().enumerate().map(attend).collect()
    }
}

impl Linear {
    fn apply(&self, rows: &[Vec<f64>], adapters: &Adapters) -> Vec<Vec<f64>> {
        let base = FoldedAdapter { virtual_rows: vec![Default::default()], ..FoldedAdapter::default() };
        let adapter = adapters.iter().find(|(index, _)| *index == self.index).map_or(&base, |(_, adapter)| adapter);
        apply(adapter, rows, &self.weight, self.bias.as_ref())
    }
}

fn apply(adapter: &FoldedAdapter, rows: &[Vec<f64>], weight: &Value, bias: Option<&Value>) -> Vec<Vec<f64>> {
    let x = Value::matrix(rows.len(), rows[0].len(), rows.concat()).expect("whole rows");
    let y = adapter.apply(&x, weight, bias, Activation::Identity).expect("shapes that fit");
    y.data().chunks_exact(weight.shape()[1]).map(<[f64]>::to_vec).collect()
}

fn add(row: &mut [f64], other: &[f64]) {
    row.iter_mut().zip(other).for_each(|(value, other)| *value += other);
}

fn cross_entropy(logits: &[f64], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>().ln() - logits[target]
}
