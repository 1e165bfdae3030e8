"""Reading an adapter's folder in a worker: plain LoRA as vLLM reads it, everything else by flora.

What flora reads becomes one of vLLM's adapters, whose modules hold folded vectors in place of LoRA's two tensors. vLLM packs them, keeps
them, evicts them and puts them into slots as it does its own.
"""

from __future__ import annotations

import functools
import json
import os
from typing import NamedTuple, Optional

import torch
from vllm.distributed import get_tp_group
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager

from .. import Adapter
from ..attached import Folded, fold, reads_base
from .layers import AttachedLayer, FoldedModule

#: Options of a LORA folder that vLLM refuses and flora serves.
BEYOND_VLLM = ("use_dora", "lora_bias")

#: Quantised bases that were tested; to others only sums are added.
TESTED_QUANTISATIONS: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where a module of an adapter is in vLLM's model: part ``part`` of ``layer``."""

    layer: AttachedLayer
    part: int


class FoldedWeights(LoRALayerWeights):
    """A module of an adapter of any kind, in the place of LoRA's tensors."""

    def __init__(self, module: str, folded: Folded) -> None:
        super().__init__(module, folded.rank, folded.rank, FoldedModule(folded), None, scaling=1)


def is_plain_lora(folder: str) -> bool:
    """Whether vLLM's own reading is the right one."""
    with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/adapter_config.json is no object; PEFT writes one")
    return config.get("peft_type", "LORA") == "LORA" and not any(config.get(option) for option in BEYOND_VLLM)


def load(worker: WorkerLoRAManager, folder: str, number: int) -> LoRAModel:
    """Reads a folder for the model of a worker.

    Args:
        number: vLLM's number of the adapter.

    Raises:
        ValueError: it can't be read, or doesn't fit the model as it is wrapped; the message says what to do.
    """
    adapter = Adapter(folder)
    if worker.lora_config.fully_sharded_loras:
        raise ValueError(
            f"the adapter {adapter.name} ({adapter.kind}) can't be served with fully sharded LoRAs, which cut the rank; "
            "start vLLM without --fully-sharded-loras"
        )
    manager = worker._adapter_manager
    places = places_of(manager)
    rename = getattr(manager.model, "hf_to_vllm_mapper", None)
    rename = rename.get_rename_mapper() if rename is not None else None
    found = {}
    for module in adapter.modules:
        name = module if rename is None else (rename.map_name(module) or module)
        place = places.get(name)
        if place is None:
            raise ValueError(_missing(adapter, module, manager))
        _check_base(adapter, module, place)
        found[module] = (name, place)
    weights = {}
    for module, (name, place) in found.items():
        folded = _fold(adapter, module, place)
        if folded.rank > worker.lora_config.max_lora_rank:
            raise ValueError(
                f"the adapter {adapter.name} ({adapter.kind}) has rank {folded.rank} in {module}, more than max_lora_rank "
                f"{worker.lora_config.max_lora_rank}; start vLLM with a larger one"
            )
        weights[name] = FoldedWeights(name, folded)
    rank = max((own.rank for own in weights.values()), default=0)
    return LoRAModel(number, rank, weights)


def places_of(manager) -> dict[str, Place]:
    """The modules of a model that an adapter may have."""
    places = {}
    for name, layer in manager.modules.items():
        if isinstance(layer, AttachedLayer):
            for part, module in enumerate(manager.packed_modules.get(name, [name])):
                places[module] = Place(layer, part)
    return places


def _missing(adapter: Adapter, module: str, manager) -> str:
    wrapped = manager.modules.get(module)
    if wrapped is not None:
        reason = f"vLLM has a {type(wrapped).__name__} there, which only plain LoRA may adapt"
    elif manager.lora_config.target_modules is not None:
        reason = "lora_target_modules leaves it out; name it there"
    else:
        reason = f"{type(manager.model).__name__} has no such layer that can be adapted"
    return f"the adapter {adapter.name} ({adapter.kind}) adapts {module}, but {reason}"


def _check_base(adapter: Adapter, module: str, place: Place) -> None:
    base = place.layer.base
    name = type(base.method).__name__
    if not base.is_plain and name not in TESTED_QUANTISATIONS:
        raise ValueError(
            f"the adapter {adapter.name} ({adapter.kind}) adapts {module}, whose weight vLLM keeps quantised ({name}); "
            "flora serves other kinds than plain LoRA on float weights"
        )


def _fold(adapter: Adapter, module: str, place: Place) -> Folded:
    shape, held = _whole(place)
    weight = None
    if reads_base(adapter, module):
        weight = _gathered(place, shape, held)
    bias = _whole_bias(place, shape, held)
    return fold(adapter, module, shape, weight, bias)


class Held(NamedTuple):
    """The numbers of a module's outputs and inputs that a rank holds; None are all of them."""

    outputs: Optional[list[int]]
    inputs: Optional[list[int]]


def _whole(place: Place) -> tuple[tuple[int, int], Held]:
    """The outputs and inputs of a module on all ranks together."""
    layer, part = place
    base = layer.base_layer
    if layer.tp_size == 1:
        return (layer.base.parts[part], base.input_size), Held(None, None)
    sizes = getattr(layer, "output_sizes", None)
    outputs = base.output_size if layer.n_slices == 1 or sizes is None else sizes[part]
    inputs, own_outputs = layer.shard(part, base.input_size, outputs)
    return (outputs, base.input_size), Held(own_outputs, inputs)


def _gathered(place: Place, shape: tuple[int, int], held: Held) -> torch.Tensor:
    """The weight ``[out, in]`` of a module, from all ranks."""
    layer, part = place
    own = layer.base.weight().split(layer.base.parts, dim=0)[part]
    if held.outputs is None or held.inputs is None:
        return own.contiguous()
    shards: list = [None] * layer.tp_size
    torch.distributed.all_gather_object(shards, (held, own), group=get_tp_group().cpu_group)
    weight = torch.zeros(shape, dtype=own.dtype)
    for (outputs, inputs), values in shards:
        weight[torch.tensor(outputs).unsqueeze(1), torch.tensor(inputs).unsqueeze(0)] = values
    return weight


def _whole_bias(place: Place, shape: tuple[int, int], held: Held) -> Optional[torch.Tensor]:
    """The bias ``[out]`` of a module, with zeros for what other ranks have."""
    layer, part = place
    bias = getattr(layer.base_layer, "bias", None)
    if bias is None or layer.base_layer.skip_bias_add:
        return None
    if held.outputs is None:
        return bias.detach().split(layer.base.parts)[part].contiguous()
    whole = torch.zeros(shape[0], dtype=bias.dtype)
    own = bias.detach().split(layer.base.parts)[part] if bias.shape[0] == sum(layer.base.parts) else bias.detach()
    whole[torch.tensor(held.outputs)] = own
    return whole


def install() -> None:
    """Has vLLM's workers read folders by :func:`load` where its own reading isn't the right one."""
    vllm_load = WorkerLoRAManager._load_adapter

    @functools.wraps(vllm_load)
    def load_adapter(self, lora_request):
        folder = get_adapter_absolute_path(lora_request.lora_path)
        if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
        if is_plain_lora(folder):
            return vllm_load(self, lora_request)
        return load(self, folder, lora_request.lora_int_id)

    WorkerLoRAManager._load_adapter = load_adapter
