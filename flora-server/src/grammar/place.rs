//! Where in a schema a fault is. llguidance tells what is wrong, and the place is found by asking again about parts of the schema.

use std::time::{Duration, Instant};

use serde_json::{Map, Value};

/// How often is asked, and how long at most.
const QUESTIONS: usize = 400;
const PATIENCE: Duration = Duration::from_secs(1);

/// Keywords whose value is a schema, a list of schemas, or schemas by name; the definitions last, because not all need be used.
const KEYWORDS: [&str; 11] = [
    "properties",
    "patternProperties",
    "additionalProperties",
    "items",
    "prefixItems",
    "additionalItems",
    "anyOf",
    "oneOf",
    "allOf",
    "$defs",
    "definitions",
];

/// The JSON pointer of the innermost part of `schema` that by itself has the same fault, as `fault` tells; empty for all of it.
pub(super) fn place(schema: &Value, told: &str, fault: &mut dyn FnMut(&Value) -> Option<String>) -> String {
    let (start, mut questions) = (Instant::now(), 0);
    let (mut pointer, mut part) = (String::new(), schema);
    'deeper: loop {
        for (step, inner) in parts(part) {
            if questions == QUESTIONS || start.elapsed() > PATIENCE {
                return pointer;
            }
            questions += 1;
            if fault(&with_definitions(inner, schema)).is_some_and(|inner| told.contains(&inner)) {
                pointer += &step;
                part = inner;
                continue 'deeper;
            }
        }
        return pointer;
    }
}

/// The schemas right within a schema, each with its pointer from there.
fn parts(schema: &Value) -> Vec<(String, &Value)> {
    let mut parts = Vec::new();
    for keyword in KEYWORDS {
        let by_name = matches!(keyword, "properties" | "patternProperties" | "$defs" | "definitions");
        match &schema[keyword] {
            Value::Object(schemas) if by_name => {
                let step = |name: &str| format!("/{keyword}/{}", name.replace('~', "~0").replace('/', "~1"));
                parts.extend(schemas.iter().map(|(name, inner)| (step(name), inner)));
            }
            inner @ Value::Object(_) => parts.push((format!("/{keyword}"), inner)),
            Value::Array(schemas) => {
                parts.extend(schemas.iter().enumerate().map(|(index, inner)| (format!("/{keyword}/{index}"), inner)));
            }
            _ => {}
        }
    }
    parts
}

/// A part with the definitions that the whole has, which it may refer to.
fn with_definitions(part: &Value, whole: &Value) -> Value {
    let Value::Object(fields) = part else { return part.clone() };
    let mut fields: Map<String, Value> = fields.clone();
    for keyword in ["$defs", "definitions"] {
        if let Some(definitions) = whole.get(keyword) {
            fields.insert(keyword.to_owned(), definitions.clone());
        }
    }
    Value::Object(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_innermost_part_with_the_fault_is_named() {
        let mut fault = |part: &Value| part.to_string().contains("bad").then(|| "bad".to_owned());
        let mut find = |schema: Value| place(&schema, "it is bad", &mut fault);
        assert_eq!(find(json!({"bad": 1})), "");
        assert_eq!(
            find(json!({"properties": {"a": {}, "b/c": {"items": {"anyOf": [{}, {"bad": 1}]}}}})),
            "/properties/b~1c/items/anyOf/1"
        );
        assert_eq!(find(json!({"allOf": [{"properties": {"bad": {"properties": {}}}}]})), "/allOf/0");
    }

    #[test]
    fn another_fault_is_not_taken_for_it() {
        let mut fault = |part: &Value| Some(part["title"].to_string());
        assert_eq!(place(&json!({"items": {"title": "other"}}), "this one", &mut fault), "");
    }
}
