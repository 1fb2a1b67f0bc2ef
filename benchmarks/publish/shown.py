"""How measurements are put into words and tables: numbers, subjects, cases, machines, and the runs they are from."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..harness.report import MEBIBYTE, markdown_table
from ..harness.results import Case, Results, Setting, every
from ..layers.methods import LABELS

MISSING = "–"
"""What was not measured."""
OWN = "dual_lora"
"""The subject that tables set in bold: this package, its own door, on the backend that it chooses."""
SUMMARISED = (
    "full", "lora", "lora_compiled", "dora", "loha", "hira", "naive", "naive_compiled", "dual_lora_eager", OWN,
    "dual_lora_peft",
)  # fmt: skip
"""The subjects of summaries and pictures: what one chooses among. Bounds and variants are in the whole tables."""
_DEFAULTS: Mapping[str, Setting] = {"base": "dense", "checkpointing": False}
"""Settings that need not be named."""
Shape = tuple[tuple[str, Setting], ...]
"""A case's settings, sorted, without those that have their default: what two machines can have in common."""


@dataclass(frozen=True)
class Machine:
    """What one machine has measured with one preset.

    cases: by their settings, of cases that were measured again the newest run's. runs: newest first, those of which
    at least one case is shown. run_of: the run that each case is from.
    """

    label: str
    cases: Mapping[Shape, Case]
    runs: Sequence[Results]
    run_of: Mapping[Shape, Results]

    def where(self, **settings: Setting) -> Case | None:
        """The case with exactly these settings, or None."""
        return self.cases.get(shape(settings))


def shape(settings: Mapping[str, Setting]) -> Shape:
    """The settings as a key."""
    return tuple(sorted((name, value) for name, value in settings.items() if _DEFAULTS.get(name) != value))


def machines(preset: str, wanted: Callable[[Case], bool]) -> list[Machine]:
    """What each machine has measured with `preset`, of the cases that are `wanted`.

    Another number of threads counts as another machine.
    """
    runs_of: dict[str, list[Results]] = {}
    for results in every(preset):
        runs_of.setdefault(machine_words(results), []).append(results)
    return [machine for label, runs in runs_of.items() if (machine := _machine(label, runs, wanted)).cases]


def _machine(label: str, runs: Sequence[Results], wanted: Callable[[Case], bool]) -> Machine:
    cases: dict[Shape, Case] = {}
    run_of: dict[Shape, Results] = {}
    for results in runs:
        for case in filter(wanted, results.cases):
            if shape(case.settings) not in cases:
                cases[shape(case.settings)] = case
                run_of[shape(case.settings)] = results
    shown = [results for results in runs if any(results is other for other in run_of.values())]
    return Machine(label, cases, shown, run_of)


def in_fast_dtypes(of: Sequence[Machine]) -> tuple[list[Machine], str]:
    """The machines without cases in a half dtype without units in the processor, and a sentence on these or ""."""
    kept: list[Machine] = []
    slow: dict[str, None] = {}
    for machine in of:
        cases = {key: case for key, case in machine.cases.items() if not _is_slow(case, machine.run_of[key])}
        if len(cases) < len(machine.cases):
            slow[machine.label] = None
        runs = [run for run in machine.runs if any(run is machine.run_of[key] for key in cases)]
        if cases:
            kept.append(Machine(machine.label, cases, runs, {key: machine.run_of[key] for key in cases}))
    if not slow:
        return kept, ""
    return kept, (
        f"Not counted here: half dtypes on {'; '.join(slow)}, which has no units for them: PyTorch's own products "
        "are slow there and this package multiplies in fp32, so a ratio to them would flatter it."
    )


def _is_slow(case: Case, results: Results) -> bool:
    about = results.environment
    units = str(about.get("instruction_set", ""))
    half = case.settings.get("dtype") in ("bf16", "fp16")
    return half and about["device"] == "cpu" and "AMX" not in units and "bf16 units" not in units


def machine_words(results: Results) -> str:
    """The machine, for headings: its label without trade marks."""
    return plain(results.label)


def plain(words: str) -> str:
    """A processor's name without trade marks."""
    return re.sub(r"\((R|TM)\)| Processor| CPU", "", words)


def subjects_of(cases: Iterable[Case]) -> list[str]:
    """Every subject of these cases, in the order of `LABELS`.

    Raises:
        ValueError: a result names a subject that has no label.
    """
    named = {name for case in cases for name in case.subjects}
    if unknown := sorted(named - LABELS.keys()):
        raise ValueError(
            f"results name the subject {unknown[0]!r}, which benchmarks/layers/methods.py has no label for"
        )
    return [name for name in LABELS if name in named]


