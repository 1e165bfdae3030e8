"""What can't be served is an error of its own request, which says why."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
from engine import start
from flora.vllm import versions
from folders import folder
from models import model


@pytest.fixture(scope="module")
def engine():
    return start(model("float32"), "float32", max_loras=4, max_lora_rank=1, lora_target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])


def broken(tmp_path, kind: str, change) -> str:
    """A copy of an adapter's folder with something wrong."""
    copy = tmp_path / "broken"
    shutil.copytree(folder(kind), copy)
    change(copy)
    return str(copy)


def with_option(name: str, value):
    def change(path):
        file = path / "adapter_config.json"
        config = json.loads(file.read_text())
        config[name] = value
        file.write_text(json.dumps(config))

    return change


def truncate(path):
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


BROKEN = {
    "an unknown kind": ("ia3", with_option("peft_type", "NOT_A_KIND"), "NOT_A_KIND"),
    "a truncated file": ("hira-2", truncate, ""),
    "a rank beyond the engine's": ("flora-3", lambda path: None, "max_lora_rank 1"),
    "a module that isn't wrapped": ("ia3-all", lambda path: None, "lora_target_modules"),
    "no file": ("ia3", lambda path: (path / "adapter_model.safetensors").unlink(), ""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_adapter_that_cant_be_loaded_fails_its_own_requests(engine, tmp_path, what):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    kind, change, _ = BROKEN[what]
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    alone = engine.generate(["Two and two make"], sampling, lora_request=[LoRARequest("ia3-0", 1, folder("ia3"))], use_tqdm=False)
    number = 10 + list(BROKEN).index(what)
    adapters = [None, LoRARequest("ia3-0", 1, folder("ia3")), LoRARequest(what, number, broken(tmp_path, kind, change))]
    outputs = engine.generate(["Two and two make"] * 3, sampling, lora_request=adapters, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [5, 5, 0]
    assert outputs[2].outputs[0].finish_reason == "error"
    assert list(outputs[1].outputs[0].token_ids) == list(alone[0].outputs[0].token_ids)


@pytest.mark.parametrize("what", BROKEN)
def test_the_error_says_what_is_wrong(engine, tmp_path, what):
    kind, change, said = BROKEN[what]
    from vllm.lora.request import LoRARequest

    with pytest.raises(Exception, match=said):
        engine.llm_engine.add_lora(LoRARequest(what, 100, broken(tmp_path, kind, change)))


def test_an_unknown_version_is_refused(monkeypatch):
    import vllm
    versions.check()
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(versions.UnknownVllm, match="0.99.0"):
        versions.check()


@pytest.mark.parametrize("relied", versions.RELIED, ids=lambda relied: relied.name)
def test_each_name_that_is_relied_on_is_checked(monkeypatch, relied):
    owner = importlib.import_module(relied.module)
    *path, last = relied.name.split(".")
    for part in path:
        owner = getattr(owner, part)
    if relied.parameters is None:
        monkeypatch.delattr(owner, last)
    else:
        # Deleted, an inherited one would take its place.
        monkeypatch.setattr(owner, last, lambda something_else: None)
    with pytest.raises(versions.UnknownVllm, match=last):
        versions.check()
