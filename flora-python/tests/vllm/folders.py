"""Adapters of every kind as PEFT writes them, with random numbers that change what the model says."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Callable, Optional

import torch
from models import cache, model
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

QK = ("q_proj", "k_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Kind:
    """How adapters of one setting are made."""

    config: Optional[Callable[[], Any]]
    #: The deviation of each of its numbers from ``centre``, by a part of the tensor's name.
    spread: dict[str, float]
    centre: dict[str, float] = field(default_factory=dict)
    #: Of FLORA: rank and modules.
    flora: Optional[tuple[int, tuple[str, ...]]] = None


def _lora(r: int, modules: tuple[str, ...], spread: float, **options: Any) -> Kind:
    config = lambda: LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(modules), task_type="CAUSAL_LM", **options)
    return Kind(config, {"lora_A": spread, "lora_B": spread})


def _ia3(modules: tuple[str, ...], inputs: tuple[str, ...]) -> Kind:
    config = lambda: IA3Config(target_modules=list(modules), feedforward_modules=list(inputs), task_type="CAUSAL_LM")
    return Kind(config, {"ia3_l": 0.2}, {"ia3_l": 1.0})


def _hira(r: int, modules: tuple[str, ...]) -> Kind:
    return Kind(lambda: HiraConfig(r=r, target_modules=list(modules), task_type="CAUSAL_LM"), {"hira_A": 0.4, "hira_B": 0.4})


KINDS = {
    "lora-1": _lora(1, QK, 0.08),
    "lora-2-all": _lora(2, ALL, 0.03),
    "lora-4": _lora(4, QK, 0.05),
    "lora-8-all": _lora(8, ALL, 0.02),
    "lora-16": _lora(16, ATTENTION, 0.03),
    "rslora-4": _lora(4, QK, 0.04, use_rslora=True),
    "patterns": _lora(4, ATTENTION, 0.04, rank_pattern={"q_proj": 7}, alpha_pattern={"v_proj": 3}),
    "dora-3": _lora(3, QK, 0.05, use_dora=True),
    "dora-8-all": _lora(8, ALL, 0.02, use_dora=True),
    "ia3": _ia3(("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "ia3-all": _ia3(ALL, ("o_proj", "down_proj")),
    "hira-2": _hira(2, QK),
    "hira-8": _hira(8, ATTENTION),
    "flora-1": Kind(None, {}, flora=(1, QK)),
    "flora-3": Kind(None, {}, flora=(3, ("q_proj", "k_proj", "v_proj"))),
    "flora-16-all": Kind(None, {}, flora=(16, ALL)),
}


def folder(name: str, seed: int = 0) -> str:
    """The folder of an adapter of one of the ``KINDS``, made at the first call."""
    path = cache() / "adapters" / f"{name}-{seed}"
    if (path / "adapter_model.safetensors").exists():
        return str(path)
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(1000 * list(KINDS).index(name) + seed)
    base = AutoModelForCausalLM.from_pretrained(model("float32"), dtype=torch.float32)
    if kind.flora is not None:
        _write_flora(base, path, kind.flora, generator)
        return str(path)
    assert kind.config is not None
    adapted = get_peft_model(base, kind.config())
    with torch.no_grad():
        for tensor, parameter in adapted.named_parameters():
            for part, spread in kind.spread.items():
                if part in tensor:
                    numbers = torch.randn(parameter.shape, generator=generator) * spread
                    parameter.copy_(numbers + kind.centre.get(part, 0.0))
            if "lora_magnitude_vector" in tensor:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(path))
    return str(path)


def _write_flora(base, path, setting: tuple[int, tuple[str, ...]], generator: torch.Generator) -> None:
    rank, modules = setting
    tensors = {}
    for name, layer in base.named_modules():
        if name.endswith(modules):
            outputs, inputs = layer.weight.shape
            b = torch.randn(inputs, rank, generator=generator) * 0.15
            a = torch.randn(rank, outputs, generator=generator) * 0.15
            b[:, 0] += 1
            a[0] += 1
            tensors[f"base_model.model.{name}.flora_B"] = b
            tensors[f"base_model.model.{name}.flora_A"] = a
    path.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "FLORA", "r": rank, "reduce": "sum", "target_modules": list(modules)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
