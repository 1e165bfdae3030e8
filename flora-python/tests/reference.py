"""Every layer's equation a second time, in float64 and plain operations of NumPy or PyTorch, and how far float32 may be from it."""

import numpy as np


def shapes(layer, d, k, r):
    """The shapes of a layer's operands."""
    pair = {"b": (d, r), "a": (r, k)}
    return {
        "lora": {**pair, "s": ()},
        "dora": {**pair, "s": (), "m": (k,)},
        "hira": pair,
        "flora": pair,
        "flora_mean": pair,
        "ia3": {"l": (k,)},
        "ia3_feedforward": {"l": (d,)},
        "loha": {**pair, "d": (d, r), "c": (r, k), "s": ()},
        "adalora": {"b": (d, r), "e": (r,), "a": (r, k), "s": (), "n": ()},
        "beft": {"v": (k,)},
    }[layer]


def operands(layer, d, k, r, rng):
    """Operands of a layer that no kind starts from: nothing is zero, and sums stay near one."""
    made = {}
    for name, shape in shapes(layer, d, k, r).items():
        scale = 1 / np.sqrt(d) if name in "bd" and layer not in ("flora", "flora_mean", "hira") else 1.0
        made[name] = (rng.standard_normal(shape) * scale).astype(np.float32) if shape else float(rng.uniform(0.5, 2))
    if layer == "adalora":
        made["n"] = float(r)
    return made


def weight(layer, w0, own, rank, norm=lambda w: (w * w).sum(0) ** 0.5):
    """``(w [d, k], offset [k] or 0)`` of ``y = x @ w + offset``; norms are what ``norm`` gives of a weight's columns."""
    b, a = own.get("b"), own.get("a")
    match layer:
        case "lora":
            return w0 + own["s"] * (b @ a), 0
        case "dora":
            w = w0 + own["s"] * (b @ a)
            return w * own["m"] / norm(w), 0
        case "hira":
            return w0 + w0 * (b @ a), 0
        case "flora":
            return w0 * (b @ a), 0
        case "flora_mean":
            return w0 * (b @ a) / rank, 0
        case "ia3":
            return w0 * own["l"], 0
        case "ia3_feedforward":
            return own["l"][:, None] * w0, 0
        case "loha":
            return w0 + own["s"] * ((b @ a) * (own["d"] @ own["c"])), 0
        case "adalora":
            return w0 + own["s"] / (own["n"] + 0.00001) * ((b * own["e"]) @ a), 0
        case "beft":
            return w0, own["v"]
    raise KeyError(layer)


def doubled(own):
    """Operands in float64."""
    return {name: value if isinstance(value, float) else value.astype(np.float64) for name, value in own.items()}


def output(layer, x, w0, own, rank, bias=None):
    """``(y, magnitudes)`` in float64: the second are sums of the magnitudes of all products."""
    x, w0, own = x.astype(np.float64), w0.astype(np.float64), doubled(own)
    w, offset = weight(layer, w0, own, rank)
    sizes = {name: abs(value) for name, value in own.items()}
    # A norm is no sum of what it divides: the magnitudes are divided by the norm itself.
    if layer == "dora":
        norm = np.linalg.norm(w0 + own["s"] * (own["b"] @ own["a"]), axis=0)
        w_size, offset_size = weight(layer, abs(w0), sizes, rank, norm=lambda _: norm)
    else:
        w_size, offset_size = weight(layer, abs(w0), sizes, rank)
    y, size = x @ w + offset, abs(x) @ w_size + offset_size
    if bias is not None:
        # IA3 scales a layer's bias as well, as PEFT has it.
        own_bias = bias * own["l"] if layer == "ia3" else bias
        y, size = y + own_bias, size + abs(own_bias)
    return y, size


def bound(size, roundings, unit=2.0**-24):
    """n roundings in any order are a random walk of deviation u·√n·Σ|p|, of which four are allowed."""
    return 4 * unit * np.sqrt(roundings) * size
