//! A model's files to a running engine: tokenizer, decoder on the device, adapters, threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use flora::prelude::*;
use flora_checkpoint::Model;
use flora_engine::{AdapterOptions, AdapterSource, Engine, Options, Vocabulary};
use flora_model::{AdapterDirectory, PlanningChoice, PreparedAdapter, ServeOptions};
use flora_tokenizer::Tokenizer;
use flora_tune::Planner;

use super::{ModelArguments, PlanChoice};
use crate::commands::error::CommandError;
use crate::commands::{output, planner};

/// A model that takes requests.
pub(crate) struct Serving {
    pub(crate) engine: Engine,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// The model's name.
    pub(crate) name: String,
    /// The device's name and id.
    pub(crate) device: String,
}

/// Opens the model, puts it on the device and starts the engine.
pub(crate) fn start(arguments: &ModelArguments) -> Result<Serving, CommandError> {
    let path = model_path(arguments)?;
    // First, because its errors say what is there instead of a model.
    let model = Arc::new(Model::open(&path)?);
    let tokenizer = Arc::new(Tokenizer::open(&path)?);
    let vocabulary = Vocabulary::new(tokenizer.token_bytes().to_vec());
    let device = devices::open(&arguments.device)?;
    let saved = saved(arguments.plan, &device)?;
    let device = saved.as_ref().map_or_else(|| device.clone(), |planner| planner.tuned(&device));
    let planning = match &saved {
        Some(planner) => PlanningChoice::Priced(planner.coefficients()),
        None => PlanningChoice::default(),
    };
    let layers = arguments.kinds.layers()?;
    let directory = AdapterDirectory::with_layers(arguments.adapters.as_deref(), &model, arguments.dtype, layers);
    let engine = engine(arguments, &device, &model, planning, vocabulary, directory)?;
    let info = device.info();
    Ok(Serving { engine, tokenizer, name: name(&path, &model), device: format!("{} ({})", info.name, info.id) })
}

/// The model that is asked for, else SmolLM2, fetched.
pub(crate) fn model_path(arguments: &ModelArguments) -> Result<PathBuf, CommandError> {
    match &arguments.model {
        Some(path) => Ok(path.clone()),
        None => Ok(flora_toolchain::smollm2()?),
    }
}

/// The name under which clients ask for the base model: the file's or folder's.
fn name(path: &Path, model: &Model) -> String {
    path.file_stem().map_or_else(|| model.name().to_owned(), |name| name.to_string_lossy().into_owned())
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

/// A model behind an engine.
pub(crate) fn engine(
    arguments: &ModelArguments,
    device: &Device,
    model: &Arc<Model>,
    planning: PlanningChoice<'_>,
    vocabulary: Vocabulary,
    source: impl AdapterSource<Prepared = PreparedAdapter>,
) -> Result<Engine, CommandError> {
    let options = options(arguments);
    let serve = ServeOptions {
        adapted: arguments.adapted.clone(),
        activations: arguments.dtype,
        adapters: arguments.dtype,
        adapter_bytes: arguments.adapter_memory << 20,
        block_tokens: options.block_tokens as u32,
        planning,
        ..ServeOptions::default()
    };
    let decoder = flora_model::load(device, model, &serve)?;
    Ok(Engine::start(decoder, source, vocabulary, options)?)
}

fn options(arguments: &ModelArguments) -> Options {
    let options = Options::default();
    Options {
        sequences: arguments.sequences,
        // A chunk beside one token of every other sequence always finds room.
        tokens_per_step: arguments.tokens_per_step.max(options.chunk_tokens + arguments.sequences - 1),
        cache_tokens: arguments.cache_tokens,
        waiting: arguments.waiting,
        adapters: AdapterOptions {
            resident: arguments.resident,
            bytes: arguments.adapter_memory << 20,
            ..options.adapters
        },
        ..options
    }
}
