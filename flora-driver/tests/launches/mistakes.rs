//! What is wrong is an error that names it, before anything is launched.

use std::fs;

use flora_codegen::target::export::{LaunchList, Operand};
use flora_driver::{
    Card, DeviceMemory, DriverError, Includes, KernelCache, Kernels, Launches, OperandProblem, OwnedMemory, Stream,
};
use flora_plan::plan::Plan;

use crate::case::Operands;
use crate::halves;
use crate::played::{Played, cards, on_cards};
use crate::streams::{OwnStream, use_card};

/// What binding says of operands of which one is changed.
fn refused(launches: &Launches, operands: &Operands, wrong: Operand, memory: DeviceMemory) -> OperandProblem {
    let changed = operands.memory().into_iter().map(|(own, was)| (own, if own == wrong { memory } else { was }));
    match launches.bind(&changed.collect::<Vec<_>>()) {
        Err(DriverError::Operand { operand, problem }) if operand == wrong => problem,
        other => panic!("{wrong:?}: {other:?}"),
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    on_cards("mistakes::operands_that_do_not_fit_are_refused", || {
        let played = cards().remove(0);
        let cache = tempfile::tempdir().unwrap();
        let ([case, _], kernels) = (halves(), played.kernels(cache.path()));
        let operands = Operands::new(&played.card, &case);
        let launches = Launches::new(&kernels, case.list(&played.card, Plan::default())).expect("they are loaded");
        let all = operands.memory();
        let of = |wanted: Operand| all.iter().find(|(operand, _)| *operand == wanted).expect("an operand").1;
        let x = of(Operand::X);

        let without: Vec<_> = all.iter().copied().filter(|(operand, _)| *operand != Operand::X).collect();
        let error = launches.bind(&without).expect_err("x is missing").to_string();
        assert_eq!(error, format!("the operand X is missing; the launches take {} bytes", x.bytes));
        let twice = [&all[..], &[(Operand::X, x)]].concat();
        let error = launches.bind(&twice).expect_err("x comes twice");
        assert!(matches!(error, DriverError::Operand { problem: OperandProblem::Twice, .. }), "{error}");

        let with = |memory| refused(&launches, &operands, Operand::X, memory);
        assert_eq!(with(DeviceMemory { address: 0, ..x }), OperandProblem::Null);
        let short = DeviceMemory { bytes: x.bytes - 1, ..x };
        assert_eq!(with(short), OperandProblem::Short { needed: x.bytes, found: x.bytes - 1 });
        assert!(matches!(with(DeviceMemory { address: x.address + 2, ..x }), OperandProblem::Misaligned { .. }));
        let host = vec![0u64; 1 << 16];
        let address = (host.as_ptr().expose_provenance() as u64).next_multiple_of(256);
        assert!(matches!(with(DeviceMemory { address, ..x }), OperandProblem::Elsewhere { .. }));
        // Said to be long enough, and too short in truth.
        let brief = OwnedMemory::new(&played.card, x.bytes / 2).expect("memory");
        let beyond = DeviceMemory { bytes: x.bytes, ..brief.memory() };
        if played.is_emulated {
            assert!(matches!(with(beyond), OperandProblem::Elsewhere { .. }));
        }
        assert!(matches!(with(DeviceMemory { bytes: u64::MAX, ..x }), OperandProblem::Elsewhere { .. }));
        let over = refused(&launches, &operands, Operand::Y, of(Operand::InPool));
        assert_eq!(over, OperandProblem::Overlap(Operand::InPool));
    });
}

/// Every first word of a failure for lists, memory and kernels that can't be used.
#[test]
fn lists_and_kernels_that_cannot_run_are_refused() {
    on_cards("mistakes::lists_and_kernels_that_cannot_run_are_refused", || {
        let played = cards().remove(0);
        let scratch = tempfile::tempdir().unwrap();
        let ([case, _], kernels) = (halves(), played.kernels(scratch.path()));
        let list = case.list(&played.card, Plan::default());
        let said = |list: LaunchList| Launches::new(&kernels, list).expect_err("it is wrong").to_string();
        let changed = |change: fn(&mut LaunchList)| {
            let mut list = list.clone();
            change(&mut list);
            said(list)
        };
        let of = |kernels: &Kernels| Launches::new(kernels, list.clone()).expect_err("it can't be loaded").to_string();

        let error = changed(|list| list.launches[0].kernel = 99);
        assert!(error.starts_with("the list of launches can't be made: launch 0 is of kernel 99"), "{error}");
        let error = changed(|list| list.kernels[0].dynamic_shared_bytes = 1 << 20);
        assert!(error.contains("takes 1048576 bytes of shared memory and a block of this card has"), "{error}");
        let error = changed(|list| list.kernels[0].source = "int broken(".to_owned());
        assert!(error.contains("NVRTC doesn't compile"), "{error}");
        let error = changed(|list| list.kernels[0].name = "another".to_owned());
        assert!(error.starts_with("cuModuleGetFunction fails for the kernel `another`"), "{error}");

        let nowhere = Kernels::new(played.card.clone(), KernelCache::at(scratch.path().join("b")), Includes::default());
        assert!(of(&nowhere).starts_with("CUDA's headers are not in any folder that is known"), "{}", of(&nowhere));
        let file = scratch.path().join("file");
        fs::write(&file, "").unwrap();
        let includes = played.includes(scratch.path());
        let blocked = Kernels::new(played.card.clone(), KernelCache::at(file.join("c")), includes);
        assert!(of(&blocked).starts_with("compiled kernels can't be kept in"), "{}", of(&blocked));

        let bytes = Launches::bytes(&list).unwrap();
        let own = OwnedMemory::new(&played.card, bytes).expect("memory");
        for (memory, problem) in [
            (DeviceMemory { bytes: bytes - 1, ..own.memory() }, "has"),
            (DeviceMemory { address: 512, bytes }, "is"),
            (DeviceMemory { address: own.memory().address + 4, bytes }, "is at"),
        ] {
            // SAFETY: it is refused.
            let error = unsafe { Launches::in_memory(&kernels, list.clone(), memory) }.expect_err("wrong memory");
            assert!(error.to_string().starts_with(&format!("the memory for tables and scratch {problem}")), "{error}");
        }
        let error = Card::primary(77).expect_err("there are not so many").to_string();
        assert!(error.starts_with("there is no CUDA card 77; the driver lists"), "{error}");
        let error = OwnedMemory::new(&played.card, 1 << 60).expect_err("too much").to_string();
        assert!(error.contains("CUDA_ERROR_OUT_OF_MEMORY; free memory of the card"), "{error}");
    });
}

fn capturing(played: &Played) {
    use_card(&played.card);
    let cache = tempfile::tempdir().unwrap();
    let ([one, other], kernels, plan) = (halves(), played.kernels(cache.path()), Plan::default());
    let operands = Operands::new(&played.card, &one);
    let (list, next) = (one.list(&played.card, plan), other.list(&played.card, plan));
    let memory = OwnedMemory::new(&played.card, Launches::bytes(&list).unwrap()).expect("memory");
    // SAFETY: the memory is nobody else's and lives to the end.
    let mut launches = unsafe { Launches::in_memory(&kernels, list, memory.memory()) }.expect("they are loaded");
    let stream = OwnStream::new();
    stream.begin();
    // SAFETY: the stream is alive, as below.
    let error = unsafe { launches.retable(next.clone(), stream.stream()) }.expect_err("it is captured");
    assert!(matches!(error, DriverError::Capturing), "{error}");
    // SAFETY: operands live to the end.
    unsafe { operands.bind(&launches).launch(stream.stream()) }.expect("the capture goes on");
    let graph = stream.end();
    stream.replay(&graph);
    assert!(operands.take_y() == one.on(&played.device, &plan));

    let mut longer = other.clone();
    longer.segments[1].rows += 40;
    // SAFETY: as above.
    let error = unsafe { launches.retable(longer.list(&played.card, plan), stream.stream()) }.expect_err("others");
    assert!(error.to_string().starts_with("the batch has other launches than this one:"), "{error}");
    // SAFETY: as above.
    let wrote = unsafe { launches.retable(next, stream.stream()) };
    assert!(wrote.expect("what was refused has changed nothing"));
}

#[test]
fn tables_are_not_written_into_a_capture() {
    on_cards("mistakes::tables_are_not_written_into_a_capture", || capturing(&cards().remove(0)));
}

#[test]
fn streams_of_another_card_are_refused() {
    on_cards("mistakes::streams_of_another_card_are_refused", || {
        let all = cards();
        let [first, second, ..] = &all[..] else {
            println!("NOT RUN: there is one card");
            return;
        };
        let cache = tempfile::tempdir().unwrap();
        let ([case, _], kernels) = (halves(), first.kernels(cache.path()));
        let operands = Operands::new(&first.card, &case);
        let list = case.list(&first.card, Plan::default());
        let mut launches = Launches::new(&kernels, list.clone()).expect("they are loaded");
        use_card(&second.card);
        let stream = OwnStream::new();
        // SAFETY: it is refused.
        let error = unsafe { operands.bind(&launches).launch(stream.stream()) }.expect_err("another card's");
        assert!(matches!(error, DriverError::ForeignStream { ordinal: 0 }), "{error}");
        // SAFETY: as above.
        let error = unsafe { launches.retable(list, stream.stream()) }.expect_err("another card's");
        assert!(matches!(error, DriverError::ForeignStream { .. }), "{error}");
        // A card's driver believes a handle; the emulated one looks it up.
        // SAFETY: as above.
        let error = unsafe { operands.bind(&launches).launch(Stream(0x1234)) }.expect_err("no stream").to_string();
        assert!(error.contains("cuStreamGetCtx fails for the stream 0x1234: CUDA_ERROR_INVALID_HANDLE"), "{error}");
        // Memory of the other card isn't this one's.
        let foreign = OwnedMemory::new(&second.card, 1 << 16).expect("memory").memory();
        let problem = refused(&launches, &operands, Operand::X, foreign);
        assert!(matches!(problem, OperandProblem::Elsewhere { .. }), "{problem}");
        // Machine code is for its card alone.
        let others = Kernels::new(second.card.clone(), KernelCache::at(cache.path()), first.includes(cache.path()));
        assert!(Launches::new(&others, case.list(&second.card, Plan::default())).is_ok());
        assert!(others.compiled() > 0);
    });
}
