//! A sequence's logits are the same to the bit, whatever the others in its steps are and however its generated tokens come.

use flora_engine::{AdapterId, Decoder, LogitRows, SequenceId, StepSegment};

use crate::served::{Served, load};
use crate::{families, is_host, rounded};

/// Steps of one sequence alone: its prompt in chunks of `chunk`, then its tokens one by one; the logits of every step.
fn alone(
    model: &mut Served,
    adapter: Option<AdapterId>,
    prompt: &[u32],
    generated: &[u32],
    chunk: usize,
) -> Vec<Vec<f32>> {
    let sequence = SequenceId(900);
    let steps = pieces(prompt, generated, chunk);
    let logits = steps.iter().map(|piece| model.step(&[piece.segment(sequence, adapter)])).collect();
    model.decoder.release(sequence);
    logits
}

struct Piece<'a> {
    first: usize,
    tokens: &'a [u32],
    prompt_tokens: usize,
}

impl Piece<'_> {
    fn segment(&self, sequence: SequenceId, adapter: Option<AdapterId>) -> StepSegment<'_> {
        let (first_position, prompt_tokens) = (self.first as u32, self.prompt_tokens as u32);
        StepSegment { sequence, adapter, first_position, tokens: self.tokens, prompt_tokens, logits: LogitRows::Last }
    }
}

fn pieces<'a>(prompt: &'a [u32], generated: &'a [u32], chunk: usize) -> Vec<Piece<'a>> {
    let chunks = prompt.chunks(chunk).enumerate();
    let mut pieces: Vec<_> =
        chunks.map(|(at, tokens)| Piece { first: at * chunk, tokens, prompt_tokens: tokens.len() }).collect();
    let singles = generated.chunks(1).enumerate();
    pieces.extend(singles.map(|(at, tokens)| Piece { first: prompt.len() + at, tokens, prompt_tokens: 0 }));
    pieces
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|logit| logit.to_bits()).collect()
}

fn tokens(random: &mut fastrand::Rng, count: usize, vocabulary: usize) -> Vec<u32> {
    (0..count).map(|_| random.u32(0..vocabulary as u32)).collect()
}

pub(crate) fn crowd_changes_no_bit(model: &mut Served) {
    const CHUNK: usize = 16;
    let adapters = [None, Some(model.adapter("lora"))];
    let mut random = fastrand::Rng::with_seed(11);
    for round in 0..12 {
        let of = |random: &mut fastrand::Rng| {
            let (prompt, generated) = (random.usize(1..50), random.usize(1..8));
            let vocabulary = model.vocabulary();
            (tokens(random, prompt, vocabulary), tokens(random, generated, vocabulary), adapters[random.usize(0..2)])
        };
        let sequences: Vec<_> = (0..random.usize(2..9)).map(|_| of(&mut random)).collect();
        let right: Vec<_> = sequences
            .iter()
            .map(|(prompt, generated, adapter)| alone(model, *adapter, prompt, generated, CHUNK))
            .collect();
        // All at once, each beginning at a step of its own and skipping some.
        let steps: Vec<_> = sequences.iter().map(|(prompt, generated, _)| pieces(prompt, generated, CHUNK)).collect();
        let mut at = vec![0; sequences.len()];
        while at.iter().zip(&steps).any(|(at, steps)| *at < steps.len()) {
            let ready: Vec<_> =
                (0..sequences.len()).filter(|own| at[*own] < steps[*own].len() && random.u8(0..3) > 0).collect();
            if ready.is_empty() {
                continue;
            }
            let segment = |own: &usize| steps[*own][at[*own]].segment(SequenceId(*own as u64), sequences[*own].2);
            let segments: Vec<_> = ready.iter().map(segment).collect();
            let logits = model.step(&segments);
            for (own, logits) in ready.iter().zip(logits.chunks_exact(model.vocabulary())) {
                assert_eq!(
                    bits(logits),
                    bits(&right[*own][at[*own]]),
                    "round {round}, sequence {own}, step {}",
                    at[*own]
                );
                at[*own] += 1;
            }
        }
        (0..sequences.len()).for_each(|own| model.decoder.release(SequenceId(own as u64)));

        // A pre-empted sequence: its prompt in the same chunks, then all generated tokens in one segment.
        let (prompt, generated, adapter) = &sequences[0];
        let sequence = SequenceId(77);
        for piece in pieces(prompt, &[], CHUNK) {
            model.step(&[piece.segment(sequence, *adapter)]);
        }
        let replayed = Piece { first: prompt.len(), tokens: generated, prompt_tokens: 0 };
        let logits = model.step(&[replayed.segment(sequence, *adapter)]);
        assert_eq!(bits(&logits), bits(&right[0][right[0].len() - 1]), "round {round}, replayed");
        model.decoder.release(sequence);
    }
}

#[test]
fn the_rest_of_the_batch_changes_no_bit_of_a_llama() {
    crowd_changes_no_bit(&mut load("llama_tiny"));
}

#[test]
fn the_rest_of_the_batch_changes_no_bit_of_a_gpt_big_code() {
    crowd_changes_no_bit(&mut load("gpt_bigcode"));
}

/// A window shorter than the sequences, and norms of heads.
#[test]
fn the_rest_of_the_batch_changes_no_bit_of_other_families() {
    ["mistral", "qwen3"].iter().for_each(|case| crowd_changes_no_bit(&mut families::load(case)));
}

/// Activations in 8 bits by int8 weights, prompts in several tiles and rows alone.
#[test]
fn the_rest_of_the_batch_changes_no_bit_where_activations_are_rounded() {
    if !is_host() {
        println!("NOT RUN: the host alone rounds activations");
        return;
    }
    ["llama_tiny", "gpt_bigcode"].iter().for_each(|name| crowd_changes_no_bit(&mut rounded::load(name)));
}

/// A row meets keys in the same blocks and order however many rows a step has.
#[test]
fn the_chunks_of_a_prompt_change_no_bit() {
    let mut random = fastrand::Rng::with_seed(23);
    for (name, mut model) in [
        ("llama_tiny", load("llama_tiny")),
        ("gpt_bigcode", load("gpt_bigcode")),
        ("mistral", families::load("mistral")),
    ] {
        for adapter in [None, Some(model.adapter("lora"))] {
            let vocabulary = model.vocabulary();
            let (prompt, generated) = (tokens(&mut random, 75, vocabulary), tokens(&mut random, 3, vocabulary));
            let last = |model: &mut Served, chunk| {
                let logits = alone(model, adapter, &prompt, &generated, chunk);
                logits[logits.len() - generated.len() - 1..].iter().map(|logits| bits(logits)).collect::<Vec<_>>()
            };
            let whole = last(&mut model, prompt.len());
            for chunk in [1, 2, 7, 31, 32, 33, 74] {
                assert_eq!(last(&mut model, chunk), whole, "{name}, chunks of {chunk}");
            }
        }
    }
}
