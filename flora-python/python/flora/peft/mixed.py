"""Batches whose sequences have adapters of any kinds, ranks and folders, in one pass of a model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._adapters import Adapter
from ..torch import AdaptedLinear, adapted_linear

_BASE = "__base__"
_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


class MixedBatches:
    """Runs a model on batches whose sequences name their adapters, of every kind that flora reads.

    PEFT's own ``adapter_names`` works for some kinds and is ignored by others, and one PEFT model has one kind. Here, each sequence may
    have an adapter of another kind and rank, or none, and every linear layer computes the batch in one call.

    Args:
        model: a model on the processor, or a PEFT model, whose own adapters are among those that can be named then.
        folders: adapters by name: folders as PEFT writes them.

    Example::

        mixed = MixedBatches(model, {"a": "adapters/a", "b": "adapters/b"})
        logits = mixed(**inputs, adapter_names=["a", "b", "__base__"]).logits
        tokens = mixed.generate(**inputs, adapter_names=["a", "b", "__base__"], max_new_tokens=32)

    The layers hold packed copies of the base weights that are adapted. Adapters are those that the folders, or the PEFT model, have when
    this is made.
    """

    def __init__(self, model: nn.Module, folders: Optional[Mapping[str, Union[str, os.PathLike]]] = None) -> None:
        self.model = model
        is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
        self._base = model.get_base_model() if is_peft else model
        adapters = {name: Adapter.open(folder) for name, folder in (folders or {}).items()}
        if is_peft:
            adapters = {**_own_adapters(model), **adapters}
        if _BASE in adapters:
            raise ValueError(f"`{_BASE}` is what no adapter is called")
        self._slots = {name: slot for slot, name in enumerate(adapters)}
        self._layers: dict[str, tuple[nn.Module, AdaptedLinear]] = {}
        for name, adapter in adapters.items():
            for path in adapter.modules:
                self._layer(name, path).put_adapter(self._slots[name], adapter, path)

    @property
    def names(self) -> list[str]:
        """The adapters that can be named."""
        return list(self._slots)

    def __call__(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The model's output for a batch; ``adapter_names`` has one for each sequence, ``"__base__"`` for none."""
        with self._adapted(adapter_names):
            return self._base(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
        """The same of ``model.generate``."""
        with self._adapted(adapter_names):
            return self._base.generate(*args, **kwargs)

    def close(self) -> None:
        """Frees the packed weights."""
        for _, layer in self._layers.values():
            layer.close()
        self._layers.clear()

    def _layer(self, name: str, path: str) -> AdaptedLinear:
        known = self._layers.get(path)
        if known is not None:
            return known[1]
        try:
            module = self._base.get_submodule(path)
        except AttributeError:
            raise ValueError(f"the adapter `{name}` adapts `{path}`, which the model doesn't have") from None
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(f"an adapter is merged into `{path}`; unmerge it first")
        is_conv1d = type(base).__name__ == "Conv1D" and hasattr(base, "nf")
        if not (is_conv1d or isinstance(base, nn.Linear)):
            raise ValueError(f"the adapter `{name}` adapts `{path}`, a {type(base).__name__}; batches are mixed in linear layers alone")
        weight = base.weight.detach()
        bias = None if base.bias is None else base.bias.detach()
        layer = AdaptedLinear(weight.T if is_conv1d else weight, bias, slots=len(self._slots))
        self._layers[path] = (module, layer)
        return layer

    def _adapted(self, adapter_names: Sequence[str]) -> "_Adapted":
        unknown = sorted(set(adapter_names) - set(self._slots) - {_BASE})
        if unknown:
            raise ValueError(f"no adapter is called {', '.join(unknown)}; there are {', '.join(self._slots)}")
        slots = torch.tensor([self._slots.get(name, -1) for name in adapter_names], dtype=torch.int64)
        return _Adapted(self._layers.values(), slots)


class _Adapted:
    """While it lasts, the modules compute by flora's layers."""

    def __init__(self, layers: Any, slots: torch.Tensor) -> None:
        self._layers = list(layers)
        self._slots = slots

    def __enter__(self) -> None:
        for module, layer in self._layers:
            # An attribute of the module's own hides its class's function.
            module.forward = self._forward(layer)

    def __exit__(self, *error: Any) -> None:
        for module, _ in self._layers:
            del module.forward

    def _forward(self, layer: AdaptedLinear) -> Any:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            rows = x.shape[:-1].numel()
            count = len(self._slots)
            if count == 0 or x.shape[0] % count:
                raise ValueError(f"{count} adapters are named for a batch of {x.shape[0]} sequences; name one for each")
            # Beams of a sequence follow one another.
            return adapted_linear(x, self._slots.repeat_interleave(rows // count), layer)

        return forward


def _own_adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a PEFT model, by way of what PEFT saves of them."""
    adapters = {}
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        for name in model.peft_config:
            # PEFT saves the adapter that is called so where it is told to, and others below.
            path = folder if name == "default" else os.path.join(folder, name)
            adapters[name] = Adapter.open(path)
    return adapters
