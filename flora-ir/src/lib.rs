//! The tensor IR of flora: a layer's equation, its verifier, the algebra that normalises it, and the f64 oracle.

pub mod algebra;
pub mod arena;
pub mod builtin;
pub mod diagnostic;
pub mod evaluate;
mod infer;
pub mod layer;
pub mod text;
pub mod types;
pub mod verify;

pub use arena::{Arena, Handle};
pub use diagnostic::{Diagnostic, Label};
pub use evaluate::{Bindings, EvaluateError, Value, evaluate, evaluate_root};
pub use layer::{Activation, Layer, Node, Operand, Operator, Reduce, Role, Span};
pub use text::{ParseError, parse, print};
pub use types::{Dimension, ElementType, Scope, Shape, TensorType};
pub use verify::{VerifiedLayer, verify};
