"""A plain PyTorch module whose rows belong to adapters of four kinds, in one call, and what each of them would be by itself.

    python examples/python/mixed_batch.py
"""

import time

import torch

import flora.torch


def main():
    torch.manual_seed(0)
    d, k, rows = 576, 960, 64
    linear = torch.nn.Linear(d, k)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    layer = flora.AdaptedLinear(weight, bias)

    b, a = torch.randn(d, 4) / d**0.5, torch.randn(4, k)
    factors = 1 + torch.randn(d, 2) / 4, 1 + torch.randn(2, k) / 4
    scales = 1 + torch.randn(k) / 4
    layer.put(0, "lora", {"b": b, "a": a, "s": 2.0})
    layer.put(1, "flora", {"b": factors[0], "a": factors[1]})
    layer.put(2, "ia3", {"l": scales})
    layer.put(3, "hira", {"b": b, "a": a})

    x = torch.randn(rows, d)
    slots = torch.arange(rows) % 5 - 1
    y = flora.torch.adapted_linear(x, slots, layer)

    alone = {
        -1: lambda x: linear(x),
        0: lambda x: linear(x) + 2 * (x @ b) @ a,
        1: lambda x: x @ (weight.T * (factors[0] @ factors[1])) + bias,
        2: lambda x: linear(x) * scales,
        3: lambda x: linear(x) + x @ (weight.T * (b @ a)),
    }
    with torch.no_grad():
        for slot, compute in alone.items():
            own = slots == slot
            print(f"slot {slot:2}: {int(own.sum())} rows, largest difference {(y[own] - compute(x[own])).abs().max():.1e}")

        def seconds(work):
            times = []
            for _ in range(200):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            return sorted(times)[100]

        mixed = seconds(lambda: flora.torch.adapted_linear(x, slots, layer))
        base = seconds(lambda: linear(x))
        print(f"{mixed * 1e6:.0f} us for the mixed batch, {base * 1e6:.0f} us for PyTorch's base rows alone, on {flora.get_num_threads()} threads")


if __name__ == "__main__":
    main()
