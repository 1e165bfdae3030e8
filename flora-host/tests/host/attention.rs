//! Attention against the sum that defines it, in f64, and the promise that a row's bits are its own sequence's.

use std::ops::Range;

use flora_host::decoder::{
    Attention, AttentionSegment, Heads, KeyValueCache, Matrix, OperationError, RotaryFrequencies,
};
use flora_host::{HostEngine, OwnedValues};
use flora_plan::layer::Element;
use proptest::prelude::*;

use crate::problem::{Numbers, config, elements, random_values};

const BASE: f64 = 10_000.0;

/// What turned queries and keys are multiplied by.
const FACTOR: f64 = 1.25;

fn frequencies(size: usize) -> RotaryFrequencies {
    let one = |pair: usize| BASE.powf(-2.0 * pair as f64 / size as f64);
    RotaryFrequencies::new((0..size / 2).map(one).collect(), FACTOR)
}

/// Queries, keys and values of a few sequences, each row of a sequence `[queries, keys, values]`.
#[derive(Clone, Debug)]
struct Sequences {
    heads: Heads,
    element: Element,
    rotated: bool,
    window: Option<usize>,
    /// `[tokens, width]` each.
    rows: Vec<Vec<f32>>,
}

/// What one step runs: sequences, each at most once, with how many of their next tokens.
type Step = Vec<(usize, usize)>;

impl Sequences {
    fn new(heads: Heads, element: Element, rotated: bool, lengths: &[usize], random: &mut fastrand::Rng) -> Self {
        let mut own = Self { heads, element, rotated, window: None, rows: Vec::new() };
        let numbers = |random: &mut fastrand::Rng, tokens: usize| {
            Numbers::new(element, &random_values(tokens * own.width(), random)).widened()
        };
        own.rows = lengths.iter().map(|tokens| numbers(random, *tokens)).collect();
        own
    }

    fn with_window(self, window: Option<usize>) -> Self {
        Self { window, ..self }
    }

    /// Numbers of queries, keys and values of a token.
    fn width(&self) -> usize {
        (self.heads.queries + 2 * self.heads.keys) * self.heads.size
    }

    fn tokens(&self, sequence: usize) -> usize {
        self.rows[sequence].len() / self.width()
    }

    /// What every row of every sequence attends to: `[tokens, query heads · size]`.
    fn run(&self, engine: &HostEngine, steps: &[Step]) -> Vec<Vec<f32>> {
        let Heads { queries, keys, size } = self.heads;
        let frequencies = self.rotated.then(|| frequencies(size));
        let mut caches: Vec<_> = self.rows.iter().map(|_| KeyValueCache::new(self.heads, self.element)).collect();
        let mut outputs = vec![Vec::new(); self.rows.len()];
        for step in steps {
            let (mut rows, mut ranges, mut positions) = (Vec::new(), vec![None; caches.len()], Vec::new());
            for (sequence, tokens) in step {
                let first = caches[*sequence].tokens();
                let before = rows.len() / self.width();
                rows.extend_from_slice(&self.rows[*sequence][first * self.width()..(first + tokens) * self.width()]);
                ranges[*sequence] = Some(before..before + tokens);
                positions.extend(first..first + tokens);
            }
            let count = rows.len() / self.width();
            let joined = OwnedValues::rounded(&rows, self.element);
            let columns = |range: Range<usize>| {
                Matrix::new(joined.values(), self.width(), range.start * size..range.end * size).unwrap()
            };
            let rotary = frequencies.as_ref().map(|frequencies| frequencies.rows(&positions));
            let attention = Attention {
                heads: self.heads,
                queries: columns(0..queries),
                keys: columns(queries..queries + keys),
                values: columns(queries + keys..queries + 2 * keys),
                rotary: rotary.as_ref(),
                window: self.window,
            };
            let segments = caches.iter_mut().zip(&ranges);
            let segments = segments.filter_map(|(cache, rows)| Some(AttentionSegment { rows: rows.clone()?, cache }));
            let mut segments: Vec<_> = segments.collect();
            segments.sort_by_key(|segment| (segment.rows.start, segment.rows.end));
            let mut out = OwnedValues::rounded(&vec![f32::NAN; count * queries * size], self.element);
            engine.attend(&attention, &mut segments, out.values_mut()).unwrap();
            let out = widened(&out);
            for (sequence, _) in step {
                let rows = ranges[*sequence].clone().unwrap_or_default();
                outputs[*sequence].extend_from_slice(&out[rows.start * queries * size..rows.end * queries * size]);
            }
        }
        outputs
    }

