//! Adapters that somebody else trains: their operands come with every call, and their gradients go back. Nothing is written for a
//! kind: operands are folded as its equation says, and gradients of the folded vectors come back through its [`Unfolding`].

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use flora_host::{GradientsMut, Rows, RowsMut, Values, ValuesMut, operands};
use flora_ir::algebra::{FoldedAdapter, NormalForm};
use flora_ir::gradient::Unfolding;
use flora_ir::{Bindings, Value};
use flora_runtime::BackwardPass;

use crate::error::Error;
use crate::kinds::{layers, operands_of, unknown};
use crate::linear::{Linear, Part, machine, place};
use crate::memory::Tensor;
use crate::step::RowSlots;
use crate::threads;

/// An adapter of one layer: the layer of its kind, and its operands in the order of the equation.
#[derive(Clone, Debug)]
pub(crate) struct TrainedAdapter {
    pub(crate) layer: String,
    pub(crate) operands: Vec<Tensor>,
}

/// An equation and its two ways.
#[derive(Debug)]
struct Form {
    linear: NormalForm,
    unfolding: Unfolding,
    operands: Vec<&'static str>,
    /// What the base weight is called, where folding reads it.
    base: Option<String>,
    scales_bias: bool,
}

/// An adapter, folded.
struct FoldedOperands {
    form: Arc<Form>,
    bindings: Bindings,
    folded: FoldedAdapter,
}

/// Where the gradient of an operand goes: f32, as many as the operand has numbers; `None`: nowhere.
pub(crate) type GradientPlace<'a> = Option<&'a mut [f32]>;

fn form(layer: &str) -> Result<Arc<Form>, Error> {
    static FORMS: RwLock<Option<HashMap<String, Arc<Form>>>> = RwLock::new(None);
    let known = |forms: &Option<HashMap<String, Arc<Form>>>| forms.as_ref().and_then(|forms| forms.get(layer)).cloned();
    if let Some(form) = known(&FORMS.read().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(form);
    }
    let layers = layers()?;
    let compiled = layers.compiled(layer).ok_or_else(|| unknown(layer))?;
    let linear = compiled.linear.clone();
    let base = linear.reads_base_weight();
    let base = base.then(|| linear.layer.layer().operands[linear.base_weight].name.clone());
    let (unfolding, scales_bias) = (linear.unfolding(), layers.layer_scales_bias(layer));
    let form = Arc::new(Form { linear, unfolding, operands: operands_of(layer)?, base, scales_bias });
    let mut forms = FORMS.write().unwrap_or_else(PoisonError::into_inner);
    forms.get_or_insert_default().insert(layer.to_owned(), form.clone());
    Ok(form)
}

impl TrainedAdapter {
    fn fold(&self, part: &Part) -> Result<FoldedOperands, Error> {
        let form = form(&self.layer)?;
        if form.scales_bias && part.bias.is_some() {
            let problem = format!(
                "`{}` scales the layer's bias, which isn't trained: make the layer without its bias, and add the scaled bias to what it gives",
                self.layer
            );
            return Err(Error::Training(problem));
        }
        if self.operands.len() != form.operands.len() {
            let problem =
                format!("takes the operands {}, and {} were given", form.operands.join(", "), self.operands.len());
            return Err(Error::shape(format!("an adapter of the layer `{}`", self.layer), problem));
        }
        let mut bindings = Bindings::new();
        for (name, tensor) in form.operands.iter().zip(&self.operands) {
            let values = tensor.to_f64(&format!("the operand `{name}`"))?;
            let value = match tensor.shape[..] {
                [] => Value::scalar(values.first().copied().unwrap_or(f64::NAN)),
                [rows, columns] => Value::matrix(rows, columns, values)?,
                _ => Value::vector(values),
            };
            bindings.insert((*name).to_owned(), value);
        }
        let (d, k) = part.shape();
        if let Some(name) = &form.base {
            bindings.insert(name.clone(), Value::matrix(d, k, part.weight().into_iter().map(f64::from).collect())?);
        }
        let folded = form.linear.fold(&bindings)?;
        folded.check(d, k)?;
        Ok(FoldedOperands { form, bindings, folded })
    }
}

/// Adapters that are in a projection's table for a call, behind its slots.
struct Placed<'a> {
    part: &'a Part,
    first: u32,
    count: u32,
}

impl<'a> Placed<'a> {
    fn new(part: &'a Part, adapters: &[FoldedOperands], slots: u32) -> Result<Self, Error> {
        let count = u32::try_from(adapters.len()).unwrap_or(u32::MAX);
        part.projection.change(|projection| {
            // Other calls' adapters may be there, too.
            let is_free = |first: &u32| (*first..first + count).all(|position| projection.slots_at(position).is_none());
            let first = (slots + 1..u32::MAX - count).find(is_free).unwrap_or(slots + 1);
            let placed = Self { part, first, count };
            for (position, adapter) in (first..).zip(adapters) {
                if let Err(error) = place(projection, position, &adapter.folded) {
                    (first..position).for_each(|position| projection.remove(position));
                    std::mem::forget(placed);
                    return Err(error.into());
                }
            }
            Ok(placed)
        })
    }
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        let Self { part, first, count } = *self;
        part.projection.change(|projection| (first..first + count).for_each(|position| projection.remove(position)));
    }
}

