//! Writes adapter folders that PEFT reads (all kinds but FLORA, which is ours) and [`AdapterFolder::open`] reads back exactly.

use super::modules::{Form, PREFIX, Slot, slots};
use super::{AdapterError, AdapterFolder, AdapterKind, AdapterModule, CONFIG, Operand, TENSORS};
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
    pub fn write(&self, parent: &Path) -> Result<PathBuf, AdapterError> {
        let mut components = Path::new(&self.name).components();
        let is_plain = matches!((components.next(), components.next()), (Some(std::path::Component::Normal(_)), None));
        if !is_plain {
            return Err(self.unwritable("", "the adapter's name is no plain folder name".to_string()));
        }
        let path = parent.join(&self.name);
        let config = self.config()?;
        let tensors = self.tensors()?;
        std::fs::create_dir_all(parent).map_err(|source| FileError::io(parent, "create", source))?;
        if path.symlink_metadata().is_ok() {
            return Err(AdapterError::Exists { path });
        }
        let temporary = tempfile::Builder::new().prefix(".adapter-").tempdir_in(parent);
        let temporary = temporary.map_err(|source| FileError::io(parent, "write in", source))?;
        let folder = temporary.path().join(&self.name);
        std::fs::create_dir(&folder).map_err(|source| FileError::io(&folder, "create", source))?;
        atomic::write_file(&folder.join(CONFIG), format!("{config:#}\n").as_bytes())?;
        atomic::write_file(&folder.join(TENSORS), &tensors)?;
        let again = AdapterFolder::open(&folder)?;
        if again.kind != self.kind || again.modules != self.modules {
            let changed = self.modules.iter().find(|(module, adapter)| again.modules.get(*module) != Some(*adapter));
            let module = changed.map_or("", |(module, _)| module);
            return Err(
                self.unwritable(module, "its layer, rank or operands can't be said in PEFT's layout".to_string())
            );
        }
        std::fs::rename(&folder, &path).map_err(|source| FileError::io(&path, "create", source))?;
        Ok(path)
    }

    fn unwritable(&self, module: &str, problem: String) -> AdapterError {
        AdapterError::Unwritable { name: self.name.clone(), module: module.to_string(), problem }
    }

    fn config(&self) -> Result<Value, AdapterError> {
        let modules: Vec<&String> = self.modules.keys().collect();
        let mut config = json!({ "inference_mode": true, "task_type": null, "target_modules": modules });
        let options = match self.kind {
            AdapterKind::Lora | AdapterKind::Dora => {
                let mut options =
                    json!({ "peft_type": "LORA", "use_dora": self.kind == AdapterKind::Dora, "bias": "none" });
                options["r"] = json!(self.first_rank());
                options["rank_pattern"] =
                    self.patterns(|module| Ok((module.rank != self.first_rank()).then(|| json!(module.rank))))?;
                // α is each module's own, so the common one never holds.
                options["lora_alpha"] = json!(self.first_rank());
                options["alpha_pattern"] = self.patterns(|module| alpha(module).map(Some))?;
                options
            }
            AdapterKind::Hira | AdapterKind::Flora => {
                let mut options = json!({ "r": self.first_rank() });
                options["rank_pattern"] =
                    self.patterns(|module| Ok((module.rank != self.first_rank()).then(|| json!(module.rank))))?;
                if self.kind == AdapterKind::Hira {
                    options["peft_type"] = json!("HIRA");
                } else {
                    options["peft_type"] = json!("FLORA");
                    let is_mean = self.modules.values().any(|module| module.layer == "flora_mean");
                    options["reduce"] = json!(if is_mean { "mean" } else { "sum" });
                }
                options
            }
            AdapterKind::Ia3 => {
                let feedforward = self.modules.iter().filter(|(_, module)| module.layer == "ia3_feedforward");
                let feedforward: Vec<&String> = feedforward.map(|(path, _)| path).collect();
                json!({ "peft_type": "IA3", "feedforward_modules": feedforward })
            }
        };
        if let (Value::Object(config), Value::Object(options)) = (&mut config, options) {
            config.extend(options);
        }
        Ok(config)
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
            for slot in slots(self.kind) {
                let operand = module.operands.get(slot.operand);
                let operand =
                    operand.ok_or_else(|| self.unwritable(path, format!("operand `{}` is missing", slot.operand)))?;
                let (shape, values) =
                    stored(slot, module, operand).map_err(|problem| self.unwritable(path, problem))?;
                tensors.push((format!("{PREFIX}{path}.{}", slot.suffix), shape, values));
            }
        }
        let borrowed = tensors.iter().map(|(name, shape, values)| (name.clone(), shape.clone(), &values[..]));
        safetensors_file::to_bytes(borrowed)
            .map_err(|problem| FileError::Safetensors { path: PathBuf::from(&self.name), problem }.into())
    }
}

/// α of a LoRA module. The product of an f32 and a rank is exact in f64, so reading it back gives the same scale.
fn alpha(module: &AdapterModule) -> Result<Value, String> {
    match module.operands.get("s").map(|scale| &scale.values[..]) {
        Some([scale]) if scale.is_finite() => Ok(json!(f64::from(*scale) * module.rank as f64)),
        _ => Err("operand `s` must be one finite number".to_string()),
    }
}

/// Shape and values as PEFT stores them.
fn stored(slot: &Slot, module: &AdapterModule, operand: &Operand) -> Result<(Vec<usize>, Vec<f32>), String> {
    let elements = operand.shape.iter().try_fold(1usize, |product, extent| product.checked_mul(*extent));
    if elements != Some(operand.values.len()) {
        let (shape, count) = (&operand.shape, operand.values.len());
        return Err(format!("operand `{}` has the shape {shape:?} but {count} values", slot.operand));
    }
    match (slot.form, &operand.shape[..]) {
        (Form::Transposed, [rows, columns]) => Ok((vec![*columns, *rows], transpose(&operand.values, *rows, *columns))),
        (Form::AsStored, [rows, columns]) => Ok((vec![*rows, *columns], operand.values.clone())),
        (Form::Vector, [length]) => Ok((vec![*length], operand.values.clone())),
        (Form::ColumnOrRow, [length]) if module.layer == "ia3_feedforward" => {
            Ok((vec![1, *length], operand.values.clone()))
        }
        (Form::ColumnOrRow, [length]) => Ok((vec![*length, 1], operand.values.clone())),
        (_, shape) => Err(format!("operand `{}` can't have the shape {shape:?}", slot.operand)),
    }
}
