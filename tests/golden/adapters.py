"""Adapters of PEFT with random numbers, saved as PEFT saves them: used by every script here that has adapters."""

import json
import shutil
from pathlib import Path

from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]


# Parts of the names of parameters, by what they are filled with: scales around 1, all others around 0, angles near to it.
AROUND_ONE = ["ia3_", "road_alpha", "boft_s"]
AROUND_ZERO = ["lora_", "hira_", "hada_", "lokr_", "vera_lambda", "delora_", "miss_", "hra_", "beft_", "c3a_", "shira_", "road_theta"]
SMALL = ["oft_R", "randlora_"]


def fill(adapted, std):
    """Fills a PEFT model's adapter by normal numbers, because PEFT's adapters start as the identity."""
    for key, parameter in adapted.named_parameters():
        if any(part in key for part in SMALL):
            nn.init.normal_(parameter, std=std / 5)
        elif any(part in key for part in AROUND_ONE):
            nn.init.normal_(parameter, mean=1.0, std=std)
        elif any(part in key for part in AROUND_ZERO):
            nn.init.normal_(parameter, std=std)
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
