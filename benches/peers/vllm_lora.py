"""Measures vLLM with flora's plugin beside vLLM's own LoRA and beside vLLM without adapters, in turns in one run, on the processor.

    LD_PRELOAD=$VIRTUAL_ENV/lib/libiomp5.so python vllm_lora.py [--dtype bfloat16] [--cases none,flora-r4] [--rounds 7]

It needs what docs/vllm.md installs for the tests, and flora's package. The model is
SmolLM2-135M-Instruct; every request has an adapter of its own, with random numbers.

    decode     32 requests of some 30 tokens, each with 29 generated
    prefill    4 requests of 512 tokens, each with 1 generated

Each case is an engine in processes of its own, of which at most --together live side by side: each takes some 2.5 GB. In a round each has
its turn at both workloads; the first round isn't counted. `none` is in every group, and what is printed is the median of the rounds'
ratios to it with their quartiles: above 1, the case makes more tokens a second than vLLM without adapters.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

TESTS = Path(__file__).resolve().parents[2] / "flora-python" / "tests" / "vllm"
GENERATED = 29
QK = ["q_proj", "k_proj"]


@dataclass(frozen=True)
class Case:
    """An engine and its requests."""

    #: Whether flora's plugin is loaded.
    flora: bool
    #: The adapters' kind, as the tests' `folders.py` names them; None: base rows.
    adapter: Optional[str]
    #: The modules that vLLM wraps; None: every linear one.
    wrapped: Optional[list[str]] = None
    #: Whether vLLM wraps any.
    adapters_on: bool = True


CASES = {
    "none": Case(False, None, adapters_on=False),
    "flora-base": Case(True, None),
    "flora-r4": Case(True, "lora-4"),
    "flora-r4-qk": Case(True, "lora-4", QK),
    "flora-r8-all": Case(True, "lora-8-all"),
    "flora-flora-1": Case(True, "flora-1"),
    "flora-hira-2": Case(True, "hira-2"),
    "vllm-r4": Case(False, "lora-4"),
    "vllm-r4-qk": Case(False, "lora-4", QK),
    "vllm-r8-all": Case(False, "lora-8-all"),
}


def serve(name: str, dtype: str) -> None:
    """Runs a workload for each line that comes, and answers with its seconds."""
    case = CASES[name]
    if not case.flora:
        os.environ["VLLM_PLUGINS"] = ""
    sys.path.insert(0, str(TESTS))
    from engine import start
    from folders import folder
    from models import model

    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": case.adapters_on, "enable_prefix_caching": False, "max_model_len": 640, "max_num_batched_tokens": 2048}
    if case.wrapped:
        options["lora_target_modules"] = case.wrapped
    if case.adapters_on:
        # vLLM pads to this; flora doesn't.
        options["max_lora_rank"] = 8
    engine = start(model(dtype), dtype, **options)
    story = "Write a short and simple story about a small animal that lives near the old mill and finds a new friend."
    long = engine.get_tokenizer()("The river runs by the mill, and the wheel turns slowly. " * 60).input_ids[:511]
    workloads = {
        "decode": ([f"Request number {at} is here. {story}" for at in range(32)], GENERATED),
        "prefill": ([{"prompt_token_ids": [100 + at, *long]} for at in range(4)], 1),
    }
    adapters = case.adapter and [LoRARequest(f"a{at}", at + 1, folder(case.adapter, at)) for at in range(32)]
    print("ready", flush=True)
    for line in sys.stdin:
        prompts, tokens = workloads[line.strip()]
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        begin = time.perf_counter()
        outputs = engine.generate(prompts, sampling, lora_request=adapters and adapters[: len(prompts)], use_tqdm=False)
        seconds = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        print(f"seconds {seconds}", flush=True)


class Engine:
    """A case in a process of its own."""

    def __init__(self, name: str, dtype: str) -> None:
        command = [sys.executable, __file__, "--serve", name, "--dtype", dtype]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer("ready")

    def answer(self, first: str) -> list[str]:
        # vLLM prints on the same stream.
        for line in self.process.stdout:
            if line.startswith(first):
                return line.split()
        raise SystemExit(f"the engine of `{self.name}` ended: {self.process.wait()}")

    def seconds(self, workload: str) -> float:
        self.process.stdin.write(f"{workload}\n")
        self.process.stdin.flush()
        return float(self.answer("seconds")[1])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(names: list[str], dtype: str, rounds: int, settle: float) -> list[dict]:
    """A record of each case and workload."""
    engines = [Engine(name, dtype) for name in names]
    print(f"{', '.join(names)}: ready, and measured from now on", file=sys.stderr, flush=True)
    taken = {(name, workload): [] for name in names for workload in ("decode", "prefill")}
    try:
        for round_number in range(rounds + 1):
            for engine in engines:
                for workload in ("decode", "prefill"):
                    # Threads of the turn before spin for a while.
                    time.sleep(settle)
                    seconds = engine.seconds(workload)
                    if round_number > 0:
                        taken[engine.name, workload].append(seconds)
    finally:
        for engine in engines:
            engine.close()
    tokens = {"decode": 32 * GENERATED, "prefill": 4 * 512}
    records = []
    for (name, workload), seconds in taken.items():
        ratios = [base / own for base, own in zip(taken["none", workload], seconds)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rate = tokens[workload] / statistics.median(seconds)
        records.append({"case": name, "workload": workload, "tokens_per_second": rate, "of_none": middle, "quartiles": [low, high]})
        print(f"{dtype:9} {name:14} {workload:8} {rate:8.1f} tokens/s  {middle:.3f} of none ({low:.3f} to {high:.3f})", flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cases", default=",".join(CASES), help="some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--together", type=int, default=3, help="engines side by side, `none` among them")
    parser.add_argument("--settle", type=float, default=0.4, help="seconds between turns")
    parser.add_argument("--json", type=Path, help="where records are written")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.dtype)
        return
    cases = [name for name in arguments.cases.split(",") if name != "none"]
    unknown = [name for name in cases if name not in CASES]
    if unknown or arguments.together < 2 or arguments.rounds < 2:
        parser.error(f"no such cases: {unknown}" if unknown else "at least two engines and two rounds are needed")
    size = arguments.together - 1
    records = []
    for first in range(0, len(cases), size):
        records += measure(["none", *cases[first : first + size]], arguments.dtype, arguments.rounds, arguments.settle)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
