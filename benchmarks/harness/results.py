"""What a preset of the suite has measured, as one kind of JSON document; ``results/schema.json`` describes it.

A document holds cases, a case its subjects, and a subject its time in every round. Medians, quartiles and ratios are
computed from the rounds by whoever shows them, so no two places can disagree. Documents lie in a folder for each
machine, ``results/machines/<machine>/<name>.json``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import RESULTS, write_text
from .timing import Quartiles, quartiles

MACHINES = RESULTS / "machines"
VERSION = 1
"""Of the schema; it changes when a reader of the old one would misread the new one."""
Setting = str | int | float | bool


@dataclass(frozen=True)
class Measurement:
    """One subject in one case.

    seconds: its time in every round. trainable: its trainable parameters. checked: for each thing that was compared
    before it was timed, its error against fp64 over that of the plain implementation in the same dtype (2 is allowed).
    bytes: kinds of memory, such as ``temporary`` (by PyTorch's allocator, released again),
    ``peak`` (by the allocator, results included) and ``resident`` (growth of the process, in a process of its own).
    counts: anything else that was counted, such as tokens or kernel launches. left_out: why it was not measured.
    """

    seconds: tuple[float, ...] = ()
    trainable: int | None = None
    checked: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    left_out: str | None = None


@dataclass(frozen=True)
class Case:
    """Subjects that were timed in the same rounds.

    settings: what is measured, such as kind, dtype, out_features, in_features, tokens and rank. reference: the subject
    that ratios are to.
    """

    settings: Mapping[str, Setting]
    reference: str
    subjects: Mapping[str, Measurement]

    def timed(self) -> list[str]:
        """The subjects that have times."""
        return [name for name, measurement in self.subjects.items() if measurement.seconds]

    def seconds(self, subject: str) -> Quartiles:
        """Its time."""
        return quartiles(self.subjects[subject].seconds)

    def ratio(self, subject: str, reference: str | None = None) -> Quartiles:
        """How many times the reference's time it took, round by round."""
        other = self.subjects[reference or self.reference].seconds
        pairs = zip(self.subjects[subject].seconds, other, strict=True)
        return quartiles([own / least for own, least in pairs])


@dataclass(frozen=True)
class Results:
    """One run of a preset on one machine.

    self_check: how much longer a subject seemed to take that was made to take 1.1 times as long, by quartiles of the
    ratio (``lower``, ``median``, ``upper``); empty where the run is from before there was a self-check.
    """

    preset: str
    command: str
    environment: Mapping[str, Any]
    cases: tuple[Case, ...]
    load_average_after: float | None = None
    self_check: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def machine(self) -> str:
        """The folder's name: the device and what it multiplies with, no host names."""
        about = self.environment
        if about["device"] != "cpu":
            return _slug(str(about["device"]))
        return _slug(f"{about['cpu']} {about.get('instruction_set') or ''} {about['cores']} cores")

    @property
    def label(self) -> str:
        """The machine in words."""
        about = self.environment
        if about["device"] != "cpu":
            return str(about["device"])
        return f"{about['cpu']}, {about.get('instruction_set') or 'vectors unknown'}, {about['threads']} threads"


def _slug(words: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)|Processor|CPU", "", words).lower()).strip("-")


def document(results: Results) -> dict[str, Any]:
    """The results as the schema has them."""
    return {"schema": VERSION, **dataclasses.asdict(results)}


def write(results: Results, name: str, root: Path = MACHINES) -> Path:
    """Write ``<root>/<machine>/<name>.json``, whole or not at all, and return its path."""
    folder = root / results.machine
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps(document(results), indent=1) + "\n")
    return path


def read(path: Path) -> Results:
    """The document at `path`.

    Raises:
        ValueError: it has another version than this program reads.
    """
    fields = json.loads(path.read_text(encoding="utf-8"))
    version = fields.pop("schema", None)
    if version != VERSION:
        raise ValueError(f"{path.name}: got schema {version!r}, expected {VERSION}")
    cases = tuple(
        Case(
            case["settings"],
            case["reference"],
            {name: _measurement(subject) for name, subject in case["subjects"].items()},
        )
        for case in fields.pop("cases")
    )
    return Results(**{**fields, "notes": tuple(fields.get("notes", ()))}, cases=cases)


def _measurement(fields: dict[str, Any]) -> Measurement:
    return Measurement(**{**fields, "seconds": tuple(fields.get("seconds", ()))})


def every(preset: str, root: Path = MACHINES) -> Iterator[Results]:
    """All runs of a preset, machines in the order of their names, of one machine the newest first."""
    found = [results for path in sorted(root.glob("*/*.json")) if (results := read(path)).preset == preset]
    found.sort(key=lambda results: str(results.environment["date"]), reverse=True)
    yield from sorted(found, key=lambda results: results.machine)
