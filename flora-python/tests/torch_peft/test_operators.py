"""PyTorch's operators: their outputs and gradients against the equations in float64, and what PyTorch asks of operators."""

import gc
import os
import threading

import numpy as np
import pytest
import torch

import flora
import flora.torch
import reference

D, K = 45, 37
# What is trained: those that add a vector aren't, and IA3 of a layer with a bias isn't.
TRAINED = [layer for layer in flora.adapter_layers() if layer != "beft"]
UNIT = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def made(seed=0, d=D, k=K, dtype=torch.float32, bias=False, **options):
    torch.manual_seed(seed)
    weight = torch.randn(k, d) / d**0.5
    own = torch.randn(k) if bias else None
    return weight.to(dtype), own, flora.AdaptedLinear(weight.to(dtype), own, **options)


def operands(layer, rank, seed=0, d=D, k=K):
    own = reference.operands(layer, d, k, rank, np.random.default_rng(seed))
    return [torch.tensor(value, dtype=torch.float32).requires_grad_() for value in own.values()]


def named(layer, values):
    return dict(zip(flora.adapter_operands(layer), values))


def norm(weight):
    """A column's norm, which is a constant of the backward pass."""
    return weight.norm(dim=0).detach()


def expected(layer, x, weight, values, rank):
    """``(y, magnitudes)`` in float64, the first with gradients."""
    weight, rank = weight.T.double(), float(rank)
    own = named(layer, values)
    w, offset = reference.weight(layer, weight, own, rank, norm)
    sizes = {name: value.abs() for name, value in own.items()}
    if layer == "dora":
        column = (weight + own["s"] * (own["b"] @ own["a"])).norm(dim=0).detach()
        size, offset_size = reference.weight(layer, weight.abs(), sizes, rank, lambda _: column)
    else:
        size, offset_size = reference.weight(layer, weight.abs(), sizes, rank)
    return x @ w + offset, x.abs() @ size + offset_size


