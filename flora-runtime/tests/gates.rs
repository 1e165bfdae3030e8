//! Adapters whose parts are weighed for each row: sums with gates under every plan, in batches with all others, and what is refused.

use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_ir::evaluate::apply_activation;
use flora_ir::{Activation, SparseMatrix};
use flora_plan::layer::{LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::{
    Batch, Device, PlannedProjection, Planning, Projection, ProjectionError, ProjectionOptions, RowGates, StepBatch,
    Wanted,
};

const D: usize = 37;
const K: usize = 70;
/// Positions of the adapters.
const GATED: u32 = 1;
const LORA: u32 = 2;
const SCALED: u32 = 3;
const BIASED: u32 = 4;
const TURNED: u32 = 5;
const ACTIVATIONS: [Activation; 2] = [Activation::Identity, Activation::Silu];
/// Of each rank of the gated adapter, its part.
const PARTS: [u32; 7] = [0, 0, 1, 1, 1, 2, 2];

fn values(count: usize, random: &mut fastrand::Rng) -> Vec<f32> {
    (0..count).map(|_| random.f32() - 0.5).collect()
}

fn low_rank(rank: usize, random: &mut fastrand::Rng) -> FoldedAdapter {
    let pairs = (0..rank).map(|_| RankOne { shrink: values(D, random), expand: values(K, random) });
    FoldedAdapter { virtual_rows: vec![VirtualRow::default()], low_rank: pairs.collect(), ..FoldedAdapter::default() }
}

struct Bench {
    device: Device,
    weight: Vec<f32>,
    gated: FoldedAdapter,
    projection: PlannedProjection,
}

impl Bench {
    /// With an adapter of each sort; an activation makes rows with a bias of their own another launch.
    fn new(activation: Activation, plan: Plan) -> Self {
        let mut random = fastrand::Rng::with_seed(3);
        let device = flora_host::device();
        let weight = values(D * K, &mut random);
        let shape = LayerShape { d: D as u32, k: K as u32 };
        let packed = PackedWeight::from_f32(WeightFormat::default(), shape, &weight).unwrap();
        let options = ProjectionOptions { activation, ..ProjectionOptions::default() };
        let mut projection = Projection::from_packed(&device, &packed, options).unwrap();
        projection.reserve(64, 64).unwrap();
        let gated = low_rank(PARTS.len(), &mut random);
        projection.place(GATED, &gated).unwrap();
        projection.set_gates(GATED, 1, &PARTS).unwrap();
        projection.place(LORA, &low_rank(9, &mut random)).unwrap();
        let scale = |width, random: &mut fastrand::Rng| Some(values(width, random));
        let row = VirtualRow { in_scale: scale(D, &mut random), out_scale: scale(K, &mut random) };
        let scaled = FoldedAdapter { virtual_rows: vec![VirtualRow::default(), row], ..low_rank(3, &mut random) };
        projection.place(SCALED, &scaled).unwrap();
        if activation == Activation::Identity {
            projection.place(BIASED, &low_rank(2, &mut random)).unwrap();
            projection.set_offset(BIASED, &values(K, &mut random)).unwrap();
        }
        // Its sums are turned before an activation, so that its rows are a launch of their own.
        let columns = (0..K as u32).map(|column| vec![(column, 0.5), ((column + 1) % K as u32, -0.25)]);
        let mut turned = low_rank(4, &mut random);
        turned.sparse.outputs = Some(SparseMatrix::of_columns(K, columns));
        projection.place(TURNED, &turned).unwrap();
        let projection = PlannedProjection::of(projection, Planning::Fixed(plan));
        Self { device, weight, gated, projection }
    }

    fn run(&self, x: &[f32], batch: &StepBatch) -> Result<Vec<f32>, ProjectionError> {
        let x = self.device.upload(x)?;
        Ok(self.device.read(&self.projection.forward(&x, batch, None)?)?)
    }

    /// What a row of the gated adapter gives, in f64, and the sum of the sizes of what it is made of.
    fn right(&self, x: &[f32], gates: &[f32]) -> Vec<(f64, f64)> {
        let mut y = vec![(0.0, 0.0); K];
        let mut add = |at: usize, value: f64| {
            y[at].0 += value;
            y[at].1 += value.abs();
        };
        for (row, x) in self.weight.chunks_exact(K).zip(x) {
            row.iter().enumerate().for_each(|(at, weight)| add(at, f64::from(*weight) * f64::from(*x)));
        }
        for (RankOne { shrink, expand }, part) in self.gated.low_rank.iter().zip(PARTS) {
            let gate = f64::from(gates[part as usize]);
            for (shrink, x) in shrink.iter().zip(x) {
                let hidden = gate * f64::from(*shrink) * f64::from(*x);
                expand.iter().enumerate().for_each(|(at, expand)| add(at, hidden * f64::from(*expand)));
            }
        }
        y
    }
}

/// Two sets for three parts; the projection has the second.
fn gates(rows: std::ops::Range<usize>, random: &mut fastrand::Rng) -> RowGates {
    let values = values(rows.len() * 6, random);
    RowGates { rows, layers: 2, parts: 3, values }
}

#[test]
fn sums_have_their_gates_under_every_plan() {
    for (plan, activation) in Plan::unmerged().flat_map(|plan| ACTIVATIONS.map(|activation| (plan, activation))) {
        let bench = Bench::new(activation, plan);
        let mut random = fastrand::Rng::with_seed(11);
        let other = if activation == Activation::Identity { BIASED } else { TURNED };
        let segments =
            [(0, 2), (GATED, 21), (LORA, 3), (SCALED, 4), (GATED, 1), (other, 2), (GATED, 5), (TURNED, 1), (LORA, 18)];
        let rows: u32 = segments.iter().map(|(_, rows)| rows).sum();
        let x = values(rows as usize * D, &mut random);
        let given = [gates(2..23, &mut random), gates(30..31, &mut random), gates(33..38, &mut random)];
        let batch = StepBatch::new(segments).with_gates(given.to_vec());
        let y = bench.run(&x, &batch).unwrap();
        for own in &given {
            for (at, row) in own.rows.clone().enumerate() {
                let x = &x[row * D..(row + 1) * D];
                let set = &own.values[at * 6 + 3..at * 6 + 6];
                for (found, (right, size)) in y[row * K..(row + 1) * K].iter().zip(bench.right(x, set)) {
                    let right = apply_activation(activation, right);
                    let off = (f64::from(*found) - right).abs();
                    assert!(off <= 2e-6 * size, "{plan:?}, {activation:?}, row {row}: {found} not {right}");
                }
                // Alone it has the same bits.
                let alone = RowGates { rows: 0..1, layers: 1, parts: 3, values: set.to_vec() };
                let both = RowGates { layers: 2, values: [[9.0; 3].as_slice(), set].concat(), ..alone };
                let alone = bench.run(x, &StepBatch::new([(GATED, 1)]).with_gates(vec![both])).unwrap();
                assert_eq!(alone, y[row * K..(row + 1) * K], "{plan:?}, row {row}");
            }
        }
        // The others have those that they have without gates beside them.
        let mut first = 0;
        for (adapter, rows) in segments {
            let range = first..first + rows as usize;
            first = range.end;
            if adapter != GATED {
                let alone = bench.run(&x[range.start * D..range.end * D], &StepBatch::new([(adapter, rows)])).unwrap();
                assert_eq!(alone, y[range.start * K..range.end * K], "{plan:?}, adapter {adapter}");
            }
        }
    }
}

#[test]
fn ones_leave_rows_as_they_are() {
    for plan in Plan::unmerged() {
        let bench = Bench::new(Activation::Silu, plan);
        let mut random = fastrand::Rng::with_seed(5);
        let x = values(20 * D, &mut random);
        let ones = RowGates { rows: 0..20, layers: 2, parts: 3, values: vec![1.0; 120] };
        let gated = bench.run(&x, &StepBatch::new([(GATED, 20)]).with_gates(vec![ones])).unwrap();
        bench.projection.change(|projection| {
            projection.remove(GATED);
            projection.place(GATED, &bench.gated).unwrap();
        });
        assert_eq!(bench.run(&x, &StepBatch::new([(GATED, 20)])).unwrap(), gated, "{plan:?}");
    }
}

#[test]
fn what_has_no_gates_is_refused() {
    let bench = Bench::new(Activation::Identity, Plan::fixed());
    let x = vec![0.5; 3 * D];
    let mut random = fastrand::Rng::with_seed(1);
    let of = |gates: Vec<RowGates>| bench.run(&x, &StepBatch::new([(0, 1), (GATED, 2)]).with_gates(gates));
    let missing =
        |row| move |error| matches!(error, ProjectionError::NoGates { position: GATED, row: own } if own == row);
    assert!(of(Vec::new()).is_err_and(missing(1)));
    assert!(of(vec![gates(1..2, &mut random)]).is_err_and(missing(2)), "a row without");
    assert!(of(vec![RowGates { rows: 0..3, layers: 1, parts: 6, values: vec![0.5; 18] }]).is_err_and(missing(1)));
    assert!(of(vec![RowGates { rows: 0..3, layers: 3, parts: 2, values: vec![0.5; 18] }]).is_err_and(missing(1)));
    assert!(of(vec![RowGates { values: vec![0.5; 7], ..gates(0..3, &mut random) }]).is_err_and(missing(1)));
    assert!(of(vec![gates(0..3, &mut random)]).is_ok());

    let batch = StepBatch::new([(GATED, 3)]).with_gates(vec![gates(0..3, &mut random)]);
    assert!(matches!(bench.projection.scheduled(&batch), Err(ProjectionError::GatedSchedule)));
    let (on_device, g) = (bench.device.upload(&x).unwrap(), bench.device.upload(&[0.0; 3 * K]).unwrap());
    let refused = bench.projection.backward(&batch, &on_device, &g, Wanted::All);
    assert!(matches!(refused, Err(ProjectionError::GatedSchedule)));
    bench.projection.change(|projection| {
        for (position, parts) in [(GATED, 6), (LORA, 7), (7, 1), (0, 1)] {
            let refused = projection.set_gates(position, 0, &vec![0; parts]);
            assert!(matches!(refused, Err(ProjectionError::WrongGates { .. })), "{position}");
        }
    });
}

/// A weight that the low-rank part is in has nothing between the factors: neither is a gated adapter merged nor a merged one gated.
#[test]
fn a_merged_weight_has_no_gates() {
    let mut random = fastrand::Rng::with_seed(1);
    let device = flora_host::device();
    let shape = LayerShape { d: D as u32, k: K as u32 };
    let mut projection =
        Projection::new(&device, shape, &values(D * K, &mut random), None, Activation::Identity).unwrap();
    projection.load([("gated", Some(&low_rank(2, &mut random)))]).unwrap();
    projection.set_gates(1, 0, &[0, 1]).unwrap();
    let named = Batch::new([(Some("gated"), 2)]);
    let refused = projection.forward(&named, &Plan::fixed(), &[0.5; 2 * D]);
    assert!(matches!(refused, Err(ProjectionError::GatedSchedule)));
    assert!(matches!(projection.merge("gated"), Err(ProjectionError::GatedMerge(1))));
    projection.load([("merged", Some(&low_rank(2, &mut random)))]).unwrap();
    projection.merge("merged").unwrap();
    assert!(matches!(projection.set_gates(2, 0, &[0, 1]), Err(ProjectionError::MergedGates(2))));
    // In one batch each has its own.
    let x = values(5 * D, &mut random);
    let gates = RowGates { rows: 1..3, layers: 1, parts: 2, values: vec![0.5, 2.0, 1.0, 0.25] };
    let batch = StepBatch::new([(2, 1), (1, 2), (0, 1), (2, 1)]).with_gates(vec![gates]);
    let planned = PlannedProjection::of(projection, Planning::Fixed(Plan::fixed()));
    let run = || device.read(&planned.forward(&device.upload(&x).unwrap(), &batch, None).unwrap()).unwrap();
    let merged = run();
    planned.change(Projection::unmerge);
    let separate = run();
    let rows = |y: &[f32], rows: std::ops::Range<usize>| y[rows.start * K..rows.end * K].to_vec();
    assert_eq!(rows(&merged, 1..4), rows(&separate, 1..4));
    for row in [0, 4] {
        let (merged, separate) = (rows(&merged, row..row + 1), rows(&separate, row..row + 1));
        assert_ne!(merged, separate, "the sums are other ones");
        assert!(merged.iter().zip(&separate).all(|(one, other)| (one - other).abs() < 1e-4), "row {row}");
    }
}
