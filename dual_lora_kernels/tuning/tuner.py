"""Times tile shapes on the GPU at hand and rewrites that GPU family's entries of ``tile_shapes.json``.

    dual-lora tune [--kernels forward token_product ...] [--minutes 6] [--out FILE]

Every candidate runs as the package runs it, on layers of bf16 with fp32 factors, from a replayed graph (launches cost
nothing) on operands that no cache holds. A candidate's score is its time over the current shape's, the geometric mean
over the layers; the fastest whose results agree with the current shape's wins. W must agree bit for bit in every
kernel that rebuilds it. Then fused passes are timed against panels, which decides ``fused_up_to``. The table is written
after every kernel, so a stopped run keeps what it has measured.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from triton.errors import TritonError

from .. import panels
from ..backends import resolve_backend
from ..backends.triton.architecture import Architecture, architecture
from ..backends.triton.shapes import PATH, TABLE, ProductShape, Shapes
from ..durable_files import replace_files
from ..runtime_settings import current_settings
from ..validation import check_choice
from .budget import Deadline, part_seconds
from .candidates import CLASS_TOKENS, Shape, Slot, candidates, current, slots
from .device_time import seconds_per_call
from .kernel_calls import (
    ESTIMATOR,
    KERNELS,
    TOKEN_READERS,
    WEIGHT_READERS,
    Operands,
    adopt,
    call,
    operands,
    results,
    rotated,
    shape_in_use,
)

PRODUCT_TOLERANCE = 2.0**-8
"""Relative, in norm, between two shapes' bf16 results: each is within half an ulp, 2⁻⁹, of the same fp32 sum."""
GRADIENT_TOLERANCE = 2.0**-9
"""Between two shapes' factor gradients: sums of TF32 products, whose operands are each rounded by up to 2⁻¹¹."""
FAILURES = (TritonError, RuntimeError, ValueError, AssertionError)
"""What a shape that a chip cannot run raises: OutOfResources at its launch, a compiler's or a pass's error before."""
CROSSOVER_SHARE = 0.25
"""Of the time."""


@dataclass(frozen=True)
class Plan:
    """What is measured: layers [N, K], tokens for each class, for the token product and for the crossover."""

    layers: tuple[tuple[int, int], ...] = ((4096, 4096), (14336, 4096), (4096, 14336))
    class_tokens: dict[int | None, int] = dataclasses.field(default_factory=lambda: dict(CLASS_TOKENS))
    token_product_tokens: int = 1024
    crossover_tokens: tuple[int, ...] = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    most_candidates: int | None = None


TINY = Plan(
    layers=((32, 64),),
    class_tokens={16: 2, 64: 3, 128: 4, None: 5},
    token_product_tokens=5,
    crossover_tokens=(1, 3),
    most_candidates=2,
)
"""For Triton's interpreter: everything runs, the times mean nothing."""


