"""Makes texts/: small tokenizers of many kinds and chat templates, with the tokens and texts that transformers makes of them.

    ~/golden-venv/bin/python tests/golden/make_texts.py

`texts/tokenizers/NAME/` is a folder as a model has it, with tokenizer.json or tokenizer.model; `texts/tokenizers.json` has the
texts and their tokens: `prompt` as transformers makes them of a prompt, `parsed` without the tokens around it, `plain` with
control tokens taken as text, and what is said back, `decoded`. `texts/sentencepiece.json` is the same SentencePiece model as the
arrays of a GGUF file. `texts/templates.json` has templates, conversations and what they are written as, on 2024-07-04.
"""

import io
import json
import shutil
from datetime import datetime
from pathlib import Path
from unittest import mock

import sentencepiece
import transformers.utils.chat_template_utils as templates
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "texts"

CORPUS = [
    "the quick brown fox jumps over the lazy dog and the other dogs",
    "a low rank adapter is added to each layer of the model, and the model is served with all of them",
    "Hello world, hello there: numbers like 12, 345 and 6.78 are text too",
    "naïve café, Straße, smörgåsbord; the end of the story is the end of the day",
] * 4

TEXTS = [
    "",
    " ",
    "Hello world",
    "  Hello   world ",
    "the quick brown fox, 12 + 345 = 357!",
    "Naïve CAFÉ ﬁne Ｆｕｌｌ",
    "日本語 and 👍🏽 emoji",
    "<s>Hello</s>",
    "a</s> b<s>c<unk>",
    "<|user|> hi <|User|>there",
    "<|TURN|> The other, over  THE<|turn|>",
    "line\nline\n\n\ttab",
    "▁already▁here",
]

CONTROLS = ["<unk>", "<s>", "</s>"]


CHARACTERS = sorted(set("".join(CORPUS)) - {" "})
WORDS = sorted({word for word in "".join(character if character.isalpha() else " " for character in CORPUS[0]).split()})