    /// Sequence by sequence, each in one step.
    fn whole(&self) -> Vec<Step> {
        (0..self.rows.len()).map(|sequence| vec![(sequence, self.tokens(sequence))]).collect()
    }

    /// All sequences in random pieces, in random company.
    fn pieces(&self, most: usize, random: &mut fastrand::Rng) -> Vec<Step> {
        let mut left: Vec<_> = (0..self.rows.len()).map(|sequence| self.tokens(sequence)).collect();
        let mut steps = Vec::new();
        while left.iter().any(|left| *left > 0) {
            let mut step: Step = Vec::new();
            for (sequence, left) in left.iter_mut().enumerate() {
                if random.u8(0..3) == 0 {
                    continue;
                }
                let tokens = if random.bool() { random.usize(0..=1) } else { random.usize(0..=most) }.min(*left);
                *left -= tokens;
                step.push((sequence, tokens));
            }
            random.shuffle(&mut step);
            steps.push(step);
        }
        steps
    }

    /// A head of a token in f64, rotated if that is asked for.
    fn head(&self, sequence: usize, token: usize, first: usize, rotated: bool) -> Vec<f64> {
        let size = self.heads.size;
        let at = token * self.width() + first * size;
        let own: Vec<_> = self.rows[sequence][at..at + size].iter().map(|value| f64::from(*value)).collect();
        if !rotated {
            return own;
        }
        let turned = |at: usize| {
            let pair = at % (size / 2);
            let (sine, cosine) = (token as f64 * BASE.powf(-2.0 * pair as f64 / size as f64)).sin_cos();
            let (a, b) = (own[pair], own[pair + size / 2]);
            FACTOR * if at < size / 2 { a * cosine - b * sine } else { b * cosine + a * sine }
        };
        (0..size).map(turned).collect()
    }

    /// Asserts that outputs are what defines them but for rounding. A score errs by four standard deviations of its products'
    /// roundings, and of the rotated keys' where they are kept in a half type; a weight by as much relatively, and by twice that
    /// where the sum of the weights does too; the sum over values by its own roundings. In bf16 queries and weights are rounded, too.
    fn assert_right(&self, outputs: &[Vec<f32>], what: &str) {
        let Heads { queries, keys, size } = self.heads;
        let unit = f64::from(f32::EPSILON) / 2.0;
        let half = if self.element == Element::F32 { 0.0 } else { self.element.rounding() };
        let paired = if self.element == Element::Bf16 { half } else { 0.0 };
        let kept = (if self.rotated { half } else { 0.0f64 }).hypot(paired);
        let root = (size as f64).sqrt();
        for (sequence, outputs) in outputs.iter().enumerate() {
            for (token, head) in
                (0..self.tokens(sequence)).flat_map(|token| (0..queries).map(move |head| (token, head)))
            {
                let query = self.head(sequence, token, head, self.rotated);
                let own = head / (queries / keys);
                let (mut scores, mut error) = (Vec::new(), 0.0f64);
                let first = self.window.map_or(0, |window| (token + 1).saturating_sub(window));
                for seen in first..=token {
                    let key = self.head(sequence, seen, queries + own, self.rotated);
                    let products: Vec<_> = query.iter().zip(&key).map(|(query, key)| query * key).collect();
                    let magnitude: f64 = products.iter().map(|product| product.abs()).sum();
                    let norm = products.iter().map(|product| product * product).sum::<f64>().sqrt();
                    let rounding = unit * (size as f64 + 8.0).sqrt() * magnitude + 3f64.sqrt() * kept * norm;
                    error = error.max(4.0 * rounding / root);
                    scores.push(products.iter().sum::<f64>() / root);
                }
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<_> = scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for column in 0..size {
                    let values =
                        (first..=token).map(|seen| self.head(sequence, seen, queries + keys + own, false)[column]);
                    let terms: Vec<_> =
                        weights.iter().zip(values).map(|(weight, value)| weight / sum * value).collect();
                    let (right, magnitude) =
                        (terms.iter().sum::<f64>(), terms.iter().map(|term| term.abs()).sum::<f64>());
                    let rounding = 2.0 * error + paired + 4.0 * unit * (token as f64 + 8.0).sqrt();
                    let allowed =
                        rounding * magnitude + 1.001 * half * right.abs() + if half > 0.0 { 3e-8 } else { 0.0 };
                    let found = f64::from(outputs[(token * queries + head) * size + column]);
                    assert!(
                        (found - right).abs() <= allowed,
                        "{what}: sequence {sequence}, token {token}, head {head}, column {column}: {found} not {right} ± {allowed}"
                    );
                }
            }
        }
    }
}

