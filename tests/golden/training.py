"""Makes training/: twenty steps of AdamW by PEFT and PyTorch on llama_tiny's model, for every kind that is trained.

    venv/bin/python tests/golden/training.py          the environment is that of smollm2.py, after llama_tiny.py

Each step learns from all of the sequences. What is written is computed in float64; the same in float32 says how far rounding alone
takes losses and weights, which is what other programs in float32 may be off by. fLoRA, which PEFT doesn't have, is a small module of
Eq. 5 here.
"""

import json
import shutil
from pathlib import Path

import torch
from adapters import fill, save
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

HERE = Path(__file__).parent
FOLDER = HERE / "training"
# One thread, so that sums have one order.
torch.set_num_threads(1)

STEPS, WARMUP, RATE, DECAY, NORM = 20, 3, 0.02, 0.01, 1.0
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, FLORA_TARGETS = 3, ["k_proj", "q_proj", "down_proj"]

KINDS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj"]),
    "dora": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "hira": HiraConfig(r=2, target_modules=PROJECTIONS),
    "flora": None,
}

STD = {"lora": 0.15, "dora": 0.15, "ia3": 0.2, "hira": 0.3}


class Flora(nn.Module):
    """y = Σ_r a_r ∘ ((b_r ∘ x) @ w0) beside a frozen linear layer without bias."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.flora_B = nn.Parameter(1 + 0.3 * torch.randn(linear.in_features, RANK))
        self.flora_A = nn.Parameter((1 + 0.3 * torch.randn(RANK, linear.out_features)) / RANK)

    def forward(self, x):
        return sum(a * self.linear(x * b) for b, a in zip(self.flora_B.T, self.flora_A))


def adapted(name, config):
    """The model with an adapter of random numbers."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(HERE / "llama_tiny" / "model", attn_implementation="eager")
    if config is not None:
        return fill(get_peft_model(model, config), std=STD[name])
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, end = path.rpartition(".")
        if end in FLORA_TARGETS:
            setattr(model.get_submodule(parent), end, Flora(module))
    return model


def tensors(model, config):
    """An adapter as it is stored, by name."""
    if config is not None:
        return get_peft_model_state_dict(model)
    own = {key: value for key, value in model.state_dict().items() if "flora_" in key}
    return {f"base_model.model.{key}": value for key, value in own.items()}


def write(model, config, folder):
    if config is not None:
        save(model, folder)
    else:
        folder.mkdir(parents=True)
        settings = {"peft_type": "FLORA", "r": RANK, "reduce": "sum", "target_modules": sorted(FLORA_TARGETS)}
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    kept = {key: value.detach().float().contiguous() for key, value in tensors(model, config).items()}
    save_file(kept, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def train(model, sequences):
    """Losses in nats a target and norms of the gradients, one a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    targets = sum(len(tokens) - learnt for tokens, learnt in sequences)
    losses, norms = [], []
    for _ in range(STEPS):
        total = 0.0
        for tokens, learnt in sequences:
            logits = model(torch.tensor([tokens])).logits[0, learnt - 1 : -1]
            loss = nn.functional.cross_entropy(logits, torch.tensor(tokens[learnt:]), reduction="sum") / targets
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(nn.utils.clip_grad_norm_(parameters, NORM).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, norms


def rms(numbers):
    return torch.as_tensor(numbers, dtype=torch.float64).pow(2).mean().sqrt().item()


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    torch.manual_seed(3)
    # Tokens, and how many of them come before the first that is learnt.
    lengths = [(14, 1), (9, 4), (23, 1), (31, 20), (5, 2)]
    sequences = [(torch.randint(173, (length,)).tolist(), learnt) for length, learnt in lengths]
    for name, config in KINDS.items():
        folder = FOLDER / name
        exact, single = adapted(name, config).double(), adapted(name, config)
        write(single, config, folder / "start")
        (losses, norms), (single_losses, single_norms) = train(exact, sequences), train(single, sequences)
        write(exact, config, folder / "end")
        weights, single_weights = tensors(exact, config), tensors(single, config)
        off = [(single_weights[key].double() - weights[key]).flatten() for key in weights]
        moved = torch.cat([value.flatten() for value in weights.values()])
        steps = {
            "losses": losses,
            "norms": norms,
            "rounding_of_losses": rms([one - other for one, other in zip(single_losses, losses)]),
            "rounding_of_norms": rms([one / other - 1 for one, other in zip(single_norms, norms)]),
            "rounding_of_weights": rms(torch.cat(off)),
        }
        (folder / "steps.json").write_text(json.dumps(steps, indent=1) + "\n")
        print(name, losses[0], losses[-1], rms(moved), steps["rounding_of_losses"], steps["rounding_of_weights"])
    options = {"steps": STEPS, "warmup": WARMUP, "rate": RATE, "weight_decay": DECAY, "largest_norm": NORM}
    lines = ",\n".join(json.dumps({"tokens": tokens, "learnt_from": learnt}) for tokens, learnt in sequences)
    (FOLDER / "sequences.json").write_text('{\n"options": ' + json.dumps(options) + ',\n"sequences": [\n' + lines + "\n]\n}\n")
