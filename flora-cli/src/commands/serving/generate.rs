//! `flora generate`: one prompt, one adapter, text as it comes.

use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use flora_engine::{
    AdapterFailure, Event, FinishReason, LogProbabilities, LogitRules, Request, RequestError, Sampling, StopAt, Usage,
};
use flora_tokenizer::{AdapterText, AdapterTexts, Conversation, Message, Next, Specials};
use serde::Serialize;
use serde_json::Map;

use super::{ModelArguments, Serving, start};
use crate::commands::error::CommandError;
use crate::commands::output;

/// Continue a prompt, with an adapter or without
#[derive(Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// The adapter: a folder in --adapters, or a name of --lora-modules; the base model unless given
    #[arg(long, requires = "sources")]
    adapter: Option<String>,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    /// Pass the prompt as a user's message in the model's chat template
    #[arg(long)]
    chat: bool,
    /// The most tokens to generate
    #[arg(long, default_value = "128", value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    /// What logits are divided by before a token is drawn; 0 always takes the likeliest
    #[arg(long, default_value = "0")]
    temperature: f32,
    /// Draw from the likeliest tokens that together have this probability
    #[arg(long, default_value = "1")]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value = "1")]
    seed: u64,
    /// Text to stop before; may be given several times
    #[arg(long)]
    stop: Vec<String>,
    /// Print JSON when it is done
    #[arg(long)]
    json: bool,
}

/// What was generated.
#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    adapter: Option<String>,
    prompt: String,
    text: String,
    tokens: Vec<u32>,
    finish_reason: &'static str,
    prompt_tokens: u32,
    completion_tokens: u32,
    first_token_seconds: f64,
    seconds: f64,
}

pub(crate) fn generate(arguments: &Arguments) -> Result<(), CommandError> {
    let serving = start(&arguments.model, None)?;
    let tokenizer = &serving.tokenizer;
    let adapted = adapter_text(arguments, &serving)?;
    let prompt = if arguments.chat {
        let messages = [Message::text("user", &arguments.prompt)];
        let conversation = Conversation { messages: &messages, next: Next::Answer, variables: &Map::new() };
        tokenizer.conversation(adapted.template(), &conversation)?
    } else {
        tokenizer.prompt(&arguments.prompt, Specials::Parse)?
    };
    let sampling = if arguments.temperature == 0.0 {
        Sampling::Greedy
    } else {
        Sampling::Random { temperature: arguments.temperature, top_p: arguments.top_p, seed: arguments.seed }
    };
    let mut ends = tokenizer.stop_tokens();
    ends.extend(adapted.end());
    let stop = StopAt { max_tokens: arguments.max_tokens, strings: arguments.stop.clone(), tokens: ends };
    let adapters = arguments.adapter.as_deref().into();
    let (rules, log_probabilities) = (LogitRules::default(), LogProbabilities::default());
    let request = Request { prompt, adapters, sampling, rules, stop, grammar: None, log_probabilities };
    let began = Instant::now();
    let mut stream = serving.engine.handle().submit(request)?;
    let (mut said, mut tokens, mut first) = (String::new(), Vec::new(), None);
    if !arguments.json && !arguments.chat {
        output::print(&arguments.prompt)?;
    }
    let (reason, usage) = loop {
        match stream.blocking_recv() {
            Some(Event::Prompt(_)) => {}
            Some(Event::Text { text, tokens: more, .. }) => {
                first.get_or_insert_with(|| began.elapsed());
                if !arguments.json {
                    output::print(&text)?;
                }
                said.push_str(&text);
                tokens.extend(more);
            }
            Some(Event::Finished { reason, usage }) => break (reason, usage),
            Some(Event::Failed(error)) => return Err(error.into()),
            // A stream says how it ends before it does.
            None => break (FinishReason::Stop, Usage::default()),
        }
    };
    let seconds = began.elapsed().as_secs_f64();
    if !arguments.json {
        output::print("\n")?;
        return Ok(());
    }
    output::print_json(&Report {
        model: serving.name,
        device: serving.device,
        adapter: arguments.adapter.clone(),
        prompt: arguments.prompt.clone(),
        text: said,
        tokens,
        finish_reason: match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        },
        prompt_tokens: usage.prompt_tokens,
        completion_tokens: usage.completion_tokens,
        first_token_seconds: first.map_or(seconds, |first| first.as_secs_f64()),
        seconds,
    })
}

/// What the adapter's folder says of texts.
fn adapter_text(arguments: &Arguments, serving: &Serving) -> Result<Arc<AdapterText>, CommandError> {
    let Some(name) = &arguments.adapter else { return Ok(Arc::default()) };
    let Some(folder) = serving.adapters.folder_of(name) else { return Ok(Arc::default()) };
    AdapterTexts::new(Arc::clone(&serving.tokenizer)).of(&folder).map_err(|reason| {
        CommandError::from(RequestError::from(AdapterFailure::Unusable { name: name.clone(), reason }))
    })
}
