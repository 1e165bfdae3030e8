//! The tensor IR of flora: a layer's equation, its verifier, the algebra that normalises it, and the f64 oracle.

pub mod algebra;
pub mod arena;
pub mod layer;
pub mod types;
pub mod verify;

pub use arena::{Arena, Handle};
pub use layer::{Activation, Layer, Node, Operand, Operator, Reduce, Role, Span};
pub use types::{Dimension, ElementType, Scope, Shape, TensorType};
