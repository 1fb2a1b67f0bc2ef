"""``python -m benchmarks model``: training steps and generation of whole models, every method at equal parameters."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from rich.console import Console

from dual_lora_kernels.products import product_dtype

from ..harness.environment import DTYPE_NAMES, environment, installed
from ..harness.report import MEBIBYTE
from ..harness.results import Case, Results
from ..layers.methods import FROZEN, LABELS
from ..models.case import NF4, ModelCase
from ..models.measure import generate, train
from ..models.shapes import REAL, shape
from ..models.subjects import GENERATING, ON_NF4, TRAINED
from .arguments import add_device, count
from .arguments import dtype as dtype_name

HELP = "Training steps and generation of whole models with random weights: tokens/s, memory, all methods."
CASES = ("train", "checkpointing", "nf4", "generate")
FEW = ("floor", "lora", "dora", "dual_lora")
"""Subjects where a step takes long, and under checkpointing."""
PROMPT = 16
"""Tokens, at most, before those that are generated."""
QUICK = (FROZEN, "floor", "lora", "dora", "naive", "dual_lora")
NOTES = (
    "train: forward, backward, clipping of the gradients' norm, AdamW and zeroing, on all seven linear layers of every "
    "block at equal trainable parameters. frozen and floor have no optimiser. A ratio is the median over rounds of "
    "the ratio within a round.",
    "floor: the same model in which every adapted layer costs the products X W0ᵀ, G W0 and Gᵀ X and nothing else; on a "
    "4-bit base, those of the dense model.",
    "held: model, adapters and optimiser's state. peak: what PyTorch's allocator handed out at once above that, in a "
    "step. resident: how far the process's resident size rose in one. Each subject has a process of its own for these.",
    "generate: greedily, batch 1, with a cache of keys and values, the prompt's pass included.",
)
_MEMORY = ("held", "peak", "resident")


def add(parser: argparse.ArgumentParser) -> None:
    """The preset's options."""
    parser.set_defaults(rounds=5)
    parser.add_argument(
        "--model", type=_model,
        help=f"llama-hN of hidden size N, or {', '.join(REAL)} (llama-h1024; with --quick llama-h128)",
    )  # fmt: skip
    parser.add_argument("--dtype", type=dtype_name, default="fp32", help="of the frozen weights (%(default)s)")
    parser.add_argument("--layers", type=count, help="blocks (the model's own number)")
    parser.add_argument("--batch", type=count, help="sequences of a step (4; of the real models on a CPU 1)")
    parser.add_argument(
        "--sequence",
        type=count,
        help="tokens of each (256; of the real models on a CPU 32; 4 in 16 bits without units)",
    )
    parser.add_argument("--rank", type=count, default=16, help="r1 = r2; other methods' ranks follow (%(default)s)")
    parser.add_argument("--new-tokens", type=count, default=32, help="that are generated (%(default)s)")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="all; of the real models on a CPU train alone")
    parser.add_argument("--subjects", nargs="+", choices=sorted({*TRAINED, *GENERATING}), help="every case's own")
    parser.add_argument("--no-memory", action="store_true", help="only time")
    add_device(parser)


def _model(text: str) -> str:
    try:
        shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(options: argparse.Namespace, console: Console) -> Results:
    """Measure the cases that were asked for."""
    about = environment(options.device)
    remarks: list[str] = []
    cases = tuple(_cases(options, console, remarks))
    return Results("model", "", about, cases, notes=(*NOTES, *remarks))


