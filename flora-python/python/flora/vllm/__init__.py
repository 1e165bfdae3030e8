"""vLLM serves adapters of every kind that flora knows, beside its own LoRA and in the same batches.

Installed beside vLLM, this is one of its general plugins: vLLM calls :func:`register` in every process that it starts, and nothing else
has to be done. A ``LoRARequest``, ``--lora-modules`` and ``/v1/load_lora_adapter`` then take PEFT folders of any kind.
"""

from __future__ import annotations

from .versions import UnknownVllm

__all__ = ["UnknownVllm", "register"]

_is_registered = False


def register() -> None:
    """Makes vLLM's layers, its reading of folders and its admission of requests take every kind of adapter. Later calls do nothing.

    On other platforms than the processor vLLM stays as it is, with a warning.

    Raises:
        UnknownVllm: a version of vLLM that this wasn't made for.
    """
    global _is_registered
    if _is_registered:
        return
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        init_logger(f"vllm.{__name__}").warning(
            "flora's plugin serves adapters on the CPU platform; on this one (%s) vLLM keeps its own LoRA layers, "
            "and other kinds of adapters stay refused. VLLM_PLUGINS says which plugins are loaded.",
            current_platform.device_name,
        )
        _is_registered = True
        return
    from . import versions

    versions.check()

    from . import admission, ends, layers, loading

    layers.install()
    ends.install()
    loading.install()
    admission.install()
    _is_registered = True
