"""What the subcommands share: how an error or an interruption ends one, and a progress bar in bytes."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from typing import TypeAlias

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
            return run(arguments)
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
