"""Adapters from folders, and the layers that adapters may be of."""

from __future__ import annotations

import os
from typing import Union

from . import _native


def adapter_layers() -> list[str]:
    """The layers that :meth:`flora.AdaptedLinear.put` takes, such as ``lora``, ``dora``, ``hira``, ``flora`` and ``ia3``."""
    return _native.layer_names()


def adapter_operands(layer: str) -> list[str]:
    """The names of the tensors that an adapter of ``layer`` is made of, in the order of its equation."""
    return _native.layer_operands(layer)


class Adapter:
    """An adapter's folder as PEFT writes it, of any kind that flora serves, read and checked whole.

    Args:
        folder: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ValueError: it can't be read, or says what isn't understood; the message says what.
    """

    __slots__ = ("_native",)

    def __init__(self, folder: Union[str, os.PathLike]) -> None:
        self._native = _native.Adapter.open(os.fspath(folder))

    @classmethod
    def open(cls, folder: Union[str, os.PathLike]) -> "Adapter":
        """The same as the constructor."""
        return cls(folder)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._native.name

    @property
    def kind(self) -> str:
        """Its kind, such as ``lora`` or ``flora``."""
        return self._native.kind

    @property
    def modules(self) -> list[str]:
        """The paths of the modules that it adapts, such as ``model.layers.0.self_attn.q_proj``."""
        return self._native.modules

    def layer_of(self, module: str) -> str:
        """The layer of a module, such as ``dora``."""
        return self._native.layer_of(module)

    def rank_of(self, module: str) -> int:
        """The rank of a module; 0 where its kind has none."""
        return self._native.rank_of(module)

    def __repr__(self) -> str:
        return f"<flora.Adapter {self.name!r}: {self.kind}, {len(self.modules)} modules>"
