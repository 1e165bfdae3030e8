//! Random layers and batches, and what they should give.

use flora_host::{HostEngine, NOT_REPLACED, Operands, Replaced, Rows, RowsMut, Values, ValuesMut, Weight};
use flora_ir::Activation;
use flora_ir::evaluate::apply_activation;
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::schedule::{Materialised, schedule};
use flora_plan::weight::PackedWeight;
use half::{bf16, f16};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, RngSeed};

/// `cases` cases from a fixed seed, so that every run tests the same ones.
pub(crate) fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(0x686f_7374),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Numbers in their own type.
#[derive(Clone, Debug)]
pub(crate) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Numbers {
    pub(crate) fn new(element: Element, values: &[f32]) -> Self {
        match element {
            Element::F32 => Numbers::F32(values.to_vec()),
            Element::F16 => Numbers::F16(values.iter().map(|value| f16::from_f32(*value)).collect()),
            Element::Bf16 => Numbers::Bf16(values.iter().map(|value| bf16::from_f32(*value)).collect()),
        }
    }

    pub(crate) fn values(&self) -> Values<'_> {
        match self {
            Numbers::F32(values) => Values::F32(values),
            Numbers::F16(values) => Values::F16(values),
            Numbers::Bf16(values) => Values::Bf16(values),
        }
    }

    pub(crate) fn values_mut(&mut self) -> ValuesMut<'_> {
        match self {
            Numbers::F32(values) => ValuesMut::F32(values),
            Numbers::F16(values) => ValuesMut::F16(values),
            Numbers::Bf16(values) => ValuesMut::Bf16(values),
        }
    }

    pub(crate) fn widened(&self) -> Vec<f32> {
        match self {
            Numbers::F32(values) => values.clone(),
            Numbers::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
            Numbers::Bf16(values) => values.iter().map(|value| value.to_f32()).collect(),
        }
    }

    pub(crate) fn bits(&self) -> Vec<u32> {
        self.widened().iter().map(|value| value.to_bits()).collect()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Problem {
    pub(crate) shape: LayerShape,
    pub(crate) format: LayerFormat,
    pub(crate) epilogue: Epilogue,
    pub(crate) weight: PackedWeight,
    pub(crate) bias: Vec<f32>,
    pub(crate) adapters: Vec<AdapterSlots>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) in_pool: Vec<f32>,
    pub(crate) out_pool: Vec<f32>,
    pub(crate) x: Vec<f32>,
    pub(crate) residual: Vec<f32>,
}

pub(crate) fn random_values(len: usize, random: &mut fastrand::Rng) -> Vec<f32> {
    (0..len).map(|_| random.f32() * 2.0 - 1.0).collect()
}

