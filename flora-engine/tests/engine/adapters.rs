//! Adapters that come and go while requests run.

use std::time::Duration;

use flora_engine::{
    AdapterChoice, AdapterFailure, AdapterOptions, Composition, Options, Request, RequestError, RequestId, Span, Spans,
};

use crate::support::disk::{Disk, Files};
use crate::support::drive::{Drive, End};
use crate::support::{options, request};

/// Room for that many adapters.
fn drive(resident: usize, disk: Disk) -> Drive {
    drive_with(AdapterOptions { resident, ..AdapterOptions::default() }, disk)
}

fn drive_with(adapters: AdapterOptions, disk: Disk) -> Drive {
    Drive::new(Options { adapters, ..options() }, disk)
}

impl Drive {
    fn ask(&mut self, adapter: &str) -> RequestId {
        self.submit(request(&[1], Some(adapter), 3))
    }

    /// Asks, and runs all there is.
    fn serve(&mut self, adapter: &str) -> RequestId {
        let id = self.ask(adapter);
        self.finish();
        id
    }

    fn resident(&self) -> Vec<String> {
        self.decoder.state().adapters.values().map(|adapter| format!("{} {}", adapter.name, adapter.version)).collect()
    }

    fn version_of(&self, request: RequestId) -> u64 {
        self.decoder.state().known[&request.sequence()].adapters[0].version
    }

    fn failure(&self, request: RequestId) -> &AdapterFailure {
        match self.end(request) {
            End::Failed(RequestError::Adapter(failure)) => failure,
            other => panic!("{other:?}"),
        }
    }

    /// The disk is looked at again from now on.
    fn let_time_pass(&mut self) {
        self.now += Duration::from_secs(2);
    }
}

/// A request of adapters, one after the other.
fn of_all(names: &[&str]) -> Request {
    let span = |(start, name): (usize, &&str)| Span { start, end: Some(start + 1), adapter: Some((*name).into()) };
    let adapters = Spans::new(None, names.iter().enumerate().map(span)).expect("spans that don't overlap");
    Request { adapters, ..request(&[1, 2, 3], None, 2) }
}

#[test]
fn all_adapters_of_a_request_are_resident_while_it_runs() {
    let disk = Disk::with(&["ann", "bob", "cat", "dan"]);
    let mut drive = drive(2, disk.clone());
    let sum = Composition::new([("cat".to_owned(), 0.5), ("dan".to_owned(), 2.0)]).expect("two parts");
    for _ in 0..2 {
        drive.submit(of_all(&["ann", "bob"]));
        drive.submit(Request { adapters: AdapterChoice::from(sum.clone()).into(), ..request(&[1, 2, 3], None, 2) });
        drive.submit(of_all(&["cat", "ann"]));
    }
    drive.finish();
    assert_eq!(drive.core.metrics().finished, 6);
    drive.check_nothing_is_held();
    let error = drive.core.submit(of_all(&["ann", "bob", "cat"]), drive.now).expect_err("three of two");
    assert!(error.to_string().contains("3 adapters, and 2 may be resident"), "{error}");
    // A part that changes is another sum.
    let reads = disk.reads("dan");
    disk.write("dan", 1, Files::Good);
    drive.submit(Request { adapters: AdapterChoice::from(sum).into(), ..request(&[1, 2, 3], None, 2) });
    drive.finish();
    assert_eq!(disk.reads("dan"), reads + 1);
}

#[test]
fn what_never_fits_together_fails_the_request_alone() {
    let disk = Disk::default();
    for (name, bytes) in [("ann", 3), ("bob", 3), ("cat", 1)] {
        disk.write(name, bytes, Files::Good);
    }
    for device in [None, Some(5)] {
        let bytes = if device.is_some() { 100 } else { 5 };
        let mut drive = drive_with(AdapterOptions { bytes, ..AdapterOptions::default() }, disk.clone());
        drive.decoder.state().adapter_capacity = device;
        let (both, fits) = (drive.submit(of_all(&["ann", "bob"])), drive.submit(of_all(&["bob", "cat"])));
        drive.finish();
        let AdapterFailure::Unusable { reason, .. } = drive.failure(both) else { panic!("a reason") };
        assert!(reason.contains("others of the request"), "{reason}");
        assert!(matches!(drive.end(fits), End::Finished(..)));
        for name in ["ann", "bob"] {
            let alone = drive.serve(name);
            assert!(matches!(drive.end(alone), End::Finished(..)), "{name}");
        }
        drive.check_nothing_is_held();
    }
}

