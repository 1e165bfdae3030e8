//! A chat template, and the environment that it runs in.

use super::{ChatError, Content, Conversation, Message, Next, json, time};
use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value};
use regex::{Captures, Regex};
use std::collections::BTreeMap;
use std::sync::LazyLock;
use thiserror::Error;

/// Steps that a template may take, and how many more for each message. Templates take about 30 a message.
const STEPS: u64 = 50_000;
const STEPS_PER_MESSAGE: u64 = 2_000;
/// How deep its macros and includes may nest.
const DEPTH: usize = 100;

/// Stands at the end of a message that is to go on; its space is there where a template trims nothing.
const OPEN_END: &str = "FLORA_THE_MESSAGE_GOES_ON_HERE ";

/// Comments and raw text, which are left alone, and the tags of Hugging Face's that Jinja hasn't got.
static GENERATION: LazyLock<Regex> = LazyLock::new(|| {
    let text = r"(?s)\{#.*?#\}|\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}|(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})";
    Regex::new(text).expect("a pattern that compiles")
});

/// A loop over the parts of a message.
static OVER_PARTS: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{%[-+]?\s*for\s+\w+\s+in\s+[^%]*\bcontent\b").expect("a pattern that compiles"));

/// A template and the texts that it may ask for.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    takes_parts: bool,
    /// `bos_token`, `eos_token` and others, as they are written.
    special: BTreeMap<String, String>,
}

impl ChatTemplate {
    pub(crate) fn new(source: &str, mut special: BTreeMap<String, String>) -> Self {
        // Templates put these two together with others without asking whether they are there.
        for name in ["bos_token", "eos_token"] {
            special.entry(name.to_owned()).or_default();
        }
        // A scope of its own is all that these tags are when nobody asks which tokens are the model's.
        let plain = GENERATION.replace_all(source, |found: &Captures<'_>| match (found.get(1), found.get(3)) {
            (Some(start), Some(end)) => {
                let prefix = found.get(2).map_or("", |prefix| prefix.as_str());
                format!("{}{prefix}with{}", start.as_str(), end.as_str())
            }
            _ => found[0].to_owned(),
        });
        Self { takes_parts: OVER_PARTS.is_match(&plain), source: plain.into_owned(), special }
    }

    /// The template as it is run: as it was given, but for tags that only ask which tokens are the model's.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as it writes it today.
    ///
    /// Steps and depth are bounded, repeated strings by the library; a string that a loop doubles is not. A template is as
    /// trusted as the model that it comes with.
    ///
    /// # Errors
    /// It refuses the messages, fails on them, or doesn't leave a message open that is to go on.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, ChatError> {
        self.render_at(conversation, chrono::Local::now().naive_local())
    }

    /// [`render`](Self::render), with the local time that the template hears of.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_at(&self, conversation: &Conversation<'_>, now: NaiveDateTime) -> Result<String, ChatError> {
        let &Conversation { messages, next, variables } = conversation;
        let mut written: Vec<Value> = Vec::with_capacity(messages.len());
        for (index, message) in messages.iter().enumerate() {
            let is_open = next == Next::Rest && index + 1 == messages.len();
            written.push(self.message(message, is_open));
        }
        let mut context: BTreeMap<&str, Value> =
            self.special.iter().map(|(name, text)| (&name[..], Value::from(&text[..]))).collect();
        // Given as none where there are none, so they are defined.
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        context.extend(variables.iter().map(|(name, value)| (&name[..], Value::from(Serde(value)))));
        context.insert("messages", Value::from(written));
        context.insert("add_generation_prompt", Value::from(next == Next::Answer));
        let environment = environment(messages.len(), now)?;
        let rendered =
            environment.render_str(&self.source, Value::from_pairs(context)).map_err(|error| problem(&error))?;
        match next {
            Next::Answer | Next::Anything => Ok(rendered),
            Next::Rest => left_open(rendered, messages),
        }
    }

    /// A message as templates see it: its keys in the order in which clients write them.
    fn message(&self, message: &Message<'_>, is_open: bool) -> Value {
        let end = if is_open { OPEN_END } else { "" };
        let content = match message.content {
            Content::None => Value::from(()),
            Content::Text(text) => Value::from(format!("{text}{end}")),
            Content::Parts(parts) if self.takes_parts => {
                let part = |(index, text): (usize, &String)| {
                    let end = if index + 1 == parts.len() { end } else { "" };
                    map([("type", Value::from("text")), ("text", Value::from(format!("{text}{end}")))])
                };
                Value::from(parts.iter().enumerate().map(part).collect::<Vec<_>>())
            }
            Content::Parts(parts) => Value::from(parts.concat() + end),
        };
        let name = message.name.map(|name| ("name", Value::from(name)));
        let calls = message.tool_calls.map(|calls| ("tool_calls", Value::from(Serde(calls))));
        let answered = message.tool_call_id.map(|id| ("tool_call_id", Value::from(id)));
        let more = name.into_iter().chain(calls).chain(answered);
        map([("role", Value::from(message.role)), ("content", content)].into_iter().chain(more))
    }
}

fn map(entries: impl IntoIterator<Item = (&'static str, Value)>) -> Value {
    Value::from_pairs(entries)
}

/// The text up to where the last message goes on.
fn left_open(rendered: String, messages: &[Message<'_>]) -> Result<String, ChatError> {
    let last = match messages.last().map(|message| message.content) {
        Some(Content::None) => return Err(ChatError::Closed("it has no content")),
        Some(Content::Text(text)) => text,
        Some(Content::Parts(parts)) => parts.last().map_or("", |text| text),
        None => return Err(ChatError::Closed("there is none")),
    };
    let marker = OPEN_END.trim_end();
    let end = rendered.rfind(marker).ok_or(ChatError::Closed("the model's chat template leaves it out"))?;
    let is_trimmed = !rendered[end..].starts_with(OPEN_END);
    let text = if is_trimmed { rendered[..end].trim_end() } else { &rendered[..end] };
    if !text.contains(last.trim()) {
        return Err(ChatError::Closed("the model's chat template changes it"));
    }
    Ok(text.to_owned())
}

fn environment<'a>(messages: usize, now: NaiveDateTime) -> Result<Environment<'a>, ChatError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| ChatError::Failed(error.to_string()))?);
    environment.set_fuel(Some(STEPS + STEPS_PER_MESSAGE.saturating_mul(messages as u64)));
    environment.set_recursion_limit(DEPTH);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("strftime_now", move |format: String| time::strftime(now, &format));
    environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, REFUSAL).with_source(Refusal(reason)))
    });
    Ok(environment)
}

const REFUSAL: &str = "the template refuses";

/// What a template gave to `raise_exception`.
#[derive(Debug, Error)]
#[error("{0}")]
struct Refusal(String);

fn problem(error: &Error) -> ChatError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(Refusal(reason)) = error.downcast_ref() {
            return ChatError::Refused(reason.clone());
        }
        cause = error.source();
    }
    ChatError::Failed(error.to_string())
}
