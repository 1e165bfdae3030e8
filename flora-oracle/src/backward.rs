//! The backward pass of a whole batch in f64: segments of adapters of any kind and rank, each by itself. What gradients that a
//! device computes are held against.

use flora_ir::algebra::{FoldError, FoldedAdapter};
use flora_ir::gradient::{FoldedGradient, LinearGradient, RankOneGradient, VirtualRowGradient};
use flora_ir::{Activation, Value};
use flora_plan::batch::Segment;
use flora_plan::layer::LayerShape;

/// A batch of rows over one layer, with the gradient of what it gave.
#[derive(Clone, Copy, Debug)]
pub struct BatchRows<'a> {
    /// Extents.
    pub shape: LayerShape,
    /// `[d, k]`, row-major: the numbers that the device decodes.
    pub base_weight: &'a [f32],
    /// `[k]`
    pub bias: Option<&'a [f32]>,
    /// φ
    pub activation: Activation,
    /// `[t, d]`
    pub x: &'a [f32],
    /// ∂L/∂y, `[t, k]`
    pub output_gradient: &'a [f32],
}

/// The gradients of a batch. That of a residual is the output's own.
#[derive(Clone, Debug, PartialEq)]
pub struct BatchGradient {
    /// dx, `[t, d]`
    pub input: Vec<f64>,
    /// `[k]`, the sum over all rows.
    pub bias: Vec<f64>,
    /// Each adapter's, the sum over the rows of its segments: zeros where it has none.
    pub adapters: Vec<FoldedGradient>,
}

/// Why a batch has no gradients.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackwardError {
    /// A tensor of another size.
    #[error("{what} has {found} numbers, the batch's segments and the layer's shape ask for {expected}")]
    WrongSize {
        /// Which tensor.
        what: &'static str,
        /// Its numbers.
        found: usize,
        /// What the others ask for.
        expected: usize,
    },
    /// A segment of an adapter that isn't there.
    #[error("segment {segment} is of adapter {adapter}, of {adapters} that there are")]
    UnknownAdapter {
        /// Position of the segment.
        segment: usize,
        /// What it names.
        adapter: u32,
        /// How many there are.
        adapters: usize,
    },
    /// An adapter's vectors don't fit the weight.
    #[error(transparent)]
    Adapter(#[from] FoldError),
}

/// The gradients of `segments`, which follow one another in the batch and name `adapters` by position. A segment's gradients
/// depend on its own rows and its own adapter alone.
///
/// # Errors
/// Tensors or adapters that don't fit the layer or the segments.
pub fn backward(
    batch: &BatchRows,
    adapters: &[FoldedAdapter],
    segments: &[Segment],
) -> Result<BatchGradient, BackwardError> {
    let (d, k) = (batch.shape.d as usize, batch.shape.k as usize);
    let tokens: usize = segments.iter().map(|segment| segment.rows as usize).sum();
    let check = |what, found: usize, expected: usize| match found == expected {
        true => Ok(()),
        false => Err(BackwardError::WrongSize { what, found, expected }),
    };
    check("the base weight", batch.base_weight.len(), d * k)?;
    check("the bias", batch.bias.map_or(k, <[f32]>::len), k)?;
    check("x", batch.x.len(), tokens * d)?;
    check("the output's gradient", batch.output_gradient.len(), tokens * k)?;
    adapters.iter().try_for_each(|adapter| adapter.check(d, k))?;
    let matrix = |rows: usize, columns: usize, numbers: &[f32]| {
        Value::matrix(rows, columns, widened(numbers)).map_err(FoldError::from)
    };
    let base_weight = matrix(d, k, batch.base_weight)?;
    let bias = batch.bias.map(|bias| Value::vector(widened(bias)));

    let mut sums = BatchGradient {
        input: Vec::with_capacity(tokens * d),
        bias: vec![0.0; k],
        adapters: adapters.iter().map(|adapter| zeros(adapter, d, k)).collect(),
    };
    let mut first = 0;
    for (position, Segment { rows, adapter }) in segments.iter().enumerate() {
        let (Some(folded), Some(sum)) = (adapters.get(*adapter as usize), sums.adapters.get_mut(*adapter as usize))
        else {
            let (adapter, adapters) = (*adapter, adapters.len());
            return Err(BackwardError::UnknownAdapter { segment: position, adapter, adapters });
        };
        let rows = *rows as usize;
        let x = matrix(rows, d, &batch.x[first * d..][..rows * d])?;
        let output = matrix(rows, k, &batch.output_gradient[first * k..][..rows * k])?;
        let LinearGradient { input, bias: of_bias, adapter } =
            folded.gradient(&x, &base_weight, bias.as_ref(), batch.activation, &output)?;
        sums.input.extend(input.data());
        add(&mut sums.bias, of_bias.data());
        add_folded(sum, &adapter);
        first += rows;
    }
    Ok(sums)
}

