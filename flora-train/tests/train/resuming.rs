//! What is saved and gone on from: bit for bit, whenever a job was interrupted, and never half a file.

use flora_train::{AddError, Ending, Length, Places, StateError, Trainer};
use proptest::prelude::*;
use std::path::{Path, PathBuf};

use crate::model::{KINDS, Small, add_job, finish, job, layers, options};

fn places(folder: &Path) -> Places {
    Places { adapters: Some(folder.join("adapters")), state: Some(folder.join("states/a.safetensors")) }
}

fn own(layer: &str, rank: Option<usize>, folder: Option<&Path>) -> flora_train::NewJob {
    let mut own = options("a", layer, rank);
    own.accumulation = 2;
    own.save_every = Some(3);
    own.length = Length::Steps(10);
    let mut own = job(own);
    own.places = folder.map(places).unwrap_or_default();
    own
}

#[test]
fn an_interrupted_job_goes_on_bit_for_bit() {
    for (layer, rank) in KINDS {
        let whole = {
            let mut trainer = Trainer::new(Small::new(), 100);
            add_job(&mut trainer, own(layer, rank, None));
            finish(&mut trainer).remove("a").expect("an outcome")
        };
        // Batches, of which two make a step: killed within a step, right after one, and after a saved one.
        for batches in [1, 4, 5, 6, 13] {
            let folder = tempfile::tempdir().expect("a folder");
            let mut killed = Trainer::new(Small::new(), 100);
            add_job(&mut killed, own(layer, rank, Some(folder.path())));
            for _ in 0..batches {
                killed.step();
            }
            drop(killed);
            let mut resumed = Trainer::new(Small::new(), 100);
            let (_, started) =
                resumed.add(own(layer, rank, Some(folder.path())), Path::new("jobs.toml"), &layers()).expect("a job");
            let line = serde_json::to_string(&started).expect("a line");
            let step = batches / 2 / 3 * 3;
            assert!(line.contains(&format!("\"step\":{step},")), "{line}");
            let outcome = finish(&mut resumed).remove("a").expect("an outcome");
            assert_eq!(outcome.parameters, whole.parameters, "{layer} killed after {batches} batches");
            assert_eq!(outcome.reason, Some(Ending::Complete));
            let told = |events: &[String]| {
                let is_number = |line: &&String| line.contains("\"step\",") || line.contains("evaluated");
                events.iter().filter(is_number).cloned().collect::<Vec<_>>()
            };
            let (all, rest) = (told(&whole.events), told(&outcome.events));
            assert!(all.ends_with(&rest), "{layer} killed after {batches} batches: {rest:#?}");
        }
    }
}

#[test]
fn a_stopped_job_goes_on_and_a_complete_one_is_over() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, own("flora", Some(2), None));
    let whole = finish(&mut trainer).remove("a").expect("an outcome");
    let id = add_job(&mut trainer, own("flora", Some(2), Some(folder.path())));
    // Two batches make a step: it is stopped within one.
    for _ in 0..5 {
        trainer.step();
    }
    trainer.stop(id);
    add_job(&mut trainer, own("flora", Some(2), Some(folder.path())));
    let outcome = finish(&mut trainer).remove("a").expect("an outcome");
    assert_eq!((&outcome.reason, &outcome.parameters), (&Some(Ending::Complete), &whole.parameters));
    add_job(&mut trainer, own("flora", Some(2), Some(folder.path())));
    let again = finish(&mut trainer).remove("a").expect("an outcome");
    assert_eq!((again.reason, again.parameters), (outcome.reason, outcome.parameters));
    assert!(again.events.iter().all(|line| !line.contains("norm")), "no step more: {:?}", again.events);
}

#[test]
fn what_is_written_is_the_adapter() {
    for (layer, rank) in KINDS {
        let folder = tempfile::tempdir().expect("a folder");
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, own(layer, rank, Some(folder.path())));
        finish(&mut trainer);
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, own(layer, rank, Some(folder.path())));
        trainer.step();
        let ended = trainer.take_ended().remove(0);
        let path = folder.path().join("adapters/a");
        let read = flora_checkpoint::AdapterFolder::open(&path, layers().kinds()).expect("an adapter");
        let made = ended.adapter.folder("a");
        assert_eq!((read.kind, read.modules), (made.kind, made.modules), "{layer}");
        let left: Vec<_> = std::fs::read_dir(folder.path().join("adapters")).expect("a folder").collect();
        assert_eq!(left.len(), 1, "nothing is left beside it");
    }
}

