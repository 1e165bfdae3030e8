//! Attention's backward pass.

use std::ops::Range;

use flora_host::decoder::{
    Attention, AttentionAdjoint, AttentionSegment, Heads, KeyValueCache, Matrix, OperationError, RotaryFrequencies,
};
use flora_host::{HostEngine, Values, ValuesMut};
use flora_plan::layer::Element;
use proptest::prelude::*;

use super::{UNIT, bits, difference, rounding, widened};
use crate::problem::{config, random_values};

const BASE: f64 = 10_000.0;

/// What turned queries and keys are multiplied by.
const FACTOR: f64 = 1.25;

fn frequencies(size: usize) -> RotaryFrequencies {
    let one = |pair: usize| BASE.powf(-2.0 * pair as f64 / size as f64);
    RotaryFrequencies::new((0..size / 2).map(one).collect(), FACTOR)
}

/// Segments of random rows, each row `[queries, keys, values]`, with the gradients of what they attend to.
#[derive(Clone, Debug)]
struct Problem {
    heads: Heads,
    rotated: bool,
    window: Option<usize>,
    lengths: Vec<usize>,
    rows: Vec<f32>,
    g: Vec<f32>,
}

impl Problem {
    fn new(heads: Heads, rotated: bool, window: Option<usize>, lengths: &[usize], random: &mut fastrand::Rng) -> Self {
        let Heads { queries, keys, size } = heads;
        let count: usize = lengths.iter().sum();
        let rows = random_values(count * (queries + 2 * keys) * size, random);
        let g = random_values(count * queries * size, random);
        Self { heads, rotated, window, lengths: lengths.to_vec(), rows, g }
    }

    fn width(&self) -> usize {
        (self.heads.queries + 2 * self.heads.keys) * self.heads.size
    }

    fn segments(&self) -> Vec<Range<usize>> {
        let mut next = 0;
        let range = |length: &usize| {
            next += length;
            next - length..next
        };
        self.lengths.iter().map(range).collect()
    }

    /// One of the segments by itself.
    fn alone(&self, segment: usize) -> Self {
        let rows = self.segments()[segment].clone();
        let cut = |values: &[f32], width: usize| values[rows.start * width..rows.end * width].to_vec();
        let g = cut(&self.g, self.heads.queries * self.heads.size);
        Self { lengths: vec![rows.len()], rows: cut(&self.rows, self.width()), g, ..self.clone() }
    }

    /// The gradients of all rows.
    fn run(&self, engine: &HostEngine) -> Vec<f32> {
        let Heads { queries, keys, size } = self.heads;
        let segments = self.segments();
        let positions: Vec<_> = self.lengths.iter().flat_map(|length| 0..*length).collect();
        let rotary = self.rotated.then(|| frequencies(size).rows(&positions));
        let columns = |range: Range<usize>| {
            Matrix::new(Values::F32(&self.rows), self.width(), range.start * size..range.end * size).unwrap()
        };
        let attention = Attention {
            heads: self.heads,
            queries: columns(0..queries),
            keys: columns(queries..queries + keys),
            values: columns(queries + keys..queries + 2 * keys),
            rotary: rotary.as_ref(),
            window: self.window,
        };
        let mut caches: Vec<_> = segments.iter().map(|_| KeyValueCache::new(self.heads, Element::F32)).collect();
        let of_caches = segments.iter().zip(&mut caches);
        let mut of_segments: Vec<_> =
            of_caches.map(|(rows, cache)| AttentionSegment { rows: rows.clone(), cache }).collect();
        let (mut attended, mut log_sums) = (vec![f32::NAN; self.g.len()], vec![f32::NAN; positions.len() * queries]);
        let out = ValuesMut::F32(&mut attended);
        engine.attend_with_log_sums(&attention, &mut of_segments, out, &mut log_sums).unwrap();
        let adjoint =
            AttentionAdjoint { attention, segments: &segments, attended: &attended, log_sums: &log_sums, g: &self.g };
        let mut out = vec![f32::NAN; self.rows.len()];
        engine.attend_adjoint(&adjoint, &mut out).unwrap();
        out
    }

