//! What the item that replaces the function keeps of it: name, visibility, documentation and lint levels. Everything else
//! that a Rust function may carry has no meaning for an equation and is refused where it stands.

use proc_macro2::TokenStream;
use quote::ToTokens;
use syn::{AttrStyle, Attribute, Ident, ItemFn, Visibility};

use crate::mistakes::{at, listed, none, over};

/// What users of the function see of it.
pub(crate) struct Interface {
    /// Documentation and deprecation, which the item takes.
    pub(crate) described: Vec<Attribute>,
    /// Lint levels, which everything that stands for the function takes.
    pub(crate) lint_levels: Vec<Attribute>,
    /// The function's visibility.
    pub(crate) visibility: Visibility,
    /// The function's name.
    pub(crate) name: Ident,
}

const DESCRIBING: [&str; 2] = ["doc", "deprecated"];

// `expect` is missing: where one function becomes several items, all but one would not fulfil it.
const LINT_LEVELS: [&str; 3] = ["allow", "warn", "deny"];

/// The item as a function.
pub(crate) fn function(item: TokenStream) -> syn::Result<ItemFn> {
    match syn::parse2(item.clone())? {
        syn::Item::Fn(function) => Ok(function),
        other => Err(over(
            other,
            "`#[flora::layer]` goes on a function",
            "write the equation as `fn name(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> { x.matmul(w0) }`",
        )),
    }
}

/// The interface of `function`, and the mistakes among its attributes and modifiers. (`cfg` and `cfg_attr` are gone before
/// the macro runs.)
pub(crate) fn interface(arguments: TokenStream, function: &ItemFn) -> (Interface, syn::Result<()>) {
    let (described, others): (Vec<_>, Vec<_>) = function.attrs.iter().cloned().partition(is_outer_one_of(&DESCRIBING));
    let (lint_levels, refused): (Vec<_>, Vec<_>) = others.into_iter().partition(is_outer_one_of(&LINT_LEVELS));
    let refused = refused.iter().map(|attribute| {
        let path = attribute.path().to_token_stream().to_string().replace(' ', "");
        let help = format!("remove it; a layer keeps {} before it", listed(DESCRIBING.into_iter().chain(LINT_LEVELS)));
        over(attribute, format!("the attribute `{path}` has no meaning here"), help)
    });
    let arguments = (!arguments.is_empty())
        .then(|| over(&arguments, "`#[flora::layer]` takes no arguments", "write `#[flora::layer]` alone"));
    let mistakes = none(arguments.into_iter().chain(refused).chain(modifiers(function)));
    let (visibility, name) = (function.vis.clone(), function.sig.ident.clone());
    (Interface { described, lint_levels, visibility, name }, mistakes)
}

/// Whether an attribute stands before the function and has one of `names`.
fn is_outer_one_of(names: &[&str]) -> impl Fn(&Attribute) -> bool {
    |attribute| matches!(attribute.style, AttrStyle::Outer) && names.iter().any(|name| attribute.path().is_ident(name))
}

/// What stands around the name and the arguments, none of which an equation has.
fn modifiers(function: &ItemFn) -> impl Iterator<Item = syn::Error> {
    let signature = &function.sig;
    let generics = &signature.generics;
    let remove = "remove it: an equation is neither called nor compiled as Rust";
    let keywords = [
        signature.constness.map(|token| at(token.span, "a layer can't be `const`", remove)),
        signature.asyncness.map(|token| at(token.span, "a layer can't be `async`", remove)),
        signature.unsafety.map(|token| at(token.span, "a layer can't be `unsafe`", remove)),
        signature.abi.as_ref().map(|abi| over(abi, "a layer has no calling convention", remove)),
        signature.variadic.as_ref().map(|dots| over(dots, "a layer can't be variadic", "name every operand")),
    ];
    let generic = (!generics.params.is_empty())
        .then(|| over(generics, "a layer has no generics", "remove them: extents such as `D` need no declaration"));
    let bounds =
        generics.where_clause.as_ref().map(|clause| over(clause, "a layer has no `where` clause", "remove it"));
    keywords.into_iter().flatten().chain(generic).chain(bounds)
}
