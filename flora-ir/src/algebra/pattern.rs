//! Matching one side of a rule against a place of an equation, and writing the other side in its stead.

use crate::arena::Handle;
use crate::layer::{Layer, Node, Operand, Operator, Role};
use crate::text::parse_pattern;
use crate::types::{Shape, TensorType};
use crate::verify::VerifiedLayer;

/// One side of a rule.
#[derive(Debug)]
pub(super) struct Pattern {
    layer: Layer,
    root: Handle<Node>,
    letters: Vec<Letter>,
}

/// What a letter of a rule stands for; the table is in [`rules`](mod@super::rules).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Letter {
    Unprojected,
    Stream,
    BaseWeight,
    WeightShaped,
    Matrix,
    Factor,
    NarrowMatrix,
    Transform,
    OtherMatrix,
    Scalar,
    Scale,
    RankScale,
    Residual,
    Other,
}

impl Letter {
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "x" => Letter::Unprojected,
            "y" | "z" => Letter::Stream,
            "w" => Letter::BaseWeight,
            "t" | "u" | "v" => Letter::WeightShaped,
            "a" | "b" | "c" | "d" => Letter::Matrix,
            "f" => Letter::Factor,
            "r" => Letter::NarrowMatrix,
            "k" => Letter::Transform,
            "g" => Letter::OtherMatrix,
            "s" => Letter::Scalar,
            "l" | "m" => Letter::Scale,
            "p" | "q" => Letter::RankScale,
            "e" => Letter::Residual,
            "n" | "o" => Letter::Other,
            _ => return None,
        })
    }
}

/// A verified equation, and for each node what the letters ask.
pub(super) struct Subject<'l> {
    pub(super) layer: &'l VerifiedLayer,
    reads_input: Vec<bool>,
    reads_residual: Vec<bool>,
    projected: Vec<bool>,
    sparse: Vec<bool>,
}

impl<'l> Subject<'l> {
    pub(super) fn new(layer: &'l VerifiedLayer) -> Self {
        let (mut reads_input, mut reads_residual) = (Vec::new(), Vec::new());
        let (mut projected, mut sparse) = (Vec::new(), Vec::new());
        let residual = layer.residual().map(Node::Operand);
        for (handle, node) in layer.layer().nodes.iter() {
            let reads = node.operands().any(|operand| reads_input[operand.index()]);
            let is_projection = reads && matches!(node, Node::MatMul { .. });
            projected.push(is_projection || node.operands().any(|operand| projected[operand.index()]));
            reads_input.push(reads || *node == Node::Operand(layer.input()));
            let reads = node.operands().any(|operand| reads_residual[operand.index()]);
            reads_residual.push(reads || Some(node) == residual.as_ref());
            let is_sparse = |node: Handle<Node>| sparse[node.index()];
            let is_sparse = match *node {
                Node::Operand(operand) => layer.layer().operands[operand].role == Role::Sparse,
                Node::Transpose(value) => is_sparse(value),
                Node::Elementwise { operator: Operator::Add, lhs, rhs } => is_sparse(lhs) && is_sparse(rhs),
                Node::Elementwise { operator: Operator::Multiply, lhs, rhs } => is_sparse(lhs) || is_sparse(rhs),
                Node::Elementwise { operator: Operator::Divide, lhs, .. } => is_sparse(lhs),
                _ => false,
            };
            // What is stacked over the rank, or no longer known when the adapter is loaded, is no matrix of its own.
            sparse.push(is_sparse && !reads_input[handle.index()] && layer.type_of(handle).rank_axis.is_none());
        }
        Self { layer, reads_input, reads_residual, projected, sparse }
    }

