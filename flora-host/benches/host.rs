//! Every lowering against the base GEMM of as many rows, and that against the `gemm` crate; `int8` is the base GEMM of x in 8 bits. The
//! runs of all cases take turns, so that whatever else the machine does falls on all of them; medians are printed.
//!
//! `cargo bench -p flora-host --bench host -- [rounds] [filter]`, where a filter is parts of names, with `|` between them.

use std::time::Instant;

use flora_host::{HostEngine, Operands, Values, ValuesMut, Weight};
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Element, Epilogue, LayerShape, WeightFormat};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Schedule, schedule};
use flora_plan::weight::PackedWeight;

const SHAPE: LayerShape = LayerShape { d: 2048, k: 2048 };
const SLOTS: usize = 1024;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Flora,
    Lora,
}

/// `segments` adapters of `rows` rows each.
struct Case {
    name: String,
    rows: usize,
    format: WeightFormat,
    /// Whether x is rounded to 8 bits.
    rounds: bool,
    schedule: Schedule,
}

impl Case {
    fn base(rows: usize, format: WeightFormat) -> Self {
        let schedule = Schedule::base_gemm(SHAPE, rows as u32).expect("it fits");
        Self { name: format!("base {format} {rows}"), rows, format, rounds: false, schedule }
    }

    fn rounded(rows: usize, format: WeightFormat) -> Self {
        Self { name: format!("int8 {format} {rows}"), rounds: true, ..Self::base(rows, format) }
    }

    /// `base_rows` of no adapter follow the segments.
    fn adapted(
        (kind, rank): (Kind, u32),
        (segments, rows): (u32, u32),
        base_rows: u32,
        (multiplicative, additive): (MultiplicativeLowering, AdditiveLowering),
    ) -> Self {
        let mut adapters = vec![AdapterSlots::base()];
        let mut batch = Vec::new();
        for segment in 0..segments {
            let first = segment * rank;
            let adapter = match kind {
                Kind::Lora => AdapterSlots {
                    low_rank: LowRankSlots { shrink: first, expand: first, rank },
                    ..AdapterSlots::base()
                },
                Kind::Flora => AdapterSlots {
                    virtual_rows: (first..first + rank)
                        .map(|slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) })
                        .collect(),
                    ..AdapterSlots::base()
                },
            };
            adapters.push(adapter);
            batch.push(Segment { rows, adapter: segment + 1 });
        }
        batch.push(Segment { rows: base_rows, adapter: 0 });
        let plan = Plan::new(multiplicative, additive);
        let schedule = schedule(&plan, SHAPE, &batch, &adapters, true).expect("it fits");
        let kind = match kind {
            Kind::Flora => format!("flora {multiplicative}"),
            Kind::Lora => format!("lora {additive}"),
        };
        let name = format!("{kind} r{rank} {segments}x{rows}+{base_rows}");
        let rows = (segments * rows + base_rows) as usize;
        Self { name, rows, format: WeightFormat::default(), rounds: false, schedule }
    }
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.f32() - 0.5).collect()
}

