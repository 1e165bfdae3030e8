//! The type of one operation from the types of what it reads: the typing rules of the IR, and what breaks each of them.

use crate::arena::Handle;
use crate::layer::{Backward, Layer, Node, Operator, Pairs};
use crate::types::{Dimension, ElementType, Scope, Shape, TensorType};

/// A broken typing rule, before it is given a place.
pub(crate) struct Mistake {
    pub(crate) message: String,
    pub(crate) help: String,
}

fn mistake<T>(message: impl Into<String>, help: impl Into<String>) -> Result<T, Mistake> {
    Err(Mistake { message: message.into(), help: help.into() })
}

/// Why `node` would mix the rows of different requests, or make a column of them. Gradients alone do so: they sum over the rows
/// of one segment.
pub(crate) fn mixes_rows<'t>(node: &Node, type_of: impl Fn(Handle<Node>) -> &'t TensorType) -> Option<Mistake> {
    let has_rows = |node| matches!(type_of(node).shape, Shape::Matrix(Dimension::Tokens, _));
    let has_columns = |node| matches!(type_of(node).shape, Shape::Matrix(_, Dimension::Tokens));
    let adapter_matrix = |operation: &str| format!("take {operation} of an adapter matrix");
    let (message, help) = match *node {
        Node::MatMul { lhs, rhs, .. } if has_columns(lhs) && has_rows(rhs) => (
            "a matmul over the tokens would mix the rows of different requests",
            "contract over the dimensions of the weight or the rank".to_owned(),
        ),
        Node::ColumnNorm(value) if has_rows(value) => (
            "a norm over the tokens would mix the rows of different requests",
            "take the norm of a weight, such as column_norm(w0 + b @ a)".to_owned(),
        ),
        Node::Columns(value) if (has_rows(value) || has_columns(value)) && type_of(value).rank_axis.is_none() => (
            "columns would make the tokens a vector, and rows of different requests would mix",
            adapter_matrix("columns"),
        ),
        Node::Rows(value) if (has_rows(value) || has_columns(value)) && type_of(value).rank_axis.is_none() => {
            ("rows would make the tokens a vector, and rows of different requests would mix", adapter_matrix("rows"))
        }
        Node::Transpose(value) if has_rows(value) || has_columns(value) => {
            ("transpose would make columns of the tokens", "transpose an adapter matrix".to_owned())
        }
        _ => return None,
    };
    Some(Mistake { message: message.to_owned(), help })
}

/// The type of `node`, given the type of every node that it reads.
pub(crate) fn infer<'t>(
    layer: &Layer,
    node: &Node,
    type_of: impl Fn(Handle<Node>) -> &'t TensorType,
) -> Result<TensorType, Mistake> {
    match *node {
        Node::Operand(operand) => match layer.operands.get(operand) {
            Some(operand) => Ok(operand.ty.clone()),
            None => mistake(
                format!("operand {operand:?} does not exist"),
                "declare the operand in this layer before it is used; a handle of another layer can't be",
            ),
        },
        Node::Constant(number) if !number.is_finite() => {
            mistake(format!("the constant {number} is not a finite number"), "write a finite number")
        }
        Node::Constant(_) => {
            Ok(TensorType { shape: Shape::Scalar, rank_axis: None, element: ElementType::F32, scope: Scope::Shared })
        }
        Node::MatMul { lhs, rhs, .. } => {
            let (l, r) = (type_of(lhs), type_of(rhs));
            Ok(TensorType { shape: matmul(l, r)?, ..combined(layer, lhs, l, rhs, r)? })
        }
        Node::Elementwise { operator, lhs, rhs } => {
            let (l, r) = (type_of(lhs), type_of(rhs));
            Ok(TensorType { shape: broadcast(operator, l, r)?, ..combined(layer, lhs, l, rhs, r)? })
        }
        Node::Columns(value) => {
            let (m, n) = split(type_of(value), "columns")?;
            with_rank_axis(type_of(value), m, n)
        }
        Node::Rows(value) => {
            let (m, n) = split(type_of(value), "rows")?;
            with_rank_axis(type_of(value), n, m)
        }
        Node::ReduceRank { value, .. } => {
            let ty = type_of(value);
            if ty.rank_axis.is_none() {
                return mistake(
                    format!("{ty} has no rank axis to reduce"),
                    "reduce a value that is made of columns(b) or rows(a)",
                );
            }
            Ok(TensorType { rank_axis: None, ..ty.clone() })
        }
        Node::ColumnNorm(value) => {
            let ty = type_of(value);
            match &ty.shape {
                Shape::Matrix(_, columns) => Ok(TensorType { shape: Shape::Vector(columns.clone()), ..ty.clone() }),
                other => mistake(
                    format!("column_norm needs a matrix, this is {other}"),
                    "take the norm of a weight, such as column_norm(w0 + b @ a)",
                ),
            }
        }
        Node::Transpose(value) => {
            let ty = type_of(value);
            match &ty.shape {
                Shape::Matrix(m, n) => Ok(TensorType { shape: Shape::Matrix(n.clone(), m.clone()), ..ty.clone() }),
                other => mistake(format!("transpose needs a matrix, this is {other}"), "leave vectors as they are"),
            }
        }
        Node::PairProduct { pairs, lhs, rhs } => {
            let (l, r) = (type_of(lhs), type_of(rhs));
            Ok(TensorType { shape: pair_product(pairs, l, r)?, ..combined(layer, lhs, l, rhs, r)? })
        }
        Node::Activation { value, .. } => Ok(type_of(value).clone()),
        Node::Backward(ref backward) => infer_backward(backward, type_of),
    }
}

