//! One adapter's tensors meet the compiled layer of their kind and become the vectors of one projection.

use std::collections::BTreeMap;

use flora_checkpoint::peft::description::BiasRule;
use flora_checkpoint::{
    AdapterError, AdapterFolder, AdapterKinds, AdapterModule, BaseWeight, Model, Operand, Projection,
};
use flora_ir::algebra::{FoldError, FoldedAdapter, NormalForm};
use flora_ir::{Bindings, EvaluateError, Value};
use flora_plan::pipeline::CompiledLayer;

use crate::store::{LoadedAdapter, StoreError};

/// The layers of every kind of adapter, compiled: what adapters are folded by.
#[derive(Clone, Debug)]
pub struct Layers {
    /// x @ w0
    pub(crate) base: CompiledLayer,
    /// By name; each is described by one of `kinds`.
    pub(crate) compiled: BTreeMap<String, CompiledLayer>,
    pub(crate) kinds: AdapterKinds,
}

/// Which adapter is folded for which projection.
pub(crate) struct FoldTarget<'a> {
    pub(crate) adapter: &'a str,
    pub(crate) path: &'a str,
    pub(crate) d: usize,
    pub(crate) k: usize,
    pub(crate) has_bias: bool,
}

impl<'a> FoldTarget<'a> {
    pub(crate) fn new(adapter: &'a str, projection: &'a Projection) -> Self {
        let Projection { path, d, k, has_bias, .. } = projection;
        Self { adapter, path, d: *d, k: *k, has_bias: *has_bias }
    }

    pub(crate) fn failed(&self, source: FoldError) -> StoreError {
        let (adapter, module) = (self.adapter.to_owned(), self.path.to_owned());
        StoreError::Fold { adapter, module, source: source.into() }
    }
}

impl Layers {
    /// The layer of base rows: x @ w0.
    pub fn base(&self) -> &CompiledLayer {
        &self.base
    }

    /// Whether folding `module` reads the base weight.
    pub(crate) fn read_base(&self, module: &AdapterModule) -> bool {
        self.compiled.get(&module.layer).is_some_and(|layer| layer.linear.reads_base_weight())
    }

    /// Checks that an adapter fits `model`: modules, shapes, and that what its config targets is there.
    pub(crate) fn check_against(&self, adapter: &AdapterFolder, model: &Model) -> Result<(), StoreError> {
        let failed = |source: AdapterError| StoreError::Adapter { name: adapter.name.clone(), source: source.into() };
        adapter.check_against(model).map_err(failed)?;
        for (path, module) in &adapter.modules {
            let projection = model.projection(path).map_err(|error| failed(error.into()))?;
            self.layer(&FoldTarget::new(&adapter.name, projection), module)?;
        }
        Ok(())
    }

    /// The layer of `module`, unless it would scale a bias.
    fn layer(&self, target: &FoldTarget<'_>, module: &AdapterModule) -> Result<&CompiledLayer, StoreError> {
        let (adapter, path) = (target.adapter.to_owned(), target.path.to_owned());
        let described = self.kinds.layer(&module.layer);
        let Some((layer, described)) = self.compiled.get(&module.layer).zip(described) else {
            return Err(StoreError::UnknownLayer { adapter, module: path, layer: module.layer.clone() });
        };
        // A bias is one vector for all rows of a batch.
        let scales_bias = layer.linear.scales_base_output() && described.bias == Some(BiasRule::Scaled);
        if scales_bias && target.has_bias {
            return Err(StoreError::ScaledBias { adapter, kind: described.kind().to_owned(), module: path });
        }
        Ok(layer)
    }

    /// An adapter folded for every projection that it adapts, by module path. Base weights are read only where a fold needs them.
    ///
    /// # Errors
    /// It doesn't fit `model`, or a module doesn't fold.
    pub fn prepare(
        &self,
        adapter: &AdapterFolder,
        model: &Model,
    ) -> Result<BTreeMap<String, FoldedAdapter>, StoreError> {
        self.check_against(adapter, model)?;
        let modules = adapter.modules.iter().map(|(path, module)| {
            let failed = |source| StoreError::Base { adapter: adapter.name.clone(), source: Box::new(source) };
            let projection = model.projection(path).map_err(failed)?;
            let target = FoldTarget::new(&adapter.name, projection);
            let base = || base_value(&model.weight(path).map_err(failed)?).map_err(|error| target.failed(error.into()));
            Ok((path.clone(), self.fold(&target, module, base)?.folded))
        });
        modules.collect()
    }

    /// Folds one module; `base` is asked for the base weight where the fold reads it.
    pub(crate) fn fold(
        &self,
        target: &FoldTarget<'_>,
        module: &AdapterModule,
        base: impl FnOnce() -> Result<Value, StoreError>,
    ) -> Result<LoadedAdapter<'_>, StoreError> {
        let layer = self.layer(target, module)?;
        let failed = |source| target.failed(source);
        let operands = bindings(&module.operands).map_err(|error| failed(error.into()))?;
        let folded = if layer.linear.reads_base_weight() {
            let mut all = operands.clone();
            all.insert(base_weight_name(&layer.linear), base()?);
            layer.linear.fold(&all)
        } else {
            layer.linear.fold(&operands)
        };
        let folded = folded.map_err(failed)?;
        folded.check(target.d, target.k).map_err(failed)?;
        Ok(LoadedAdapter { layer, operands, folded })
    }
}

/// The weight as the algebra takes it, in f64.
pub(crate) fn base_value(base: &BaseWeight) -> Result<Value, EvaluateError> {
    Value::matrix(base.d, base.k, base.values.iter().map(|value| f64::from(*value)).collect())
}

/// The operands as values of the IR.
fn bindings(operands: &BTreeMap<String, Operand>) -> Result<Bindings, EvaluateError> {
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

fn base_weight_name(linear: &NormalForm) -> String {
    linear.layer.layer().operands[linear.base_weight].name.clone()
}
