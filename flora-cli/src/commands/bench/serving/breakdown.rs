//! `flora bench serving --breakdown`: what the time of a prefill and of decoding steps is spent on, by the spans that the engine and
//! the decoder open.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use flora_engine::Engine;
use flora_engine::phases::{OF_DECODER, SAMPLING, STEP};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

use super::super::serving_answer::{Breakdown, Variant};
use super::drive::{Planned, drive};
use super::workload::Lengths;
use crate::commands::error::CommandError;

/// Adds up how long each name's spans were open.
#[derive(Clone, Debug, Default)]
pub(super) struct Spans(Arc<Mutex<BTreeMap<&'static str, Duration>>>);

/// When a span was entered.
struct Entered(Instant);

impl<S> Layer<S> for Spans
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    fn on_enter(&self, id: &tracing::span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            span.extensions_mut().replace(Entered(Instant::now()));
        }
    }

    fn on_exit(&self, id: &tracing::span::Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(Entered(begin)) = span.extensions_mut().remove()
        {
            let mut taken = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            *taken.entry(span.name()).or_default() += begin.elapsed();
        }
    }
}

impl Spans {
    /// What was added up since the last time.
    fn take(&self) -> BTreeMap<&'static str, Duration> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Requests that begin together and are alike.
struct Workload {
    name: String,
    requests: usize,
    lengths: Lengths,
    /// Whether all of it is shown, or a step of it.
    is_whole: bool,
}

/// `longest` is the most tokens of a request.
fn workloads(sequences: usize, longest: u32) -> [Workload; 3] {
    let room = longest.saturating_sub(1);
    let decode = |name, requests, output| {
        let lengths = Lengths { prompt: 1, output: room.min(output) };
        Workload { name, requests, lengths, is_whole: false }
    };
    let prompt = room.min(512);
    [
        Workload {
            name: format!("A prompt of {prompt} tokens"),
            requests: 1,
            lengths: Lengths { prompt, output: 1 },
            is_whole: true,
        },
        decode("A step of one sequence".to_owned(), 1, 65),
        decode(format!("A step of {sequences} sequences"), sequences, 33),
    ]
}

/// Runs each workload `rounds` times after once to warm up.
pub(super) fn measure(
    spans: &Spans,
    engine: &Engine,
    (variant, adapters): (&Variant, &dyn Fn(usize) -> Option<String>),
    (sequences, rounds): (usize, usize),
    (vocabulary, longest, seed): (u32, u32, u64),
) -> Result<Vec<Breakdown>, CommandError> {
    let mut measured = Vec::new();
    for Workload { name, requests, lengths, is_whole } in workloads(sequences, longest) {
        let planned = |number| Planned { lengths, adapter: adapters(number), arrival: Duration::ZERO };
        let planned: Vec<_> = (0..requests).map(planned).collect();
        drive(engine, &planned, vocabulary, seed)?;
        spans.take();
        let (mut seconds, mut steps) = (0.0, 0);
        for round in 1..=rounds {
            // Other prompts each time: nothing is shared.
            let outcome = drive(engine, &planned, vocabulary, seed.wrapping_add((round * requests) as u64))?;
            seconds += outcome.seconds;
            steps += outcome.steps;
        }
        let taken = spans.take();
        let parts_of = if is_whole { rounds as f64 } else { steps.max(1) as f64 };
        let each = |name: &str| taken.get(name).map_or(0.0, Duration::as_secs_f64) / parts_of;
        let mut parts: Vec<_> = OF_DECODER.iter().map(|name| ((*name).to_owned(), each(name))).collect();
        let of_decoder: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
        let all = seconds / parts_of;
        parts.push(("rest of the decoder".to_owned(), (each(STEP) - of_decoder).max(0.0)));
        parts.push((SAMPLING.to_owned(), each(SAMPLING)));
        parts.push(("engine and waiting".to_owned(), (all - each(STEP) - each(SAMPLING)).max(0.0)));
        measured.push(Breakdown { variant: variant.clone(), workload: name, steps, seconds: all, parts });
    }
    Ok(measured)
}
