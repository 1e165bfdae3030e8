"""Trains an fLoRA adapter with PEFT and transformers' Trainer on a few lines of text, and runs it in a batch with the base.

    python examples/python/train_flora.py [MODEL] [OUT]

MODEL is a folder or a name of a causal language model; without one, a tiny random model learns to say bytes. What is saved in OUT is
what PEFT loads and what `flora serve --adapters` reads.
"""

import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from flora.peft import FloraConfig, MixedBatches

LINES = [
    "The mill by the river grinds at night.",
    "A fox came to the mill and asked for bread.",
    "The miller gave it half a loaf and a name.",
    "Since then the mill has had a fox.",
]


def model_and_encoder(name):
    """A model, and what makes token ids of text."""
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name)
        return AutoModelForCausalLM.from_pretrained(name), lambda text: tokenizer(text).input_ids
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config), lambda text: list(text.encode())


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else None
    out = sys.argv[2] if len(sys.argv) > 2 else "flora-adapter"
    model, encode = model_and_encoder(name)
    data = [{"input_ids": torch.tensor(encode(line)), "labels": torch.tensor(encode(line))} for line in LINES]

    config = FloraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=out,
        num_train_epochs=10,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        logging_steps=len(LINES),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=data)
    trainer.train()
    adapted.save_pretrained(out)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; the adapter is in {out}")

    # One batch, in which each sequence names its adapter.
    adapted.eval()
    mixed = MixedBatches(adapted)
    ids = data[0]["input_ids"].expand(2, -1)
    with torch.no_grad():
        logits = mixed(ids, adapter_names=["default", "__base__"]).logits
    gain = torch.nn.functional.cross_entropy(logits[1, :-1], ids[1, 1:]) - torch.nn.functional.cross_entropy(
        logits[0, :-1], ids[0, 1:]
    )
    print(f"the adapted sequence's loss is lower by {gain:.3f} than the base's, in the same batch")


if __name__ == "__main__":
    main()
