"""Adapters of PEFT with random numbers, saved as PEFT saves them: used by every script here that has adapters."""

import json
import shutil
from pathlib import Path

from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]


def fill(adapted, std):
    """Fills a PEFT model's adapter by normal numbers, because PEFT's adapters start as the identity."""
    for key, parameter in adapted.named_parameters():
        if "lora_" in key or "hira_" in key:
            nn.init.normal_(parameter, std=std)
        elif "ia3_" in key:
            nn.init.normal_(parameter, mean=1.0, std=std)
    return adapted.eval()


def save(adapted, folder, embeddings=False):
    """Writes what save_pretrained writes, the same bytes on every run; `embeddings` is its save_embedding_layers."""
    shutil.rmtree(folder, ignore_errors=True)
    adapted.save_pretrained(folder, save_embedding_layers=embeddings)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    for key, value in settings.items():
        # PEFT writes sets in hash order; sorted, the files are the same on every run.
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            settings[key] = sorted(value)
    # Where the repository lies is nobody's matter.
    base = Path(settings.get("base_model_name_or_path") or "")
    if base.is_relative_to(REPOSITORY):
        settings["base_model_name_or_path"] = str(base.relative_to(REPOSITORY))
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
