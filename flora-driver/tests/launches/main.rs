//! Launches by the driver give the bits of flora's own device, on another program's streams, in graphs, and from kernels on disk; and
//! what is wrong is an error.

mod case;
mod mistakes;
mod played;
mod streams;

use std::fs;

use flora_codegen::target::export::Operand;
use flora_driver::{Card, DriverError, Launches};
use flora_ir::Activation;
use flora_plan::batch::AdapterSlots;
use flora_plan::layer::{Element, Epilogue, LayerShape, WeightFormat};
use flora_plan::plan::Plan;

use case::{Case, Operands, bytes, launch, low_rank, numbers, scaled};
use played::{Played, cards, on_cards};
use streams::{OwnStream, use_card};

/// Every plan; those that share the depth where the card's multiprocessors are those that the list was made for.
fn plans(played: &Played) -> Vec<Plan> {
    let split = |plan: Plan| played.is_emulated.then(|| plan.with_split());
    Plan::unmerged().flat_map(|plan| [Some(plan), split(plan)]).flatten().collect()
}

fn compare(played: &Played, case: &Case, plans: &[Plan]) {
    let cache = tempfile::tempdir().unwrap();
    let (kernels, operands) = (played.kernels(cache.path()), Operands::new(&played.card, case));
    for plan in plans {
        let launches = Launches::new(&kernels, case.list(&played.card, *plan)).expect("they are loaded");
        let bound = operands.bind(&launches);
        let expected = case.on(&played.device, plan);
        for time in 0..2 {
            launch(&bound);
            assert!(operands.take_y() == expected, "{:?} {} {plan:?}, time {time}", played.card, case.format);
        }
    }
}

#[test]
fn every_lowering_gives_the_bits_of_flora_s_device() {
    on_cards("every_lowering_gives_the_bits_of_flora_s_device", || {
        for played in cards() {
            for element in Element::ALL {
                let case = Case::mixed(element, WeightFormat::Float(element), Epilogue::default());
                compare(&played, &case, &plans(&played));
            }
        }
    });
}

#[test]
fn quantised_weights_and_epilogues_give_them_too() {
    on_cards("quantised_weights_and_epilogues_give_them_too", || {
        let epilogue = Epilogue { bias: true, activation: Activation::Silu, residual: true };
        // Lowerings of all steps: the epilogue's own, and the fused one's.
        let plans: Vec<_> = Plan::unmerged().step_by(4).collect();
        for played in cards().into_iter().rev().take(1) {
            for (element, weight) in [(Element::F16, WeightFormat::Q4_K), (Element::F32, WeightFormat::Q8_0)] {
                compare(&played, &Case::mixed(element, weight, epilogue), &plans);
            }
        }
    });
}

/// The batches of a graph: the same segments by one half of the adapters or by the other one.
fn halves() -> [Case; 2] {
    let adapters = vec![AdapterSlots::base(), scaled(0, 3), scaled(3, 3), low_rank(6, 4), low_rank(10, 4)];
    let shape = LayerShape { d: 72, k: 40 };
    let of = |first: u32, second: u32| {
        let segments = [(0, 2), (first, 9), (second, 1), (first, 1)];
        let format = (Element::F16, WeightFormat::Float(Element::F16));
        Case::new(shape, format, Epilogue::default(), adapters.clone(), &segments)
    };
    [of(1, 3), of(2, 4)]
}

