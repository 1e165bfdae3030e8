//! The graph of one layer: the equation as its author wrote it, before anything is checked.

use crate::arena::{Arena, Handle};
use crate::types::{Scope, TensorType};

/// A stretch of the source that a mistake can be shown at: bytes of the text form, or token numbers of a macro's input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first byte or token.
    pub start: u32,
    /// One past the last byte or token.
    pub end: u32,
}

/// What an operand is to the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The activations, `[tokens, d]`.
    Input,
    /// The frozen weight W0, `[d, k]`.
    BaseWeight,
    /// A shared vector added to the output, `[k]`.
    Bias,
    /// A matrix, vector or scalar that each segment's adapter brings.
    Adapter,
    /// A matrix that each segment's adapter brings and that is mostly zeros: rows are multiplied by it entry by entry.
    Sparse,
    /// A row for each token, `[tokens, k]`, added to the finished output, after the activation.
    Residual,
}

impl Role {
    /// Whether each segment's adapter brings it.
    pub fn is_adapters(self) -> bool {
        match self {
            Role::Adapter | Role::Sparse => true,
            Role::Input | Role::BaseWeight | Role::Bias | Role::Residual => false,
        }
    }

    /// Whose it is: each segment's own, or the same for all.
    pub fn scope(self) -> Scope {
        if self.is_adapters() { Scope::PerSegment } else { Scope::Shared }
    }
}

/// A named argument of the layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Operand {
    /// The name in the source.
    pub name: String,
    /// What it is to the layer.
    pub role: Role,
    /// Its declared type.
    pub ty: TensorType,
}

/// How values over the rank axis, or the products of a matmul, are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reduce {
    /// Their sum.
    Sum,
    /// Their mean (the paper's `torch.mean`, §3.1).
    Mean,
}

/// An elementwise operator; a vector broadcasts over rows, a scalar over everything, both over the rank axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operator {
    /// `l + r`
    Add,
    /// `l * r`
    Multiply,
    /// `l / r`
    Divide,
}

impl Pairs {
    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            Pairs::Columns => "face_splitting",
            Pairs::Rows => "khatri_rao",
        }
    }
}

impl Operator {
    /// The sign in the text form.
    pub fn sign(self) -> &'static str {
        match self {
            Operator::Add => "+",
            Operator::Multiply => "*",
            Operator::Divide => "/",
        }
    }

    /// Whether the operands can be exchanged.
    pub fn is_commutative(self) -> bool {
        self != Operator::Divide
    }
}

/// What is paired in a [`Node::PairProduct`]; the pair of the lhs's p and the rhs's q is at p·s + q.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairs {
    /// `[d, r]`, `[d, s]` → `[d, r·s]`: the face-splitting product (the Khatri–Rao product of the transposed).
    Columns,
    /// `[r, k]`, `[s, k]` → `[r·s, k]`: the Khatri–Rao product.
    Rows,
}

/// One side of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// The first.
    Left,
    /// The second.
    Right,
}

/// φ of Eq. 2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x
    #[default]
    Identity,
    /// max(x, 0)
    Relu,
    /// x·Φ(x), by the error function
    GeluErf,
    /// x·Φ(x), by its tanh approximation
    GeluTanh,
    /// x·sigmoid(x)
    Silu,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Activation; 5] =
        [Activation::Identity, Activation::Relu, Activation::GeluErf, Activation::GeluTanh, Activation::Silu];

    /// The name in the text form.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Identity => "identity",
            Activation::Relu => "relu",
            Activation::GeluErf => "gelu_erf",
            Activation::GeluTanh => "gelu_tanh",
            Activation::Silu => "silu",
        }
    }
}

