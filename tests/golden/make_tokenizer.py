"""Makes tokenizer.json: texts and conversations, and the tokens that `transformers` gives them with the tokenizer in SmolLM2's GGUF.

    venv/bin/pip install transformers gguf torch
    venv/bin/python tests/golden/make_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf

`transformers` reads tokens, merges and special tokens from the GGUF but not `tokenizer.ggml.pre`, so it does not know that
SmolLM2 cuts numbers into digits. SmolLM2's own tokenizer.json does: Digits(individual_digits), then ByteLevel. That is put in
its place here, and the file says for each text whether it made a difference.
"""

import json
import sys
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

TEXTS = [
    "",
    " ",
    "  \n\n\t x",
    "The capital of France is",
    "Hello, world!",
    "I'll say it's what they've done; don't you'd?",
    "DON'T SHOUT, I'M HERE",
    "In 2024, 3.14159 ≈ π and 1,000,000 = 10^6; ½ of Ⅷ is ④.",
    "def f(x):\n    return x ** 2  # squares\n\n\nprint(f(3))\n",
    "Ünïcödé, naïve café, Straße",
    "日本語のテキストと中文文本",
    "Привет, мир! Γειά σου Κόσμε",
    "مرحبا بالعالم और नमस्ते",
    "emoji 👩‍👩‍👧‍👦 🦙 🇫🇷 and 👍🏽",
    "zero\u200bwidth and nbsp\u00a0here and \u2028 line",
    "trailing spaces   ",
    "\r\nwindows\r\nlines\r\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b <|endoftext|> c",
    "<|im_start|<|im_end|>|>",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "e\u0301 combining and é composed",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "{\"json\": [1, 2.5e-3, null, true], \"k\": \"v\\n\"}",
    "control \x01\x02\x04\x1d chars and \U000E0041 tag",
]

CONVERSATIONS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  Hi  "},
        {"role": "assistant", "content": "Hello!\n"},
        {"role": "user", "content": "<b>&'\"</b>"},
    ],
]


def main():
    path = Path(sys.argv[1]).resolve()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = tokenizer.backend_tokenizer
    ids = lambda text: backend.encode(text, add_special_tokens=False).ids
    as_read = [ids(text) for text in TEXTS]
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    texts = []
    for text, before in zip(TEXTS, as_read):
        parsed = ids(text)
        backend.encode_special_tokens = True
        plain = ids(text)
        backend.encode_special_tokens = False
        texts.append({"text": text, "parsed": parsed, "plain": plain, "digits_matter": parsed != before})
    chats = []
    for messages in CONVERSATIONS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chats.append({"messages": messages, "text": text, "tokens": ids(text)})
    target = Path(__file__).parent / "tokenizer.json"
    target.write_text(json.dumps({"texts": texts, "chats": chats}, ensure_ascii=True, indent=1) + "\n")


if __name__ == "__main__":
    main()
