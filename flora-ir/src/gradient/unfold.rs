//! From the gradients of folded vectors back to those of what the user wrote: scales, means, factors. Folding is written as nodes
//! of the equation's graph, so that reverse mode takes it back, with the same rules as everything else.

use super::folded::{FoldedGradient, RankOneGradient, VirtualRowGradient};
use super::graph::Graph;
use super::operands::OperandGradients;
use super::reverse::reverse;
use crate::algebra::{FoldError, Folding, NormalForm, Pair, Term};
use crate::arena::Handle;
use crate::evaluate::{Bindings, Value};
use crate::layer::{Axis, Backward, Node, Operator, Reduce};
use crate::types::{Dimension, ElementType, Scope, Shape, TensorType};

/// How the gradients of an equation's folded vectors become those of its adapter's operands. It follows from the equation alone.
#[derive(Clone, Debug)]
pub struct Unfolding {
    vectors: Vec<FoldedVectors>,
    /// Where the layer's adapters add a vector to the sum.
    offset: Option<Seed>,
    /// Whether they multiply by sparse matrices, whose gradients nobody computes.
    is_sparse: bool,
    operands: OperandGradients,
    layer: String,
}

/// A run of folded vectors that one part of the equation gives.
#[derive(Clone, Debug)]
struct FoldedVectors {
    /// One for each rank of this dimension, or a single one.
    rank: Option<Dimension>,
    /// Whether they are the low-rank part's, not virtual rows'.
    is_low_rank: bool,
    /// In-scales or shrink vectors, where there are some.
    input: Option<Seed>,
    /// Out-scales or expand vectors, where there are some.
    output: Option<Seed>,
}

/// The operand of the graph that holds the gradients of a run's vectors.
#[derive(Clone, Debug)]
struct Seed {
    name: String,
    /// The vectors' length.
    dimension: Dimension,
}

impl NormalForm {
    /// How the gradients of [`fold`](Self::fold)'s vectors become those of the adapter's operands.
    pub fn unfolding(&self) -> Unfolding {
        let mut unfold = Unfold { linear: self, graph: Graph::of(&self.layer), seeds: Vec::new() };
        let vectors = self.foldings().iter().filter_map(|folding| unfold.vectors(folding)).collect();
        let offset = unfold.offset();
        let Unfold { mut graph, seeds, .. } = unfold;
        let reversed = reverse(&mut graph, &seeds, |operand| operand.role.is_adapters());
        let own = self.layer.layer().operands.iter().filter(|(_, operand)| operand.role.is_adapters());
        let operands = OperandGradients::new(graph, &reversed, own.map(|(operand, _)| operand));
        Unfolding { vectors, offset, is_sparse: self.is_sparse(), operands, layer: self.layer.layer().name.clone() }
    }
}

/// One run of [`NormalForm::unfolding`].
struct Unfold<'a> {
    linear: &'a NormalForm,
    graph: Graph,
    /// Values and their gradients.
    seeds: Vec<(Handle<Node>, Handle<Node>)>,
}

impl Unfold<'_> {
    /// `None` where there are none that have gradients.
    fn vectors(&mut self, folding: &Folding<'_>) -> Option<FoldedVectors> {
        Some(match folding {
            Folding::SharedRow { terms, out_scale } => {
                let output = out_scale.then(|| {
                    let scales: Vec<_> = terms.iter().map(|term| self.product([term.inner, term.outer])).collect();
                    let sum = scales.into_iter().reduce(|sum, scale| self.graph.binary(Operator::Add, sum, scale));
                    sum.unwrap_or_else(|| self.graph.push(Node::Constant(0.0)))
                });
                self.run(None, false, None, output)
            }
            Folding::ScaledRow { term: Term { inner, outer, .. }, out_scale } => {
                let (input, output) = match out_scale {
                    true => (self.product([*inner]), *outer),
                    false => (self.product([*inner, *outer]), None),
                };
                self.run(None, false, Some(input), output)
            }
            Folding::RankRows { term, pair } => self.rank_one_pairs(term, *pair, false),
            Folding::LowRank { term, pair } => self.rank_one_pairs(term, *pair, true),
            Folding::Transformed { .. } | Folding::Sparse { .. } => return None,
        })
    }

    /// (inner ∘ b_r, outer ∘ a_r) for each r; a mean's 1/r goes to the second.
    fn rank_one_pairs(&mut self, term: &Term, Pair { b, a, reduce }: Pair, is_low_rank: bool) -> FoldedVectors {
        let (columns, rows) = (self.graph.push(Node::Columns(b)), self.graph.push(Node::Rows(a)));
        let input = self.product([term.inner, Some(columns)]);
        let mut output = self.product([term.outer, Some(rows)]);
        if reduce == Reduce::Mean {
            let ranks = self.graph.push(Node::Backward(Backward::Extent { axis: Axis::Rank, value: rows }));
            output = self.graph.binary(Operator::Divide, output, ranks);
        }
        let rank = match &self.linear.layer.type_of(b).shape {
            Shape::Matrix(_, rank) => Some(rank.clone()),
            _ => None,
        };
        self.run(rank, is_low_rank, Some(input), Some(output))
    }

    /// The gradient of the sum is that of every vector and number in it.
    fn offset(&mut self) -> Option<Seed> {
        if self.linear.offset.is_empty() {
            return None;
        }
        let Shape::Matrix(_, k) = &self.linear.layer.type_of(self.linear.layer.root()).shape else { return None };
        let ty = TensorType {
            shape: Shape::Vector(k.clone()),
            rank_axis: None,
            element: ElementType::F32,
            scope: Scope::PerSegment,
        };
        let (name, gradient) = self.graph.declare("d_offset", ty);
        self.seeds.extend(self.linear.offset.iter().map(|node| (*node, gradient)));
        Some(Seed { name, dimension: k.clone() })
    }

    /// The product of the scales that are there; 1 where none is.
    fn product<const N: usize>(&mut self, scales: [Option<Handle<Node>>; N]) -> Handle<Node> {
        let product = scales.into_iter().flatten().reduce(|l, r| self.graph.binary(Operator::Multiply, l, r));
        product.unwrap_or_else(|| self.graph.push(Node::Constant(1.0)))
    }

    fn run(
        &mut self,
        rank: Option<Dimension>,
        is_low_rank: bool,
        input: Option<Handle<Node>>,
        output: Option<Handle<Node>>,
    ) -> FoldedVectors {
        let names = if is_low_rank { ["d_shrink", "d_expand"] } else { ["d_in", "d_out"] };
        let mut seed = |value: Option<Handle<Node>>, name: &str, dimension: &Dimension| {
            let value = value?;
            let ty = TensorType {
                shape: Shape::Vector(dimension.clone()),
                rank_axis: rank.clone(),
                element: ElementType::F32,
                scope: Scope::PerSegment,
            };
            let (name, gradient) = self.graph.declare(name, ty);
            self.seeds.push((value, gradient));
            Some(Seed { name, dimension: dimension.clone() })
        };
        let (input, output) = match &self.linear.layer.layer().operands[self.linear.base_weight].ty.shape {
            Shape::Matrix(d, k) => (seed(input, names[0], d), seed(output, names[1], k)),
            _ => (None, None),
        };
        FoldedVectors { rank, is_low_rank, input, output }
    }
}

