//! The form that a request asks its text to have: OpenAI's `response_format`, and the fields of vLLM that say the same of schemas,
//! regular expressions, choices and grammars.

use llguidance::JsonCompileOptions;
use llguidance::api::TopLevelGrammar;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::gbnf;
use crate::body::{Object, fields};
use crate::error::ApiError;

/// JSON's whitespace. Without an end, a small model would go on with it and never come to the next token.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,40}";
/// How often two patterns of properties are compared at most, each time up to a millisecond.
const PATTERN_PAIRS: usize = 5000;
/// The most choices of a list.
const CHOICES: usize = 4096;

/// The form that a text has to have, and where the request says so.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Form {
    /// The field, `response_format.json_schema.schema`.
    pub(crate) field: String,
    pub(crate) kind: Kind,
}

/// What a form is given as.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Kind {
    /// JSON of a schema.
    Json { schema: Value, whitespace: Whitespace },
    /// A text that matches as a whole.
    Regex(String),
    /// One of these.
    Choice(Vec<String>),
    /// A text of a grammar, in Lark's notation or in GBNF.
    Grammar(String),
}

/// What may stand between the tokens of JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Whitespace {
    /// What JSON allows, up to 40 characters.
    #[default]
    Any,
    /// Nothing.
    None,
    /// What matches this regular expression.
    Pattern(String),
}

#[derive(Deserialize)]
struct Fields {
    response_format: Option<Object<ResponseFormat>>,
    structured_outputs: Option<Object<Structured>>,
    guided_json: Option<Schema>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
    guided_whitespace_pattern: Option<String>,
    json_schema: Option<Value>,
    grammar: Option<String>,
}

#[derive(Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: ResponseKind,
    json_schema: Option<Object<NamedSchema>>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum ResponseKind {
    Text,
    JsonObject,
    JsonSchema,
}

#[derive(Deserialize)]
struct NamedSchema {
    schema: Option<Value>,
}

#[derive(Deserialize)]
struct Structured {
    json: Option<Schema>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
    #[serde(default)]
    disable_any_whitespace: bool,
    #[serde(default)]
    disable_additional_properties: bool,
    whitespace_pattern: Option<String>,
}

/// A schema, or the text of one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Schema {
    Text(String),
    Value(Value),
}

impl Form {
    /// What `body`, whose fields are known, asks of the text.
    ///
    /// # Errors
    /// A field that is wrong, or two that each ask for a form.
    pub(crate) fn parse(body: &Value) -> Result<Option<Self>, ApiError> {
        let asked: Fields = fields(body)?;
        let whitespace = match asked.guided_whitespace_pattern {
            None => Whitespace::Any,
            Some(pattern) => Whitespace::Pattern(pattern),
        };
        let mut forms = Forms(Vec::new());
        forms.schema("guided_json", asked.guided_json, &whitespace)?;
        forms.add("guided_regex", asked.guided_regex.map(Kind::Regex));
        forms.choice("guided_choice", asked.guided_choice)?;
        forms.add("guided_grammar", asked.guided_grammar.map(Kind::Grammar));
        forms.schema("json_schema", asked.json_schema.map(Schema::Value), &Whitespace::Any)?;
        // llama.cpp's way to ask for none.
        forms.add("grammar", asked.grammar.filter(|grammar| !grammar.is_empty()).map(Kind::Grammar));
        if let Some(Object(format)) = asked.response_format {
            forms.response(format)?;
        }
        if let Some(Object(structured)) = asked.structured_outputs {
            forms.structured(structured)?;
        }
        let form = forms.only()?;
        let is_json = matches!(&form, Some(Self { kind: Kind::Json { .. }, .. }));
        if whitespace != Whitespace::Any && !is_json {
            let message = "guided_whitespace_pattern is about JSON, and none is asked for";
            return Err(ApiError::invalid("guided_whitespace_pattern", message));
        }
        Ok(form)
    }