#[test]
fn a_captured_graph_runs_other_adapters() {
    on_cards("a_captured_graph_runs_other_adapters", || {
        for played in cards() {
            use_card(&played.card);
            let card = Card::current().expect("the primary context is current");
            assert_eq!(card.ordinal(), played.card.ordinal());
            let cache = tempfile::tempdir().unwrap();
            let (kernels, [one, mut other]) = (played.kernels(cache.path()), halves());
            for plan in Plan::unmerged() {
                let operands = Operands::new(&card, &one);
                let mut launches = Launches::new(&kernels, one.list(&card, plan)).expect("they are loaded");
                let stream = OwnStream::new();
                let bound = operands.bind(&launches);
                stream.begin();
                // SAFETY: all of it lives until the graph is destroyed.
                unsafe { bound.launch(stream.stream()) }.expect("it is captured");
                let graph = stream.end();
                assert!(
                    one.on(&played.device, &plan) != other.on(&played.device, &plan),
                    "one can be told from the other"
                );
                for _ in 0..2 {
                    stream.replay(&graph);
                    assert!(operands.take_y() == one.on(&played.device, &plan), "{card:?} {plan:?}");
                }
                // SAFETY: the stream is alive, and the graph's work is over.
                let wrote = unsafe { launches.retable(one.list(&card, plan), stream.stream()) };
                assert!(!wrote.expect("the same batch"), "nothing is written for it");
                // SAFETY: as above.
                let wrote = unsafe { launches.retable(other.list(&card, plan), stream.stream()) };
                assert!(wrote.expect("the same launches"), "tables are written");
                stream.replay(&graph);
                assert!(operands.take_y() == other.on(&played.device, &plan), "{card:?} {plan:?}, other tables");
                // Other vectors in the same slots.
                let element = other.format.adapters;
                let ins: Vec<_> = numbers(other.ins.len(), 8).into_iter().map(|value| element.round(value)).collect();
                let was = std::mem::replace(&mut other.ins, ins);
                operands.write(Operand::InPool, &bytes(&other.ins, element));
                stream.replay(&graph);
                assert!(operands.take_y() == other.on(&played.device, &plan), "{card:?} {plan:?}, other vectors");
                other.ins = was;
            }
        }
    });
}

#[test]
fn kernels_are_compiled_once_for_all_processes() {
    on_cards("kernels_are_compiled_once_for_all_processes", || {
        let played = cards().remove(0);
        let cache = tempfile::tempdir().unwrap();
        let ([case, _], plan) = (halves(), Plan::default());
        let expected = case.on(&played.device, &plan);
        let compiled = || {
            let (kernels, operands) = (played.kernels(cache.path()), Operands::new(&played.card, &case));
            let list = case.list(&played.card, plan);
            let launches = Launches::new(&kernels, list.clone()).expect("they are loaded");
            launch(&operands.bind(&launches));
            assert!(operands.take_y() == expected);
            Launches::new(&kernels, list).expect("they are loaded");
            kernels.compiled()
        };
        let first = compiled();
        assert!(first > 0);
        assert_eq!(compiled(), 0, "what is on disk isn't compiled");
        for file in cache.path().read_dir().unwrap().map(|file| file.unwrap().path()).filter(|path| path.is_file()) {
            let mut code = fs::read(&file).unwrap();
            let middle = code.len() / 2;
            code[middle] ^= 1;
            fs::write(&file, code).unwrap();
        }
        assert_eq!(compiled(), first, "what is damaged is compiled again");
        assert_eq!(compiled(), 0);
    });
}

#[test]
fn contexts_stay_as_they_were() {
    on_cards("contexts_stay_as_they_were", || {
        assert!(Card::primary(0).is_ok());
        // A thread of its own has no context.
        std::thread::spawn(|| {
            let error = Card::current().expect_err("none is current");
            assert!(matches!(error, DriverError::NoContext), "{error}");
            let played = cards().remove(0);
            let cache = tempfile::tempdir().unwrap();
            let ([case, _], kernels) = (halves(), played.kernels(cache.path()));
            let operands = Operands::new(&played.card, &case);
            let launches = Launches::new(&kernels, case.list(&played.card, Plan::default())).expect("they are loaded");
            // To open a card's own device may make a context current.
            let before = Card::current().is_ok();
            assert!(!(before && played.is_emulated));
            launch(&operands.bind(&launches));
            assert!(operands.take_y().iter().any(|byte| *byte != 0xff));
            assert_eq!(Card::current().is_ok(), before);
        })
        .join()
        .expect("no assertion failed");
    });
}

/// Without the emulated driver this process has what the machine has.
#[test]
fn a_machine_without_a_driver_is_told() {
    match Card::primary(0) {
        Err(error @ DriverError::NoLibrary { .. }) => {
            assert!(error.to_string().contains("this machine has no card or no driver"), "{error}");
        }
        Err(DriverError::Call { .. } | DriverError::NoCard { .. }) | Ok(_) => {}
        Err(other) => panic!("{other}"),
    }
}
