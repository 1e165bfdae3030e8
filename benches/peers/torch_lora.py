"""Measures one adapted layer in PyTorch, so that flora's figures stand beside those of the programs in use today.

The layer has t tokens in s segments, l of them in the longest, each segment with an adapter of its own; d inputs, k
outputs, rank r. Sections and equations are those of "Batched Low-Rank Adaptation of Foundation Models".

    variant       adapter  lowering  what runs
    base          none     matmul    x @ w0: one GEMM over the t rows
    lora          lora     bmm       x @ w0 + bmm(bmm(x, b), a) (A.2): one GEMM over s·l rows, two bmm, an add
    flora         flora    stacked   sum over r of a ∘ ((b ∘ x) @ w0) (Eq. 6), its axes ordered for speed: one GEMM over
                                     r·s·l rows
    flora_einsum  flora    einsum    the same as Eq. 6 stands: b and x broadcast into [s, l, d, r], einsum with w0, a
                                     broadcast, the last axis summed

x is [s, l, d], shorter segments padded with zeros; adapters of mixed ranks would be padded to the largest, so that is
the rank to give. Padding, making the tensors, and transposing adapters into the layout that is read fastest are done
once, untimed. PyTorch runs eagerly, with its defaults; it allocates its results and temporaries within the timed call,
as it does in use.

    python torch_lora.py [options]            prints a JSON array, one object a measurement
    python torch_lora.py --serve [options]    answers requests, to be run interleaved with another program
    python torch_lora.py --check [options]    compares every variant with float64, exit status 1 if one is wrong

A measurement has the fields device, d, k, dtype, tokens (t), segments, rank (0 for base), adapter, lowering, seconds
(the median of the rounds), base_seconds (that of base among the same rounds), ratio_to_base (seconds / base_seconds)
and floor_seconds:

    floor_seconds = max(MACs / p, bytes / w)
    MACs          = t·d·k  (matmul),   t·d·k + t·r·(d + k)  (bmm),   r·t·d·k  (stacked, einsum)
    bytes         = bytes of an element × (d·k + t·d + t·k + s·r·(d + k))     r = 0 for base

p and w are measured in the same run, each the best of at least five repetitions: p is the MACs a second of a large
square matmul of the dtype, w the bytes a second, read plus written, of a copy of 256 MiB. Padding and temporaries are
not in the floor.

A timed repetition is untimed calls for 20 ms, one at least, which wake the threads and fill the caches, and then
--calls timed ones; its seconds are those of one call. In a round every variant of a shape has one repetition; the first
round is not counted. On CUDA, time is taken by events on the stream, after a synchronisation; the gaps between kernels
that PyTorch can't launch fast enough count, unless --graphs replays each variant as a CUDA graph.


The protocol of --serve (version 1)
-----------------------------------

One JSON object a line in both directions, UTF-8, at most 65536 bytes for a request. Every line that is not blank gets
exactly one answer, in order. Standard output carries nothing else; warnings go to standard error. The end of standard
input ends the program with status 0. Of the options, --device, --threads, --calls, --graphs and --settle matter.
Below, > is a request, < an answer; the long ones are one line each.

Once started, which takes seconds, it greets, or says why it can't and ends with status 1:

    <  {"protocol": 1, "device": "AMD EPYC, 2 threads (PyTorch 2.9.1+cu128)", "threads": 2}
    <  {"error": "..."}

Prepare a case. Only "variants" may be left out (then it is all four). "tokens_per_segment" is one number, or a list
with one for each segment. The answer comes after every variant has been called once. It names the case and has, for
each variant, a measurement without its "seconds", "base_seconds" and "ratio_to_base". The first case of a dtype takes
some seconds more, to measure p and w.

    >  {"d": 2048, "k": 2048, "dtype": "f32", "segments": 8, "tokens_per_segment": 32, "rank": 4,
        "variants": ["base", "lora"]}
    <  {"id": 0, "variants": {"base": {"device": "...", "d": 2048, "k": 2048, "dtype": "f32", "tokens": 256,
        "segments": 8, "rank": 0, "adapter": "none", "lowering": "matmul", "floor_seconds": 0.0105}, "lora": {...}}}

Ids count up from 0 and are not used again. Run one timed repetition of a variant that was prepared:

    >  {"run": 0, "variant": "lora"}
    <  {"run": 0, "variant": "lora", "seconds": 0.0131}

Free a case's memory; its id is unknown from then on:

    >  {"drop": 0}
    <  {"drop": 0}

A request that can't be served prepares and drops nothing and is answered with

    <  {"error": "what was wrong and how to mend it"}

OpenMP's idle threads spin for some milliseconds after a call and would take processor time from the other program. On
the CPU the answers to "run" and to a prepared case are therefore sent --settle milliseconds after the work is done,
which is not part of the seconds. The other program should likewise let its threads fall idle before it sends "run",
and make untimed calls for as long before its own timed ones.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time

from torch_layer import DTYPES, VARIANTS, Bench, Case, Refused, torch, working_bytes

PROTOCOL = 1
LONGEST_REQUEST = 65536
LARGEST_EXTENT = 1 << 20


# --- The three modes --------------------------------------------------------------------------------------------------


def measure(bench, cases, ranks, rounds):
    """Every measurement, each case's variants in turn, round after round."""
    medians = []
    for number, case in enumerate(cases, 1):
        print(
            f"{number}/{len(cases)}: {case.d}x{case.k} {case.dtype}, {case.segments} segments, {case.tokens} tokens",
            file=sys.stderr,
        )
        bench.require(working_bytes(case, ranks, VARIANTS), "the case")
        bench.measure_peaks(case.dtype)
        layer = bench.layer(case)
        calls = {("base", 0): bench.callable("base", layer, None)}
        for rank in ranks:
            adapters = bench.adapters(case, rank)
            calls |= {(name, rank): bench.callable(name, layer, adapters) for name in VARIANTS if name != "base"}
        times = {key: [] for key in calls}
        for taken in range(rounds + 1):
            for key, call in calls.items():
                seconds = bench.seconds(call)
                if taken > 0:
                    times[key].append(seconds)
        medians += [
            (case, key, statistics.median(taken), statistics.median(times["base", 0])) for key, taken in times.items()
        ]
    # Only now, with the best peaks of the whole run.
    return [
        bench.described(case, *key) | {"seconds": taken, "base_seconds": base, "ratio_to_base": taken / base}
        for case, key, taken, base in medians
    ]