def trained(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


# The library's trainers for the next three break ties by chance, so these are made of words and characters.


def wordpiece():
    # BERT's kind, with which nobody generates, but whose parts occur.
    tokens = ["[UNK]", "[CLS]", "[SEP]"] + CHARACTERS + ["##" + character for character in CHARACTERS] + WORDS
    tokens = list(dict.fromkeys(tokens))
    tokenizer = Tokenizer(models.WordPiece({token: id for id, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer, {"unk_token": "[UNK]", "eos_token": "[SEP]"}


def unigram():
    scored = [(token, 0.0) for token in CONTROLS] + [("▁", -3.0)]
    scored += [("▁" + word, -5.0 - index / 8) for index, word in enumerate(WORDS)]
    scored += [(character, -6.0 - index / 16) for index, character in enumerate(CHARACTERS)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(CONTROLS)
    return tokenizer, {"unk_token": "<unk>", "eos_token": "</s>"}


def byte_level(**options):
    tokenizer = trained(
        models.BPE(),
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=CONTROLS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        pre_tokenizer=pre_tokenizers.ByteLevel(**options),
        decoder=decoders.ByteLevel(),
    )
    return tokenizer, {"unk_token": "<unk>", "eos_token": "</s>"}


def roberta():
    tokenizer, names = byte_level(add_prefix_space=True)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer, names | {"bos_token": "<s>"}


def normalized_added():
    """Added tokens that are looked for before and after texts are lowercased."""
    tokenizer, names = byte_level(add_prefix_space=False)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens([AddedToken("<|user|>", normalized=False), AddedToken("<|turn|>", normalized=True)])
    tokenizer.add_tokens([AddedToken("the", normalized=True, single_word=True), AddedToken("over", lstrip=True)])
    return tokenizer, names


def flagged():
    """Flags in tokenizer_config.json say nothing beside a tokenizer.json."""
    tokenizer, names = byte_level(add_prefix_space=False)
    return tokenizer, names | {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}


def word_ends():
    merges = []
    for word in WORDS:
        parts = list(word[:-1]) + [word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append(tuple(parts[:2]))
            parts = ["".join(parts[:2])] + parts[2:]
    merges = list(dict.fromkeys(merges))
    tokens = CONTROLS + CHARACTERS + [character + "</w>" for character in CHARACTERS] + ["".join(pair) for pair in merges]
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens(CONTROLS)
    return tokenizer, {"unk_token": "<unk>", "eos_token": "</s>"}


KINDS = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "roberta": roberta,
    "normalized-added": normalized_added,
    "flagged": flagged,
    "word-ends": word_ends,
}


def sentencepiece_model(model_type):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type=model_type,
        vocab_size=340 if model_type == "bpe" else 330,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>"],
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def encoded(tokenizer):
    backend = tokenizer.backend_tokenizer
    lines = []
    for text in TEXTS:
        parsed = backend.encode(text, add_special_tokens=False).ids
        backend.encode_special_tokens = True
        plain = backend.encode(text, add_special_tokens=False).ids
        backend.encode_special_tokens = False
        lines.append(
            {
                "text": text,
                "prompt": tokenizer(text)["input_ids"],
                "parsed": parsed,
                "plain": plain,
                "decoded": backend.decode(plain, skip_special_tokens=True),
            }
        )
    return lines


def make_tokenizers():
    outputs = {}
    for name, make in KINDS.items():
        folder = FOLDER / "tokenizers" / name
        folder.mkdir(parents=True)
        tokenizer, config = make()
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (folder / "tokenizer_config.json").write_text(json.dumps(config) + "\n")
        outputs[name] = encoded(AutoTokenizer.from_pretrained(folder))
    model = sentencepiece_model("bpe")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    # How spaces are put before texts depends on the class.
    for name, config in {
        "sentencepiece": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        "sentencepiece-legacy": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True},
        "sentencepiece-plain": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        folder = FOLDER / "tokenizers" / name
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").write_bytes(model)
        (folder / "tokenizer_config.json").write_text(json.dumps(config | names) + "\n")
        outputs[name] = encoded(AutoTokenizer.from_pretrained(folder))
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    kinds = [
        2 if processor.is_unknown(id) else 3 if processor.is_control(id) else 6 if processor.is_byte(id)
        else 4 if processor.id_to_piece(id) == "<|user|>" else 1
        for id in range(processor.get_piece_size())
    ]
    arrays = {
        "tokens": [processor.id_to_piece(id) for id in range(processor.get_piece_size())],
        "scores": [processor.get_score(id) for id in range(processor.get_piece_size())],
        "types": kinds,
    }
    write(FOLDER / "sentencepiece.json", arrays)
    write(FOLDER / "tokenizers.json", outputs)


MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Hi 'you' \"there\"\n"},
    {"role": "assistant", "content": "Hello é!"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}]
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"

TEMPLATES = {
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{%- generation -%} {{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}{# {% generation %} #}"
    "{% raw %}{% generation %}{% endraw %}{% if add_generation_prompt %}A:{% endif %}",
    "generation-scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "tojson": "{{ messages | tojson }}|{{ {'b': 1, 'a': 'é<&\\'', 'c': [], 'd': {}, 'e': [1, [2.5, none, true]]} | tojson(indent=2) }}",
    "tojson-options": "{{ messages | tojson(ensure_ascii=True) }}{{ {'b': 1e-7, 'a': 1e22, 'c': 0.1} | tojson(sort_keys=True) }}"
    "{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}{{ [1, {'a': 'é'}] | tojson(True, indent='\t') }}",
    "date": "{{ strftime_now('%d %b %Y') }}|{{ strftime_now('%-d %B, %A %H:%M:%S') }}",
    "date-guarded": "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% else %}26 Jul 2024{% endif %}",
    "nothing": "{{ tools is defined }}{{ tools is none }}{{ documents is defined }}{{ documents is none }}{{ tools }}"
    "{% if tools %}tools{% endif %}{% if not tools %}-{% endif %}{{ nowhere is defined }}{{ nowhere }}",
    "values": "{{ true }}{{ none }}{{ [1, 'a', none] }}{{ {'k': 'v'} }}{{ 1.0 }}{{ 'a' ~ true ~ 1 }}",
    "content-kinds": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.type }}:{{ p.text }}]{% endfor %}{% endif %}{% endfor %}{{ messages | length }}",
    "loops": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{{ m.role }}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
    "strings": "{% for m in messages %}{{ m.content.strip().upper() }}{{ m['role'].title() }}{{ m.content.split(' ')[-1] }}"
    "{{ m.get('name', 'nobody') }}{% endfor %}{{ messages[-1:] | map(attribute='role') | join(',') }}",
    "special": "{{ bos_token }}{{ eos_token }}{{ unk_token }}" + LOOP,
    "kwargs": "{% if enable_thinking is defined and enable_thinking is false %}no{% else %}yes{% endif %}{{ extra | tojson }}",
}


class July(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 4, 9, 5, 3)


def make_templates():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )
    cases = []

    def case(name, messages, next="answer", template=None, **kwargs):
        template = template or TEMPLATES[name]
        asked = {"answer": {"add_generation_prompt": True}, "anything": {}, "rest": {"continue_final_message": True}}
        with mock.patch.object(templates, "datetime", July):
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, **asked[next], **kwargs
            )
        cases.append(
            {"name": name, "template": template, "messages": messages, "next": next, "variables": kwargs, "text": text}
        )

    for name in TEMPLATES:
        if name != "kwargs":
            case(name, MESSAGES)
    case("content-kinds", PARTS)
    case("generation", MESSAGES, next="anything")
    case("kwargs", MESSAGES, enable_thinking=False, extra={"a": [1, "é"]})
    case("kwargs", MESSAGES, extra=None, enable_thinking=True)
    case("rest", MESSAGES, next="rest", template=LOOP)
    case("rest-trimmed", MESSAGES[:2], next="rest", template=LOOP.replace("m.content", "m.content | trim"))
    case("rest-of-parts", PARTS, next="rest", template=TEMPLATES["content-kinds"])
    write(FOLDER / "templates.json", cases)


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("},{", "},\n{") + "\n")


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    make_tokenizers()
    make_templates()
