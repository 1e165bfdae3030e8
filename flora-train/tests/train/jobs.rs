//! A job's numbers are its own: alone, in company, beside jobs that fail, and whatever comes and goes.

use flora_train::event::NotFinite;
use flora_train::{AddError, Ending, Evaluation, Length, MakeError, Places, Start, TrainSegment, Trainee, Trainer};
use std::path::Path;

use crate::model::{KINDS, Small, add_job, data, finish, job, layers, options};

#[test]
fn a_job_has_the_same_bits_alone_and_with_others() {
    let jobs = || {
        KINDS.iter().enumerate().map(|(index, (layer, rank))| {
            let mut own = options(&format!("{layer}-{index}"), layer, *rank);
            own.batch = 1 + index % 3;
            own.accumulation = 1 + (index % 2) as u32;
            own.length = Length::Steps(7 + index as u64);
            job(own)
        })
    };
    let mut together = Trainer::new(Small::new(), 25);
    for own in jobs() {
        add_job(&mut together, own);
    }
    let together_outcomes = finish(&mut together);
    let calls = &together.trainee().calls;
    assert!(calls.iter().all(|tokens| *tokens <= 25), "{calls:?}");
    assert_eq!(together_outcomes.len(), KINDS.len());
    for own in jobs() {
        let name = own.options.name.clone();
        let mut alone = Trainer::new(Small::new(), 25);
        add_job(&mut alone, own);
        let outcome = &finish(&mut alone)[&name];
        assert_eq!(outcome.reason, Some(Ending::Complete), "{name}");
        // The first event is told when it is added.
        assert_eq!(outcome, &together_outcomes[&name], "{name}");
    }
}

#[test]
fn a_model_that_is_taken_back_holds_no_job() {
    let mut trainer = Trainer::new(Small::new(), 40);
    let id = add_job(&mut trainer, job(options("own", "lora", Some(2))));
    trainer.step();
    let segment = TrainSegment { job: Some(id), tokens: &[1], targets: &[Some(2)] };
    let mut model = trainer.into_trainee();
    assert!(model.losses(&[segment]).is_err(), "the job is gone");
    assert!(model.losses(&[TrainSegment { job: None, ..segment }]).is_ok());
}

#[test]
fn a_job_that_comes_late_or_is_stopped_changes_no_other() {
    let alone = {
        let mut trainer = Trainer::new(Small::new(), 40);
        add_job(&mut trainer, job(options("steady", "flora", Some(2))));
        finish(&mut trainer)
    };
    let mut trainer = Trainer::new(Small::new(), 40);
    let stopped = add_job(&mut trainer, job(options("stopped", "lora", Some(2))));
    add_job(&mut trainer, job(options("steady", "flora", Some(2))));
    let mut events = Vec::new();
    for _ in 0..3 {
        events.extend(trainer.step());
    }
    events.extend(trainer.stop(stopped));
    assert!(trainer.stop(stopped).is_empty(), "it is stopped already");
    assert!(trainer.adapter(stopped).is_none());
    add_job(&mut trainer, job(options("late", "hira", Some(2))));
    let mut outcomes = finish(&mut trainer);
    let steady = outcomes.remove("steady").expect("an outcome");
    assert_eq!(steady.parameters, alone["steady"].parameters);
    assert_eq!(outcomes["stopped"].reason, Some(Ending::Stopped));
    assert_eq!(outcomes["late"].reason, Some(Ending::Complete));
}

#[test]
fn a_job_whose_numbers_are_not_finite_ends_alone() {
    let steady = || job(options("steady", "hira", Some(2)));
    let alone = {
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, steady());
        finish(&mut trainer)
    };
    let mut wild = options("wild", "lora", Some(2));
    (wild.learning_rate, wild.largest_norm, wild.warmup) = (1e30, None, flora_train::Warmup::Steps(0));
    let mut wilder = options("wilder", "flora", Some(2));
    (wilder.learning_rate, wilder.warmup) = (1e39, flora_train::Warmup::Steps(0));
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, job(wild));
    add_job(&mut trainer, steady());
    add_job(&mut trainer, job(wilder));
    let outcomes = finish(&mut trainer);
    assert_eq!(outcomes["steady"], alone["steady"]);
    assert_eq!(outcomes["wilder"].reason, Some(Ending::NotFinite { what: NotFinite::Parameters }));
    assert!(matches!(outcomes["wild"].reason, Some(Ending::NotFinite { .. })), "{:?}", outcomes["wild"]);
    for name in ["wild", "wilder"] {
        let finite = outcomes[name].parameters.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite());
        assert!(finite, "what is left of {name} is from before");
    }
}

#[test]
fn a_job_that_the_model_refuses_ends_alone() {
    let steady = || job(options("steady", "ia3", None));
    let alone = {
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, steady());
        finish(&mut trainer)
    };
    let mut foreign = job(options("foreign", "lora", Some(1)));
    foreign.held_out = None;
    let mut document = flora_train::data::Document::new(flora_train::data::Excess::Continued);
    document.push([1, 99, 2], true);
    foreign.data = flora_train::Dataset::new(&[document], 6).expect("a sequence").into();
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, foreign);
    add_job(&mut trainer, steady());
    let outcomes = finish(&mut trainer);
    assert_eq!(outcomes["steady"], alone["steady"]);
    let Some(Ending::Failed { problem }) = &outcomes["foreign"].reason else { panic!("{:?}", outcomes["foreign"]) };
    assert!(problem.contains("beyond the vocabulary"), "{problem}");
}