def check(bench, dtypes):
    """Whether every variant equals its definition in float64, on padded segments and ranks and odd extents.

    The bound is that of the roundings made: with Y the same sum over absolute values, n the roundings to the dtype on
    the way to y, u its unit roundoff and v that of f32, in which sums of d and of r terms are accumulated,
    |y - exact| <= ((1 + u)^n (1 + v)^(d + r) - 1) Y.
    """
    right = True
    lengths, ranks = (5, 1, 11), (3, 1, 2)
    for dtype in dtypes:
        case, rank = Case(67, 41, dtype, lengths), max(ranks)
        layer, adapters = bench.layer(case), bench.adapters(case, rank)
        for segment, own in enumerate(ranks):
            adapters.b[segment, :, own:] = 0
            adapters.b_rows[segment, own:] = 0
            adapters.a[segment, own:] = 0
        unit = DTYPES[dtype].unit_roundoff
        for name, variant in VARIANTS.items():
            y = variant.compute(layer, adapters)
            # Base has the real rows only, the others padded segments.
            split = (
                y.split(lengths) if y.dim() == 2 else [y[segment, :length] for segment, length in enumerate(lengths)]
            )
            bound = (1 + unit) ** variant.roundings * (1 + 2.0**-24) ** (case.d + rank) - 1
            worst = 0.0
            for segment, (length, own) in enumerate(zip(lengths, ranks, strict=True)):
                operands = (
                    layer.x[segment, :length],
                    layer.w0,
                    adapters.b[segment, :, :own],
                    adapters.a[segment, :own],
                )
                operands = [operand.to("cpu", torch.float64) for operand in operands]
                exact, magnitude = variant.oracle(*operands), variant.oracle(*(operand.abs() for operand in operands))
                relative = (split[segment].to("cpu", torch.float64) - exact).abs() / magnitude
                # A NaN anywhere is an infinite deviation.
                worst = max(worst, relative.nan_to_num(nan=math.inf).max().item())
            right &= worst <= bound
            verdict = "right" if worst <= bound else "WRONG"
            print(f"{dtype:5} {name:12} deviation {worst:.1e} of at most {bound:.1e}  {verdict}")
    return right


