//! The text form: what is printed parses back to the same graph, and no text makes the parser panic.

mod support;

use flora_ir::{Layer, Node, builtin, parse, print};
use proptest::prelude::*;
use support::{config, fuzz_cases, layer_from_choices, same_graph};

#[test]
fn builtins_round_trip() {
    for name in builtin::names() {
        let layer = builtin::builtin(name).expect(name).layer();
        let again = parse(&print(layer)).expect(name);
        assert!(same_graph(layer, &again), "{}", print(layer));
    }
}

#[test]
fn precedence_is_pythons() {
    let same = |one: &str, other: &str| {
        let body = |equation: &str| {
            parse(&format!("layer f(a: adapter[], b: adapter[], c: adapter[]) {{ {equation} }}")).unwrap()
        };
        assert!(same_graph(&body(one), &body(other)), "{one} is not {other}");
    };
    same("a @ b * c / a", "((a @ b) * c) / a");
    same("a + b @ c + -2 * a", "(a + (b @ c)) + (-2.0 * a)");
    same("let t = a * b; t + t", "let u = (a * b); u + u");
}

#[test]
fn shared_nodes_stay_shared() {
    let layer = parse("layer f(x: input[tokens, D], w0: weight[D, K]) { let y = x @ w0; y + y }").unwrap();
    let again = parse(&print(&layer)).unwrap();
    let matmuls = again.nodes.iter().filter(|(_, node)| matches!(node, Node::MatMul { .. })).count();
    assert_eq!(matmuls, 1);
}

#[test]
fn element_types_dimensions_and_numbers_survive() {
    let source =
        "layer f(x: input[tokens, 37]: bf16, w0: weight[37, K]: f16, c: bias[K]) {\n    x @ w0 * 1e-7 + c * -0.1\n}\n";
    let printed = print(&parse(source).unwrap());
    assert_eq!(
        printed,
        "layer f(x: input[tokens, 37]: bf16, w0: weight[37, K]: f16, c: bias[K]) {\n    (x @ w0) * 1e-7 + c * -0.1\n}\n"
    );
}

#[test]
fn a_residual_survives() {
    let source = "layer f(x: input[tokens, D], w0: weight[D, K], residual: residual[tokens, K]: bf16) {\n    relu(x @ w0) + residual\n}\n";
    let layer = parse(source).unwrap();
    assert_eq!(print(&layer), source);
    let (_, residual) = layer.operands.iter().next_back().unwrap();
    assert_eq!((residual.role, residual.name.as_str()), (flora_ir::Role::Residual, "residual"));
}

#[track_caller]
fn refuses(source: &str, place: &str, message: &str) {
    let error = parse(source).expect_err("the parser must refuse it");
    let span = error.span();
    assert_eq!(source.get(span.start as usize..span.end as usize), Some(place), "{error}");
    assert!(error.to_string().contains(message), "{error}");
    assert!(error.diagnostic.render("text", source).contains(message));
}

#[test]
fn mistakes_point_at_their_place() {
    refuses("", "", "expected `layer`");
    refuses("layer f(x: output[tokens, D]) { x }", "output", "is not a role");
    refuses("layer f(x: residuals[tokens, D]) { x }", "residuals", "is not a role");
    refuses("layer f(x: input[tokens, D, E]) { x }", "[", "at most two dimensions");
    refuses("layer f(x: input[0]) { x }", "0", "is not an extent");
    refuses("layer f(x: input[99999999999999999999]) { x }", "99999999999999999999", "is not an extent");
    refuses("layer f(x: input[tokens, D]: f8) { x }", "f8", "is not an element type");
    refuses("layer f(x: input[tokens, D], x: bias[K]) { x }", "x", "already defined");
    refuses("layer f(x: input[tokens, D]) { x @ w }", "w", "is not defined");
    refuses("layer f(x: input[tokens, D]) { norm(x) }", "norm", "no function `norm`");
    refuses("layer f(x: input[tokens, D]) { x - x }", "-", "no subtraction");
    refuses("layer f(x: input[tokens, D]) { x * 1e999 }", "1e999", "too large");
    refuses("layer f(x: input[tokens, D]) { x ", "", "found the end");
    refuses("layer f(x: input[tokens, D]) { x } x", "x", "unexpected");
    refuses("layer f(x: input[tokens, D]) { x § x }", "§", "means nothing");
    refuses("layer f(x: input[tokens, D]) { let = x; x }", "=", "expected a name");
}

