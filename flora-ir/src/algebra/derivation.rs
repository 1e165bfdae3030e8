//! How an equation became an adapted linear: every step, so that anyone can follow it.

use std::fmt;

use super::rules::Rule;
use crate::text::print_equation;
use crate::verify::VerifiedLayer;

/// The steps from an equation as written to its normal form.
#[derive(Clone, Debug)]
pub struct Derivation {
    /// The equation as written.
    pub start: VerifiedLayer,
    /// One rule each, in order.
    pub steps: Vec<Step>,
}

/// One application of a rule.
#[derive(Clone, Debug)]
pub struct Step {
    /// The rule.
    pub rule: &'static Rule,
    /// The whole equation before, in the text form.
    pub before: String,
    /// The whole equation after, in the text form.
    pub after: String,
    /// The layer after.
    pub layer: VerifiedLayer,
}

impl Derivation {
    pub(super) fn new(start: VerifiedLayer) -> Self {
        Self { start, steps: Vec::new() }
    }

    /// The layer as it is after all steps.
    pub fn result(&self) -> &VerifiedLayer {
        self.steps.last().map_or(&self.start, |step| &step.layer)
    }

    pub(super) fn push(&mut self, rule: &'static Rule, layer: VerifiedLayer) {
        let before = match self.steps.last() {
            Some(step) => step.after.clone(),
            None => print_equation(self.start.layer()),
        };
        let after = print_equation(layer.layer());
        self.steps.push(Step { rule, before, after, layer });
    }
}

/// The equation as written, then for each step the rule and the equation that it gives.
impl fmt::Display for Derivation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_equation(f, &print_equation(self.start.layer()))?;
        for step in &self.steps {
            let Rule { name, words, from_text, to_text, .. } = step.rule;
            writeln!(f, "= {{ {name}: {words}\n    {from_text}  =  {to_text} }}")?;
            write_equation(f, &step.after)?;
        }
        Ok(())
    }
}

fn write_equation(f: &mut fmt::Formatter<'_>, equation: &str) -> fmt::Result {
    equation.lines().try_for_each(|line| writeln!(f, "  {line}"))
}
