//! What a step makes of gradients: every kind learns, starts where it should, and neither accumulation nor the cut of batches changes
//! what is learnt.

use flora_train::{Length, Start, Trainer, Warmup};

use crate::model::{KINDS, Small, add_job, data, finish, job, layers, options};

fn losses(events: &[String], what: &str) -> Vec<f64> {
    let events = events.iter().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("JSON"));
    events.filter(|event| event["event"] == what).map(|event| event["loss"].as_f64().expect("a number")).collect()
}

#[test]
fn every_kind_starts_from_the_base_and_lowers_the_held_out_loss() {
    for (layer, rank) in KINDS {
        let mut own = options(layer, layer, rank);
        own.length = Length::Steps(60);
        let mut own = job(own);
        own.held_out = Some(data(77, 20, 6));
        let base = {
            let mut none = options("none", "lora", Some(1));
            (none.learning_rate, none.length) = (0.0, Length::Steps(1));
            let mut none = job(none);
            none.held_out = own.held_out.clone();
            let mut trainer = Trainer::new(Small::new(), 100);
            add_job(&mut trainer, none);
            losses(&finish(&mut trainer)["none"].events, "evaluated")[0]
        };
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, own);
        let evaluated = losses(&finish(&mut trainer)[layer].events, "evaluated");
        // DoRA divides by a norm whose numerator was rounded to f32.
        assert!((evaluated[0] - base).abs() < 1e-6 * base, "{layer} starts at {}, the base is {base}", evaluated[0]);
        let last = evaluated.last().copied().expect("evaluations");
        assert!(last < 0.95 * base, "{layer}: {base} became {last}");
    }
}

#[test]
fn the_components_of_flora_differ_and_those_of_the_reference_don_t() {
    let components = |layer: &str, start: Start| {
        let mut own = options("components", layer, Some(3));
        own.start = start;
        let mut trainer = Trainer::new(Small::new(), 100);
        add_job(&mut trainer, job(own));
        let outcome = finish(&mut trainer).remove("components").expect("an outcome");
        // `a`, [r, k], of the first layer.
        let a = outcome.parameters[1].clone();
        a.chunks(a.len() / 3).map(<[u32]>::to_vec).collect::<Vec<_>>()
    };
    let rows = components("flora", Start::Default);
    assert!(rows[0] != rows[1] && rows[1] != rows[2]);
    let rows = components("flora_mean", Start::Reference);
    assert!(rows[0] == rows[1] && rows[1] == rows[2]);
}

/// One step over eight sequences, cut into batches in three ways.
#[test]
fn accumulation_is_a_large_batch() {
    for (layer, rank) in KINDS {
        let parameters = |batch: usize, accumulation: u32| {
            let mut own = options("a", layer, rank);
            (own.batch, own.accumulation, own.length, own.warmup) =
                (batch, accumulation, Length::Epochs(1), Warmup::Steps(0));
            let mut own = job(own);
            // Targets differ from batch to batch, so a mean of means would be another number.
            own.data = equally_long(8, 6);
            own.held_out = None;
            let mut trainer = Trainer::new(Small::new(), 1000);
            add_job(&mut trainer, own);
            let outcome = finish(&mut trainer).remove("a").expect("an outcome");
            assert_eq!(losses(&outcome.events, "step").len(), 1);
            outcome.parameters
        };
        let whole = parameters(8, 1);
        for (batch, accumulation) in [(2, 4), (1, 8), (4, 2)] {
            let cut = parameters(batch, accumulation);
            for (one, other) in whole.iter().flatten().zip(cut.iter().flatten()) {
                let (one, other) = (f32::from_bits(*one), f32::from_bits(*other));
                // The sums differ by f64's rounding, and AdamW's first step is the gradient's sign.
                assert!((one - other).abs() <= 2.0 * f32::EPSILON * one.abs().max(1e-3), "{layer}: {one} and {other}");
            }
        }
    }
}

/// Sequences of `length` tokens, with one to `length` targets.
fn equally_long(sequences: usize, length: usize) -> std::sync::Arc<flora_train::Dataset> {
    let mut random = fastrand::Rng::with_seed(9);
    let mut documents = Vec::new();
    for index in 0..sequences {
        let mut document = flora_train::data::Document::new(flora_train::data::Excess::Dropped);
        for at in 0..=length {
            document.push([random.u32(0..13)], at > index % length);
        }
        documents.push(document);
    }
    flora_train::Dataset::new(&documents, length).expect("sequences").into()
}

#[test]
fn gradients_of_parameters_equal_differences_of_the_loss() {
    use flora_train::{Adapter, JobId, TrainSegment, Trainee};
    let (tokens, targets) = ([3, 1, 4, 1, 5, 9], [Some(1), None, Some(1), Some(5), Some(9), Some(2)]);
    for (layer, rank) in KINDS {
        let mut model = Small::new();
        let own = options("a", layer, rank);
        let place = std::path::Path::new("jobs.toml");
        let mut adapter = Adapter::new(place, &own.adapter, own.start, 3, &layers(), &model).expect("an adapter");
        // Away from the start, where many gradients are zero.
        let mut random = fastrand::Rng::with_seed(2);
        adapter.change(|value| *value += random.f32() - 0.5);
        let segment = [TrainSegment { job: Some(JobId(0)), tokens: &tokens, targets: &targets }];
        let place = |model: &mut Small, adapter: &Adapter| {
            model.place(JobId(0), &adapter.fold().expect("finite")).expect("a place");
        };
        place(&mut model, &adapter);
        let gradients = model.gradients(&segment).expect("a segment");
        let unfolded = adapter.unfold(&gradients.jobs[0].layers).expect("the layout");
        // Folded vectors are rounded to f32, so a difference is off by that over the step.
        let step = 2f32.powi(-8);
        for (tensor, gradient) in unfolded.iter().enumerate() {
            let name = adapter.parameters().nth(tensor).map(|own| own.operand.to_owned()).expect("a tensor");
            for index in (0..gradient.len()).step_by(3) {
                let mut loss = |change: f32| {
                    let mut moved = adapter.clone();
                    let before: usize = unfolded[..tensor].iter().map(Vec::len).sum();
                    let mut at = 0;
                    moved.change(|value| {
                        *value += if at == before + index { change } else { 0.0 };
                        at += 1;
                    });
                    place(&mut model, &moved);
                    model.losses(&segment).expect("a segment")[0].nats
                };
                let difference = (loss(step) - loss(-step)) / f64::from(2.0 * step);
                let bound = 2e-3 * (1.0 + gradient[index].abs());
                // DoRA's norm is a constant of the backward pass and not of the difference.
                let is_detached = layer == "dora" && name != "m";
                assert!(
                    is_detached || (difference - gradient[index]).abs() < bound,
                    "{layer} {name}[{index}]: {} and {difference}",
                    gradient[index]
                );
            }
        }
    }
}
