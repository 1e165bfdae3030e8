//! The tensors of an adapter file → the operands of each module.

use super::config::Config;
use super::description::{Extent, LayerDescription, TensorDescription};
use super::replaced::{self, Part, Replacements};
use super::{AdapterError, AdapterModule, Operand};
use crate::tensor::{StoredTensor, TensorProblem, TensorTable, transpose};
use std::collections::BTreeMap;

/// What PEFT puts before the module path.
pub(super) const PREFIX: &str = "base_model.model.";

/// What PEFT puts before what is shared by all modules.
const SHARED_PREFIX: &str = "base_model.";

/// The longest tensor name, in bytes.
const NAME_LIMIT: usize = 1024;
/// The most matches of patterns with modules that are tried: a thousand patterns for four thousand modules.
const MATCH_LIMIT: usize = 4_000_000;

/// The tensors of one module, by what follows its path: the whole name and the tensor.
type Found<'a> = BTreeMap<&'a str, (&'a str, &'a StoredTensor)>;

/// What a file holds.
pub(super) struct Read {
    pub(super) modules: BTreeMap<String, AdapterModule>,
    pub(super) shared: BTreeMap<String, Operand>,
    pub(super) replaced: Replacements,
}

/// Every module of the file, its operands checked against each other and the config.
pub(super) fn read(config: &Config, tensors: &TensorTable) -> Result<Read, AdapterError> {
    let Grouped { modules: found, shared, parts } = group(config, tensors)?;
    if found.is_empty() && parts.is_empty() {
        let problem = format!("the file holds no {} tensors", config.kind.name());
        return Err(AdapterError::NotAnAdapter { path: tensors.path().to_owned(), reason: problem });
    }
    let patterns = config.patterns();
    if patterns.saturating_mul(found.len()) > MATCH_LIMIT {
        let expected = format!("that many patterns are not tried on {} modules", found.len());
        let option = config.rank.as_ref().and_then(|rank| rank.description.patterns.as_deref()).unwrap_or("patterns");
        return Err(config.invalid(option, format!("{patterns} patterns"), expected));
    }
    let mut modules = BTreeMap::new();
    for (module, found) in found {
        let mut reader = Reader { config, tensors, module: &module, found: &found, extents: BTreeMap::new() };
        let read = reader.read()?;
        modules.insert(module, read);
    }
    let replaced = replaced::read(config, tensors, &parts, &modules)?;
    let shared = shared_operands(config, tensors, &shared)?;
    Ok(Read { modules, shared, replaced })
}

/// The tensors that replace something of the base model: module and part → the tensor's whole name.
type Parts = BTreeMap<(String, Part), String>;

/// The tensors of a file by what they are of.
struct Grouped<'a> {
    modules: BTreeMap<String, Found<'a>>,
    /// Those of all modules, by their names after [`SHARED_PREFIX`].
    shared: Found<'a>,
    parts: Parts,
}

