//! Keys and values of one sequence in one layer: tensors of its own that grow by whole blocks, so that attention reads them where
//! they lie. How many blocks there are in all is the engine's account.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Keys and values of one layer, each `[1, key-value heads, capacity, head size]`.
#[derive(Debug)]
pub(crate) struct LayerCache<B: Backend> {
    keys: Half<B>,
    values: Half<B>,
}

/// One of the two. The tensor is taken out while it is written, so that it is the only one of its memory and changed in place.
#[derive(Debug)]
struct Half<B: Backend>(Option<Tensor<B, 4>>);

impl<B: Backend> LayerCache<B> {
    pub(crate) fn new() -> Self {
        Self { keys: Half(None), values: Half(None) }
    }

    /// Appends at position `at`, which is how many there are: keys and values `[1, key-value heads, tokens, head size]`.
    pub(crate) fn append(&mut self, keys: Tensor<B, 4>, values: Tensor<B, 4>, at: usize, block_tokens: usize) {
        self.keys.append(keys, at, block_tokens);
        self.values.append(values, at, block_tokens);
    }

    /// The first `length` keys and values.
    pub(crate) fn first(&self, length: usize) -> Option<(Tensor<B, 4>, Tensor<B, 4>)> {
        Some((self.keys.first(length)?, self.values.first(length)?))
    }
}

impl<B: Backend> Half<B> {
    fn append(&mut self, new: Tensor<B, 4>, at: usize, block_tokens: usize) {
        let [_, heads, tokens, size] = new.dims();
        let end = at + tokens;
        let room = match self.0.take() {
            Some(held) if end <= held.dims()[2] => held,
            smaller => grown(smaller, [1, heads, end.next_multiple_of(block_tokens.max(1)), size], &new),
        };
        self.0 = Some(room.slice_assign([0..1, 0..heads, at..end, 0..size], new));
    }

    fn first(&self, length: usize) -> Option<Tensor<B, 4>> {
        let all = self.0.as_ref()?;
        let [_, heads, _, size] = all.dims();
        Some(all.clone().slice([0..1, 0..heads, 0..length, 0..size]))
    }
}

/// A larger tensor that begins with the smaller one.
fn grown<B: Backend>(smaller: Option<Tensor<B, 4>>, shape: [usize; 4], like: &Tensor<B, 4>) -> Tensor<B, 4> {
    let larger = Tensor::zeros(shape, (&like.device(), like.dtype()));
    match smaller {
        Some(smaller) => {
            let [one, heads, held, size] = smaller.dims();
            larger.slice_assign([0..one, 0..heads, 0..held, 0..size], smaller)
        }
        None => larger,
    }
}
