//! What came out, for programs and for people.

use std::path::Path;

use flora_train::{Dataset, Ending};
use serde::Serialize;

use super::plan::{Plan, Variant};
use super::runs::Scored;
use super::statistics::{Interval, Share, Verdict};
use crate::commands::error::CommandError;

/// Of the bootstrap.
const SEED: u64 = 1;

#[derive(Serialize)]
pub(super) struct Answer {
    pub(super) model: String,
    pub(super) plan: Plan,
    pub(super) languages: Vec<OfLanguage>,
}

/// What came out in one language. Gains are in bits a byte, or in the part of lines, over the base model.
#[derive(Clone, Serialize)]
pub(super) struct OfLanguage {
    language: String,
    /// Of the data that is learnt from.
    tokens: u64,
    files: usize,
    bytes: usize,
    lines: usize,
    base_bits_per_byte: f64,
    base_exact: Option<f64>,
    variants: Vec<OfVariant>,
    comparisons: Vec<Compared>,
}

/// A learning rate, and what a short job made of it on the validation split.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Rate {
    pub(super) rate: f64,
    pub(super) bits_per_byte: Option<f64>,
}

#[derive(Clone, Serialize)]
pub(super) struct OfVariant {
    pub(super) name: String,
    parameters: usize,
    rate: f64,
    rates: Vec<Rate>,
    seeds: Vec<OfSeed>,
    bits_per_byte: f64,
    /// Of the mean over seeds; by files.
    pub(super) gain: Interval,
    exact: Option<f64>,
    exact_gain: Option<Interval>,
}

#[derive(Clone, Serialize)]
struct OfSeed {
    seed: u64,
    bits_per_byte: f64,
    exact: Option<f64>,
    ended: Option<Ending>,
}

/// How much more one variant gains than another.
#[derive(Clone, Serialize)]
pub(super) struct Compared {
    of: String,
    with: String,
    bits: Verdict,
    /// Of the lines; nothing where none is looked at.
    exact: Option<Interval>,
}

/// Bits of one file that `own` saves against `other`, both the mean of their seeds.
fn saved(own: &[Scored], other: &[Scored]) -> Vec<Share> {
    shares(own, other, |score, file| {
        let file = &score.files[file];
        (-file.nats / std::f64::consts::LN_2, file.bytes as f64)
    })
}

/// Lines of one file that `own` writes and `other` doesn't.
fn won(own: &[Scored], other: &[Scored]) -> Vec<Share> {
    shares(own, other, |score, file| (score.files[file].exact as f64, score.files[file].lines as f64))
}

fn shares(own: &[Scored], other: &[Scored], of: impl Fn(&Scored, usize) -> (f64, f64)) -> Vec<Share> {
    let mean = |scores: &[Scored], file| {
        scores.iter().map(|score| of(score, file).0).sum::<f64>() / scores.len().max(1) as f64
    };
    let files = own.first().map_or(0, |score| score.files.len());
    let size = |file| own.first().map_or(0.0, |score| of(score, file).1);
    (0..files).map(|file| Share { part: mean(own, file) - mean(other, file), of: size(file) }).collect()
}

fn mean(scores: &[Scored], of: impl Fn(&Scored) -> f64) -> f64 {
    scores.iter().map(of).sum::<f64>() / scores.len().max(1) as f64
}

fn known(number: f64) -> Option<f64> {
    number.is_finite().then_some(number)
}

fn of_lines(own: &[Scored], other: &[Scored]) -> Option<Interval> {
    let interval = Interval::of(&won(own, other), SEED);
    interval.estimate.is_finite().then_some(interval)
}

pub(super) fn compared((of, with): (String, String), own: &[Scored], other: &[Scored], gain: f64) -> Compared {
    Compared { of, with, bits: Verdict::of(&saved(own, other), gain, SEED), exact: of_lines(own, other) }
}

impl OfVariant {
    pub(super) fn new(
        variant: &Variant,
        (rate, rates): (f64, Vec<Rate>),
        seeds: &[u64],
        base: &Scored,
        scores: &[Scored],
    ) -> Self {
        let of_seed = |(seed, score): (&u64, &Scored)| OfSeed {
            seed: *seed,
            bits_per_byte: score.bits_per_byte(),
            exact: known(score.exact()),
            ended: score.ended.clone(),
        };
        let base = std::slice::from_ref(base);
        Self {
            name: variant.name(),
            parameters: scores.first().map_or(0, |score| score.parameters),
            rate,
            rates,
            seeds: seeds.iter().zip(scores).map(of_seed).collect(),
            bits_per_byte: mean(scores, Scored::bits_per_byte),
            gain: Interval::of(&saved(scores, base), SEED),
            exact: known(mean(scores, Scored::exact)),
            exact_gain: of_lines(scores, base),
        }
    }
}

