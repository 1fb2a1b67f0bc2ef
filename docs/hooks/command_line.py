"""The reference of the command line is what the commands say of themselves."""

from __future__ import annotations

import argparse
import os
from typing import Any
from unittest import mock

from dual_lora_kernels import cli

MARKER = "<!-- every command's help -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' event: `MARKER` becomes a section for each command."""
    return markdown.replace(MARKER, "\n\n".join(_section(*command) for command in commands().items()))


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parsers of ``dual-lora``'s subcommands by name."""
    subparsers = argparse.ArgumentParser(prog="dual-lora").add_subparsers()
    for add in cli._SUBCOMMANDS:
        add(subparsers)
    return subparsers.choices


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    with mock.patch.dict(os.environ, COLUMNS="90"):  # argparse would ask the terminal
        return f"## dual-lora {name}\n\n```text\n{parser.format_help()}```"
