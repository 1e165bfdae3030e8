//! What is priced and emitted for an equation is what its adapters fold to, scale by scale.

use flora_ir::algebra::{FoldedAdapter, normalize};
use flora_ir::{Bindings, Dimension, Value, VerifiedLayer, parse, verify};
use flora_plan::batch::{AdapterSlots, VirtualRowSlots};
use flora_plan::lowering::{Part, parts_of};
use proptest::prelude::*;

const OPERANDS: &str = "x: input[tokens, D], w0: weight[D, K], b: adapter[D, R], a: adapter[R, K], i: adapter[D], \
    l: adapter[K], s: adapter[]";

fn layer(equation: &str) -> VerifiedLayer {
    let source = format!("layer f({OPERANDS}) {{ {equation} }}");
    verify(parse(&source).expect("an equation")).unwrap_or_else(|mistakes| panic!("{equation}: {mistakes:?}"))
}

/// Sums of up to four terms, each with a scale of any shape on either side; the last one reads every operand.
fn equations() -> impl Strategy<Value = String> {
    let input = prop::sample::select(vec!["x", "(i * x)", "(s * x)", "(2 * x)", "(i * s * x)"]);
    let weight = prop::sample::select(vec!["w0", "w0", "w0", "(w0 * (b @ a))", "(b @ a)", "(w0 + s * (b @ a))"]);
    let output = prop::sample::select(vec!["", "l * ", "s * ", "0.5 * ", "l * s * "]);
    let term = (output, input, weight).prop_map(|(output, input, weight)| format!("{output}({input} @ {weight})"));
    let last = prop::sample::select(vec!["l * ((s * i * x) @ (w0 * (b @ a)))", "l * ((s * i * x) @ (w0 + b @ a))"]);
    (prop::collection::vec(term, 0..4), last)
        .prop_map(|(terms, last)| terms.into_iter().chain([last.to_owned()]).collect::<Vec<_>>().join(" + "))
}

fn adapter(d: usize, k: usize, rank: usize) -> Bindings {
    let matrix = |rows, columns| Value::matrix(rows, columns, vec![0.5; rows * columns]).expect("as many values");
    let mut adapter = Bindings::from_iter([
        ("b", matrix(d, rank)),
        ("a", matrix(rank, k)),
        ("i", Value::vector(vec![2.0; d])),
        ("l", Value::vector(vec![3.0; k])),
        // The one number at which a scale could be left out.
        ("s", Value::scalar(1.0)),
    ]);
    adapter.insert_extent(Dimension::Symbol("K".to_owned()), k);
    adapter
}

/// Which scales the virtual rows have, and the rank of the additive part.
fn scales(slots: &AdapterSlots) -> (Vec<[bool; 2]>, u32) {
    let of = |row: &VirtualRowSlots| [row.in_scale.is_some(), row.out_scale.is_some()];
    (slots.virtual_rows.iter().map(of).collect(), slots.low_rank.rank)
}

fn folded_scales(folded: &FoldedAdapter) -> (Vec<[bool; 2]>, u32) {
    let rows = folded.virtual_rows.iter().map(|row| [row.in_scale.is_some(), row.out_scale.is_some()]);
    (rows.collect(), folded.low_rank.len() as u32)
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: proptest::test_runner::RngSeed::Fixed(13), ..Default::default() })]

    #[test]
    fn the_priced_rows_are_the_folded_rows(equation in equations(), (d, k, rank) in (1usize..5, 1usize..5, 1usize..4)) {
        let linear = normalize(&layer(&equation)).expect("a normal form").linear;
        let folded = linear.fold(&adapter(d, k, rank)).expect("operands that fit");
        let slots = AdapterSlots::of(&linear.layout(rank), 7);
        if !folded.virtual_rows.is_empty() {
            prop_assert_eq!(scales(&slots), folded_scales(&folded), "{}", equation);
        }
        let parts = parts_of(&linear);
        prop_assert_eq!(parts.contains(&Part::Additive), slots.low_rank.rank > 0, "{}", equation);
        let is_multiplicative = !folded.virtual_rows.is_empty() && !slots.is_plain();
        prop_assert_eq!(parts.contains(&Part::Multiplicative), is_multiplicative, "{}", equation);
    }
}

#[test]
fn slots_are_counted_from_the_first() {
    let linear = normalize(&layer("s * ((i * x) @ w0) + l * (x @ w0) + x @ (b @ a)")).expect("a normal form").linear;
    let slots = AdapterSlots::of(&linear.layout(3), 7);
    let row = |in_scale, out_scale| VirtualRowSlots { in_scale, out_scale };
    assert_eq!(slots.virtual_rows, [row(None, Some(7)), row(Some(8), None)]);
    assert_eq!((slots.low_rank.shrink, slots.low_rank.expand, slots.low_rank.rank), (9, 9, 3));
}

#[test]
fn an_additive_part_alone_has_a_row_of_zeros() {
    let linear = normalize(&layer("s * l * column_norm(w0) * ((i * x) @ (b @ a))")).expect("a normal form").linear;
    assert!(linear.layout(2).virtual_rows.is_empty());
    assert_eq!(scales(&AdapterSlots::of(&linear.layout(2), 0)), (vec![[false, true]], 2));
    assert_eq!(parts_of(&linear), [Part::Additive]);
}
