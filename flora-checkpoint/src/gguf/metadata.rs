//! Typed metadata values. Arrays are views into the file: a vocabulary costs nothing until it is read.

use super::GgufProblem;
use super::cursor::Cursor;
use crate::tensor::SharedBytes;

/// The type of a metadata value or of an array's elements, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, GgufProblem> {
        let offset = cursor.position();
        let found = cursor.u32("a metadata type")?;
        let known = Self::ALL.get(found as usize).copied();
        known.ok_or(GgufProblem::UnknownValueType { found, offset })
    }

    /// The bytes of an element, where all elements have the same number.
    fn size(self) -> Option<u64> {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => Some(1),
            ValueType::U16 | ValueType::I16 => Some(2),
            ValueType::U32 | ValueType::I32 | ValueType::F32 => Some(4),
            ValueType::U64 | ValueType::I64 | ValueType::F64 => Some(8),
            ValueType::String | ValueType::Array => None,
        }
    }
}

/// A metadata value.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "the names say it all")]
pub enum MetadataValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(MetadataArray),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl MetadataValue {
    pub(super) fn read(cursor: &mut Cursor<'_>) -> Result<Self, GgufProblem> {
        match ValueType::read(cursor)? {
            ValueType::Array => MetadataArray::read(cursor).map(MetadataValue::Array),
            scalar => Self::read_scalar(cursor, scalar),
        }
    }

    fn read_scalar(cursor: &mut Cursor<'_>, kind: ValueType) -> Result<Self, GgufProblem> {
        let what = "a metadata value";
        Ok(match kind {
            ValueType::U8 => MetadataValue::U8(u8::from_le_bytes(cursor.array(what)?)),
            ValueType::I8 => MetadataValue::I8(i8::from_le_bytes(cursor.array(what)?)),
            ValueType::U16 => MetadataValue::U16(u16::from_le_bytes(cursor.array(what)?)),
            ValueType::I16 => MetadataValue::I16(i16::from_le_bytes(cursor.array(what)?)),
            ValueType::U32 => MetadataValue::U32(u32::from_le_bytes(cursor.array(what)?)),
            ValueType::I32 => MetadataValue::I32(i32::from_le_bytes(cursor.array(what)?)),
            ValueType::F32 => MetadataValue::F32(f32::from_le_bytes(cursor.array(what)?)),
            ValueType::Bool => MetadataValue::Bool(u8::from_le_bytes(cursor.array(what)?) != 0),
            ValueType::U64 => MetadataValue::U64(u64::from_le_bytes(cursor.array(what)?)),
            ValueType::I64 => MetadataValue::I64(i64::from_le_bytes(cursor.array(what)?)),
            ValueType::F64 => MetadataValue::F64(f64::from_le_bytes(cursor.array(what)?)),
            ValueType::String => MetadataValue::String(cursor.string(what)?.to_string()),
            ValueType::Array => return Err(GgufProblem::NestedArray { offset: cursor.position() }),
        })
    }

    /// The value of any integer type that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            MetadataValue::U8(value) => Some(value.into()),
            MetadataValue::U16(value) => Some(value.into()),
            MetadataValue::U32(value) => Some(value.into()),
            MetadataValue::U64(value) => Some(value),
            MetadataValue::I8(value) => value.try_into().ok(),
            MetadataValue::I16(value) => value.try_into().ok(),
            MetadataValue::I32(value) => value.try_into().ok(),
            MetadataValue::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            MetadataValue::String(text) => Some(text),
            _ => None,
        }
    }
}

/// An array of scalars or strings, still in the file and already checked to be whole.
#[derive(Clone, Debug)]
pub struct MetadataArray {
    element: ValueType,
    length: u64,
    bytes: SharedBytes,
}

impl MetadataArray {
    fn read(cursor: &mut Cursor<'_>) -> Result<Self, GgufProblem> {
        let what = "a metadata array";
        let offset = cursor.position();
        let element = ValueType::read(cursor)?;
        let length = cursor.u64(what)?;
        let start = cursor.position();
        match (element, element.size()) {
            (ValueType::Array, _) => return Err(GgufProblem::NestedArray { offset }),
            (_, Some(size)) => {
                let bytes = length.checked_mul(size).ok_or(GgufProblem::Truncated { what, offset })?;
                cursor.take(bytes, what)?;
            }
            (_, None) => {
                for _ in 0..length {
                    cursor.string(what)?;
                }
            }
        }
        Ok(Self { element, length, bytes: cursor.since(start) })
    }

    /// The type of the elements.
    pub fn element(&self) -> ValueType {
        self.element
    }

    /// The number of elements.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The elements in order, decoded one at a time.
    pub fn iter(&self) -> impl Iterator<Item = MetadataValue> + '_ {
        let mut cursor = Cursor::new(&self.bytes);
        // Every element was read once when the file was opened, so none fails now.
        (0..self.length).map_while(move |_| MetadataValue::read_scalar(&mut cursor, self.element).ok())
    }
}
