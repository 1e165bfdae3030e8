//! What a decoder does to rows between its projections, on devices whose keys and values are in pools: norms, products, and attention
//! of all sequences of a step at once. What a kernel trusts is checked here, once for all of them.

mod pool;

use std::ops::Range;
use std::sync::Arc;

use flora_plan::layer::Element;
use flora_plan::schedule::Kept;

use crate::backend::Storage;
use crate::buffer::Buffer;
use crate::device::{Device, DeviceError};
use crate::operands::OperandError;

pub use pool::{BLOCK_TOKENS, KeyValueBlock, KeyValueCache, KeyValuePool};

/// Heads of a model's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads, a multiple of the key-value heads.
    pub queries: usize,
    /// Key-value heads.
    pub keys: usize,
    /// Numbers of a head.
    pub size: usize,
}

/// A norm's numbers on a device, f32.
#[derive(Clone, Debug)]
pub struct Norm<T = Buffer> {
    /// `[width]`
    pub gamma: T,
    /// `[width]`; `None`: the root of the mean square, without an offset.
    pub beta: Option<T>,
    /// Added to the mean square or the variance.
    pub epsilon: f32,
}

/// Some columns of a matrix.
#[derive(Debug)]
pub struct Columns<'a, T = Buffer> {
    /// `[rows, width]`
    pub matrix: &'a T,
    /// Numbers of a row, those of other columns among them.
    pub width: usize,
    /// The first of the columns.
    pub first: usize,
}

/// Cosines and sines of a step's rows, `[rows, 2, pairs]` in f32: pair i of a head is (i, i + pairs).
#[derive(Clone, Debug)]
pub struct Rotary {
    rows: Buffer,
    pairs: usize,
}

/// What attention reads, apart from keys and values of earlier steps.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// Heads.
    pub heads: Heads,
    /// `query heads · size` columns.
    pub queries: Columns<'a>,
    /// `key-value heads · size` columns.
    pub keys: Columns<'a>,
    /// `key-value heads · size` columns.
    pub values: Columns<'a>,
    /// What queries and keys are turned by; `None` where positions are in the embedding.
    pub rotary: Option<&'a Rotary>,
    /// How many tokens a token sees, itself and those before it; `None`: all.
    pub window: Option<usize>,
    /// Tables that the layers of a step have in common.
    pub kept: &'a Kept,
}

/// The rows of one sequence.
#[derive(Debug)]
pub struct AttentionSegment<'a> {
    /// Its rows. The first follows the cache's last token.
    pub rows: Range<usize>,
    /// The tokens before; the rows' keys and values are appended.
    pub cache: &'a mut KeyValueCache,
}

/// What a backend's attention is given: what [`DecoderOperations::attend`] has checked.
#[derive(Clone, Debug)]
pub struct AttentionOperands<'a> {
    /// Heads.
    pub heads: Heads,
    /// The type of all rows, keys and values.
    pub element: Element,
    /// Rows of the step.
    pub rows: usize,
    /// Queries.
    pub queries: Columns<'a, Storage>,
    /// Keys.
    pub keys: Columns<'a, Storage>,
    /// Values.
    pub values: Columns<'a, Storage>,
    /// `[rows, 2, size / 2]`, f32
    pub rotary: Option<&'a Storage>,
    /// At least 1.
    pub window: Option<u32>,
    /// Keys and values: `[blocks, 2, key-value heads, BLOCK_TOKENS, size]`, keys first.
    pub pool: &'a Storage,
    /// Blocks of the pool.
    pub pool_blocks: usize,
    /// Blocks that are copied before anything else is done: from which, and to which.
    pub copies: Vec<[u32; 2]>,
    /// The sequences; their rows follow one another and are all rows.
    pub segments: Vec<SegmentOperands>,
    /// Tables that the layers of a step have in common.
    pub kept: &'a Kept,
}

/// One sequence of a step.
#[derive(Clone, Debug)]
pub struct SegmentOperands {
    /// Its rows.
    pub rows: Range<usize>,
    /// The position of the first.
    pub first_position: usize,
    /// Where its keys and values lie, up to those of its last row.
    pub blocks: Vec<u32>,
}

/// How a kind of device does what [`DecoderOperations`] offers.
pub trait DecoderKernels: Send + Sync {
    /// x `[rows, width]`, the result the same.
    ///
    /// # Errors
    /// More than the device takes in a launch or a buffer, as of all others.
    fn normalise(
        &self,
        x: &Storage,
        shape: [usize; 2],
        norm: Norm<&Storage>,
        element: Element,
    ) -> Result<Storage, DeviceError>;

    /// one ∘ other, `[count]` each.
    ///
    /// # Errors
    /// As above.
    fn multiply(&self, factors: [&Storage; 2], count: usize, element: Element) -> Result<Storage, DeviceError>;

