"""One layer's training step, and a few tokens through unmerged layers: each subject checked, timed, its memory traced.

A step is a forward and a backward pass that returns the output, the input's and the parameters' gradients. It is
compared with the floor, the three products of its shape by the vendor's library. Decoding is the forward pass without
gradients, in evaluation mode, compared with ``F.linear`` on W0 alone. It goes through as many layers in turn as no
cache holds, as a model's pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from dual_lora_kernels import DualLoraLinear
from dual_lora_kernels.tuning.device_time import copies

from ..harness.environment import DTYPE_NAMES
from ..harness.results import Case, Setting
from ..harness.timing import interleaved
from .checks import Checker
from .claims import SEED, Layer
from .layer_step import FLOOR, floor_step, step
from .methods import FROZEN, LABELS, MERGED, METHODS, PREPARED, build, frozen_linear, trainable_parameters
from .subjects import Subjects

STEP_SUBJECTS = tuple(METHODS)
DECODE_SUBJECTS = ("lora", "dora", "dual_lora_eager", "dual_lora", "dual_lora_peft", PREPARED, MERGED)
"""Besides the reference."""
_ENOUGH_SECONDS = 10.0
"""Small layers are timed in more rounds than asked for, as many as take so long, but no more than `_MOST_ROUNDS`."""
_MOST_ROUNDS = 201
_IN_TURN_BYTES = 2**28
"""Weights that decoding goes through on a CPU: eight times the last-level cache that a process has of an EPYC's."""
_MOST_IN_TURN = 64

Run = Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Shape:
    """One layer [out_features, in_features] and M tokens; `dtype` by its short name, `rank` is r1 = r2."""

    out_features: int
    in_features: int
    tokens: int
    dtype: str = "fp32"
    rank: int = 16

    def settings(self, kind: str) -> dict[str, Setting]:
        """As results have them."""
        return {
            "kind": kind,
            "dtype": self.dtype,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "tokens": self.tokens,
            "rank": self.rank,
            "base": "dense",
        }

    def __str__(self) -> str:
        return f"{self.dtype}, {self.out_features} × {self.in_features}, {self.tokens} tokens, r1 = r2 = {self.rank}"


