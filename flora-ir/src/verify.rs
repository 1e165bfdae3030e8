//! The verifier: a layer that it accepts can be evaluated, normalised or refused with a reason, and never breaks a later pass.
//!
//! What holds in a [`VerifiedLayer`]:
//!
//! - there is a root, at most [`MAX_NODES`] nodes and [`MAX_OPERANDS`] operands; every handle exists, and every node reads
//!   only nodes before it;
//! - operand names are identifiers, no two are equal, and the root reads every operand;
//! - there is exactly one input, `[tokens, d]`, exactly one base weight, `[m, n]`, and at most one residual, `[tokens, k]`; a
//!   bias is a vector, a sparse operand a matrix; only the input and the residual have the dimension `tokens`; no operand has a rank axis; adapters are
//!   per segment, everything else is shared;
//! - every extent is positive, every constant finite;
//! - the sides of a matmul are matrices that meet; elementwise operands broadcast; one value has at most one rank axis;
//!   `columns` and `rows` take apart a matrix without rank axis, `sum_rank` and `mean_rank` reduce one that is there,
//!   `column_norm` and `transpose` take a matrix; nothing contracts, splits, transposes or takes a norm over the tokens, so
//!   that a request's rows never meet another's; no operation belongs to gradients alone;
//! - the root is `[tokens, k]` without a rank axis.

use std::collections::HashMap;

use crate::arena::Handle;
use crate::diagnostic::Diagnostic;
use crate::infer::{infer, mixes_rows};
use crate::layer::{Layer, Node, Operand, Role, Span};
use crate::types::{Dimension, ElementType, Shape, TensorType};

/// The most nodes of one layer: far above any equation, and low enough for passes that recurse.
pub const MAX_NODES: usize = 1024;

/// The most operands of one layer.
pub const MAX_OPERANDS: usize = 256;

/// A layer that [`verify`] has accepted, with the type of every node.
#[derive(Clone, Debug, PartialEq)]
pub struct VerifiedLayer {
    layer: Layer,
    types: Vec<TensorType>,
    root: Handle<Node>,
    input: Handle<Operand>,
    base_weight: Handle<Operand>,
    residual: Option<Handle<Operand>>,
}

impl VerifiedLayer {
    /// The graph.
    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// The graph, to be changed and verified again.
    pub fn into_layer(self) -> Layer {
        self.layer
    }

    /// The type of `node`, which must be a handle of this layer.
    ///
    /// # Panics
    /// When `node` belongs to another, longer layer.
    pub fn type_of(&self, node: Handle<Node>) -> &TensorType {
        &self.types[node.index()]
    }

    /// The output, `[tokens, k]`.
    pub fn root(&self) -> Handle<Node> {
        self.root
    }

    /// x, `[tokens, d]`.
    pub fn input(&self) -> Handle<Operand> {
        self.input
    }

    /// w0, `[d, k]`.
    pub fn base_weight(&self) -> Handle<Operand> {
        self.base_weight
    }

    /// What is added to the output row by row, `[tokens, k]`.
    pub fn residual(&self) -> Option<Handle<Operand>> {
        self.residual
    }

    /// The operand called `name`.
    pub fn operand_named(&self, name: &str) -> Option<Handle<Operand>> {
        self.layer.operands.iter().find(|(_, operand)| operand.name == name).map(|(handle, _)| handle)
    }
}

/// Infers the type of every node and checks every invariant of the module.
///
/// # Errors
/// All mistakes, in the order of the source; a node that reads a wrong one is not reported for it.
pub fn verify(layer: Layer) -> Result<VerifiedLayer, Vec<Diagnostic>> {
    if layer.nodes.len() > MAX_NODES || layer.operands.len() > MAX_OPERANDS {
        return Err(vec![Diagnostic::new(
            Span::default(),
            format!("a layer of {} nodes and {} operands is too large", layer.nodes.len(), layer.operands.len()),
            format!("write it in at most {MAX_NODES} nodes and {MAX_OPERANDS} operands"),
        )]);
    }
    let mut diagnostics = Vec::new();
    let sound = check_operands(&layer, &mut diagnostics);
    let input = exactly_one(&layer, &INPUT, "x: input[tokens, D]", &mut diagnostics);
    let base_weight = exactly_one(&layer, &BASE_WEIGHT, "w0: weight[D, K]", &mut diagnostics);
    let residual = at_most_one(&layer, &RESIDUAL, &mut diagnostics);
    let types = infer_types(&layer, &sound, &mut diagnostics);
    check_operations(&layer, &mut diagnostics);
    let root = check_root(&layer, &types, input.is_some(), &mut diagnostics);
    if let Some(root) = root {
        check_use(&layer, root, &mut diagnostics);
    }
    match (root, input, base_weight, types.into_iter().collect::<Option<Vec<_>>>()) {
        (Some(root), Some(input), Some(base_weight), Some(types)) if diagnostics.is_empty() => {
            Ok(VerifiedLayer { layer, types, root, input, base_weight, residual })
        }
        _ => {
            diagnostics.sort_by_key(|diagnostic| diagnostic.span.start);
            Err(diagnostics)
        }
    }
}

