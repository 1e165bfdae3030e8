"""One batch of every kind of adapter in vLLM, held against PEFT."""

from __future__ import annotations

import pytest
from engine import start
from mixed import ADAPTERS, COUNT, PROMPTS, requests
from models import model
from answers import reference


def served(dtype: str, **options):
    """Tokens and log-probabilities of each request of the mixed batch."""
    from vllm import SamplingParams

    engine = start(model(dtype), dtype, **options)
    sampling = SamplingParams(temperature=0, min_tokens=COUNT, max_tokens=COUNT, logprobs=0)
    outputs = engine.generate(PROMPTS, sampling, lora_request=requests(), use_tqdm=False)
    found = []
    for output in outputs:
        own = output.outputs[0]
        tokens = list(own.token_ids)
        found.append((tokens, [own.logprobs[at][token].logprob for at, token in enumerate(tokens)]))
    return found


def check(dtype: str, found) -> None:
    """Holds answers against PEFT's.

    What rounding costs in this type is seen in two places, both against f64: of base rows in the engine, and of PEFT itself with the same
    adapter. An adapted row has the same sums as a base row and those of its adapter, so that four times the larger of the two is its
    bound. Tokens are equal wherever PEFT's choice is ahead of the next best by more than both may be off; in f32, everywhere.
    """
    expected = [reference(name, seed, prompt, COUNT, dtype) for (name, seed), prompt in zip(ADAPTERS, PROMPTS)]
    common = [_common(tokens, own.tokens) for (tokens, _), own in zip(found, expected)]
    off = [
        max((abs(ours - exact) for ours, exact in zip(logprobs[:length], own.exact)), default=0.0)
        for (_, logprobs), own, length in zip(found, expected, common)
    ]
    base = max(own for own, (name, _) in zip(off, ADAPTERS) if name is None)
    for (name, seed), own, length, ours in zip(ADAPTERS, expected, common, off):
        who = f"{name}-{seed}" if name else "the base"
        bound = 4 * max(base, max(abs(a - b) for a, b in zip(own.rounded, own.exact)))
        print(f"{dtype} {who:16} {length:3} tokens as PEFT's, log-probabilities off by {ours:.2e} (bound {bound:.2e})")
        assert ours <= bound, f"{who}: log-probabilities are off by {ours:.3e}, the bound is {bound:.3e}"
        if length < COUNT:
            ahead = own.margin[length]
            assert ahead <= 2 * bound, f"{who}: token {length} isn't PEFT's, which is ahead of the next best by {ahead:.3e}"
    if dtype == "float32":
        assert common == [COUNT] * len(common), f"tokens as PEFT's: {common}"


def _common(ours: list[int], theirs: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(theirs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_in_one_batch_gives_pefts_answers(dtype):
    check(dtype, served(dtype))


def test_chunks_of_prompts_and_cached_prefixes_change_nothing():
    """Prompts are longer than what one step takes and than a block of the cache, 128 tokens, and come twice."""
    from vllm import SamplingParams

    prompts = [prompt * 14 for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, min_tokens=8, max_tokens=8)
    whole = start(model("float32"), "float32", enable_prefix_caching=False, max_num_batched_tokens=2048)
    expected = [list(output.outputs[0].token_ids) for output in whole.generate(prompts, sampling, lora_request=requests(), use_tqdm=False)]
    del whole
    chunked = start(model("float32"), "float32", enable_prefix_caching=True, max_num_batched_tokens=48)
    for _ in range(2):
        outputs = chunked.generate(prompts, sampling, lora_request=requests(), use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert any(output.num_cached_tokens for output in outputs)


def test_three_ranks_give_the_same_answers(monkeypatch):
    """Three, because the model has nine heads for queries and three for keys."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    check("float32", served("float32", tensor_parallel_size=3))
