//! One adapter's tensors meet the compiled layer of their kind and become the vectors of one projection.

use std::collections::BTreeMap;

use flora_checkpoint::peft::description::BiasRule;
use flora_checkpoint::tensor::transpose;
use flora_checkpoint::{
    AdapterError, AdapterFolder, AdapterKinds, AdapterModule, BaseWeight, DecoderEnds, Model, Operand, Projection,
    Replaced, StoredTensor,
};
use flora_ir::algebra::{FoldError, FoldedAdapter, NormalForm, RankOne, VirtualRow};
use flora_ir::{Bindings, Dimension, EvaluateError, Shape, Value};
use flora_plan::pipeline::CompiledLayer;

use crate::adapted::{AdaptedEmbedding, AdaptedHead, AdaptedModel};
use crate::derive::{Derivation, DeriveError};
use crate::store::StoreError;
use crate::weights::{BaseError, BaseForm};

/// The layers of every kind of adapter, compiled: what adapters are folded by.
#[derive(Clone, Debug)]
pub struct Layers {
    /// x @ w0
    pub(crate) base: CompiledLayer,
    /// By name; each is described by one of `kinds`.
    pub(crate) compiled: BTreeMap<String, CompiledLayer>,
    pub(crate) kinds: AdapterKinds,
}

/// A base weight that somebody else holds.
pub struct HeldBase<'a> {
    /// Inputs.
    pub d: usize,
    /// Outputs.
    pub k: usize,
    /// Gives its numbers `[d, k]`, for a fold that reads them.
    pub weight: &'a dyn Fn() -> Vec<f32>,
    /// `[k]`
    pub bias: Option<&'a [f32]>,
}

/// Which adapter is folded for which projection.
pub(crate) struct FoldTarget<'a> {
    pub(crate) adapter: &'a str,
    pub(crate) path: &'a str,
    pub(crate) d: usize,
    pub(crate) k: usize,
    /// In a sum of adapters; 1 for one by itself.
    pub(crate) weight: f64,
}

/// A module of an adapter, folded for its base weight.
pub(crate) struct Prepared<'a> {
    pub(crate) layer: &'a CompiledLayer,
    /// The adapter's own tensors by the names of the layer's operands.
    pub(crate) operands: Bindings,
    pub(crate) folded: FoldedAdapter,
    /// What the adapter adds to every row, `[k]`.
    pub(crate) offset: Option<Vec<f32>>,
}

/// One end of a decoder as the weight `[d, k]` of a projection.
struct EndWeight<'a> {
    /// Of one-hot rows.
    is_embedding: bool,
    d: usize,
    k: usize,
    tensor: &'a StoredTensor,
}

impl<'a> EndWeight<'a> {
    /// The one that is at `path`, as an adapter has replaced it.
    fn of(path: &str, ends: &'a DecoderEnds, replaced: &Replaced<'a>) -> Option<Self> {
        let is_embedding = path == ends.embedding;
        let (own, base) = match is_embedding {
            true => (replaced.embedding, ends.tokens()),
            false if path == ends.head => (replaced.head, ends.output()),
            false => return None,
        };
        let tensor = own.unwrap_or(base.stored());
        let (vocabulary, width) = tensor.matrix_shape().ok()?;
        let (d, k) = if is_embedding { (vocabulary, width) } else { (width, vocabulary) };
        Some(Self { is_embedding, d, k, tensor })
    }

    fn value(&self, target: &FoldTarget<'_>) -> Result<Value, StoreError> {
        let values = self.tensor.to_finite_f32().map_err(|problem| StoreError::End {
            adapter: target.adapter.to_owned(),
            module: target.path.to_owned(),
            problem,
        })?;
        let values = if self.is_embedding { values } else { transpose(&values, self.k, self.d) };
        let values = values.into_iter().map(f64::from).collect();
        Value::matrix(self.d, self.k, values).map_err(|error| target.failed(error.into()))
    }
}

impl<'a> FoldTarget<'a> {
    pub(crate) fn new(adapter: &'a str, projection: &'a Projection, weight: f64) -> Self {
        let Projection { path, d, k, .. } = projection;
        Self { adapter, path, d: *d, k: *k, weight }
    }

    pub(crate) fn failed(&self, source: FoldError) -> StoreError {
        let (adapter, module) = (self.adapter.to_owned(), self.path.to_owned());
        StoreError::Fold { adapter, module, source: source.into() }
    }

    fn not_derived(&self, operand: String, source: DeriveError) -> StoreError {
        let (adapter, module) = (self.adapter.to_owned(), self.path.to_owned());
        StoreError::Derive { adapter, module, operand, source: Box::new(source) }
    }
}

impl Layers {
    /// The layer of base rows: x @ w0.
    pub fn base(&self) -> &CompiledLayer {
        &self.base
    }

