"""Whether a command that the documentation shows could be typed: the program, its subcommand and its options exist."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import tomllib
from pathlib import Path

from benchmarks import command as suite
from dual_lora_kernels import cli

from .documents import ROOT, Command

_PLACEHOLDERS = ("…", "PRESET", "COMMAND")
NOT_BUILT = ("dual-lora", "extract")
"""docs/decisions.md says why there is none."""


def problem(command: Command) -> str | None:
    """What is wrong with it; None also for what is no command of this project's."""
    if command.words == NOT_BUILT:
        return None
    program, *words = command.words
    program = program.removeprefix(".venv/bin/")
    if program == "dual-lora":
        return _cli(words, command.is_whole)
    if program == "make":
        return _make(words)
    if program in ("python", "torchrun", "accelerate") and (module := _module(words)):
        return _run_module(*module, command.is_whole)
    if program == "pip" and words[:1] == ["install"]:
        return _pip(words)
    if program == "pytest":
        return _pytest(words)
    return None


def _cli(words: list[str], is_whole: bool) -> str | None:
    subparsers = argparse.ArgumentParser().add_subparsers()
    for add in cli._SUBCOMMANDS:
        add(subparsers)
    if not words or words[0] in _PLACEHOLDERS:
        return None
    if words[0] not in subparsers.choices:
        return f"no subcommand {words[0]}"
    if words[0] == "bench":
        return _suite(words[1:], is_whole)
    return _parses(subparsers.choices[words[0]], words[1:], is_whole)


def _suite(words: list[str], is_whole: bool) -> str | None:
    if not words or words[0] in _PLACEHOLDERS:
        return None
    if words[0] not in suite.PRESETS:
        return f"no preset {words[0]}"
    return _parses(suite._parser("bench", suite.load(words[0])), words[1:], is_whole)


def _parses(parser: argparse.ArgumentParser, words: list[str], is_whole: bool) -> str | None:
    if not is_whole:  # a sentence names an option, and not all that a command needs
        unknown = [word for word in words if word.startswith("--") and word not in parser._option_string_actions]
        return f"no option {unknown[0]}" if unknown else None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parser.parse_args(words)
    except SystemExit:
        return said.getvalue().splitlines()[-1]
    return None


def _make(words: list[str]) -> str | None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        if not re.search(rf"^{name}\s*\?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE):
            return f"make has no {name}"
    return None


def _module(words: list[str]) -> tuple[str, list[str]] | None:
    """(the module that is run, its words)."""
    for flag in ("-m", "--module"):
        if flag in words[:-1]:
            place = words.index(flag) + 1
            return words[place], words[place + 1 :]
    return None


def _run_module(module: str, words: list[str], is_whole: bool) -> str | None:
    """Whether it exists, and has the options: in its text, or in that of the files beside it."""
    if module == "pytest":
        return _pytest(words)
    if module == "benchmarks":
        return _suite(words, is_whole)
    if module == "dual_lora_kernels.cli":
        return _cli(words, is_whole)
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        return f"no module {module}"
    if not Path(spec.origin).is_relative_to(ROOT) or ".venv" in spec.origin:
        return None
    sources = "".join(file.read_text(encoding="utf-8") for file in Path(spec.origin).parent.glob("*.py"))
    options = [word for word in words if word.startswith("--")]
    unknown = [word for word in options if not re.search(f'"(--)?{word[2:]}"', sources)]
    return f"no option {unknown[0]}" if unknown else None


def _pip(words: list[str]) -> str | None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"\.\[([\w,]+)\]", word):
            missing = set(found[1].split(",")) - set(extras)
            if missing:
                return f"no extra {missing.pop()}"
    return None


def _pytest(words: list[str]) -> str | None:
    missing = [word for word in words if word.startswith("tests/") and not (ROOT / word.partition("::")[0]).exists()]
    return f"no {missing[0]}" if missing else None
