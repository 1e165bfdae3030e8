//! Adapters around a product with a base weight that somebody else computes, where that one is faster, quantised in a format of its
//! own, or the only one that may hold the weight. The base is a linear map and nothing else:
//!
//! ```text
//! y = Σ_v out_v ∘ base(in_v ∘ x)  +  Σ_q (x · shrink_q) expand_q  +  bias  +  offset
//! ```
//!
//! [`AttachedAdapters::expand`] makes the *virtual inputs* in_v ∘ x, the owner of the base multiplies them, and
//! [`AttachedAdapters::combine`] does the rest. Where no row of a batch is scaled, the owner multiplies x itself, and
//! [`AttachedAdapters::add`] adds to what came out. An adapter has its own memory at its own rank, and nothing is padded.
//!
//! The order of every sum depends on the layer and the adapter alone, so that a row has the same bits whatever else is in its batch.

mod batch;
mod error;
mod kernels;
mod placed;
mod rows;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::Element;
use pulp::Arch;

use crate::pool::Pool;
use crate::scratch::Scratch;
pub use batch::{Grouping, Work};
pub use error::AttachedError;
use placed::PlacedAdapter;

/// The most slots of a layer.
const MOST_SLOTS: u32 = 1 << 20;

/// Adapters of one layer in numbered slots. The outputs of a layer may be several *parts* with adapters of their own, as where one
/// weight makes queries, keys and values.
pub struct AttachedAdapters {
    inputs: usize,
    /// Consecutive outputs.
    parts: Vec<Range<usize>>,
    /// The type that adapters are kept in: f32 or bf16.
    kept: Element,
    slots: RwLock<Slots>,
    arch: Arch,
    scratches: Pool<Scratch>,
}

/// By slot and part.
type Slots = Vec<Option<Vec<Option<Arc<PlacedAdapter>>>>>;

impl AttachedAdapters {
    /// Room for `slots` adapters of a layer with so many `inputs`, and so many outputs in each of `parts`. Adapters are kept in bf16
    /// where `adapters` says so, otherwise in f32.
    ///
    /// # Errors
    /// A layer without inputs or outputs, more slots than a table should have.
    pub fn new(inputs: usize, parts: &[usize], slots: u32, adapters: Element) -> Result<Self, AttachedError> {
        if inputs == 0 || parts.is_empty() || parts.contains(&0) {
            return Err(AttachedError::EmptyLayer { inputs, parts: parts.to_vec() });
        }
        if slots > MOST_SLOTS {
            return Err(AttachedError::TooManySlots { slots, most: MOST_SLOTS });
        }
        let mut end = 0;
        let parts = parts.iter().map(|outputs| {
            let start = end;
            end += outputs;
            start..end
        });
        Ok(Self {
            inputs,
            parts: parts.collect(),
            kept: if adapters == Element::Bf16 { Element::Bf16 } else { Element::F32 },
            slots: RwLock::new(vec![None; slots as usize]),
            arch: Arch::new(),
            scratches: Pool::default(),
        })
    }

    /// Numbers of a row of x.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Numbers of a row of y.
    pub fn outputs(&self) -> usize {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// The outputs of each part.
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// How many slots there are.
    pub fn slots(&self) -> usize {
        self.read().len()
    }

    /// Puts an adapter into a slot for one part, in place of what was there; `offset` `[outputs of the part]` is added to its rows. A
    /// batch that is being computed keeps what it had.
    ///
    /// # Errors
    /// A slot or a part that there isn't, a vector of another length than the layer's.
    pub fn put(
        &self,
        slot: usize,
        part: usize,
        adapter: &FoldedAdapter,
        offset: Option<&[f32]>,
    ) -> Result<(), AttachedError> {
        let columns = self.parts.get(part).ok_or(AttachedError::NoPart { part, parts: self.parts.len() })?;
        if !adapter.sparse.is_empty() {
            return Err(AttachedError::Sparse);
        }
        let placed = PlacedAdapter::new(adapter, offset, (self.inputs, columns.len()), self.kept)?;
        let parts = self.parts.len();
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let count = slots.len();
        let own = slots.get_mut(slot).ok_or(AttachedError::NoSlot { slot, slots: count })?;
        own.get_or_insert_with(|| vec![None; parts])[part] = Some(Arc::new(placed));
        Ok(())
    }

    /// Empties a slot: its rows are the base's from now on.
    ///
    /// # Errors
    /// A slot that there isn't.
    pub fn clear(&self, slot: usize) -> Result<(), AttachedError> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let count = slots.len();
        *slots.get_mut(slot).ok_or(AttachedError::NoSlot { slot, slots: count })? = None;
        Ok(())
    }

    /// Bytes that the adapters' vectors take.
    pub fn bytes(&self) -> usize {
        let slots = self.read();
        slots.iter().flatten().flatten().flatten().map(|adapter| adapter.bytes()).sum()
    }

    // A panic of another holder leaves the table as whole as any error does.
    fn read(&self) -> RwLockReadGuard<'_, Slots> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for AttachedAdapters {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "adapters of [{}, {}] in {} slots", self.inputs, self.outputs(), self.slots())
    }
}
