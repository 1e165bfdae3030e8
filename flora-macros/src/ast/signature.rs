//! Reads the arguments and the return type. The types are syntax only: `Weight<D, K>` names no Rust type.

use flora_ir::{Dimension, ElementType, Role, Shape, TensorType};
use proc_macro2::{TokenStream, TokenTree};
use quote::ToTokens;
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{
    Expr, ExprLit, FnArg, GenericArgument, Ident, Lit, Pat, PathArguments, ReturnType, Signature, Type, TypePath,
};

use super::{Declared, Output, Parameter};
use crate::mistakes::{all, at, both, listed, none, over, suggestion};

/// A name that a type of the signature may have.
struct TypeName {
    name: &'static str,
    role: Role,
    /// How many extents it may be written with.
    extents: std::ops::RangeInclusive<usize>,
    /// How it is written.
    usage: &'static [&'static str],
}

const TYPE_NAMES: [TypeName; 7] = [
    TypeName { name: "Tokens", role: Role::Input, extents: 1..=1, usage: &["Tokens<D>"] },
    TypeName { name: "Weight", role: Role::BaseWeight, extents: 2..=2, usage: &["Weight<D, K>"] },
    TypeName { name: "Bias", role: Role::Bias, extents: 1..=1, usage: &["Bias<K>"] },
    TypeName { name: "Residual", role: Role::Residual, extents: 1..=1, usage: &["Residual<K>"] },
    TypeName {
        name: "Adapter",
        role: Role::Adapter,
        extents: 0..=2,
        usage: &["Adapter<D, R>", "Adapter<D>", "Adapter"],
    },
    TypeName { name: "Sparse", role: Role::Sparse, extents: 2..=2, usage: &["Sparse<D, K>"] },
    TypeName { name: "Scale", role: Role::Adapter, extents: 0..=0, usage: &["Scale"] },
];

const ELEMENT_TYPES: [(&str, ElementType); 3] =
    [("f32", ElementType::F32), ("f16", ElementType::F16), ("bf16", ElementType::BF16)];

/// The parameters and the output.
pub(super) fn read(signature: &Signature) -> syn::Result<(Vec<Parameter>, Output)> {
    let parameters = all(signature.inputs.iter().map(parameter)).and_then(distinct);
    both(parameters, output(signature))
}

/// The names that the arguments bring into the body, each with its argument's position. Those of an argument that is itself
/// a mistake count: their uses aren't mistakes too.
pub(super) fn names(signature: &Signature) -> impl Iterator<Item = (String, usize)> {
    let names = |(position, input): (usize, &FnArg)| {
        let tokens = match input {
            FnArg::Typed(typed) => typed.pat.to_token_stream(),
            FnArg::Receiver(receiver) => receiver.self_token.to_token_stream(),
        };
        identifiers(tokens).into_iter().map(move |name| (name, position))
    };
    signature.inputs.iter().enumerate().flat_map(names)
}

/// Every name in a pattern.
pub(super) fn identifiers(tokens: TokenStream) -> Vec<String> {
    let identifiers = tokens.into_iter().flat_map(|token| match token {
        TokenTree::Ident(ident) => vec![ident.unraw().to_string()],
        TokenTree::Group(group) => identifiers(group.stream()),
        TokenTree::Punct(_) | TokenTree::Literal(_) => Vec::new(),
    });
    identifiers.filter(|name| name != "mut" && name != "ref").collect()
}

fn distinct(parameters: Vec<Parameter>) -> syn::Result<Vec<Parameter>> {
    let repeated = parameters.iter().enumerate().filter_map(|(position, parameter)| {
        let Parameter { name, span, .. } = parameter;
        let repeats = parameters[..position].iter().any(|earlier| earlier.name == *name);
        repeats.then(|| at(*span, format!("two operands are called `{name}`"), "rename one of them"))
    });
    none(repeated)?;
    Ok(parameters)
}

/// The name that a pattern is, if it is no more than that.
pub(super) fn name(pattern: &Pat) -> syn::Result<&Ident> {
    match pattern {
        Pat::Ident(plain) if plain.by_ref.is_none() && plain.mutability.is_none() && plain.subpat.is_none() => {
            Ok(&plain.ident)
        }
        Pat::Ident(plain) => {
            Err(over(plain, "an operand or a binding is a plain name", format!("write `{}` alone", plain.ident)))
        }
        other => Err(over(other, "a pattern can't take an operand apart", "name it, and use the name in the equation")),
    }
}

fn parameter(input: &FnArg) -> syn::Result<Parameter> {
    match input {
        FnArg::Receiver(receiver) => Err(at(
            receiver.self_token.span,
            "a layer has no `self`",
            "declare every operand, the input as `x: Tokens<D>`",
        )),
        FnArg::Typed(typed) => {
            let attributes = typed
                .attrs
                .iter()
                .map(|attribute| Err::<(), _>(over(attribute, "an operand has no attributes", "remove it")));
            let ((name, declared), _) = both(both(name(&typed.pat), declared(&typed.ty)), all(attributes))?;
            Ok(Parameter { name: name.unraw().to_string(), span: name.span(), declared })
        }
    }
}

fn declared(ty: &Type) -> syn::Result<Declared> {
    let Written { kind, shape, element } = written(ty)?;
    let element = element.unwrap_or(ElementType::F32);
    let ty = TensorType { shape, rank_axis: None, element, scope: kind.role.scope() };
    Ok(Declared { role: kind.role, ty })
}

