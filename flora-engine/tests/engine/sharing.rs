//! Keys and values that sequences have in common: what they save, and that they change nothing.

use flora_engine::{
    AdapterChoice, FinishReason, LogProbabilities, Options, Request, RequestError, RequestId, Span, Spans,
};

use crate::support::decoder::{GATED, INVOKED};
use crate::support::disk::{Disk, Files, INVOCATION};
use crate::support::drive::{Drive, End, alone};
use crate::support::{options, request};

fn sharing() -> Options {
    Options { share_prefixes: true, ..options() }
}

/// Runs a request to its end, and says how many tokens were run for it.
fn run(drive: &mut Drive, request: Request) -> (RequestId, usize) {
    let before = drive.decoder.state().computed;
    let id = drive.submit(request);
    drive.finish();
    (id, drive.decoder.state().computed - before)
}

#[test]
fn a_second_turn_runs_its_new_tokens_alone() {
    let mut drive = Drive::new(sharing(), Disk::default());
    let first = [1, 2, 3, 4, 5, 6, 7];
    let (id, run_first) = run(&mut drive, request(&first, None, 6));
    assert_eq!(run_first, 7 + 6 - 1, "the last token isn't run");
    let turn = [9, 8, 9, 8, 9];
    let second = [&first[..], &drive.heard[&id].tokens, &turn].concat();
    let (id, run_second) = run(&mut drive, request(&second, None, 3));
    assert_eq!(run_second, 1 + turn.len() + 2, "what was said last, the new turn, and what is said now but the last");
    assert_eq!(drive.heard[&id].tokens, alone(request(&second, None, 3), 4, Disk::default()).tokens);
    let metrics = drive.core.metrics();
    assert_eq!((metrics.shared_tokens, metrics.prompt_tokens), (12, 7 + 18));
    // The same again: its last token has to be run, to know what comes then.
    let (_, again) = run(&mut drive, request(&second, None, 1));
    assert_eq!(again, 1);
    drive.check_nothing_is_held();
}

#[test]
fn those_that_run_together_share_what_is_run_by_now() {
    let mut drive = Drive::new(sharing(), Disk::default());
    let prompt: Vec<u32> = (0..16).map(|token| token % 11).collect();
    let first = drive.submit(request(&prompt, None, 20));
    for _ in 0..4 {
        drive.step();
    }
    let second = drive.submit(request(&prompt, None, 20));
    drive.step();
    let metrics = drive.core.metrics();
    assert_eq!((metrics.running, metrics.shared_tokens), (2, 15), "all tokens but the last");
    assert_eq!(metrics.cache_blocks_used, 4 + 2, "the prompt's blocks are both sequences', the last one each's own");
    drive.finish();
    assert_eq!(drive.heard[&first].tokens, drive.heard[&second].tokens);
    drive.check_nothing_is_held();
}

#[test]
fn an_adapter_shares_with_itself_alone() {
    let disk = Disk::with(&["ann", "bob"]);
    let mut drive = Drive::new(sharing(), disk.clone());
    let prompt = [5; 10];
    let of = |name| request(&prompt, name, 1);
    for name in [None, Some("ann"), Some("bob")] {
        assert_eq!(run(&mut drive, of(name)).1, 10, "{name:?}");
        assert_eq!(run(&mut drive, of(name)).1, 1, "{name:?}");
    }
    // One that takes another's place is another, and the same that comes back is the same.
    let before = disk.all()["ann"].clone();
    disk.write("ann", 1, Files::Good);
    assert_eq!(run(&mut drive, of(Some("ann"))).1, 10);
    assert_eq!(run(&mut drive, of(Some("ann"))).1, 1);
    disk.all().insert("ann".into(), before);
    assert_eq!(run(&mut drive, of(Some("ann"))).1, 1);
    drive.check_nothing_is_held();
}

