"""Makes llama_spans/: what transformers and PEFT compute with llama_tiny/ and several adapters in one request.

    venv/bin/python tests/golden/llama_spans.py          the environment is that of smollm2.py, the model that of llama_tiny.py

Sums of adapters are PEFT's `add_weighted_adapter(combination_type="cat")`. PEFT has one adapter for all tokens of an example
(`adapter_names`), so spans are computed by a forward of its LoRA layers that adds to each row what PEFT's own A, B and scaling of
that row's adapter give; the sums are adapters like others there. With one span the logits have to be PEFT's own, which is checked.
"""

import shutil
from pathlib import Path

import torch
from adapters import fill, save
from decoder import record, save_outputs
from llama_tiny import PROJECTIONS
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
FOLDER = HERE / "llama_spans"
STEPS, LEAST_MARGIN = 8, 0.002

# Of other ranks and modules each.
ADAPTERS = {
    "one": LoraConfig(r=2, lora_alpha=3, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    "two": LoraConfig(r=5, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "three": LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "o_proj"], task_type="CAUSAL_LM"),
}
SUMS = {
    "sum_of_two": [("one", 0.7), ("two", 0.3)],
    # PEFT gives a sum the `use_rslora` of its first part, which would scale all of it by the root of its rank.
    "sum_of_three": [("one", 0.25), ("three", 1.5), ("two", 0.5)],
    "difference": [("two", 1.0), ("one", -0.6)],
}
# (start, end or none, adapter or none); what no span holds is the base model's, or that of `own`.
SPANS = {
    "middle": (None, [(5, 20, "one"), (20, 31, "two")]),
    "answer": (None, [(17, None, "three")]),
    "sums": ("sum_of_two", [(0, 7, "difference"), (9, 10, None), (25, None, "sum_of_three")]),
    "within": ("one", [(33, 43, "two")]),
    "whole": (None, [(0, None, "two")]),
}


class Spanned:
    """A model whose LoRA layers add to each row what its own adapter gives."""

    def __init__(self, adapted):
        self.adapted, self.rows, self.at = adapted, [], 0
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.forward = lambda x, module=module: self.forward(module, x)

    def forward(self, module, x):
        result = module.base_layer(x)
        for name in {name for name in self.rows if name in module.lora_A}:
            rows = torch.tensor([own == name for own in self.rows])
            change = module.lora_B[name](module.lora_A[name](x[:, rows])) * module.scaling[name]
            result[:, rows] += change
        return result

    def of(self, own, spans):
        self.own, self.spans = own, spans
        return self

    def __call__(self, ids, **options):
        self.at = 0 if options.get("cache") is None else self.at
        positions = range(self.at, self.at + ids.shape[1])
        self.rows = [self.adapter(position) for position in positions]
        self.at += ids.shape[1]
        return self.adapted.base_model.model(ids, **options)

    def adapter(self, position):
        for start, end, name in self.spans:
            if start <= position and (end is None or position < end):
                return name
        return self.own


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(25)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama_tiny" / "model", attn_implementation="eager").eval()
    prompts = {name: torch.randint(0, model.config.vocab_size, (37,)).tolist() for name in ["first", "second"]}
    for name, config in ADAPTERS.items():
        adapted = fill(get_peft_model(model, config), std=0.2)
        save(adapted, FOLDER / "adapters" / name)
        model = adapted.unload()
    first, *others = ADAPTERS
    adapted = PeftModel.from_pretrained(model, FOLDER / "adapters" / first, adapter_name=first).eval()
    for name in others:
        adapted.load_adapter(FOLDER / "adapters" / name, adapter_name=name)
    vocabulary = list(range(model.config.vocab_size))

    def recorded(model):
        prompt = [{"name": name, "tokens": tokens} for name, tokens in prompts.items()]
        return [record(model, own, vocabulary, STEPS, LEAST_MARGIN) for own in prompt]

    for name, parts in SUMS.items():
        names, weights = zip(*parts)
        adapted.add_weighted_adapter(list(names), list(weights), name, combination_type="cat")
        adapted.set_adapter(name)
        save_outputs(FOLDER / "outputs", name, recorded(adapted), parts=parts)
    adapted.set_adapter("two")
    own = adapted(torch.tensor([prompts["first"]])).logits[0]

    spanned = Spanned(adapted)
    for name, (base, spans) in SPANS.items():
        outputs = recorded(spanned.of(base, spans))
        save_outputs(FOLDER / "outputs", f"spans_{name}", outputs, own=base, spans=spans)
        if name == "whole":
            worst = (outputs[0][0]["first.logits"] - own).abs().max().item()
            print("one span is off from PEFT's own by", worst)
            assert worst < 1e-5
