//! Examples to tokens, and which of them are learnt. A prompt and what follows it are encoded apart, as they are when the model is
//! served: what it is asked to go on from is the tokens of the prompt alone.

use std::path::Path;

use chrono::{DateTime, Local, NaiveDateTime};
use flora_tokenizer::{ChatError, Conversation, EncodeError, Message as Said, Next, Specials, Tokenizer};
use rayon::prelude::*;
use serde_json::Map;

use super::sequences::{Document, Excess};
use super::{Content, DataError, Example, Message};

/// Why an example has no tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeProblem {
    /// The tokenizer refuses a text.
    #[error(transparent)]
    Text(#[from] EncodeError),
    /// The chat template refuses a conversation, or there is none.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A template that writes a message in another way once more follow, so that nobody can say what the assistant has said.
    #[error(
        "the chat template writes the conversation in another way when it goes on after message {0}; use `prompt` and `completion`"
    )]
    Rewritten(usize),
}

/// The documents of `examples`, in their order.
///
/// # Errors
/// The first example that has none, by file and line.
pub fn encode(examples: &[Example], tokenizer: &Tokenizer) -> Result<Vec<Document>, DataError> {
    let documents: Vec<_> = examples.par_iter().map(|example| document(example, tokenizer)).collect();
    let failed =
        |example: &Example, problem| DataError::Encode { path: example.file.clone(), line: example.line, problem };
    examples
        .iter()
        .zip(documents)
        .map(|(example, document)| document.map_err(|problem| failed(example, problem)))
        .collect()
}

fn document(example: &Example, tokenizer: &Tokenizer) -> Result<Document, EncodeProblem> {
    let end = tokenizer.end_token();
    match &example.content {
        Content::Text(text) => Ok(whole(tokenizer.prompt(text, Specials::Parse)?, end)),
        Content::Source(text) => Ok(whole(tokenizer.prompt(text, Specials::Plain)?, end)),
        Content::Completion { prompt, completion } => {
            let mut document = Document::new(Excess::Dropped);
            document.push(tokenizer.prompt(prompt, Specials::Parse)?, false);
            document.push(tokenizer.encode(completion, Specials::Parse)?, true);
            if document.last() != end {
                document.push(end, true);
            }
            Ok(document)
        }
        Content::Messages(messages) => conversation(messages, &example.file, tokenizer),
    }
}

/// All is learnt, and ends as texts of the model do. What doesn't fit one sequence goes on in the next.
fn whole(tokens: Vec<u32>, end: Option<u32>) -> Document {
    let mut document = Document::new(Excess::Continued);
    document.push(tokens, true);
    if document.last() != end {
        document.push(end, true);
    }
    document
}

/// What the template writes for the assistant is learnt, the end of its turn too, but for the head that a prompt has already.
fn conversation(messages: &[Message], file: &Path, tokenizer: &Tokenizer) -> Result<Document, EncodeProblem> {
    let said: Vec<Said<'_>> = messages.iter().map(|message| Said::text(&message.role, &message.content)).collect();
    let now = written_at(file);
    let variables = Map::new();
    let template = tokenizer.template().ok_or(ChatError::NoTemplate)?;
    let render = |messages, next| template.render_at(&Conversation { messages, next, variables: &variables }, now);
    let text = render(&said, Next::Anything)?;
    let mut document = Document::new(Excess::Dropped);
    let mut written = 0;
    for (index, _) in messages.iter().enumerate().filter(|(_, message)| message.role == "assistant") {
        let prompt = render(&said[..index], Next::Answer)?;
        let answered = render(&said[..=index], Next::Anything)?;
        let follows = text.starts_with(&answered) && answered.starts_with(&prompt) && prompt.len() >= written;
        if !follows {
            return Err(EncodeProblem::Rewritten(index + 1));
        }
        document.push(tokenizer.encode(&text[written..prompt.len()], Specials::Parse)?, false);
        document.push(tokenizer.encode(&text[prompt.len()..answered.len()], Specials::Parse)?, true);
        written = answered.len();
    }
    document.push(tokenizer.encode(&text[written..], Specials::Parse)?, false);
    Ok(document)
}

/// The time that templates hear of: the file's, so that the same file has the same tokens tomorrow.
fn written_at(file: &Path) -> NaiveDateTime {
    let modified = std::fs::metadata(file).and_then(|metadata| metadata.modified()).ok();
    modified.map_or_else(NaiveDateTime::default, |modified| DateTime::<Local>::from(modified).naive_local())
}
