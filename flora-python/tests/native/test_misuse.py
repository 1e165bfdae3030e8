"""What is wrong is an exception that says so, and nothing is written."""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import flora

D, K = 12, 7
F32 = np.float32


@pytest.fixture
def linear():
    weight = np.arange(K * D, dtype=F32).reshape(K, D) / 100
    linear = flora.AdaptedLinear(weight, slots=3)
    linear.put(0, "lora", {"b": np.ones((D, 2), F32), "a": np.ones((2, K), F32), "s": 1})
    return linear


def x_of(rows=4):
    return np.ones((rows, D), F32)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: flora.AdaptedLinear(np.ones(3, F32)), ValueError, r"\[outputs, inputs\]"),
        (lambda: flora.AdaptedLinear(np.ones((0, 3), F32)), ValueError, "parts"),
        (lambda: flora.AdaptedLinear(np.ones((3, 0), F32)), ValueError, "0"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4))), TypeError, "float64"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), np.int32)), TypeError, "int32"),
        (lambda: flora.AdaptedLinear([[1.0]]), TypeError, "list"),
        (lambda: flora.AdaptedLinear(np.full((3, 4), np.nan, F32)), ValueError, "NaN|finite"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), np.ones(4, F32)), ValueError, "bias has 4"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), parts=[1, 1]), ValueError, "add up"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), parts=[3, 0]), ValueError, "add up"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), slots=-1), OverflowError, None),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), slots=1 << 30), IndexError, "slot"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), activations="int8"), TypeError, "int8"),
        (lambda: flora.AdaptedLinear(np.ones((3, 4), F32), activations="float64"), TypeError, "float64"),
    ],
)
def test_layers_that_can_t_be(make, error, said):
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize(
    ("layer", "operands", "said"),
    [
        ("nonsense", {}, "nonsense.*lora"),
        ("vera", {}, "vera"),
        ("lora", {"b": np.ones((D, 2), F32), "a": np.ones((2, K), F32)}, "no operand `s`"),
        ("lora", {"b": np.ones((D, 2), F32), "a": np.ones((2, K), F32), "s": 1, "t": 1}, "no operand `t`"),
        ("lora", {"b": np.ones((D + 1, 2), F32), "a": np.ones((2, K), F32), "s": 1}, "13|D"),
        ("lora", {"b": np.ones((D, 3), F32), "a": np.ones((2, K), F32), "s": 1}, "3|R"),
        ("lora", {"b": np.ones((D, 2), F32), "a": np.ones((2, K), F32), "s": float("nan")}, "NaN"),
        ("lora", {"b": np.ones((D, 2, 1), F32), "a": np.ones((2, K), F32), "s": 1}, "extents"),
        ("ia3", {"l": np.ones(D, F32)}, "12|7"),
        ("flora", {"b": np.ones((D, 0), F32), "a": np.ones((0, K), F32)}, "no numbers"),
    ],
)
def test_adapters_that_don_t_fit(linear, layer, operands, said):
    before = linear.forward(x_of(), np.zeros(4, np.int64))
    with pytest.raises(ValueError, match=said):
        linear.put(0, layer, operands)
    assert (linear.forward(x_of(), np.zeros(4, np.int64)) == before).all()


@pytest.mark.parametrize(
    ("x", "rows", "out", "error", "said"),
    [
        (np.ones((4, D + 1), F32), None, None, ValueError, "last extent"),
        (np.ones((4, D)), None, None, TypeError, "float64"),
        (np.ones((4, D), np.float16), None, None, TypeError, "float16"),
        (np.float32(1), None, None, (TypeError, ValueError), None),
        (np.ones((D, 4), F32).T, None, None, ValueError, "contiguous"),
        (np.lib.stride_tricks.as_strided(np.ones(40, F32), (4, D), (4, 4)), None, None, ValueError, "over one another"),
        (x_of(), np.zeros(3, np.int64), None, ValueError, "one slot for each"),
        (x_of(), np.zeros(4, np.int32), None, TypeError, "int32"),
        (x_of(), np.zeros((4, 1), np.int64), None, ValueError, "one slot for each"),
        (x_of(), np.zeros(8, np.int64)[::2], None, ValueError, "contiguous"),
        (x_of(), np.array([0, 1, 3, 0]), None, IndexError, "row 2 asks for slot 3"),
        (x_of(), np.array([0, -2, 0, 0]), None, IndexError, "row 1 asks for slot -2"),
        (x_of(), np.array([2**40, 0, 0, 0]), None, IndexError, "row 0"),
        (x_of(), None, np.ones((4, K + 1), F32), ValueError, "last extent"),
        (x_of(), None, np.ones((5, K), F32), ValueError, "shape"),
        (x_of(), None, np.ones((4, K), np.float16), TypeError, "float16"),
        (x_of(), None, np.broadcast_to(np.ones(K, F32), (4, K)), ValueError, "written"),
    ],
)
def test_batches_that_can_t_be(linear, x, rows, out, error, said):
    before = None if out is None else np.array(out)
    with pytest.raises(error, match=said):
        linear.forward(x, rows, out)
    assert out is None or (out == before).all()


