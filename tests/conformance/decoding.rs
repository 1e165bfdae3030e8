//! What decoders do between projections: norms, products, chosen rows and attention equal f64, and a row's bits are its own sequence's
//! up to itself, however that came into the cache and whoever is beside it.
//!
//! The host's decoders have operations of their own, which `flora-host` tests.

use std::sync::Arc;

use flora::prelude::*;
use flora_plan::schedule::Kept;
use flora_runtime::Buffer;
use flora_runtime::decoding::{
    Attention, AttentionSegment, BLOCK_TOKENS, Columns, DecoderOperations, Heads, KeyValueCache, KeyValuePool, Norm,
};

use super::case::{Numbers, device};
use super::isolation::bits;

/// The operations of the device under test, where it has some, and the types that its buffers may have.
fn operations() -> Option<(DecoderOperations<'static>, Vec<Element>)> {
    let Some(operations) = device().decoder_operations() else {
        println!("NOT RUN: `{}` has decoders of its own", device().info().id);
        return None;
    };
    let has = |element: &Element| device().info().element_types.iter().any(|name| name == element.name());
    Some((operations, Element::ALL.into_iter().filter(has).collect()))
}

fn upload(values: &[f32], element: Element) -> Buffer {
    device().upload_as(values, element).expect("a type that it has")
}

/// What the device holds of these numbers.
fn rounded(values: &[f32], element: Element) -> Vec<f64> {
    let values = device().read(&upload(values, element)).expect("what was uploaded");
    values.into_iter().map(f64::from).collect()
}

/// Numbers are what they should be to `steps` roundings of the largest.
fn assert_near(what: &str, found: &[f32], expected: &[f64], steps: f64, element: Element) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-3, |largest: f64, value| largest.max(value.abs()));
    let tolerance = largest * (element.rounding() + 1e-6) * steps;
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let off = (f64::from(*found) - expected).abs();
        assert!(
            off <= tolerance,
            "{what}, {element}, number {at}: {found} for {expected}, off by more than {tolerance}"
        );
    }
}

