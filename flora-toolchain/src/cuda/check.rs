//! What must hold of a kernel's machine code, whatever its speed.

use std::collections::BTreeMap;

use serde::Serialize;

use super::Compiled;
use super::mix::{Class, Mix};

/// What a kernel should compile to, which its blueprint knows and its machine code doesn't say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expectations {
    /// It multiplies matrices of a half type, so its main loop should run on tensor cores.
    pub half_types: bool,
    /// It reads a base weight whose sizes allow loads of 16 bytes.
    pub wide_weight_loads: bool,
    /// It fetches the next step of its main loop while it multiplies one.
    pub fetches_ahead: bool,
}

/// Something that makes a kernel slower than it has to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(tag = "defect", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Defect {
    /// Registers ran out.
    #[error(
        "registers spill to local memory ({store_bytes} bytes of stores, {load_bytes} bytes of loads a thread): use smaller \
         tiles or fewer threads a block"
    )]
    Spills {
        /// Bytes that a thread's spilled values take in stores.
        store_bytes: u32,
        /// The same in loads.
        load_bytes: u32,
    },
    /// An array that should be in registers lies in local memory.
    #[error(
        "{bytes} bytes of arrays a thread lie in local memory, because they are indexed by a variable: unroll the loops over \
         them"
    )]
    LocalArrays {
        /// Bytes a thread.
        bytes: u32,
    },
    /// The main loop of a kernel for half types does without tensor cores.
    #[error(
        "the main loop has no tensor-core instruction although it multiplies half types ({elsewhere} outside of it)"
    )]
    NoTensorCore {
        /// Tensor-core instructions in the rest of the kernel.
        elsewhere: u32,
    },
    /// Every load of the main loop is waited for before it multiplies.
    #[error(
        "no load of 16 bytes is under way while the main loop multiplies: the assembler moved what is fetched ahead behind \
         the products, or something touches it before them"
    )]
    WaitsForLoads,
    /// No load of 16 bytes where there should be one.
    #[error("no load from global memory around the main loop is 16 bytes wide (by width: {})", list(.loads))]
    NarrowLoads {
        /// The loads that there are, by width; see [`Mix`].
        loads: BTreeMap<String, u32>,
    },
}

impl Compiled {
    /// The defects of this machine code; none in a good kernel.
    ///
    /// Loads are looked for in the loop nest that holds the main loop, and in the whole kernel where no loop multiplies.
    #[must_use]
    pub fn defects(&self, expectations: Expectations) -> Vec<Defect> {
        let Expectations { half_types, wide_weight_loads, fetches_ahead } = expectations;
        let main = self.main_loop.as_ref();
        let nest = main.map_or(&self.mix, |main| &main.nest);
        let products = main.map_or(0, |main| main.mix.count(Class::TensorCore));
        let rows = [
            (
                self.spill_bytes > 0,
                Defect::Spills { store_bytes: self.spill_store_bytes, load_bytes: self.spill_load_bytes() },
            ),
            // Spilled values lie in the same frame, so its size says nothing where there are some.
            (self.spill_bytes == 0 && self.stack_bytes > 0, Defect::LocalArrays { bytes: self.stack_bytes }),
            (half_types && products == 0, Defect::NoTensorCore { elsewhere: self.mix.count(Class::TensorCore) }),
            (wide_weight_loads && nest.wide_global_loads() == 0, Defect::NarrowLoads { loads: loads(nest) }),
            (fetches_ahead && main.is_some_and(|main| main.loads_ahead == 0), Defect::WaitsForLoads),
        ];
        rows.into_iter().filter(|(found, _)| *found).map(|(_, defect)| defect).collect()
    }
}

/// The loads from global memory by width.
pub(super) fn loads(mix: &Mix) -> BTreeMap<String, u32> {
    mix.forms(Class::GlobalLoad).map(|(width, count)| (width.to_owned(), count)).collect()
}

/// Counts by name, for people.
fn list(counts: &BTreeMap<String, u32>) -> String {
    match counts.len() {
        0 => "none at all".to_owned(),
        _ => counts.iter().map(|(name, count)| format!("{name}×{count}")).collect::<Vec<_>>().join(" "),
    }
}
