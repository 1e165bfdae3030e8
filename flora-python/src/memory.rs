//! Memory of other people's programs: the only place of this crate that reads and writes through addresses.
//!
//! What it relies on: whoever calls the C interface, or the native module behind the Python package, says that for as long as the
//! call runs there are numbers of the given type at the given addresses, as many as extents and strides say, which nobody else writes,
//! and, where something is written, nobody else reads. That can't be checked from here. The Python package takes addresses from
//! tensors and arrays, which it holds until the call is over, and checks their types, devices and shapes; of raw addresses the
//! caller's word is all there is. What can be checked is: null, alignment, extents that overflow, rows that overlap.
#![allow(unsafe_code, reason = "numbers are read and written where others say that they are")]

use std::ffi::{CStr, c_char};

use flora_host::{Rows, RowsMut, Values, ValuesMut};
use flora_plan::layer::Element;
use half::{bf16, f16};

use crate::error::Error;

/// The type of numbers somewhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NumberType {
    /// Those that layers compute with.
    Element(Element),
    /// 64-bit floats, which adapters may come in.
    F64,
}

impl NumberType {
    fn bytes(self) -> u64 {
        match self {
            Self::Element(element) => element.bytes(),
            Self::F64 => 8,
        }
    }
}

/// A tensor somewhere else.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) address: usize,
    pub(crate) numbers: NumberType,
    pub(crate) shape: Vec<usize>,
    /// Numbers from one place of an extent to the next.
    pub(crate) strides: Vec<isize>,
}

/// Rows somewhere else: row i begins `pitch` · i numbers after the address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowsAt {
    pub(crate) address: usize,
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) pitch: usize,
}

/// The first of `count` numbers at an address, if it can be one.
fn pointer<T>(what: &str, address: usize, count: usize) -> Result<*mut T, Error> {
    let bytes = count.checked_mul(size_of::<T>()).filter(|bytes| isize::try_from(*bytes).is_ok());
    if bytes.and_then(|bytes| address.checked_add(bytes)).is_none() {
        return Err(Error::shape(what, format!("would have {count} numbers, more than there is memory")));
    }
    if count == 0 {
        return Ok(std::ptr::NonNull::dangling().as_ptr());
    }
    if address == 0 || !address.is_multiple_of(align_of::<T>()) {
        let problem = format!("is at the address {address:#x}, where no such number can be");
        return Err(Error::shape(what, problem));
    }
    Ok(std::ptr::with_exposed_provenance_mut(address))
}

fn numbers<'a, T>(what: &str, address: usize, count: usize) -> Result<&'a [T], Error> {
    let first = pointer::<T>(what, address, count)?;
    // SAFETY: not null and aligned, as checked; that so many numbers are there and stay as they are is the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(first, count) })
}

fn numbers_mut<'a, T>(what: &str, address: usize, count: usize) -> Result<&'a mut [T], Error> {
    let first = pointer::<T>(what, address, count)?;
    // SAFETY: as above, and that nobody else reads or writes them.
    Ok(unsafe { std::slice::from_raw_parts_mut(first, count) })
}

/// The slots of rows.
pub(crate) fn slots<'a>(address: usize, count: usize) -> Result<&'a [i64], Error> {
    numbers("the slots of the rows", address, count)
}

/// The operands of an adapter.
pub(crate) fn operands<'a>(
    first: *const crate::c::FloraOperand,
    count: usize,
) -> Result<&'a [crate::c::FloraOperand], Error> {
    numbers("the operands", first.expose_provenance(), count)
}

/// f32 numbers that are to be written.
pub(crate) fn floats_mut<'a>(what: &str, address: usize, count: usize) -> Result<&'a mut [f32], Error> {
    numbers_mut(what, address, count)
}

/// Text that ends with a zero.
pub(crate) fn text<'a>(what: &str, address: *const c_char) -> Result<&'a str, Error> {
    if address.is_null() {
        return Err(Error::shape(what, "is null"));
    }
    // SAFETY: not null; that it ends is the caller's word.
    let text = unsafe { CStr::from_ptr(address) };
    text.to_str().map_err(|_| Error::shape(what, "isn't UTF-8"))
}

impl RowsAt {
    /// Numbers from the first of the first row to the last of the last one.
    fn span(&self, what: &str) -> Result<usize, Error> {
        let Self { rows, width, pitch, .. } = *self;
        if rows > 1 && pitch < width {
            return Err(Error::shape(what, format!("has rows of {width} numbers that begin {pitch} apart")));
        }
        let Some(steps) = rows.checked_sub(1) else { return Ok(0) };
        let span = steps.checked_mul(pitch).and_then(|last| last.checked_add(width));
        span.ok_or_else(|| {
            Error::shape(what, format!("would have {rows} rows {pitch} apart, more than there is memory"))
        })
    }