    /// Some rows of x `[_, width]`.
    ///
    /// # Errors
    /// As above.
    fn select(&self, x: &Storage, width: usize, rows: &[u32], element: Element) -> Result<Storage, DeviceError>;

    /// Writes the rows' keys and values into the pool, turned where there is a rotation, and gives what the rows attend to,
    /// `[rows, query heads · size]`. A row's bits depend on its own sequence up to itself alone, and not on how its rows are cut into
    /// steps.
    ///
    /// # Errors
    /// As above.
    fn attend(&self, attention: &AttentionOperands<'_>) -> Result<Storage, DeviceError>;
}

/// The operations of a device that has them.
#[derive(Clone, Copy)]
pub struct DecoderOperations<'a> {
    device: &'a Device,
    kernels: &'a dyn DecoderKernels,
}

impl Device {
    /// What decoders do between projections; `None` where the device has no such kernels.
    pub fn decoder_operations(&self) -> Option<DecoderOperations<'_>> {
        Some(DecoderOperations { device: self, kernels: self.backend().decoder_kernels()? })
    }
}

impl DecoderOperations<'_> {
    /// A norm of rows of as many numbers as gamma has.
    ///
    /// # Errors
    /// A beta of another length, more than the device takes.
    pub fn norm(&self, gamma: &[f32], beta: Option<&[f32]>, epsilon: f32) -> Result<Norm, DeviceError> {
        if let Some(beta) = beta {
            length("a norm's beta", beta.len(), gamma.len())?;
        }
        let beta = beta.map(|beta| self.device.upload(beta)).transpose()?;
        Ok(Norm { gamma: self.device.upload(gamma)?, beta, epsilon })
    }

    /// Rows x `[_, width]` of the norm's width, normalised.
    ///
    /// # Errors
    /// Another width, buffers of another device.
    pub fn normalise(&self, norm: &Norm, x: &Buffer) -> Result<Buffer, DeviceError> {
        let Norm { gamma, beta, epsilon } = norm;
        self.check(x, x.element(), "rows")?;
        self.check(gamma, Element::F32, "a norm's gamma")?;
        let width = gamma.len();
        if let Some(beta) = beta {
            self.check(beta, Element::F32, "a norm's beta")?;
            length("a norm's beta", beta.len(), width)?;
        }
        let rows = x.len().checked_div(width).unwrap_or(0);
        length("rows that are normalised", x.len(), rows * width)?;
        let norm = Norm { gamma: &gamma.storage, beta: beta.as_ref().map(|beta| &beta.storage), epsilon: *epsilon };
        let y = self.kernels.normalise(&x.storage, [rows, width], norm, x.element())?;
        Ok(self.device.buffer(y, x.len(), x.element()))
    }

    /// one ∘ other
    ///
    /// # Errors
    /// Other lengths or types, buffers of another device.
    pub fn multiply(&self, one: &Buffer, other: &Buffer) -> Result<Buffer, DeviceError> {
        self.check(one, one.element(), "a factor")?;
        self.check(other, one.element(), "a factor")?;
        length("a factor", other.len(), one.len())?;
        let y = self.kernels.multiply([&one.storage, &other.storage], one.len(), one.element())?;
        Ok(self.device.buffer(y, one.len(), one.element()))
    }

    /// Some rows of x `[of, width]`, in that order.
    ///
    /// # Errors
    /// Rows that x doesn't have.
    pub fn select(&self, x: &Buffer, of: usize, rows: &[usize]) -> Result<Buffer, DeviceError> {
        self.check(x, x.element(), "rows")?;
        let width = x.len() / of.max(1);
        length("rows", x.len(), of * width)?;
        if let Some(beyond) = rows.iter().find(|row| **row >= of) {
            return Err(OperandError::WrongSize { what: "rows to choose from", expected: beyond + 1, found: of }.into());
        }
        let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
        let y = self.kernels.select(&x.storage, width, &rows, x.element())?;
        Ok(self.device.buffer(y, rows.len() * width, x.element()))
    }

    /// What turns rows by these cosines and sines, `[rows, pairs]` each.
    ///
    /// # Errors
    /// More than the device takes.
    pub fn rotary(&self, cosines: &[f32], sines: &[f32], pairs: usize) -> Result<Rotary, DeviceError> {
        length("sines", sines.len(), cosines.len())?;
        let rows = cosines.chunks(pairs.max(1)).zip(sines.chunks(pairs.max(1)));
        let both: Vec<f32> = rows.flat_map(|(cosines, sines)| cosines.iter().chain(sines)).copied().collect();
        Ok(Rotary { rows: self.device.upload(&both)?, pairs })
    }

    /// Appends keys and values to the segments' caches, all of which are of one pool, and gives what every row attends to,
    /// `[rows, query heads · size]`: the sum of the values that it sees, weighed by the softmax of query · key / √size.
    ///
    /// # Errors
    /// Operands that don't belong together: nothing is appended then. A device that has no room.
    pub fn attend(
        &self,
        attention: &Attention<'_>,
        segments: &mut [AttentionSegment<'_>],
    ) -> Result<Buffer, DeviceError> {
        let Attention { heads, queries, keys, values, rotary, window, kept } = *attention;
        let element = queries.matrix.element();
        let rows = self.rows(attention, segments)?;
        let Some(first) = segments.first() else { return self.device.upload_as(&[], element) };
        let pool = Arc::clone(first.cache.pool());
        for segment in segments.iter() {
            if !Arc::ptr_eq(segment.cache.pool(), &pool) || pool.heads() != heads || pool.element() != element {
                return Err(OperandError::ForeignCache.into());
            }
        }
        self.device.check_owner(pool.owner())?;
        let storages = |columns: Columns<'_>| -> Result<(), DeviceError> {
            self.check(columns.matrix, element, "queries, keys or values")
        };
        [queries, keys, values].into_iter().try_for_each(storages)?;

        let mut copies = Vec::new();
        let reserve = |segment: &AttentionSegment<'_>| segment.cache.reserve(segment.rows.len(), &mut copies);
        let reserved = segments.iter().map(reserve).collect::<Result<Vec<_>, _>>()?;
        let laid_out =
            segments.iter().zip(&reserved).map(|(AttentionSegment { rows, cache }, blocks)| SegmentOperands {
                rows: rows.clone(),
                first_position: cache.tokens(),
                blocks: blocks.iter().map(KeyValueBlock::index).collect(),
            });
        let (buffer, pool_blocks) = pool.buffer()?;
        let operands = AttentionOperands {
            heads,
            element,
            rows,
            queries: queries.storage(),
            keys: keys.storage(),
            values: values.storage(),
            rotary: rotary.map(|rotary| &rotary.rows.storage),
            // A window of more tokens than there are positions hides none.
            window: window.map(|window| u32::try_from(window).unwrap_or(u32::MAX)),
            pool: &buffer.storage,
            pool_blocks,
            copies,
            segments: laid_out.collect(),
            kept,
        };
        let y = self.kernels.attend(&operands)?;
        for (AttentionSegment { rows, cache }, blocks) in segments.iter_mut().zip(reserved) {
            cache.append(rows.len(), blocks);
        }
        Ok(self.device.buffer(y, rows * heads.queries * heads.size, element))
    }

    /// The rows of a step whose operands belong together.
    fn rows(&self, attention: &Attention<'_>, segments: &[AttentionSegment<'_>]) -> Result<usize, DeviceError> {
        let Attention { heads: Heads { queries: query_heads, keys: key_heads, size }, rotary, window, .. } = *attention;
        if size == 0 || query_heads == 0 || query_heads.checked_rem(key_heads) != Some(0) {
            return Err(OperandError::Heads { queries: query_heads, keys: key_heads, size }.into());
        }
        if window == Some(0) {
            return Err(OperandError::EmptyWindow.into());
        }
        let mut rows = 0;
        for segment in segments {
            length("rows before a sequence's", segment.rows.start, rows)?;
            rows = segment.rows.end.max(rows);
        }
        let Attention { queries, keys, values, .. } = attention;
        for (what, columns, heads) in
            [("queries", queries, query_heads), ("keys", keys, key_heads), ("values", values, key_heads)]
        {
            length(what, columns.matrix.len(), rows * columns.width)?;
            if columns.first + heads * size > columns.width {
                let (expected, found) = (columns.first + heads * size, columns.width);
                return Err(OperandError::WrongSize { what, expected, found }.into());
            }
        }
        if let Some(Rotary { rows: turned, pairs }) = rotary {
            self.device.check_owner(&turned.owner)?;
            // Halves of a head are turned against one another.
            length("twice the pairs of a head", 2 * pairs, size)?;
            length("cosines and sines of rows", turned.len(), rows * size)?;
        }
        Ok(rows)
    }

    fn check(&self, buffer: &Buffer, element: Element, what: &'static str) -> Result<(), DeviceError> {
        self.device.check_owner(&buffer.owner)?;
        match buffer.element() == element {
            true => Ok(()),
            false => Err(OperandError::WrongElement { what, expected: element, found: buffer.element() }.into()),
        }
    }
}

// Not derived: a reference is copied, whatever it is to.
impl<T> Clone for Columns<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Columns<'_, T> {}

impl<'a> Columns<'a> {
    fn storage(self) -> Columns<'a, Storage> {
        Columns { matrix: &self.matrix.storage, width: self.width, first: self.first }
    }
}

fn length(what: &'static str, found: usize, expected: usize) -> Result<(), OperandError> {
    if found == expected { Ok(()) } else { Err(OperandError::WrongSize { what, expected, found }) }
}