#[test]
fn the_least_recently_used_is_evicted() {
    let mut drive = drive(2, Disk::with(&["ann", "bob", "cat"]));
    for name in ["ann", "bob", "ann", "cat", "ann"] {
        drive.serve(name);
    }
    assert_eq!(drive.resident(), ["ann 1", "cat 1"]);
    let metrics = drive.core.metrics().adapters;
    assert_eq!((metrics.hits, metrics.loads, metrics.evictions, metrics.failures), (2, 3, 1, 0));
    assert_eq!((metrics.resident, metrics.resident_bytes, metrics.loading), (2, 2, 0));
    drive.check_nothing_is_held();
}

/// An adapter is in use until the last of its sequences ends, whenever that began.
#[test]
fn use_lasts_to_the_end() {
    let mut drive = drive(2, Disk::with(&["ann", "bob", "cat"]));
    let long = drive.submit(request(&[1], Some("ann"), 20));
    drive.step();
    drive.load();
    let short = drive.ask("bob");
    drive.finish();
    assert!(matches!((drive.end(long), drive.end(short)), (End::Finished(..), End::Finished(..))));
    drive.serve("cat");
    assert_eq!(drive.resident(), ["ann 1", "cat 1"]);
}

#[test]
fn bytes_count_as_well_as_adapters() {
    let disk = Disk::with(&["ann", "bob"]);
    disk.write("large", 9, Files::Good);
    disk.write("larger", 11, Files::Good);
    let mut drive = drive_with(AdapterOptions { bytes: 10, ..AdapterOptions::default() }, disk);
    drive.serve("ann");
    drive.serve("bob");
    drive.serve("large");
    assert_eq!(drive.resident(), ["bob 1", "large 1"]);
    let larger = drive.serve("larger");
    assert!(drive.failure(larger).to_string().contains("takes 11 bytes on the device; 10 are allowed"));
    assert_eq!(drive.resident(), ["bob 1", "large 1"], "nothing was evicted in vain");
}

#[test]
fn a_pinned_one_stays() {
    let adapters = AdapterOptions { resident: 2, pinned: vec!["ann".into()], ..AdapterOptions::default() };
    let mut drive = drive_with(adapters, Disk::with(&["ann", "bob", "cat", "dan"]));
    for name in ["ann", "bob", "cat"] {
        drive.serve(name);
    }
    assert_eq!(drive.resident(), ["ann 1", "cat 1"]);
    drive.core.pin("cat");
    let refused = drive.serve("dan");
    assert!(drive.failure(refused).to_string().contains("2 pinned ones are"));
    drive.core.unpin("ann");
    drive.let_time_pass();
    drive.serve("dan");
    assert_eq!(drive.resident(), ["cat 1", "dan 1"]);
}

/// A pinned adapter whose files change is still replaced, though there is room for no other.
#[test]
fn a_pinned_one_is_renewed() {
    let adapters = AdapterOptions { resident: 1, pinned: vec!["ann".into()], ..AdapterOptions::default() };
    let mut drive = drive_with(adapters, Disk::with(&["ann"]));
    drive.serve("ann");
    drive.disk.write("ann", 1, Files::Good);
    drive.let_time_pass();
    let second = drive.serve("ann");
    assert_eq!((drive.version_of(second), drive.resident()), (2, vec!["ann 2".to_string()]));
}