fn widened(numbers: &[f32]) -> Vec<f64> {
    numbers.iter().map(|number| f64::from(*number)).collect()
}

fn zeros(adapter: &FoldedAdapter, d: usize, k: usize) -> FoldedGradient {
    let rows = adapter.virtual_rows.iter().map(|row| VirtualRowGradient {
        in_scale: row.in_scale.as_ref().map(|_| vec![0.0; d]),
        out_scale: row.out_scale.as_ref().map(|_| vec![0.0; k]),
    });
    let pair = RankOneGradient { shrink: vec![0.0; d], expand: vec![0.0; k] };
    FoldedGradient { virtual_rows: rows.collect(), low_rank: vec![pair; adapter.low_rank.len()] }
}

fn add(sum: &mut [f64], summand: &[f64]) {
    sum.iter_mut().zip(summand).for_each(|(sum, summand)| *sum += summand);
}

/// Adds gradients of the same adapter.
fn add_folded(sum: &mut FoldedGradient, summand: &FoldedGradient) {
    for (sum, summand) in sum.virtual_rows.iter_mut().zip(&summand.virtual_rows) {
        for (sum, summand) in [(&mut sum.in_scale, &summand.in_scale), (&mut sum.out_scale, &summand.out_scale)] {
            if let (Some(sum), Some(summand)) = (sum, summand) {
                add(sum, summand);
            }
        }
    }
    for (sum, summand) in sum.low_rank.iter_mut().zip(&summand.low_rank) {
        add(&mut sum.shrink, &summand.shrink);
        add(&mut sum.expand, &summand.expand);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flora_ir::algebra::normalize;
    use flora_ir::gradient::differentiate;
    use flora_ir::{
        Bindings, Dimension, ElementType, Node, Operand, Operator, Role, Scope, Shape, Span, TensorType, VerifiedLayer,
        builtin, verify,
    };

    /// Numbers that repeat no pattern of an extent.
    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|index| ((index + 31 * seed) as f32 * 0.7).sin()).collect()
    }

    fn tensors(kind: &str, rank: usize, [d, k]: [usize; 2], seed: usize) -> Bindings {
        let layer = builtin::builtin(kind).expect(kind).layer();
        let extent = |dimension: &Dimension| match dimension.to_string().as_str() {
            "D" => d,
            "K" => k,
            _ => rank,
        };
        let adapter = layer.operands.iter().filter(|(_, operand)| operand.role.is_adapters());
        let value = |(index, (_, operand)): (usize, (_, &Operand))| {
            let of = |count: usize| widened(&numbers(count, seed + index));
            let value = match &operand.ty.shape {
                Shape::Scalar => Value::scalar(0.5),
                Shape::Vector(n) => Value::vector(of(extent(n))),
                Shape::Matrix(m, n) => Value::matrix(extent(m), extent(n), of(extent(m) * extent(n))).expect("as many"),
            };
            (operand.name.clone(), value)
        };
        adapter.enumerate().map(value).collect()
    }

    /// φ(layer + bias)
    fn activated(layer: &VerifiedLayer, function: Activation) -> VerifiedLayer {
        let mut layer = layer.layer().clone();
        let shape = Shape::Vector(Dimension::Symbol("K".to_owned()));
        let ty = TensorType { shape, rank_axis: None, element: ElementType::F32, scope: Scope::Shared };
        let bias = Operand { name: "bias".to_owned(), role: Role::Bias, ty };
        let bias = layer.declare(bias, Span::default());
        let (lhs, rhs) = (layer.root.unwrap(), layer.push(Node::Operand(bias), Span::default()));
        let value = layer.push(Node::Elementwise { operator: Operator::Add, lhs, rhs }, Span::default());
        layer.root = Some(layer.push(Node::Activation { function, value }, Span::default()));
        verify(layer).unwrap()
    }

    /// Every kind, ranks 1 to 3, two segments each but for the last, the first of no rows.
    #[test]
    fn a_batch_of_every_kind_has_the_gradients_of_its_equations() {
        let (d, k, activation) = (5, 7, Activation::Silu);
        let (base_weight, bias) = (numbers(d * k, 1), numbers(k, 2));
        let kinds: Vec<&str> = builtin::names().collect();
        let w0 = Value::matrix(d, k, widened(&base_weight)).unwrap();
        let bound: Vec<Bindings> = (0..kinds.len())
            .map(|index| {
                let mut bindings = tensors(kinds[index], 1 + index % 3, [d, k], 7 * index);
                bindings.insert("w0", w0.clone());
                bindings
            })
            .collect();
        let linear = |index: usize| normalize(builtin::builtin(kinds[index]).unwrap()).unwrap().linear;
        let folded: Vec<_> = (0..kinds.len()).map(|index| linear(index).fold(&bound[index]).unwrap()).collect();
        let once = (0..kinds.len()).map(|index| Segment { rows: index as u32 % 4, adapter: index as u32 });
        let again = once.clone().take(kinds.len() - 1).map(|segment| Segment { rows: 2, ..segment });
        let segments: Vec<Segment> = once.chain(again).collect();
        let tokens: usize = segments.iter().map(|segment| segment.rows as usize).sum();
        let (x, dy) = (numbers(tokens * d, 3), numbers(tokens * k, 4));
        let batch = BatchRows {
            shape: LayerShape { d: d as u32, k: k as u32 },
            base_weight: &base_weight,
            bias: Some(&bias),
            activation,
            x: &x,
            output_gradient: &dy,
        };
        let found = backward(&batch, &folded, &segments).unwrap();

        let first_row =
            |position: usize| segments[..position].iter().map(|segment| segment.rows as usize).sum::<usize>();
        let mut d_bias = vec![0.0; k];
        for (index, kind) in kinds.iter().enumerate() {
            // The rows of this adapter, side by side; the bias and the activation as parts of the equation.
            let own: Vec<usize> =
                (0..segments.len()).filter(|segment| segments[*segment].adapter == index as u32).collect();
            let rows: Vec<usize> =
                own.iter().flat_map(|own| (0..segments[*own].rows as usize).map(|row| first_row(*own) + row)).collect();
            let of = |numbers: &[f32], width: usize| {
                let rows =
                    rows.iter().flat_map(|row| &numbers[row * width..][..width]).map(|number| f64::from(*number));
                rows.collect::<Vec<f64>>()
            };
            let layer = activated(builtin::builtin(kind).unwrap(), activation);
            let mut bindings = bound[index].clone();
            bindings.insert("x", Value::matrix(rows.len(), d, of(&x, d)).unwrap());
            bindings.insert("bias", Value::vector(widened(&bias)));
            let dy = Value::matrix(rows.len(), k, of(&dy, k)).unwrap();
            let expected = differentiate(&layer).evaluate(&bindings, &dy).unwrap();
            let close = |found: &[f64], expected: &[f64]| {
                // Folded vectors are rounded to f32, and sums of a few dozen products are below 100.
                assert_eq!(found.len(), expected.len(), "{kind}");
                let furthest = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs());
                assert!(
                    furthest.fold(0.0, f64::max) < 100.0 * f64::from(f32::EPSILON),
                    "{kind}: {found:?}, {expected:?}"
                );
            };
            let dx: Vec<f64> = rows.iter().flat_map(|row| found.input[row * d..][..d].to_vec()).collect();
            close(&dx, expected.get("x").unwrap().data());
            add(&mut d_bias, expected.get("bias").unwrap().data());
            let operands = linear(index).unfolding().unfold(&bound[index], &found.adapters[index]).unwrap();
            for (_, operand) in layer.layer().operands.iter().filter(|(_, operand)| operand.role.is_adapters()) {
                close(operands.get(&operand.name).unwrap().data(), expected.get(&operand.name).unwrap().data());
            }
        }
        let furthest =
            found.bias.iter().zip(&d_bias).map(|(found, expected)| (found - expected).abs()).fold(0.0, f64::max);
        assert!(furthest < 100.0 * f64::from(f32::EPSILON), "{furthest}");
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let base = FoldedAdapter { virtual_rows: vec![Default::default()], ..FoldedAdapter::default() };
        let numbers = numbers(12, 1);
        let batch = BatchRows {
            shape: LayerShape { d: 2, k: 3 },
            base_weight: &numbers[..6],
            bias: None,
            activation: Activation::Identity,
            x: &numbers[..4],
            output_gradient: &numbers[..6],
        };
        let segment = |rows, adapter| Segment { rows, adapter };
        let run = |batch: BatchRows, segment: Segment| backward(&batch, std::slice::from_ref(&base), &[segment]);
        assert!(run(batch, segment(2, 0)).is_ok());
        let refused = run(batch, segment(2, 1));
        assert!(matches!(refused, Err(BackwardError::UnknownAdapter { segment: 0, adapter: 1, adapters: 1 })));
        for (what, wrong, rows) in [
            ("x", batch, 3),
            ("x", BatchRows { x: &numbers[..5], ..batch }, 2),
            ("the output's gradient", BatchRows { output_gradient: &numbers[..5], ..batch }, 2),
            ("the base weight", BatchRows { base_weight: &numbers, ..batch }, 2),
            ("the bias", BatchRows { bias: Some(&numbers), ..batch }, 2),
        ] {
            match run(wrong, segment(rows, 0)) {
                Err(BackwardError::WrongSize { what: found, .. }) => assert_eq!(found, what),
                other => panic!("{what}: {other:?}"),
            }
        }
        let scaled = FoldedAdapter {
            virtual_rows: vec![flora_ir::algebra::VirtualRow { in_scale: Some(vec![1.0; 3]), out_scale: None }],
            ..FoldedAdapter::default()
        };
        assert!(matches!(backward(&batch, &[scaled], &[segment(2, 0)]), Err(BackwardError::Adapter(_))));
    }
}
