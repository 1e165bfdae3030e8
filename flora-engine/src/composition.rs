//! Which adapter is meant: one by its name, or a weighted sum of several, which is one adapter when it is loaded.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// The most parts of a composition; each is read when it is loaded.
const MOST_PARTS: usize = 16;

/// An adapter that a request asks for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdapterChoice {
    /// By its name.
    Named(String),
    /// Several at once.
    Composed(Composition),
}

/// A weighted sum of what adapters change, y = y₀ + Σᵢ wᵢ · (yᵢ − y₀): their names, each once, and finite weights.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Composition(Arc<[Part]>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Part {
    name: String,
    weight: Weight,
}

/// A finite number; there is one zero.
#[derive(Clone, Copy, Debug)]
struct Weight(f64);

impl PartialEq for Weight {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Weight {}

impl PartialOrd for Weight {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Weight {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

impl Hash for Weight {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.to_bits().hash(state);
    }
}

/// Why adapters and weights are no composition.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CompositionError {
    /// No part.
    #[error("a composition of no adapters; name one at least")]
    Empty,
    /// Too many.
    #[error("a composition of {0} adapters; at most {MOST_PARTS} are taken")]
    TooMany(usize),
    /// An adapter that is named twice.
    #[error("a composition names the adapter `{0}` twice; name it once, with the sum of the weights")]
    Twice(String),
    /// NaN or an infinity.
    #[error("the weight of the adapter `{name}` is {weight}; it has to be a finite number")]
    Weight {
        /// The adapter.
        name: String,
        /// Its weight.
        weight: f64,
    },
}

impl Composition {
    /// Of adapters by their names, in this order, each with its weight; weights may be negative.
    ///
    /// # Errors
    /// See [`CompositionError`].
    pub fn new(parts: impl IntoIterator<Item = (String, f64)>) -> Result<Self, CompositionError> {
        let mut composed: Vec<Part> = Vec::new();
        for (name, weight) in parts {
            if !weight.is_finite() {
                return Err(CompositionError::Weight { name, weight });
            }
            if composed.iter().any(|part| part.name == name) {
                return Err(CompositionError::Twice(name));
            }
            composed.push(Part { name, weight: Weight(weight + 0.0) });
        }
        match composed.len() {
            0 => Err(CompositionError::Empty),
            count if count > MOST_PARTS => Err(CompositionError::TooMany(count)),
            _ => Ok(Self(composed.into())),
        }
    }

    /// The adapters with their weights.
    pub fn parts(&self) -> impl ExactSizeIterator<Item = (&str, f64)> {
        self.0.iter().map(|part| (part.name.as_str(), part.weight.0))
    }

    /// What tells the composition from what it becomes when the files of a part change: by the version of each part.
    ///
    /// # Errors
    /// The first that `version` has.
    pub fn version<E>(&self, mut version: impl FnMut(&str) -> Result<u64, E>) -> Result<u64, E> {
        let mut hasher = DefaultHasher::new();
        for part in &*self.0 {
            version(&part.name)?.hash(&mut hasher);
            part.weight.hash(&mut hasher);
        }
        Ok(hasher.finish())
    }
}

impl AdapterChoice {
    /// The names of all adapters that it is made of.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let (named, composed) = match self {
            Self::Named(name) => (Some(name.as_str()), None),
            Self::Composed(composition) => (None, Some(composition.parts().map(|(name, _)| name))),
        };
        named.into_iter().chain(composed.into_iter().flatten())
    }
}

impl From<&str> for AdapterChoice {
    fn from(name: &str) -> Self {
        Self::Named(name.to_owned())
    }
}

impl From<String> for AdapterChoice {
    fn from(name: String) -> Self {
        Self::Named(name)
    }
}

impl From<Composition> for AdapterChoice {
    fn from(composition: Composition) -> Self {
        Self::Composed(composition)
    }
}

impl fmt::Display for AdapterChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Composed(composition) => composition.fmt(f),
        }
    }
}

impl fmt::Display for Composition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (name, weight)) in self.parts().enumerate() {
            let plus = if index == 0 { "" } else { " + " };
            write!(f, "{plus}{name}×{weight}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn composed(parts: &[(&str, f64)]) -> Result<Composition, CompositionError> {
        Composition::new(parts.iter().map(|(name, weight)| ((*name).to_owned(), *weight)))
    }

    #[test]
    fn adapters_have_one_finite_weight_each() {
        let sum = composed(&[("a", 0.7), ("b", -0.25), ("c", 0.0)]).expect("three parts");
        assert_eq!(sum.to_string(), "a×0.7 + b×-0.25 + c×0");
        assert_eq!(AdapterChoice::from(sum.clone()).names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(composed(&[("a", -0.0)]), composed(&[("a", 0.0)]), "there is one zero");
        assert_ne!(composed(&[("a", 1.0), ("b", 1.0)]), composed(&[("b", 1.0), ("a", 1.0)]), "the order counts");
        assert_eq!(composed(&[]), Err(CompositionError::Empty));
        assert_eq!(composed(&[("a", 1.0), ("a", 2.0)]), Err(CompositionError::Twice("a".to_owned())));
        for weight in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(matches!(composed(&[("a", weight)]), Err(CompositionError::Weight { .. })), "{weight}");
        }
        let many = (0..17).map(|index| (index.to_string(), 1.0));
        assert_eq!(Composition::new(many), Err(CompositionError::TooMany(17)));
    }

    #[test]
    fn its_version_is_that_of_its_parts_and_weights() {
        let version = |parts: &[(&str, f64)], b: u64| {
            let of = |name: &str| Ok::<_, ()>(if name == "b" { b } else { 1 });
            composed(parts).expect("parts").version(of).expect("versions")
        };
        let sum = [("a", 0.5), ("b", 0.5)];
        assert_eq!(version(&sum, 1), version(&sum, 1));
        assert_ne!(version(&sum, 1), version(&sum, 2));
        assert_ne!(version(&sum, 1), version(&[("a", 0.5), ("b", 0.25)], 1));
        assert_eq!(composed(&sum).expect("parts").version(|name| Err::<u64, _>(name.to_owned())), Err("a".to_owned()));
    }
}
