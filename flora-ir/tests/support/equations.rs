//! Random equations that have a normal form.

use proptest::prelude::*;

/// An equation over the operands below that has a normal form: random products, sums, scales and groupings, with a residual or
/// without.
pub(crate) fn equation() -> impl Strategy<Value = String> {
    let scalar = prop::sample::select(vec!["s", "2.5", "(s * s)", "(s / 3)", "(1 + s * s)"]);
    let inner = prop::sample::select(vec!["i", "(i * j)", "(s * i)", "(1 + i)"]);
    let outer = prop::sample::select(vec!["l", "(l * k)", "(1 / k)", "column_norm(w0 + b @ a)", "(1 + l)"]);
    let pair = prop_oneof![
        Just("(b @ a)".to_owned()),
        Just("matmul_mean(b, a)".to_owned()),
        Just("(d @ (a * l))".to_owned()),
        Just("((b * e) @ c)".to_owned()),
        Just("((b + d) @ c)".to_owned()),
        Just("((b @ a) * (d @ c))".to_owned()),
        Just("((d @ a) * (s * (b @ c)) * (b @ a))".to_owned()),
    ];
    let pair = pair.prop_recursive(2, 6, 2, move |pair| {
        prop_oneof![
            (scalar.clone(), pair.clone()).prop_map(|(s, pair)| format!("({pair} * {s})")),
            pair.clone().prop_map(|pair| format!("({pair} / k)")),
            (pair.clone(), pair).prop_map(|(one, other)| format!("({one} + {other})")),
        ]
    });
    let weight = prop_oneof![
        Just("w0".to_owned()),
        Just("(w0 @ (transpose(a) @ c))".to_owned()),
        Just("((b @ transpose(d)) @ w0)".to_owned()),
        pair.clone(),
        pair.clone().prop_map(|pair| format!("(w0 * {pair})")),
        pair.clone().prop_map(|pair| format!("({pair} * w0)")),
        pair.prop_map(|pair| format!("(w0 * (1 + {pair}))")),
    ];
    let scaled_weight = weight.prop_recursive(2, 8, 2, {
        let outer = outer.clone();
        move |weight| {
            prop_oneof![
                (outer.clone(), weight.clone()).prop_map(|(l, weight)| format!("({weight} * {l})")),
                weight.clone().prop_map(|weight| format!("({weight} / (1 + s * s))")),
                (weight.clone(), weight).prop_map(|(one, other)| format!("({one} + {other})")),
            ]
        }
    });
    let input = prop_oneof![
        2 => Just("x".to_owned()),
        1 => inner.clone().prop_map(|i| format!("({i} * x)")),
        1 => inner.clone().prop_map(|i| format!("(x * {i} * s)")),
        1 => inner.prop_map(|i| format!("(x + {i} * x / 2)")),
    ];
    let term = prop_oneof![
        5 => (input.clone(), scaled_weight).prop_map(|(x, weight)| format!("({x} @ {weight})")),
        1 => input.clone().prop_map(|x| format!("((({x} @ b) * e) @ a)")),
        1 => input.clone().prop_map(|x| format!("matmul_mean({x} @ b, c)")),
        1 => input.clone().prop_map(|x| format!("sum_rank(((columns(b) * {x}) @ w0) * rows(a) * l)")),
        1 => input.clone().prop_map(|x| format!("mean_rank(s * rows(a) * (({x} * columns(d) * columns(b)) @ (w0 / k)))")),
        1 => input.clone().prop_map(|x| format!("sum_rank(rows(c) * rows(a) * ({x} @ w0))")),
        1 => input.prop_map(|x| format!("mean_rank((columns(b) * {x}) @ (w0 * l))")),
    ];
    let scaled_term = term.prop_recursive(3, 6, 2, move |term| {
        prop_oneof![
            (outer.clone(), term.clone()).prop_map(|(l, term)| format!("({l} * {term})")),
            term.clone().prop_map(|term| format!("({term} / k)")),
            term.clone().prop_map(|term| format!("identity({term})")),
            (term.clone(), term).prop_map(|(one, other)| format!("({one} + {other})")),
        ]
    });
    // Where no activation stands around the sum, the residual may stand anywhere in it. `$` is the sum of the terms.
    let epilogue = prop::sample::select(vec![
        "($ + bias)",
        "relu($ + bias)",
        "gelu_erf(bias + $)",
        "silu($ + bias)",
        "gelu_tanh($ + bias) + residual",
        "residual + relu($ + bias)",
        "$ + bias + residual",
        "$ + l * k + bias",
        "silu($ + (s + bias) + l)",
        "$ + (residual + bias)",
        "(bias + identity(residual + $))",
    ]);
    // The last summand reads every operand once, so that none is left over.
    let rest = "((i * j * x) @ (b * e) + x @ d) @ (a + c) + l * k * s * (x @ w0)";
    (scaled_term, epilogue).prop_map(move |(term, epilogue)| epilogue.replace('$', &format!("({term} + {rest})")))
}

/// The operands of `equation` and itself.
pub(crate) fn source(equation: &str) -> String {
    let residual = if equation.contains("residual") { ", residual: residual[tokens, K]" } else { "" };
    format!("layer f({OPERANDS}{residual}) {{ {equation} }}")
}

/// The operands but for the residual.
pub(crate) const OPERANDS: &str = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], d: adapter[D, R], a: adapter[R, K], \
    c: adapter[R, K], e: adapter[R], i: adapter[D], j: adapter[D], l: adapter[K], k: adapter[K], s: adapter[], bias: bias[K]";

/// Odd sizes: tokens, D, K, R.
pub(crate) fn sizes() -> impl Strategy<Value = [usize; 4]> {
    (1usize..5, 1usize..10, 1usize..10, 1usize..5).prop_map(|(tokens, d, k, r)| [tokens, d, k, r])
}
