//! The requests of the serving experiment: lengths of real chats, prompts of random tokens, arrivals at random times.

use std::time::Duration;

use serde::Deserialize;

/// The lengths of real chats' first turns, as `flora-cli/data/lengths.py` counted them.
const LENGTHS: &str = include_str!("../../../../data/lengths.json");

/// A joint histogram of prompt and output lengths.
#[derive(Deserialize)]
struct Histogram {
    /// The most tokens of a pair.
    largest_total: u32,
    /// Bucket i is from edge i to before edge i + 1.
    prompt_edges: Vec<u32>,
    output_edges: Vec<u32>,
    /// `[prompt bucket][output bucket]`
    counts: Vec<Vec<u64>>,
}

/// One request's sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lengths {
    pub(super) prompt: u32,
    pub(super) output: u32,
}

/// Lengths of `count` requests, each `scale` times as long as a real chat's and at least 1, together at most `longest`.
pub(super) fn lengths(count: usize, scale: f64, longest: u32, seed: u64) -> Result<Vec<Lengths>, serde_json::Error> {
    let histogram: Histogram = serde_json::from_str(LENGTHS)?;
    let mut random = fastrand::Rng::with_seed(seed);
    let total: u64 = histogram.counts.iter().flatten().sum();
    let scaled = |tokens: u32| ((f64::from(tokens) * scale).round() as u32).max(1);
    let mut requests = Vec::with_capacity(count);
    while requests.len() < count {
        let mut left = random.u64(0..total.max(1));
        let buckets = histogram.counts.iter().zip(histogram.prompt_edges.windows(2)).flat_map(|(row, prompts)| {
            row.iter().zip(histogram.output_edges.windows(2)).map(move |(count, outputs)| (*count, prompts, outputs))
        });
        for (count, prompts, outputs) in buckets {
            if left >= count {
                left -= count;
                continue;
            }
            let (prompt, output) = (random.u32(prompts[0]..prompts[1]), random.u32(outputs[0]..outputs[1]));
            if prompt + output <= histogram.largest_total {
                let prompt = scaled(prompt).min(longest.saturating_sub(1)).max(1);
                requests.push(Lengths { prompt, output: scaled(output).min(longest.saturating_sub(prompt)).max(1) });
            }
            break;
        }
    }
    Ok(requests)
}

/// When each of `count` requests comes, `rate` a second to be expected (a Poisson process).
pub(super) fn arrivals(count: usize, rate: f64, seed: u64) -> Vec<Duration> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut at = 0.0;
    let mut next = || {
        at -= (1.0 - random.f64()).ln() / rate;
        Duration::from_secs_f64(at)
    };
    (0..count).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_chats_that_were_counted() {
        let drawn = lengths(20_000, 1.0, 2048, 7).expect("the checked-in file");
        let median = |mut values: Vec<u32>| {
            values.sort_unstable();
            values[values.len() / 2]
        };
        let (prompt, output) = drawn.iter().map(|one| (one.prompt, one.output)).unzip();
        let (prompt, output) = (median(prompt), median(output));
        // 108 and 140 in the file; a bucket is a fourth of that wide.
        assert!((90..130).contains(&prompt) && (115..170).contains(&output), "{prompt} {output}");
        assert!(drawn.iter().all(|one| one.prompt + one.output <= 2048));
        let short = lengths(100, 0.01, 64, 7).expect("the checked-in file");
        assert!(short.iter().all(|one| one.prompt >= 1 && one.output >= 1 && one.prompt + one.output <= 64));
    }

    #[test]
    fn arrivals_come_at_the_rate() {
        let drawn = arrivals(10_000, 4.0, 3);
        let last = drawn[drawn.len() - 1].as_secs_f64();
        assert!((last / 2500.0 - 1.0).abs() < 0.05, "{last}");
        assert!(drawn.windows(2).all(|pair| pair[0] <= pair[1]));
    }
}
