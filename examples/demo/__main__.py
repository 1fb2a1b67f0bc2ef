"""Command line of the demo: pre-train, adapt with every method, compare, then save, reload and merge Dual LoRA."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from .curves import draw_curves
from .data import InputError
from .experiment import Base, adapt, prepare_base
from .models import METHODS, load_base
from .options import Settings, build_parser, settings_from
from .report import Results, backend_in_use, device_name, print_report, write_json, write_markdown
from .training import TrainingRun, evaluate
from .verification import Verification, verify

EVALUATIONS = 4
"""Held-out losses on each method's curve."""

VERIFIED_BLOCKS = 4
"""Held-out sequences whose logits are compared."""


def compare(settings: Settings, console: Console) -> Results:
    """Runs every stage and returns what was found; writes nothing but the checkpoints."""
    started = time.perf_counter()
    console.print(f"Device: {device_name()}; Dual LoRA runs on backend {backend_in_use(settings.dtype)}")
    base = prepare_base(settings, console)
    model = load_base(base.checkpoint, settings.dtype)
    base_parameters = model.num_parameters()
    base_loss = evaluate(
        model, base.corpus.held_out, out=settings.out, batch_size=settings.batch_size, seed=settings.seed
    )
    del model
    console.print(f"Base on the held-out text: {base_loss:.4f} nats per {base.unit}")

    runs: dict[str, TrainingRun] = {}
    verification: Verification | None = None
    for method in settings.methods:
        rate = settings.learning_rate(method)
        console.print(f"Adapting with {METHODS[method].label}: {settings.steps} steps, learning rate {rate:.0e}")
        trained, runs[method] = adapt(settings, base, method, rate, base.corpus.held_out, EVALUATIONS)
        if method == "dual_lora":
            console.print("Saving the Dual LoRA adapter, reloading it into a fresh base, merging it")
            verification = _verify(settings, base, trained)
        del trained  # before the next method's memory is measured
    return Results(
        settings=settings,
        unit=base.unit,
        corpus=base.corpus.name,
        base_parameters=base_parameters,
        base_loss=base_loss,
        runs=runs,
        pretraining=base.pretraining,
        verification=verification,
        seconds=time.perf_counter() - started,
    )


def _verify(settings: Settings, base: Base, trained: torch.nn.Module) -> Verification:
    return verify(
        trained,
        lambda: load_base(base.checkpoint, settings.dtype),
        settings.out / "adapter",
        base.corpus.held_out.blocks[:VERIFIED_BLOCKS],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 when saving, reloading or merging changed the logits."""
    parser = build_parser(
        "python -m examples.demo",
        "Adapt a small language model with Dual LoRA, LoRA, DoRA and full fine-tuning, and compare them.",
        default_out="results/demo",
    )
    settings = settings_from(parser, arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        results = compare(settings, console)
    except InputError as error:
        parser.error(str(error))
    curves = settings.out / "curves.png"
    draw_curves(results, curves)
    write_markdown(results, settings.out / "results.md", curves)
    write_json(results, settings.out / "results.json")
    print_report(results, console)
    console.print(f"Results in {settings.out} after {results.seconds:.0f} s")
    failures = results.verification.failures if results.verification is not None else []
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
