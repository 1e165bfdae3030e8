"""A process whose CUDA driver is the emulated one: what the tests of cards run. The argument names a function of this file."""

import ctypes
import sys
import types

import numpy as np

import flora
import flora.cuda

D, K, F32 = 72, 40, np.float32
CARD = 1
CUDA = ctypes.CDLL("libcuda.so")


def call(name, *arguments):
    status = getattr(CUDA, name)(*arguments)
    assert status == 0, f"{name}: {status}"


class Memory:
    """Bytes on the card."""

    def __init__(self, array):
        address = ctypes.c_uint64()
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(array.nbytes))
        self.address, self.like = address.value, array
        self.write(array)

    @property
    def place(self):
        return self.address, self.like.nbytes

    def write(self, array):
        assert array.nbytes == self.like.nbytes
        call("cuMemcpyHtoD_v2", ctypes.c_uint64(self.address), array.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(array.nbytes))

    def read(self):
        out = np.empty_like(self.like)
        call("cuMemcpyDtoH_v2", out.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(self.address), ctypes.c_size_t(out.nbytes))
        return out


def use_card():
    context = ctypes.c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), CARD)
    call("cuCtxSetCurrent", context)


def own_stream():
    stream = ctypes.c_void_p()
    call("cuStreamCreate", ctypes.byref(stream), 1)
    return stream


def random(*shape, seed):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(F32)


def low_rank(seed, rank=3):
    return {"b": random(D, rank, seed=seed), "a": random(rank, K, seed=seed + 1), "s": 2.0}


def layer_of(parts=None):
    own = flora.AdaptedLinear(random(K, D, seed=1), random(K, seed=2), slots=8, parts=parts)
    return own


def close(one, other):
    return np.allclose(one, other, rtol=1e-4, atol=1e-4)


ROWS = np.array([0, 0, 0, 2, 1, 1, -1, 7])
X = random(len(ROWS), D, seed=5)


def adapted():
    layer = layer_of()
    layer.put(0, "lora", low_rank(10))
    layer.put(1, "lora", low_rank(20))
    layer.put(2, "flora", {"b": random(D, 2, seed=30), "a": random(2, K, seed=31)})
    return layer


def rows_of_many_adapters_are_the_processor_s():
    use_card()
    layer = adapted()
    card = flora.cuda.CudaLinear(layer, CARD)
    x, y = Memory(X), Memory(np.full((len(ROWS), K), np.nan, F32))
    for rows in (ROWS, None, np.zeros(len(ROWS), np.int64)):
        card.batch(rows, len(ROWS), stream=0).forward_pointers(x.place, [y.place], 0)
        assert close(y.read(), layer.forward(X, rows)), rows
    again = flora.cuda.CudaLinear(adapted(), CARD)
    before = again.compiled
    again.batch(ROWS, stream=0).forward_pointers(x.place, [y.place], 0)
    assert again.compiled == before, "kernels are shared by the layers of a card"


