//! Forms that are followed, forms that can't be, and forms that nobody means well with.

use std::time::{Duration, Instant};

use flora_engine::CompiledGrammar;
use serde_json::{Map, Value, json};

use super::*;

/// Bytes as tokens, and some words that span several of a text's parts.
pub(super) fn factory() -> &'static Factory {
    static FACTORY: OnceLock<Factory> = OnceLock::new();
    FACTORY.get_or_init(|| {
        let words = ["{\"", "\":", "\", \"", "}}", "null", "tru", " \n", "\u{e9}t\u{e9}"];
        let bytes = (0..=255).map(|byte| vec![byte]);
        build(bytes.chain(words.map(|word| word.as_bytes().to_vec())).collect()).unwrap()
    })
}

pub(super) fn begin(body: &Value) -> Result<Compiled, String> {
    let form = Form::parse(body).map_err(|error| error.to_string())?.ok_or("no form")?;
    compile_form(factory(), &form)
}

/// What is wrong with a form; that it takes no longer than it may is asserted.
fn fault(body: &Value) -> String {
    let start = Instant::now();
    let fault = begin(body).err().unwrap_or_default();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    fault
}

/// Whether a text is one of the form, cut to bytes.
fn accepts(body: &Value, text: &str) -> bool {
    let mut state = begin(body).unwrap().begin();
    let mut is_over = false;
    for byte in text.bytes() {
        let mut logits = vec![0.0; factory().tokens];
        if is_over || state.mask(&mut logits).is_err() || logits[usize::from(byte)] != 0.0 {
            return false;
        }
        is_over = state.advance(byte.into()).unwrap();
    }
    is_over || state.mask(&mut vec![0.0; factory().tokens]).unwrap()
}

