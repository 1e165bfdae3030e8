//! Safetensors models: a folder as `save_pretrained` writes it, or one file.

use super::settings::{Settings, configuration};
use super::{Layout, Model, ModelError, Place, Projection, Source, assemble, foreign, stem};
use crate::error::FileError;
use crate::json::Json;
use crate::safetensors_file;
use crate::tensor::{SharedBytes, TensorTable};
use std::collections::BTreeMap;
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
        let gguf = files_with(folder, |name| name.ends_with(".gguf"))?.into_iter().next();
        let reason = match gguf {
            _ if folder.join("adapter_config.json").is_file() => {
                "it holds an adapter; the model is the one that it was trained on".to_owned()
            }
            Some(gguf) => format!("the folder has no {CONFIG}, but {}, which can be given itself", gguf.display()),
            None => format!("the folder has no {CONFIG}"),
        };
        return Err(ModelError::NotAModel { path: folder.to_owned(), reason });
    }
    let config = Configuration::read(&config_path)?;
    let tables = if folder.join(INDEX).is_file() { indexed_shards(folder)? } else { all_shards(folder)? };
    if tables.is_empty()
        && let Some(file) = files_with(folder, foreign::is_weights)?.into_iter().next()
    {
        return Err(ModelError::ForeignWeights { path: file });
    }
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
    let is_shard = |name: &str| name.ends_with(".safetensors") && name != "adapter_model.safetensors";
    files_with(folder, is_shard)?.iter().map(|path| Ok(safetensors_file::map(path)?)).collect()
}

/// What is in the folder under such a name, sorted.
fn files_with(folder: &Path, is_wanted: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>, FileError> {
    let listing = std::fs::read_dir(folder).map_err(|source| FileError::io(folder, "list", source))?;
    let mut paths = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| FileError::io(folder, "list", source))?;
        if is_wanted(&entry.file_name().to_string_lossy()) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn model(name: String, config: Configuration, tables: Vec<TensorTable>, path: &Path) -> Result<Model, ModelError> {
    let mut parameters: BTreeMap<String, Place> = BTreeMap::new();
    for table in tables.into_iter().map(Arc::new) {
        for tensor in table.entries().keys() {
            let place = Place { table: table.clone(), name: tensor.clone() };
            if let Some(first) = parameters.insert(tensor.clone(), place) {
                let (first, second) = (first.table.path().to_owned(), table.path().to_owned());
                return Err(ModelError::RepeatedTensor { tensor: tensor.clone(), first, second });
            }
        }
    }
    let mut projections = Vec::new();
    for (tensor, place) in &parameters {
        let Some(module) = tensor.strip_suffix(".weight") else { continue };
        let is_matrix = place.table.entries().get(tensor).is_some_and(|entry| entry.shape().len() == 2);
        if is_matrix && is_projection(module) {
            // A model is cut into shards anywhere: the bias may lie in another one.
            let bias = parameters.get(&format!("{module}.bias")).cloned();
            let source = Source { weight: place.clone(), bias, layout: layout(&config.model_type, module) };
            projections.push(Projection::new(module.to_string(), source)?);
        }
    }
    for source in projections.iter().map(|projection: &Projection| &projection.source) {
        parameters.remove(&source.weight.name);
        source.bias.as_ref().map(|bias| parameters.remove(&bias.name));
    }
    let Configuration { architecture, settings, .. } = config;
    assemble(Model { name, architecture, projections, parameters, settings: Arc::new(settings) }, path)
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