def own(subject: str, text: str) -> str:
    """`text`, in bold if it is about this package."""
    return f"**{text}**" if subject == OWN and text and text != MISSING else text


def tokens(case: Case) -> str:
    """The case's tokens in words."""
    count = case.settings["tokens"]
    return "1 token" if count == 1 else f"{count:,} tokens"


def ratio(case: Case | None, subject: str, reference: str | None = None) -> str:
    """The median of the time over the reference's within a round."""
    if case is None or not _timed(case, subject) or not _timed(case, reference or case.reference):
        return MISSING
    return f"{case.ratio(subject, reference).median:.2f}"


def spread(case: Case, subject: str) -> str:
    """The same with its quartiles: ``1.28 (1.25 to 1.33)``."""
    if not _timed(case, subject) or not _timed(case, case.reference):
        return MISSING
    found = case.ratio(subject)
    return f"{found.median:.2f} ({found.lower:.2f} to {found.upper:.2f})"


def milliseconds(case: Case | None, subject: str) -> str:
    """The median time."""
    if case is None or not _timed(case, subject):
        return MISSING
    value = case.seconds(subject).median * 1e3
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def mebibytes(case: Case | None, subject: str, kind: str) -> str:
    """One kind of memory."""
    value = None if case is None or subject not in case.subjects else case.subjects[subject].bytes.get(kind)
    if value is None:
        return MISSING
    return f"{value / MEBIBYTE:,.1f}" if abs(value) < 10 * MEBIBYTE else f"{value / MEBIBYTE:,.0f}"


def _timed(case: Case, subject: str) -> bool:
    return subject in case.subjects and bool(case.subjects[subject].seconds)


def size(case: Case) -> str:
    """A layer's weight, N × K."""
    rows, columns = case.settings["out_features"], case.settings["in_features"]
    return f"{rows}²" if rows == columns else f"{rows} × {columns}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[int] = (0,)) -> str:
    """Markdown: the columns of `words` to the left, numbers to the right; columns without any number are left out."""
    cells = [list(row) for row in rows]
    kept = [i for i in range(len(headings)) if i in words or any(row[i] not in ("", MISSING) for row in cells)]
    left = [place for place, i in enumerate(kept) if i in words]
    return markdown_table([headings[i] for i in kept], [[row[i] for i in kept] for row in cells], left)


def source(results: Results) -> str:
    """Which run it is, with everything that a reader may want to know before believing it."""
    about, seen = results.environment, results.self_check
    packages = ("torch", "triton", "peft", "transformers", "dual_lora_kernels")
    check = (
        f"a planted 1.10 was seen as {seen['median']:.3f} ({seen['lower']:.3f} to {seen['upper']:.3f})"
        if seen
        else "no self-check"
    )
    facts = (
        f"load average {_number(about['load_average'])} before and {_number(results.load_average_after)} after",
        check,
        f"Python {about['python']}, " + ", ".join(f"{name} {about[name]}" for name in packages if about.get(name)),
        *([f"backends {', '.join(about['backends'])}"] if about.get("backends") else []),
    )
    commit = f" at commit {about['commit']}" if about.get("commit") else ""
    return " ".join([f"{about['date']}: `{results.command}`; {'; '.join(facts)}{commit}.", *results.notes])


def brief(machine: Machine) -> str:
    """A machine's runs in a line: dates, versions, commands."""
    runs = {
        f"{run.environment['date']}, dual_lora_kernels {run.environment['dual_lora_kernels']}"
        + (f" at {run.environment['commit']}" if run.environment.get("commit") else "")
        + f", torch {run.environment['torch']}, `{run.command}`"
        for run in machine.runs
    }
    return f"- {machine.label}: {'; '.join(sorted(runs, reverse=True))}"


def sources(runs: Iterable[Results]) -> str:
    """A list of runs."""
    return "\n".join(f"- {source(results)}" for results in runs)


def left_out(cases: Iterable[Case], describe: Callable[[Case], str]) -> Iterator[str]:
    """Sentences on what was not measured and why."""
    for case in cases:
        for name, measurement in case.subjects.items():
            if measurement.left_out:
                yield f"{LABELS[name]}, {describe(case)}: {measurement.left_out}"


def not_measured(cases: Iterable[Case], describe: Callable[[Case], str]) -> Iterator[str]:
    """The same as a list, if there is anything."""
    if missing := list(left_out(cases, describe)):
        yield "Left out:\n\n" + "\n".join(f"- {sentence}" for sentence in missing)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"