#[test]
fn deep_long_and_large_texts_are_refused() {
    let deep = format!("layer f(x: input[tokens, D]) {{ {}x{} }}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(parse(&deep).unwrap_err().to_string().contains("nested too deeply"));
    let calls = format!("layer f(x: input[tokens, D]) {{ {}x", "relu(".repeat(100_000));
    assert!(parse(&calls).unwrap_err().to_string().contains("nested too deeply"));
    let long = format!("layer f(x: input[tokens, D]) {{ x{} }}", " + x".repeat(100_000));
    assert!(parse(&long).unwrap_err().to_string().contains("too long"));
    let large = "/".repeat(2 << 20);
    assert!(parse(&large).unwrap_err().to_string().contains("bytes"));
}

#[test]
fn a_graph_that_cannot_be_written_is_printed_all_the_same() {
    let mut deep = Layer::new("f");
    let mut value = deep.push(Node::Constant(f64::NAN), Default::default());
    for _ in 0..50_000 {
        value = deep.push(Node::Columns(value), Default::default());
    }
    let mut other = Layer::new("g");
    other.root = Some(value);
    assert!(print(&other).starts_with("layer g() {"));
    deep.root = Some(value);
    assert!(print(&deep).len() > 50_000);
}

/// Pieces of the text form, for texts that are nearly right.
const PIECES: &[&str] = &[
    "layer",
    "let",
    "f",
    "x",
    "w0",
    "input",
    "adapter",
    "residual",
    "tokens",
    "columns",
    "sum_rank",
    "matmul_mean",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    ";",
    "=",
    "+",
    "-",
    "*",
    "/",
    "@",
    "1",
    "1.5e3",
    "//",
    "\n",
    "é",
    "layer f(x: input[tokens, D]) {",
];

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn random_graphs_round_trip(choices in prop::collection::vec(any::<[u8; 3]>(), 1..60)) {
        let layer = layer_from_choices(&choices);
        let text = print(&layer);
        let again = parse(&text).map_err(|error| TestCaseError::fail(format!("{error}\n{text}")))?;
        prop_assert!(same_graph(&layer, &again), "{text}\n{}", print(&again));
        prop_assert_eq!(print(&again), text);
    }
}

/// Whatever the text, it is parsed or refused; `cargo xtask test` runs these for longer.
mod fuzz {
    use super::*;

    proptest! {
        #![proptest_config(config(fuzz_cases()))]

        #[test]
        fn any_string_is_parsed_or_refused(source in ".{0,200}") {
            let _ = parse(&source).map(flora_ir::verify);
        }

        #[test]
        fn any_words_are_parsed_or_refused(words in prop::collection::vec(prop::sample::select(PIECES), 0..60)) {
            let source = words.join(" ");
            if let Err(error) = parse(&source) {
                prop_assert!(!error.diagnostic.render("text", &source).is_empty());
            }
        }

        #[test]
        fn mutated_layers_are_parsed_or_refused(
            name in prop::sample::select(builtin::names().collect::<Vec<_>>()),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), prop::sample::select(PIECES)), 1..6),
        ) {
            let mut text: Vec<char> = builtin::source(name).unwrap_or_default().chars().collect();
            for (from, to, piece) in edits {
                let from = from.index(text.len() + 1);
                let to = (from + to.index(8)).min(text.len());
                text.splice(from..to, piece.chars());
            }
            let source: String = text.into_iter().collect();
            match parse(&source).map(flora_ir::verify) {
                Err(error) => prop_assert!(!error.diagnostic.render("text", &source).is_empty()),
                Ok(Err(mistakes)) => prop_assert!(mistakes.iter().all(|mistake| !mistake.render("text", &source).is_empty())),
                Ok(Ok(layer)) => drop(flora_ir::algebra::normalize(&layer)),
            }
        }
    }
}
