//! Adapters around a product that somebody else computes, against sums in f64; isolation; refusals.

use flora_host::attached::{AttachedAdapters, AttachedError, Grouping, Work};
use flora_host::{Rows, RowsMut, Team, Values, ValuesMut};
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_plan::layer::Element;
use half::{bf16, f16};

/// Inputs, and the outputs of each part: multiples of nothing.
const INPUTS: usize = 37;
const PARTS: [usize; 3] = [19, 5, 43];
const OUTPUTS: usize = 67;

/// What is lent to every call: the caller's own thread, twice.
fn two_threads(work: &(dyn Fn() + Sync)) {
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
}

fn vector(random: &mut fastrand::Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| random.f32() * 2.0 - 1.0).collect()
}

/// An adapter of a part: scales where `rows` says so, and a low-rank sum.
fn adapter(random: &mut fastrand::Rng, k: usize, rows: &[(bool, bool)], rank: usize) -> FoldedAdapter {
    let virtual_rows = rows.iter().map(|(inner, outer)| VirtualRow {
        in_scale: inner.then(|| vector(random, INPUTS)),
        out_scale: outer.then(|| vector(random, k)),
    });
    let virtual_rows = virtual_rows.collect();
    let low_rank = (0..rank).map(|_| RankOne { shrink: vector(random, INPUTS), expand: vector(random, k) }).collect();
    FoldedAdapter { virtual_rows, low_rank, ..FoldedAdapter::default() }
}

/// An adapter, and the vector that it adds.
type Own = (FoldedAdapter, Option<Vec<f32>>);

/// A layer with a base, and adapters of all forms.
struct Problem {
    weight: Vec<f32>,
    bias: Vec<f32>,
    layer: AttachedAdapters,
    /// By slot and part.
    adapters: Vec<Vec<Option<Own>>>,
}

/// LoRA, fLoRA, HiRA, IA3 of inputs, IA3 of outputs, LoRA on one part with an offset, nothing.
const FORMS: [(&[(bool, bool)], usize); 6] = [
    (&[(false, false)], 5),
    (&[(true, true), (true, true), (true, true)], 0),
    (&[(false, false), (true, true), (true, true)], 0),
    (&[(true, false)], 0),
    (&[(false, true)], 0),
    (&[(false, true)], 9),
];

impl Problem {
    fn new(kept: Element) -> Self {
        let mut random = fastrand::Rng::with_seed(7);
        let layer = AttachedAdapters::new(INPUTS, &PARTS, 8, kept).unwrap();
        let mut adapters = Vec::new();
        for (slot, (rows, rank)) in FORMS.iter().enumerate() {
            let mut own = Vec::new();
            for (part, k) in PARTS.iter().enumerate() {
                // The first slot has one part, the last an offset.
                let has = slot != 0 || part == 1;
                let offset = (slot == FORMS.len() - 1).then(|| vector(&mut random, *k));
                let made = has.then(|| (adapter(&mut random, *k, rows, *rank), offset));
                if let Some((adapter, offset)) = &made {
                    layer.put(slot, part, adapter, offset.as_deref()).unwrap();
                }
                own.push(made);
            }
            adapters.push(own);
        }
        let (weight, bias) = (vector(&mut random, INPUTS * OUTPUTS), vector(&mut random, OUTPUTS));
        Self { weight, bias, layer, adapters }
    }

    /// base(x) for columns, in f64.
    fn product(&self, x: &[f64], column: usize) -> f64 {
        x.iter().enumerate().map(|(at, x)| x * f64::from(self.weight[at * OUTPUTS + column])).sum()
    }

