//! The fields that both endpoints take: which model, how tokens are drawn, what ends a text, how it is sent.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use flora_engine::{LogitRules, Sampling};
use serde::Deserialize;
use serde_json::Value;

use crate::adapters::AdapterField;
use crate::body::{Object, fields};
use crate::error::ApiError;

/// The most stop strings of a request, as OpenAI has it.
const STOP_STRINGS: usize = 4;
/// The furthest that OpenAI lets penalties go from 0.
const PENALTY: f32 = 2.0;
/// The furthest that OpenAI lets biases go from 0.
const BIAS: f32 = 100.0;
/// Below this a temperature would divide logits past what f32 holds, and nothing but the largest is ever drawn.
const COLDEST: f32 = 1e-5;

/// The shared fields of a request, checked.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameters {
    /// The base model's name or an adapter's.
    pub(crate) model: String,
    /// What acts where the model is the base model.
    pub(crate) adapter: Option<AdapterField>,
    /// Choices of each prompt.
    pub(crate) n: usize,
    /// How tokens are drawn.
    pub(crate) draw: Draw,
    /// What is done to logits before that.
    pub(crate) rules: LogitRules,
    /// None of them empty.
    pub(crate) stop: Vec<String>,
    /// Tokens that end a text, beside the model's own.
    pub(crate) stop_tokens: Vec<u32>,
    /// Whether the model's own don't.
    pub(crate) ignore_eos: bool,
    /// How the answer is sent.
    pub(crate) delivery: Delivery,
}

/// How tokens are drawn for all choices of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Draw {
    /// Always the likeliest.
    Greedy,
    /// At random.
    Random { temperature: f32, top_p: f32, seed: Option<u64> },
}

/// How an answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    /// At once, when it is done.
    Whole,
    /// As it comes, as server-sent events.
    Stream { include_usage: bool },
}

impl Draw {
    /// How the choice at `index` is drawn. Choices differ, and each is the same again for the same seed.
    pub(crate) fn choice(self, index: usize) -> Sampling {
        match self {
            Self::Greedy => Sampling::Greedy,
            Self::Random { temperature, top_p, seed } => {
                let seed = seed.map_or_else(|| fastrand::u64(..), |seed| seed.wrapping_add(index as u64));
                Sampling::Random { temperature, top_p, seed }
            }
        }
    }
}

#[derive(Deserialize)]
struct Fields {
    model: String,
    n: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    stop: Option<Stop>,
    stream: Option<bool>,
    stream_options: Option<Object<StreamOptions>>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    min_tokens: Option<u32>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or an array of strings")]
enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

impl Parameters {
    /// The shared fields of `body`.
    pub(crate) fn parse(body: &Value) -> Result<Self, ApiError> {
        let fields: Fields = fields(body)?;
        let n = match fields.n.unwrap_or(1) {
            0 => return Err(ApiError::invalid("n", "n must be at least 1")),
            n => n as usize,
        };
        let draw = draw(fields.temperature, fields.top_p, fields.seed)?;
        let rules = LogitRules {
            repetition_penalty: repetition_penalty(fields.repetition_penalty)?,
            presence_penalty: penalty("presence_penalty", fields.presence_penalty)?,
            frequency_penalty: penalty("frequency_penalty", fields.frequency_penalty)?,
            bias: bias(fields.logit_bias.unwrap_or_default())?,
            min_tokens: fields.min_tokens.unwrap_or(0),
            top_k: top_k(fields.top_k)?,
            min_p: min_p(fields.min_p)?,
        };
        let stop = stop(fields.stop)?;
        let stream_options = fields.stream_options.map(|Object(options)| options);
        let delivery = match (fields.stream.unwrap_or(false), stream_options) {
            (true, options) => {
                Delivery::Stream { include_usage: options.and_then(|options| options.include_usage).unwrap_or(false) }
            }
            (false, None) => Delivery::Whole,
            (false, Some(_)) => {
                return Err(ApiError::invalid("stream_options", "stream_options needs stream to be true"));
            }
        };
        let (stop_tokens, ignore_eos) = (fields.stop_token_ids.unwrap_or_default(), fields.ignore_eos.unwrap_or(false));
        let adapter = AdapterField::parse(&body["adapter"], "adapter")?;
        Ok(Self { model: fields.model, adapter, n, draw, rules, stop, stop_tokens, ignore_eos, delivery })
    }
}

/// How many tokens are generated at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MostTokens {
    /// As many as the model's context and the cache hold.
    Context,
    /// So many.
    Count(u32),
}

