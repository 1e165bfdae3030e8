"""The lines that users are shown run as they are."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import flora

ROOT = pathlib.Path(__file__).parents[3]
PACKAGE = pathlib.Path(flora.__file__).parents[1]


def run(arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["flora-python/README.md", "docs/python.md"])
def test_ten_lines_run(page, tmp_path):
    lines = re.search(r"```python\n(import torch\n.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    assert run(["-c", lines], tmp_path).strip() == "torch.Size([4, 576])"


def test_a_mixed_batch_is_what_each_adapter_is_alone(tmp_path):
    said = run([ROOT / "examples/python/mixed_batch.py"], tmp_path)
    differences = [float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if line.startswith("slot")]
    assert len(differences) == 5 and max(differences) < 1e-4, said


def test_an_adapter_is_trained_saved_and_run(tmp_path):
    said = run([ROOT / "examples/python/train_flora.py"], tmp_path)
    first, last = map(float, re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", said).groups())
    assert last < 0.9 * first, said
    assert flora.Adapter.open(tmp_path / "flora-adapter").kind == "flora"
