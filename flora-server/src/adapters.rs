//! Which adapters a request asks for beside its model's name: one for all of it, sums of several with weights, and others for parts of
//! the prompt.

use std::cell::OnceCell;
use std::collections::HashSet;

use flora_engine::{AdapterChoice, AdapterSpans, Composition, Span, Spans};
use serde_json::Value;

use crate::app::App;
use crate::error::ApiError;
use crate::fields::{check_adapter_part, check_span};

/// An adapter as a field names it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AdapterField {
    /// The field.
    param: String,
    named: Named,
}

#[derive(Clone, Debug, PartialEq)]
enum Named {
    /// The base model, or an adapter.
    One(String),
    Sum(Composition),
}

/// The adapters that there are for one request, looked for once.
pub(crate) struct Known<'a> {
    app: &'a App,
    names: OnceCell<HashSet<String>>,
}

impl<'a> Known<'a> {
    pub(crate) fn new(app: &'a App) -> Self {
        Self { app, names: OnceCell::new() }
    }

    /// Whether `name`, which `param` gives, is an adapter; otherwise it is the base model.
    fn is_adapter(&self, name: &str, param: &str) -> Result<bool, ApiError> {
        let names = || self.names.get_or_init(|| self.app.engine().adapters().into_iter().collect());
        match self.app.adapter(name) {
            Ok(None) => Ok(false),
            Ok(Some(name)) if names().contains(name) => Ok(true),
            _ => Err(ApiError::UnknownAdapter { param: param.to_owned(), name: name.to_owned() }),
        }
    }
}

/// Where a span lies, as a field says it: in tokens or in characters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SpanField {
    start: usize,
    /// It goes on through the answer where there is none.
    end: Option<usize>,
    /// None for the base model.
    adapter: Option<AdapterField>,
}

impl AdapterField {
    /// The value of a field: a name, or parts with weights; none where it is null or missing.
    pub(crate) fn parse(value: &Value, param: &str) -> Result<Option<Self>, ApiError> {
        let invalid = |param: &str, message: String| Err(ApiError::invalid(param, format!("{param} {message}")));
        let named = match value {
            Value::Null => return Ok(None),
            Value::String(name) => Named::One(name.clone()),
            Value::Array(items) => {
                let mut parts = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    let path = format!("{param}[{index}]");
                    check_adapter_part(item, &format!("{path}."))?;
                    match (item["name"].as_str(), item["weight"].as_f64()) {
                        (Some(name), Some(weight)) => parts.push((name.to_owned(), weight)),
                        (None, _) => return invalid(&format!("{path}.name"), "must be an adapter's name".to_owned()),
                        (_, None) => return invalid(&format!("{path}.weight"), "must be a number".to_owned()),
                    }
                }
                match Composition::new(parts) {
                    Ok(composition) => Named::Sum(composition),
                    Err(error) => return invalid(param, format!("can't be had: {error}")),
                }
            }
            _ => {
                let message = "must be an adapter's name, or an array of objects with `name` and `weight`";
                return invalid(param, message.to_owned());
            }
        };
        Ok(Some(Self { param: param.to_owned(), named }))
    }

    /// What it asks for; none for the base model.
    pub(crate) fn choice(&self, known: &Known<'_>) -> Result<Option<AdapterChoice>, ApiError> {
        let known = |name: &str| known.is_adapter(name, &self.param);
        match &self.named {
            Named::One(name) => Ok(known(name)?.then(|| AdapterChoice::from(name.as_str()))),
            Named::Sum(sum) => {
                for (name, _) in sum.parts() {
                    if !known(name)? {
                        let param = &self.param;
                        let message = format!("{param} names the base model, which is in every sum; leave it out");
                        return Err(ApiError::invalid(param, message));
                    }
                }
                Ok(Some(AdapterChoice::from(sum.clone())))
            }
        }
    }
}

impl SpanField {
    /// The spans of `adapter_spans`.
    pub(crate) fn parse(value: &Value) -> Result<Vec<Self>, ApiError> {
        let items = match value {
            Value::Null => return Ok(Vec::new()),
            Value::Array(items) => items,
            _ => return Err(ApiError::invalid(FIELD, format!("{FIELD} must be an array of spans"))),
        };
        let span = |(index, item): (usize, &Value)| {
            let path = format!("{FIELD}[{index}]");
            if !item.is_object() {
                return Err(ApiError::invalid(&path, format!("{path} must be an object with `start` and `adapter`")));
            }
            check_span(item, &format!("{path}."))?;
            let position = |field: &str| match &item[field] {
                Value::Null => Ok(None),
                value => match value.as_u64().and_then(|position| usize::try_from(position).ok()) {
                    Some(position) => Ok(Some(position)),
                    None => {
                        let param = format!("{path}.{field}");
                        Err(ApiError::invalid(&param, format!("{param} must be a position, from 0 on")))
                    }
                },
            };
            let (start, end) = (position("start")?, position("end")?);
            let start = start.ok_or_else(|| {
                let param = format!("{path}.start");
                ApiError::invalid(&param, format!("{param} is missing"))
            })?;
            if item.get("adapter").is_none() {
                let param = format!("{path}.adapter");
                return Err(ApiError::invalid(&param, format!("{param} is missing; null is the base model")));
            }
            let adapter = AdapterField::parse(&item["adapter"], &format!("{path}.adapter"))?;
            Ok(Self { start, end, adapter })
        };
        items.iter().enumerate().map(span).collect()
    }

