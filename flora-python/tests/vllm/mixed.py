"""The batch that every engine answers: 32 requests, most with an adapter, of every kind, with ranks from 1 to 16."""

from __future__ import annotations

from typing import Optional

from folders import KINDS, folder

COUNT = 64

_SUBJECTS = (
    "a small animal that lives near the old mill",
    "the sea and a lighthouse keeper",
    "how bread is baked in a village",
    "a letter that arrives too late",
    "two rivers that meet",
    "the first snow of the year",
    "a clock that runs backwards",
    "why the sky is blue",
)

#: Adapter (None: the base) and seed of each request: every kind once, some twice with other numbers, and four base rows.
ADAPTERS: list[tuple[Optional[str], int]] = [
    *((name, 0) for name in KINDS),
    *((name, 1) for name in list(KINDS)[::2]),
    *[(None, 0)] * 4,
    ("lora-4", 0),
    ("flora-3", 0),
    ("ia3", 0),
    ("hira-2", 0),
]

PROMPTS = [f"Request {at}: write a short text about {_SUBJECTS[at % len(_SUBJECTS)]}." for at in range(len(ADAPTERS))]

assert len(ADAPTERS) == 32


def requests():
    """vLLM's ``LoRARequest`` of each; None for base rows."""
    from vllm.lora.request import LoRARequest

    numbers: dict[tuple[Optional[str], int], int] = {}
    made = []
    for name, seed in ADAPTERS:
        if name is None:
            made.append(None)
            continue
        number = numbers.setdefault((name, seed), len(numbers) + 1)
        made.append(LoRARequest(f"{name}-{seed}", number, folder(name, seed)))
    return made
