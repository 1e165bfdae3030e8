"""The product of a layer of vLLM's with its base weight, which stays where vLLM has it.

vLLM packs a weight for its own kernels and drops the original. So the product is called as vLLM calls it, and where the weight itself
is needed (to fold DoRA's norms, say), it is what the product makes of unit vectors: exactly the numbers that are multiplied by.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Optional

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

#: Unit vectors that are multiplied at a time.
UNIT_ROWS = 512

#: Rows that the choice between a whole and a cut weight is measured with: a batch of single tokens.
MEASURED_ROWS = 32


class BaseProduct:
    """A layer's own product, with the bias that it has here.

    Args:
        layer: the linear layer that vLLM has made, with this rank's shard of its weight.
        parts: its outputs, in consecutive parts.
    """

    def __init__(self, layer: torch.nn.Module, parts: Sequence[int]) -> None:
        self.layer, self.parts = layer, tuple(parts)
        self.method = layer.quant_method
        self.cut: Optional[list[torch.nn.Module]] = None
        self.bias: Optional[torch.Tensor] = None

    @property
    def inputs(self) -> int:
        """The inputs of this rank's shard."""
        return getattr(self.layer, "input_size_per_partition", self.layer.input_size)

    @property
    def dtype(self) -> torch.dtype:
        """The type of inputs and outputs."""
        return self.layer.params_dtype

    @property
    def is_plain(self) -> bool:
        """Whether the weight isn't quantised."""
        return type(self.method) is UnquantizedLinearMethod

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self.layer, x, self.bias)

    def with_bias(self, bias: Optional[torch.Tensor]) -> "BaseProduct":
        """The same with the bias of this call: vLLM adds it on one rank, or later."""
        self.bias = bias
        return self

    @property
    def by_parts(self) -> bool:
        return self.cut is not None

    def products(self, group: int, x: torch.Tensor) -> torch.Tensor:
        if self.cut is None:
            return self.method.apply(self.layer, x, None)
        part = self.cut[group]
        return part.cpu_linear(x, part.weight, None)

    def weight(self) -> torch.Tensor:
        """The weight ``[out, in]`` of this rank, in the type of the activations."""
        columns = []
        for first in range(0, self.inputs, UNIT_ROWS):
            units = torch.zeros(min(UNIT_ROWS, self.inputs - first), self.inputs, dtype=self.dtype)
            units[:, first:].fill_diagonal_(1)
            columns.append(self.method.apply(self.layer, units, None).t())
        return torch.cat(columns, dim=1)

    def choose_cut(self) -> None:
        """Packs each part's weight apart, in place of the whole, if that is faster for rows whose parts are scaled differently.

        Such a row is multiplied once for every part. By the whole weight, that makes as many products with it; by parts, each is a
        product with its own outputs, but rows without an adapter then take several calls. Which of them counts for more depends on the
        processor and the layer, so both are measured.
        """
        if self.cut is not None or len(self.parts) == 1 or not self.is_plain or not hasattr(self.layer, "cpu_linear"):
            return
        if getattr(self.layer, "bias", None) is not None and self.layer.bias.dtype != self.dtype:
            # The kernel behind it keeps the bias in a form of its own.
            return
        cut = []
        for weight in self.weight().split(self.parts, dim=0):
            part = torch.nn.Module()
            part.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
            dispatch_cpu_unquantized_gemm(part, remove_weight=True)
            cut.append(part)
        rows = torch.randn(MEASURED_ROWS, self.inputs, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        scaled = rows.repeat(len(self.parts), 1)
        joined = _joined(cut, self.parts)
        whole = _seconds(lambda: self.method.apply(self.layer, rows, None))
        whole_scaled = _seconds(lambda: self.method.apply(self.layer, scaled, None))
        apart = _seconds(lambda: joined(rows, None, None))
        apart_scaled = _seconds(lambda: [part.cpu_linear(rows, part.weight, None) for part in cut])
        if whole_scaled - apart_scaled > apart - whole:
            self.cut = cut
            self.layer.cpu_linear = joined


class ForwardProduct:
    """The product of a layer that computes in a way of its own, by its own ``forward``."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer
        self.bias: Optional[torch.Tensor] = None
        self.by_parts = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y

    def products(self, group: int, x: torch.Tensor) -> torch.Tensor:
        if getattr(self.layer, "bias", None) is not None and not self.layer.skip_bias_add:
            raise ValueError(
                f"{type(self.layer).__name__} adds its bias by itself, so that an adapter can't scale what comes before it; "
                "leave this layer out of the adapter, or serve it as LoRA"
            )
        return self(x).to(x.dtype)


def _joined(cut: list[torch.nn.Module], parts: tuple[int, ...]):
    """A layer's product by its parts' weights."""

    def linear(x: torch.Tensor, weight: object, bias: Optional[torch.Tensor]) -> torch.Tensor:
        biases = [None] * len(cut) if bias is None else bias.split(parts)
        return torch.cat([part.cpu_linear(x, part.weight, own) for part, own in zip(cut, biases)], dim=-1)

    return linear


def _seconds(call) -> float:
    call()
    taken = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken)
