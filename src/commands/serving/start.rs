//! A model's files to a running engine: tokenizer, decoder on the device's own Burn backend, adapters, threads.

use std::path::Path;
use std::sync::Arc;

use flora::burn::{Cuda, FloraBackend, Host, Target, Wgpu};
use flora::checkpoint::Model;
use flora::engine::{AdapterOptions, Engine, Options, Vocabulary};
use flora::model::{AdapterDirectory, PlanningChoice, ServeOptions, ServedModel};
use flora::prelude::*;
use flora::runtime::{Place, Planner};
use flora::tokenizer::Tokenizer;

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
    let fetched;
    let path = match &arguments.model {
        Some(path) => path,
        None => {
            fetched = flora_toolchain::smollm2()?;
            &fetched
        }
    };
    let tokenizer = Arc::new(Tokenizer::open(path)?);
    let vocabulary = Vocabulary::new(tokenizer.token_bytes().to_vec());
    let model = Arc::new(Model::open(path)?);
    let device = Device::open(&arguments.device)?;
    let saved = saved(arguments.plan, &device)?;
    let device = saved.as_ref().map_or_else(|| device.clone(), |planner| planner.tuned(&device));
    let start = match device.place() {
        Place::Host => on::<Host>,
        Place::Wgpu(_) => on::<Wgpu>,
        Place::Cuda(_) => on::<Cuda>,
    };
    let engine = start(arguments, &device, &model, saved.as_ref(), vocabulary)?;
    let info = device.info();
    Ok(Serving { engine, tokenizer, name: name(path, &model), device: format!("{} ({})", info.name, info.id) })
}

/// The name under which clients ask for the base model: the file's or folder's.
fn name(path: &Path, model: &Model) -> String {
    path.file_stem().map_or_else(|| model.name().to_owned(), |name| name.to_string_lossy().into_owned())
}

/// What tuning saved, where that is asked for and there.
fn saved(plan: PlanChoice, device: &Device) -> Result<Option<Planner>, CommandError> {
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

/// The model on one backend.
fn on<B: FloraBackend>(
    arguments: &ModelArguments,
    device: &Device,
    model: &Arc<Model>,
    planner: Option<&Planner>,
    vocabulary: Vocabulary,
) -> Result<Engine, CommandError> {
    let target = Target::<B>::of(device).ok_or(CommandError::OtherBackend)?;
    let options = Options {
        sequences: arguments.sequences,
        tokens_per_step: arguments.tokens_per_step.max(64 + arguments.sequences - 1),
        cache_tokens: arguments.cache_tokens,
        waiting: arguments.waiting,
        adapters: AdapterOptions {
            resident: arguments.resident,
            bytes: arguments.adapter_memory << 20,
            ..AdapterOptions::default()
        },
        ..Options::default()
    };
    let serve = ServeOptions {
        adapted: arguments.adapted.clone(),
        activations: arguments.dtype,
        adapters: arguments.dtype,
        adapter_bytes: arguments.adapter_memory << 20,
        block_tokens: options.block_tokens as u32,
        planning: planner.map_or_else(PlanningChoice::default, PlanningChoice::Priced),
        ..ServeOptions::default()
    };
    let decoder = ServedModel::load(&target, model, &serve)?;
    let source = AdapterDirectory::new(arguments.adapters.as_deref(), model, arguments.dtype)?;
    Ok(Engine::start(decoder, source, vocabulary, options)?)
}
