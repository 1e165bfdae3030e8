//! Training through blocks that keep their inputs alone: each block is computed again, with Burn's records, when the backward pass
//! comes to it. The memory of one block's records is enough then, for a third more work and the same bits.
//!
//! Burn's own checkpointing computes light operations again, and keeps what follows a frozen parent, which in a model with adapters is
//! nearly everything.

use burn::backend::Autodiff;
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

/// A block of a model, and what comes after the last one.
pub type Block<'a, B, const D: usize> = &'a dyn Fn(Tensor<Autodiff<B>, D>) -> Tensor<Autodiff<B>, D>;

/// The gradients of a container of Burn's.
pub type BlockGradients<B> = <Autodiff<B> as AutodiffBackend>::Gradients;

/// What a pass through blocks gave.
pub struct Recomputed<B: Backend> {
    /// The loss, `[1]`.
    pub loss: Tensor<B, 1>,
    /// The gradients of each block's parameters, in the order of the blocks, then those of what `loss` read: what an optimizer's
    /// `GradientsParams::from_grads` takes.
    pub gradients: Vec<BlockGradients<B>>,
}

/// Runs `blocks` one after the other and then `loss`, and goes back through them.
pub fn recomputed<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    blocks: &[Block<'_, B, D>],
    loss: impl FnOnce(Tensor<Autodiff<B>, D>) -> Tensor<Autodiff<B>, 1>,
) -> Recomputed<B> {
    let mut inputs = Vec::with_capacity(blocks.len());
    let mut x = x;
    for block in blocks {
        inputs.push(x.clone());
        // Without what the block has recorded.
        x = block(Tensor::from_inner(x)).inner();
    }
    let last = Tensor::<Autodiff<B>, D>::from_inner(x).require_grad();
    let loss = loss(last.clone());
    let mut own = loss.backward();
    let mut g = last.grad_remove(&mut own);
    let mut gradients = vec![own];
    for (block, input) in blocks.iter().zip(inputs).rev() {
        let Some(output_gradient) = g.take() else { break };
        let input = Tensor::<Autodiff<B>, D>::from_inner(input).require_grad();
        let output = block(input.clone());
        let mut own = (output * Tensor::from_inner(output_gradient)).sum().backward();
        g = input.grad_remove(&mut own);
        gradients.push(own);
    }
    gradients.reverse();
    Recomputed { loss: loss.inner(), gradients }
}