    pub(super) fn node(&self, node: Handle<Node>) -> &'l Node {
        &self.layer.layer().nodes[node]
    }

    /// Whether `node` depends on the input.
    pub(super) fn reads_input(&self, node: Handle<Node>) -> bool {
        self.reads_input[node.index()]
    }

    /// Whether `node` depends on the input through a matmul.
    pub(super) fn is_projected(&self, node: Handle<Node>) -> bool {
        self.projected[node.index()]
    }

    pub(super) fn is_base_weight(&self, node: Handle<Node>) -> bool {
        *self.node(node) == Node::Operand(self.layer.base_weight())
    }

    /// Whether `node` is a matrix known at load time whose zeros those of a sparse operand are.
    pub(super) fn is_sparse(&self, node: Handle<Node>) -> bool {
        self.sparse[node.index()]
    }

    /// Whether `node` is a square sparse matrix.
    pub(super) fn is_transform(&self, node: Handle<Node>) -> bool {
        self.is_sparse(node) && matches!(&self.layer.type_of(node).shape, Shape::Matrix(m, n) if m == n)
    }

    pub(super) fn is_residual(&self, node: Handle<Node>) -> bool {
        matches!(self.node(node), Node::Operand(operand) if Some(*operand) == self.layer.residual())
    }

    /// Whether `node` is a scalar or vector known at load time, without rank axis.
    pub(super) fn is_scale(&self, node: Handle<Node>) -> bool {
        self.accepts(Letter::Scale, node)
    }

    fn accepts(&self, letter: Letter, node: Handle<Node>) -> bool {
        let TensorType { shape, rank_axis, .. } = self.layer.type_of(node);
        let ranked = rank_axis.is_some();
        let is_matrix = matches!(shape, Shape::Matrix(..));
        let base_weight = &self.layer.layer().operands[self.layer.base_weight()].ty.shape;
        let reads = (self.reads_input(node), self.reads_residual[node.index()]);
        let may_read = match letter {
            Letter::Unprojected | Letter::Stream => reads.0,
            Letter::Residual => self.is_residual(node),
            Letter::Other => !reads.1,
            _ => reads == (false, false),
        };
        may_read
            && match letter {
                Letter::Unprojected => !self.is_projected(node),
                Letter::Stream => true,
                Letter::BaseWeight => self.is_base_weight(node),
                Letter::WeightShaped => !ranked && shape == base_weight,
                Letter::Matrix => !ranked && is_matrix,
                Letter::Factor => !ranked && is_matrix && !self.is_base_weight(node),
                Letter::NarrowMatrix => !ranked && is_matrix && shape != base_weight,
                Letter::Transform => self.is_transform(node),
                Letter::OtherMatrix => !ranked && is_matrix && !self.is_transform(node),
                Letter::Scalar => !ranked && *shape == Shape::Scalar,
                Letter::Scale => !ranked && !is_matrix,
                Letter::RankScale => ranked && !is_matrix,
                Letter::Residual | Letter::Other => true,
            }
    }
}

/// For each operand of a pattern the node that it stands for.
type Match = Vec<Option<Handle<Node>>>;

