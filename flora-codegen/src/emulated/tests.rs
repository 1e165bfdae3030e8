//! What a card would compute is computed, and what a card would get wrong only now and then is caught every time: under a sanitizer a
//! kernel without one of its barriers is a race, and an index one too far an error.

use std::process::Output;

use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::schedule::schedule;
use flora_plan::weight::PackedWeight;
use flora_runtime::{Device, LayerOperands, PoolBuffer};
use flora_toolchain::{CxxCompiler, Sanitizer};

/// What a child process changes in the text of every kernel for halves: `barrier N` takes out the N-th barrier, `index` writes one vector too far.
const BREAK: &str = "FLORA_TEST_BREAK";

const BARRIER: &str = "__syncthreads();";

/// The text as the variable asks for it, in processes that have it.
pub(super) fn broken(source: String) -> String {
    let Ok(change) = std::env::var(BREAK) else { return source };
    if !source.contains("x_f16") {
        return source;
    }
    match change.split_once(' ') {
        Some(("barrier", number)) => {
            let number: usize = number.parse().expect("a number");
            let place = source.match_indices(BARRIER).nth(number).map(|(at, _)| at);
            place.map_or(source.clone(), |at| format!("{}{}", &source[..at], &source[at + BARRIER.len()..]))
        }
        _ => {
            let writes = source.lines().map(|line| match line.split_once("] = ") {
                Some((place, value)) if line.starts_with("buffer_") => format!("{place} + uint32(1)] = {value}"),
                _ => line.to_owned(),
            });
            writes.collect::<Vec<_>>().join("\n")
        }
    }
}

/// Whether there is a compiler to run a test with; said aloud where there is none.
fn there_is_a_compiler() -> bool {
    let found = CxxCompiler::from_environment().expect("FLORA_CXX=required: GCC with its sanitizers");
    if found.is_none() {
        println!("NOT RUN: there is no C++ compiler with GCC's sanitizers");
    }
    found.is_some()
}

fn device(name: &str) -> Device {
    let id = format!("cuda-emulated:{name}");
    let found = super::found().into_iter().find(|found| found.info().id == id).expect("there is a C++ compiler");
    found.start().expect("it starts")
}

/// Numbers that no two neighbours share, small enough for halves.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 37 + seed * 11) % 23) as f32 / 16.0 - 0.625).collect()
}

/// A batch of base rows, scaled rows and rows with low-rank sums, of sizes that are multiples of nothing.
struct Case {
    element: Element,
    adapters: Vec<AdapterSlots>,
    segments: Vec<Segment>,
    /// Rounded to the type, as those below.
    w0: Vec<f32>,
    x: Vec<f32>,
    ins: Vec<f32>,
    outs: Vec<f32>,
}

impl Case {
    const SHAPE: LayerShape = LayerShape { d: 72, k: 40 };
    const SLOTS: u32 = 12;

    fn new(element: Element) -> Self {
        let (d, k, slots) = (Self::SHAPE.d as usize, Self::SHAPE.k as usize, Self::SLOTS as usize);
        let scaled = |first: u32, rows: u32| {
            let row = |slot: u32| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) };
            (first..first + rows).map(row).collect::<Vec<_>>()
        };
        let adapters = vec![
            AdapterSlots::base(),
            AdapterSlots { virtual_rows: scaled(0, 3), ..AdapterSlots::base() },
            AdapterSlots { low_rank: LowRankSlots { shrink: 3, expand: 3, rank: 5 }, ..AdapterSlots::base() },
            AdapterSlots {
                virtual_rows: scaled(8, 1),
                low_rank: LowRankSlots { shrink: 9, expand: 9, rank: 3 },
                is_merged: false,
            },
        ];
        let segments = [(0, 3), (1, 19), (2, 17), (3, 2), (1, 1)].map(|(adapter, rows)| Segment { rows, adapter });
        let tokens: usize = segments.iter().map(|segment| segment.rows as usize).sum();
        let round = |values: Vec<f32>| values.into_iter().map(|value| element.round(value)).collect::<Vec<_>>();
        let (w0, x) = (round(numbers(d * k, 1)), round(numbers(tokens * d, 2)));
        let (ins, outs) = (round(numbers(slots * d, 3)), round(numbers(slots * k, 4)));
        Self { element, adapters, segments: segments.to_vec(), w0, x, ins, outs }
    }

    /// y on a device.
    fn on(&self, device: &Device, plan: &Plan) -> Vec<f32> {
        let Self { element, adapters, segments, w0, x, ins, outs } = self;
        let shape = Self::SHAPE;
        let schedule = schedule(plan, shape, segments, adapters, false).expect("it is scheduled");
        let weight =
            PackedWeight::from_f32(WeightFormat::Float(*element), shape, w0).expect("as long as the shape says");
        let upload = |values: &[f32]| device.upload_as(values, *element).expect("it fits");
        let pools = (PoolBuffer::new(upload(ins), Self::SLOTS), PoolBuffer::new(upload(outs), Self::SLOTS));
        let weight = device.upload_weight(&weight).expect("it fits");
        let format = LayerFormat { fragments: *element != Element::F32, ..LayerFormat::uniform(*element) };
        let epilogue = Epilogue::default();
        let operands = LayerOperands::new(format, weight, None, pools, epilogue).expect("they fit");
        let y = device.execute(&operands, &schedule, &upload(x), None).expect("it runs");
        device.read(&y).expect("no launch failed")
    }

    /// The largest difference to what f64 makes of it.
    fn worst(&self, y: &[f32]) -> f64 {
        let Self { adapters, segments, w0, x, ins, outs, .. } = self;
        let (d, k) = (Self::SHAPE.d as usize, Self::SHAPE.k as usize);
        let mut worst = 0.0f64;
        let mut row = 0;
        for segment in segments {
            let adapter = &adapters[segment.adapter as usize];
            for _ in 0..segment.rows {
                let at = |values: &[f32], slot: Option<u32>, width: usize, place: usize| {
                    slot.map_or(1.0, |slot| f64::from(values[slot as usize * width + place]))
                };
                for column in 0..k {
                    let product = |slot: Option<u32>| {
                        let term =
                            |i: usize| at(ins, slot, d, i) * f64::from(x[row * d + i]) * f64::from(w0[i * k + column]);
                        (0..d).map(term).sum::<f64>()
                    };
                    let rows = adapter.virtual_rows.iter();
                    let mut expected: f64 =
                        rows.map(|row| at(outs, row.out_scale, k, column) * product(row.in_scale)).sum();
                    for rank in 0..adapter.low_rank.rank {
                        let shrink =
                            |i: usize| at(ins, Some(adapter.low_rank.shrink + rank), d, i) * f64::from(x[row * d + i]);
                        expected +=
                            (0..d).map(shrink).sum::<f64>() * at(outs, Some(adapter.low_rank.expand + rank), k, column);
                    }
                    worst = worst.max((f64::from(y[row * k + column]) - expected).abs());
                }
                row += 1;
            }
        }
        worst
    }
}

