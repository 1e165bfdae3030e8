//! Chooses the next token from the logits.

use crate::request::{LogitRules, Sampling};

/// Chooses the tokens of one request.
#[derive(Debug)]
pub(crate) enum Sampler {
    Greedy,
    Random { temperature: f64, set: Set, generator: fastrand::Rng },
}

/// Which tokens are drawn from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Set {
    /// The most tokens.
    top_k: usize,
    /// The least weight, as a part of the heaviest.
    min_p: f64,
    /// The part of all weight that is enough.
    top_p: f64,
}

/// Logits that nothing can be chosen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LogitsError {
    #[error("the logit of token {0} is not a number")]
    NotANumber(usize),
    #[error("the logit of token {0} is infinite")]
    Infinite(usize),
    #[error("no token has a logit above minus infinity")]
    Nothing,
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling, rules: &LogitRules) -> Self {
        match sampling {
            Sampling::Greedy => Self::Greedy,
            Sampling::Random { temperature, top_p, seed } => Self::Random {
                temperature: f64::from(temperature),
                set: Set {
                    top_k: rules.top_k.map_or(usize::MAX, |count| count.get() as usize),
                    min_p: f64::from(rules.min_p),
                    top_p: f64::from(top_p),
                },
                generator: fastrand::Rng::with_seed(seed),
            },
        }
    }

    /// The next token.
    pub(crate) fn next(&mut self, logits: &[f32]) -> Result<u32, LogitsError> {
        let (likeliest, largest) = largest(logits)?;
        let token = match self {
            Self::Greedy => likeliest,
            Self::Random { temperature, set, generator } => {
                let weight = |logit: f32| ((f64::from(logit) - f64::from(largest)) / *temperature).exp();
                let weights: Vec<f64> = logits.iter().map(|logit| weight(*logit)).collect();
                draw(weights, *set, generator.f64()).unwrap_or(likeliest)
            }
        };
        // Vocabularies are counted in u32.
        Ok(token as u32)
    }
}

/// Logits that are compared side by side.
const LANES: usize = 32;

/// The first of the largest, and its value, which is finite.
pub(crate) fn largest(logits: &[f32]) -> Result<(usize, f32), LogitsError> {
    // In lanes and without a branch, so that it is done in vectors: a vocabulary is long, and this is asked for every token.
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut last = [f32::NEG_INFINITY; LANES];
    last[..rest.len()].copy_from_slice(rest);
    let (mut lanes, mut faults) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    for chunk in chunks.iter().chain([&last]) {
        for ((lane, fault), logit) in lanes.iter_mut().zip(&mut faults).zip(chunk) {
            *lane = if *logit > *lane { *logit } else { *lane };
            // What isn't a number isn't below it either.
            let is_below_infinity = *logit < f32::INFINITY;
            *fault |= u32::from(!is_below_infinity);
        }
    }
    if faults.iter().any(|fault| *fault > 0) {
        let found = logits.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY).unwrap_or_default();
        return Err(if logits[found].is_nan() { LogitsError::NotANumber(found) } else { LogitsError::Infinite(found) });
    }
    let largest = lanes.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let first = logits.iter().position(|logit| *logit == largest && largest > f32::NEG_INFINITY);
    first.map(|token| (token, largest)).ok_or(LogitsError::Nothing)
}

/// The token at `point` (from 0 up to 1) of `set`. The heaviest weight is 1.
fn draw(mut weights: Vec<f64>, set: Set, point: f64) -> Option<usize> {
    if set.min_p > 0.0 {
        weights.iter_mut().filter(|weight| **weight < set.min_p).for_each(|weight| *weight = 0.0);
    }
    if set.top_k < weights.len() {
        keep_heaviest(&mut weights, set.top_k);
    }
    let total: f64 = weights.iter().sum();
    let top_p = set.top_p;
    if top_p >= 1.0 {
        return at(weights.iter().copied().enumerate(), point * total);
    }
    // Lighter ones come to less than 1 - top_p together, so none of them is in the set, and few are left to sort.
    let least = (1.0 - top_p) * total / weights.len() as f64;
    let mut likely: Vec<(usize, f64)> =
        weights.iter().copied().enumerate().filter(|(_, weight)| *weight >= least).collect();
    likely.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let mut reached = 0.0;
    let mut size = 0;
    for (_, weight) in &likely {
        reached += weight;
        size += 1;
        if reached >= top_p * total {
            break;
        }
    }
    at(likely.into_iter().take(size), point * reached)
}

/// Leaves the `count` heaviest weights, of equal ones those that come first, and makes the others 0.
fn keep_heaviest(weights: &mut [f64], count: usize) {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    let heavier = |a: &usize, b: &usize| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b));
    order.select_nth_unstable_by(count, heavier);
    for token in &order[count..] {
        weights[*token] = 0.0;
    }
}