/// The type of every node; `None` for one that is wrong, or that reads a wrong one or an operand that isn't `sound`.
pub(crate) fn infer_types(layer: &Layer, sound: &[bool], diagnostics: &mut Vec<Diagnostic>) -> Vec<Option<TensorType>> {
    let mut types: Vec<Option<TensorType>> = Vec::with_capacity(layer.nodes.len());
    for (handle, node) in layer.nodes.iter() {
        let span = layer.node_span(handle);
        if let Some(stray) = node.operands().find(|operand| *operand >= handle) {
            diagnostics.push(Diagnostic::new(
                span,
                format!("node {handle:?} reads node {stray:?}, which is not before it"),
                "push operands before the nodes that read them; a handle of another layer can't be used",
            ));
            types.push(None);
            continue;
        }
        let is_unsound = |operand: &Handle<Operand>| sound.get(operand.index()) == Some(&false);
        if node.operands().any(|operand| types[operand.index()].is_none())
            || matches!(node, Node::Operand(operand) if is_unsound(operand))
        {
            types.push(None);
            continue;
        }
        let type_of = |operand: Handle<Node>| types[operand.index()].as_ref().expect("checked above");
        match mixes_rows(node, type_of).map_or_else(|| infer(layer, node, type_of), Err) {
            Ok(ty) => types.push(Some(ty)),
            Err(mistake) => {
                let mut diagnostic = Diagnostic::new(span, mistake.message, mistake.help);
                for operand in node.operands() {
                    diagnostic = diagnostic.label(layer.node_span(operand), format!("{}", type_of(operand)));
                }
                diagnostics.push(diagnostic);
                types.push(None);
            }
        }
    }
    types
}

/// Reports operations that only gradients have.
fn check_operations(layer: &Layer, diagnostics: &mut Vec<Diagnostic>) {
    for (handle, _) in layer.nodes.iter().filter(|(_, node)| matches!(node, Node::Backward(_))) {
        diagnostics.push(Diagnostic::new(
            layer.node_span(handle),
            "a layer can't have an operation of the backward pass",
            "write the layer's own equation; its gradients are derived",
        ));
    }
}

/// Reports mistakes of the declarations; for each operand, whether its type can be relied on.
fn check_operands(layer: &Layer, diagnostics: &mut Vec<Diagnostic>) -> Vec<bool> {
    let mut sound = vec![true; layer.operands.len()];
    let mut first_with_name = HashMap::new();
    for (handle, operand) in layer.operands.iter() {
        let span = layer.operand_span(handle);
        let name = &operand.name;
        let mut report = |message: String, help: String| diagnostics.push(Diagnostic::new(span, message, help));
        if !is_identifier(name) {
            report(
                format!("`{name}` can't be the name of an operand"),
                "use letters, digits and underscores, not starting with a digit; `let` and `layer` are taken"
                    .to_owned(),
            );
        }
        for (message, help) in operand_mistakes(operand) {
            sound[handle.index()] = false;
            report(format!("operand `{name}`: {message}"), help);
        }
        if let Some(first) = first_with_name.insert(name.as_str(), span) {
            diagnostics.push(
                Diagnostic::new(span, format!("two operands are called `{name}`"), "rename one of them")
                    .label(first, "the first is here"),
            );
        }
    }
    sound
}

/// What is wrong with the declaration of one operand, each with its mend.
fn operand_mistakes(operand: &Operand) -> Vec<(String, String)> {
    let TensorType { shape, rank_axis, element, scope } = &operand.ty;
    let dimensions: Vec<&Dimension> = match shape {
        Shape::Scalar => vec![],
        Shape::Vector(n) => vec![n],
        Shape::Matrix(m, n) => vec![m, n],
    };
    let mut mistakes = Vec::new();
    let mut wrong = |message: String, help: &str| mistakes.push((message, help.to_owned()));
    match (operand.role, shape) {
        (Role::Input, Shape::Matrix(Dimension::Tokens, d)) if *d != Dimension::Tokens => {}
        (Role::Input, _) => {
            wrong(format!("the input must be [tokens, d], this is {shape}"), "declare it input[tokens, D]")
        }
        (Role::Residual, Shape::Matrix(Dimension::Tokens, k)) if *k != Dimension::Tokens => {}
        (Role::Residual, _) => {
            wrong(format!("a residual must be [tokens, k], this is {shape}"), "declare it residual[tokens, K]")
        }
        (_, _) if dimensions.contains(&&Dimension::Tokens) => wrong(
            format!("only the input and the residual have the dimension tokens, this is {shape}"),
            "name the dimension otherwise",
        ),
        (Role::BaseWeight | Role::Sparse, Shape::Matrix(..)) | (Role::Bias, Shape::Vector(_)) | (Role::Adapter, _) => {}
        (Role::Sparse, _) => wrong(
            format!("a sparse operand must be a matrix, this is {shape}"),
            "declare it sparse[D, K], or adapter[..]",
        ),
        (Role::BaseWeight, _) => {
            wrong(format!("the base weight must be a matrix, this is {shape}"), "declare it weight[D, K]")
        }
        (Role::Bias, _) => wrong(format!("a bias must be a vector, this is {shape}"), "declare it bias[K]"),
    }
    for dimension in dimensions {
        match dimension {
            Dimension::Product(..) => wrong(
                format!("an operand has an extent of pairs, {dimension}"),
                "name the dimension: pairs are what face_splitting and khatri_rao make",
            ),
            Dimension::Fixed(0) => wrong("an extent is 0".to_owned(), "extents are positive"),
            Dimension::Symbol(name) if name == "tokens" || !is_identifier(name) => wrong(
                format!("`{name}` can't be the name of a dimension"),
                "use letters, digits and underscores, as in D",
            ),
            _ => {}
        }
    }
    if operand.role == Role::Sparse && *element != ElementType::F32 {
        wrong("a sparse operand is kept in f32".to_owned(), "leave its element type out");
    }
    if rank_axis.is_some() {
        wrong(
            "an operand can't have a rank axis".to_owned(),
            "declare a matrix and take columns(..) or rows(..) of it",
        );
    }
    if operand.role.scope() != *scope {
        wrong("its role and its scope disagree".to_owned(), "adapters are per segment, everything else is shared");
    }
    mistakes
}

