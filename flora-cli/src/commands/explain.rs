//! `flora explain`: from the written equation to the normal form and the legal lowerings.

use clap::Args;
use flora::prelude::*;
use flora_ir::algebra::{Core, NormalForm, Term};
use flora_ir::text::print_equation;
use flora_ir::{Handle, Node, Reduce};
use flora_plan::lowering::{Part, lowerings_of};
use serde::Serialize;

use super::error::CommandError;
use super::layer::{self, NamedLayer};
use super::output;

/// Show how a layer's equation becomes the normal form, and how it can be computed
#[derive(Args)]
pub(crate) struct Arguments {
    /// A built-in layer (linear, flora, flora_mean, hira, lora, ia3, ia3_feedforward, dora) or a file in the text form
    layer: String,
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
    bias: Option<String>,
    activation: &'static str,
    /// What is added last.
    residual: Option<String>,
    lowerings: Vec<LegalLowering>,
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

pub(crate) fn explain(arguments: &Arguments) -> Result<(), CommandError> {
    let NamedLayer { source, compiled } = layer::open(&arguments.layer)?;
    let report = report(source, &compiled);
    if arguments.json { output::print_json(&report) } else { output::print(&human(&report, &compiled)) }
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
        bias: linear.bias.map(name),
        activation: linear.activation.name(),
        residual: linear.residual.map(name),
        lowerings: lowerings.collect(),
    }
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
    text += &report.bias.as_ref().map(|bias| format!(" + {bias}")).unwrap_or_default();
    text += " )";
    text += &report.residual.as_ref().map(|residual| format!(" + {residual}")).unwrap_or_default();
    text += "\n";
    for term in &report.terms {
        text += &format!("  {}\n", term.replace('\n', "\n  "));
    }
    text += "\nLowerings\n";
    if report.lowerings.is_empty() {
        text += "  the base GEMM: nothing is adapted\n";
    }
    let mut table = output::table(&["<  part", "<lowering", "<what it does"]);
    for row in &report.lowerings {
        table.add_row([format!("  {}", row.part), row.lowering.to_string(), row.summary.to_owned()]);
    }
    if !report.lowerings.is_empty() {
        text += &output::lines(&table);
    }
    text
}

/// `outer ∘ core(inner ∘ x)` with the load-time values written out.
fn term_text(linear: &NormalForm, term: &Term) -> String {
    let value = |node: Handle<Node>| {
        let mut part = linear.layer.layer().clone();
        part.root = Some(node);
        let text = print_equation(&part);
        if text.contains([' ', '\n']) { format!("({text})") } else { text }
    };
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
    };
    term.outer.map_or_else(|| core.clone(), |outer| format!("{} ∘ ({core})", value(outer)))
}
