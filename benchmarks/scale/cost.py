"""The cost model: what a method's step computes, moves and launches, and how long that takes at a machine's rates.

docs/costs.md has the same formulas in words. M tokens, N = out_features, K = in_features, r = r1 = r2 and R = r1 + r2,
which is LoRA's, DoRA's and HiRA's rank. Products are those that PyTorch is seen to call, numbers and launches those of
its other operations on N×K, M×N, M×K and K×K tensors (tests/test_bench_scale.py counts both). Of the package's own
kernels operations are counted from csrc/formula.h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

UPDATE_OPERATIONS = 4
"""An element's operations from P and Q to W: max, times s, sign, plus W0. fp32; the dither of bf16 has three more."""
GRADIENT_OPERATIONS = 8
"""An element's operations from H, P and Q to ∂P and ∂Q: three products, max, two bounds, sign, where P > 0."""
PACKING = 32
"""Lines that come on top along a product's shortest side, in time: operands are packed, and tiles are not full. On two
cores of an EPYC (Zen 3) three products of 1024² and 16 tokens took 3.3 times what the rate of large ones gives, of 64
tokens 1.6 times, of 256 tokens 1.1 times; 32 lines make that 3, 1.5 and 1.1."""
KEPT = 32 * 2**20
"""Bytes of a tensor up to which a CPU's allocator keeps its memory for the next: above, glibc gives it back, and gets
it in pages that have to be made, zeroed and mapped one by one."""
WORKSPACE = 32 * 2**20
"""Bytes that panels of W and H may take, the package's default."""


class Product(NamedTuple):
    """[m, k] times [k, n]."""

    m: int
    n: int
    k: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def slowed(self) -> float:
        """Operations at the rate of a large product that take as long."""
        return self.operations * (1 + PACKING / min(self))

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """Its operands and its result, each once."""
        return Sweep(1, self.m * self.k), Sweep(1, self.k * self.n), Sweep(1, self.m * self.n)


class Sweep(NamedTuple):
    """`times` that a tensor of so many `numbers` is read or written."""

    times: int
    numbers: int


@dataclass(frozen=True)
class Layer:
    """A frozen linear layer, its adapter's r1 = r2, and the tokens of a step."""

    tokens: int
    out_features: int
    in_features: int
    rank: int = 16

    @property
    def weight(self) -> int:
        """N·K."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Work:
    """What a pass does.

    products: by the vendor's library. sweeps: of elementwise operations. launches: operations of PyTorch. generation:
    operations of the package's kernels, which make W of its factors and contract H with them.
    """

    products: tuple[Product, ...] = ()
    sweeps: tuple[Sweep, ...] = ()
    launches: int = 0
    generation: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.sweeps + other.sweeps,
            self.launches + other.launches,
            self.generation + other.generation,
        )

    def times(self, count: int) -> Work:
        """The same `count` times."""
        return Work(self.products * count, self.sweeps * count, self.launches * count, self.generation * count)

    @property
    def numbers(self) -> int:
        """That elementwise operations read and write."""
        return sum(sweep.times * sweep.numbers for sweep in self.sweeps)

    @property
    def operations(self) -> int:
        """Of all products."""
        return sum(product.operations for product in self.products)


class Passes(NamedTuple):
    """A training step of one layer; with gradient checkpointing its forward pass runs twice."""

    forward: Work
    backward: Work

    def step(self, checkpointing: bool = False) -> Work:
        """Both."""
        return self.forward.times(2 if checkpointing else 1) + self.backward


@dataclass(frozen=True)
class Memory:
    """Numbers that a layer's step holds beside parameters, X, G, Y and gradients.

    saved: from forward to backward, for every layer of a model at once. transient: the most at one moment beyond that,
    for one layer at a time. workspace: whether the package's panels come on top, `WORKSPACE` at most.
    """

    saved: int
    transient: int
    workspace: bool = False

    def bytes(self, layer: Layer, itemsize: int, layers: int = 1) -> int:
        """Of a stack of as many such layers; two of the layer's panels suffice where the workspace is larger."""
        panels = min(WORKSPACE, 2 * layer.weight * itemsize) if self.workspace else 0
        return (self.saved * layers + self.transient) * itemsize + panels