impl MostTokens {
    /// What a request says, if it does: -1 is as many as there is room for.
    pub(crate) fn parse(field: &str, value: Option<i64>) -> Result<Option<Self>, ApiError> {
        let Some(value) = value else { return Ok(None) };
        match u32::try_from(value) {
            Ok(0) => Err(ApiError::invalid(
                field,
                format!("{field} must be at least 1, or -1 for as many as there is room for"),
            )),
            Ok(count) => Ok(Some(Self::Count(count))),
            Err(_) if value == -1 => Ok(Some(Self::Context)),
            Err(_) => {
                Err(ApiError::invalid(field, format!("{field} must be from 1 to {}, or -1, not {value}", u32::MAX)))
            }
        }
    }

    /// How many where there is room for `room`.
    pub(crate) fn within(self, room: usize) -> u32 {
        match self {
            Self::Context => u32::try_from(room).unwrap_or(u32::MAX),
            Self::Count(count) => count,
        }
    }
}

/// The most alternatives that are told of a token. OpenAI has 5 for completions and 20 for chats, and vLLM 20 for both.
const ALTERNATIVES: i64 = 20;

/// A number of alternatives.
pub(crate) fn alternatives(field: &str, value: i64) -> Result<u32, ApiError> {
    match u32::try_from(value) {
        Ok(count) if value <= ALTERNATIVES => Ok(count),
        _ => Err(ApiError::invalid(field, format!("{field} must be from 0 to {ALTERNATIVES}, not {value}"))),
    }
}

fn draw(temperature: Option<f32>, top_p: Option<f32>, seed: Option<i64>) -> Result<Draw, ApiError> {
    let (temperature, top_p) = (temperature.unwrap_or(1.0), top_p.unwrap_or(1.0));
    if !(0.0..=2.0).contains(&temperature) {
        return Err(ApiError::invalid("temperature", format!("temperature must be from 0 to 2, not {temperature}")));
    }
    if !(0.0..=1.0).contains(&top_p) {
        return Err(ApiError::invalid("top_p", format!("top_p must be from 0 to 1, not {top_p}")));
    }
    if temperature < COLDEST || top_p == 0.0 {
        return Ok(Draw::Greedy);
    }
    // Seeds below 0 are as good as others.
    Ok(Draw::Random { temperature, top_p, seed: seed.map(i64::cast_unsigned) })
}

fn penalty(field: &str, value: Option<f32>) -> Result<f32, ApiError> {
    match value.unwrap_or(0.0) {
        value if (-PENALTY..=PENALTY).contains(&value) => Ok(value),
        value => Err(ApiError::invalid(field, format!("{field} must be from -{PENALTY} to {PENALTY}, not {value}"))),
    }
}

fn repetition_penalty(value: Option<f32>) -> Result<f32, ApiError> {
    match value.unwrap_or(1.0) {
        value if value > 0.0 && value.is_finite() => Ok(value),
        value => {
            let message = format!("repetition_penalty must be a number above 0, not {value}");
            Err(ApiError::invalid("repetition_penalty", message))
        }
    }
}

fn bias(biases: BTreeMap<String, f32>) -> Result<Vec<(u32, f32)>, ApiError> {
    let bias = |(token, bias): (String, f32)| {
        let Ok(token) = token.parse() else {
            let message = format!("logit_bias names {token:?}, which is not the number of a token");
            return Err(ApiError::invalid("logit_bias", message));
        };
        if !(-BIAS..=BIAS).contains(&bias) {
            let message = format!("logit_bias must be from -{BIAS} to {BIAS}, and is {bias} for token {token}");
            return Err(ApiError::invalid("logit_bias", message));
        }
        Ok((token, bias))
    };
    biases.into_iter().map(bias).collect()
}

/// 0 and -1 are all tokens.
fn top_k(value: Option<i64>) -> Result<Option<NonZeroU32>, ApiError> {
    match value.unwrap_or(0) {
        -1 | 0 => Ok(None),
        // No model has more tokens than u32 counts.
        value @ 1.. => Ok(NonZeroU32::new(u32::try_from(value).unwrap_or(u32::MAX))),
        value => Err(ApiError::invalid("top_k", format!("top_k must be at least 1, or 0 or -1 for all, not {value}"))),
    }
}

fn min_p(value: Option<f32>) -> Result<f32, ApiError> {
    match value.unwrap_or(0.0) {
        value if (0.0..=1.0).contains(&value) => Ok(value),
        value => Err(ApiError::invalid("min_p", format!("min_p must be from 0 to 1, not {value}"))),
    }
}