#[test]
fn patience_ends_a_job_and_its_best_adapter_is_the_result() {
    let mut own = options("patient", "lora", Some(2));
    own.length = Length::Steps(400);
    own.learning_rate = 0.3;
    own.evaluation = Evaluation { every: 2, patience: Some(3), least_gain: 1e-3 };
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, job(own));
    let outcome = &finish(&mut trainer)["patient"];
    assert_eq!(outcome.reason, Some(Ending::NoGain));
    let evaluated: Vec<serde_json::Value> = outcome
        .events
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .filter(|event: &serde_json::Value| event["event"] == "evaluated")
        .collect();
    let best: Vec<bool> = evaluated.iter().map(|event| event["best"].as_bool().expect("a flag")).collect();
    let (gains, rest) = best.split_at(best.len() - 3);
    assert!(gains.last() == Some(&true) && rest == [false; 3], "{best:?}");
    let losses = evaluated.iter().map(|event| event["loss"].as_f64().expect("a number"));
    assert_eq!(evaluated[0]["step"], 0, "the start is evaluated too");
    assert!(losses.clone().next_back() > losses.clone().reduce(f64::min), "the last isn't the best");
}

#[test]
fn what_can_t_be_a_job_is_refused_with_its_mend() {
    let add = |trainer: &mut Trainer<Small>, own| trainer.add(own, Path::new("jobs.toml"), &layers()).err();
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, job(options("a", "lora", Some(2))));
    let taken = add(&mut trainer, job(options("a", "lora", Some(2))));
    assert!(matches!(taken, Some(AddError::Taken(name)) if name == "a"));

    let mut large = options("large", "lora", Some(2));
    large.batch = 100;
    let large = add(&mut trainer, job(large));
    assert!(matches!(large, Some(AddError::TooLarge { budget: 100, .. })), "{large:?}");

    let mut reference = options("reference", "flora", Some(2));
    reference.start = Start::Reference;
    let message = add(&mut trainer, job(reference.clone())).expect_err_message();
    assert!(message.contains("the layer `flora_mean`"), "{message}");
    reference.adapter.layer = "flora_mean".to_owned();
    assert!(add(&mut trainer, job(reference)).is_none());

    let mut elsewhere = options("elsewhere", "lora", Some(2));
    elsewhere.adapter.targets = vec!["v_proj".to_owned()];
    let message = add(&mut trainer, job(elsewhere)).expect_err_message();
    assert!(message.contains("called q_proj, down_proj"), "{message}");

    let biased = add(&mut Trainer::new(Small::new().with_bias(), 100), job(options("biased", "ia3", None)));
    let is_bias = |source: &MakeError| matches!(source, MakeError::ScaledBias { .. });
    assert!(matches!(&biased, Some(AddError::Make { source, .. }) if is_bias(source)), "{biased:?}");
    let input = {
        let mut own = options("input", "ia3", None);
        own.adapter.targets = vec!["q_proj".to_owned()];
        own.adapter.options = serde_json::from_str(r#"{"feedforward_modules": ["q_proj"]}"#).expect("JSON");
        add(&mut Trainer::new(Small::new().with_bias(), 100), job(own))
    };
    assert!(input.is_none(), "scaling the input leaves the bias alone: {input:?}");

    let wrong = |change: &dyn Fn(&mut flora_train::JobOptions)| {
        let mut own = options("wrong", "lora", Some(2));
        change(&mut own);
        add(&mut Trainer::new(Small::new(), 100), job(own)).expect_err_message()
    };
    for (message, option) in [
        (wrong(&|own| own.name = "a/b".to_owned()), "name"),
        (wrong(&|own| own.learning_rate = f64::NAN), "learning_rate"),
        (wrong(&|own| own.length = Length::Epochs(u64::MAX)), "length"),
        (wrong(&|own| own.length = Length::Steps(0)), "length"),
        (wrong(&|own| own.accumulation = 0), "accumulation"),
        (wrong(&|own| own.optimizer.beta2 = 1.0), "betas"),
        (wrong(&|own| own.largest_norm = Some(0.0)), "largest_norm"),
        (wrong(&|own| own.save_every = Some(0)), "save_every"),
        (wrong(&|own| own.evaluation.every = 0), "evaluate_every"),
        (wrong(&|own| own.warmup = flora_train::Warmup::Fraction(1.5)), "warmup"),
    ] {
        assert!(message.contains(option), "{message} doesn't name {option}");
    }
}

trait Message {
    fn expect_err_message(self) -> String;
}

impl Message for Option<AddError> {
    fn expect_err_message(self) -> String {
        self.expect("a refusal").to_string()
    }
}

#[test]
fn epochs_are_as_many_steps_as_their_batches_make() {
    let mut own = options("epochs", "lora", Some(1));
    (own.length, own.accumulation) = (Length::Epochs(3), 4);
    let own = flora_train::NewJob {
        data: data(3, 9, 6),
        held_out: None,
        begin: None,
        options: own,
        places: Places::default(),
    };
    let sequences = own.data.sequences().len() as u64;
    let mut trainer = Trainer::new(Small::new(), 100);
    add_job(&mut trainer, own.clone());
    let outcome = &finish(&mut trainer)["epochs"];
    let steps = outcome.events.iter().filter(|line| line.contains("\"step\":") && line.contains("\"norm\"")).count();
    let tokens: u64 = outcome
        .events
        .iter()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"))
        .filter_map(|event| event["tokens"].as_u64())
        .sum();
    assert_eq!(tokens, 3 * own.data.tokens(), "each token is learnt once an epoch");
    assert!(steps > 1 && steps as u64 <= 3 * sequences, "{steps}");
    assert_eq!(outcome.reason, Some(Ending::Complete));
}
