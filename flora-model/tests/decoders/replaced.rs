//! A thousand replacements of adapters under load, in every way that people replace them: no answer is of two versions, and none is
//! older than its request.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use flora_checkpoint::{AdapterFolder, AdapterKinds, AdapterModule, Model, Operand};
use flora_engine::{
    Engine, EngineHandle, Event, LogProbabilities, LogitRules, Options, Request, RequestError, Sampling, StopAt,
    Vocabulary,
};
use flora_model::{AdapterDirectory, ServeOptions};

use crate::served::golden;
use crate::{device, is_host};

/// Versions of an adapter. The first two have one config, and so have the others: a config with other tensors than its own answers
/// as none of them does.
const VERSIONS: usize = 4;
const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

pub(crate) fn write_version(parent: &Path, model: &Model, version: usize) {
    let mut random = fastrand::Rng::with_seed(version as u64);
    let mut operand = |shape: Vec<usize>| {
        let values = (0..shape.iter().product()).map(|_| random.f32() - 0.5).collect();
        Operand { shape, values }
    };
    let adapted = model.projections().iter().filter(|own| own.path.ends_with("q_proj") || own.path.ends_with("v_proj"));
    let modules = adapted.map(|own| {
        let scale = Operand { shape: Vec::new(), values: vec![if version < 2 { 2.0 } else { 5.0 }] };
        let operands = [("b", operand(vec![own.d, 3])), ("a", operand(vec![3, own.k])), ("s", scale)];
        let operands = operands.map(|(name, operand)| (name.to_owned(), operand)).into();
        (own.path.clone(), AdapterModule { layer: "lora".to_owned(), rank: 3, operands })
    });
    let kind = AdapterKinds::builtin().kind_of_layer("lora").expect("a built-in layer");
    AdapterFolder::new(format!("v{version}"), kind, modules.collect()).write(parent).expect("a folder");
}

/// One adapter that is replaced again and again.
struct Target {
    name: &'static str,
    /// The versions that were put in place, one after the other.
    history: Mutex<Vec<usize>>,
    /// Replacements that were begun, and those that are done.
    begun: AtomicUsize,
    done: AtomicUsize,
}

impl Target {
    fn new(name: &'static str) -> Self {
        Self { name, history: Mutex::new(vec![0]), begun: AtomicUsize::new(0), done: AtomicUsize::new(0) }
    }

    /// Replaces it `count` times by what `next` chooses, in the way of `replace`.
    fn replace(&self, count: usize, seed: u64, next: fn(usize, &mut fastrand::Rng) -> usize, replace: impl Fn(usize)) {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut version = 0;
        for _ in 0..count {
            version = next(version, &mut random);
            self.history.lock().expect("no panic").push(version);
            self.begun.fetch_add(1, Ordering::SeqCst);
            replace(version);
            self.done.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(random.u64(0..60)));
        }
    }
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).expect("a folder");
    for file in FILES {
        fs::copy(from.join(file), to.join(file)).expect("a copy");
    }
}

/// Another version than this.
fn any(version: usize, random: &mut fastrand::Rng) -> usize {
    (version + random.usize(1..VERSIONS)) % VERSIONS
}

/// The other version with the same config.
fn other(version: usize, _: &mut fastrand::Rng) -> usize {
    version ^ 1
}

/// The tokens of an answer, or that the adapter couldn't be had.
pub(crate) fn ask(handle: &EngineHandle, adapter: &str) -> Option<Vec<u32>> {
    let stop = StopAt { max_tokens: 4, strings: Vec::new(), tokens: Vec::new() };
    let prompt = vec![5, 80, 3, 17, 90, 41, 9];
    let rules = LogitRules::default();
    let (sampling, log_probabilities) = (Sampling::Greedy, LogProbabilities::default());
    let adapters = Some(adapter).into();
    let request = Request { prompt, adapters, sampling, rules, stop, grammar: None, log_probabilities };
    let mut stream = handle.submit(request).expect("a request that can be run");
    let mut said = Vec::new();
    loop {
        match stream.blocking_recv().expect("a stream says how it ends") {
            Event::Prompt(_) => {}
            Event::Text { tokens, .. } => said.extend(tokens),
            Event::Finished { .. } => return Some(said),
            Event::Failed(RequestError::Adapter(_)) => return None,
            Event::Failed(error) => panic!("{error}"),
        }
    }
}

