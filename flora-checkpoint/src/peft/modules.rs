//! The tensors of an adapter file → the operands of each module.

use super::config::Config;
use super::{AdapterError, AdapterKind, AdapterModule, Operand};
use crate::tensor::{StoredTensor, TensorProblem, TensorTable, transpose};
use std::collections::BTreeMap;

/// What PEFT puts before the module path.
pub(super) const PREFIX: &str = "base_model.model.";

/// The longest tensor name, in bytes.
const NAME_LIMIT: usize = 1024;
/// The most matches of patterns with modules that are tried: a thousand patterns for four thousand modules.
const MATCH_LIMIT: usize = 4_000_000;

/// A tensor that a module of some kind has.
pub(super) struct Slot {
    /// What follows the module path and a dot.
    pub(super) suffix: &'static str,
    /// Another suffix for the same, in files of other PEFT versions.
    alias: Option<&'static str>,
    pub(super) operand: &'static str,
    pub(super) form: Form,
}

/// How a stored tensor becomes an operand.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A matrix that is stored the other way round.
    Transposed,
    /// A matrix that is stored as it is used.
    AsStored,
    /// `[n]`
    Vector,
    /// `[k, 1]`, or `[1, d]` for a feed-forward module.
    ColumnOrRow,
}

const fn slot(suffix: &'static str, operand: &'static str, form: Form) -> Slot {
    Slot { suffix, alias: None, operand, form }
}

/// PEFT computes x Aᵀ Bᵀ with A `[r, d]`, B `[k, r]`: its A transposed is our b, its B transposed our a.
const LORA: [Slot; 2] = [slot("lora_A.weight", "b", Form::Transposed), slot("lora_B.weight", "a", Form::Transposed)];
const DORA: [Slot; 3] = [
    slot("lora_A.weight", "b", Form::Transposed),
    slot("lora_B.weight", "a", Form::Transposed),
    Slot {
        suffix: "lora_magnitude_vector",
        alias: Some("lora_magnitude_vector.weight"),
        operand: "m",
        form: Form::Vector,
    },
];
const IA3: [Slot; 1] = [slot("ia3_l", "l", Form::ColumnOrRow)];
const HIRA: [Slot; 2] = [slot("hira_A", "b", Form::Transposed), slot("hira_B", "a", Form::Transposed)];
const FLORA: [Slot; 2] = [slot("flora_B", "b", Form::AsStored), slot("flora_A", "a", Form::AsStored)];

pub(super) fn slots(kind: AdapterKind) -> &'static [Slot] {
    match kind {
        AdapterKind::Lora => &LORA,
        AdapterKind::Dora => &DORA,
        AdapterKind::Ia3 => &IA3,
        AdapterKind::Hira => &HIRA,
        AdapterKind::Flora => &FLORA,
    }
}

/// The tensors of one module: for each slot of the kind, its name and the tensor.
type Found<'a> = Vec<Option<(&'a str, &'a StoredTensor)>>;

/// Every module of the file, its operands checked against each other and the config.
pub(super) fn read(config: &Config, tensors: &TensorTable) -> Result<BTreeMap<String, AdapterModule>, AdapterError> {
    let found = group(config.kind, tensors)?;
    if found.is_empty() {
        let problem = format!("the file holds no {} tensors", config.kind.name());
        return Err(AdapterError::NotAnAdapter { path: tensors.path().to_owned(), reason: problem });
    }
    let patterns = config.ranks.len() + config.alphas.len();
    if patterns.saturating_mul(found.len()) > MATCH_LIMIT {
        let expected = format!("that many patterns are not tried on {} modules", found.len());
        return Err(config.invalid("rank_pattern", format!("{patterns} patterns"), expected));
    }
    let mut modules = BTreeMap::new();
    for (module, found) in found {
        let read = Reader { config, tensors, module: &module, found: &found }.read()?;
        modules.insert(module, read);
    }
    Ok(modules)
}