/// The rows before an invocation are the base's, and found as such; those from it on are the adapter's.
#[test]
fn an_activated_adapter_begins_as_the_base_does() {
    let disk = Disk::with(&[INVOKED, "ann"]);
    let mut drive = Drive::new(sharing(), disk.clone());
    let before = [5, 4, 3, 2, 1, 5, 4, 3, 2, 1];
    let invoked = [&before[..], &INVOCATION, &[3, 3]].concat();
    run(&mut drive, request(&invoked, None, 1));
    let (id, computed) = run(&mut drive, request(&invoked, Some(INVOKED), 4));
    assert_eq!(computed, 4 + 3, "its invocation and what follows");
    assert_eq!(drive.heard[&id], alone(request(&invoked, Some(INVOKED), 4), 4, disk.clone()));
    assert_ne!(drive.heard[&id].tokens, alone(request(&invoked, None, 4), 4, disk.clone()).tokens);
    assert_eq!(run(&mut drive, request(&invoked, Some(INVOKED), 1)).1, 1);
    // The last invocation counts.
    let twice = [&invoked[..], &before, &INVOCATION].concat();
    let (id, computed) = run(&mut drive, request(&twice, Some(INVOKED), 2));
    assert_eq!(computed, twice.len() - invoked.len() + 1, "all before it is the base's");
    assert_eq!(drive.heard[&id], alone(request(&twice, Some(INVOKED), 2), 4, disk.clone()));
    // Without one it is the base model.
    let (id, _) = run(&mut drive, request(&before, Some(INVOKED), 3));
    assert_eq!(drive.heard[&id].tokens, alone(request(&before, None, 3), 4, disk).tokens);
    drive.check_nothing_is_held();
}

/// Rows are known by what each was computed with, wherever their request's spans end.
#[test]
fn spans_share_what_is_computed_alike() {
    let disk = Disk::with(&["ann", "bob"]);
    let mut drive = Drive::new(sharing(), disk.clone());
    let prompt: Vec<u32> = (0..20).map(|token| token * 7 % 11).collect();
    let span = |start, end, name: Option<&str>| Span { start, end, adapter: name.map(AdapterChoice::from) };
    let with = |own: Option<&str>, spans: Vec<Span<AdapterChoice>>, max_tokens| {
        let adapters = Spans::new(own.map(AdapterChoice::from), spans).expect("spans that don't overlap");
        Request { adapters, ..request(&prompt, None, max_tokens) }
    };
    let spanned =
        |max_tokens| with(None, vec![span(6, Some(11), Some("ann")), span(15, None, Some("bob"))], max_tokens);
    assert_eq!(run(&mut drive, request(&prompt, None, 1)).1, 20);
    let (id, computed) = run(&mut drive, spanned(5));
    assert_eq!(computed, 14 + 4, "what comes before the first span is the base's");
    assert_eq!(drive.heard[&id], alone(spanned(5), 4, disk.clone()));
    let first = drive.heard[&id].tokens.clone();
    assert_ne!(first, alone(with(Some("bob"), vec![], 5), 4, disk.clone()).tokens);
    assert_eq!(run(&mut drive, spanned(1)).1, 1);
    // The same rows, said in another way.
    let otherwise =
        with(Some("bob"), vec![span(0, Some(6), None), span(6, Some(11), Some("ann")), span(11, Some(15), None)], 5);
    let (id, _) = run(&mut drive, otherwise);
    assert_eq!(drive.heard[&id].tokens, first);
    // An answer may begin with one adapter and go on with another.
    let changes = with(None, vec![span(18, Some(22), Some("ann"))], 6);
    let (id, _) = run(&mut drive, changes.clone());
    assert_eq!(drive.heard[&id], alone(changes, 4, disk));
    drive.check_nothing_is_held();
}

/// The base model's keys and values are held beside a gated adapter's: its blocks take two each, shared ones too.
#[test]
fn a_gated_adapters_blocks_take_two() {
    let disk = Disk::with(&[GATED, "ann"]);
    let mut drive = Drive::new(sharing(), disk.clone());
    let prompt = [5; 10];
    let of = |name, max_tokens| request(&prompt, name, max_tokens);
    drive.submit(of(Some(GATED), 5));
    while drive.core.metrics().running == 0 {
        drive.step();
        drive.load();
    }
    assert_eq!(drive.core.metrics().cache_blocks_used, 2 * 3);
    drive.finish();
    assert_eq!(drive.core.metrics().cache_blocks_kept, 2 * 4);
    let (id, computed) = run(&mut drive, of(Some(GATED), 5));
    assert_eq!(computed, 5, "its last token and what is said but the last");
    assert_eq!(drive.heard[&id], alone(of(Some(GATED), 5), 4, disk.clone()));
    assert_eq!(run(&mut drive, of(None, 1)).1, 10, "the base model's rows are others");
    // Another that takes its place shares nothing with it.
    disk.write(GATED, 1, Files::Good);
    assert_eq!(run(&mut drive, of(Some(GATED), 1)).1, 10);
    drive.check_nothing_is_held();
}

