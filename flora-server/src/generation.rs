//! From a request's body to the engine, and from the engine's events to an answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use flora_engine::{Event, FinishReason, Request as EngineRequest, StopAt, Stream, Usage};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};

use crate::answer::{Answer, Choice, Endpoint};
use crate::app::{App, blocking};
use crate::body;
use crate::chat::Chat;
use crate::completions::{Completions, Prompt};
use crate::error::ApiError;
use crate::parameters::{Delivery, Parameters};
use crate::sse;
use crate::text::Reader;

/// How long a stream's head waits for its first piece. An error before that has a status of its own; but proxies give up on a
/// server that says nothing for long.
const FIRST_PIECE: Duration = Duration::from_secs(10);

/// Answers a request to `endpoint`. Dropping the future, or the answer's body, cancels what runs.
pub(crate) async fn answer(app: Arc<App>, endpoint: Endpoint, request: Request) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let body = body::object(request, &app.options().limits).await?;
    let parameters = Parameters::parse(&body)?;
    let asked = match endpoint {
        Endpoint::Completions => Asked::Completions(Completions::parse(&body)?),
        Endpoint::Chat => Asked::Chat(Chat::parse(&body)?),
    };
    drop(body);
    let answer = Answer::new(endpoint, parameters.model.clone());
    let (delivery, n) = (parameters.delivery, parameters.n);
    let requests = {
        let app = Arc::clone(&app);
        blocking(move || asked.requests(&app, &parameters)).await?
    };
    let mut generation = Generation::submit(app, requests, n, arrived)?;
    match delivery {
        Delivery::Whole => {
            let choices = generation.gather().await?;
            Ok(Json(answer.whole(&choices, generation.usage())).into_response())
        }
        Delivery::Stream { include_usage } => {
            let first = match tokio::time::timeout(FIRST_PIECE, generation.next()).await {
                Ok(first) => first.transpose()?,
                Err(_elapsed) => None,
            };
            Ok(sse::response(answer, first, generation, include_usage))
        }
    }
}

/// What is asked, before the model reads it.
enum Asked {
    Completions(Completions),
    Chat(Chat),
}

impl Asked {
    /// A request of the engine for each choice: those of the first prompt, then those of the next.
    fn requests(self, app: &App, parameters: &Parameters) -> Result<Vec<EngineRequest>, ApiError> {
        let adapter = app.adapter(&parameters.model)?;
        let prompts = match &self {
            Self::Completions(completions) => completions.prompts.len(),
            Self::Chat(_) => 1,
        };
        let limits = app.options().limits;
        if prompts.saturating_mul(parameters.n) > limits.choices {
            let message = format!(
                "{prompts} prompts of {} choices each are more than the {} choices that are taken",
                parameters.n, limits.choices
            );
            return Err(ApiError::invalid("n", message));
        }
        let context = app.engine().limits().most_tokens();
        let mut requests = Vec::with_capacity(prompts * parameters.n);
        let reader = app.text().reader(adapter)?;
        let mut stop_tokens = if parameters.ignore_eos { Vec::new() } else { reader.stop_tokens() };
        stop_tokens.extend(&parameters.stop_tokens);
        let (prompts, max_tokens) = self.tokens(&reader)?;
        for prompt in prompts {
            // Room for one token at least.
            let (tokens, limit) = (prompt.len(), limits.prompt_tokens.min(context.saturating_sub(1)));
            if tokens > limit {
                return Err(ApiError::LongPrompt { tokens, limit });
            }
            let rest = u32::try_from(context - tokens).unwrap_or(u32::MAX);
            requests.extend((0..parameters.n).map(|choice| EngineRequest {
                prompt: prompt.clone(),
                adapter: adapter.map(str::to_owned),
                sampling: parameters.draw.choice(choice),
                rules: parameters.rules.clone(),
                stop: StopAt {
                    max_tokens: max_tokens.unwrap_or(rest),
                    strings: parameters.stop.clone(),
                    tokens: stop_tokens.clone(),
                },
            }));
        }
        Ok(requests)
    }

