//! Adapters whose parts are weighed for each token (X-LoRA): a small network reads the base model's last hidden state of a token and gives
//! a gate for each part, or for each part at each projection.
//!
//! So a step runs the tokens of such sequences two times: with the base model, beside all other rows of the step, and then by themselves
//! with their adapter and the gates. The base model's keys and values are kept beside the adapter's.

use std::collections::BTreeMap;
use std::sync::Arc;

use flora_adapters::BaseError;
use flora_checkpoint::{AdapterMixture, ClassifierLayer, GateRule};
use flora_engine::{AdapterId, Decoder, LogitRows, StepSegment};
use flora_ir::Activation;
use flora_plan::layer::LayerShape;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Buffer, Device, PlannedProjection, ProjectionError, RowGates, StepBatch};

use crate::decoder::{Sequence, ServedModel, wanted};
use crate::error::ServeError;
use crate::form::{Finish, ProjectionForm};
use crate::operations::Serving;

/// What weighs the parts of an adapter, in host memory.
#[derive(Clone, Debug)]
pub struct PreparedGates {
    /// By module path, of each rank the part that it is of.
    ranks: Arc<BTreeMap<String, Vec<u32>>>,
    classifier: Arc<[ClassifierLayer]>,
    parts: usize,
    layerwise: bool,
    rule: GateRule,
}

impl PreparedGates {
    pub(crate) fn new(mixture: AdapterMixture, ranks: BTreeMap<String, Vec<u32>>) -> Self {
        let AdapterMixture { parts, classifier, layerwise, rule, .. } = mixture;
        Self { ranks: ranks.into(), classifier: classifier.into(), parts: parts.len(), layerwise, rule }
    }

    /// Bytes that the network takes.
    pub(crate) fn bytes(&self) -> u64 {
        self.classifier.iter().map(|layer| 4 * (layer.weight.len() + layer.bias.len()) as u64).sum()
    }

    /// The modules that are gated, each with the set of gates that is its own and the parts of its ranks; `order` is that of the model's
    /// modules.
    pub(crate) fn modules<'a>(&'a self, order: &'a [String]) -> impl Iterator<Item = (&'a str, usize, &'a [u32])> {
        let gated = order.iter().filter_map(|path| Some((path.as_str(), self.ranks.get(path)?.as_slice())));
        gated.enumerate().map(|(at, (path, ranks))| (path, if self.layerwise { at } else { 0 }, ranks))
    }
}

/// The same on the device.
pub(crate) struct ResidentGates {
    layers: Vec<PlannedProjection>,
    parts: usize,
    rule: GateRule,
}

/// Why a classifier can't be put on the device.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClassifierError {
    #[error(transparent)]
    Base(#[from] BaseError),
    #[error(transparent)]
    Projection(#[from] ProjectionError),
    #[error("its classifier has layers that are too large for any device")]
    Extent,
}

impl ResidentGates {
    pub(crate) fn new(form: &ProjectionForm, gates: &PreparedGates) -> Result<Self, ClassifierError> {
        let last = gates.classifier.len().saturating_sub(1);
        let layer = |(at, layer): (usize, &ClassifierLayer)| {
            let extent = |extent: usize| u32::try_from(extent).map_err(|_| ClassifierError::Extent);
            let shape = LayerShape { d: extent(layer.inputs)?, k: extent(layer.outputs)? };
            let values = flora_checkpoint::tensor::transpose(&layer.weight, layer.outputs, layer.inputs);
            let weight = PackedWeight::from_f32(Default::default(), shape, &values)
                .map_err(|source| BaseError::Pack { name: "the classifier".to_owned(), source })?;
            let finish = if at < last { Finish::Activation(Activation::Relu) } else { Finish::Nothing };
            Ok::<_, ClassifierError>(form.projection(&weight, Some(&layer.bias), finish)?)
        };
        let layers = gates.classifier.iter().enumerate().map(layer).collect::<Result<_, _>>()?;
        Ok(Self { layers, parts: gates.parts, rule: gates.rule })
    }

    /// Bytes that the weights take on the device.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes = |linear: &PlannedProjection| {
            linear.change(|projection| projection.operands().format().weight.bytes(projection.shape()))
        };
        self.layers.iter().map(bytes).sum()
    }

    /// The gates of hidden states `[rows, d]`: `[rows, sets, parts]`.
    fn of(&self, device: &Device, hidden: Buffer, rows: usize) -> Result<Vec<f32>, ServeError> {
        let batch = StepBatch::new([(0, rows as u32)]);
        let mut x = hidden;
        for layer in &self.layers {
            x = layer.forward(&x, &batch, None)?;
        }
        let mut gates = device.read(&x)?;
        gates.chunks_exact_mut(self.parts).for_each(|set| apply(self.rule, set));
        Ok(gates)
    }
}

