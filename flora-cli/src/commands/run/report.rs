//! What a run found, for people and for programs.

use std::collections::BTreeMap;

use flora_oracle::Deviation;
use serde::Serialize;

use super::measure::{LayerReport, Lowerings, Setting};
use super::weights::Weights;
use crate::commands::error::CommandError;
use crate::commands::output;
use crate::models::name_in_layer;

/// The whole run.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    device: String,
    device_name: String,
    model: String,
    weights: &'static str,
    coefficients: &'static str,
    rows: usize,
    segments: usize,
    adapters: BTreeMap<String, usize>,
    repetitions: usize,
    dtype: &'static str,
    base: Vec<Form>,
    max_relative_error: f64,
    max_rounding_units: f64,
    seconds: f64,
    base_seconds: f64,
    right: bool,
    layers: Vec<LayerReport>,
}

/// Base weights of one form.
#[derive(Debug, Serialize)]
struct Form {
    stored: &'static str,
    weight: &'static str,
    layers: usize,
    bytes: u64,
}

/// The forms in which base weights are kept, the one with most layers first.
fn forms(layers: &[LayerReport]) -> Vec<Form> {
    let mut forms: Vec<Form> = Vec::new();
    for &LayerReport { stored, weight, base_bytes, .. } in layers {
        match forms.iter_mut().find(|form| (form.stored, form.weight) == (stored, weight)) {
            Some(form) => {
                form.layers += 1;
                form.bytes += base_bytes;
            }
            None => forms.push(Form { stored, weight, layers: 1, bytes: base_bytes }),
        }
    }
    forms.sort_by_key(|form| std::cmp::Reverse(form.layers));
    forms
}

impl Form {
    fn human(&self) -> String {
        let Self { stored, weight, layers, bytes } = self;
        let form = match (stored.eq_ignore_ascii_case(weight), *weight) {
            (true, _) => format!("{weight} as stored"),
            (false, weight) if *stored == "random" => format!("{weight}, random"),
            (false, weight) => format!("{stored} dequantised to {weight}"),
        };
        let plural = if *layers == 1 { "" } else { "s" };
        format!("{form}: {layers} layer{plural}, {}", output::bytes(*bytes))
    }
}

impl Report {
    pub(super) fn new(
        Setting { device, store, batch, dtype, repetitions, .. }: &Setting,
        weights: &Weights,
        coefficients: &'static str,
        rows: usize,
        layers: Vec<LayerReport>,
    ) -> Self {
        let worst = worst(layers.iter());
        Self {
            device: device.info().id.clone(),
            device_name: device.info().name.clone(),
            model: weights.name().to_owned(),
            weights: weights.kind(),
            coefficients,
            rows,
            segments: batch.segments().len(),
            adapters: store.kinds().into_iter().map(|(kind, count)| (kind.name().to_owned(), count)).collect(),
            repetitions: *repetitions,
            dtype: dtype.name(),
            base: forms(&layers),
            max_relative_error: worst.relative_error,
            max_rounding_units: worst.rounding_units,
            seconds: layers.iter().map(|layer| layer.seconds).sum(),
            base_seconds: layers.iter().map(|layer| layer.base_seconds).sum(),
            right: layers.iter().all(|layer| layer.right),
            layers,
        }
    }

    /// An error if a layer is wrong.
    pub(super) fn verdict(&self) -> Result<(), CommandError> {
        let wrong: Vec<_> = self.layers.iter().filter(|layer| !layer.right).collect();
        let key = |layer: &&&LayerReport| {
            if layer.max_rounding_units.is_nan() { f64::INFINITY } else { layer.max_rounding_units }
        };
        match wrong.iter().max_by(|one, other| key(one).total_cmp(&key(other))) {
            None => Ok(()),
            Some(worst) => Err(CommandError::Deviates {
                wrong: wrong.len(),
                layers: self.layers.len(),
                worst: worst.layer.clone(),
            }),
        }
    }

