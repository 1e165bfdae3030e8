"""Measures steps of training beside PEFT's, in turns in one run: jobs that share a base, one after the other and in one batch.

    python torch_train.py MODEL [options]

MODEL is a GGUF file or a Hugging Face folder, which both programs read; the base is f32 in both (PyTorch dequantises it), unless
--base gives flora another form. Adapters are of rank 16, of queries and keys: LoRA, HiRA and IA3 by PEFT, fLoRA, which PEFT doesn't
have, by a module of Eq. 5 here. A step is the forward pass, the loss, the backward pass and AdamW. Sequences have 128 tokens.

    case      flora                                       PyTorch
    1x128     a job of one sequence                       the same
    8x128     a job of eight sequences                    the same
    8 jobs    eight jobs of one sequence each, a batch    eight adapters, each with its optimizer, one after the other

In a round every case has its turn in flora and then in PyTorch; the first round is not counted. Printed are the medians of tokens a
second, and the median of the rounds' ratios with their quartiles: above 1, flora is faster. "CPU" is the same ratio of processor time,
which other programs on the machine disturb less; start with OMP_WAIT_POLICY=PASSIVE so that PyTorch's waiting isn't in it. Then what memory flora's process has had at
most for eight jobs and for one job with as many tokens, each in a process of its own.

Before anything is timed, the losses of the first step are compared: both programs start from the base model.

PyTorch's threads spin for some milliseconds after a call, so --settle milliseconds pass between turns.
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

LENGTH, RANK, JOBS = 128, 16, 8
TARGETS = ["q_proj", "k_proj"]
CASES = {"1x128": (1, 1), "8x128": (1, 8), "8 jobs": (8, 1)}
# Two programs in f32 that sum in other orders: 30 layers over logits of the order of 10.
MOST_DIFFERENCE = 1e-3


def tokens(number):
    """Sequence `number`, one token longer than what goes in; flora's program makes the same."""
    return [(at * 37 + number * 1009 + 7) % 49_000 for at in range(LENGTH + 1)]


class Flora(nn.Module):
    """y = Σ_r a_r ∘ ((b_r ∘ x) @ w0), with a pair of b `[r, d]` and a `[r, k]` for each job. It starts from the base."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.job = linear, 0
        start = torch.zeros(RANK, 1)
        start[0] = 1.0
        inputs = torch.where(start > 0, 1.0, torch.randn(RANK, linear.in_features))
        outputs = start.expand(RANK, linear.out_features)
        self.b = nn.ParameterList([inputs.clone() for _ in range(JOBS)])
        self.a = nn.ParameterList([outputs.clone() for _ in range(JOBS)])

    def forward(self, x):
        b, a = self.b[self.job], self.a[self.job]
        # The rank before the tokens, one matmul over all virtual rows: the fastest form of Eq. 6 in torch_lora.py.
        products = self.linear(x.unsqueeze(0) * b[:, None, None, :])
        return (products * a[:, None, None, :]).sum(0)


CONFIGS = {
    "lora": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS),
    "hira": lambda: HiraConfig(r=RANK, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "flora": None,
}


class Peer:
    """PyTorch's model with eight adapters of one kind."""

    def __init__(self, base, kind):
        torch.manual_seed(0)
        self.kind = kind
        self.model = copy.deepcopy(base)
        self.model.requires_grad_(False)
        if CONFIGS[kind] is None:
            paths = [path for path, _ in self.model.named_modules() if path.rpartition(".")[2] in TARGETS]
            for path in paths:
                parent, _, end = path.rpartition(".")
                setattr(self.model.get_submodule(parent), end, Flora(self.model.get_submodule(path)))
            self.sites = [module for module in self.model.modules() if isinstance(module, Flora)]
        else:
            self.model = get_peft_model(self.model, CONFIGS[kind](), adapter_name="0")
            for job in range(1, JOBS):
                self.model.add_adapter(str(job), CONFIGS[kind]())
        self.model.train()
        self.optimizers = []
        for job in range(JOBS):
            self.choose(job)
            self.optimizers.append(torch.optim.AdamW(self.parameters(job), lr=1e-3, weight_decay=0.0))

    def choose(self, job):
        if CONFIGS[self.kind] is None:
            for site in self.sites:
                site.job = job
        else:
            self.model.set_adapter(str(job))

    def parameters(self, job):
        if CONFIGS[self.kind] is None:
            return [parameter for site in self.sites for parameter in (site.b[job], site.a[job])]
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self, case):
        """Seconds, those of processors, and the losses of the jobs before the step."""
        jobs, sequences = CASES[case]
        batches = []
        for job in range(jobs):
            rows = [tokens(job * sequences + sequence) for sequence in range(sequences)]
            batches.append(torch.tensor(rows))
        losses = []
        start, busy = time.perf_counter(), time.process_time()
        for job, batch in enumerate(batches):
            self.choose(job)
            logits = self.model(input_ids=batch[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            self.optimizers[job].step()
            self.optimizers[job].zero_grad()
            losses.append(loss.detach())
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        return seconds, busy, [loss.item() for loss in losses]


class Server:
    """flora's program, answering requests."""

    def __init__(self, command, model, base):
        command = [*shlex.split(command), str(model), base]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.device = self.read()["device"]

    def read(self):
        for line in self.process.stdout:
            # Whatever starts it may print something first.
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"flora's program ended with status {self.process.wait()}")

    def step(self, kind, case):
        jobs, sequences = CASES[case]
        busy = self.busy()
        print(json.dumps({"kind": kind, "jobs": jobs, "sequences": sequences}), file=self.process.stdin, flush=True)
        answer = self.read()
        return answer | {"busy": self.busy() - busy}

    def busy(self):
        """Seconds of processors so far."""
        after_name = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def compare(kind, case, flora, torchs):
    """Ends the run where the first losses differ."""
    worst = max(abs(own - other) for own, other in zip(sorted(flora), sorted(torchs), strict=True))
    if worst > MOST_DIFFERENCE:
        raise SystemExit(f"{kind}, {case}: the losses of the first step differ by {worst}: {flora} and {torchs}")
    return worst


def measure(given, kind, base, server):
    peer = Peer(base, kind)
    times = {case: ([], [], []) for case in given.cases}
    # PyTorch's adapters learn in every case, so that only the first one begins where flora's does.
    first = given.cases[0]
    for taken in range(given.rounds + 1):
        for case in given.cases:
            flora = server.step(kind, case)
            time.sleep(given.settle / 1e3)
            seconds, busy, losses = peer.step(case)
            time.sleep(given.settle / 1e3)
            if taken == 0 and case == first:
                off = compare(kind, case, flora["losses"], losses)
                print(f"{kind}: the first losses differ by {off:.1e} nats", file=sys.stderr)
            if taken > 0:
                times[case][0].append(flora["seconds"])
                times[case][1].append(seconds)
                times[case][2].append(busy / max(flora["busy"], 1e-9))
    rows = []
    for case, (own, others, busy) in times.items():
        jobs, sequences = CASES[case]
        ratios = sorted(other / one for one, other in zip(own, others, strict=True))
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        count = jobs * sequences * LENGTH
        rows.append(
            {
                "kind": kind,
                "case": case,
                "flora_tokens_per_second": count / statistics.median(own),
                "torch_tokens_per_second": count / statistics.median(others),
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [quartiles[0], quartiles[2]],
                "processor_ratio": statistics.median(busy),
            }
        )
    return rows


def against_one_batch(rows):
    """How fast flora's eight jobs are beside PyTorch's one job of as many tokens."""
    by = {(row["kind"], row["case"]): row for row in rows}
    return {
        kind: by[kind, "8 jobs"]["flora_tokens_per_second"] / by[kind, "8x128"]["torch_tokens_per_second"]
        for kind in CONFIGS
        if (kind, "8 jobs") in by and (kind, "8x128") in by
    }


def memory(given, kind):
    peaks = {}
    for case in ("8x128", "8 jobs"):
        server = Server(given.flora, given.model, given.base)
        peaks[case] = [server.step(kind, case) for _ in range(2)][-1]["peak_bytes"]
        server.end()
    return {"kind": kind, "one_job_bytes": peaks["8x128"], "eight_jobs_bytes": peaks["8 jobs"]}


def load(path):
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)