#[test]
fn an_adapter_is_trained_further_from_where_it_is() {
    for (layer, rank) in KINDS {
        let folder = tempfile::tempdir().expect("a folder");
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, own(layer, rank, Some(folder.path())));
        let first = finish(&mut trainer).remove("a").expect("an outcome");
        let made = flora_checkpoint::AdapterFolder::open(&folder.path().join("adapters/a"), layers().kinds());
        let mut further = own(layer, rank, None);
        further.begin = Some(made.expect("an adapter"));
        further.options.learning_rate = 0.0;
        further.options.optimizer.weight_decay = 0.0;
        let id = add_job(&mut trainer, further);
        let bits = |trainer: &Trainer<Small>| {
            let adapter = trainer.adapter(id).expect("a job");
            let bits = adapter.parameters().map(|own| own.values.values.iter().map(|value| value.to_bits()).collect());
            bits.collect::<Vec<Vec<u32>>>()
        };
        assert_eq!(bits(&trainer), first.parameters, "{layer}");
        assert_eq!(finish(&mut trainer)["a"].parameters, first.parameters, "{layer}: a rate of 0 changes nothing");
    }
    let mut foreign = own("lora", Some(2), None);
    let kind = layers().kinds().kind_of_layer("ia3").expect("a kind");
    let module = flora_checkpoint::AdapterModule {
        layer: "ia3".to_owned(),
        rank: 0,
        operands: [("l".to_owned(), flora_checkpoint::Operand { shape: vec![3], values: vec![1.0; 3] })].into(),
    };
    let modules = [("model.layers.0.self_attn.q_proj".to_owned(), module)].into();
    foreign.begin = Some(flora_checkpoint::AdapterFolder::new("x", kind, modules));
    let refused = Trainer::new(Small::new(), 100).add(foreign, Path::new("jobs.toml"), &layers());
    assert!(refused.expect_err("another shape").to_string().contains("not in that shape"));
}

#[test]
fn another_job_s_state_is_refused_by_what_differs() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut trainer = Trainer::new(Small::new(), 100);
    let id = add_job(&mut trainer, own("lora", Some(2), Some(folder.path())));
    trainer.step();
    trainer.stop(id);
    let refused = |change: &dyn Fn(&mut flora_train::NewJob)| {
        let mut other = own("lora", Some(2), Some(folder.path()));
        change(&mut other);
        let refused = Trainer::new(Small::new(), 100).add(other, Path::new("jobs.toml"), &layers());
        match refused {
            Err(AddError::State(StateError::Other { what, .. })) => what,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused(&|job| job.options.learning_rate = 0.5), "`learning_rate`");
    assert_eq!(refused(&|job| job.options.adapter.rank = Some(3)), "`adapter`");
    assert_eq!(refused(&|job| job.options.seed = 9), "`seed`");
    assert_eq!(refused(&|job| job.data = crate::model::data(1, 3, 6)), "data");
    assert_eq!(refused(&|job| job.held_out = None), "held-out data");
    let mut of_another = Trainer::new(Small::new().named("another"), 100);
    let job = own("lora", Some(2), Some(folder.path()));
    let of_another = of_another.add(job, Path::new("jobs.toml"), &layers());
    let refused_state = of_another.expect_err("another model's").to_string();
    assert!(refused_state.contains(r#"whose model was "small" and is "another""#), "{refused_state}");
    let mut other = own("lora", Some(2), Some(folder.path()));
    other.options.save_every = None;
    assert!(Trainer::new(Small::new(), 100).add(other, Path::new("jobs.toml"), &layers()).is_ok());
}

#[test]
fn a_place_that_can_t_be_written_costs_no_more_than_the_saving() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("states"), "a file where a folder should be").expect("a file");
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, own("lora", Some(2), Some(folder.path())));
    let outcome = finish(&mut trainer).remove("a").expect("an outcome");
    assert_eq!(outcome.reason, Some(Ending::Complete));
    let problems = outcome.events.iter().filter(|line| line.contains("not_saved")).count();
    assert_eq!(problems, 4, "{:?}", outcome.events);
}

fn saved() -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut trainer = Trainer::new(Small::new(), 100);
    let id = add_job(&mut trainer, own("ia3", None, Some(folder.path())));
    trainer.step();
    trainer.stop(id);
    let path = places(folder.path()).state.expect("a place");
    let bytes = std::fs::read(&path).expect("a state");
    (folder, path, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn damaged_states_are_errors_or_states(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), cut in any::<prop::sample::Index>(), cuts in any::<bool>()) {
        use std::sync::LazyLock;
        static SAVED: LazyLock<(tempfile::TempDir, PathBuf, Vec<u8>)> = LazyLock::new(saved);
        let (folder, path, bytes) = &*SAVED;
        let mut damaged = bytes.clone();
        for (at, byte) in changes {
            let at = at.index(damaged.len());
            damaged[at] = byte;
        }
        if cuts {
            damaged.truncate(cut.index(damaged.len()));
        }
        std::fs::write(path, damaged).expect("a file");
        // Whatever comes of it, it is no panic.
        let _ = Trainer::new(Small::new(), 100).add(own("ia3", None, Some(folder.path())), Path::new("jobs.toml"), &layers());
    }
}
