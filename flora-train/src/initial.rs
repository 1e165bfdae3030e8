//! What a job's parameters start from, as the description of their kind says it.

use flora_checkpoint::Operand;
use flora_checkpoint::peft::description::{Extent, Filling, Initial, TensorDescription};
use serde::{Deserialize, Serialize};

use crate::random::{generator, normal};

/// Which of a kind's starts a job takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// PEFT's for the kinds that it has; of fLoRA, one component of ones and others whose output is 0. The adapted model is the base.
    #[default]
    Default,
    /// That of the code of the kind's authors, where it has one of its own: of fLoRA with the mean, ones.
    Reference,
}

/// The module that an operand is of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place<'a> {
    pub(crate) path: &'a str,
    pub(crate) d: usize,
    pub(crate) k: usize,
    pub(crate) rank: usize,
    /// `[d, k]`, where some operand starts from it.
    pub(crate) base: Option<&'a [f32]>,
}

impl Place<'_> {
    fn extent(&self, extent: Extent) -> usize {
        match extent {
            Extent::Inputs => self.d,
            Extent::Outputs => self.k,
            Extent::Rank => self.rank,
            Extent::Fixed(number) => number,
            // Only what functions read or make, which isn't trained.
            Extent::Components | Extent::Any => 0,
        }
    }

    /// The operand that `described` is of, filled as `initial` says by numbers that follow from `seed`.
    pub(crate) fn filled(&self, described: &TensorDescription, initial: Initial, seed: u64) -> Operand {
        let shape: Vec<Extent> = described.shape();
        let (first, others) = match initial {
            Initial::All(filling) => (filling, filling),
            Initial::ByComponent(fillings) => (fillings.first, fillings.others),
        };
        // In PyTorch's order of extents, the last one is how many inputs a row has.
        let inputs = described.stored.last().map_or(1, |extent| self.extent(*extent));
        let component = shape.iter().position(|extent| *extent == Extent::Rank);
        let extents: Vec<usize> = shape.iter().map(|extent| self.extent(*extent)).collect();
        let mut generator = generator(seed, &format!("{}.{}", self.path, described.operand), 0);
        let norms = [first, others].contains(&Filling::ColumnNorms).then(|| self.column_norms());
        let values = (0..extents.iter().product::<usize>()).map(|at| {
            let columns = extents.last().copied().unwrap_or(1);
            let component = match component {
                Some(0) if extents.len() == 2 => at / columns,
                Some(_) => at % columns,
                None => 0,
            };
            match if component == 0 { first } else { others } {
                Filling::Zeros => 0.0,
                Filling::Ones => 1.0,
                Filling::Rank => self.rank as f32,
                Filling::Normal => normal(&mut generator) as f32,
                Filling::KaimingUniform => ((2.0 * generator.f64() - 1.0) / (inputs as f64).sqrt()) as f32,
                Filling::ColumnNorms => norms.as_ref().and_then(|norms| norms.get(at)).copied().unwrap_or(f32::NAN),
            }
        });
        Operand { values: values.collect(), shape: extents }
    }

    fn column_norms(&self) -> Vec<f32> {
        let mut squares = vec![0.0f64; self.k];
        for row in self.base.unwrap_or_default().chunks_exact(self.k.max(1)) {
            squares.iter_mut().zip(row).for_each(|(sum, weight)| *sum += f64::from(*weight) * f64::from(*weight));
        }
        squares.into_iter().map(|sum| sum.sqrt() as f32).collect()
    }
}

/// Whether an operand starts from the base weight.
pub(crate) fn reads_base(initial: Initial) -> bool {
    match initial {
        Initial::All(filling) => filling == Filling::ColumnNorms,
        Initial::ByComponent(fillings) => [fillings.first, fillings.others].contains(&Filling::ColumnNorms),
    }
}