    /// The form as llguidance takes it.
    ///
    /// # Errors
    /// What is wrong with it, for the client.
    pub(crate) fn grammar(&self) -> Result<TopLevelGrammar, String> {
        match &self.kind {
            Kind::Json { schema, whitespace } => schema_grammar(schema, whitespace),
            Kind::Regex(pattern) => {
                let pattern = anchorless(pattern);
                match pattern.is_empty() {
                    true => Err("it matches nothing but an empty text".to_owned()),
                    false => Ok(TopLevelGrammar::from_regex(&pattern)),
                }
            }
            Kind::Choice(choices) => {
                let quoted: Vec<String> =
                    choices.iter().map(|choice| Value::from(choice.as_str()).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: CHOICE\nCHOICE: {}", quoted.join(" | "))))
            }
            Kind::Grammar(grammar) if grammar.trim().is_empty() => Err("it is empty".to_owned()),
            Kind::Grammar(grammar) if gbnf::is_gbnf(grammar) => Ok(TopLevelGrammar::from_lark(gbnf::to_lark(grammar)?)),
            Kind::Grammar(grammar) => Ok(TopLevelGrammar::from_lark(grammar.clone())),
        }
    }

    /// Bytes of what the client wrote.
    pub(crate) fn bytes(&self) -> usize {
        match &self.kind {
            Kind::Json { schema, .. } => schema.to_string().len(),
            Kind::Regex(text) | Kind::Grammar(text) => text.len(),
            Kind::Choice(choices) => choices.iter().map(|choice| choice.len() + 1).sum(),
        }
    }
}

/// A schema as llguidance takes it.
pub(crate) fn schema_grammar(schema: &Value, whitespace: &Whitespace) -> Result<TopLevelGrammar, String> {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        Value::Object(fields) if fields.contains_key("x-guidance") => {
            return Err("x-guidance is not taken; structured_outputs has fields for whitespace".to_owned());
        }
        Value::Object(_) => {
            check_patterns(schema)?;
            schema.clone()
        }
        _ => return Err("a schema is an object, or true".to_owned()),
    };
    let pattern = match whitespace {
        Whitespace::Any => Some(WHITESPACE.to_owned()),
        Whitespace::None => None,
        Whitespace::Pattern(pattern) => Some(pattern.clone()),
    };
    let options =
        JsonCompileOptions { whitespace_flexible: false, whitespace_pattern: pattern, ..JsonCompileOptions::default() };
    options.apply_to(&mut schema);
    Ok(TopLevelGrammar::from_json_schema(schema))
}

/// Refuses names of properties by more patterns than can be told apart in time: each is compared with each, and again wherever schemas
/// meet.
fn check_patterns(schema: &Value) -> Result<(), String> {
    let (mut patterns, mut meetings, mut rest) = (0, 1, vec![schema]);
    while let Some(part) = rest.pop() {
        match part {
            Value::Object(fields) => {
                patterns += fields.get("patternProperties").and_then(Value::as_object).map_or(0, Map::len);
                meetings += usize::from(fields.contains_key("$ref"));
                meetings += fields.get("allOf").and_then(Value::as_array).map_or(0, Vec::len);
                rest.extend(fields.values());
            }
            Value::Array(items) => rest.extend(items),
            _ => {}
        }
    }
    match patterns * patterns * meetings > PATTERN_PAIRS {
        true => {
            Err(format!("it has {patterns} patternProperties, which is too many beside {meetings} schemas that meet"))
        }
        false => Ok(()),
    }
}

/// The forms that a request asks for.
struct Forms(Vec<Form>);

impl Forms {
    fn add(&mut self, field: &str, kind: Option<Kind>) {
        self.0.extend(kind.map(|kind| Form { field: field.to_owned(), kind }));
    }

    fn schema(&mut self, field: &str, schema: Option<Schema>, whitespace: &Whitespace) -> Result<(), ApiError> {
        let schema = match schema {
            None => return Ok(()),
            Some(Schema::Value(schema)) => schema,
            Some(Schema::Text(text)) => serde_json::from_str(&text)
                .map_err(|error| ApiError::invalid(field, format!("{field} is a text, and not JSON: {error}")))?,
        };
        self.add(field, Some(Kind::Json { schema, whitespace: whitespace.clone() }));
        Ok(())
    }

    fn choice(&mut self, field: &str, choices: Option<Vec<String>>) -> Result<(), ApiError> {
        let Some(choices) = choices else { return Ok(()) };
        if choices.is_empty() || choices.len() > CHOICES || choices.iter().any(String::is_empty) {
            let message = format!("{field} must be from 1 to {CHOICES} texts, none of them empty");
            return Err(ApiError::invalid(field, message));
        }
        self.add(field, Some(Kind::Choice(choices)));
        Ok(())
    }

