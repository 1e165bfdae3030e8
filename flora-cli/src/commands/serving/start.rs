//! A model's files to a running engine: tokenizer, decoder on the device, adapters, threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flora::prelude::*;
use flora_checkpoint::Model;
use flora_engine::{AdapterOptions, AdapterSource, Engine, Options, Vocabulary};
use flora_model::{AdapterDirectory, DeviceModel, PlanningChoice, PreparedAdapter, RoundingCost, ServeOptions};
use flora_tokenizer::Tokenizer;
use flora_tune::Planner;

use super::{Activations, ModelArguments, PlanChoice};
use crate::commands::error::CommandError;
use crate::commands::{output, planner};

/// A model that takes requests.
pub(crate) struct Serving {
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Where the files of adapters are.
    pub(crate) adapters: AdapterDirectory,
    /// The model's name.
    pub(crate) name: String,
    /// The device's name and id.
    pub(crate) device: String,
}

/// Opens the model, puts it on the device and starts the engine. The whole weights of an adapter of the name `merge` are kept.
pub(crate) fn start(arguments: &ModelArguments, merge: Option<&str>) -> Result<Serving, CommandError> {
    let path = model_path(arguments)?;
    // First, because its errors say what is there instead of a model.
    let model = Arc::new(Model::open(&path)?);
    let mut tokenizer = Tokenizer::open(&path)?;
    if let Some(template) = &arguments.chat_template {
        tokenizer.choose_template(template)?;
    }
    let tokenizer = Arc::new(tokenizer);
    let vocabulary = vocabulary(&tokenizer);
    let device = device(arguments)?;
    let saved = saved(arguments.plan, &device)?;
    let device = saved.as_ref().map_or_else(|| device.clone(), |planner| planner.tuned(&device));
    let planning = match &saved {
        Some(planner) => PlanningChoice::Priced(planner.coefficients()),
        None => PlanningChoice::default(),
    };
    let layers = arguments.kinds.layers()?;
    let named = arguments.lora_modules.iter().map(|module| (module.name.clone(), module.path.clone()));
    let directory = AdapterDirectory::with_layers(arguments.adapters.as_deref(), &model, arguments.dtype, layers);
    let directory = directory.over(arguments.base.into()).with_named(named)?;
    directory.check()?;
    if let Some(name) = merge {
        let bytes = directory.merged_bytes(name, arguments.dtype)?;
        output::note(&format!(
            "merge: the weights of `{name}` take {} from its first request on",
            output::bytes(bytes)
        ));
    }
    let (decoder, cost) = decoder(arguments, merge, &device, &model, planning)?;
    if let Some(cost) = cost {
        output::note(&format!("activations: int8; {cost}"));
    }
    let engine = engine(arguments, merge, decoder, vocabulary, directory.clone())?;
    let info = device.info();
    Ok(Serving {
        engine,
        tokenizer,
        adapters: directory,
        name: name_of(&path, model.name()),
        device: format!("{} ({})", info.name, info.id),
    })
}

/// The model that is asked for, else SmolLM2, fetched.
pub(crate) fn model_path(arguments: &ModelArguments) -> Result<PathBuf, CommandError> {
    match &arguments.model {
        Some(path) => Ok(path.clone()),
        None => Ok(flora_toolchain::smollm2()?),
    }
}

/// What the tokens of a model say.
fn vocabulary(tokenizer: &Arc<Tokenizer>) -> Vocabulary {
    match tokenizer.token_bytes() {
        Some(bytes) => Vocabulary::new(bytes.to_vec()),
        None => {
            let tokenizer = Arc::clone(tokenizer);
            Vocabulary::decoded(move |tokens| tokenizer.decode(tokens))
        }
    }
}

/// The name under which clients ask for the base model: the folder's, or the file's without `.gguf`.
fn name_of(path: &Path, unnamed: &str) -> String {
    // A path like `.` has its name where it leads.
    let whole = path.canonicalize();
    let Some(last) = path.file_name().or_else(|| whole.as_ref().ok()?.file_name()) else {
        return unnamed.to_owned();
    };
    let name = last.to_string_lossy();
    match name.strip_suffix(".gguf") {
        Some(stem) if !stem.is_empty() && !path.is_dir() => stem.to_owned(),
        _ => name.into_owned(),
    }
}

