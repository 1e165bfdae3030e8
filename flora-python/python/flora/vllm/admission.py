"""A request whose adapter can't be loaded fails alone.

vLLM loads an adapter in the step that first computes with it, where an error ends the engine and every request in it. Here the engine's
core has the workers load it when the request comes, and answers the request with an error if they can't.
"""

from __future__ import annotations

import functools

from vllm.logger import init_logger
from vllm.v1.engine.core import EngineCore

logger = init_logger(f"vllm.{__name__}")


def install() -> None:
    """Has vLLM's engine load a request's adapter before it takes the request."""
    take = EngineCore.add_request

    @functools.wraps(take)
    def add_request(self, request, request_wave: int = 0):
        adapter = request.lora_request
        if adapter is not None and self.vllm_config.lora_config is not None:
            try:
                _load(self, adapter)
            except Exception as error:
                refuse = getattr(self, "_send_error_outputs_to_client", None)
                if refuse is None:
                    # The engine runs in the caller's process, who gets the error itself.
                    raise
                logger.error("request %s ends: its adapter %s can't be loaded: %s", request.request_id, adapter.lora_name, error)
                refuse([request.request_id], request.client_index)
                return
        take(self, request, request_wave)

    EngineCore.add_request = add_request


def _load(core: EngineCore, adapter) -> None:
    """Loads an adapter that this engine hasn't loaded before, or that is to be loaded again."""
    loaded = core.__dict__.setdefault("_flora_loaded", {})
    if loaded.get(adapter.lora_int_id) == adapter.lora_path and not adapter.load_inplace:
        return
    core.add_lora(adapter)
    loaded[adapter.lora_int_id] = adapter.lora_path