fn widened(values: &OwnedValues) -> Vec<f32> {
    match values {
        OwnedValues::F32(values) => values.clone(),
        OwnedValues::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
        OwnedValues::Bf16(values) => values.iter().map(|value| value.to_f32()).collect(),
    }
}

fn bits(outputs: &[Vec<f32>]) -> Vec<Vec<u32>> {
    outputs.iter().map(|own| own.iter().map(|value| value.to_bits()).collect()).collect()
}

/// Everything, a token, parts of a block, whole blocks, more than there is.
fn windows() -> impl Strategy<Value = Option<usize>> {
    prop_oneof![Just(None), (1usize..100).prop_map(Some), Just(Some(64)), Just(Some(usize::MAX))]
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn attention_is_the_sum_that_defines_it(
        size in 1usize..100,
        keys in 1usize..4,
        group in 1usize..6,
        element in elements(),
        rotated in any::<bool>(),
        window in windows(),
        lengths in prop::collection::vec(0usize..80, 0..4),
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = if rotated { 2 * size.div_ceil(2) } else { size };
        let heads = Heads { queries: keys * group, keys, size };
        let sequences = Sequences::new(heads, element, rotated, &lengths, &mut random).with_window(window);
        let steps = sequences.pieces(40, &mut random);
        for engine in HostEngine::all() {
            let outputs = sequences.run(&engine, &steps);
            sequences.assert_right(&outputs, engine.vectors());
        }
    }

    #[test]
    fn company_and_chunks_change_no_bit(
        size in 1usize..100,
        keys in 1usize..4,
        group in 1usize..20,
        element in elements(),
        rotated in any::<bool>(),
        window in windows(),
        lengths in prop::collection::vec(0usize..150, 1..5),
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = if rotated { 2 * size.div_ceil(2) } else { size };
        let heads = Heads { queries: keys * group, keys, size };
        let sequences = Sequences::new(heads, element, rotated, &lengths, &mut random).with_window(window);
        for engine in HostEngine::all() {
            let right = bits(&sequences.run(&engine, &sequences.whole()));
            for most in [1, 7, 64, 150] {
                let steps = sequences.pieces(most, &mut random);
                prop_assert_eq!(&bits(&sequences.run(&engine, &steps)), &right, "{}, {:?}", engine.vectors(), steps);
            }
        }
    }

    #[test]
    fn nan_stays_in_its_sequence_and_behind_its_token(
        size in 1usize..70,
        keys in 1usize..3,
        group in 1usize..6,
        element in elements(),
        lengths in prop::collection::vec(1usize..90, 2..4),
        seed in any::<u64>(),
    ) {
        let mut random = fastrand::Rng::with_seed(seed);
        let heads = Heads { queries: keys * group, keys, size };
        let sequences = Sequences::new(heads, element, false, &lengths, &mut random);
        let mut damaged = sequences.clone();
        // From some token of the first sequence on.
        let token = random.usize(0..lengths[0]);
        let width = sequences.width();
        damaged.rows[0][token * width..].fill(f32::NAN);
        let steps = sequences.pieces(50, &mut random);
        for engine in HostEngine::all() {
            let (right, found) = (sequences.run(&engine, &steps), damaged.run(&engine, &steps));
            let (before, after) = found[0].split_at(token * heads.queries * size);
            prop_assert_eq!(&bits(&found[1..]), &bits(&right[1..]));
            prop_assert_eq!(bits(&[before.to_vec()]), bits(&[right[0][..before.len()].to_vec()]));
            prop_assert!(after.iter().all(|value| value.is_nan()), "NaN says that something is wrong");
        }
    }
}

#[test]
fn long_prompts_on_all_threads() {
    let mut random = fastrand::Rng::with_seed(3);
    for (heads, lengths) in [
        (Heads { queries: 9, keys: 3, size: 64 }, [300, 1]),
        (Heads { queries: 48, keys: 1, size: 40 }, [97, 130]),
        (Heads { queries: 4, keys: 4, size: 128 }, [257, 40]),
    ] {
        for window in [None, Some(70)] {
            let sequences = Sequences::new(heads, Element::F32, true, &lengths, &mut random).with_window(window);
            let steps = sequences.pieces(300, &mut random);
            let outputs = sequences.run(&HostEngine::new(), &steps);
            sequences.assert_right(&outputs, "long");
            assert_eq!(bits(&outputs), bits(&sequences.run(&HostEngine::new(), &sequences.whole())));
        }
    }
}