/// The old version of a pinned adapter isn't pinned: it leaves with its last user, and another gets its place.
#[test]
fn an_old_version_is_not_pinned() {
    let adapters = AdapterOptions { resident: 2, pinned: vec!["ann".into()], ..AdapterOptions::default() };
    let mut drive = drive_with(adapters, Disk::with(&["ann", "bob"]));
    drive.submit(request(&[1], Some("ann"), 30));
    drive.step();
    drive.load();
    drive.step();
    drive.disk.write("ann", 1, Files::Good);
    drive.let_time_pass();
    drive.ask("ann");
    let other = drive.ask("bob");
    drive.finish();
    assert!(matches!(drive.end(other), End::Finished(..)));
    assert_eq!(drive.resident(), ["ann 2", "bob 1"]);
}

#[test]
fn those_that_run_go_on_while_an_adapter_is_read() {
    let mut drive = drive(4, Disk::with(&["ann"]));
    let running = drive.submit(request(&[1], None, 9));
    let waits = drive.ask("ann");
    let passes = drive.submit(request(&[2], None, 3));
    for step in 1..=5 {
        drive.step();
        assert_eq!(drive.heard[&running].tokens.len(), step);
    }
    assert!(drive.heard[&passes].end.is_some(), "it isn't kept waiting by an older one's adapter");
    assert!(drive.heard[&waits].tokens.is_empty());
    drive.load();
    drive.step();
    assert_eq!(drive.heard[&waits].tokens.len(), 1, "it begins with the step that places its adapter");
    drive.finish();
}

/// There is nothing to do while all wait to be read, and the core says so.
#[test]
fn a_core_that_waits_is_stalled() {
    let mut drive = drive(4, Disk::with(&["ann"]));
    assert!(drive.core.is_stalled());
    drive.ask("ann");
    assert!(!drive.core.is_stalled());
    drive.step();
    assert!(drive.core.is_stalled());
    drive.step();
    drive.load();
    assert!(!drive.core.is_stalled());
    drive.finish();
}

#[test]
fn a_changed_adapter_is_loaded_beside_the_old_one() {
    let mut drive = drive(4, Disk::with(&["ann"]));
    let old = drive.submit(request(&[1], Some("ann"), 30));
    drive.step();
    drive.load();
    drive.step();
    let same = drive.ask("ann");
    drive.step();
    assert_eq!(drive.orders[0].known, Some(1), "the disk is looked at for every request");
    drive.load();
    drive.step();
    drive.disk.write("ann", 1, Files::Good);
    let new = drive.ask("ann");
    drive.step();
    drive.load();
    drive.step();
    assert_eq!(drive.resident(), ["ann 1", "ann 2"]);
    drive.finish();
    assert_eq!([old, same, new].map(|id| drive.version_of(id)), [1, 1, 2]);
    assert_eq!(drive.resident(), ["ann 2"], "the old one left with its last user");
}

/// What was read for a request and waits for a place is too old for one that comes later.
#[test]
fn what_was_read_before_a_request_is_not_its_own() {
    let mut drive = drive(1, Disk::with(&["ann", "bob"]));
    let running = drive.submit(request(&[1], Some("ann"), 20));
    drive.step();
    drive.load();
    drive.step();
    let early = drive.ask("bob");
    drive.step();
    drive.load();
    drive.step();
    assert!(drive.heard[&early].tokens.is_empty(), "there is no place for it");
    drive.disk.write("bob", 1, Files::Good);
    drive.let_time_pass();
    let late = drive.ask("bob");
    drive.finish();
    assert!(matches!(drive.end(running), End::Finished(..)));
    assert_eq!([early, late].map(|id| drive.version_of(id)), [1, 2]);
}

#[test]
fn an_unchanged_adapter_is_not_read_again() {
    let mut drive = drive(4, Disk::with(&["ann"]));
    drive.serve("ann");
    drive.let_time_pass();
    drive.serve("ann");
    assert_eq!(drive.disk.reads("ann"), 1);
    let metrics = drive.core.metrics().adapters;
    assert_eq!((metrics.hits, metrics.loads), (1, 1));
}

