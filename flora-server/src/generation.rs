//! From a request's body to the engine, and from the engine's events to an answer.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use flora_engine::{Event, FinishReason, RequestError, ScoredToken, Stream, Usage};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};

use crate::answer::{Answer, Choice, Endpoint};
use crate::app::{App, blocking};
use crate::asked::{Asked, Echo, Planned};
use crate::body;
use crate::chat::Chat;
use crate::completions::Completions;
use crate::error::ApiError;
use crate::grammar::{self, Form};
use crate::logprobs::Scored;
use crate::parameters::{Delivery, Parameters};
use crate::sse;

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
    let form = Form::parse(&body)?;
    drop(body);
    let grammar = match form {
        None => None,
        Some(form) => Some(grammar::compile(&app, form).await?),
    };
    let answer = Answer::new(endpoint, parameters.model.clone());
    let (delivery, n, is_scored) = (parameters.delivery, parameters.n, asked.logprobs().is_some());
    let planned = {
        let app = Arc::clone(&app);
        blocking(move || asked.requests(&app, &parameters, grammar)).await?
    };
    let mut generation = Generation::submit(app, planned, n, is_scored, arrived)?;
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

/// The choices of one request as they run. Dropping it cancels them.
pub(crate) struct Generation {
    app: Arc<App>,
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    /// Those that follow when others have ended, with their numbers.
    later: VecDeque<(usize, Planned)>,
    /// What is to be said before the next event.
    ready: VecDeque<Piece>,
    arrived: Instant,
    /// When what isn't said is cancelled, and how long after the arrival that is.
    deadline: Option<(tokio::time::Instant, Duration)>,
    choices: Vec<State>,
    /// Choices of each prompt.
    n: usize,
    /// Whether log-probabilities are told.
    is_scored: bool,
    usage: Usage,
}

/// How far a choice is.
#[derive(Default)]
struct State {
    /// The prompt, where it is yet to be given back.
    echo: Option<Echo>,
    /// When its first token came, and its last so far.
    times: Option<(Instant, Instant)>,
    /// Characters of the tokens that were told.
    characters: usize,
}

/// What comes of a choice.
pub(crate) enum Piece {
    Text {
        choice: usize,
        text: String,
        /// Its tokens, where log-probabilities are told.
        tokens: Option<Vec<Scored>>,
        /// Characters of the tokens before.
        offset: usize,
    },
    End {
        choice: usize,
        reason: FinishReason,
    },
}

impl Generation {
    /// Gives the first of `planned` to the engine, or none of them: one that isn't taken cancels those before it. The others
    /// follow as choices end.
    fn submit(
        app: Arc<App>,
        planned: Vec<Planned>,
        n: usize,
        is_scored: bool,
        arrived: Instant,
    ) -> Result<Self, ApiError> {
        let at_once = app.options().limits.choices_at_once;
        let choices = planned.iter().map(|planned| State { echo: planned.echo.clone(), ..State::default() }).collect();
        let (events, ready, usage) = (SelectAll::new(), VecDeque::new(), Usage::default());
        let later = planned.into_iter().enumerate().collect();
        let limit = app.options().limits.request_timeout;
        let deadline = limit.and_then(|limit| Some((arrived.checked_add(limit)?.into(), limit)));
        let mut generation = Self { app, events, later, ready, arrived, deadline, choices, n, is_scored, usage };
        for _ in 0..at_once.max(1) {
            let Some((choice, planned)) = generation.later.pop_front() else { break };
            generation.events.push(numbered(choice, generation.app.engine().submit(planned.request)?));
        }
        Ok(generation)
    }

    /// Gives the next choice to the engine, where there is one. While others run, one that finds a full queue waits for the next
    /// of them to end.
    fn follow(&mut self) -> Result<(), ApiError> {
        let Some((choice, planned)) = self.later.pop_front() else { return Ok(()) };
        match self.app.engine().submit(planned.request.clone()) {
            Ok(stream) => self.events.push(numbered(choice, stream)),
            Err(RequestError::QueueFull { .. }) if !self.events.is_empty() => self.later.push_front((choice, planned)),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The next piece of any choice; `None` when all have ended.
    pub(crate) async fn next(&mut self) -> Option<Result<Piece, ApiError>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            let next = self.events.next();
            let (choice, event) = match self.deadline {
                None => next.await?,
                Some((deadline, limit)) => match tokio::time::timeout_at(deadline, next).await {
                    Ok(next) => next?,
                    Err(_elapsed) => return Some(Err(ApiError::TimedOut(limit))),
                },
            };
            match event {
                Event::Prompt(scored) => self.say(choice, String::new(), scored),
                Event::Text { text, tokens, scored } => {
                    if !tokens.is_empty() {
                        self.note_tokens(choice);
                    }
                    self.say(choice, text, scored);
                }
                Event::Finished { reason, usage } => {
                    // A prompt of one token has nothing that is told before.
                    self.say(choice, String::new(), Vec::new());
                    self.note_end(choice, usage);
                    self.ready.push_back(Piece::End { choice, reason });
                    if let Err(error) = self.follow() {
                        return Some(Err(error));
                    }
                }
                Event::Failed(error) => return Some(Err(error.into())),
            }
        }
    }

    /// Makes a piece of what there is to be said, after the prompt where that is given back.
    fn say(&mut self, choice: usize, text: String, scored: Vec<ScoredToken>) {
        let said = self.app.text();
        let state = &mut self.choices[choice];
        let (text, first) = match state.echo.take() {
            Some(echo) => (echo.text + &text, echo.first),
            None => (text, None),
        };
        let tokens: Option<Vec<Scored>> = self.is_scored.then(|| {
            let first = first.map(|token| Scored::first(token, said));
            first.into_iter().chain(scored.into_iter().map(|scored| Scored::new(scored, said))).collect()
        });
        let offset = state.characters;
        state.characters += tokens.iter().flatten().map(Scored::characters).sum::<usize>();
        if !text.is_empty() || tokens.as_ref().is_some_and(|tokens| !tokens.is_empty()) {
            self.ready.push_back(Piece::Text { choice, text, tokens, offset });
        }
    }

    /// All choices, once they have ended.
    async fn gather(&mut self) -> Result<Vec<Choice>, ApiError> {
        let mut said = vec![(String::new(), Vec::new()); self.choices.len()];
        let mut ended = Vec::with_capacity(said.len());
        while let Some(piece) = self.next().await {
            match piece? {
                Piece::Text { choice, text, tokens, .. } => {
                    said[choice].0.push_str(&text);
                    said[choice].1.extend(tokens.into_iter().flatten());
                }
                Piece::End { choice, reason } => ended.push((choice, reason)),
            }
        }
        ended.sort_unstable_by_key(|(choice, _)| *choice);
        let choice = |((_, reason), (text, tokens)): ((usize, FinishReason), (String, Vec<Scored>))| Choice {
            text,
            reason,
            tokens: self.is_scored.then_some(tokens),
        };
        Ok(ended.into_iter().zip(said).map(choice).collect())
    }

    /// How many choices there are.
    pub(crate) fn choices(&self) -> usize {
        self.choices.len()
    }

    /// What those that have ended took; a prompt of several choices is counted once.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    fn note_tokens(&mut self, choice: usize) {
        let now = Instant::now();
        match &mut self.choices[choice].times {
            Some((_, last)) => *last = now,
            none => {
                *none = Some((now, now));
                self.app.metrics().first_token(now - self.arrived);
            }
        }
    }

    fn note_end(&mut self, choice: usize, usage: Usage) {
        if let Some((first, last)) = self.choices[choice].times {
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