    /// A head of a token in f64, rotated where it is to be.
    fn head(&self, rows: &[f64], token: usize, head: usize) -> Vec<f64> {
        let Heads { queries, keys, size } = self.heads;
        let own = &rows[token * self.width() + head * size..][..size];
        if !self.rotated || head >= queries + keys {
            return own.to_vec();
        }
        let turned = |at: usize| {
            let (sine, cosine) = angle(token, at, size);
            let (a, b) = (own[at % (size / 2)], own[at % (size / 2) + size / 2]);
            FACTOR * if at < size / 2 { a * cosine - b * sine } else { b * cosine + a * sine }
        };
        (0..size).map(turned).collect()
    }

    /// Every head of every token, `[tokens, heads]`.
    fn heads(&self, rows: &[f64]) -> Vec<Vec<Vec<f64>>> {
        let all = self.heads.queries + 2 * self.heads.keys;
        (0..self.lengths[0]).map(|token| (0..all).map(|head| self.head(rows, token, head)).collect()).collect()
    }

    fn seen(&self, token: usize) -> Range<usize> {
        self.window.map_or(0, |window| (token + 1).saturating_sub(window))..token + 1
    }

    /// What a query head of a token makes of its keys: the weights.
    fn weights(&self, rows: &[Vec<Vec<f64>>], token: usize, head: usize) -> Vec<f64> {
        let Heads { queries, keys, size } = self.heads;
        let key = queries + head / (queries / keys);
        let score = |seen: usize| dot(&rows[token][head], &rows[seen][key]) / (size as f64).sqrt();
        let scores: Vec<_> = self.seen(token).map(score).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<_> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    /// Σ g ∘ attention(rows) of a problem of one segment.
    fn loss(&self, rows: &[f64]) -> f64 {
        let Heads { queries, keys, size } = self.heads;
        let mut loss = 0.0;
        let rows = self.heads(rows);
        for (token, head) in (0..self.lengths[0]).flat_map(|token| (0..queries).map(move |head| (token, head))) {
            let g = widened(&self.g[(token * queries + head) * size..][..size]);
            let value = queries + keys + head / (queries / keys);
            for (weight, seen) in self.weights(&rows, token, head).iter().zip(self.seen(token)) {
                loss += weight * dot(&g, &rows[seen][value]);
            }
        }
        loss
    }

    /// How far rounding may take each gradient of a problem of one segment. A score errs by its products' rounding and its log-sum's;
    /// a weight by as much relatively; g · value and the mean of these as sums of products do, the latter also by what the
    /// row attended to is off. What a query, key or value gets is a sum of these errors and rounds itself.
    fn bounds(&self) -> Vec<f64> {
        let Heads { queries, keys, size } = self.heads;
        let mut bounds = vec![0.0; self.rows.len()];
        let rows = self.heads(&widened(&self.rows));
        let (tokens, root) = (self.lengths[0], (size as f64).sqrt());
        for (token, head) in (0..tokens).flat_map(|token| (0..queries).map(move |head| (token, head))) {
            let (key_head, value_head) = (queries + head / (queries / keys), queries + keys + head / (queries / keys));
            let query = &rows[token][head];
            let g = widened(&self.g[(token * queries + head) * size..][..size]);
            let weights = self.weights(&rows, token, head);
            let seen: Vec<_> = self.seen(token).collect();
            let of_score = |seen: &usize| rounding(size, absolute(query, &rows[*seen][key_head]) / root);
            let scores = seen.iter().map(|seen| absolute(query, &rows[*seen][key_head]) / root);
            let largest = scores.fold(0.0, f64::max) + (seen.len() as f64).ln();
            let of_weight =
                2.0 * seen.iter().map(of_score).fold(0.0, f64::max) + rounding(seen.len(), 1.0) + 4.0 * UNIT * largest;
            let products: Vec<_> = seen.iter().map(|seen| absolute(&g, &rows[*seen][value_head])).collect();
            let mean: f64 = weights.iter().zip(&products).map(|(weight, product)| weight * product).sum();
            for (at, seen) in seen.iter().enumerate() {
                let (weight, product) = (weights[at], products[at]);
                let of_gradient = weight
                    * (of_weight * (product + mean)
                        + rounding(size, product)
                        + rounding(size + tokens, mean)
                        + of_weight * mean);
                let gradient = weight * (product + mean);
                let key = &rows[*seen][key_head];
                for column in 0..size {
                    let of_sum = rounding(tokens * queries, 1.0);
                    let mut add = |token: usize, head: usize, factor: f64| {
                        bounds[token * self.width() + head * size + column] += factor;
                    };
                    add(token, head, (of_gradient + of_sum * gradient) * key[column].abs() / root);
                    add(*seen, key_head, (of_gradient + of_sum * gradient) * query[column].abs() / root);
                    add(*seen, value_head, (of_weight + of_sum) * weight * g[column].abs());
                }
            }
        }
        if self.rotated {
            // Turned back: an error of either number of a pair is one of both.
            let rotated = queries + keys;
            for (token, head) in (0..tokens).flat_map(|token| (0..rotated).map(move |head| (token, head))) {
                let own = &mut bounds[token * self.width() + head * size..][..size];
                for pair in 0..size / 2 {
                    let both = 2.0 * FACTOR * (own[pair] + own[pair + size / 2]);
                    (own[pair], own[pair + size / 2]) = (both, both);
                }
            }
        }
        bounds
    }
}

fn angle(token: usize, at: usize, size: usize) -> (f64, f64) {
    (token as f64 * BASE.powf(-2.0 * (at % (size / 2)) as f64 / size as f64)).sin_cos()
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| one * other).sum()
}

