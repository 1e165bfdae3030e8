//! Borrowed numbers of any element type. They are widened as they are packed and rounded as they are written; between that
//! everything is f32.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use flora_plan::layer::Element;
use pulp::Simd;

use crate::layout::STRIP;
use crate::vectorise::vectorised;
use crate::widen::{round_all, widen_bf16};

/// Numbers to read.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// 16-bit IEEE floats.
    F16(&'a [f16]),
    /// 16-bit floats with f32's range.
    Bf16(&'a [bf16]),
}

/// Numbers to write.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// 16-bit IEEE floats.
    F16(&'a mut [f16]),
    /// 16-bit floats with f32's range.
    Bf16(&'a mut [bf16]),
}

impl<'a> Values<'a> {
    /// The first `count`, or all where there are no more.
    pub(crate) fn first(self, count: usize) -> Self {
        match self {
            Values::F32(values) => Values::F32(&values[..count.min(values.len())]),
            Values::F16(values) => Values::F16(&values[..count.min(values.len())]),
            Values::Bf16(values) => Values::Bf16(&values[..count.min(values.len())]),
        }
    }
}

impl Values<'_> {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Values::F32(values) => values.len(),
            Values::F16(values) => values.len(),
            Values::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Their type.
    pub fn element(&self) -> Element {
        match self {
            Values::F32(_) => Element::F32,
            Values::F16(_) => Element::F16,
            Values::Bf16(_) => Element::Bf16,
        }
    }

    /// Widens the numbers from `first` on into `out`.
    #[inline(always)]
    pub(crate) fn widen(&self, first: usize, out: &mut [f32]) {
        let range = first..first + out.len();
        match self {
            Values::F32(values) => out.copy_from_slice(&values[range]),
            Values::F16(values) => values[range].convert_to_f32_slice(out),
            Values::Bf16(values) => {
                out.iter_mut().zip(&values[range]).for_each(|(out, value)| *out = widen_bf16(*value));
            }
        }
    }
}

impl<'a> ValuesMut<'a> {
    /// The first `count`, or all where there are no more.
    pub(crate) fn first(self, count: usize) -> Self {
        match self {
            ValuesMut::F32(values) => ValuesMut::F32(first(values, count)),
            ValuesMut::F16(values) => ValuesMut::F16(first(values, count)),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(first(values, count)),
        }
    }
}

fn first<T>(values: &mut [T], count: usize) -> &mut [T] {
    let count = count.min(values.len());
    &mut values[..count]
}

impl ValuesMut<'_> {
    /// The same numbers for a while.
    pub fn reborrow(&mut self) -> ValuesMut<'_> {
        match self {
            ValuesMut::F32(values) => ValuesMut::F32(values),
            ValuesMut::F16(values) => ValuesMut::F16(values),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(values),
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        match self {
            ValuesMut::F32(values) => values.len(),
            ValuesMut::F16(values) => values.len(),
            ValuesMut::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Rows to read that need not follow one another: row i begins at the number i · pitch.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// From the first number of the first row to the last of the last one.
    pub values: Values<'a>,
    /// Numbers from the beginning of a row to that of the next.
    pub pitch: usize,
}

/// Rows that are read in place of others.
#[derive(Clone, Copy, Debug)]
pub struct Replaced<'a> {
    /// By row: which of these is read instead, or [`NOT_REPLACED`].
    pub places: &'a [u32],
    /// One row behind the other.
    pub values: &'a [f32],
}

/// The place of a row that nothing is read instead of.
pub const NOT_REPLACED: u32 = u32::MAX;

/// The same to write. What lies between rows is left alone.
#[derive(Debug)]
pub struct RowsMut<'a> {
    /// From the first number of the first row to the last of the last one.
    pub values: ValuesMut<'a>,
    /// Numbers from the beginning of a row to that of the next.
    pub pitch: usize,
}

impl RowsMut<'_> {
    /// Some columns of the first `rows` rows.
    ///
    /// # Panics
    /// Beyond the numbers that there are.
    pub fn columns(&mut self, rows: usize, columns: Range<usize>) -> RowsMut<'_> {
        let range = columns.start..columns.start + span(rows, columns.len(), self.pitch);
        let values = match &mut self.values {
            ValuesMut::F32(values) => ValuesMut::F32(&mut values[range]),
            ValuesMut::F16(values) => ValuesMut::F16(&mut values[range]),
            ValuesMut::Bf16(values) => ValuesMut::Bf16(&mut values[range]),
        };
        RowsMut { values, pitch: self.pitch }
    }
}

/// Numbers from the first of the first row to the last of the last one.
pub(crate) fn span(rows: usize, width: usize, pitch: usize) -> usize {
    rows.checked_sub(1).map_or(0, |steps| steps.saturating_mul(pitch).saturating_add(width))
}

/// Numbers that several threads write, each its own places.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T> {
    first: *mut T,
    len: usize,
}

