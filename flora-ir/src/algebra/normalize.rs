//! Rewrites an equation with the rules until none applies, and reads the normal form off what is left.

use super::NormalForm;
use super::derivation::Derivation;
use super::obstacle::{NormalizeError, Obstacle};
use super::pattern::{Subject, rewrite};
use super::read::read;
use super::rules::{Rule, rules};
use crate::arena::Handle;
use crate::layer::Node;
use crate::verify::{MAX_NODES, VerifiedLayer, verify};

/// The most steps of one derivation; the built-in adapters take at most ten.
pub const MAX_STEPS: usize = 1000;

/// An equation in normal form.
#[derive(Clone, Debug)]
pub struct Normalized {
    /// The normal form.
    pub linear: NormalForm,
    /// How it was reached.
    pub derivation: Derivation,
}

/// Takes `layer` to its normal form by the rules of [`rules`](mod@super::rules).
///
/// # Errors
/// When the rules end at something else: the term that is in the way, as it was written, and why. When the equation grows past
/// the verifier's limit or takes more than [`MAX_STEPS`] steps.
pub fn normalize(layer: &VerifiedLayer) -> Result<Normalized, NormalizeError> {
    let mut derivation = Derivation::new(layer.clone());
    while let Some((rule, next)) = step(derivation.result()) {
        // A rule adds a handful of nodes, so an equation never reaches the limit at which the verifier would refuse it.
        if derivation.steps.len() == MAX_STEPS || next.layer().nodes.len() > MAX_NODES - 16 {
            return Err(NormalizeError::at(&next, next.root(), Obstacle::TooLong));
        }
        derivation.push(rule, next);
    }
    let linear = read(derivation.result())?;
    Ok(Normalized { linear, derivation })
}

/// Applies the first rule that fits at the place nearest to the root.
fn step(layer: &VerifiedLayer) -> Option<(&'static Rule, VerifiedLayer)> {
    let subject = Subject::new(layer);
    let mut seen = vec![false; layer.layer().nodes.len()];
    let mut places = vec![layer.root()];
    while let Some(place) = places.pop() {
        if std::mem::replace(&mut seen[place.index()], true) {
            continue;
        }
        if let Some(applied) = rules().iter().find_map(|rule| Some((rule, apply(rule, &subject, place)?))) {
            return Some(applied);
        }
        let mut operands: Vec<_> = subject.node(place).operands().collect();
        operands.reverse();
        places.extend(operands);
    }
    None
}

/// The verified equation after `rule` at `place`; `None` where it doesn't match or would change the type.
fn apply(rule: &Rule, subject: &Subject<'_>, place: Handle<Node>) -> Option<VerifiedLayer> {
    let keeps_type = |next: &VerifiedLayer, value| {
        let (old, new) = (subject.layer.type_of(place), next.type_of(value));
        old.shape == new.shape && old.rank_axis == new.rank_axis
    };
    rule.from.matches(subject, place).into_iter().find_map(|found| {
        let (next, value) = rewrite(subject, place, &rule.from, &found, &rule.to)?;
        verify(next).ok().filter(|next| keeps_type(next, value))
    })
}
