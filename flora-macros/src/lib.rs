//! `#[flora::layer]`: the equation of an adapted layer, written as a Rust function, becomes a [`flora_ir::Layer`].
//!
//! The passes, each from one type to the next: `attributes` takes from the function what the item that replaces it
//! keeps, `ast` reads signature and body with every name resolved, `check` builds the very graph that the program will
//! hold and runs flora's verifier and algebra on it, `expand` writes the code that rebuilds it. A mistake stops the
//! passes after it, and every mistake that a pass finds is reported at its own token, beside a stub of the item, so that
//! the item's users aren't reported too.

mod ast;
mod attributes;
mod check;
mod expand;
mod mistakes;
#[cfg(test)]
mod properties;

use proc_macro::TokenStream;
use quote::quote;

/// Turns a function whose body is an equation into a layer.
///
/// The function disappears; a type of its name, documentation and visibility takes its place, with
/// `fn layer() -> flora_ir::verify::VerifiedLayer`.
///
/// ```
/// # use flora_macros as flora;
/// /// StarCoder's query projection with per-request fLoRA adapters (Eq. 5).
/// #[flora::layer]
/// fn query(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>) -> Tokens<K> {
///     x.matmul(w0 * b.matmul(a))
/// }
///
/// let layer = query::layer();
/// assert_eq!(layer.layer().operands.len(), 4);
/// ```
///
/// # Signature
///
/// | type | is |
/// |---|---|
/// | `Tokens<D>` | the input, `[tokens, D]`; also the return type |
/// | `Weight<D, K>` | the base weight shared by the batch |
/// | `Bias<K>` | a shared vector |
/// | `Residual<K>` | a row for each token, `[tokens, K]`, added last: `x.matmul(w0).relu() + residual` |
/// | `Adapter<D, R>`, `Adapter<D>`, `Adapter` | a matrix, vector or scalar that each segment's adapter brings |
/// | `Sparse<D, K>` | a matrix that each segment's adapter brings, mostly zeros |
/// | `Scale` | the same as `Adapter` without extents |
///
/// An extent is a name or an integer literal. A type may end with an element type, `f32` (the default), `f16` or `bf16`:
/// `Weight<D, K, f16>`. It is the type that the operand is kept in, where whoever runs the layer names no other
/// (`CompiledLayer::format`). These names needn't be in scope: the macro reads them, no Rust type is meant.
///
/// # Body
///
/// `let` bindings, then the output: operands, numbers, `+ - * /`, unary minus, parentheses, and the methods `matmul(e)`,
/// `matmul_mean(e)` (the mean over the contracted dimension), `columns()`, `rows()`, `sum_rank()`, `mean_rank()`,
/// `column_norm()`, `transpose()`, `relu()`, `gelu()` (by the error function), `gelu_tanh()` and `silu()`.
///
/// # Errors
///
/// What flora's verifier refuses, and what its algebra can't take to the normal form that kernels compute, is a compile
/// error at the token that is wrong, in their words.
#[proc_macro_attribute]
pub fn layer(arguments: TokenStream, item: TokenStream) -> TokenStream {
    compile(arguments.into(), item.into()).into()
}

fn compile(arguments: proc_macro2::TokenStream, item: proc_macro2::TokenStream) -> proc_macro2::TokenStream {
    let function = match attributes::function(item) {
        Ok(function) => function,
        Err(mistake) => return mistake.into_compile_error(),
    };
    let (interface, refused) = attributes::interface(arguments, &function);
    let ir = match expand::ir_path() {
        Ok(path) => path,
        Err(mistake) => return mistake.into_compile_error(),
    };
    let layer = mistakes::both(refused, ast::read(&function)).and_then(|((), equation)| check::check(&equation));
    match layer {
        Ok(layer) => expand::layer(&ir, &interface, &layer),
        Err(mistakes) => {
            // No type can stand in an `impl` block, where a method is.
            let stub = function.sig.receiver().is_none().then(|| expand::stub(&ir, &interface));
            let errors = mistakes.into_compile_error();
            quote!(#errors #stub)
        }
    }
}