def serve(bench, settle, requests, answer):
    """Answers requests until they end."""
    prepared, next_id = {}, 0
    answer({"protocol": PROTOCOL, "device": bench.name, "threads": bench.threads})

    def settled(reply):
        if bench.device == "cpu":
            time.sleep(settle / 1e3)
        return reply

    def prepare(request):
        nonlocal next_id
        case, rank, names = read_case(request)
        bench.require(working_bytes(case, [rank], names), "the case")
        if case.dtype not in bench.macs_per_second:
            bench.measure_peaks(case.dtype)
        layer, adapters = bench.layer(case), bench.adapters(case, rank)
        calls = {name: bench.callable(name, layer, adapters) for name in names}
        prepared[next_id] = calls
        next_id += 1
        described = {name: bench.described(case, name, rank) for name in names}
        return settled({"id": next_id - 1, "variants": described})

    def known(request, key):
        if type(request[key]) is not int or request[key] not in prepared:
            raise Refused(f"`{key}` is {request[key]!r}, no prepared case; prepared are {sorted(prepared)}")
        return request[key]

    def run(request):
        only_keys(request, ("run", "variant"))
        calls, name = prepared[known(request, "run")], request["variant"]
        if not isinstance(name, str) or name not in calls:
            raise Refused(f"`variant` is {name!r}; this case has {', '.join(calls)}")
        return settled({"run": request["run"], "variant": name, "seconds": bench.seconds(calls[name])})

    def drop(request):
        only_keys(request, ("drop",))
        del prepared[known(request, "drop")]
        return {"drop": request["drop"]}

    while line := requests.readline(LONGEST_REQUEST + 1):
        if len(line) > LONGEST_REQUEST:
            while line and not line.endswith(b"\n"):
                line = requests.readline(LONGEST_REQUEST)
            answer({"error": f"a request longer than {LONGEST_REQUEST} bytes"})
            continue
        if not line.strip():
            continue
        try:
            request = read_object(line)
            reply = (run if "run" in request else drop if "drop" in request else prepare)(request)
        except Refused as error:
            reply = {"error": str(error)}
        except (RuntimeError, MemoryError) as error:  # PyTorch's own, out of memory among them
            reply = {"error": f"PyTorch: {error}"}
        answer(reply)


# --- What is asked for ------------------------------------------------------------------------------------------------


def read_object(line):
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refused(f"not JSON: {error}") from error
    if not isinstance(request, dict):
        raise Refused(f"a request is a JSON object, not {line.decode().strip()[:40]}")
    return request


def only_keys(request, required, optional=()):
    missing = [key for key in required if key not in request]
    unknown = [key for key in request if key not in required and key not in optional]
    if missing:
        raise Refused(f"missing: {', '.join(missing)}")
    if unknown:
        raise Refused(f"unknown: {', '.join(map(str, unknown))}; expected {', '.join((*required, *optional))}")


def extent(value, what):
    if type(value) is not int or not 1 <= value <= LARGEST_EXTENT:
        raise Refused(f"{what} is {value!r}; it must be a whole number from 1 to {LARGEST_EXTENT}")
    return value