@dataclass(frozen=True)
class Rates:
    """A machine's, a second: operations of products and of generation, bytes copied, and bytes copied into new memory.

    launch: seconds of a launch.
    """

    products: float
    bytes: float
    new_bytes: float
    generation: float
    launch: float

    def seconds(self, work: Work, itemsize: int) -> float:
        """A product takes its operations' time or its bytes', whichever is longer; everything else adds up."""
        products = sum(max(each.slowed / self.products, self.moving(each.sweeps, itemsize)) for each in work.products)
        launches = (len(work.products) + work.launches) * self.launch
        return products + self.moving(work.sweeps, itemsize) + work.generation / self.generation + launches

    def moving(self, sweeps: Iterable[Sweep], itemsize: int) -> float:
        """Seconds of reading and writing: large tensors are taken to be new."""
        return sum(
            times * numbers * itemsize / (self.bytes if numbers * itemsize <= KEPT else self.new_bytes)
            for times, numbers in sweeps
        )


class _Sizes(NamedTuple):
    m: int
    n: int
    k: int
    r: int
    total: int

    @staticmethod
    def of(layer: Layer) -> _Sizes:
        return _Sizes(layer.tokens, layer.out_features, layer.in_features, layer.rank, 2 * layer.rank)


def _output(at: _Sizes) -> Product:
    return Product(at.m, at.n, at.k)


def _input_gradient(at: _Sizes) -> Product:
    return Product(at.m, at.k, at.n)


def _token_product(at: _Sizes) -> Product:
    return Product(at.n, at.k, at.m)


def _rebuilt(at: _Sizes, rank: int) -> Product:
    return Product(at.n, at.k, rank)


def _contracted(at: _Sizes, rank: int) -> tuple[Product, Product]:
    return Product(at.n, rank, at.k), Product(rank, at.k, at.n)


def _frozen(at: _Sizes) -> Passes:
    return Passes(Work((_output(at),)), Work((_input_gradient(at),)))


def _floor(at: _Sizes) -> Passes:
    return Passes(Work((_output(at),)), Work((_input_gradient(at), _token_product(at))))


def _lora(at: _Sizes) -> Passes:
    m, n, k, total = at.m, at.n, at.k, at.total
    forward = Work((_output(at), Product(m, total, k), Product(m, n, total)), sweeps=(Sweep(5, m * n),), launches=2)
    thin = (Product(n, total, m), Product(m, total, n), Product(total, k, m), Product(m, k, total))
    return Passes(forward, Work((_input_gradient(at), *thin), sweeps=(Sweep(2, m * n), Sweep(3, m * k)), launches=2))


def _dora(at: _Sizes) -> Passes:
    m, n, k, total = at.m, at.n, at.k, at.total
    forward, backward = _lora(at)
    norm = Work(
        (Product(k, total, k), Product(k, n, total)),
        sweeps=(Sweep(6, n * k), Sweep(7, m * n), Sweep(1, k * k)),
        launches=9,
    )  # B A by way of the K×K identity, and the norms of W0 + s B A
    return Passes(forward + norm, backward + Work(sweeps=(Sweep(15, m * n),), launches=9))


def _loha(at: _Sizes) -> Passes:
    m, n, k, r = at.m, at.n, at.k, at.r
    rebuilt = (_rebuilt(at, r),) * 2
    forward = Work((_output(at),) * 2 + rebuilt, sweeps=(Sweep(5, n * k), Sweep(3, m * n)), launches=6)
    products = (*(_input_gradient(at),) * 2, _token_product(at), *rebuilt, *_contracted(at, r) * 2)
    return Passes(forward, Work(products, sweeps=(Sweep(8, n * k), Sweep(3, m * k)), launches=4))


def _hira(at: _Sizes) -> Passes:
    m, n, k, total = at.m, at.n, at.k, at.total
    forward = Work((*(_output(at),) * 2, Product(k, n, total)), sweeps=(Sweep(3, n * k), Sweep(3, m * n)), launches=2)
    products = (*(_input_gradient(at),) * 2, _token_product(at), *_contracted(at, total))
    return Passes(forward, Work(products, sweeps=(Sweep(3, n * k), Sweep(3, m * k)), launches=2))


