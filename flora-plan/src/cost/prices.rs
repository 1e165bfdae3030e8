//! One layer's prices: the device's coefficients at the layer's extent, so that a batch costs a few dozen multiplications.

use super::surface::Sheet;
use super::{DeviceCoefficients, GradientKernel, GradientTerm, Kernel, PricedLayer, Work};
use crate::gradient::GradientLowering;
use crate::layer::{LayerFormat, WeightFormat};

/// What the work of one layer takes on one device. Prices without allocating.
#[derive(Clone, Debug)]
pub struct LayerPrices {
    layer: PricedLayer,
    /// In the order of [`Kernel::TIMED`].
    sheets: Box<[Option<Sheet>]>,
    /// Of [`Kernel::Merged`].
    merged: Option<Sheet>,
    /// In the order of [`GradientKernel::TIMED`]; `None` where they weren't measured.
    gradients: Option<[Sheet; 3]>,
    seconds_per_launch: f64,
    seconds_per_byte: f64,
    pads_blocks: bool,
    largest_buffer_bytes: Option<u64>,
    split_rows: u64,
}

impl LayerPrices {
    /// The prices of `layer`, by the coefficients of its own format where they were measured, else by the nearest
    /// ([`DeviceCoefficients::of_format`]).
    pub fn new(coefficients: &DeviceCoefficients, layer: PricedLayer) -> Self {
        let (_, own) = coefficients.of_format(layer.format);
        let sheet = |(_, kernel): &(&str, Kernel)| {
            own.seconds_per_mac.get(kernel).map(|surface| surface.at_extent(layer.extent()))
        };
        let made = WeightFormat::Float(layer.format.activations);
        let (_, of_made) = coefficients.of_format(LayerFormat { weight: made, ..layer.format });
        let merged = of_made.seconds_per_mac.get(&Kernel::Matmul).map(|surface| surface.at_extent(layer.extent()));
        let gradient = |kernel| own.gradients.get(&kernel).map(|surface| surface.at_extent(layer.extent()));
        let [(_, reduced), (_, outer), (_, pairs)] = GradientKernel::TIMED;
        let gradients = match (gradient(reduced), gradient(outer), gradient(pairs)) {
            (Some(reduced), Some(outer), Some(pairs)) => Some([reduced, outer, pairs]),
            _ => None,
        };
        Self {
            layer,
            gradients,
            merged,
            sheets: Kernel::TIMED.iter().map(sheet).collect(),
            seconds_per_launch: coefficients.seconds_per_launch,
            seconds_per_byte: coefficients.seconds_per_byte,
            pads_blocks: coefficients.pads_blocks,
            largest_buffer_bytes: coefficients.largest_buffer_bytes,
            split_rows: u64::from(coefficients.blueprints.split_rows),
        }
    }

    /// The layer.
    pub fn layer(&self) -> PricedLayer {
        self.layer
    }

    /// Whether the device's batched matmul multiplies padding.
    pub fn pads_blocks(&self) -> bool {
        self.pads_blocks
    }

    /// The most bytes of one buffer.
    pub(crate) fn largest_buffer_bytes(&self) -> Option<u64> {
        self.largest_buffer_bytes
    }

    /// Virtual rows up to which cubes share the depth.
    pub(crate) fn split_rows(&self) -> u64 {
        self.split_rows
    }

    /// Seconds of gradients of vectors: Σ max(MACs·c, bytes·c_bw). `None` where their coefficients weren't measured.
    pub fn price_gradients(&self, terms: &[GradientTerm]) -> Option<f64> {
        let sheets = self.gradients.as_ref()?;
        let seconds = |term: &GradientTerm| {
            let position = GradientKernel::TIMED.iter().position(|(_, kernel)| *kernel == term.kernel);
            let sheet = position.and_then(|at| sheets.get(at));
            let arithmetic = sheet.map_or(0.0, |sheet| term.macs as f64 * sheet.at(term.regime));
            arithmetic.max(term.bytes as f64 * self.seconds_per_byte)
        };
        Some(terms.iter().map(seconds).sum())
    }

    /// The cheaper way to the gradients of an adapter's scales, by its own rows and scales alone: by multiply-adds where coefficients
    /// weren't measured.
    pub fn gradient_lowering(&self, rows: u64, scales: u64) -> GradientLowering {
        let seconds = |lowering| {
            let term = GradientTerm::of_scales(lowering, self.layer, rows, scales);
            self.price_gradients(std::slice::from_ref(&term))
        };
        match (seconds(GradientLowering::Reduced), seconds(GradientLowering::Outer)) {
            (Some(reduced), Some(outer)) if reduced <= outer => GradientLowering::Reduced,
            (Some(_), Some(_)) => GradientLowering::Outer,
            _ => GradientLowering::cheapest(rows, scales),
        }
    }

    /// Seconds of some work: launches·c0 + Σ max(MACs·c, bytes·c_bw). W_i that is made and read again sets no bound by its bytes: a
    /// device that makes one after the other keeps it in a cache, and where it goes to memory, a MAC was measured to take that.
    pub fn price(&self, work: &Work) -> f64 {
        let terms = work.terms.iter().map(|term| {
            let position = Kernel::TIMED.iter().position(|(_, kernel)| *kernel == term.kernel);
            let sheet = match term.kernel {
                Kernel::Merged => self.merged.as_ref(),
                _ => position.and_then(|at| self.sheets[at].as_ref()),
            };
            let arithmetic = sheet.map_or(0.0, |sheet| term.macs as f64 * sheet.at(term.regime));
            let bytes = if term.kernel == Kernel::Bmm { 0 } else { term.bytes };
            arithmetic.max(bytes as f64 * self.seconds_per_byte)
        });
        work.launches as f64 * self.seconds_per_launch + terms.sum::<f64>()
    }
}
