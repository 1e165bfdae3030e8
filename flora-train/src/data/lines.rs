//! JSON lines: an example a line, in the forms that trainers of language models share.

use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{Content, Example, Message};

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LineProblem {
    /// Bytes that are no text.
    #[error("it is not UTF-8")]
    NotUtf8,
    /// No JSON, or fields of other types.
    #[error("{0}")]
    Json(String),
    /// None of the forms, or several at once.
    #[error("it has {found}; a line has `messages`, or `prompt` and `completion`, or `text`")]
    Form {
        /// The fields of such forms that it has.
        found: String,
    },
    /// A conversation in which nothing is learnt.
    #[error("no message has the role `assistant`, whose messages are what is learnt")]
    NoAnswer,
}

/// A line as it is written; other fields are the author's own.
#[derive(Deserialize)]
struct Line {
    messages: Option<Vec<Turn>>,
    prompt: Option<String>,
    completion: Option<String>,
    text: Option<String>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: Said,
    /// Calls of tools are no text, and to leave them out would teach another answer.
    tool_calls: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Said {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// The examples in the `bytes` of the JSON lines file `file`; empty lines are none.
///
/// # Errors
/// The first line, counted from 1, that can't be used, and why.
pub fn parse_lines(file: &Path, bytes: &[u8]) -> Result<Vec<Example>, (usize, LineProblem)> {
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let mut examples = Vec::new();
    for (line, bytes) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let text = std::str::from_utf8(bytes).map_err(|_| (line, LineProblem::NotUtf8))?;
        if text.trim().is_empty() {
            continue;
        }
        let content = content(text).map_err(|problem| (line, problem))?;
        examples.push(Example { file: file.to_owned(), line: Some(line), content });
    }
    Ok(examples)
}

fn content(text: &str) -> Result<Content, LineProblem> {
    let line: Line = serde_json::from_str(text).map_err(|error| LineProblem::Json(said(&error)))?;
    match line {
        Line { messages: Some(turns), prompt: None, completion: None, text: None } => {
            let messages = turns.into_iter().map(message).collect::<Result<Vec<_>, _>>()?;
            match messages.iter().any(|message| message.role == "assistant") {
                true => Ok(Content::Messages(messages)),
                false => Err(LineProblem::NoAnswer),
            }
        }
        Line { messages: None, prompt: Some(prompt), completion: Some(completion), text: None } => {
            Ok(Content::Completion { prompt, completion })
        }
        Line { messages: None, prompt: None, completion: None, text: Some(text) } => Ok(Content::Text(text)),
        Line { messages, prompt, completion, text } => {
            let fields = [
                (messages.is_some(), "`messages`"),
                (prompt.is_some(), "`prompt`"),
                (completion.is_some(), "`completion`"),
                (text.is_some(), "`text`"),
            ];
            let found = fields.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect::<Vec<_>>();
            let found = if found.is_empty() { "none of the known fields".to_owned() } else { found.join(" and ") };
            Err(LineProblem::Form { found })
        }
    }
}

fn message(turn: Turn) -> Result<Message, LineProblem> {
    if turn.tool_calls.is_some() {
        return Err(LineProblem::Json("a message has `tool_calls`, which can't be learnt".to_owned()));
    }
    let content = match turn.content {
        Said::Text(text) => text,
        Said::Parts(parts) => parts
            .into_iter()
            .map(|part| match (&part.kind[..], part.text) {
                ("text", Some(text)) => Ok(text),
                (kind, _) => {
                    let kind: String = kind.chars().take(40).collect();
                    Err(LineProblem::Json(format!("a message has a part of the type {kind:?}, which isn't text")))
                }
            })
            .collect::<Result<String, _>>()?,
    };
    Ok(Message { role: turn.role, content })
}

/// The library counts lines within the one that it got.
fn said(error: &serde_json::Error) -> String {
    let whole = error.to_string();
    whole.replace(" at line 1 column ", " at column ")
}
