//! Safetensors models: a folder as `save_pretrained` writes it, or one file.

use super::settings::{Settings, configuration};
use super::{Layout, Model, ModelError, Place, Projection, Source, assemble, stem};
use crate::error::FileError;
use crate::json::Json;
use crate::safetensors_file;
use crate::tensor::{SharedBytes, TensorTable};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// The longest JSON file that is accepted, in bytes; the index of a model with 100,000 tensors has about 10 MB.
const JSON_LIMIT: u64 = 64 << 20;

/// Values of `model_type` whose attention and feed-forward layers are `Conv1D` modules, stored `[d, k]`.
const CONV1D_MODELS: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];
/// The names that those modules have.
const CONV1D_MODULES: [&str; 4] = ["c_attn", "q_attn", "c_proj", "c_fc"];

pub(super) fn open(folder: &Path) -> Result<Model, ModelError> {
    let config_path = folder.join(CONFIG);
    if !config_path.is_file() {
        let reason = format!("the folder has no {CONFIG}");
        return Err(ModelError::NotAModel { path: folder.to_owned(), reason });
    }
    let config = Configuration::read(&config_path)?;
    let tables = if folder.join(INDEX).is_file() { indexed_shards(folder)? } else { all_shards(folder)? };
    let name = folder.canonicalize().map_or_else(|_| stem(folder), |folder| folder_name(&folder));
    model(name, config, tables, folder)
}

pub(super) fn open_file(path: &Path) -> Result<Model, ModelError> {
    let config_path = path.with_file_name(CONFIG);
    let config =
        if config_path.is_file() { Configuration::read(&config_path)? } else { Configuration::none(&config_path) };
    model(stem(path), config, vec![safetensors_file::map(path)?], path)
}

fn folder_name(folder: &Path) -> String {
    folder.file_name().map_or_else(|| "model".to_string(), |name| name.to_string_lossy().into_owned())
}

/// `config.json`, and what of it every model needs.
struct Configuration {
    architecture: String,
    model_type: String,
    settings: Settings,
}

impl Configuration {
    /// Of a safetensors file that has none beside it, at `path`.
    fn none(path: &Path) -> Self {
        let settings = Settings::Config { path: path.to_owned(), json: Json::Null };
        Self { architecture: String::new(), model_type: String::new(), settings }
    }

    fn read(path: &Path) -> Result<Self, ModelError> {
        let config = read_json(path)?;
        let quantisation = config.get("quantization_config").filter(|value| !value.is_falsy());
        if let Some(value) = quantisation {
            let problem =
                format!("is {value}: such weights can't be read; save the model as F32, F16 or BF16, or as GGUF");
            return Err(configuration(path, "quantization_config", problem));
        }
        let model_type = config.get("model_type").and_then(Json::as_str).unwrap_or_default().to_string();
        let architecture = match config.get("architectures") {
            Some(Json::Array(names)) => names.first().and_then(Json::as_str),
            _ => None,
        };
        let architecture = architecture.unwrap_or(&model_type).to_string();
        Ok(Self { architecture, model_type, settings: Settings::Config { path: path.to_owned(), json: config } })
    }
}

fn read_json(path: &Path) -> Result<Json, FileError> {
    Json::parse(path, SharedBytes::read(path, JSON_LIMIT)?.as_slice())
}

/// The shards that the index lists, each tensor in the one that the index says.
fn indexed_shards(folder: &Path) -> Result<Vec<TensorTable>, ModelError> {
    let path = folder.join(INDEX);
    let index = read_json(&path)?;
    let Some(Json::Object(map)) = index.get("weight_map") else {
        return Err(configuration(&path, "weight_map", "is missing or no object"));
    };
    let mut tensors_of: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str() else {
            return Err(configuration(&path, &format!("weight_map.{tensor}"), "does not name a file"));
        };
        tensors_of.entry(shard).or_default().push(tensor);
    }
    let mut tables = Vec::new();
    for (shard, tensors) in tensors_of {
        let mut components = Path::new(shard).components();
        if !matches!((components.next(), components.next()), (Some(Component::Normal(_)), None)) {
            return Err(ModelError::ShardEscapes { path, shard: shard.to_string() });
        }
        let table = safetensors_file::map(&folder.join(shard))?;
        for tensor in tensors.iter().filter(|tensor| !table.entries().contains_key(**tensor)) {
            table.get(tensor)?;
        }
        tables.push(table);
    }
    Ok(tables)
}

