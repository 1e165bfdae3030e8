//! What each operation of the IR computes, one loop nest each.

use super::{EvaluateError, Value};
use crate::arena::Handle;
use crate::layer::{Activation, Node, Operator, Reduce};

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
        Node::Activation { function, value } => {
            let value = value_of(value)?;
            Value::from_fn(value.rank_extent(), value.shape().to_vec(), |rank, row, column| {
                apply_activation(function, value.broadcast_at(rank, row, column))
            })
        }
    }
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
