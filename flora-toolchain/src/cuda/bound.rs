//! What bounds a main loop: the multiprocessor's cycles that each of its units needs for a step, by published rates.
//!
//! A step is one pass of one warp through the loop. Every rate is the multiprocessor's, so that the blocks and warps on it don't matter:
//! they share it. The longest of the four is a bound that no arrangement of the same instructions gets below; latencies that nothing
//! hides come on top. `docs/inspecting.md` says where the rates are published.

use std::fmt;

use serde::Serialize;

use super::architecture::Architecture;
use super::loops::MainLoop;
use super::mix::{Class, Mix, WARP};

/// Multiply-adds of an MMA of 16 × 8 × 16, the unit that loops are compared by.
const MMA: f64 = 16.0 * 8.0 * 16.0;
/// Instructions that a multiprocessor issues a cycle: one for each of its four schedulers.
const ISSUED: f64 = 4.0;
/// Bytes that shared memory reads or writes a cycle: 32 banks of 4.
const SHARED_BYTES: f64 = 128.0;
/// Bytes that the second-level cache gives all multiprocessors a cycle. Published for the A100, and taken for the others.
const CACHE_BYTES: f64 = 5120.0;

/// A generation's card, as far as rates go.
struct Rates {
    multiprocessors: f64,
    /// Hertz.
    clock: f64,
    /// Multiply-adds of half types on tensor cores, a cycle and multiprocessor.
    tensor: f64,
    /// The same in f32, without them.
    scalar: f64,
    /// Bytes a second of device memory.
    memory: f64,
}

impl Rates {
    fn of(architecture: Architecture) -> Self {
        let (multiprocessors, clock, tensor, scalar, memory) = match architecture {
            Architecture::Sm80 => (108.0, 1.41e9, 1024.0, 64.0, 2.039e12),
            Architecture::Sm90a => (132.0, 1.83e9, 2048.0, 128.0, 3.35e12),
            Architecture::Sm100 => (148.0, 1.856e9, 4096.0, 128.0, 8.0e12),
        };
        Self { multiprocessors, clock, tensor, scalar, memory }
    }
}

/// Where a loop's loads from global memory are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// By the device's memory: what is read is read once, as the weight of a decode batch.
    Memory,
    /// By the second-level cache: other blocks read the same, as of a prefill batch.
    Cache,
}

/// What a step can be bound by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// The multiplications: tensor cores, or the units of f32.
    Arithmetic,
    /// The issue of instructions.
    Issue,
    /// The banks of shared memory.
    Shared,
    /// Global memory.
    Global,
}

impl fmt::Display for Unit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Arithmetic => "arithmetic",
            Self::Issue => "issue",
            Self::Shared => "shared",
            Self::Global => "global",
        })
    }
}

/// A multiprocessor's cycles for as many steps as make an MMA of 16 × 8 × 16 (2048 multiply-adds), by unit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bound {
    /// By the rate of multiplications.
    pub arithmetic: f64,
    /// By the rate of instructions.
    pub issue: f64,
    /// By the bytes that go to and from shared memory; conflicts of banks are not counted.
    pub shared: f64,
    /// By the bytes that come from global memory.
    pub global: f64,
}

impl Bound {
    /// The longest, and what it is of; the first of equals.
    #[must_use]
    pub fn longest(&self) -> (Unit, f64) {
        let all = [
            (Unit::Arithmetic, self.arithmetic),
            (Unit::Issue, self.issue),
            (Unit::Shared, self.shared),
            (Unit::Global, self.global),
        ];
        all.into_iter().rev().max_by(|(_, one), (_, other)| one.total_cmp(other)).unwrap_or(all[0])
    }
}

impl MainLoop {
    /// MMAs of 16 × 8 × 16 that a warp's step is worth, whatever instructions make them.
    #[must_use]
    pub fn products(&self) -> f64 {
        multiply_adds(&self.mix) / MMA
    }

    /// Instructions that a warp issues for each of [`MainLoop::products`].
    #[must_use]
    pub fn slots(&self) -> f64 {
        f64::from(self.mix.total()) / self.products()
    }

    /// What bounds the loop on cards of this generation.
    #[must_use]
    pub fn bound(&self, architecture: Architecture, source: Source) -> Bound {
        let rates = Rates::of(architecture);
        let (mix, products) = (&self.mix, self.products());
        let rate = if mix.count(Class::TensorCore) > 0 { rates.tensor } else { rates.scalar };
        let global = mix.bytes(Class::GlobalLoad);
        let from_global = match source {
            Source::Memory => rates.memory / rates.multiprocessors / rates.clock,
            Source::Cache => CACHE_BYTES / rates.multiprocessors,
        };
        Bound {
            arithmetic: MMA / rate,
            issue: f64::from(mix.total()) / ISSUED / products,
            shared: (shared_bytes(mix) + f64::from(self.copied_bytes)) / SHARED_BYTES / products,
            global: global / from_global / products,
        }
    }
}

/// Multiply-adds of a warp.
fn multiply_adds(mix: &Mix) -> f64 {
    let tensor: f64 = mix.forms(Class::TensorCore).map(|(form, count)| f64::from(count) * of_a_product(form)).sum();
    if tensor > 0.0 {
        return tensor;
    }
    let scalar = mix.forms(Class::Fma).map(|(form, count)| f64::from(count) * if form == "FFMA2" { 2.0 } else { 1.0 });
    WARP * scalar.sum::<f64>()
}

