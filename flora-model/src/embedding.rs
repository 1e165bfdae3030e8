//! The first numbers of a token. Rows are looked up in the model's file, in whatever form it has them: a step needs a few thousand
//! numbers, and the device keeps no second copy of a table of tens of millions.

use flora_checkpoint::ModelError;
use flora_checkpoint::model::Parameter;

/// The tables.
#[derive(Clone, Debug)]
pub(crate) struct Embedding {
    /// `[vocabulary, d]`
    pub(crate) tokens: Parameter,
    /// `[positions, d]`, of a model that learned them.
    pub(crate) positions: Option<Parameter>,
}

impl Embedding {
    /// `[tokens.len(), d]`
    pub(crate) fn rows(&self, tokens: &[usize], positions: &[usize]) -> Result<Vec<f32>, ModelError> {
        let mut rows = self.tokens.rows_f32(tokens)?;
        if let Some(table) = &self.positions {
            let learned = table.rows_f32(positions)?;
            rows.iter_mut().zip(learned).for_each(|(row, learned)| *row += learned);
        }
        Ok(rows)
    }
}
