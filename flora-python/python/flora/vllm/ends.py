"""The two ends of a decoder, its token embedding and its output matrix, where no adapter adapts them.

vLLM wraps them whenever LoRA is on, and computes their sums for every row and step, with zeros where an adapter has nothing there. That
is a vocabulary's worth of work for each row. Only plain LoRA adapts them, and vLLM computes that itself; here it is left out as long as
no slot holds any.
"""

from __future__ import annotations

import torch
from vllm.lora import utils as vllm_utils
from vllm.lora.layers import LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA


class SparselyUsed:
    """Knows the slots that hold something. It stands before one of vLLM's wrappers among a class's bases."""

    def create_lora_weights(self, *arguments, **options) -> None:
        super().create_lora_weights(*arguments, **options)
        self.used_slots: set[int] = set()

    def reset_lora(self, index: int) -> None:
        if index in self.used_slots:
            self.used_slots.discard(index)
            super().reset_lora(index)

    def set_lora(self, index: int, lora_a, lora_b) -> None:
        self.reset_lora(index)
        # vLLM's first runs are with adapters of zeros.
        if lora_a.any() and lora_b.any():
            super().set_lora(index, lora_a, lora_b)
            self.used_slots.add(index)

    def is_base(self) -> bool:
        """Whether the base alone gives the result."""
        return not self.used_slots or self.punica_wrapper.no_lora


class SparseEmbedding(SparselyUsed, VocabParallelEmbeddingWithLoRA):
    """vLLM's VocabParallelEmbeddingWithLoRA, which does nothing where there is nothing to do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer.forward(x) if self.is_base() else super().forward(x)


class SparseLogits(SparselyUsed, LogitsProcessorWithLoRA):
    """vLLM's LogitsProcessorWithLoRA, likewise."""

    def _get_logits(self, hidden_states, lm_head, embedding_bias=None, skip_gather=False):
        if not self.is_base():
            return super()._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)
        lm_head = getattr(lm_head, "base_layer", lm_head)
        return self.base_layer._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)


def install() -> None:
    """Has vLLM wrap the ends of decoders in these classes."""
    vllm_utils._all_lora_classes = (SparseEmbedding, *vllm_utils._all_lora_classes)
    vllm_utils.LogitsProcessorWithLoRA = SparseLogits