fn absolute(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(one, other)| (one * other).abs()).sum()
}

/// Everything, a token, parts of a block, whole blocks, more than there is.
fn windows() -> impl Strategy<Value = Option<usize>> {
    prop_oneof![Just(None), (1usize..100).prop_map(Some), Just(Some(64)), Just(Some(usize::MAX))]
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn attention_equals_differences(
        size in 1usize..50,
        keys in 1usize..4,
        group in 1usize..5,
        rotated in any::<bool>(),
        window in windows(),
        length in 1usize..75,
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = if rotated { 2 * size.div_ceil(2) } else { size };
        let heads = Heads { queries: keys * group, keys, size };
        let problem = Problem::new(heads, rotated, window, &[length], &mut random);
        let bounds = problem.bounds();
        let found: Vec<_> = HostEngine::all().iter().map(|engine| (engine.vectors(), problem.run(engine))).collect();
        let mut rows = widened(&problem.rows);
        let magnitude = absolute(&widened(&problem.g), &vec![1.0; problem.g.len()]);
        for _ in 0..6 {
            let at = random.usize(0..rows.len());
            let (right, of_difference) = difference(&mut rows, at, magnitude, |rows| problem.loss(rows));
            let allowed = of_difference + bounds[at];
            for (vectors, found) in &found {
                let found = f64::from(found[at]);
                prop_assert!((found - right).abs() <= allowed, "{vectors}: {at}: {found} not {right} ± {allowed}");
            }
        }
    }

    #[test]
    fn company_changes_no_bit(
        size in 1usize..100,
        keys in 1usize..4,
        group in 1usize..20,
        rotated in any::<bool>(),
        window in windows(),
        lengths in prop::collection::vec(0usize..150, 1..5),
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = if rotated { 2 * size.div_ceil(2) } else { size };
        let heads = Heads { queries: keys * group, keys, size };
        let problem = Problem::new(heads, rotated, window, &lengths, &mut random);
        let mut poisoned = problem.clone();
        let first = lengths[0];
        poisoned.rows[first * problem.width()..].fill(f32::NAN);
        poisoned.g[first * heads.queries * size..].fill(f32::NAN);
        for engine in HostEngine::all() {
            let (all, beside) = (problem.run(&engine), poisoned.run(&engine));
            for (segment, rows) in problem.segments().into_iter().enumerate() {
                let own = rows.start * problem.width()..rows.end * problem.width();
                prop_assert_eq!(bits(&problem.alone(segment).run(&engine)), bits(&all[own]), "{}", engine.vectors());
            }
            let (own, others) = beside.split_at(first * problem.width());
            prop_assert_eq!(bits(own), bits(&all[..own.len()]));
            prop_assert!(others.iter().all(|value| value.is_nan()), "NaN says that something is wrong");
        }
    }
}

