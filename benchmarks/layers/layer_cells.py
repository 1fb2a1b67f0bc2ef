"""A layer's training step and its decoding, every method and strategy against the products no method can avoid.

A cell is one layer [N, K], one M, and one way to launch: ``plain`` launches from Python, ``graph`` replays one captured
CUDA (HIP) graph, so that only the device's time counts, and ``compiled`` runs modules under torch.compile. A cell of
few tokens runs over as many layers in turn as no cache holds, as a model does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dual_lora_kernels import settings
from dual_lora_kernels.tuning.device_time import captured, copies
from dual_lora_kernels.tuning.kernel_calls import RANK

from ..harness.timing import interleaved, quartiles, ratios
from .checks import Checker
from .claims import SEED, Layer
from .layer_step import FLOOR, floor_step, step
from .methods import FROZEN, LABELS, build, frozen_linear
from .subjects import Subjects

STRATEGIES = ("auto", "fused", "panels")
PEERS = ("lora", "dora", "naive")
SAMPLED = ("dual_lora_half", "dual_lora_quarter")
"""Training steps with gradients from a part of the columns; they decode as the others."""
COMPILED_PEERS = ("dora",)
"""Compiling takes seconds a method, so only the peer that a goal names is compiled too."""
SUBJECTS = {name: {"auto": "dual_lora"}.get(name, f"dual_lora_{name}") for name in STRATEGIES}
"""A strategy of this package's → the subject; other subjects have one name everywhere."""
CELL_LABELS = {
    **{name: f"dual_lora_kernels, {name}" for name in STRATEGIES},
    **{n: LABELS[n] for n in (FLOOR, *SAMPLED, *PEERS)},
}
MODES = ("plain", "graph", "compiled")
LLAMA_8B = ((4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096))
LLAMA_70B = ((8192, 8192), (28672, 8192), (8192, 28672), (1024, 8192))
TOKENS = (4096, 16384, 1024, 256, 64, 16, 4, 1)
DECODE_TOKENS = (1, 16, 4)
_CACHED_TOKENS = 1024
"""Up to here reading W takes a share of a step's time that matters, so layers are used in turn."""
_LIMIT = 1.0
"""Seconds after which a cell has rounds enough, be they three."""
Call = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Cell:
    """One measurement. `kind`: ``"step"``, forward and backward, or ``"decode"``, the forward pass alone."""

    kind: str
    mode: str
    rows: int
    columns: int
    tokens: int

    @property
    def label(self) -> str:
        """For the progress bar."""
        return f"{self.kind}, {self.mode}, {self.rows}x{self.columns}, M={self.tokens}"


def cells(near: Sequence[tuple[int, int]] = LLAMA_8B, far: Sequence[tuple[int, int]] = LLAMA_70B) -> list[Cell]:
    """Everything, in the order of value: the goals on the near layers, their other M, compiled, the far layers."""

    def every(kind: str, mode: str, layers: Sequence[tuple[int, int]], tokens: Sequence[int]) -> list[Cell]:
        return [Cell(kind, mode, *layer, m) for m in tokens for layer in layers]

    order = [
        *every("step", "graph", near, TOKENS[:1]),
        *every("decode", "graph", near, DECODE_TOKENS[:2]),
        *every("step", "plain", near[:2], TOKENS[:1]),
        *every("decode", "plain", near[:2], DECODE_TOKENS[:2]),
        *every("step", "graph", near, TOKENS[1:5]),
        *every("step", "graph", far, TOKENS[:1]),
        *every("decode", "graph", far, DECODE_TOKENS[:2]),
        *every("step", "compiled", near[1:2], TOKENS[:1]),
        *every("decode", "compiled", near[1:2], DECODE_TOKENS[:1]),
        *every("step", "plain", near, TOKENS),
        *every("decode", "plain", near, DECODE_TOKENS),
        *every("step", "graph", near, TOKENS),
        *every("decode", "graph", near, DECODE_TOKENS),
        *every("step", "graph", far, TOKENS),
        *every("decode", "graph", far, DECODE_TOKENS),
        *every("step", "compiled", near, TOKENS),
        *every("decode", "compiled", near, DECODE_TOKENS),
        *every("step", "plain", far, TOKENS),
        *every("decode", "plain", far, DECODE_TOKENS),
    ]
    return list(dict.fromkeys(order))


