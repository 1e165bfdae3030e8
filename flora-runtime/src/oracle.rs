//! Holds a device's output against the f64 oracle: the equation as it was written, on some rows and columns of a batch.

use flora_codegen::batch::LayerShape;
use flora_ir::algebra::{FoldError, FoldedAdapter};
use flora_ir::{Activation, Bindings, EvaluateError, Role, Shape, Value, VerifiedLayer, evaluate_root};

/// How far sampled outputs are from the oracle's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deviation {
    /// ‖y − oracle‖ / ‖oracle‖ over the sample.
    pub relative_error: f64,
    /// The largest |y − oracle| / (u·√n·Σ|products|): below 4 is rounding, see [`rounding_unit`].
    pub rounding_units: f64,
}

impl Deviation {
    /// The limit of `rounding_units` that f32 arithmetic may reach: a sum of n products in any order errs by a random walk of n
    /// roundings, √n of them at one standard deviation; four cover every sample, and a wrong kernel errs by thousands.
    pub const LIMIT: f64 = 4.0;

    /// Whether the outputs are right but for rounding. NaN is not.
    pub fn is_rounding(&self) -> bool {
        self.rounding_units <= Self::LIMIT && self.relative_error.is_finite()
    }

    /// The worse of two.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            relative_error: worse(self.relative_error, other.relative_error),
            rounding_units: worse(self.rounding_units, other.rounding_units),
        }
    }
}

/// The larger, or NaN when either is.
fn worse(one: f64, other: f64) -> f64 {
    if one >= other || one.is_nan() { one } else { other }
}

/// u·√n: the half-ulp of f32, relative, times the square root of the number of roundings on the way to one output: d products
/// and sums a virtual row or rank, the scales, the bias and the activation.
pub fn rounding_unit(d: u32, adapter: &FoldedAdapter) -> f64 {
    let sums = adapter.virtual_rows.len() + adapter.low_rank.len();
    f64::from(f32::EPSILON) / 2.0 * ((u64::from(d) as f64) + sums as f64 + 8.0).sqrt()
}

/// What the sample is taken from.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Extents.
    pub shape: LayerShape,
    /// `[d, k]`, row-major.
    pub base_weight: &'a [f32],
    /// `[k]`
    pub bias: Option<&'a [f32]>,
    /// What follows the layer's own equation.
    pub activation: Activation,
    /// One row of the input, `[d]`.
    pub x: &'a [f32],
    /// The device's output for it, `[k]`.
    pub y: &'a [f32],
    /// Which outputs to compute again.
    pub columns: &'a [usize],
}

