//! The backward pass beside the forward pass's base GEMM of as many rows: dx, and the gradients of adapters' vectors. The runs of all
//! cases take turns, so that whatever else the machine does falls on all of them; medians are printed.
//!
//! `cargo bench -p flora-host --bench backward -- [rounds] [filter]`, where a filter is parts of names, with `|` between them.

use std::time::Instant;

use flora_host::{GradientsMut, HostEngine, Operands, Values, ValuesMut, Weight};
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Element, Epilogue, LayerShape, WeightFormat};
use flora_plan::lowering::{AdditiveLowering, MultiplicativeLowering};
use flora_plan::plan::Plan;
use flora_plan::schedule::{BackwardSchedule, Schedule, backward_schedule, schedule};
use flora_plan::weight::PackedWeight;

const SLOTS: usize = 8 * 16;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Base,
    Ia3,
    Lora,
    Flora,
}

/// What of a case is timed.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    /// The forward pass of base rows.
    Gemm,
    Forward,
    Input,
    Vectors,
}

struct Case {
    name: String,
    layer: usize,
    rows: usize,
    part: Part,
    forward: Schedule,
    backward: BackwardSchedule,
}

impl Case {
    fn new(layer: usize, shape: LayerShape, (kind, rank): (Kind, u32), segments: u32, part: Part, name: &str) -> Self {
        let adapter = |segment: u32| {
            let first = segment * rank;
            let scaled = |slot| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) };
            let low_rank = LowRankSlots { shrink: first, expand: first, rank };
            let out_scale = VirtualRowSlots { in_scale: None, out_scale: Some(first) };
            match kind {
                Kind::Base => AdapterSlots::base(),
                Kind::Ia3 => AdapterSlots { virtual_rows: vec![out_scale], ..AdapterSlots::base() },
                Kind::Lora => AdapterSlots { low_rank, ..AdapterSlots::base() },
                Kind::Flora => {
                    AdapterSlots { virtual_rows: (first..first + rank).map(scaled).collect(), ..AdapterSlots::base() }
                }
            }
        };
        let adapters: Vec<_> = (0..segments).map(adapter).collect();
        let batch: Vec<_> = (0..segments).map(|adapter| Segment { rows: 128, adapter }).collect();
        let plan = Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(4);
        let part_name = match part {
            Part::Gemm => "gemm",
            Part::Forward => "forward",
            Part::Input => "dx",
            Part::Vectors => "vectors",
        };
        let kind = match kind {
            Kind::Base => "base".to_owned(),
            Kind::Ia3 => "ia3".to_owned(),
            Kind::Lora => format!("lora r{rank}"),
            Kind::Flora => format!("flora r{rank}"),
        };
        Self {
            name: format!("{name} {segments}x128 {kind} {part_name}"),
            layer,
            rows: segments as usize * 128,
            part,
            forward: schedule(&plan, shape, &batch, &adapters, false).expect("it fits"),
            backward: backward_schedule(&plan, shape, &batch, &adapters).expect("it fits"),
        }
    }
}

/// A weight with what its batches need.
struct Layer {
    shape: LayerShape,
    weight: Weight,
    in_pool: Vec<f32>,
    out_pool: Vec<f32>,
    x: Vec<f32>,
    g: Vec<f32>,
}

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.f32() - 0.5).collect()
}

impl Layer {
    fn new(shape: LayerShape, format: WeightFormat) -> Self {
        let (d, k) = (shape.d as usize, shape.k as usize);
        let weight = PackedWeight::from_f32(format, shape, &random(d * k, 1)).expect("whole blocks");
        let rows = 8 * 128;
        Self {
            shape,
            weight: Weight::new(&weight),
            in_pool: random(SLOTS * d, 2),
            out_pool: random(SLOTS * k, 3),
            x: random(rows * d, 4),
            g: random(rows * k, 5),
        }
    }

