//! The tensor IR of flora: a layer's equation, its verifier, the algebra that normalises it, and the f64 oracle.
//!
//! ```
//! use flora_ir::algebra::normalize;
//! use flora_ir::{Bindings, Value, parse, verify};
//!
//! let source = "layer flora(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K]) { x @ (w0 * (b @ a)) }";
//! let layer = verify(parse(source)?).map_err(|mistakes| mistakes[0].render("flora", source))?;
//! let normalized = normalize(&layer)?;
//! println!("{}", normalized.derivation);
//!
//! // An adapter of rank 2 for a weight [3, 1] takes two virtual rows per token.
//! let adapter = Bindings::from_iter([
//!     ("b", Value::matrix(3, 2, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?),
//!     ("a", Value::matrix(2, 1, vec![7.0, 8.0])?),
//! ]);
//! let folded = normalized.linear.fold(&adapter)?;
//! assert_eq!(folded.virtual_rows[1].in_scale, Some(vec![2.0, 4.0, 6.0]));
//! assert_eq!(folded.virtual_rows[1].out_scale, Some(vec![8.0]));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod algebra;
pub mod arena;
pub mod builtin;
pub mod diagnostic;
pub mod evaluate;
pub mod gradient;
mod infer;
pub mod layer;
pub mod sparse;
pub mod text;
pub mod types;
pub mod verify;

pub use arena::{Arena, Handle};
pub use diagnostic::{Diagnostic, Label};
pub use evaluate::{Bindings, EvaluateError, Value, evaluate, evaluate_root};
pub use layer::{Activation, Axis, Backward, Layer, Node, Operand, Operator, Pairs, Reduce, Role, Side, Span};
pub use sparse::SparseMatrix;
pub use text::{ParseError, parse, print};
pub use types::{Dimension, ElementType, Scope, Shape, TensorType};
pub use verify::{VerifiedLayer, verify};
