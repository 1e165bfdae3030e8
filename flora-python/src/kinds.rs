//! The kinds of adapters that this library knows, and one module of an adapter as a layer takes it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;

use flora_adapters::layers::HeldBase;
use flora_adapters::{Layers, RegisterError};
use flora_checkpoint::peft::description::{Extent, LayerDescription};
use flora_checkpoint::{AdapterFolder, AdapterModule, Operand};
use flora_ir::Role;
use flora_ir::algebra::FoldedAdapter;

use crate::error::{Error, shortened};

/// The compiled layers of every built-in kind.
pub(crate) fn layers() -> Result<&'static Layers, Error> {
    static LAYERS: OnceLock<Result<Layers, RegisterError>> = OnceLock::new();
    match LAYERS.get_or_init(Layers::builtin) {
        Ok(layers) => Ok(layers),
        Err(error) => Err(Error::Training(format!("{error}; this is a defect of flora"))),
    }
}

/// The names of the layers that [`of_operands`] takes: those whose operands are all tensors of an adapter.
pub(crate) fn names() -> Result<Vec<&'static str>, Error> {
    let layers = layers()?;
    let described = layers.kinds().descriptions().flat_map(|kind| &kind.layers);
    let plain = described.filter(|layer| layer.derived.is_empty() && layers.compiled(&layer.name).is_some());
    Ok(plain.map(|layer| layer.name.as_str()).collect())
}

/// The operands of the layer called `name` that an adapter brings along, in the order of its equation.
pub(crate) fn operands_of(name: &str) -> Result<Vec<&'static str>, Error> {
    let layer = layers()?.compiled(name).filter(|_| names().is_ok_and(|names| names.contains(&name)));
    let layer = layer.ok_or_else(|| unknown(name))?;
    let own = layer.written.layer().operands.iter().filter(|(_, operand)| operand.role == Role::Adapter);
    Ok(own.map(|(_, operand)| operand.name.as_str()).collect())
}

pub(crate) fn unknown(name: &str) -> Error {
    let known = names().map_or_else(|_| String::new(), |names| shortened(names.into_iter()));
    Error::UnknownKind { name: name.to_owned(), known }
}

/// An adapter of one module that isn't in a file, and the path that it has.
pub(crate) fn of_operands(layer: &str, operands: BTreeMap<String, Operand>) -> Result<(AdapterFolder, String), Error> {
    let expected = operands_of(layer)?;
    if let Some(name) = expected.iter().find(|name| !operands.contains_key(**name)) {
        return Err(Error::shape(
            format!("an adapter of the layer `{layer}`"),
            format!("has no operand `{name}`; it takes {}", expected.join(", ")),
        ));
    }
    if let Some(name) = operands.keys().find(|name| !expected.contains(&name.as_str())) {
        return Err(Error::shape(
            format!("an adapter of the layer `{layer}`"),
            format!("has no operand `{name}`; it takes {}", expected.join(", ")),
        ));
    }
    if let Some((name, _)) = operands.iter().find(|(_, operand)| operand.shape.contains(&0)) {
        return Err(Error::shape(format!("the operand `{name}`"), "has no numbers"));
    }
    let kind = layers()?.kinds().kind_of_layer(layer).ok_or_else(|| unknown(layer))?;
    let rank = operands.get("b").and_then(|b| b.shape.get(1)).copied().unwrap_or(0);
    let path = "this layer".to_owned();
    let module = AdapterModule { layer: layer.to_owned(), rank, operands };
    Ok((AdapterFolder::new("of a slot", kind, BTreeMap::from([(path.clone(), module)])), path))
}

/// Which part of a module's weight a layer holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shard {
    /// Of its inputs; `None`: all.
    pub(crate) inputs: Option<Range<usize>>,
    /// Of its outputs; `None`: all.
    pub(crate) outputs: Option<Range<usize>>,
}

/// A module's adapter folded for the layer that holds a shard of its base weight, and what is added to its rows' outputs.
pub(crate) fn fold(
    adapter: &AdapterFolder,
    path: &str,
    shard: &Shard,
    base: HeldBase<'_>,
) -> Result<(FoldedAdapter, Option<Vec<f32>>), Error> {
    let layers = layers()?;
    let module = adapter.modules.get(path).ok_or_else(|| Error::UnknownModule {
        adapter: adapter.name.clone(),
        module: path.to_owned(),
        known: shortened(adapter.modules.keys().map(String::as_str)),
    })?;
    if shard.inputs.is_none() && shard.outputs.is_none() {
        return Ok(layers.adapt(adapter, path, module, base)?);
    }
    let described = layers.kinds().layer(&module.layer).ok_or_else(|| unknown(&module.layer))?;
    let refused = |why: &str| {
        Err(Error::Shard(format!("the adapter `{}` of `{path}` is a {}, {why}", adapter.name, module.layer)))
    };
    if !described.derived.is_empty() {
        return refused("whose operands are made of the whole layer's; it can't be cut, so don't shard this layer");
    }
    if shard.inputs.is_some() && layers.read_base(module) {
        return refused("which reads whole columns of the base weight; it can't be cut along its inputs");
    }
    let (d, k) = (base.d, base.k);
    let cut = cut(module, described, shard, (d, k), path)?;
    // What isn't the first shard of the inputs has no part in what is added once to a row.
    let is_first = shard.inputs.as_ref().is_none_or(|inputs| inputs.start == 0);
    let (folded, offset) = layers.adapt(adapter, path, &cut, base)?;
    Ok((folded, offset.filter(|_| is_first)))
}

/// The module with those of its operands' rows and columns that a shard has.
fn cut(
    module: &AdapterModule,
    described: &LayerDescription,
    shard: &Shard,
    (d, k): (usize, usize),
    path: &str,
) -> Result<AdapterModule, Error> {
    let mut cut = module.clone();
    for (extent, range, expected) in [(Extent::Inputs, &shard.inputs, d), (Extent::Outputs, &shard.outputs, k)] {
        let Some(range) = range else { continue };
        let what = if extent == Extent::Inputs { "inputs" } else { "outputs" };
        if range.len() != expected {
            let problem =
                format!("has {expected} {what}, and the shard {}..{} has {}", range.start, range.end, range.len());
            return Err(Error::shape("the layer", problem));
        }
        for tensor in &described.tensors {
            let axis = tensor.shape().iter().position(|own| *own == extent);
            let operand = cut.operands.get_mut(&tensor.operand);
            if let (Some(axis), Some(operand)) = (axis, operand) {
                *operand = slice(operand, axis, range.clone()).ok_or_else(|| {
                    let problem =
                        format!("has {:?} numbers of which {}..{} are no part", operand.shape, range.start, range.end);
                    Error::shape(format!("`{}` of `{path}`", tensor.operand), problem)
                })?;
            }
        }
    }
    Ok(cut)
}

/// Some rows or columns of an operand; `None` where it doesn't have them.
fn slice(operand: &Operand, axis: usize, range: Range<usize>) -> Option<Operand> {
    let extent = *operand.shape.get(axis)?;
    if range.start > range.end || range.end > extent {
        return None;
    }
    let inner: usize = operand.shape[axis + 1..].iter().product();
    let block = (extent * inner).max(1);
    let kept = range.start * inner..range.end * inner;
    let values = operand.values.chunks_exact(block).flat_map(|block| &block[kept.clone()]).copied().collect();
    let mut shape = operand.shape.clone();
    shape[axis] = range.len();
    Some(Operand { shape, values })
}