def _cases(options: argparse.Namespace, console: Console, remarks: list[str]) -> Iterator[Case]:
    """The cases that were asked for; what could not be measured of them becomes a remark."""
    options.model = options.model or ("llama-h128" if options.quick else "llama-h1024")
    slow = options.model in REAL and options.device.type == "cpu"
    few = QUICK if options.quick else FEW
    case = ModelCase(
        model=options.model,
        dtype=options.dtype,
        batch=options.batch or (1 if slow else 4),
        sequence=options.sequence or _sequence(options, slow),
        layers=options.layers or (2 if options.quick else None),
        rank=options.rank,
        device=str(options.device),
    )
    trained = {
        "train": (case, few if slow or options.quick else TRAINED),
        "checkpointing": (replace(case, checkpointing=True), few),
        "nf4": (replace(case, base=NF4), ON_NF4),
    }
    wanted = options.cases or (("train",) if slow else CASES)
    _refuse_strangers(options.subjects, wanted)
    if "nf4" in wanted and installed("bitsandbytes") is None:
        remarks.append("The NF4 base was left out: bitsandbytes is not installed.")
        wanted = [name for name in wanted if name != "nf4"]
    for name, (own, default) in trained.items():
        if name in wanted:
            subjects = _chosen(options.subjects, ON_NF4 if name == "nf4" else TRAINED, default)
            yield train(own, subjects, options.rounds, console, not options.no_memory, remarks.append)
    if "generate" in wanted:
        prompt = replace(case, batch=1, sequence=min(case.sequence, PROMPT))
        subjects = _chosen(options.subjects, GENERATING, GENERATING)
        yield generate(prompt, subjects, options.new_tokens, options.rounds, console)


def _sequence(options: argparse.Namespace, slow: bool) -> int:
    """Tokens of a sequence unless the user says."""
    dtype = DTYPE_NAMES[options.dtype]
    if product_dtype(dtype, options.device.type) != dtype:
        # Without units for bf16, PyTorch multiplies G W0 at 0.13 to 0.25 GFlop/s on two Zen 3 cores: the 1B model's
        # step takes about 10 s a token.
        return 4
    return 32 if slow or options.quick else 256


def _refuse_strangers(subjects: Sequence[str] | None, cases: Sequence[str]) -> None:
    """Raise ValueError where none of the cases has a subject that the user names."""
    known = {"generate": GENERATING, "nf4": ON_NF4}
    possible = {name for case in cases for name in known.get(case, TRAINED)}
    if strangers := [name for name in subjects or () if name not in possible]:
        raise ValueError(f"--subjects: got {', '.join(strangers)}, which the cases {', '.join(cases)} do not have")


def _chosen(wanted: Sequence[str] | None, possible: Sequence[str], default: Sequence[str]) -> Sequence[str]:
    """Of the subjects that the user names, those that a case has."""
    return default if wanted is None else [name for name in wanted if name in possible]


def table(case: Case) -> tuple[str, list[str], list[list[str]]]:
    """Title, headings and cells of one case."""
    settings: dict[str, Any] = dict(case.settings)
    model = ModelCase(**{field.name: settings[field.name] for field in fields(ModelCase) if field.name in settings})
    what = f"Generation of {settings['new_tokens']} tokens" if settings["kind"] == "generate" else "Training step"
    title = f"{what}: {model.title}"
    left_out = "".join(f"\n{name} left out: {m.left_out}" for name, m in case.subjects.items() if m.left_out)
    memory = [name for name in _MEMORY if any(name in subject.bytes for subject in case.subjects.values())]
    headings = ["method", "median ms", "tokens/s", f"× {case.reference}", "trainable"]
    cells = [_row(case, name, memory) for name in case.timed()]
    return title + left_out, [*headings, *(f"{name} MiB" for name in memory)], cells


def _row(case: Case, name: str, memory: list[str]) -> list[str]:
    measured, seconds = case.subjects[name], case.seconds(name).median
    sizes = [f"{measured.bytes[each] / MEBIBYTE:,.0f}" if each in measured.bytes else "–" for each in memory]
    return [
        LABELS.get(name, name), f"{seconds * 1e3:,.0f}", f"{measured.counts['tokens'] / seconds:,.1f}",
        f"{case.ratio(name).median:.3f}", f"{measured.trainable:,}", *sizes,
    ]  # fmt: skip
