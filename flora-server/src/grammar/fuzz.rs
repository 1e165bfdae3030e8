//! Forms of pieces in any order: whatever they are, a grammar or an error comes soon, and no text by one panics.
//!
//! `FLORA_FUZZ_CASES` sets the cases per property (64 where it is not set); the seed is fixed.

use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed};
use serde_json::{Map, Value, json};

use super::tests::{begin, factory};

const KEYWORDS: [&str; 24] = [
    "type",
    "properties",
    "patternProperties",
    "additionalProperties",
    "required",
    "items",
    "prefixItems",
    "minItems",
    "maxItems",
    "anyOf",
    "oneOf",
    "allOf",
    "enum",
    "const",
    "$ref",
    "$defs",
    "minimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "pattern",
    "format",
    "not",
];
const TEXTS: [&str; 14] = [
    "object",
    "array",
    "string",
    "integer",
    "number",
    "null",
    "#",
    "#/$defs/a",
    "a",
    "(a|b)*",
    "[",
    "date",
    "\u{e9}{3,}",
    "^.$",
];
const REGEX: [&str; 20] = [
    "(",
    ")",
    "[",
    "]",
    "[^",
    "{2,}",
    "{3}",
    "{1000}",
    "*",
    "+",
    "?",
    "|",
    "a",
    "b-z",
    "\\d",
    "\\",
    "^",
    "$",
    "(?i)",
    "\u{1f980}",
];
const LARK: [&str; 22] = [
    "start: ",
    "\n",
    "a: ",
    "B: ",
    "a ",
    "B ",
    "start ",
    "\"x\" ",
    "/y*/ ",
    "| ",
    "( ",
    ") ",
    "* ",
    "+ ",
    "? ",
    "{2,3} ",
    "%json {} ",
    "%ignore ",
    "<[3]> ",
    "\"a\"..\"f\" ",
    "@b ",
    "[capture] ",
];
const GBNF: [&str; 16] = [
    "root ::= ",
    "\n",
    "a ::= ",
    "A ",
    "a ",
    "root ",
    "\"x\\n\" ",
    "[a-z] ",
    "[^\"] ",
    ". ",
    "| ",
    "( ",
    ") ",
    "* ",
    "{2,30} ",
    "# ",
];

fn config() -> Config {
    let cases = std::env::var("FLORA_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(64);
    Config { cases, rng_seed: RngSeed::Fixed(22), failure_persistence: None, ..Config::default() }
}

fn schema() -> impl Strategy<Value = Value> {
    let numbers = [0.0, 1.0, -3.0, 0.5, 1e9, 1e300, -1e-300];
    let leaf = prop_oneof![
        Just(json!(true)),
        Just(json!(null)),
        proptest::sample::select(numbers.to_vec()).prop_map(|number| json!(number)),
        (0u64..40).prop_map(|number| json!(number)),
        proptest::sample::select(TEXTS.to_vec()).prop_map(|text| json!(text)),
    ];
    leaf.prop_recursive(5, 40, 5, |inner| {
        let object = vec((proptest::sample::select([&KEYWORDS[..], &["a"]].concat()), inner.clone()), 0..5);
        let object = object.prop_map(|fields| {
            Value::Object(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
        });
        prop_oneof![3 => object, 1 => vec(inner, 0..4).prop_map(Value::Array)]
    })
}

fn text(pieces: &'static [&'static str]) -> impl Strategy<Value = String> {
    vec(proptest::sample::select(pieces), 0..24).prop_map(|pieces| pieces.concat())
}

/// Compiles a form, and follows it by tokens that it allows.
fn follow(body: &Value, draws: &[usize]) {
    let start = Instant::now();
    let Ok(compiled) = begin(body) else { return soon(start) };
    let mut state = flora_engine::CompiledGrammar::begin(&compiled);
    for draw in draws {
        let mut logits = vec![0.0; factory().tokens];
        if state.mask(&mut logits).is_err() {
            break;
        }
        let allowed: Vec<usize> = (0..logits.len()).filter(|token| logits[*token] == 0.0).collect();
        if allowed.is_empty() || state.advance(allowed[draw % allowed.len()] as u32) != Ok(false) {
            break;
        }
    }
    soon(start);
}

fn soon(start: Instant) {
    assert!(start.elapsed() < Duration::from_secs(20), "it took {:?}", start.elapsed());
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_schema(schema in schema(), definition in schema(), draws in vec(any::<usize>(), 12)) {
        let mut schema = schema;
        if let Value::Object(fields) = &mut schema {
            fields.insert("$defs".to_owned(), json!({"a": definition}));
        }
        follow(&json!({"guided_json": schema}), &draws);
    }

    #[test]
    fn any_regular_expression(pattern in text(&REGEX), draws in vec(any::<usize>(), 12)) {
        follow(&json!({"guided_regex": pattern}), &draws);
    }

    #[test]
    fn any_grammar(lark in text(&LARK), gbnf in text(&GBNF), draws in vec(any::<usize>(), 12)) {
        follow(&json!({"guided_grammar": lark}), &draws);
        follow(&json!({"guided_grammar": gbnf}), &draws);
    }
}
