"""The layer that torch_lora.py measures: what each variant computes, what that costs at least, and the device.

Shapes and formulas are those of the text at the top of torch_lora.py.
"""

import functools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass

try:
    import torch
except ImportError as error:
    torch, MISSING = None, f"PyTorch can't be imported ({error}); see README.md in this script's parent folder"


@dataclass(frozen=True)
class Dtype:
    """An element type: its name in torch, bytes, and unit roundoff."""

    torch_name: str
    bytes: int
    unit_roundoff: float


DTYPES = {
    "f32": Dtype("float32", 4, 2.0**-24),
    "bf16": Dtype("bfloat16", 2, 2.0**-8),
    "f16": Dtype("float16", 2, 2.0**-11),
}


class Refused(Exception):
    """A request or option that can't be served; the text is for the one who asked."""


# --- What is computed -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The extents of a layer and its batch: `[tokens, d]` by `[d, k]`, `lengths` the tokens of each segment."""

    d: int
    k: int
    dtype: str
    lengths: tuple

    @property
    def tokens(self):
        return sum(self.lengths)

    @property
    def segments(self):
        return len(self.lengths)

    @property
    def longest(self):
        return max(self.lengths)


@dataclass(frozen=True)
class Layer:
    """What all adapters of a case share: x `[s, l, d]` padded, its real rows `[t, d]`, and w0 `[d, k]`."""

    x: "torch.Tensor"
    rows: "torch.Tensor"
    w0: "torch.Tensor"


@dataclass(frozen=True)
class Adapters:
    """One adapter for each segment: b `[s, d, r]`, a `[s, r, k]`, and b's columns as rows `[s, r, d]`."""

    b: "torch.Tensor"
    a: "torch.Tensor"
    b_rows: "torch.Tensor"


def compute_base(layer, _adapters):
    """`[t, k]`"""
    return layer.rows @ layer.w0


def compute_lora(layer, adapters):
    """A.2, `[s, l, k]`"""
    segments, longest, d = layer.x.shape
    base = (layer.x.view(segments * longest, d) @ layer.w0).view(segments, longest, -1)
    hidden = torch.bmm(layer.x, adapters.b)
    return base.add_(torch.bmm(hidden, adapters.a))


def compute_flora(layer, adapters):
    """Eq. 6, `[s, l, k]`: the rank is an axis before the tokens, broadcast into x and reduced at the end."""
    scaled = adapters.b_rows[:, :, None, :] * layer.x[:, None, :, :]
    return (scaled @ layer.w0).mul_(adapters.a[:, :, None, :]).sum(1)


def compute_flora_einsum(layer, adapters):
    """Eq. 6 as it stands, `[s, l, k]`: each b `[d, r]` broadcast into its rows of x, so that the rank is the last axis."""
    products = torch.einsum("sldr,dk->slkr", adapters.b[:, None] * layer.x[..., None], layer.w0)
    return (adapters.a.transpose(1, 2)[:, None] * products).sum(-1)


@dataclass(frozen=True)
class Variant:
    adapter: str
    lowering: str
    compute: Callable
    macs: Callable
    # The float64 definition that it is checked against, for one segment: x [l, d], w0, b [d, r], a [r, k].
    oracle: Callable
    # Roundings to the dtype between the inputs and y, the last one included.
    roundings: int


def stacked_macs(case, rank):
    return rank * case.tokens * case.d * case.k


def flora_oracle(x, w0, b, a):
    return x @ (w0 * (b @ a))


VARIANTS = {
    "base": Variant(
        adapter="none",
        lowering="matmul",
        compute=compute_base,
        macs=lambda case, rank: case.tokens * case.d * case.k,
        oracle=lambda x, w0, b, a: x @ w0,
        roundings=1,
    ),
    "lora": Variant(
        adapter="lora",
        lowering="bmm",
        compute=compute_lora,
        macs=lambda case, rank: case.tokens * (case.d * case.k + rank * (case.d + case.k)),
        oracle=lambda x, w0, b, a: x @ (w0 + b @ a),
        roundings=3,
    ),
    "flora": Variant(
        adapter="flora",
        lowering="stacked",
        compute=compute_flora,
        macs=stacked_macs,
        oracle=flora_oracle,
        roundings=4,
    ),
    "flora_einsum": Variant(
        adapter="flora",
        lowering="einsum",
        compute=compute_flora_einsum,
        macs=stacked_macs,
        oracle=flora_oracle,
        roundings=4,
    ),
}


def rank_of(name, rank):
    """Base rows have no adapter, so no rank."""
    return 0 if VARIANTS[name].adapter == "none" else rank


def least_bytes(case, rank):
    """Each operand read once and y written once."""
    elements = case.d * case.k + case.tokens * (case.d + case.k) + case.segments * rank * (case.d + case.k)
    return elements * DTYPES[case.dtype].bytes


def working_bytes(case, ranks, names):
    """An upper estimate of the memory for a case's tensors and for the temporaries of its largest variant."""
    padded = case.segments * case.longest
    held = case.d * case.k + 2 * padded * case.d + sum(case.segments * rank * (2 * case.d + case.k) for rank in ranks)
    stacks = any(VARIANTS[name].adapter == "flora" for name in names)
    # einsum copies its operand into the order that a matmul needs.
    temporaries = (1 + max(ranks) * stacks) * padded * 2 * (case.d + case.k)
    return (held + temporaries) * DTYPES[case.dtype].bytes