#[test]
fn scores_far_apart_give_no_wrong_number() {
    let heads = Heads { queries: 1, keys: 1, size: 1 };
    let mut random = fastrand::Rng::with_seed(1);
    let mut sequences = Sequences::new(heads, Element::F32, false, &[70], &mut random);
    // Scores rise by 1000 from token to token: each attends to itself alone.
    for (token, row) in sequences.rows[0].chunks_exact_mut(3).enumerate() {
        row.copy_from_slice(&[1000.0, token as f32, token as f32]);
    }
    for engine in HostEngine::all() {
        let outputs = sequences.run(&engine, &sequences.whole());
        assert_eq!(outputs[0], (0..70).map(|token| token as f32).collect::<Vec<_>>(), "{}", engine.vectors());
    }
    // And fall: all attend to the first.
    for (token, row) in sequences.rows[0].chunks_exact_mut(3).enumerate() {
        row.copy_from_slice(&[1000.0, -(token as f32), 1.0 + token as f32]);
    }
    for engine in HostEngine::all() {
        assert_eq!(sequences.run(&engine, &sequences.whole())[0], [1.0; 70], "{}", engine.vectors());
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let engine = HostEngine::new();
    let heads = Heads { queries: 2, keys: 1, size: 4 };
    let numbers = OwnedValues::zeros(32, Element::F32);
    let matrix = |columns| Matrix::new(numbers.values(), 16, columns).unwrap();
    let (queries, keys, values) = (matrix(0..8), matrix(8..12), matrix(12..16));
    let attention = Attention { heads, queries, keys, values, rotary: None, window: None };
    let one = frequencies(4).rows(&[0]);
    let odd = frequencies(6).rows(&[0, 1]);
    let refuse = |attention: Attention<'_>, cache: &mut KeyValueCache, rows: Range<usize>, out: usize| {
        let mut segments = [AttentionSegment { rows, cache }];
        let mut out = OwnedValues::zeros(out, Element::F32);
        let refused = engine.attend(&attention, &mut segments, out.values_mut()).unwrap_err();
        assert_eq!(segments[0].cache.tokens(), 0, "nothing is appended");
        refused
    };
    let cache = || KeyValueCache::new(heads, Element::F32);
    let wide = Heads { queries: 2, keys: 2, size: 4 };
    let three = Heads { queries: 3, keys: 2, size: 4 };
    use OperationError::*;
    assert!(matches!(refuse(attention, &mut cache(), 0..2, 15), WrongLength { expected: 16, found: 15, .. }));
    assert!(matches!(refuse(attention, &mut cache(), 0..1, 16), WrongSegment { expected: 1, found: 2 }));
    assert!(matches!(refuse(attention, &mut cache(), 1..2, 16), WrongSegment { expected: 0, found: 1 }));
    assert!(matches!(refuse(Attention { heads: wide, ..attention }, &mut cache(), 0..2, 16), WrongLength { .. }));
    assert!(matches!(refuse(Attention { heads: three, ..attention }, &mut cache(), 0..2, 16), WrongHeads { .. }));
    assert!(matches!(refuse(attention, &mut KeyValueCache::new(wide, Element::F32), 0..2, 16), WrongHeads { .. }));
    let half = &mut KeyValueCache::new(heads, Element::F16);
    assert!(matches!(refuse(attention, half, 0..2, 16), WrongElement { .. }));
    let rotated = |rotary| Attention { rotary: Some(rotary), ..attention };
    assert!(matches!(refuse(rotated(&one), &mut cache(), 0..2, 16), WrongLength { expected: 2, found: 1, .. }));
    assert_eq!(refuse(Attention { window: Some(0), ..attention }, &mut cache(), 0..2, 16), EmptyWindow);
    assert!(matches!(refuse(rotated(&odd), &mut cache(), 0..2, 16), WrongRotation { size: 4, expected: 6 }));
    assert!(matches!(Matrix::new(numbers.values(), 15, 0..4), Err(PartialRow { .. })));
    assert!(matches!(Matrix::new(numbers.values(), 0, 0..0), Err(PartialRow { .. })));
    assert!(matches!(Matrix::new(numbers.values(), 16, 8..17), Err(NoColumn { .. })));
}
