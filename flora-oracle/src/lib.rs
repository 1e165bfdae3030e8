//! Holds a device's output against the f64 oracle: the equation as it was written, on some rows and columns of a batch.

pub mod backward;

use flora_ir::algebra::{FoldError, FoldedAdapter, SparseParts, SparseProduct};
use flora_ir::{
    Activation, Bindings, EvaluateError, Node, Pairs, Role, Shape, SparseMatrix, Value, VerifiedLayer, evaluate_root,
};
use flora_plan::layer::{Element, LayerFormat, LayerShape, WeightFormat};

/// How far sampled outputs are from the oracle's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deviation {
    /// ‖y − oracle‖ / ‖oracle‖ over the sample.
    pub relative_error: f64,
    /// The largest |y − oracle| / (one standard deviation of rounding): below 4 is rounding, see [`rounding`].
    pub rounding_units: f64,
}

impl Deviation {
    /// The limit of `rounding_units` that right arithmetic may reach: four standard deviations cover every sample.
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

/// One standard deviation of the rounding of an output, for a sum of n products p that is y in the end:
///
/// u₃₂·√n·Σ|p| + √6·u_s·‖p‖ + √3·u_s·|y| + 2·u_a·‖p‖ + u_w·‖p‖
///
/// - Sums are f32 in any order: a random walk of n roundings, n counting d products and sums a virtual row or rank, the scales,
///   the bias and the activation.
/// - Half types round each product by itself: x · b, w0 ∘ (b a) and the two vectors of that as they are staged, and of a low-rank
///   sum h and h·a, in the type of the activations (u_s); the adapter's two vectors in theirs (u_a), again where they are means
///   or scaled; a float w0 as it is staged. Independent roundings add up to the products' norm ‖p‖ = √Σp², not to Σ|p|.
/// - y is written three times at most, as x @ w0, with the low-rank sum added, and finished. An adapter's sparse matrices stay f32;
///   rows that they transform are written once before, and sums that they add to once between.
///
/// f32 rounds nothing of that: those terms are left out.
pub fn rounding(sizes: Sizes, n: f64, format: LayerFormat) -> f64 {
    let half = |element: Element| if element == Element::F32 { 0.0 } else { element.rounding() };
    let stage = half(format.activations);
    let weight = if matches!(format.weight, WeightFormat::Float(_)) { stage } else { 0.0 };
    let products = 6f64.sqrt() * stage + 2.0 * half(format.adapters) + weight;
    Element::F32.rounding() * n.sqrt() * sizes.sum + products * sizes.norm + 3f64.sqrt() * stage * sizes.output
}

/// How large the products of an output are.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sizes {
    /// Σ|p|
    pub sum: f64,
    /// √Σp²
    pub norm: f64,
    /// |y|
    pub output: f64,
}

/// What the sample is taken from.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Extents.
    pub shape: LayerShape,
    /// The types that the device computed with.
    pub format: LayerFormat,
    /// `[d, k]`, row-major: the numbers that the device decodes.
    pub base_weight: &'a [f32],
    /// `[k]`
    pub bias: Option<&'a [f32]>,
    /// What follows the layer's own equation.
    pub activation: Activation,
    /// What is added last, `[k]`.
    pub residual: Option<&'a [f32]>,
    /// One row of the input, `[d]`, as the device has it.
    pub x: &'a [f32],
    /// The device's output for it, `[k]`.
    pub y: &'a [f32],
    /// Which outputs to compute again.
    pub columns: &'a [usize],
}

/// Why a sample can't be checked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
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