fn all_shards(folder: &Path) -> Result<Vec<TensorTable>, ModelError> {
    let listing = std::fs::read_dir(folder).map_err(|source| FileError::io(folder, "list", source))?;
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in listing {
        let path = entry.map_err(|source| FileError::io(folder, "list", source))?.path();
        let is_adapter = path.file_name().is_some_and(|name| name == "adapter_model.safetensors");
        if path.extension().is_some_and(|extension| extension == "safetensors") && !is_adapter {
            paths.push(path);
        }
    }
    paths.sort();
    paths.iter().map(|path| Ok(safetensors_file::map(path)?)).collect()
}

fn model(name: String, config: Configuration, tables: Vec<TensorTable>, path: &Path) -> Result<Model, ModelError> {
    let mut owners: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut projections = Vec::new();
    let mut parameters = BTreeMap::new();
    for table in tables.into_iter().map(Arc::new) {
        for tensor in table.entries().keys() {
            if let Some(first) = owners.insert(tensor.clone(), table.path().to_owned()) {
                let second = table.path().to_owned();
                return Err(ModelError::RepeatedTensor { tensor: tensor.clone(), first, second });
            }
        }
        for (tensor, entry) in table.entries() {
            parameters.insert(tensor.clone(), Place { table: table.clone(), name: tensor.clone() });
            let Some(module) = tensor.strip_suffix(".weight") else { continue };
            if entry.shape().len() == 2 && is_projection(module) {
                let bias = format!("{module}.bias");
                let source = Source {
                    weight: tensor.clone(),
                    bias: table.entries().contains_key(&bias).then_some(bias),
                    layout: layout(&config.model_type, module),
                    table: table.clone(),
                };
                projections.push(Projection::new(module.to_string(), source)?);
            }
        }
    }
    biases_are_beside_their_weights(&projections, &owners)?;
    for source in projections.iter().map(|projection: &Projection| &projection.source) {
        parameters.remove(&source.weight);
        source.bias.as_ref().map(|bias| parameters.remove(bias));
    }
    let Configuration { architecture, settings, .. } = config;
    assemble(Model { name, architecture, projections, parameters, settings: Arc::new(settings) }, path)
}

/// Refuses a bias that lies in another shard than its weight, which would otherwise be left out.
fn biases_are_beside_their_weights(
    projections: &[Projection],
    owners: &BTreeMap<String, PathBuf>,
) -> Result<(), ModelError> {
    let lost: BTreeSet<String> = projections
        .iter()
        .filter(|projection| !projection.has_bias)
        .map(|projection| format!("{}.bias", projection.path))
        .filter(|bias| owners.contains_key(bias))
        .collect();
    match lost.first() {
        None => Ok(()),
        Some(bias) => {
            let problem = "is in another shard than its weight; save the model again with larger shards";
            Err(configuration(&owners[bias], bias, problem))
        }
    }
}

/// Whether a matrix of that module path is a linear layer between the embeddings.
fn is_projection(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    !(last.contains("embed")
        || last.contains("norm")
        || last.starts_with("ln_")
        || ["lm_head", "wte", "wpe", "shared"].contains(&last))
}

fn layout(model_type: &str, module: &str) -> Layout {
    let last = module.rsplit('.').next().unwrap_or(module);
    if CONV1D_MODELS.contains(&model_type) && CONV1D_MODULES.contains(&last) {
        Layout::InputsByOutputs
    } else {
        Layout::OutputsByInputs
    }
}