    fn response(&mut self, format: ResponseFormat) -> Result<(), ApiError> {
        if format.kind != ResponseKind::JsonSchema && format.json_schema.is_some() {
            let message = "response_format.json_schema needs the type json_schema";
            return Err(ApiError::invalid("response_format.json_schema", message));
        }
        match format.kind {
            ResponseKind::Text => {}
            ResponseKind::JsonObject => {
                let kind = Kind::Json { schema: json!({"type": "object"}), whitespace: Whitespace::Any };
                self.add("response_format", Some(kind));
            }
            ResponseKind::JsonSchema => {
                let field = "response_format.json_schema.schema";
                let Some(schema) = format.json_schema.and_then(|Object(named)| named.schema) else {
                    return Err(ApiError::invalid(field, format!("{field} is missing")));
                };
                self.add(field, Some(Kind::Json { schema, whitespace: Whitespace::Any }));
            }
        }
        Ok(())
    }

    fn structured(&mut self, asked: Structured) -> Result<(), ApiError> {
        let name = |field: &str| format!("structured_outputs.{field}");
        let whitespace = match (asked.disable_any_whitespace, asked.whitespace_pattern) {
            (true, Some(_)) => {
                let message = "there is no whitespace with disable_any_whitespace";
                return Err(ApiError::invalid(&name("whitespace_pattern"), message));
            }
            (true, None) => Whitespace::None,
            (false, Some(pattern)) => Whitespace::Pattern(pattern),
            (false, None) => Whitespace::Any,
        };
        let before = self.0.len();
        self.schema(&name("json"), asked.json, &whitespace)?;
        if asked.json_object == Some(true) {
            self.add(
                &name("json_object"),
                Some(Kind::Json { schema: json!({"type": "object"}), whitespace: whitespace.clone() }),
            );
        }
        if asked.disable_additional_properties {
            for form in &mut self.0[before..] {
                if let Kind::Json { schema, .. } = &mut form.kind {
                    close(schema);
                }
            }
        }
        let is_json = self.0.len() > before;
        self.add(&name("regex"), asked.regex.map(Kind::Regex));
        self.choice(&name("choice"), asked.choice)?;
        self.add(&name("grammar"), asked.grammar.map(Kind::Grammar));
        if self.0.len() == before {
            let message = "structured_outputs needs one of json, json_object, regex, choice and grammar";
            return Err(ApiError::invalid("structured_outputs", message));
        }
        if !is_json && (whitespace != Whitespace::Any || asked.disable_additional_properties) {
            let message = "whitespace and additional properties are JSON's, and none is asked for";
            return Err(ApiError::invalid("structured_outputs", message));
        }
        Ok(())
    }

    fn only(self) -> Result<Option<Form>, ApiError> {
        let mut forms = self.0.into_iter();
        match (forms.next(), forms.next()) {
            (form, None) => Ok(form),
            (first, Some(second)) => {
                let first = first.map(|form| form.field).unwrap_or_default();
                let message = format!("{first} and {} each ask for a form; a text has one", second.field);
                Err(ApiError::invalid(&second.field, message))
            }
        }
    }
}

/// Keeps objects to the properties that they name, where they don't say whether others may come.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            fields.values_mut().for_each(close);
            let names_some = |fields: &Map<String, Value>| {
                fields.contains_key("properties") || fields.contains_key("patternProperties")
            };
            if names_some(fields) && !fields.contains_key("additionalProperties") {
                fields.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
        }
        Value::Array(items) => items.iter_mut().for_each(close),
        _ => {}
    }
}

