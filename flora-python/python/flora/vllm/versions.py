"""Which versions of vLLM this plugin knows, and what of vLLM it relies on.

vLLM has no interface for other kinds of adapters. What is replaced or called here beyond its public names stands in one table, which is
checked before anything is changed: a version that differs is refused, rather than served wrongly.
"""

from __future__ import annotations

import importlib
import inspect
from typing import NamedTuple

#: Versions whose parts below were read and tested.
KNOWN = ("0.32.0",)


class UnknownVllm(RuntimeError):
    """A vLLM that this plugin wasn't made for."""


class Relied(NamedTuple):
    """A name of vLLM's and what is expected of it."""

    module: str
    name: str
    #: The parameters of a function, without ``self``; None where it is no function.
    parameters: tuple[str, ...] | None


RELIED = (
    # Replaced: the classes that wrap linear layers.
    Relied("vllm.lora.utils", "_all_lora_classes", None),
    # Overridden in subclasses of those.
    Relied("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_sync", ("x", "bias")),
    Relied("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_base_forward", ("x",)),
    Relied("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.create_lora_weights", ("max_loras", "lora_config", "model_config")),
    Relied("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.set_lora", ("index", "lora_a", "lora_b")),
    Relied("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.reset_lora", ("index",)),
    Relied("vllm.lora.layers.base", "BaseLayerWithLoRA.set_mapping", ("punica_wrapper",)),
    Relied("vllm.lora.layers.column_parallel_linear", "MergedColumnParallelLinearWithLoRA.expand_packed_lora", ("lora_a", "lora_b")),
    # Replaced, and overridden: the ends of a decoder.
    Relied("vllm.lora.utils", "LogitsProcessorWithLoRA", ("base_layer", "hidden_size", "dtype", "device", "sharded_to_full_mapping")),
    Relied("vllm.lora.layers", "LogitsProcessorWithLoRA._get_logits", ("hidden_states", "lm_head", "embedding_bias", "skip_gather")),
    Relied("vllm.model_executor.layers.logits_processor", "LogitsProcessor._get_logits", ("hidden_states", "lm_head", "embedding_bias", "skip_gather")),
    # Wrapped: reading an adapter's folder, in a worker.
    Relied("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("lora_request",)),
    Relied("vllm.lora.utils", "get_adapter_absolute_path", ("lora_path",)),
    Relied("vllm.lora.lora_model", "LoRAModel", ("lora_model_id", "rank", "loras", "is_3d_lora_weight", "modules_to_save")),
    Relied("vllm.lora.lora_weights", "LoRALayerWeights", ("module_name", "rank", "lora_alpha", "lora_a", "lora_b", "scaling")),
    # Wrapped: a request's admission, in the engine's core.
    Relied("vllm.v1.engine.core", "EngineCore.add_request", ("request", "request_wave")),
    Relied("vllm.v1.engine.core", "EngineCore.add_lora", ("lora_request",)),
    Relied("vllm.v1.engine.core", "EngineCoreProc._send_error_outputs_to_client", ("req_ids", "client_index")),
    # Read: the slot of each row.
    Relied("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.update_metadata", ("mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs")),
    # Called: multiplying by a part of a packed weight.
    Relied("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
)

#: Attributes that a row's slot is read from, of every wrapper that vLLM makes.
WRAPPER_ATTRIBUTES = ("_token_lora_indices", "indices_len", "no_lora")


def check() -> None:
    """Checks vLLM's version and everything in the table.

    Raises:
        UnknownVllm: it is another one; the message says what differs.
    """
    import vllm

    version = vllm.__version__.split("+")[0]
    if version not in KNOWN:
        raise UnknownVllm(
            f"flora's vLLM plugin knows vLLM {', '.join(KNOWN)}, and this is {vllm.__version__}; "
            "install one of those, or start vLLM without the plugin (VLLM_PLUGINS='')"
        )
    for relied in RELIED:
        problem = _problem(relied)
        if problem:
            raise UnknownVllm(
                f"flora's vLLM plugin relies on {relied.module}.{relied.name} of vLLM {version}, which {problem}; "
                "is this vLLM changed? Start it without the plugin (VLLM_PLUGINS=''), or install the released one"
            )


def check_wrapper(wrapper: object) -> None:
    """Checks the object that a layer reads the slots of its rows from."""
    missing = [name for name in WRAPPER_ATTRIBUTES if not hasattr(wrapper, name)]
    if missing:
        raise UnknownVllm(
            f"flora's vLLM plugin reads {', '.join(missing)} of {type(wrapper).__name__}, which doesn't have it"
        )


def _problem(relied: Relied) -> str:
    value: object = importlib.import_module(relied.module)
    for name in relied.name.split("."):
        if not hasattr(value, name):
            return "doesn't exist"
        value = getattr(value, name)
    if relied.parameters is None:
        return ""
    found = tuple(name for name in inspect.signature(value).parameters if name != "self")  # type: ignore[arg-type]
    return "" if found == relied.parameters else f"takes {found} in place of {relied.parameters}"
