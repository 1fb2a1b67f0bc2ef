"""A GPU session's goals, tables and plots, from its records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..harness import charts
from ..harness.environment import sentence
from ..harness.report import MEBIBYTE, markdown_table
from ..harness.timing import Quartiles, quartiles, ratios
from ..layers.layer_cells import CELL_LABELS, LLAMA_8B, MODES
from ..layers.layer_step import FLOOR
from ..layers.methods import LABELS

STEP_GOAL, DECODE_GOAL = 1.10, 1.3
MEMORY_ALLOWANCE = 32 * MEBIBYTE
GOAL_TOKENS = 4096
_MODEL_MEMORY = ("held", "peak")
GOAL_HEADINGS = ("goal", "bound", "worst measured", "measurements", "verdict")
Records = Mapping[str, Mapping[str, Any]]
"""Part → {"status", "reason", "seconds", "results"}."""


def goals(records: Records, layers: Sequence[tuple[int, int]] = LLAMA_8B) -> list[dict[str, Any]]:
    """The goals on a GPU (docs/architecture.md): the worst value of each, and ``pass``, ``short`` or ``not measured``.

    A device's time is a replayed graph's; with plain launches it includes what Python and PyTorch take to launch.
    """
    cells = [cell for cell in _results(records, "layers", "cells", []) if (cell["rows"], cell["columns"]) in layers]
    found = []
    for mode, words in (("graph", "device time"), ("plain", "plain launches")):
        steps = [c for c in cells if c["kind"] == "step" and c["mode"] == mode and c["tokens"] >= GOAL_TOKENS]
        decodes = [c for c in cells if c["kind"] == "decode" and c["mode"] == mode]
        found += [
            _goal(f"step / floor, M ≥ {GOAL_TOKENS}, {words}", STEP_GOAL, [_auto(cell) for cell in steps]),
            _goal(
                f"step / PEFT DoRA's, M ≥ {GOAL_TOKENS}, {words}", 1.0, [cell["to_dora"].get("auto") for cell in steps]
            ),
            _goal(f"decode / F.linear, M ≤ 16, {words}", DECODE_GOAL, [_auto(cell) for cell in decodes]),
        ]
    peaks = {row["method"]: row["peak"] for row in _results(records, "memory", "rows", [])}
    excess = [(peaks["dual_lora"] - peaks["lora"]) / MEBIBYTE] if {"dual_lora", "lora"} <= peaks.keys() else []
    found.append(_goal("peak memory of a layer's step over PEFT LoRA's, MiB", MEMORY_ALLOWANCE / MEBIBYTE, excess))
    return [*found, _numerics_goal(records)]


def _numerics_goal(records: Records) -> dict[str, Any]:
    """Zero failures; a suite that was cut off can fail, but not pass."""
    counts = _results(records, "numerics", "counts", {})
    failures = counts.get("failed", 0) + counts.get("error", 0)
    is_measured = failures or (counts.get("passed") and _results(records, "numerics", "complete", False))
    name = "failures of the numerical suite (errors against fp64 among others)"
    return _goal(name, 0.0, [float(failures)] if is_measured else [])


def _goal(name: str, bound: float, values: Sequence[float | None]) -> dict[str, Any]:
    measured = [value for value in values if value is not None]
    worst = max(measured, default=None)
    verdict = "not measured" if worst is None else "pass" if worst <= bound else "short"
    return {"goal": name, "bound": bound, "worst": worst, "measurements": len(measured), "verdict": verdict}


def _auto(cell: Mapping[str, Any]) -> float | None:
    ratio = cell["to_floor"].get("auto")
    return None if ratio is None else float(ratio["median"])


def _results(records: Records, part: str, name: str, default: Any) -> Any:
    return records.get(part, {}).get("results", {}).get(name, default)


def paragraphs(
    title: str,
    reached: Sequence[Mapping[str, Any]],
    records: Records,
    titles: Mapping[str, str],
    plots: Sequence[str],
) -> list[str]:
    """The summary in Markdown: what `goals` found first, then each part."""
    found = [f"# {title}", markdown_table(GOAL_HEADINGS, goal_cells(reached))]
    for key, heading in titles.items():
        record = records[key]
        found.append(f"## {heading}")
        words = f"{record['status']}, {record['seconds']:.0f} s"
        found.append(f"{words}: {record['reason']}" if record["reason"] else words)
        if record["results"]:
            found += _PARTS[key](record["results"])
    return [*found, *(f"![{name}]({name})" for name in plots)]


def goal_cells(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """What `goals` found as a table's cells, in the order of ``GOAL_HEADINGS``."""
    return [
        (
            goal["goal"],
            f"≤ {goal['bound']:g}",
            "–" if goal["worst"] is None else f"{goal['worst']:.2f}",
            str(goal["measurements"]),
            goal["verdict"],
        )
        for goal in found
    ]


