"""fLoRA in PEFT: that it starts, trains, is saved, loaded and merged as PEFT's own methods are; and batches of every kind."""

import copy
import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import flora
import flora.peft
from flora.peft import FloraConfig, MixedBatches

TARGETS = ["q_proj", "v_proj", "down_proj"]


def base(dtype=torch.float32):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        # Large enough that what layers do matters.
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def filled(model, seed=0, deviation=0.2):
    """Adapters with numbers that no start has."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model.eval()


def adapted(r=3, dtype=torch.float32, **options):
    options = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base(dtype), FloraConfig(r=r, **options))


@pytest.fixture
def ids():
    return torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def kernels():
    yield
    flora.peft.use_kernels(True)


def close(one, other, by=1e-5):
    return (one.float() - other.float()).abs().max() <= by * other.float().abs().max()


@pytest.mark.parametrize(("reduce", "init"), [("sum", "identity"), ("mean", "identity"), ("mean", "ones")])
def test_training_starts_from_the_base(ids, reduce, init):
    model = adapted(reduce=reduce, init=init).eval()
    assert close(model(ids).logits, base()(ids).logits)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 2 * 3 * ((36 + 36) + (36 + 12) + (52 + 36))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_kernels_give_what_pytorch_s_operations_give(ids, reduce):
    model = filled(adapted(reduce=reduce))

    def run(on):
        flora.peft.use_kernels(on)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        return out.logits, {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    (logits, gradients), (right, right_gradients) = run(True), run(False)
    assert close(logits, right)
    assert gradients.keys() == right_gradients.keys() and len(gradients) == 12
    for name, gradient in gradients.items():
        assert close(gradient, right_gradients[name], 1e-4), name


def test_the_layer_in_pytorch_s_operations_has_right_gradients():
    model = filled(adapted(dtype=torch.float64))
    layer = model.base_model.model.model.layers[0].self_attn.v_proj.double()
    x = torch.randn(3, 36, dtype=torch.float64, requires_grad=True)
    parameters = [layer.flora_B["default"], layer.flora_A["default"]]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_models_train(ids, dtype):
    model = filled(adapted(dtype=dtype), deviation=0.05)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == dtype and torch.isfinite(out.loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    flora.peft.use_kernels(False)
    assert close(model(ids).logits, out.logits, 0.05)


def test_what_is_saved_is_loaded_and_is_what_flora_reads(ids, tmp_path):
    model = filled(adapted(r=3, rank_pattern={"down_proj": 2}))
    right = model(ids).logits
    model.save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "FLORA" and config["r"] == 3 and config["reduce"] == "sum"
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "a").eval()(ids).logits, right)
    assert isinstance(peft.PeftConfig.from_pretrained(tmp_path / "a"), FloraConfig)
    adapter = flora.Adapter.open(tmp_path / "a")
    assert adapter.kind == "flora" and len(adapter.modules) == 6
    assert adapter.rank_of("model.layers.0.mlp.down_proj") == 2
    assert adapter.rank_of("model.layers.1.self_attn.q_proj") == 3
    mixed = MixedBatches(base(), {"a": tmp_path / "a"})
    assert close(mixed(ids, adapter_names=["a"] * 4).logits, right)


def test_merging_and_taking_it_back(ids):
    model = filled(adapted())
    right, plain = model(ids).logits, base()(ids).logits
    before = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    model.merge_adapter(safe_merge=True)
    assert close(model(ids).logits, right)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight, before)
    assert torch.equal(model(ids).logits, right)
    with model.disable_adapter():
        assert close(model(ids).logits, plain)
    assert close(copy.deepcopy(model)(ids).logits, right)
    assert close(model.merge_and_unload()(ids).logits, right)


def test_an_adapter_of_gpt_2(ids):
    torch.manual_seed(0)
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=1, n_head=2)).eval()
    config = {"r": 2, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="fan_in_fan_out=True"):
        get_peft_model(copy.deepcopy(plain), FloraConfig(**config))
    model = filled(get_peft_model(copy.deepcopy(plain), FloraConfig(**config, fan_in_fan_out=True)))
    right = model(ids).logits
    assert not close(right, plain(ids).logits, 1e-3)
    flora.peft.use_kernels(False)
    assert close(model(ids).logits, right)
    assert close(model.merge_and_unload()(ids).logits, right)


def test_several_adapters_in_one_batch(ids):
    model = filled(adapted(r=1))
    for name, r, targets in [("b", 4, ["q_proj", "down_proj"]), ("c", 2, ["v_proj"])]:
        model.add_adapter(name, FloraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
        model.set_adapter(name)
        filled(model, seed=r)
    names = ["default", "__base__", "c", "b"]
    right = []
    for at, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                right.append(model(ids).logits[at])
        else:
            model.set_adapter(name)
            right.append(model(ids).logits[at])
    for on in (True, False):
        flora.peft.use_kernels(on)
        assert close(model(ids, adapter_names=names).logits, torch.stack(right))
    flora.peft.use_kernels(True)
    assert close(MixedBatches(model)(ids, adapter_names=names).logits, torch.stack(right))
    with pytest.raises(ValueError, match="no adapter is called d"):
        model(ids, adapter_names=["d"] * 4)
    with pytest.raises(ValueError, match="name one for each"):
        model(ids, adapter_names=["b"] * 3)
    model.base_model.set_adapter(["b", "c"])
    model(ids)
    model.base_model.set_adapter(["b", "default"])
    with pytest.raises(ValueError, match="activate one"):
        model(ids)


def kinds():
    """A config of every method of PEFT's that flora reads and whose folders it takes as they are."""
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    yield "lora", peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, **options)
    yield "dora", peft.LoraConfig(r=2, use_dora=True, **options)
    yield "ia3", peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    yield "hira", peft.HiraConfig(r=4, **options)
    yield "flora", FloraConfig(r=2, **options)
    yield "loha", peft.LoHaConfig(r=2, alpha=3, **options)
    yield "lokr", peft.LoKrConfig(r=2, **options)
    yield "vera", peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    yield "oft", peft.OFTConfig(oft_block_size=4, **options)
    yield "boft", peft.BOFTConfig(boft_block_size=4, **options)
    yield "road", peft.RoadConfig(group_size=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    yield "hra", peft.HRAConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    yield "miss", peft.MissConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    yield "randlora", peft.RandLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def test_one_batch_has_adapters_of_every_kind(ids, tmp_path):
    right, names, refused = {}, [], {}
    for seed, (name, config) in enumerate(kinds()):
        model = filled(get_peft_model(base(), config), seed, 0.05)
        model.save_pretrained(tmp_path / name)
        right[name] = model(ids[:1]).logits[0]
        names.append(name)
    for name in list(names):
        # What scales or turns a bias in a way that flora refuses is refused by name, and by no other.
        try:
            MixedBatches(base(), {name: tmp_path / name}).close()
        except ValueError as error:
            refused[name] = str(error)
            names.remove(name)
    assert all("bias" in said for said in refused.values()), refused
    assert len(names) >= 9, refused
    mixed = MixedBatches(base(), {name: tmp_path / name for name in names})
    order = [*names, "__base__"]
    logits = mixed(ids[:1].expand(len(order), -1), adapter_names=order).logits
    right["__base__"] = base()(ids[:1]).logits[0]
    for at, name in enumerate(order):
        assert close(logits[at], right[name], 2e-4), name
    # The model is as it was, and generates with beams, too.
    assert torch.equal(mixed.model(ids).logits, base()(ids).logits)
    tokens = mixed.generate(ids[:2], adapter_names=[names[0], "__base__"], max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0)
    alone = base().generate(ids[1:2], max_new_tokens=5, num_beams=2, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens[1:], alone)
    with pytest.raises(ValueError, match="no adapter is called nobody"):
        mixed(ids, adapter_names=["nobody"] * 4)


def test_a_compiled_model_has_no_graph_break(ids):
    model = filled(adapted())
    right = model(ids).logits
    explained = torch._dynamo.explain(model.base_model.model.model.layers[0].self_attn.q_proj)(torch.randn(2, 5, 36))
    assert explained.graph_break_count == 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert close(compiled(input_ids=ids, use_cache=False).logits, right)


def test_trainer_trains(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted(r=4, target_modules="all-linear")
    torch.manual_seed(0)
    rows = [torch.randint(0, 61, (8,)) for _ in range(8)]
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=6,
        per_device_train_batch_size=4,
        learning_rate=3e-2,
        report_to=[],
        save_strategy="epoch",
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-2:]) < 0.95 * sum(losses[:2]), losses
    assert flora.Adapter.open(tmp_path / "checkpoint-12").kind == "flora"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 0}, "r is 0"),
        ({"reduce": "max"}, "reduce is"),
        ({"init": "nothing"}, "init is"),
        ({"init": "ones"}, "reduce=\"mean\""),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["embed_tokens"]}, "Embedding"),
    ],
)
def test_configs_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        adapted(**{"r": 2, **options})
