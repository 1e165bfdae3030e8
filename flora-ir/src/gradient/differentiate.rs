//! The gradients of a whole equation as equations: what `flora explain --gradient` prints, and what the oracle evaluates.

use std::fmt;

use super::graph::Graph;
use super::operands::OperandGradients;
use super::reverse::reverse;
use super::rules::GradientRule;
use crate::evaluate::{Bindings, EvaluateError, Value};
use crate::layer::Role;
use crate::verify::VerifiedLayer;

/// The gradients of an equation's operands, but for the frozen base weight, from the gradient of its output.
#[derive(Clone, Debug)]
pub struct Gradient {
    /// What ∂L/∂y is called.
    pub output: String,
    /// The rules that were used, in the order of their use.
    pub rules: Vec<&'static GradientRule>,
    operands: OperandGradients,
}

/// Differentiates an equation, as it was written or in any other form.
pub fn differentiate(layer: &VerifiedLayer) -> Gradient {
    let mut graph = Graph::of(layer);
    let (output, seed) = graph.declare("dy", layer.type_of(layer.root()).clone());
    let reversed = reverse(&mut graph, &[(layer.root(), seed)], |operand| operand.role != Role::BaseWeight);
    let wanted = layer.layer().operands.iter().filter(|(_, operand)| operand.role != Role::BaseWeight);
    let operands = OperandGradients::new(graph, &reversed, wanted.map(|(operand, _)| operand));
    Gradient { output, rules: reversed.rules, operands }
}

impl Gradient {
    /// ∂L/∂ of each operand but the base weight, by the operand's name, for ∂L/∂y = `output`, `[tokens, k]`. An operand that norms
    /// alone read has a gradient of zeros.
    ///
    /// # Errors
    /// As [`evaluate_root`](crate::evaluate_root): every operand must be bound, and `output` must have the output's extents.
    pub fn evaluate(&self, bindings: &Bindings, output: &Value) -> Result<Bindings, EvaluateError> {
        let mut bindings = bindings.clone();
        bindings.insert(self.output.clone(), output.clone());
        self.operands.evaluate(&bindings)
    }

    /// What the gradients share, a `let` each; and each operand's name with its gradient in the text form, `0` for one that
    /// norms alone read.
    pub fn equations(&self) -> (String, Vec<(&str, String)>) {
        self.operands.equations()
    }
}

/// The rules, and the gradients that they give, of an operand `b` as `db`.
impl fmt::Display for Gradient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for GradientRule { operation, gradients, words, .. } in &self.rules {
            let gradients = ["dm", "dn"].iter().zip(*gradients).map(|(name, text)| format!("{name} = {text}"));
            let gradients = gradients.collect::<Vec<_>>().join(", ");
            writeln!(f, "{{ {operation}: {words}\n    {gradients} }}")?;
        }
        let (lets, equations) = self.equations();
        lets.lines().try_for_each(|line| writeln!(f, "  {line}"))?;
        equations.into_iter().try_for_each(|(name, equation)| writeln!(f, "  d{name} = {equation}"))
    }
}