def read_case(request):
    """The case, rank and variants of a request to prepare."""
    only_keys(request, ("d", "k", "dtype", "segments", "tokens_per_segment", "rank"), ("variants",))
    d, k, segments, rank = (extent(request[key], f"`{key}`") for key in ("d", "k", "segments", "rank"))
    tokens = request["tokens_per_segment"]
    lengths = tokens if isinstance(tokens, list) else [extent(tokens, "`tokens_per_segment`")] * segments
    if len(lengths) != segments:
        raise Refused(f"`tokens_per_segment` has {len(lengths)} lengths for {segments} segments")
    for length in lengths:
        extent(length, "a length of `tokens_per_segment`")
    dtype, names = request["dtype"], request.get("variants", list(VARIANTS))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise Refused(f"`dtype` is {dtype!r}; use one of {', '.join(DTYPES)}")
    if (
        not isinstance(names, list)
        or not names
        or any(not isinstance(name, str) or name not in VARIANTS for name in names)
    ):
        raise Refused(f"`variants` is {names!r}; use a list of {', '.join(VARIANTS)}")
    return Case(d, k, dtype, tuple(lengths)), rank, list(dict.fromkeys(names))


def numbers(text, separator, what):
    try:
        return tuple(extent(int(part), what) for part in text.split(separator))
    except (ValueError, Refused) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def shape_option(text):
    shape = numbers(text, ",", "an extent")
    if len(shape) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not d,k such as 2048,2048")
    return shape


def tokens_option(text):
    if "x" not in text:
        return numbers(text, "+", "the tokens of a segment")
    counts = numbers(text, "x", "a number of segments or tokens")
    if len(counts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not SEGMENTSxTOKENS such as 8x32, or lengths such as 1+7+32")
    return (counts[1],) * counts[0]


def options():
    summary, _, _ = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=f"{summary} The text at the top of this file says what is measured and how."
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--serve", action="store_true", help="answer requests on standard input")
    mode.add_argument("--check", action="store_true", help="compare every variant and dtype with float64")
    parser.add_argument(
        "--shape", type=shape_option, action="append", metavar="D,K", help="may be repeated; default 2048,2048"
    )
    parser.add_argument(
        "--tokens",
        type=tokens_option,
        action="append",
        metavar="SEGMENTSxTOKENS",
        help="or the lengths, such as 1+7+32; may be repeated; default 8x32, 4x128 and 32x1",
    )
    parser.add_argument(
        "--ranks", type=lambda text: numbers(text, ",", "a rank"), default=(1, 4, 16), help="default 1,4,16"
    )
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default f32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="that count, after one that warms up; default 15")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--calls", type=int, help="in a timed repetition; default 1, on CUDA 20")
    parser.add_argument("--graphs", action="store_true", help="replay each variant as a CUDA graph")
    parser.add_argument(
        "--settle", type=float, default=20.0, help="milliseconds before an answer of --serve; default 20"
    )
    given = parser.parse_args()
    for name, least, most in (("rounds", 1, 10**6), ("threads", 1, 1024), ("calls", 1, 10**6), ("settle", 0, 10**4)):
        value = getattr(given, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name} is {value}; it must be from {least} to {most}")
    return given


def main():
    given = options()
    output = sys.stdout
    if given.serve:
        # Only answers may reach the client: whatever else is printed, by libraries too, goes to standard error.
        output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def answer(value):
        print(json.dumps(value), file=output, flush=True)

    try:
        bench = Bench(given.device, given.threads, given.calls, given.graphs)
        with torch.inference_mode():
            if given.serve:
                serve(bench, given.settle, sys.stdin.buffer, answer)
            elif given.check:
                return 0 if check(bench, DTYPES) else 1
            else:
                cases = [
                    Case(*shape, dtype, lengths)
                    for dtype in given.dtype or ["f32"]
                    for shape in given.shape or [(2048, 2048)]
                    for lengths in given.tokens or [(32,) * 8, (128,) * 4, (1,) * 32]
                ]
                rows = measure(bench, cases, tuple(dict.fromkeys(given.ranks)), given.rounds)
                print("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]")
    except (Refused, RuntimeError, MemoryError) as error:
        if given.serve:
            answer({"error": str(error)})
        else:
            print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader has gone; what is left to flush would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