#[test]
fn texts_of_a_form_are_accepted_and_others_not() {
    let object = json!({"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}},
        "required": ["b"], "additionalProperties": false});
    let tight = json!({"structured_outputs": {"json": object, "disable_any_whitespace": true}});
    let open = json!({"structured_outputs": {"json": {"properties": {"a": {"type": "null"}}, "type": "object"},
        "disable_additional_properties": true}});
    let object = json!({"guided_json": object});
    let any = json!({"response_format": {"type": "json_object"}});
    for (body, text, expected) in [
        (&object, r#"{"b": 12}"#, true),
        (&object, r#"{"b":12, "a" : null}"#, true),
        (&object, r#"{"a": null, "b": 12}"#, false),
        (&object, r#"{"b": 1.5}"#, false),
        (&object, r#"{"b": 12"#, false),
        (&object, r#"{"b": 12} and more"#, false),
        (&tight, r#"{"b":12}"#, true),
        (&tight, r#"{"b": 12}"#, false),
        (&open, r#"{"a": null}"#, true),
        (&open, r#"{"c": null}"#, false),
        (&any, r#"{"x": [1, {"y": "\n\u0001é"}]}"#, true),
        (&any, "[]", false),
        (&json!({"guided_choice": ["yes", "yes, \"indeed\"", "no"]}), "yes, \"indeed\"", true),
        (&json!({"guided_choice": ["yes", "no"]}), "yes", true),
        (&json!({"guided_choice": ["yes", "no"]}), "ye", false),
        (&json!({"guided_regex": "^[0-9]{3}-[a-z]+/$"}), "123-abc/", true),
        (&json!({"guided_regex": "[0-9]{3}"}), "1234", false),
        (&json!({"guided_grammar": "start: \"a\" start \"b\" | \"c\""}), "aacbb", true),
        (&json!({"guided_grammar": "start: \"a\" start \"b\" | \"c\""}), "aacb", false),
    ] {
        assert_eq!(accepts(body, text), expected, "{body} {text}");
    }
}

#[test]
fn what_cannot_be_followed_is_told_with_its_place() {
    let property = |schema: Value| json!({"guided_json": {"type": "object", "properties": {"a": {"items": schema}}}});
    for (body, place, reason) in [
        (property(json!({"not": {}})), "at /properties/a/items", "not"),
        (property(json!({"type": "strin"})), "at /properties/a/items", "strin"),
        (property(json!({"pattern": "(a"})), "at /properties/a/items", "unclosed group"),
        (property(json!({"$ref": "#/$defs/none"})), "at /properties/a/items", "none"),
        (property(json!({"$ref": "http://localhost/schema"})), "at /properties/a/items", "localhost"),
        (property(json!({"format": "phone"})), "at /properties/a/items", "phone"),
        (json!({"guided_json": {"minimum": 3, "maximum": 2, "type": "integer"}}), "guided_json", "nsatisfiable"),
        (json!({"guided_json": false}), "guided_json", "a schema is an object"),
        (
            json!({"guided_json": {"patternProperties": (0..80).map(|index| (format!("{index}"), json!({}))).collect::<Map<_, _>>()}}),
            "guided_json",
            "80 patternProperties",
        ),
        (json!({"guided_json": {"type": "object", "x-guidance": {}}}), "guided_json", "x-guidance"),
        (json!({"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}), "guided_json", ""),
        (json!({"guided_regex": "a("}), "guided_regex", "unclosed group"),
        (json!({"guided_regex": "a(?=b)"}), "guided_regex", "look-around"),
        (json!({"guided_regex": "(a)\\1"}), "guided_regex", "backreferences"),
        (json!({"guided_regex": "^$"}), "guided_regex", "empty"),
        (json!({"guided_grammar": "start: other"}), "guided_grammar", "other"),
        (json!({"guided_grammar": "start: \"a\"\nstart \"b\""}), "guided_grammar", "2("),
        (json!({"guided_grammar": "rule: \"a\""}), "guided_grammar", "start"),
    ] {
        let told = fault(&body);
        assert!(told.contains(place) && told.contains(reason), "{body}: {told}");
        assert!(!told.contains("backtrace") && !told.contains('<'), "{told}");
    }
}

/// Schemas and grammars that nobody means well with.
fn hostile() -> Vec<(&'static str, Value)> {
    let json = |schema: Value| json!({"guided_json": schema});
    let deep = |inner: fn(Value) -> Value| (0..100).fold(json!({"type": "null"}), |schema, _| inner(schema));
    let chain = |count: usize| -> Value {
        let definition = |index: usize| (format!("d{index}"), json!({"$ref": format!("#/$defs/d{}", index + 1)}));
        let mut definitions: Map<String, Value> = (0..count).map(definition).collect();
        definitions.insert(format!("d{count}"), json!({"type": "null"}));
        json!({"$ref": "#/$defs/d0", "$defs": definitions})
    };
    let options = |count: usize| -> Value {
        let option = |index: usize| json!({"properties": {format!("p{index}"): {"type": "null"}}});
        json!({"anyOf": (0..count).map(option).collect::<Vec<_>>()})
    };
    let lark = |text: String| json!({"guided_grammar": text});
    let rules = |name: &str, count: usize| -> String {
        let rule = |index: usize| format!("{name}{}: \"a\" {name}{}\n", letters(index), letters(index + 1));
        format!(
            "start: {name}{}\n{}{name}{}: \"b\"",
            letters(0),
            (0..count).map(rule).collect::<String>(),
            letters(count)
        )
    };
    vec![
        ("deep items", json(deep(|inner| json!({"items": inner})))),
        ("deep properties", json(deep(|inner| json!({"type": "object", "properties": {"a": inner}})))),
        ("deep anyOf", json(deep(|inner| json!({"anyOf": [inner, {"type": "string"}]})))),
        ("deep allOf", json(deep(|inner| json!({"allOf": [inner, {"type": "null"}]})))),
        ("a chain of references", json(chain(4500))),
        ("a reference to itself", json(json!({"$ref": "#"}))),
        ("a reference to itself among others", json(json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}))),
        (
            "a reference to itself with siblings",
            json(json!({"$ref": "#", "type": "object", "properties": {"a": {"$ref": "#"}}})),
        ),
        ("an endless list", json(json!({"type": "array", "items": {"$ref": "#"}, "minItems": 1}))),
        ("a product of choices", json(json!({"allOf": vec![options(10); 20]}))),
        (
            "exclusive choices",
            json(json!({"oneOf": (0..2000).map(|index| json!({"const": index})).collect::<Vec<_>>()})),
        ),
        ("a long list", json(json!({"type": "array", "minItems": 1_000_000_000_u64}))),
        ("at most a long list", json(json!({"type": "array", "maxItems": 1_000_000_000_u64}))),
        (
            "long lists of long lists",
            json(json!({"type": "array", "maxItems": 3000, "items": {"type": "array", "maxItems": 3000}})),
        ),
        ("a long text", json(json!({"type": "string", "minLength": 1_000_000_000_u64}))),
        ("at most a long text", json(json!({"type": "string", "maxLength": 1_000_000_000_u64}))),
        ("the longest text", json(json!({"type": "string", "maxLength": u64::MAX}))),
        ("many properties at least", json(json!({"type": "object", "minProperties": 1_000_000_000_u64}))),
        ("strange numbers", json(json!({"type": "number", "multipleOf": 1e-300, "minimum": -1e308, "maximum": 1e308}))),
        ("large multiples", json(json!({"type": "integer", "multipleOf": 1_000_000_007_u64}))),
        ("many values", json(json!({"enum": (0..5000).map(|index| format!("value {index}")).collect::<Vec<_>>()}))),
        (
            "as many patterns as may be",
            json(json!({"type": "object", "patternProperties":
            (0..70).map(|index| (format!("^(a|b)*{index}(c|d)*$"), json!({}))).collect::<Map<_, _>>()})),
        ),
        (
            "many patterns",
            json(json!({"type": "object", "patternProperties":
            (0..400).map(|index| (format!("^(a|b)*{index}(c|d)*$"), json!({}))).collect::<Map<_, _>>()})),
        ),
        ("characters cut in an error", json(json!({"minimum": "\u{e9}".repeat(200), "type": "number"}))),
        ("no schema", json(json!([]))),
        ("a pattern of repetitions", json(json!({"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}))),
        ("repeated repetitions", json!({"guided_regex": "((a{1,1000}){1,1000}){1,1000}"})),
        ("nested repetitions", json!({"guided_regex": "(a*)*b"})),
        ("many choices in a pattern", json!({"guided_regex": "(.*a.{200}|.*b.{200}|.*c.{200})*"})),
        ("parentheses", json!({"guided_regex": format!("{}a{}", "(".repeat(20_000), ")".repeat(20_000))})),
        ("classes", json!({"guided_regex": "[".repeat(50_000)})),
        ("parentheses in Lark", lark(format!("start: {}\"a\"{}", "(".repeat(20_000), ")".repeat(20_000)))),
        ("grammars in grammars", lark(format!("start: {}start: \"a\"{}", "%lark { ".repeat(2000), " }".repeat(2000)))),
        ("a chain of rules", lark(rules("r", 6000))),
        ("a chain of terminals", lark(rules("T", 6000))),
        ("a rule that is itself", lark("start: start".to_owned())),
        ("an ambiguous rule", lark("start: start start | \"a\" | \"\"".to_owned())),
        ("a terminal that is itself", lark("start: A\nA: \"a\" A".to_owned())),
        ("what may be left out", lark(format!("start: {}", "\"a\"? ".repeat(3000)))),
        ("repetitions in Lark", lark("start: b{1000000}\nb: \"b\"{1000000}".to_owned())),
        ("what is imported", lark("%import python.file\nstart: file".to_owned())),
        ("tokens by number", lark("start: <[5]> <[99999999]>".to_owned())),
        ("zeros", lark("start: \"\\u0000\" /\\x00+/".to_owned())),
        ("many texts", json!({"guided_choice": (0..4000).map(|index| format!("{index}")).collect::<Vec<_>>()})),
    ]
}

/// A number in letters, because terminals are all large and rules all small.
fn letters(mut number: usize) -> String {
    let mut text = String::from("_");
    while number > 0 {
        text.push(char::from(b'0' + (number % 10) as u8));
        number /= 10;
    }
    text
}

#[test]
fn hostile_forms_give_an_error_or_a_grammar_and_soon() {
    for (what, body) in hostile() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let work = move || {
            let start = Instant::now();
            let begun = begin(&body).map(|compiled| {
                let mut state = compiled.begin();
                let mut logits = vec![0.0; factory().tokens];
                // As far as a text goes with the first token that may come, each step within its time.
                for _ in 0..40 {
                    let step = Instant::now();
                    logits.fill(0.0);
                    let masked = state.mask(&mut logits);
                    assert!(step.elapsed() < Duration::from_secs(1), "a step took {:?}", step.elapsed());
                    let Some(token) = logits.iter().position(|logit| *logit == 0.0) else { break };
                    if masked.is_err() || !matches!(state.advance(token as u32), Ok(false)) {
                        break;
                    }
                }
            });
            let _ = sender.send((start.elapsed(), begun));
        };
        thread::Builder::new().stack_size(stack(1 << 17)).spawn(work).unwrap();
        let (took, begun) =
            receiver.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|error| panic!("{what}: {error}"));
        let refused = begun.as_ref().err().map(|reason| reason.chars().take(150).collect::<String>());
        assert!(took < Duration::from_secs(10), "{what} took {took:?}: {refused:?}");
    }
}
