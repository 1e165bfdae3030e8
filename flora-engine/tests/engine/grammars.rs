//! Requests whose text has to have a form: it has, beside others that need have none, and those say what they say alone.

use flora_engine::{
    FinishReason, LogProbabilities, LogitRules, Options, Request, RequestError, Sampling, StopAt, Usage,
};

use crate::support::disk::Disk;
use crate::support::drive::{Drive, End, Heard, alone};
use crate::support::grammar::Letters;
use crate::support::{TOKENS, options, request};

/// A token that ends a text.
const STOP: u32 = 7;

fn with(letters: Letters, prompt: &[u32], max_tokens: u32, seed: u64) -> Request {
    let stop = StopAt { max_tokens, strings: Vec::new(), tokens: vec![STOP] };
    let sampling = Sampling::Random { temperature: 2.0, top_p: 1.0, seed };
    Request { grammar: Some(letters.grammar()), stop, sampling, ..request(prompt, None, max_tokens) }
}

fn reason(heard: &Heard) -> FinishReason {
    match heard.end {
        Some(End::Finished(reason, _)) => reason,
        ref end => panic!("{end:?}"),
    }
}

#[test]
fn a_text_is_whole_or_was_cut() {
    let mut reasons = [0, 0];
    for letters in [Letters::Nested, Letters::Pairs] {
        for seed in 0..60 {
            let heard = alone(with(letters, &[seed as u32 % TOKENS], 5, seed), 4, Disk::default());
            match reason(&heard) {
                FinishReason::Stop => assert!(letters.is(&heard.text), "{letters:?} {}", heard.text),
                FinishReason::Length => assert!(letters.begins_with(&heard.text), "{letters:?} {}", heard.text),
            }
            reasons[usize::from(reason(&heard) == FinishReason::Stop)] += 1;
        }
    }
    assert!(reasons.iter().all(|count| *count > 10), "{reasons:?}");
}

#[test]
fn a_text_that_is_over_ends_without_a_further_step() {
    let heard = alone(with(Letters::Nested, &[1], 2, 3), 4, Disk::default());
    let usage = Usage { prompt_tokens: 1, completion_tokens: 2 };
    // Cut and over at once is over.
    assert_eq!((&heard.text[..], heard.end), ("ab", Some(End::Finished(FinishReason::Stop, usage))));
}

#[test]
fn neighbours_say_what_they_say_alone() {
    let requests: Vec<Request> = (0..24)
        .map(|index| {
            let prompt: Vec<u32> = (0..=index % 7).map(|token| (index * 5 + token) % TOKENS).collect();
            match index % 3 {
                0 => with(Letters::Nested, &prompt, 12, index.into()),
                1 => with(Letters::Pairs, &prompt, 12, index.into()),
                _ => request(&prompt, None, 12),
            }
        })
        .collect();
    // Few blocks: some are pre-empted, and go on where they were in their grammar.
    for cache_tokens in [256, 28] {
        let mut drive = Drive::new(Options { cache_tokens, ..options() }, Disk::default());
        let together: Vec<_> = requests.iter().map(|request| drive.submit(request.clone())).collect();
        drive.finish();
        drive.check_nothing_is_held();
        assert_eq!(drive.core.metrics().preemptions > 0, cache_tokens == 28);
        for (id, request) in together.iter().zip(&requests) {
            assert_eq!(drive.heard[id], alone(request.clone(), 4, Disk::default()));
        }
    }
}

#[test]
fn stop_strings_and_rules_hold_within_a_grammar() {
    let pairs = with(Letters::Pairs, &[1], 30, 5);
    let stop = StopAt { strings: vec!["cdc".to_owned()], ..pairs.stop.clone() };
    let rules = LogitRules { min_tokens: 6, bias: vec![(6, -100.0), (STOP, 60.0)], ..LogitRules::default() };
    let heard = alone(Request { rules: rules.clone(), ..pairs.clone() }, 4, Disk::default());
    assert_eq!((&heard.text[..], reason(&heard)), ("cdcdcd", FinishReason::Stop));
    let rules = LogitRules { min_tokens: 0, bias: vec![(6, -100.0), (STOP, -100.0)], ..rules };
    let heard = alone(Request { rules, stop, ..pairs }, 4, Disk::default());
    assert_eq!((&heard.text[..], reason(&heard)), ("", FinishReason::Stop));
    // What is over is over, whatever is the least.
    let rules = LogitRules { min_tokens: 30, ..LogitRules::default() };
    let heard = alone(Request { rules, ..with(Letters::Nested, &[1], 40, 5) }, 4, Disk::default());
    assert!(Letters::Nested.is(&heard.text) && reason(&heard) == FinishReason::Stop);
}

#[test]
fn log_probabilities_are_those_among_what_may_come() {
    let log_probabilities = LogProbabilities { generated: Some(TOKENS), prompt: None };
    let heard = alone(Request { log_probabilities, ..with(Letters::Pairs, &[1], 4, 5) }, 4, Disk::default());
    for (position, scored) in heard.scored.iter().enumerate() {
        let may_come: Vec<u32> = if position % 2 == 0 { vec![2, STOP] } else { vec![3, 6] };
        let sum: f64 = scored.likeliest.iter().map(|(_, log)| f64::from(*log).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{scored:?}");
        for (token, log_probability) in &scored.likeliest {
            assert_eq!(may_come.contains(token), log_probability.is_finite(), "{scored:?}");
        }
    }
}

#[test]
fn what_cannot_go_on_fails_by_itself() {
    let mut drive = Drive::new(options(), Disk::default());
    let stuck = drive.submit(with(Letters::Stuck, &[1], 9, 1));
    let fails = drive.submit(with(Letters::Fails, &[1], 9, 1));
    let free = drive.submit(request(&[1], None, 9));
    drive.finish();
    drive.check_nothing_is_held();
    for (id, text, told) in [(stuck, "e", "no token of the model"), (fails, "f", "too complex")] {
        assert_eq!(drive.heard[&id].text, text);
        let End::Failed(RequestError::Invalid(reason)) = drive.end(id) else { panic!("{:?}", drive.end(id)) };
        assert!(reason.contains(told), "{reason}");
    }
    assert_eq!(drive.heard[&free], alone(request(&[1], None, 9), 4, Disk::default()));
}
