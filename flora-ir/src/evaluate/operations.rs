//! What each operation of the IR computes, one loop nest each.

use super::{EvaluateError, Value};
use crate::arena::Handle;
use crate::layer::{Activation, Axis, Backward, Node, Operator, Pairs, Reduce, Side};

/// The value of `node`, which is not an operand, from the values of what it reads.
pub(super) fn evaluate_node<'v>(
    node: &Node,
    value_of: impl Fn(Handle<Node>) -> Result<&'v Value, EvaluateError>,
) -> Result<Value, EvaluateError> {
    match *node {
        Node::Operand(operand) => Err(EvaluateError::UnknownNode { node: operand.index() }),
        Node::Constant(number) => Ok(Value::scalar(number)),
        Node::MatMul { lhs, rhs, reduce } => matmul(value_of(lhs)?, value_of(rhs)?, reduce),
        Node::Elementwise { operator, lhs, rhs } => elementwise(operator, value_of(lhs)?, value_of(rhs)?),
        Node::Columns(value) => {
            let value = value_of(value)?;
            let (rows, columns) = value.rows_and_columns();
            Value::from_fn(Some(columns), vec![rows], |rank, _, row| value.broadcast_at(0, row, rank))
        }
        Node::Rows(value) => {
            let value = value_of(value)?;
            let (rows, columns) = value.rows_and_columns();
            Value::from_fn(Some(rows), vec![columns], |rank, _, column| value.broadcast_at(0, rank, column))
        }
        Node::ReduceRank { reduce, value } => reduce_rank(reduce, value_of(value)?),
        Node::ColumnNorm(value) => {
            let value = value_of(value)?;
            let (rows, columns) = value.rows_and_columns();
            Value::from_fn(value.rank_extent(), vec![columns], |rank, _, column| {
                (0..rows).map(|row| value.broadcast_at(rank, row, column).powi(2)).sum::<f64>().sqrt()
            })
        }
        Node::Transpose(value) => {
            let value = value_of(value)?;
            let (rows, columns) = value.rows_and_columns();
            Value::from_fn(value.rank_extent(), vec![columns, rows], |rank, row, column| {
                value.broadcast_at(rank, column, row)
            })
        }
        Node::PairProduct { pairs, lhs, rhs } => pair_product(pairs, value_of(lhs)?, value_of(rhs)?),
        Node::Activation { function, value } => elements(value_of(value)?, |x| apply_activation(function, x)),
        Node::Backward(ref backward) => evaluate_backward(backward, value_of),
    }
}

fn evaluate_backward<'v>(
    backward: &Backward,
    value_of: impl Fn(Handle<Node>) -> Result<&'v Value, EvaluateError>,
) -> Result<Value, EvaluateError> {
    match *backward {
        Backward::Stack(value) => {
            let value = value_of(value)?;
            let (_, columns) = value.rows_and_columns();
            let rank = value.rank_extent().unwrap_or(1);
            Value::from_fn(None, vec![rank, columns], |_, row, column| value.broadcast_at(row, 0, column))
        }
        Backward::SumLike { value, like } => sum_like(value_of(value)?, value_of(like)?),
        Backward::BroadcastLike { value, like } => {
            let (value, like) = (value_of(value)?, value_of(like)?);
            Value::from_fn(like.rank_extent(), like.shape().to_vec(), |rank, row, column| {
                value.broadcast_at(rank, row, column)
            })
        }
        Backward::SumPairs { side, value, like } => sum_pairs(side, value_of(value)?, value_of(like)?),
        Backward::Extent { axis, value } => {
            let value = value_of(value)?;
            let extent = match axis {
                Axis::Rank => value.rank_extent().unwrap_or(1),
                Axis::Columns => value.rows_and_columns().1,
            };
            Ok(Value::scalar(extent as f64))
        }
        Backward::Derivative { function, value } => elements(value_of(value)?, |x| activation_derivative(function, x)),
    }
}

fn elements(value: &Value, f: impl Fn(f64) -> f64) -> Result<Value, EvaluateError> {
    Value::new(value.rank_extent(), value.shape().to_vec(), value.data().iter().map(|x| f(*x)).collect())
}

/// The sum of all places of `value` at which an element of `like` would stand.
fn sum_like(value: &Value, like: &Value) -> Result<Value, EvaluateError> {
    let ((rows, columns), (like_rows, like_columns)) = (value.rows_and_columns(), like.rows_and_columns());
    let mut sum = vec![0.0; like.data().len()];
    for layer in 0..value.rank_extent().unwrap_or(1) {
        let like_layer = if like.rank_extent().is_some() { layer } else { 0 };
        for row in 0..rows {
            let like_row = like_layer * like_rows + if like.shape().len() == 2 { row } else { 0 };
            for (column, element) in value.row(layer, row).iter().enumerate().take(columns) {
                let like_column = if like.shape().is_empty() { 0 } else { column };
                if let Some(sum) = sum.get_mut(like_row * like_columns + like_column) {
                    *sum += element;
                }
            }
        }
    }
    Value::new(like.rank_extent(), like.shape().to_vec(), sum)
}

