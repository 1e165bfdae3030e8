//! Structured output: the form that a request asks its text to have becomes a grammar for the tokens of the model, by llguidance.
//!
//! A grammar is whatever a client makes up, so it is compiled on a thread of its own: with a stack that holds what nests as deep as
//! its length allows, within a time, and few at once. What costs at every token is bounded by llguidance's own counts.

mod form;
mod gbnf;
mod place;
mod state;

pub(crate) use form::Form;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread;

use flora_engine::Grammar;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use crate::app::App;
use crate::error::ApiError;
use crate::options::Limits;
use form::{Kind, schema_grammar};
use state::Compiled;

/// Grammars that are compiled at once.
const AT_ONCE: usize = 2;
/// Bytes of stack for each byte of a form. Definitions and rules that each name the next take up to 250, which would end the process on
/// a stack of the usual size. Only what is used becomes memory.
const STACK: usize = 2048;
/// States of a lexer, of up to 2 KiB each; a long schema makes hundreds.
const LEXER_STATES: usize = 1 << 14;
/// The longest token that llguidance's tree of tokens takes is 1024 bytes.
const TOKEN_BYTES: usize = 1000;
/// What llguidance says where no token of the model can come next.
const NO_TOKEN: &str = "NoExtensionBias";
/// What llguidance takes for the beginning of a control token; no text has it.
const MARKER: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// Compiles grammars for one vocabulary.
#[derive(Debug)]
pub(crate) struct Grammars {
    factory: OnceLock<Result<Factory, String>>,
    permits: Arc<Semaphore>,
}

struct Factory {
    parsers: ParserFactory,
    /// Tokens of the vocabulary.
    tokens: usize,
}

impl std::fmt::Debug for Factory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Factory").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}

impl Grammars {
    pub(crate) fn new() -> Self {
        Self { factory: OnceLock::new(), permits: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

/// Compiles `form` for the tokens of the model.
///
/// # Errors
/// It is too large, takes too long or is none that can be followed, each with its field; or as many are compiled already as may be.
pub(crate) async fn compile(app: &Arc<App>, form: Form) -> Result<Grammar, ApiError> {
    let Limits { grammar_bytes, grammar_timeout, .. } = app.options().limits;
    let field = form.field.clone();
    let invalid = |reason: String| ApiError::invalid(&field, reason);
    let bytes = form.bytes();
    if bytes > grammar_bytes {
        return Err(invalid(format!("{field} has {bytes} bytes, more than the {grammar_bytes} that are taken")));
    }
    let deadline = Instant::now() + grammar_timeout;
    let permit = timeout_at(deadline, Arc::clone(&app.grammars().permits).acquire_owned()).await;
    let permit = permit.map_err(|_elapsed| ApiError::GrammarsBusy)?.map_err(|_closed| ApiError::Broken)?;
    let (sender, compiled) = oneshot::channel();
    let work = {
        let app = Arc::clone(app);
        move || {
            let compiled = catch_unwind(AssertUnwindSafe(|| {
                let factory = app.grammars().factory.get_or_init(|| build(tokens(&app)?)).as_ref();
                compile_form(factory.map_err(|reason| format!("{} can't be done: {reason}", form.field))?, &form)
            }));
            // What is too slow goes on to its end, and keeps its place until then.
            drop(permit);
            let _ = sender.send(compiled.unwrap_or_else(|panic| Err(panic_text(&*panic))));
        }
    };
    let thread = thread::Builder::new().name("flora-grammar".to_owned()).stack_size(stack(grammar_bytes));
    thread.spawn(work).map_err(|_error| ApiError::Broken)?;
    match timeout_at(deadline, compiled).await {
        Ok(Ok(compiled)) => compiled.map(Grammar::new).map_err(invalid),
        Ok(Err(_gone)) => Err(ApiError::Broken),
        Err(_elapsed) => {
            let seconds = grammar_timeout.as_secs_f64();
            Err(invalid(format!(
                "{field} takes longer to compile than the {seconds} seconds that it may; ask for less"
            )))
        }
    }
}

/// Bytes of stack that forms of so many bytes may need.
fn stack(grammar_bytes: usize) -> usize {
    grammar_bytes.saturating_mul(STACK).max(8 << 20)
}

/// The grammar, or why there is none.
fn compile_form(factory: &Factory, form: &Form) -> Result<Compiled, String> {
    let reason = match form.grammar().and_then(|grammar| factory.begin(grammar)) {
        Ok(matcher) => return Ok(Compiled::new(matcher, factory.tokens)),
        Err(reason) => reason,
    };
    let at = match &form.kind {
        Kind::Json { schema, whitespace } => {
            let mut fault = |part: &serde_json::Value| {
                schema_grammar(part, whitespace).and_then(|grammar| factory.begin(grammar)).err()
            };
            place::place(schema, &reason, &mut fault)
        }
        Kind::Regex(_) | Kind::Choice(_) | Kind::Grammar(_) => String::new(),
    };
    let at = if at.is_empty() { at } else { format!(" at {at}") };
    Err(format!("{} can't be followed{at}: {reason}", form.field))
}

/// The bytes of the model's tokens.
fn tokens(app: &App) -> Result<Vec<Vec<u8>>, String> {
    let vocabulary = app.engine().limits().vocabulary() as usize;
    let tokens = app.text().token_bytes(vocabulary);
    let mut tokens = tokens.ok_or("this model's tokens are read together, and none of them stands for bytes alone")?;
    tokens.truncate(vocabulary);
    Ok(tokens)
}

/// What compiles for tokens that stand for these bytes.
fn build(mut tokens: Vec<Vec<u8>>) -> Result<Factory, String> {
    let unusable = |token: &Vec<u8>| token.len() > TOKEN_BYTES || token.first() == Some(&MARKER);
    tokens.iter_mut().filter(|token| unusable(token)).for_each(Vec::clear);
    let count = tokens.len();
    // One more stands for the end, whatever tokens end a request's text.
    tokens.push(Vec::new());
    let end = u32::try_from(count).map_err(|_| "the model has too many tokens".to_owned())?;
    let tree = TokTrie::from(&TokRxInfo::new(end + 1, end), &tokens);
    let environment: TokEnv = Arc::new(ApproximateTokEnv::new(tree));
    let mut parsers = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
    parsers.quiet();
    *parsers.limits_mut() =
        ParserLimits { max_lexer_states: LEXER_STATES, verbose_errors: false, ..ParserLimits::default() };
    Ok(Factory { parsers, tokens: count })
}

impl Factory {
    /// The state of a grammar before the first token, of which one at least can come.
    fn begin(&self, grammar: TopLevelGrammar) -> Result<Matcher, String> {
        let parser = self.parsers.create_parser(grammar).map_err(|error| told(&error.to_string()))?;
        let mut matcher = Matcher::new(Ok(parser));
        match matcher.compute_mask().map_err(|error| told(&error.to_string())) {
            Ok(_mask) => Ok(matcher),
            Err(reason) if reason == NO_TOKEN => Err("no text is of it".to_owned()),
            Err(reason) => Err(reason),
        }
    }
}

/// What llguidance says, without the parts that are for its developers.
fn told(message: &str) -> String {
    if message.starts_with("panic: ") {
        return "llguidance fails at it".to_owned();
    }
    let ends = ["<backtrace>", "<non-verbose/>", "<state>"].into_iter().filter_map(|mark| message.find(mark));
    message[..ends.min().unwrap_or(message.len())].trim_end().to_owned()
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("it can't be compiled: {}", text.unwrap_or("for no reason that is told"))
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