    /// The layer called `name` that modules of some kind can be of.
    pub fn compiled(&self, name: &str) -> Option<&CompiledLayer> {
        self.compiled.get(name)
    }

    /// Whether folding `module` reads the base weight.
    pub fn read_base(&self, module: &AdapterModule) -> bool {
        self.compiled.get(&module.layer).is_some_and(|layer| layer.linear.reads_base_weight())
    }

    /// Checks that an adapter fits `model`, projections by themselves: modules, shapes, that what its config targets is there, and
    /// that none scales a bias.
    pub(crate) fn check_against(&self, adapter: &AdapterFolder, model: &Model) -> Result<(), StoreError> {
        adapter.check_against(model).map_err(|source| failed(adapter, source))?;
        for (path, module) in &adapter.modules {
            self.layer(&adapter.name, path, module)?;
            if self.scales_bias(module) && model.projection(path).is_ok_and(|projection| projection.has_bias) {
                return Err(self.scaled_bias(&adapter.name, path, module));
            }
        }
        Ok(())
    }

    /// The layer of `module`.
    fn layer(&self, adapter: &str, path: &str, module: &AdapterModule) -> Result<&CompiledLayer, StoreError> {
        self.compiled.get(&module.layer).ok_or_else(|| {
            let (adapter, module, layer) = (adapter.to_owned(), path.to_owned(), module.layer.clone());
            StoreError::UnknownLayer { adapter, module, layer }
        })
    }

    /// Whether `module` scales the base layer's bias along with its output.
    pub(crate) fn scales_bias(&self, module: &AdapterModule) -> bool {
        self.layer_scales_bias(&module.layer)
    }

    /// Whether modules of the layer called `name` scale the base layer's bias along with its output, as IA3's do, or do something
    /// else to it.
    pub fn layer_scales_bias(&self, name: &str) -> bool {
        let scales = || self.compiled.get(name).is_some_and(|layer| layer.linear.scales_base_output());
        self.kinds.layer(name).is_some_and(|layer| match layer.bias {
            Some(BiasRule::Scaled) => scales(),
            Some(BiasRule::Transformed) => true,
            Some(BiasRule::Unscaled) | None => false,
        })
    }

    /// The refusal of an adapter that would scale a bias.
    pub(crate) fn scaled_bias(&self, adapter: &str, path: &str, module: &AdapterModule) -> StoreError {
        let kind = self.kinds.layer(&module.layer).map_or(module.layer.as_str(), |layer| layer.kind());
        StoreError::ScaledBias { adapter: adapter.to_owned(), kind: kind.to_owned(), module: path.to_owned() }
    }

    /// An adapter folded for all of a model that it adapts. Base weights are read only where a fold needs them.
    ///
    /// # Errors
    /// It doesn't fit `model`, or a module doesn't fold.
    pub fn prepare(&self, adapter: &AdapterFolder, model: &Model) -> Result<AdaptedModel, StoreError> {
        self.prepare_over(adapter, model, BaseForm::default())
    }

