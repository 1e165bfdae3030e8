//! The printer of the text form. What is used more than once gets a `let`, so that the text parses back to the same graph.

use std::collections::HashSet;
use std::fmt::Write;

use super::{function_name, role_name};
use crate::arena::Handle;
use crate::layer::{Layer, Node, Operator, Reduce};
use crate::types::ElementType;

/// A longer value gets a `let` of its own, which also bounds the depth of the text.
const MAX_INLINE_BYTES: usize = 80;

/// The layer in the text form. Nodes that the root doesn't read are left out. A layer that the verifier refuses is printed
/// too, as far as it can be, but need not parse.
pub fn print(layer: &Layer) -> String {
    let mut out = format!("layer {}(", layer.name);
    for (index, (_, operand)) in layer.operands.iter().enumerate() {
        let separator = if index == 0 { "" } else { ", " };
        let _ = write!(out, "{separator}{}: {}{}", operand.name, role_name(operand.role), operand.ty.shape);
        if operand.ty.element != ElementType::F32 {
            let _ = write!(out, ": {}", operand.ty.element.name());
        }
    }
    out.push_str(") {\n");
    for line in print_equation(layer).lines() {
        let _ = writeln!(out, "    {line}");
    }
    out.push_str("}\n");
    out
}

/// The body of the layer: a line for each `let`, and the output.
pub fn print_equation(layer: &Layer) -> String {
    let Some(root) = layer.root else { return String::new() };
    let (lets, values) = print_values(layer, &[root]);
    lets + &values.concat()
}

/// A line for each `let` of what is read more than once, by `roots` or as one of them, and each root's own text.
pub(crate) fn print_values(layer: &Layer, roots: &[Handle<Node>]) -> (String, Vec<String>) {
    let mut uses = vec![0usize; layer.nodes.len()];
    let reachable = reachable_from(layer, roots);
    for (handle, node) in layer.nodes.iter().filter(|(handle, _)| reachable[handle.index()]) {
        for operand in node.operands().filter(|operand| *operand < handle) {
            uses[operand.index()] += 1;
        }
    }
    for root in roots {
        if let Some(uses) = uses.get_mut(root.index()) {
            *uses += 1;
        }
    }
    print_from(layer, roots, |node| uses[node.index()] > 1)
}

/// Whether one of `roots` reads a node, directly or not, for each node.
fn reachable_from(layer: &Layer, roots: &[Handle<Node>]) -> Vec<bool> {
    let mut reachable = vec![false; layer.nodes.len()];
    for root in roots {
        reachable.iter_mut().zip(layer.reachable_from(*root)).for_each(|(reachable, reads)| *reachable |= reads);
    }
    reachable
}

/// The value of `node` on one line, whatever else reads its parts; long ones are cut.
pub(crate) fn print_node(layer: &Layer, node: Handle<Node>) -> String {
    let (lets, values) = print_from(layer, &[node], |_| false);
    values.concat() + if lets.is_empty() { "" } else { " (abridged)" }
}

fn print_from(
    layer: &Layer,
    roots: &[Handle<Node>],
    is_shared: impl Fn(Handle<Node>) -> bool,
) -> (String, Vec<String>) {
    let taken: HashSet<&str> = layer.operands.iter().map(|(_, operand)| operand.name.as_str()).collect();
    let mut fresh = (0..).map(|index| format!("t{index}")).filter(|name| !taken.contains(name.as_str()));
    let reachable = reachable_from(layer, roots);
    let mut out = String::new();
    let mut written: Vec<Written> = vec![Written::default(); layer.nodes.len()];
    for (handle, node) in layer.nodes.iter().filter(|(handle, _)| reachable[handle.index()]) {
        let this = write_node(layer, handle, node, &written);
        let is_leaf = matches!(node, Node::Operand(_) | Node::Constant(_));
        let is_long = !roots.contains(&handle) && this.text.len() > MAX_INLINE_BYTES;
        let named = !is_leaf && (is_shared(handle) || is_long);
        let name = if named { fresh.next() } else { None };
        written[handle.index()] = match name {
            Some(name) => {
                let _ = writeln!(out, "let {name} = {};", this.text);
                Written { text: name, form: Form::Atom }
            }
            None => this,
        };
    }
    let text = |root: &Handle<Node>| written.get(root.index()).map_or_else(String::new, |root| root.text.clone());
    let values = roots.iter().map(text).collect();
    (out, values)
}

#[derive(Clone, Default)]
struct Written {
    text: String,
    form: Form,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum Form {
    #[default]
    Atom,
    MatMul,
    Infix(Operator),
}

fn write_node(layer: &Layer, handle: Handle<Node>, node: &Node, written: &[Written]) -> Written {
    let operands = node.operands().map(|operand| match written.get(operand.index()) {
        Some(operand_text) if operand < handle => operand_text.clone(),
        _ => Written { text: format!("{operand:?}"), form: Form::Atom },
    });
    let operands: Vec<Written> = operands.collect();
    let infix = |sign: &str, form: Form| match operands.as_slice() {
        [lhs, rhs] => {
            let text = format!("{} {sign} {}", bracketed(lhs, form, true), bracketed(rhs, form, false));
            Written { text, form }
        }
        _ => Written::default(),
    };
    match node {
        Node::Operand(operand) => {
            let name =
                layer.operands.get(*operand).map_or_else(|| format!("{operand:?}"), |operand| operand.name.clone());
            Written { text: name, form: Form::Atom }
        }
        Node::Constant(number) => Written { text: format!("{number:?}"), form: Form::Atom },
        Node::MatMul { reduce: Reduce::Sum, .. } => infix("@", Form::MatMul),
        Node::Elementwise { operator, .. } => infix(operator.sign(), Form::Infix(*operator)),
        call => {
            let arguments: Vec<&str> = operands.iter().map(|operand| operand.text.as_str()).collect();
            let text = format!("{}({})", function_name(call).unwrap_or_default(), arguments.join(", "));
            Written { text, form: Form::Atom }
        }
    }
}

/// Parentheses wherever a reader would need a table of precedences: around all but products in a sum, and chains of one
/// operator from the left.
fn bracketed(operand: &Written, user: Form, is_left: bool) -> String {
    let (add, multiply) = (Form::Infix(Operator::Add), Form::Infix(Operator::Multiply));
    let bare = match operand.form {
        Form::Atom => true,
        form if form == user => is_left && (user == add || user == multiply),
        _ => user == add,
    };
    if bare { operand.text.clone() } else { format!("({})", operand.text) }
}
