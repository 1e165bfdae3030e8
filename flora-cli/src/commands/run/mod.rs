//! `flora run`: a model's weights, adapters and a mixed batch through every adapted projection, held against the oracle.

mod inputs;
mod measure;
mod report;
mod requests;
pub(crate) mod samples;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::RangedU64ValueParser;
use flora::prelude::*;
use flora_adapters::{AdapterStore, Layers};
use flora_checkpoint::{Matrix, write_matrices};

use super::error::CommandError;
use super::kinds::KindArguments;
use super::{output, planner, types};
use crate::models::is_target;
use inputs::Inputs;
use measure::Setting;
use report::Report;
use requests::Requests;
use weights::{Module, Weights};

/// Run a batch of mixed adapters through a model's projections and check it
#[derive(Args)]
pub(crate) struct Arguments {
    /// A .gguf file, a .safetensors file or a model's folder; SmolLM2-135M unless given, fetched once (93 MB)
    #[arg(long)]
    model: Option<PathBuf>,
    /// Fetch nothing: random weights of SmolLM2-135M's shapes
    #[arg(long, conflicts_with = "model")]
    seeded: bool,
    /// A folder of PEFT adapter folders; adapters of every kind are made up unless given
    #[arg(long, group = "sources")]
    adapters: Option<PathBuf>,
    #[command(flatten)]
    kinds: KindArguments,
    /// Where to keep the made-up adapters
    #[arg(long, conflicts_with = "adapters", value_name = "DIR")]
    keep_adapters: Option<PathBuf>,
    /// The batch, [{"adapter": "name" or null, "rows": n}, ...]; 32 requests unless given
    #[arg(long, value_name = "FILE")]
    batch: Option<PathBuf>,
    /// A [rows, d] tensor for every adapted module path, safetensors; random unless given
    #[arg(long, value_name = "FILE")]
    inputs: Option<PathBuf>,
    /// Where to write the [rows, k] outputs, safetensors
    #[arg(long, value_name = "FILE")]
    outputs: Option<PathBuf>,
    /// Only the modules whose path ends so, separated by commas
    #[arg(long, value_delimiter = ',')]
    targets: Vec<String>,
    /// The form in which the device keeps base weights
    #[arg(long, value_enum, default_value = "stored")]
    base: types::Base,
    /// The type of activations and adapters
    #[arg(long, default_value = "f32", value_parser = types::element())]
    dtype: Element,
    /// The device, as `flora devices` lists it
    #[arg(long, default_value = "auto")]
    device: String,
    /// Seed of everything random
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Timed runs of every projection; the median counts
    #[arg(long, default_value = "5", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    repetitions: usize,
    /// A line for every projection
    #[arg(long)]
    all_layers: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), CommandError> {
    let device = devices::open(&arguments.device)?;
    let weights = Weights::open(arguments.model.as_deref(), arguments.seeded, arguments.seed)?;
    let chosen = chosen(&weights, &arguments.targets)?;
    let store = adapters(arguments, &weights, &chosen)?;
    let modules = adapted(&weights, &store, &chosen, &arguments.targets)?;
    let batch = match &arguments.batch {
        Some(path) => inputs::read_batch(path)?,
        None => samples::batch(store.names(), arguments.seed),
    };
    let rows = batch.rows()? as usize;
    let requests = Requests::new(batch, &store);
    let batch = &requests.served;
    let names: BTreeSet<_> = batch.segments().iter().filter_map(|segment| segment.adapter.as_deref()).collect();
    let store = store.restricted_to(names)?;
    let mut inputs = match &arguments.inputs {
        Some(path) => Inputs::read(path, rows, &modules, &weights)?,
        None => Inputs::Seeded { seed: arguments.seed, rows },
    };
    let (planner, coefficients) = planner::for_device(&device)?;
    let device = planner.tuned(&device);

    let (dtype, repetitions) = (arguments.dtype, arguments.repetitions);
    let setting = Setting { device: &device, planner: &planner, store: &store, batch, dtype, repetitions };
    let bar = output::progress(modules.len(), "running");
    let mut layers = Vec::with_capacity(modules.len());
    let mut outputs = BTreeMap::new();
    for module in &modules {
        let x = requests.served_rows(inputs.take(module), module.d);
        let base = weights.base(&module.path, arguments.base, &device)?;
        let (layer, y) = measure::measure(&setting, module, &base, x)?;
        layers.push(layer);
        if arguments.outputs.is_some() {
            let values = requests.all_rows(y, module.k);
            outputs.insert(module.path.clone(), Matrix { rows, columns: module.k, values });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if let Some(path) = &arguments.outputs {
        write_matrices(path, &outputs)?;
    }
    let report = Report::new(&setting, &weights, coefficients, batch.rows()? as usize, layers);
    if arguments.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.human(arguments.all_layers))?;
    }
    report.verdict()?;
    requests.verdict(&store)
}