/// One operation; its operands are earlier nodes of the same arena.
#[derive(Clone, Debug, PartialEq)]
pub enum Node {
    /// The value of an operand.
    Operand(Handle<Operand>),
    /// A number that the equation itself holds.
    Constant(f64),
    /// `lhs @ rhs`: contracts the last dimension of `lhs` with the first of `rhs`; [`Reduce::Mean`] divides by its extent.
    /// A rank axis of either side is kept.
    MatMul {
        /// `[m, n]`
        lhs: Handle<Node>,
        /// `[n, p]`
        rhs: Handle<Node>,
        /// Sum, or mean over the contracted dimension.
        reduce: Reduce,
    },
    /// An elementwise operation with broadcast.
    Elementwise {
        /// The operator.
        operator: Operator,
        /// The left operand.
        lhs: Handle<Node>,
        /// The right operand.
        rhs: Handle<Node>,
    },
    /// `[d, r]` → r vectors `[d]` over the rank axis: the b_r of Eq. 5.
    Columns(Handle<Node>),
    /// `[r, k]` → r vectors `[k]` over the rank axis: the a_r of Eq. 5.
    Rows(Handle<Node>),
    /// Σ_r or mean_r: removes the rank axis.
    ReduceRank {
        /// Sum or mean.
        reduce: Reduce,
        /// A value with a rank axis.
        value: Handle<Node>,
    },
    /// `[d, k]` → `[k]`, the Euclidean norm of every column (DoRA's ‖·‖).
    ColumnNorm(Handle<Node>),
    /// `[m, n]` → `[n, m]`, of a value known when the adapter is loaded. A rank axis is kept.
    Transpose(Handle<Node>),
    /// The elementwise products of every pair of columns, or of every pair of rows, of two matrices known when the adapter is
    /// loaded: (b @ a) ∘ (d @ c) = face_splitting(b, d) @ khatri_rao(a, c) (Slyusar). So a Hadamard product of two matrices of
    /// ranks r and s is one of rank r·s.
    PairProduct {
        /// Columns or rows.
        pairs: Pairs,
        /// `[d, r]` or `[r, k]`
        lhs: Handle<Node>,
        /// `[d, s]` or `[s, k]`
        rhs: Handle<Node>,
    },
    /// φ(value), elementwise.
    Activation {
        /// φ
        function: Activation,
        /// `[tokens, k]`
        value: Handle<Node>,
    },
    /// What only the gradients of an equation need. The verifier refuses it in a layer.
    Backward(Backward),
}

/// An operation that occurs in gradients alone: what undoes a broadcast, a reduction or a `columns`.
#[derive(Clone, Debug, PartialEq)]
pub enum Backward {
    /// r vectors `[n]` over the rank axis → `[r, n]`: undoes [`Node::Rows`].
    Stack(Handle<Node>),
    /// `value` summed over everything that `like` doesn't have (rank axis, rows, elements): undoes a broadcast.
    SumLike {
        /// A value that `like` broadcasts to.
        value: Handle<Node>,
        /// A value of the type of the result.
        like: Handle<Node>,
    },
    /// `value` at every place of `like`: undoes a sum.
    BroadcastLike {
        /// A value that broadcasts to `like`.
        value: Handle<Node>,
        /// A value of the type of the result.
        like: Handle<Node>,
    },
    /// `value` summed over all pairs that one column or row of `like` is in: undoes one side of a [`Node::PairProduct`].
    SumPairs {
        /// Which side of the pairs `like` is.
        side: Side,
        /// `[d, r·s]` or `[r·s, k]`
        value: Handle<Node>,
        /// A value of the type of the result.
        like: Handle<Node>,
    },
    /// How many values a mean is over, as a scalar.
    Extent {
        /// Of which axis.
        axis: Axis,
        /// The value with that axis.
        value: Handle<Node>,
    },
    /// φ'(value), elementwise.
    Derivative {
        /// φ
        function: Activation,
        /// What φ was applied to.
        value: Handle<Node>,
    },
}

/// An axis that is averaged over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// The rank axis.
    Rank,
    /// The last dimension.
    Columns,
}

impl Backward {
    fn operands(&self) -> (Handle<Node>, Option<Handle<Node>>) {
        match *self {
            Backward::SumLike { value, like }
            | Backward::BroadcastLike { value, like }
            | Backward::SumPairs { value, like, .. } => (value, Some(like)),
            Backward::Stack(value) | Backward::Extent { value, .. } | Backward::Derivative { value, .. } => {
                (value, None)
            }
        }
    }

    fn map_operands(&self, mut f: impl FnMut(Handle<Node>) -> Handle<Node>) -> Backward {
        match *self {
            Backward::Stack(value) => Backward::Stack(f(value)),
            Backward::SumLike { value, like } => Backward::SumLike { value: f(value), like: f(like) },
            Backward::BroadcastLike { value, like } => Backward::BroadcastLike { value: f(value), like: f(like) },
            Backward::SumPairs { side, value, like } => Backward::SumPairs { side, value: f(value), like: f(like) },
            Backward::Extent { axis, value } => Backward::Extent { axis, value: f(value) },
            Backward::Derivative { function, value } => Backward::Derivative { function, value: f(value) },
        }
    }
}

