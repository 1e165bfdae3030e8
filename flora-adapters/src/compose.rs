//! Several adapters at once, each with a weight, as one: what they change of each projection is added up when it is loaded, so that
//! a row costs what an adapter of all their ranks costs. Where they are weighed for each token instead, it is known of each rank whose it
//! is.

use std::collections::BTreeMap;

use flora_checkpoint::{AdapterFolder, AdapterMixture, DecoderEnds, Model};
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
        let prepared = |(weight, folder): &(f64, &AdapterFolder)| {
            let part = self.prepare_weighted(folder, *weight, model, form)?;
            check(folder, &part)?;
            Ok((*weight, part))
        };
        summed(&parts.iter().map(prepared).collect::<Result<Vec<_>, StoreError>>()?)
    }

    /// The parts of a mixture side by side, over base weights in `form`.
    ///
    /// # Errors
    /// A part that doesn't fit `model`, or changes anything but the projections of its blocks.
    pub fn mix(&self, mixture: &AdapterMixture, model: &Model, form: BaseForm) -> Result<MixedAdapters, StoreError> {
        let head = DecoderEnds::of(model).map(|ends| ends.head);
        let mut parts = Vec::with_capacity(mixture.parts.len());
        let mut ranks: BTreeMap<String, Vec<u32>> = BTreeMap::new();
        for (at, folder) in (0..).zip(&mixture.parts) {
            let part = self.prepare_weighted(folder, mixture.weight, model, form)?;
            let adapts_head = part.modules.keys().any(|path| Some(path.as_str()) == head);
            let others = [
                (part.embedding.is_some(), "the token embedding"),
                (part.head.is_some() || adapts_head, "the output matrix"),
                (!part.bias_offsets.is_empty(), "biases"),
            ];
            if let Some((_, what)) = others.into_iter().find(|(is_so, _)| *is_so) {
                return Err(StoreError::Mixed { adapter: folder.name.clone(), what });
            }
            for (path, folded) in &part.modules {
                ranks.entry(path.clone()).or_default().extend(folded.low_rank.iter().map(|_| at));
            }
            parts.push((mixture.weight, part));
        }
        Ok(MixedAdapters { adapted: summed(&parts)?, ranks })
    }
}

/// The parts of a mixture, of which gates choose row by row.
#[derive(Clone, Debug)]
pub struct MixedAdapters {
    /// All of them at once.
    pub adapted: AdaptedModel,
    /// By module path, of each rank the part that it is of.
    pub ranks: BTreeMap<String, Vec<u32>>,
}

/// The sum of what parts change, folded with their weights.
fn summed(adapted: &[(f64, AdaptedModel)]) -> Result<AdaptedModel, StoreError> {
    let mut modules: BTreeMap<&String, Vec<Part<'_>>> = BTreeMap::new();
    let mut offsets: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let mut embeddings: Vec<Part<'_>> = Vec::new();
    let mut embedding_path = None;
    for (weight, part) in adapted {
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