@dataclass(frozen=True)
class Measured:
    """A candidate that ran: its time on each of the plan's layers."""

    shape: Shape
    seconds: tuple[float, ...]

    def score(self, reference: Measured) -> float:
        """Geometric mean of its times over `reference`'s."""
        return geometric_mean([own / other for own, other in zip(self.seconds, reference.seconds, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(sum(map(math.log, values)) / len(values))


def fused_up_to(ratios: dict[int, float]) -> int:
    """The largest number of tokens up to which fused / panels stays below 1, 0 if nowhere."""
    best = 0
    for tokens, ratio in sorted(ratios.items()):
        if ratio >= 1:
            break
        best = tokens
    return best


class Tuner:
    """One run: its device and plan, and what it tells the user. The winners go into the table in use."""

    def __init__(self, device: torch.device, chip: Architecture, plan: Plan, console: Console) -> None:
        self.device, self.chip, self.plan, self.console = device, chip, plan, console
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        date = datetime.datetime.now(datetime.UTC).date()
        self.origin = f"{name}, {date}, torch {torch.__version__}, triton {triton.__version__}"

    @property
    def shapes(self) -> Shapes:
        """The family's table so far."""
        return TABLE[self.chip.family]

    def slots(self, kernel: str) -> list[Slot]:
        """The table's entries that belong to `kernel`."""
        return slots(kernel, self.plan.class_tokens, self.plan.token_product_tokens)

    def winner(self, slot: Slot, deadline: Deadline) -> Shape | None:
        """The fastest candidate whose results agree; None if there is none, or no time."""
        grid = candidates(slot, self.shapes)[: self.plan.most_candidates]
        measured = self._measure(slot, grid, deadline)
        if not measured:
            self.console.print(f"{slot.name}: nothing measured, stays as it is")
            return None
        trusted = measured[0].shape  # the one in use, unless the chip cannot run it
        for found in sorted(measured, key=lambda each: each.score(measured[0])):
            reason = self._disagreement(slot, found.shape, trusted) or self._failure_at_the_largest_rank(
                slot, found.shape
            )
            if reason is not None:
                self._left_out(slot, found.shape, reason)
                continue
            times = ", ".join(
                f"{seconds * 1e6:.1f} µs at {rows}x{columns}"
                for seconds, (rows, columns) in zip(found.seconds, self.plan.layers, strict=True)
            )
            tokens = f", {slot.tokens} tokens" if slot.tokens else ""
            score = found.score(measured[0])
            self.console.print(f"{slot.name}: {describe(found.shape)}, {score:.2f} × the time before; {times}")
            return dataclasses.replace(found.shape, source=f"measured: {self.origin}, {times}{tokens}")
        return None

    def _measure(self, slot: Slot, grid: Sequence[Shape], deadline: Deadline) -> list[Measured]:
        layers = [rotated(slot.kernel, *layer, slot.tokens, self.device) for layer in self.plan.layers]
        measured: list[Measured] = []
        for index, shape in enumerate(grid):
            if deadline.passed:
                self.console.print(f"{slot.name}: time for {index} of {len(grid)} candidates only")
                break
            try:
                with shape_in_use(self.chip.family, slot.kernel, shape):
                    seconds = [
                        seconds_per_call([call(slot.kernel, each) for each in layer], self.device) for layer in layers
                    ]
            except FAILURES as error:
                self._left_out(slot, shape, f"{type(error).__name__}: {last_line(error)}")
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # raises if the device is lost: nothing would run any more
                continue
            measured.append(Measured(shape, tuple(seconds)))
        return measured

    def _left_out(self, slot: Slot, shape: Shape, reason: str) -> None:
        self.console.print(f"{slot.name}: {describe(shape)} left out: {reason}")

    def _disagreement(self, slot: Slot, shape: Shape, trusted: Shape) -> str | None:
        """Why `shape` may not be used, on the plan's first layer; None if it may."""
        given = operands(slot.kernel, *self.plan.layers[0], slot.tokens, self.device)

        def under(which: Shape, on: Operands) -> tuple[torch.Tensor, ...]:
            with shape_in_use(self.chip.family, slot.kernel, which):
                return results(slot.kernel, on)

        if slot.kernel in WEIGHT_READERS:
            differing = self._differing_weights(slot, given, lambda on: under(shape, on)[0], trusted)
            if differing:
                return f"W differs in {differing} elements from the one that panels write"
        tolerance = PRODUCT_TOLERANCE if slot.kernel in WEIGHT_READERS else GRADIENT_TOLERANCE
        for own, expected in zip(under(shape, given), under(trusted, given), strict=True):
            error = float((own.double() - expected.double()).norm() / expected.double().norm())
            if not error <= tolerance:
                return f"results differ by {error:.1e}, expected at most {tolerance:.1e}"
        return None

    def _failure_at_the_largest_rank(self, slot: Slot, shape: Shape) -> str | None:
        """Why `shape` does not run at the largest rank that the family fuses; None if it does."""
        rank = self.shapes.fused_rank
        given = operands(slot.kernel, *self.plan.layers[0], slot.tokens, self.device, rank)
        try:
            with shape_in_use(self.chip.family, slot.kernel, shape):
                call(slot.kernel, given)()
        except FAILURES as error:
            return f"at rank {rank}: {type(error).__name__}: {last_line(error)}"
        return None

    def _differing_weights(
        self, slot: Slot, given: Operands, run: Callable[[Operands], torch.Tensor], trusted: Shape
    ) -> int:
        """In how many elements the W that a kernel rebuilds is not, bit for bit, the W that panels write."""
        panel_shape = trusted if slot.kernel == "effective_weight" else self.shapes.effective_weight
        panel = dataclasses.replace(given, out=torch.empty_like(given.weight))
        with shape_in_use(self.chip.family, "effective_weight", panel_shape):
            (expected,) = results("effective_weight", panel)
        if slot.kernel == "effective_weight":
            return int((run(given).view(torch.int16) != expected.view(torch.int16)).sum())
        # Inputs that are lines of an identity matrix pick lines of W out of the product, each bf16 number exactly.
        lines = expected if slot.kernel == "input_gradient" else expected.t()
        index = torch.arange(slot.tokens, device=self.device) * (len(lines) // slot.tokens)
        picking = torch.zeros(slot.tokens, len(lines), device=self.device, dtype=expected.dtype)
        picking[torch.arange(slot.tokens, device=self.device), index] = 1
        return int((run(dataclasses.replace(given, x=picking, grad=picking)) != lines[index]).sum())

    def crossover(self, operation: str, deadline: Deadline) -> bool:
        """Time `operation` fused and over panels, and set its ``fused_up_to``. Whether enough was measured."""
        ratios: dict[int, float] = {}
        for tokens in self.plan.crossover_tokens:
            if deadline.passed or sum(ratio >= 1 for ratio in ratios.values()) == 2:
                break  # two losses: more tokens only favour panels more
            try:
                ratios[tokens] = geometric_mean(
                    [self._fused_over_panels(operation, *layer, tokens) for layer in self.plan.layers]
                )
            except FAILURES as error:
                self.console.print(f"{operation}, {tokens} tokens: {type(error).__name__}: {last_line(error)}")
                return False
        text = ", ".join(f"{tokens}: {ratio:.2f}" for tokens, ratio in ratios.items())
        self.console.print(f"{operation}, fused / panels by tokens: {text or 'not measured'}")
        bound = fused_up_to(ratios)
        if bound == max(ratios, default=0) and deadline.passed:
            return False  # it stopped before panels won: where they do is unknown
        bounds = self.shapes.fused_up_to | {operation: bound}
        TABLE[self.chip.family] = dataclasses.replace(self.shapes, fused_up_to=bounds)
        return True

    def _fused_over_panels(self, operation: str, rows: int, columns: int, tokens: int) -> float:
        layers = rotated(operation, rows, columns, tokens, self.device)
        fused = seconds_per_call([call(operation, each) for each in layers], self.device)
        return fused / seconds_per_call([panel_call(operation, each) for each in layers], self.device)


def panel_call(operation: str, given: Operands) -> Callable[[], object]:
    """`operation` over panels, on the Triton backend."""
    backend = resolve_backend("triton", given.x.device, given.x.dtype, given.factors.A.dtype)
    block, settings = given.block, current_settings()
    if operation == "forward":
        return lambda: panels.forward(given.x, block, None, backend, settings)
    if operation == "input_gradient":
        return lambda: panels.input_gradient(given.grad, block, backend, settings)
    return lambda: panels.parameter_gradients(given.grad, given.x, block, ESTIMATOR, given.gradients, backend, settings)


def describe(shape: Shape) -> str:
    """The shape in one line, for people."""
    return ", ".join(f"{name} {value}" for name, value in table_entry(shape).items() if name not in ("source", "up_to"))


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where compilers say what was wrong."""
    return (str(error).strip().splitlines() or [""])[-1]


def fallback(kernel: str, chosen: Sequence[Shape], shapes: Shapes) -> list[Shape]:
    """The table's last shape of a product, behind one for whole tiles alone: some shape must suit all weights."""
    if isinstance(chosen[-1], ProductShape) and chosen[-1].whole_tiles:
        return [getattr(shapes, kernel)[-1]]
    return []


def table_entry(shape: Shape) -> dict[str, Any]:
    """The shape as the file has it: fields that keep their default are left out."""
    fields = dataclasses.fields(shape)
    return {field.name: getattr(shape, field.name) for field in fields if getattr(shape, field.name) != field.default}


def write_table(path: Path, family: str, shapes: Shapes) -> None:
    """Replace `family`'s entries in the table at `path`, which starts as a copy of the shipped one; all or nothing."""
    document = json.loads((path if path.exists() else PATH).read_text(encoding="utf-8"))
    entry: dict[str, Any] = {}
    for field in dataclasses.fields(shapes):
        value = getattr(shapes, field.name)
        if isinstance(value, tuple):
            entry[field.name] = [table_entry(shape) for shape in value]
        else:
            entry[field.name] = value if field.name.startswith("fused_") else table_entry(value)
    document[family] = entry
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    replace_files(path.parent, {path.name: text.encode()})


def run(tuner: Tuner, kernels: Sequence[str], minutes: float, path: Path) -> None:
    """Tune `kernels`, then where fused ends and panels begin, writing the table after each."""
    deadline = Deadline.after(60 * minutes)
    todo = [(kernel, slot) for kernel in kernels for slot in tuner.slots(kernel)]
    operations = [operation for operation in TOKEN_READERS if operation in kernels]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    before = tuner.shapes
    try:
        with Progress(*columns, console=tuner.console, transient=True) as progress:
            task = progress.add_task("tuning", total=len(todo) + len(operations))
            for kernel in kernels:
                winners: list[Shape | None] = []
                for slot in tuner.slots(kernel):
                    progress.update(task, description=slot.name)
                    left = deadline.left() - 60 * minutes * (CROSSOVER_SHARE if operations else 0)
                    remaining = len(todo) - int(progress.tasks[0].completed)
                    winners.append(tuner.winner(slot, Deadline.after(part_seconds(left, [1.0] * remaining))))
                    progress.advance(task)
                if any(winners):
                    kept = [current(slot, tuner.shapes) for slot in tuner.slots(kernel)]
                    chosen = [new or old for new, old in zip(winners, kept, strict=True)]
                    adopt(tuner.chip.family, kernel, chosen + fallback(kernel, chosen, tuner.shapes))
                    write_table(path, tuner.chip.family, tuner.shapes)
            for index, operation in enumerate(operations):
                progress.update(task, description=f"{operation}: fused or panels")
                share = part_seconds(deadline.left(), [1.0] * (len(operations) - index))
                if tuner.crossover(operation, Deadline.after(share)):
                    write_table(path, tuner.chip.family, tuner.shapes)
                progress.advance(task)
    finally:
        TABLE[tuner.chip.family] = before


def tune(kernels: Sequence[str], minutes: float, path: Path, tiny: bool = False, *, to_stderr: bool = False) -> str:
    """Measure `kernels` (none named: all) for at most `minutes`, rewrite this GPU's entries at `path`; its family.

    `tiny` walks through it in Triton's interpreter instead. What goes on is told on stdout or stderr.

    Raises ValueError for an unknown kernel, without a GPU, and where measurements that mean nothing would overwrite the
    shipped table; OSError where `path` cannot be written.
    """
    for kernel in kernels:
        check_choice("kernels", kernel, KERNELS)
    if tiny and path.resolve() == PATH.resolve():
        raise ValueError(
            f"--tiny: its times mean nothing, so it does not write to {PATH.name}; give --out another file"
        )
    if not tiny and not torch.cuda.is_available():
        raise ValueError("no GPU: tuning needs one (--tiny walks through it in Triton's interpreter)")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OSError(f"--out: got {path}, which cannot be written; give another file")
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    chip = architecture(device)
    if isinstance(chip, str):
        raise ValueError(chip)
    console = Console(stderr=to_stderr)
    torch.manual_seed(0)
    console.print(f"tuning {chip.family}, at most {minutes:g} minutes")
    run(Tuner(device, chip, TINY if tiny else Plan(), console), kernels or KERNELS, minutes, path)
    console.print(f"written to {path}")
    return chip.family