def candidates(cell: Cell) -> tuple[str, ...]:
    """What a cell measures besides the floor."""
    if cell.mode == "compiled":
        return *STRATEGIES, *COMPILED_PEERS
    return *STRATEGIES, *(SAMPLED if cell.kind == "step" else ()), *PEERS


def measure(cell: Cell, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds by round, microseconds and ratios to the floor of every candidate that runs, and why the others do not.

    Times are of one layer. The floor: three products for a step, F.linear on W0 alone for decoding. Before it is timed,
    each candidate is held to what it claims (`checks`), on the first layer and by a plain launch.
    """
    names = candidates(cell)
    if cell.mode == "compiled":
        torch.compiler.reset()  # or it would stop compiling after eight modules
    linears = _layers(cell, device)
    x = torch.randn(cell.tokens, cell.columns, device=device, dtype=torch.bfloat16)
    grad = torch.randn(cell.tokens, cell.rows, device=device, dtype=torch.bfloat16)
    if cell.kind == "step":
        x.requires_grad_()
    checker = Checker(Layer(linears[0].weight.detach(), x, grad if cell.kind == "step" else None, RANK))
    found = Subjects()
    modules: dict[str, list[nn.Module]] = {}
    for name in (FLOOR, *names):
        with found.unless_it_fails(name):
            claim, strategy = SUBJECTS.get(name, name), name if name in STRATEGIES else "auto"
            if name == FLOOR:
                calls = [_floor(cell, linear.weight, x, grad) for linear in linears]
                claim, parameters = (FLOOR, ["weight"]) if cell.kind == "step" else (FROZEN, [])
            else:
                method = "dual_lora" if name in STRATEGIES else name
                if method not in modules:
                    modules[method] = [_module(cell, method, linear) for linear in linears]
                calls = [_own(cell, module, x, grad) for module in modules[method]]
                parameters = checker.give_values(claim, modules[method][0])
            torch.manual_seed(SEED)  # of the columns that the claims of sampled gradients take
            with settings(strategy=strategy):
                errors = checker.errors(claim, calls[0](), parameters)
            run = _in_turn(calls, strategy)
            launched = captured(run) if cell.mode == "graph" else run
            launched()
            found.decide(name, errors, launched)
    if FLOOR in found.left_out:
        raise RuntimeError(f"the floor {found.left_out[FLOOR]}")
    del checker  # with the truths, several times as large as the layer
    runs = found.runs
    seconds = interleaved(runs, rounds=rounds, warmup=1, device=device, limit=_LIMIT, show=False)
    return {
        **dataclasses.asdict(cell),
        "layers_in_turn": len(linears),
        "seconds": {name: [value / len(linears) for value in times] for name, times in seconds.items()},
        "microseconds": {name: quartiles(times).median * 1e6 / len(linears) for name, times in seconds.items()},
        "to_floor": {name: dataclasses.asdict(ratios(seconds, name, FLOOR)) for name in runs if name != FLOOR},
        "to_dora": {name: ratios(seconds, name, "dora").median for name in STRATEGIES if {name, "dora"} <= runs.keys()},
        "checked": found.checked,
        "left_out": found.left_out,
    }


def _layers(cell: Cell, device: torch.device) -> list[nn.Linear]:
    # torch.compile compiles every module anew, so a compiled cell has one, and layers too large for a cache.
    in_turn = cell.tokens <= _CACHED_TOKENS and cell.mode != "compiled"
    count = copies(cell.rows * cell.columns * 2, device) if in_turn else 1
    return [frozen_linear(cell.columns, cell.rows, torch.bfloat16, device) for _ in range(count)]


def _module(cell: Cell, method: str, linear: nn.Linear) -> nn.Module:
    module = build(method, linear, RANK, RANK).train(cell.kind == "step")
    if cell.mode != "compiled":
        return module
    module.compile(dynamic=False)
    return module


def _floor(cell: Cell, weight: torch.Tensor, x: torch.Tensor, grad: torch.Tensor) -> Call:
    if cell.kind == "step":
        return floor_step(weight, x, grad)
    return lambda: (nn.functional.linear(x, weight),)


def _own(cell: Cell, module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Call:
    if cell.kind == "step":
        return step(module, x, grad)

    def run() -> tuple[torch.Tensor]:
        with torch.no_grad():
            return (module(x),)

    return run


def _in_turn(calls: Sequence[Call], strategy: str) -> Callable[[], None]:
    def run() -> None:
        with settings(strategy=strategy):
            for call in calls:
                call()

    return run
