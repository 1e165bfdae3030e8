//! Several adapters at once, each with a weight, as one: what they change of each projection is added up when it is loaded, so that
//! a row costs what an adapter of all their ranks costs.

use std::collections::BTreeMap;

use flora_checkpoint::{AdapterFolder, Model};
use flora_ir::algebra::{ComposeError, FoldedAdapter};

use crate::adapted::{AdaptedEmbedding, AdaptedModel};
use crate::layers::Layers;
use crate::store::StoreError;
use crate::weights::BaseForm;

/// A part of a sum for one module, with its weight.
type Part<'a> = (f64, &'a FoldedAdapter);

impl Layers {
    /// The sum of what `parts` change of `model`, each with its weight, over base weights in `form`. Of LoRA it is what PEFT's
    /// `add_weighted_adapter` gives with `combination_type="cat"`.
    ///
    /// # Errors
    /// A part that doesn't fit `model`, multiplies rows by sparse matrices, or replaces rows of the embedding or the output matrix.
    pub fn compose(
        &self,
        parts: &[(f64, &AdapterFolder)],
        model: &Model,
        form: BaseForm,
    ) -> Result<AdaptedModel, StoreError> {
        let mut adapted = Vec::with_capacity(parts.len());
        for (weight, folder) in parts {
            let part = self.prepare_weighted(folder, *weight, model, form)?;
            check(folder, &part)?;
            adapted.push((*weight, part));
        }
        let mut modules: BTreeMap<&String, Vec<Part<'_>>> = BTreeMap::new();
        let mut offsets: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        let mut embeddings: Vec<Part<'_>> = Vec::new();
        let mut embedding_path = None;
        for (weight, part) in &adapted {
            for (path, folded) in &part.modules {
                modules.entry(path).or_default().push((*weight, folded));
            }
            for (path, offset) in &part.bias_offsets {
                let sum = offsets.entry(path.clone()).or_default();
                sum.resize(offset.len(), 0.0);
                sum.iter_mut().zip(offset).for_each(|(sum, offset)| *sum += f64::from(*offset));
            }
            if let Some(AdaptedEmbedding { path, folded: Some(folded), .. }) = &part.embedding {
                embeddings.push((*weight, folded));
                embedding_path = Some(path);
            }
        }
        let sum = |path: &str, parts: &[Part<'_>]| {
            let failed = |source| StoreError::Sum { module: path.to_owned(), source };
            FoldedAdapter::compose(parts.iter().copied()).map_err(failed)
        };
        let embedding = match embedding_path {
            None => None,
            Some(path) => {
                let folded = Some(sum(path, &embeddings)?);
                Some(AdaptedEmbedding { path: path.clone(), table: None, rows: None, folded })
            }
        };
        let modules = modules.into_iter().map(|(path, parts)| Ok((path.clone(), sum(path, &parts)?)));
        let rounded = |offset: Vec<f64>| offset.into_iter().map(|offset| offset as f32).collect();
        Ok(AdaptedModel {
            modules: modules.collect::<Result<_, StoreError>>()?,
            bias_offsets: offsets.into_iter().map(|(path, offset)| (path, rounded(offset))).collect(),
            embedding,
            head: None,
        })
    }
}

/// Whether an adapter is changes of projections alone, that can be weighted.
fn check(folder: &AdapterFolder, part: &AdaptedModel) -> Result<(), StoreError> {
    let replaces = |what| Err(StoreError::Replaces { adapter: folder.name.clone(), what });
    if part.head.is_some() {
        return replaces("output matrix, or rows of it");
    }
    if part.embedding.as_ref().is_some_and(|embedding| embedding.table.is_some() || embedding.rows.is_some()) {
        return replaces("token embedding, or rows of it");
    }
    let folded = part.embedding.iter().filter_map(|embedding| Some((&embedding.path, embedding.folded.as_ref()?)));
    match part.modules.iter().chain(folded).find(|(_, folded)| !folded.sparse.is_empty()) {
        None => Ok(()),
        Some((module, _)) => Err(StoreError::Compose {
            adapter: folder.name.clone(),
            kind: folder.kind.name().to_owned(),
            module: module.clone(),
            source: ComposeError::Sparse,
        }),
    }
}