# --- On a device ------------------------------------------------------------------------------------------------------


class Bench:
    """A device with its settings, its peaks so far, and the tensors and times that are taken on it."""

    COPY_BYTES = 1 << 28
    LARGEST_MATMUL = 8192
    LARGE_MATMUL_SECONDS = 0.05
    # Before a repetition: a processor that was idle, or at another program's work, takes milliseconds to be as fast as
    # in a loop over the same layer.
    WARM_UP_SECONDS = 0.02

    def __init__(self, device, threads, calls, graphs):
        if torch is None:
            raise Refused(MISSING)
        if device == "cuda" and not torch.cuda.is_available():
            raise Refused("PyTorch finds no CUDA device here; use --device cpu")
        if graphs and device != "cuda":
            raise Refused("--graphs needs --device cuda")
        if threads is not None:
            torch.set_num_threads(threads)
        self.device, self.graphs = device, graphs
        self.calls = calls or (1 if device == "cpu" else 20)
        self.threads = torch.get_num_threads()
        self.generator = torch.Generator(device).manual_seed(0)
        self.macs_per_second, self.large_matmul, self.bytes_per_second = {}, {}, 0.0

    @property
    def name(self):
        if self.device == "cuda":
            return f"{torch.cuda.get_device_name()} (PyTorch {torch.__version__})"
        plural = "" if self.threads == 1 else "s"
        return f"{processor()}, {self.threads} thread{plural} (PyTorch {torch.__version__})"

    def require(self, needed, what):
        """Refuses what would not fit into the memory that is free now, before anything is allocated."""
        if self.device == "cuda":
            # What PyTorch keeps for later is free too.
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info()
        else:
            free = free_host_memory()
        if needed > 0.9 * free:
            raise Refused(
                f"{what} needs {needed >> 20} MiB and {free >> 20} MiB are free; drop cases or make it smaller"
            )

    def random(self, dtype, *shape, scale=1.0):
        kind = getattr(torch, DTYPES[dtype].torch_name)
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=kind).mul_(scale)

    def layer(self, case):
        x = self.random(case.dtype, case.segments, case.longest, case.d)
        lengths = torch.tensor(case.lengths, device=self.device)
        real = torch.arange(case.longest, device=self.device)[None, :] < lengths[:, None]
        x.mul_(real[:, :, None])
        whole = case.tokens == case.segments * case.longest
        rows = x.view(-1, case.d) if whole else x[real].contiguous()
        return Layer(x, rows, self.random(case.dtype, case.d, case.k, scale=case.d**-0.5))

    def adapters(self, case, rank):
        b = self.random(case.dtype, case.segments, case.d, rank)
        a = self.random(case.dtype, case.segments, rank, case.k, scale=rank**-0.5)
        return Adapters(b, a, b.transpose(1, 2).contiguous())

    def callable(self, name, layer, adapters):
        """The variant as a function without arguments, called once; a replayed CUDA graph where asked for."""
        compute = VARIANTS[name].compute
        if not self.graphs:
            compute(layer, adapters)
            return lambda: compute(layer, adapters)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                compute(layer, adapters)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            compute(layer, adapters)
        return graph.replay

    def seconds(self, call):
        """One timed repetition, after untimed calls."""
        start = time.perf_counter()
        while True:
            call()
            if self.device != "cpu":
                torch.cuda.synchronize()
            if time.perf_counter() - start >= self.WARM_UP_SECONDS:
                break
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in range(self.calls):
                call()
            return (time.perf_counter() - start) / self.calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(self.calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / self.calls

    def best(self, call):
        return min(self.seconds(call) for _ in range(5))

    def measure_peaks(self, dtype):
        """Raises the peaks to what is reached now. The matmul's extent is the first power of two that takes long."""
        extent = self.large_matmul.get(dtype, 256)
        while True:
            self.require(3 * extent * extent * DTYPES[dtype].bytes + 2 * self.COPY_BYTES, "measuring the peaks")
            one, other = self.random(dtype, extent, extent), self.random(dtype, extent, extent)
            best = self.best(functools.partial(torch.matmul, one, other))
            if dtype in self.large_matmul or best >= self.LARGE_MATMUL_SECONDS or extent == self.LARGEST_MATMUL:
                break
            extent *= 2
        self.large_matmul[dtype] = extent
        self.macs_per_second[dtype] = max(self.macs_per_second.get(dtype, 0.0), extent**3 / best)
        source = torch.ones(self.COPY_BYTES // 4, device=self.device)
        target = torch.empty_like(source)
        best = self.best(functools.partial(target.copy_, source))
        self.bytes_per_second = max(self.bytes_per_second, 2 * self.COPY_BYTES / best)

    def described(self, case, name, rank):
        """A measurement, but for what was measured."""
        variant, rank = VARIANTS[name], rank_of(name, rank)
        compute = variant.macs(case, rank) / self.macs_per_second[case.dtype]
        return {
            "device": self.name,
            "d": case.d,
            "k": case.k,
            "dtype": case.dtype,
            "tokens": case.tokens,
            "segments": case.segments,
            "rank": rank,
            "adapter": variant.adapter,
            "lowering": variant.lowering,
            "floor_seconds": max(compute, least_bytes(case, rank) / self.bytes_per_second),
        }


def processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def free_host_memory():
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
