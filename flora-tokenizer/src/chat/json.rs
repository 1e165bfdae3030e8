//! The filter `tojson` as `transformers` has it: Python's `json.dumps`, which leaves HTML and the order of keys alone.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// How deep values may nest.
const DEPTH: usize = 100;
/// The widest indentation.
const INDENT: usize = 64;

struct Style {
    /// Escapes all that isn't ASCII.
    ascii: bool,
    /// What one level is indented by; `None` is one line.
    indent: Option<String>,
    between_items: String,
    after_key: String,
    sort: bool,
}

/// `value | tojson(ensure_ascii, indent, separators=…, sort_keys=…)`.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<Value>,
    indent: Option<Value>,
    keywords: Kwargs,
) -> Result<Value, Error> {
    let keyword = |name: &str| keywords.get::<Option<Value>>(name);
    let ascii = ensure_ascii.or(keyword("ensure_ascii")?).is_some_and(|value| value.is_true());
    let indent = indentation(indent.or(keyword("indent")?))?;
    let (between_items, after_key) = separators(keyword("separators")?, indent.is_some())?;
    let sort = keyword("sort_keys")?.is_some_and(|value| value.is_true());
    keywords.assert_all_used()?;
    let mut text = String::new();
    write(&mut text, value, &Style { ascii, indent, between_items, after_key, sort }, 0)?;
    Ok(Value::from_safe_string(text))
}

fn indentation(given: Option<Value>) -> Result<Option<String>, Error> {
    let Some(given) = given.filter(|value| !value.is_none() && !value.is_undefined()) else { return Ok(None) };
    let indent = match given.as_str() {
        Some(text) => text.to_owned(),
        // Less than nothing is nothing, and a line for each item all the same.
        None => " ".repeat(usize::try_from(i64::try_from(given)?.max(0)).unwrap_or(usize::MAX).min(INDENT + 1)),
    };
    match indent.len() {
        0..=INDENT => Ok(Some(indent)),
        _ => Err(failure(format!("tojson got an indentation of more than {INDENT} bytes"))),
    }
}

fn separators(given: Option<Value>, is_indented: bool) -> Result<(String, String), Error> {
    let Some(given) = given.filter(|value| !value.is_none() && !value.is_undefined()) else {
        return Ok((if is_indented { "," } else { ", " }.to_owned(), ": ".to_owned()));
    };
    let given: Vec<Value> = given.try_iter()?.collect();
    match &given[..] {
        [items, key] => match (items.as_str(), key.as_str()) {
            (Some(items), Some(key)) if items.len() + key.len() <= INDENT => Ok((items.to_owned(), key.to_owned())),
            _ => Err(failure("tojson's separators must be two short strings")),
        },
        _ => Err(failure("tojson's separators must be two strings")),
    }
}

fn failure(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn write(text: &mut String, value: &Value, style: &Style, depth: usize) -> Result<(), Error> {
    if depth > DEPTH {
        return Err(failure(format!("tojson got values that nest more than {DEPTH} deep")));
    }
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&number(value)?),
        ValueKind::String => string(text, value.as_str().unwrap_or_default(), style.ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            enclosed(text, ['[', ']'], items, style, depth, |text, item| write(text, &item, style, depth + 1))?;
        }
        ValueKind::Map => {
            let mut entries = Vec::new();
            for key in value.try_iter()? {
                let item = value.get_item(&key)?;
                entries.push((key_text(&key)?, item));
            }
            if style.sort {
                entries.sort_by(|(one, _), (other, _)| one.cmp(other));
            }
            enclosed(text, ['{', '}'], entries, style, depth, |text, (key, item)| {
                string(text, &key, style.ascii);
                text.push_str(&style.after_key);
                write(text, &item, style, depth + 1)
            })?;
        }
        kind => return Err(failure(format!("tojson got {kind}, which JSON can't hold"))),
    }
    Ok(())
}

fn enclosed<T>(
    text: &mut String,
    [open, close]: [char; 2],
    items: Vec<T>,
    style: &Style,
    depth: usize,
    mut item: impl FnMut(&mut String, T) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |text: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            text.push('\n');
            text.push_str(&indent.repeat(depth));
        }
    };
    text.push(open);
    let is_empty = items.is_empty();
    for (index, one) in items.into_iter().enumerate() {
        if index > 0 {
            text.push_str(&style.between_items);
        }
        line(text, depth + 1);
        item(text, one)?;
    }
    if !is_empty {
        line(text, depth);
    }
    text.push(close);
    Ok(())
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(key.is_true().to_string()),
        ValueKind::Number => number(key),
        kind => Err(failure(format!("tojson got a key that is {kind}"))),
    }
}

/// A number as Python writes it.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    if !number.is_finite() {
        let sign = if number < 0.0 { "-" } else { "" };
        return Ok(if number.is_nan() { "NaN".to_owned() } else { format!("{sign}Infinity") });
    }
    let text = format!("{number:?}");
    Ok(match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
            format!("{digits}e{sign}{exponent:0>2}")
        }
    })
}

fn string(text: &mut String, value: &str, ascii: bool) {
    text.push('"');
    for character in value.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\0'..='\u{1f}' => escape(text, character),
            ' '..='~' => text.push(character),
            _ if ascii => escape(text, character),
            _ => text.push(character),
        }
    }
    text.push('"');
}

fn escape(text: &mut String, character: char) {
    for unit in character.encode_utf16(&mut [0; 2]) {
        text.push_str(&format!("\\u{unit:04x}"));
    }
}