impl Problem {
    /// A layer of this shape and adapters of every kind, in a batch of short and long segments.
    pub(crate) fn new(shape: LayerShape, format: LayerFormat, epilogue: Epilogue, seed: u64) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let (d, k) = (shape.d as usize, shape.k as usize);
        let (mut in_slots, mut out_slots) = (0, 0);
        let adapters: Vec<_> =
            (0..8).map(|kind| adapter(kind, random.u32(1..20), &mut in_slots, &mut out_slots)).collect();
        let segments: Vec<_> = (0..random.usize(1..9))
            .map(|_| Segment {
                rows: if random.bool() { random.u32(0..3) } else { random.u32(1..40) },
                adapter: random.u32(0..adapters.len() as u32),
            })
            .collect();
        let tokens = segments.iter().map(|segment| segment.rows as usize).sum::<usize>();
        let weight = random_values(d * k, &mut random);
        Self {
            shape,
            format,
            epilogue,
            weight: PackedWeight::from_f32(format.weight, shape, &weight).unwrap(),
            bias: random_values(k, &mut random),
            adapters,
            segments,
            in_pool: random_values(in_slots as usize * d, &mut random),
            out_pool: random_values(out_slots as usize * k, &mut random),
            x: random_values(tokens * d, &mut random),
            residual: random_values(tokens * k, &mut random),
        }
    }

    pub(crate) fn tokens(&self) -> usize {
        self.segments.iter().map(|segment| segment.rows as usize).sum()
    }

    /// The same with the weight of one of its adapters resident.
    pub(crate) fn merged(&self, own: usize) -> Self {
        let adapters = self.adapters.iter().enumerate();
        let adapters = adapters.map(|(at, adapter)| AdapterSlots { is_merged: at == own, ..adapter.clone() });
        Self { adapters: adapters.collect(), ..self.clone() }
    }

    /// Whose weight a plan has resident.
    pub(crate) fn resident(&self, plan: &Plan) -> Option<usize> {
        self.adapters.iter().position(|adapter| adapter.is_merged).filter(|_| plan.merges())
    }

    /// The adapters that have rows.
    pub(crate) fn present(&self) -> impl Iterator<Item = usize> {
        (0..self.adapters.len())
            .filter(|own| self.segments.iter().any(|segment| segment.rows > 0 && segment.adapter as usize == *own))
    }

    /// One of the adapters alone.
    pub(crate) fn recipe(&self, adapter: usize) -> Materialised {
        Materialised::weight_of(&self.adapters[adapter])
    }

    /// What the engine makes of it.
    pub(crate) fn run(&self, engine: &HostEngine, plan: &Plan) -> Numbers {
        self.run_apart(engine, plan, [0, 0], false)
    }

    /// The same with every other row beside x, in reverse; in x they are NaN.
    pub(crate) fn run_replaced(&self, engine: &HostEngine, plan: &Plan) -> Numbers {
        self.run_apart(engine, plan, [3, 0], true)
    }

    /// The same with gaps of so many numbers between the rows of x and of y, whose numbers neither count nor change.
    pub(crate) fn run_apart(&self, engine: &HostEngine, plan: &Plan, gaps: [usize; 2], replaces: bool) -> Numbers {
        const KEPT: f32 = 7.0;
        let format = self.format;
        let (tokens, d, k) = (self.tokens(), self.shape.d as usize, self.shape.k as usize);
        let [x_pitch, y_pitch] = [d + gaps[0], k + gaps[1]];
        let finishes = !self.epilogue.is_identity();
        let schedule = schedule(plan, self.shape, &self.segments, &self.adapters, finishes).unwrap();
        let numbers = |values: &[f32], element| Numbers::new(element, values);
        let residual = numbers(&self.residual, format.activations);
        let is_beside = |row: usize| replaces && row % 2 == 1;
        let mut beside: Vec<_> = (0..tokens).filter(|row| is_beside(*row)).collect();
        beside.reverse();
        let own = numbers(&self.x, format.activations).widened();
        let replacing: Vec<_> = beside.iter().flat_map(|row| &own[row * d..(row + 1) * d]).copied().collect();
        let place = |row: usize| beside.iter().position(|other| *other == row).map_or(NOT_REPLACED, |at| at as u32);
        let places: Vec<_> = (0..tokens).map(place).collect();
        let replaced = replaces.then_some(Replaced { places: &places, values: &replacing });
        let missing = [vec![f32::NAN; d], vec![f32::NAN; gaps[0]]];
        let rows = self.x.chunks_exact(d).enumerate();
        let rows = rows.map(|(at, row)| [if is_beside(at) { &missing[0] } else { row }, &missing[1]].concat());
        let x: Vec<_> = rows.flatten().collect();
        let x = numbers(&x[..x.len() - if tokens == 0 { 0 } else { gaps[0] }], format.activations);
        let (in_pool, out_pool) = (numbers(&self.in_pool, format.adapters), numbers(&self.out_pool, format.adapters));
        let weight = Weight::new(&self.weight);
        let operands = Operands {
            weight: &weight,
            bias: Some(&self.bias),
            in_pool: in_pool.values(),
            out_pool: out_pool.values(),
            epilogue: self.epilogue,
            merged: None,
        };
        let merged = self.resident(plan).map(|own| engine.materialise(&operands, &self.recipe(own), 0).unwrap());
        let operands = Operands { merged: merged.as_ref(), ..operands };
        // What was there before must not matter.
        let row = [vec![f32::NAN; k], vec![KEPT; gaps[1]]].concat();
        let places = tokens * y_pitch - if tokens == 0 { 0 } else { gaps[1] };
        let mut y = numbers(&row.repeat(tokens)[..places], format.activations);
        let (from, to) =
            (Rows { values: x.values(), pitch: x_pitch }, RowsMut { values: y.values_mut(), pitch: y_pitch });
        engine.execute_replaced(&operands, &schedule, (from, replaced), to, Some(residual.values())).unwrap();
        let found = y.widened();
        assert!(found.chunks(y_pitch).all(|row| row[k..].iter().all(|kept| *kept == KEPT)), "{plan}");
        let dense: Vec<_> = found.chunks(y_pitch).flat_map(|row| &row[..k]).copied().collect();
        numbers(&dense, format.activations)
    }

    /// Every output in f64, and its products' magnitudes.
    pub(crate) fn oracle(&self) -> Vec<(f64, Magnitudes)> {
        self.oracle_of(|_, _| None)
    }

    /// The same with other inputs of the base weight in place of those of an adapter's virtual row, in f32, if there are.
    pub(crate) fn oracle_of(
        &self,
        replaced: impl Fn(&AdapterSlots, &[f32]) -> Option<Vec<f32>>,
    ) -> Vec<(f64, Magnitudes)> {
        let (d, k) = (self.shape.d as usize, self.shape.k as usize);
        let widen = |values: &[f32], element| -> Vec<f64> {
            Numbers::new(element, values).widened().into_iter().map(f64::from).collect()
        };
        let (x, residual) = (widen(&self.x, self.format.activations), widen(&self.residual, self.format.activations));
        let in_pool = widen(&self.in_pool, self.format.adapters);
        let out_pool = widen(&self.out_pool, self.format.adapters);
        let weight: Vec<f64> = self.weight.to_f32().into_iter().map(f64::from).collect();
        let at = |pool: &[f64], slot: Option<u32>, position: usize, width: usize| {
            slot.map_or(1.0, |slot| pool[slot as usize * width + position])
        };
        let owners = self.segments.iter().flat_map(|segment| (0..segment.rows).map(|_| segment.adapter as usize));
        let mut outputs = Vec::new();
        for (row, owner) in owners.enumerate() {
            let (adapter, x) = (&self.adapters[owner], &x[row * d..(row + 1) * d]);
            let low_rank = adapter.low_rank;
            let inputs = |scales: &VirtualRowSlots| -> Vec<f64> {
                let scaled = x.iter().enumerate().map(|(depth, x)| at(&in_pool, scales.in_scale, depth, d) * x);
                let exact: Vec<f64> = scaled.collect();
                let rounded: Vec<f32> = exact.iter().map(|value| *value as f32).collect();
                replaced(adapter, &rounded).map_or(exact, |own| own.into_iter().map(f64::from).collect())
            };
            let virtual_inputs: Vec<_> = adapter.virtual_rows.iter().map(inputs).collect();
            for column in 0..k {
                let (mut sum, mut magnitudes) = (0.0, Magnitudes::default());
                for (scales, inputs) in adapter.virtual_rows.iter().zip(&virtual_inputs) {
                    let out = at(&out_pool, scales.out_scale, column, k);
                    for (depth, input) in inputs.iter().enumerate() {
                        let value = out * input * weight[depth * k + column];
                        sum += value;
                        magnitudes.add(value);
                    }
                }
                for rank in 0..low_rank.rank {
                    let out = at(&out_pool, Some(low_rank.expand + rank), column, k);
                    for (depth, x) in x.iter().enumerate() {
                        let value = out * at(&in_pool, Some(low_rank.shrink + rank), depth, d) * x;
                        sum += value;
                        magnitudes.add(value);
                    }
                }
                if self.epilogue.bias {
                    let bias = f64::from(self.bias[column]);
                    sum += bias;
                    magnitudes.add(bias);
                }
                sum = apply_activation(self.epilogue.activation, sum);
                if self.epilogue.residual {
                    let residual = residual[row * k + column];
                    sum += residual;
                    magnitudes.add(residual);
                }
                outputs.push((sum, magnitudes));
            }
        }
        outputs
    }

    /// Asserts that outputs are the oracle's but for rounding: a sum of n products errs by u·√n of their magnitudes at one
    /// standard deviation, of which four are allowed, and by half a unit in the last place of the type that it is stored in. Where both x
    /// and the weight are bf16, what scales make of one of them may be rounded to bf16 before it is multiplied.
    pub(crate) fn assert_right(&self, y: &Numbers, what: &str) {
        self.assert_as(y, &self.oracle(), |_| 0.0, what);
    }

    /// The same of an oracle of the caller's, from which so much more than rounding may separate output `[row, column]`.
    pub(crate) fn assert_as(&self, y: &Numbers, oracle: &[(f64, Magnitudes)], more: impl Fn(usize) -> f64, what: &str) {
        let k = self.shape.k as usize;
        let owners = self.segments.iter().flat_map(|segment| (0..segment.rows).map(|_| segment.adapter as usize));
        let (y, element) = (y.widened(), self.format.activations);
        let stored = if element == Element::F32 { 0.0 } else { element.rounding() };
        let in_pairs = element == Element::Bf16 && self.format.weight == WeightFormat::Float(Element::Bf16);
        for (row, owner) in owners.enumerate() {
            let adapter = &self.adapters[owner];
            let roundings = self.shape.d as usize + adapter.virtual_rows.len() + adapter.low_rank.rank as usize + 8;
            let unit = f64::from(f32::EPSILON) / 2.0 * (roundings as f64).sqrt();
            let has_scales = |row: &VirtualRowSlots| row.in_scale.is_some() || row.out_scale.is_some();
            let scaled = if in_pairs && adapter.virtual_rows.iter().any(has_scales) { stored } else { 0.0 };
            for column in 0..k {
                let ((right, magnitudes), found) = (oracle[row * k + column], f64::from(y[row * k + column]));
                let error = (found - right).abs();
                // f16 has a least number too.
                let allowed = 4.0 * (unit * magnitudes.sum + scaled * magnitudes.squares.sqrt())
                    + 1.001 * stored * right.abs()
                    + if stored > 0.0 { 3e-8 } else { 0.0 }
                    + more(row * k + column);
                assert!(
                    error <= allowed,
                    "{what}: row {row} of adapter {owner}, column {column}: {found} not {right}, {error} > {allowed}"
                );
            }
        }
    }
}