fn library(rows: usize, x: &[f32], weight: &[f32], y: &mut [f32]) {
    let (d, k) = (SHAPE.d as usize, SHAPE.k as usize);
    // SAFETY: the slices hold [rows, d], [d, k] and [rows, k].
    unsafe {
        gemm::gemm(
            rows,
            k,
            d,
            y.as_mut_ptr(),
            1,
            k as isize,
            false,
            x.as_ptr(),
            1,
            d as isize,
            weight.as_ptr(),
            1,
            k as isize,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let rounds: usize = arguments.next().and_then(|rounds| rounds.parse().ok()).unwrap_or(15);
    let filter = arguments.next().unwrap_or_default();
    let f32s = WeightFormat::default();
    let flora = (Kind::Flora, 16);
    let lora = (Kind::Lora, 16);
    let on_chip = (MultiplicativeLowering::OnChip, AdditiveLowering::Fused);
    let stacked = (MultiplicativeLowering::Stacked, AdditiveLowering::Fused);
    let cases: Vec<Case> = [1, 8, 16, 32, 64, 128, 256, 512]
        .map(|rows| Case::base(rows, f32s))
        .into_iter()
        .chain([
            Case::adapted(flora, (8, 32), 0, on_chip),
            Case::adapted(flora, (4, 128), 0, on_chip),
            Case::adapted((Kind::Flora, 4), (8, 32), 0, on_chip),
            Case::adapted(lora, (8, 32), 0, stacked),
            Case::adapted(lora, (4, 128), 0, stacked),
            Case::adapted(lora, (32, 1), 0, stacked),
            Case::adapted(lora, (8, 32), 0, (MultiplicativeLowering::Stacked, AdditiveLowering::Segmented)),
            Case::adapted((Kind::Flora, 4), (32, 1), 0, stacked),
            Case::adapted((Kind::Flora, 1), (32, 1), 0, stacked),
            Case::adapted((Kind::Flora, 1), (1, 1), 255, stacked),
            Case::adapted((Kind::Flora, 1), (1, 1), 31, stacked),
            Case::adapted(flora, (4, 128), 0, (MultiplicativeLowering::Bmm, AdditiveLowering::Fused)),
        ])
        .chain(
            WeightFormat::ALL
                .into_iter()
                .skip(1)
                .flat_map(|(_, format)| [1, 32, 256].map(|rows| Case::base(rows, format))),
        )
        .chain(
            WeightFormat::ALL
                .into_iter()
                .filter(|(_, format)| format.quantisation().is_some())
                .flat_map(|(_, format)| [1, 32, 256].map(|rows| Case::rounded(rows, format))),
        )
        .filter(|case| filter.split('|').any(|part| case.name.contains(part)))
        .collect();

    let (d, k) = (SHAPE.d as usize, SHAPE.k as usize);
    let most = cases.iter().map(|case| case.rows).max().unwrap_or(0);
    let (x, values) = (random(most * d, 1), random(d * k, 2));
    let (in_pool, out_pool) = (random(SLOTS * d, 3), random(SLOTS * k, 4));
    let packed = |(_, format)| PackedWeight::from_f32(format, SHAPE, &values).expect("whole blocks");
    let weights: Vec<_> = WeightFormat::ALL.map(|format| Weight::new(&packed(format))).into();
    let mut y = vec![0.0; most * k];
    let (engine, rounding) = (HostEngine::new(), HostEngine::new().rounding_activations());
    let mut run = |case: &Case| {
        let weight = weights.iter().find(|weight| weight.format() == case.format).expect("all formats are packed");
        let operands = Operands {
            weight,
            bias: None,
            in_pool: Values::F32(&in_pool),
            out_pool: Values::F32(&out_pool),
            epilogue: Epilogue::default(),
            merged: None,
        };
        let (x, y) = (Values::F32(&x[..case.rows * d]), &mut y[..case.rows * k]);
        let engine = if case.rounds { &rounding } else { &engine };
        let start = Instant::now();
        engine.execute(&operands, &case.schedule, x, ValuesMut::F32(y), None).expect("operands fit");
        start.elapsed().as_secs_f64()
    };
    let mut times = vec![Vec::new(); cases.len()];
    let mut peers = vec![Vec::new(); cases.len()];
    let mut peer_y = vec![0.0; most * k];
    for round in 0..=rounds {
        for (at, case) in cases.iter().enumerate() {
            let seconds = run(case);
            let is_base = case.name.starts_with("base f32");
            let start = Instant::now();
            if is_base {
                library(case.rows, &x[..case.rows * d], &values, &mut peer_y[..case.rows * k]);
            }
            // The first round warms up.
            if round > 0 {
                times[at].push(seconds);
                peers[at].push(start.elapsed().as_secs_f64());
            }
        }
    }
    let median = |times: &[f64]| {
        let mut times = times.to_vec();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    };
    let base_of = |rows: usize| {
        let at = cases.iter().position(|case| case.name == format!("base {} {rows}", Element::F32));
        at.map_or(f64::NAN, |at| median(&times[at]))
    };
    println!("{}, {} threads, d = k = {}", HostEngine::instruction_set(), rayon::current_num_threads(), SHAPE.d);
    let best = |times: &[f64]| times.iter().copied().fold(f64::NAN, f64::min);
    println!("{:<32} {:>9} {:>9} {:>9} {:>8} {:>10}", "case", "best ms", "ms", "GFLOP/s", "to base", "gemm crate");
    for (at, case) in cases.iter().enumerate() {
        let seconds = median(&times[at]);
        let rate = 2.0 * (case.rows * d * k) as f64 / seconds / 1e9;
        let peer = match case.name.starts_with("base f32") {
            true => format!("{:>10.2}", seconds / median(&peers[at])),
            false => String::new(),
        };
        let (ratio, best) = (seconds / base_of(case.rows), best(&times[at]) * 1e3);
        println!("{:<32} {best:>9.3} {:>9.3} {rate:>9.1} {ratio:>8.3} {peer}", case.name, seconds * 1e3);
    }
}
