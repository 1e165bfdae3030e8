//! Random layers, adapters and batches, from a seed.

use std::sync::LazyLock;

use flora::prelude::*;
use flora_ir::algebra::FoldedAdapter;
use flora_ir::builtin;
use flora_oracle::{Deviation, Sample, check};
use flora_runtime::BackendKind;
use proptest::prelude::*;

use super::on_burn::OnBurn;

/// The device under test.
pub(crate) fn device() -> &'static Device {
    static DEVICE: LazyLock<Device> = LazyLock::new(|| {
        let wanted = std::env::var("FLORA_TEST_DEVICE").unwrap_or_else(|_| "host".to_owned());
        devices::open(&wanted).unwrap_or_else(|error| panic!("FLORA_TEST_DEVICE={wanted}: {error}"))
    });
    &DEVICE
}

/// Whether it is lavapipe, which takes seconds to compile a kernel.
pub(crate) fn is_rasteriser() -> bool {
    let info = device().info();
    info.software && info.backend == BackendKind::Wgpu
}

/// Every plan there is.
pub(crate) fn plans() -> Vec<Plan> {
    let short = Plan::new(MultiplicativeLowering::OnChip, AdditiveLowering::Fused).with_on_chip_from(4);
    Plan::unmerged().flat_map(|plan| [plan, plan.with_split()]).chain([short]).collect()
}

/// Numbers between −1 and 1 from a seed.
#[derive(Clone)]
pub(crate) struct Numbers(u64);

impl Numbers {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn take(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn values(&mut self, count: usize) -> Vec<f64> {
        self.take(count).into_iter().map(f64::from).collect()
    }
}

/// An adapter of a built-in kind.
#[derive(Clone, Debug)]
pub(crate) struct Adapter {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) rank: usize,
}

/// A batch over one layer.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) d: usize,
    pub(crate) k: usize,
    pub(crate) bias: bool,
    pub(crate) activation: Activation,
    pub(crate) residual: bool,
    pub(crate) format: LayerFormat,
    pub(crate) adapters: Vec<Adapter>,
    /// (position in `adapters`, or past its end for the base; rows)
    pub(crate) segments: Vec<(usize, u32)>,
    pub(crate) seed: u64,
}

pub(crate) fn kinds() -> Vec<&'static str> {
    builtin::names().filter(|name| *name != "linear").collect()
}

fn extent() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 1usize..70, 2 => Just(37), 2 => Just(96), 1 => Just(576), 1 => 128usize..260]
}

/// Batches of every kind of adapter, ranks 1 to 64, segments of 0 to 200 rows.
pub(crate) fn cases() -> impl Strategy<Value = Case> {
    let adapter = (0..kinds().len(), prop_oneof![4 => 1usize..9, 2 => 9usize..33, 1 => 33usize..65]);
    let segment = |adapters: usize| (0..adapters + 1, prop_oneof![4 => 0u32..4, 3 => 4u32..30, 1 => 30u32..201]);
    (extent(), extent(), any::<bool>(), prop::sample::select(Activation::ALL.to_vec()), any::<u64>()).prop_flat_map(
        move |(d, k, bias, activation, seed)| {
            let adapters = prop::collection::vec(adapter.clone(), 0..6);
            adapters.prop_flat_map(move |adapters| {
                let named = adapters.iter().enumerate().map(|(position, (kind, rank))| Adapter {
                    name: format!("adapter{position}"),
                    kind: kinds()[*kind],
                    rank: *rank,
                });
                let named: Vec<_> = named.collect();
                prop::collection::vec(segment(named.len()), 0..9).prop_map(move |segments| Case {
                    d,
                    k,
                    bias,
                    activation,
                    residual: seed % 3 == 0,
                    format: LayerFormat::default(),
                    adapters: named.clone(),
                    segments,
                    seed,
                })
            })
        },
    )
}

/// The tensors of a case.
pub(crate) struct Loaded {
    pub(crate) case: Case,
    pub(crate) projection: OnBurn,
    pub(crate) base_weight: Vec<f32>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) x: Vec<f32>,
    pub(crate) residual: Option<Vec<f32>>,
    pub(crate) operands: Vec<Bindings>,
    pub(crate) folded: Vec<FoldedAdapter>,
}

/// The adapter's tensors, by the names of the built-in layers.
pub(crate) fn operands(adapter: &Adapter, d: usize, k: usize, numbers: &mut Numbers) -> Bindings {
    let layer = builtin::builtin(adapter.kind).expect("a built-in layer").layer();
    let mut bindings = Bindings::new();
    for (_, operand) in layer.operands.iter().filter(|(_, operand)| operand.role.is_adapters()) {
        let extent = |dimension: &flora_ir::Dimension| match dimension.to_string().as_str() {
            "D" => d,
            "K" => k,
            _ => adapter.rank,
        };
        let value = match &operand.ty.shape {
            flora_ir::Shape::Scalar => Value::scalar(0.5),
            flora_ir::Shape::Vector(n) => Value::vector(numbers.values(extent(n))),
            flora_ir::Shape::Matrix(m, n) => {
                let (m, n) = (extent(m), extent(n));
                Value::matrix(m, n, numbers.values(m * n)).expect("as long as its extents say")
            }
        };
        bindings.insert(operand.name.clone(), value);
    }
    bindings
}

