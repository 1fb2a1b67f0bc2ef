"""What gradients from a sample of H's columns cost in quality: small models adapted with every kind of sample.

    python -m benchmarks.training.gradient_columns --processes 2

Two bases, the demo's Llama and a GPT-2 of its size, are adapted to the standard library's sources, as in the demo.
Every configuration gets three learning rates around the demo's, each tried with seed 0; the best on the validation text
runs with the other seeds. A seed decides the factors, the order of the data and the samples. Losses are in nats per
byte on the held-out text. Runs that the folder of an earlier, interrupted run has are not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GPT2Config, GPT2LMHeadModel, set_seed
from transformers.utils import logging as transformers_logging

from dual_lora_kernels import set_gradient_columns
from examples.demo import models as demo
from examples.demo.data import BYTE_VOCABULARY, Corpus, english_blocks
from examples.demo.experiment import PRETRAINING_LEARNING_RATE, adapt, prepare_base
from examples.demo.options import Settings
from examples.demo.training import TrainingRun, evaluate, train

from ..harness import report
from ..harness.environment import environment, sentence
from .column_samples import SAMPLERS, can_sample, sampled

STEM = "gradient_columns"
FAMILIES = ("Llama", "GPT-2")
FRACTIONS = (0.5, 0.25, 0.125)
SEEDS = (0, 1, 2)
RATES = {"dual_lora": (5e-3, 1e-2, 2e-2), "lora": (2e-3, 5e-3, 1e-2), "dora": (2e-3, 5e-3, 1e-2)}
STEPS, PRETRAIN_STEPS, EVALUATIONS = 150, 300, 5
WIDTH, LENGTH, BATCH = 256, 128, 4
PACKAGE = "package"
"""The sample of the package itself, by its own kernels; the others are experiments in plain PyTorch."""
HEADINGS = ("model", "method", "sample", "learning rate", *(f"seed {seed}" for seed in SEEDS), "mean", "to exact")


@dataclass(frozen=True)
class Run:
    """One training run. `sample` is empty for methods without one."""

    family: str
    method: str
    sample: str
    fraction: float
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Final validation loss, and (step, held-out loss) on the way."""

    validation: float
    held_out: list[tuple[int, float]]


def make_base(family: str, folder: Path, width: int = WIDTH, steps: int = PRETRAIN_STEPS) -> Path:
    """The checkpoint of a family's base, pre-trained as the demo's."""
    transformers_logging.disable_progress_bar()
    checkpoint = folder / family
    if (checkpoint / "config.json").exists():
        return checkpoint
    set_seed(0)
    if family == "GPT-2":
        config = GPT2Config(
            vocab_size=BYTE_VOCABULARY, n_positions=LENGTH, n_embd=width, n_layer=4, n_head=4, bos_token_id=None,
            eos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )  # fmt: skip
        model: Any = GPT2LMHeadModel(config)
    else:
        model = demo.tiny_llama(width, 4, LENGTH)
    train(
        model, demo.one_group(model, PRETRAINING_LEARNING_RATE), *english_blocks(LENGTH, 64),
        label=f"pre-training {family}", out=folder, steps=steps, batch_size=BATCH, seed=0, evaluations=1,
    )  # fmt: skip
    model.save_pretrained(checkpoint)
    return checkpoint


@contextmanager
def by_the_package(fraction: float) -> Iterator[None]:
    """Within it, the demo's Dual LoRA has `gradient_columns` of `fraction`."""
    plain = demo.METHODS["dual_lora"]

    def prepare(model: Any, rank: int) -> torch.nn.Module:
        adapted = plain.prepare(model, rank)
        set_gradient_columns(adapted, fraction)
        return adapted

    demo.METHODS["dual_lora"] = replace(plain, prepare=prepare)
    try:
        yield
    finally:
        demo.METHODS["dual_lora"] = plain


def adapted(
    folder: Path, run: Run, steps: int = STEPS, batch: int = BATCH, evaluations: int = EVALUATIONS
) -> tuple[torch.nn.Module, TrainingRun, Corpus]:
    """A fresh base adapted: the model, what training measured, and the corpus."""
    settings = Settings(
        out=folder / "runs", model=folder / run.family, steps=steps, batch_size=batch, block_size=LENGTH, seed=run.seed
    )
    with Console(quiet=True) as console:
        base = prepare_base(settings, console)
    if not run.sample:
        sampling: Any = nullcontext()
    else:
        sampling = by_the_package(run.fraction) if run.sample == PACKAGE else sampled(run.sample, run.fraction)
    with sampling:
        model, training = adapt(settings, base, run.method, run.rate, base.corpus.held_out, evaluations)
    return model, training, base.corpus


