//! Answers as server-sent events, each sent when it is there.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::Value;

use crate::answer::Answer;
use crate::error::ApiError;
use crate::generation::{Generation, Piece};

/// An answer in chunks: `first`, which came already, then what `generation` brings.
pub(crate) fn response(answer: Answer, first: Option<Piece>, generation: Generation, include_usage: bool) -> Response {
    let mut chunks = Chunks { answer, generation, include_usage, ready: VecDeque::new(), ended: false };
    for choice in 0..chunks.generation.choices() {
        if let Some(opening) = chunks.answer.opening(choice) {
            chunks.push(opening);
        }
    }
    if let Some(piece) = first {
        chunks.piece(piece);
    }
    // While a model is slow to begin, comments keep proxies from giving up, and tell of clients that have.
    Sse::new(stream::unfold(chunks, Chunks::next)).keep_alive(KeepAlive::default()).into_response()
}

/// The events of one answer.
struct Chunks {
    answer: Answer,
    generation: Generation,
    include_usage: bool,
    ready: VecDeque<Event>,
    /// Whether nothing comes after what is ready.
    ended: bool,
}

impl Chunks {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        while self.ready.is_empty() && !self.ended {
            match self.generation.next().await {
                Some(Ok(piece)) => self.piece(piece),
                Some(Err(error)) => self.fail(&error),
                None => self.finish(),
            }
        }
        let event = self.ready.pop_front()?;
        Some((Ok(event), self))
    }

    fn piece(&mut self, piece: Piece) {
        let chunk = match piece {
            Piece::Text { choice, text, tokens, offset } => self.answer.text(choice, &text, tokens.as_deref(), offset),
            Piece::End { choice, reason } => self.answer.closing(choice, reason),
        };
        self.push(chunk);
    }

    fn push(&mut self, mut chunk: Value) {
        if self.include_usage {
            // A field that all chunks have then, as OpenAI has it.
            chunk["usage"] = Value::Null;
        }
        self.ready.push_back(event(&chunk));
    }

    fn finish(&mut self) {
        if self.include_usage {
            self.ready.push_back(event(&self.answer.usage(self.generation.usage())));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
        self.ended = true;
    }

    fn fail(&mut self, error: &ApiError) {
        // The status was sent long ago.
        let body = serde_json::json!(error.body());
        self.ready.push_back(event(&body).event("error"));
        self.ended = true;
    }
}

fn event(data: &Value) -> Event {
    Event::default().data(data.to_string())
}