/// A pattern for a whole text needs no anchors at its ends, and a line break within it is an escape.
fn anchorless(pattern: &str) -> String {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let escapes = |text: &str| text.bytes().rev().take_while(|byte| *byte == b'\\').count();
    let pattern = match pattern.strip_suffix('$') {
        Some(text) if escapes(text) % 2 == 0 => text,
        _ => pattern,
    };
    pattern.replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(body: Value) -> Option<(String, Kind)> {
        Form::parse(&body).unwrap().map(|form| (form.field, form.kind))
    }

    fn json_of(schema: Value, whitespace: Whitespace) -> Kind {
        Kind::Json { schema, whitespace }
    }

    #[test]
    fn openais_and_vllms_fields_ask_for_the_same() {
        let schema = json!({"type": "object", "properties": {"b": {}, "a": {}}});
        let any = || json_of(schema.clone(), Whitespace::Any);
        let (text, pattern) = (schema.to_string(), "[ ]?".to_owned());
        let object = json_of(json!({"type": "object"}), Whitespace::Any);
        for (body, expected) in [
            (json!({}), None),
            (json!({"response_format": null}), None),
            (json!({"response_format": {"type": "text"}}), None),
            (json!({"response_format": {"type": "json_object"}}), Some(("response_format", object.clone()))),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
                Some(("response_format.json_schema.schema", any())),
            ),
            (json!({"guided_json": schema}), Some(("guided_json", any()))),
            (json!({"json_schema": schema}), Some(("json_schema", any()))),
            (json!({"structured_outputs": {"json": text}}), Some(("structured_outputs.json", any()))),
            (json!({"structured_outputs": {"json_object": true}}), Some(("structured_outputs.json_object", object))),
            (
                json!({"guided_json": schema, "guided_whitespace_pattern": pattern}),
                Some(("guided_json", json_of(schema.clone(), Whitespace::Pattern(pattern.clone())))),
            ),
            (
                json!({"structured_outputs": {"json": schema, "disable_any_whitespace": true}}),
                Some(("structured_outputs.json", json_of(schema.clone(), Whitespace::None))),
            ),
            (json!({"grammar": ""}), None),
            (json!({"grammar": "root ::= \"a\""}), Some(("grammar", Kind::Grammar("root ::= \"a\"".to_owned())))),
            (json!({"guided_regex": "a+"}), Some(("guided_regex", Kind::Regex("a+".to_owned())))),
            (
                json!({"structured_outputs": {"choice": ["a", "b"]}}),
                Some(("structured_outputs.choice", Kind::Choice(vec!["a".to_owned(), "b".to_owned()]))),
            ),
            (
                json!({"structured_outputs": {"grammar": "start: \"a\""}}),
                Some(("structured_outputs.grammar", Kind::Grammar("start: \"a\"".to_owned()))),
            ),
        ] {
            assert_eq!(form(body), expected.map(|(field, kind)| (field.to_owned(), kind)));
        }
    }

    #[test]
    fn what_asks_for_no_form_or_for_two_is_refused() {
        for (body, field) in [
            (json!({"response_format": "json"}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema.schema"),
            (
                json!({"response_format": {"type": "text", "json_schema": {"schema": {}}}}),
                "response_format.json_schema",
            ),
            (json!({"structured_outputs": {}}), "structured_outputs"),
            (json!({"structured_outputs": {"json_object": false}}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}), "structured_outputs"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}), "structured_outputs.choice"),
            (json!({"response_format": {"type": "json_object"}, "guided_regex": "a"}), "response_format"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": [""]}), "guided_choice"),
            (json!({"guided_regex": "a", "guided_whitespace_pattern": " "}), "guided_whitespace_pattern"),
        ] {
            let Err(ApiError::Invalid { param, .. }) = Form::parse(&body) else { panic!("{body} was taken") };
            assert_eq!(param.as_deref(), Some(field), "{body}");
        }
    }

    #[test]
    fn objects_are_closed_wherever_they_are() {
        let mut schema = json!({
            "properties": {"a": {"items": [{"properties": {}}]}},
            "$defs": {"b": {"patternProperties": {}, "additionalProperties": {}}},
        });
        close(&mut schema);
        assert_eq!(schema["additionalProperties"], json!(false));
        assert_eq!(schema["properties"]["a"]["items"][0]["additionalProperties"], json!(false));
        assert_eq!(schema["$defs"]["b"]["additionalProperties"], json!({}));
    }

    #[test]
    fn a_pattern_is_of_the_whole_text() {
        for (pattern, expected) in
            [("^a$", "a"), ("a\\$", "a\\$"), ("a\\\\$", "a\\\\"), ("[$]", "[$]"), ("a\nb", "a\\nb"), ("^$", "")]
        {
            assert_eq!(anchorless(pattern), expected);
        }
    }
}
