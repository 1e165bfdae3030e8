//! What an adapter makes of a model: the vectors of the projections that it adapts, and what becomes of the two ends of a decoder,
//! its token embedding and its output matrix.

use std::collections::BTreeMap;

use flora_checkpoint::{ReplacedRows, StoredTensor, TensorProblem};
use flora_ir::algebra::FoldedAdapter;

/// An adapter in host memory, folded for a model.
#[derive(Clone, Debug, Default)]
pub struct AdaptedModel {
    /// By module path, the output matrix among them.
    pub modules: BTreeMap<String, FoldedAdapter>,
    /// What is added to a projection's outputs before anything follows, `[k]`, by module path.
    pub bias_offsets: BTreeMap<String, Vec<f32>>,
    /// What becomes of the token embedding; `None`: nothing.
    pub embedding: Option<AdaptedEmbedding>,
    /// What takes the place of the output matrix; `None`: nothing. What adapts it, that of the base or this one, is in `modules`.
    pub head: Option<AdaptedHead>,
}

/// A token embedding with an adapter.
#[derive(Clone, Debug)]
pub struct AdaptedEmbedding {
    /// The embedding's path.
    pub path: String,
    /// `[vocabulary, d]` in place of the base's.
    pub table: Option<StoredTensor>,
    /// In place of single rows.
    pub rows: Option<ReplacedRows>,
    /// For a projection of one-hot rows.
    pub folded: Option<FoldedAdapter>,
}

/// An output matrix of an adapter's own, or rows of one.
#[derive(Clone, Debug)]
pub struct AdaptedHead {
    /// The output matrix's path.
    pub path: String,
    /// `[vocabulary, d]` in place of the base's.
    pub weight: Option<StoredTensor>,
    /// In place of single rows.
    pub rows: Option<ReplacedRows>,
}

impl AdaptedEmbedding {
    /// The first numbers of `tokens`, `[tokens.len(), d]`; `base` gives rows of the base's embedding.
    ///
    /// # Errors
    /// A token that there isn't, and whatever `base` says.
    pub fn rows<E: From<TensorProblem>>(
        &self,
        tokens: &[usize],
        base: impl FnOnce(&[usize]) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f32>, E> {
        let mut rows = match &self.table {
            Some(table) => table.rows_f32(tokens)?,
            None => base(tokens)?,
        };
        let d = rows.len() / tokens.len().max(1);
        for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(d.max(1))) {
            let own = self.rows.as_ref().and_then(|rows| rows.get(u32::try_from(*token).ok()?));
            if let Some(own) = own.filter(|own| own.len() == row.len()) {
                row.copy_from_slice(own);
            }
            if let Some(folded) = &self.folded {
                apply_to_one_hot(folded, *token, row);
            }
        }
        Ok(rows)
    }

    /// Bytes in host memory.
    pub fn bytes(&self) -> u64 {
        let table = self.table.as_ref().map_or(0, |table| table.bytes().len());
        let rows = self.rows.as_ref().map_or(0, |rows| rows.values.len());
        let folded = self.folded.as_ref().map_or(0, |folded| 4 * numbers(folded) + folded.sparse.bytes());
        (table + 4 * rows + folded) as u64
    }
}

/// Numbers of an adapter's vectors. Sparse matrices aren't among them: [`SparseParts::bytes`](flora_ir::algebra::SparseParts::bytes).
pub fn numbers(folded: &FoldedAdapter) -> usize {
    let scales = folded.virtual_rows.iter().flat_map(|row| [&row.in_scale, &row.out_scale]);
    let scales: usize = scales.flatten().map(Vec::len).sum();
    scales + folded.low_rank.iter().map(|pair| pair.shrink.len() + pair.expand.len()).sum::<usize>()
}

/// Makes of the row of the weight that `at` names what the adapted projection gives for the one-hot row of `at`.
fn apply_to_one_hot(folded: &FoldedAdapter, at: usize, row: &mut [f32]) {
    // Only one number of each in-vector meets anything but zero.
    let of = |vector: &[f32]| f64::from(vector.get(at).copied().unwrap_or(0.0));
    let mut sums = vec![0.0f64; row.len()];
    for scales in &folded.virtual_rows {
        let inner = scales.in_scale.as_deref().map_or(1.0, of);
        for (index, (sum, base)) in sums.iter_mut().zip(&*row).enumerate() {
            let outer = scales.out_scale.as_ref().map_or(1.0, |scale| f64::from(scale[index]));
            *sum += outer * inner * f64::from(*base);
        }
    }
    for pair in &folded.low_rank {
        let shrunk = of(&pair.shrink);
        sums.iter_mut().zip(&pair.expand).for_each(|(sum, expand)| *sum += shrunk * f64::from(*expand));
    }
    if let Some(outputs) = &folded.sparse.outputs {
        sums = outputs.times_row(&sums);
    }
    for product in &folded.sparse.added {
        let mut one_hot = vec![0.0; product.first.shape()[0]];
        one_hot.get_mut(at).into_iter().for_each(|one| *one = 1.0);
        sums.iter_mut().zip(product.times_row(&one_hot)).for_each(|(sum, added)| *sum += added);
    }
    row.iter_mut().zip(sums).for_each(|(number, sum)| *number = sum as f32);
}
