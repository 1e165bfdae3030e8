"""Makes trained/: adapters that flora trained, and what transformers computes with them as PEFT loads them.

    FLORA_TRAINED=DIR cargo test -p flora-model --test decoders -- --ignored write_what_training_makes
    venv/bin/python tests/golden/trained.py DIR         the environment is that of smollm2.py

The adapters are those of the jobs of training/, after their last step. fLoRA is none of PEFT's kinds.
"""

import shutil
import sys
from pathlib import Path

import torch
from decoder import record, save_outputs
from peft import PeftModel
from tiny import LEAST_MARGIN, STEPS
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "trained"
KINDS = ["lora", "dora", "ia3", "hira"]

if __name__ == "__main__":
    trained = Path(sys.argv[1])
    shutil.rmtree(FOLDER, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama_tiny" / "model", attn_implementation="eager").eval()
    config = model.config
    torch.manual_seed(5)
    prompts = [
        {"name": name, "tokens": torch.randint(config.vocab_size, (length,)).tolist()}
        for name, length in [("few", 11), ("full", config.max_position_embeddings - STEPS + 1)]
    ]
    vocabulary = list(range(config.vocab_size))
    for name in KINDS:
        shutil.copytree(trained / name, FOLDER / "adapters" / name)
        base = [model(torch.tensor([prompt["tokens"]])).logits[0] for prompt in prompts]
        adapted = PeftModel.from_pretrained(model, FOLDER / "adapters" / name).eval()
        recorded = [record(adapted, prompt, vocabulary, STEPS, LEAST_MARGIN) for prompt in prompts]
        save_outputs(FOLDER / "outputs", name, recorded, adapter=name)
        for before, (after, line) in zip(base, recorded):
            print(name, line["name"], (after[f"{line['name']}.logits"] - before).pow(2).mean().sqrt().item())
        model = adapted.unload()
