"""A linear layer of PEFT's with fLoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.nn import functional

from ..torch import AdaptedLinear, trained_linear
from .config import FloraConfig

# Types that flora's kernels compute in.
_KERNEL_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# A base weight that changed so often keeps changing, as where it is sharded and gathered for every pass. It isn't packed again.
_MOST_PACKINGS = 4

_uses_kernels = True


def use_kernels(on: bool) -> None:
    """Whether layers on the processor run on flora's kernels, which hold a packed copy of each base weight. They do where nobody says."""
    global _uses_kernels
    _uses_kernels = bool(on)


class _Packed:
    """The base weight as flora's kernels have it. A copy of a module packs its own."""

    def __init__(self) -> None:
        self.layer: Optional[AdaptedLinear] = None
        self.key: Any = None
        self.packings = 0

    def __deepcopy__(self, memo: Any) -> "_Packed":
        return _Packed()

    def __reduce__(self) -> Any:
        return (_Packed, ())

    def of(self, weight: torch.Tensor, bias: Optional[torch.Tensor], dtype: torch.dtype) -> Optional[AdaptedLinear]:
        """The layer for a weight ``[out, in]`` and a type of inputs; None where flora's kernels are not used."""
        if torch.compiler.is_compiling():
            # What is traced can't pack: it uses what a pass before it packed.
            return self.layer if _uses_kernels else None
        usable = _uses_kernels and weight.is_cpu and dtype in _KERNEL_TYPES and weight.dtype in _KERNEL_TYPES
        if not usable or type(weight.data) is not torch.Tensor:
            self.layer = self.key = None
            return None
        key = (weight.data_ptr(), weight._version, weight.dtype, dtype, None if bias is None else (bias.data_ptr(), bias._version))
        if key != self.key:
            self.layer, self.key = None, key
            self.packings += 1
            if self.packings <= _MOST_PACKINGS:
                own_bias = None if bias is None else bias.detach()
                self.layer = AdaptedLinear(weight.detach(), own_bias, slots=0, activations=_KERNEL_TYPES[dtype])
        return self.layer


class FloraLayer(BaseTunerLayer):
    """What fLoRA adapters of a layer have: ``flora_B [in, r]`` and ``flora_A [r, out]`` by the adapter's name."""

    adapter_layer_names = ("flora_A", "flora_B")
    other_param_names = ("r", "reduce")

    def __init__(self, base_layer: nn.Module, fan_in_fan_out: bool = False) -> None:
        self.base_layer = base_layer
        self.fan_in_fan_out = fan_in_fan_out
        self.r: dict[str, int] = {}
        self.reduce: dict[str, str] = {}
        self.flora_A = nn.ParameterDict({})
        self.flora_B = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._weight_before_merge: Optional[torch.Tensor] = None
        self._packed = _Packed()
        self.out_features, self.in_features = self._base_weight().shape

    def _base_weight(self) -> torch.Tensor:
        """``[out, in]``"""
        weight = self.get_base_layer().weight
        return weight.T if self.fan_in_fan_out else weight

    def update_layer(self, adapter_name: str, r: int, config: FloraConfig) -> None:
        """Adds an adapter at its start."""
        if r < 1:
            raise ValueError(f"r is {r}; a rank is a whole number from 1 on")
        self.r[adapter_name] = r
        self.reduce[adapter_name] = config.reduce
        self.flora_B[adapter_name] = nn.Parameter(torch.empty(self.in_features, r))
        self.flora_A[adapter_name] = nn.Parameter(torch.empty(r, self.out_features))
        self.reset_parameters(adapter_name, config.init)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, init: str) -> None:
        """Puts an adapter back to its start, which computes what the base layer does."""
        b, a = self.flora_B[adapter_name], self.flora_A[adapter_name]
        if b.is_meta:
            return
        nn.init.ones_(b)
        nn.init.ones_(a)
        if init == "identity":
            # The first component is the base layer; the others add nothing yet, but differ, so that they learn different things.
            nn.init.normal_(b[:, 1:])
            nn.init.zeros_(a[1:])
            if self.reduce[adapter_name] == "mean":
                a[0] = float(self.r[adapter_name])

    def factor(self, adapter_name: str) -> torch.Tensor:
        """What the base weight is multiplied by, ``[out, in]``."""
        factor = (self.flora_B[adapter_name] @ self.flora_A[adapter_name]).T
        return factor / self.r[adapter_name] if self.reduce[adapter_name] == "mean" else factor


