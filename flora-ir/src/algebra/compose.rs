//! Several adapters of one layer at once, each with a weight: what they change is added up, y = y₀ + Σᵢ wᵢ · (yᵢ − y₀).
//!
//! Folded adapters are closed under such sums. Their low-rank pairs and virtual rows stand side by side, each weighted, and what is
//! left of x @ w0 is one more virtual row, with the scale 1 − Σwᵢ over the parts that scale their own.

use super::{FoldedAdapter, VirtualRow};

/// Why adapters have no sum.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ComposeError {
    /// One of them transforms rows, or adds sparse products.
    #[error("it multiplies rows by sparse matrices, which aren't weighted; leave it out of the sum")]
    Sparse,
    /// What is left of the base layer isn't a number of f32.
    #[error("the weights leave {0} times the base layer, which is not a finite f32; give smaller weights")]
    NotFinite(f64),
    /// Adapters that replace the base layer and hold no vector.
    #[error("the parts of the sum hold no vector")]
    NoVector,
}

impl VirtualRow {
    fn is_plain(&self) -> bool {
        self.in_scale.is_none() && self.out_scale.is_none()
    }
}

impl FoldedAdapter {
    /// The sum of what adapters of one layer change, each with its weight: what
    /// [`NormalForm::fold_weighted`](super::NormalForm::fold_weighted) gave for that weight. Where no part scales x @ w0, that stays as
    /// it is, and no part is the base layer.
    ///
    /// # Errors
    /// See [`ComposeError`].
    pub fn compose<'a>(parts: impl IntoIterator<Item = (f64, &'a Self)>) -> Result<Self, ComposeError> {
        let mut composed = Self::default();
        let mut replaced = 0.0;
        for (weight, part) in parts {
            if !part.sparse.is_empty() {
                return Err(ComposeError::Sparse);
            }
            let plain = part.virtual_rows.iter().filter(|row| row.is_plain()).count();
            replaced += weight * (1.0 - plain as f64);
            composed.virtual_rows.extend(part.virtual_rows.iter().filter(|row| !row.is_plain()).cloned());
            composed.low_rank.extend(part.low_rank.iter().cloned());
        }
        if let Some(base) = composed.base_row(1.0 - replaced)? {
            composed.virtual_rows.insert(0, base);
        }
        Ok(composed)
    }

    /// `scale` times the base layer beside these vectors; none where nothing of it is left.
    fn base_row(&self, scale: f64) -> Result<Option<VirtualRow>, ComposeError> {
        if scale == 1.0 {
            return Ok(Some(VirtualRow::default()));
        }
        if scale == 0.0 && !self.virtual_rows.is_empty() {
            return Ok(None);
        }
        let rounded = scale as f32;
        if !rounded.is_finite() {
            return Err(ComposeError::NotFinite(scale));
        }
        let outputs = self.virtual_rows.iter().filter_map(|row| row.out_scale.as_ref());
        let mut inputs = self.virtual_rows.iter().filter_map(|row| row.in_scale.as_ref());
        let all = |vector: &Vec<f32>| Some(vec![rounded; vector.len()]);
        match (outputs.chain(self.low_rank.iter().map(|pair| &pair.expand)).next(), inputs.next()) {
            (Some(output), _) => Ok(Some(VirtualRow { in_scale: None, out_scale: all(output) })),
            (None, Some(input)) => Ok(Some(VirtualRow { in_scale: all(input), out_scale: None })),
            (None, None) => Err(ComposeError::NoVector),
        }
    }
}