/// Evaluates `layer` on the sampled columns alone, which is exact where its operations keep output columns apart, and on all
/// columns elsewhere. `operands` are the adapter's, by name; `folded` is the same adapter, for the size of the products.
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
    let vectors = [sample.bias, sample.residual];
    let bias_fits = vectors.iter().flatten().all(|vector| vector.len() == width);
    let columns_fit = sample.columns.iter().all(|column| *column < width);
    if sample.x.len() != rows
        || sample.y.len() != width
        || sample.base_weight.len() != rows * width
        || !bias_fits
        || !columns_fit
    {
        return Err(OracleError::Sample { d, k });
    }
    let every: Vec<usize> = (0..width).collect();
    let columns = if keeps_columns_apart(layer) { sample.columns } else { &every };
    let sample = &Sample { columns, ..*sample };
    let base_weight = columns_of(sample.base_weight, k as usize, sample.columns);
    let base_weight = Value::matrix(d as usize, sample.columns.len(), base_weight)?;
    let x = Value::matrix(1, d as usize, sample.x.iter().map(|value| f64::from(*value)).collect())?;
    let of_columns =
        |vector: &[f32]| sample.columns.iter().map(|column| f64::from(vector[*column])).collect::<Vec<_>>();
    let (bias, residual) = (sample.bias.map(of_columns), sample.residual.map(of_columns));

    let mut bindings = Bindings::new();
    for (_, operand) in layer.layer().operands.iter() {
        let value = match operand.role {
            Role::Input => Some(x.clone()),
            Role::BaseWeight => Some(base_weight.clone()),
            Role::Bias => bias.clone().map(Value::vector),
            Role::Residual => {
                residual.clone().map(|residual| Value::matrix(1, sample.columns.len(), residual)).transpose()?
            }
            Role::Adapter | Role::Sparse => {
                let sparse = operands.get_sparse(&operand.name).map(dense).transpose()?;
                let value = sparse.as_ref().or_else(|| operands.get(&operand.name));
                value.map(|value| sampled(layer, &operand.ty.shape, value, sample)).transpose()?
            }
        };
        if let Some(value) = value {
            bindings.insert(operand.name.clone(), value);
        }
    }
    let mut expected = evaluate_root(layer, &bindings)?.into_data();
    // What the equation itself has is in its value already.
    let has = |role: Role| layer.layer().operands.iter().any(|(_, operand)| operand.role == role);
    for (position, value) in expected.iter_mut().enumerate() {
        let bias = bias.as_ref().filter(|_| !has(Role::Bias)).map_or(0.0, |bias| bias[position]);
        *value = flora_ir::evaluate::apply_activation(sample.activation, *value + bias);
        *value += residual.as_ref().filter(|_| !has(Role::Residual)).map_or(0.0, |residual| residual[position]);
    }

    let added = |of: fn(f64) -> f64, position: usize| -> f64 {
        [&bias, &residual].into_iter().flatten().map(|vector| of(vector[position])).sum()
    };
    let sums = products(folded, &x, &base_weight, sample.columns, f64::abs)?;
    let squares = products(folded, &x, &base_weight, sample.columns, |number| number * number)?;
    let longest = folded.sparse.matrices().map(SparseMatrix::longest_column).sum::<usize>();
    let n = f64::from(d) + (folded.virtual_rows.len() + folded.low_rank.len() + longest) as f64 + 8.0;
    let (mut difference, mut norm, mut units) = (0.0f64, 0.0f64, 0.0f64);
    for (position, (column, expected)) in sample.columns.iter().zip(&expected).enumerate() {
        let sizes = Sizes {
            sum: sums[position] + added(f64::abs, position),
            norm: (squares[position] + added(|number| number * number, position)).sqrt(),
            output: expected.abs(),
        };
        let error = (f64::from(sample.y[*column]) - expected).abs();
        difference += error * error;
        norm += expected * expected;
        units = worse(units, error / rounding(sizes, n, sample.format).max(f64::MIN_POSITIVE));
    }
    let relative_error = if difference == 0.0 { 0.0 } else { (difference / norm.max(f64::MIN_POSITIVE)).sqrt() };
    Ok(Deviation { relative_error, rounding_units: units })
}

fn dense(matrix: &SparseMatrix<f64>) -> Result<Value, EvaluateError> {
    let [rows, columns] = matrix.shape();
    Value::matrix(rows, columns, matrix.to_dense())
}

/// Whether no operation of `layer` sums over the outputs, as a matmul with a transposed factor may, or takes them for ranks or pairs.
fn keeps_columns_apart(layer: &VerifiedLayer) -> bool {
    let Shape::Matrix(_, outputs) = &layer.layer().operands[layer.base_weight()].ty.shape else { return false };
    layer.layer().nodes.iter().all(|(handle, node)| {
        let sums = match *node {
            Node::MatMul { lhs: value, .. } => {
                matches!(&layer.type_of(value).shape, Shape::Matrix(_, n) if n == outputs)
            }
            Node::PairProduct { pairs, lhs, rhs } => {
                [lhs, rhs].into_iter().any(|value| match (&layer.type_of(value).shape, pairs) {
                    (Shape::Matrix(_, paired), Pairs::Columns) | (Shape::Matrix(paired, _), Pairs::Rows) => {
                        paired == outputs
                    }
                    _ => false,
                })
            }
            Node::ColumnNorm(value) => matches!(&layer.type_of(value).shape, Shape::Matrix(m, _) if m == outputs),
            _ => false,
        };
        !sums && layer.type_of(handle).rank_axis.as_ref() != Some(outputs)
    })
}

/// The sampled outputs of an adapter's operand, where one of its extents is the layer's k.
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
        (Shape::Matrix(extent, _), [height, width]) if extent == outputs && *height == k => {
            let rows = sample.columns.iter().flat_map(|row| &value.data()[row * width..][..*width]);
            Value::matrix(sample.columns.len(), *width, rows.copied().collect())
        }
        _ => Ok(value.clone()),
    }
}

fn columns_of<T: Copy + Into<f64>>(values: &[T], width: usize, columns: &[usize]) -> Vec<f64> {
    values.chunks_exact(width.max(1)).flat_map(|row| columns.iter().map(|column| row[*column].into())).collect()
}