fn output(signature: &Signature) -> syn::Result<Output> {
    let ty = match &signature.output {
        ReturnType::Type(_, ty) => ty,
        ReturnType::Default => {
            let end = signature.paren_token.span.close();
            return Err(at(
                end,
                "the return type is missing",
                "add `-> Tokens<K>`, `K` being the weight's second extent",
            ));
        }
    };
    let Written { kind, shape, element } = written(ty)?;
    if kind.role != Role::Input {
        let message = format!("a layer can't return {}", described(kind.role));
        return Err(over(ty, message, "write `-> Tokens<K>`, `K` being the weight's second extent"));
    }
    Ok(Output { shape, element, tokens: (**ty).clone() })
}

fn described(role: Role) -> &'static str {
    match role {
        Role::Input => "tokens",
        Role::BaseWeight => "a base weight",
        Role::Bias => "a bias",
        Role::Adapter => "an adapter",
        Role::Sparse => "a sparse matrix",
        Role::Residual => "a residual",
    }
}

/// A type as written: its name, its extents, and the element type if there is one.
struct Written {
    kind: &'static TypeName,
    shape: Shape,
    element: Option<ElementType>,
}

fn written(ty: &Type) -> syn::Result<Written> {
    let segment = match ty {
        Type::Group(group) => return written(&group.elem),
        Type::Path(TypePath { qself: None, path }) if path.leading_colon.is_none() && path.segments.len() == 1 => {
            &path.segments[0]
        }
        _ => return Err(no_tensor(ty, "")),
    };
    let name = segment.ident.to_string();
    let Some(kind) = TYPE_NAMES.iter().find(|kind| kind.name == name) else {
        return Err(no_tensor(ty, &suggestion(&name, TYPE_NAMES.iter().map(|kind| kind.name))));
    };
    let arguments: Vec<&GenericArgument> = match &segment.arguments {
        PathArguments::None => Vec::new(),
        PathArguments::AngleBracketed(list) => list.args.iter().collect(),
        PathArguments::Parenthesized(_) => return Err(no_tensor(ty, "")),
    };
    let (element, extents) = match arguments.split_last() {
        Some((last, extents)) if element_type(last).is_some() => (element_type(last), extents),
        _ => (None, arguments.as_slice()),
    };
    let extents = all(extents.iter().map(|argument| dimension(argument)))?;
    let shape = match (kind.role, extents.as_slice()) {
        (Role::Input | Role::Residual, [n]) => Some(Shape::Matrix(Dimension::Tokens, n.clone())),
        (_, []) => Some(Shape::Scalar),
        (_, [n]) => Some(Shape::Vector(n.clone())),
        (_, [m, n]) => Some(Shape::Matrix(m.clone(), n.clone())),
        _ => None,
    };
    match shape {
        Some(shape) if kind.extents.contains(&extents.len()) => Ok(Written { kind, shape, element }),
        _ => {
            let plural = if extents.len() == 1 { "" } else { "s" };
            let message = format!("`{name}` can't have {} extent{plural}", extents.len());
            Err(over(ty, message, format!("write {}", listed(kind.usage.iter().copied()))))
        }
    }
}

fn no_tensor(ty: &Type, suggestion: &str) -> syn::Error {
    let usages = listed(TYPE_NAMES.iter().flat_map(|kind| kind.usage).copied());
    let message = format!("`{}` is no tensor type{suggestion}", compact(ty));
    over(ty, message, format!("the tensor types are {usages}"))
}

/// The element type that an argument names.
fn element_type(argument: &GenericArgument) -> Option<ElementType> {
    let GenericArgument::Type(Type::Path(path)) = argument else { return None };
    let name = path.path.get_ident()?;
    ELEMENT_TYPES.iter().find(|(known, _)| name == known).map(|&(_, element)| element)
}

fn dimension(argument: &GenericArgument) -> syn::Result<Dimension> {
    if element_type(argument).is_some() {
        return Err(over(
            argument,
            "the element type isn't last",
            "write it once, after the extents: `Weight<D, K, f16>`",
        ));
    }
    match argument {
        GenericArgument::Type(Type::Path(path)) if path.qself.is_none() => match path.path.get_ident() {
            Some(name) => Ok(Dimension::Symbol(name.unraw().to_string())),
            None => Err(no_extent(argument)),
        },
        GenericArgument::Const(Expr::Lit(ExprLit { lit: Lit::Int(literal), .. })) if literal.suffix().is_empty() => {
            match literal.base10_parse() {
                Ok(extent) => Ok(Dimension::Fixed(extent)),
                Err(error) => Err(at(argument.span(), error.to_string(), "an extent is below 2⁶⁴")),
            }
        }
        _ => Err(no_extent(argument)),
    }
}

fn no_extent(argument: &GenericArgument) -> syn::Error {
    over(
        argument,
        format!("`{}` is no extent", compact(argument)),
        "an extent is a name such as `D` or an integer such as `576`",
    )
}

/// A type as one would write it: the printer of tokens puts a space between any two.
fn compact(tokens: &impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string();
    for (spaced, close) in
        [(" <", "<"), ("< ", "<"), (" >", ">"), (" ,", ","), ("& ", "&"), (" ::", "::"), (":: ", "::"), (" ;", ";")]
    {
        text = text.replace(spaced, close);
    }
    text
}