def a_graph_follows_slots_and_adapters():
    use_card()
    layer, stream = adapted(), own_stream()
    batch = flora.cuda.CudaLinear(layer, CARD).batch(ROWS, stream=stream.value)
    x, y = Memory(X), Memory(np.full((len(ROWS), K), np.nan, F32))
    batch.forward_pointers(x.place, [y.place], stream.value)
    captured, graph = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuStreamBeginCapture_v2", stream, 0)
    batch.forward_pointers(x.place, [y.place], stream.value)
    call("cuStreamEndCapture", stream, ctypes.byref(captured))
    call("cuGraphInstantiateWithFlags", ctypes.byref(graph), captured, ctypes.c_ulonglong(0))

    def replayed():
        y.write(np.full((len(ROWS), K), np.nan, F32))
        call("cuGraphLaunch", graph, stream)
        call("cuStreamSynchronize", stream)
        return y.read()

    assert close(replayed(), layer.forward(X, ROWS))
    # The same segments, by the other adapter of the same rank.
    other = np.where(ROWS == 0, 1, np.where(ROWS == 1, 0, ROWS))
    assert batch.assign(other, stream=stream.value)
    assert not batch.assign(other, stream=stream.value), "nothing has changed"
    assert close(replayed(), layer.forward(X, other))
    # Another adapter in a slot.
    layer.put(0, "lora", low_rank(40))
    assert batch.refresh(stream=stream.value)
    assert close(replayed(), layer.forward(X, other))
    assert not close(replayed(), layer.forward(X, ROWS))
    # Another rank needs other launches where it is of another size.
    layer.put(0, "lora", low_rank(50, rank=64))
    try:
        batch.refresh(stream=stream.value)
    except flora.cuda.OtherLaunchesError as error:
        assert "capture them anew" in str(error), error
    else:
        raise AssertionError("other launches were taken for the same")
    fresh = flora.cuda.CudaLinear(layer, CARD).batch(other, stream=stream.value)
    fresh.forward_pointers(x.place, [y.place], stream.value)
    call("cuStreamSynchronize", stream)
    assert close(y.read(), layer.forward(X, other))


def parts_have_outputs_of_their_own():
    use_card()
    layer = layer_of(parts=[24, 16])
    layer.put(0, "lora", {"b": random(D, 2, seed=60), "a": random(2, 16, seed=61), "s": 1.0}, part=1)
    card = flora.cuda.CudaLinear(layer, CARD)
    assert card.parts == [24, 16]
    x = Memory(X)
    outs = [Memory(np.full((len(ROWS), size), np.nan, F32)) for size in card.parts]
    card.batch(ROWS, stream=0).forward_pointers(x.place, [out.place for out in outs], 0)
    assert close(np.concatenate([out.read() for out in outs], axis=1), layer.forward(X, ROWS))


class Tensor:
    """As much of a PyTorch tensor on a card as is asked of one."""

    is_cuda = True

    def __init__(self, array):
        self.memory, self.shape, self.dtype = Memory(array), array.shape, "float32"
        self.device = types.SimpleNamespace(index=CARD)

    def data_ptr(self):
        return self.memory.address

    def numel(self):
        return self.memory.like.size

    def element_size(self):
        return self.memory.like.itemsize

    def is_contiguous(self):
        return True

    def new_empty(self, shape):
        return Tensor(np.full(shape, np.nan, F32))


class Rows:
    """The same of one in host memory."""

    def __init__(self, rows):
        self.rows, self.__array_interface__, self.dtype = rows, rows.__array_interface__, rows.dtype

    def cpu(self):
        return self

    contiguous = cpu

    def numpy(self):
        return self.rows

    def numel(self):
        return self.rows.size

    def __len__(self):
        return len(self.rows)