def step_case(
    shape: Shape,
    subjects: Sequence[str] = STEP_SUBJECTS,
    *,
    rounds: int = 7,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Case:
    """Check, time and trace a training step of `subjects`, names of `METHODS`, beside the floor.

    What fails or computes something else than it claims is in the case with the reason, as ``left_out``.
    """
    device, dtype = torch.device(device), DTYPE_NAMES[shape.dtype]
    torch.compiler.reset()  # or it would stop compiling after eight modules
    torch.manual_seed(0)
    linear = frozen_linear(shape.in_features, shape.out_features, dtype, device)
    x = torch.randn(shape.tokens, shape.in_features, dtype=dtype, device=device).requires_grad_()
    grad = torch.randn(shape.tokens, shape.out_features, dtype=dtype, device=device)
    checker = Checker(Layer(linear.weight.detach(), x, grad, shape.rank))
    found = Subjects()
    for name in _shown((FLOOR, *subjects), f"checking a step, {shape}", console):
        with found.unless_it_fails(name):
            if name == FLOOR:
                run: Run = floor_step(linear.weight, x, grad)
                names = ["weight"]
            else:
                module = build(name, linear, shape.rank, shape.rank)
                names = checker.give_values(name, module)
                found.trainable[name] = sum(parameter.numel() for parameter in trainable_parameters(module))
                run = step(module, x, grad)
            torch.manual_seed(SEED)
            found.decide(name, checker.errors(name, run(), names), run)
    if FLOOR in found.left_out:
        raise RuntimeError(f"{shape}: the floor {found.left_out[FLOOR]}")
    del checker  # its fp64 tensors
    seconds = _timed(found, rounds, device, console)
    others = _shown([name for name in found.runs if name != FLOOR], f"tracing memory, {shape}", console)
    traces = found.traced(device, ("temporary", "peak"), others)
    return found.case(shape.settings("step"), FLOOR, (FLOOR, *subjects), seconds, traces)


def decode_case(
    shape: Shape,
    subjects: Sequence[str] = DECODE_SUBJECTS,
    *,
    rounds: int = 7,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Case:
    """Check and time `shape.tokens` tokens through `subjects`, beside ``F.linear`` on W0. Seconds are a layer's.

    Subjects: names of `METHODS` that are not compiled, `PREPARED` and `MERGED`. Left out as in `step_case`.
    """
    device, dtype = torch.device(device), DTYPE_NAMES[shape.dtype]
    torch.manual_seed(0)
    count = _layers_in_turn(shape, dtype, device)
    linears = [frozen_linear(shape.in_features, shape.out_features, dtype, device) for _ in range(count)]
    x = torch.randn(shape.tokens, shape.in_features, dtype=dtype, device=device)
    checkers = [Checker(Layer(linear.weight.detach(), x, None, shape.rank)) for linear in linears]
    found = Subjects()
    for name in _shown((FROZEN, *subjects), f"checking decoding, {shape}", console):
        with found.unless_it_fails(name):
            modules = [
                _ready(name, linear, checker, shape.rank) for linear, checker in zip(linears, checkers, strict=True)
            ]
            found.trainable[name] = sum(parameter.numel() for parameter in trainable_parameters(modules[0]))
            run = _in_turn(modules, x)
            errors = [checker.errors(name, [y]) for checker, y in zip(checkers, run(), strict=True)]
            found.decide(name, {key: max(each[key] for each in errors) for key in errors[0]}, run)
    if FROZEN in found.left_out:
        raise RuntimeError(f"{shape}: the layer without an adapter {found.left_out[FROZEN]}")
    del checkers
    seconds = {name: [time / count for time in times] for name, times in _timed(found, rounds, device, console).items()}
    return found.case(shape.settings("decode"), FROZEN, (FROZEN, *subjects), seconds, {}, {"layers_in_turn": count})


def _layers_in_turn(shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
    weight_bytes = shape.out_features * shape.in_features * dtype.itemsize
    if device.type == "cuda":
        return copies(weight_bytes, device)
    return max(1, min(_MOST_IN_TURN, -(-_IN_TURN_BYTES // weight_bytes)))


def _ready(name: str, linear: nn.Linear, checker: Checker, rank: int) -> nn.Module:
    module = build("dual_lora" if name in (PREPARED, MERGED) else name, linear, rank, rank)
    checker.give_values(name, module)
    module.eval()
    if name in (PREPARED, MERGED):
        assert isinstance(module, DualLoraLinear)
        if name == MERGED:
            return module.to_linear()
        module.prepare()
    return module


def _in_turn(modules: Sequence[nn.Module], x: torch.Tensor) -> Run:
    def run() -> list[torch.Tensor]:
        with torch.no_grad():
            return [module(x) for module in modules]

    return run


def _timed(found: Subjects, rounds: int, device: torch.device, console: Console | None) -> Mapping[str, list[float]]:
    """Seconds by round, after one that is not counted: at least `rounds`, more where they are short."""
    show = console is not None and console.is_terminal
    warmed = interleaved(found.runs, rounds=1, warmup=0, device=device, show=False)
    a_round = sum(times[0] for times in warmed.values())
    enough = min(_MOST_ROUNDS, max(rounds, int(_ENOUGH_SECONDS / a_round)))
    return interleaved(found.runs, rounds=enough, warmup=0, device=device, console=console, show=show)


def _shown(names: Sequence[str], what: str, console: Console | None) -> Iterator[str]:
    """The names, with a line on the terminal that says which is at work."""
    with (console or Console(quiet=True)).status(what) as status:
        for name in names:
            status.update(f"{what}: {LABELS[name]}")
            yield name