/// Assigns every tensor to a module; what has no place in one is an error.
fn group<'a>(config: &'a Config, tensors: &'a TensorTable) -> Result<Grouped<'a>, AdapterError> {
    let described = || config.layers().flat_map(|layer| &layer.tensors).filter(|tensor| !tensor.shared);
    let shared_names = || config.layers().flat_map(|layer| &layer.tensors).filter(|tensor| tensor.shared);
    let mut modules: BTreeMap<String, Found<'_>> = BTreeMap::new();
    let mut shared = Found::new();
    let mut parts = Parts::new();
    for name in tensors.entries().keys() {
        let extra = |problem: String| AdapterError::ExtraTensor {
            path: tensors.path().to_owned(),
            tensor: name.chars().take(200).collect(),
            problem,
        };
        if name.len() > NAME_LIMIT {
            return Err(extra(format!("has a name of {} bytes; at most {NAME_LIMIT} are accepted", name.len())));
        }
        let end = name.strip_prefix(SHARED_PREFIX);
        let is_shared = |end: &&str| shared_names().flat_map(|tensor| &tensor.names).any(|name| name == *end);
        if let Some(end) = end.filter(is_shared) {
            shared.insert(end, (name, tensors.get(name)?));
            continue;
        }
        let Some(path) = name.strip_prefix(PREFIX) else {
            return Err(extra(format!("does not start with `{PREFIX}`; save the adapter with PEFT's save_pretrained")));
        };
        // PEFT saves some for each module once more.
        let is_copy = |shared: &&String| path.strip_suffix(shared.as_str()).is_some_and(|module| module.ends_with('.'));
        if let Some(shared) = shared_names().flat_map(|tensor| &tensor.names).find(is_copy) {
            let (copy, original) = (tensors.get(name)?, tensors.get(&format!("{SHARED_PREFIX}{shared}"))?);
            if (copy.shape(), copy.encoding(), copy.bytes())
                != (original.shape(), original.encoding(), original.bytes())
            {
                return Err(extra(format!("isn't the copy of `{SHARED_PREFIX}{shared}` that it should be")));
            }
            continue;
        }
        let matched = described().find_map(|tensor| {
            let (suffix, module) = tensor.names.iter().find_map(|suffix| {
                Some((
                    suffix,
                    path.strip_suffix(suffix.as_str())?.strip_suffix('.').filter(|module| !module.is_empty())?,
                ))
            })?;
            Some((tensor, suffix, module))
        });
        let Some((described_tensor, suffix, module)) = matched else {
            if let Some((module, part)) = replaced::part(config, path) {
                if let Some(other) = parts.insert((module.to_string(), part), name.clone()) {
                    return Err(extra(format!("says the same as `{other}`; remove one")));
                }
                continue;
            }
            let mut known: Vec<String> = Vec::new();
            for tensor in described() {
                let end = tensor.names.first().map(|name| format!("`.{name}`"));
                known.extend(end.filter(|end| !known.contains(end)));
            }
            let (kind, known) = (config.kind.name(), known.join(", "));
            return Err(extra(format!("is no part of a {kind} adapter, whose tensors end in {known}")));
        };
        let tensor = tensors.get(name)?;
        let found = modules.entry(module.to_string()).or_default();
        let others = described_tensor.names.iter().filter(|other| *other != suffix);
        if let Some((other, _)) = others.filter_map(|other| found.get(other.as_str())).next() {
            return Err(extra(format!("says the same as `{other}`; remove one")));
        }
        found.insert(suffix, (name, tensor));
    }
    Ok(Grouped { modules, shared, parts })
}

/// The operands that all modules have in common.
fn shared_operands(
    config: &Config,
    tensors: &TensorTable,
    found: &Found<'_>,
) -> Result<BTreeMap<String, Operand>, AdapterError> {
    let mut shared = BTreeMap::new();
    for layer in config.layers() {
        let mut reader = Reader { config, tensors, module: "", found, extents: BTreeMap::new() };
        for described in layer.tensors.iter().filter(|tensor| tensor.shared) {
            let Some((name, tensor)) = reader.tensor(described) else {
                let name = described.names.first().map_or("", String::as_str);
                return Err(AdapterError::MissingTensor {
                    path: tensors.path().to_owned(),
                    tensor: format!("{SHARED_PREFIX}{name}"),
                    module: "all modules".to_owned(),
                    kind: config.kind.name().to_owned(),
                });
            };
            let operand = reader.operand(described, name, tensor)?;
            shared.insert(described.operand.clone(), operand);
        }
    }
    Ok(shared)
}

/// Reads one module.
struct Reader<'a> {
    config: &'a Config,
    tensors: &'a TensorTable,
    module: &'a str,
    found: &'a Found<'a>,
    /// The extents that tensors showed, and the tensor that showed each first.
    extents: BTreeMap<Extent, (usize, String)>,
}

impl<'a> Reader<'a> {
    fn read(&mut self) -> Result<AdapterModule, AdapterError> {
        let layer = self.layer()?;
        if let Some(name) = self.foreign(layer) {
            return Err(AdapterError::ExtraTensor {
                path: self.tensors.path().to_owned(),
                tensor: name.to_string(),
                problem: format!("is no part of a module of the layer `{}`, which the config makes it", layer.name),
            });
        }
        let mut operands = BTreeMap::new();
        let mut missing = Vec::new();
        for described in layer.tensors.iter().filter(|tensor| !tensor.shared) {
            match self.tensor(described) {
                Some((name, tensor)) => {
                    operands.insert(described.operand.clone(), self.operand(described, name, tensor)?);
                }
                None if described.optional => {}
                None => missing.push(described),
            }
        }
        for described in missing {
            let operand = self.filled(described)?;
            operands.insert(described.operand.clone(), operand);
        }
        let rank = match (self.extent(Extent::Rank), &self.config.rank) {
            (Some(shown), _) => shown,
            // What functions read may not show it.
            (None, Some(setting)) if !layer.derived.is_empty() => {
                setting.ranks.of(self.module).map_err(self.config.pattern_error())?
            }
            (None, _) => 0,
        };
        for scalar in &layer.scalars {
            let values = vec![self.config.scalar(scalar, self.module, rank)?];
            operands.insert(scalar.operand.clone(), Operand { shape: Vec::new(), values });
        }
        Ok(AdapterModule { layer: layer.name.clone(), rank, operands })
    }

