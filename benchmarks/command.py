"""The suite's command line: ``python -m benchmarks PRESET``, which ``dual-lora bench PRESET`` is too."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from rich.console import Console

from dual_lora_kernels.commands.common import FAILED, ends_in_words

from .harness.environment import environment, load_average, missing_backend
from .harness.report import print_table
from .harness.results import MACHINES, Case, Results, document, read, write
from .harness.self_check import self_check, warning
from .harness.timing import Quartiles
from .presets.arguments import count

PRESETS = ("layer", "decode", "model", "merge", "scale", "gpu")
"""Each is the file of its name in `benchmarks.presets`."""
PROG = "python -m benchmarks"
_WIDTH = 120
"""Of tables in a file or a pipe, which tell no width of their own."""
_PATHS = {"--out": "DIR", "--on-disk": "FOLDER"}
"""Options with a user's path, and what stands for it in results, which are published."""
_DESCRIPTION = "What Dual LoRA costs in time and memory, beside what it is compared with, on this machine."
_EPILOG = """\
example:
  {prog} layer --quick

{prog} PRESET --help lists a preset's options. Exit status: 0 measured, 1 something is missing or cannot be written, 2
wrong usage, 130 Ctrl-C.
"""


class Preset(Protocol):
    """A file of `benchmarks.presets`."""

    HELP: str
    """One line."""

    def add(self, parser: argparse.ArgumentParser) -> None:
        """Add the preset's own options; ``parser.set_defaults(rounds=…)`` changes a shared one's default.

        An option by which the preset measures something else gives ``document``, the results' name, another value.
        """

    def run(self, options: argparse.Namespace, console: Console) -> Results | None:
        """Measure; None where there is nothing to write.

        `main` fills in what all presets have in common, ``command``, ``self_check`` and the load average. `options`
        has, besides the preset's own, ``threads``, which PyTorch is set to already, ``rounds`` and ``quick``. A preset
        that goes on where a part of it fails puts what failed into ``options.failed``; it is said at the end, and the
        exit status is 1.
        """

    def table(self, case: Case) -> tuple[str, list[str], list[list[str]]]:
        """(title, headings, cells) for the terminal."""


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Run the command line (by default the process's) and return its exit status; 2, by SystemExit, for wrong usage."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("preset", choices=PRESETS, metavar="PRESET", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="…", help="the preset's options")
    chosen = parser.parse_args(arguments)

    @ends_in_words
    def run(early: argparse.Namespace) -> int:
        preset = load(chosen.preset)
        options = _parser(f"{prog} {chosen.preset}", preset).parse_args(chosen.options)
        return _measure(chosen.preset, preset, options, _without_paths([*shlex.split(prog), *arguments]))

    return run(argparse.Namespace(command="bench", json="--json" in chosen.options))


def load(name: str) -> Preset:
    """The preset, imported.

    Raises:
        ValueError: a package that it needs is not installed.
    """
    try:
        return cast(Preset, importlib.import_module(f"{__package__}.presets.{name}"))
    except ImportError as error:
        raise ValueError(
            f"preset {name!r} cannot be imported: {error}. The benchmarks' packages come with "
            "pip install --no-build-isolation -e '.[test]' in the project's folder"
        ) from error


def _parser(prog: str, preset: Preset) -> argparse.ArgumentParser:
    # Abbreviated options would hide paths from `_without_paths`.
    parser = argparse.ArgumentParser(prog=prog, description=preset.HELP, allow_abbrev=False)
    parser.add_argument(
        "--threads", type=count, default=torch.get_num_threads(), help="CPU threads (PyTorch's own choice: %(default)s)"
    )
    parser.add_argument("--rounds", type=count, default=7, help="timed rounds of every case (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: an impression in a minute or two, written only with --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (benchmarks/results/machines)")
    parser.add_argument("--name", type=_file_name, help="the results' file, without .json (named after the preset)")
    parser.add_argument("--json", action="store_true", help="the results as a JSON object; all else goes to stderr")
    parser.set_defaults(document=None, failed=None)
    preset.add(parser)
    return parser


def _file_name(text: str) -> str:
    if not text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file name without folders")
    return text


def _without_paths(words: Sequence[str]) -> str:
    """The command as results have it."""
    shown: list[str] = []
    for word in words:
        option, equals, _ = word.partition("=")
        if shown and shown[-1] in _PATHS:
            shown.append(_PATHS[shown[-1]])
        else:
            shown.append(f"{option}={_PATHS[option]}" if equals and option in _PATHS else word)
    return shlex.join(shown)


def _refuse_to_replace(path: Path, typed: str) -> None:
    """Raise ValueError if `path` has the results of another command, or of another number of threads."""
    if not path.exists():
        return
    other = read(path)
    found = other.command, other.environment["threads"]
    if found != (typed, torch.get_num_threads()):
        raise ValueError(
            f"--name: got {path.stem!r}, which has this machine's results of {found[0]!r} on {found[1]} threads, "
            "expected a name that is free, or the same command and threads"
        )


def _measure(name: str, preset: Preset, options: argparse.Namespace, typed: str) -> int:
    """Measure, show, write."""
    load_before = load_average()
    root: Path | None = options.out or (None if options.quick else MACHINES)
    torch.set_num_threads(options.threads)
    device: torch.device = getattr(options, "device", torch.device("cpu"))
    stem: str = options.name or options.document or name
    if root is not None:  # what cannot be written is said before minutes of work
        machine = Results(name, typed, environment(device), ()).machine
        _refuse_to_replace(root / machine / f"{stem}.json", typed)
        root.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=options.json)
    if not console.is_terminal:
        console = Console(stderr=options.json, width=_WIDTH)
    seen = self_check(device, console)
    problems = [problem for problem in (warning(seen), missing_backend(device)) if problem]
    for problem in problems:
        console.print(problem, style="bold red", markup=False)
    measured = preset.run(options, console)
    found = None if measured is None else _completed(measured, typed, load_before, seen, problems)
    if found is not None:
        _show(found, preset, console)
        if root is not None:
            console.print(f"written to {write(found, stem, root)}", markup=False)
    if root is None:
        console.print("Nothing was written: --quick without --out")
    if options.json:
        print(json.dumps(None if found is None else document(found), indent=1))
    if options.failed:
        console.print(f"failed: {options.failed}", style="bold red", markup=False)
    return FAILED if options.failed else 0


def _show(results: Results, preset: Preset, console: Console) -> None:
    """Every case's table, who was left out of it, and the notes."""
    for case in results.cases:
        shown = preset.table(case)
        print_table(*shown, console)
        said = "\n".join([shown[0], *(cell for row in shown[2] for cell in row)])
        for subject, measurement in case.subjects.items():
            if measurement.left_out and measurement.left_out not in said:
                console.print(f"left out: {subject}: {measurement.left_out}", markup=False)
    for note in results.notes:
        console.print(note, markup=False)


def _completed(
    results: Results, typed: str, load_before: float | None, seen: Quartiles, problems: Sequence[str]
) -> Results:
    """The results with what the presets leave to the command line."""
    return dataclasses.replace(
        results,
        command=typed,
        environment={**results.environment, "load_average": load_before},
        load_average_after=load_average(),
        self_check=dataclasses.asdict(seen),
        notes=(*results.notes, *problems),
    )