pub(crate) fn fold(adapter: &Adapter, operands: &Bindings, base_weight: &[f32], d: usize, k: usize) -> FoldedAdapter {
    let layer = builtin::builtin(adapter.kind).expect("a built-in layer").clone();
    let mut bindings = operands.clone();
    let base_weight = base_weight.iter().map(|value| f64::from(*value)).collect();
    bindings.insert("w0", Value::matrix(d, k, base_weight).expect("as long as its extents say"));
    let layer = compile_verified(layer).expect("built-in layers compile");
    layer.linear.fold(&bindings).expect("operands of a built-in layer fold")
}

impl Case {
    pub(crate) fn load(self, device: &Device) -> Loaded {
        let mut numbers = Numbers::new(self.seed);
        let weight = self.weight(&numbers.take(self.d * self.k));
        let base_weight = weight.to_f32();
        let bias = self.bias.then(|| numbers.take(self.k));
        let operands: Vec<_> =
            self.adapters.iter().map(|adapter| operands(adapter, self.d, self.k, &mut numbers)).collect();
        let folded: Vec<_> = (self.adapters.iter().zip(&operands))
            .map(|(adapter, operands)| fold(adapter, operands, &base_weight, self.d, self.k))
            .collect();
        let rows: u32 = self.segments.iter().map(|(_, rows)| rows).sum();
        // What the device gets is what it keeps.
        let round = |values: Vec<f32>| values.into_iter().map(|value| self.format.activations.round(value)).collect();
        let x = round(numbers.take(rows as usize * self.d));
        let residual = self.residual.then(|| round(numbers.take(rows as usize * self.k)));
        let projection = self.projection(device, &weight, bias.as_deref(), &folded);
        Loaded { case: self, projection, base_weight, bias, x, residual, operands, folded }
    }

    pub(crate) fn weight(&self, values: &[f32]) -> PackedWeight {
        let shape = LayerShape { d: self.d as u32, k: self.k as u32 };
        PackedWeight::from_f32(self.format.weight, shape, values).expect("a weight of the shape")
    }

    pub(crate) fn projection(
        &self,
        device: &Device,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        folded: &[FoldedAdapter],
    ) -> OnBurn {
        let LayerFormat { activations, adapters, fragments, .. } = self.format;
        let options = ProjectionOptions {
            bias,
            activation: self.activation,
            residual: self.residual,
            activations,
            adapters,
            fragments,
        };
        let mut projection = Projection::from_packed(device, weight, options).expect("tensors of the shape");
        let named = self.adapters.iter().zip(folded).map(|(adapter, folded)| (adapter.name.as_str(), Some(folded)));
        projection.load(named).expect("vectors of the shape");
        OnBurn::new(projection)
    }

    pub(crate) fn batch(&self) -> Batch {
        Batch::new(
            self.segments
                .iter()
                .map(|(adapter, rows)| (self.adapters.get(*adapter).map(|adapter| adapter.name.as_str()), *rows)),
        )
    }
}

impl Loaded {
    pub(crate) fn run(&self, plan: &Plan) -> Vec<f32> {
        self.run_of(&self.projection, plan)
    }

    pub(crate) fn run_of(&self, projection: &OnBurn, plan: &Plan) -> Vec<f32> {
        projection.forward(&self.case.batch(), plan, &self.x, self.residual.as_deref())
    }

    /// The worst deviation of a few rows of every segment.
    pub(crate) fn deviation(&self, y: &[f32]) -> Deviation {
        let (d, k) = (self.case.d, self.case.k);
        assert_eq!(y.len(), self.x.len() / d * k);
        let columns: Vec<usize> = (0..k).step_by((k / 11).max(1)).chain([k - 1]).collect();
        let mut worst = Deviation::default();
        let mut first = 0;
        for (adapter, rows) in &self.case.segments {
            let rows = *rows as usize;
            let sampled = [0, rows / 2, rows.saturating_sub(1)];
            for row in sampled.into_iter().filter(|row| *row < rows).map(|row| first + row) {
                let sample = Sample {
                    shape: self.projection.shape(),
                    format: self.case.format,
                    residual: self.residual.as_ref().map(|residual| &residual[row * k..(row + 1) * k]),
                    base_weight: &self.base_weight,
                    bias: self.bias.as_deref(),
                    activation: self.case.activation,
                    x: &self.x[row * d..(row + 1) * d],
                    y: &y[row * k..(row + 1) * k],
                    columns: &columns,
                };
                let base = FoldedAdapter { virtual_rows: vec![Default::default()], ..FoldedAdapter::default() };
                let deviation = match self.case.adapters.get(*adapter) {
                    Some(kind) => {
                        let layer = builtin::builtin(kind.kind).expect("a built-in layer");
                        check(layer, &self.operands[*adapter], &self.folded[*adapter], &sample)
                    }
                    None => {
                        let layer = builtin::builtin("linear").expect("a built-in layer");
                        check(layer, &Bindings::new(), &base, &sample)
                    }
                };
                worst = worst.max(deviation.expect("the oracle evaluates built-in layers"));
            }
            first += rows;
        }
        worst
    }
}
