"""Layers on a card of NVIDIA's, on the stream and memory of PyTorch or of any other program.

The same weights and adapters as on the processor; what computes is CUDA's driver with kernels that NVRTC compiles once. A wheel has this
only when it was built with the feature ``cuda``; :data:`AVAILABLE` says whether. With PyTorch, ``flora.AdaptedLinear.forward`` and
``torch.ops.flora.adapted_linear`` come here by themselves when ``x`` is on a card.

A :class:`CudaBatch` is what a CUDA graph captures: it allocates nothing and waits for nothing while it runs, and its tables lie at fixed
addresses. :meth:`CudaBatch.assign` makes it the batch of other adapters, and a graph that was captured computes that from then on::

    batch = flora.cuda.CudaLinear(layer).batch(rows)
    batch(x, out)                          # once before, so that all is loaded
    with torch.cuda.graph(graph):
        batch(x, out)
    batch.assign(other_rows)               # as many rows a segment, adapters of the same kinds and ranks, say
    graph.replay()
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Optional, Union

from . import _native
from ._linear import AdaptedLinear
from ._memory import numbers, slots_of

__all__ = ["AVAILABLE", "CudaBatch", "CudaLinear", "OtherLaunchesError"]

#: Whether this build has it.
AVAILABLE: bool = _native.has_cuda

#: Raised where a batch's launches differ from those that were made, so that no graph of them computes it.
OtherLaunchesError: type[Exception] = getattr(_native, "OtherLaunchesError", RuntimeError)

#: What addresses of tensors have to be multiples of, in bytes; kernels read vectors.
_ALIGNMENT = 256
#: Batches of a layer that are kept, the latest last.
_KEPT = 16


class CudaLinear:
    """A layer's weights and adapters on a card. Adapters that are put into the layer later are copied when they are first needed.

    Args:
        layer: the layer, or its handle.
        card: the card's number, PyTorch's ``device.index``.

    Raises:
        RuntimeError: this build has no support for cards, there is no driver, or the card is too old.
    """

    __slots__ = ("_batches", "_captured", "_native", "card", "parts")

    def __init__(self, layer: Union[AdaptedLinear, int], card: int = 0) -> None:
        if not AVAILABLE:
            raise RuntimeError(
                "this build of flora has no support for cards: build the wheel with `cargo xtask wheel --cuda`, or move tensors to the processor"
            )
        handle = layer if isinstance(layer, int) else layer.handle
        _load_nvrtc()
        self._native = _native.CudaLinear(handle, card, [str(folder) for folder in _headers()])
        self.card = card
        self.parts: list[int] = self._native.parts
        # By rows and stream, because one batch's launches run on one stream at a time.
        self._batches: OrderedDict[tuple[bytes, int, int], CudaBatch] = OrderedDict()
        # By rows. A graph reads its tables for as long as it lives, which nobody tells, and on a stream of its own.
        self._captured: dict[tuple[bytes, int], CudaBatch] = {}

    @property
    def compiled(self) -> int:
        """How many kernels NVRTC has compiled for this card in this process; others were kept on disk."""
        return self._native.compiled

    def batch(self, rows: Any, count: Optional[int] = None, *, stream: Optional[int] = None) -> CudaBatch:
        """Makes the launches of a batch: the first of its kind compiles kernels, seconds apiece. Not while a stream is captured.

        Args:
            rows: int64 ``[rows]`` in host memory, the slot of each row; -1 is the base. None: ``count`` rows of the base.
            stream: the driver's number of the stream behind which tables are written; None is PyTorch's current one, or the default one.
        """
        count = count if rows is None else len(rows)
        if count is None:
            raise ValueError("rows is None, so that count has to say how many there are")
        stream = _stream(self.card) if stream is None else stream
        return CudaBatch(self._native.batch(slots_of(rows, count), count, stream), self, count)

    def _batch_of(self, rows: Any, count: int, stream: int, is_captured: bool) -> CudaBatch:
        """The batch of these rows, as it was kept or new. A capture takes one that ran before, of any stream, for itself."""
        of_rows = (b"" if rows is None else bytes(memoryview(rows.numpy())), count)
        if is_captured:
            if of_rows not in self._captured:
                known = next((key for key in reversed(self._batches) if key[:2] == of_rows), None)
                own = self.batch(rows, count, stream=stream) if known is None else self._batches.pop(known)
                self._captured[of_rows] = own
            return self._captured[of_rows]
        key = (*of_rows, stream)
        if key not in self._batches:
            self._batches[key] = self.batch(rows, count, stream=stream)
        self._batches.move_to_end(key)
        if len(self._batches) > _KEPT:
            self._batches.popitem(last=False)
        return self._batches[key]

    def _renewed(self, batch: CudaBatch, rows: Any, count: int, stream: int) -> CudaBatch:
        """A batch of the same rows whose adapters have other ranks now."""
        for key in [key for key, own in self._batches.items() if own is batch]:
            del self._batches[key]
        return self._batch_of(rows, count, stream, False)


class CudaBatch:
    """The launches of a batch. It has to live as long as a graph that captured it."""

    __slots__ = ("_linear", "_native", "rows")

    def __init__(self, native: Any, linear: CudaLinear, rows: int) -> None:
        self._native = native
        self._linear = linear
        self.rows = rows

    def assign(self, rows: Any, *, stream: Optional[int] = None) -> bool:
        """Makes this the batch of other rows; what was replayed on other streams has to be over. Whether anything was written.

        Raises:
            OtherLaunchesError: other segments, or adapters of other kinds and ranks. Nothing has changed.
        """
        count = len(rows)
        stream = _stream(self._linear.card) if stream is None else stream
        return self._native.assign(slots_of(rows, count), count, stream)

    def refresh(self, *, stream: Optional[int] = None) -> bool:
        """Copies adapters that were put into the layer's slots since, without which a graph goes on with those before. :meth:`forward_pointers`
        does it by itself.

        Raises:
            OtherLaunchesError: they have other kinds or ranks. Nothing has changed but the vectors.
        """
        return self._native.refresh(_stream(self._linear.card) if stream is None else stream)

    def forward_pointers(self, x: tuple[int, int], outs: Sequence[tuple[int, int]], stream: int) -> None:
        """Queues the launches: (address, bytes) of ``x [rows, in]`` and of one ``y [rows, out]`` for each part, row-major without gaps."""
        self._native.forward(x, list(outs), stream)

    def __call__(self, x: Any, out: Any = None) -> Any:
        """Queues the launches for PyTorch's tensors on its current stream.

        Args:
            x: ``[..., in]``, on the card and contiguous.
            out: ``[..., out]`` to write to, of a layer of one part; None makes one.
        """
        torch = sys.modules["torch"]
        if not x.is_contiguous() or x.data_ptr() % _ALIGNMENT:
            x = x.clone(memory_format=torch.contiguous_format)
        shape, parts = x.shape[:-1], self._linear.parts
        if out is not None and (len(parts) != 1 or not out.is_contiguous() or out.shape != (*shape, parts[0]) or out.dtype != x.dtype):
            raise ValueError(f"out has to be contiguous, {x.dtype} and [..., {sum(parts)}], of a layer of one part")
        outs = [x.new_empty((*shape, size)) for size in parts] if out is None else [out]
        stream = torch.cuda.current_stream(x.device).cuda_stream
        self.forward_pointers(_described(x), [_described(own) for own in outs], stream)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


#: Layers on cards, by handle and card.
_linears: dict[tuple[int, int], CudaLinear] = {}


def forward(handle: int, x: Any, rows: Any, out: Any = None) -> Any:
    """y of x on its card, by the layer with a handle. ``rows`` in host memory, or on the card, which waits for them to be copied."""
    torch = sys.modules["torch"]
    inputs, _, activations = _native.describe_handle(handle)
    if x.dtype != getattr(torch, activations):
        raise TypeError(f"x is {x.dtype}, and the layer's activations are {activations}; convert it")
    if not x.shape or x.shape[-1] != inputs:
        raise ValueError(f"x has the shape {list(x.shape)}; its last extent has to be {inputs}")
    card = x.device.index
    own = _linears.get((handle, card))
    if own is None:
        own = _linears[handle, card] = CudaLinear(handle, card)
    count = x.numel() // inputs if inputs else 0
    if count == 0:
        return x.new_empty((*x.shape[:-1], sum(own.parts))) if out is None else out
    if rows is not None:
        rows = rows.cpu().contiguous()
        numbers(rows, "rows")
        if rows.numel() != count:
            raise ValueError(f"rows has {rows.numel()} slots and x {count} rows; it takes one slot for each")
    stream, is_captured = torch.cuda.current_stream(x.device).cuda_stream, torch.cuda.is_current_stream_capturing()
    batch = own._batch_of(rows, count, stream, is_captured)
    try:
        return batch(x, out)
    except OtherLaunchesError:
        if is_captured:
            raise
        return own._renewed(batch, rows, count, stream)(x, out)


def forget(handle: int) -> None:
    """Frees what a layer has on cards. Graphs that captured it can't be replayed afterwards."""
    for key in [key for key in _linears if key[0] == handle]:
        del _linears[key]


def _described(tensor: Any) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def _stream(card: int) -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.current_stream(card).cuda_stream if torch is not None and torch.cuda.is_available() else 0


def _packages() -> list[pathlib.Path]:
    """The folders of packages that may have parts of CUDA's toolkit."""
    return [pathlib.Path(folder) for folder in sys.path if folder and pathlib.Path(folder, "nvidia").is_dir()]


@functools.cache
def _headers() -> tuple[pathlib.Path, ...]:
    """Folders with CUDA's headers among Python's packages: NVIDIA's own, then those that Triton brings."""
    patterns = ("nvidia/*/include/cuda_runtime.h", "nvidia/*/include/crt/host_config.h", "triton/backends/nvidia/include/cuda.h")
    found = [file for folder in _packages() for pattern in patterns for file in sorted(folder.glob(pattern))]
    folders = [file.parent.parent if file.parent.name == "crt" else file.parent for file in found]
    return tuple(dict.fromkeys(folders))


@functools.cache
def _load_nvrtc() -> None:
    """Loads the NVRTC that PyTorch's packages have, which no system's loader finds; who asks for it by its name gets this one then."""
    for folder in _packages():
        for library in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*")):
            if "alt" not in library.name:
                ctypes.CDLL(str(library))
                return