    /// From one row to the next, where there is a next.
    fn pitch(&self) -> usize {
        self.pitch.max(self.width)
    }

    /// To read.
    pub(crate) fn read<'a>(&self, what: &str, element: Element) -> Result<Rows<'a>, Error> {
        let (address, count) = (self.address, self.span(what)?);
        let values = match element {
            Element::F32 => Values::F32(numbers(what, address, count)?),
            Element::F16 => Values::F16(numbers::<f16>(what, address, count)?),
            Element::Bf16 => Values::Bf16(numbers::<bf16>(what, address, count)?),
        };
        Ok(Rows { values, pitch: self.pitch() })
    }

    /// To write.
    pub(crate) fn write<'a>(&self, what: &str, element: Element) -> Result<RowsMut<'a>, Error> {
        let (address, count) = (self.address, self.span(what)?);
        let values = match element {
            Element::F32 => ValuesMut::F32(numbers_mut(what, address, count)?),
            Element::F16 => ValuesMut::F16(numbers_mut::<f16>(what, address, count)?),
            Element::Bf16 => ValuesMut::Bf16(numbers_mut::<bf16>(what, address, count)?),
        };
        Ok(RowsMut { values, pitch: self.pitch() })
    }
}

impl Tensor {
    /// All numbers, row-major, widened (f64: rounded).
    pub(crate) fn to_f32(&self, what: &str) -> Result<Vec<f32>, Error> {
        match self.numbers {
            NumberType::Element(Element::F32) => self.gather::<f32, _>(what, |number| number),
            NumberType::Element(Element::F16) => self.gather::<f16, _>(what, f16::to_f32),
            NumberType::Element(Element::Bf16) => self.gather::<bf16, _>(what, bf16::to_f32),
            NumberType::F64 => self.gather::<f64, _>(what, |number| number as f32),
        }
    }

    /// Some rows of a matrix.
    pub(crate) fn rows(&self, rows: &std::ops::Range<usize>) -> Result<Self, Error> {
        let ([_, columns], [row_stride, _]) = (&self.shape[..], &self.strides[..]) else {
            return Err(Error::shape("a matrix", format!("has the shape {:?}", self.shape)));
        };
        let bytes = (rows.start as isize).wrapping_mul(*row_stride).wrapping_mul(self.numbers.bytes() as isize);
        let address = self.address.wrapping_add_signed(bytes);
        Ok(Self { address, shape: vec![rows.len(), *columns], ..self.clone() })
    }

    /// The same numbers with their extents in the other order.
    pub(crate) fn transposed(mut self) -> Self {
        self.shape.reverse();
        self.strides.reverse();
        self
    }

    /// The same in f64.
    pub(crate) fn to_f64(&self, what: &str) -> Result<Vec<f64>, Error> {
        match self.numbers {
            NumberType::Element(Element::F32) => self.gather::<f32, _>(what, f64::from),
            NumberType::Element(Element::F16) => self.gather::<f16, _>(what, f16::to_f64),
            NumberType::Element(Element::Bf16) => self.gather::<bf16, _>(what, bf16::to_f64),
            NumberType::F64 => self.gather::<f64, _>(what, |number| number),
        }
    }

    fn gather<T: Copy, U>(&self, what: &str, widen: impl Fn(T) -> U) -> Result<Vec<U>, Error> {
        let (rows, columns, row_stride, stride) = match (&self.shape[..], &self.strides[..]) {
            ([], []) => (1, 1, 0, 0),
            ([length], [stride]) => (1, *length, 0, *stride),
            ([rows, columns], [row_stride, stride]) => (*rows, *columns, *row_stride, *stride),
            (shape, _) => {
                return Err(Error::shape(what, format!("has the shape {shape:?}; it takes 2 extents at most")));
            }
        };
        let count = rows.checked_mul(columns).filter(|count| *count <= isize::MAX as usize / size_of::<U>());
        let count = count.ok_or_else(|| Error::shape(what, format!("has the shape {:?}", self.shape)))?;
        let mut gathered = Vec::with_capacity(count);
        if count == 0 {
            return Ok(gathered);
        }
        let first: *const T = pointer::<T>(what, self.address, 1)?;
        for row in 0..rows as isize {
            // Wrapping, because only the last step leads to a number that has to be there.
            let first = first.wrapping_offset(row.wrapping_mul(row_stride));
            gathered.extend((0..columns as isize).map(|column| {
                // SAFETY: aligned, as the first number is; that it is there is the caller's word.
                widen(unsafe { first.wrapping_offset(column.wrapping_mul(stride)).read() })
            }));
        }
        Ok(gathered)
    }
}