    /// A row by its definition, and for each output how large its terms are.
    fn expected(&self, slot: i64, x: &[f32]) -> Vec<(f64, f64)> {
        let x: Vec<_> = x.iter().copied().map(f64::from).collect();
        let mut out = Vec::new();
        let mut first = 0;
        for (part, k) in PARTS.iter().enumerate() {
            let own = usize::try_from(slot).ok().and_then(|slot| self.adapters.get(slot)?[part].as_ref());
            for column in 0..*k {
                let bias = f64::from(self.bias[first + column]);
                let (mut sum, mut size) = (bias, bias.abs());
                let mut add = |term: f64| {
                    sum += term;
                    size += term.abs();
                };
                match own {
                    None => add(self.product(&x, first + column)),
                    Some((adapter, offset)) => {
                        for row in &adapter.virtual_rows {
                            let scaled: Vec<_> = match &row.in_scale {
                                Some(scale) => x.iter().zip(scale).map(|(x, scale)| x * f64::from(*scale)).collect(),
                                None => x.clone(),
                            };
                            let outer = row.out_scale.as_ref().map_or(1.0, |scale| f64::from(scale[column]));
                            add(outer * self.product(&scaled, first + column));
                        }
                        for pair in &adapter.low_rank {
                            let hidden: f64 =
                                x.iter().zip(&pair.shrink).map(|(x, shrink)| x * f64::from(*shrink)).sum();
                            add(hidden * f64::from(pair.expand[column]));
                        }
                        add(offset.as_ref().map_or(0.0, |offset| f64::from(offset[column])));
                    }
                }
                out.push((sum, size));
            }
            first += k;
        }
        out
    }

    /// The batch through the layer: in f32 the caller's products are sums in f64, rounded once.
    fn run(&self, slots: &[i64], x: &[f32], grouping: Grouping, team: Team) -> Vec<f32> {
        let (x_rows, mut y) = (Rows { values: Values::F32(x), pitch: INPUTS }, vec![f32::NAN; slots.len() * OUTPUTS]);
        if self.layer.work(slots).unwrap() < Work::Scales {
            for (y, x) in y.chunks_exact_mut(OUTPUTS).zip(x.chunks_exact(INPUTS)) {
                let x: Vec<_> = x.iter().copied().map(f64::from).collect();
                for (column, y) in y.iter_mut().enumerate() {
                    *y = (self.product(&x, column) + f64::from(self.bias[column])) as f32;
                }
            }
            let out = RowsMut { values: ValuesMut::F32(&mut y), pitch: OUTPUTS };
            self.layer.add(slots, x_rows, out, team).unwrap();
            return y;
        }
        let counts = self.layer.virtual_inputs(slots, grouping).unwrap();
        let columns: Vec<_> = match grouping {
            Grouping::Whole => std::iter::once(0..OUTPUTS).collect(),
            Grouping::Parts => self.layer.parts().to_vec(),
        };
        let mut products = Vec::new();
        for (group, (count, columns)) in counts.iter().zip(&columns).enumerate() {
            let mut inputs = vec![f32::NAN; count * INPUTS];
            let out = RowsMut { values: ValuesMut::F32(&mut inputs), pitch: INPUTS };
            self.layer.expand(slots, (grouping, group), x_rows, out).unwrap();
            let product = inputs.chunks_exact(INPUTS).flat_map(|x| {
                let x: Vec<_> = x.iter().copied().map(f64::from).collect();
                columns.clone().map(move |column| self.product(&x, column) as f32).collect::<Vec<_>>()
            });
            products.push(product.collect::<Vec<_>>());
        }
        let products: Vec<_> = products
            .iter()
            .zip(&columns)
            .map(|(values, columns)| Rows { values: Values::F32(values), pitch: columns.len() })
            .collect();
        let out = RowsMut { values: ValuesMut::F32(&mut y), pitch: OUTPUTS };
        let bias = Some(Values::F32(&self.bias));
        self.layer.combine(slots, (grouping, &products), bias, x_rows, out, team).unwrap();
        y
    }
}

fn inputs(rows: usize) -> Vec<f32> {
    vector(&mut fastrand::Rng::with_seed(3), rows * INPUTS)
}

/// Rows of every slot, alone and in runs of every remainder of a tile, empty slots and base rows among them.
fn mixed() -> Vec<i64> {
    let runs = [(0, 1), (-1, 3), (1, 2), (5, 7), (7, 1), (2, 4), (3, 1), (4, 6), (0, 35), (1, 1), (-1, 1), (2, 1)];
    runs.into_iter().flat_map(|(slot, rows)| std::iter::repeat_n(slot, rows)).collect()
}