fn refusal(drive: &Drive, request: RequestId) -> RequestError {
    match &drive.heard[&request].end {
        Some(End::Failed(error)) => error.clone(),
        other => panic!("{other:?} is no refusal"),
    }
}

#[test]
fn a_gated_adapter_has_all_tokens_of_a_request() {
    let mut drive = Drive::new(sharing(), Disk::with(&[GATED, "ann"]));
    let span = |name: Option<&str>| Span { start: 3, end: Some(5), adapter: name.map(AdapterChoice::from) };
    let with = |own: Option<&str>, other: Option<&str>| {
        let adapters = Spans::new(own.map(AdapterChoice::from), [span(other)]).expect("spans that don't overlap");
        Request { adapters, ..request(&[1; 9], None, 2) }
    };
    for mixed in [with(Some(GATED), None), with(None, Some(GATED)), with(Some("ann"), Some(GATED))] {
        let id = drive.submit(mixed);
        drive.finish();
        let error = refusal(&drive, id).to_string();
        assert!(error.contains("`gated`") && error.contains("all tokens of a request"), "{error}");
    }
    let (id, _) = run(&mut drive, with(Some(GATED), Some(GATED)));
    assert_eq!(drive.heard[&id].tokens.len(), 2);
    drive.check_nothing_is_held();
}

/// It would wait for room that can't be.
#[test]
fn a_gated_request_ends_where_its_half_of_the_cache_does() {
    let mut drive = Drive::new(Options { cache_tokens: 32, ..sharing() }, Disk::with(&[GATED]));
    for (max_tokens, said) in [(5, 5), (6, 6), (7, 6), (20, 6)] {
        let (id, _) = run(&mut drive, request(&[1; 10], Some(GATED), max_tokens));
        assert_eq!(drive.heard[&id].tokens.len(), said);
        let End::Finished(reason, _) = drive.end(id) else { panic!("{:?}", drive.end(id)) };
        assert_eq!(*reason, FinishReason::Length);
    }
    let (id, computed) = run(&mut drive, request(&[1; 16], Some(GATED), 1));
    let error = refusal(&drive, id);
    assert!(
        matches!(&error, RequestError::Invalid(reason) if reason.contains("16 tokens, and with one to come the cache holds 16"))
    );
    assert_eq!(computed, 0);
    drive.check_nothing_is_held();
}

#[test]
fn a_prompt_whose_tokens_are_scored_is_run_whole() {
    let mut drive = Drive::new(sharing(), Disk::default());
    let plain = request(&[1, 2, 3, 4, 5, 6], None, 1);
    run(&mut drive, plain.clone());
    let scored = Request { log_probabilities: LogProbabilities { generated: None, prompt: Some(1) }, ..plain.clone() };
    let (id, computed) = run(&mut drive, scored);
    assert_eq!((computed, drive.heard[&id].prompt.len()), (6, 5));
    assert_eq!(run(&mut drive, plain).1, 1);
    drive.check_nothing_is_held();
}

/// What is kept takes no room from those that run.
#[test]
fn what_is_kept_makes_room() {
    let mut drive = Drive::new(Options { cache_tokens: 32, ..sharing() }, Disk::default());
    for token in 0..9 {
        let prompt = [token; 20];
        let (id, computed) = run(&mut drive, request(&prompt, None, 12));
        assert_eq!(computed, 31);
        assert_eq!(drive.heard[&id].tokens, alone(request(&prompt, None, 12), 4, Disk::default()).tokens);
        let metrics = drive.core.metrics();
        assert_eq!((metrics.preemptions, metrics.cache_blocks_kept), (0, 8));
    }
    // What a request begins with is no other's to take.
    let (_, computed) = run(&mut drive, request(&[8; 20], None, 12));
    assert_eq!(computed, 31 - 19);
    drive.check_nothing_is_held();
}
