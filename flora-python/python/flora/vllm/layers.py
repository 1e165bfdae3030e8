"""vLLM's linear layers with adapters of every kind in their slots.

Each class of vLLM's that wraps a linear layer gets a subclass. It keeps vLLM's own cutting for tensor parallelism, and the slots; what
it replaces is where an adapter's vectors are kept, and what is computed with them.
"""

from __future__ import annotations

from typing import Optional

import torch
from vllm.lora import layers as vllm_layers
from vllm.lora import utils as vllm_utils
from vllm.model_executor.layers.linear import ReplicatedLinear

from ..attached import AttachedAdapters, Folded
from . import versions
from .base import BaseProduct, ForwardProduct


class FoldedModule:
    """What flora made of a module of an adapter, in the place of LoRA's first tensor. vLLM asks that one where it is."""

    device = torch.device("cpu")

    def __init__(self, folded: Folded) -> None:
        self.folded = folded


class AttachedLayer:
    """What vLLM's wrappers of linear layers become. It stands before one of them among a class's bases."""

    #: Adapters by slot.
    attached: AttachedAdapters
    #: The product with the base weight.
    base: BaseProduct

    def create_lora_weights(self, max_loras, lora_config, model_config=None) -> None:
        self.lora_config = lora_config
        parts = tuple(self.output_slices) if self.n_slices > 1 else (self.output_size,)
        self.output_slices = parts
        self.base = BaseProduct(self.base_layer, parts)
        self.attached = AttachedAdapters(
            self.input_size, parts, max_loras, self.base.dtype, lora_config.lora_dtype
        )
        # vLLM reads shapes and types of these to make adapters up for its first runs. They hold one number each.
        def shaped(*shape: int) -> torch.Tensor:
            return torch.zeros((), dtype=lora_config.lora_dtype).expand(max_loras, 1, *shape)

        rank = lora_config.max_lora_rank
        self.lora_a_stacked = tuple(shaped(rank, self.input_size) for _ in parts)
        self.lora_b_stacked = tuple(shaped(outputs, rank) for outputs in parts)

    def set_mapping(self, punica_wrapper) -> None:
        versions.check_wrapper(punica_wrapper)
        super().set_mapping(punica_wrapper)
        # vLLM writes the slots of each step to the same place.
        self.slots_address = punica_wrapper._token_lora_indices.data_ptr()

    def reset_lora(self, index: int) -> None:
        self.attached.clear(index)

    def set_lora(self, index: int, lora_a, lora_b) -> None:
        self.reset_lora(index)
        if not isinstance(lora_a, (list, tuple)):
            lora_a, lora_b = [lora_a], [lora_b]
        elif len(lora_a) != self.n_slices:
            if any(isinstance(weights, FoldedModule) for weights in lora_a):
                raise ValueError(
                    f"{type(self.base_layer).__name__} has {self.n_slices} parts of outputs, and modules for {len(lora_a)} of them, "
                    "which flora can't cut; leave this layer out of the adapter"
                )
            lora_a, lora_b = self.expand_packed_lora(lora_a, lora_b)
        for part, (a, b) in enumerate(zip(lora_a, lora_b)):
            if isinstance(a, FoldedModule):
                inputs, outputs = self.shard(part, a.folded.inputs, a.folded.outputs)
                self.attached.put(index, part, a.folded, inputs, outputs)
                if a.folded.scales_inputs:
                    self.base.choose_cut()
            elif a is not None and b is not None and a.any() and b.any():
                # Not the zeros that vLLM makes its first runs with.
                self.attached.put_low_rank(index, part, *self._own(part, a, b))

    def shard(self, part: int, inputs: int, outputs: int) -> tuple[Optional[list[int]], Optional[list[int]]]:
        """The numbers of the inputs and outputs of a module that this rank holds; None are all of them.

        vLLM's own cutting says so: it cuts a column of numbers as it would cut an adapter's vectors.
        """
        if self.tp_size == 1:
            return None, None
        in_numbers = torch.arange(inputs).unsqueeze(0)
        out_numbers = torch.arange(outputs).unsqueeze(1)
        a, b = self._own(part, in_numbers, out_numbers)
        return a.flatten().tolist(), b.flatten().tolist()

    def _own(self, part: int, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What this rank has of one part's tensors."""
        if self.tp_size == 1:
            return a, b
        if self.n_slices == 1:
            return self.slice_lora_a(a), self.slice_lora_b(b)
        only = lambda tensor: [tensor if at == part else None for at in range(self.n_slices)]
        return self.slice_lora_a(only(a))[part], self.slice_lora_b(only(b))[part]

    def _apply_sync(self, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        return self._attach(x, self.base.with_bias(bias))

    def _apply_base_forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(self.base_layer) is ReplicatedLinear:
            return self._attach(x, self.base.with_bias(None if self.base_layer.skip_bias_add else self.base_layer.bias))
        return self._attach(x, ForwardProduct(self.base_layer))

    def _attach(self, x: torch.Tensor, base) -> torch.Tensor:
        wrapper = self.punica_wrapper
        rows = wrapper.indices_len[0]
        if wrapper.no_lora or rows is None:
            return base(x)
        if x.dim() == 2:
            return self.attached.forward(x, self.slots_address, rows, base)
        y = self.attached.forward(x.reshape(-1, x.shape[-1]), self.slots_address, rows, base)
        return y.view(*x.shape[:-1], y.shape[-1])


def _attached(name: str, *before: type) -> type:
    """A subclass of vLLM's wrapper of that name."""
    return type(f"Attached{name}", (*before, AttachedLayer, getattr(vllm_layers, name)), {"__doc__": f"vLLM's {name} with adapters of every kind."})


_Merged = _attached("MergedColumnParallelLinearWithLoRA")

#: In the place of vLLM's classes, which they stand before.
CLASSES: tuple[type, ...] = (
    _attached("ColumnParallelLinearWithLoRA"),
    _Merged,
    _attached("QKVParallelLinearWithLoRA"),
    _attached("MergedQKVParallelLinearWithLoRA"),
    _attached("RowParallelLinearWithLoRA"),
    _attached("ReplicatedLinearWithLoRA"),
    # It cuts a single module into parts, and then does as its own base does.
    type(
        "AttachedMergedColumnParallelLinearVariableSliceWithLoRA",
        (vllm_layers.MergedColumnParallelLinearVariableSliceWithLoRA, _Merged),
        {"__doc__": "vLLM's MergedColumnParallelLinearVariableSliceWithLoRA with adapters of every kind."},
    ),
)


def install() -> None:
    """Has vLLM wrap layers in these classes."""
    vllm_utils._all_lora_classes = CLASSES + vllm_utils._all_lora_classes