class FloraLinear(nn.Module, FloraLayer):
    """A linear layer with fLoRA adapters, of which one is active, or each sequence of a batch names its own."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, r: int, config: FloraConfig) -> None:
        super().__init__()
        FloraLayer.__init__(self, base_layer, config.fan_in_fan_out)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``. ``adapter_names`` has the adapter of each sequence, ``"__base__"`` for none."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            if self.merged:
                raise ValueError("an adapter is merged; unmerge it before a batch that names adapters")
            return self._mixed(x, list(adapter_names))
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.flora_A]
        if not active:
            return self.base_layer(x, *args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"the adapters {', '.join(active)} are active; fLoRA adapters multiply one weight and don't add up: activate one")
        return self._adapted(x, active[0])

    def _adapted(self, x: torch.Tensor, name: str) -> torch.Tensor:
        base = self.get_base_layer()
        layer = self._packed.of(self._base_weight(), base.bias, x.dtype)
        if layer is not None:
            return trained_linear(x, [self._operands(name)], None, layer)
        return self._by_weight(x, name)

    def _operands(self, name: str) -> tuple[str, list[torch.Tensor]]:
        kind = "flora" if self.reduce[name] == "sum" else "flora_mean"
        return kind, [self.flora_B[name], self.flora_A[name]]

    def _by_weight(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """The same in PyTorch's operations."""
        weight = self._base_weight()
        return functional.linear(x, weight * self.factor(name).to(weight.dtype), self.get_base_layer().bias)

    def _mixed(self, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        rows = len(adapter_names)
        if rows == 0 or x.shape[0] % rows:
            raise ValueError(f"{rows} adapters are named for a batch of {x.shape[0]} sequences; name one for each")
        # Adapters that don't adapt this layer leave it to the base.
        names = [name for name in dict.fromkeys(adapter_names) if name in self.flora_A]
        if not names:
            return self.base_layer(x)
        base = self.get_base_layer()
        layer = self._packed.of(self._base_weight(), base.bias, x.dtype)
        if layer is not None:
            number = {name: at for at, name in enumerate(names)}
            own = torch.tensor([number.get(name, -1) for name in adapter_names], dtype=torch.int64)
            own = own.repeat_interleave(x.shape[:-1].numel() // rows)
            return trained_linear(x, [self._operands(name) for name in names], own, layer)
        parts = []
        each = x.shape[0] // rows
        for sequences, name in zip(x.split(each), adapter_names):
            parts.append(self._by_weight(sequences, name) if name in self.flora_A else self.base_layer(sequences))
        return torch.cat(parts)

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Multiplies the base weight by an adapter's factor, which :meth:`unmerge` takes back exactly."""
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.flora_A]
        if not adapter_names:
            return
        if len(adapter_names) > 1 or self.merged:
            raise ValueError("one fLoRA adapter at a time can be merged, because they multiply the weight and don't add up")
        name = adapter_names[0]
        weight = self.get_base_layer().weight
        factor = self.factor(name).detach()
        merged = weight.data * (factor.T if self.fan_in_fan_out else factor).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"the adapter {name} gives weights that are not finite; it is damaged")
        # Zeros can't be divided by.
        self._weight_before_merge = weight.data.detach().clone().cpu()
        with torch.no_grad():
            weight.copy_(merged)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Gives the base layer its own weight back."""
        if not self.merged:
            return
        weight = self.get_base_layer().weight
        with torch.no_grad():
            weight.copy_(self._weight_before_merge.to(device=weight.device, dtype=weight.dtype))
        self._weight_before_merge = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What merging adds to the base weight."""
        weight = self._base_weight()
        delta = weight * (self.factor(adapter) - 1).to(weight.dtype)
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's own conversion to LoRA holds; what an fLoRA adapter adds depends on the weight."""
        return False

    def __repr__(self) -> str:
        return "flora." + super().__repr__()
