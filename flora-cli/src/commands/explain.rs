//! `flora explain`: from the written equation to the normal form and the legal lowerings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::Args;
use flora::prelude::*;
use flora_adapters::{Layers, zoo};
use flora_checkpoint::AdapterFolder;
use flora_ir::algebra::{Core, NormalForm, Term};
use flora_ir::gradient::Gradient;
use flora_ir::text::{print, print_equation};
use flora_ir::{Activation, Handle, Node, Reduce};
use flora_plan::lowering::{Part, SparsePass, lowerings_of, sparse_passes_of};
use flora_plan::pipeline::CompiledGradient;
use serde::Serialize;

use super::error::CommandError;
use super::layer::{self, NamedLayer};
use super::output;

/// Show how a layer's equation becomes the normal form, and how it can be computed
#[derive(Args)]
pub(crate) struct Arguments {
    /// A built-in layer (linear, flora, hira, lora, loha, ...; `--zoo` lists all) or a file in the text form
    #[arg(required_unless_present_any = ["peft", "zoo"])]
    layer: Option<String>,
    /// Show the layers of an adapter instead: a folder as PEFT saves it
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["layer", "gradient"])]
    peft: Option<PathBuf>,
    /// List the kinds of adapters that are read, with their equations, and PEFT's kinds that aren't, as docs/adapters.md has them
    #[arg(long, conflicts_with_all = ["layer", "gradient", "peft", "json"])]
    zoo: bool,
    /// Show the gradients that follow from the equation instead: the layer that gives the input's, and those of the operands
    #[arg(long)]
    gradient: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    layer: String,
    source: String,
    equation: String,
    derivation: Vec<Step>,
    terms: Vec<String>,
    /// What each adapter adds to its rows.
    offset: Vec<String>,
    bias: Option<String>,
    activation: &'static str,
    /// What is added last.
    residual: Option<String>,
    lowerings: Vec<LegalLowering>,
    /// What rows are multiplied by beside them.
    sparse: Vec<Sparse>,
}

#[derive(Serialize)]
struct Sparse {
    pass: SparsePass,
    summary: &'static str,
}

#[derive(Serialize)]
struct Step {
    rule: &'static str,
    words: &'static str,
    from: &'static str,
    to: &'static str,
    equation: String,
}

#[derive(Serialize)]
struct LegalLowering {
    part: &'static str,
    lowering: Lowering,
    summary: &'static str,
}

/// What follows from an equation by differentiation.
#[derive(Serialize)]
struct GradientReport {
    layer: String,
    source: String,
    /// The layer that gives the input's gradient.
    adjoint: Report,
    /// What the gradient of the output is called in what follows.
    output: String,
    /// Of the equation as it was written.
    written: Equations,
    /// Of its normal form.
    normal: Equations,
}

#[derive(Serialize)]
struct Equations {
    rules: Vec<GradientStep>,
    /// What the gradients share, a `let` each.
    shared: String,
    gradients: Vec<OperandGradient>,
}

#[derive(Serialize)]
struct GradientStep {
    operation: &'static str,
    gradients: &'static [&'static str],
    words: &'static str,
}

#[derive(Serialize)]
struct OperandGradient {
    operand: String,
    equation: String,
}

pub(crate) fn explain(arguments: &Arguments) -> Result<(), CommandError> {
    if arguments.zoo {
        return output::print(&zoo::markdown(&Layers::builtin()?));
    }
    if let Some(folder) = &arguments.peft {
        return explain_folder(folder, arguments.json);
    }
    let name = arguments.layer.as_deref().unwrap_or_default();
    let NamedLayer { source, compiled } = layer::open(name)?;
    if arguments.gradient {
        let gradient = compiled.gradient().map_err(|error| layer::in_source(name, &source, &[error.diagnostic()]))?;
        let report = gradient_report(&compiled, &gradient, source);
        return match arguments.json {
            true => output::print_json(&report),
            false => output::print(&gradient_text(&report, compiled.activation(), &gradient)),
        };
    }
    let report = report(source, &compiled);
    if arguments.json { output::print_json(&report) } else { output::print(&human(&report, &compiled)) }
}

/// What is said of an adapter's folder: its layers, each once.
#[derive(Serialize)]
struct FolderReport {
    adapter: String,
    kind: String,
    layers: Vec<LayerOfFolder>,
}

