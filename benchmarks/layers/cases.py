"""One layer's training step, and a few tokens through unmerged layers: each subject checked, timed, its memory traced.

A step is a forward and a backward pass that returns the output, the input's and the parameters' gradients. It is
compared with the floor, the three products of its shape by the vendor's library. Decoding is the forward pass without
gradients, in evaluation mode, compared with ``F.linear`` on W0 alone. It goes through as many layers in turn as no
cache holds, as a model's pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import nn

from dual_lora_kernels import DualLoraLinear
from dual_lora_kernels.tuning.device_time import copies

from ..harness.environment import DTYPE_NAMES
from ..harness.results import Case, Measurement, Setting
from ..harness.timing import interleaved
from .checks import Checker, refusal
from .claims import SEED, Layer
from .layer_step import FLOOR, floor_step, step
from .memory import peak_temporary_bytes
from .methods import LABELS, METHODS, build, frozen_linear, trainable_parameters

FROZEN, PREPARED, MERGED = "frozen", "dual_lora_prepared", "dual_lora_merged"
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


@dataclass
class _Subjects:
    """What is to be timed, and what is known of it already."""

    runs: dict[str, Run] = field(default_factory=dict)
    trainable: dict[str, int] = field(default_factory=dict)
    checked: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def unless_it_fails(self, name: str) -> Iterator[None]:
        """Whatever a subject cannot do, the others are still to be measured."""
        try:
            yield
        except Exception as error:
            self.runs.pop(name, None)
            self.left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    def decide(self, name: str, errors: Mapping[str, float], run: Run) -> None:
        """Take a subject in if its errors are allowed."""
        reason = refusal(errors)
        self.checked[name] = {key: round(error, 4) for key, error in errors.items() if error < float("inf")}
        if reason is None:
            self.runs[name] = run
        else:
            self.left_out[name] = reason


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
    found = _Subjects()
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
    traces: dict[str, dict[str, int]] = {}
    for name in _shown([name for name in found.runs if name != FLOOR], f"tracing memory, {shape}", console):
        trace = peak_temporary_bytes(found.runs[name], device)
        traces[name] = {"temporary": trace.peak_temporary, "peak": trace.peak}
    return _case(shape.settings("step"), FLOOR, (FLOOR, *subjects), found, seconds, traces)


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
    found = _Subjects()
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
    return _case(shape.settings("decode"), FROZEN, (FROZEN, *subjects), found, seconds, {}, {"layers_in_turn": count})


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


def _timed(found: _Subjects, rounds: int, device: torch.device, console: Console | None) -> Mapping[str, list[float]]:
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


def _case(
    settings: Mapping[str, Setting],
    reference: str,
    names: Sequence[str],
    found: _Subjects,
    seconds: Mapping[str, Sequence[float]],
    traces: Mapping[str, dict[str, int]],
    counts: Mapping[str, float] | None = None,
) -> Case:
    subjects = {
        name: Measurement(
            seconds=tuple(seconds.get(name, ())),
            trainable=found.trainable.get(name),
            checked=found.checked.get(name, {}),
            bytes=traces.get(name, {}),
            counts=counts or {},
            left_out=found.left_out.get(name),
        )
        for name in names
    }
    return Case(settings, reference, subjects)
