//! Batches, blocks, stops and failures, with requests that need no adapter.

use flora_engine::{FinishReason, Options, OptionsError, Request, RequestError, Sampling, StopAt, Usage};

use crate::support::decoder::{CONTEXT, NextStep, POISON};
use crate::support::disk::Disk;
use crate::support::drive::{Drive, End};
use crate::support::{TOKENS, options, request};

fn drive(options: Options) -> Drive {
    Drive::new(options, Disk::default())
}

fn finished(reason: FinishReason, prompt_tokens: u32, completion_tokens: u32) -> End {
    End::Finished(reason, Usage { prompt_tokens, completion_tokens })
}

#[test]
fn a_request_that_cannot_be_run_is_refused() {
    let mut drive = drive(Options { cache_tokens: 32, block_tokens: 5, ..options() });
    let good = request(&[1, 2], None, 3);
    let stop = |stop: StopAt| Request { stop, ..good.clone() };
    let random =
        |temperature, top_p| Request { sampling: Sampling::Random { temperature, top_p, seed: 0 }, ..good.clone() };
    let strings = |strings: Vec<String>| stop(StopAt { strings, ..good.stop.clone() });
    let refused = [
        (request(&[], None, 3), "the prompt is empty"),
        (request(&[1, TOKENS], None, 3), "token 12 at position 1"),
        (request(&[1], None, 0), "max_tokens is 0"),
        (request(&[1; CONTEXT as usize], None, 1), "context of 64 has no room"),
        (request(&[1; 20], None, 11), "come to 31 tokens, and the cache holds 30"),
        (request(&[1], Some(&"a".repeat(256)), 1), "name is longer"),
        (random(0.0, 1.0), "a temperature of 0"),
        (random(f32::NAN, 1.0), "a temperature of NaN"),
        (random(f32::INFINITY, 1.0), "a temperature of inf"),
        (random(1.0, 0.0), "a top_p of 0"),
        (random(1.0, 1.01), "a top_p of 1.01"),
        (random(1.0, f32::NAN), "a top_p of NaN"),
        (strings(vec![String::new()]), "a stop string is empty"),
        (strings(vec!["x".into(); 17]), "17 stop strings"),
        (strings(vec!["x".repeat(257)]), "has 257 bytes"),
        (stop(StopAt { tokens: vec![0; 65], ..good.stop.clone() }), "65 stop tokens"),
    ];
    for (request, reason) in refused {
        let now = drive.now;
        match drive.core.submit(request, now) {
            Err(RequestError::Invalid(said)) => assert!(said.contains(reason), "{said}"),
            other => panic!("{reason}: {other:?}"),
        }
    }
    let full = drive.submit(request(&[1; 20], None, 10));
    drive.finish();
    assert_eq!(*drive.end(full), finished(FinishReason::Length, 20, 10));
}

#[test]
fn options_that_cannot_be_run_with_are_refused() {
    let refused = |options: Options| options_error(options);
    assert_eq!(refused(Options { sequences: 0, ..options() }), OptionsError::Zero("sequences"));
    let too_small = Options { tokens_per_step: 6, chunk_tokens: 4, sequences: 4, ..options() };
    let expected = OptionsError::StepTooSmall { tokens_per_step: 6, chunk_tokens: 4, sequences: 4, least: 7 };
    assert_eq!(refused(too_small), expected);
    let expected = OptionsError::CacheTooSmall { cache_tokens: 3, block_tokens: 4 };
    assert_eq!(refused(Options { cache_tokens: 3, ..options() }), expected);
}

fn options_error(options: Options) -> OptionsError {
    let decoder = crate::support::decoder::FakeDecoder::new(&options);
    flora_engine::Core::new(decoder, Default::default(), options).expect_err("options that can't be run with")
}

#[test]
fn more_than_the_queue_holds_is_refused() {
    let mut drive = drive(Options { waiting: 2, ..options() });
    let now = drive.now;
    drive.submit(request(&[1], None, 1));
    drive.submit(request(&[1], None, 1));
    let third = drive.core.submit(request(&[1], None, 1), now);
    assert_eq!(third, Err(RequestError::QueueFull { waiting: 2 }));
    drive.step();
    drive.submit(request(&[1], None, 1));
}

