"""What the subcommands share: how an error or an interruption ends one, and a progress bar in bytes."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

FAILED = 1
"""The exit status where files or values do not fit; argparse has 2 for wrong usage."""
INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""

Run = Callable[[argparse.Namespace], int]


def ends_in_words(run: Run) -> Run:
    """Make errors of files and values a line on stderr, or {"error": …} on stdout with ``--json``, and status 1."""

    @functools.wraps(run)
    def checked(arguments: argparse.Namespace) -> int:
        try:
            status = run(arguments)
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # the reader of stdout (head, say) has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush into it at the end
            return FAILED
        except (ValueError, OSError) as error:
            message = str(error)
            if arguments.json:
                print(json.dumps({"error": message}))
            else:
                print(f"dual-lora {arguments.command}: {message}", file=sys.stderr)
            return FAILED
        except KeyboardInterrupt:
            print(f"dual-lora {arguments.command}: interrupted", file=sys.stderr)
            return INTERRUPTED

    return checked


@contextmanager
def byte_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, where that is a terminal; what it yields takes (what is done, bytes done, bytes in all)."""
    columns = (
        TextColumn("{task.description}", markup=False),  # names of files may have brackets
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading")

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
