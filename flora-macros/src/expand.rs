//! Writes the item that takes the function's place: a type with a function that rebuilds the checked graph, call by call,
//! through flora-ir's public builder.

use flora_ir::{
    Activation, Dimension, ElementType, Handle, Layer, Node, Operand, Operator, Pairs, Reduce, Role, Scope, Shape,
    Span, TensorType,
};
use proc_macro_crate::{FoundCrate, crate_name};
use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::Ident;

use crate::attributes::Interface;

/// The path of flora-ir in the crate that uses the macro: inside the facade `flora`, or flora-ir itself.
pub(crate) fn ir_path() -> syn::Result<TokenStream> {
    // Tests, examples and the binary of a package see its library under its own name, so `Itself` is that name too. The
    // library itself would need `extern crate self as flora;`.
    let absolute = |found: FoundCrate, own: &str| {
        let name = match found {
            FoundCrate::Itself => format_ident!("{own}"),
            FoundCrate::Name(name) => format_ident!("{name}"),
        };
        quote!(::#name)
    };
    if let Ok(facade) = crate_name("flora") {
        let facade = absolute(facade, "flora");
        return Ok(quote!(#facade::ir));
    }
    match crate_name("flora-ir") {
        Ok(ir) => Ok(absolute(ir, "flora_ir")),
        Err(error) => Err(syn::Error::new(
            proc_macro2::Span::call_site(),
            format!("`#[flora::layer]` needs the crate `flora`, or `flora-ir`\nhelp: add it to Cargo.toml: {error}"),
        )),
    }
}

/// The item of a checked layer.
pub(crate) fn layer(ir: &TokenStream, interface: &Interface, layer: &Layer) -> TokenStream {
    let code = Code { ir };
    let name = &layer.name;
    let operands = layer.operands.iter().zip(&layer.operand_spans).map(|((handle, operand), &span)| {
        let (variable, operand, span) = (operand_name(handle), code.operand(operand), code.span(span));
        quote!(let #variable = layer.declare(#operand, #span);)
    });
    let nodes = layer.nodes.iter().zip(&layer.node_spans).map(|((handle, node), &span)| {
        let (variable, node, span) = (node_name(handle), code.node(node), code.span(span));
        quote!(let #variable = layer.push(#node, #span);)
    });
    let root = layer.root.map(|root| {
        let root = node_name(root);
        quote!(layer.root = ::core::option::Option::Some(#root);)
    });
    let body = quote! {
        static LAYER: ::std::sync::LazyLock<#ir::verify::VerifiedLayer> = ::std::sync::LazyLock::new(|| {
            let mut layer = #ir::Layer::new(#name);
            #(#operands)*
            #(#nodes)*
            #root
            // The macro ran the same verifier on the same graph when this was compiled.
            #ir::verify::verify(layer).expect("verified when it was compiled")
        });
        ::std::clone::Clone::clone(&*LAYER)
    };
    item(ir, interface, &body)
}

/// The item of a layer with mistakes, so that its uses aren't mistakes too. Nothing runs it: the program doesn't compile.
pub(crate) fn stub(ir: &TokenStream, interface: &Interface) -> TokenStream {
    item(ir, interface, &quote!(::core::unreachable!("a layer with mistakes doesn't compile")))
}

fn item(ir: &TokenStream, interface: &Interface, body: &TokenStream) -> TokenStream {
    let Interface { described, lint_levels, visibility, name } = interface;
    // A type without values, and not a unit struct, whose name would be a pattern: `let query = query::layer();`.
    quote! {
        #(#described)*
        #(#lint_levels)*
        #[allow(non_camel_case_types, clippy::empty_enums)]
        #visibility enum #name {}

        #(#lint_levels)*
        #[allow(deprecated)]
        impl #name {
            /// The layer, verified. It is built once, by the first call.
            #[allow(clippy::expect_used, clippy::too_many_lines)]
            #visibility fn layer() -> #ir::verify::VerifiedLayer {
                #body
            }
        }
    }
}

fn operand_name(handle: Handle<Operand>) -> Ident {
    format_ident!("operand_{}", handle.index())
}

fn node_name(handle: Handle<Node>) -> Ident {
    format_ident!("node_{}", handle.index())
}

/// Rust expressions for values of flora-ir, which is found at `ir`.
struct Code<'a> {
    ir: &'a TokenStream,
}

impl Code<'_> {
    fn span(&self, Span { start, end }: Span) -> TokenStream {
        let ir = self.ir;
        quote!(#ir::Span { start: #start, end: #end })
    }

    fn operand(&self, Operand { name, role, ty }: &Operand) -> TokenStream {
        let ir = self.ir;
        let ty = self.tensor_type(ty);
        let role = match role {
            Role::Input => quote!(Input),
            Role::BaseWeight => quote!(BaseWeight),
            Role::Bias => quote!(Bias),
            Role::Adapter => quote!(Adapter),
            Role::Sparse => quote!(Sparse),
            Role::Residual => quote!(Residual),
        };
        quote!(#ir::Operand { name: ::core::convert::From::from(#name), role: #ir::Role::#role, ty: #ty })
    }

    fn tensor_type(&self, TensorType { shape, rank_axis, element, scope }: &TensorType) -> TokenStream {
        let ir = self.ir;
        let shape = match shape {
            Shape::Scalar => quote!(Scalar),
            Shape::Vector(n) => {
                let n = self.dimension(n);
                quote!(Vector(#n))
            }
            Shape::Matrix(m, n) => {
                let (m, n) = (self.dimension(m), self.dimension(n));
                quote!(Matrix(#m, #n))
            }
        };
        let rank_axis = match rank_axis {
            None => quote!(::core::option::Option::None),
            Some(rank) => {
                let rank = self.dimension(rank);
                quote!(::core::option::Option::Some(#rank))
            }
        };
        let element = match element {
            ElementType::F32 => quote!(F32),
            ElementType::F16 => quote!(F16),
            ElementType::BF16 => quote!(BF16),
        };
        let scope = match scope {
            Scope::Shared => quote!(Shared),
            Scope::PerSegment => quote!(PerSegment),
        };
        quote!(#ir::TensorType {
            shape: #ir::Shape::#shape,
            rank_axis: #rank_axis,
            element: #ir::ElementType::#element,
            scope: #ir::Scope::#scope,
        })
    }

    fn dimension(&self, dimension: &Dimension) -> TokenStream {
        let ir = self.ir;
        match dimension {
            Dimension::Tokens => quote!(#ir::Dimension::Tokens),
            Dimension::Symbol(name) => quote!(#ir::Dimension::Symbol(::core::convert::From::from(#name))),
            Dimension::Fixed(extent) => quote!(#ir::Dimension::Fixed(#extent)),
            Dimension::Product(first, second) => {
                let (first, second) = (self.dimension(first), self.dimension(second));
                quote!(#ir::Dimension::Product(::core::convert::From::from(#first), ::core::convert::From::from(#second)))
            }
        }
    }

    fn reduce(&self, reduce: Reduce) -> TokenStream {
        let ir = self.ir;
        match reduce {
            Reduce::Sum => quote!(#ir::Reduce::Sum),
            Reduce::Mean => quote!(#ir::Reduce::Mean),
        }
    }

    fn node(&self, node: &Node) -> TokenStream {
        let ir = self.ir;
        let node = match *node {
            Node::Operand(operand) => {
                let operand = operand_name(operand);
                quote!(Operand(#operand))
            }
            Node::Constant(value) => quote!(Constant(#value)),
            Node::MatMul { lhs, rhs, reduce } => {
                let (lhs, rhs, reduce) = (node_name(lhs), node_name(rhs), self.reduce(reduce));
                quote!(MatMul { lhs: #lhs, rhs: #rhs, reduce: #reduce })
            }
            Node::Elementwise { operator, lhs, rhs } => {
                let (lhs, rhs) = (node_name(lhs), node_name(rhs));
                let operator = match operator {
                    Operator::Add => quote!(Add),
                    Operator::Multiply => quote!(Multiply),
                    Operator::Divide => quote!(Divide),
                };
                quote!(Elementwise { operator: #ir::Operator::#operator, lhs: #lhs, rhs: #rhs })
            }
            Node::Columns(value) => {
                let value = node_name(value);
                quote!(Columns(#value))
            }
            Node::Rows(value) => {
                let value = node_name(value);
                quote!(Rows(#value))
            }
            Node::ReduceRank { reduce, value } => {
                let (reduce, value) = (self.reduce(reduce), node_name(value));
                quote!(ReduceRank { reduce: #reduce, value: #value })
            }
            Node::ColumnNorm(value) => {
                let value = node_name(value);
                quote!(ColumnNorm(#value))
            }
            Node::Transpose(value) => {
                let value = node_name(value);
                quote!(Transpose(#value))
            }
            Node::PairProduct { pairs, lhs, rhs } => {
                let (lhs, rhs) = (node_name(lhs), node_name(rhs));
                let pairs = match pairs {
                    Pairs::Columns => quote!(Columns),
                    Pairs::Rows => quote!(Rows),
                };
                quote!(PairProduct { pairs: #ir::Pairs::#pairs, lhs: #lhs, rhs: #rhs })
            }
            // The equation is verified, and the verifier refuses what gradients alone have.
            Node::Backward(_) => return quote!(::core::compile_error!("an equation has no operation of gradients")),
            Node::Activation { function, value } => {
                let value = node_name(value);
                let function = match function {
                    Activation::Identity => quote!(Identity),
                    Activation::Relu => quote!(Relu),
                    Activation::GeluErf => quote!(GeluErf),
                    Activation::GeluTanh => quote!(GeluTanh),
                    Activation::Silu => quote!(Silu),
                };
                quote!(Activation { function: #ir::Activation::#function, value: #value })
            }
        };
        quote!(#ir::Node::#node)
    }
}