/// Those that generate say a word each step while a long prompt is run beside them.
#[test]
fn a_long_prompt_stalls_none() {
    let mut drive = drive(Options { tokens_per_step: 7, ..options() });
    let talker = drive.submit(request(&[1], None, 20));
    drive.step();
    let long = drive.submit(request(&[2; 16], None, 1));
    for step in 0..4 {
        assert_eq!(drive.heard[&talker].tokens.len(), 1 + step);
        drive.step();
        assert_eq!(drive.decoder.state().last_step, [talker.sequence(), long.sequence()]);
    }
    assert_eq!(*drive.end(long), finished(FinishReason::Length, 16, 1));
}

#[test]
fn a_finished_sequence_makes_room_at_the_next_step() {
    let mut drive = drive(Options { sequences: 2, ..options() });
    let [short, long, next, last] = [1, 5, 5, 1].map(|most| drive.submit(request(&[1], None, most)));
    drive.step();
    assert_eq!(drive.decoder.state().last_step, [short, long].map(|id| id.sequence()));
    drive.step();
    assert_eq!(drive.decoder.state().last_step, [long, next].map(|id| id.sequence()));
    assert_eq!(drive.heard[&last].tokens, []);
    drive.finish();
    drive.check_nothing_is_held();
}

/// Two that fit at first, and not to their ends: the younger makes room, and says nothing twice.
#[test]
fn the_youngest_makes_room() {
    let mut drive = drive(Options { cache_tokens: 28, ..options() });
    let [old, young] = [1, 2].map(|token| drive.submit(request(&[token; 5], None, 15)));
    while drive.core.metrics().preemptions == 0 {
        drive.step();
    }
    assert_eq!(drive.core.metrics().running, 1);
    assert!(drive.decoder.state().sequences.contains_key(&old.sequence()));
    let heard = drive.heard[&young].tokens.len();
    assert!(heard > 0);
    drive.finish();
    for id in [old, young] {
        assert_eq!(*drive.end(id), finished(FinishReason::Length, 5, 15));
        assert_eq!(drive.heard[&id].tokens.len(), 15);
    }
    let metrics = drive.core.metrics();
    assert_eq!((metrics.preemptions, metrics.prompt_tokens, metrics.generated_tokens), (1, 10, 30));
    assert_eq!(metrics.recomputed_tokens, 5 + heard as u64 - 1, "all that was run of it");
    drive.check_nothing_is_held();
}

/// Small requests that keep coming don't keep out a large one.
#[test]
fn small_requests_do_not_starve_a_large_one() {
    let mut drive = drive(Options { cache_tokens: 32, ..options() });
    // They end one after the other, so that there is always room for one of them, and never for the large one.
    for tokens in 2..6 {
        drive.submit(request(&[1, 2], None, tokens));
    }
    drive.step();
    let large = drive.submit(request(&[3; 20], None, 12));
    for _ in 0..50 {
        drive.submit(request(&[1, 2], None, 6));
        drive.step();
    }
    assert_eq!(*drive.end(large), finished(FinishReason::Length, 20, 12));
}

#[test]
fn a_context_that_is_full_ends_a_request() {
    let mut drive = drive(options());
    let id = drive.submit(request(&[1; 60], None, 100));
    drive.finish();
    assert_eq!(*drive.end(id), finished(FinishReason::Length, 60, 4));
}

/// `abé`, where the last character is two tokens, then half a character.
const SCRIPT: [u32; 5] = [0, 1, 8, 9, 8];

/// What is heard of the script, with a stop at that.
fn scripted(stop: StopAt) -> (String, Vec<u32>, End) {
    let mut drive = drive(options());
    drive.decoder.state().script = SCRIPT.to_vec();
    let id = drive.submit(Request { stop, ..request(&[1], None, 1) });
    drive.finish();
    drive.check_nothing_is_held();
    let heard = drive.heard.remove(&id).expect("the request");
    (heard.text, heard.tokens, heard.end.expect("an end"))
}

