//! Conversations as a model's own Jinja template writes them.
//!
//! The environment is that of `transformers`: blocks are trimmed, strings have Python's methods, `raise_exception` refuses.

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use thiserror::Error;

/// Steps that a template may take, and how many more for each message. Templates take about 30 a message.
const STEPS: u64 = 50_000;
const STEPS_PER_MESSAGE: u64 = 2_000;
/// How deep its macros and includes may nest.
const DEPTH: usize = 100;

/// One turn of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks: `system`, `user` or `assistant` for most templates.
    pub role: &'a str,
    /// What is said.
    pub content: &'a str,
}

impl Message<'_> {
    fn to_value(self) -> Value {
        context! { role => self.role, content => self.content }
    }
}

/// Why a conversation could not be written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The model's files have no template.
    #[error("the model has no chat template; ask for a completion of plain text")]
    NoTemplate,
    /// The template itself refuses the messages.
    #[error("the model's chat template refuses the messages: {0}")]
    Refused(String),
    /// The template can't be run.
    #[error("the model's chat template fails: {0}")]
    Failed(String),
}

/// A template and the texts that it may ask for.
pub(crate) struct ChatTemplate {
    pub(crate) source: String,
    pub(crate) beginning: Option<String>,
    pub(crate) end: Option<String>,
}

impl ChatTemplate {
    /// Writes `messages` and the start of the assistant's answer.
    ///
    /// Steps and depth are bounded, repeated strings by the library; a string that a loop doubles is not. A template is as
    /// trusted as the model that it comes with.
    pub(crate) fn render(&self, messages: &[Message<'_>]) -> Result<String, ChatError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| ChatError::Failed(error.to_string()))?);
        environment.set_fuel(Some(STEPS + STEPS_PER_MESSAGE.saturating_mul(messages.len() as u64)));
        environment.set_recursion_limit(DEPTH);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |reason: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, REFUSAL).with_source(Refusal(reason)))
        });
        let context = context! {
            messages => messages.iter().copied().map(Message::to_value).collect::<Vec<_>>(),
            add_generation_prompt => true,
            bos_token => self.beginning.as_deref().unwrap_or_default(),
            eos_token => self.end.as_deref().unwrap_or_default(),
        };
        environment.render_str(&self.source, context).map_err(|error| problem(&error))
    }
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
