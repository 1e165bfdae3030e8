//! Writes adapter folders as the description of their kind says, so that PEFT reads those of its own kinds, and [`AdapterFolder::open`] reads back exactly.

use super::description::{Choice, Divisor, Extent, LayerDescription, ScalarDescription, TensorDescription};
use super::modules::PREFIX;
use super::{AdapterError, AdapterFolder, AdapterKinds, AdapterModule, CONFIG, Operand, TENSORS};
use crate::atomic;
use crate::error::FileError;
use crate::safetensors_file;
use crate::tensor::transpose;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};

impl AdapterFolder {
    /// Writes the adapter as the folder `name` of `parent`, which is created; returns the folder's path.
    ///
    /// The folder appears whole or not at all, and only after reading it back gave the same adapter. A folder of that name must
    /// not exist.
    ///
    /// # Errors
    /// The name is taken or no name, the adapter can't be said in PEFT's layout, or the operating system refuses.
    pub fn write(&self, parent: &Path) -> Result<PathBuf, AdapterError> {
        let path = parent.join(&self.name);
        let written = self.write_beside(parent, |path| match path.symlink_metadata() {
            Ok(_) => Err(AdapterError::Exists { path: path.to_owned() }),
            Err(_) => Ok(()),
        })?;
        std::fs::rename(&written.folder, &path).map_err(|source| FileError::io(&path, "create", source))?;
        atomic::sync_folder(parent)?;
        Ok(path)
    }

    /// [`write`](Self::write), in place of the folder of that name if there is one: a reader sees the old adapter or the new one.
    ///
    /// Where the system can't exchange two folders, there is none for a moment.
    ///
    /// # Errors
    /// As [`write`](Self::write); what has the name is then as it was. What isn't an adapter's folder isn't replaced.
    pub fn replace(&self, parent: &Path) -> Result<PathBuf, AdapterError> {
        let path = parent.join(&self.name);
        let written = self.write_beside(parent, |path| {
            let is_free = path.symlink_metadata().is_err();
            let is_adapter = path.join(CONFIG).symlink_metadata().is_ok();
            if is_free || is_adapter { Ok(()) } else { Err(AdapterError::Exists { path: path.to_owned() }) }
        })?;
        atomic::replace_folder(&written.folder, &path)?;
        atomic::sync_folder(parent)?;
        Ok(path)
    }

    /// The adapter in a folder of `parent` that goes when it is dropped; `check` may refuse the path that it should have.
    fn write_beside(
        &self,
        parent: &Path,
        check: impl FnOnce(&Path) -> Result<(), AdapterError>,
    ) -> Result<Written, AdapterError> {
        let mut components = Path::new(&self.name).components();
        let is_plain = matches!((components.next(), components.next()), (Some(std::path::Component::Normal(_)), None));
        if !is_plain {
            return Err(self.unwritable("", "the adapter's name is no plain folder name".to_string()));
        }
        if !self.replaced.is_empty() {
            let problem = "it replaces weights of the base model, which only PEFT writes".to_string();
            return Err(self.unwritable("", problem));
        }
        let derived = |layer: &&LayerDescription| !layer.derived.is_empty();
        if let Some(layer) = self.kind.layers().filter_map(|name| self.kind.layer(name)).find(derived) {
            let problem = format!("operands of the layer `{}` are derived from what only PEFT writes", layer.name);
            return Err(self.unwritable("", problem));
        }
        let config = self.config()?;
        let tensors = self.tensors()?;
        std::fs::create_dir_all(parent).map_err(|source| FileError::io(parent, "create", source))?;
        check(&parent.join(&self.name))?;
        let temporary = tempfile::Builder::new().prefix(".adapter-").tempdir_in(parent);
        let temporary = temporary.map_err(|source| FileError::io(parent, "write in", source))?;
        let folder = temporary.path().join(&self.name);
        std::fs::create_dir(&folder).map_err(|source| FileError::io(&folder, "create", source))?;
        atomic::write_file(&folder.join(CONFIG), format!("{config:#}\n").as_bytes())?;
        atomic::write_file(&folder.join(TENSORS), &tensors)?;
        let again = AdapterFolder::open(&folder, &AdapterKinds::only(&self.kind))?;
        if again.kind != self.kind || again.modules != self.modules {
            let changed = self.modules.iter().find(|(module, adapter)| again.modules.get(*module) != Some(*adapter));
            let module = changed.map_or("", |(module, _)| module);
            return Err(
                self.unwritable(module, "its layer, rank or operands can't be said in PEFT's layout".to_string())
            );
        }
        Ok(Written { folder, _temporary: temporary })
    }

    fn unwritable(&self, module: &str, problem: String) -> AdapterError {
        AdapterError::Unwritable { name: self.name.clone(), module: module.to_string(), problem }
    }