/// Makes the gates of the logits of one set, as PEFT does.
fn apply(rule: GateRule, set: &mut [f32]) {
    if let Some(temperature) = rule.temperature {
        shares(set, |logit| Some(f64::from(logit) / temperature));
    }
    if let Some(top) = rule.top.filter(|top| *top < set.len()) {
        let mut order: Vec<usize> = (0..set.len()).collect();
        // Of equal ones the first is the largest.
        order.sort_by(|one, other| set[*other].total_cmp(&set[*one]));
        order[top..].iter().for_each(|at| set[*at] = 0.0);
    }
    if rule.shares_of_top {
        shares(set, |gate| (gate != 0.0).then_some(f64::from(gate)));
    }
}

/// Softmax over those that `of` gives a logit; the others become 0.
fn shares(set: &mut [f32], of: impl Fn(f32) -> Option<f64>) {
    let logits: Vec<Option<f64>> = set.iter().map(|value| of(*value)).collect();
    let largest = logits.iter().flatten().copied().fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|logit| logit.map_or(0.0, |logit| (logit - largest).exp())).collect();
    let sum: f64 = powers.iter().sum();
    let share = |power: f64| if power == 0.0 { 0.0 } else { (power / sum) as f32 };
    set.iter_mut().zip(powers).for_each(|(value, power)| *value = share(power));
}

