//! Log-probabilities: of each token once and by the right logits, in whatever pieces they are computed.

use flora_engine::{Event, FinishReason, LogProbabilities, Options, Request, RequestError, ScoredToken, StopAt, Usage};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use crate::support::decoder::{CONTEXT, FakeDecoder, FakeRow};
use crate::support::disk::Disk;
use crate::support::drive::{Drive, End, alone};
use crate::support::{TOKENS, options, request};

fn scored(prompt: &[u32], max_tokens: u32, generated: Option<u32>, of_prompt: Option<u32>) -> Request {
    let log_probabilities = LogProbabilities { generated, prompt: of_prompt };
    Request { log_probabilities, ..request(prompt, None, max_tokens) }
}

/// What the fake model's logits after `tokens` say of `next`, by another route: exponentials in f64, without a shift.
fn expected(decoder: &FakeDecoder, prompt: usize, tokens: &[u32], next: u32, alternatives: usize) -> ScoredToken {
    let rows: Vec<FakeRow> = tokens.iter().map(|token| (*token, None)).collect();
    let logits = decoder.state().logits_of(Some(prompt), &rows);
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let log_probability = |token: u32| (f64::from(logits[token as usize]).exp() / sum).ln() as f32;
    let mut order: Vec<u32> = (0..TOKENS).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let likeliest = order[..alternatives].iter().map(|token| (*token, log_probability(*token))).collect();
    ScoredToken { token: next, log_probability: log_probability(next), likeliest }
}

fn assert_near(found: &[ScoredToken], expected: &[ScoredToken]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.token, expected.token);
        assert!((found.log_probability - expected.log_probability).abs() < 1e-5, "{found:?} {expected:?}");
        let tokens = |scored: &ScoredToken| scored.likeliest.iter().map(|(token, _)| *token).collect::<Vec<_>>();
        assert_eq!(tokens(found), tokens(expected));
        for (found, expected) in found.likeliest.iter().zip(&expected.likeliest) {
            assert!((found.1 - expected.1).abs() < 1e-5, "{found:?} {expected:?}");
        }
    }
}

#[test]
fn each_token_is_scored_by_the_logits_before_it() {
    let prompt: Vec<u32> = (0..11).map(|token| token * 5 % TOKENS).collect();
    let mut drive = Drive::new(options(), Disk::default());
    let id = drive.submit(scored(&prompt, 6, Some(2), Some(3)));
    drive.finish();
    drive.check_nothing_is_held();
    let heard = &drive.heard[&id];
    let whole = [&prompt[..], &heard.tokens].concat();
    let all = |from: usize, to: usize, alternatives| -> Vec<ScoredToken> {
        let of = |at: usize| expected(&drive.decoder, prompt.len(), &whole[..at], whole[at], alternatives);
        (from..to).map(of).collect()
    };
    assert_near(&heard.prompt, &all(1, prompt.len(), 3));
    assert_near(&heard.scored, &all(prompt.len(), whole.len(), 2));
}

#[test]
fn a_prompt_may_be_all_that_is_asked_of() {
    for prompt in [1, 4, 5, CONTEXT as usize] {
        let mut drive = Drive::new(options(), Disk::default());
        let id = drive.submit(scored(&vec![3; prompt], 0, None, Some(0)));
        drive.finish();
        let usage = Usage { prompt_tokens: prompt as u32, completion_tokens: 0 };
        assert_eq!(*drive.end(id), End::Finished(FinishReason::Length, usage));
        assert_eq!(drive.heard[&id].prompt.len(), prompt - 1);
        assert!(drive.heard[&id].tokens.is_empty());
        drive.check_nothing_is_held();
    }
    let mut drive = Drive::new(options(), Disk::default());
    let now = drive.now;
    for (request, reason) in [
        (scored(&[1], 0, Some(1), None), "max_tokens is 0"),
        (scored(&[1; CONTEXT as usize + 1], 0, None, Some(0)), "no room for them"),
    ] {
        match drive.core.submit(request, now) {
            Err(RequestError::Invalid(said)) => assert!(said.contains(reason), "{said}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Whoever counts tokens from the end finds one for each step.
#[test]
fn a_stop_token_is_scored_and_not_passed_on() {
    let mut drive = Drive::new(options(), Disk::default());
    drive.decoder.state().script = vec![0, 1, 2];
    let asked = scored(&[3], 3, Some(0), None);
    let stop = StopAt { tokens: vec![1], ..asked.stop.clone() };
    let id = drive.submit(Request { stop, ..asked });
    drive.finish();
    let heard = &drive.heard[&id];
    assert_eq!((&heard.tokens[..], &heard.text[..]), (&[0][..], "a"));
    assert_eq!(heard.scored.iter().map(|scored| scored.token).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn nothing_is_scored_unless_it_is_asked_for() {
    let mut drive = Drive::new(options(), Disk::default());
    drive.submit(request(&[1, 2, 3], None, 3));
    drive.finish();
    assert!(drive.heard.values().all(|heard| heard.prompt.is_empty() && heard.scored.is_empty()));
    assert!(!Event::Prompt(Vec::new()).is_last());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        rng_seed: RngSeed::Fixed(0x5C04E),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// With too small a cache for all, sequences are pre-empted and computed again, and are told everything once.
    #[test]
    fn scores_are_told_once_whatever_is_computed_again(
        prompts in prop::collection::vec((prop::collection::vec(0..TOKENS - 1, 1..20), 0u32..20), 2..8),
        chunk_tokens in 1usize..6,
        cache_tokens in 48usize..80,
    ) {
        let options = Options { cache_tokens, chunk_tokens, tokens_per_step: chunk_tokens + 9, ..options() };
        let mut drive = Drive::new(options, Disk::default());
        let requests: Vec<Request> = prompts.iter().map(|(prompt, most)| scored(prompt, *most, Some(1), Some(1))).collect();
        let ids: Vec<_> = requests.iter().map(|request| drive.submit(request.clone())).collect();
        drive.finish();
        for (id, request) in ids.into_iter().zip(requests) {
            prop_assert_eq!(&drive.heard[&id], &alone(request, chunk_tokens, Disk::default()));
        }
    }
}
