//! Keys and values of one sequence in one layer: tensors of its own that grow by whole blocks, so that attention reads them where
//! they lie. How many blocks there are in all is the engine's account.

use std::ops::Range;

use burn::tensor::Tensor;
use flora_burn::FloraBackend;

/// Keys and values of one layer, each `[1, key-value heads, capacity, head size]`.
#[derive(Debug)]
pub(crate) struct LayerCache<B: FloraBackend> {
    keys: Half<B>,
    values: Half<B>,
}

/// One of the two. The tensor is taken out while it is written, so that it is the only one of its memory and changed in place.
#[derive(Debug)]
struct Half<B: FloraBackend>(Option<Tensor<B, 4>>);

impl<B: FloraBackend> LayerCache<B> {
    pub(crate) fn new() -> Self {
        Self { keys: Half(None), values: Half(None) }
    }

    /// Appends at position `at`, which is how many there are: keys and values `[1, key-value heads, tokens, head size]`.
    pub(crate) fn append(&mut self, keys: Tensor<B, 4>, values: Tensor<B, 4>, at: usize, block_tokens: usize) {
        self.keys.append(keys, at, block_tokens);
        self.values.append(values, at, block_tokens);
    }

    /// The keys and values at some positions.
    pub(crate) fn at(&self, positions: Range<usize>) -> Option<(Tensor<B, 4>, Tensor<B, 4>)> {
        Some((self.keys.at(positions.clone())?, self.values.at(positions)?))
    }
}

impl<B: FloraBackend> Half<B> {
    fn append(&mut self, new: Tensor<B, 4>, at: usize, block_tokens: usize) {
        let [_, heads, tokens, size] = new.dims();
        let end = at + tokens;
        let room = match self.0.take() {
            Some(held) if end <= held.dims()[2] => held,
            smaller => grown(smaller, [1, heads, end.next_multiple_of(block_tokens.max(1)), size], &new),
        };
        self.0 = Some(written(room, new, at));
    }

    fn at(&self, positions: Range<usize>) -> Option<Tensor<B, 4>> {
        let all = self.0.as_ref()?.clone();
        let [_, heads, capacity, size] = all.dims();
        Some(if positions == (0..capacity) { all } else { all.slice([0..1, 0..heads, positions, 0..size]) })
    }
}

/// A larger tensor that begins with the smaller one.
fn grown<B: FloraBackend>(smaller: Option<Tensor<B, 4>>, shape: [usize; 4], like: &Tensor<B, 4>) -> Tensor<B, 4> {
    let larger = Tensor::zeros(shape, (&like.device(), like.dtype()));
    match smaller {
        Some(smaller) => written(larger, smaller, 0),
        None => larger,
    }
}

/// `new` over the tokens from `at` on.
fn written<B: FloraBackend>(held: Tensor<B, 4>, new: Tensor<B, 4>, at: usize) -> Tensor<B, 4> {
    let [one, heads, tokens, size] = new.dims();
    held.slice_assign([0..one, 0..heads, at..at + tokens, 0..size], new)
}