    /// The tokens of each prompt, and how many to generate where the request says so.
    fn tokens(self, reader: &Reader<'_>) -> Result<(Vec<Vec<u32>>, Option<u32>), ApiError> {
        match self {
            Self::Completions(Completions { prompts, max_tokens }) => {
                let prompts = prompts.into_iter().map(|prompt| match prompt {
                    Prompt::Text(said) => reader.prompt(&said).map_err(|error| ApiError::invalid("prompt", error)),
                    Prompt::Tokens(tokens) => Ok(tokens),
                });
                Ok((prompts.collect::<Result<_, _>>()?, Some(max_tokens)))
            }
            Self::Chat(Chat { conversation, max_tokens }) => {
                let prompt = reader.chat(&conversation).map_err(|error| ApiError::invalid("messages", error))?;
                Ok((vec![prompt], max_tokens))
            }
        }
    }
}

/// The choices of one request as they run. Dropping it cancels them.
pub(crate) struct Generation {
    app: Arc<App>,
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    arrived: Instant,
    /// When the first token of each choice came, and its last so far.
    times: Vec<Option<(Instant, Instant)>>,
    /// Choices of each prompt.
    n: usize,
    usage: Usage,
}

/// What comes of a choice.
pub(crate) enum Piece {
    Text { choice: usize, text: String },
    End { choice: usize, reason: FinishReason },
}

impl Generation {
    /// Gives all of `requests` to the engine, or none: one that isn't taken cancels those before it.
    fn submit(app: Arc<App>, requests: Vec<EngineRequest>, n: usize, arrived: Instant) -> Result<Self, ApiError> {
        let times = vec![None; requests.len()];
        let mut events = SelectAll::new();
        for (choice, request) in requests.into_iter().enumerate() {
            events.push(numbered(choice, app.engine().submit(request)?));
        }
        Ok(Self { app, events, arrived, times, n, usage: Usage::default() })
    }

    /// The next piece of any choice; `None` when all have ended.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        loop {
            let (choice, event) = self.events.next().await?;
            match event {
                Event::Text { text, tokens } => {
                    if !tokens.is_empty() {
                        self.note_tokens(choice);
                    }
                    if !text.is_empty() {
                        return Some(Ok(Piece::Text { choice, text }));
                    }
                }
                Event::Finished { reason, usage } => {
                    self.note_end(choice, usage);
                    return Some(Ok(Piece::End { choice, reason }));
                }
                Event::Failed(error) => return Some(Err(error.into())),
            }
        }
    }

    /// All choices, once they have ended.
    async fn gather(&mut self) -> Result<Vec<Choice>, ApiError> {
        let mut texts = vec![String::new(); self.times.len()];
        let mut ended = Vec::with_capacity(texts.len());
        while let Some(piece) = self.next().await {
            match piece? {
                Piece::Text { choice, text } => texts[choice].push_str(&text),
                Piece::End { choice, reason } => ended.push((choice, reason)),
            }
        }
        ended.sort_unstable_by_key(|(choice, _)| *choice);
        let choices = ended.into_iter().zip(texts);
        Ok(choices.map(|((_, reason), text)| Choice { text, reason }).collect())
    }

    /// How many choices there are.
    pub(crate) fn choices(&self) -> usize {
        self.times.len()
    }

    /// What those that have ended took; a prompt of several choices is counted once.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    fn note_tokens(&mut self, choice: usize) {
        let now = Instant::now();
        match &mut self.times[choice] {
            Some((_, last)) => *last = now,
            none => {
                *none = Some((now, now));
                self.app.metrics().first_token(now - self.arrived);
            }
        }
    }

    fn note_end(&mut self, choice: usize, usage: Usage) {
        if let Some((first, last)) = self.times[choice] {
            self.app.metrics().output_tokens(last - first, usage.completion_tokens);
        }
        self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(usage.completion_tokens);
        if choice.is_multiple_of(self.n) {
            self.usage.prompt_tokens = self.usage.prompt_tokens.saturating_add(usage.prompt_tokens);
        }
    }
}

/// The events of one choice, with its number.
fn numbered(choice: usize, stream: Stream) -> BoxStream<'static, (usize, Event)> {
    stream::unfold(stream, move |mut stream| async move {
        let event = stream.recv().await?;
        Some(((choice, event), stream))
    })
    .boxed()
}