#[test]
fn an_adapter_that_fails_fails_its_own_requests() {
    let disk = Disk::with(&["ann"]);
    disk.write("bad", 1, Files::Broken);
    let mut drive = drive(4, disk);
    let ids = ["bad", "ann", "bad", "gone"].map(|name| drive.ask(name));
    drive.finish();
    let unusable = AdapterFailure::Unusable { name: "bad".into(), reason: "broken".into() };
    assert_eq!((drive.failure(ids[0]), drive.failure(ids[2])), (&unusable, &unusable));
    assert_eq!(*drive.failure(ids[3]), AdapterFailure::Unknown("gone".into()));
    assert!(matches!(drive.end(ids[1]), End::Finished(..)));
    assert_eq!(drive.core.metrics().adapters.failures, 2);

    drive.let_time_pass();
    let again = drive.serve("bad");
    assert_eq!((drive.failure(again), drive.disk.reads("bad")), (&unusable, 1), "what is broken is read once");
    drive.disk.write("bad", 1, Files::Good);
    drive.disk.write("gone", 1, Files::Good);
    drive.let_time_pass();
    for name in ["bad", "gone"] {
        let mended = drive.serve(name);
        assert!(matches!(drive.end(mended), End::Finished(..)));
    }
}

/// What is gone from the disk serves whom it has begun to serve, and no one else.
#[test]
fn an_adapter_that_breaks_leaves() {
    let mut drive = drive(4, Disk::with(&["ann"]));
    let old = drive.submit(request(&[1], Some("ann"), 20));
    drive.step();
    drive.load();
    drive.step();
    drive.disk.all().clear();
    drive.let_time_pass();
    let new = drive.ask("ann");
    drive.step();
    drive.load();
    drive.step();
    assert_eq!(*drive.failure(new), AdapterFailure::Unknown("ann".into()));
    drive.finish();
    assert!(matches!(drive.end(old), End::Finished(..)));
    assert!(drive.resident().is_empty());
}

#[test]
fn what_the_device_refuses_fails_or_waits() {
    let disk = Disk::with(&["ann", "bob"]);
    disk.write("unfit", 1, Files::Unfit);
    disk.write("large", 5, Files::Good);
    let mut drive = drive(4, disk);
    drive.decoder.state().adapter_capacity = Some(1);
    let unfit = drive.serve("unfit");
    assert!(drive.failure(unfit).to_string().contains("of another shape"));
    drive.serve("ann");
    drive.serve("bob");
    assert_eq!(drive.resident(), ["bob 1"], "the device has less room than the options say");
    let large = drive.serve("large");
    assert!(drive.failure(large).to_string().contains("the device has no room for it"));
    drive.decoder.state().adapter_capacity = Some(5);
    drive.let_time_pass();
    for name in ["ann", "large", "ann", "bob"] {
        drive.serve(name);
    }
    assert_eq!(drive.resident(), ["ann 1", "bob 1"], "there is room again once something was removed");
}

/// One place, and an adapter that is always in use: another's request gets it in the end.
#[test]
fn an_adapter_in_use_does_not_starve_another() {
    let mut drive = drive(1, Disk::with(&["ann", "bob"]));
    drive.ask("ann");
    let mut other = None;
    for step in 0..40 {
        drive.ask("ann");
        if step == 5 {
            other = Some(drive.ask("bob"));
        }
        drive.step();
        drive.load();
    }
    assert!(matches!(drive.end(other.expect("bob's request")), End::Finished(..)));
    drive.finish();
}

/// The older request is about to use its adapter, and has no blocks yet; the younger doesn't take its place.
#[test]
fn what_an_older_request_waits_to_use_is_not_evicted() {
    let options = Options {
        cache_tokens: 32,
        adapters: AdapterOptions { resident: 1, ..AdapterOptions::default() },
        ..options()
    };
    let mut drive = Drive::new(options, Disk::with(&["ann", "bob"]));
    let running = drive.submit(request(&[1; 20], None, 8));
    let older = drive.submit(request(&[2; 10], Some("ann"), 3));
    let younger = drive.ask("bob");
    while drive.heard[&running].end.is_none() {
        assert!(drive.heard[&older].tokens.is_empty() && drive.heard[&younger].tokens.is_empty());
        drive.step();
        drive.load();
    }
    assert_eq!(drive.resident(), ["ann 1"]);
    drive.finish();
    assert_eq!(drive.core.metrics().adapters.evictions, 1);
}

