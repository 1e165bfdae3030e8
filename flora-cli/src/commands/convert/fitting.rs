//! The fit of every layer: inputs from a pass over the text with the adapter that is converted, and factors from `flora-convert`.

use std::collections::BTreeMap;
use std::path::Path;

use flora_adapters::Layers;
use flora_checkpoint::{AdapterFolder, AdapterRequest};
use flora_convert::{Fit, Gram, Kind, Limits, Problem, fit, residual};
use flora_ir::algebra::{FoldedAdapter, VirtualRow};
use flora_model::TrainedModel;
use flora_train::{Adapter, Dataset, Start, Trainee};
use rayon::prelude::*;
use serde_json::Map;

use super::report::OfLayer;
use super::{BATCH, TEACHER, segments};
use crate::commands::error::CommandError;

/// What is made.
pub(super) struct Request {
    pub(super) kind: Kind,
    /// Its layer.
    pub(super) layer: &'static str,
    pub(super) rank: usize,
    pub(super) limits: Limits,
}

/// The adapter that is converted, by the model's layers.
type Folded = [(usize, FoldedAdapter)];

/// Whether all that the adapter does is to add a low-rank update.
pub(super) fn check(adapter: &AdapterFolder, folded: &Folded) -> Result<(), CommandError> {
    let refused = |reason: &'static str| {
        Err(CommandError::NotConvertible {
            adapter: adapter.name.clone(),
            kind: adapter.kind.name().to_owned(),
            reason,
        })
    };
    let is_added = |own: &FoldedAdapter| own.virtual_rows == [VirtualRow::default()] && !own.low_rank.is_empty();
    match () {
        () if !adapter.replaced.is_empty() => refused("it replaces weights of the base model"),
        () if !folded.iter().all(|(_, own)| is_added(own)) => {
            refused("it does more to a layer than to add a low-rank update")
        }
        () => Ok(()),
    }
}

/// What is asked of `flora-train`: the same modules in another kind.
pub(super) fn adapter_request(request: &Request, folded: &Folded, decoder: &TrainedModel) -> AdapterRequest {
    AdapterRequest {
        layer: request.layer.to_owned(),
        rank: Some(request.rank),
        alpha: None,
        targets: folded.iter().map(|(layer, _)| decoder.layers()[*layer].path.clone()).collect(),
        options: Map::new(),
    }
}

/// The adapter, and what came of each layer. `data` is fitted on by some of its sequences and held against others.
pub(super) fn fitted(
    decoder: &TrainedModel,
    layers: &Layers,
    folded: &Folded,
    request: &Request,
    (data, on, held_out): (&Dataset, &[usize], &[usize]),
) -> Result<(Adapter, Vec<OfLayer>), CommandError> {
    // Before the work: it says what the modules can't be.
    let asked = adapter_request(request, folded, decoder);
    let mut adapter = Adapter::new(Path::new("the command line"), &asked, Start::Default, 0, layers, decoder)?;
    let inputs = grams(decoder, data, on)?;
    let others = grams(decoder, data, held_out)?;
    let fits: BTreeMap<String, (Fit, OfLayer)> = folded
        .par_iter()
        .map(|(layer, own)| {
            let path = decoder.layers()[*layer].path.clone();
            let fitted = one(decoder, (*layer, own), request, (inputs.get(&path), others.get(&path)))?;
            Ok((path, fitted))
        })
        .collect::<Result<_, CommandError>>()?;
    let mut numbers: Vec<f32> = Vec::new();
    for parameter in adapter.parameters() {
        let found = fits.get(parameter.path).map(|(fit, _)| if parameter.operand == "b" { &fit.b } else { &fit.a });
        numbers.extend(found.into_iter().flatten().map(|number| *number as f32));
    }
    let mut numbers = numbers.into_iter();
    // As many as there are: shapes are those of the fit.
    adapter.change(|number| *number = numbers.next().unwrap_or(f32::NAN));
    Ok((adapter, fits.into_values().map(|(_, found)| found).collect()))
}

fn one(
    decoder: &TrainedModel,
    (layer, own): (usize, &FoldedAdapter),
    request: &Request,
    (inputs, others): (Option<&Gram>, Option<&Gram>),
) -> Result<(Fit, OfLayer), CommandError> {
    let target = &decoder.layers()[layer];
    let (d, k) = (target.shape.d as usize, target.shape.k as usize);
    let nothing = Gram::new(d);
    let inputs = inputs.unwrap_or(&nothing);
    let base = decoder.base_weight(layer)?;
    let update = update(own, (d, k));
    let problem = Problem { kind: request.kind, base: &base, update: &update, inputs };
    let failed = |error: &dyn std::error::Error| CommandError::NotFitted {
        path: target.path.clone(),
        reason: error.to_string(),
    };
    let found = fit(&problem, request.rank, request.limits).map_err(|error| failed(&error))?;
    let held_out = match others {
        Some(others) => {
            let problem = Problem { inputs: others, ..problem };
            Some(residual(&problem, &found.b, &found.a).map_err(|error| failed(&error))?)
        }
        None => None,
    };
    let spectrum = inputs.spectrum().map_err(|error| failed(&error))?;
    let told = OfLayer {
        path: target.path.clone(),
        d,
        k,
        residual: found.residuals.last().copied().unwrap_or(f64::NAN),
        held_out_residual: held_out,
        half_steps: found.residuals.len() - 1,
        energy: OfLayer::LEADING.map(|leading| spectrum.share(leading)),
    };
    Ok((found, told))
}

/// Σ shrink expandᵀ, `[d, k]`.
fn update(adapter: &FoldedAdapter, (d, k): (usize, usize)) -> Vec<f64> {
    let mut update = vec![0.0; d * k];
    for pair in &adapter.low_rank {
        for (row, shrink) in update.chunks_exact_mut(k.max(1)).zip(&pair.shrink) {
            row.iter_mut().zip(&pair.expand).for_each(|(sum, expand)| *sum += f64::from(*shrink) * f64::from(*expand));
        }
    }
    update
}

/// xᵀx of every layer that is adapted, by its path.
fn grams(decoder: &TrainedModel, data: &Dataset, indices: &[usize]) -> Result<BTreeMap<String, Gram>, CommandError> {
    let mut grams: BTreeMap<String, Gram> = BTreeMap::new();
    for indices in indices.chunks(BATCH) {
        let batch = segments(data, Some(TEACHER), indices);
        let rows: usize = batch.iter().map(|segment| segment.tokens.len()).sum();
        let mut read: BTreeMap<String, Vec<f32>> = BTreeMap::new();
        decoder.adapted_inputs(&batch, |path, x| {
            read.insert(path.to_owned(), x.to_vec());
        })?;
        for (path, x) in &read {
            grams.entry(path.clone()).or_insert_with(|| Gram::new(x.len() / rows.max(1)));
        }
        let added: Result<(), (String, flora_convert::GramError)> = grams
            .par_iter_mut()
            .filter_map(|(path, gram)| Some((path, gram, read.get(path)?)))
            .try_for_each(|(path, gram, x)| gram.add(x).map_err(|error| (path.clone(), error)));
        added.map_err(|(path, error)| CommandError::NotFitted { path, reason: error.to_string() })?;
    }
    Ok(grams)
}