def _environment(results: Mapping[str, Any]) -> list[str]:
    found = [sentence(results["environment"])]
    if "backend" in results:
        found.append(f"Backend: {results['backend']}.")
    if "bytes_per_second" in results:
        found.append(
            f"Ceilings: copy {results['bytes_per_second'] / 1e12:.3f} TB/s (bytes read and written), bf16 product "
            f"{results['operations_per_second'] / 1e12:,.1f} TFLOP/s."
        )
    return found


def _numerics(results: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{number} {outcome}" for outcome, number in results["counts"].items()) or "no counts"
    ended = "" if results["complete"] else "; cut off at its time limit"
    return [
        f"`{results['command']}`: {counts}; exit code {results['exit_code']}{ended}.",
        "\n".join(("```", *results["tail"], "```")),
    ]


def _rooflines(results: Mapping[str, Any]) -> list[str]:
    headings = ("kernel", "µs", "bytes' floor µs", "operations' floor µs", "MiB", "GFLOP", "fraction of the roofline")
    cells = [
        (
            row["label"],
            f"{row['seconds'] * 1e6:,.1f}",
            f"{row['bytes_floor'] * 1e6:,.1f}",
            f"{row['operations_floor'] * 1e6:,.1f}",
            f"{row['bytes'] / MEBIBYTE:,.1f}",
            f"{row['operations'] / 1e9:,.2f}",
            f"{row['fraction']:.2f}",
        )
        for row in results["rows"]
    ]
    return [markdown_table(headings, cells), *_left_out(results["left_out"])]


def _layers(results: Mapping[str, Any]) -> list[str]:
    names = [FLOOR, *(name for name in CELL_LABELS if name != FLOOR)]
    found = []
    for kind, words in (("step", "Step, × three products"), ("decode", "Decode (forward, unmerged), × F.linear on W0")):
        chosen = [cell for cell in results["cells"] if cell["kind"] == kind]
        chosen.sort(key=_order)
        headings = ("layer", "M", "launches", "floor µs", *(CELL_LABELS[name] for name in names[1:]))
        cells = [
            (
                f"{cell['rows']}x{cell['columns']}",
                str(cell["tokens"]),
                cell["mode"],
                f"{cell['microseconds'][FLOOR]:,.1f}",
                *(f"{cell['to_floor'][n]['median']:.2f}" if n in cell["to_floor"] else "–" for n in names[1:]),
            )
            for cell in chosen
        ]
        if cells:
            found += [f"{words}:", markdown_table(headings, cells)]
    found += _predictions(results["cells"])
    reasons = {
        f"{CELL_LABELS[name]}: {reason}": None for cell in results["cells"] for name, reason in cell["left_out"].items()
    }
    return [*found, f"{results['unmeasured']} cells not measured.", *_left_out([*results["left_out"], *reasons])]


def _predictions(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the model predicted (benchmarks/model) beside what was measured."""
    lines = [
        (
            f"{cell['kind']} {cell['rows']}x{cell['columns']}",
            str(cell["tokens"]),
            *(
                text
                for name in ("auto", FLOOR)
                for text in (
                    f"{cell['predicted_microseconds'][name]:,.1f}",
                    f"{cell['microseconds'][name]:,.1f}",
                    f"{cell['microseconds'][name] / cell['predicted_microseconds'][name]:.2f}",
                )
            ),
        )
        for cell in sorted(cells, key=_order)
        if cell.get("predicted_microseconds") and {"auto", FLOOR} <= cell["microseconds"].keys()
    ]
    headings = ("cell", "M", "predicted µs", "measured", "ratio", "floor: predicted µs", "measured", "ratio")
    return ["Predicted beside measured:", markdown_table(headings, lines)] if lines else []


def _order(cell: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return MODES.index(cell["mode"]), cell["rows"], cell["columns"], cell["tokens"]


def _memory(results: Mapping[str, Any]) -> list[str]:
    headings = ("method", "peak MiB", "of it temporary MiB", "allocator's own peak MiB", "over PEFT LoRA MiB")
    peaks = {row["method"]: row["peak"] for row in results["rows"]}
    cells = [
        (
            LABELS[row["method"]],
            f"{row['peak'] / MEBIBYTE:,.1f}",
            f"{row['peak_temporary'] / MEBIBYTE:,.1f}",
            "–" if row["counter"] is None else f"{row['counter'] / MEBIBYTE:,.1f}",
            f"{(row['peak'] - peaks['lora']) / MEBIBYTE:,.1f}" if "lora" in peaks else "–",
        )
        for row in results["rows"]
    ]
    words = f"One layer's step, {results['layer']}; what it allocates over weights, inputs and the incoming gradient."
    return [words, markdown_table(headings, cells), *_left_out(results["left_out"])]


def _models(results: Mapping[str, Any]) -> list[str]:
    headings = ("model", "method", "ms", "tokens/s", "× its floor", "held MiB", "peak MiB")
    cells = [
        (
            f"{about['model']}, {about['batch']} × {about['sequence']}"
            + (", checkpointed" if about["checkpointing"] else ""),
            LABELS[name],
            f"{quartiles(found['seconds']).median * 1e3:,.0f}",
            f"{about['tokens'] / quartiles(found['seconds']).median:,.0f}",
            f"{ratios(seconds, name, FLOOR).median:.3f}",
            *(f"{found['bytes'][kind] / MEBIBYTE:,.0f}" if kind in found["bytes"] else "–" for kind in _MODEL_MEMORY),
        )
        for case in results["cases"]
        for about in (case["settings"],)
        for seconds in ({name: list(found["seconds"]) for name, found in case["subjects"].items()},)
        for name, found in case["subjects"].items()
        if found["seconds"]
    ]
    reasons = [
        f"{LABELS[name]}, {case['settings']['model']}: {found['left_out']}"
        for case in results["cases"]
        for name, found in case["subjects"].items()
        if found["left_out"]
    ]
    words = "A training step of every linear layer in every block: forward, backward, clipping, AdamW."
    return [words, markdown_table(headings, cells), *_left_out([*results["left_out"], *reasons])]


def _left_out(reasons: Sequence[str]) -> list[str]:
    return ["Left out:\n\n" + "\n".join(f"- {reason}" for reason in reasons)] if reasons else []


_PARTS = {
    "environment": _environment,
    "numerics": _numerics,
    "rooflines": _rooflines,
    "layers": _layers,
    "memory": _memory,
    "models": _models,
}


def draw(records: Records, folder: Path) -> list[str]:
    """The plots whose data there are, and their names."""
    names = []
    rows = _results(records, "rooflines", "rows", [])
    if rows:
        fractions = {row["label"]: Quartiles(*[row["fraction"]] * 3) for row in rows}
        axis = "fraction of the roofline"
        charts.ratio_bars(fractions, "", "Kernels against their rooflines", axis, folder / "rooflines.png")
        names.append("rooflines.png")
    titles = {
        "step": ("Training step", STEP_GOAL, "time / three products"),
        "decode": ("Decode", DECODE_GOAL, "time / F.linear"),
    }
    for kind, (title, goal, axis) in titles.items():
        plots = _lines([cell for cell in _results(records, "layers", "cells", []) if cell["kind"] == kind])
        if plots:
            charts.ratio_lines(plots, goal, f"{title}; dashed: the goal", axis, folder / f"{kind}_ratios.png")
            names.append(f"{kind}_ratios.png")
    return names


def _lines(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """Layer and way to launch → candidate → M → ratio to the floor."""
    plots: dict[str, dict[str, dict[int, float]]] = {}
    for cell in sorted(
        cells, key=lambda cell: (MODES.index(cell["mode"]), cell["rows"], cell["columns"], cell["tokens"])
    ):
        if cell["mode"] == "compiled":
            continue
        lines = plots.setdefault(f"{cell['rows']}x{cell['columns']}, {cell['mode']}", {})
        for name, ratio in cell["to_floor"].items():
            lines.setdefault(CELL_LABELS[name], {})[cell["tokens"]] = ratio["median"]
    return plots