#[test]
fn long_segments_on_all_threads() {
    let mut random = fastrand::Rng::with_seed(3);
    for (heads, lengths, window) in [
        (Heads { queries: 9, keys: 3, size: 64 }, [100, 1], None),
        (Heads { queries: 48, keys: 1, size: 40 }, [45, 13], None),
        (Heads { queries: 4, keys: 4, size: 128 }, [77, 40], Some(40)),
    ] {
        let problem = Problem::new(heads, true, window, &lengths, &mut random);
        let found = problem.run(&HostEngine::new());
        let alone = problem.alone(0);
        let (bounds, mut rows) = (alone.bounds(), widened(&alone.rows));
        let magnitude = absolute(&widened(&alone.g), &vec![1.0; alone.g.len()]);
        for _ in 0..2 {
            let at = random.usize(0..rows.len());
            let (right, of_difference) = difference(&mut rows, at, magnitude, |rows| alone.loss(rows));
            let allowed = of_difference + bounds[at];
            let found = f64::from(found[at]);
            assert!((found - right).abs() <= allowed, "{at}: {found} not {right} ± {allowed}");
        }
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let engine = HostEngine::new();
    let heads = Heads { queries: 2, keys: 1, size: 4 };
    let numbers = [1.0; 32];
    let matrix = |columns| Matrix::new(Values::F32(&numbers), 16, columns).unwrap();
    let (queries, keys, values) = (matrix(0..8), matrix(8..12), matrix(12..16));
    let attention = Attention { heads, queries, keys, values, rotary: None, window: None };
    let whole = std::slice::from_ref(&(0..2));
    let right = AttentionAdjoint {
        attention,
        segments: whole,
        attended: &numbers[..16],
        log_sums: &numbers[..4],
        g: &numbers[..16],
    };
    let refuse = |adjoint: AttentionAdjoint<'_>, out: usize| {
        let mut out = vec![7.0; out];
        let refused = engine.attend_adjoint(&adjoint, &mut out).unwrap_err();
        assert!(out.iter().all(|number| *number == 7.0), "nothing is written");
        refused
    };
    use OperationError::*;
    assert!(matches!(refuse(right, 31), WrongLength { expected: 32, found: 31, .. }));
    assert!(matches!(refuse(AttentionAdjoint { g: &numbers[..15], ..right }, 32), WrongLength { found: 15, .. }));
    assert!(matches!(refuse(AttentionAdjoint { attended: &numbers, ..right }, 32), WrongLength { found: 32, .. }));
    assert!(matches!(refuse(AttentionAdjoint { log_sums: &numbers, ..right }, 32), WrongLength { expected: 4, .. }));
    assert!(matches!(
        refuse(AttentionAdjoint { segments: std::slice::from_ref(&(0..1)), ..right }, 32),
        WrongSegment { expected: 1, found: 2 }
    ));
    assert!(matches!(
        refuse(AttentionAdjoint { segments: std::slice::from_ref(&(1..2)), ..right }, 32),
        WrongSegment { expected: 0, found: 1 }
    ));
    let empty = Attention { window: Some(0), ..attention };
    assert_eq!(refuse(AttentionAdjoint { attention: empty, ..right }, 32), EmptyWindow);
}
