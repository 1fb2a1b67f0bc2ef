"""Chooses each method's learning rate: trains it at several rates and compares them on the validation text.

The validation files are neither trained on nor reported by the demo, and every method gets the same number of rates,
spaced by the same factor.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from benchmarks.harness.report import markdown_table, print_table

from .data import InputError
from .experiment import adapt, prepare_base
from .models import METHODS
from .options import build_parser, settings_from

# Each about a factor of 2 apart. Full fine-tuning moves every weight directly and wants lower rates than factors do.
ADAPTER_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
RATES: dict[str, tuple[float, ...]] = {
    "dual_lora": ADAPTER_RATES,
    "lora": ADAPTER_RATES,
    "dora": ADAPTER_RATES,
    "full": (2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes sweep.json and sweep.md and prints the best rate of each method."""
    parser = build_parser("python -m examples.demo.sweep", (__doc__ or "").splitlines()[0], default_out="results/sweep")
    settings = settings_from(parser, arguments)
    console = Console(soft_wrap=True, highlight=False)
    try:
        base = prepare_base(settings, console)
    except InputError as error:
        parser.error(str(error))
    losses: dict[str, dict[float, float]] = {}
    for method in settings.methods:
        losses[method] = {}
        rates = RATES[method] if method not in settings.learning_rates else (settings.learning_rates[method],)
        for rate in rates:
            _, run = adapt(settings, base, method, rate, base.corpus.validation, evaluations=1)
            losses[method][rate] = run.final_held_out_loss
            console.print(f"{METHODS[method].label} at {rate:.0e}: {run.final_held_out_loss:.4f} nats per {base.unit}")
    headings = ("method", "learning rate", f"validation loss, nats per {base.unit}", "best")
    cells = [
        (METHODS[method].label, f"{rate:.0e}", f"{loss:.4f}", "yes" if loss == min(by_rate.values()) else "")
        for method, by_rate in losses.items()
        for rate, loss in by_rate.items()
    ]
    print_table("Learning rates", headings, cells, console)
    (settings.out / "sweep.md").write_text(markdown_table(headings, cells) + "\n", encoding="utf-8")
    (settings.out / "sweep.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