def tensors_go_to_their_card():
    use_card()
    layer, stream, state = adapted(), own_stream(), types.SimpleNamespace(captures=False, stream=0)
    cuda = types.SimpleNamespace(
        current_stream=lambda device: types.SimpleNamespace(cuda_stream=state.stream),
        is_current_stream_capturing=lambda: state.captures,
        is_available=lambda: True,
    )
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, Tensor=Tensor, float32="float32", cat=lambda parts, dim: parts)
    x, rows = Tensor(X), Rows(ROWS)
    y = layer.forward(x, rows)
    expected = layer.forward(X, ROWS)
    assert close(y.memory.read(), expected)
    own = flora.cuda._linears[layer.handle, CARD]
    assert len(own._batches) == 1
    layer.forward(x, rows)
    assert len(own._batches) == 1, "the batch was kept"
    # A capture takes the batch for itself, and one that is new can't be made in it.
    out = x.new_empty((len(ROWS), K))
    captured, graph = ctypes.c_void_p(), ctypes.c_void_p()
    state.captures, state.stream = True, stream.value
    call("cuStreamBeginCapture_v2", stream, 0)
    assert layer.forward(x, rows, out) is out
    call("cuStreamEndCapture", stream, ctypes.byref(captured))
    assert (len(own._batches), len(own._captured)) == (0, 1)
    call("cuGraphInstantiateWithFlags", ctypes.byref(graph), captured, ctypes.c_ulonglong(0))
    call("cuGraphLaunch", graph, stream)
    call("cuStreamSynchronize", stream)
    assert close(out.memory.read(), expected)
    state.captures, state.stream = False, 0
    # Another rank in a slot is another batch, which is made by itself outside of captures.
    layer.forward(x, rows)
    layer.put(0, "lora", low_rank(80, rank=64))
    assert close(layer.forward(x, rows).memory.read(), layer.forward(X, ROWS))
    assert not close(layer.forward(X, ROWS), expected)
    for seed in range(20):
        layer.forward(x, Rows(np.random.default_rng(seed).integers(-1, 3, len(ROWS))))
    assert len(own._batches) == flora.cuda._KEPT
    for wrong, said in [(Rows(ROWS[:3]), "one slot for each"), (Tensor(X[:, :4].copy()), "last extent has to be 72")]:
        try:
            layer.forward(x, wrong) if isinstance(wrong, Rows) else layer.forward(wrong)
        except ValueError as error:
            assert said in str(error), error
        else:
            raise AssertionError(said)
    layer.close()
    assert not flora.cuda._linears, "what a closed layer had on cards is freed"


def what_is_wrong_is_raised():
    use_card()
    layer = adapted()
    card = flora.cuda.CudaLinear(layer, CARD)
    batch = card.batch(ROWS, stream=0)
    x, y = Memory(X), Memory(np.full((len(ROWS), K), np.nan, F32))
    ia3 = layer_of()
    ia3.put(0, "ia3", {"l": random(K, seed=70)})
    for error, said, wrong in [
        (ValueError, "operand X is at the address 0", lambda: batch.forward_pointers((0, x.place[1]), [y.place], 0)),
        (ValueError, "operand X has 4 bytes", lambda: batch.forward_pointers((x.address, 4), [y.place], 0)),
        (ValueError, "not all memory of this card", lambda: batch.forward_pointers((X.ctypes.data & ~255, X.nbytes), [y.place], 0)),
        (ValueError, "lies over the operand", lambda: batch.forward_pointers(x.place, [x.place], 0)),
        (ValueError, "the layer has 1 parts", lambda: batch.forward_pointers(x.place, [], 0)),
        (RuntimeError, "cuStreamGetCtx fails for the stream 0x40", lambda: batch.forward_pointers(x.place, [y.place], 64)),
        (IndexError, "asks for slot 8", lambda: card.batch(np.array([8]), stream=0)),
        (ValueError, "has no rows", lambda: card.batch(np.array([], np.int64), stream=0)),
        (ValueError, "count has to say", lambda: card.batch(None, stream=0)),
        (ValueError, "there is no CUDA card 9", lambda: flora.cuda.CudaLinear(layer, 9)),
        (flora.cuda.OtherLaunchesError, "capture them anew", lambda: batch.assign(ROWS[:5], stream=0)),
        (ValueError, "on the processor alone", lambda: flora.cuda.CudaLinear(ia3, CARD).batch(ROWS, stream=0)),
    ]:
        try:
            wrong()
        except error as found:
            assert said in str(found), f"{found} instead of {said}"
        else:
            raise AssertionError(f"nothing was raised instead of {said}")
    batch.forward_pointers(x.place, [y.place], 0)
    assert close(y.read(), layer.forward(X, ROWS)), "what was refused has changed nothing"
    layer.close()
    try:
        flora.cuda.CudaLinear(layer, CARD)
    except flora.ClosedError:
        return
    raise AssertionError("a layer that was closed was copied to a card")


if __name__ == "__main__":
    globals()[sys.argv[1]]()