    /// The adapters of a prompt of `length` units with these spans, `own` wherever none is. `token` gives the first token from a unit
    /// of the prompt on, for 0 to `length`.
    pub(crate) fn place(
        spans: &[Self],
        known: &Known<'_>,
        own: Option<AdapterChoice>,
        (unit, length): (&str, usize),
        token: impl Fn(usize) -> usize,
    ) -> Result<AdapterSpans, ApiError> {
        let mut placed = Vec::with_capacity(spans.len());
        for (index, Self { start, end, adapter }) in spans.iter().enumerate() {
            for (field, position) in [("start", Some(*start)), ("end", *end)] {
                if let Some(position) = position.filter(|position| *position > length) {
                    let param = format!("{FIELD}[{index}].{field}");
                    let message = format!(
                        "{param} is {position}, and the prompt has {length} {unit}; a span without an end goes on through the answer"
                    );
                    return Err(ApiError::invalid(&param, message));
                }
            }
            placed.push(Span {
                start: *start,
                end: *end,
                adapter: adapter.as_ref().map(|adapter| adapter.choice(known)).transpose()?.flatten(),
            });
        }
        // What is wrong with them is said in what they were given in.
        Spans::new(own.clone(), placed.clone())
            .map_err(|error| ApiError::invalid(FIELD, format!("{FIELD}, in {unit}: {error}")))?;
        let tokens = placed.into_iter().filter_map(|Span { start, end, adapter }| {
            let (start, end) = (token(start), end.map(&token));
            // One within a token holds no token's first byte.
            end.is_none_or(|end| start < end).then_some(Span { start, end, adapter })
        });
        Spans::new(own, tokens).map_err(|error| ApiError::invalid(FIELD, format!("{FIELD}: {error}")))
    }
}

/// The field with spans.
const FIELD: &str = "adapter_spans";

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn param<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        match result {
            Err(ApiError::Invalid { param: Some(param), message }) => {
                assert!(message.starts_with(&param), "{message}");
                param
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_adapter_is_a_name_or_a_sum() {
        let parse = |value: Value| AdapterField::parse(&value, "adapter");
        assert_eq!(parse(json!(null)).unwrap(), None);
        assert_eq!(parse(json!("a")).unwrap().unwrap().named, Named::One("a".to_owned()));
        let sum = json!([{"name": "a", "weight": 0.7}, {"name": "b", "weight": -1}]);
        let Some(AdapterField { named: Named::Sum(sum), .. }) = parse(sum).unwrap() else { panic!("a sum") };
        assert_eq!(sum.parts().collect::<Vec<_>>(), [("a", 0.7), ("b", -1.0)]);
        for (value, expected) in [
            (json!(1), "adapter"),
            (json!({"name": "a", "weight": 1}), "adapter"),
            (json!([]), "adapter"),
            (json!([{"name": "a", "weight": 1}, {"name": "a", "weight": 2}]), "adapter"),
            (json!(["a"]), "adapter[0].name"),
            (json!([{"weight": 1}]), "adapter[0].name"),
            (json!([{"name": "a"}]), "adapter[0].weight"),
            (json!([{"name": "a", "weight": "1"}]), "adapter[0].weight"),
            (json!([{"name": "a", "weight": 1, "combination": "linear"}]), "adapter[0].combination"),
        ] {
            assert_eq!(param(parse(value)), expected);
        }
    }

    #[test]
    fn spans_have_a_start_and_an_adapter() {
        let spans = SpanField::parse(&json!([{"start": 3, "adapter": "a"}, {"start": 0, "end": 2, "adapter": null}]));
        let spans: Vec<_> =
            spans.unwrap().into_iter().map(|span| (span.start, span.end, span.adapter.is_some())).collect();
        assert_eq!(spans, [(3, None, true), (0, Some(2), false)]);
        assert_eq!(SpanField::parse(&json!(null)).unwrap(), []);
        for (value, expected) in [
            (json!({}), "adapter_spans"),
            (json!(["a"]), "adapter_spans[0]"),
            (json!([{"adapter": "a"}]), "adapter_spans[0].start"),
            (json!([{"start": -1, "adapter": "a"}]), "adapter_spans[0].start"),
            (json!([{"start": 0, "end": 0.5, "adapter": "a"}]), "adapter_spans[0].end"),
            (json!([{"start": 0}]), "adapter_spans[0].adapter"),
            (json!([{"start": 0, "adapter": [{"name": 1}]}]), "adapter_spans[0].adapter[0].name"),
            (json!([{"start": 0, "adapter": "a", "stop": 3}]), "adapter_spans[0].stop"),
        ] {
            assert_eq!(param(SpanField::parse(&value)), expected);
        }
    }
}