/// A pre-empted request keeps the version that it began with, though there is a newer one.
#[test]
fn a_preempted_request_keeps_its_version() {
    let mut drive = Drive::new(Options { cache_tokens: 28, ..options() }, Disk::with(&["ann"]));
    let old = drive.submit(request(&[1; 5], None, 15));
    let young = drive.submit(request(&[2; 5], Some("ann"), 15));
    while drive.core.metrics().preemptions == 0 {
        drive.step();
        drive.load();
    }
    drive.disk.write("ann", 1, Files::Good);
    drive.let_time_pass();
    let new = drive.ask("ann");
    drive.finish();
    assert!(matches!(drive.end(old), End::Finished(..)));
    assert_eq!([young, new].map(|id| drive.version_of(id)), [1, 2]);
    drive.check_nothing_is_held();
}

/// What was read for a request that has gone doesn't stay in host memory.
#[test]
fn what_nobody_waits_for_is_dropped() {
    let adapters = AdapterOptions { loading: 1, ..AdapterOptions::default() };
    let mut drive = drive_with(adapters, Disk::with(&["ann", "bob"]));
    let gone = drive.ask("ann");
    drive.step();
    drive.core.cancel(gone);
    let next = drive.ask("bob");
    drive.step();
    assert!(drive.orders.iter().all(|order| order.adapter == AdapterChoice::from("ann")), "one at a time");
    drive.load();
    drive.finish();
    assert!(matches!(drive.end(next), End::Finished(..)));
    assert_eq!(drive.resident(), ["bob 1"]);
    assert_eq!(drive.core.metrics().adapters.loading, 0);
}

#[test]
fn thousands_are_registered_and_tens_resident() {
    let names: Vec<String> = (0..3000).map(|index| format!("adapter-{index}")).collect();
    let disk = Disk::default();
    for name in &names {
        disk.write(name, 1, Files::Good);
    }
    let mut drive = drive(16, disk);
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..300 {
        for _ in 0..random.usize(0..5) {
            drive.ask(random.choice(&names).expect("a name"));
        }
        drive.step();
        drive.load();
        assert!(drive.core.metrics().adapters.resident <= 16);
    }
    drive.finish();
    assert!(drive.heard.values().all(|heard| matches!(heard.end, Some(End::Finished(..)))));
    drive.check_nothing_is_held();
}

/// Names that clients make up are answered, and not remembered without end.
#[test]
fn made_up_names_are_answered() {
    let mut drive = drive(4, Disk::with(&["ann"]));
    for index in 0..3000 {
        let id = drive.ask(&format!("no-{index}"));
        if index % 50 == 0 {
            drive.finish();
            assert_eq!(*drive.failure(id), AdapterFailure::Unknown(format!("no-{index}")));
        }
    }
    let real = drive.serve("ann");
    assert!(matches!(drive.end(real), End::Finished(..)));
}

/// As many begin with one step as the bytes of a step allow, and one of any size.
#[test]
fn small_ones_are_placed_together() {
    let disk = Disk::with(&[]);
    for (name, bytes) in [("large", 7), ("ann", 2), ("bob", 2), ("cat", 2)] {
        disk.write(name, bytes, Files::Good);
    }
    let mut drive = drive_with(AdapterOptions { bytes_per_step: 4, ..AdapterOptions::default() }, disk);
    let asked = ["large", "ann", "bob", "cat"].map(|name| drive.ask(name));
    drive.step();
    drive.load();
    let heard = |drive: &Drive| asked.map(|id| drive.heard[&id].tokens.len());
    drive.step();
    assert_eq!(heard(&drive), [1, 0, 0, 0]);
    drive.step();
    assert_eq!(heard(&drive), [2, 1, 1, 0]);
    drive.step();
    assert_eq!(heard(&drive), [3, 2, 2, 1]);
}
