"""Adapters of a layer whose product with its base weight somebody else computes.

An engine that has a weight packed, or quantised in a format of its own, keeps it. To flora the base is a linear map and nothing else::

    y = sum_v out_v * base(in_v * x)  +  sum_q (x . shrink_q) expand_q  +  bias

so whatever multiplies by it will do, and rows without an adapter cost what they would cost without flora. PyTorch is needed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Protocol

import torch

from . import _native
from ._adapters import Adapter
from ._memory import numbers

__all__ = ["AttachedAdapters", "Base", "Folded", "fold", "reads_base"]

#: A module of an adapter, folded for its base weight: what :meth:`AttachedAdapters.put` takes.
Folded = _native.Folded


class Base(Protocol):
    """A linear map ``[rows, in] -> [rows, out]`` and its bias."""

    #: ``[out]``, in the type of the activations, or None.
    bias: Optional[torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias``, a new tensor."""
        ...

    @property
    def by_parts(self) -> bool:
        """Whether :meth:`products` multiplies by the outputs of each part apart."""
        ...

    def products(self, group: int, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T`` without the bias: by the whole weight, or by the outputs of part ``group``."""
        ...


def reads_base(adapter: Adapter, module: str) -> bool:
    """Whether a module can only be folded with the base weight at hand, as DoRA's can, which divides by its column norms."""
    return _native.reads_base(adapter._native, module)


def fold(
    adapter: Adapter,
    module: str,
    shape: tuple[int, int],
    weight: Optional[torch.Tensor] = None,
    bias: Optional[torch.Tensor] = None,
) -> Folded:
    """Folds a module of an adapter for a base weight: scales, means and norms are computed in f64 and rounded once.

    Args:
        shape: the module's outputs and inputs, all of them, whatever shard of it is held here.
        weight: ``[out, in]``, where :func:`reads_base` asks for it.
        bias: ``[out]`` of the base, which some kinds scale along with its product.

    Raises:
        KeyError: the adapter has no such module.
        ValueError: it doesn't fit.
    """
    outputs, inputs = shape
    own_weight = None if weight is None else numbers(weight, "weight").described
    own_bias = None if bias is None else numbers(bias, "bias").described
    return Folded(adapter._native, module, inputs, outputs, own_weight, own_bias)


class AttachedAdapters:
    """Adapters in the numbered slots of one layer, each kept at its own rank.

    Args:
        inputs: numbers of a row of x.
        parts: the sizes of consecutive slices of the outputs that have adapters of their own.
        slots: how many slots there are, numbered from 0.
        activations: the type of x, y, the bias and the base's products. Sums are float32 and rounded once.
        adapters: the type that adapters are kept in; float16 is kept as float32.
    """

    __slots__ = ("_native", "activations", "inputs", "outputs", "parts")

    def __init__(
        self, inputs: int, parts: Sequence[int], slots: int, activations: torch.dtype, adapters: torch.dtype
    ) -> None:
        self._native = _native.Attached(inputs, list(parts), slots, _name(activations), _name(adapters))
        self.activations = activations
        self.inputs, self.outputs, self.parts = inputs, sum(parts), tuple(parts)

    @property
    def bytes(self) -> int:
        """What the adapters' vectors take."""
        return self._native.bytes

    def put(
        self,
        slot: int,
        part: int,
        folded: Folded,
        inputs: Optional[Sequence[int]] = None,
        outputs: Optional[Sequence[int]] = None,
    ) -> None:
        """Puts an adapter into a slot of one part, in place of what was there.

        Args:
            inputs: the module's inputs that this layer holds, by their numbers; None is all of them.
            outputs: the same of its outputs.
        """
        self._native.put(slot, part, folded, inputs, outputs)

    def put_low_rank(self, slot: int, part: int, shrink: torch.Tensor, expand: torch.Tensor) -> None:
        """Puts a plain low-rank sum: ``shrink [r, in]`` and ``expand [out of the part, r]``, with its scale in one of them."""
        shrink, expand = shrink.detach(), expand.detach()
        self._native.put_low_rank(slot, part, numbers(shrink, "shrink").described, numbers(expand, "expand").described)

    def clear(self, slot: int) -> None:
        """Empties a slot. Its rows are base rows from then on."""
        self._native.clear(slot)

    def forward(self, x: torch.Tensor, slots: int, rows: int, base: Base) -> torch.Tensor:
        """Computes y ``[n, out]`` of x ``[n, in]``.

        Args:
            slots: the address of int64 numbers, the slot of each row; -1 is the base.
            rows: how many there are. Later rows of x are the base's.
        """
        native, count = self._native, min(rows, x.shape[0])
        work = native.work(slots, count)
        if work == 0:
            return base(x)
        if x.dtype != self.activations or x.stride(-1) != 1:
            x = x.to(self.activations).contiguous()
        at = (x.data_ptr(), x.stride(0))
        if work == 1:
            y = base(x)
            if y.dtype == self.activations:
                native.add(at, slots, count, (y.data_ptr(), y.stride(0)))
                return y
            sums = torch.zeros(y.shape, dtype=self.activations)
            native.add(at, slots, count, (sums.data_ptr(), sums.stride(0)))
            return y + sums
        products = self._products(x, at, slots, count, base)
        y = torch.empty((x.shape[0], self.outputs), dtype=self.activations)
        described = [(own.data_ptr(), own.stride(0), own.shape[0], own.shape[1]) for own in products]
        bias = None if base.bias is None else base.bias.data_ptr()
        native.combine(base.by_parts, described, bias, at, slots, count, (y.data_ptr(), y.stride(0)))
        if count < x.shape[0]:
            y[count:] = base(x[count:])
        return y

    def _products(self, x: torch.Tensor, at: tuple[int, int], slots: int, count: int, base: Base) -> list[torch.Tensor]:
        """The base's product with each group's virtual inputs."""
        products = []
        for group, inputs in enumerate(self._native.virtual_inputs(slots, count, base.by_parts)):
            virtual = torch.empty((inputs, self.inputs), dtype=self.activations)
            to = (virtual.data_ptr(), virtual.stride(0))
            self._native.expand(base.by_parts, group, at, slots, count, to, inputs)
            products.append(base.products(group, virtual))
        return products


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