impl Node {
    /// The nodes this one reads, in the order of the source.
    pub fn operands(&self) -> impl Iterator<Item = Handle<Node>> + use<> {
        let (first, second) = match *self {
            Node::Operand(_) | Node::Constant(_) => (None, None),
            Node::MatMul { lhs, rhs, .. } | Node::Elementwise { lhs, rhs, .. } | Node::PairProduct { lhs, rhs, .. } => {
                (Some(lhs), Some(rhs))
            }
            Node::Columns(value) | Node::Rows(value) | Node::ColumnNorm(value) => (Some(value), None),
            Node::Transpose(value) | Node::ReduceRank { value, .. } | Node::Activation { value, .. } => {
                (Some(value), None)
            }
            Node::Backward(ref backward) => {
                let (first, second) = backward.operands();
                (Some(first), second)
            }
        };
        first.into_iter().chain(second)
    }

    /// The same operation on other nodes: `f` is called once for each operand, in order.
    pub fn map_operands(&self, mut f: impl FnMut(Handle<Node>) -> Handle<Node>) -> Node {
        match *self {
            Node::Operand(operand) => Node::Operand(operand),
            Node::Constant(number) => Node::Constant(number),
            Node::MatMul { lhs, rhs, reduce } => Node::MatMul { lhs: f(lhs), rhs: f(rhs), reduce },
            Node::Elementwise { operator, lhs, rhs } => Node::Elementwise { operator, lhs: f(lhs), rhs: f(rhs) },
            Node::PairProduct { pairs, lhs, rhs } => Node::PairProduct { pairs, lhs: f(lhs), rhs: f(rhs) },
            Node::Columns(value) => Node::Columns(f(value)),
            Node::Rows(value) => Node::Rows(f(value)),
            Node::ReduceRank { reduce, value } => Node::ReduceRank { reduce, value: f(value) },
            Node::ColumnNorm(value) => Node::ColumnNorm(f(value)),
            Node::Transpose(value) => Node::Transpose(f(value)),
            Node::Activation { function, value } => Node::Activation { function, value: f(value) },
            Node::Backward(ref backward) => Node::Backward(backward.map_operands(f)),
        }
    }
}

/// An equation: operands, nodes, and the node that is the output. Not verified; see [`verify`](crate::verify::verify).
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// The layer's name.
    pub name: String,
    /// The arguments, in the order of the source.
    pub operands: Arena<Operand>,
    /// The operations, operands before users.
    pub nodes: Arena<Node>,
    /// The output, `[tokens, k]`.
    pub root: Option<Handle<Node>>,
    /// Where each operand was declared, by handle.
    pub operand_spans: Vec<Span>,
    /// Where each node was written, by handle.
    pub node_spans: Vec<Span>,
}

impl Layer {
    /// A layer without operands or nodes.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            operands: Arena::default(),
            nodes: Arena::default(),
            root: None,
            operand_spans: Vec::new(),
            node_spans: Vec::new(),
        }
    }

    /// Declares an operand.
    pub fn declare(&mut self, operand: Operand, span: Span) -> Handle<Operand> {
        self.operand_spans.push(span);
        self.operands.push(operand)
    }

    /// Appends a node.
    pub fn push(&mut self, node: Node, span: Span) -> Handle<Node> {
        self.node_spans.push(span);
        self.nodes.push(node)
    }

    /// Where `operand` was declared; the empty span when that was not recorded.
    pub fn operand_span(&self, operand: Handle<Operand>) -> Span {
        self.operand_spans.get(operand.index()).copied().unwrap_or_default()
    }

    /// Where `node` was written; the empty span when that was not recorded.
    pub fn node_span(&self, node: Handle<Node>) -> Span {
        self.node_spans.get(node.index()).copied().unwrap_or_default()
    }

    /// For each node, whether `node` reads it, directly or not (`node` itself included). Handles that don't exist or point
    /// forward are passed over.
    pub fn reachable_from(&self, node: Handle<Node>) -> Vec<bool> {
        let mut reachable = vec![false; self.nodes.len()];
        if let Some(first) = reachable.get_mut(node.index()) {
            *first = true;
        }
        for (user, operation) in self.nodes.iter().rev() {
            if reachable[user.index()] {
                for operand in operation.operands().filter(|operand| *operand < user) {
                    reachable[operand.index()] = true;
                }
            }
        }
        reachable
    }

    /// Whether the value of `node` depends on `operand`.
    pub fn depends_on(&self, node: Handle<Node>, operand: Handle<Operand>) -> bool {
        let reachable = self.reachable_from(node);
        self.nodes.iter().any(|(handle, node)| reachable[handle.index()] && *node == Node::Operand(operand))
    }
}
