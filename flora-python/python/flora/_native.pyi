"""The native module: everything here takes addresses. Use the package's own functions, which check what they pass."""

from os import PathLike
from typing import Optional, Union

# The address of the first number, the type's name, extents, and numbers from one place to the next.
_Described = tuple[int, str, tuple[int, ...], tuple[int, ...]]

__version__: str

class ClosedError(RuntimeError): ...

# Whether this build has the classes below that begin with Cuda.
has_cuda: bool

class OtherLaunchesError(RuntimeError): ...

class CudaLinear:
    parts: list[int]
    compiled: int
    def __init__(self, handle: int, card: int, includes: list[str]) -> None: ...
    def batch(self, slots: int, rows: int, stream: int) -> CudaBatch: ...

class CudaBatch:
    def assign(self, slots: int, rows: int, stream: int) -> bool: ...
    def refresh(self, stream: int) -> bool: ...
    # (address, bytes)
    def forward(self, x: tuple[int, int], y: list[tuple[int, int]], stream: int) -> None: ...

class Linear:
    handle: int
    in_features: int
    out_features: int
    parts: list[int]
    slots: int
    activations: str
    def __init__(
        self,
        weight: _Described,
        bias: Optional[_Described],
        parts: Optional[list[int]],
        slots: int,
        activations: Optional[str],
    ) -> None: ...
    def put(self, slot: int, part: int, layer: str, operands: dict[str, _Described]) -> None: ...
    def put_adapter(
        self,
        slot: int,
        part: int,
        adapter: Adapter,
        module: str,
        inputs: Optional[tuple[int, int]],
        outputs: Optional[tuple[int, int]],
    ) -> None: ...
    def clear(self, slot: int, part: Optional[int]) -> None: ...
    def forward(self, x: int, x_stride: int, slots: int, rows: int, y: int, y_stride: int) -> None: ...
    def unpack(self, out: int, rows: int, width: int, stride: int) -> None: ...
    def close(self) -> None: ...

class Adapter:
    name: str
    kind: str
    modules: list[str]
    @staticmethod
    def open(folder: Union[str, PathLike[str]]) -> Adapter: ...
    def layer_of(self, module: str) -> str: ...
    def rank_of(self, module: str) -> int: ...

def forward_handle(handle: int, x: int, x_stride: int, slots: int, rows: int, y: int, y_stride: int) -> None: ...
def describe_handle(handle: int) -> tuple[int, int, str]: ...
def trained_forward(
    handle: int,
    adapters: list[tuple[str, list[_Described]]],
    x: int,
    x_stride: int,
    slots: int,
    rows: int,
    y: int,
    y_stride: int,
) -> None: ...
def trained_backward(
    handle: int,
    adapters: list[tuple[str, list[_Described]]],
    x: int,
    g: int,
    slots: int,
    rows: int,
    dx: int,
    gradients: list[int],
) -> None: ...
def input_gradient(handle: int, x: int, g: int, slots: int, rows: int, dx: int) -> None: ...
def layer_names() -> list[str]: ...
def layer_operands(layer: str) -> list[str]: ...
def set_num_threads(threads: int) -> None: ...
def get_num_threads() -> int: ...
def instruction_set() -> str: ...

# The address of the first row's first number, and numbers from one row to the next.
_At = tuple[int, int]

class Folded:
    inputs: int
    outputs: int
    rank: int
    scales_inputs: bool
    def __init__(
        self,
        adapter: Adapter,
        module: str,
        inputs: int,
        outputs: int,
        weight: Optional[_Described],
        bias: Optional[_Described],
    ) -> None: ...

class Attached:
    slots: int
    bytes: int
    def __init__(self, inputs: int, parts: list[int], slots: int, activations: str, adapters: str) -> None: ...
    def put(
        self, slot: int, part: int, folded: Folded, inputs: Optional[list[int]], outputs: Optional[list[int]]
    ) -> None: ...
    def put_low_rank(self, slot: int, part: int, shrink: _Described, expand: _Described) -> None: ...
    def clear(self, slot: int) -> None: ...
    def work(self, slots: int, rows: int) -> int: ...
    def add(self, x: _At, slots: int, rows: int, y: _At) -> None: ...
    def virtual_inputs(self, slots: int, rows: int, by_parts: bool) -> list[int]: ...
    def expand(
        self, by_parts: bool, group: int, x: _At, slots: int, rows: int, out: _At, out_rows: int
    ) -> None: ...
    def combine(
        self,
        by_parts: bool,
        products: list[tuple[int, int, int, int]],
        bias: Optional[int],
        x: _At,
        slots: int,
        rows: int,
        y: _At,
    ) -> None: ...

def reads_base(adapter: Adapter, module: str) -> bool: ...