fn matmul(l: &Value, r: &Value, reduce: Reduce) -> Result<Value, EvaluateError> {
    let ((rows, inner), (_, columns)) = (l.rows_and_columns(), r.rows_and_columns());
    let rank = l.rank_extent().or(r.rank_extent());
    let divisor = divisor(reduce, inner)?;
    let count = Value::count(rank, &[rows, columns])?;
    let mut data = vec![0.0; count];
    for layer in 0..rank.unwrap_or(1) {
        for row in 0..rows {
            let out = &mut data[(layer * rows + row) * columns..][..columns];
            for index in 0..inner {
                let left = l.broadcast_at(layer, row, index);
                out.iter_mut().zip(r.row(layer, index)).for_each(|(out, right)| *out += left * right);
            }
            out.iter_mut().for_each(|out| *out /= divisor);
        }
    }
    Value::new(rank, vec![rows, columns], data)
}

fn elementwise(operator: Operator, l: &Value, r: &Value) -> Result<Value, EvaluateError> {
    let shape = if l.shape().len() >= r.shape().len() { l.shape() } else { r.shape() };
    Value::from_fn(l.rank_extent().or(r.rank_extent()), shape.to_vec(), |rank, row, column| {
        let (l, r) = (l.broadcast_at(rank, row, column), r.broadcast_at(rank, row, column));
        match operator {
            Operator::Add => l + r,
            Operator::Multiply => l * r,
            Operator::Divide => l / r,
        }
    })
}

fn pair_product(pairs: Pairs, l: &Value, r: &Value) -> Result<Value, EvaluateError> {
    let ((rows, columns), (other_rows, other_columns)) = (l.rows_and_columns(), r.rows_and_columns());
    match pairs {
        Pairs::Columns => Value::from_fn(None, vec![rows, columns * other_columns], |_, row, pair| {
            l.broadcast_at(0, row, pair / other_columns) * r.broadcast_at(0, row, pair % other_columns)
        }),
        Pairs::Rows => Value::from_fn(None, vec![rows * other_rows, columns], |_, pair, column| {
            l.broadcast_at(0, pair / other_rows, column) * r.broadcast_at(0, pair % other_rows, column)
        }),
    }
}

/// The sum of `value` over the pairs that a place of `like` is in. Along the axis that isn't paired, both are as long; where both
/// axes are, each pair is alone.
fn sum_pairs(side: Side, value: &Value, like: &Value) -> Result<Value, EvaluateError> {
    let ((rows, columns), (like_rows, like_columns)) = (value.rows_and_columns(), like.rows_and_columns());
    let along_columns = rows == like_rows;
    let (pairs, own) = if along_columns { (columns, like_columns) } else { (rows, like_rows) };
    let others = pairs / own.max(1);
    Value::from_fn(None, like.shape().to_vec(), |_, row, column| {
        let place = if along_columns { column } else { row };
        let pair = |other: usize| match side {
            Side::Left => place * others + other,
            Side::Right => other * own + place,
        };
        let at = |pair: usize| match along_columns {
            true => value.broadcast_at(0, row, pair),
            false => value.broadcast_at(0, pair, column),
        };
        (0..others).map(|other| at(pair(other))).sum()
    })
}

fn reduce_rank(reduce: Reduce, value: &Value) -> Result<Value, EvaluateError> {
    let rank = value.rank_extent().unwrap_or(1);
    let divisor = divisor(reduce, rank)?;
    Value::from_fn(None, value.shape().to_vec(), |_, row, column| {
        (0..rank).map(|layer| value.broadcast_at(layer, row, column)).sum::<f64>() / divisor
    })
}

/// What a reduction over `extent` values divides their sum by.
fn divisor(reduce: Reduce, extent: usize) -> Result<f64, EvaluateError> {
    match reduce {
        Reduce::Sum => Ok(1.0),
        Reduce::Mean if extent == 0 => Err(EvaluateError::EmptyMean),
        Reduce::Mean => Ok(extent as f64),
    }
}

/// φ of one number, in f64.
pub fn apply_activation(function: Activation, x: f64) -> f64 {
    match function {
        Activation::Identity => x,
        Activation::Relu if x.is_nan() => x,
        Activation::Relu => x.max(0.0),
        Activation::GeluErf => 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

/// φ' of one number, in f64. At 0, where `relu` has none, it is 0, as PyTorch has it.
pub fn activation_derivative(function: Activation, x: f64) -> f64 {
    match function {
        Activation::Identity => 1.0,
        _ if x.is_nan() => x,
        // Each goes to 0 on the left and to 1 on the right; the formulas give 0 · ∞ there.
        Activation::Relu => f64::from(x > 0.0),
        _ if x.is_infinite() => f64::from(x > 0.0),
        Activation::GeluErf => {
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            0.5 * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)) + x * density
        }
        Activation::GeluTanh => {
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let tanh = (root * (x + 0.044715 * x.powi(3))).tanh();
            let slope = 1.0 - tanh * tanh;
            // Where tanh is ±1 the cube of x may be infinite.
            let inner = if slope == 0.0 { 0.0 } else { slope * x * root * (1.0 + 3.0 * 0.044715 * x * x) };
            0.5 * (1.0 + tanh + inner)
        }
        Activation::Silu => {
            let sigmoid = 1.0 / (1.0 + (-x).exp());
            sigmoid * (1.0 + x * (1.0 - sigmoid))
        }
    }
}
