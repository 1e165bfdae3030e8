"""What Triton compiles to, without a GPU: an ordinary matrix product, and vLLM's kernels for LoRA.

Prints a JSON array of kernels, each with `title`, `architecture`, `source` ("memory" where what the main loop reads is read
once, as the weight of a decode batch; "cache" where other blocks read the same) and `ptx`. `cargo xtask machine-code` starts
this program, assembles the PTX with the assembler that flora's kernels go through, and prints the same columns.

    python machine_code.py                  # the product alone
    python machine_code.py --vllm FOLDER    # and vLLM's, from an unpacked source distribution of it

Needs Triton 3.5 (`pip install triton==3.5.1`) and, for vLLM's kernels, PyTorch, which their files import.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError as error:
    sys.exit(f"error: Triton can't be imported ({error}); pip install triton==3.5.1")

ARCHITECTURES = (80, 90)


@triton.jit
def product(
    x, w, y, rows, columns, depth, x_line, w_line, y_line, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
):
    """y = x w for x [rows, depth], w [depth, columns]; a block makes ROWS x COLUMNS of it, DEPTH at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, DEPTH)
    x_tile = x + row[:, None] * x_line + step[None, :]
    w_tile = w + step[:, None] * w_line + column[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, depth, DEPTH):
        left = tl.load(x_tile, mask=row[:, None] < rows, other=0.0)
        right = tl.load(w_tile, mask=column[None, :] < columns, other=0.0)
        sums = tl.dot(left, right, sums)
        x_tile += DEPTH
        w_tile += DEPTH * w_line
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(y + row[:, None] * y_line + column[None, :], sums.to(y.dtype.element_ty), mask=inside)


# (title, rows, columns, depth, warps, stages, source): tiles that Triton's tutorials and autotuners use for these sizes.
PRODUCTS = (
    ("Triton matmul, prefill", 128, 128, 64, 8, 3, "cache"),
    ("Triton matmul, 16 rows", 16, 64, 128, 4, 4, "memory"),
)
DTYPES = {"f16": "*fp16", "bf16": "*bf16"}


def compiled(function, types_by_name: dict, constants: dict, architecture: int, warps: int, stages: int, unaligned=()):
    """The PTX of a kernel for arguments of these types, pointers and extents taken as multiples of 16 but for `unaligned`."""
    names = function.arg_names
    signature = {name: types_by_name.get(name, "constexpr") for name in names}
    aligned = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(names)
        if name in types_by_name and types_by_name[name] != "fp32" and name not in unaligned
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages}).asm["ptx"]


def products():
    for architecture in ARCHITECTURES:
        for dtype, pointer in DTYPES.items():
            for title, rows, columns, depth, warps, stages, source in PRODUCTS:
                types_by_name = {name: pointer for name in ("x", "w", "y")}
                types_by_name |= {name: "i32" for name in ("rows", "columns", "depth", "x_line", "w_line", "y_line")}
                constants = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth}
                ptx = compiled(product, types_by_name, constants, architecture, warps, stages)
                yield {
                    "title": f"{title} {rows}x{columns}x{depth} {dtype}",
                    "architecture": f"sm_{architecture}",
                    "source": source,
                    "ptx": ptx,
                }


class Anything(types.ModuleType):
    """A module in which everything is found: what vLLM's files import beside Triton and don't need to be compiled."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "direct_register_custom_op":
            # To register none is what their files expect where it can't be done.
            raise AttributeError(name)
        return Anything(f"{self.__name__}.{name}")

    def __call__(self, *arguments, **options):
        return self


def vllm_kernels(folder: Path) -> dict:
    """The shrink and expand kernels in vLLM's files, imported without the rest of vLLM."""
    place = folder / "vllm" / "lora" / "ops" / "triton_ops"
    if not place.is_dir():
        sys.exit(f"error: {place} isn't there; --vllm names an unpacked source distribution of vLLM")
    for name in ("vllm", "vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops"):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [str(place)] if name.endswith("triton_ops") else []
    for name in ("vllm.platforms", "vllm.utils", "vllm.utils.torch_utils", "vllm.distributed", "vllm.logger", "vllm.envs"):
        sys.modules[name] = Anything(name)
    sys.modules["vllm.utils"].__dict__["direct_register_custom_op"] = registers_nothing
    sys.modules["vllm.triton_utils"] = types.ModuleType("vllm.triton_utils")
    sys.modules["vllm.triton_utils"].__dict__.update(tl=tl, triton=triton)
    return {
        kind: getattr(importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{kind}_op"), f"_lora_{kind}_kernel")
        for kind in ("shrink", "expand")
    }


def registers_nothing(*_arguments, **_options):
    raise AttributeError("nothing is registered")


# (title, kernel, what its launch gives for rank 16 and one slice of a 4096-wide layer, stages, source): as vLLM 0.10.2
# launches it for fewer than 128 tokens, and for more.
SHRINK = {"BLOCK_M": 32, "BLOCK_N": 16, "SLICE_NUM": 1}
EXPAND = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16, "EVEN_K": True, "SLICE_NUM": 1}
EXPAND |= {"ADD_INPUTS": True, "CAST_TYPE": True, "SAME_STRIDE": True}
LAUNCHES = (
    ("vLLM LoRA shrink, decode", "shrink", SHRINK | {"BLOCK_K": 256, "SPLIT_K": 64, "EVEN_K": False}, "memory"),
    ("vLLM LoRA shrink, prefill", "shrink", SHRINK | {"BLOCK_K": 32, "SPLIT_K": 8, "EVEN_K": True}, "cache"),
    ("vLLM LoRA expand", "expand", EXPAND, "memory"),
)
# The kernels' pointers to other things than numbers of the model.
TABLES = ("token_indices_sorted_by_lora_ids", "num_tokens_per_lora", "lora_token_start_loc", "lora_ids")


def vllm(folder: Path):
    kernels = vllm_kernels(folder)
    for architecture in ARCHITECTURES:
        for title, kind, constants, source in LAUNCHES:
            function = kernels[kind]
            # Sums of the shrink are f32: atomically added, and cast as the expand reads them.
            f32 = "out_ptr" if kind == "shrink" else "input_ptr"
            types_by_name = {}
            for name in function.arg_names:
                if name in constants:
                    continue
                if name in TABLES:
                    types_by_name[name] = "*i32"
                elif name in ("input_ptr", "lora_ptr", "out_ptr"):
                    types_by_name[name] = "*fp32" if name == f32 else "*fp16"
                else:
                    types_by_name[name] = "fp32" if name == "scaling" else "i32"
            # Strides of 1 are known to be 1 when Triton compiles for a launch.
            ones = {"input_d1_stride", "lora_d2_stride", "output_d2_stride"}
            if kind == "expand":
                ones = {"input_d2_stride", "ls_d2_ptr", "output_d1_stride"}
            for name in ones:
                types_by_name.pop(name)
            given = constants | {name: 1 for name in ones}
            # Where a slice starts is 0 here, which Triton takes for no multiple of anything in particular.
            ptx = compiled(function, types_by_name, given, architecture, 4, 2, unaligned=("slice_start_loc",))
            yield {"title": f"{title} f16", "architecture": f"sm_{architecture}", "source": source, "ptx": ptx}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path, metavar="FOLDER", help="an unpacked source distribution of vLLM")
    given = parser.parse_args()
    found = list(products())
    if given.vllm is not None:
        found += vllm(given.vllm)
    print(f"Triton {triton.__version__}", file=sys.stderr)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
