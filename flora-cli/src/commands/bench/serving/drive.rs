//! Drives an engine with the requests of an experiment and hears when what comes back.

use std::time::{Duration, Instant};

use flora_engine::{Engine, Event, LogProbabilities, LogitRules, Request, RequestError, Sampling, StopAt};
use tokio::time::sleep;

use super::workload::Lengths;

/// A request that is to come.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) lengths: Lengths,
    pub(super) adapter: Option<String>,
    /// After the start.
    pub(super) arrival: Duration,
}

/// What came of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heard {
    /// From its arrival to its first token.
    pub(super) first: Duration,
    /// From its arrival to its end.
    pub(super) whole: Duration,
    /// Generated.
    pub(super) tokens: u32,
}

/// What came of all of them.
pub(super) struct Outcome {
    pub(super) requests: Vec<Heard>,
    pub(super) seconds: f64,
    pub(super) steps: u64,
}

/// Runs all requests to their end.
pub(super) fn drive(engine: &Engine, planned: &[Planned], vocabulary: u32, seed: u64) -> Result<Outcome, RequestError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    let runtime = runtime.map_err(|error| RequestError::Invalid(format!("no timer can be had: {error}")))?;
    let steps = engine.handle().metrics().steps;
    let start = Instant::now();
    let requests = runtime.block_on(async {
        let one = |(number, planned): (usize, &Planned)| {
            let (planned, handle) = (planned.clone(), engine.handle());
            let mut random = fastrand::Rng::with_seed(seed.wrapping_add(number as u64));
            async move {
                sleep(planned.arrival.saturating_sub(start.elapsed())).await;
                let arrived = Instant::now();
                let prompt = (0..planned.lengths.prompt).map(|_| random.u32(0..vocabulary)).collect();
                // Nothing ends it but its length, as the experiment has it.
                let stop = StopAt { max_tokens: planned.lengths.output, strings: Vec::new(), tokens: Vec::new() };
                let request = Request {
                    prompt,
                    adapters: planned.adapter.into(),
                    sampling: Sampling::Greedy,
                    rules: LogitRules::default(),
                    stop,
                    grammar: None,
                    log_probabilities: LogProbabilities::default(),
                };
                let mut stream = handle.submit(request)?;
                let mut first = None;
                loop {
                    match stream.recv().await {
                        Some(Event::Prompt(_)) => {}
                        Some(Event::Text { .. }) => {
                            first.get_or_insert_with(|| arrived.elapsed());
                        }
                        Some(Event::Finished { usage, .. }) => {
                            let whole = arrived.elapsed();
                            let first = first.unwrap_or(whole);
                            return Ok::<_, RequestError>(Heard { first, whole, tokens: usage.completion_tokens });
                        }
                        Some(Event::Failed(error)) => return Err(error),
                        None => return Err(RequestError::ShuttingDown),
                    }
                }
            }
        };
        let local = tokio::task::LocalSet::new();
        local
            .run_until(async {
                let tasks: Vec<_> =
                    planned.iter().enumerate().map(|planned| tokio::task::spawn_local(one(planned))).collect();
                let mut heard = Vec::with_capacity(tasks.len());
                for task in tasks {
                    heard.push(task.await.map_err(|error| RequestError::Model(error.to_string()))??);
                }
                Ok::<_, RequestError>(heard)
            })
            .await
    })?;
    Ok(Outcome { requests, seconds: start.elapsed().as_secs_f64(), steps: engine.handle().metrics().steps - steps })
}