@pytest.mark.parametrize("call", [lambda own: own.put(3, "ia3", {"l": np.ones(K, F32)}), lambda own: own.clear(3)])
def test_slots_that_there_aren_t(linear, call):
    with pytest.raises(IndexError, match="no slot 3"):
        call(linear)


def test_parts_that_there_aren_t(linear):
    with pytest.raises(IndexError, match="no part 1"):
        linear.put(0, "ia3", {"l": np.ones(K, F32)}, part=1)
    with pytest.raises(OverflowError):
        linear.put(-1, "ia3", {"l": np.ones(K, F32)})


def test_raw_addresses_are_checked_as_far_as_they_can_be(linear):
    x, out = x_of(), np.zeros((4, K), F32)
    for wrong in [(0, D, 0, 4), (x.ctypes.data + 1, D, 0, 4), (x.ctypes.data, D - 1, 0, 4), (x.ctypes.data, D, 0, 2**62)]:
        with pytest.raises(ValueError):
            linear.forward_pointers(*wrong, out.ctypes.data, K)
    with pytest.raises(OverflowError):
        linear.forward_pointers(-1, D, 0, 4, out.ctypes.data, K)
    assert (out == 0).all()


def test_a_layer_that_was_closed(linear):
    linear.close()
    for call in [lambda: linear.forward(x_of()), lambda: linear.clear(0), lambda: linear.unpacked(np.ones((K, D), F32))]:
        with pytest.raises(flora.ClosedError):
            call()
    linear.close()


def test_threads_may_call_while_adapters_come_and_go(linear):
    rng = np.random.default_rng(0)
    x, rows = rng.standard_normal((5, D)).astype(F32), np.array([0, 1, 0, -1, 2])
    fixed = linear.forward(x, np.array([0, -1, 0, -1, -1]))
    wrong, done = [], threading.Event()

    def compute():
        while not done.is_set():
            y = linear.forward(x, rows)
            if not (y[[0, 2, 3]] == fixed[[0, 2, 3]]).all():
                wrong.append(y)

    threads = [threading.Thread(target=compute) for _ in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(200):
        linear.put(1, "flora", {"b": np.ones((D, 1 + turn % 3), F32), "a": np.ones((1 + turn % 3, K), F32)})
        linear.clear(1)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_interpreter_is_free_while_a_layer_computes():
    rng = np.random.default_rng(0)
    linear = flora.AdaptedLinear(rng.standard_normal((2048, 2048)).astype(F32))
    x = rng.standard_normal((1024, 2048)).astype(F32)
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1

    counter = threading.Thread(target=count)
    counter.start()
    before = counted[0]
    linear.forward(x)
    between = counted[0] - before
    done.set()
    counter.join()
    assert between > 0


def test_a_child_process_has_threads_of_its_own(linear):
    expected = linear.forward(x_of())
    child = os.fork()
    if child == 0:
        os._exit(0 if (linear.forward(x_of()) == expected).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_memory_grows_in_ten_thousand_calls(linear):
    x, out = x_of(6), np.empty((6, K), F32)
    rng = np.random.default_rng(0)
    rows = [rng.integers(-1, 3, 6) for _ in range(64)]

    def call(count):
        for at in range(count):
            linear.forward(x, rows[at % 64], out)
            if at % 50 == 0:
                linear.put(1, "flora", {"b": np.ones((D, 1 + at % 3), F32), "a": np.ones((1 + at % 3, K), F32)})
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    call(3000)
    before = call(1000)
    assert call(10000) - before < 2 << 20


def test_layers_give_their_memory_back():
    def made():
        return flora.AdaptedLinear(np.ones((1024, 1024), F32))

    def resident():
        gc.collect()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    made()
    before = resident()
    for _ in range(30):
        made()
    assert resident() - before < 32 << 20


def test_the_package_needs_no_other():
    code = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import flora; print(flora.get_num_threads())"
    environment = {**os.environ, "FLORA_NUM_THREADS": "3"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "3"