/// What an operation of gradients gives.
fn infer_backward<'t>(
    backward: &Backward,
    type_of: impl Fn(Handle<Node>) -> &'t TensorType,
) -> Result<TensorType, Mistake> {
    match *backward {
        Backward::Stack(value) => match type_of(value) {
            TensorType { shape: Shape::Vector(n), rank_axis: Some(rank), element, scope } => Ok(TensorType {
                shape: Shape::Matrix(rank.clone(), n.clone()),
                rank_axis: None,
                element: *element,
                scope: *scope,
            }),
            other => mistake(format!("stack needs vectors over a rank axis, this is {other}"), "stack a gradient"),
        },
        Backward::SumLike { value: wide, like: narrow } | Backward::BroadcastLike { value: narrow, like: wide } => {
            let (wide, narrow) = (type_of(wide), type_of(narrow));
            let fits = broadcast(Operator::Multiply, wide, narrow).is_ok_and(|shape| shape == wide.shape)
                && (narrow.rank_axis.is_none() || narrow.rank_axis == wide.rank_axis);
            if !fits {
                return mistake(format!("{narrow} does not broadcast to {wide}"), "sum over axes that are there");
            }
            Ok(if matches!(backward, Backward::SumLike { .. }) { narrow.clone() } else { wide.clone() })
        }
        Backward::SumPairs { value, like, .. } => {
            let (value, like) = (type_of(value), type_of(like));
            let (Shape::Matrix(rows, columns), Shape::Matrix(m, n)) = (&value.shape, &like.shape) else {
                return mistake(
                    format!("{value} and {like} are no matrices of pairs"),
                    "sum over pairs that are there",
                );
            };
            if (rows == m) == (columns == n) {
                return mistake(format!("{value} has no pairs of {like}"), "sum over pairs that are there");
            }
            Ok(like.clone())
        }
        Backward::Extent { value, .. } => {
            Ok(TensorType { shape: Shape::Scalar, rank_axis: None, ..type_of(value).clone() })
        }
        Backward::Derivative { value, .. } => Ok(type_of(value).clone()),
    }
}

/// `[m, n] @ [n, p]`
fn matmul(l: &TensorType, r: &TensorType) -> Result<Shape, Mistake> {
    let (Shape::Matrix(m, n), Shape::Matrix(o, p)) = (&l.shape, &r.shape) else {
        let (side, other) = if matches!(l.shape, Shape::Matrix(..)) { ("right", r) } else { ("left", l) };
        return mistake(
            format!("the {side} side of a matmul must be a matrix, this is {other}"),
            "use `*` to scale by a vector or a scalar",
        );
    };
    if n != o {
        let help = if p == m {
            "the sides meet the other way round: exchange them".to_owned()
        } else if m == o {
            format!("the left side would have to be transposed: declare it [{n}, {m}]")
        } else if n == p {
            format!("the right side would have to be transposed: declare it [{p}, {o}]")
        } else {
            format!("the last dimension of the left side and the first of the right must be the same: {n} is not {o}")
        };
        return mistake(format!("{l} @ {r} does not meet: it would contract {n} with {o}"), help);
    }
    Ok(Shape::Matrix(m.clone(), p.clone()))
}