def _naive(at: _Sizes) -> Passes:
    forward = Work((_output(at), *(_rebuilt(at, at.r),) * 2), sweeps=(Sweep(14, at.n * at.k),), launches=8)
    products = (_input_gradient(at), _token_product(at), *_contracted(at, at.r) * 2)
    return Passes(forward, Work(products, sweeps=(Sweep(13, at.n * at.k),), launches=5))


def _dual_lora(at: _Sizes) -> Passes:
    forward = Work((_output(at),), generation=at.n * at.k * (2 * at.total + UPDATE_OPERATIONS), launches=1)
    each = 6 * at.total + UPDATE_OPERATIONS + GRADIENT_OPERATIONS  # P and Q once for ∂X and for H, and the contraction
    return Passes(forward, Work((_input_gradient(at), _token_product(at)), generation=at.n * at.k * each, launches=1))


def _dual_lora_eager(at: _Sizes) -> Passes:
    rebuilt = (_rebuilt(at, at.r),) * 2
    backward = (_input_gradient(at), _token_product(at), *rebuilt * 2, *_contracted(at, at.r) * 2)
    return Passes(Work((_output(at), *rebuilt)), Work(backward))


@dataclass(frozen=True)
class Method:
    """passes: of a step. memory: of the same. note: what the formula leaves out, if anything."""

    passes: Callable[[_Sizes], Passes]
    memory: Callable[[_Sizes], Memory]
    note: str | None = field(default=None)


METHODS: Mapping[str, Method] = {
    "frozen": Method(_frozen, lambda _: Memory(0, 0)),
    "floor": Method(_floor, lambda at: Memory(at.m * at.k, at.n * at.k)),
    "lora": Method(_lora, lambda at: Memory(at.m * (at.k + at.total), 2 * at.m * at.n)),
    "dora": Method(
        _dora,
        lambda at: Memory(at.m * (at.k + 2 * at.n + at.total) + at.k * (at.k + at.total), 3 * at.n * at.k),
    ),
    "loha": Method(_loha, lambda at: Memory(at.m * at.k + at.n * at.k, 4 * at.n * at.k)),
    "hira": Method(_hira, lambda at: Memory(at.m * at.k + at.n * at.k, at.n * at.k)),
    "naive": Method(_naive, lambda at: Memory(at.m * at.k + 5 * at.n * at.k, 2 * at.n * at.k)),
    "dual_lora_eager": Method(
        _dual_lora_eager,
        lambda at: Memory(at.m * at.k, 0, workspace=True),
        "elementwise operations, which are in cache",
    ),
    "dual_lora": Method(_dual_lora, lambda at: Memory(at.m * at.k, 0, workspace=True)),
}
"""Subjects that the model covers."""
PREDICTED = tuple(name for name, method in METHODS.items() if method.note is None)
"""Those whose time it gives."""


def passes(method: str, layer: Layer) -> Passes:
    """A training step's forward and backward pass.

    Raises:
        ValueError: the model has no such method.
    """
    return _method(method).passes(_Sizes.of(layer))


def memory(method: str, layer: Layer) -> Memory:
    """What the step holds; `passes`' errors."""
    return _method(method).memory(_Sizes.of(layer))


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name]


def step_seconds(method: str, layer: Layer, rates: Rates, itemsize: int, checkpointing: bool = False) -> float:
    """A training step's time at a machine's rates; `passes`' errors."""
    return rates.seconds(passes(method, layer).step(checkpointing), itemsize)


def merging(layer: Layer) -> Work:
    """`dual_lora_merge_`: W over W0, once."""
    return Work(generation=layer.weight * (2 * 2 * layer.rank + UPDATE_OPERATIONS), launches=1)


def decoding(layer: Layer) -> Work:
    """An unmerged forward pass over few tokens: as a step's, but that W is not written to memory."""
    return passes("dual_lora", layer).forward