    /// The same over base weights in another form than the file's.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_over(
        &self,
        adapter: &AdapterFolder,
        model: &Model,
        form: BaseForm,
    ) -> Result<AdaptedModel, StoreError> {
        self.prepare_weighted(adapter, 1.0, model, form)
    }

    /// A part of a sum of adapters: what it changes is `weight` times as much, as
    /// [`NormalForm::fold_weighted`] has it.
    pub(crate) fn prepare_weighted(
        &self,
        adapter: &AdapterFolder,
        weight: f64,
        model: &Model,
        form: BaseForm,
    ) -> Result<AdaptedModel, StoreError> {
        let replaced = adapter.replaced_of(model).map_err(|source| failed(adapter, source))?;
        let ends = DecoderEnds::of(model);
        let weighted = |offset: &Vec<f32>| offset.iter().map(|offset| (weight * f64::from(*offset)) as f32).collect();
        let bias_offsets = replaced.bias_offsets.iter().map(|(path, offset)| (path.clone(), weighted(offset)));
        let mut adapted = AdaptedModel { bias_offsets: bias_offsets.collect(), ..AdaptedModel::default() };
        let mut embedding = None;
        for (path, module) in &adapter.modules {
            let end = ends.as_ref().and_then(|ends| EndWeight::of(path, ends, &replaced));
            if let Some(end) = end {
                let target = FoldTarget { adapter: &adapter.name, path, d: end.d, k: end.k, weight };
                let Prepared { folded, offset, .. } = self.fold(&target, adapter, module, || end.value(&target))?;
                // Nothing adds one at either end of a decoder.
                if offset.is_some() {
                    return Err(self.own_bias(&target, module));
                }
                // It would need the rows of other tokens.
                if end.is_embedding && folded.sparse.inputs.is_some() {
                    return Err(self.mixed_tokens(&target, module));
                }
                match end.is_embedding {
                    true => embedding = Some(folded),
                    false => {
                        adapted.modules.insert(path.clone(), folded);
                    }
                }
                continue;
            }
            let failed = |source: BaseError| StoreError::Base { adapter: adapter.name.clone(), source: source.into() };
            let projection = model.projection(path).map_err(|error| failed(error.into()))?;
            let target = FoldTarget::new(&adapter.name, projection, weight);
            let base = || {
                let weight = form.weight(model, path).map_err(failed)?;
                base_value(&weight).map_err(|error| target.failed(error.into()))
            };
            let bias = || model.bias(path).map_err(|error| failed(error.into()));
            let (folded, offset) = self.adapt_target(&target, adapter, module, base, bias)?;
            offset.into_iter().for_each(|offset| add(adapted.bias_offsets.entry(path.clone()).or_default(), offset));
            adapted.modules.insert(path.clone(), folded);
        }
        if let Some(ends) = ends {
            // Factors that are tied together: those of the embedding, transposed.
            if let Some(folded) = embedding.as_ref().filter(|_| adapter.keeps_ties() && ends.tied) {
                let transposed = transposed(folded).ok_or_else(|| StoreError::TiedFactors {
                    adapter: adapter.name.clone(),
                    module: ends.embedding.clone(),
                })?;
                adapted.modules.entry(ends.head.to_owned()).or_insert(transposed);
            }
            let table = replaced.embedding.cloned();
            let rows = replaced.embedding_rows.cloned();
            if embedding.is_some() || table.is_some() || rows.is_some() {
                adapted.embedding = Some(AdaptedEmbedding { path: ends.embedding, table, rows, folded: embedding });
            }
            let (weight, rows) = (replaced.head.cloned(), replaced.head_rows.cloned());
            if weight.is_some() || rows.is_some() {
                adapted.head = Some(AdaptedHead { path: ends.head.to_owned(), weight, rows });
            }
        }
        Ok(adapted)
    }

    /// A module of an adapter, folded for a base weight that somebody else holds, and what is added to its rows' outputs, `[k]`.
    ///
    /// # Errors
    /// A module that doesn't fold, or would do to a bias what isn't supported.
    pub fn adapt(
        &self,
        adapter: &AdapterFolder,
        path: &str,
        module: &AdapterModule,
        base: HeldBase<'_>,
    ) -> Result<(FoldedAdapter, Option<Vec<f32>>), StoreError> {
        let HeldBase { d, k, weight, bias } = base;
        let target = FoldTarget { adapter: &adapter.name, path, d, k, weight: 1.0 };
        let weight = || {
            let values = weight().into_iter().map(f64::from).collect();
            Value::matrix(d, k, values).map_err(|error| target.failed(error.into()))
        };
        self.adapt_target(&target, adapter, module, weight, || Ok(bias.map(<[f32]>::to_vec)))
    }

    fn adapt_target(
        &self,
        target: &FoldTarget<'_>,
        adapter: &AdapterFolder,
        module: &AdapterModule,
        base: impl FnOnce() -> Result<Value, StoreError>,
        bias: impl FnOnce() -> Result<Option<Vec<f32>>, StoreError>,
    ) -> Result<(FoldedAdapter, Option<Vec<f32>>), StoreError> {
        let Prepared { folded, mut offset, .. } = self.fold(target, adapter, module, base)?;
        if self.scales_bias(module)
            && let Some(bias) = bias()?
        {
            let scaled = self.scaled_offset(target, module, &folded, &bias)?;
            add(offset.get_or_insert_default(), scaled);
        }
        Ok((folded, offset))
    }

    /// What scaling the base layer's bias adds: (scale − 1) ∘ bias, of a part of a sum with its weight.
    fn scaled_offset(
        &self,
        target: &FoldTarget<'_>,
        module: &AdapterModule,
        folded: &FoldedAdapter,
        bias: &[f32],
    ) -> Result<Vec<f32>, StoreError> {
        match &folded.virtual_rows[..] {
            [VirtualRow { in_scale: None, out_scale: Some(scale) }] => {
                let offset =
                    |(scale, bias): (&f32, &f32)| ((f64::from(*scale) - target.weight) * f64::from(*bias)) as f32;
                Ok(scale.iter().zip(bias).map(offset).collect())
            }
            // Which of several scales is the bias's, no description says.
            _ => Err(self.scaled_bias(target.adapter, target.path, module)),
        }
    }

    /// The refusal of an adapter's own bias where there is no place for one.
    pub(crate) fn own_bias(&self, target: &FoldTarget<'_>, module: &AdapterModule) -> StoreError {
        let kind = self.kinds.layer(&module.layer).map_or(module.layer.as_str(), |layer| layer.kind());
        let (adapter, module) = (target.adapter.to_owned(), target.path.to_owned());
        StoreError::OwnBias { adapter, kind: kind.to_owned(), module }
    }

    /// The refusal of an adapter that makes a token's embedding of other tokens' as well.
    fn mixed_tokens(&self, target: &FoldTarget<'_>, module: &AdapterModule) -> StoreError {
        let kind = self.kinds.layer(&module.layer).map_or(module.layer.as_str(), |layer| layer.kind());
        let (adapter, module) = (target.adapter.to_owned(), target.path.to_owned());
        StoreError::MixedTokens { adapter, kind: kind.to_owned(), module }
    }

    /// Folds one module; `base` is asked for the base weight where the fold reads it.
    pub(crate) fn fold(
        &self,
        target: &FoldTarget<'_>,
        adapter: &AdapterFolder,
        module: &AdapterModule,
        base: impl FnOnce() -> Result<Value, StoreError>,
    ) -> Result<Prepared<'_>, StoreError> {
        let layer = self.layer(target.adapter, target.path, module)?;
        let failed = |source| target.failed(source);
        let base = self.read_base(module).then(base).transpose()?;
        let described = self.kinds.layer(&module.layer).filter(|described| !described.derived.is_empty());
        let operands = match described {
            None => bindings(&module.operands).map_err(|error| failed(error.into()))?,
            Some(described) => {
                let derivation = Derivation { described, adapter, module, d: target.d, k: target.k };
                let operands = derivation.operands(layer.written.layer());
                operands.map_err(|(operand, source)| target.not_derived(operand, source))?
            }
        };
        let mut all = operands.clone();
        all.insert_extent(output_dimension(&layer.linear), target.k);
        if let Some(base) = base {
            all.insert(base_weight_name(&layer.linear), base);
        }
        let (folded, offset) = layer.linear.fold_weighted(&all, target.weight).map_err(failed)?;
        folded.check(target.d, target.k).map_err(failed)?;
        if let Some(offset) = offset.as_ref().filter(|offset| offset.len() != target.k) {
            let (found, expected) = (vec![offset.len()], vec![target.k]);
            return Err(failed(FoldError::WrongShape { what: "the adapter's bias", found, expected }));
        }
        Ok(Prepared { layer, operands, folded, offset })
    }
}

