"""Measures `flora serve` beside llama.cpp's server and vLLM's, in turns in one run, through the API that all three speak.

    python serving.py --flora target/release/flora --llama llama-server=path/to/llama-server [--vllm float32,bfloat16] [--rounds 5]

    decode       one request of some 20 tokens, 128 generated: tokens a second after the first
    prefill      one request of 512 tokens, 1 generated: prompt tokens a second
    decode-32    32 requests of some 20 tokens at once, 64 generated each: milliseconds of a step, while all of them generate

The model is SmolLM2-135M-Instruct: its Q4_1 file for flora and llama.cpp, and the same dequantised, in float32 or bfloat16, for flora and
vLLM (benches/peers/vllm_lora.py says what that needs). With --adapters each of the 32 requests also has an adapter of its own: `lora` and
`flora` of rank 4 on q and k.

Every server is a process of its own, and is stopped while another has its turn: some look for work all the time. In a round each has its turn at each workload; the first round
isn't counted. What is printed is each server's median and, of flora's, the median of the rounds' ratios to each peer with their quartiles:
above 1, flora is faster.
"""

import argparse
import json
import os
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "flora-python" / "tests" / "vllm"
SEQUENCES = 32
WORDS = "river mill wheel stone water field small old bright cold winter road bread house friend night song".split()


@dataclass
class Server:
    """A server and how it is asked."""

    name: str
    command: list[str]
    port: int
    #: What a request names; by the number of the request.
    models: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen = None

    def start(self, stack: ExitStack, log: Path) -> None:
        environment = {**os.environ, **self.environment}
        out = stack.enter_context(open(log / f"{self.name}-{self.port}.log", "w"))
        # With the processes that it starts in a group of its own.
        self.process = subprocess.Popen(self.command, stdout=out, stderr=out, env=environment, start_new_session=True)
        stack.callback(self.process.wait)
        stack.callback(self.process.terminate)
        stack.callback(self.signal, signal.SIGCONT)
        begin = time.monotonic()
        while True:
            if self.process.poll() is not None or time.monotonic() - begin > 300:
                raise SystemExit(f"{self.name} doesn't start; see {out.name}")
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                    probe.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    if b" 200 " in probe.recv(4096).splitlines()[0]:
                        return
            except (OSError, IndexError):
                pass
            time.sleep(0.5)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)


def prompt(generator: random.Random, words: int) -> str:
    """A text that no earlier one begins like: what servers keep of prompts is of no use for it."""
    return " ".join(generator.choice(WORDS) for _ in range(words))


def ask(server: Server, requests: list[dict]) -> list[list[float]]:
    """Sends requests at once; when each of their tokens came, in seconds after they were sent."""
    selector = selectors.DefaultSelector()
    connections = []
    for request in requests:
        body = json.dumps(request).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connections.append((connection, head.encode() + body))
    times = [[] for _ in connections]
    heard = [b"" for _ in connections]
    begin = time.perf_counter()
    for at, (connection, message) in enumerate(connections):
        connection.sendall(message)
        selector.register(connection, selectors.EVENT_READ, at)
    while selector.get_map():
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 16)
            now = time.perf_counter() - begin
            if not data:
                selector.unregister(key.fileobj)
                key.fileobj.close()
                continue
            text = heard[key.data] + data
            *lines, heard[key.data] = text.split(b"\n")
            if not times[key.data] and lines and b" 200 " not in lines[0] and b"HTTP/" in lines[0]:
                raise SystemExit(f"{server.name}: {text[:1000]!r}")
            times[key.data] += [now for line in lines if line.startswith(b"data: {") and b'"text"' in line]
    if not all(times):
        raise SystemExit(f"{server.name}: a request without an answer: {heard}")
    return times


def body(model: str, text, tokens: int) -> dict:
    return {
        "model": model,
        "prompt": text,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        # llama.cpp's own.
        "cache_prompt": False,
    }


def decode(server: Server, generator: random.Random) -> float:
    """Tokens a second."""
    tokens = 128
    (times,) = ask(server, [body(server.models[0], prompt(generator, 20), tokens)])
    return (tokens - 1) / (times[-1] - times[0])


def prefill(server: Server, generator: random.Random) -> float:
    """Tokens a second."""
    tokens = [generator.randrange(1000, 40000) for _ in range(512)]
    (times,) = ask(server, [body(server.models[0], tokens, 1)])
    return len(tokens) / times[0]


def decode_many(server: Server, generator: random.Random) -> float:
    """Steps a second, while all requests generate."""
    requests = [body(server.models[at % len(server.models)], prompt(generator, 20), 64) for at in range(SEQUENCES)]
    times = ask(server, requests)
    first, last = max(own[0] for own in times), min(own[-1] for own in times)
    between = sum(first < moment <= last for own in times for moment in own)
    return between / SEQUENCES / (last - first)


WORKLOADS = {"decode": (decode, "tokens/s"), "prefill": (prefill, "tokens/s"), "decode-32": (decode_many, "ms a step")}


