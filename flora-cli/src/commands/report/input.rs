//! The files that the page is made of, which may be anyone's: read whole, within limits, and checked before anything is drawn.

use std::io::Read;
use std::path::{Path, PathBuf};

use flora_ir::builtin;
use serde::de::DeserializeOwned;

use super::page::{Choice, Regret};
use crate::commands::bench::paper::{BASE, Record};
use crate::commands::bench::serving_answer::{Answer, Variant};

/// Why a file can't be part of the page.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    #[error("can't read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{} is too large for measurements: more than {} MiB; give what `{command}` prints", path.display(), MOST_BYTES >> 20)]
    TooLarge { path: PathBuf, command: &'static str },
    #[error("{} is not what `{command}` prints: {reason}; run that again", path.display())]
    Foreign { path: PathBuf, command: &'static str, reason: String },
    #[error("{} has too many {what} for a page: {found}, at most {limit}; measure fewer at a time", path.display())]
    TooMany { path: PathBuf, what: &'static str, found: usize, limit: usize },
}

/// The command that makes `--paper` files.
pub(super) const PAPER: &str = "flora bench paper --json";
/// The command that makes `--planner` files.
pub(super) const PLANNER: &str = "flora bench planner --json";

/// The command that makes `--serving` files.
pub(super) const SERVING: &str = "flora bench serving --json";

/// The largest file.
const MOST_BYTES: u64 = 32 << 20;
/// The most records of a file.
const MOST_RECORDS: usize = 20_000;
/// The largest extents, as `flora bench` measures them; products of them stay within 64 bits.
const LARGEST_EXTENT: u32 = 1 << 16;
const MOST_TOKENS: u32 = 1 << 20;
const MOST_SEGMENTS: u32 = 4096;
const HIGHEST_RANK: u32 = 1024;
/// The ranks of all adapters of a batch: what pricing it takes time for.
const MOST_RANKS: u32 = 1 << 17;

/// Reads a file of `flora bench paper --json`.
pub(super) fn paper(path: &Path) -> Result<Vec<Record>, InputError> {
    let records: Vec<Record> = read(path, PAPER)?;
    limit(path, "measurements", records.len())?;
    for (position, record) in records.iter().enumerate() {
        let checked = adapter(&record.adapter)
            .and_then(|()| extents(record.d, record.k, record.tokens, record.segments, record.rank))
            .and_then(|()| equal_segments(record))
            .and_then(|()| time("seconds", record.seconds))
            .and_then(|()| time("base_seconds", record.base_seconds))
            .and_then(|()| time("tokens_per_second", record.tokens_per_second))
            .and_then(|()| share("spread", record.spread, f64::MAX));
        checked.map_err(|reason| foreign(path, PAPER, format!("in measurement {}, {reason}", position + 1)))?;
    }
    Ok(records)
}

/// Reads a file of `flora bench planner --json`.
pub(super) fn planner(path: &Path) -> Result<Regret, InputError> {
    let regret: Regret = read(path, PLANNER)?;
    limit(path, "results", regret.results.len().max(regret.worst.len()))?;
    let whole = [
        share("top1", regret.top1, 1.0),
        share("mean_regret", regret.mean_regret, f64::MAX),
        share("p95_regret", regret.p95_regret, f64::MAX),
        share("max_regret", regret.max_regret, f64::MAX),
        share("median_error", regret.median_error.unwrap_or(0.0), f64::MAX),
    ];
    whole.into_iter().collect::<Result<(), _>>().map_err(|reason| foreign(path, PLANNER, reason))?;
    for (position, result) in regret.results.iter().chain(&regret.worst).enumerate() {
        let place = |reason| foreign(path, PLANNER, format!("in result {}, {reason}", position + 1));
        choice(result).map_err(place)?;
    }
    Ok(regret)
}

/// Reads a file of `flora bench serving --json`.
pub(super) fn serving(path: &Path) -> Result<Answer, InputError> {
    let answer: Answer = read(path, SERVING)?;
    let Answer { throughput, latency, steps, .. } = &answer;
    limit(path, "measurements", throughput.len().max(latency.len()).max(steps.len()))?;
    let checked = (throughput.iter())
        .try_for_each(|one| {
            variant(&one.variant)?;
            time("tokens_per_second", one.tokens_per_second)
        })
        .and_then(|()| {
            latency.iter().try_for_each(|one| {
                variant(&one.variant)?;
                time("rate", one.rate)?;
                [one.time_to_first_token, one.time_per_output_token, one.latency].iter().try_for_each(|of| {
                    time("p50", of.p50).and_then(|()| time("p95", of.p95)).and_then(|()| time("p99", of.p99))
                })
            })
        })
        .and_then(|()| {
            steps.iter().try_for_each(|one| {
                variant(&one.variant)?;
                time("predicted_seconds", one.predicted_seconds)?;
                time("predicted_base_seconds", one.predicted_base_seconds)?;
                one.seconds.map_or(Ok(()), |seconds| time("seconds", seconds))
            })
        });
    checked.map_err(|reason| foreign(path, SERVING, reason))?;
    Ok(answer)
}

fn variant(variant: &Variant) -> Result<(), String> {
    adapter(&variant.adapter)?;
    match variant.rank <= HIGHEST_RANK {
        true => Ok(()),
        false => Err(format!("the rank {} is above {HIGHEST_RANK}", variant.rank)),
    }
}

fn choice(choice: &Choice) -> Result<(), String> {
    extents(choice.d, choice.k, choice.tokens, choice.segments, choice.rank)?;
    share("regret", choice.regret, f64::MAX)?;
    for candidate in &choice.candidates {
        time("predicted_seconds", candidate.predicted_seconds)?;
        time("seconds", candidate.seconds)?;
    }
    Ok(())
}

fn read<T: DeserializeOwned>(path: &Path, command: &'static str) -> Result<T, InputError> {
    let io = |source| InputError::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(io)?;
    file.take(MOST_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > MOST_BYTES {
        return Err(InputError::TooLarge { path: path.to_owned(), command });
    }
    serde_json::from_slice(&bytes).map_err(|error| foreign(path, command, error.to_string()))
}

fn foreign(path: &Path, command: &'static str, reason: String) -> InputError {
    InputError::Foreign { path: path.to_owned(), command, reason }
}

fn limit(path: &Path, what: &'static str, found: usize) -> Result<(), InputError> {
    match found <= MOST_RECORDS {
        true => Ok(()),
        false => Err(InputError::TooMany { path: path.to_owned(), what, found, limit: MOST_RECORDS }),
    }
}

fn adapter(name: &str) -> Result<(), String> {
    match name == BASE || builtin::names().any(|known| known == name) {
        true => Ok(()),
        false => Err(format!("the adapter `{name}` is unknown")),
    }
}

fn extents(d: u32, k: u32, tokens: u32, segments: u32, rank: u32) -> Result<(), String> {
    let within = |what: &str, value: u32, least: u32, most: u32| match (least..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{what} is {value}, not from {least} to {most}")),
    };
    within("d", d, 1, LARGEST_EXTENT)?;
    within("k", k, 1, LARGEST_EXTENT)?;
    within("tokens", tokens, 1, MOST_TOKENS)?;
    within("segments", segments, 1, tokens.min(MOST_SEGMENTS))?;
    within("rank", rank, 0, HIGHEST_RANK)?;
    within("segments times rank", segments * rank, 0, MOST_RANKS)
}

fn equal_segments(Record { tokens, segments, .. }: &Record) -> Result<(), String> {
    match tokens.is_multiple_of(*segments) {
        true => Ok(()),
        false => Err(format!("{tokens} tokens are in {segments} segments, which aren't of one length")),
    }
}

fn time(what: &str, value: f64) -> Result<(), String> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(format!("{what} is {value}, which nothing takes")),
    }
}

fn share(what: &str, value: f64, most: f64) -> Result<(), String> {
    match (0.0..=most).contains(&value) {
        true => Ok(()),
        false => Err(format!("{what} is {value}, which is no share")),
    }
}