    fn run(&self, engine: &HostEngine, case: &Case, [out, ins, outs]: &mut [Vec<f32>; 3]) -> f64 {
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        let operands = Operands {
            weight: &self.weight,
            bias: None,
            in_pool: Values::F32(&self.in_pool),
            out_pool: Values::F32(&self.out_pool),
            epilogue: Epilogue::default(),
            merged: None,
        };
        let (x, g) = (Values::F32(&self.x[..case.rows * d]), Values::F32(&self.g[..case.rows * k]));
        let schedule = &case.backward;
        let start = Instant::now();
        match case.part {
            Part::Gemm | Part::Forward => {
                let y = ValuesMut::F32(&mut out[..case.rows * k]);
                engine.execute(&operands, &case.forward, x, y, None).expect("operands fit");
            }
            Part::Input => {
                let input = Some(ValuesMut::F32(&mut out[..case.rows * d]));
                let gradients = GradientsMut { input, vectors: None };
                engine.backward(&operands, schedule, x, g, gradients).expect("operands fit");
            }
            Part::Vectors => {
                let ins = &mut ins[..schedule.in_vectors() as usize * d];
                let outs = &mut outs[..schedule.out_vectors() as usize * k];
                let gradients = GradientsMut { input: None, vectors: Some([ins, outs]) };
                engine.backward(&operands, schedule, x, g, gradients).expect("operands fit");
            }
        }
        start.elapsed().as_secs_f64()
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    let rounds: usize = arguments.next().and_then(|rounds| rounds.parse().ok()).unwrap_or(15);
    let filter = arguments.next().unwrap_or_default();
    let formats =
        [WeightFormat::Float(Element::F32), WeightFormat::Q8_0, WeightFormat::Q4_K, WeightFormat::Float(Element::Bf16)];
    let shapes = [(576, 576), (576, 1536), (2048, 2048)].map(|(d, k)| LayerShape { d, k });
    let (mut layers, mut cases) = (Vec::new(), Vec::new());
    for shape in shapes {
        for format in formats.into_iter().filter(|format| format.fits(shape)) {
            let name = format!("{}x{} {format}", shape.d, shape.k);
            for segments in [1, 8] {
                let mut case = |kind, part| cases.push(Case::new(layers.len(), shape, kind, segments, part, &name));
                case((Kind::Base, 1), Part::Gemm);
                case((Kind::Base, 1), Part::Input);
                for kind in [(Kind::Ia3, 1), (Kind::Lora, 16), (Kind::Flora, 4), (Kind::Flora, 16)] {
                    [Part::Forward, Part::Input, Part::Vectors].into_iter().for_each(|part| case(kind, part));
                }
            }
            layers.push(Layer::new(shape, format));
        }
    }
    cases.retain(|case| filter.split('|').any(|part| case.name.contains(part)));
    let most = layers.iter().map(|layer| layer.shape.d.max(layer.shape.k) as usize).max().unwrap_or(0);
    let mut memory = [8 * 128, SLOTS, SLOTS].map(|rows| vec![0.0; rows * most]);
    let engine = HostEngine::new();
    let mut times = vec![Vec::new(); cases.len()];
    for round in 0..=rounds {
        for (times, case) in times.iter_mut().zip(&cases) {
            let seconds = layers[case.layer].run(&engine, case, &mut memory);
            // The first round warms up.
            if round > 0 {
                times.push(seconds);
            }
        }
    }
    let median = |times: &[f64]| {
        let mut times = times.to_vec();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    };
    println!("{}, {} threads", HostEngine::instruction_set(), rayon::current_num_threads());
    println!("{:<40} {:>9} {:>9} {:>8}", "case", "best ms", "ms", "to gemm");
    for (own, case) in times.iter().zip(&cases) {
        let base = cases
            .iter()
            .position(|other| (other.layer, other.rows, other.part == Part::Gemm) == (case.layer, case.rows, true));
        let base = base.map_or(f64::NAN, |at| median(&times[at]));
        let (seconds, best) = (median(own), own.iter().copied().fold(f64::NAN, f64::min));
        println!("{:<40} {:>9.3} {:>9.3} {:>8.3}", case.name, best * 1e3, seconds * 1e3, seconds / base);
    }
}