impl<O: Serving> ServedModel<O> {
    /// Runs a step that has segments of gated adapters.
    pub(crate) fn run_gated(
        &self,
        segments: &[StepSegment<'_>],
        sequences: &mut [Sequence<O>],
    ) -> Result<Vec<f32>, ServeError> {
        let is_gated = |segment: &StepSegment<'_>| self.gates(segment.adapter).is_some();
        let blocks = self.parts.blocks.len();
        let mut base = segments.to_vec();
        for segment in base.iter_mut().filter(|segment| is_gated(segment)) {
            (segment.adapter, segment.logits) = (None, LogitRows::None);
        }
        let of_base = |(sequence, segment): (&'_ mut Sequence<O>, &StepSegment<'_>)| match is_gated(segment) {
            true => sequence.layers.split_off(blocks),
            false => std::mem::take(&mut sequence.layers),
        };
        // The base model's part of what a gated sequence keeps is taken out, and put back behind the adapter's.
        let mut layers: Vec<Vec<O::Cache>> = sequences.iter_mut().zip(segments).map(of_base).collect();
        let mut caches: Vec<_> = layers.iter_mut().map(|layers| &mut layers[..]).collect();
        // Of gated rows all are needed: they are what gates are made of.
        let x = self.forward(&base, &mut caches, Vec::new(), None)?;
        let of_others = wanted(&base);
        let rows = segments.iter().map(|segment| segment.tokens.len()).sum();
        let others = self.logits_of(&base, &of_others, &self.rows_of(&x, rows, &of_others)?)?;

        let gated: Vec<StepSegment<'_>> = segments.iter().filter(|segment| is_gated(segment)).copied().collect();
        let gates = self.row_gates(segments, &x)?;
        let of_gated = sequences.iter_mut().zip(segments).filter(|(_, segment)| is_gated(segment));
        let mut caches: Vec<_> = of_gated.map(|(sequence, _)| &mut sequence.layers[..]).collect();
        let x = self.forward(&gated, &mut caches, gates, None)?;
        let of_gated = wanted(&gated);
        let rows = gated.iter().map(|segment| segment.tokens.len()).sum();
        let own = self.logits_of(&gated, &of_gated, &self.rows_of(&x, rows, &of_gated)?)?;
        sequences.iter_mut().zip(layers).for_each(|(sequence, layers)| sequence.layers.extend(layers));

        let (mut others, mut own) = (&others[..], &own[..]);
        let mut logits = Vec::with_capacity(others.len() + own.len());
        for segment in segments {
            let count = segment.logits.of(segment.tokens.len()) * self.vocabulary(segment.adapter) as usize;
            let rows = if is_gated(segment) { &mut own } else { &mut others };
            logits.extend(rows.split_off(..count).unwrap_or_default());
        }
        Ok(logits)
    }

    /// The gates of all gated segments, by the rows of these alone; x `[rows of all segments, d]` came out of the base model's blocks.
    fn row_gates(&self, segments: &[StepSegment<'_>], x: &Buffer) -> Result<Vec<RowGates>, ServeError> {
        // By adapter, its rows among all rows, and among the gated ones.
        let mut of_adapters: BTreeMap<AdapterId, Vec<(usize, usize)>> = BTreeMap::new();
        let (mut row, mut gated_row) = (0, 0);
        for segment in segments {
            if let Some(adapter) = segment.adapter.filter(|adapter| self.gates(Some(*adapter)).is_some()) {
                let rows = (row..row + segment.tokens.len()).zip(gated_row..);
                of_adapters.entry(adapter).or_default().extend(rows);
                gated_row += segment.tokens.len();
            }
            row += segment.tokens.len();
        }
        let operations = &self.parts.operations;
        let mut all = Vec::new();
        for (adapter, rows) in of_adapters {
            let Some(resident) = self.gates(Some(adapter)) else { continue };
            let (of_x, of_gated): (Vec<usize>, Vec<usize>) = rows.into_iter().unzip();
            let hidden = operations.normalise(&self.parts.norm, &operations.select(x, row, &of_x)?)?;
            let values = resident.of(&self.device, hidden, of_x.len())?;
            let (parts, numbers) = (resident.parts, values.len() / of_x.len().max(1));
            let mut pieces: Vec<RowGates> = Vec::new();
            for (at, values) in of_gated.into_iter().zip(values.chunks_exact(numbers.max(1))) {
                // Rows that follow one another are one piece.
                match pieces.last_mut().filter(|last| last.rows.end == at) {
                    Some(last) => {
                        last.rows.end += 1;
                        last.values.extend_from_slice(values);
                    }
                    None => pieces.push(RowGates {
                        rows: at..at + 1,
                        layers: numbers / parts,
                        parts,
                        values: values.to_vec(),
                    }),
                }
            }
            all.append(&mut pieces);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_pefts() {
        let of = |temperature, top, shares_of_top, logits: [f32; 3]| {
            let mut set = logits;
            apply(GateRule { temperature, top, shares_of_top }, &mut set);
            set
        };
        assert_eq!(of(None, None, false, [0.5, -1.0, 0.0]), [0.5, -1.0, 0.0]);
        let shares = of(Some(2.0), None, false, [2.0, 4.0, 0.0]);
        let sum: f64 = [1.0f64, 2.0, 0.0].iter().map(|logit| logit.exp()).sum();
        for (share, logit) in shares.iter().zip([1.0f64, 2.0, 0.0]) {
            assert!((f64::from(*share) - logit.exp() / sum).abs() < 1e-7);
        }
        assert_eq!(of(None, Some(2), false, [0.5, -1.0, 0.25]), [0.5, 0.0, 0.25]);
        assert_eq!(of(None, Some(1), false, [0.5, 0.5, 0.5]), [0.5, 0.0, 0.0], "of equal ones the first");
        // What is 0 is none of those that share.
        assert_eq!(of(None, Some(1), true, [0.5, -1.0, 0.25]), [1.0, 0.0, 0.0]);
        let half = of(None, Some(2), true, [0.5, 0.5, 0.25]);
        assert_eq!(half, [0.5, 0.5, 0.0]);
        assert_eq!(of(None, None, true, [0.0; 3]), [0.0; 3]);
    }
}
