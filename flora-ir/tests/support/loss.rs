//! A loss of a layer's output, and its gradients by central differences of the oracle.

use flora_ir::{
    Activation, Bindings, Dimension, Handle, Layer, Node, Operand, Role, Scope, Shape, Span, TensorType, Value,
    VerifiedLayer, evaluate, evaluate_root, verify,
};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use super::{bindings, extent};

/// Half an ulp of f64.
pub(crate) const ROUNDING: f64 = 1.0 / (1u64 << 53) as f64;

/// The step of the differences, far above the rounding of an operand.
const STEP: f64 = 1.0 / (1 << 15) as f64;

/// The numbers of `support::bindings` are at least 0.5, and no equation here has a higher degree in one of them than 8. So the
/// summands of a gradient are at most 16 times as large as those of what it is the gradient of.
pub(crate) const DEGREE: f64 = 16.0;

/// A loss Σ dy ∘ y of a layer's output, with norms as the constants that they are to gradients.
pub(crate) struct Loss {
    pub(crate) layer: VerifiedLayer,
    pub(crate) bindings: Bindings,
    pub(crate) dy: Value,
    /// What activations of the output are applied to. Those of operands are far from a kink.
    pub(crate) sums: Vec<(Activation, Handle<Node>)>,
    /// A bound on the sum of the sizes of all products that the loss is made of. Evaluated on sizes, an equation of sums,
    /// products and quotients gives their sum, and an activation of a positive sum at least half of that.
    pub(crate) size: f64,
    /// The number of roundings on the way to a loss.
    pub(crate) roundings: f64,
}

impl Loss {
    pub(crate) fn new(layer: &VerifiedLayer, sizes: [usize; 4], seed: u64) -> Self {
        let mut all = bindings(layer, sizes, seed);
        let dy = output_gradient(layer, sizes, seed);
        let layer = detached(layer, &mut all);
        let has_rows = |node| matches!(layer.type_of(node).shape, Shape::Matrix(Dimension::Tokens, _));
        let sums = layer.layer().nodes.iter().filter_map(|(_, node)| match node {
            Node::Activation { function, value } if has_rows(*value) => Some((*function, *value)),
            _ => None,
        });
        let sums = sums.collect();
        let absolute = |value: &Value| {
            let mut sizes = value.data().iter().map(|element| element.abs());
            with_elements(value, |_| sizes.next().expect("as many"))
        };
        let operands = layer.layer().operands.iter();
        let sizes_of =
            operands.map(|(_, operand)| (operand.name.clone(), absolute(all.get(&operand.name).expect("bound"))));
        let positive = evaluate_root(&layer, &Bindings::from_iter(sizes_of)).expect("as the values themselves");
        let size = 2.0 * dot(&positive, &absolute(&dy));
        let [tokens, d, k, r] = sizes;
        let roundings = (layer.layer().nodes.len() + d + k + r + tokens * k) as f64;
        Self { layer, bindings: all, dy, sums, size, roundings }
    }

    /// The loss, and the sums that an activation with a kink is applied to, with `operand`'s element moved by `step`; and the step
    /// that was made.
    fn moved(&self, operand: &str, index: usize, step: f64) -> (f64, Vec<f64>, f64) {
        let mut bindings = self.bindings.clone();
        let value = bindings.get(operand).expect("bound").clone();
        let old = value.data()[index];
        bindings.insert(operand, with_elements(&value, |at| if at == index { old + step } else { value.data()[at] }));
        let loss = dot(&evaluate_root(&self.layer, &bindings).expect("bound"), &self.dy);
        let kinked = self.sums.iter().filter(|(function, _)| *function == Activation::Relu);
        let sums = kinked.flat_map(|(_, sum)| evaluate(&self.layer, *sum, &bindings).expect("bound").into_data());
        (loss, sums.collect(), (old + step) - old)
    }

    /// A central difference by `step`, and a bound on its error from kinks: where relu's argument changes its sign, the slope of
    /// the difference and that at the middle, both between 0 and 1, differ by no more than 1.
    fn difference(&self, operand: &str, index: usize, step: f64) -> (f64, f64) {
        let (above, sums_above, up) = self.moved(operand, index, step);
        let (below, sums_below, down) = self.moved(operand, index, -step);
        let changes = sums_above.iter().zip(&sums_below).zip(self.dy.data().iter().cycle());
        let kinks = changes.filter(|((above, below), _)| (**above > 0.0) != (**below > 0.0));
        let kinks: f64 = kinks.map(|((above, below), dy)| (dy * (above - below)).abs()).sum();
        ((above - below) / (up - down), kinks / (up - down))
    }