/// The largest sums are of some 30; a half has 11 bits, a bfloat16 8.
fn tolerance(element: Element) -> f64 {
    match element {
        Element::F32 => 1e-4,
        Element::F16 => 0.1,
        Element::Bf16 => 0.8,
    }
}

#[test]
fn every_lowering_is_right_on_every_card() {
    if !there_is_a_compiler() {
        return;
    }
    for name in ["sm_80", "sm_90", "sm_100"] {
        let device = device(name);
        for element in Element::ALL {
            let case = Case::new(element);
            for plan in Plan::unmerged() {
                let worst = case.worst(&case.on(&device, &plan));
                assert!(worst <= tolerance(element), "{name} {element} {plan:?}: {worst}");
            }
        }
    }
}

/// What a child process runs under a sanitizer; by itself one more test.
#[test]
fn batches_by_fragments() {
    if !there_is_a_compiler() {
        return;
    }
    println!("watched by {:?}", Sanitizer::of_process());
    let (device, case) = (device("sm_90"), Case::new(Element::F16));
    for plan in Plan::unmerged() {
        let worst = case.worst(&case.on(&device, &plan));
        // A broken kernel may be wrong here; whether it is caught is the sanitizer's matter.
        assert!(std::env::var(BREAK).is_ok() || worst <= tolerance(Element::F16), "{plan:?}: {worst}");
    }
}

/// [`batches_by_fragments`] in a process that `sanitizer` watches.
fn watched(sanitizer: Sanitizer, change: Option<&str>) -> Output {
    let program = std::env::current_exe().expect("this program's path");
    let mut command =
        CxxCompiler::find().and_then(|compiler| compiler.watched(sanitizer, &program)).expect("GCC's sanitizers");
    command.args(["--exact", "emulated::tests::batches_by_fragments", "--nocapture"]);
    command.envs(change.map(|change| (BREAK, change)));
    command.output().expect("this program starts")
}

fn words(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn sanitizers_find_nothing_in_whole_kernels() {
    if !there_is_a_compiler() {
        return;
    }
    for (_, sanitizer) in Sanitizer::ALL {
        let output = watched(sanitizer, None);
        assert!(output.status.success(), "{sanitizer}: {}", words(&output));
        assert!(words(&output).contains(&format!("watched by Some({sanitizer:?})")), "{}", words(&output));
    }
}

#[test]
fn a_barrier_taken_out_is_a_race() {
    if !there_is_a_compiler() {
        return;
    }
    let output = watched(Sanitizer::Thread, Some("barrier 2"));
    assert!(words(&output).contains("ThreadSanitizer: data race"), "{}", words(&output));
    assert!(!output.status.success());
}

#[test]
fn an_index_one_too_far_is_caught() {
    if !there_is_a_compiler() {
        return;
    }
    let output = watched(Sanitizer::Address, Some("index"));
    assert!(words(&output).contains("AddressSanitizer"), "{}", words(&output));
    assert!(!output.status.success());
}