#[test]
fn what_ends_a_text() {
    let stop = |max_tokens, strings: &[&str], tokens: &[u32]| StopAt {
        max_tokens,
        strings: strings.iter().map(|string| (*string).to_string()).collect(),
        tokens: tokens.to_vec(),
    };
    let heard = |text: &str, tokens: &[u32], reason| {
        (text.to_string(), tokens.to_vec(), finished(reason, 1, tokens.len() as u32))
    };
    let (length, stopped) = (FinishReason::Length, FinishReason::Stop);
    assert_eq!(scripted(stop(2, &[], &[])), heard("ab", &SCRIPT[..2], length));
    assert_eq!(scripted(stop(5, &[], &[])), heard("abé\u{fffd}", &SCRIPT, length), "half a character at the end");
    assert_eq!(scripted(stop(3, &[], &[])), heard("ab\u{fffd}", &SCRIPT[..3], length));
    assert_eq!(scripted(stop(5, &[], &[1])), heard("a", &SCRIPT[..1], stopped), "a stop token is not passed on");
    assert_eq!(scripted(stop(5, &[], &[0])), heard("", &[], stopped));
    assert_eq!(scripted(stop(5, &["bé"], &[])), heard("a", &SCRIPT[..4], stopped), "a stop string spans tokens");
    assert_eq!(
        scripted(stop(2, &["abc"], &[])),
        heard("ab", &SCRIPT[..2], length),
        "held back, and passed on at the end"
    );
    assert_eq!(scripted(stop(5, &["abc"], &[1])), heard("a", &SCRIPT[..1], stopped), "held back at a stop token");
    assert_eq!(scripted(stop(3, &["\u{fffd}"], &[])), heard("ab", &SCRIPT[..3], stopped));
}

/// A stop string that was begun is not passed on until it is known to be none.
#[test]
fn text_that_may_become_a_stop_string_is_held_back() {
    let mut drive = drive(options());
    drive.decoder.state().script = vec![0, 1, 0, 2, 3];
    let stop = StopAt { max_tokens: 5, strings: vec!["abd".into()], tokens: Vec::new() };
    let id = drive.submit(Request { stop, ..request(&[1], None, 1) });
    let texts = ["", "", "ab", "abac", "abacd"];
    for (step, text) in texts.into_iter().enumerate() {
        drive.step();
        assert_eq!(drive.heard[&id].text, text);
        assert_eq!(drive.heard[&id].tokens.len(), step + 1, "tokens are said as they come");
    }
}

#[test]
fn logits_that_are_not_numbers_fail_their_request_alone() {
    let mut drive = drive(options());
    let [poisoned, healthy] = [&POISON[..], &[1]].map(|prompt| drive.submit(request(prompt, None, 4)));
    drive.finish();
    let expected = RequestError::Model("the logit of token 0 is not a number".into());
    assert_eq!(*drive.end(poisoned), End::Failed(expected));
    assert_eq!(*drive.end(healthy), finished(FinishReason::Length, 1, 4));
    drive.check_nothing_is_held();
}

#[test]
fn a_step_that_fails_fails_its_requests() {
    let mut drive = drive(Options { sequences: 2, ..options() });
    let [first, second, waits] = [1, 2, 3].map(|token| drive.submit(request(&[token], None, 4)));
    drive.step();
    drive.decoder.state().next_step = NextStep::Fails;
    drive.step();
    let expected = End::Failed(RequestError::Model("the device is lost".into()));
    assert_eq!((drive.end(first), drive.end(second)), (&expected, &expected));
    drive.finish();
    assert_eq!(*drive.end(waits), finished(FinishReason::Length, 1, 4));
    assert_eq!((drive.core.metrics().failed, drive.core.metrics().finished), (2, 1));
    drive.check_nothing_is_held();
}

#[test]
fn a_cancelled_request_makes_room_at_once() {
    let mut drive = drive(Options { sequences: 1, ..options() });
    let [running, waiting, next] = [1, 2, 3].map(|token| drive.submit(request(&[token], None, 9)));
    drive.step();
    drive.core.cancel(running);
    drive.core.cancel(waiting);
    drive.core.cancel(waiting);
    drive.step();
    assert_eq!(drive.decoder.state().last_step, [next.sequence()]);
    assert_eq!(drive.core.metrics().cancelled, 2);
    drive.finish();
    drive.check_nothing_is_held();
}

#[test]
fn a_seed_gives_the_same_text_in_any_company() {
    let random = |seed| Request {
        sampling: Sampling::Random { temperature: 1.5, top_p: 0.95, seed },
        ..request(&[1, 2, 3], None, 20)
    };
    let mut drive = drive(options());
    let [first, other, same] = [7, 8, 7].map(|seed| drive.submit(random(seed)));
    drive.finish();
    assert_eq!(drive.heard[&first], drive.heard[&same]);
    assert_ne!(drive.heard[&first].tokens, drive.heard[&other].tokens);
}
