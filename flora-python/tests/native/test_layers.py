"""Layers on NumPy's memory, against their equations in float64."""

import numpy as np
import pytest

import flora
import reference

D, K = 45, 37


def made(rng, d=D, k=K, **options):
    weight = (rng.standard_normal((k, d)) / np.sqrt(d)).astype(np.float32)
    return weight, flora.AdaptedLinear(weight, **options)


def x_of(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def test_every_layer_has_a_reference():
    for layer in flora.adapter_layers():
        assert list(reference.shapes(layer, 3, 4, 2)) == flora.adapter_operands(layer)


@pytest.mark.parametrize("layer", flora.adapter_layers())
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 19])
def test_a_layer_is_its_equation(layer, rank, has_bias, rows):
    rng = np.random.default_rng(rank)
    bias = rng.standard_normal(K).astype(np.float32) if has_bias else None
    weight, linear = made(rng, bias=bias)
    own, x = reference.operands(layer, D, K, rank, rng), x_of(rng, rows, D)
    linear.put(5, layer, own)
    y = linear.forward(x, np.full(rows, 5))
    expected, size = reference.output(layer, x, weight.T, own, rank, bias)
    assert (abs(y - expected) <= reference.bound(size, D + 3 * rank + 8)).all()


def test_one_batch_has_all_kinds_and_ranks_and_the_base():
    rng = np.random.default_rng(0)
    weight, linear = made(rng)
    kinds = [(layer, rank) for layer in flora.adapter_layers() for rank in (1, 2, 16)]
    adapters = [(layer, rank, reference.operands(layer, D, K, rank, rng)) for layer, rank in kinds]
    for slot, (layer, _, own) in enumerate(adapters):
        linear.put(slot, layer, own)
    rows = rng.integers(-1, len(adapters), 97)
    x = x_of(rng, 97, D)
    y = linear.forward(x, rows)
    for row, slot in enumerate(rows):
        base = ("beft", 0, {"v": np.zeros(K, np.float32)})
        layer, rank, own = adapters[slot] if slot >= 0 else base
        expected, size = reference.output(layer, x[row], weight.T, own, rank)
        assert (abs(y[row] - expected) <= reference.bound(size, D + 3 * rank + 8)).all(), (row, layer, rank)
    # A row's numbers are its own, to the bit.
    for row in range(0, 97, 7):
        assert (linear.forward(x[row : row + 1], rows[row : row + 1]) == y[row]).all()


def test_parts_have_adapters_of_their_own():
    rng = np.random.default_rng(1)
    sizes = [21, 5, 11]
    weight, linear = made(rng, parts=sizes)
    x, rows = x_of(rng, 7, D), np.array([0, 0, 1, -1, 1, 2, 0])
    own = [{slot: reference.operands(layer, D, size, rank, rng) for slot, layer, rank in kinds}
           for size, kinds in zip(sizes, [[(0, "lora", 3), (1, "flora", 2)], [(0, "ia3", 1)], [(1, "dora", 4), (2, "hira", 1)]])]
    names = [{0: ("lora", 3), 1: ("flora", 2)}, {0: ("ia3", 1)}, {1: ("dora", 4), 2: ("hira", 1)}]
    for part, slots in enumerate(names):
        for slot, (layer, _) in slots.items():
            linear.put(slot, layer, own[part][slot], part=part)
    y = linear.forward(x, rows)
    first = 0
    for part, size in enumerate(sizes):
        w0 = weight[first : first + size].T
        for row, slot in enumerate(rows):
            layer, rank = names[part].get(slot, ("beft", 0))
            operands = own[part].get(slot, {"v": np.zeros(size, np.float32)})
            expected, size_of = reference.output(layer, x[row], w0, operands, rank)
            found = y[row, first : first + size]
            assert (abs(found - expected) <= reference.bound(size_of, D + 3 * rank + 8)).all(), (part, row)
        first += size


