//! Low-rank adapters in the layout of PEFT (Hugging Face's adapter library): a folder with `adapter_config.json` and
//! `adapter_model.safetensors`.
//!
//! An adapter is turned into operands of flora's layers: what a config option means (scale, rank pattern, orientation) is
//! settled here once, and nothing after it knows PEFT. An option that would change the result and isn't understood is refused.
//!
//! What a kind's tensors and options mean is a [`KindDescription`], a row of [`AdapterKinds`]; the code reads rows.
//!
//! `FLORA` is our own `peft_type` in the same layout: `.flora_B` `[d, r]` and `.flora_A` `[r, k]`, with the config key `reduce`
//! (`"sum"` or `"mean"`, over the rank).

mod check;
mod config;
pub mod description;
mod error;
mod kind_error;
mod kinds;
mod modules;
mod options;
mod targets;
mod write;

pub use description::KindDescription;
pub use error::AdapterError;
pub use kind_error::{KindError, KindProblem};
pub use kinds::{AdapterKind, AdapterKinds};

use crate::error::FileError;
use crate::json::Json;
use crate::model::Model;
use crate::safetensors_file;
use crate::tensor::{SharedBytes, TensorProblem};
use config::Config;
use description::Extent;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use targets::Targets;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// The longest config that is accepted, in bytes; one with a pattern for every module of a large model has about 200 kB.
const CONFIG_LIMIT: u64 = 4 << 20;
/// The longest adapter that is accepted, in bytes.
const TENSORS_LIMIT: u64 = 16 << 30;

/// An adapter: what it adds to each module that it adapts.
#[derive(Clone, Debug)]
pub struct AdapterFolder {
    /// The folder's name.
    pub name: String,
    /// The kind of all its modules.
    pub kind: AdapterKind,
    /// By module path, such as `model.layers.0.self_attn.q_proj`. Not empty after [`open`](Self::open).
    pub modules: BTreeMap<String, AdapterModule>,
    path: PathBuf,
    targets: Targets,
}

/// The adapter of one module, as operands of one of flora's layers.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterModule {
    /// The layer, by the name in its [`LayerDescription`](description::LayerDescription): `lora`, `dora`, `ia3`,
    /// `ia3_feedforward`, `hira`, `flora`, `flora_mean`, or one that was registered.
    pub layer: String,
    /// r; 0 for a layer without rank, such as IA3's.
    pub rank: usize,
    /// The operands by the layer's names: of the built-in ones `b` `[d, r]`, `a` `[r, k]`, `s` `[]`, `m` `[k]`, `l` `[k]` (`ia3`)
    /// or `[d]` (`ia3_feedforward`).
    pub operands: BTreeMap<String, Operand>,
}

/// A named tensor of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    /// `[]`, `[n]` or `[rows, columns]`.
    pub shape: Vec<usize>,
    /// Row-major; finite after [`AdapterFolder::open`].
    pub values: Vec<f32>,
}

impl AdapterFolder {
    /// An adapter in memory, to be written or used. What it holds is checked by [`write`](Self::write).
    pub fn new(name: impl Into<String>, kind: AdapterKind, modules: BTreeMap<String, AdapterModule>) -> Self {
        let name = name.into();
        let targets = Targets::exactly(modules.keys().cloned());
        Self { path: PathBuf::from(&name), name, kind, modules, targets }
    }

    /// Reads and checks a folder of one of `kinds` whole; nothing of it stays open.
    pub fn open(path: &Path, kinds: &AdapterKinds) -> Result<AdapterFolder, AdapterError> {
        let name = folder_name(path)?;
        let config_path = inside(path, CONFIG)?;
        let tensors_path = inside(path, TENSORS)?;
        let json = Json::parse(&config_path, SharedBytes::read(&config_path, CONFIG_LIMIT)?.as_slice())?;
        let config = Config::read(&config_path, &json, kinds)?;
        let tensors = safetensors_file::parse(&tensors_path, SharedBytes::read(&tensors_path, TENSORS_LIMIT)?)?;
        let modules = modules::read(&config, &tensors)?;
        config.targets.check_modules(&config_path, &tensors_path, modules.keys())?;
        Ok(AdapterFolder { name, kind: config.kind, modules, path: path.to_owned(), targets: config.targets })
    }

    /// Checks that `model` has every adapted module in the adapter's shape, and that every module of `model` that the config
    /// targets has its tensors.
    pub fn check_against(&self, model: &Model) -> Result<(), AdapterError> {
        for (module, adapter) in &self.modules {
            let projection = model.projection(module)?;
            let described = self.kind.layer(&adapter.layer).map_or(&[][..], |layer| &layer.tensors);
            for (operand, tensor) in &adapter.operands {
                let Some(described) = described.iter().find(|tensor| tensor.operand == *operand) else { continue };
                let extent = |extent| match extent {
                    Extent::Inputs => projection.d,
                    Extent::Outputs => projection.k,
                    Extent::Rank => adapter.rank,
                    Extent::Fixed(number) => number,
                };
                let expected: Vec<usize> = described.shape().into_iter().map(extent).collect();
                if tensor.shape != expected {
                    let expected =
                        format!("{expected:?} (the model {} has d {}, k {})", model.name(), projection.d, projection.k);
                    let problem = TensorProblem::WrongShape { found: tensor.shape.clone(), expected };
                    let tensor = format!("{module} ({operand})");
                    return Err(FileError::Tensor { path: self.path.clone(), tensor, problem }.into());
                }
            }
        }
        let paths = model.projections().iter().map(|projection| projection.path.as_str());
        for path in paths.filter(|path| !self.modules.contains_key(*path)) {
            if self.targets.asks_for(path).map_err(|problem| problem.in_file(&self.path.join(CONFIG)))? {
                return Err(AdapterError::ModuleWithoutTensors {
                    path: self.path.join(TENSORS),
                    module: path.to_string(),
                });
            }
        }
        Ok(())
    }
}

fn folder_name(path: &Path) -> Result<String, AdapterError> {
    if !path.is_dir() {
        let reason = "there is no such folder".to_string();
        return Err(AdapterError::NotAnAdapter { path: path.to_owned(), reason });
    }
    let whole = path.canonicalize().map_err(|source| FileError::io(path, "open", source))?;
    Ok(whole.file_name().map_or_else(|| "adapter".to_string(), |name| name.to_string_lossy().into_owned()))
}

/// The file `name` of `folder`, unless it is missing or a link that leads out of the folder.
fn inside(folder: &Path, name: &str) -> Result<PathBuf, AdapterError> {
    let path = folder.join(name);
    if path.symlink_metadata().is_err() {
        let other = folder.join("adapter_model.bin");
        let reason = match name == TENSORS && other.exists() {
            true => {
                "its weights are a pickle (adapter_model.bin), which can run code; save it again as safetensors".into()
            }
            false => format!("it has no {name}"),
        };
        return Err(AdapterError::NotAnAdapter { path: folder.to_owned(), reason });
    }
    let canonical = |path: &Path| path.canonicalize().map_err(|source| FileError::io(path, "open", source));
    let (target, home) = (canonical(&path)?, canonical(folder)?);
    if !target.starts_with(&home) {
        return Err(AdapterError::Escapes { path, target });
    }
    Ok(path)
}