/// The one part of a layer that is trained.
fn only_part(linear: &Linear) -> Result<&Part, Error> {
    match linear.part_sizes().count() {
        1 => linear.part(0),
        count => Err(Error::Training(format!("the layer has {count} parts; gradients are those of a layer of one"))),
    }
}

/// y of x, each row by the adapter of `adapters` that its slot names.
pub(crate) fn forward(
    linear: &Linear,
    adapters: &[TrainedAdapter],
    x: Rows<'_>,
    rows: RowSlots<'_>,
    y: RowsMut<'_>,
) -> Result<(), Error> {
    let part = only_part(linear)?;
    let folded = adapters.iter().map(|adapter| adapter.fold(part)).collect::<Result<Vec<_>, _>>()?;
    let placed = Placed::new(part, &folded, linear.slots())?;
    let batch = rows.batch(placed.count, placed.first)?;
    linear.run(&batch, x, y)
}

/// The gradients of a layer's input and of adapters that come with the call: x `[rows, inputs]` as the forward pass had it, g
/// `[rows, outputs]` the gradient of its outputs, both without gaps. `gradients` has a place for each operand of each adapter.
pub(crate) fn backward(
    linear: &Linear,
    adapters: &[TrainedAdapter],
    (x, g): (Values<'_>, Values<'_>),
    rows: RowSlots<'_>,
    dx: Option<ValuesMut<'_>>,
    gradients: &mut [GradientPlace<'_>],
) -> Result<(), Error> {
    let part = only_part(linear)?;
    let folded = adapters.iter().map(|adapter| adapter.fold(part)).collect::<Result<Vec<_>, _>>()?;
    check_places(adapters, gradients)?;
    let placed = Placed::new(part, &folded, linear.slots())?;
    let batch = rows.batch(placed.count, placed.first)?;
    let pass = part.projection.scheduled_backward(&batch)?;
    let first = placed.first;
    drop(placed);
    let wanted = gradients.iter().any(Option::is_some);
    let (in_vectors, out_vectors) = run(&pass, part, (x, g), dx, wanted)?;
    gradients.iter_mut().flatten().for_each(|place| place.fill(0.0));
    if !wanted {
        return Ok(());
    }
    for (position, gradient) in pass.gradients(&in_vectors, &out_vectors) {
        let at = position.checked_sub(first).map_or(usize::MAX, |at| at as usize);
        let Some(FoldedOperands { form, bindings, .. }) = folded.get(at) else { continue };
        let before = folded[..at].iter().map(|adapter| adapter.form.operands.len()).sum::<usize>();
        let unfolded = form.unfolding.unfold(bindings, &gradient)?;
        for (name, place) in form.operands.iter().zip(&mut gradients[before..]) {
            if let (Some(place), Some(value)) = (place, unfolded.get(name)) {
                place.iter_mut().zip(value.data()).for_each(|(to, from)| *to = *from as f32);
            }
        }
    }
    Ok(())
}

/// dx of a layer whose adapters are in its slots.
pub(crate) fn input_gradient(
    linear: &Linear,
    (x, g): (Values<'_>, Values<'_>),
    rows: RowSlots<'_>,
    dx: ValuesMut<'_>,
) -> Result<(), Error> {
    let part = only_part(linear)?;
    let batch = rows.batch(linear.slots(), 1)?;
    let pass = part.projection.scheduled_backward(&batch)?;
    run(&pass, part, (x, g), Some(dx), false).map(drop)
}

/// Runs a backward pass: the gradients of in-vectors and out-vectors, where they are wanted.
fn run(
    pass: &BackwardPass,
    part: &Part,
    (x, g): (Values<'_>, Values<'_>),
    dx: Option<ValuesMut<'_>>,
    wanted: bool,
) -> Result<(Vec<f32>, Vec<f32>), Error> {
    let (d, k) = part.shape();
    let zeros = |vectors: u32, width: usize| vec![0.0; if wanted { vectors as usize * width } else { 0 }];
    let mut in_vectors = zeros(pass.schedule.in_vectors(), d);
    let mut out_vectors = zeros(pass.schedule.out_vectors(), k);
    let engine = &machine()?.engine;
    threads::run(|| {
        let vectors = wanted.then_some([&mut in_vectors[..], &mut out_vectors[..]]);
        engine.backward(&operands(&pass.operands)?, &pass.schedule, x, g, GradientsMut { input: dx, vectors })?;
        Ok::<_, Error>(())
    })??;
    Ok((in_vectors, out_vectors))
}

fn check_places(adapters: &[TrainedAdapter], gradients: &[GradientPlace<'_>]) -> Result<(), Error> {
    let numbers = |tensor: &Tensor| tensor.shape.iter().product::<usize>();
    let expected: Vec<usize> = adapters.iter().flat_map(|adapter| &adapter.operands).map(numbers).collect();
    if gradients.len() != expected.len() {
        let problem = format!("are {}, and the adapters have {} operands", gradients.len(), expected.len());
        return Err(Error::shape("the places for gradients", problem));
    }
    for (place, expected) in gradients.iter().zip(expected) {
        if let Some(found) = place.as_ref().map(|place| place.len()).filter(|found| *found != expected) {
            let problem = format!("has {found} numbers, and the operand has {expected}");
            return Err(Error::shape("a place for a gradient", problem));
        }
    }
    Ok(())
}
