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

mod against;
mod check;
mod config;
pub mod description;
mod error;
mod files;
mod kind_error;
mod kinds;
mod mixture;
mod modules;
mod options;
mod replaced;
mod settings;
mod targets;
mod write;

pub use against::{DecoderEnds, Replaced};
pub use description::KindDescription;
pub use error::AdapterError;
pub use files::{AdapterFiles, FolderVersion};
pub use kind_error::{KindError, KindProblem};
pub use kinds::{AdapterKind, AdapterKinds};
pub use mixture::{AdapterMixture, ClassifierLayer, GateRule, MOST_MIXED};
pub use replaced::{ReplacedRows, ReplacedWeight, Replacements};
pub use settings::{AdapterRequest, AdapterSettings, ModuleSettings};

use crate::error::FileError;
use crate::json::Json;
use crate::safetensors_file;
use config::Config;
use modules::Read;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use targets::Targets;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// An adapter: what it adds to each module that it adapts.
#[derive(Clone, Debug)]
pub struct AdapterFolder {
    /// The folder's name.
    pub name: String,
    /// The kind of all its modules.
    pub kind: AdapterKind,
    /// By module path, such as `model.layers.0.self_attn.q_proj`.
    pub modules: BTreeMap<String, AdapterModule>,
    /// What all of its modules have in common, such as projections that they share: operands by their names in the description.
    pub shared: BTreeMap<String, Operand>,
    /// What it brings along in place of the base model's own.
    pub replaced: Replacements,
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
    /// `[]`, `[n]` or `[rows, columns]`; more extents of what functions alone read.
    pub shape: Vec<usize>,
    /// Row-major; finite after [`AdapterFolder::open`].
    pub values: Vec<f32>,
}

impl AdapterFolder {
    /// An adapter in memory, to be written or used. What it holds is checked by [`write`](Self::write).
    pub fn new(name: impl Into<String>, kind: AdapterKind, modules: BTreeMap<String, AdapterModule>) -> Self {
        let name = name.into();
        let targets = Targets::exactly(modules.keys().cloned());
        let (path, shared, replaced) = (PathBuf::from(&name), BTreeMap::new(), Replacements::default());
        Self { path, name, kind, modules, shared, replaced, targets }
    }

    /// Reads and checks a folder of one of `kinds` whole; nothing of it stays open. The adapter has the name that the folder is
    /// called by: a link's own.
    pub fn open(path: &Path, kinds: &AdapterKinds) -> Result<AdapterFolder, AdapterError> {
        Self::parse(&AdapterFiles::read_at_once(path)?, kinds)
    }

    /// Checks files that were read, as an adapter of one of `kinds` that acts on every token.
    pub fn parse(files: &AdapterFiles, kinds: &AdapterKinds) -> Result<AdapterFolder, AdapterError> {
        let (folder, invocation) = Self::parse_activated(files, kinds)?;
        match invocation {
            None => Ok(folder),
            Some(tokens) => Err(AdapterError::UnsupportedOption {
                path: files.folder.join(CONFIG),
                key: "alora_invocation_tokens".to_string(),
                value: format!("{tokens:?}"),
                reason: "the adapter acts only after these tokens (activated LoRA), which is served and nothing else"
                    .to_string(),
            }),
        }
    }

    /// The same of an adapter that may act on some tokens only, and the tokens that invoke it then (PEFT's
    /// `alora_invocation_tokens`): it acts from their last occurrence in a prompt on.
    pub fn parse_activated(
        files: &AdapterFiles,
        kinds: &AdapterKinds,
    ) -> Result<(AdapterFolder, Option<Vec<u32>>), AdapterError> {
        let path = &files.folder;
        let (config_path, tensors_path) = (path.join(CONFIG), path.join(TENSORS));
        let json = Json::parse(&config_path, files.config.as_slice())?;
        let config = Config::read(&config_path, &json, kinds)?;
        let tensors = files.tensors.clone();
        let tensors = safetensors_file::parse_with_integers(&tensors_path, tensors, |name| config.has_integers(name))?;
        let Read { modules, shared, replaced } = modules::read(&config, &tensors)?;
        // PEFT targets the embedding alone then, and saves the tied output matrix's factors beside.
        let is_tied = |path: &&String| config.keeps_ties && *path == against::HEAD;
        config.targets.check_modules(&config_path, &tensors_path, modules.keys().filter(|path| !is_tied(path)))?;
        let name = folder_name(path)?;
        let (kind, path, targets) = (config.kind, path.to_owned(), config.targets);
        Ok((AdapterFolder { name, kind, modules, shared, replaced, path, targets }, config.invocation))
    }
}

/// What a folder is called: a link has its own name. `.` and `..` have that of the folder that they are.
fn folder_name(path: &Path) -> Result<String, AdapterError> {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    if let Some(name) = name(path) {
        return Ok(name);
    }
    let whole = path.canonicalize().map_err(|source| FileError::io(path, "open", source))?;
    Ok(name(&whole).unwrap_or_else(|| "adapter".to_string()))
}