def options():
    summary, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=f"{summary} The text at the top of this file says what is measured.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(CONFIGS), help="default all")
    parser.add_argument("--cases", type=lambda text: text.split(","), default=list(CASES), help="default all")
    parser.add_argument("--rounds", type=int, default=5, help="that count, after one that warms up; default 5")
    parser.add_argument("--base", default="f32", help="flora's base: stored, f32 or int8; default f32, as PyTorch's")
    parser.add_argument("--threads", type=int, default=0, help="PyTorch's; default its own choice")
    parser.add_argument("--settle", type=float, default=50.0, help="milliseconds between turns; default 50")
    parser.add_argument("--memory", action="store_true", help="compare flora's memory too")
    parser.add_argument("--json", action="store_true")
    command = "cargo bench -q -p flora-model --bench training_steps --"
    parser.add_argument("--flora", default=command, metavar="COMMAND", help=f"flora's program; default `{command}`")
    given = parser.parse_args()
    for what, names, known in (("kind", given.kinds, CONFIGS), ("case", given.cases, CASES)):
        for name in names:
            if name not in known:
                parser.error(f"`{name}` is no {what}; there are {', '.join(known)}")
    return given


def main():
    given = options()
    if given.threads:
        torch.set_num_threads(given.threads)
    base = load(given.model)
    server = Server(given.flora, given.model, given.base)
    rows = [row for kind in given.kinds for row in measure(given, kind, base, server)]
    server.end()
    answer = {
        "device": server.device,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "base": given.base,
        "rounds": given.rounds,
        "steps": rows,
        "eight_jobs_beside_one_torch_batch": against_one_batch(rows),
        "memory": [memory(given, kind) for kind in given.kinds] if given.memory else [],
    }
    if given.json:
        print(json.dumps(answer, indent=1))
        return
    print(f"{server.device}; PyTorch {torch.__version__}, {torch.get_num_threads()} threads; base {given.base}")
    print("kind   case    flora tokens/s  PyTorch tokens/s  flora / PyTorch  quartiles      CPU")
    for row in rows:
        low, high = row["ratio_quartiles"]
        speeds = f"{row['flora_tokens_per_second']:14.0f}  {row['torch_tokens_per_second']:16.0f}"
        print(f"{row['kind']:<5}  {row['case']:<6}  {speeds}  {row['ratio']:15.2f}  {low:.2f} to {high:.2f}  {row['processor_ratio']:.2f}")
    for kind, ratio in answer["eight_jobs_beside_one_torch_batch"].items():
        print(f"{kind}: flora's eight jobs at {ratio:.2f} times PyTorch's one job of eight sequences")
    for row in answer["memory"]:
        one, eight = row["one_job_bytes"], row["eight_jobs_bytes"]
        print(f"{row['kind']}: memory of eight jobs {eight / one:.3f} times one job's, {eight >> 20} and {one >> 20} MiB")


if __name__ == "__main__":
    main()