/// Multiply-adds of a tensor-core instruction by a warp: `HMMA.16816.F32`, or a quarter of what the four warps of
/// `HGMMA.64x128x16.F32` do together.
fn of_a_product(form: &str) -> f64 {
    let Some(shape) = form.split('.').nth(1) else { return 0.0 };
    let extents: Option<Vec<f64>> = shape.split('x').map(|extent| extent.parse().ok()).collect();
    match (shape, extents.as_deref()) {
        ("16816", _) => MMA,
        ("1688", _) => MMA / 2.0,
        ("16832", _) => MMA * 2.0,
        ("884", _) => MMA / 8.0,
        (_, Some([m, n, k])) => m * n * k / 4.0,
        _ => 0.0,
    }
}

/// Bytes that a warp moves to and from shared memory through registers, and what the products of four warps read there themselves.
fn shared_bytes(mix: &Mix) -> f64 {
    // A matrix is 8 × 8 of two bytes.
    let matrices = |form: &str| {
        form.rsplit('.').next().and_then(|count| count.parse().ok()).filter(|count| *count <= 4.0).unwrap_or(1.0)
    };
    let fragments = [Class::MatrixLoad, Class::MatrixStore].into_iter().flat_map(|class| mix.forms(class));
    let fragments: f64 = fragments.map(|(form, count)| 128.0 * f64::from(count) * matrices(form)).sum();
    let operands = mix.forms(Class::TensorCore).map(|(form, count)| {
        let extents: Option<Vec<f64>> =
            form.split('.').nth(1).and_then(|shape| shape.split('x').map(|extent| extent.parse().ok()).collect());
        match extents.as_deref() {
            // Both operands, by the four warps together.
            Some([m, n, k]) => f64::from(count) * 2.0 * k * (m + n) / 4.0,
            _ => 0.0,
        }
    });
    let operands: f64 = operands.sum();
    // In a main loop what may lie in any memory are fragments that are loaded by way of a pointer.
    let accesses = [Class::SharedLoad, Class::SharedStore, Class::Generic];
    fragments + operands + accesses.into_iter().map(|class| mix.bytes(class)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::listing::Listing;

    fn main_loop(program: &[(u32, &str)]) -> MainLoop {
        let lines: Vec<_> = program
            .iter()
            .flat_map(|(count, line)| vec![format!("        /*0000*/    {line} ;"); *count as usize])
            .collect();
        let text = format!(".L_loop:\n{}\n        /*0000*/    @P0 BRA `(.L_loop) ;", lines.join("\n"));
        MainLoop::find(&Listing::parse(&text), "k").unwrap()
    }

    #[test]
    fn each_unit_can_be_the_bound() {
        let products = (4, "HMMA.16816.F32 R8, R4, R6, R8");
        let dense = main_loop(&[products, (1, "LDSM.16.M88.4 R4, [R2]")]);
        assert_eq!((dense.products(), dense.slots()), (4.0, 6.0 / 4.0));
        let bound = dense.bound(Architecture::Sm80, Source::Cache);
        assert_eq!(bound, Bound { arithmetic: 2.0, issue: 6.0 / 16.0, shared: 1.0, global: 0.0 });
        assert_eq!(bound.longest(), (Unit::Arithmetic, 2.0));
        assert_eq!(dense.bound(Architecture::Sm90a, Source::Cache).longest(), (Unit::Arithmetic, 1.0));

        let many = main_loop(&[products, (59, "IADD3 R4, R5, R6, RZ")]);
        assert_eq!(many.bound(Architecture::Sm80, Source::Cache).longest(), (Unit::Issue, 4.0));
        let shared = main_loop(&[products, (4, "LDS.128 R4, [R2]"), (4, "STS.64 [R2], R4")]);
        assert_eq!(shared.bound(Architecture::Sm80, Source::Cache).longest(), (Unit::Shared, 6.0));
        let generic = main_loop(&[products, (16, "LD.E R4, [R2.64]"), (4, "LD.E.64 R4, [R2.64]")]);
        assert_eq!(generic.bound(Architecture::Sm80, Source::Cache).longest(), (Unit::Shared, 6.0));
        let loads = main_loop(&[products, (2, "LDG.E.128 R4, [R2.64]")]);
        let (unit, cycles) = loads.bound(Architecture::Sm80, Source::Memory).longest();
        assert_eq!((unit, (cycles * 100.0).round()), (Unit::Global, (256.0 / 13.39f64 * 100.0).round()));
        let (unit, cycles) = loads.bound(Architecture::Sm80, Source::Cache).longest();
        assert_eq!((unit, cycles), (Unit::Global, 256.0 / (5120.0 / 108.0)));
    }

    #[test]
    fn what_is_copied_past_registers_is_written_to_shared_memory() {
        let copied = main_loop(&[(4, "HMMA.16816.F32 R8, R4, R6, R8"), (1, "LDGSTS.E.BYPASS.128 [R5], [R2.64]")]);
        assert_eq!(copied.bound(Architecture::Sm80, Source::Cache).shared, 1.0);
    }

    #[test]
    fn other_products_count_by_their_multiply_adds() {
        assert_eq!(main_loop(&[(2, "HMMA.1688.F32.TF32 R8, R4, R6, R8")]).products(), 1.0);
        let four_warps = main_loop(&[(1, "HGMMA.64x128x16.F32 R24, gdesc[UR8], R24")]);
        assert_eq!(four_warps.products(), 16.0);
        assert_eq!(four_warps.bound(Architecture::Sm90a, Source::Cache).shared, 32.0 * 192.0 / 4.0 / 128.0 / 16.0);
        let scalar = main_loop(&[(64, "FFMA R4, R5, R6, R4")]);
        assert_eq!(scalar.products(), 1.0);
        assert_eq!(scalar.bound(Architecture::Sm80, Source::Cache).arithmetic, 32.0);
        assert_eq!(scalar.bound(Architecture::Sm90a, Source::Cache).arithmetic, 16.0);
    }
}
