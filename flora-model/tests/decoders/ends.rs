//! Adapters of a decoder's ends and biases against PEFT: LoRA, DoRA and HiRA on the embedding and the output matrix, copies of them,
//! a vocabulary that grew, single tokens, biases; of a model whose ends are tied and of one whose aren't.

use flora_engine::{Decoder, LogitRows, SequenceId, StepSegment};

use crate::golden::check;
use crate::served::load;

const OF_BOTH: [&str; 9] = [
    "head",
    "embedding",
    "embedding_dora",
    "embedding_hira",
    "saved",
    "saved_embedding",
    "saved_head",
    "tokens",
    "resized",
];

#[test]
fn the_ends_of_a_tied_model_equal_peft() {
    let mut model = load("llama_ends/tied");
    check(&mut model, "base");
    OF_BOTH.iter().chain(&["kept_tied", "saved_tied"]).for_each(|name| check(&mut model, name));
}

#[test]
fn the_ends_of_an_untied_model_equal_peft() {
    let mut model = load("llama_ends/untied");
    check(&mut model, "base");
    let own = ["tokens_of_both", "lora_bias", "bias_lora_only", "ia3_bias"];
    OF_BOTH.iter().chain(&own).for_each(|name| check(&mut model, name));
}

/// Whatever else is in the batch: rows of the base, of other output matrices, of other vocabularies.
#[test]
fn ends_of_others_change_no_bit() {
    let mut model = load("llama_ends/untied");
    let names = ["head", "resized", "tokens", "embedding", "lora_bias", "saved"];
    let adapters: Vec<_> = [None].into_iter().chain(names.map(|name| Some(model.adapter(name)))).collect();
    let tokens = [1, 7, 3, 40, 9];
    let segment = |sequence: usize| StepSegment {
        sequence: SequenceId(sequence as u64),
        adapter: adapters[sequence % adapters.len()],
        first_position: 0,
        tokens: &tokens,
        prompt_tokens: 5,
        logits: if sequence % 3 == 2 { LogitRows::None } else { LogitRows::Last },
    };
    let alone: Vec<Vec<f32>> = (0..14)
        .map(|sequence| {
            let logits = model.step(&[segment(sequence)]);
            model.decoder.release(SequenceId(sequence as u64));
            logits
        })
        .collect();
    let segments: Vec<_> = (0..14).map(segment).collect();
    assert_eq!(model.step(&segments), alone.concat());
    let widths: Vec<usize> = alone.iter().map(Vec::len).collect();
    assert!(widths.contains(&48) && widths.contains(&45), "{widths:?}");
}