/// Σ of(product) of each sampled output, for an `of` that keeps products: the folded adapter on `of` every number.
fn products(
    folded: &FoldedAdapter,
    x: &Value,
    base_weight: &Value,
    columns: &[usize],
    of: fn(f64) -> f64,
) -> Result<Vec<f64>, OracleError> {
    let number = |value: &f32| of(f64::from(*value)) as f32;
    let all = |vector: &Vec<f32>| vector.iter().map(number).collect::<Vec<_>>();
    let sampled = |vector: &Vec<f32>| columns.iter().map(|column| number(&vector[*column])).collect::<Vec<_>>();
    let mut sizes = FoldedAdapter::default();
    for row in &folded.virtual_rows {
        sizes.virtual_rows.push(flora_ir::algebra::VirtualRow {
            in_scale: row.in_scale.as_ref().map(all),
            out_scale: row.out_scale.as_ref().map(sampled),
        });
    }
    for pair in &folded.low_rank {
        sizes.low_rank.push(flora_ir::algebra::RankOne { shrink: all(&pair.shrink), expand: sampled(&pair.expand) });
    }
    // Where outputs are transformed, all are sampled.
    let sampled = |product: &SparseProduct| match &product.second {
        None => SparseProduct { first: product.first.with_columns(columns), second: None },
        Some(second) => SparseProduct { first: product.first.clone(), second: Some(second.with_columns(columns)) },
    };
    let added = folded.sparse.added.iter().map(sampled).collect();
    let sparse = SparseParts { added, ..folded.sparse.clone() };
    sizes.sparse = sparse.map(|matrix| matrix.map(|_, _, value| number(&value)));
    let every = |value: &Value| value.data().iter().map(|number| of(*number)).collect::<Vec<_>>();
    let (&[rows, d], &[_, k]) = (x.shape(), base_weight.shape()) else { return Ok(Vec::new()) };
    let (x, base_weight) = (Value::matrix(rows, d, every(x))?, Value::matrix(d, k, every(base_weight))?);
    Ok(sizes.apply(&x, &base_weight, None, Activation::Identity)?.into_data())
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
            format: LayerFormat::default(),
            base_weight: &base_weight,
            bias: None,
            residual: None,
            activation: Activation::Identity,
            x: &[1.0, 10.0],
            y,
            columns: &[0, 1],
        };
        let folded = FoldedAdapter { virtual_rows: vec![VirtualRow::default()], ..FoldedAdapter::default() };
        let layer = builtin("linear").expect("a built-in layer");
        check(layer, &Bindings::new(), &folded, &sample).expect("a sample that fits")
    }

    /// Of a layer whose adapter's operands are `a`, `[3, 2]`, and `c`, `[2, 3]`, columns 0 and 2 of what it gives.
    #[test]
    fn outputs_may_lie_in_rows_and_be_summed_over() {
        let operands = "x: input[tokens, D], w0: weight[D, K], a: adapter[K, R], c: adapter[R, K], b: adapter[D, R]";
        let numbers = |count: u32| (1..=count).map(|number| (f64::from(number) * 0.7).sin()).collect::<Vec<_>>();
        let bindings = Bindings::from_iter([
            ("a", Value::matrix(3, 2, numbers(6)).unwrap()),
            ("c", Value::matrix(2, 3, numbers(6)).unwrap()),
            ("b", Value::matrix(2, 2, numbers(4)).unwrap()),
        ]);
        let (x, base_weight) = ([1.0, 10.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        for equation in ["x @ (w0 * (b @ (transpose(a) + c)))", "x @ (w0 * (b @ (c @ a) @ c))"] {
            let source = format!("layer f({operands}) {{ {equation} }}");
            let layer = flora_ir::verify(flora_ir::parse(&source).unwrap()).unwrap();
            let normal = flora_ir::algebra::normalize(&layer).unwrap().linear;
            let folded = normal.fold(&bindings).unwrap();
            let of = |numbers: &[f32]| numbers.iter().map(|number| f64::from(*number)).collect::<Vec<_>>();
            let mut all = bindings.clone();
            all.insert("x", Value::matrix(1, 2, of(&x)).unwrap());
            all.insert("w0", Value::matrix(2, 3, of(&base_weight)).unwrap());
            let y: Vec<f32> = evaluate_root(&layer, &all).unwrap().data().iter().map(|y| *y as f32).collect();
            let deviation = |y: &[f32]| {
                let sample = Sample {
                    shape: LayerShape { d: 2, k: 3 },
                    format: LayerFormat::default(),
                    base_weight: &base_weight,
                    bias: None,
                    residual: None,
                    activation: Activation::Identity,
                    x: &x,
                    y,
                    columns: &[0, 2],
                };
                check(&layer, &bindings, &folded, &sample).unwrap()
            };
            assert!(deviation(&y).is_rounding(), "{equation}");
            assert!(!deviation(&[y[0], y[1], y[2] * 1.001]).is_rounding(), "{equation}");
        }
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
