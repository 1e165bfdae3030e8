//! A batch with its operands, on flora's own device and as a list of launches.

use flora_codegen::target::export::{LaunchList, Operand, export_with_pools};
use flora_codegen::target::{Emission, Pass};
use flora_driver::{Bound, Card, DeviceMemory, Launches, OwnedMemory, Stream};
use flora_plan::batch::{AdapterSlots, LowRankSlots, Segment, VirtualRowSlots};
use flora_plan::layer::{Element, Epilogue, LayerFormat, LayerShape, WeightFormat};
use flora_plan::plan::Plan;
use flora_plan::schedule::schedule;
use flora_plan::weight::{PackedWeight, WeightValues};
use flora_runtime::{Device, LayerOperands, PoolBuffer};

pub(crate) const SLOTS: u32 = 16;

/// A batch of a layer. Numbers are rounded to their types.
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) shape: LayerShape,
    pub(crate) format: LayerFormat,
    pub(crate) epilogue: Epilogue,
    pub(crate) adapters: Vec<AdapterSlots>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) weight: PackedWeight,
    pub(crate) x: Vec<f32>,
    pub(crate) residual: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub(crate) ins: Vec<f32>,
    pub(crate) outs: Vec<f32>,
}

/// Numbers that no two neighbours share, small enough for halves.
pub(crate) fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 37 + seed * 11) % 23) as f32 / 16.0 - 0.625).collect()
}

/// Virtual rows with scales in these slots.
pub(crate) fn scaled(first: u32, rows: u32) -> AdapterSlots {
    let row = |slot: u32| VirtualRowSlots { in_scale: Some(slot), out_scale: Some(slot) };
    AdapterSlots { virtual_rows: (first..first + rows).map(row).collect(), ..AdapterSlots::base() }
}

/// A base row and a low-rank sum of vectors in these slots.
pub(crate) fn low_rank(first: u32, rank: u32) -> AdapterSlots {
    AdapterSlots { low_rank: LowRankSlots { shrink: first, expand: first, rank }, ..AdapterSlots::base() }
}

/// Numbers in a type's bytes.
pub(crate) fn bytes(values: &[f32], element: Element) -> Vec<u8> {
    let of = |value: &f32| match element {
        Element::F32 => value.to_le_bytes().to_vec(),
        Element::F16 => half::f16::from_f32(*value).to_le_bytes().to_vec(),
        Element::Bf16 => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
    };
    values.iter().flat_map(of).collect()
}

impl Case {
    /// Base rows, scaled rows and rows with low-rank sums, of sizes that are multiples of nothing.
    pub(crate) fn mixed(element: Element, weight: WeightFormat, epilogue: Epilogue) -> Self {
        let both = AdapterSlots { low_rank: low_rank(9, 3).low_rank, ..scaled(8, 1) };
        let adapters = vec![AdapterSlots::base(), scaled(0, 3), low_rank(3, 5), both];
        let segments = [(0, 3), (1, 19), (2, 17), (3, 2), (1, 1)];
        // Blocks of K-quants are of 256 inputs.
        let d = if matches!(weight, WeightFormat::Float(_)) { 72 } else { 256 };
        Self::new(LayerShape { d, k: 40 }, (element, weight), epilogue, adapters, &segments)
    }

    pub(crate) fn new(
        shape: LayerShape,
        (element, weight): (Element, WeightFormat),
        epilogue: Epilogue,
        adapters: Vec<AdapterSlots>,
        segments: &[(u32, u32)],
    ) -> Self {
        let (d, k, slots) = (shape.d as usize, shape.k as usize, SLOTS as usize);
        let segments: Vec<_> =
            segments.iter().map(|(adapter, rows)| Segment { rows: *rows, adapter: *adapter }).collect();
        let tokens: usize = segments.iter().map(|segment| segment.rows as usize).sum();
        let round = |values: Vec<f32>| values.into_iter().map(|value| element.round(value)).collect::<Vec<_>>();
        let format = LayerFormat { weight, fragments: element != Element::F32, ..LayerFormat::uniform(element) };
        let weight =
            PackedWeight::from_f32(weight, shape, &round(numbers(d * k, 1))).expect("as long as the shape says");
        Self {
            shape,
            format,
            epilogue,
            adapters,
            segments,
            weight,
            x: round(numbers(tokens * d, 2)),
            residual: round(numbers(tokens * k, 5)),
            bias: numbers(k, 6),
            ins: round(numbers(slots * d, 3)),
            outs: round(numbers(slots * k, 4)),
        }
    }