def test_half_numbers_are_rounded_once():
    rng = np.random.default_rng(2)
    weight, linear = made(rng, activations="float16")
    x = x_of(rng, 9, D).astype(np.float16)
    own = reference.operands("flora", D, K, 2, rng)
    linear.put(0, "flora", own)
    y = linear.forward(x, np.zeros(9, np.int64))
    assert y.dtype == np.float16
    expected, size = reference.output("flora", x, weight.T, own, 2)
    assert (abs(y - expected) <= reference.bound(size, D + 14) + 2.0**-11 * abs(expected) + 2.0**-25).all()
    half = weight.astype(np.float16)
    of_half = flora.AdaptedLinear(half)
    assert of_half.activations == "float16"
    assert (of_half.unpacked(np.empty((K, D), np.float32)) == half).all()


def test_inputs_and_outputs_stay_where_they_are():
    rng = np.random.default_rng(3)
    weight, linear = made(rng)
    own = reference.operands("lora", D, K, 3, rng)
    linear.put(0, "lora", own)
    wide = x_of(rng, 11, D + 9)
    x = wide[:, 4 : 4 + D]
    out = np.full((11, K + 6), 7.0, np.float32)
    rows = np.array([0, -1] * 5 + [0])
    given = linear.forward(x, rows, out[:, 2 : 2 + K])
    assert given.base is out
    assert (given == linear.forward(np.ascontiguousarray(x), rows)).all()
    assert (out[:, :2] == 7).all() and (out[:, 2 + K :] == 7).all()
    # More extents, and strides of any kind where numbers are only read once.
    cube = x_of(rng, 2, 3, D)
    assert (linear.forward(cube) == linear.forward(cube.reshape(6, D)).reshape(2, 3, K)).all()
    turned = np.asfortranarray(weight)
    assert (flora.AdaptedLinear(turned).forward(x) == flora.AdaptedLinear(weight).forward(x)).all()
    other = flora.AdaptedLinear(weight)
    other.put(0, "lora", {**own, "b": np.asfortranarray(own["b"]), "a": own["a"][:, ::-1][:, ::-1]})
    assert (other.forward(x, rows) == given).all()


def test_nothing_is_kept_of_what_was_passed():
    rng = np.random.default_rng(4)
    weight, linear = made(rng)
    own, x = reference.operands("flora", D, K, 2, rng), x_of(rng, 5, D)
    linear.put(0, "flora", own)
    rows = np.zeros(5, np.int64)
    before = linear.forward(x, rows)
    weight[:] = np.nan
    own["b"][:] = np.nan
    assert (linear.forward(x, rows) == before).all()


def test_slots_are_replaced_and_emptied():
    rng = np.random.default_rng(5)
    weight, linear = made(rng, slots=2)
    x, rows = x_of(rng, 3, D), np.ones(3, np.int64)
    base = linear.forward(x)
    assert (linear.forward(x, rows) == base).all()
    one, other = (reference.operands("lora", D, K, rank, rng) for rank in (2, 5))
    linear.put(1, "lora", one)
    first = linear.forward(x, rows)
    linear.put(1, "lora", other)
    second = linear.forward(x, rows)
    assert (first != second).any() and (second != base).any()
    linear.put(1, "lora", one)
    assert (linear.forward(x, rows) == first).all()
    linear.clear(1)
    assert (linear.forward(x, rows) == base).all()
    # What can't be folded leaves what was there.
    linear.put(1, "lora", one)
    with pytest.raises(ValueError):
        linear.put(1, "lora", {**one, "a": one["a"][:, 1:]})
    assert (linear.forward(x, rows) == first).all()


def test_no_rows_are_no_work():
    weight, linear = made(np.random.default_rng(6))
    assert linear.forward(np.empty((0, D), np.float32)).shape == (0, K)
    assert linear.forward(np.empty((3, 0, D), np.float32), np.empty(0, np.int64)).shape == (3, 0, K)


def test_a_wide_layer_is_cut_among_threads():
    rng = np.random.default_rng(7)
    weight, linear = made(rng, d=515, k=1031)
    x = x_of(rng, 131, 515)
    own = reference.operands("flora", 515, 1031, 3, rng)
    linear.put(0, "flora", own)
    rows = np.repeat([0, -1, 0], [64, 3, 64])
    before = flora.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            flora.set_num_threads(threads)
            assert flora.get_num_threads() == threads
            found.append(linear.forward(x, rows))
    finally:
        flora.set_num_threads(before)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    expected, size = reference.output("flora", x[rows == 0], weight.T, own, 3)
    assert (abs(found[0][rows == 0] - expected) <= reference.bound(size, 515 + 17)).all()