#[derive(Serialize)]
struct LayerOfFolder {
    /// The paths of the modules that are of it.
    modules: Vec<String>,
    /// Their ranks, each once; 0 for a layer without rank.
    ranks: BTreeSet<usize>,
    report: Report,
}

fn explain_folder(folder: &Path, json: bool) -> Result<(), CommandError> {
    let layers = Layers::builtin()?;
    let adapter = AdapterFolder::open(folder, layers.kinds())?;
    let mut by_layer: BTreeMap<&str, Vec<(&String, usize)>> = BTreeMap::new();
    for (path, module) in &adapter.modules {
        by_layer.entry(&module.layer).or_default().push((path, module.rank));
    }
    let (mut own, mut text) = (Vec::new(), format!("{}: {}\n", adapter.name, adapter.kind.name()));
    for (name, modules) in by_layer {
        let Some(compiled) = layers.compiled(name) else { continue };
        let report = report(print(compiled.written.layer()), compiled);
        let ranks: BTreeSet<usize> = modules.iter().map(|(_, rank)| *rank).collect();
        let listed = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        text += &format!("\n{} modules, of rank {listed}\n{}", modules.len(), human(&report, compiled));
        let modules = modules.into_iter().map(|(path, _)| path.clone()).collect();
        own.push(LayerOfFolder { modules, ranks, report });
    }
    match json {
        true => {
            let (adapter, kind) = (adapter.name.clone(), adapter.kind.name().to_owned());
            output::print_json(&FolderReport { adapter, kind, layers: own })
        }
        false => output::print(&text),
    }
}

fn report(source: String, compiled: &CompiledLayer) -> Report {
    let CompiledLayer { written, linear, derivation, parts } = compiled;
    let steps = derivation.steps.iter().map(|step| Step {
        rule: step.rule.name,
        words: step.rule.words,
        from: step.rule.from_text,
        to: step.rule.to_text,
        equation: step.after.clone(),
    });
    let name = |operand| linear.layer.layer().operands[operand].name.clone();
    let lowerings = parts.iter().flat_map(|part| {
        lowerings_of(*part).map(|row| LegalLowering {
            part: part_name(*part),
            lowering: row.lowering(),
            summary: row.summary,
        })
    });
    Report {
        layer: written.layer().name.clone(),
        source,
        equation: print_equation(written.layer()),
        derivation: steps.collect(),
        terms: linear.terms.iter().map(|term| term_text(linear, term)).collect(),
        offset: linear.offset.iter().map(|node| value_text(linear, *node)).collect(),
        bias: linear.bias.map(name),
        activation: linear.activation.name(),
        residual: linear.residual.map(name),
        lowerings: lowerings.collect(),
        sparse: sparse_passes_of(linear).into_iter().map(|pass| Sparse { pass, summary: pass.summary() }).collect(),
    }
}

fn gradient_report(compiled: &CompiledLayer, gradient: &CompiledGradient, source: String) -> GradientReport {
    let CompiledGradient { adjoint, written, normal, .. } = gradient;
    GradientReport {
        layer: compiled.written.layer().name.clone(),
        source,
        adjoint: report(print(adjoint.written.layer()), adjoint),
        output: written.output.clone(),
        written: equations(written),
        normal: equations(normal),
    }
}

fn equations(gradient: &Gradient) -> Equations {
    let (shared, gradients) = gradient.equations();
    let rules = gradient.rules.iter().map(|rule| GradientStep {
        operation: rule.operation,
        gradients: rule.gradients,
        words: rule.words,
    });
    let gradients =
        gradients.into_iter().map(|(operand, equation)| OperandGradient { operand: operand.to_owned(), equation });
    Equations { rules: rules.collect(), shared, gradients: gradients.collect() }
}

fn part_name(part: Part) -> &'static str {
    match part {
        Part::Multiplicative => "multiplicative",
        Part::Additive => "additive",
    }
}