fn failed(adapter: &AdapterFolder, source: AdapterError) -> StoreError {
    StoreError::Adapter { name: adapter.name.clone(), source: source.into() }
}

fn add(sum: &mut Vec<f32>, offset: Vec<f32>) {
    sum.resize(offset.len(), 0.0);
    sum.iter_mut().zip(offset).for_each(|(sum, offset)| *sum += offset);
}

/// The adapter of the transposed weight; `None` where it is more than a low-rank sum.
fn transposed(folded: &FoldedAdapter) -> Option<FoldedAdapter> {
    let is_plain = folded.sparse.is_empty()
        && folded.virtual_rows.iter().all(|row| row.in_scale.is_none() && row.out_scale.is_none());
    is_plain.then(|| FoldedAdapter {
        virtual_rows: folded.virtual_rows.clone(),
        low_rank: folded
            .low_rank
            .iter()
            .map(|pair| RankOne { shrink: pair.expand.clone(), expand: pair.shrink.clone() })
            .collect(),
        ..FoldedAdapter::default()
    })
}

/// The weight as the algebra takes it, in f64.
pub(crate) fn base_value(base: &BaseWeight) -> Result<Value, EvaluateError> {
    Value::matrix(base.d, base.k, base.values.iter().map(|value| f64::from(*value)).collect())
}

/// An adapter's operands as what [`NormalForm::fold`] takes.
///
/// # Errors
/// An operand whose values are not as many as its extents say.
pub fn bindings(operands: &BTreeMap<String, Operand>) -> Result<Bindings, EvaluateError> {
    let mut bindings = Bindings::new();
    for (name, operand) in operands {
        let mut values = operand.values.iter().map(|value| f64::from(*value));
        let value = match operand.shape[..] {
            [] => Value::scalar(values.next().unwrap_or(f64::NAN)),
            [rows, columns] => Value::matrix(rows, columns, values.collect())?,
            _ => Value::vector(values.collect()),
        };
        bindings.insert(name.clone(), value);
    }
    Ok(bindings)
}

/// K
fn output_dimension(linear: &NormalForm) -> Dimension {
    match &linear.layer.layer().operands[linear.base_weight].ty.shape {
        Shape::Matrix(_, k) => k.clone(),
        _ => Dimension::Fixed(0),
    }
}

fn base_weight_name(linear: &NormalForm) -> String {
    linear.layer.layer().operands[linear.base_weight].name.clone()
}
