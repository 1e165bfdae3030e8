//! The first numbers of a token. Rows are looked up in the model's file, in whatever form it has them: a step needs a few thousand
//! numbers, and the device keeps no second copy of a table of tens of millions.

use flora_adapters::AdaptedEmbedding;
use flora_checkpoint::model::Parameter;
use flora_checkpoint::{ModelError, TensorProblem};

/// A row that can't be looked up.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddingError {
    /// Of the base model.
    #[error(transparent)]
    Base(#[from] ModelError),
    /// Of an adapter's own embedding.
    #[error("the embedding of an adapter {0}")]
    Adapter(#[from] TensorProblem),
}

/// The tables.
#[derive(Clone, Debug)]
pub(crate) struct Embedding {
    /// `[vocabulary, d]`
    pub(crate) tokens: Parameter,
    /// `[positions, d]`, of a model that learned them.
    pub(crate) positions: Option<Parameter>,
}

impl Embedding {
    /// The rows of `tokens`, `[tokens.len(), d]`, of an adapter that changes them or of the base; without positions.
    pub(crate) fn rows(
        &self,
        adapted: Option<&AdaptedEmbedding>,
        tokens: &[usize],
    ) -> Result<Vec<f32>, EmbeddingError> {
        let base = |tokens: &[usize]| Ok(self.tokens.rows_f32(tokens)?);
        match adapted {
            None => base(tokens),
            Some(adapted) => adapted.rows(tokens, base),
        }
    }

    /// Adds what the model learned of positions to rows.
    pub(crate) fn add_positions(&self, rows: &mut [f32], positions: &[usize]) -> Result<(), ModelError> {
        if let Some(table) = &self.positions {
            let learned = table.rows_f32(positions)?;
            rows.iter_mut().zip(learned).for_each(|(row, learned)| *row += learned);
        }
        Ok(())
    }
}