fn human(report: &Report, compiled: &CompiledLayer) -> String {
    let mut text = format!("{}\nDerivation\n{}\n", report.source, compiled.derivation);
    text += &format!("Normal form: y = {}( sum of the terms", report.activation);
    text += &report.offset.iter().map(|offset| format!(" + {offset}")).collect::<String>();
    text += &report.bias.as_ref().map(|bias| format!(" + {bias}")).unwrap_or_default();
    text += " )";
    text += &report.residual.as_ref().map(|residual| format!(" + {residual}")).unwrap_or_default();
    text += "\n";
    for term in &report.terms {
        text += &format!("  {}\n", term.replace('\n', "\n  "));
    }
    text + &lowerings_text(report)
}

/// The input's gradient as a layer, and those of all operands as equations.
fn gradient_text(report: &GradientReport, activation: Activation, gradient: &CompiledGradient) -> String {
    let GradientReport { source, adjoint, output, .. } = report;
    let linear = &gradient.adjoint.linear;
    let g = &linear.layer.layer().operands[linear.input].name;
    let of_g = match activation {
        Activation::Identity => format!("{g} = {output}"),
        function => format!("{g} = {}_derivative(sum before it) * {output}", function.name()),
    };
    let mut text = format!("{source}\nInput, where {of_g} is the gradient of the sum of the terms\n{}", adjoint.source);
    if !gradient.adjoint.derivation.steps.is_empty() {
        text += &format!("\nDerivation\n{}", gradient.adjoint.derivation);
    }
    text += "\nNormal form: sum of the terms\n";
    for term in &adjoint.terms {
        text += &format!("  {}\n", term.replace('\n', "\n  "));
    }
    text += &lowerings_text(adjoint);
    text += &format!("\nOperands, where {output} is the gradient of the output\n{}", gradient.written);
    text + &format!("\nThe same from the normal form\n{}", gradient.normal)
}

fn lowerings_text(report: &Report) -> String {
    let mut text = "\nLowerings\n".to_owned();
    if report.lowerings.is_empty() && report.sparse.is_empty() {
        text += "  the base GEMM: nothing is adapted\n";
    }
    let mut table = output::table(&["<  part", "<lowering", "<what it does"]);
    for row in &report.lowerings {
        table.add_row([format!("  {}", row.part), row.lowering.to_string(), row.summary.to_owned()]);
    }
    for pass in &report.sparse {
        table.add_row(["  sparse".to_owned(), SparsePass::NAME.to_owned(), pass.summary.to_owned()]);
    }
    if !report.lowerings.is_empty() || !report.sparse.is_empty() {
        text += &output::lines(&table);
    }
    text
}

/// A value that is known when an adapter is loaded, in brackets unless it is one word.
fn value_text(linear: &NormalForm, node: Handle<Node>) -> String {
    let mut part = linear.layer.layer().clone();
    part.root = Some(node);
    let text = print_equation(&part);
    if text.contains([' ', '\n']) { format!("({text})") } else { text }
}

/// `outer ∘ core(inner ∘ x)` with the load-time values written out.
fn term_text(linear: &NormalForm, term: &Term) -> String {
    let value = |node: Handle<Node>| value_text(linear, node);
    let operand = |operand| linear.layer.layer().operands[operand].name.clone();
    let (x, w0) = (operand(linear.input), operand(linear.base_weight));
    let x = term.inner.map_or_else(|| x.clone(), |inner| format!("({} ∘ {x})", value(inner)));
    let fold = |reduce, sum: &'static str, mean: &'static str| if reduce == Reduce::Sum { sum } else { mean };
    let core = match term.core {
        Core::Base => format!("{x} @ {w0}"),
        Core::Multiplicative { b, a, reduce } => {
            let fold = fold(reduce, "Σ_r", "mean_r");
            format!("{fold} {a}_r ∘ (({b}_r ∘ {x}) @ {w0})", a = value(a), b = value(b))
        }
        Core::Additive { b, a, reduce } => {
            format!("{}({x} @ {}) @ {}", fold(reduce, "", "1/r · "), value(b), value(a))
        }
        Core::TransformedInputs(matrix) => format!("({x} @ {}) @ {w0}", value(matrix)),
        Core::TransformedOutputs(matrix) => format!("({x} @ {w0}) @ {}", value(matrix)),
        Core::Sparse { first, second: None } => format!("{x} @ {}", value(first)),
        Core::Sparse { first, second: Some(second) } => format!("({x} @ {}) @ {}", value(first), value(second)),
    };
    term.outer.map_or_else(|| core.clone(), |outer| format!("{} ∘ ({core})", value(outer)))
}
