"""vLLM on this machine's processors, for the tests."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def start(folder: str, dtype: str, **options: Any):
    """An engine with LoRA on, unless ``options`` say otherwise. It works in processes of its own."""
    from vllm import LLM

    chosen: dict[str, Any] = dict(
        dtype=dtype,
        enforce_eager=True,
        enable_lora=True,
        max_loras=32,
        max_lora_rank=16,
        max_cpu_loras=64,
        max_model_len=512,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        seed=0,
        disable_log_stats=True,
    )
    chosen.update(options)
    if not chosen["enable_lora"]:
        for name in ("max_loras", "max_lora_rank", "max_cpu_loras"):
            chosen.pop(name)
    return LLM(folder, **chosen)
