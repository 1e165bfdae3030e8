//! What a model pays for being able to adapt, where nobody brings an adapter: all projections of SmolLM2-135M's shapes, 30 layers,
//! as Burn's `nn::Linear`, as adapted layers that never had an adapter, and as adapted layers with 32 resident ones of which no row
//! names any. The three take turns, round after round; medians, and their ratios within a round.

use std::time::Instant;

use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Distribution, Tensor};
use flora_burn::{AdaptedLinear, BurnDevice, Host, Planning, StepBatch};
use flora_ir::algebra::{FoldedAdapter, RankOne, VirtualRow};
use flora_plan::layer::{LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::weight::PackedWeight;
use flora_runtime::ProjectionOptions;

const LAYERS: usize = 30;
/// (d, k), how many a layer.
const SHAPES: [(u32, u32, usize); 4] = [(576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1)];
const ROUNDS: usize = 15;

fn adapted(target: &BurnDevice<Host>, shape: LayerShape, values: &[f32], adapters: u32) -> AdaptedLinear<Host> {
    let weight = PackedWeight::from_f32(WeightFormat::default(), shape, values).expect("as long as the shape says");
    let planning = Planning::Fixed(Plan::default());
    let linear = AdaptedLinear::new(target, &weight, ProjectionOptions::default(), planning).expect("it fits");
    linear.change(|projection| {
        projection.reserve(adapters * 8, adapters * 8).expect("it fits");
        for position in 1..=adapters {
            let pair = || RankOne { shrink: vec![0.01; shape.d as usize], expand: vec![0.01; shape.k as usize] };
            let adapter = FoldedAdapter {
                virtual_rows: vec![VirtualRow::default()],
                low_rank: (0..8).map(|_| pair()).collect(),
                ..FoldedAdapter::default()
            };
            projection.place(position, &adapter).expect("there is room");
        }
    });
    linear
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let target = BurnDevice::<Host>::open(&Default::default()).expect("the host");
    let mut random = fastrand::Rng::with_seed(1);
    let (mut plain, mut without, mut resident) = (Vec::new(), Vec::new(), Vec::new());
    for (d, k, count) in (0..LAYERS).flat_map(|_| SHAPES) {
        for _ in 0..count {
            let shape = LayerShape { d, k };
            let values: Vec<f32> = (0..d as usize * k as usize).map(|_| random.f32() - 0.5).collect();
            let linear: Linear<Host> = LinearConfig::new(d as usize, k as usize).with_bias(false).init(&target.burn);
            plain.push(linear);
            without.push(adapted(&target, shape, &values, 0));
            resident.push(adapted(&target, shape, &values, 32));
        }
    }
    println!("{}\nrows   nn::Linear     adapted    resident   adapted/nn   resident/nn", target.flora.info().name);
    for rows in [1usize, 4, 32, 256] {
        let batch = StepBatch::new((0..rows).map(|_| (0, 1)));
        let inputs = |d: usize| Tensor::<Host, 2>::random([rows, d], Distribution::Default, &target.burn);
        let (narrow, wide) = (inputs(576), inputs(1536));
        let x = |d: u32| if d == 576 { narrow.clone() } else { wide.clone() };
        let mut times = [Vec::new(), Vec::new(), Vec::new()];
        let mut ratios = [Vec::new(), Vec::new()];
        for _ in 0..ROUNDS {
            let mut round = [0.0; 3];
            for (own, seconds) in round.iter_mut().enumerate() {
                let start = Instant::now();
                match own {
                    0 => plain.iter().for_each(|linear| {
                        let d = linear.weight.dims()[0] as u32;
                        drop(linear.forward(x(d)));
                    }),
                    _ => (if own == 1 { &without } else { &resident }).iter().for_each(|linear| {
                        drop(linear.forward(x(linear.shape().d), &batch, None).expect("it runs"));
                    }),
                }
                *seconds = start.elapsed().as_secs_f64();
            }
            times.iter_mut().zip(round).for_each(|(times, seconds)| times.push(seconds));
            ratios.iter_mut().zip([1, 2]).for_each(|(ratios, own)| ratios.push(round[own] / round[0]));
        }
        let [plain, adapted, resident] = times.map(|times| median(times) * 1e3);
        let [adapted_ratio, resident_ratio] = ratios.map(median);
        println!(
            "{rows:>4}  {plain:>8.2} ms {adapted:>8.2} ms {resident:>8.2} ms   {adapted_ratio:>10.3}   {resident_ratio:>11.3}"
        );
    }
}