fn stop(stop: Option<Stop>) -> Result<Vec<String>, ApiError> {
    let strings = match stop {
        None => Vec::new(),
        Some(Stop::One(string)) => vec![string],
        Some(Stop::Many(strings)) => strings,
    };
    if strings.len() > STOP_STRINGS {
        let message = format!("stop holds {} strings; at most {STOP_STRINGS} are taken", strings.len());
        return Err(ApiError::invalid("stop", message));
    }
    if strings.iter().any(String::is_empty) {
        return Err(ApiError::invalid("stop", "a stop string is empty, which every text holds"));
    }
    Ok(strings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(mut body: Value) -> Result<Parameters, ApiError> {
        body["model"] = json!("m");
        Parameters::parse(&body)
    }

    #[test]
    fn what_is_left_out_or_null_is_as_openai_has_it() {
        let expected = Parameters {
            model: "m".to_owned(),
            adapter: None,
            n: 1,
            draw: Draw::Random { temperature: 1.0, top_p: 1.0, seed: None },
            rules: LogitRules::default(),
            stop: Vec::new(),
            stop_tokens: Vec::new(),
            ignore_eos: false,
            delivery: Delivery::Whole,
        };
        assert_eq!(parse(json!({})).unwrap(), expected);
        let nulls = json!({
            "n": null, "temperature": null, "top_p": null, "seed": null, "stop": null, "stream": null,
            "stream_options": null, "presence_penalty": null, "frequency_penalty": null, "logit_bias": null,
            "repetition_penalty": null, "top_k": null, "min_p": null, "stop_token_ids": null, "ignore_eos": null,
            "min_tokens": null, "user": "someone", "adapter": null,
        });
        assert_eq!(parse(nulls).unwrap(), expected);
        let nothing = json!({
            "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "repetition_penalty": 1, "top_k": -1,
            "min_p": 0, "stop_token_ids": [], "ignore_eos": false, "min_tokens": 0,
        });
        assert_eq!(parse(nothing).unwrap(), expected);
    }

    #[test]
    fn rules_are_read() {
        let body = json!({
            "presence_penalty": 1, "frequency_penalty": -2, "logit_bias": {"7": -100, "3": 0.5}, "repetition_penalty": 1.5,
            "top_k": 40, "min_p": 0.25, "stop_token_ids": [5, 6], "ignore_eos": true, "min_tokens": 9,
        });
        let parameters = parse(body).unwrap();
        let rules = LogitRules {
            presence_penalty: 1.0,
            frequency_penalty: -2.0,
            repetition_penalty: 1.5,
            bias: vec![(3, 0.5), (7, -100.0)],
            top_k: NonZeroU32::new(40),
            min_p: 0.25,
            min_tokens: 9,
        };
        assert_eq!(parameters.rules, rules);
        assert_eq!((parameters.stop_tokens, parameters.ignore_eos), (vec![5, 6], true));
    }

    #[test]
    fn drawing_follows_temperature_top_p_and_seed() {
        // No closure: rustc before 1.97 hands two calls of one the same empty map, and it is freed twice
        // (rust-lang/rust#155241).
        fn sampling(body: Value, index: usize) -> Sampling {
            parse(body).unwrap().draw.choice(index)
        }
        for body in [json!({"temperature": 0}), json!({"top_p": 0.0}), json!({"temperature": 1e-30, "seed": 7})] {
            assert_eq!(sampling(body, 3), Sampling::Greedy);
        }
        let seeded = json!({"temperature": 0.5, "top_p": 0.9, "seed": -1});
        let expected = |seed| Sampling::Random { temperature: 0.5, top_p: 0.9, seed };
        assert_eq!(sampling(seeded.clone(), 0), expected(u64::MAX));
        assert_eq!(sampling(seeded, 2), expected(1));
        assert_ne!(sampling(json!({}), 0), sampling(json!({}), 0));
    }

    #[test]
    fn a_stream_may_tell_its_usage() {
        let delivery = |body| parse(body).map(|parameters| parameters.delivery);
        assert_eq!(delivery(json!({"stream": true})).unwrap(), Delivery::Stream { include_usage: false });
        let options = json!({"include_usage": true});
        assert_eq!(
            delivery(json!({"stream": true, "stream_options": options})).unwrap(),
            Delivery::Stream { include_usage: true }
        );
        assert!(delivery(json!({"stream_options": options})).is_err());
        assert!(delivery(json!({"stream": true, "stream_options": [true]})).is_err());
    }

    #[test]
    fn what_is_out_of_range_is_refused_by_name() {
        for (field, value) in [
            ("n", json!(0)),
            ("temperature", json!(-0.1)),
            ("temperature", json!(2.1)),
            ("top_p", json!(1.01)),
            ("stop", json!("")),
            ("stop", json!(["a", "b", "c", "d", "e"])),
            ("presence_penalty", json!(2.5)),
            ("frequency_penalty", json!(-3)),
            ("repetition_penalty", json!(0)),
            ("logit_bias", json!({"1": 101})),
            ("logit_bias", json!({"the": 1})),
            ("top_k", json!(-2)),
            ("min_p", json!(1.5)),
        ] {
            let Err(ApiError::Invalid { param, .. }) = parse(json!({field: value})) else {
                panic!("{field} was taken")
            };
            assert_eq!(param.as_deref(), Some(field));
        }
    }
}
