"""A linear layer with adapters."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Optional

from . import _native, _threads
from ._adapters import Adapter
from ._memory import is_on_card, is_tensor, numbers, on_host, rows_of, slots_of


class AdaptedLinear:
    """A frozen linear layer with adapters in numbered slots: ``y = x @ weight.T + bias``, adapted row by row.

    Args:
        weight: ``[out, in]``, float32, float16 or bfloat16, a PyTorch tensor or NumPy array of any strides. It is packed once, in its
            own type; nothing of it is kept.
        bias: ``[out]``, or None.
        slots: how many slots there are, numbered from 0.
        parts: the sizes of consecutive slices of the outputs that have adapters of their own, such as ``[q, k, v]``; None is one part.
        activations: the type of ``x`` and ``y``; None is the weight's. Sums are float32 and rounded once.

    Any number of threads may call a layer at once, while adapters come and go. The interpreter is free meanwhile.
    """

    __slots__ = ("__weakref__", "_native", "activations", "handle", "in_features", "out_features", "parts", "slots")

    def __init__(
        self,
        weight: Any,
        bias: Any = None,
        *,
        slots: int = 64,
        parts: Optional[Sequence[int]] = None,
        activations: Optional[str] = None,
    ) -> None:
        _threads.choose()
        weight, bias = on_host(weight), on_host(bias)
        own_bias = None if bias is None else numbers(bias, "bias").described
        own_parts = None if parts is None else list(parts)
        self._native = _native.Linear(numbers(weight, "weight").described, own_bias, own_parts, slots, activations)
        self.handle: int = self._native.handle
        self.in_features: int = self._native.in_features
        self.out_features: int = self._native.out_features
        self.parts: list[int] = self._native.parts
        self.slots: int = self._native.slots
        self.activations: str = self._native.activations
        weakref.finalize(self, _forget_on_cards, self.handle).atexit = False

    def put(self, slot: int, layer: str, operands: Mapping[str, Any], *, part: int = 0) -> None:
        """Puts an adapter into a slot of one part, in place of what was there.

        Args:
            layer: what its equation is called, one of :func:`flora.adapter_layers`.
            operands: its tensors by the names of the equation, or numbers: ``b [in, r]`` and ``a [r, out]`` of low-rank pairs (PEFT's
                ``lora_A.T`` and ``lora_B.T``), ``s`` LoRA's scale, ``m [out]`` DoRA's magnitudes, ``l`` IA3's scales of the outputs
                ``[out]`` (``ia3``) or inputs ``[in]`` (``ia3_feedforward``).
        """
        kept, described = [], {}
        for name, value in operands.items():
            if isinstance(value, (int, float)):
                value = _Number(value)
            value = on_host(value)
            kept.append(value)
            described[name] = value.described if isinstance(value, _Number) else numbers(value, name).described
        self._native.put(slot, part, layer, described)
        del kept

    def put_adapter(
        self,
        slot: int,
        adapter: Adapter,
        module: str,
        *,
        part: int = 0,
        inputs: Optional[tuple[int, int]] = None,
        outputs: Optional[tuple[int, int]] = None,
    ) -> None:
        """Puts a module of an adapter's folder into a slot of one part, in place of what was there.

        Args:
            module: one of ``adapter.modules``.
            inputs: the first input and the one after the last of the shard that this layer holds; None is all of them.
            outputs: the same of its outputs.

        Raises:
            KeyError: the adapter has no such module.
            ValueError: it doesn't fit the layer, or its kind can't be cut so.
        """
        self._native.put_adapter(slot, part, adapter._native, module, inputs, outputs)

    def clear(self, slot: int, *, part: Optional[int] = None) -> None:
        """Empties a slot of one part, or of all. Its rows are base rows from then on."""
        self._native.clear(slot, part)

    def forward(self, x: Any, rows: Any = None, out: Any = None) -> Any:
        """Computes a batch.

        Args:
            x: ``[..., in]`` in the type of the activations, a PyTorch tensor or a NumPy array. It is read where it lies, on a card too
                (:mod:`flora.cuda`).
            rows: int64 ``[rows]``, the slot of each row; -1, and a slot that is empty, is the base. None: all rows are the base's.
            out: ``[..., out]`` to write to; None makes one.

        Returns:
            ``out``.
        """
        if is_on_card(x):
            from . import cuda

            return cuda.forward(self.handle, x, rows, out)
        own = numbers(x, "x")
        self._check_type(own.dtype, "x")
        count, stride = rows_of(own, self.in_features, "x")
        if out is None:
            out = self._empty(x)
        to = numbers(out, "out")
        self._check_type(to.dtype, "out")
        if not to.writable:
            raise ValueError("out may not be written")
        if to.shape[:-1] != own.shape[:-1]:
            raise ValueError(f"out has the shape {list(to.shape)} and x {list(own.shape)}; all but the last extents have to be the same")
        out_count, out_stride = rows_of(to, self.out_features, "out")
        assert out_count == count
        self._native.forward(own.address, stride, slots_of(rows, count), count, to.address, out_stride)
        return out

    def forward_pointers(self, x: int, x_stride: int, rows: int, count: int, out: int, out_stride: int) -> None:
        """:meth:`forward` of raw addresses, for who has checked everything: ``count`` rows of ``x`` and ``out``, ``x_stride`` and
        ``out_stride`` numbers apart, and as many int64 slots at ``rows``, or 0 there. Only slots are checked. Wrong addresses end the
        process, or worse.
        """
        self._native.forward(x, x_stride, rows, count, out, out_stride)

    def unpacked(self, out: Any) -> Any:
        """Writes the weight ``[out, in]``, widened, into a float32 tensor or array of that shape, and returns it."""
        to = numbers(out, "out")
        if to.dtype != "float32":
            raise TypeError(f"out is {to.dtype}; the weight is given as float32")
        if not to.writable or len(to.shape) != 2 or (to.shape[1] > 1 and to.strides[1] != 1):
            raise ValueError("out has to be a writable matrix whose rows are contiguous")
        if to.shape[0] > 1 and to.strides[0] < to.shape[1]:
            raise ValueError("out has rows that lie over one another")
        self._native.unpack(to.address, to.shape[0], to.shape[1], max(to.strides[0], to.shape[1]))
        return out

    def close(self) -> None:
        """Frees its memory. Calls that are running end as they would; later ones raise :class:`flora.ClosedError`."""
        self._native.close()
        _forget_on_cards(self.handle)

    def _check_type(self, found: str, what: str) -> None:
        if found != self.activations:
            raise TypeError(f"{what} is {found}, and the layer's activations are {self.activations}; convert it, or make the layer with activations={found!r}")

    def _empty(self, x: Any) -> Any:
        if is_tensor(x):
            return x.new_empty((*x.shape[:-1], self.out_features))
        import numpy

        return numpy.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)

    def __repr__(self) -> str:
        return f"<flora.AdaptedLinear {self.in_features} -> {self.out_features}, {self.activations}>"


def _forget_on_cards(handle: int) -> None:
    """Frees what a layer has on cards, where anybody has used some."""
    cuda = sys.modules.get("flora.cuda")
    if cuda is not None:
        cuda.forget(handle)


class _Number:
    """A number as a tensor without extents."""

    __slots__ = ("_held", "described")

    def __init__(self, value: float) -> None:
        import ctypes

        self._held = ctypes.c_double(value)
        self.described = (ctypes.addressof(self._held), "float64", (), ())