def doubled(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("layer", TRAINED)
@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("rows", [1, 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_the_equation_s(layer, rank, rows, dtype):
    weight, _, linear = made(dtype=dtype)
    own = operands(layer, rank)
    x = torch.randn(rows, D).to(dtype).requires_grad_()
    y = flora.torch.trained_linear(x, [(layer, own)], None, linear)
    g = torch.randn(rows, K).to(dtype)
    found = torch.autograd.grad(y, [x, *own], g)
    x64, *own64 = doubled([x, *own])
    right, size = expected(layer, x64, weight, own64, rank)
    roundings = D + K + rows + 3 * rank + 40
    assert y.dtype == dtype
    assert ((y - right).abs() <= reference.bound(size, D + 3 * rank + 8) + UNIT[dtype] * right.abs() + 2e-8).all()
    # Σ|p| of a gradient is the gradient of the magnitudes of all numbers.
    gradients = torch.autograd.grad(right, [x64, *own64], g.double(), allow_unused=True)
    sizes = doubled([tensor.abs() for tensor in [x, *own]])
    of_sizes, _ = expected(layer, sizes[0], weight.abs(), sizes[1:], rank)
    if layer == "dora":
        # The magnitudes by the norm of what is normed, not of the magnitudes.
        of_sizes = expected(layer, x64.abs(), weight, [value.abs() for value in own64], rank)[1]
        sizes = [x64, *own64]
    magnitudes = torch.autograd.grad(of_sizes, sizes, g.abs().double(), allow_unused=True)
    for at, (one, other, magnitude) in enumerate(zip(found, gradients, magnitudes)):
        if other is None:
            assert (one == 0).all()
            continue
        unit = UNIT[dtype] if at == 0 else 0.0
        allowed = reference.bound(magnitude.abs(), roundings) + unit * other.abs() + 2e-8
        assert one.dtype == (dtype if at == 0 else torch.float32)
        assert ((one - other).abs() <= allowed).all(), (at, ((one - other).abs() / allowed).max())


def test_one_batch_trains_adapters_of_every_kind():
    weight, _, linear = made()
    adapters = [(layer, operands(layer, rank, seed)) for seed, (layer, rank) in enumerate((layer, rank) for layer in TRAINED for rank in (1, 4))]
    # One run of rows for each, because how a run is computed depends on its length.
    rows = torch.randint(-1, len(adapters), (61,)).sort().values
    x = torch.randn(61, D, requires_grad=True)
    g = torch.randn(61, K)
    y = flora.torch.trained_linear(x, adapters, rows, linear)
    flat = [tensor for _, own in adapters for tensor in own]
    found = torch.autograd.grad(y, [x, *flat], g)
    first = 1
    for at, (layer, own) in enumerate(adapters):
        mask = rows == at
        alone_x = x.detach()[mask].requires_grad_()
        alone = flora.torch.trained_linear(alone_x, [(layer, own)], None, linear)
        assert (alone == y[mask]).all()
        if mask.any():
            gradients = torch.autograd.grad(alone, [alone_x, *own], g[mask])
            assert (gradients[0] == found[0][mask]).all()
            # A row's and an adapter's own numbers, to the bit, whatever else is in the batch.
            for one, other in zip(gradients[1:], found[first : first + len(own)]):
                assert (one == other).all(), layer
        else:
            assert all((gradient == 0).all() for gradient in found[first : first + len(own)])
        first += len(own)
    assert torch.equal(y[rows == -1], flora.torch.adapted_linear(x[rows == -1], None, linear))


def test_resident_adapters_give_the_input_its_gradient():
    weight, bias, linear = made(bias=True)
    values = operands("flora", 3)
    linear.put(4, "flora", named("flora", [value.detach() for value in values]))
    x = torch.randn(2, 9, D, requires_grad=True)
    rows = torch.tensor([4, -1, 0] * 6)
    y = flora.torch.adapted_linear(x, rows, linear)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    base = weight.T.double()
    adapted = base * (values[0].double() @ values[1].double())
    for at, row in enumerate(rows):
        own = adapted if row == 4 else base
        right, size = g.view(-1, K)[at].double() @ own.T, g.view(-1, K)[at].double().abs() @ own.abs().T
        assert ((dx.view(-1, D)[at] - right).abs() <= reference.bound(size, K + 14)).all()


@pytest.mark.parametrize("layer", ["flora", "lora", "ia3"])
def test_pytorch_s_own_checks_of_operators(layer):
    _, _, linear = made()
    linear.put(0, "lora", named("lora", [value.detach() for value in operands("lora", 2)]))
    x, own = torch.randn(3, 4, D, requires_grad=True), operands(layer, 2)
    rows = torch.zeros(12, dtype=torch.int64)
    for given in (None, rows):
        torch.library.opcheck(torch.ops.flora.adapted_linear, (x, given, linear.handle, K))
        torch.library.opcheck(torch.ops.flora.trained_linear, (x, own, given, layer, linear.handle, K))


def test_what_is_compiled_has_no_graph_break():
    _, _, linear = made(bias=True)
    own = operands("flora", 3)
    rows = torch.tensor([0, -1, 0, 0])

    def run(x):
        hidden = torch.relu(flora.torch.adapted_linear(x, None, linear))
        return hidden.sum() + flora.torch.trained_linear(x, [("flora", own)], rows, linear).square().sum()

    x = torch.randn(4, D, requires_grad=True)
    right = run(x)
    gradients = torch.autograd.grad(right, [x, *own])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    assert torch.allclose(found, right, rtol=1e-6)
    for one, other in zip(torch.autograd.grad(found, [x, *own]), gradients):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.explain(run)(x).graph_break_count == 0


@pytest.mark.parametrize(
    ("x", "rows", "error", "said"),
    [
        (torch.randn(4, D + 1), None, ValueError, "last extent"),
        (torch.randn(4, D, dtype=torch.float64), None, TypeError, "float64"),
        (torch.ones(4, D, dtype=torch.int32), None, TypeError, "int32"),
        (torch.randn(4, D), torch.zeros(3, dtype=torch.int64), ValueError, "one slot for each"),
        (torch.randn(4, D), torch.zeros(4), TypeError, "float32"),
        (torch.randn(4, D), torch.tensor([0, 0, 2, 0]), IndexError, "slot 2"),
        (torch.randn(4, D).to_sparse(), None, (TypeError, NotImplementedError, RuntimeError), None),
    ],
)
@pytest.mark.parametrize("is_trained", [False, True])
def test_what_is_wrong_is_said(x, rows, error, said, is_trained):
    _, _, linear = made(slots=2)
    with pytest.raises(error, match=said):
        if is_trained:
            flora.torch.trained_linear(x, [("flora", operands("flora", 2)), ("ia3", operands("ia3", 0))], rows, linear)
        else:
            flora.torch.adapted_linear(x, rows, linear)


def test_operands_that_are_wrong_are_said():
    _, _, linear = made(bias=True)
    x = torch.randn(4, D)
    b, a = operands("flora", 2)
    with pytest.raises(ValueError, match="operands"):
        flora.torch.trained_linear(x, [("flora", [b])], None, linear)
    with pytest.raises(ValueError, match="nonsense"):
        flora.torch.trained_linear(x, [("nonsense", [b, a])], None, linear)
    with pytest.raises(ValueError):
        flora.torch.trained_linear(x, [("flora", [a, b])], None, linear)
    with pytest.raises(ValueError, match="bias"):
        flora.torch.trained_linear(x, [("ia3", operands("ia3", 0))], None, linear)
    with pytest.raises(ValueError, match="add a vector"):
        flora.torch.trained_linear(x, [("beft", operands("beft", 0))], None, linear)
    with pytest.raises(ValueError, match="outputs"):
        torch.ops.flora.adapted_linear(x, None, linear.handle, K + 1)
    handle = linear.handle
    linear.close()
    with pytest.raises(flora.ClosedError):
        torch.ops.flora.adapted_linear(x, None, handle, K)
    with pytest.raises(flora.ClosedError):
        torch.ops.flora.trained_linear(x, [b, a], None, "flora", 2**40, K)


def test_tensors_elsewhere_are_refused():
    _, _, linear = made()
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        linear.forward(torch.randn(4, D, device="meta"))
    with pytest.raises(ValueError, match="meta"):
        flora.AdaptedLinear(torch.randn(4, D, device="meta"))


def test_memory_is_read_and_written_where_it_lies():
    weight, _, linear = made()
    wide = torch.randn(7, D + 5)
    x = wide[:, 2 : 2 + D]
    out = torch.full((7, K + 3), 7.0)
    assert linear.forward(x, None, out[:, 1 : 1 + K]).data_ptr() == out[:, 1:].data_ptr()
    assert torch.equal(out[:, 1 : 1 + K], flora.torch.adapted_linear(x.contiguous(), None, linear))
    assert (out[:, 0] == 7).all() and (out[:, 1 + K :] == 7).all()
    # Rows of which one is every third of another tensor's.
    cube = torch.randn(3, 5, D).transpose(0, 1)
    assert torch.equal(flora.torch.adapted_linear(cube, None, linear), flora.torch.adapted_linear(cube.contiguous(), None, linear))


def test_threads_may_train_one_layer():
    _, _, linear = made()
    x, rows = torch.randn(9, D), None
    adapters = [("flora", operands("flora", rank)) for rank in (1, 2, 3, 4)]

    def gradients(at):
        own = [value.detach().requires_grad_() for value in adapters[at][1]]
        y = flora.torch.trained_linear(x, [("flora", own)], rows, linear)
        return [y, *torch.autograd.grad(y.sum(), own)]

    right = [gradients(at) for at in range(4)]
    wrong = []

    def repeat(at):
        for _ in range(100):
            if not all(torch.equal(one, other) for one, other in zip(gradients(at), right[at])):
                wrong.append(at)

    threads = [threading.Thread(target=repeat, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_no_memory_grows_in_ten_thousand_calls():
    _, _, linear = made(d=16, k=16)
    own = operands("flora", 2, d=16, k=16)
    x = torch.randn(4, 16, requires_grad=True)
    rows = [torch.randint(-1, 1, (4,)) for _ in range(32)]

    def call(count):
        for at in range(count):
            y = flora.torch.trained_linear(x, [("flora", own)], rows[at % 32], linear)
            if at % 4 == 0:
                y.sum().backward()
                x.grad = None
                for value in own:
                    value.grad = None
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    call(3000)
    before = call(1000)
    assert call(10000) - before < 2 << 20


def test_operators_are_there_for_cards():
    """What they do on one is tested on emulated cards (`native/test_cuda.py`); PyTorch has to find them."""
    for name in ("adapted_linear", "adapted_linear_gradient", "trained_linear", "trained_linear_gradients"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flora::{name}", "CUDA"), name
