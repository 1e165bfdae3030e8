//! What an adapter's file may hold beside the adapter's own tensors: copies of modules of the base model that were trained whole
//! (`modules_to_save`) or grew (a resized vocabulary), single rows of them (`trainable_token_indices`), and biases.

use super::config::Config;
use super::{AdapterError, AdapterModule};
use crate::tensor::{SharedBytes, StoredTensor, TensorProblem, TensorTable};
use std::collections::BTreeMap;

/// What takes the place of something of the base model, by module path.
#[derive(Clone, Debug, Default)]
pub struct Replacements {
    /// Whole weights.
    pub weights: BTreeMap<String, ReplacedWeight>,
    /// Single rows of weights.
    pub rows: BTreeMap<String, ReplacedRows>,
    /// Biases `[k]`, finite.
    pub biases: BTreeMap<String, Vec<f32>>,
    /// Biases `[k]` that are added to the base's, scaled already.
    pub added_biases: BTreeMap<String, Vec<f32>>,
    /// Modules that the config lists as saved whole, by the ends of their paths.
    pub(super) listed: Vec<String>,
    /// What is done to the embedding is done to an output matrix that is tied to it.
    pub(super) keeps_ties: bool,
}

/// A weight that takes the place of the base's, which it may equal.
#[derive(Clone, Debug)]
pub struct ReplacedWeight {
    /// `[k, d]`, as the base stores it.
    pub tensor: StoredTensor,
    /// A copy of this module alone, even where the base shares its weight with another. Otherwise the base's own weight is replaced,
    /// for all that share it.
    pub(super) of_one_module: bool,
}

/// Rows that take the place of some of a weight's.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplacedRows {
    /// Which, each once.
    pub rows: Vec<u32>,
    /// `[rows, columns]`, finite.
    pub values: Vec<f32>,
}

impl ReplacedRows {
    /// Numbers in a row.
    pub fn width(&self) -> usize {
        self.values.len() / self.rows.len().max(1)
    }

    /// The row that takes the place of `row`.
    pub fn get(&self, row: u32) -> Option<&[f32]> {
        let at = self.rows.iter().position(|own| *own == row)?;
        self.values.chunks_exact(self.width().max(1)).nth(at)
    }
}

impl Replacements {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.weights.is_empty() && self.rows.is_empty() && self.biases.is_empty() && self.added_biases.is_empty()
    }
}

/// What a tensor replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Weight,
    Rows,
    Bias,
    AddedBias,
}

/// The ends of tensors' names, the longer ones of an alike end first.
const ENDS: [(&str, Part); 6] = [
    (".token_adapter.trainable_tokens_delta", Part::Rows),
    (".lora_B.bias", Part::AddedBias),
    (".base_layer.weight", Part::Weight),
    (".weight", Part::Weight),
    (".base_layer.bias", Part::Bias),
    (".bias", Part::Bias),
];

/// The module that the tensor at `path` replaces something of, and what of it.
pub(super) fn part<'p>(config: &Config, path: &'p str) -> Option<(&'p str, Part)> {
    let (module, part) = ENDS.iter().find_map(|(end, part)| Some((path.strip_suffix(end)?, *part)))?;
    let is_allowed = match part {
        Part::AddedBias => config.adds_biases,
        Part::Rows => config.token_indices.is_some(),
        // An adapter's own tensors under names that its kind doesn't have.
        Part::Weight | Part::Bias => !module.rsplit('.').next().is_some_and(|last| last.starts_with("lora_")),
    };
    (is_allowed && !module.is_empty()).then_some((module, part))
}

/// The tensors of `parts`: module and part → the tensor's whole name.
pub(super) fn read(
    config: &Config,
    tensors: &TensorTable,
    parts: &BTreeMap<(String, Part), String>,
    modules: &BTreeMap<String, AdapterModule>,
) -> Result<Replacements, AdapterError> {
    let mut replaced = Replacements {
        listed: config.modules_to_save.clone(),
        keeps_ties: config.keeps_ties,
        ..Replacements::default()
    };
    for ((module, part), name) in parts {
        let tensor = tensors.get(name)?;
        let bad = |problem| AdapterError::from(tensors.error(name, problem));
        match part {
            Part::Weight => {
                let tensor = detached(tensor).map_err(bad)?;
                let of_one_module = config.modules_to_save.iter().any(|listed| module.ends_with(listed.as_str()));
                replaced.weights.insert(module.clone(), ReplacedWeight { tensor, of_one_module });
            }
            Part::Rows => {
                let rows = config.token_rows(module)?;
                let (count, _) = tensor.matrix_shape().map_err(bad)?;
                if count != rows.len() || count == 0 {
                    let expected = format!("[{}, width], a row for each of `trainable_token_indices`,", rows.len());
                    return Err(bad(TensorProblem::WrongShape { found: tensor.shape().to_vec(), expected }));
                }
                let values = tensor.to_finite_f32().map_err(bad)?;
                replaced.rows.insert(module.clone(), ReplacedRows { rows, values });
            }
            Part::Bias | Part::AddedBias => {
                if !matches!(tensor.shape(), [_]) {
                    let expected = "a vector".to_string();
                    return Err(bad(TensorProblem::WrongShape { found: tensor.shape().to_vec(), expected }));
                }
                let mut values = tensor.to_finite_f32().map_err(bad)?;
                if *part == Part::Bias {
                    replaced.biases.insert(module.clone(), values);
                    continue;
                }
                let scale = modules.get(module).and_then(|own| own.operands.get("s")?.values.first().copied());
                let Some(scale) = scale else {
                    return Err(AdapterError::ExtraTensor {
                        path: tensors.path().to_owned(),
                        tensor: name.clone(),
                        problem: "is the bias of factors that are missing".to_string(),
                    });
                };
                values.iter_mut().for_each(|value| *value *= scale);
                replaced.added_biases.insert(module.clone(), values);
            }
        }
    }
    Ok(replaced)
}

/// The same tensor without the file that it is part of.
fn detached(tensor: &StoredTensor) -> Result<StoredTensor, TensorProblem> {
    StoredTensor::new(tensor.shape().to_vec(), tensor.encoding(), SharedBytes::from(tensor.bytes().to_vec()))
}