/// The model's modules that --targets names, all without it.
fn chosen(weights: &Weights, targets: &[String]) -> Result<Vec<Module>, CommandError> {
    let is_chosen = |path: &str| targets.is_empty() || targets.iter().any(|target| is_target(path, target));
    let modules = weights.modules();
    let chosen: Vec<_> = modules.iter().filter(|module| is_chosen(&module.path)).cloned().collect();
    if chosen.is_empty() {
        let mut known: Vec<_> = modules.iter().map(|module| crate::models::name_in_layer(&module.path)).collect();
        known.sort_unstable();
        known.dedup();
        let (model, targets, known) = (weights.name().to_owned(), targets.join(" or "), known.join(", "));
        return Err(CommandError::NoTarget { model, targets, known });
    }
    Ok(chosen)
}

/// The adapters of --adapters, or made-up ones that are written and read back.
fn adapters(arguments: &Arguments, weights: &Weights, chosen: &[Module]) -> Result<AdapterStore, CommandError> {
    let store = match (&arguments.adapters, &arguments.keep_adapters) {
        (Some(folder), _) => AdapterStore::open(folder, arguments.kinds.layers()?)?,
        (None, Some(folder)) => made_up(folder, chosen, arguments.seed)?,
        (None, None) => {
            let temporary = tempfile::tempdir();
            let failed = |source| CommandError::Io { action: "write in", path: std::env::temp_dir(), source };
            made_up(temporary.map_err(failed)?.path(), chosen, arguments.seed)?
        }
    };
    let store = match weights {
        Weights::Stored(model) => store.fitting(model),
        Weights::Seeded { .. } => store,
    };
    if store.names().next().is_none()
        && let Some(error) = store.failed().values().next()
    {
        return Err(CommandError::NoAdapter(error.clone()));
    }
    for error in store.failed().values() {
        output::note(&format!("warning: {error}"));
    }
    Ok(store)
}

fn made_up(folder: &Path, chosen: &[Module], seed: u64) -> Result<AdapterStore, CommandError> {
    samples::write_adapters(folder, chosen, seed)?;
    Ok(AdapterStore::open(folder, Layers::builtin()?)?)
}

/// The chosen modules that some adapter adapts.
fn adapted(
    weights: &Weights,
    store: &AdapterStore,
    chosen: &[Module],
    targets: &[String],
) -> Result<Vec<Module>, CommandError> {
    let adapted = store.modules();
    let known = weights.modules();
    // A model's own adapters fit it: what isn't a projection is an embedding or an output matrix, which aren't run here.
    if matches!(weights, Weights::Seeded { .. })
        && let Some(module) = adapted.iter().find(|path| !known.iter().any(|module| module.path == **path))
    {
        let (module, model) = ((*module).to_owned(), weights.name().to_owned());
        return Err(CommandError::UnknownModule { module, model });
    }
    let modules: Vec<_> = chosen.iter().filter(|module| adapted.contains(module.path.as_str())).cloned().collect();
    if modules.is_empty() {
        let known = adapted.into_iter().take(8).collect::<Vec<_>>().join(", ");
        let (model, targets) = ("the adapters".to_owned(), targets.join(" or "));
        return Err(CommandError::NoTarget { model, targets, known });
    }
    Ok(modules)
}