/// Assigns every tensor to a slot of a module; what has no slot is an error.
fn group(kind: AdapterKind, tensors: &TensorTable) -> Result<BTreeMap<String, Found<'_>>, AdapterError> {
    let slots = slots(kind);
    let mut modules: BTreeMap<String, Found<'_>> = BTreeMap::new();
    for name in tensors.entries().keys() {
        let extra = |problem: String| AdapterError::ExtraTensor {
            path: tensors.path().to_owned(),
            tensor: name.chars().take(200).collect(),
            problem,
        };
        if name.len() > NAME_LIMIT {
            return Err(extra(format!("has a name of {} bytes; at most {NAME_LIMIT} are accepted", name.len())));
        }
        let Some(path) = name.strip_prefix(PREFIX) else {
            return Err(extra(format!("does not start with `{PREFIX}`; save the adapter with PEFT's save_pretrained")));
        };
        let ending = |suffix: &str| path.strip_suffix(suffix).and_then(|rest| rest.strip_suffix('.'));
        let matched = slots.iter().enumerate().find_map(|(index, slot)| {
            let module = ending(slot.suffix).or_else(|| slot.alias.and_then(ending));
            module.filter(|module| !module.is_empty()).map(|module| (index, module))
        });
        let Some((index, module)) = matched else {
            let known: Vec<String> = slots.iter().map(|slot| format!("`.{}`", slot.suffix)).collect();
            let known = known.join(", ");
            return Err(extra(format!("is no part of a {} adapter, whose tensors end in {known}", kind.name())));
        };
        let tensor = tensors.get(name)?;
        let found = modules.entry(module.to_string()).or_insert_with(|| vec![None; slots.len()]);
        if let Some((other, _)) = found[index].replace((name, tensor)) {
            return Err(extra(format!("says the same as `{other}`; remove one")));
        }
    }
    Ok(modules)
}

/// Reads one module.
struct Reader<'a> {
    config: &'a Config,
    tensors: &'a TensorTable,
    module: &'a str,
    found: &'a Found<'a>,
}