def perform(folder: Path, run: Run) -> Outcome:
    """One run, in a process of its own."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    model, training, corpus = adapted(folder, run)
    validation = evaluate(model, corpus.validation, out=folder / "runs", batch_size=BATCH, seed=0)
    return Outcome(validation, training.held_out)


def configurations() -> list[Run]:
    """Every configuration, without a rate."""
    found = []
    for family in FAMILIES:
        found += [Run(family, method, "", 1.0, 0.0, 0) for method in RATES]
        for fraction in FRACTIONS:
            for name in SAMPLERS:
                if name != "random" and can_sample(name, WIDTH, fraction):
                    found.append(Run(family, "dual_lora", name, fraction, 0.0, 0))
    return found


class Results:
    """Outcomes in a JSON file, written after every run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcomes: dict[Run, Outcome] = {}
        if path.exists():
            for entry in json.loads(path.read_text(encoding="utf-8"))["runs"]:
                held_out = [(step, loss) for step, loss in entry.pop("held_out")]
                validation = entry.pop("validation")
                self.outcomes[Run(**entry)] = Outcome(validation, held_out)

    def entries(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [{**asdict(run), **asdict(outcome)} for run, outcome in self.outcomes.items()]

    def add(self, run: Run, outcome: Outcome) -> None:
        """Keep one more."""
        self.outcomes[run] = outcome
        report.write_text(self._path, json.dumps({"runs": self.entries()}, indent=1) + "\n")

    def best_rate(self, configuration: Run) -> float | None:
        """The rate of the least validation loss with seed 0; None before all have run."""
        rates = RATES[configuration.method]
        tried = {rate: self.outcomes.get(replace(configuration, rate=rate, seed=0)) for rate in rates}
        known = {rate: outcome.validation for rate, outcome in tried.items() if outcome is not None}
        return min(known, key=known.__getitem__) if len(known) == len(rates) else None

    def losses(self, configuration: Run) -> list[float]:
        """The final held-out loss with every seed."""
        rate = self.best_rate(configuration)
        assert rate is not None, "it has not run"
        return [self.outcomes[replace(configuration, rate=rate, seed=seed)].held_out[-1][1] for seed in SEEDS]


def run_all(folder: Path, results: Results, processes: int, console: Console) -> None:
    """Every run that `results` lacks: seeds as soon as their rates are known."""
    todo, ready = configurations(), set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProcessPoolExecutor(processes) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=sum(len(RATES[each.method]) + len(SEEDS) - 1 for each in todo))
        pending: dict[Future[Outcome], Run] = {}

        def submit(run: Run) -> None:
            if run in results.outcomes:
                progress.advance(task)
            else:
                pending[pool.submit(perform, folder, run)] = run

        def submit_seeds() -> None:
            for configuration in todo:
                rate = results.best_rate(configuration)
                if rate is not None and configuration not in ready:
                    ready.add(configuration)
                    for seed in SEEDS[1:]:
                        submit(replace(configuration, rate=rate, seed=seed))

        submit_seeds()
        for configuration in todo:
            for rate in RATES[configuration.method]:
                submit(replace(configuration, rate=rate))
        while pending:
            future = next(as_completed(pending))
            results.add(pending.pop(future), future.result())
            progress.advance(task)
            submit_seeds()


def cells(results: Results) -> list[tuple[str, ...]]:
    """The table's cells, in the order of ``HEADINGS``; the last one against all columns, as mean ± standard error."""
    rows = []
    exact = {family: results.losses(Run(family, "dual_lora", "", 1.0, 0.0, 0)) for family in FAMILIES}
    for each in configurations():
        losses = results.losses(each)
        differences = [own - other for own, other in zip(losses, exact[each.family], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        is_exact = each.method == "dual_lora" and not each.sample
        sample = f"1/{round(1 / each.fraction)}, {each.sample}" if each.sample else "all" if is_exact else "–"
        rows.append(
            (
                each.family, demo.METHODS[each.method].label, sample, f"{results.best_rate(each):.0e}",
                *(f"{loss:.4f}" for loss in losses), f"{statistics.mean(losses):.4f}",
                "–" if is_exact else f"{statistics.mean(differences):+.4f} ± {error:.4f}",
            )
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.gradient_columns", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each (2)")
    parser.add_argument("--work", type=Path, default=Path("results/gradient_columns"), help="folder for bases and runs")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder for the results (benchmarks/results)")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    console = Console()
    about = environment(torch.device("cpu"))
    for family in FAMILIES:
        make_base(family, options.work)
    results = Results(options.work / "runs.json")
    run_all(options.work, results, options.processes, console)
    table = cells(results)
    report.print_table("Held-out loss, nats per byte", HEADINGS, table, console)
    paragraphs = [
        "# Held-out loss with gradients from a sample of columns",
        report.markdown_table(HEADINGS, table),
        f"Nats per byte after {STEPS} steps of {BATCH} × {LENGTH} bytes; at each configuration's own best of three "
        "learning rates by the validation loss with seed 0. `package` is what `gradient_columns` does, the others are "
        "experiments (benchmarks/training/column_samples.py), whose blocks are whole, so that some have fewer columns. "
        "To exact: the mean difference to Dual LoRA with all "
        "columns, seed by seed, and its standard error.",
        sentence(about),
    ]
    report.write(options.out, STEM, {"environment": about, "runs": results.entries()}, paragraphs)


if __name__ == "__main__":
    main()