impl OfLanguage {
    pub(super) fn new(
        language: &str,
        data: &Dataset,
        base: &Scored,
        variants: Vec<OfVariant>,
        comparisons: Vec<Compared>,
    ) -> Self {
        Self {
            language: language.to_owned(),
            tokens: data.tokens(),
            files: base.files.len(),
            bytes: base.files.iter().map(|file| file.bytes).sum(),
            lines: base.files.iter().map(|file| file.lines).sum(),
            base_bits_per_byte: base.bits_per_byte(),
            base_exact: known(base.exact()),
            variants,
            comparisons,
        }
    }

    fn markdown(&self) -> String {
        let percent = |part: Option<f64>| part.map_or_else(|| "-".to_owned(), |part| format!("{:.1} %", 100.0 * part));
        let points = |interval: Option<Interval>| interval.map_or_else(|| "-".to_owned(), |own| points(&own));
        let mut text = format!(
            "\n## {}\n\nHeld out: {} files, {} bytes, {} lines. Base: {:.4} bits a byte, {} of lines.\n\n",
            self.language,
            self.files,
            self.bytes,
            self.lines,
            self.base_bits_per_byte,
            percent(self.base_exact)
        );
        text += "| variant | numbers | rate | bits a byte | of each seed | gain | lines | gain in lines |\n";
        text += "|---|---|---|---|---|---|---|---|\n";
        for own in &self.variants {
            let seeds: Vec<String> = own.seeds.iter().map(OfSeed::words).collect();
            text += &format!(
                "| {} | {} | {} | {:.4} | {} | {} | {} | {} |\n",
                own.name,
                own.parameters,
                own.rate,
                own.bits_per_byte,
                seeds.join(", "),
                own.gain.words(),
                percent(own.exact),
                points(own.exact_gain)
            );
        }
        if !self.comparisons.is_empty() {
            text += "\n| gain of | less that of | bits a byte | over the latter's gain | verdict | lines |\n|---|---|---|---|---|---|\n";
        }
        for own in &self.comparisons {
            let Interval { estimate, low, high } = own.bits.relative;
            text += &format!(
                "| {} | {} | {} | {:+.0} % [{:+.0}, {:+.0}] | {} | {} |\n",
                own.of,
                own.with,
                own.bits.difference.words(),
                100.0 * estimate,
                100.0 * low,
                100.0 * high,
                own.bits.words(),
                points(own.exact)
            );
        }
        text
    }
}

impl OfSeed {
    /// A job that ended before its last step is marked.
    fn words(&self) -> String {
        let mark =
            if self.ended.as_ref().is_none_or(|ended| *ended == Ending::Complete) { "" } else { " (ended early)" };
        format!("{:.4}{mark}", self.bits_per_byte)
    }
}

impl Interval {
    fn words(&self) -> String {
        format!("{:+.4} [{:+.4}, {:+.4}]", self.estimate, self.low, self.high)
    }
}

/// Of parts of lines, in points.
fn points(own: &Interval) -> String {
    format!("{:+.1} [{:+.1}, {:+.1}]", 100.0 * own.estimate, 100.0 * own.low, 100.0 * own.high)
}

impl Answer {
    /// As `quality.json` and `quality.md` in `folder`.
    pub(super) fn write(&self, folder: &Path) -> Result<(), CommandError> {
        let json = serde_json::to_string_pretty(self)? + "\n";
        flora_checkpoint::write_file(&folder.join("quality.json"), json.as_bytes())?;
        Ok(flora_checkpoint::write_file(&folder.join("quality.md"), self.markdown().as_bytes())?)
    }

    pub(super) fn markdown(&self) -> String {
        let Plan { steps, batch, sequence_length, rate_steps, seeds, .. } = &self.plan;
        let mut text = format!(
            "# Quality\n\n{}; {steps} steps of {batch}×{sequence_length} tokens, seeds: {}; rates chosen by {rate_steps} steps on the \
             validation split.\nBrackets are 95 % intervals of a bootstrap over held-out files of the mean of the seeds; what seeds \
             would differ by isn't in them.\n\"Equal\": the interval lies within ±20 % of the gain that is compared with; \"better\" \
             and \"worse\": it leaves zero out.\n",
            self.model,
            seeds.len()
        );
        self.languages.iter().for_each(|language| text += &language.markdown());
        text
    }
}
