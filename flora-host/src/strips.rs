//! A matrix `[depth, columns]` as the strips that the kernel multiplies by: where it lies, or packed.

use pulp::Simd;

use crate::kernel::{Strip, strip_columns, vectors_at_once};

/// The columns of a panel, the first `whole` where they lie and the others packed.
#[derive(Clone, Copy)]
pub(crate) struct Strips<'a> {
    /// From the first column on; `pitch` floats from one depth to the next.
    pub(crate) in_place: &'a [f32],
    pub(crate) pitch: usize,
    /// Whole strips of them.
    pub(crate) whole: usize,
    /// The other strips, one after the other, padded to whole ones.
    pub(crate) packed: &'a [f32],
    /// Floats from one packed strip to the next.
    pub(crate) strip_pitch: usize,
    /// All columns, rounded up to strips.
    pub(crate) columns: usize,
}

/// Columns that are multiplied at once.
pub(crate) struct Piece<'a> {
    pub(crate) first: usize,
    pub(crate) vectors: usize,
    pub(crate) weight: Strip<'a>,
}

impl<'a> Strips<'a> {
    /// The columns in pieces that suit a tile of so many rows.
    pub(crate) fn pieces<S: Simd>(&self, rows: usize) -> impl Iterator<Item = Piece<'a>> {
        let (strips, strip, most) = (*self, strip_columns::<S>(), vectors_at_once::<S>(rows));
        let in_place = strips.whole * strip;
        let mut first = 0;
        std::iter::from_fn(move || {
            let own = first;
            if own >= strips.columns {
                return None;
            }
            let (vectors, weight) = if own < in_place {
                let vectors = if in_place - own < most * S::F32_LANES { 2 } else { most };
                (vectors, Strip { values: &strips.in_place[own..], pitch: strips.pitch })
            } else {
                let at = (own - in_place) / strip * strips.strip_pitch;
                (2, Strip { values: &strips.packed[at..], pitch: strip })
            };
            first += vectors * S::F32_LANES;
            Some(Piece { first: own, vectors, weight })
        })
    }
}
