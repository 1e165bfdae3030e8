"""Adapters from folders in PEFT's layout, whole and in shards."""

import json
import struct

import numpy as np
import pytest

import flora
import reference

D, K, R = 30, 22, 3
MODULE = "model.layers.0.self_attn.q_proj"
F32 = np.float32


def write(folder, config, tensors):
    """A folder as PEFT writes it."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"], **config}))
    header, data = {}, b""
    for name, values in tensors.items():
        values = np.ascontiguousarray(values, F32)
        end = len(data) + values.nbytes
        header[f"base_model.model.{MODULE}.{name}"] = {"dtype": "F32", "shape": values.shape, "data_offsets": [len(data), end]}
        data += values.tobytes()
    text = json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return flora.Adapter.open(folder)


def folders(rng, path):
    """An adapter of each of the kinds that are most used: layer, adapter and operands."""
    def low_rank(layer):
        own = reference.operands(layer, D, K, R, rng)
        return own, {"lora_A.weight": own["b"].T, "lora_B.weight": own["a"].T}

    own, tensors = low_rank("lora")
    own["s"] = 4 / R**0.5
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "use_rslora": True}
    yield "lora", write(path / "lora", config, tensors), own
    own, tensors = low_rank("dora")
    own["s"] = 2.0
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "use_dora": True}
    yield "dora", write(path / "dora", config, {**tensors, "lora_magnitude_vector": own["m"]}), own
    own = reference.operands("ia3", D, K, 0, rng)
    yield "ia3", write(path / "ia3", {"peft_type": "IA3", "feedforward_modules": []}, {"ia3_l": own["l"][:, None]}), own
    own = reference.operands("ia3_feedforward", D, K, 0, rng)
    config = {"peft_type": "IA3", "feedforward_modules": ["q_proj"]}
    yield "ia3_feedforward", write(path / "ff", config, {"ia3_l": own["l"][None]}), own
    own = reference.operands("hira", D, K, R, rng)
    yield "hira", write(path / "hira", {"peft_type": "HIRA", "r": R}, {"hira_A": own["b"].T, "hira_B": own["a"].T}), own
    own = reference.operands("flora", D, K, R, rng)
    config = {"peft_type": "FLORA", "r": R, "reduce": "sum"}
    yield "flora", write(path / "flora", config, {"flora_B": own["b"], "flora_A": own["a"]}), own


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_folder_is_its_equation(rng, tmp_path):
    weight = (rng.standard_normal((K, D)) / D**0.5).astype(F32)
    bias = rng.standard_normal(K).astype(F32)
    linear = flora.AdaptedLinear(weight, bias)
    x = rng.standard_normal((7, D)).astype(F32)
    for slot, (layer, adapter, own) in enumerate(folders(rng, tmp_path)):
        assert adapter.modules == [MODULE] and adapter.layer_of(MODULE) == layer
        assert adapter.rank_of(MODULE) == (0 if layer.startswith("ia3") else R)
        linear.put_adapter(slot, adapter, MODULE)
        expected, size = reference.output(layer, x, weight.T, own, R, bias)
        y = linear.forward(x, np.full(7, slot))
        assert (abs(y - expected) <= reference.bound(size, D + 17)).all(), layer


@pytest.mark.parametrize("cut", [0, 8, 13, 22])
def test_shards_of_the_outputs_are_parts_of_the_whole(rng, tmp_path, cut):
    weight = (rng.standard_normal((K, D)) / D**0.5).astype(F32)
    x = rng.standard_normal((7, D)).astype(F32)
    whole = flora.AdaptedLinear(weight)
    rows = np.zeros(7, np.int64)
    for _, adapter, _ in folders(rng, tmp_path):
        whole.put_adapter(0, adapter, MODULE)
        expected = whole.forward(x, rows)
        for first, end in [(0, cut), (cut, K)]:
            if first < end:
                shard = flora.AdaptedLinear(weight[first:end])
                shard.put_adapter(0, adapter, MODULE, outputs=(first, end))
                assert (shard.forward(x, rows) == expected[:, first:end]).all(), adapter


def test_shards_of_the_inputs_add_up_to_the_whole(rng, tmp_path):
    weight = (rng.standard_normal((K, D)) / D**0.5).astype(F32)
    bias = rng.standard_normal(K).astype(F32)
    x = rng.standard_normal((7, D)).astype(F32)
    rows, cut = np.zeros(7, np.int64), 11
    for layer, adapter, own in folders(rng, tmp_path):
        one = flora.AdaptedLinear(weight[:, :cut], bias)
        other = flora.AdaptedLinear(weight[:, cut:])
        if layer == "dora":
            with pytest.raises(ValueError, match="whole columns"):
                one.put_adapter(0, adapter, MODULE, inputs=(0, cut))
            continue
        one.put_adapter(0, adapter, MODULE, inputs=(0, cut))
        other.put_adapter(0, adapter, MODULE, inputs=(cut, D))
        sum_of_both = one.forward(x[:, :cut], rows) + other.forward(x[:, cut:], rows)
        expected, size = reference.output(layer, x, weight.T, own, R, bias)
        assert (abs(sum_of_both - expected) <= reference.bound(size, D + 18)).all(), layer


def test_what_is_wrong_with_a_folder_is_said(rng, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        flora.Adapter.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="NONSENSE"):
        write(tmp_path / "kind", {"peft_type": "NONSENSE"}, {})
    with pytest.raises(ValueError, match="option"):
        write(tmp_path / "option", {"peft_type": "HIRA", "r": R, "other": 1}, {"hira_A": np.ones((R, D)), "hira_B": np.ones((K, R))})
    adapter = write(tmp_path / "a", {"peft_type": "HIRA", "r": R}, {"hira_A": np.ones((R, D)), "hira_B": np.ones((K, R))})
    linear = flora.AdaptedLinear(np.ones((K, D), F32))
    with pytest.raises(KeyError, match="q_proj"):
        linear.put_adapter(0, adapter, "model.layers.1.self_attn.q_proj")
    with pytest.raises(KeyError):
        adapter.rank_of("model")
    with pytest.raises(ValueError, match="shard"):
        linear.put_adapter(0, adapter, MODULE, inputs=(0, D + 1))
    with pytest.raises(ValueError, match="no part"):
        linear.put_adapter(0, adapter, MODULE, outputs=(1, K + 1))
    with pytest.raises(ValueError):
        flora.AdaptedLinear(np.ones((K, D + 1), F32)).put_adapter(0, adapter, MODULE)