impl Unfolding {
    /// ∂L/∂ of each of the adapter's operands, by name. `bindings` holds what [`NormalForm::fold`] was given; `folded` has the
    /// gradients of what it gave. A norm is taken as a constant, and an operand that norms alone read has a gradient of zeros.
    ///
    /// # Errors
    /// A missing tensor, extents that disagree, or gradients of another layout or length than the adapter's vectors; a layer whose
    /// adapters add a vector to the output.
    pub fn unfold(&self, bindings: &Bindings, folded: &FoldedGradient) -> Result<Bindings, FoldError> {
        self.unfold_with_offset(bindings, folded, None)
    }

    /// [`unfold`](Self::unfold), for a layer whose adapters add a vector to the output: `offset` is the gradient of that vector,
    /// `[k]`, the sum of g over the rows.
    ///
    /// # Errors
    /// As [`unfold`](Self::unfold); the vector's gradient where there is none, or none where there is one; a layer whose adapters
    /// multiply by sparse matrices.
    pub fn unfold_with_offset(
        &self,
        bindings: &Bindings,
        folded: &FoldedGradient,
        offset: Option<&[f64]>,
    ) -> Result<Bindings, FoldError> {
        if self.is_sparse {
            return Err(FoldError::SparseGradient { layer: self.layer.clone() });
        }
        let extents = bindings.extents(self.operands.graph_operands())?;
        let extent = |dimension: &Dimension| {
            extents.get(dimension).ok_or_else(|| FoldError::UnknownExtent { dimension: dimension.clone() })
        };
        let mut bindings = bindings.clone();
        let mut rows = folded.virtual_rows.iter();
        let mut pairs = folded.low_rank.iter();
        for vectors in &self.vectors {
            let rank = vectors.rank.as_ref().map(extent).transpose()?;
            let count = rank.unwrap_or(1);
            let (inputs, outputs): (Vec<_>, Vec<_>) = match vectors.is_low_rank {
                false => rows.by_ref().take(count).map(VirtualRowGradient::vectors).unzip(),
                true => pairs.by_ref().take(count).map(RankOneGradient::vectors).unzip(),
            };
            for (found, seed) in [(inputs, &vectors.input), (outputs, &vectors.output)] {
                let found: Vec<&[f64]> = found.into_iter().flatten().collect();
                let Some(Seed { name, dimension }) = seed else {
                    check("the gradients of folded vectors", found.len(), 0)?;
                    continue;
                };
                check("the gradients of folded vectors", found.len(), count)?;
                let length = extent(dimension)?;
                found.iter().try_for_each(|vector| check("a folded vector's gradient", vector.len(), length))?;
                bindings.insert(name.clone(), Value::new(rank, vec![length], found.concat())?);
            }
        }
        match (&self.offset, offset) {
            (None, given) => check("the gradient of a vector that is added", given.map_or(0, <[f64]>::len), 0)?,
            (Some(_), None) => return Err(FoldError::Offset { layer: self.layer.clone() }),
            (Some(Seed { name, dimension }), Some(given)) => {
                check("the gradient of a vector that is added", given.len(), extent(dimension)?)?;
                bindings.insert(name.clone(), Value::vector(given.to_vec()));
            }
        }
        check("the gradients of folded vectors beyond the adapter's", rows.len() + pairs.len(), 0)?;
        Ok(self.operands.evaluate(&bindings)?)
    }
}

impl VirtualRowGradient {
    fn vectors(&self) -> (Option<&[f64]>, Option<&[f64]>) {
        (self.in_scale.as_deref(), self.out_scale.as_deref())
    }
}

impl RankOneGradient {
    fn vectors(&self) -> (Option<&[f64]>, Option<&[f64]>) {
        (Some(&self.shrink), Some(&self.expand))
    }
}

fn check(what: &'static str, found: usize, expected: usize) -> Result<(), FoldError> {
    match found == expected {
        true => Ok(()),
        false => Err(FoldError::WrongShape { what, found: vec![found], expected: vec![expected] }),
    }
}
