//! One adapter of one part, as the kernels read it.

use flora_ir::algebra::FoldedAdapter;
use flora_plan::layer::Element;
use half::bf16;
use half::slice::HalfFloatSliceExt;
use pulp::Arch;

use super::error::AttachedError;
use super::rows::Widen;
use crate::buffer::Buffer;

/// Vectors begin on cache lines.
const LINE: usize = 32;

/// An adapter's vectors.
#[derive(Debug)]
pub(super) struct PlacedAdapter {
    pub(super) virtual_rows: Vec<Scales>,
    pub(super) in_vectors: Vectors,
    pub(super) out_vectors: Vectors,
    /// The first of the low-rank sum's in-vectors and out-vectors.
    pub(super) shrink: usize,
    pub(super) expand: usize,
    pub(super) rank: usize,
    /// Added to every row.
    pub(super) offset: Option<Vec<f32>>,
}

/// The scales of a virtual row; `None`: ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scales {
    pub(super) inner: Option<usize>,
    pub(super) outer: Option<usize>,
}

impl Scales {
    /// The virtual rows of the base.
    pub(super) const BASE: &[Self] = &[Self { inner: None, outer: None }];
}

/// What an adapter asks of the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    /// Its product with x, as it is.
    Product,
    /// Anything else.
    Scaled,
}

impl PlacedAdapter {
    pub(super) fn new(
        adapter: &FoldedAdapter,
        offset: Option<&[f32]>,
        (d, k): (usize, usize),
        kept: Element,
    ) -> Result<Self, AttachedError> {
        let wrong = |what, expected, found| AttachedError::WrongVector { what, expected, found };
        let mut in_vectors = VectorList { what: "in-vector", width: d, vectors: Vec::new() };
        let mut out_vectors = VectorList { what: "out-vector", width: k, vectors: Vec::new() };
        let mut virtual_rows = Vec::with_capacity(adapter.virtual_rows.len());
        for row in &adapter.virtual_rows {
            let inner = row.in_scale.as_deref().map(|scale| in_vectors.push(scale)).transpose()?;
            let outer = row.out_scale.as_deref().map(|scale| out_vectors.push(scale)).transpose()?;
            virtual_rows.push(Scales { inner, outer });
        }
        let (shrink, expand) = (in_vectors.vectors.len(), out_vectors.vectors.len());
        for pair in &adapter.low_rank {
            in_vectors.push(&pair.shrink)?;
            out_vectors.push(&pair.expand)?;
        }
        if let Some(offset) = offset.filter(|offset| offset.len() != k) {
            return Err(wrong("bias", k, offset.len()));
        }
        Ok(Self {
            virtual_rows,
            in_vectors: in_vectors.keep(kept),
            out_vectors: out_vectors.keep(kept),
            shrink,
            expand,
            rank: adapter.low_rank.len(),
            offset: offset.map(<[f32]>::to_vec),
        })
    }

    pub(super) fn needs(&self) -> Needs {
        match self.virtual_rows[..] {
            [Scales { inner: None, outer: None }] => Needs::Product,
            _ => Needs::Scaled,
        }
    }

    /// Whether it adds anything to its products.
    pub(super) fn adds(&self) -> bool {
        self.rank > 0 || self.offset.is_some()
    }

    pub(super) fn bytes(&self) -> usize {
        let offset = self.offset.as_ref().map_or(0, |offset| size_of_val(offset.as_slice()));
        self.in_vectors.bytes() + self.out_vectors.bytes() + offset
    }
}

/// Vectors that are still to be kept.
struct VectorList<'a> {
    what: &'static str,
    width: usize,
    vectors: Vec<&'a [f32]>,
}

impl<'a> VectorList<'a> {
    fn push(&mut self, vector: &'a [f32]) -> Result<usize, AttachedError> {
        if vector.len() != self.width {
            return Err(AttachedError::WrongVector { what: self.what, expected: self.width, found: vector.len() });
        }
        self.vectors.push(vector);
        Ok(self.vectors.len() - 1)
    }

    fn keep(&self, kept: Element) -> Vectors {
        let (width, pitch) = (self.width, self.width.next_multiple_of(LINE));
        let mut buffer = Buffer::default();
        let len = pitch * self.vectors.len();
        let is_bf16 = kept == Element::Bf16;
        if is_bf16 {
            let numbers: &mut [bf16] = buffer.numbers_mut(len);
            for (out, vector) in numbers.chunks_exact_mut(pitch).zip(&self.vectors) {
                out[..width].convert_from_f32_slice(vector);
                out[width..].fill(bf16::ZERO);
            }
        } else {
            for (out, vector) in buffer.floats(len).chunks_exact_mut(pitch).zip(&self.vectors) {
                out[..width].copy_from_slice(vector);
                out[width..].fill(0.0);
            }
        }
        Vectors { buffer, is_bf16, pitch, width, count: self.vectors.len() }
    }
}

/// Vectors one after the other, each on a cache line.
#[derive(Debug)]
pub(super) struct Vectors {
    buffer: Buffer,
    is_bf16: bool,
    pitch: usize,
    pub(super) width: usize,
    count: usize,
}

/// Vectors of floats.
#[derive(Clone, Copy)]
pub(super) struct Floats<'a> {
    pub(super) values: &'a [f32],
    pub(super) pitch: usize,
    pub(super) width: usize,
}

impl<'a> Floats<'a> {
    pub(super) fn vector(&self, at: usize) -> &'a [f32] {
        &self.values[at * self.pitch..][..self.width]
    }
}

impl Vectors {
    /// `count` vectors from `first` on: where they lie, or widened into `scratch`.
    pub(super) fn floats<'a>(&'a self, arch: Arch, first: usize, count: usize, scratch: &'a mut Buffer) -> Floats<'a> {
        let Self { pitch, width, .. } = *self;
        let range = first * pitch..(first + count) * pitch;
        let values = if self.is_bf16 {
            let widened = scratch.floats(range.len());
            arch.dispatch(Widen { values: &self.buffer.numbers()[range], out: widened });
            &*widened
        } else {
            &self.buffer.numbers()[range]
        };
        Floats { values, pitch, width }
    }

    fn bytes(&self) -> usize {
        self.count * self.pitch * if self.is_bf16 { size_of::<bf16>() } else { size_of::<f32>() }
    }
}
