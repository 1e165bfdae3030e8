"""Where the numbers of tensors and arrays lie.

The native module takes addresses. They are taken from PyTorch's tensors and NumPy's arrays here, after what it can't check: that the
memory is the processor's, that the types are those that it says, that the memory may be written. Neither library is imported.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

_NUMPY_TYPES = {"<f4": "float32", "<f2": "float16", "<f8": "float64", "<i8": "int64", "<V2": "bfloat16"}
_TORCH_TYPES = ("float32", "float16", "bfloat16", "float64", "int64")


class Numbers(NamedTuple):
    """A tensor's memory: the address of its first number, its type, extents, and numbers from one place to the next."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool

    @property
    def described(self) -> tuple[int, str, tuple[int, ...], tuple[int, ...]]:
        """What the native module takes."""
        return self.address, self.dtype, tuple(self.shape), tuple(self.strides)


def is_tensor(value: Any) -> bool:
    """Whether it is a PyTorch tensor, without importing PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, getattr(torch, "Tensor", ()))


def numbers(value: Any, what: str) -> Numbers:
    """Where the numbers of a tensor or an array lie.

    Raises:
        TypeError: it is neither, or its numbers are of no type that this library has.
        ValueError: its memory isn't this processor's.
    """
    if is_tensor(value):
        return _of_tensor(value, what)
    interface = getattr(value, "__array_interface__", None)
    if interface is None:
        raise TypeError(f"{what} is a {type(value).__name__}; it has to be a PyTorch tensor or a NumPy array")
    name = _NUMPY_TYPES.get(interface["typestr"])
    if name == "bfloat16" and getattr(value.dtype, "name", "") != "bfloat16":
        name = None
    if name is None:
        raise TypeError(f"{what} has numbers of the type {value.dtype}, which this takes none of")
    address, read_only = interface["data"]
    shape = tuple(interface["shape"])
    size = value.dtype.itemsize
    strides = interface.get("strides") or _dense(shape, size)
    if any(stride % size for stride in strides):
        raise ValueError(f"{what} has strides of {strides} bytes, which are no whole numbers; make it contiguous")
    return Numbers(address, name, shape, tuple(stride // size for stride in strides), not read_only)


def _of_tensor(value: Any, what: str) -> Numbers:
    if not value.is_cpu:
        raise ValueError(f"{what} is on the device {value.device}; this layer computes on the processor: move it there")
    if value.layout is not sys.modules["torch"].strided or value.is_neg():
        raise TypeError(f"{what} is no dense tensor; make one of it")
    name = _torch_types().get(value.dtype)
    if name is None:
        raise TypeError(f"{what} has numbers of the type {value.dtype}, which this takes none of")
    return Numbers(value.data_ptr(), name, value.shape, value.stride(), True)


@functools.cache
def _torch_types() -> dict[Any, str]:
    """The types of PyTorch's tensors and their names."""
    return {getattr(sys.modules["torch"], name): name for name in _TORCH_TYPES}


def _dense(shape: tuple[int, ...], step: int) -> tuple[int, ...]:
    strides = []
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def is_on_card(value: Any) -> bool:
    """Whether it is a PyTorch tensor on a card of NVIDIA's."""
    return is_tensor(value) and value.is_cuda


def on_host(value: Any) -> Any:
    """A tensor on a card as one in host memory; anything else as it is."""
    return value.detach().cpu() if is_on_card(value) else value


def rows_of(own: Numbers, width: int, what: str) -> tuple[int, int]:
    """A tensor ``[..., width]`` as rows: how many, and numbers from one to the next.

    Raises:
        ValueError: another width, or rows that are not equally far apart.
    """
    shape, strides = own.shape, own.strides
    if not shape or shape[-1] != width:
        raise ValueError(f"{what} has the shape {list(shape)}; its last extent has to be {width}")
    count = 1
    for extent in shape[:-1]:
        count *= extent
    if count == 0:
        return 0, width
    if width > 1 and strides[-1] != 1:
        raise ValueError(f"{what} has numbers of a row {strides[-1]} apart; make it contiguous")
    # The rows of the last extents have to go on where those of the ones before it end.
    pitch, expected = width, None
    for extent, stride in zip(reversed(shape[:-1]), reversed(strides[:-1])):
        if extent == 1:
            continue
        if expected is None:
            pitch = stride
        elif stride != expected:
            raise ValueError(f"{what} has rows that are not equally far apart (strides {list(strides)}); make it contiguous")
        expected = stride * extent
    if count > 1 and pitch < width:
        raise ValueError(f"{what} has rows that lie over one another (strides {list(strides)}); make it contiguous")
    return count, pitch


def slots_of(value: Any, rows: int) -> int:
    """The address of one int64 for each of ``rows`` rows; 0 for None.

    Raises:
        TypeError: no int64.
        ValueError: fewer than there are rows, or not one after the other.
    """
    if value is None:
        return 0
    own = numbers(value, "rows")
    if own.dtype != "int64":
        raise TypeError(f"rows has numbers of the type {own.dtype}; slots are int64")
    if len(own.shape) != 1 or own.shape[0] < rows:
        raise ValueError(f"rows has the shape {list(own.shape)}; it is one slot for each of the {rows} rows of x")
    if rows > 1 and own.strides[0] != 1:
        raise ValueError("rows isn't contiguous; make it so")
    return own.address if rows else 0
