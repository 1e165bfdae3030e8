"""What the figures were measured on."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

GPU_FIELDS = (
    "name",
    "uuid",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
    "mig.mode.current",
)
TORCH = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
    "cuda_available": there,
    "device": torch.cuda.get_device_name(0) if there else None,
}))
"""


def said(command: list[str], seconds: float) -> tuple[str | None, str | None]:
    """What a command prints, or why it didn't."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None, f"{command[0]} took longer than {seconds:.0f} s"
    except OSError as error:
        return None, f"{command[0]}: {error.strerror}"
    text = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        words = (done.stderr.decode(errors="replace").strip() or text.strip()).splitlines()
        return None, f"{command[0]} ended with status {done.returncode}: {words[-1] if words else 'it printed nothing'}"
    return text, None


def gpus() -> list[dict] | dict:
    """Every GPU's name, driver, clocks and load at this moment, with nvidia-smi's units."""
    text, error = said(["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"], 30)
    if text is None:
        return {"error": error}
    return [dict(zip(GPU_FIELDS, row)) for row in csv.reader(text.splitlines(), skipinitialspace=True)]


def torch() -> dict:
    """The PyTorch of this Python, or why there is none."""
    text, error = said([sys.executable, "-c", TORCH], 120)
    try:
        return {"error": error} if text is None else json.loads(text.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"PyTorch printed {text!r}"}


def describe() -> dict:
    """The machine, without its CUDA toolkit and its PyTorch."""
    smi, error = said(["nvidia-smi"], 30)
    return {
        "gpus": gpus(),
        "nvidia_smi": smi if smi is not None else error,
        "torch": None,
        "python": {"path": sys.executable, "version": platform.python_version()},
        "system": platform.platform(),
        "processor": processor(),
        "processors": os.cpu_count(),
        "load": list(os.getloadavg()),
    }


def processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