/// The token that `point` falls to when weights are laid end to end.
fn at(weights: impl Iterator<Item = (usize, f64)>, point: f64) -> Option<usize> {
    let mut reached = 0.0;
    let mut last = None;
    for (token, weight) in weights.filter(|(_, weight)| *weight > 0.0) {
        reached += weight;
        last = Some(token);
        if point < reached {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::*;

    fn random(temperature: f32, top_p: f32, seed: u64) -> Sampler {
        Sampler::new(Sampling::Random { temperature, top_p, seed }, &LogitRules::default())
    }

    fn of_set(top_p: f32, top_k: u32, min_p: f32) -> Sampler {
        let rules = LogitRules { top_k: NonZeroU32::new(top_k), min_p, ..LogitRules::default() };
        Sampler::new(Sampling::Random { temperature: 1.0, top_p, seed: 5 }, &rules)
    }

    /// How often each token came.
    fn counts(mut sampler: Sampler, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.next(logits).expect("finite logits") as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(Sampler::Greedy.next(&[1.0, 3.0, f32::NEG_INFINITY, 3.0]), Ok(1));
    }

    #[test]
    fn logits_that_mean_nothing_are_errors() {
        for mut sampler in [Sampler::Greedy, random(1.0, 0.5, 1)] {
            assert_eq!(sampler.next(&[1.0, f32::NAN]), Err(LogitsError::NotANumber(1)));
            assert_eq!(sampler.next(&[f32::INFINITY, 0.0]), Err(LogitsError::Infinite(0)));
            assert_eq!(sampler.next(&[f32::NEG_INFINITY; 3]), Err(LogitsError::Nothing));
            assert_eq!(sampler.next(&[]), Err(LogitsError::Nothing));
        }
    }

    /// Chi-square with 3 degrees of freedom: 16.27 is passed once in a thousand seeds, and this one seed is fixed.
    #[test]
    fn draws_follow_the_softmax() {
        let (logits, temperature, draws) = ([0.0f32, 1.0, -1.0, 0.5], 0.7f32, 20_000);
        let weights = logits.map(|logit| f64::from(logit / temperature).exp());
        let total: f64 = weights.iter().sum();
        let counts = counts(random(temperature, 1.0, 11), &logits, draws);
        let chi_square: f64 = counts
            .iter()
            .zip(weights)
            .map(|(count, weight)| {
                let expected = weight / total * draws as f64;
                (*count as f64 - expected).powi(2) / expected
            })
            .sum();
        assert!(chi_square < 16.27, "{chi_square}: {counts:?}");
    }

    /// Of 0.5, 0.3, 0.15 and 0.05, 0.8 takes two, drawn as 5 to 3; one degree of freedom.
    #[test]
    fn top_p_draws_from_the_smallest_set() {
        let logits = [0.05f32.ln(), 0.5f32.ln(), 0.3f32.ln(), 0.15f32.ln()];
        let counts = counts(random(1.0, 0.79, 5), &logits, 8000);
        assert_eq!((counts[0], counts[3]), (0, 0));
        let chi_square = (counts[1] as f64 - 5000.0).powi(2) / 5000.0 + (counts[2] as f64 - 3000.0).powi(2) / 3000.0;
        assert!(chi_square < 10.83, "{chi_square}: {counts:?}");
    }

    #[test]
    fn the_edges_of_top_p() {
        let logits = [1.0, 2.0, 2.0, f32::NEG_INFINITY];
        let tiny = counts(random(1.0, 1e-6, 3), &logits, 100);
        assert_eq!(tiny, [0, 100, 0, 0], "the likeliest is always in the set, of equals the first");
        let nearly_all = counts(random(1.0, 0.999_999, 3), &logits, 2000);
        assert!(nearly_all[..3].iter().all(|count| *count > 0) && nearly_all[3] == 0, "{nearly_all:?}");
        let all = counts(random(1.0, 1.0, 3), &logits, 2000);
        assert!(all[..3].iter().all(|count| *count > 0) && all[3] == 0, "{all:?}");
    }

    #[test]
    fn top_k_draws_from_so_many() {
        let logits = [0.0, 2.0, 1.0, 2.0, 1.0];
        let came = |top_p, top_k, min_p| -> Vec<usize> {
            let counts = counts(of_set(top_p, top_k, min_p), &logits, 2000);
            (0..5).filter(|token| counts[*token] > 0).collect()
        };
        assert_eq!(came(1.0, 1, 0.0), [1], "of equals the first");
        assert_eq!(came(1.0, 3, 0.0), [1, 2, 3], "of equals the first");
        assert_eq!(came(1.0, 5, 0.0), [0, 1, 2, 3, 4]);
        assert_eq!(came(1.0, 1000, 0.0), [0, 1, 2, 3, 4]);
        // e^-1 is 0.368 and e^-2 is 0.135 of the likeliest.
        assert_eq!(came(1.0, 0, 0.3), [1, 2, 3, 4]);
        assert_eq!(came(1.0, 0, 0.4), [1, 3]);
        assert_eq!(came(1.0, 0, 1.0), [1, 3], "the likeliest are always in the set");
        // Of two equal ones that are left, the first has half.
        assert_eq!(came(0.5, 2, 0.0), [1], "top_p is a part of what the others left");
    }

    #[test]
    fn temperatures_of_any_size_are_taken() {
        assert_eq!(counts(random(f32::MIN_POSITIVE, 1.0, 1), &[1.0, 1.5, -f32::MAX], 50), [0, 50, 0]);
        let hot = counts(random(f32::MAX, 0.9, 1), &[f32::MAX, -f32::MAX], 200);
        assert!(hot.iter().all(|count| *count > 0), "{hot:?}");
    }

    #[test]
    fn a_seed_gives_the_same_tokens() {
        let logits: Vec<f32> = (0..50).map(|token| (token as f32 * 0.7).sin()).collect();
        let tokens = |seed| {
            let mut sampler = random(0.8, 0.9, seed);
            (0..40).map(|_| sampler.next(&logits).expect("finite logits")).collect::<Vec<_>>()
        };
        assert_eq!(tokens(9), tokens(9));
        assert_ne!(tokens(9), tokens(10));
    }
}