    fn element(&self) -> Element {
        self.format.activations
    }

    /// y's bytes, by flora's own launches.
    pub(crate) fn on(&self, device: &Device, plan: &Plan) -> Vec<u8> {
        let finishes = !self.epilogue.is_identity();
        let schedule = schedule(plan, self.shape, &self.segments, &self.adapters, finishes).expect("it is scheduled");
        let upload = |values: &[f32]| device.upload_as(values, self.element()).expect("it fits");
        let pools = (PoolBuffer::new(upload(&self.ins), SLOTS), PoolBuffer::new(upload(&self.outs), SLOTS));
        let weight = device.upload_weight(&self.weight).expect("it fits");
        let bias = self.epilogue.bias.then(|| device.upload(&self.bias).expect("it fits"));
        let operands = LayerOperands::new(self.format, weight, bias, pools, self.epilogue).expect("they fit");
        let residual = self.epilogue.residual.then(|| upload(&self.residual));
        let y = device.execute(&operands, &schedule, &upload(&self.x), residual.as_ref()).expect("it runs");
        bytes(&device.read(&y).expect("no launch failed"), self.element())
    }

    /// The launches, as another program gets them.
    pub(crate) fn list(&self, card: &Card, plan: Plan) -> LaunchList {
        let Self { shape, format, epilogue, segments, adapters, .. } = self.clone();
        let (segments, adapters) = (&segments[..], &adapters[..]);
        let emission = Emission { pass: Pass::Forward, shape, format, epilogue, plan, segments, adapters };
        let list = export_with_pools(card.capability(), &emission, (SLOTS, SLOTS)).expect("it is exported");
        serde_json::from_str(&serde_json::to_string(&list).expect("JSON")).expect("a list")
    }
}

/// A case's operands on a card.
pub(crate) struct Operands {
    held: Vec<(Operand, OwnedMemory)>,
}

impl Operands {
    pub(crate) fn new(card: &Card, case: &Case) -> Self {
        let element = case.element();
        let weight = match case.weight.values() {
            WeightValues::F32(values) => bytemuck::cast_slice(values).to_vec(),
            WeightValues::F16(values) => bytemuck::cast_slice(values).to_vec(),
            WeightValues::Bf16(values) => bytemuck::cast_slice(values).to_vec(),
            WeightValues::Words(words) => bytemuck::cast_slice(words).to_vec(),
        };
        let rows = bytes(&case.residual, element);
        let held = [
            (Operand::X, bytes(&case.x, element)),
            (Operand::BaseWeight, weight),
            (Operand::WeightScales, bytemuck::cast_slice(case.weight.scales()).to_vec()),
            (Operand::InPool, bytes(&case.ins, element)),
            (Operand::OutPool, bytes(&case.outs, element)),
            (Operand::Bias, bytes(&case.bias, Element::F32)),
            (Operand::Y, vec![0xff; rows.len()]),
            (Operand::Residual, rows),
        ];
        let held = held.into_iter().map(|(operand, bytes)| (operand, OwnedMemory::with(card, &bytes).expect("memory")));
        Self { held: held.collect() }
    }

    pub(crate) fn memory(&self) -> Vec<(Operand, DeviceMemory)> {
        self.held.iter().map(|(operand, own)| (*operand, own.memory())).collect()
    }

    fn of(&self, wanted: Operand) -> &OwnedMemory {
        &self.held.iter().find(|(operand, _)| *operand == wanted).expect("an operand").1
    }

    pub(crate) fn write(&self, operand: Operand, bytes: &[u8]) {
        self.of(operand).write(0, bytes).expect("it is written");
    }

    /// y, which is NaN afterwards.
    pub(crate) fn take_y(&self) -> Vec<u8> {
        let y = self.of(Operand::Y);
        let mut bytes = vec![0; y.memory().bytes as usize];
        y.read(0, &mut bytes).expect("it is read");
        y.write(0, &vec![0xff; bytes.len()]).expect("it is written");
        bytes
    }

    pub(crate) fn bind<'a>(&self, launches: &'a Launches) -> Bound<'a> {
        launches.bind(&self.memory()).expect("the operands fit")
    }
}

/// A launch on the default stream.
pub(crate) fn launch(bound: &Bound<'_>) {
    // SAFETY: the operands are those of the case, and live until y was read.
    unsafe { bound.launch(Stream(0)) }.expect("it is launched");
}