/// What tuning saved, where that is asked for and there.
pub(crate) fn saved(plan: PlanChoice, device: &Device) -> Result<Option<Planner>, CommandError> {
    if plan == PlanChoice::Fixed {
        return Ok(None);
    }
    match Planner::saved(&planner::config_folder()?, device) {
        Ok(coefficients) => Ok(Some(Planner::new(coefficients))),
        Err(error) => {
            let why = if error.is_missing() { String::new() } else { format!("warning: {error}\n") };
            output::note(&format!("{why}plan: fixed, because this device isn't tuned; `flora tune` measures it once"));
            Ok(None)
        }
    }
}

/// The device that is asked for, with the activations that are.
pub(crate) fn device(arguments: &ModelArguments) -> Result<Device, CommandError> {
    let device = devices::open(&arguments.device)?;
    match arguments.activations {
        Activations::Float => Ok(device),
        Activations::Int8 => Ok(device.rounding_activations()?),
    }
}

/// A model on its device, and what rounded activations cost it, where they are.
pub(crate) fn decoder(
    arguments: &ModelArguments,
    merge: Option<&str>,
    device: &Device,
    model: &Arc<Model>,
    planning: PlanningChoice<'_>,
) -> Result<(DeviceModel, Option<RoundingCost>), CommandError> {
    let serve = ServeOptions {
        adapted: arguments.adapted.clone(),
        base: arguments.base.into(),
        activations: arguments.dtype,
        adapters: arguments.dtype,
        adapter_bytes: arguments.adapter_memory << 20,
        merged: merge.map(str::to_owned),
        cache_tokens: arguments.cache_tokens,
        planning,
    };
    let mut decoder = flora_model::load(device, model, &serve)?;
    let cost = match arguments.activations {
        Activations::Float => None,
        Activations::Int8 => Some(flora_model::rounding_cost(device, &mut decoder)?),
    };
    Ok((decoder, cost))
}

/// A model behind an engine.
pub(crate) fn engine(
    arguments: &ModelArguments,
    merge: Option<&str>,
    decoder: DeviceModel,
    vocabulary: Vocabulary,
    source: impl AdapterSource<Prepared = PreparedAdapter>,
) -> Result<Engine, CommandError> {
    Ok(Engine::start(decoder, source, vocabulary, options(arguments, merge))?)
}

fn options(arguments: &ModelArguments, merge: Option<&str>) -> Options {
    let options = Options::default();
    Options {
        sequences: arguments.sequences,
        chunk_tokens: arguments.chunk_tokens,
        // A chunk beside one token of every other sequence always finds room.
        tokens_per_step: arguments.tokens_per_step.max(arguments.chunk_tokens + arguments.sequences - 1),
        cache_tokens: arguments.cache_tokens,
        waiting: arguments.waiting,
        share_prefixes: !arguments.no_prefix_sharing,
        adapters: AdapterOptions {
            resident: arguments.resident,
            bytes: arguments.adapter_memory << 20,
            // What is made of it isn't made again and again.
            pinned: merge.iter().map(|name| (*name).to_owned()).collect(),
            ..options.adapters
        },
        ..options
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_called_as_its_folder_or_file_is() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let called = |name: &str| name_of(&folder.path().join(name), "unnamed");
        std::fs::create_dir(folder.path().join("odd.gguf")).expect("a folder");
        for (path, expected) in [
            ("Llama-3.2-1B", "Llama-3.2-1B"),
            ("Llama-3.2-1B.Q4_K_M.gguf", "Llama-3.2-1B.Q4_K_M"),
            ("SmolLM2.gguf", "SmolLM2"),
            ("odd.gguf", "odd.gguf"),
            (".gguf", ".gguf"),
        ] {
            assert_eq!(called(path), expected);
        }
        assert_eq!(name_of(&folder.path().join("odd.gguf").join("."), "unnamed"), "odd.gguf");
    }
}
