//! What a value of the IR is: its symbolic shape, its element type, and whether every segment of a batch brings its own.

use std::fmt;

/// One symbolic extent of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dimension {
    /// The rows of the batch (t in the paper's notation, b·l flattened).
    Tokens,
    /// A named extent such as `D`, `K` or `R`; two dimensions are the same when their names are.
    Symbol(String),
    /// A known extent.
    Fixed(u64),
    /// A pair of one of the first and one of the second, the first outermost. Only what is computed has it, no operand.
    Product(Box<Dimension>, Box<Dimension>),
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dimension::Tokens => f.write_str("tokens"),
            Dimension::Symbol(name) => f.write_str(name),
            Dimension::Fixed(extent) => write!(f, "{extent}"),
            Dimension::Product(first, second) => write!(f, "{first}·{second}"),
        }
    }
}

/// The extents of a value, its rank axis (see [`TensorType::rank_axis`]) not counted.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// One number.
    Scalar,
    /// `[n]`, which broadcasts over the rows of a matrix.
    Vector(Dimension),
    /// `[m, n]`, row-major.
    Matrix(Dimension, Dimension),
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Shape::Scalar => f.write_str("[]"),
            Shape::Vector(n) => write!(f, "[{n}]"),
            Shape::Matrix(m, n) => write!(f, "[{m}, {n}]"),
        }
    }
}

/// The element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ElementType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    BF16,
}

impl ElementType {
    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            ElementType::F32 => "f32",
            ElementType::F16 => "f16",
            ElementType::BF16 => "bf16",
        }
    }

    /// The type whose values hold those of both: itself when they agree, [`ElementType::F32`] otherwise.
    pub fn join(self, other: ElementType) -> ElementType {
        if self == other { self } else { ElementType::F32 }
    }
}

/// Whether a value is the same for the whole batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The same whatever the adapters: base weight, bias and constants, one value for all rows, and the input and the
    /// residual, which have a row for each token.
    Shared,
    /// Every segment brings its own: adapters, and everything computed from them.
    PerSegment,
}

/// The type of a value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TensorType {
    /// The extents.
    pub shape: Shape,
    /// A leading axis over the rank, as in Eq. 5's Σ_r: the value is a stack of `shape`s, one per rank, until
    /// [`Node::ReduceRank`](crate::Node::ReduceRank) sums it.
    pub rank_axis: Option<Dimension>,
    /// The element type.
    pub element: ElementType,
    /// Shared or per segment.
    pub scope: Scope,
}

impl fmt::Display for TensorType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.shape)?;
        if let Some(rank) = &self.rank_axis {
            write!(f, " for each of {rank}")?;
        }
        Ok(())
    }
}
