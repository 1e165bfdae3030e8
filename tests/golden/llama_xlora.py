"""Makes llama_xlora/: what transformers computes with llama_tiny/ and X-LoRAs of PEFT, whose adapters a network weighs for each token.

    venv/bin/python tests/golden/llama_xlora.py          the environment is that of smollm2.py, the model that of llama_tiny.py

The adapters are saved before the mixture is made of them, in its sub-folders, and the network is written here: PEFT's save_pretrained
leaves out what has `.0.` in its name, because an adapter is called 0, and puts the base model's weights into the adapters' folders.
That PEFT loads the folders and computes the same is checked, and that its `generate`, which has no cache, says the same tokens.
"""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from adapters import REPOSITORY, fill, save
from decoder import record, save_outputs
from llama_tiny import PROJECTIONS
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "llama_xlora"
STEPS, LEAST_MARGIN = 8, 0.002

# Of other ranks and modules each.
ADAPTERS = {
    "0": LoraConfig(r=2, lora_alpha=3, target_modules=PROJECTIONS),
    "1": LoraConfig(r=5, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "2": LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "o_proj"]),
}
CASES = {
    "layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.7},
    "top_two": {"top_k_lora": 2, "xlora_depth": 2, "xlora_size": 12, "global_scaling_weight": 1.5},
    "shares": {
        "layerwise_scalings": True,
        "enable_softmax": False,
        "enable_softmax_topk": True,
        "top_k_lora": 2,
        "xlora_depth": 3,
        "xlora_size": 9,
        "xlora_dropout_p": 0.0,
    },
}


class Whole:
    """A model without a cache, that runs the whole text for every token."""

    def __init__(self, adapted):
        self.adapted, self.ids = adapted, None

    def __call__(self, ids, **options):
        self.ids = ids if options.get("cache") is None else torch.cat([self.ids, ids], dim=1)
        logits = self.adapted(input_ids=self.ids).logits
        return SimpleNamespace(logits=logits[:, -ids.shape[1] :], cache=True)


def save_mixture(adapted, config, folder):
    """Writes what PEFT's loader reads: the config, and the network under the names that it has in the model."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.adapters = {name: str(Path(path).relative_to(REPOSITORY)) for name, path in config.adapters.items()}
    settings = config.to_dict()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n")
    network = adapted.base_model.internal_xlora_classifier.state_dict()
    tensors = {f"base_model.internal_xlora_classifier.{key}": value for key, value in network.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(31)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama_tiny" / "model", attn_implementation="eager").eval()
    # PEFT asks for the first; no token ends a text here.
    model.config.use_cache = False
    model.generation_config.eos_token_id = None
    prompts = {name: torch.randint(0, model.config.vocab_size, (37,)).tolist() for name in ["first", "second"]}
    parts = {name: fill(get_peft_model(copy.deepcopy(model), config), std=0.2) for name, config in ADAPTERS.items()}
    vocabulary = list(range(model.config.vocab_size))
    for case, options in CASES.items():
        folder = FOLDER / "adapters" / case
        for name, part in parts.items():
            save(part, folder / name)
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters={name: str(folder / name) for name in ADAPTERS},
            **options,
        )
        adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config)).eval()
        for parameter in adapted.base_model.internal_xlora_classifier.parameters():
            nn.init.normal_(parameter, std=0.15)
        save_mixture(adapted, config, folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder, adapters=dict(config.adapters)).eval()

        recorded = []
        for name, tokens in prompts.items():
            prompt = {"name": name, "tokens": tokens}
            tensors, line = record(Whole(adapted), prompt, vocabulary, STEPS, LEAST_MARGIN)
            ids = torch.tensor([tokens])
            said = adapted.generate(input_ids=ids, max_new_tokens=STEPS, do_sample=False)
            assert said[0, len(tokens) :].tolist() == line["continuation"], (said, line)
            with torch.no_grad():
                assert torch.equal(loaded(input_ids=ids).logits[0], tensors[f"{name}.logits"])
                gates = adapted.base_model.get_latest_scalings()[0]
                base = model(input_ids=ids).logits[0]
            changed = (tensors[f"{name}.logits"] - base).abs().max().item()
            spread = f"gates from {gates.min():.3f} to {gates.max():.3f}, {gates.std():.3f} apart"
            print(f"{case} {name}: logits differ from the base model's by {changed:.2f}; {spread}")
            recorded.append((tensors, line))
        save_outputs(FOLDER / "outputs", case, recorded, adapter=case)