// SAFETY: places are only reached through `slice`, whose callers promise that no two of them share one.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self { first: values.as_mut_ptr(), len: values.len() }
    }

    /// # Safety
    /// The slice that this was made of still lives, and nothing else refers to these places while the result lives.
    ///
    /// # Panics
    /// Beyond the end.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that places are not shared")]
    pub(crate) unsafe fn slice(&self, first: usize, len: usize) -> &mut [T] {
        assert!(first <= self.len && len <= self.len - first, "places {first} + {len} of {}", self.len);
        // SAFETY: within the slice by the assertion, unshared by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(first), len) }
    }

    /// `count` runs of `width` places, from one to the next `pitch`.
    ///
    /// # Safety
    /// As [`Shared::slice`], of all runs.
    ///
    /// # Panics
    /// Beyond the end.
    #[inline(always)]
    unsafe fn runs(&self, first: usize, pitch: usize, count: usize, width: usize) -> impl Iterator<Item = &mut [T]> {
        let len = span(count, width, pitch);
        assert!(first <= self.len && len <= self.len - first, "places {first} + {len} of {}", self.len);
        (0..count).map(
            #[inline(always)]
            move |at| {
                // SAFETY: within the slice by the assertion, unshared by the caller's promise.
                unsafe { std::slice::from_raw_parts_mut(self.first.add(first + at * pitch), width) }
            },
        )
    }
}

/// Where outputs are written.
#[derive(Clone, Copy)]
pub(crate) enum Sink {
    F32(Shared<f32>),
    F16(Shared<f16>),
    Bf16(Shared<bf16>),
}

impl Sink {
    pub(crate) fn new(values: &mut ValuesMut<'_>) -> Self {
        match values {
            ValuesMut::F32(values) => Sink::F32(Shared::new(values)),
            ValuesMut::F16(values) => Sink::F16(Shared::new(values)),
            ValuesMut::Bf16(values) => Sink::Bf16(Shared::new(values)),
        }
    }

    /// The same places as rows of `pitch` numbers.
    pub(crate) fn rows(self, pitch: usize) -> RowSink {
        RowSink { sink: self, pitch }
    }

    /// Rounds `values` to the places from `first` on.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    pub(crate) unsafe fn write<S: Simd>(&self, simd: S, first: usize, values: &[f32]) {
        // SAFETY: by the caller's promise.
        unsafe {
            match self {
                Sink::F32(out) => out.slice(first, values.len()).copy_from_slice(values),
                Sink::F16(out) => out.slice(first, values.len()).convert_from_f32_slice(values),
                Sink::Bf16(out) => {
                    let out = out.slice(first, values.len());
                    vectorised(
                        simd,
                        #[inline(always)]
                        || round_all(values, out),
                    );
                }
            }
        }
    }
}

/// Where rows of outputs are written.
#[derive(Clone, Copy)]
pub(crate) struct RowSink {
    sink: Sink,
    pitch: usize,
}

impl RowSink {
    /// Rounds `values` to the places of a row from `column` on.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    pub(crate) unsafe fn write<S: Simd>(&self, simd: S, row: usize, column: usize, values: &[f32]) {
        // SAFETY: by the caller's promise.
        unsafe { self.sink.write(simd, row * self.pitch + column, values) }
    }

    /// Rounds columns of a strip to those of the rows from `first` on, within a loop that is compiled for the instruction set.
    ///
    /// # Safety
    /// As [`Shared::slice`].
    #[inline(always)]
    pub(crate) unsafe fn write_strip(&self, first: usize, columns: Range<usize>, values: &[[f32; STRIP]]) {
        let Self { sink, pitch } = self;
        let (start, rows, width) = (first * pitch + columns.start, values.len(), columns.len());
        // SAFETY: by the caller's promise.
        unsafe {
            match sink {
                // Whole strips in a loop of their own, for which the compiler knows how long they are.
                Sink::F32(out) if width == STRIP => {
                    for (out, values) in out.runs(start, *pitch, rows, STRIP).zip(values) {
                        if let Some(out) = out.first_chunk_mut() {
                            *out = *values;
                        }
                    }
                }
                Sink::F32(out) => {
                    let rows = out.runs(start, *pitch, rows, width).zip(values);
                    rows.for_each(|(out, values)| out.copy_from_slice(&values[..width]));
                }
                Sink::F16(out) => {
                    let rows = out.runs(start, *pitch, rows, width).zip(values);
                    rows.for_each(|(out, values)| out.convert_from_f32_slice(&values[..width]));
                }
                Sink::Bf16(out) if width == STRIP => {
                    for (out, values) in out.runs(start, *pitch, rows, STRIP).zip(values) {
                        round_all(values, out);
                    }
                }
                Sink::Bf16(out) => {
                    for (out, values) in out.runs(start, *pitch, rows, width).zip(values) {
                        round_all(&values[..width], out);
                    }
                }
            }
        }
    }
}