    fn config(&self) -> Result<Value, AdapterError> {
        let description = self.kind.description();
        let mut config = Map::new();
        config.insert("peft_type".into(), json!(description.peft_type));
        config.insert("inference_mode".into(), json!(true));
        config.insert("task_type".into(), Value::Null);
        config.insert("target_modules".into(), json!(self.modules.keys().collect::<Vec<_>>()));
        if let Some(rank) = &description.rank {
            config.insert(rank.option.clone(), json!(self.first_rank()));
            if let Some(patterns) = &rank.patterns {
                let other = |module: &AdapterModule| Ok((module.rank != self.first_rank()).then(|| json!(module.rank)));
                config.insert(patterns.clone(), self.patterns(other)?);
            }
        }
        // Layers without modules first, so that the choices of those with modules hold.
        let mut layers: Vec<&LayerDescription> = self.kind.layers().filter_map(|name| self.kind.layer(name)).collect();
        layers.sort_by_key(|layer| self.modules.values().any(|module| module.layer == layer.name));
        for layer in layers {
            for (option, choice) in &layer.when {
                let value = match choice {
                    Choice::Flag(flag) => json!(flag),
                    Choice::Word(word) => json!(word),
                };
                config.insert(option.clone(), value);
            }
            if let Some(option) = &layer.modules {
                let own = self.modules.iter().filter(|(_, module)| module.layer == layer.name);
                config.insert(option.clone(), json!(own.map(|(path, _)| path).collect::<Vec<_>>()));
            }
            for scalar in &layer.scalars {
                let of = |module: &AdapterModule| match module.layer == layer.name {
                    true => number(scalar, module).map(|number| Some(json!(number))),
                    false => Ok(None),
                };
                let first = self.modules.values().find(|module| module.layer == layer.name);
                // Where there are patterns, each module has its own, so the common number never holds.
                let common = first.map(|module| number(scalar, module)).transpose();
                let common = common.map_err(|problem| self.unwritable("", problem))?;
                config.insert(scalar.option.clone(), json!(common.or(scalar.default).unwrap_or(1.0)));
                if let Some(patterns) = &scalar.patterns {
                    config.insert(patterns.clone(), self.patterns(of)?);
                }
            }
        }
        Ok(Value::Object(config))
    }

    fn first_rank(&self) -> usize {
        self.modules.values().next().map_or(1, |module| module.rank)
    }

    /// `value` of every module that has one, under a pattern for exactly that module.
    fn patterns(&self, value: impl Fn(&AdapterModule) -> Result<Option<Value>, String>) -> Result<Value, AdapterError> {
        let mut patterns = Map::new();
        for (path, module) in &self.modules {
            if let Some(value) = value(module).map_err(|problem| self.unwritable(path, problem))? {
                patterns.insert(format!("^{}", fancy_regex::escape(path)), value);
            }
        }
        Ok(Value::Object(patterns))
    }

    fn tensors(&self) -> Result<Vec<u8>, AdapterError> {
        let mut tensors = Vec::new();
        for (path, module) in &self.modules {
            let layer = self.kind.layer(&module.layer).ok_or_else(|| {
                let (kind, layer) = (self.kind.name(), &module.layer);
                self.unwritable(path, format!("{kind} has no layer `{layer}`"))
            })?;
            for described in &layer.tensors {
                let operand = module.operands.get(&described.operand);
                let operand = operand.ok_or_else(|| {
                    let operand = &described.operand;
                    self.unwritable(path, format!("operand `{operand}` is missing"))
                })?;
                let (shape, values) = stored(described, operand).map_err(|problem| self.unwritable(path, problem))?;
                let name = described.names.first().map_or("", String::as_str);
                tensors.push((format!("{PREFIX}{path}.{name}"), shape, values));
            }
        }
        let borrowed = tensors.iter().map(|(name, shape, values)| (name.clone(), shape.clone(), &values[..]));
        safetensors_file::to_bytes(borrowed, [])
            .map_err(|problem| FileError::Safetensors { path: PathBuf::from(&self.name), problem }.into())
    }
}

/// A folder that was written beside the place where it belongs.
struct Written {
    folder: PathBuf,
    /// Holds `folder`, or what it was exchanged with, and is removed with it.
    _temporary: tempfile::TempDir,
}

/// The option that a scalar comes from. The product of an f32 and a rank is exact in f64, so reading it back gives the same
/// scalar.
fn number(scalar: &ScalarDescription, module: &AdapterModule) -> Result<f64, String> {
    let factor = match scalar.over {
        None => 1.0,
        Some(Divisor::Rank) => module.rank as f64,
        Some(Divisor::RootRank) => (module.rank as f64).sqrt(),
    };
    match module.operands.get(&scalar.operand).map(|scale| &scale.values[..]) {
        Some([scale]) if scale.is_finite() => Ok(f64::from(*scale) * factor),
        _ => Err(format!("operand `{}` must be one finite number", scalar.operand)),
    }
}

/// Shape and values as they are stored.
fn stored(described: &TensorDescription, operand: &Operand) -> Result<(Vec<usize>, Vec<f32>), String> {
    let elements = operand.shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
    let (name, shape) = (&described.operand, &operand.shape);
    if elements != Some(operand.values.len()) {
        return Err(format!("operand `{name}` has the shape {shape:?} but {} values", operand.values.len()));
    }
    if shape.len() != described.shape().len() {
        return Err(format!("operand `{name}` can't have the shape {shape:?}"));
    }
    let (mut extents, values) = match shape[..] {
        [rows, columns] if described.transposed => (vec![columns, rows], transpose(&operand.values, rows, columns)),
        _ => (shape.clone(), operand.values.clone()),
    };
    for (index, extent) in described.stored.iter().enumerate() {
        if *extent == Extent::Fixed(1) {
            extents.insert(index.min(extents.len()), 1);
        }
    }
    Ok((extents, values))
}
