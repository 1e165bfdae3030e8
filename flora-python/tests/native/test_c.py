"""The C interface, called as a C program calls it, in the library that the Python module is part of."""

import ctypes
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

import flora
import reference

HEADER = pathlib.Path(__file__).parents[2] / "include" / "flora.h"
OK, INVALID, CLOSED = 0, 1, 2
D, K, R = 19, 13, 2


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("element", ctypes.c_int),
        ("extents", ctypes.c_int),
        ("shape", ctypes.c_int64 * 2),
        ("strides", ctypes.c_int64 * 2),
    ]

    @classmethod
    def of(cls, values):
        element = {"float32": 0, "float16": 1, "float64": 3}[values.dtype.name]
        pad = (0,) * (2 - values.ndim)
        strides = tuple(stride // values.itemsize for stride in values.strides)
        return cls(values.ctypes.data, element, values.ndim, values.shape + pad, strides + pad)


class Operand(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("tensor", Tensor)]


@pytest.fixture
def library():
    library = ctypes.CDLL(flora._native.__file__)
    library.flora_last_error.restype = ctypes.c_char_p
    return library


def put(library, layer, slot, kind, own, part=0):
    values = {name: np.asarray(value, np.float64 if isinstance(value, float) else None) for name, value in own.items()}
    operands = (Operand * len(values))(*(Operand(name.encode(), Tensor.of(value)) for name, value in values.items()))
    return library.flora_linear_put(layer, ctypes.c_int64(slot), ctypes.c_int64(part), kind, operands, ctypes.c_int64(len(values)))


def forward(library, layer, x, slots, y):
    i64 = ctypes.c_int64
    pointers = [ctypes.c_void_p(values.ctypes.data if values is not None else None) for values in (x, slots, y)]
    return library.flora_linear_forward(layer, pointers[0], i64(x.shape[1]), pointers[1], i64(len(x)), pointers[2], i64(y.shape[1]))


def test_a_layer_from_its_making_to_its_end(library):
    rng = np.random.default_rng(0)
    weight, bias = (rng.standard_normal(shape).astype(np.float32) for shape in [(K, D), (K,)])
    layer = ctypes.c_int64()
    tensors = [ctypes.byref(Tensor.of(values)) for values in (weight, bias)]
    assert library.flora_linear_new(*tensors, None, ctypes.c_int64(0), ctypes.c_int64(4), 0, ctypes.byref(layer)) == OK
    own = reference.operands("flora", D, K, R, rng)
    assert put(library, layer, 2, b"flora", own) == OK
    x, y = rng.standard_normal((5, D)).astype(np.float32), np.empty((5, K), np.float32)
    assert forward(library, layer, x, np.full(5, 2), y) == OK
    expected, size = reference.output("flora", x, weight.T, own, R, bias)
    assert (abs(y - expected) <= reference.bound(size, D + 17)).all()
    assert library.flora_linear_clear(layer, ctypes.c_int64(2), ctypes.c_int64(-1)) == OK
    assert forward(library, layer, x, np.full(5, 2), y) == OK
    base = y.copy()
    assert forward(library, layer, x, None, y) == OK
    assert (base == y).all()

    assert forward(library, layer, x, np.full(5, 4), y) == INVALID
    assert b"slot 4" in library.flora_last_error()
    assert put(library, layer, 9, b"flora", own) == INVALID
    assert put(library, layer, 0, b"nonsense", own) == INVALID
    assert b"nonsense" in library.flora_last_error()
    assert put(library, layer, -1, b"flora", own) == INVALID
    assert library.flora_linear_put(layer, ctypes.c_int64(0), ctypes.c_int64(0), None, None, ctypes.c_int64(0)) == INVALID
    assert library.flora_linear_new(None, None, None, ctypes.c_int64(0), ctypes.c_int64(4), 0, None) == INVALID
    assert library.flora_set_num_threads(ctypes.c_int64(0)) != OK
    assert (base == y).all()

    assert library.flora_linear_free(layer) == OK
    assert library.flora_linear_free(layer) == CLOSED
    assert forward(library, layer, x, None, y) == CLOSED


def test_an_adapter_s_folder(library, tmp_path):
    from test_adapters import MODULE, write

    rng = np.random.default_rng(1)
    own = reference.operands("hira", D, K, R, rng)
    write(tmp_path / "a", {"peft_type": "HIRA", "r": R}, {"hira_A": own["b"].T, "hira_B": own["a"].T})
    weight = rng.standard_normal((K, D)).astype(np.float32)
    linear = flora.AdaptedLinear(weight)
    layer, zero = ctypes.c_int64(linear.handle), ctypes.c_int64(0)
    folder = str(tmp_path / "a").encode()
    assert library.flora_linear_put_folder(layer, zero, zero, folder, MODULE.encode()) == OK
    x = rng.standard_normal((3, D)).astype(np.float32)
    expected, size = reference.output("hira", x, weight.T, own, R)
    assert (abs(linear.forward(x, np.zeros(3, np.int64)) - expected) <= reference.bound(size, D + 17)).all()
    assert library.flora_linear_put_folder(layer, zero, zero, folder, b"elsewhere") == INVALID
    assert b"elsewhere" in library.flora_last_error()


@pytest.mark.parametrize("compiler", ["cc", "c++"])
def test_the_header_is_c_and_c_plus_plus(compiler, tmp_path):
    program = shutil.which(compiler)
    assert program, f"no {compiler} here; install one (Debian: apt-get install g++)"
    source = tmp_path / ("a.c" if compiler == "cc" else "a.cc")
    source.write_text('#include "flora.h"\nint main(void) { return flora_linear_free(0); }\n')
    command = [program, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", f"-I{HEADER.parent}", str(source)]
    subprocess.run(command, check=True)
    # What the header declares is there.
    names = [word.split("(")[0].lstrip("*") for word in HEADER.read_text().replace("\n", " ").split() if word.startswith(("flora_", "*flora_")) and "(" in word]
    library = ctypes.CDLL(flora._native.__file__)
    assert len(set(names) - {"flora_last_error()"}) >= 7
    for name in set(names):
        assert getattr(library, name.rstrip(")"))
