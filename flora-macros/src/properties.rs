//! Properties of the whole macro, on generated functions: whatever stands there it answers with Rust items, and an equation
//! means what the same equation means in flora-ir's text form.

use flora_ir::algebra::normalize;
use flora_ir::{parse, print, verify};
use proc_macro2::TokenStream;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::{ast, check, compile};

fn seeded(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, rng_seed: RngSeed::Fixed(2), failure_persistence: None, ..ProptestConfig::default() }
}

/// Words of the language and of Rust around it, in no order.
fn soup() -> impl Strategy<Value = String> {
    const WORDS: &[&str] = &[
        "x",
        "w0",
        "b",
        "c",
        "let",
        "=",
        ";",
        "+",
        "-",
        "*",
        "/",
        "%",
        ".",
        ",",
        "matmul",
        "columns",
        "sum_rank",
        "relu",
        "(",
        ")",
        "{",
        "}",
        "[",
        "]",
        "<",
        ">",
        "::",
        "&",
        "mut",
        "_",
        "1",
        "0.5f32",
        "1e999",
        "'a'",
        "\"s\"",
        "if",
        "return",
        "|x|",
        "..",
        "!",
        "Tokens",
        "Weight",
        "Adapter",
        "Residual<K>",
        "D",
        "f16",
        "r#type",
        "as",
        "x.matmul(w0)",
        "fn f() {}",
        "self",
    ];
    prop::collection::vec(prop::sample::select(WORDS), 0..12).prop_map(|words| words.join(" "))
}

/// One expression, written for Rust and in the text form.
fn expression() -> impl Strategy<Value = (String, String)> {
    let leaf = prop::sample::select(&["x", "w0", "b", "a", "l", "s", "bias", "residual", "0.5", "3"][..])
        .prop_map(|name| (name.to_owned(), name.to_owned()));
    leaf.prop_recursive(5, 24, 2, |inner| {
        let operator = prop::sample::select(&["+", "*", "/", "@"][..]);
        let functions = [
            ("columns", "columns"),
            ("rows", "rows"),
            ("sum_rank", "sum_rank"),
            ("mean_rank", "mean_rank"),
            ("column_norm", "column_norm"),
            ("transpose", "transpose"),
            ("gelu", "gelu_erf"),
            ("silu", "silu"),
        ];
        let pairs = prop::sample::select(&["face_splitting", "khatri_rao"][..]);
        let pairs = (inner.clone(), pairs, inner.clone()).prop_map(|((l, text_l), name, (r, text_r))| {
            (format!("({l}).{name}({r})"), format!("{name}({text_l}, {text_r})"))
        });
        let binary = (inner.clone(), operator, inner.clone()).prop_map(|((l, text_l), operator, (r, text_r))| {
            let rust = if operator == "@" { format!("({l}).matmul({r})") } else { format!("({l}) {operator} ({r})") };
            (rust, format!("({text_l}) {operator} ({text_r})"))
        });
        let unary =
            (prop::sample::select(functions.to_vec()), inner).prop_map(|((method, function), (value, text))| {
                (format!("({value}).{method}()"), format!("{function}({text})"))
            });
        prop_oneof![3 => binary, 1 => pairs, 1 => unary]
    })
}

/// A value `[tokens, K]`, written for Rust and in the text form: without mistakes by construction.
fn output() -> impl Strategy<Value = (String, String)> {
    const WEIGHTS: &[(&str, &str)] = &[
        ("w0", "w0"),
        ("(w0 + s * b.matmul(a))", "(w0 + s * (b @ a))"),
        ("(w0 - w0 * b.matmul_mean(a))", "(w0 + -1 * (w0 * matmul_mean(b, a)))"),
        ("(w0 / w0.column_norm() * 0.5)", "(w0 / column_norm(w0) * 0.5)"),
        ("(w0 + b.face_splitting(b).matmul(a.khatri_rao(a)))", "(w0 + face_splitting(b, b) @ khatri_rao(a, a))"),
        ("(w0 + a.transpose().matmul(b.transpose()).transpose())", "(w0 + transpose(transpose(a) @ transpose(b)))"),
    ];
    // `$` is the value so far.
    const STEPS: &[(&str, &str)] = &[
        ("l * $", "l * $"),
        ("-$ / s", "(-1 * $) / s"),
        ("2 * ($ / 3 + $)", "2 * ($ / 3 + $)"),
        (
            "$ - (a.rows() * (b.columns() * x).matmul(w0)).sum_rank()",
            "$ + -1 * sum_rank(rows(a) * ((columns(b) * x) @ w0))",
        ),
        (
            "$ + (a.rows() * (x * b.columns()).matmul(w0)).mean_rank()",
            "$ + mean_rank(rows(a) * ((x * columns(b)) @ w0))",
        ),
    ];
    let linear =
        prop::sample::select(WEIGHTS).prop_map(|(weight, text)| (format!("x.matmul({weight})"), format!("x @ {text}")));
    linear.prop_recursive(3, 4, 1, |inner| {
        (inner, prop::sample::select(STEPS)).prop_map(|((value, value_text), (step, step_text))| {
            (step.replace('$', &format!("({value})")), step_text.replace('$', &format!("({value_text})")))
        })
    })
}

