"""flora's layers as PyTorch operators.

Importing this module registers two operators, for the processor, for fake tensors (so that ``torch.compile`` has no graph break), and
for autograd, whose gradients are those that flora derives from a layer's equation:

``torch.ops.flora.adapted_linear(x, rows, layer, out_features) -> y``
    Of an ``x`` on a card too, where this build has support for it (:mod:`flora.cuda`); gradients are the processor's alone.
    ``x [..., in]`` through the layer with the handle ``layer``, each row by the adapter in its slot (int64 ``rows``, -1 is the base,
    None: all rows are). The gradient goes to ``x``.

``torch.ops.flora.trained_linear(x, operands, rows, adapters, layer, out_features) -> y``
    The same by adapters that come with the call. ``adapters`` names their layers, ``"flora"`` or ``"flora;lora"``; ``operands`` are the
    tensors of the first, then of the second, each in the order of :func:`flora.adapter_operands`. ``rows`` counts these adapters from 0,
    -1 is the base; None: all rows are the first one's. Gradients go to ``x`` and to the operands.

A layer is named by its ``handle``, a number, so that operators hold no objects; one that was closed raises :class:`flora.ClosedError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch

from . import _native, _threads, cuda
from ._adapters import adapter_operands
from ._linear import AdaptedLinear
from ._memory import numbers, rows_of, slots_of

__all__ = ["AdaptedLinear", "adapted_linear", "trained_linear"]

_library = torch.library.Library("flora", "DEF")
_library.define("adapted_linear(Tensor x, Tensor? rows, int layer, int out_features) -> Tensor")
_library.define("adapted_linear_gradient(Tensor x, Tensor g, Tensor? rows, int layer) -> Tensor")
_library.define(
    "trained_linear(Tensor x, Tensor[] operands, Tensor? rows, str adapters, int layer, int out_features) -> Tensor"
)
_library.define(
    "trained_linear_gradients(Tensor x, Tensor g, Tensor[] operands, Tensor? rows, str adapters, int layer, bool[] wanted) "
    "-> Tensor[]"
)


def adapted_linear(x: torch.Tensor, rows: Optional[torch.Tensor], layer: AdaptedLinear) -> torch.Tensor:
    """``x [..., in]`` through ``layer``, each row by the adapter in its slot (int64 ``[rows]``; None: the base)."""
    return torch.ops.flora.adapted_linear(x, rows, layer.handle, layer.out_features)


def trained_linear(
    x: torch.Tensor,
    adapters: Sequence[tuple[str, Sequence[torch.Tensor]]],
    rows: Optional[torch.Tensor],
    layer: AdaptedLinear,
) -> torch.Tensor:
    """``x [..., in]`` through ``layer`` by adapters that are trained: the layer of each, such as ``"flora"``, with its operands."""
    operands = [operand for _, own in adapters for operand in own]
    names = ";".join(name for name, _ in adapters)
    return torch.ops.flora.trained_linear(x, operands, rows, names, layer.handle, layer.out_features)


def _checked(x: torch.Tensor, layer: int, what: str, of_outputs: bool = False) -> tuple[Any, int, int]:
    """Where ``x`` lies, its rows, and numbers from one to the next; it has to be of the layer's type and width."""
    inputs, outputs, activations = _native.describe_handle(layer)
    own = numbers(x, what)
    if own.dtype != activations:
        raise TypeError(f"{what} is {own.dtype}, and the layer's activations are {activations}; convert it")
    count, stride = rows_of(own, outputs if of_outputs else inputs, what)
    return own, count, stride


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers in rows that are equally far apart, which they mostly are."""
    if x.dim() <= 2 and (x.size(-1) <= 1 or x.stride(-1) == 1) and (x.dim() < 2 or x.stride(0) >= x.size(-1)):
        return x
    return x.contiguous()


def _output(x: torch.Tensor, layer: int, out_features: int) -> torch.Tensor:
    outputs = _native.describe_handle(layer)[1]
    if outputs != out_features:
        raise ValueError(f"the layer has {outputs} outputs and not {out_features}")
    return x.new_empty((*x.shape[:-1], out_features))


def _forward(x: torch.Tensor, rows: Optional[torch.Tensor], layer: int, out_features: int) -> torch.Tensor:
    _threads.choose()
    x = _rows_apart(x)
    own, count, stride = _checked(x, layer, "x")
    y = _output(x, layer, out_features)
    _native.forward_handle(layer, own.address, stride, slots_of(rows, count), count, y.data_ptr(), out_features)
    return y


def _gradient(x: torch.Tensor, g: torch.Tensor, rows: Optional[torch.Tensor], layer: int) -> torch.Tensor:
    _threads.choose()
    x, g = x.contiguous(), g.contiguous()
    own, count, _ = _checked(x, layer, "x")
    of_outputs, g_count, _ = _checked(g, layer, "the output's gradient", of_outputs=True)
    if g_count != count:
        raise ValueError(f"the output's gradient has {g_count} rows and x {count}")
    dx = torch.empty_like(x)
    _native.input_gradient(layer, own.address, of_outputs.address, slots_of(rows, count), count, dx.data_ptr())
    return dx


def _described(adapters: str, operands: Sequence[torch.Tensor]) -> list[tuple[str, list[Any]]]:
    described, first = [], 0
    for name in filter(None, adapters.split(";")):
        count = len(adapter_operands(name))
        own = [numbers(operand, f"an operand of `{name}`").described for operand in operands[first : first + count]]
        described.append((name, own))
        first += count
    if first != len(operands):
        raise ValueError(f"the adapters {adapters!r} have {first} operands, and there are {len(operands)}")
    return described


def _trained_forward(
    x: torch.Tensor,
    operands: Sequence[torch.Tensor],
    rows: Optional[torch.Tensor],
    adapters: str,
    layer: int,
    out_features: int,
) -> torch.Tensor:
    _threads.choose()
    x = _rows_apart(x)
    own, count, stride = _checked(x, layer, "x")
    y = _output(x, layer, out_features)
    described = _described(adapters, operands)
    slots = slots_of(rows, count)
    _native.trained_forward(layer, described, own.address, stride, slots, count, y.data_ptr(), out_features)
    return y


def _trained_gradients(
    x: torch.Tensor,
    g: torch.Tensor,
    operands: Sequence[torch.Tensor],
    rows: Optional[torch.Tensor],
    adapters: str,
    layer: int,
    wanted: Sequence[bool],
) -> list[torch.Tensor]:
    _threads.choose()
    x, g = x.contiguous(), g.contiguous()
    own, count, _ = _checked(x, layer, "x")
    of_outputs, g_count, _ = _checked(g, layer, "the output's gradient", of_outputs=True)
    if g_count != count:
        raise ValueError(f"the output's gradient has {g_count} rows and x {count}")
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    gradients = [
        torch.empty(operand.shape if is_wanted else 0, dtype=torch.float32)
        for operand, is_wanted in zip(operands, wanted[1:])
    ]
    places = [gradient.data_ptr() if is_wanted else 0 for gradient, is_wanted in zip(gradients, wanted[1:])]
    described = _described(adapters, operands)
    slots = slots_of(rows, count)
    _native.trained_backward(
        layer, described, own.address, of_outputs.address, slots, count, dx.data_ptr() if wanted[0] else 0, places
    )
    own_types = [gradient.to(operand.dtype) for gradient, operand in zip(gradients, operands)]
    return [dx, *own_types]


def _forward_on_card(x: torch.Tensor, rows: Optional[torch.Tensor], layer: int, out_features: int) -> torch.Tensor:
    y = cuda.forward(layer, x, rows)
    if y.size(-1) != out_features:
        raise ValueError(f"the layer has {y.size(-1)} outputs and not {out_features}")
    return y


def _not_on_card(*_: Any) -> Any:
    raise NotImplementedError("cards compute flora's layers without gradients; move tensors to the processor to train adapters")


_library.impl("adapted_linear", _forward, "CPU")
_library.impl("adapted_linear", _forward_on_card, "CUDA")
for _name in ("adapted_linear_gradient", "trained_linear", "trained_linear_gradients"):
    _library.impl(_name, _not_on_card, "CUDA")
_library.impl("adapted_linear_gradient", _gradient, "CPU")
_library.impl("trained_linear", _trained_forward, "CPU")
_library.impl("trained_linear_gradients", _trained_gradients, "CPU")


@torch.library.register_fake("flora::adapted_linear", lib=_library)
def _(x, rows, layer, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("flora::adapted_linear_gradient", lib=_library)
def _(x, g, rows, layer):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("flora::trained_linear", lib=_library)
def _(x, operands, rows, adapters, layer, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("flora::trained_linear_gradients", lib=_library)
def _(x, g, operands, rows, adapters, layer, wanted):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0)
    return [dx, *(operand.new_empty(operand.shape if is_wanted else 0) for operand, is_wanted in zip(operands, wanted[1:]))]


def _keep(ctx, inputs, output):
    x, rows, layer, _ = inputs
    ctx.save_for_backward(x, rows)
    ctx.layer = layer


def _backward(ctx, g):
    x, rows = ctx.saved_tensors
    dx = torch.ops.flora.adapted_linear_gradient(x, g, rows, ctx.layer) if ctx.needs_input_grad[0] else None
    return dx, None, None, None


def _keep_trained(ctx, inputs, output):
    x, operands, rows, adapters, layer, _ = inputs
    ctx.save_for_backward(x, rows, *operands)
    ctx.adapters, ctx.layer = adapters, layer


def _backward_trained(ctx, g):
    x, rows, *operands = ctx.saved_tensors
    of_operands = ctx.needs_input_grad[1]
    wanted = [ctx.needs_input_grad[0], *(operand.requires_grad and of_operands_at for operand, of_operands_at in zip(operands, _each(of_operands, len(operands))))]
    dx, *gradients = torch.ops.flora.trained_linear_gradients(
        x, g, operands, rows, ctx.adapters, ctx.layer, wanted
    )
    gradients = [gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted[1:])]
    return dx if wanted[0] else None, gradients, None, None, None, None


def _each(needs: Any, count: int) -> Sequence[bool]:
    """Whether each tensor of a list needs a gradient; PyTorch says it of the list, or of each."""
    return needs if isinstance(needs, (list, tuple)) else [needs] * count


torch.library.register_autograd("flora::adapted_linear", _backward, setup_context=_keep, lib=_library)
torch.library.register_autograd("flora::trained_linear", _backward_trained, setup_context=_keep_trained, lib=_library)