    fn tensor(&self, described: &TensorDescription) -> Option<(&'a str, &'a StoredTensor)> {
        described.names.iter().find_map(|name| self.found.get(name.as_str()).copied())
    }

    /// A tensor of the module that `layer` doesn't have.
    fn foreign(&self, layer: &LayerDescription) -> Option<&'a str> {
        let has = |suffix: &str| layer.tensors.iter().flat_map(|tensor| &tensor.names).any(|name| name == suffix);
        self.found.iter().find(|(suffix, _)| !has(suffix)).map(|(_, (name, _))| *name)
    }

    fn extent(&self, extent: Extent) -> Option<usize> {
        match extent {
            Extent::Fixed(number) => Some(number),
            symbol => self.extents.get(&symbol).map(|(number, _)| *number),
        }
    }

    /// The layer that the module is of: the one whose list has it, or, without lists, the one whose tensors have these shapes.
    fn layer(&self) -> Result<&'a LayerDescription, AdapterError> {
        let config = self.config;
        let candidates: Vec<&LayerDescription> = config.layers().collect();
        if let [only] = candidates[..] {
            return Ok(only);
        }
        let mut unlisted = Vec::new();
        for layer in &candidates {
            match layer.modules.as_ref().and_then(|option| config.lists.get(option)) {
                None => unlisted.push(*layer),
                Some(Some(names)) if names.contain_loosely(self.module).map_err(config.pattern_error())? => {
                    return Ok(layer);
                }
                Some(Some(_)) => {}
                Some(None) => unlisted.push(*layer),
            }
        }
        if let [only] = unlisted[..] {
            return Ok(only);
        }
        let fits = |layer: &&&LayerDescription| {
            let fits = |tensor: &TensorDescription| match self.tensor(tensor) {
                Some((_, stored)) => is_stored_as(stored.shape(), &tensor.stored),
                None => tensor.default.is_some() || tensor.optional || tensor.shared,
            };
            layer.tensors.iter().all(fits) && self.foreign(layer).is_none()
        };
        let fitting: Vec<&&LayerDescription> = unlisted.iter().filter(fits).collect();
        match (&fitting[..], unlisted.first()) {
            ([only], _) => Ok(only),
            ([], Some(first)) => {
                // Whichever layer was meant, the first tensor that fits none says what is wrong.
                for tensor in &first.tensors {
                    let Some((name, stored)) = self.tensor(tensor) else { continue };
                    let shapes =
                        unlisted.iter().flat_map(|layer| &layer.tensors).filter(|other| other.names == tensor.names);
                    let shapes: Vec<_> = shapes.map(|other| &other.stored).collect();
                    if !shapes.iter().any(|shape| is_stored_as(stored.shape(), shape)) {
                        let shapes: Vec<String> = shapes.into_iter().map(|shape| bracketed(shape)).collect();
                        return Err(self.wrong_shape(name, stored, shapes.join(" or ")));
                    }
                }
                Ok(first)
            }
            _ => {
                let option = candidates.iter().find_map(|layer| layer.modules.as_deref()).unwrap_or("target_modules");
                let expected = format!(
                    "the tensors of `{}` have shapes that fit several layers, so list the modules there",
                    self.module
                );
                Err(config.invalid(option, "not given".to_string(), expected))
            }
        }
    }

    fn wrong_shape(&self, name: &str, tensor: &StoredTensor, expected: String) -> AdapterError {
        self.tensors.error(name, TensorProblem::WrongShape { found: tensor.shape().to_vec(), expected }).into()
    }

    fn operand(
        &mut self,
        described: &TensorDescription,
        name: &str,
        tensor: &StoredTensor,
    ) -> Result<Operand, AdapterError> {
        if !is_stored_as(tensor.shape(), &described.stored) {
            let expected = match described.stored[..] {
                [Extent::Fixed(_)] | [Extent::Fixed(_), _] | [_, Extent::Fixed(_)] => bracketed(&described.stored),
                [_, _] => "a matrix of a linear layer".to_string(),
                [_] => "a vector".to_string(),
                _ => bracketed(&described.stored),
            };
            return Err(self.wrong_shape(name, tensor, expected));
        }
        for (extent, number) in described.stored.iter().zip(tensor.shape()) {
            self.show(*extent, *number, described, name, tensor)?;
        }
        let values = tensor.to_finite_f32().map_err(|problem| self.tensors.error(name, problem))?;
        let extents = described.stored.iter().zip(tensor.shape());
        let extents = extents.filter(|(extent, _)| **extent != Extent::Fixed(1)).map(|(_, number)| *number);
        let mut shape: Vec<usize> = extents.collect();
        if described.transposed {
            shape.reverse();
        }
        let values = match shape[..] {
            [rows, columns] if described.transposed => transpose(&values, columns, rows),
            _ => values,
        };
        Ok(Operand { shape, values })
    }

    /// Holds an extent of a tensor against the config and the tensors before it.
    fn show(
        &mut self,
        extent: Extent,
        number: usize,
        described: &TensorDescription,
        name: &str,
        tensor: &StoredTensor,
    ) -> Result<(), AdapterError> {
        if matches!(extent, Extent::Fixed(_) | Extent::Any | Extent::Components) {
            return Ok(());
        }
        if extent == Extent::Rank {
            self.check_rank(name, number)?;
        }
        match self.extents.get(&extent) {
            Some((known, first)) if *known != number => {
                let shape = described.stored.iter().map(|extent| match self.extent(*extent) {
                    Some(number) => number.to_string(),
                    None => extent.to_string(),
                });
                let shape: Vec<String> = shape.collect();
                let what = if extent == Extent::Inputs { "inputs" } else { "outputs" };
                Err(self.wrong_shape(name, tensor, format!("[{}], the {what} of `{first}`,", shape.join(", "))))
            }
            Some(_) => Ok(()),
            None => {
                // As people say it: PEFT's `lora_B.weight` is `lora_B`.
                let end = described.names.first().map_or("", |name| name.trim_end_matches(".weight"));
                self.extents.insert(extent, (number, end.to_string()));
                Ok(())
            }
        }
    }

    fn check_rank(&self, name: &str, found: usize) -> Result<(), AdapterError> {
        let fail = |rank, expected| AdapterError::Rank {
            path: self.tensors.path().to_owned(),
            tensor: name.to_string(),
            found,
            rank,
            expected,
        };
        if let Some(setting) = &self.config.rank {
            let (said, common) = (&setting.description, setting.ranks.common);
            let by_pattern = setting.ranks.patterns.find(self.module).map_err(self.config.pattern_error())?;
            let ignored = said.patterns_may_be_ignored && found == common;
            match by_pattern {
                Some(expected) if found != expected && !ignored => {
                    let option = said.patterns.as_deref().unwrap_or(&said.option);
                    return Err(fail(expected, format!("`{option}`")));
                }
                None if found != common => return Err(fail(common, format!("`{}`", said.option))),
                _ => {}
            }
        }
        match self.extent(Extent::Rank) {
            Some(other) if other != found => Err(fail(other, "the other factor".to_string())),
            _ => Ok(()),
        }
    }

    /// The operand of a tensor that isn't there.
    fn filled(&self, described: &TensorDescription) -> Result<Operand, AdapterError> {
        let shape: Option<Vec<usize>> = described.shape().into_iter().map(|extent| self.extent(extent)).collect();
        let (Some(default), Some(shape)) = (described.default, shape) else {
            let name = described.names.first().map_or("", String::as_str);
            return Err(AdapterError::MissingTensor {
                path: self.tensors.path().to_owned(),
                tensor: format!("{PREFIX}{}.{name}", self.module),
                module: self.module.to_string(),
                kind: self.config.kind.name().to_string(),
            });
        };
        let values = vec![default; shape.iter().product()];
        Ok(Operand { shape, values })
    }
}

/// Whether a tensor of this shape can be stored as described. No extent is 0.
fn is_stored_as(shape: &[usize], stored: &[Extent]) -> bool {
    let fits = |(number, extent): (&usize, &Extent)| match extent {
        Extent::Fixed(fixed) => number == fixed,
        _ => *number > 0,
    };
    shape.len() == stored.len() && shape.iter().zip(stored).all(fits)
}

fn bracketed(extents: &[Extent]) -> String {
    format!("[{}]", extents.iter().map(Extent::to_string).collect::<Vec<_>>().join(", "))
}