    /// A table that fits a screen, or a line for every layer.
    pub(super) fn human(&self, all_layers: bool) -> String {
        let mut groups: Vec<(String, Vec<&LayerReport>)> = Vec::new();
        for layer in &self.layers {
            let name = if all_layers { &layer.layer } else { name_in_layer(&layer.layer) };
            match groups.iter_mut().find(|(known, of)| known == name && (of[0].d, of[0].k) == (layer.d, layer.k)) {
                Some((_, of)) if !all_layers => of.push(layer),
                _ => groups.push((name.to_owned(), vec![layer])),
            }
        }
        let adapters = self.adapters.iter().map(|(kind, count)| format!("{count} {kind}")).collect::<Vec<_>>();
        let adapters = if adapters.is_empty() { "none".to_owned() } else { adapters.join(", ") };
        let mut text = format!("model     {} ({} weights)\n", self.model, self.weights);
        for (position, form) in self.base.iter().enumerate() {
            text += &format!("{:<10}{}\n", if position == 0 { "base" } else { "" }, form.human());
        }
        text += &format!("device    {} ({}), in {}\n", self.device_name, self.device, self.dtype);
        text += &format!("batch     {} requests, {} rows\nadapters  {adapters}\n\n", self.segments, self.rows);

        let columns =
            ["<projection", ">layers", ">d", ">k", "<lowerings", ">time", ">base GEMM", ">ratio", ">relative error"];
        let mut table = output::table(&columns);
        for (name, layers) in &groups {
            table.add_row(row(name, &layers[0].d.to_string(), &layers[0].k.to_string(), &lowerings(layers), layers));
        }
        table.add_row(row("all", "", "", "", &self.layers.iter().collect::<Vec<_>>()));
        text += &output::lines(&table);

        let wrong = self.layers.iter().filter(|layer| !layer.right).count();
        let (units, limit) = (self.max_rounding_units, Deviation::LIMIT);
        let verdict = match wrong {
            0 => format!("right: all {} layers equal the f64 oracle but for rounding", self.layers.len()),
            _ => format!("WRONG: {wrong} of {} layers differ from the f64 oracle", self.layers.len()),
        };
        text += &format!("\n{verdict} (worst {units:.2} units of it, of {limit} allowed)\n");
        text
    }
}

fn worst<'a>(layers: impl Iterator<Item = &'a LayerReport>) -> Deviation {
    let deviation = |layer: &LayerReport| Deviation {
        relative_error: layer.max_relative_error,
        rounding_units: layer.max_rounding_units,
    };
    layers.map(deviation).fold(Deviation::default(), Deviation::max)
}

fn row(name: &str, d: &str, k: &str, lowerings: &str, layers: &[&LayerReport]) -> Vec<String> {
    let seconds: f64 = layers.iter().map(|layer| layer.seconds).sum();
    let base_seconds: f64 = layers.iter().map(|layer| layer.base_seconds).sum();
    vec![
        name.to_owned(),
        layers.len().to_string(),
        d.to_owned(),
        k.to_owned(),
        lowerings.to_owned(),
        output::seconds(seconds),
        output::seconds(base_seconds),
        format!("{:.2}", seconds / base_seconds),
        format!("{:.1e}", worst(layers.iter().copied()).relative_error),
    ]
}

/// The lowerings of a group, with how many layers took each where they differ.
fn lowerings(layers: &[&LayerReport]) -> String {
    let mut counts: BTreeMap<Lowerings, usize> = BTreeMap::new();
    for layer in layers {
        *counts.entry(layer.lowerings).or_insert(0) += 1;
    }
    let name = |Lowerings { multiplicative, additive }: &Lowerings| {
        let names: Vec<_> = [multiplicative, additive].into_iter().flatten().map(|lowering| lowering.name()).collect();
        if names.is_empty() { "base GEMM".to_owned() } else { names.join(" + ") }
    };
    match counts.len() {
        1 => counts.keys().map(name).collect(),
        _ => counts.iter().map(|(key, count)| format!("{} ×{count}", name(key))).collect::<Vec<_>>().join(", "),
    }
}