    /// Holds the gradient of one operand against differences.
    ///
    /// With D(h) = (f(p + h) − f(p − h)) / 2h, D(h) = f' + h²/6 f''' + O(h⁴) and D(2h) − D(h) = h²/2 f''' + O(h⁴), so that D(h) is off
    /// by a third of D(2h) − D(h). The h⁴, times a fifth derivative of 3·10⁸ where an activation's argument moves by 50 times the
    /// step, are below the rounding. n roundings of a loss whose products have the size F make a difference uncertain by n·u·F / h,
    /// one of twice the step by half of that, and a gradient by n·u·16 F: less than 2·n·u·F / h in all.
    pub(crate) fn check(&self, operand: &str, gradient: &Value, further: f64) -> Result<(), TestCaseError> {
        prop_assert_eq!(gradient.extents(), self.bindings.get(operand).expect("bound").extents(), "d{}", operand);
        let rounding = 2.0 * self.roundings * ROUNDING * self.size / STEP;
        for (index, found) in gradient.data().iter().enumerate() {
            let (near, kinks) = self.difference(operand, index, STEP);
            let (far, far_kinks) = self.difference(operand, index, 2.0 * STEP);
            let bound = (far - near).abs() / 3.0 + rounding + kinks + far_kinks + further;
            let error = (found - near).abs();
            prop_assert!(
                error <= bound,
                "d{operand}[{index}] is {found}, the difference {near}: {error:.3e} is more than {bound:.3e}\n{}",
                flora_ir::print(self.layer.layer())
            );
        }
        Ok(())
    }

    pub(crate) fn get(&self, operand: Handle<Operand>) -> &Value {
        self.bindings.get(&self.layer.layer().operands[operand].name).expect("bound")
    }
}

fn dot(one: &Value, other: &Value) -> f64 {
    one.data().iter().zip(other.data()).map(|(one, other)| one * other).sum()
}

/// A value of the same extents.
pub(crate) fn with_elements(value: &Value, mut element: impl FnMut(usize) -> f64) -> Value {
    let data: Vec<f64> = (0..value.data().len()).map(&mut element).collect();
    match *value.shape() {
        [] => Value::scalar(data[0]),
        [_] => Value::vector(data),
        [rows, columns, ..] => Value::matrix(rows, columns, data).expect("the same extents"),
    }
}

/// ∂L/∂y, drawn like an operand.
pub(crate) fn output_gradient(layer: &VerifiedLayer, sizes: [usize; 4], seed: u64) -> Value {
    let Shape::Matrix(rows, columns) = &layer.type_of(layer.root()).shape else { panic!("a matrix") };
    let (rows, columns) = (extent(rows, sizes), extent(columns, sizes));
    let numbers = (0..rows * columns).map(|index| ((index as f64 + seed as u32 as f64) * 0.7).sin() + 0.1);
    Value::matrix(rows, columns, numbers.collect()).expect("as many")
}

/// `layer` with an operand in the place of every norm, and its value in `bindings`.
pub(crate) fn detached(layer: &VerifiedLayer, bindings: &mut Bindings) -> VerifiedLayer {
    let old = layer.layer();
    let mut new = Layer { nodes: Default::default(), node_spans: Vec::new(), ..old.clone() };
    for (handle, node) in old.nodes.iter() {
        let node = match node {
            Node::ColumnNorm(_) => {
                let name = format!("norm{}", handle.index());
                bindings.insert(name.clone(), evaluate(layer, handle, bindings).expect("bound"));
                let ty = TensorType { scope: Scope::PerSegment, ..layer.type_of(handle).clone() };
                Node::Operand(new.declare(Operand { name, role: Role::Adapter, ty }, Span::default()))
            }
            other => other.clone(),
        };
        new.push(node, Span::default());
    }
    verify(new).expect("no operand is read by norms alone")
}

/// The operands that have gradients.
pub(crate) fn differentiable(layer: &VerifiedLayer) -> impl Iterator<Item = &Operand> {
    layer.layer().operands.iter().map(|(_, operand)| operand).filter(|operand| operand.role != Role::BaseWeight)
}

pub(crate) fn fail(error: impl ToString) -> TestCaseError {
    TestCaseError::fail(error.to_string())
}