impl Reader<'_> {
    fn read(&self) -> Result<AdapterModule, AdapterError> {
        let Config { kind, mean, .. } = *self.config;
        let mut operands = BTreeMap::new();
        let mut layer = match kind {
            AdapterKind::Lora => "lora",
            AdapterKind::Dora => "dora",
            AdapterKind::Ia3 => "ia3",
            AdapterKind::Hira => "hira",
            AdapterKind::Flora if mean => "flora_mean",
            AdapterKind::Flora => "flora",
        };
        let mut rank = None;
        for (slot, found) in slots(kind).iter().zip(self.found) {
            let Some((name, tensor)) = *found else {
                return Err(AdapterError::MissingTensor {
                    path: self.tensors.path().to_owned(),
                    tensor: format!("{PREFIX}{}.{}", self.module, slot.suffix),
                    module: self.module.to_string(),
                    kind: kind.name(),
                });
            };
            let shape = self.shape(name, tensor, slot.form)?;
            if slot.form == Form::ColumnOrRow && self.is_feedforward(name, tensor)? {
                layer = "ia3_feedforward";
            }
            // b is [d, r] and a is [r, k]; nothing else has a rank.
            let axis = match slot.operand {
                "b" => Some(1),
                "a" => Some(0),
                _ => None,
            };
            if let Some(found) = axis.and_then(|axis| shape.get(axis).copied()) {
                self.check_rank(name, found, &mut rank)?;
            }
            let values = tensor.to_finite_f32().map_err(|problem| self.tensors.error(name, problem))?;
            let values = match (slot.form, &shape[..]) {
                (Form::Transposed, [rows, columns]) => transpose(&values, *columns, *rows),
                _ => values,
            };
            operands.insert(slot.operand, Operand { shape, values });
        }
        self.check_ends(&operands)?;
        let rank = rank.unwrap_or(0);
        if matches!(kind, AdapterKind::Lora | AdapterKind::Dora) {
            operands.insert("s", Operand { shape: Vec::new(), values: vec![self.scale(rank)?] });
        }
        Ok(AdapterModule { layer, rank, operands })
    }

    /// The operand's shape, from the stored one.
    fn shape(&self, name: &str, tensor: &StoredTensor, form: Form) -> Result<Vec<usize>, AdapterError> {
        let shape = match (form, tensor.shape()) {
            (Form::Transposed, [rows, columns]) => vec![*columns, *rows],
            (Form::AsStored, [rows, columns]) => vec![*rows, *columns],
            (Form::Vector, [length]) => vec![*length],
            (Form::ColumnOrRow, [1, length] | [length, 1]) => vec![*length],
            _ => Vec::new(),
        };
        if shape.is_empty() || shape.contains(&0) {
            let expected = match form {
                Form::Transposed | Form::AsStored => "a matrix of a linear layer",
                Form::Vector => "a vector",
                Form::ColumnOrRow => "[k, 1] or [1, d]",
            };
            let problem = TensorProblem::WrongShape { found: tensor.shape().to_vec(), expected: expected.to_string() };
            return Err(self.tensors.error(name, problem).into());
        }
        Ok(shape)
    }

    /// Whether an IA3 vector scales the input; config and shape must agree.
    fn is_feedforward(&self, name: &str, tensor: &StoredTensor) -> Result<bool, AdapterError> {
        let is_row = matches!(tensor.shape(), [1, _]);
        let is_column = matches!(tensor.shape(), [_, 1]);
        let Some(feedforward) = &self.config.feedforward else {
            if is_row && is_column {
                let expected =
                    "with one element the shapes of both forms agree, so list the feed-forward modules".to_string();
                return Err(self.config.invalid("feedforward_modules", "not given".to_string(), expected));
            }
            return Ok(is_row);
        };
        let says = feedforward.contain_loosely(self.module).map_err(self.config.pattern_error())?;
        if says && is_row || !says && is_column {
            return Ok(says);
        }
        let expected = if says { "[1, d], for a feed-forward module of the config" } else { "[k, 1]" };
        let problem = TensorProblem::WrongShape { found: tensor.shape().to_vec(), expected: expected.to_string() };
        Err(self.tensors.error(name, problem).into())
    }

    fn check_rank(&self, name: &str, found: usize, rank: &mut Option<usize>) -> Result<(), AdapterError> {
        let by_pattern = self.config.ranks.find(self.module).map_err(self.config.pattern_error())?;
        let fail = |rank, expected| AdapterError::Rank {
            path: self.tensors.path().to_owned(),
            tensor: name.to_string(),
            found,
            rank,
            expected,
        };
        // PEFT 0.21 creates a model's first HiRA adapter with `r`, whatever the pattern; its result doesn't depend on either.
        let ignored = self.config.kind == AdapterKind::Hira && found == self.config.rank;
        match by_pattern {
            Some(expected) if found != expected && !ignored => return Err(fail(expected, "`rank_pattern`")),
            None if found != self.config.rank => return Err(fail(self.config.rank, "`r`")),
            _ => {}
        }
        match rank.replace(found) {
            Some(other) if other != found => Err(fail(other, "the other factor")),
            _ => Ok(()),
        }
    }

    /// DoRA's magnitudes must be as many as the outputs.
    fn check_ends(&self, operands: &BTreeMap<&'static str, Operand>) -> Result<(), AdapterError> {
        let (Some(a), Some(m)) = (operands.get("a"), operands.get("m")) else { return Ok(()) };
        if a.shape.get(1) == m.shape.first() {
            return Ok(());
        }
        let expected = format!("[{}], the outputs of `lora_B`,", a.shape.get(1).copied().unwrap_or(0));
        let problem = TensorProblem::WrongShape { found: m.shape.clone(), expected };
        Err(self.tensors.error(&format!("{PREFIX}{}.lora_magnitude_vector", self.module), problem).into())
    }

    /// LoRA's scale: α/r, or α/√r when rank-stabilised.
    fn scale(&self, rank: usize) -> Result<f32, AdapterError> {
        let by_pattern = self.config.alphas.find(self.module).map_err(self.config.pattern_error())?;
        let alpha = by_pattern.unwrap_or(self.config.alpha);
        let divisor = if self.config.rank_stabilised { (rank as f64).sqrt() } else { rank as f64 };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            let expected = format!("the scale of module `{}` exceeds the range of f32", self.module);
            return Err(self.config.invalid("lora_alpha", alpha.to_string(), expected));
        }
        Ok(scale)
    }
}