/// `[d, r]` and `[d, s]` → `[d, r·s]`, or `[r, k]` and `[s, k]` → `[r·s, k]`
fn pair_product(pairs: Pairs, l: &TensorType, r: &TensorType) -> Result<Shape, Mistake> {
    let name = pairs.name();
    let shapes = (&l.shape, &r.shape, l.rank_axis.is_some() || r.rank_axis.is_some());
    let (Shape::Matrix(m, n), Shape::Matrix(o, p), false) = shapes else {
        return mistake(format!("{name} needs two matrices, these are {l} and {r}"), "take it of two adapter matrices");
    };
    if [m, n, o, p].contains(&&Dimension::Tokens) {
        return mistake(format!("{name} would pair rows of the batch"), "take it of two adapter matrices");
    }
    let pair = |first: &Dimension, second: &Dimension| Dimension::Product(first.clone().into(), second.clone().into());
    match pairs {
        Pairs::Columns if m == o => Ok(Shape::Matrix(m.clone(), pair(n, p))),
        Pairs::Rows if n == p => Ok(Shape::Matrix(pair(m, o), n.clone())),
        Pairs::Columns => mistake(format!("{name} needs as many rows: {m} is not {o}"), "pair columns of one length"),
        Pairs::Rows => mistake(format!("{name} needs as many columns: {n} is not {p}"), "pair rows of one length"),
    }
}

/// Elementwise: a scalar goes with everything, a vector with every row of a matrix.
fn broadcast(operator: Operator, l: &TensorType, r: &TensorType) -> Result<Shape, Mistake> {
    let sign = operator.sign();
    match (&l.shape, &r.shape) {
        (Shape::Scalar, other) | (other, Shape::Scalar) => Ok(other.clone()),
        (l, r) if l == r => Ok(l.clone()),
        (Shape::Vector(n), matrix @ Shape::Matrix(_, columns))
        | (matrix @ Shape::Matrix(_, columns), Shape::Vector(n))
            if n == columns =>
        {
            Ok(matrix.clone())
        }
        (Shape::Vector(n), Shape::Matrix(rows, columns)) | (Shape::Matrix(rows, columns), Shape::Vector(n)) => {
            let help = if n == rows {
                format!(
                    "a vector scales the last dimension, {columns}; to scale the rows of a weight, scale the input: (v * x) @ w0"
                )
            } else {
                format!("the vector must be as long as the matrix is wide: {n} is not {columns}")
            };
            mistake(format!("the shapes of {l} {sign} {r} don't broadcast"), help)
        }
        _ => mistake(
            format!("the shapes of {l} {sign} {r} don't broadcast"),
            "both sides must have the same dimensions, or one be a vector or a scalar that broadcasts over the other",
        ),
    }
}

/// What two values have in common besides their shape: one rank axis, the wider element type, the narrower scope.
fn combined(
    layer: &Layer,
    lhs: Handle<Node>,
    l: &TensorType,
    rhs: Handle<Node>,
    r: &TensorType,
) -> Result<TensorType, Mistake> {
    if let (Some(one), Some(other)) = (&l.rank_axis, &r.rank_axis)
        && one != other
    {
        return mistake(
            format!("two different rank axes meet: {one} and {other}"),
            "reduce one of them first, or give both adapters the same rank dimension",
        );
    }
    // A number in the equation has no element type of its own.
    let is_constant = |node| matches!(layer.nodes.get(node), Some(Node::Constant(_)));
    let element = match (is_constant(lhs), is_constant(rhs)) {
        (true, false) => r.element,
        (false, true) => l.element,
        _ => l.element.join(r.element),
    };
    Ok(TensorType {
        shape: Shape::Scalar,
        rank_axis: l.rank_axis.clone().or_else(|| r.rank_axis.clone()),
        element,
        scope: l.scope.max(r.scope),
    })
}

/// The dimensions of a matrix that `columns` or `rows` takes apart.
fn split<'t>(ty: &'t TensorType, operation: &str) -> Result<(&'t Dimension, &'t Dimension), Mistake> {
    match (&ty.shape, &ty.rank_axis) {
        (_, Some(_)) => mistake(
            format!("{operation} of a value that already has a rank axis, {ty}"),
            "reduce the rank axis first, with sum_rank or mean_rank",
        ),
        (Shape::Matrix(m, n), None) => Ok((m, n)),
        (other, None) => mistake(
            format!("{operation} needs a matrix, this is {other}"),
            format!("take {operation} of an adapter matrix, such as b: adapter[D, R]"),
        ),
    }
}

fn with_rank_axis(ty: &TensorType, extent: &Dimension, rank: &Dimension) -> Result<TensorType, Mistake> {
    Ok(TensorType { shape: Shape::Vector(extent.clone()), rank_axis: Some(rank.clone()), ..ty.clone() })
}
