//! One adapter's tensors meet the compiled layer of their kind and become the vectors of one projection.

use std::collections::BTreeMap;

use flora_checkpoint::{AdapterError, AdapterFolder, AdapterModule, BaseWeight, Model, Operand};
use flora_codegen::pipeline::{CompiledLayer, compile_verified};
use flora_ir::algebra::{FoldError, FoldedAdapter, NormalForm};
use flora_ir::{Bindings, EvaluateError, Value, builtin};

use super::{LoadedAdapter, StoreError};

/// The built-in layers, compiled: what adapters of every kind are folded by.
#[derive(Clone, Debug)]
pub struct Layers(BTreeMap<&'static str, CompiledLayer>);

/// Which adapter is folded for which projection.
pub(super) struct FoldTarget<'a> {
    pub(super) adapter: &'a str,
    pub(super) path: &'a str,
    pub(super) d: usize,
    pub(super) k: usize,
    pub(super) has_bias: bool,
}

impl FoldTarget<'_> {
    pub(super) fn failed(&self, source: FoldError) -> StoreError {
        let (adapter, module) = (self.adapter.to_owned(), self.path.to_owned());
        StoreError::Fold { adapter, module, source: source.into() }
    }
}

impl Layers {
    /// Compiles them.
    ///
    /// # Errors
    /// A built-in equation has no normal form.
    pub fn compile() -> Result<Self, StoreError> {
        let mut layers = BTreeMap::new();
        for name in builtin::names() {
            let Some(written) = builtin::builtin(name) else { continue };
            let failed = |source| StoreError::Layer { layer: name.to_owned(), source };
            layers.insert(name, compile_verified(written.clone()).map_err(failed)?);
        }
        Ok(Self(layers))
    }

    /// The layer of base rows: x @ w0.
    pub(super) fn base(&self) -> Option<&CompiledLayer> {
        self.0.get("linear")
    }

    /// Whether folding `module` reads the base weight.
    pub(super) fn read_base(&self, module: &AdapterModule) -> bool {
        self.0.get(module.layer).is_some_and(|layer| layer.linear.reads_base_weight())
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
        check_against(adapter, model)?;
        let modules = adapter.modules.iter().map(|(path, module)| {
            let failed = |source| StoreError::Base { adapter: adapter.name.clone(), source: Box::new(source) };
            let projection = model.projection(path).map_err(failed)?;
            let (d, k, has_bias) = (projection.d, projection.k, projection.has_bias);
            let target = FoldTarget { adapter: &adapter.name, path, d, k, has_bias };
            let base = || base_value(&model.weight(path).map_err(failed)?).map_err(|error| target.failed(error.into()));
            Ok((path.clone(), self.fold(&target, module, base)?.folded))
        });
        modules.collect()
    }

    /// Folds one module; `base` is asked for the base weight where the fold reads it.
    pub(super) fn fold(
        &self,
        target: &FoldTarget<'_>,
        module: &AdapterModule,
        base: impl FnOnce() -> Result<Value, StoreError>,
    ) -> Result<LoadedAdapter<'_>, StoreError> {
        refuse_scaled_bias(target.adapter, target.path, module, target.has_bias)?;
        let Some(layer) = self.0.get(module.layer) else {
            let (adapter, module, layer) = (target.adapter.to_owned(), target.path.to_owned(), module.layer);
            return Err(StoreError::UnknownLayer { adapter, module, layer });
        };
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

/// Checks that an adapter fits `model`: modules, shapes, and that what its config targets is there.
pub(super) fn check_against(adapter: &AdapterFolder, model: &Model) -> Result<(), StoreError> {
    let failed = |source: AdapterError| StoreError::Adapter { name: adapter.name.clone(), source: source.into() };
    adapter.check_against(model).map_err(failed)?;
    for (path, module) in &adapter.modules {
        let has_bias = model.projection(path).map_err(|error| failed(error.into()))?.has_bias;
        refuse_scaled_bias(&adapter.name, path, module, has_bias)?;
    }
    Ok(())
}

/// The weight as the algebra takes it, in f64.
pub(super) fn base_value(base: &BaseWeight) -> Result<Value, EvaluateError> {
    Value::matrix(base.d, base.k, base.values.iter().map(|value| f64::from(*value)).collect())
}

fn refuse_scaled_bias(adapter: &str, path: &str, module: &AdapterModule, has_bias: bool) -> Result<(), StoreError> {
    match module.layer {
        "ia3" if has_bias => Err(StoreError::ScaledBias { adapter: adapter.to_owned(), module: path.to_owned() }),
        _ => Ok(()),
    }
}

/// The operands as values of the IR.
fn bindings(operands: &BTreeMap<&'static str, Operand>) -> Result<Bindings, EvaluateError> {
    let mut bindings = Bindings::new();
    for (name, operand) in operands {
        let mut values = operand.values.iter().map(|value| f64::from(*value));
        let value = match operand.shape[..] {
            [] => Value::scalar(values.next().unwrap_or(f64::NAN)),
            [rows, columns] => Value::matrix(rows, columns, values.collect())?,
            _ => Value::vector(values.collect()),
        };
        bindings.insert(*name, value);
    }
    Ok(bindings)
}

fn base_weight_name(linear: &NormalForm) -> String {
    linear.layer.layer().operands[linear.base_weight].name.clone()
}