#[test]
fn every_form_in_one_batch_equals_its_definition() {
    let problem = Problem::new(Element::F32);
    let slots = mixed();
    let x = inputs(slots.len());
    for (grouping, team) in
        [(Grouping::Whole, Team::Rayon), (Grouping::Parts, Team::Rayon), (Grouping::Whole, Team::Foreign(two_threads))]
    {
        let y = problem.run(&slots, &x, grouping, team);
        for ((row, slot), (y, x)) in slots.iter().enumerate().zip(y.chunks_exact(OUTPUTS).zip(x.chunks_exact(INPUTS))) {
            for (column, (y, (expected, size))) in y.iter().zip(problem.expected(*slot, x)).enumerate() {
                // A product is rounded once as x is scaled, once as a product and once by its out-scale; a sum of at most so many terms
                // is off by their number of half ulps of their size.
                let bound = (INPUTS + 16) as f64 * 2f64.powi(-24) * size;
                assert!(
                    (f64::from(*y) - expected).abs() <= bound,
                    "row {row}, slot {slot}, column {column}: {y} {expected}"
                );
            }
        }
    }
}

#[test]
fn sums_alone_are_added_to_what_is_there() {
    let problem = Problem::new(Element::F32);
    let slots: Vec<_> =
        [(0, 6), (-1, 2), (0, 1), (6, 2)].into_iter().flat_map(|(slot, rows)| vec![slot; rows]).collect();
    assert_eq!(problem.layer.work(&slots).unwrap(), Work::Sums);
    assert_eq!(problem.layer.work(&[-1, 6, 7]).unwrap(), Work::Base);
    let x = inputs(slots.len());
    let y = problem.run(&slots, &x, Grouping::Whole, Team::Rayon);
    for (slot, (y, x)) in slots.iter().zip(y.chunks_exact(OUTPUTS).zip(x.chunks_exact(INPUTS))) {
        for (y, (expected, size)) in y.iter().zip(problem.expected(*slot, x)) {
            assert!((f64::from(*y) - expected).abs() <= (INPUTS + 16) as f64 * 2f64.powi(-24) * size);
        }
    }
}

#[test]
fn a_rows_bits_are_its_own() {
    let problem = Problem::new(Element::Bf16);
    let slots = mixed();
    let x = inputs(slots.len());
    let together = problem.run(&slots, &x, Grouping::Whole, Team::Foreign(two_threads));
    for (row, slot) in slots.iter().enumerate() {
        let alone = problem.run(&[*slot], &x[row * INPUTS..(row + 1) * INPUTS], Grouping::Parts, Team::Rayon);
        let own = &together[row * OUTPUTS..(row + 1) * OUTPUTS];
        // The caller's products are the same in either grouping.
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        if problem.layer.work(&[*slot]).unwrap() == Work::Scales {
            assert_eq!(bits(&alone), bits(own), "row {row} of slot {slot}");
        }
    }
    for slots in [vec![0; 9], vec![0, -1, 0, 0, 0, 0, 0]] {
        let x = inputs(slots.len());
        let together = problem.run(&slots, &x, Grouping::Whole, Team::Rayon);
        for (row, slot) in slots.iter().enumerate() {
            let alone = problem.run(&[*slot], &x[row * INPUTS..(row + 1) * INPUTS], Grouping::Whole, Team::Rayon);
            assert_eq!(alone, together[row * OUTPUTS..(row + 1) * OUTPUTS], "row {row}");
        }
    }
}