/// Why a sample can't be checked.
#[derive(Debug, thiserror::Error)]
pub enum OracleError {
    /// Tensors of another size.
    #[error("the sample's tensors or columns don't fit a weight of [{d}, {k}]")]
    Sample {
        /// Inputs.
        d: u32,
        /// Outputs.
        k: u32,
    },
    /// The equation can't be evaluated.
    #[error(transparent)]
    Evaluate(#[from] EvaluateError),
    /// The adapter can't be folded.
    #[error(transparent)]
    Fold(#[from] FoldError),
}

/// Evaluates `layer` on the sampled columns alone, which is exact: every operation of a verified layer keeps its output columns
/// apart. `operands` are the adapter's, by name; `folded` is the same adapter, for the size of the products.
///
/// # Errors
/// Operands that don't fit the layer.
pub fn check(
    layer: &VerifiedLayer,
    operands: &Bindings,
    folded: &FoldedAdapter,
    sample: &Sample,
) -> Result<Deviation, OracleError> {
    let LayerShape { d, k } = sample.shape;
    let (rows, width) = (d as usize, k as usize);
    let bias_fits = sample.bias.is_none_or(|bias| bias.len() == width);
    let columns_fit = sample.columns.iter().all(|column| *column < width);
    if sample.x.len() != rows
        || sample.y.len() != width
        || sample.base_weight.len() != rows * width
        || !bias_fits
        || !columns_fit
    {
        return Err(OracleError::Sample { d, k });
    }
    let base_weight = columns_of(sample.base_weight, k as usize, sample.columns);
    let base_weight = Value::matrix(d as usize, sample.columns.len(), base_weight)?;
    let x = Value::matrix(1, d as usize, sample.x.iter().map(|value| f64::from(*value)).collect())?;
    let bias = sample.bias.map(|bias| sample.columns.iter().map(|column| f64::from(bias[*column])).collect::<Vec<_>>());

    let mut bindings = Bindings::new();
    for (_, operand) in layer.layer().operands.iter() {
        let value = match operand.role {
            Role::Input => Some(x.clone()),
            Role::BaseWeight => Some(base_weight.clone()),
            Role::Bias => bias.clone().map(Value::vector),
            Role::Adapter => match operands.get(&operand.name) {
                Some(value) => Some(sampled(layer, &operand.ty.shape, value, sample)?),
                None => None,
            },
        };
        if let Some(value) = value {
            bindings.insert(operand.name.clone(), value);
        }
    }
    let mut expected = evaluate_root(layer, &bindings)?.into_data();
    let layer_has_bias = layer.layer().operands.iter().any(|(_, operand)| operand.role == Role::Bias);
    for (position, value) in expected.iter_mut().enumerate() {
        let bias = bias.as_ref().filter(|_| !layer_has_bias).map_or(0.0, |bias| bias[position]);
        *value = flora_ir::evaluate::apply_activation(sample.activation, *value + bias);
    }

    let magnitudes = magnitudes(folded, &x, &base_weight, bias.as_deref(), sample.columns)?;
    let unit = rounding_unit(d, folded);
    let (mut difference, mut norm, mut units) = (0.0f64, 0.0f64, 0.0f64);
    for ((column, expected), magnitude) in sample.columns.iter().zip(&expected).zip(magnitudes) {
        let error = (f64::from(sample.y[*column]) - expected).abs();
        difference += error * error;
        norm += expected * expected;
        let own = error / (unit * magnitude).max(f64::MIN_POSITIVE);
        units = worse(units, own);
    }
    let relative_error = if difference == 0.0 { 0.0 } else { (difference / norm.max(f64::MIN_POSITIVE)).sqrt() };
    Ok(Deviation { relative_error, rounding_units: units })
}

/// The sampled columns of an adapter's operand, where its last extent is the layer's k.
fn sampled(layer: &VerifiedLayer, shape: &Shape, value: &Value, sample: &Sample) -> Result<Value, EvaluateError> {
    let base_weight = &layer.layer().operands[layer.base_weight()].ty.shape;
    let Shape::Matrix(_, outputs) = base_weight else { return Ok(value.clone()) };
    let k = sample.shape.k as usize;
    match (shape, value.shape()) {
        (Shape::Vector(extent), [width]) if extent == outputs && *width == k => {
            Ok(Value::vector(columns_of(value.data(), k, sample.columns)))
        }
        (Shape::Matrix(_, extent), [rows, width]) if extent == outputs && *width == k => {
            Value::matrix(*rows, sample.columns.len(), columns_of(value.data(), k, sample.columns))
        }
        _ => Ok(value.clone()),
    }
}

fn columns_of<T: Copy + Into<f64>>(values: &[T], width: usize, columns: &[usize]) -> Vec<f64> {
    values.chunks_exact(width.max(1)).flat_map(|row| columns.iter().map(|column| row[*column].into())).collect()
}

/// Σ|products| of each sampled output: the folded adapter on absolute values.
fn magnitudes(
    folded: &FoldedAdapter,
    x: &Value,
    base_weight: &Value,
    bias: Option<&[f64]>,
    columns: &[usize],
) -> Result<Vec<f64>, OracleError> {
    let absolute = |vector: &Vec<f32>| vector.iter().map(|value| value.abs()).collect::<Vec<_>>();
    let sampled = |vector: &Vec<f32>| columns.iter().map(|column| vector[*column].abs()).collect::<Vec<_>>();
    let mut sizes = FoldedAdapter::default();
    for row in &folded.virtual_rows {
        sizes.virtual_rows.push(flora_ir::algebra::VirtualRow {
            in_scale: row.in_scale.as_ref().map(absolute),
            out_scale: row.out_scale.as_ref().map(sampled),
        });
    }
    for pair in &folded.low_rank {
        let (shrink, expand) = (absolute(&pair.shrink), sampled(&pair.expand));
        sizes.low_rank.push(flora_ir::algebra::RankOne { shrink, expand });
    }
    let all = |value: &Value| value.data().iter().map(|number| number.abs()).collect::<Vec<_>>();
    let (&[rows, d], &[_, k]) = (x.shape(), base_weight.shape()) else { return Ok(Vec::new()) };
    let (x, base_weight) = (Value::matrix(rows, d, all(x))?, Value::matrix(d, k, all(base_weight))?);
    let bias = bias.map(|bias| Value::vector(bias.iter().map(|number| number.abs()).collect()));
    Ok(sizes.apply(&x, &base_weight, bias.as_ref(), Activation::Identity)?.into_data())
}

#[cfg(test)]
mod tests {
    use super::*;
    use flora_ir::algebra::VirtualRow;
    use flora_ir::builtin::builtin;

    fn deviation(y: &[f32]) -> Deviation {
        let base_weight = [1.0, 2.0, 3.0, 4.0];
        let sample = Sample {
            shape: LayerShape { d: 2, k: 2 },
            base_weight: &base_weight,
            bias: None,
            activation: Activation::Identity,
            x: &[1.0, 10.0],
            y,
            columns: &[0, 1],
        };
        let folded = FoldedAdapter { virtual_rows: vec![VirtualRow::default()], low_rank: Vec::new() };
        let layer = builtin("linear").expect("a built-in layer");
        check(layer, &Bindings::new(), &folded, &sample).expect("a sample that fits")
    }

    #[test]
    fn right_outputs_are_rounding_and_others_are_not() {
        assert!(deviation(&[31.0, 42.0]).is_rounding());
        assert!(!deviation(&[31.1, 42.0]).is_rounding());
        assert!(!deviation(&[f32::NAN, 42.0]).is_rounding());
        assert!(!deviation(&[31.0, f32::NAN]).is_rounding());
        assert!(!deviation(&[31.0, f32::INFINITY]).is_rounding());
        assert!(!deviation(&[f32::NAN, 42.0]).max(deviation(&[31.0, 42.0])).is_rounding());
    }
}