#[cfg(unix)]
#[test]
fn a_thousand_replacements_mix_nothing_and_serve_nothing_old() {
    use std::os::unix::fs::symlink;
    if !is_host() {
        println!("NOT RUN: what is compared is files, which no device has to do with");
        return;
    }
    let model = Arc::new(Model::open(&golden("llama_tiny").join("model")).expect("a golden model"));
    let root = tempfile::tempdir().expect("a temporary folder");
    let (versions, adapters, scratch) =
        (root.path().join("versions"), root.path().join("adapters"), root.path().join("scratch"));
    [&versions, &adapters, &scratch].into_iter().for_each(|folder| fs::create_dir(folder).expect("a folder"));
    (0..VERSIONS).for_each(|version| write_version(&versions, &model, version));
    let version = |version: usize| versions.join(format!("v{version}"));

    let source = AdapterDirectory::new(Some(&adapters), &model, ServeOptions::default().adapters).expect("built in");
    let named = (0..VERSIONS).map(|number| (format!("v{number}"), version(number)));
    let source = source.with_named(named).expect("names of their own");
    let decoder = flora_model::load(&device(), &model, &ServeOptions::default()).expect("a decoder");
    let engine = Engine::start(decoder, source, Vocabulary::new(Vec::new()), Options::default()).expect("an engine");

    let answers: Vec<Vec<u32>> =
        (0..VERSIONS).map(|version| ask(&engine.handle(), &format!("v{version}")).expect("a version")).collect();
    let distinct: std::collections::BTreeSet<_> = answers.iter().collect();
    assert_eq!(distinct.len(), VERSIONS, "the versions can be told apart");

    let modified = File::open(version(0).join(FILES[1])).and_then(|file| file.metadata()?.modified()).expect("a time");
    let targets = ["linked", "renamed", "copied", "written"].map(Target::new);
    symlink(version(0), adapters.join("linked")).expect("a link");
    ["renamed", "copied", "written"].iter().for_each(|name| copy(&version(0), &adapters.join(name)));
    let [linked, renamed, copied, written] = &targets;
    let (stop, tally) = (AtomicBool::new(false), Mutex::new(BTreeMap::<&str, (usize, usize)>::new()));
    thread::scope(|scope| {
        for client in 0..4u64 {
            let (handle, targets, answers, stop, tally) = (engine.handle(), &targets, &answers, &stop, &tally);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(client);
                while !stop.load(Ordering::SeqCst) {
                    let target = &targets[random.usize(0..targets.len())];
                    let first = target.done.load(Ordering::SeqCst);
                    let said = ask(&handle, target.name);
                    let last = target.begun.load(Ordering::SeqCst);
                    let mut tally = tally.lock().expect("no panic");
                    let (answered, failed) = tally.entry(target.name).or_default();
                    let Some(said) = said else {
                        *failed += 1;
                        continue;
                    };
                    *answered += 1;
                    let version = answers.iter().position(|answer| *answer == said);
                    let allowed = target.history.lock().expect("no panic")[first..=last].to_vec();
                    assert!(
                        version.is_some_and(|version| allowed.contains(&version)),
                        "`{}` answers as version {version:?} when {allowed:?} were there",
                        target.name
                    );
                }
            });
        }
        let writers = [
            // A link that is flipped.
            scope.spawn(|| {
                linked.replace(250, 1, any, |number| {
                    let link = scratch.join("link");
                    symlink(version(number), &link).expect("a link");
                    fs::rename(&link, adapters.join("linked")).expect("a flip");
                });
            }),
            // A folder that another one takes the place of.
            scope.spawn(|| {
                let count = AtomicUsize::new(0);
                renamed.replace(250, 2, any, |number| {
                    let count = count.fetch_add(1, Ordering::SeqCst);
                    let (new, old) = (scratch.join(format!("new-{count}")), scratch.join(format!("old-{count}")));
                    copy(&version(number), &new);
                    fs::rename(adapters.join("renamed"), &old).expect("taken away");
                    fs::rename(&new, adapters.join("renamed")).expect("put in place");
                    fs::remove_dir_all(&old).expect("removed");
                });
            }),
            // A file of the same length and time of modification, as `cp -a` and reproducible images leave it.
            scope.spawn(|| {
                copied.replace(250, 3, other, |number| {
                    let new = scratch.join("tensors");
                    fs::copy(version(number).join(FILES[1]), &new).expect("a copy");
                    let file = OpenOptions::new().write(true).open(&new).expect("a file");
                    file.set_modified(modified).expect("a time");
                    fs::rename(&new, adapters.join("copied").join(FILES[1])).expect("put in place");
                });
            }),
            // A file that is written over while others read it, of the same length and time.
            scope.spawn(|| {
                written.replace(250, 4, other, |number| {
                    let bytes = fs::read(version(number).join(FILES[1])).expect("tensors");
                    let path = adapters.join("written").join(FILES[1]);
                    let mut file = OpenOptions::new().write(true).open(path).expect("a file");
                    file.write_all(&bytes).expect("written");
                    file.set_modified(modified).expect("a time");
                });
            }),
        ];
        let ended: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        stop.store(true, Ordering::SeqCst);
        assert!(ended.iter().all(Result::is_ok), "a writer panicked");
    });
    let tally = tally.into_inner().expect("no panic");
    println!("replaced 1000 times; answers and failures: {tally:?}");
    assert!(tally.len() == 4 && tally.values().all(|(answered, _)| *answered >= 10), "{tally:?}");
}