/// Whether `name` can be written in the text form.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.len() <= 64
        && name != "let"
        && name != "layer"
}

/// A role that one operand of a layer has.
struct Single {
    role: Role,
    name: &'static str,
    /// How to mend that there are several.
    merge: &'static str,
}

const INPUT: Single =
    Single { role: Role::Input, name: "input", merge: "declare it as an adapter, or split the layer in two" };

const BASE_WEIGHT: Single = Single { role: Role::BaseWeight, name: "base weight", ..INPUT };

const RESIDUAL: Single =
    Single { role: Role::Residual, name: "residual", merge: "add the two beforehand and declare one" };

fn exactly_one(
    layer: &Layer,
    single: &Single,
    declaration: &str,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Handle<Operand>> {
    let found = at_most_one(layer, single, diagnostics);
    if found.is_none() {
        diagnostics.push(Diagnostic::new(
            Span::default(),
            format!("the layer has no {}", single.name),
            format!("declare one, such as {declaration}"),
        ));
    }
    found
}

fn at_most_one(layer: &Layer, single: &Single, diagnostics: &mut Vec<Diagnostic>) -> Option<Handle<Operand>> {
    let mut found = layer.operands.iter().filter(|(_, operand)| operand.role == single.role).map(|(handle, _)| handle);
    let first = found.next()?;
    for further in found {
        diagnostics.push(
            Diagnostic::new(
                layer.operand_span(further),
                format!("a layer has one {}, this is another", single.name),
                single.merge,
            )
            .label(layer.operand_span(first), "the first is here"),
        );
    }
    Some(first)
}

/// Reports a missing or ill-typed root. A root without rows per token is no mistake of its own where there is no input.
fn check_root(
    layer: &Layer,
    types: &[Option<TensorType>],
    has_input: bool,
    diagnostics: &mut Vec<Diagnostic>,
) -> Option<Handle<Node>> {
    let Some(root) = layer.root else {
        diagnostics.push(Diagnostic::new(
            Span::default(),
            "the layer has no output",
            "write the equation, such as { x @ w0 }",
        ));
        return None;
    };
    let Some(ty) = types.get(root.index()) else {
        diagnostics.push(Diagnostic::new(
            Span::default(),
            format!("the output, node {root:?}, does not exist"),
            "a handle of another layer can't be used",
        ));
        return None;
    };
    let (message, help) = match ty {
        Some(TensorType { rank_axis: Some(rank), .. }) => {
            (format!("the output still has the rank axis {rank}"), "reduce it with sum_rank(..) or mean_rank(..)")
        }
        Some(TensorType { shape: Shape::Matrix(Dimension::Tokens, _), .. }) | None => return Some(root),
        Some(_) if !has_input => return Some(root),
        Some(other) => {
            (format!("the output must be [tokens, k], this is {other}"), "multiply the input with the weight: x @ (..)")
        }
    };
    diagnostics.push(Diagnostic::new(layer.node_span(root), message, help));
    None
}

fn check_use(layer: &Layer, root: Handle<Node>, diagnostics: &mut Vec<Diagnostic>) {
    let reachable = layer.reachable_from(root);
    let mut used = vec![false; layer.operands.len()];
    for (handle, node) in layer.nodes.iter() {
        if let Node::Operand(operand) = node
            && reachable[handle.index()]
            && let Some(used) = used.get_mut(operand.index())
        {
            *used = true;
        }
    }
    for (handle, operand) in layer.operands.iter().filter(|(handle, _)| !used[handle.index()]) {
        diagnostics.push(Diagnostic::new(
            layer.operand_span(handle),
            format!("the output does not depend on operand `{}`", operand.name),
            "use it in the equation, or remove it",
        ));
    }
}
