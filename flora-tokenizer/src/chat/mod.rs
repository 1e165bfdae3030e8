//! Conversations as a model's own Jinja template writes them.
//!
//! The environment is that of `transformers`: blocks are trimmed, strings have Python's methods, values are printed as Python
//! prints them, `tojson` is `json.dumps`, `{% generation %}` only marks what it encloses, `strftime_now` knows today's date, and
//! `raise_exception` refuses.

mod guard;
mod json;
mod places;
mod template;
mod time;

pub(crate) use guard::Guard;
pub use template::ChatTemplate;

use serde_json::{Map, Value};
use thiserror::Error;

/// A conversation to be written.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// What was said.
    pub messages: &'a [Message<'a>],
    /// How it goes on.
    pub next: Next,
    /// Further variables of the template; one named as a special token goes before that.
    pub variables: &'a Map<String, Value>,
}

/// One turn of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks: `system`, `user` or `assistant` for most templates.
    pub role: &'a str,
    /// What is said.
    pub content: Content<'a>,
    /// Who of several in that role; templates mostly leave it out.
    pub name: Option<&'a str>,
    /// The tools that an assistant calls, as OpenAI writes them; templates mostly want arguments as an object, not as its text.
    pub tool_calls: Option<&'a Value>,
    /// The call that a tool answers.
    pub tool_call_id: Option<&'a str>,
}

/// What is said in one turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Nothing, as where an assistant calls tools alone.
    None,
    /// As one text.
    Text(&'a str),
    /// In parts. A template that goes over parts gets them as `{"type": "text", "text": …}`, another gets them joined.
    Parts(&'a [String]),
}

/// How a conversation goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Next {
    /// With the assistant's answer, whose head the template writes.
    #[default]
    Answer,
    /// With whatever comes after the last message.
    Anything,
    /// With the rest of the last message, which is left open.
    Rest,
}

impl<'a> Message<'a> {
    /// A message that is one text.
    pub const fn text(role: &'a str, content: &'a str) -> Self {
        Self { role, content: Content::Text(content), name: None, tool_calls: None, tool_call_id: None }
    }
}

/// Why a conversation could not be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model's files have no template.
    #[error("the model has no chat template; ask for a completion of plain text, or serve it with a template")]
    NoTemplate,
    /// The template itself refuses the messages.
    #[error("the model's chat template refuses the messages: {0}")]
    Refused(String),
    /// The template can't be run.
    #[error("the model's chat template fails: {0}")]
    Failed(String),
    /// What the template writes has no tokens.
    #[error(transparent)]
    Encode(#[from] crate::EncodeError),
    /// Messages spell control tokens, and have every character by which these are told from the template's.
    #[error(
        "the messages spell control tokens and have all characters from U+10FF00 to U+10FFFD; leave one of them out"
    )]
    Unmarkable,
    /// The tokens of each message are asked for, and the template doesn't write its content as it is.
    #[error(
        "which tokens are message {0}'s can't be told: the model's chat template changes its content, or leaves it out"
    )]
    Changed(usize),
    /// The last message is to go on, and the template doesn't leave it whole.
    #[error("the last message can't be continued: {0}")]
    Closed(&'static str),
}
