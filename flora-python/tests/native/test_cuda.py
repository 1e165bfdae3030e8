"""Layers on a card, which the processor plays: each test is a process that finds the emulated driver (`flora-emulated-driver`) in the
driver's place. `FLORA_EMULATED_DRIVER` names it, as `cargo xtask test` does."""

import ctypes.util
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import flora
import flora.cuda

PLAYED = pathlib.Path(__file__).with_name("cuda_played.py")
TESTS = [
    "rows_of_many_adapters_are_the_processor_s",
    "a_graph_follows_slots_and_adapters",
    "parts_have_outputs_of_their_own",
    "tensors_go_to_their_card",
    "what_is_wrong_is_raised",
]


@pytest.mark.parametrize("name", TESTS)
def test_on_a_card(name, tmp_path):
    library = os.environ.get("FLORA_EMULATED_DRIVER")
    assert library and pathlib.Path(library).is_file(), "FLORA_EMULATED_DRIVER names the emulated driver's library"
    folder = tmp_path / "driver"
    folder.mkdir()
    for link in ("libcuda.so", "libnvrtc.so"):
        (folder / link).symlink_to(library)
    # An emulated card has headers of its own, and is only asked for their folder.
    (tmp_path / "cuda" / "include").mkdir(parents=True)
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "CUDA_PATH": str(tmp_path / "cuda")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run([sys.executable, str(PLAYED), name], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_function_is_run():
    own = [line.split("(")[0][4:] for line in PLAYED.read_text().splitlines() if line.startswith("def ")]
    helpers = {"call", "use_card", "own_stream", "random", "low_rank", "layer_of", "close", "adapted"}
    assert set(own) - helpers == set(TESTS)


def test_without_a_driver_it_says_so():
    if ctypes.util.find_library("cuda"):
        assert flora.cuda.AVAILABLE
        return
    layer = flora.AdaptedLinear(np.ones((4, 4), np.float32))
    with pytest.raises(RuntimeError, match="CUDA's driver can't be loaded; .* no card or no driver"):
        flora.cuda.CudaLinear(layer)


def test_a_build_without_cards_says_so(monkeypatch):
    monkeypatch.setattr(flora.cuda, "AVAILABLE", False)
    with pytest.raises(RuntimeError, match="no support for cards: build the wheel with `cargo xtask wheel --cuda`"):
        flora.cuda.CudaLinear(flora.AdaptedLinear(np.ones((4, 4), np.float32)))
