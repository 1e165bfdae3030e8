//! Rows that are read and written as floats, whatever type they have.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};

use crate::buffer::Buffer;
use crate::values::{Rows, RowsMut, Shared, Values, ValuesMut, span};
use crate::vectorise::vectorised;
use crate::widen::{round_all, widen, widen_bf16};

/// Rows of x as floats.
#[derive(Clone, Copy)]
pub(super) struct FloatRows<'a> {
    pub(super) values: &'a [f32],
    pub(super) pitch: usize,
    pub(super) width: usize,
}

impl<'a> FloatRows<'a> {
    pub(super) fn of(
        arch: Arch,
        x: Rows<'a>,
        (first, count): (usize, usize),
        width: usize,
        scratch: &'a mut Buffer,
    ) -> Self {
        match x.values {
            Values::F32(values) => Self { values: &values[first * x.pitch..], pitch: x.pitch, width },
            values => {
                let widened = scratch.floats(count * width);
                for (row, out) in widened.chunks_exact_mut(width).enumerate() {
                    read(arch, values, (first + row) * x.pitch, out);
                }
                Self { values: widened, pitch: width, width }
            }
        }
    }
}

/// Widens numbers from `first` on.
pub(super) fn read(arch: Arch, values: Values<'_>, first: usize, out: &mut [f32]) {
    match values {
        Values::Bf16(values) => arch.dispatch(Widen { values: &values[first..first + out.len()], out }),
        values => values.widen(first, out),
    }
}

/// y, which several threads write.
#[derive(Clone, Copy)]
pub(super) struct Output {
    numbers: Numbers,
    pitch: usize,
    arch: Arch,
}

#[derive(Clone, Copy)]
enum Numbers {
    F32(Shared<f32>),
    F16(Shared<f16>),
    Bf16(Shared<bf16>),
}

impl Output {
    pub(super) fn new(arch: Arch, rows: &mut RowsMut<'_>) -> Self {
        let numbers = match &mut rows.values {
            ValuesMut::F32(values) => Numbers::F32(Shared::new(values)),
            ValuesMut::F16(values) => Numbers::F16(Shared::new(values)),
            ValuesMut::Bf16(values) => Numbers::Bf16(Shared::new(values)),
        };
        Self { numbers, pitch: rows.pitch, arch }
    }

    /// Rounds `values` to a row from `column` on.
    ///
    /// # Safety
    /// What this was made of still lives, and nothing else refers to these places.
    pub(super) unsafe fn write(&self, row: usize, column: usize, values: &[f32]) {
        let first = row * self.pitch + column;
        // SAFETY: by the caller's promise.
        unsafe {
            match self.numbers {
                Numbers::F32(out) => out.slice(first, values.len()).copy_from_slice(values),
                Numbers::F16(out) => out.slice(first, values.len()).convert_from_f32_slice(values),
                Numbers::Bf16(out) => self.arch.dispatch(Round { values, out: out.slice(first, values.len()) }),
            }
        }
    }

    /// Lets `change` change some columns of `count` rows, which it gets as floats and with the distance of one row to the next.
    ///
    /// # Safety
    /// As [`Self::write`].
    pub(super) unsafe fn update(
        &self,
        first: usize,
        count: usize,
        columns: &Range<usize>,
        scratch: &mut Buffer,
        change: impl FnOnce(&mut [f32], usize),
    ) {
        let (width, pitch) = (columns.len(), self.pitch);
        if let Numbers::F32(values) = self.numbers {
            // What lies between a part's columns of these rows are other parts of the same rows, which are this task's, too.
            // SAFETY: by the caller's promise, and because a task does one part after the other.
            let rows = unsafe { values.slice(first * pitch + columns.start, span(count, width, pitch)) };
            return change(rows, pitch);
        }
        let floats = scratch.floats(count * width);
        for (row, out) in floats.chunks_exact_mut(width).enumerate() {
            // SAFETY: by the caller's promise.
            unsafe { self.read(first + row, columns.start, out) };
        }
        change(floats, width);
        for (row, values) in floats.chunks_exact(width).enumerate() {
            // SAFETY: by the caller's promise.
            unsafe { self.write(first + row, columns.start, values) };
        }
    }

    /// # Safety
    /// As [`Self::write`].
    unsafe fn read(&self, row: usize, column: usize, out: &mut [f32]) {
        let first = row * self.pitch + column;
        // SAFETY: by the caller's promise.
        unsafe {
            match self.numbers {
                Numbers::F32(values) => out.copy_from_slice(values.slice(first, out.len())),
                Numbers::F16(values) => values.slice(first, out.len()).convert_to_f32_slice(out),
                Numbers::Bf16(values) => self.arch.dispatch(Widen { values: values.slice(first, out.len()), out }),
            }
        }
    }
}

/// bf16 to floats.
pub(super) struct Widen<'a> {
    pub(super) values: &'a [bf16],
    pub(super) out: &'a mut [f32],
}

impl WithSimd for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        widen(simd, self.values, widen_bf16, self.out);
    }
}

/// Floats to bf16.
struct Round<'a> {
    values: &'a [f32],
    out: &'a mut [bf16],
}

impl WithSimd for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { values, out } = self;
        vectorised(
            simd,
            #[inline(always)]
            || round_all(values, out),
        );
    }
}