def measure(servers: list[Server], workloads: list[str], rounds: int, settle: float) -> list[dict]:
    """Rates of every server and workload, round by round; the first server is flora's."""
    rates = {(server.name, workload): [] for server in servers for workload in workloads}
    for server in servers:
        server.signal(signal.SIGSTOP)
    for round_number in range(rounds + 1):
        for workload in workloads:
            for server in servers:
                server.signal(signal.SIGCONT)
                time.sleep(settle)
                rate = WORKLOADS[workload][0](server, random.Random(round_number))
                server.signal(signal.SIGSTOP)
                if round_number > 0:
                    rates[server.name, workload].append(rate)
    records = []
    for workload in workloads:
        own = rates[servers[0].name, workload]
        unit = WORKLOADS[workload][1]
        for server in servers:
            theirs = rates[server.name, workload]
            low, middle, high = statistics.quantiles([a / b for a, b in zip(own, theirs)], n=4, method="inclusive")
            median = statistics.median(theirs)
            shown = 1000 / median if unit.startswith("ms") else median
            record = {"server": server.name, "workload": workload, "value": shown, "unit": unit, "flora_over_it": middle, "quartiles": [low, high]}
            records.append(record)
            beside = "" if server is servers[0] else f"{servers[0].name} is {middle:.2f} times as fast ({low:.2f} to {high:.2f})"
            print(f"{workload:10} {server.name:24} {shown:8.1f} {unit:10} {beside}", flush=True)
    return records


def adapters(kind: str) -> tuple[list[str], list[str]]:
    """Names and folders of 32 adapters of one kind."""
    sys.path.insert(0, str(TESTS))
    from folders import folder

    return [f"{kind}-{at}" for at in range(SEQUENCES)], [folder(kind, at) for at in range(SEQUENCES)]


def flora(program: str, model: str, name: str, port: int, options: list[str], kind: str | None) -> Server:
    command = [program, "serve", "--model", model, "--port", str(port), "--served-name", "base", "--no-prefix-sharing", *options]
    models = ["base"]
    if kind:
        models, folders = adapters(kind)
        for model_name, folder in zip(models, folders):
            command += ["--lora-modules", f"{model_name}={folder}"]
    return Server(name, command, port, models)


def vllm(dtype: str, port: int, kind: str | None) -> Server:
    sys.path.insert(0, str(TESTS))
    from models import model

    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model(dtype), "--served-model-name", "base"]
    command += ["--dtype", dtype, "--port", str(port), "--max-model-len", "1024", "--max-num-seqs", str(SEQUENCES)]
    command += ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
    models = ["base"]
    if kind:
        models, folders = adapters(kind)
        command += ["--enable-lora", "--max-loras", str(SEQUENCES), "--max-lora-rank", "8", "--lora-modules"]
        command += [f"{name}={folder}" for name, folder in zip(models, folders)]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ""}
    # Its threads bind themselves to all processors.
    return Server(f"vllm-{dtype}" + (f"-{kind}" if kind else ""), command, port, models, environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flora", required=True, help="the flora command")
    parser.add_argument("--llama", help="llama.cpp's llama-server; compared with flora on the Q4_1 file")
    parser.add_argument("--gguf", help="that file")
    parser.add_argument("--vllm", default="", help="types to compare with vLLM in: float32,bfloat16")
    parser.add_argument("--adapters", default="", help="kinds that requests of decode-32 bring to flora and vLLM: lora-4,flora-4")
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--flora-options", default="", help="more of `flora serve`, by spaces")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=0.5, help="seconds between turns")
    parser.add_argument("--logs", type=Path, default=Path("."), help="where the servers' output goes")
    parser.add_argument("--json", type=Path, help="where records are written")
    arguments = parser.parse_args()
    options = arguments.flora_options.split()
    groups = []
    if arguments.llama:
        if not arguments.gguf:
            parser.error("--llama needs --gguf")
        llama = [arguments.llama, "-m", arguments.gguf, "--port", "8101", "-np", str(SEQUENCES), "-c", str(SEQUENCES * 1024), "-b", "2048"]
        llama += ["--no-webui", "-t", str(os.cpu_count())]
        groups.append([flora(arguments.flora, arguments.gguf, "flora-q4_1", 8100, options, None), Server("llama.cpp-q4_1", llama, 8101, ["base"])])
    for dtype in filter(None, arguments.vllm.split(",")):
        sys.path.insert(0, str(TESTS))
        from models import model

        own = [*options, "--dtype", {"float32": "f32", "bfloat16": "bf16"}[dtype]]
        groups.append([flora(arguments.flora, model(dtype), f"flora-{dtype}", 8110, own, None), vllm(dtype, 8111, None)])
        for kind in filter(None, arguments.adapters.split(",")):
            peers = [vllm(dtype, 8121, kind)] if kind.startswith("lora") else []
            groups[-1] += [flora(arguments.flora, model(dtype), f"flora-{dtype}-{kind}", 8120, own, kind), *peers]
    records = []
    for servers in groups:
        with ExitStack() as stack:
            for server in servers:
                server.start(stack, arguments.logs)
            print("measured from now on", file=sys.stderr, flush=True)
            workloads = arguments.workloads.split(",")
            records += measure(servers, workloads, arguments.rounds, arguments.settle)
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