#[test]
fn halves_are_rounded_once() {
    let problem = Problem::new(Element::Bf16);
    let slots = [0i64; 5];
    let x = inputs(slots.len());
    let y = vector(&mut fastrand::Rng::with_seed(9), slots.len() * OUTPUTS);
    let narrow: Vec<_> = x.iter().map(|x| bf16::from_f32(*x)).collect();
    let wide: Vec<_> = narrow.iter().map(|x| x.to_f32()).collect();
    let mut y_bf16: Vec<_> = y.iter().map(|y| bf16::from_f32(*y)).collect();
    let mut y_f32: Vec<_> = y_bf16.iter().map(|y| y.to_f32()).collect();
    let x_rows = |values| Rows { values, pitch: INPUTS };
    let out = RowsMut { values: ValuesMut::Bf16(&mut y_bf16), pitch: OUTPUTS };
    problem.layer.add(&slots, x_rows(Values::Bf16(&narrow)), out, Team::Rayon).unwrap();
    let out = RowsMut { values: ValuesMut::F32(&mut y_f32), pitch: OUTPUTS };
    problem.layer.add(&slots, x_rows(Values::F32(&wide)), out, Team::Rayon).unwrap();
    assert!(y_bf16.iter().zip(&y_f32).all(|(narrow, wide)| *narrow == bf16::from_f32(*wide)));
    let narrow: Vec<_> = wide.iter().map(|x| f16::from_f32(*x)).collect();
    let wide: Vec<_> = narrow.iter().map(|x| x.to_f32()).collect();
    let mut y_f16: Vec<_> = y.iter().map(|y| f16::from_f32(*y)).collect();
    let mut y_f32: Vec<_> = y_f16.iter().map(|y| y.to_f32()).collect();
    let out = RowsMut { values: ValuesMut::F16(&mut y_f16), pitch: OUTPUTS };
    problem.layer.add(&slots, x_rows(Values::F16(&narrow)), out, Team::Rayon).unwrap();
    let out = RowsMut { values: ValuesMut::F32(&mut y_f32), pitch: OUTPUTS };
    problem.layer.add(&slots, x_rows(Values::F32(&wide)), out, Team::Rayon).unwrap();
    assert!(y_f16.iter().zip(&y_f32).all(|(narrow, wide)| *narrow == f16::from_f32(*wide)));
}

#[test]
fn mistakes_are_errors_and_write_nothing() {
    let problem = Problem::new(Element::F32);
    let layer = &problem.layer;
    let x = inputs(2);
    let x_rows = Rows { values: Values::F32(&x), pitch: INPUTS };
    let mut y = vec![1.0; 2 * OUTPUTS];
    let mut add = |slots: &[i64], pitch: usize| {
        let out = RowsMut { values: ValuesMut::F32(&mut y), pitch };
        layer.add(slots, x_rows, out, Team::Rayon)
    };
    assert!(matches!(add(&[0, 8], OUTPUTS), Err(AttachedError::RowSlot { row: 1, slot: 8, slots: 8 })));
    assert!(matches!(add(&[-2, 0], OUTPUTS), Err(AttachedError::RowSlot { row: 0, slot: -2, .. })));
    assert!(matches!(add(&[0, 1], OUTPUTS), Err(AttachedError::Scaled { row: 1 })));
    assert!(matches!(add(&[0, 0, 0], OUTPUTS), Err(AttachedError::WrongMemory { what: "x", .. })));
    assert!(matches!(add(&[0, 0], OUTPUTS - 1), Err(AttachedError::WrongMemory { what: "y", .. })));
    assert!(y.iter().all(|y| *y == 1.0));
    let none = FoldedAdapter::default();
    assert!(matches!(layer.put(8, 0, &none, None), Err(AttachedError::NoSlot { slot: 8, slots: 8 })));
    assert!(matches!(layer.put(0, 3, &none, None), Err(AttachedError::NoPart { part: 3, parts: 3 })));
    assert!(matches!(layer.put(0, 0, &none, Some(&[0.0])), Err(AttachedError::WrongVector { what: "bias", .. })));
    assert!(matches!(layer.clear(9), Err(AttachedError::NoSlot { slot: 9, .. })));
    assert!(AttachedAdapters::new(0, &PARTS, 1, Element::F32).is_err());
    assert!(AttachedAdapters::new(3, &[1, 0], 1, Element::F32).is_err());
    let out = RowsMut { values: ValuesMut::F32(&mut y), pitch: OUTPUTS };
    let few = layer.combine(&[1, 1], (Grouping::Parts, &[]), None, x_rows, out, Team::Rayon);
    assert!(matches!(few, Err(AttachedError::WrongGroups { expected: 3, found: 0 })));
    let bytes = layer.bytes();
    layer.clear(1).unwrap();
    assert!(layer.bytes() < bytes);
    assert_eq!(layer.work(&[1]).unwrap(), Work::Base);
}
