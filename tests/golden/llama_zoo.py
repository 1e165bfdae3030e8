"""Makes llama_zoo/: what transformers computes with llama_tiny/ and an adapter of each of PEFT's kinds.

    venv/bin/python tests/golden/llama_zoo.py          the environment is that of smollm2.py, the model that of llama_tiny.py
"""

import copy
import shutil
from pathlib import Path

import torch
from adapters import fill, save
from decoder import record, save_outputs
from make_zoo import CASES
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "llama_zoo"
STEPS, LEAST_MARGIN = 8, 0.002
# Sizes that divide those of the model, in the place of those of `make_zoo.py`.
SIZES = {
    "vblora": {"vector_length": 10},
    "c3a": {"block_size": 10},
    "road": {"group_size": 10},
    "oft": {"oft_block_size": 10},
    "boft": {"boft_block_size": 10},
}

if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama_tiny" / "model", attn_implementation="eager").eval()
    prompt = {"name": "few", "tokens": torch.randint(model.config.vocab_size, (9,)).tolist()}
    vocabulary = list(range(0, model.config.vocab_size, 4))
    for name, (_, config) in CASES.items():
        if "_" in name:
            continue
        config = copy.deepcopy(config)
        config.target_modules = {"q_proj", "k_proj"}
        for key, value in SIZES.get(name, {}).items():
            setattr(config, key, value)
        adapted = fill(get_peft_model(copy.deepcopy(model), config), std=0.2)
        save(adapted, FOLDER / "adapters" / name)
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), FOLDER / "adapters" / name).eval()
        recorded = [record(adapted, dict(prompt), vocabulary, STEPS, LEAST_MARGIN)]
        save_outputs(FOLDER / "outputs", name, recorded, adapter=name)
