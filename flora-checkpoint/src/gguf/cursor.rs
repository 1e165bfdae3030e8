//! A position in the file that only moves over bytes that are there.

use super::GgufProblem;
use crate::tensor::SharedBytes;

pub(super) struct Cursor<'a> {
    shared: &'a SharedBytes,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(shared: &'a SharedBytes) -> Self {
        Self { shared, bytes: shared.as_slice(), position: 0 }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// The next `length` bytes.
    pub(super) fn take(&mut self, length: u64, what: &'static str) -> Result<&'a [u8], GgufProblem> {
        let truncated = GgufProblem::Truncated { what, offset: self.position };
        let Some(end) = usize::try_from(length).ok().and_then(|length| self.position.checked_add(length)) else {
            return Err(truncated);
        };
        let taken = self.bytes.get(self.position..end).ok_or(truncated)?;
        self.position = end;
        Ok(taken)
    }

    /// The bytes from `start` up to here, sharing the file's storage.
    pub(super) fn since(&self, start: usize) -> SharedBytes {
        let length = self.position.saturating_sub(start);
        self.shared.slice(start, length).unwrap_or_else(|| Vec::new().into())
    }

    pub(super) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufProblem> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, GgufProblem> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, GgufProblem> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A length of 8 bytes and that many bytes of UTF-8.
    pub(super) fn string(&mut self, what: &'static str) -> Result<&'a str, GgufProblem> {
        let length = self.u64(what)?;
        let offset = self.position;
        std::str::from_utf8(self.take(length, what)?).map_err(|_| GgufProblem::NotUtf8 { what, offset })
    }
}