impl Pattern {
    /// `None` when `text` doesn't parse or holds a letter without meaning; a test reads the whole table.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let layer = parse_pattern(text).ok()?;
        let letters = layer.operands.iter().map(|(_, operand)| Letter::named(&operand.name)).collect::<Option<_>>()?;
        let root = layer.root?;
        Some(Self { layer, root, letters })
    }

    #[cfg(test)]
    pub(super) fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Every way in which the pattern is what `node` computes.
    pub(super) fn matches(&self, subject: &Subject<'_>, node: Handle<Node>) -> Vec<Match> {
        self.match_node(self.root, subject, node, vec![None; self.letters.len()])
    }

    fn match_node(&self, pattern: Handle<Node>, subject: &Subject<'_>, node: Handle<Node>, found: Match) -> Vec<Match> {
        let pair = |first: [Handle<Node>; 2], second: [Handle<Node>; 2]| -> Vec<Match> {
            let lhs = self.match_node(first[0], subject, first[1], found.clone());
            lhs.into_iter().flat_map(|found| self.match_node(second[0], subject, second[1], found)).collect()
        };
        match (&self.layer.nodes[pattern], subject.node(node)) {
            (Node::Operand(operand), _) => self.match_letter(*operand, subject, node, found),
            (Node::Constant(wanted), Node::Constant(number)) if wanted == number => vec![found],
            (Node::MatMul { lhs: l, rhs: r, reduce: wanted }, Node::MatMul { lhs, rhs, reduce })
                if wanted == reduce =>
            {
                pair([*l, *lhs], [*r, *rhs])
            }
            (Node::Elementwise { operator: wanted, lhs: l, rhs: r }, Node::Elementwise { operator, lhs, rhs })
                if wanted == operator =>
            {
                let mut all = pair([*l, *lhs], [*r, *rhs]);
                if operator.is_commutative() {
                    all.extend(pair([*l, *rhs], [*r, *lhs]));
                }
                all
            }
            (Node::PairProduct { pairs: wanted, lhs: l, rhs: r }, Node::PairProduct { pairs, lhs, rhs })
                if wanted == pairs =>
            {
                pair([*l, *lhs], [*r, *rhs])
            }
            (Node::Columns(p), Node::Columns(n)) | (Node::Rows(p), Node::Rows(n)) => {
                self.match_node(*p, subject, *n, found)
            }
            (Node::ReduceRank { reduce: wanted, value: p }, Node::ReduceRank { reduce, value }) if wanted == reduce => {
                self.match_node(*p, subject, *value, found)
            }
            (Node::Activation { function: wanted, value: p }, Node::Activation { function, value })
                if wanted == function =>
            {
                self.match_node(*p, subject, *value, found)
            }
            _ => Vec::new(),
        }
    }

    fn match_letter(
        &self,
        operand: Handle<Operand>,
        subject: &Subject<'_>,
        node: Handle<Node>,
        mut found: Match,
    ) -> Vec<Match> {
        let place = &mut found[operand.index()];
        let fits = match place {
            Some(known) => *known == node,
            None => subject.accepts(self.letters[operand.index()], node),
        };
        *place = Some(node);
        if fits { vec![found] } else { Vec::new() }
    }

    /// The node that the letter called `name` stands for.
    fn matched(&self, found: &Match, name: &str) -> Option<Handle<Node>> {
        let (operand, _) = self.layer.operands.iter().find(|(_, operand)| operand.name == name)?;
        found[operand.index()]
    }
}

/// The equation of `subject` with `to` in the place of `target`, wherever that is read, and the handle of the new value;
/// `None` when `to` holds a letter that `from` doesn't. Nodes that nothing reads are left behind.
pub(super) fn rewrite(
    subject: &Subject<'_>,
    target: Handle<Node>,
    from: &Pattern,
    found: &Match,
    to: &Pattern,
) -> Option<(Layer, Handle<Node>)> {
    let old = subject.layer.layer();
    let mut layer = Layer::new(old.name.clone());
    layer.operands = old.operands.clone();
    layer.operand_spans = old.operand_spans.clone();
    let mut copy = Copy { old, layer, copied: vec![None; old.nodes.len()] };

    let letters = to.layer.operands.iter().map(|(_, operand)| from.matched(found, &operand.name));
    let letters: Vec<_> = letters.map(|node| node.map(|node| copy.node(node))).collect::<Option<_>>()?;
    let span = old.node_span(target);
    let mut written: Vec<Handle<Node>> = Vec::new();
    for (_, node) in to.layer.nodes.iter() {
        written.push(match node {
            Node::Operand(letter) => letters[letter.index()],
            other => copy.layer.push(other.map_operands(|operand| written[operand.index()]), span),
        });
    }
    let value = written[to.root.index()];
    copy.copied[target.index()] = Some(value);
    let root = copy.node(subject.layer.root());
    copy.layer.root = Some(root);
    Some((copy.layer, value))
}

struct Copy<'l> {
    old: &'l Layer,
    layer: Layer,
    copied: Vec<Option<Handle<Node>>>,
}

impl Copy<'_> {
    /// Copies `node` and what it reads, once. The depth is bounded by the verifier's limit on nodes.
    fn node(&mut self, node: Handle<Node>) -> Handle<Node> {
        if let Some(copied) = self.copied[node.index()] {
            return copied;
        }
        let copied = self.old.nodes[node].map_operands(|operand| self.node(operand));
        let copied = self.layer.push(copied, self.old.node_span(node));
        self.copied[node.index()] = Some(copied);
        copied
    }
}