#[test]
fn norms_and_products_equal_f64() {
    let Some((operations, elements)) = operations() else { return };
    let mut numbers = Numbers::new(5);
    for element in elements {
        for (rows, width) in [(1, 1), (3, 7), (2, 64), (33, 60), (2, 1030)] {
            let (x, gamma, beta) = (numbers.take(rows * width), numbers.take(width), numbers.take(width));
            let (held, buffer) = (rounded(&x, element), upload(&x, element));
            for beta in [None, Some(&beta)] {
                let norm = operations.norm(&gamma, beta.map(Vec::as_slice), 1e-3).expect("equal lengths");
                let y = operations.normalise(&norm, &buffer).expect("rows of its width");
                let expected: Vec<f64> = held
                    .chunks(width)
                    .flat_map(|row| {
                        let count = width as f64;
                        let mean = beta.map_or(0.0, |_| row.iter().sum::<f64>() / count);
                        let square = row.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
                        let one = |(at, value): (usize, &f64)| {
                            let offset = beta.map_or(0.0, |beta| f64::from(beta[at]));
                            // Gamma is f32, as is ε.
                            (value - mean) / (square + f64::from(1e-3f32)).sqrt() * f64::from(gamma[at]) + offset
                        };
                        row.iter().enumerate().map(one).collect::<Vec<_>>()
                    })
                    .collect();
                assert_near("a norm", &device().read(&y).expect("it ran"), &expected, 4.0, element);
            }

            let other = numbers.take(x.len());
            let product = operations.multiply(&buffer, &upload(&other, element)).expect("equal lengths");
            let expected: Vec<f64> =
                held.iter().zip(rounded(&other, element)).map(|(one, other)| one * other).collect();
            assert_near("a product", &device().read(&product).expect("it ran"), &expected, 1.0, element);

            let chosen: Vec<usize> = (0..5).map(|at| (at * 7) % rows).collect();
            let y = operations.select(&buffer, rows, &chosen).expect("its rows");
            let expected: Vec<f64> =
                chosen.iter().flat_map(|row| &held[row * width..(row + 1) * width]).copied().collect();
            assert_near("chosen rows", &device().read(&y).expect("it ran"), &expected, 0.0, element);
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some((operations, _)) = operations() else { return };
    let buffer = upload(&[0.0; 12], Element::F32);
    assert!(operations.norm(&[1.0; 3], Some(&[1.0; 2]), 0.0).is_err());
    let norm = operations.norm(&[1.0; 5], None, 0.0).expect("a norm");
    assert!(operations.normalise(&norm, &buffer).is_err(), "12 numbers aren't rows of 5");
    assert!(operations.multiply(&buffer, &upload(&[0.0; 11], Element::F32)).is_err());
    assert!(operations.select(&buffer, 4, &[4]).is_err());
    let nothing = upload(&[], Element::F32);
    assert!(operations.normalise(&norm, &nothing).expect("no rows").is_empty());
    assert!(operations.multiply(&nothing, &nothing).expect("no numbers").is_empty());

    let heads = Heads { queries: 3, keys: 2, size: 4 };
    let pool = Arc::new(KeyValuePool::new(device(), heads, Element::F32, 64).expect("a small pool"));
    let mut cache = KeyValueCache::new(&pool);
    let columns = Columns { matrix: &buffer, width: 12, first: 0 };
    let attention = Attention {
        heads,
        queries: columns,
        keys: columns,
        values: columns,
        rotary: None,
        window: None,
        kept: &Kept::default(),
    };
    let segments = &mut [AttentionSegment { rows: 0..1, cache: &mut cache }];
    assert!(operations.attend(&attention, segments).is_err(), "three heads over two");
    let heads = Heads { queries: 2, keys: 2, size: 4 };
    assert!(operations.attend(&Attention { heads, ..attention }, segments).is_err(), "a cache for other heads");
    assert!(operations.attend(&Attention { heads, window: Some(0), ..attention }, segments).is_err());
    assert_eq!(cache.tokens(), 0);
    let other = Arc::new(KeyValuePool::new(device(), heads, Element::F32, 64).expect("a small pool"));
    let own = Arc::new(KeyValuePool::new(device(), heads, Element::F32, 64).expect("a small pool"));
    let row = upload(&[1.0; 8], Element::F32);
    let columns = Columns { matrix: &row, width: 8, first: 0 };
    let attention = Attention { heads, queries: columns, keys: columns, values: columns, ..attention };
    let mut cache = KeyValueCache::new(&other);
    operations.attend(&attention, &mut [AttentionSegment { rows: 0..1, cache: &mut cache }]).expect("one token");
    let mut foreign = KeyValueCache::beginning(&own, &cache.blocks(0..1), 1);
    let segments = &mut [AttentionSegment { rows: 0..1, cache: &mut foreign }];
    assert!(operations.attend(&attention, segments).is_err(), "blocks of another pool");
    let halves = Norm { gamma: upload(&[1.0; 4], Element::F32), beta: Some(buffer.clone()), epsilon: 0.0 };
    assert!(operations.normalise(&halves, &buffer).is_err(), "a beta of another length");
    assert!(KeyValuePool::new(device(), heads, Element::F32, usize::MAX).is_err(), "more than any device has");
}

/// A model's attention, and numbers for it.
struct Layer {
    heads: Heads,
    window: Option<usize>,
    rotates: bool,
    element: Element,
    /// Whether queries, keys and values are columns of one matrix.
    joined: bool,
}

/// Queries, keys and values of a sequence, a row a token.
struct Sequence {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    tokens: usize,
}

impl Layer {
    fn sequence(&self, numbers: &mut Numbers, tokens: usize) -> Sequence {
        let Heads { queries, keys, size } = self.heads;
        // Scores large enough for weights to be far apart.
        let scaled = |values: Vec<f32>| values.into_iter().map(|value| 3.0 * value).collect();
        Sequence {
            queries: scaled(numbers.take(tokens * queries * size)),
            keys: scaled(numbers.take(tokens * keys * size)),
            values: numbers.take(tokens * keys * size),
            tokens,
        }
    }

    /// Cosines and sines of a position.
    fn angles(&self, position: usize) -> (Vec<f32>, Vec<f32>) {
        (0..self.heads.size / 2)
            .map(|pair| (position as f32 / (1 + 3 * pair) as f32).sin_cos())
            .map(|(s, c)| (c, s))
            .unzip()
    }

    /// What each token attends to, in f64 `[tokens, query heads · size]`.
    fn expected(&self, sequence: &Sequence) -> Vec<f64> {
        let Heads { queries: query_heads, keys: key_heads, size } = self.heads;
        let held = |values: &[f32]| rounded(values, self.element);
        let turned = |values: &[f32], heads: usize| {
            let mut values = held(values);
            if self.rotates {
                for (position, row) in values.chunks_mut(heads * size).enumerate() {
                    let (cosines, sines) = self.angles(position);
                    for head in row.chunks_mut(size) {
                        let (first, second) = head.split_at_mut(size / 2);
                        for (((a, b), cosine), sine) in first.iter_mut().zip(second).zip(&cosines).zip(&sines) {
                            let (cosine, sine) = (f64::from(*cosine), f64::from(*sine));
                            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
                        }
                    }
                }
            }
            values
        };
        let (queries, values) = (turned(&sequence.queries, query_heads), held(&sequence.values));
        let keys: Vec<f32> = turned(&sequence.keys, key_heads).into_iter().map(|value| value as f32).collect();
        let keys = held(&keys);
        let mut result = Vec::new();
        for token in 0..sequence.tokens {
            let first = self.window.map_or(0, |window| (token + 1).saturating_sub(window));
            for head in 0..query_heads {
                let query = &queries[(token * query_heads + head) * size..][..size];
                let key_head = head / (query_heads / key_heads);
                let of = |values: &'_ [f64], key: usize| values[(key * key_heads + key_head) * size..][..size].to_vec();
                let scores: Vec<f64> = (first..=token)
                    .map(|key| {
                        let products = query.iter().zip(of(&keys, key)).map(|(query, key)| query * key);
                        products.sum::<f64>() / (size as f64).sqrt()
                    })
                    .collect();
                let largest = scores.iter().fold(f64::MIN, |largest, score| largest.max(*score));
                let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut attended = vec![0.0; size];
                for (key, weight) in (first..=token).zip(&weights) {
                    for (attended, value) in attended.iter_mut().zip(of(&values, key)) {
                        *attended += weight / sum * value;
                    }
                }
                result.extend(attended);
            }
        }
        result
    }

    fn pool(&self) -> Arc<KeyValuePool> {
        Arc::new(KeyValuePool::new(device(), self.heads, self.element, 64).expect("a small pool"))
    }

    /// One step: some tokens of each sequence behind those of its cache; what they attend to, by sequence.
    fn step(
        &self,
        operations: DecoderOperations<'_>,
        segments: &mut [(&Sequence, usize, &mut KeyValueCache)],
    ) -> Vec<Vec<f32>> {
        let Heads { queries: query_heads, keys: key_heads, size } = self.heads;
        let (query_width, key_width) = (query_heads * size, key_heads * size);
        let mut matrices = [Vec::new(), Vec::new(), Vec::new()];
        let (mut cosines, mut sines, mut joined) = (Vec::new(), Vec::new(), Vec::new());
        let (mut own, mut rows) = (Vec::new(), 0);
        for (sequence, tokens, cache) in segments.iter_mut() {
            let positions = cache.tokens()..cache.tokens() + *tokens;
            for position in positions {
                let row = |values: &[f32], width: usize| values[position * width..][..width].to_vec();
                let of_row = [
                    row(&sequence.queries, query_width),
                    row(&sequence.keys, key_width),
                    row(&sequence.values, key_width),
                ];
                joined.extend(of_row.iter().flatten().copied());
                matrices.iter_mut().zip(of_row).for_each(|(matrix, row)| matrix.extend(row));
                let angles = self.angles(position);
                cosines.extend(angles.0);
                sines.extend(angles.1);
            }
            own.push(AttentionSegment { rows: rows..rows + *tokens, cache });
            rows += *tokens;
        }
        let rotary = operations.rotary(&cosines, &sines, size / 2).expect("equal lengths");
        let buffers: Vec<_> = if self.joined { vec![joined] } else { matrices.to_vec() }
            .iter()
            .map(|m| upload(m, self.element))
            .collect();
        let columns = |at: usize| match self.joined {
            true => Columns {
                matrix: &buffers[0],
                width: query_width + 2 * key_width,
                first: [0, query_width, query_width + key_width][at],
            },
            false => Columns { matrix: &buffers[at], width: [query_width, key_width, key_width][at], first: 0 },
        };
        let attention = Attention {
            heads: self.heads,
            queries: columns(0),
            keys: columns(1),
            values: columns(2),
            rotary: self.rotates.then_some(&rotary),
            window: self.window,
            kept: &Kept::default(),
        };
        let y = operations.attend(&attention, &mut own).expect("a step that fits");
        let y = device().read(&y).expect("it ran");
        own.iter().map(|segment| y[segment.rows.start * query_width..segment.rows.end * query_width].to_vec()).collect()
    }

    /// All tokens of a sequence by itself, in steps of these many.
    fn alone(&self, operations: DecoderOperations<'_>, sequence: &Sequence, steps: &[usize]) -> Vec<f32> {
        let pool = self.pool();
        let mut cache = KeyValueCache::new(&pool);
        let mut result = Vec::new();
        for tokens in steps {
            result.extend(self.step(operations, &mut [(sequence, *tokens, &mut cache)]).concat());
        }
        assert_eq!(cache.tokens(), sequence.tokens);
        result
    }
}

/// Grouped, shared, single and odd heads; windows that begin within a block; more keys than a split.
fn layers(elements: &[Element]) -> Vec<(Layer, usize)> {
    let heads = |queries, keys, size| Heads { queries, keys, size };
    let mut layers = Vec::new();
    for element in elements.iter().copied() {
        layers.extend([
            (Layer { heads: heads(4, 2, 16), window: None, rotates: true, element, joined: false }, 300),
            (Layer { heads: heads(9, 1, 8), window: None, rotates: false, element, joined: true }, 70),
            (Layer { heads: heads(3, 3, 6), window: Some(37), rotates: true, element, joined: true }, 331),
        ]);
    }
    layers.push((
        Layer { heads: heads(2, 1, 136), window: None, rotates: true, element: Element::F32, joined: false },
        40,
    ));
    layers
}

#[test]
fn attention_equals_f64() {
    let Some((operations, elements)) = operations() else { return };
    let mut numbers = Numbers::new(17);
    for (layer, tokens) in layers(&elements) {
        let sequence = layer.sequence(&mut numbers, tokens);
        let found = layer.alone(operations, &sequence, &[tokens]);
        assert_near("attention", &found, &layer.expected(&sequence), 8.0, layer.element);
    }
}

/// All of its kernels and a merge of splits with few units, to be watched by a sanitizer.
#[test]
fn a_batch_of_attention_equals_f64() {
    let Some((operations, _)) = operations() else { return };
    let heads = Heads { queries: 1, keys: 1, size: 8 };
    let layer = Layer { heads, window: None, rotates: true, element: Element::F32, joined: true };
    let sequence = layer.sequence(&mut Numbers::new(37), 266);
    let pool = layer.pool();
    let mut cache = KeyValueCache::new(&pool);
    let mut found = layer.step(operations, &mut [(&sequence, 260, &mut cache)]).concat();
    let mut other = KeyValueCache::beginning(&pool, &cache.blocks(0..260), 259);
    found.extend(layer.step(operations, &mut [(&sequence, 6, &mut cache), (&sequence, 3, &mut other)]).swap_remove(0));
    assert_near("attention", &found, &layer.expected(&sequence), 8.0, layer.element);
}

#[test]
fn the_cut_of_a_sequence_changes_no_bit_of_attention() {
    let Some((operations, elements)) = operations() else { return };
    let mut numbers = Numbers::new(23);
    for (layer, tokens) in layers(&elements) {
        let sequence = layer.sequence(&mut numbers, tokens);
        let whole = bits(&layer.alone(operations, &sequence, &[tokens]));
        for chunk in [1, 7, 32, 33] {
            let mut steps = vec![chunk; tokens / chunk];
            steps.extend((!tokens.is_multiple_of(chunk)).then_some(tokens % chunk));
            // Token by token is slow on a device that is played: the last ones are enough there.
            if chunk == 1 {
                steps = std::iter::once(tokens - 12).chain([1; 12]).collect();
            }
            assert!(bits(&layer.alone(operations, &sequence, &steps)) == whole, "{}, chunks of {chunk}", layer.element);
        }
    }
}

#[test]
fn sequences_beside_one_another_change_no_bit_of_attention() {
    let Some((operations, elements)) = operations() else { return };
    let mut numbers = Numbers::new(29);
    for (layer, _) in layers(&elements) {
        let lengths = [(290, 3), (1, 1), (31, 40), (64, 1)];
        let sequences: Vec<_> = lengths.map(|(before, now)| layer.sequence(&mut numbers, before + now)).into();
        let right: Vec<_> = sequences
            .iter()
            .zip(lengths)
            .map(|(sequence, (before, now))| layer.alone(operations, sequence, &[before, now]))
            .collect();
        let pool = layer.pool();
        let mut caches: Vec<_> = lengths.iter().map(|_| KeyValueCache::new(&pool)).collect();
        for part in 0..2 {
            let mut segments: Vec<_> = sequences
                .iter()
                .zip(&mut caches)
                .zip(lengths)
                .map(|((sequence, cache), (before, now))| (sequence, [before, now][part], cache))
                .collect();
            let width = layer.heads.queries * layer.heads.size;
            for ((found, right), (before, _)) in layer.step(operations, &mut segments).iter().zip(&right).zip(lengths) {
                let first = [0, before][part] * width;
                assert!(bits(found) == bits(&right[first..first + found.len()]), "{}", layer.element);
            }
        }
    }
}

/// What a row doesn't see may be anything: neither what follows it nor what its window hides.
#[test]
fn values_that_are_not_seen_change_no_bit() {
    let Some((operations, elements)) = operations() else { return };
    let mut numbers = Numbers::new(43);
    for (layer, tokens) in layers(&elements) {
        let (tokens, row) = (tokens.min(70), layer.heads.queries * layer.heads.size);
        let mut sequence = layer.sequence(&mut numbers, tokens);
        let right = bits(&layer.alone(operations, &sequence, &[tokens]));
        let width = layer.heads.keys * layer.heads.size;
        let poisoned = 20;
        sequence.values[poisoned * width..(poisoned + 1) * width].fill(f32::INFINITY);
        let found = bits(&layer.alone(operations, &sequence, &[tokens]));
        let after = layer.window.map_or(tokens, |window| (poisoned + window).min(tokens));
        assert!(found[..poisoned * row] == right[..poisoned * row], "{}, before", layer.element);
        assert!(found[after * row..] == right[after * row..], "{}, behind the window", layer.element);
        assert!(found[poisoned * row..after * row] != right[poisoned * row..after * row]);
    }
}

#[test]
fn sequences_share_blocks_until_they_part() {
    let Some((operations, elements)) = operations() else { return };
    let mut numbers = Numbers::new(31);
    let (layer, _) = layers(&elements).swap_remove(0);
    let (common, own) = (2 * BLOCK_TOKENS + 9, 20);
    let mut one = layer.sequence(&mut numbers, common + own);
    let right = bits(&layer.alone(operations, &one, &[common, own]));
    let pool = layer.pool();
    let mut first = KeyValueCache::new(&pool);
    layer.step(operations, &mut [(&one, common, &mut first)]);
    let blocks = first.blocks(0..common);
    assert_eq!(blocks.len(), 3);
    // Another one that goes on by itself from within the last block, and writes other keys behind its tokens.
    let other = layer.sequence(&mut numbers, common + own);
    let mut parted = Sequence {
        tokens: common + own,
        queries: one.queries.clone(),
        keys: one.keys.clone(),
        values: one.values.clone(),
    };
    let width = layer.heads.keys * layer.heads.size;
    parted.keys[(common - 3) * width..].copy_from_slice(&other.keys[(common - 3) * width..]);
    parted.values[(common - 3) * width..].copy_from_slice(&other.values[(common - 3) * width..]);
    let right_of_parted = bits(&layer.alone(operations, &parted, &[common - 3, own + 3]));
    let mut second = KeyValueCache::beginning(&pool, &blocks, common - 3);
    drop(blocks);
    let found = layer.step(operations, &mut [(&parted, own + 3, &mut second), (&one, own, &mut first)]);
    let row = layer.heads.queries * layer.heads.size;
    assert!(bits(&found[0]) == right_of_parted[(common - 3) * row..]);
    assert!(bits(&found[1]) == right[common * row..]);

    // What is given back is taken again, and what stays is as it was, though the pool grows.
    drop(second);
    let mut many: Vec<_> = (0..40).map(|_| KeyValueCache::new(&pool)).collect();
    let mut segments: Vec<_> = many.iter_mut().map(|cache| (&other, 33, cache)).collect();
    layer.step(operations, &mut segments);
    one.tokens += 1;
    for values in [&mut one.queries, &mut one.keys, &mut one.values] {
        let count = values.len() / (common + own);
        values.extend(numbers.take(count));
    }
    let found = layer.step(operations, &mut [(&one, 1, &mut first)]);
    let right = bits(&layer.alone(operations, &one, &[common + own + 1]));
    assert!(bits(&found[0]) == right[(common + own) * row..]);
}