/// How large the products of an output are.
#[derive(Clone, Copy, Default)]
pub(crate) struct Magnitudes {
    /// Σ|p|
    pub(crate) sum: f64,
    /// Σp²
    pub(crate) squares: f64,
}

impl Magnitudes {
    fn add(&mut self, product: f64) {
        self.sum += product.abs();
        self.squares += product * product;
    }
}

/// Base, IA3 of both forms, fLoRA, HiRA, LoRA, DoRA (an out-scale and a low-rank sum), and fLoRA with one.
fn adapter(kind: usize, rank: u32, in_slots: &mut u32, out_slots: &mut u32) -> AdapterSlots {
    let take = |slots: &mut u32, count: u32| {
        let first = *slots;
        *slots += count;
        first
    };
    let plain = VirtualRowSlots::default();
    let mut scaled = |rank: u32| -> Vec<_> {
        let (first_in, first_out) = (take(in_slots, rank), take(out_slots, rank));
        (0..rank).map(|at| VirtualRowSlots { in_scale: Some(first_in + at), out_scale: Some(first_out + at) }).collect()
    };
    let mut virtual_rows = match kind {
        3 | 7 => scaled(rank),
        4 => [vec![plain], scaled(rank)].concat(),
        _ => vec![plain],
    };
    match kind {
        1 => virtual_rows[0].in_scale = Some(take(in_slots, 1)),
        2 | 6 => virtual_rows[0].out_scale = Some(take(out_slots, 1)),
        _ => {}
    }
    let low_rank = match kind {
        5..=7 => LowRankSlots { shrink: take(in_slots, rank), expand: take(out_slots, rank), rank },
        _ => LowRankSlots::default(),
    };
    AdapterSlots { virtual_rows, low_rank, is_merged: false }
}

pub(crate) fn epilogues() -> impl Strategy<Value = Epilogue> {
    (any::<bool>(), prop::sample::select(Activation::ALL.to_vec()), any::<bool>())
        .prop_map(|(bias, activation, residual)| Epilogue { bias, activation, residual })
}

pub(crate) fn elements() -> impl Strategy<Value = Element> {
    prop::sample::select(Element::ALL.to_vec())
}