/// An equation that uses every operand, with mistakes or without.
fn equation() -> impl Strategy<Value = (String, String)> {
    const ACTIVATIONS: &[(&str, &str)] = &[("", ""), (".relu()", "relu"), (".gelu_tanh()", "gelu_tanh")];
    let part = prop_oneof![expression(), output()];
    (part, prop::sample::select(ACTIVATIONS)).prop_map(|((rust, text), (method, function))| {
        let rust = format!("((x.matmul(w0 + b.matmul(a)) * s + ({rust})) * l + bias){method} + residual");
        (rust, format!("{function}(((x @ (w0 + (b @ a))) * s + ({text})) * l + bias) + residual"))
    })
}

proptest! {
    #![proptest_config(seeded(400))]

    #[test]
    fn any_function_is_answered_with_items(arguments in soup(), returned in soup(), body in soup()) {
        let function = format!("fn f({arguments}) -> {returned} {{ {body} }}");
        let body_alone = format!("fn f(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {{ {body} }}");
        let argument_alone = format!("fn f(x: Tokens<D>, w0: Weight<D, K>, {arguments}) -> Tokens<K> {{ x.matmul(w0) }}");
        for source in [function, body_alone, argument_alone] {
            // What isn't even tokens never reaches a macro.
            if let Ok(tokens) = source.parse::<TokenStream>() {
                let answer = compile(TokenStream::new(), tokens);
                prop_assert!(syn::parse2::<syn::File>(answer.clone()).is_ok(), "{source}\n{answer}");
            }
        }
    }

    #[test]
    fn an_equation_means_what_its_text_form_means((rust, text) in equation()) {
        let function = format!(
            "fn f(x: Tokens<D>, w0: Weight<D, K>, b: Adapter<D, R>, a: Adapter<R, K>, l: Adapter<K>, s: Scale, bias: Bias<K>, \
             residual: Residual<K>) -> Tokens<K> {{ {rust} }}"
        );
        let text = format!(
            "layer f(x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], l: adapter[K], s: adapter[], \
             bias: bias[K], residual: residual[tokens, K]) {{ {text} }}"
        );
        let function: syn::ItemFn = syn::parse_str(&function).expect("the generator writes Rust");
        let written = ast::read(&function).and_then(|equation| check::check(&equation));
        let expected = parse(&text).expect("the generator writes the text form");
        let checked = verify(expected.clone()).and_then(|verified| {
            normalize(&verified).map_err(|error| vec![error.diagnostic()])
        });
        match (written, checked) {
            (Ok(layer), Ok(_)) => prop_assert_eq!(print(&layer), print(&expected)),
            (Err(written), Err(expected)) => {
                let mut written: Vec<_> = written.into_iter().map(|error| error.to_string()).collect();
                let mut expected: Vec<_> =
                    expected.iter().map(|mistake| format!("{}\nhelp: {}", mistake.message, mistake.help)).collect();
                written.sort();
                expected.sort();
                prop_assert_eq!(written, expected);
            }
            (written, expected) => {
                prop_assert!(false, "only one accepts it: {:?}, {:?}", written.err(), expected.err());
            }
        }
    }
}

#[test]
fn a_long_expression_is_a_mistake_and_no_overflow() {
    let sum = vec!["x.matmul(w0)"; 1000].join(" + ");
    let function = format!("fn f(x: Tokens<D>, w0: Weight<D, K>) -> Tokens<K> {{ {sum} }}");
    let answer = compile(TokenStream::new(), function.parse().expect("these are tokens")).to_string();
    assert!(answer.contains("nested more than"), "{answer}");
}
